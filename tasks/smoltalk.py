"""SmolTalk: general conversations to train on, the selection for small models (smol-smoltalk, arXiv 2502.02737)."""

from pathlib import Path

from nanochat import chat
from nanochat.errors import UserError
from tasks import common, source


class SmolTalk(common.Task):
    """`SmolTalk("train")`: about 460,000 conversations, "test" 24,000; some begin with a system message."""

    def __init__(self, split: str, folder: str | Path | None = None, **view):
        super().__init__(**view)
        if split not in ("train", "test"):
            raise UserError(f"SmolTalk has no split {split}: there are train and test.")
        self.rows = source.load(source.SMOLTALK, "default", split, split, folder)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        conversation = {"messages": self.rows[index]["messages"]}
        chat.check(conversation)
        return conversation
