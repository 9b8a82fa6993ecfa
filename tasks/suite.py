"""The tasks that a chat model is judged by, by name: the published six, and the embedded world's three.

ChatCORE is the centred mean of one suite: that of the corpus the model was pretrained on.
"""

from collections.abc import Iterable
from pathlib import Path

from nanochat.errors import UserError
from tasks import common
from tasks.arc import ARC
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee
from tasks.tinyworld import TinyWorldFacts, TinyWorldSums

PUBLISHED = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
TINYWORLD = ("facts", "choice", "sums")
SPELLING_ITEMS = 256  # as published
TINYWORLD_ITEMS = 1000


def names(dataset: str) -> tuple[str, ...]:
    """The suite of a model pretrained on `dataset`."""
    return TINYWORLD if dataset == "tinyworld" else PUBLISHED


def check(wanted: Iterable[str]) -> None:
    """UserError if one of the names is no task."""
    unknown = [name for name in wanted if name not in PUBLISHED + TINYWORLD]
    if unknown:
        raise UserError(f"There is no task {', '.join(unknown)}: choose of {', '.join(PUBLISHED + TINYWORLD)}.")


def make(name: str, folder: str | Path | None = None, allow_unsafe: bool = False) -> common.Task:
    """A task's test split. folder: local task data (tasks/source.py). allow_unsafe: run code without isolation."""
    check([name])
    makers = {
        "ARC-Easy": lambda: ARC("ARC-Easy", "test", folder),
        "ARC-Challenge": lambda: ARC("ARC-Challenge", "test", folder),
        "MMLU": lambda: MMLU("test", folder),
        "GSM8K": lambda: GSM8K("main", "test", folder),
        "HumanEval": lambda: HumanEval("test", folder, allow_unsafe),
        "SpellingBee": lambda: SpellingBee("test", SPELLING_ITEMS, folder),
        "facts": lambda: TinyWorldFacts("open", "test", TINYWORLD_ITEMS),
        "choice": lambda: TinyWorldFacts("choice", "test", TINYWORLD_ITEMS),
        "sums": lambda: TinyWorldSums("test", TINYWORLD_ITEMS),
    }
    return makers[name]()
