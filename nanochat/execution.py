"""Running code that a model wrote, so that it can do no harm and cannot talk its way to a pass.

    execute(program)                                  did the program reach its last line?
    judge(solution, tests, entry_point, setup="")     does the solution's function pass the tests?

Each call starts fresh processes in a cage (nanochat/sandbox.py): new user, mount, pid, network, ipc and uts namespaces;
a root of read-only system libraries, the Python that runs us without its site-packages, and an empty /tmp of its own;
no capabilities, no network, four environment variables; limits on CPU time, address space, processes, file size, open
files and core dumps. At the timeout, or when the program ends, everything in its pid namespace dies, grandchildren
included. Of stdout and stderr the first `Limits.output` bytes are kept; the rest is read and dropped.

What a verdict is worth. `execute` reports that the last line was reached, so sys.exit(0), os._exit(0) or SystemExit
before it is a failure; but the program shares its interpreter with the reporter, and code made for that could forge the
report. In `judge` there is nothing to forge: the tests run in another process in another cage, the code under test sees
only the arguments of each call, and its answers come back as plain values of exact built-in types. It may still guess
the answers from the arguments, as any code may.

Not covered: faults of the kernel (put a container or a virtual machine around it all), side channels, the memory of all
its processes together (each is limited by itself, and so is their number, save under bubblewrap started by root).
Third-party packages are not there.

Where namespaces are not to be had (a hardened container, macOS), bubblewrap is used if installed; else UserError,
unless `allow_unsafe=True`: then a plain child process with the limits (but for the number of processes), a temporary
folder and the bare environment, but with the user's files and network within reach.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from nanochat.errors import UserError

SANDBOX = Path(__file__).with_name("sandbox.py")
PYTHON_FLAGS = ["-s", "-S", "-P", "-B", "-X", "utf8"]  # no site-packages, no imports from odd places, no .pyc files
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
NOBODY = 65534
KERNEL_NEEDED = (5, 14)  # first to count processes per namespace; read-only mounts of trees came with 5.12
SETUP_SECONDS = 10.0  # allowed for building a cage, beyond the program's own time


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    timeout: float = 5.0  # seconds of wall time, about 0.1 of it for the cage; twice that of CPU time
    memory: int = 256 << 20  # bytes of address space, each process
    output: int = 64 << 10  # bytes kept of stdout, and of stderr
    processes: int = 48  # processes and threads together
    file_size: int = 16 << 20  # bytes of one file
    disk: int = 64 << 20  # bytes of all its files
    open_files: int = 128

    def resource_limits(self) -> dict[str, int]:
        """By the names of setrlimit(2)."""
        cpu = int(2 * self.timeout) + 1
        limits = {"CPU": cpu, "AS": self.memory, "FSIZE": self.file_size, "NOFILE": self.open_files, "CORE": 0}
        return limits | ({"NPROC": self.processes} if self.processes else {})


@dataclass(frozen=True)
class Result:
    """What became of a program."""

    success: bool
    stdout: str
    stderr: str
    error: str = ""  # one line; empty on success
    timed_out: bool = False
    out_of_memory: bool = False  # MemoryError was raised, not merely printed


def execute(program: str, limits: Limits = Limits(), allow_unsafe: bool = False) -> Result:
    """Run `program` as __main__; success means that its last line was reached and it then ended in time."""
    return _execute(program, limits, isolation(allow_unsafe))


def _execute(program: str, limits: Limits, how: str) -> Result:
    payload = program.encode("utf-8", "surrogatepass")
    with _pipe() as (told, report), Child(how, "run", limits, payload, report=report.fileno()) as child:
        report.close()
        return Pump([child], told, limits).until_end(of=child).result(child)


def judge(
    solution: str, tests: str, entry_point: str, setup: str = "", limits: Limits = Limits(), allow_unsafe: bool = False
) -> Result:
    """Do the `tests` pass when `entry_point` of `solution` is called from them?

    setup: trusted code that the tests may use, run before them. tests: trusted code; if it defines `check`, that is
    called with the function. stdout and stderr are the solution's.
    """
    how = isolation(allow_unsafe)
    code = solution.encode("utf-8", "surrogatepass")
    job = json.dumps({"setup": setup, "tests": tests, "entry_point": entry_point}).encode()
    roomy = dataclasses.replace(limits, memory=2 * limits.memory)
    with _pipe() as (told, report), _ends() as (one, other):
        served = Child(how, "serve", limits, code, link=one.fileno())
        judging = Child(how, "judge", roomy, job, report=report.fileno(), link=other.fileno())
        with served, judging:
            for end in (report, one, other):  # so that each side sees the other's death
                end.close()
            return Pump([served, judging], told, limits).until_end(of=judging).result(served)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(read end, write end) of a pipe, as unbuffered files."""
    told, report = os.pipe()
    with open(told, "rb", 0) as reader, open(report, "wb", 0) as writer:
        yield reader, writer


