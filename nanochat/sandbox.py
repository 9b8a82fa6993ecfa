"""The inside of `nanochat/execution.py`: builds the cage and runs code in it. Standard library only; never imported.

Started as `python sandbox.py MODE SPEC` (SPEC is JSON), in one of four modes:

    enter   new user, mount, pid, network, ipc and uts namespaces; a new root of read-only system libraries, the Python
            that runs us, and an empty /tmp; no capabilities; then a mode below, as a child of the namespace's init
    run     run the program on stdin as __main__, and report whether its last line was reached
    serve   load the solution on stdin as a module, and answer calls of its functions over a socket
    judge   run the tests on stdin against a function that calls the `serve` process; report whether all of them passed

What only one mode needs is imported there: the start-up time is paid up to four times a verdict.

`judge` and `serve` are two processes in two cages: the code under test never shares memory, files or a pid namespace
with what decides about it, and only plain values cross the socket.
"""

import builtins
import contextlib
import itertools
import json
import os
import struct
import sys

NOBODY, SIGKILL = 65534, 9
MESSAGE_LIMIT = 16 << 20  # bytes of one packed value
ITERATOR_LIMIT = 100_000  # items read from an iterator that the code under test returns
NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000  # user mnt pid net ipc uts
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # one system call number on all architectures; Linux 5.12
READ_ONLY, NOSUID, NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38


class Gone(BaseException):
    """The process under test is no longer there. Not an Exception, so that no test swallows it."""


# ---- the cage --------------------------------------------------------------------------------------------------------


def checked(status: int, what: str) -> None:
    """Raise the C library's error, naming the step."""
    import ctypes

    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class Libc:
    """The few system calls that Python 3.11 has no function for."""

    def __init__(self):
        import ctypes

        self.lib = ctypes.CDLL(None, use_errno=True)
        self.long = ctypes.c_ulong

    def mount(self, source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
        coded = [None if text is None else text.encode() for text in (source, target, kind, data)]
        status = self.lib.mount(coded[0], coded[1], coded[2], self.long(flags), coded[3])
        checked(status, f"mount {target}")

    def bind(self, source: str, target: str) -> None:
        self.mount(source, target, None, MS_BIND | MS_REC)

    def protect(self, target: str) -> None:
        """Make a mount and all below it read-only, without set-uid programs and devices."""
        attributes = struct.pack("QQQQ", READ_ONLY | NOSUID | NODEV, 0, 0, 0)
        status = self.lib.syscall(
            MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, self.long(len(attributes))
        )
        checked(status, f"mount_setattr {target}")

    def prctl(self, option: int, value: int) -> int:
        return self.lib.prctl(option, self.long(value), 0, 0, 0)


def enter(spec: dict) -> None:
    """Leave the world, then run `spec["mode"]` inside. This process stays outside the pid namespace and waits."""
    libc = Libc()
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL)
    checked(libc.lib.unshare(NAMESPACES), "unshare")
    os.write(spec["control"], b"u")
    if os.read(spec["control"], 1) != b"m":  # execution.py has mapped our users
        raise OSError("the user namespace could not be set up")
    init = os.fork()
    if init == 0:
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL)
        build_root(libc, spec)
        worker = os.fork()
        if worker == 0:
            become(libc, spec)
        reap(worker)
    reap(init)


