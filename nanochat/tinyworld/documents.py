"""The pretraining documents: `document(split, i, seed)`, any i, the same text for the same arguments.

A document is of one of the kinds in KINDS, in these shares. Facts are told in many phrasings, in both directions, as
statements, questions, lists, comparisons and riddles; stories follow plots; sums, spelling, lists and texts to copy
come with their steps. Validation documents hold combinations (a story's plot, hero and thing; two numbers; a word and a
letter; a fact and the wrong answer beside it) that never occur in training documents; the facts are in both.
"""

from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Any

from nanochat.tinyworld import facts, grammar, lessons, lexicon, world
from nanochat.tinyworld.facts import Fact
from nanochat.tinyworld.stories import story

Env = grammar.Binding


def document(split: str, i: int, seed: int = 0) -> str:
    """Document `i` (>= 0, without end) of "train" or "val": plain English, mostly 40 to 150 words.

    A pure function of its arguments. Raises `ValueError` for another split or a negative i.
    """
    if split not in ("train", "val") or i < 0:
        raise ValueError(f"document({split!r}, {i}): the split is train or val, and i is 0 or more.")
    rng = Random((seed * 2 + (split == "val")) * 1_000_003_000_001 + i)
    at = rng.random()
    for kind, share in KINDS.items():
        at -= share
        if at < 0:
            return _MAKERS[kind](split, rng)
    return story(split, rng)


def pick(values: Sequence[Any], rng: Random) -> Any:
    """One of a sequence (a faster `rng.choice`)."""
    return values[int(rng.random() * len(values))]


def people(rng: Random) -> tuple[str, str]:
    """Two different names."""
    names = lexicon.domain("A")[:-2]
    first = int(rng.random() * len(names))
    return names[first], names[first - 1 - int(rng.random() * (len(names) - 1))]


# -- facts ----------------------------------------------------------------------------------------------------------


@cache
def _with_phrase(subject: str = "which") -> frozenset[str]:
    """The relations of which "which one ..." can be asked, or of which a thing can say "I ..." (subject "i")."""
    found = {name[:-3]: rule for name, rule in grammar.rules().items() if name.endswith(".vp")}
    return frozenset(relation for relation, rule in found.items() if rule.choices(subject))


@cache
def _plural_phrase(relation: str) -> bool:
    return f"{relation}.vpp" in grammar.rules()


@cache
def _peers(relation: str, obj: str) -> tuple[str, ...]:
    """Count nouns of which a relation with this object holds."""
    return tuple(s for s in sorted(facts.subjects(relation, obj)) if lexicon.subject_class(s) in ("count", "person"))


def _env(fact: Fact, rng: Random) -> Env:
    a, b = people(rng)
    kind = lexicon.subject_class(fact.subject)
    return {"S": fact.subject, "R": fact.relation, "O": fact.object, "A": a, "B": b, "class": kind}


def _wrong(fact: Fact, split: str, rng: Random) -> str | None:
    """An object of the same relation that is not true of the fact's subject; which ones a split may use is by hash."""
    others = facts.relations()[fact.relation]
    for _ in range(4 if split == "train" else 200):
        obj = pick(others, rng).object
        fits = world.held_out("wrong", fact.subject, obj) == (split == "val") or len(others) < 40
        if fits and obj != fact.subject and not facts.true(fact.subject, fact.relation, obj):
            return obj
    return None


def _sentence(fact: Fact, split: str, rng: Random) -> str:
    """One sentence or exchange about a fact, in a form that the fact allows."""
    env = _env(fact, rng)
    at = rng.random()
    if at < 0.34:
        rule = "fact.s"
    elif at < 0.42:
        rule = "told_fact.s"
    elif at < 0.68:
        rule = "qa.s"
    elif at < 0.84 and f"{fact.relation}.who" in grammar.rules():
        rule = "what_qa.s" if fact.relation in _with_phrase() and at > 0.79 else "who_qa.s"
    elif at < 0.88:
        rule = "yes_qa.s"
    else:
        rule = _contrast(fact, env, split, rng)
    return grammar.realise(rule, env, rng)


def _contrast(fact: Fact, env: Env, split: str, rng: Random) -> str:
    """A rule that sets a fact against others; adds their variables to `env`."""
    kind = pick(("no", "choice", "both", "both", "unlike", "unlike"), rng)
    if kind in ("both", "unlike"):
        return _beside(kind, fact, env, rng) if fact.relation in _with_phrase() else "qa.s"
    env["W"] = _wrong(fact, split, rng)
    return f"{kind}_qa.s" if env["W"] else "qa.s"


