"""C sources as libraries: compiled at their first use by the system's C compiler, kept in the artefact folder.

Whoever has no compiler goes without and is told so in one line. A file's name holds what it was made of (the sources,
the compiler, its flags, the processor), and it appears under that name when it is whole. It is only loaded from a
folder that nobody else can write.

NANOCHAT_KERNELS: another folder for them; set but empty: nothing is compiled.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from nanochat import paths

FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fopenmp-simd")
NATIVE = "-march=native"  # this processor's vectors
TRIED = ((NATIVE, "-mprefer-vector-width=512"), (NATIVE,), ())  # in this order: some compilers do not know them
SECONDS = 120  # for compiling: 2 on an idle machine
I, F, D, P = ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_void_p


class Unavailable(Exception):
    """Why there is no library, and the remedy."""


def struct(name: str, **members: type) -> type[ctypes.Structure]:
    """A ctypes class with these members, in order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(members.items())})


def opened(path: Path) -> ctypes.CDLL:
    """A compiled file, loaded."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} can't be loaded ({error}): remove it, it will be made again.") from error


def made(source: Path, *more: str) -> Path:
    """The file that the cache has of this source with these flags, made if need be."""
    place = folder()
    compiler = find_compiler()
    errors = ""
    for machine in TRIED:
        flags = (*FLAGS, *more, *machine)
        path = place / f"{source.stem}-{key(compiler, flags)}.so"
        if path.exists():
            return path
        errors = build(compiler, flags, source, path)
        if not errors:
            return path
    raise Unavailable(f"{compiler} failed ({errors}); set CC to another compiler.")


def folder() -> Path:
    """Where compiled files lie: a folder of ours that nobody else can write."""
    named = os.environ.get("NANOCHAT_KERNELS")
    if named is not None and not named.strip():
        raise Unavailable("NANOCHAT_KERNELS is set and empty; unset it to have it compiled.")
    if os.name != "posix":
        raise Unavailable(f"it is written for POSIX systems, and this is {sys.platform}.")
    path = Path(named).expanduser() if named else paths.base_dir() / "kernels"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = path.stat()
    except OSError as error:
        raise Unavailable(f"{path} can't be made ({error.strerror}); point NANOCHAT_KERNELS elsewhere.") from error
    if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o022:
        raise Unavailable(f"others can write {path}: make it yours alone (chmod 700).")
    return path


def find_compiler() -> str:
    """The path of CC, or of the first C compiler there is."""
    asked = os.environ.get("CC")
    for name in (asked,) if asked else ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    raise Unavailable(f"there is no C compiler ({asked or 'cc, gcc or clang'}): install one, such as gcc.")


def key(compiler: str, flags: tuple[str, ...]) -> str:
    """A name for what this compiler makes of this source on this processor."""
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{compiler} does not run ({error}): set CC to another compiler.") from error
    parts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("cpu_*.[ch]"))]
    parts += [compiler.encode(), version, " ".join(flags).encode(), processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def processor() -> str:
    """What decides which instructions the compiler may use here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.split("\t")[0].strip() in ("model name", "flags", "Features", "CPU part")}
    return "\n".join([platform.machine(), platform.processor(), *sorted(told)])


def build(compiler: str, flags: tuple[str, ...], source: Path, path: Path) -> str:
    """Compile `source` to `path`, whole or not at all -> the first line of what went wrong, empty if nothing did."""
    try:
        handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=".so", dir=path.parent)
    except OSError as error:
        raise Unavailable(
            f"{path.parent} can't be written ({error.strerror}); point NANOCHAT_KERNELS elsewhere."
        ) from error
    os.close(handle)
    try:
        command = [compiler, *flags, str(source), "-o", name, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
        if done.returncode:
            return next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
        os.replace(name, path)
        return ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        Path(name).unlink(missing_ok=True)