@contextlib.contextmanager
def _ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a socket."""
    one, other = socket.socketpair()
    with one, other:
        yield one, other


# ---- which cage ------------------------------------------------------------------------------------------------------


class NotIsolated(UserError):
    """Code that a model wrote can't be kept apart from this machine."""


def isolation(allow_unsafe: bool = False) -> str:
    """ "namespaces", "bubblewrap", or "none" when that was allowed; NotIsolated with the reasons when it was not."""
    how, reasons = _isolation()
    if how == "none" and not allow_unsafe:
        raise NotIsolated(
            f"This machine can't isolate code that a model wrote ({'; '.join(reasons)}): allow user namespaces, "
            "install bubblewrap, leave out tasks that run code, or use --allow-unsafe-code of scripts.chat_eval where "
            "nothing can be harmed."
        )
    return how


@functools.cache
def _isolation() -> tuple[str, list[str]]:
    """The first cage that works, tried out with an empty program, and why those before it do not."""
    reasons = []
    for how in ("namespaces", "bubblewrap"):
        reason = _missing(how)
        if reason is None:
            result = _execute("", Limits(), how)
            reason = None if result.success else result.error + result.stderr[-200:].strip()
        if reason is None:
            return how, reasons
        reasons.append(f"{how}: {reason}")
    return "none", reasons


def _missing(how: str) -> str | None:
    if sys.platform != "linux":
        return f"not on {sys.platform}"
    if how == "bubblewrap":
        return None if shutil.which("bwrap") else "not installed"
    release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    return None if release >= KERNEL_NEEDED else f"Linux {platform.release()} is older than 5.14"


@functools.cache
def visible_paths() -> list[str]:
    """What the cage shows of this machine: the dynamic libraries, the interpreter and its standard library."""
    base = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_exec_prefix})
    wanted = {*SYSTEM_LIBRARIES, base["stdlib"], base["platstdlib"], _python(), f"{sys.base_prefix}/lib"}
    there = sorted(path for path in wanted if os.path.exists(path))  # parents come before what they hold
    return [path for path in there if not any(path.startswith(other + "/") for other in there)]


def _python() -> str:
    return os.path.realpath(sys.executable)


# ---- one caged process -----------------------------------------------------------------------------------------------


