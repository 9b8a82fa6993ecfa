"""From a frozen dataclass to a command line: each field is a flag, its comment is the help text (tyro).

A script is a thin door: `if __name__ == "__main__": cli.run(main, Config)`. All else is importable.
"""

import sys
from collections.abc import Callable
from typing import Any

from nanochat.errors import Stopped, UserError


def parse(config_class: type, argv: list[str] | None = None, description: str | None = None) -> Any:
    """Return a `config_class` filled from `argv` (default: this process's). Unknown flags exit with status 2."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "--":  # `torchrun -m scripts.x -- --flag`: some launchers hand the separator on
        argv = argv[1:]
    return tyro.cli(config_class, args=argv, description=description)


def run(main: Callable[[Any], dict], config_class: type, argv: list[str] | None = None) -> None:
    """Parse, call `main(cfg)`, and leave with an exit status that a shell or scheduler can act on.

    0: done. 1: a UserError, printed as one sentence. 2: a wrong flag. 128 + n: stopped by signal n, all saved.
    """
    description = (sys.modules[main.__module__].__doc__ or "").strip()
    try:
        main(parse(config_class, argv, description))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stop:
        print(str(stop), file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


def command(main: Callable) -> str:
    """The command line of this process for a measurement's file, without where the file goes (no machine's paths)."""
    flags = [flag for flag in sys.argv[1:] if not flag.startswith("--output")]
    name = main.__module__ if main.__module__ != "__main__" else f"scripts.{sys.argv[0].rpartition('/')[2][:-3]}"
    return " ".join(["python -m", name, *flags])
