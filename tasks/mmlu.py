"""MMLU: four-choice questions over 57 school and professional subjects (arXiv 2009.03300)."""

from pathlib import Path

from nanochat.errors import UserError
from tasks import common, source

SPLITS = ("auxiliary_train", "validation", "dev", "test")


class MMLU(common.Task):
    """`MMLU("test")`; "auxiliary_train" has about 100,000 questions to learn from. "subject" stays in the example."""

    eval_type = "categorical"
    baseline = 0.25

    def __init__(self, split: str, folder: str | Path | None = None, **view):
        super().__init__(**view)
        if split not in SPLITS:
            raise UserError(f"MMLU has no split {split}: there are {', '.join(SPLITS)}.")
        self.rows = source.load(source.MMLU, "all", split, split, folder)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        example = common.multiple_choice_conversation(row["question"], row["choices"], row["answer"])
        return example | {"subject": row["subject"]}

    def evaluate(self, conversation: dict, reply) -> bool:
        return common.text_of(reply) == common.reference_of(conversation)
