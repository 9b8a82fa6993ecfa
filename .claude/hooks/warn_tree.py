"""Before a Bash command: warn when training starts from a tree with uncommitted changes, which no record can name."""

import subprocess
import sys

import common

SHOWN = 5  # files named


def changed() -> list[str]:
    """Tracked files with changes that are not committed; CLAUDE.md is not code, and its log grows by itself."""
    words = ["git", "status", "--porcelain", "--untracked-files=no"]
    done = subprocess.run(words, cwd=common.ROOT, capture_output=True, text=True, check=False)
    return [line[3:] for line in done.stdout.splitlines() if line[3:] != "CLAUDE.md"]


def main() -> int:
    """Always 0: the command may run."""
    if common.launches(common.shell_command(common.event())) and (files := changed()):
        more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
        common.warn(
            f"Uncommitted changes in {', '.join(files[:SHOWN])}{more}: commit first, so that the run can be repeated "
            "from the commit that its report names."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
