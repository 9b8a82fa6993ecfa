"""What is true in the world: the facts of facts.tsv, looked up in both directions.

A fact is (subject, relation, object). "opposite" and the neighbours in a sequence hold in both directions; "is_a" is
transitive (an eagle is a bird, a bird is an animal). Where a question has several right answers, `true` knows them all.
"""

from functools import cache
from typing import NamedTuple

from nanochat.tinyworld import world


class Fact(NamedTuple):
    """One thing that is true: Fact("banana", "colour", "yellow")."""

    subject: str
    relation: str
    object: str


@cache
def facts() -> tuple[Fact, ...]:
    """All facts, the reverse of each "opposite" included, in the order of the file."""
    given = [Fact(*row) for row in world.rows("facts.tsv")]
    backwards = [Fact(f.object, f.relation, f.subject) for f in given if f.relation == "opposite"]
    return tuple(given + backwards)


@cache
def relations() -> dict[str, tuple[Fact, ...]]:
    """Relation -> its facts."""
    found: dict[str, list[Fact]] = {}
    for fact in facts():
        found.setdefault(fact.relation, []).append(fact)
    return {relation: tuple(some) for relation, some in found.items()}


@cache
def about() -> dict[str, tuple[Fact, ...]]:
    """Subject -> its facts."""
    found: dict[str, list[Fact]] = {}
    for fact in facts():
        found.setdefault(fact.subject, []).append(fact)
    return {subject: tuple(some) for subject, some in found.items()}


@cache
def _objects() -> dict[tuple[str, str], frozenset[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for subject, relation, obj in facts():
        found.setdefault((subject, relation), set()).add(obj)
    for (_, relation), objects in list(found.items()):
        if relation == "is_a":
            while more := {up for o in objects for up in found.get((o, "is_a"), ())} - objects:
                objects |= more
    return {key: frozenset(objects) for key, objects in found.items()}


def objects(subject: str, relation: str) -> frozenset[str]:
    """Every right object, empty if nothing is known."""
    return _objects().get((subject, relation), frozenset())


@cache
def subjects(relation: str, obj: str) -> frozenset[str]:
    """Every subject of which the relation with `obj` holds ("opposite" and "is_a" as in `objects`)."""
    return frozenset(f.subject for f in relations()[relation] if obj in objects(f.subject, relation))


def true(subject: str, relation: str, obj: str) -> bool:
    """Whether the world says so; False also when it says nothing."""
    return obj in objects(subject, relation)


@cache
def _phrases() -> tuple[str, ...]:
    phrases = [part for fact in facts() for part in (fact.subject, fact.object)]
    phrases += [word for some in (*world.lists().values(), *world.orders().values()) for word in some]
    phrases += [word for place, some in world.scenes().values() for word in (place, *some)]
    return (*phrases, *(word for forms in world.verbs().values() for word in forms))


@cache
def words() -> frozenset[str]:
    """Every word, in lower case, of the data files' facts, lists, scenes and verbs."""
    return frozenset(word.lower() for phrase in _phrases() for word in phrase.split())


@cache
def common_words() -> frozenset[str]:
    """The words of `words` that are written with a small letter somewhere."""
    return frozenset(word for phrase in _phrases() for word in phrase.split() if word.islower())
