"""Whether a text about the world is grammatical and free of contradiction: the judge of a model's free continuations.

`problems(text)` is empty when every complete sentence is one that the grammar makes (known words, agreement,
articles, order), is written as the grammar writes it (capitals, spaces, quotation marks), and says nothing false: no
wrong fact, sum or spelling, nothing that contradicts the story so far (a pet's name, the colour of a thing, who has
it, who is where) and nobody and nothing that was never introduced. A last sentence that is not complete is ignored.
A sentence that a person would accept but this grammar never makes counts as a problem, so the share of good texts is a
lower bound.

`verbatim` says which continuations stand word for word in given documents.
"""

import re
from collections.abc import Iterable
from functools import cache

from nanochat.tinyworld import facts, grammar, world
from nanochat.tinyworld.meaning import Context

STRANGE = re.compile(r"[^A-Za-z0-9 \n.,?!:'\"+*=-]")
WORDS_COMPARED = 30  # a continuation counts as verbatim when its first 30 words occur as a run


class Word:
    """A token with its place in the text, whether it must be or must not be capitalised, and the gap before it."""

    __slots__ = ("begins", "end", "gap", "quoted", "start", "text")

    def __init__(self, text: str, start: int, gap: str, begins: bool | None, quoted: bool) -> None:
        self.text, self.start, self.gap = text, start, gap
        self.end = start + len(text)
        self.begins, self.quoted = begins, quoted


def words_of(text: str) -> list[Word]:
    """The tokens of a text; `begins`: first of a sentence or of a quotation; `quoted`: inside quotation marks."""
    found: list[Word] = []
    quoted, begins, at = False, True, 0
    for match in grammar.TOKEN.finditer(text):
        token, gap = match[0], text[at : match.start()]
        if token == '"':
            found.append(Word(token, match.start(), gap, False, quoted))
            quoted = not quoted
            begins = quoted or (None if begins else False)  # after a quotation a sentence may begin or go on
        else:
            found.append(Word(token, match.start(), gap, True if "\n" in gap else begins, quoted))
            begins = token in ".?!"
        at = match.end()
    return found


def _complete(words: list[Word]) -> list[Word]:
    """The words up to the end of the last complete sentence."""
    for i in range(len(words) - 1, -1, -1):
        if words[i].text in ".?!":
            closing = i + 1 < len(words) and words[i + 1].text == '"' and words[i + 1].quoted and not words[i + 1].gap
            return words[: i + 1 + closing]
    return []


# -- how it is written ----------------------------------------------------------------------------------------------


@cache
def _proper() -> frozenset[str]:
    names = {name for category in ("girl", "boy", "pet_name") for name in world.lists()[category]}
    names |= {part for fact in facts.facts() for part in (fact.subject, fact.object) if part[:1].isupper()}
    names |= {word for category in ("unique",) for word in world.lists()[category] if word[0].isupper()}
    return frozenset(word.lower() for name in names for word in name.split() if word[0].isupper())


def _written(text: str, words: list[Word]) -> list[tuple[int, str]]:
    """(place, problem) of every wrong capital and space."""
    found = [(m.start(), f"written: {m[0]!r} is no mark of this text") for m in STRANGE.finditer(text)]
    proper, common = _proper(), facts.common_words() | grammar.literal_words()
    for i, word in enumerate(words):
        before = words[i - 1] if i else None
        if before and not _gap_is_right(before, word):
            found.append((word.start, f"written: wrong space before {word.text!r}"))
        lower = word.text.lower()
        if len(word.text) == 1 or not word.text[0].isalpha() or re.fullmatch(r"\w(-\w)+", word.text):
            if word.text == "i" and before and before.text != "letter":
                continue
        elif word.text[0].islower() and (word.begins is True or lower in proper and lower not in common):
            found.append((word.start, f"written: {word.text!r} needs a capital letter"))
        elif word.text[0].isupper() and word.begins is False and lower.split("'")[0] not in proper:
            if before is None or before.text != ":":
                found.append((word.start, f"written: {word.text!r} has a capital letter"))
    return found


def _gap_is_right(before: Word, word: Word) -> bool:
    tight = word.text in ".,?!:;" or before.text == '"' and not before.quoted or word.text == '"' and word.quoted
    return word.gap == "" if tight else word.gap in (" ", "\n")


# -- what it says ---------------------------------------------------------------------------------------------------


def _sentence_end(words: list[Word], at: int) -> int:
    while at < len(words) and words[at].text not in ".?!":
        at += 1
    at += 1
    return at + (at < len(words) and words[at].text == '"' and words[at].quoted)


def _said(words: list[Word]) -> list[tuple[int, int, str]]:
    """(first word, end, problem) of every sentence that cannot be read or says something wrong; ("" is no problem)."""
    lower = [word.text.lower() for word in words]
    context, at, found = Context(), 0, []
    while at < len(words):
        readings = grammar.parse(lower, at)
        if not readings:
            end = _sentence_end(words, at)
            found.append((at, end, "grammar: cannot read: " + " ".join(lower[at:end])))
        else:
            end, problem = _best(readings, context)
            found.append((at, end, problem))
        at = end
    return found


def _best(readings: list[grammar.Reading], context: Context) -> tuple[int, str]:
    """The longest reading without a problem, else the longest; its meaning goes into the context."""
    first: tuple[int, str, Context] | None = None
    for end, bound in readings:
        if "partial" in bound:
            if first is None:
                return end, ""
            continue
        trial = context.copy()
        told = trial.tell(bound)
        if not told:
            context.become(trial)
            return end, ""
        if first is None:
            first = end, "; ".join(told), trial
    context.become(first[2])
    return first[:2]


def problems(text: str, start: int = 0) -> list[str]:
    """What is wrong with a text, in words; with `start`, only in what comes after that many characters (the prompt's).

    An empty list means: grammatical and free of contradiction (see the module's text for what that covers).
    """
    words = _complete(words_of(text))
    found = [problem for place, problem in _written(text[: words[-1].end if words else 0], words) if place >= start]
    for _, end, problem in _said(words):
        if problem and words[min(end, len(words)) - 1].end > start:
            found.append(problem)
    return found


def sentences(text: str) -> list[str]:
    """The complete sentences (or exchanges of question and answer) of a text, as the grammar divides it."""
    words = _complete(words_of(text))
    return [text[words[at].start : words[min(end, len(words)) - 1].end] for at, end, _ in _said(words)]


def verbatim(continuations: Iterable[str], documents: Iterable[str], n: int = WORDS_COMPARED) -> list[bool]:
    """Whether the first `n` words of each continuation (all, if it has fewer) occur as a run in one of `documents`.

    Words are what stands between spaces or new lines. An empty continuation is not verbatim.
    """
    wanted = [" " + " ".join(text.split()[:n]) + " " for text in continuations]
    found = [False] * len(wanted)
    for document in documents:
        text = " " + " ".join(document.split()) + " "
        found = [yes or bool(run.strip()) and run in text for yes, run in zip(found, wanted)]
    return found
