"""The conditions that a rule may name in a line "= ok NAME(...)": arithmetic, letters, lists, places, facts.

Each takes the context (meaning.Context: what the text has said so far) and the values, and says whether it is so.
"""

import string

from nanochat.tinyworld import facts, world

ROWS = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "January February March April May June July August September October November December".split(),
)


def _ones(context, a: int, b: int) -> bool:
    first, second = context.state.get(("first",)), context.state.get(("second",))
    return first is not None and (a, b) == (first % 10, second % 10)


def _tens(context, a: int, b: int) -> bool:
    first, second = context.state.get(("first",)), context.state.get(("second",))
    return first is not None and (a, b) == (first // 10, second // 10)


def _carried(context) -> bool:
    return context.state.get(("total",), 0) > 9


def _run(row: tuple, whole) -> bool:
    """Whether `row` is a run of `whole`, capitals aside."""
    words, whole = [str(x).lower() for x in row], [x.lower() for x in whole]
    return any(whole[i : i + len(words)] == words for i in range(len(whole)))


def _scene(context, who: str, thing: str) -> bool:
    place = context.state.get(("at", who))
    return place not in world.scenes() or thing in world.scenes()[place][1]


def _order(context, name: str, less: str, more: str) -> bool:
    things = world.orders()[name]
    return less in things and more in things and things.index(less) < things.index(more)


def _wrong(context, subject: str, relation: str, obj: str) -> bool:
    known = facts.objects(subject, relation)
    return bool(known) and obj not in known


CHECKS = {
    "sum": lambda _, a, b, c: a + int(b) == c,
    "sum_carry": lambda context, a, b, c: _carried(context) and a + b + 1 == c,
    "product": lambda _, a, b, c: a * b == c,
    "ones": _ones,
    "tens": _tens,
    "carries": lambda context, n: _carried(context) and context.state[("total",)] - 10 == n,
    "writes": lambda context, n: not _carried(context) and context.state.get(("total",)) == n,
    "greater": lambda _, a, b: a > b,
    "even": lambda _, n: n % 2 == 0,
    "odd": lambda _, n: n % 2 == 1,
    "small": lambda _, n: n < 100,
    "digits": lambda _, n, tens, ones: n < 100 and divmod(n, 10) == (tens, ones),
    "steps": lambda _, row, step: all(b - a == int(step) for a, b in zip(row, row[1:])),
    "letters": lambda _, word, n: len(word) == n,
    "letter_at": lambda _, word, at, letter: word[int(at) - 1 : int(at)] == letter,
    "last_letter": lambda _, word, letter: word[-1] == letter,
    "times": lambda _, word, letter, n: word.count(letter) == int(n),
    "many": lambda _, n: n != 1,
    "marks": lambda _, marks, word, letter: marks == world.Marks(word, letter),
    "longer": lambda _, a, b: len(a) > len(b),
    "next_letter": lambda _, a, b: a + b in string.ascii_lowercase,
    "alphabet": lambda _, row: _run(row, string.ascii_lowercase),
    "row": lambda _, row: any(_run(row, whole) for whole in ROWS),
    "in_scene": lambda _, place, thing: thing in world.scenes()[place][1],
    "not_in_scene": lambda _, place, thing: thing not in world.scenes()[place][1],
    "scene": _scene,
    "order": _order,
    "reversed": lambda _, a, b: a == b[::-1],
    "item": lambda _, row, at, word: row[int(at) - 1] == word,
    "size": lambda _, row, n: len(row) == n,
    "differ": lambda _, *values: len(set(values)) == len(values),
    "fact": lambda _, subject, relation, obj: facts.true(subject, relation, obj),
    "wrong": _wrong,
}
