"""Conversations of your own, such as who the model is: one a line, as a JSON list of messages.

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Ada, made by me."}]

A line may also be an object with that list under "messages". All lines are read and checked at once: a line that is no
conversation, an empty file or a missing one ends with a sentence, never with silently fewer examples (pitfall 53).
"""

import json
from pathlib import Path

from nanochat import chat
from nanochat.errors import UserError
from tasks import common


class CustomJSON(common.Task):
    """`CustomJSON("identity.jsonl")`."""

    def __init__(self, path: str | Path, **view):
        super().__init__(**view)
        self.conversations = read(Path(path).expanduser())

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> dict:
        return self.conversations[index]


def read(path: Path) -> list[dict]:
    """The conversations of a file; blank lines are skipped. UserError with the number of the first wrong line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a JSON string may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path} can't be read ({why}): give the path of a file with a conversation a line.") from error
    conversations = [_conversation(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not conversations:
        raise UserError(f"{path} holds no conversation: write one a line, as a JSON list of messages.")
    return conversations


def _conversation(path: Path, number: int, line: str) -> dict:
    try:
        value = json.loads(line)
        conversation = {"messages": value} if isinstance(value, list) else value
        chat.check(conversation)
        if not any(message["role"] == "assistant" for message in conversation["messages"]):
            raise UserError("This is not a conversation: it has no answer to learn from.")
    except (ValueError, UserError) as error:
        why = f"it is not JSON ({error})" if isinstance(error, ValueError) else str(error).partition(": ")[2]
        raise UserError(f"Line {number} of {path} is not a conversation: {why.rstrip('.')}.") from error
    return {"messages": conversation["messages"]}
