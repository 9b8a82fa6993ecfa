"""Documents that teach a skill rather than facts: sums with their steps, spelling, places, sizes, copying.

Copying texts (who said 482? repeat it, type it into the calculator) can only be ended by looking back; they are what
makes a small model learn to look back. Every function takes (split, rng) and returns a text; pairs of numbers and pairs
of word and letter are divided between the splits by `world.held_out`.
"""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

from nanochat.tinyworld import facts, grammar, lexicon, world
from nanochat.tinyworld.sums import held_out

Env = grammar.Binding
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()


def pick(values: Sequence[Any], rng: Random) -> Any:
    """One of a sequence (a faster `rng.choice`)."""
    return values[int(rng.random() * len(values))]


def below(n: int, rng: Random) -> int:
    """0 to n - 1."""
    return int(rng.random() * n)


def _env(rng: Random) -> Env:
    names, snacks, colours = lexicon.domain("A"), lexicon.domain("f"), lexicon.domain("c")
    a = below(len(names) - 3, rng)
    c = below(len(colours) - 1, rng)
    return {"A": names[a], "B": names[a + 1], "f": pick(snacks, rng), "c": colours[c], "c2": colours[c + 1]}


def _ours(split: str, *key: object) -> bool:
    return world.held_out(*key) == (split == "val")


# -- sums -----------------------------------------------------------------------------------------------------------


def _numbers(split: str, what: str, top: int, rng: Random) -> tuple[int, int]:
    while True:
        pair = below(top, rng), below(top, rng)
        if _ours(split, what, *pair):
            return pair


def _small_sum(split: str, rng: Random) -> str:
    env = _env(rng)
    at = rng.random()
    a, b = 1 + below(10, rng), 1 + below(10, rng)
    if at < 0.5:
        env |= {"n1": a + 1, "n2": b + 1, "n3": a + b + 2}
        return grammar.realise("add.s", env, rng)
    if at < 0.8:
        env |= {"n1": a + b + 2, "n2": b + 1, "n3": a + 1}
        return grammar.realise("subtract.s", env, rng)
    a, b = 2 + below(4, rng), 2 + below(8, rng)
    a, b = (a, b) if rng.random() < 0.5 else (b, a)
    env |= {"n1": a, "n2": b, "n3": a * b}
    return grammar.realise("times.s", env, rng)


def _worked_sum(split: str, rng: Random) -> str:
    """Two numbers of two digits, added digit by digit."""
    a, b = _numbers(split, "worked", 40, rng)
    a, b = a + 10, b + 10
    if split == "train" and held_out(a, b):  # kept for the conversations' test split
        return _worked_sum(split, rng)
    return grammar.realise("task_add.s", {"n1": a, "n2": b}, rng) + " " + steps_of_sum(a, b, rng)


