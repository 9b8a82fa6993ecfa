"""After a Bash command that trained: append the run's row to the Experiment Log of CLAUDE.md, from its record."""

import json
import re
import subprocess
import sys

import common

RECIPES = r"\bruns/(speedrun|runcpu|miniseries|scaling_laws)\.sh\b"


def main() -> int:
    """Always 0; a run that has not finished (or was logged before) adds nothing."""
    command = common.shell_command(common.event())
    if not (common.launches(command) or re.search(RECIPES, command)):
        return 0
    words = [sys.executable, "-m", "scripts.report", "--log", str(common.ROOT / "CLAUDE.md")]
    done = subprocess.run(words, cwd=common.ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0 and "added" in done.stdout:
        print(json.dumps({"systemMessage": done.stdout.strip().splitlines()[-1]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
