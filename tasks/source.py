"""Where the rows of a benchmark come from: a local folder of parquet, or the Hugging Face hub at a pinned commit.

The folder is the one given, else the environment's NANOCHAT_TASKS_DIR; without either the hub is asked, through the
`datasets` library and its cache. The folder's layout is `<task>/<name>.parquet` with the hub's own column names:

    arc/ARC-Easy_test.parquet ...  mmlu/test.parquet ...  gsm8k/train.parquet ...  humaneval/test.parquet
    chat/train.parquet ...         words_alpha.txt
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import UserError

SHUFFLE_SEED = 42  # as published: the order of a benchmark is part of every "first n problems"


@dataclass(frozen=True)
class Source:
    """One data set: its place on the hub, at a commit, and its columns."""

    name: str  # also the folder's name
    repo: str
    revision: str
    columns: tuple[str, ...]


ARC = Source("arc", "allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", ("question", "choices", "answerKey"))
GSM8K = Source("gsm8k", "openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", ("question", "answer"))
HUMANEVAL = Source(
    "humaneval",
    "openai/openai_humaneval",
    "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    ("prompt", "canonical_solution", "test", "entry_point"),
)
MMLU = Source(
    "mmlu", "cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe", ("question", "subject", "choices", "answer")
)
SMOLTALK = Source("chat", "HuggingFaceTB/smol-smoltalk", "f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc", ("messages",))


class Rows:
    """The rows of a table as dicts, in a fixed shuffled order (that of `datasets`' shuffle)."""

    def __init__(self, table: Any):
        self.table = table
        self.order = np.random.default_rng(SHUFFLE_SEED).permutation(table.num_rows)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict:
        return self.table.slice(int(self.order[i]), 1).to_pylist()[0]


def folder_of(folder: str | Path | None) -> Path | None:
    """The local folder of task data: the one given, else NANOCHAT_TASKS_DIR, else None. UserError if it is missing."""
    chosen = folder or os.environ.get("NANOCHAT_TASKS_DIR")
    if not chosen:
        return None
    path = Path(chosen).expanduser()
    if not path.is_dir():
        remedy = "mend NANOCHAT_TASKS_DIR (in chat_eval --tasks-dir)"
        raise UserError(f"The folder of task data, {path}, does not exist: {remedy}.")
    return path


def load(source: Source, subset: str, split: str, file: str, folder: str | Path | None = None) -> Rows:
    """Rows of a split; `file` is its name in the folder, without .parquet. UserError says what is missing and why."""
    local = folder_of(folder)
    table = _from_hub(source, subset, split) if local is None else _from_folder(local / source.name / f"{file}.parquet")
    missing = [name for name in source.columns if name not in table.column_names]
    if missing or not table.num_rows:
        what = f"lacks the columns {', '.join(missing)}" if missing else "has no rows"
        raise UserError(f"The {split} split of {source.name} {what}: it is not the data of {source.repo}.")
    return Rows(table.select(list(source.columns)))


def _from_folder(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    if not path.exists():
        raise UserError(
            f"{path} does not exist: put the hub's parquet there, or unset NANOCHAT_TASKS_DIR (in chat_eval leave "
            "out --tasks-dir) to read it from the hub."
        )
    try:
        return pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} can't be read as parquet ({error}): it is damaged, fetch it again.") from error


def _from_hub(source: Source, subset: str, split: str) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # The HTTP library's root error is the first base of the hub's own, whichever library that is.
        return datasets.load_dataset(source.repo, subset, split=split, revision=source.revision).data.table
    except (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"The {split} split of {source.repo} can't be read from the hub ({reason}): get online once, or point "
            "NANOCHAT_TASKS_DIR (in chat_eval --tasks-dir) at a folder that holds it (layout in tasks/source.py)."
        ) from error