def reap(child: int) -> None:
    """Hold nothing open, wait for `child` and whatever is orphaned, leave with its status (128 + n for signal n)."""
    os.closerange(0, 1024)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def build_root(libc: Libc, spec: dict) -> None:
    """Make `spec["root"]` (an empty folder) the whole file system, and go into its /tmp."""
    with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")  # no cages inside the cage
    with open(__file__, encoding="utf-8") as file:
        own_text = file.read()
    root = spec["root"]
    os.umask(0o022)
    libc.mount("none", "/", None, MS_REC | MS_PRIVATE)
    libc.mount("tmpfs", root, "tmpfs", NOSUID | NODEV, f"size={spec['disk']},nr_inodes=4096,mode=755")
    for path in spec["binds"]:
        place(libc, path, root + path)
    for name in ("null", "zero", "full", "random", "urandom"):
        device = f"/dev/{name}"
        touch(root + device)
        libc.bind(device, root + device)
    for path in ("/tmp", "/dev/shm"):
        os.makedirs(root + path, exist_ok=True)
        os.chmod(root + path, 0o1777)
    with open(root + "/sandbox.py", "w", encoding="utf-8") as file:
        file.write(own_text)
    os.chdir(root)
    checked(libc.lib.pivot_root(b".", b"."), "pivot_root")
    checked(libc.lib.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/tmp")


def place(libc: Libc, source: str, target: str) -> None:
    """Show `source` at `target`, read-only; a link stays a link."""
    if os.path.islink(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        touch(target)
    libc.bind(source, target)
    libc.protect(target)


def touch(path: str) -> None:
    """An empty file to mount on."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w"):
        pass


def become(libc: Libc, spec: dict) -> None:
    """Give up every privilege and become the runner."""
    os.setsid()
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability)
    if spec["nobody"]:  # the kernel's process limit binds everyone but root
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1)
    os.set_inheritable(spec["control"], False)
    inner = {name: spec[name] for name in ("limits", "report", "link") if name in spec}
    os.execve(spec["python"], [*spec["command"], "/sandbox.py", spec["mode"], json.dumps(inner)], dict(os.environ))


# ---- the runners -----------------------------------------------------------------------------------------------------


def limit(spec: dict) -> None:
    """Lower the limits for good. One that this system does not have is left out."""
    import resource

    for name, value in spec["limits"].items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def take_stdin() -> str:
    """All of stdin, which then is empty for good."""
    text = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return text


def save(name: str, text: str) -> str:
    """Write code to a file here, so that tracebacks, pickling and spawned processes find it."""
    with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(text)
    return os.path.abspath(name)


def report(spec: dict, **values) -> None:
    """Tell execution.py; the first report counts."""
    with os.fdopen(spec["report"], "w") as file:
        json.dump(values, file)


def described(error: BaseException, show: bool = False) -> str:
    """The line that Python ends a traceback with; `show` prints all of it, as Python does."""
    if isinstance(error, MemoryError):
        error.__traceback__ = None  # it holds on to what filled the memory
    import traceback

    if show:
        traceback.print_exception(error)
    return traceback.format_exception_only(error)[-1].strip()[:500]


def run(spec: dict) -> None:
    """Run the program as __main__."""
    import runpy

    path = save("program.py", take_stdin())
    sys.path.insert(0, os.getcwd())
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        report(spec, error=f"the program ended itself before its last line (SystemExit: {error.code})")
    except BaseException as error:  # noqa: BLE001 - whatever a program raises is its result
        report(spec, error=described(error, show=True), memory=isinstance(error, MemoryError))
    else:
        report(spec, success=True)


def serve(spec: dict) -> None:
    """Load the solution, then answer calls until the other side is done."""
    import socket

    sys.set_int_max_str_digits(0)  # answers may be long numbers
    link = socket.socket(fileno=spec["link"])
    module, failure = None, None
    try:
        save("solution.py", take_stdin())
        sys.path.insert(0, os.getcwd())
        module = __import__("solution")
    except BaseException as error:  # noqa: BLE001 - as above
        described(error, show=True)
        failure = error
    while (request := receive(link)) is not None:
        send(link, answer(module, failure, request))


def answer(module, failure: BaseException | None, request: list) -> dict:
    """{"value": packed} of a call, or {"raised": [type, line]}."""
    name, args, kwargs = request
    try:
        if failure is not None:
            raise failure
        return {"value": pack(getattr(module, name)(*unpack(args), **unpack(kwargs)))}
    except BaseException as error:  # noqa: BLE001 - as above
        return {"raised": [type(error).__name__, described(error)]}


def judge(spec: dict) -> None:
    """Run setup, then the tests with the function under test replaced by calls into the other process."""
    import runpy
    import socket

    sys.set_int_max_str_digits(0)
    job = json.loads(take_stdin())
    remote = Remote(socket.socket(fileno=spec["link"]), job["entry_point"])
    try:
        names = runpy.run_path(save("setup.py", job["setup"]), run_name="setup")
        names[job["entry_point"]] = remote
        names = runpy.run_path(save("tests.py", job["tests"]), init_globals=names, run_name="tests")
        if callable(names.get("check")):
            names["check"](remote)
    except Gone:
        report(spec, error="the code under test ended its process")
    except BaseException as error:  # noqa: BLE001 - as above
        report(spec, error=described(error), memory=remote.out_of_memory)
    else:
        report(spec, success=not remote.gone, error="the code under test ended its process" if remote.gone else "")


class Remote:
    """The function under test, as the tests see it."""

    def __init__(self, link, name: str):
        self.link, self.__name__ = link, name
        self.gone = self.out_of_memory = False

    def __call__(self, *args, **kwargs):
        send(self.link, [self.__name__, pack(list(args)), pack(kwargs)])
        reply = receive(self.link)
        if reply is None:
            self.gone = True
            raise Gone
        if "raised" in reply:
            kind, line = (str(text) for text in reply["raised"])
            self.out_of_memory |= kind == "MemoryError"
            known = getattr(builtins, kind, None)
            ours = isinstance(known, type) and issubclass(known, Exception)
            raise (known if ours and not issubclass(known, UnicodeError) else RuntimeError)(line)
        return unpack(reply["value"])


# ---- plain values over a socket --------------------------------------------------------------------------------------

KINDS = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": lambda items: dict(map(tuple, items)),
    "bytes": bytes,
    "complex": lambda items: complex(*items),
    "range": lambda items: range(*items),
    "iterator": iter,
}


class Other:
    """A value that cannot cross; it equals nothing."""

    def __init__(self, kind: str):
        self.kind = kind

    def __repr__(self):
        return f"<{self.kind}>"


def pack(value) -> object:
    """A value as JSON can hold it: numbers, texts and lists as they are, the rest as {"kind": ..., "items": [...]}."""
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, list):
        return [pack(item) for item in value]
    for kind in ("tuple", "set", "frozenset"):
        if isinstance(value, KINDS[kind]):
            return {"kind": kind, "items": [pack(item) for item in value]}
    if isinstance(value, dict):
        return {"kind": "dict", "items": [[pack(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"kind": "bytes", "items": list(value)}
    if isinstance(value, complex):
        return {"kind": "complex", "items": [value.real, value.imag]}
    if isinstance(value, range):
        return {"kind": "range", "items": [value.start, value.stop, value.step]}
    if hasattr(value, "__next__"):
        return {"kind": "iterator", "items": [pack(item) for item in itertools.islice(value, ITERATOR_LIMIT)]}
    return {"kind": "other", "items": type(value).__name__}


def unpack(value) -> object:
    """The plain value again: exact built-in types, whatever was packed."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    items = value["items"]
    return Other(str(items)) if value["kind"] == "other" else KINDS[value["kind"]](unpack(items))


def send(link, value) -> None:
    """Length (4 bytes), then JSON."""
    data = json.dumps(value).encode()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        link.sendall(struct.pack("!I", len(data)) + data)


def receive(link) -> dict | None:
    """The next message; None when the other side is gone or talks nonsense."""
    head = exactly(link, 4)
    size = struct.unpack("!I", head)[0] if head else MESSAGE_LIMIT + 1
    data = exactly(link, size) if size <= MESSAGE_LIMIT else None
    return None if data is None else json.loads(data)


def exactly(link, size: int) -> bytes | None:
    """`size` bytes, or None if they do not come."""
    data = bytearray()
    while len(data) < size:
        with contextlib.suppress(ConnectionResetError):
            chunk = link.recv(min(size - len(data), 1 << 20))
            if chunk:
                data += chunk
                continue
        return None
    return bytes(data)


def main() -> None:
    mode, spec = sys.argv[1], json.loads(sys.argv[2])
    del sys.argv[1:]
    if mode == "enter":
        enter(spec)
    limit(spec)
    {"run": run, "serve": serve, "judge": judge}[mode](spec)


if __name__ == "__main__":
    main()
