"""GSM8K: grade-school word problems with worked answers that call a calculator (arXiv 2110.14168).

    "She sold 16 - 3 = <<16-3=13>>13 eggs.\n#### 13"

An annotation `<<expression=result>>` becomes a python part and its output, so the model learns to use the tool. A reply
is right if the number after its first "####" is the reference's, compared as numbers: "18.", "18.00", "$18" and
"1,800" are what they say (pitfall 39).
"""

import re
from pathlib import Path

from nanochat.errors import UserError
from tasks import common, source

SUBSETS, SPLITS = ("main", "socratic"), ("train", "test")
CALL = re.compile(r"<<([^<>]*)>>")
ANSWER = re.compile(
    r"####\s*(?P<sign>[-+\u2212]?)\s*[$€£]?\s*(?P<inner>[-+\u2212]?)"
    r"(?P<number>\d[\d,]*+(?:\.\d++)?|\.\d++)(?!\s*[/:]\s*\d)"  # 3/4 and 3:40 are not 3
)
MINUS = ("-", "\u2212")
TOLERANCE = 1e-6  # relative, of 1 at least: beyond it numbers differ


def final_number(text: str) -> float | None:
    """The number after the first "####" of a text, or None."""
    match = ANSWER.search(text)
    if match is None:
        return None
    number = float(match["number"].replace(",", ""))
    return -number if match["sign"] in MINUS or match["inner"] in MINUS else number


def same_number(reply: str, reference: str) -> bool:
    """Do both texts end in the same number?"""
    said, wanted = final_number(reply), final_number(reference)
    return said is not None and wanted is not None and abs(said - wanted) <= TOLERANCE * max(1.0, abs(wanted))


def parts_of(answer: str) -> list[dict]:
    """A worked answer as content parts: text, and for each annotation a call and its output."""
    parts = []
    for k, piece in enumerate(CALL.split(answer)):
        if k % 2 == 0:
            if piece:
                parts.append({"type": "text", "text": piece})
            continue
        expression, _, result = piece.rpartition("=")
        parts.append({"type": "python", "text": expression})
        parts.append({"type": "python_output", "text": result})
    return parts


class GSM8K(common.Task):
    """`GSM8K("main", "test")`."""

    eval_type = "generative"
    baseline = 0.0

    def __init__(self, subset: str, split: str, folder: str | Path | None = None, **view):
        super().__init__(**view)
        if subset not in SUBSETS or split not in SPLITS:
            raise UserError(f"GSM8K has no {subset}, {split}: subsets are {SUBSETS}, splits {SPLITS}.")
        self.rows = source.load(source.GSM8K, subset, split, split if subset == "main" else f"{subset}_{split}", folder)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": parts_of(row["answer"])},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: dict, reply) -> bool:
        return same_number(common.text_of(reply), common.text_of(common.reference_of(conversation)))
