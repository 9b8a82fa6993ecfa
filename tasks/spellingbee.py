"""Spelling and counting letters: what a model that reads tokens, not letters, has to learn by rote and by tool.

SpellingBee asks how often a letter stands in a word. The model answer spells the word, counts by hand, checks itself
with the calculator's `'word'.count('letter')` and ends "#### n". SimpleSpelling only spells: "apple:a,p,p,l,e".
Examples are made from their number alone: example i is the same on every machine with the same word list.

The words are `words_alpha.txt` (370,000 English words) of the folder of task data or of NANOCHAT_BASE_DIR, fetched
there once if the network allows, else tinyworld's vocabulary; `.words_from` says which.
"""

import functools
import logging
import os
import random
import re
from pathlib import Path

from nanochat import paths
from nanochat.errors import UserError
from nanochat.tinyworld import facts, world
from tasks import common, source
from tasks.gsm8k import same_number

WORDS_FILE = "words_alpha.txt"
WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/master/words_alpha.txt"
TEST_OFFSET = 10_000_000  # seeds of the test split, as published: beyond every training index
SPELLING_SEEDS = 20_000_000  # SimpleSpelling draws its words from other seeds
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LETTER_FROM_WORD, LOWER_CASED, QUESTION_MARK = 0.9, 0.3, 0.5  # shares of the examples, as published
QUOTES = ("", "", "'", '"', "`")

# {letter} and {word} stand in it with or without quotes; a question mark may follow.
TEMPLATES = (
    "How many {letter} are in {word}",
    "How many {letter} are there in {word}",
    "How many {letter}s are in the word {word}",
    "How many times does {letter} appear in {word}",
    "How many times does the letter {letter} occur in the word {word}",
    "How often does {letter} come up in {word}",
    "How often is the letter {letter} used in {word}",
    "Count the {letter} in {word}",
    "Count the letter {letter} in {word}",
    "Please count how many {letter} the word {word} has",
    "Can you count the {letter}s in {word}",
    "Could you tell me how many {letter} {word} contains",
    "Tell me the number of {letter} in {word}",
    "What is the number of {letter}s in {word}",
    "What is the count of the letter {letter} in {word}",
    "In {word}, how many {letter} do you see",
    "In the word {word}, how many times is there a {letter}",
    "Number of {letter} in {word}",
    "Given the word {word}, count the letter {letter}",
    "Look at {word}. How many {letter} does it have",
    "Does {word} have the letter {letter}, and how many times",
    "I wonder how many {letter} {word} has",
    "{word}: how many {letter}",
    "{letter} in {word}, how many",
    "Spell {word} and count the letter {letter}",
    "If I write {word}, how many {letter} do I write",
    # Spanish
    "¿Cuántas {letter} hay en {word}",
    "¿Cuántas veces aparece la letra {letter} en {word}",
    "Cuenta las {letter} de la palabra {word}",
    # French
    "Combien de {letter} y a-t-il dans {word}",
    "Combien de fois la lettre {letter} apparaît-elle dans {word}",
    "Compte les {letter} du mot {word}",
    # German
    "Wie viele {letter} sind in {word}",
    "Wie oft kommt der Buchstabe {letter} in {word} vor",
    "Zähle die {letter} in {word}",
    # Italian
    "Quante {letter} ci sono in {word}",
    "Quante volte compare la lettera {letter} in {word}",
    # Portuguese
    "Quantas letras {letter} existem em {word}",
    "Quantas vezes a letra {letter} aparece em {word}",
    # Dutch
    "Hoeveel keer staat de letter {letter} in {word}",
    # Polish
    "Ile razy litera {letter} występuje w słowie {word}",
    # Turkish
    "{word} kelimesinde kaç tane {letter} var",
    # Russian
    "Сколько букв {letter} в слове {word}",
    # Chinese, Japanese, Korean
    "{word} 里有多少个 {letter}",
    "单词 {word} 中字母 {letter} 出现了几次",
    "{word} に {letter} はいくつありますか",
    "{word}에 {letter}가 몇 개 있나요",
)