class Child:
    """A process running sandbox.py in `mode`, in the cage `how`, `payload` on its stdin; leaving it kills it all."""

    def __init__(self, how: str, mode: str, limits: Limits, payload: bytes, **descriptors: int):
        self.how, self.mode, self.limits = how, mode, limits
        self.descriptors = descriptors  # name -> fd: "report" and "link"
        self.payload = payload

    def __enter__(self) -> "Child":
        self.folder = tempfile.mkdtemp(prefix="nanochat-run-")
        ours, control = socket.socketpair()
        with ours, control, tempfile.TemporaryFile() as stdin:
            stdin.write(self.payload)
            stdin.seek(0)
            try:
                self.process = subprocess.Popen(
                    self._command(control.fileno()),
                    stdin=stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=self._environment(),
                    cwd=self.folder,
                    start_new_session=True,
                    pass_fds=[*self.descriptors.values(), control.fileno()],
                )
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
            control.close()
            if self.how == "namespaces":
                self._map_users(ours)
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        home = self.folder if self.how == "none" else "/tmp"
        # A fixed hash seed makes verdicts repeatable; one malloc arena keeps threads within the address space.
        return {"PATH": "/usr/bin:/bin", "HOME": home, "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}

    def _command(self, control: int) -> list[str]:
        limits = self.limits if self.how != "none" else dataclasses.replace(self.limits, processes=0)
        inner = {**self.descriptors, "limits": limits.resource_limits()}
        python = [_python(), *PYTHON_FLAGS]
        if self.how == "bubblewrap":
            return [*_bubblewrap(), *python, "/sandbox.py", self.mode, json.dumps(inner)]
        if self.how == "none":
            return [*python, str(SANDBOX), self.mode, json.dumps(inner)]
        outer = {
            "mode": self.mode,
            "control": control,
            "root": self.folder,
            "disk": self.limits.disk,
            "binds": visible_paths(),
            "python": _python(),
            "command": python,
            "nobody": _can_be_nobody(),
        }
        return [*python, str(SANDBOX), "enter", json.dumps(inner | outer)]

    def _map_users(self, control: socket.socket) -> None:
        """Wait until the child has its user namespace, then say who is who in it; failure shows as the child's end."""
        control.settimeout(SETUP_SECONDS)
        with contextlib.suppress(OSError):
            if control.recv(1) == b"u":
                write_user_maps(self.process.pid, _can_be_nobody())
                control.sendall(b"m")


def _can_be_nobody() -> bool:
    """Root may become nobody in the cage, which it must, as the kernel's process limit does not bind root."""
    return os.geteuid() == 0


def write_user_maps(pid: int, nobody: bool) -> None:
    """Root inside is us outside; root outside may also use `nobody`."""
    folder = Path(f"/proc/{pid}")
    if not nobody:
        (folder / "setgroups").write_text("deny")
    more = f"\n{NOBODY} {NOBODY} 1" if nobody else ""
    (folder / "uid_map").write_text(f"0 {os.geteuid()} 1{more}\n")
    (folder / "gid_map").write_text(f"0 {os.getegid()} 1{more}\n")


def _bubblewrap() -> list[str]:
    """The same cage by bwrap(1)."""
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--dev", "/dev"]
    for path in visible_paths():
        command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    return [*command, "--ro-bind", str(SANDBOX), "/sandbox.py", "--tmpfs", "/tmp", "--chdir", "/tmp"]


# ---- reading what it says --------------------------------------------------------------------------------------------


@dataclass
class Pump:
    """Reads the children's streams and the report, keeping no more than the limit of each, until the time is up."""

    children: list[Child]
    told: IO[bytes]  # read end of the report's pipe
    limits: Limits
    kept: dict = field(default_factory=dict)
    timed_out: bool = False

    def until_end(self, of: Child) -> "Pump":
        """Read until `of` has ended or its time is over."""
        streams = [stream for child in self.children for stream in (child.process.stdout, child.process.stderr)]
        deadline = time.monotonic() + self.limits.timeout
        with selectors.DefaultSelector() as selector:
            for stream in (*streams, self.told):
                selector.register(stream, selectors.EVENT_READ)
            while of.process.poll() is None and not self.timed_out:
                self._read(selector, wait=min(0.02, max(0.0, deadline - time.monotonic())))
                self.timed_out = time.monotonic() > deadline
            while self._read(selector, wait=0.0) and time.monotonic() < deadline + 1:  # what was written before the end
                pass
        self.status = of.process.poll()
        return self

    def _read(self, selector: selectors.BaseSelector, wait: float) -> int:
        """One round; returns the number of bytes read."""
        total = 0
        for key, _ in selector.select(wait) if selector.get_map() else []:
            data = os.read(key.fd, 1 << 16)
            if not data:
                selector.unregister(key.fileobj)
            buffer = self.kept.setdefault(key.fd, bytearray())
            buffer += data[: self.limits.output - len(buffer)]
            total += len(data)
        return total

    def _text(self, stream) -> str:
        return bytes(self.kept.get(stream.fileno(), b"")).decode("utf-8", "replace")

    def result(self, shown: Child) -> Result:
        """The verdict, with the output of `shown`. No report means failure, whatever the exit status says."""
        try:
            report = json.loads(bytes(self.kept.get(self.told.fileno(), b"")) or "{}")
        except ValueError:
            report = {}
        report = report if isinstance(report, dict) else {}
        success = report.get("success") is True and not self.timed_out
        error = "" if success else self._reason(report)
        out, err = self._text(shown.process.stdout), self._text(shown.process.stderr)
        return Result(success, out, err, error, self.timed_out, report.get("memory") is True)

    def _reason(self, report: dict) -> str:
        if self.timed_out:
            return f"not done after {self.limits.timeout:g} s"
        return str(report.get("error") or f"the process ended without reaching its last line (status {self.status})")[
            :500
        ]