def steps_of_sum(a: int, b: int, rng: Random) -> str:
    """How two numbers of two digits are added: first the ones, then the tens."""
    ones, carry = a % 10 + b % 10, a % 10 + b % 10 > 9
    tens = a // 10 + b // 10 + carry
    steps = (
        ("ones_add.s", {"n1": a % 10, "n2": b % 10, "n3": ones}),
        ("carry.s" if carry else "no_carry.s", {"n": ones % 10}),
        ("tens_carry.s" if carry else "tens_add.s", {"n1": a // 10, "n2": b // 10, "n3": tens}),
        ("result_add.s", {"n1": a, "n2": b, "n3": a + b}),
    )
    return " ".join(grammar.realise(rule, env, rng) for rule, env in steps)


def _number_fact(split: str, rng: Random) -> str:
    env = _env(rng)
    n = 2 + below(98, rng)
    kind = pick(("greater", "greater", "even", "double", "in_words", "in_words", "tens_ones", "after", "after"), rng)
    if kind == "greater":
        a, b = sorted(_numbers(split, "greater", 99, rng))
        env |= {"n1": b + 2 + (a == b), "n2": a + 1}
    elif kind == "even":
        kind = "odd" if n % 2 else "even"
        env["n"] = n
    elif kind == "double":
        env |= {"n1": n % 25 + 1, "n2": 2 * (n % 25 + 1)}
    elif kind == "tens_ones":
        n = max(n, 22)
        env |= {"n1": n, "n2": n // 10, "n3": n % 10} if n % 10 > 1 else {"n1": n + 2, "n2": n // 10, "n3": n % 10 + 2}
    else:
        env |= {"n": n, "n1": n, "n2": n + 1}
    return grammar.realise(f"{kind}.s", env, rng)


def _counting(rng: Random) -> str:
    kind, step = pick((("up", 1), ("up", 1), ("down", -1), ("twos", 2), ("fives", 5), ("tens", 10)), rng)
    first = (1 + below(15, rng)) * (abs(step) if abs(step) > 1 else 1) + (8 if step < 0 else 0)
    row = tuple(first + step * i for i in range(5 + below(4, rng)))
    return grammar.realise(f"count_{kind}.s", _env(rng) | {"N": row, "n": first}, rng)


def sums(split: str, rng: Random) -> str:
    """Small sums, sums worked in steps, comparing and counting."""
    at = rng.random()
    if at < 0.3:
        lines = [_worked_sum(split, rng) for _ in range(3)]
    elif at < 0.8:
        lines = [_small_sum(split, rng) for _ in range(5 + below(5, rng))]
    else:
        lines = [_number_fact(split, rng) for _ in range(4 + below(4, rng))] + [_counting(rng)]
    return ("\n" if rng.random() < 0.5 or at < 0.3 else " ").join(lines)


# -- letters --------------------------------------------------------------------------------------------------------


@cache
def spellable() -> tuple[str, ...]:
    """The words that are spelled: of three to nine letters, in lower case in the data files."""
    return tuple(sorted(w for w in facts.common_words() if w.isalpha() and w.isascii() and 3 <= len(w) <= 9))


@cache
def short_words() -> tuple[str, ...]:
    """The words of three to five letters that facts are about."""
    words = {word for fact in facts.facts() for word in (fact.subject, fact.object) if len(word) <= 5}
    return tuple(sorted(words & set(spellable())))


def _word(rng: Random) -> str:
    """A word to spell: nearly always one of the common ones, which a small model sees often enough to learn."""
    return pick(short_words() if rng.random() < 0.92 else spellable(), rng)


def _about_word(word: str, split: str, rng: Random) -> list[str]:
    env = _env(rng)
    letter = pick(word, rng)
    place = below(min(len(word), 9), rng)
    env |= {"u": word, "n": len(word), "l": word[0], "l2": word[-1]}
    told = [grammar.realise(pick(("spell.s", "spell.s", "letters.s"), rng), env, rng)]
    kind = pick(("count", "marks", "marks", "ends", "begins", "last", "at", "not", "none"), rng)
    count = word.count(letter)
    if kind in ("count", "marks"):
        rule = "count_marks.s" if kind == "marks" else "count_one.s" if count == 1 else "count_letter.s"
        env |= {"l": letter, "n": count, "K": world.Marks(word, letter)}
    elif kind == "at":
        rule, env = "letter_at.s", env | {"n": place + 1, "l": word[place]}
    elif kind == "last":
        rule, env = "last.s", env | {"l": word[-1]}
    elif kind == "not":
        rule, env = "not_in.s", env | {"l": pick([x for x in ALPHABET if x not in word], rng)}
    else:
        rule = {"ends": "ends.s", "begins": "begins.s", "none": "letters.s"}[kind]
    if kind not in ("count", "marks") or _ours(split, "letter", word, letter) or split == "train" and count == 1:
        told.append(grammar.realise(rule, env, rng))
    return told


def _alphabet(rng: Random) -> str:
    kind = pick(("next", "next", "row", "days", "months"), rng)
    env = _env(rng)
    if kind == "next":
        at = below(25, rng)
        return grammar.realise("next_letter.s", env | {"l": ALPHABET[at], "l2": ALPHABET[at + 1]}, rng)
    if kind == "row":
        at = below(19, rng)
        row = tuple(ALPHABET[at : at + 4 + below(4, rng)])
        return grammar.realise("alphabet.s", env | {"L": row, "l": row[0]}, rng)
    names = DAYS if kind == "days" else MONTHS
    at = below(len(names) - 3, rng)
    return grammar.realise(f"{kind}.s", env | {"L": tuple(names[at : at + 3 + below(len(names) - at - 2, rng)])}, rng)


def letters(split: str, rng: Random) -> str:
    """How words are spelled, their letters counted, and the alphabet."""
    lines = []
    for _ in range(3 + below(3, rng)):
        lines.append(" ".join(_about_word(_word(rng), split, rng)))
    a, b = _word(rng), _word(rng)
    if len(a) != len(b):
        a, b = (a, b) if len(a) > len(b) else (b, a)
        lines.append(grammar.realise("longer.s", {"u": a, "u2": b}, rng))
    if rng.random() < 0.6:
        lines.append(_alphabet(rng))
    return "\n".join(lines)


# -- places and sizes -----------------------------------------------------------------------------------------------


def scenes(split: str, rng: Random) -> str:
    """What is found where."""
    places = lexicon.domain("P")
    chosen = rng.sample(places, 2)
    lines = []
    for _ in range(6 + below(4, rng)):
        place = pick(chosen, rng)
        v, v2 = rng.sample(world.scenes()[place][1], 2)
        kind = pick(("scene_one", "scene_one", "scene_one", "scene_one", "scene_two", "not_scene"), rng)
        if kind == "not_scene":
            v2 = pick(world.scenes()[pick(places, rng)][1], rng)
            if v2 in world.scenes()[place][1] or not _ours(split, place, v2):
                kind = "scene_one"
        env = _env(rng) | {"P": place, "v": v, "v2": v2}
        lines.append(grammar.realise(f"{kind}.s", env, rng))
    return " ".join(lines)


def orders(split: str, rng: Random) -> str:
    """Bigger and smaller, faster and slower."""
    lines = []
    for _ in range(6 + below(4, rng)):
        name = pick(tuple(world.orders()), rng)
        things = world.orders()[name]
        first = below(len(things) - 1, rng)
        second = first + 1 + below(len(things) - first - 1, rng)
        if _ours(split, name, first, second) or split == "val":
            lines.append(grammar.realise(f"{name}.s", {"Z": things[first], "Z2": things[second]}, rng))
    return ("\n" if rng.random() < 0.4 else " ").join(lines)


# -- copying --------------------------------------------------------------------------------------------------------


def number(split: str, rng: Random) -> int:
    """A number of one to four digits, most of two or three."""
    while True:
        n = pick(
            (
                below(10, rng),
                10 + below(90, rng),
                10 + below(90, rng),
                *[100 + below(900, rng)] * 3,
                1000 + below(9000, rng),
            ),
            rng,
        )
        if _ours(split, "number", n):
            return n


def _some(domain: tuple[str, ...], count: int, rng: Random) -> list[str]:
    return rng.sample(domain, count)


def _table(split: str, rng: Random) -> list[str]:
    """Who has, says or is what, and questions about it."""
    kind = pick(("says", "number_of", "age_of", "thing_of", "place_of", "price"), rng)
    count = 2 + below(4, rng)
    envs = []
    names, things = _some(lexicon.domain("A")[:-2], count, rng), _some(lexicon.domain("x"), count, rng)
    for name, thing, place in zip(names, things, _some(lexicon.domain("p"), count, rng)):
        env = {"A": name, "x": thing, "p": place, "c": pick(lexicon.domain("c"), rng)}
        envs.append(env | {"n": 3 + below(95, rng) if kind in ("age_of", "price") else number(split, rng)})
    if len({env["n"] for env in envs}) < count:
        return []
    told = [grammar.realise(f"{kind}.s", env, rng) for env in envs]
    asked = [grammar.realise(f"q_{kind}.s", pick(envs, rng), rng) for _ in range(1 + below(4, rng))]
    return [" ".join(told), *asked] if rng.random() < 0.5 else [" ".join(told + asked)]


def _typed(split: str, rng: Random) -> str:
    rule = pick(("type_add.s", "type_add.s", "type_subtract.s", "type_times.s"), rng)
    n1, n2 = number(split, rng), number(split, rng)
    if split == "train" and held_out(n1, n2):
        return _typed(split, rng)
    if rule == "type_subtract.s":
        n1, n2 = max(n1, n2), min(n1, n2)
    return grammar.realise(rule, _env(rng) | {"n1": n1, "n2": n2}, rng)


def _echo(split: str, rng: Random) -> str:
    env = _env(rng)
    rule = pick(
        (
            "echo",
            "echo",
            "echo_words",
            "list_again",
            "list_again",
            "list_back",
            "list_first",
            "list_last",
            "list_count",
            "pattern",
        ),
        rng,
    )
    words = tuple(_some(spellable(), 3 + below(3, rng), rng))
    env |= dict(zip(("u", "u2", "u3"), words)) | {"L": words, "L2": words[::-1], "n": number(split, rng)}
    if rule.startswith("list_"):
        env |= {"u": words[-1 if rule == "list_last" else 0], "n": len(words)}
    return grammar.realise(f"{rule}.s", env, rng)


def _passed_on(split: str, rng: Random) -> str:
    return grammar.realise("pass_on.s", _env(rng) | {"n": number(split, rng)}, rng)


def copying(split: str, rng: Random) -> str:
    """Texts to copy from: tables with questions, lists, numbers passed on or typed into the calculator."""
    lines = _table(split, rng) if rng.random() < 0.6 else []
    while len(lines) < 4:
        at = rng.random()
        if at < 0.4:
            lines += [_typed(split, rng) for _ in range(2)]
        elif at < 0.88:
            lines += [_echo(split, rng) for _ in range(2)]
        else:
            lines.append(_passed_on(split, rng))
    return "\n".join(lines)