class SpellingBee(common.Task):
    """`SpellingBee("train", size=80_000)`: how often does a letter stand in a word?"""

    eval_type = "generative"
    baseline = 0.0

    def __init__(self, split: str = "test", size: int = 256, folder: str | Path | None = None, **view):
        super().__init__(**view)
        self.size, self.offset = checked_size(size), offset_of(split)
        self.words, self.words_from = word_list(folder)

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        rng = random.Random(self.offset + index)
        word = rng.choice(self.words)
        letter = rng.choice(word if rng.random() < LETTER_FROM_WORD else LETTERS)
        messages = [
            {"role": "user", "content": question(rng, word, letter)},
            {"role": "assistant", "content": answer(word, letter)},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: dict, reply) -> bool:
        return same_number(common.text_of(reply), common.text_of(common.reference_of(conversation)))


class SimpleSpelling(common.Task):
    """`SimpleSpelling("train", size=200_000)`: spell a word."""

    eval_type = "generative"
    baseline = 0.0

    def __init__(self, split: str = "train", size: int = 1000, folder: str | Path | None = None, **view):
        super().__init__(**view)
        self.size, self.offset = checked_size(size), SPELLING_SEEDS + offset_of(split)
        self.words, self.words_from = word_list(folder)

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        word = random.Random(self.offset + index).choice(self.words)
        messages = [
            {"role": "user", "content": f"Spell the word: {word}"},
            {"role": "assistant", "content": f"{word}:{','.join(word)}"},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: dict, reply) -> bool:
        return common.text_of(reply).strip() == common.reference_of(conversation)


def checked_size(size: int) -> int:
    """`size`, if examples can be made for it without meeting another split's."""
    if not 1 <= size <= TEST_OFFSET:
        raise UserError(f"A spelling task of {size} examples can't be made: ask for 1 to {TEST_OFFSET:,}.")
    return size


def offset_of(split: str) -> int:
    """The first seed of a split."""
    if split not in ("train", "test"):
        raise UserError(f"The spelling tasks have no split {split}: there are train and test.")
    return TEST_OFFSET if split == "test" else 0


def question(rng: random.Random, word: str, letter: str) -> str:
    """One of the ways to ask."""
    text = rng.choice(TEMPLATES)
    if rng.random() < LOWER_CASED:
        text = text.lower()
    around_letter, around_word = rng.choice(QUOTES), rng.choice(QUOTES)
    text = text.format(letter=around_letter + letter + around_letter, word=around_word + word + around_word)
    return text + "?" if rng.random() < QUESTION_MARK else text


def answer(word: str, letter: str) -> list[dict]:
    """Spell, count by hand, check with the tool, conclude."""
    lines, count = [], 0
    for place, one in enumerate(word, 1):
        count += one == letter
        lines.append(f"{place}: {one}" + (f" is {letter}, number {count}" if one == letter else ""))
    by_hand = f"Spelled out, {word} is {','.join(word)}.\nLooking for {letter}, letter by letter:\n" + "\n".join(lines)
    return [
        {"type": "text", "text": f"{by_hand}\nThat makes {count}. Let me check it with the tool.\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\nThe tool says {count} too.\n\n#### {count}"},
    ]


# ---- the words ------------------------------------------------------------------------------------------------------


def word_list(folder: str | Path | None = None) -> tuple[tuple[str, ...], str]:
    """(words, where they are from)."""
    local = source.folder_of(folder)
    return _words(str(local / WORDS_FILE) if local else "", str(paths.base_dir() / WORDS_FILE))


@functools.cache
def _words(local: str, cached: str) -> tuple[tuple[str, ...], str]:
    for path in (local, cached):
        if path and os.path.exists(path):
            return _read(Path(path)), path
    try:
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            raise UserError("offline, as HF_HUB_OFFLINE says")
        return _read(paths.fetch(WORDS_URL, Path(cached), timeout=10.0)), cached
    except UserError as error:
        logging.getLogger(__name__).warning("spelling tinyworld's words, as %s is not there (%s)", WORDS_FILE, error)
        return _spellable(tinyworld_words()), "tinyworld"


def tinyworld_words() -> set[str]:
    """All words of the embedded world."""
    phrases = {phrase for values in world.lists().values() for phrase in values}
    phrases |= set(world.verbs()) | facts.words()
    return {word for phrase in phrases for word in re.findall("[a-z]+", phrase.lower())}


def _read(path: Path) -> tuple[str, ...]:
    words = _spellable(path.read_text(encoding="utf-8", errors="replace").split())
    if not words:
        raise UserError(f"{path} holds no word of the letters a to z: put a word a line there, or remove it.")
    return words


def _spellable(words) -> tuple[str, ...]:
    return tuple(sorted({word for word in words if re.fullmatch("[a-z]{2,}", word)}))
