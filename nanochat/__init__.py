"""nanochat: train your own ChatGPT, end to end, and understand every line of it."""

import sys


def _quiet(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Ctrl-C while a program imports its libraries, before cli.run is there to hear it, needs no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]


if sys.argv[:1] == ["-m"]:  # so it is while `python -m` looks for the program; else an import changes nothing
    sys.excepthook = _quiet
