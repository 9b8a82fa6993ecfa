"""HumanEval: write a Python function from its signature and docstring; hidden tests decide (arXiv 2107.03374).

The model's code runs in a cage and the tests in another (nanochat/execution.py). What counts as its code is the first
fenced block of the reply, or all of it, put behind the prompt, so that imports and helpers of the prompt are there and
a reply may give the whole function or only its body.
"""

import re
from pathlib import Path

from nanochat import execution
from nanochat.errors import UserError
from tasks import common, source

FENCE = re.compile(r"```[a-zA-Z0-9]*[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def code_of(text: str) -> str:
    """The first fenced block, closed or not, or the whole text."""
    match = FENCE.search(text)
    return match[1] if match else text


class HumanEval(common.Task):
    """`HumanEval()`: 164 problems. `allow_unsafe` runs code where it cannot be isolated (execution.isolation)."""

    eval_type = "generative"
    baseline = 0.0

    def __init__(
        self,
        split: str = "test",
        folder: str | Path | None = None,
        allow_unsafe: bool = False,
        limits: execution.Limits | None = None,
        **view,
    ):
        super().__init__(**view)
        if split != "test":
            raise UserError(f"HumanEval has no split {split}: there is only test.")
        execution.isolation(allow_unsafe)  # say now, not after the model has written everything, that it can't be run
        self.allow_unsafe, self.limits = allow_unsafe, limits or execution.Limits()
        self.rows = source.load(source.HUMANEVAL, "openai_humaneval", split, split, folder)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]},
        ]
        return {"messages": messages, "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation: dict, reply) -> bool:
        prompt = conversation["messages"][0]["content"]
        result = execution.judge(
            f"{prompt}\n{code_of(common.text_of(reply))}\n",
            conversation["test"],
            conversation["entry_point"],
            setup=prompt,
            limits=self.limits,
            allow_unsafe=self.allow_unsafe,
        )
        return result.success
