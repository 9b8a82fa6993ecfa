"""From a frozen dataclass to a command line: each field is a flag, its comment is the help text (tyro).

A script is a thin door: `if __name__ == "__main__": cli.run(main, Config)`. All else is importable.
"""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from nanochat.errors import Stopped, UserError

UNWIND = 2.0  # seconds


def parse(config_class: type, argv: list[str] | None = None, description: str | None = None) -> Any:
    """Return a `config_class` filled from `argv` (default: this process's). Unknown flags exit with status 2."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "--":  # `torchrun -m scripts.x -- --flag`: some launchers hand the separator on
        argv = argv[1:]
    return tyro.cli(config_class, args=argv, description=description)


def off(value: float) -> float | None:
    """-1 on the command line means None inside."""
    return None if value == -1 else value


def too_small(cfg: Any, auto: tuple[str, ...] = (), **least: float) -> list[str]:
    """A sentence for each flag that is below its least value, or not finite; one named in `auto` may also be -1."""
    found = []
    for name, low in least.items():
        value = getattr(cfg, name)
        if not (isinstance(value, str) or low <= value < math.inf or name in auto and value == -1):
            more = ", or -1" if name in auto else ""
            found.append(f"--{name.replace('_', '-')}={value} must be {low} or more{more}.")
    return found


class _Terminated(SystemExit):
    """SIGTERM, unwound like Ctrl-C so that nothing half written stays behind."""


@contextlib.contextmanager
def _unwinding_sigterm() -> Iterator[None]:
    """SIGTERM raises. Not under torchrun: a rank that waits for another inside a collective must still die of it."""
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(_number: int, _frame: Any) -> None:
        raise _Terminated(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def listening(hear: Callable[[socket.socket], None]) -> Iterator[None]:
    """Signals heard where Python runs no handler, as in compiled code or a collective: inside, `hear` runs in a thread
    and receives from a socket a byte a signal, the signal's number, and nothing more at the end.

    Only signals that have a Python handler are heard. For the main thread, which alone may ask for them.
    """
    told, listener = socket.socketpair()
    told.setblocking(False)

    def run() -> None:
        with listener:
            hear(listener)

    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=run, name="nanochat-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        told.close()
        thread.join()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM end the process although it is deep in compiled code, where no Python handler runs.

    For long work that writes no file. Who can unwind within UNWIND seconds does; else the listening thread leaves.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with listening(_leave_when_told):
        yield


def _leave_when_told(listener: socket.socket) -> None:
    while number := int.from_bytes(listener.recv(1)):
        if number in (signal.SIGINT, signal.SIGTERM):
            listener.settimeout(UNWIND)
            try:
                while listener.recv(1):
                    pass
                return
            except TimeoutError:
                os.write(2, f"\n{_stopped(number)}\n".encode())
                os._exit(128 + number)


def _stopped(number: int) -> str:
    how = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    return f"stopped by {how}: what was saved is whole; run the same command again."


def run(main: Callable[[Any], dict], config_class: type, argv: list[str] | None = None) -> None:
    """Parse, call `main(cfg)`, and leave with an exit status that a shell or scheduler can act on.

    0: done. 1: a UserError, printed as one sentence. 2: a wrong flag. 128 + n: stopped by signal n; what was saved is
    whole.
    """
    description = (sys.modules[main.__module__].__doc__ or "").strip()
    try:
        with _unwinding_sigterm():
            main(parse(config_class, argv, description))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stop:
        print(str(stop), file=sys.stderr)
        sys.exit(128 + stop.signum)
    except (KeyboardInterrupt, _Terminated) as stop:
        number = signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT
        print(_stopped(number), file=sys.stderr)
        sys.exit(128 + number)


def command(main: Callable) -> str:
    """The command line of this process for a measurement's file, without where the file goes (no machine's paths)."""
    flags = [flag for flag in sys.argv[1:] if not flag.startswith("--output")]
    name = main.__module__ if main.__module__ != "__main__" else f"scripts.{sys.argv[0].rpartition('/')[2][:-3]}"
    return " ".join(["python -m", name, *flags])
