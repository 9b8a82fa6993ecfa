"""The benchmark's questions and its rules for right: held-out facts, sums, identity, and what a free text must not be.

Everything is drawn by a seed and judged by a pure function, so that an exam can be read, repeated and tested without a
model. The wordings are those of heldout_phrasings.tsv, which no training text uses (`Wording` proves it); the pairs of
numbers are held out too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from random import Random

from nanochat.tinyworld import check, facts, questions, sums, world
from nanochat.tinyworld.facts import Fact

HELD_OUT = "heldout_phrasings.tsv"
RULES = {
    "facts": "The reply names a true word (or its plural, inflected verb or digits) as a whole word, and no false one, "
    "no other object of the same relation; words of the question's own subject don't count. Asked for the subject, "
    "the same with subjects. What something cannot do must be said with cannot.",
    "sums": "The last number of the reply is the result, and the calculator was called and answered.",
    "identity": 'The reply contains the word "nanochat".',
    "free": "A document of the validation split is begun (5 to 12 words) and continued. Good: at least one sentence is "
    "ended, and nanochat.tinyworld.check finds no problem of grammar (grammatical) nor of meaning (consistent) in any. "
    "Verbatim: its first 30 words (all, if fewer) stand in a row in a training document.",
}


@dataclass(frozen=True)
class Item:
    """One question. `expected` is what a right reply names; `fact` or `value` is what it is judged by."""

    section: str
    question: str
    expected: str
    fact: Fact | None = None
    back: bool = False
    value: int | None = None

    def right(self, text: str, calls: Sequence[tuple[str, str | None]] = ()) -> bool:
        """Is a reply right by `RULES`? `text`: its words; `calls`: its tool calls as (expression, output or None)."""
        if self.section == "facts":
            return questions.right(self.fact, text, self.back)
        if self.section == "sums":
            return sums.right(self.value, text) and any(output is not None for _, output in calls)
        return re.search(r"\bnanochat\b", text, re.IGNORECASE) is not None


def fact_items(n: int, seed: int) -> list[Item]:
    """n different questions: a fact drawn uniformly, then one of the held-out wordings that fit it."""
    rng, items = Random(f"facts {seed}"), {}
    while len(items) < n:
        fact = rng.choice(facts.facts())
        form, template = rng.choice(fitting(fact))
        question = questions.fill(template, fact)
        items[question] = Item("facts", question, fact.subject if form == "back" else fact.object, fact, form == "back")
    return list(items.values())


def fitting(fact: Fact) -> list[tuple[str, str]]:
    """The held-out wordings for a fact as (form, template); backwards only where the object singles out the subject."""
    found = [("ask", t) for t in questions.wordings(fact.relation, "ask", HELD_OUT) if questions.fits(t, fact)]
    if len(facts.subjects(fact.relation, fact.object)) == 1:
        found += [("back", t) for t in questions.wordings(fact.relation, "back", HELD_OUT)]
    return found


def sum_items(n: int, seed: int) -> list[Item]:
    """n sums and products, half each, of held-out pairs of two- and three-digit numbers; half in held-out wordings."""
    rng, items = Random(f"sums {seed}"), []
    for k in range(n):
        op = "+*"[k % 2]
        a, b = sums.pair(rng, True, (2, 3), (2, 3))
        expression = f"{a} {op if rng.random() < 0.6 else sums.WORDS[op][0]} {b}"
        asks = ("What is {e}?", "How much is {e}?") if k % 4 < 2 else questions.wordings("sum", "ask", HELD_OUT)
        value = sums.value_of(a, op, b)
        items.append(Item("sums", rng.choice(asks).format(e=expression), str(value), value=value))
    return items


def identity_items() -> list[Item]:
    """Ten ways to ask who it is."""
    return [Item("identity", text, "nanochat") for text in questions.wordings("who", "ask", HELD_OUT)]


# -- free continuations ------------------------------------------------------------------------------------------------


def opening(document: str, rng: Random) -> str:
    """The first 5 to 12 words of a document: a prompt to go on from."""
    words = list(re.finditer(r"\S+", document))
    return document[: words[min(rng.randrange(5, 13), max(len(words) // 2, 1)) - 1].end()]


def verdict(prompt: str, continuation: str) -> dict:
    """{"sentences", "grammatical", "consistent", "problems"} of what follows a prompt, its first sentence included."""
    text = prompt + continuation
    found = check.problems(text, start=len(prompt))
    written = [problem for problem in found if problem.startswith(("written:", "grammar:"))]
    ends = len(re.findall(r"[.?!]", continuation))
    return {
        "sentences": ends,
        "grammatical": bool(ends) and not written,
        "consistent": bool(ends) and len(written) == len(found),
        "problems": found,
    }


def share(right: Sequence[bool]) -> tuple[float, float]:
    """(share, its standard error) of n verdicts: sqrt(p (1 - p) / n)."""
    if not right:
        return 0.0, 0.0
    p = sum(right) / len(right)
    return p, sqrt(p * (1 - p) / len(right))


class Wording:
    """A template as a detector: `in_text` says whether a text uses it, with up to six words in each slot."""

    def __init__(self, template: str):
        self.template = template
        pieces = re.split(r"\{(?!z\})\w+\}", plain(template))
        self.longest = max(re.split(r"\{\w+\}", plain(template)), key=len).strip()
        gap = r"(?: [\w'-]+){0,6}? ?"
        regexes = [re.escape(piece.strip()).replace(re.escape("{z}"), "(?:e?s)?") for piece in pieces]
        self.pattern = re.compile(r"(?<![\w'-])" + gap.join(regexes) + r"(?![\w'-])")

    def in_text(self, text: str) -> bool:
        """`text` must be `plain`."""
        return self.longest in text and self.pattern.search(text) is not None


def plain(text: str) -> str:
    """Lower case, without marks, single spaces; slots stay."""
    return re.sub(r"\s+", " ", re.sub(r"[^\w{}' -]", " ", text.lower())).strip()


def held_out_wordings() -> list[Wording]:
    """Every template of heldout_phrasings.tsv."""
    return [Wording(template) for _, _, template in world.rows(HELD_OUT)]
