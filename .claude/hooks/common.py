"""What the hooks share: the event on stdin, and the training launches within a shell command."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("scripts.base_train", "scripts.chat_sft", "scripts.chat_rl")


class Launch(NamedTuple):
    """One training stage that a command starts: its module, its flags, on how many ranks."""

    module: str
    flags: list[str]
    world: int


def event() -> dict:
    """The hook's event: a JSON object on stdin; an empty one if there is none (then there is nothing to do)."""
    try:
        value = json.load(sys.stdin)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def shell_command(of: dict) -> str:
    """The command of a Bash event, else empty."""
    return str((of.get("tool_input") or {}).get("command") or "") if of.get("tool_name") == "Bash" else ""


def launches(command: str) -> list[Launch]:
    """The training stages that a shell command starts; `--help` starts nothing."""
    found = []
    plain = re.sub(r"\d?>>?\s*(&\d|\S+)", " ", command.replace("\\\n", " "))  # without redirections
    for part in re.split(r"&&|\|\||[;|&\n]", plain):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # an unclosed quote: not a command we can read
            continue
        module = next((word for word in words if word in STAGES), None)
        if module is None or "-m" not in words[: words.index(module)]:
            continue
        before, flags = words[: words.index(module)], words[words.index(module) + 1 :]
        if not {"--help", "-h"} & set(flags):
            found.append(Launch(module, [word for word in flags if word != "--"], ranks(before)))
    return found


def ranks(words: list[str]) -> int:
    """Ranks that torchrun's own flags ask for: nodes times processes, 1 without them."""
    text = " ".join(words)
    count = 1
    for name in (r"nproc[_-]per[_-]node", "nnodes"):
        match = re.search(rf"--{name}[= ](\d+)", text)
        count *= int(match[1]) if match else 1
    return count


def warn(text: str) -> None:
    """Tell the user and the assistant something, and let the command run."""
    where = {"hookEventName": "PreToolUse", "additionalContext": text}
    print(json.dumps({"systemMessage": text, "hookSpecificOutput": where}))
