"""The tasks that a chat model is judged by, by name: the published six, and the embedded world's three.

ChatCORE is the centred mean of one suite: that of the corpus the model was pretrained on.
"""

from collections.abc import Iterable
from pathlib import Path

from nanochat.errors import UserError
from nanochat.execution import NotIsolated
from nanochat.runtime import Runtime
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


def is_whole(judged: Iterable[str]) -> bool:
    """Whether these tasks are a suite, so that their mean may be called ChatCORE."""
    return set(judged) in (set(PUBLISHED), set(TINYWORLD))


def whole(
    dataset: str, runtime: Runtime, folder: str | Path | None = None, allow_unsafe: bool = False
) -> tuple[dict[str, common.Task], list[str]]:
    """The suite of a model pretrained on `dataset`, less what some machine of the run cannot run, and why.

    For what asks for no task by name: a recipe must not end at HumanEval because it runs in a container. Collective.
    """
    made, notes = {}, []
    for name in names(dataset):
        try:
            made[name] = make(name, folder, allow_unsafe)
        except NotIsolated as error:
            notes.append(f"{name} is left out, and without it there is no ChatCORE. {error}")
    everywhere = runtime.gather([list(made), notes])
    kept = {name: task for name, task in made.items() if all(name in those for those, _ in everywhere)}
    return kept, max((sentences for _, sentences in everywhere), key=len)


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