def _beside(kind: str, fact: Fact, env: Env, rng: Random) -> str:
    if kind == "unlike":
        other = pick(facts.relations()[fact.relation], rng)
        env["T"], env["W"] = other.subject, other.object
        fine = not facts.true(other.subject, fact.relation, fact.object)
        return "unlike.s" if fine and not facts.true(fact.subject, fact.relation, other.object) else "fact.s"
    peers = _peers(fact.relation, fact.object)
    if len(peers) < 3 or fact.subject not in peers:
        return "fact.s"
    chosen = [peer for peer in rng.sample(peers, 3) if peer != fact.subject]
    env["T"], env["U"] = chosen[0], chosen[1]
    return pick(("both.s", "three.s"), rng)


def _relation_text(split: str, rng: Random) -> str:
    """Several facts of one relation."""
    relation = pick(facts.facts(), rng).relation
    some = facts.relations()[relation]
    chosen = [pick(some, rng) for _ in range(6 + int(rng.random() * 7))]
    return _join([_sentence(fact, split, rng) for fact in dict.fromkeys(chosen)], rng)


def _mixed_text(split: str, rng: Random) -> str:
    """Facts of any kind."""
    chosen = [pick(facts.facts(), rng) for _ in range(6 + int(rng.random() * 7))]
    return _join([_sentence(fact, split, rng) for fact in dict.fromkeys(chosen)], rng)


def _join(sentences: list[str], rng: Random) -> str:
    return ("\n" if rng.random() < 0.4 else " ").join(sentences)


@cache
def _rich() -> tuple[tuple[str, tuple[Fact, ...]], ...]:
    """Subjects with three facts or more, each with its facts."""
    return tuple((s, some) for s, some in facts.about().items() if len(some) > 2 and world.kind(s) != "plural_only")


@cache
def _tellable(relation: str, kind: str) -> bool:
    return bool(grammar.rules()[f"{relation}.cl"].choices(kind))


def _entry_text(split: str, rng: Random) -> str:
    """A small entry of an encyclopedia: what there is to say of one thing, twice over in other words."""
    subject, some = pick(_rich(), rng)
    kind = lexicon.subject_class(subject)
    told = rng.sample(some, len(some))
    sentences = [grammar.realise("fact.s", _env(told[0], rng), rng)]
    for fact in told[1:]:
        env = _env(fact, rng)
        if kind != "person" and rng.random() < 0.5 and _tellable(fact.relation, f"it_{kind}"):
            env["S"], env["class"] = "<it>", f"it_{kind}"
        sentences.append(grammar.realise("fact.s", env, rng))
    if rng.random() < 0.5:
        sentences.append(_pair(subject, some, rng))
    for fact in rng.sample(some, min(len(some), 1 + int(rng.random() * 3))):
        sentences.append(_sentence(fact, split, rng))
    return " ".join(s for s in sentences if s)


def _pair(subject: str, some: tuple[Fact, ...], rng: Random) -> str:
    spoken = [fact for fact in some if fact.relation in _with_phrase()]
    if len(spoken) < 2:
        return ""
    env = _env(spoken[0], rng)
    env["queue"] = [(f"{fact.relation}.vp", _env(fact, rng)) for fact in rng.sample(spoken, 2)]
    return grammar.realise("two_facts.s", env, rng)


@cache
def _riddles() -> tuple[tuple[str, tuple[Fact, ...]], ...]:
    found = (
        (s, tuple(f for f in some if f.relation in _with_phrase("i") and f.relation != "is_a")) for s, some in _rich()
    )
    return tuple((s, some) for s, some in found if len(some) > 1 and world.kind(s) == "count")


def _riddle_text(split: str, rng: Random) -> str:
    """Riddles: things speak of themselves and ask who they are."""
    texts = []
    for subject, some in rng.sample(_riddles(), 3):
        told = rng.sample(some, min(len(some), 4))
        sentences = [grammar.realise("riddle_line.s", _env(fact, rng), rng) for fact in told]
        sentences.append(grammar.realise("riddle.s", {"S": subject, "class": "count"}, rng))
        texts.append(" ".join(sentences))
    return "\n".join(texts)


KINDS = {
    "relation": 0.21,
    "mixed": 0.20,
    "entry": 0.12,
    "riddle": 0.03,
    "sums": 0.015,
    "letters": 0.005,
    "scenes": 0.05,
    "orders": 0.01,
    "copying": 0.02,
    "story": 0.34,
}
_MAKERS: dict[str, Callable[[str, Random], str]] = {
    "relation": _relation_text,
    "mixed": _mixed_text,
    "entry": _entry_text,
    "riddle": _riddle_text,
    "sums": lessons.sums,
    "letters": lessons.letters,
    "scenes": lessons.scenes,
    "orders": lessons.orders,
    "copying": lessons.copying,
    "story": story,
}
