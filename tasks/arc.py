"""ARC: grade-school science questions with mostly four choices (arXiv 1803.05457); Easy and Challenge."""

from pathlib import Path

from nanochat.errors import UserError
from tasks import common, source

SUBSETS = ("ARC-Easy", "ARC-Challenge")
SPLITS = ("train", "validation", "test")


class ARC(common.Task):
    """`ARC("ARC-Easy", "test")`. Letters are the data's own labels: A to E, in some items 1 to 5."""

    eval_type = "categorical"
    baseline = 0.25  # chance, as published; a few items have three or five choices

    def __init__(self, subset: str, split: str, folder: str | Path | None = None, **view):
        super().__init__(**view)
        if subset not in SUBSETS or split not in SPLITS:
            raise UserError(f"ARC has no {subset}, {split}: subsets are {SUBSETS}, splits {SPLITS}.")
        self.rows = source.load(source.ARC, subset, split, f"{subset}_{split}", folder)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        letters, choices = row["choices"]["label"], row["choices"]["text"]
        messages = [
            {"role": "user", "content": common.multiple_choice(row["question"], choices, letters)},
            {"role": "assistant", "content": row["answerKey"]},
        ]
        return {"messages": messages, "letters": letters}

    def evaluate(self, conversation: dict, reply) -> bool:
        return common.text_of(reply) == common.reference_of(conversation)
