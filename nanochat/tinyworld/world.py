"""The world's words: the lists in data/ and the forms of English words (plural, article, verb forms, numbers).

Everything is a pure function of the data files, read once. A noun is one of: count ("dog"), mass ("milk"), plural-only
("scissors"), proper ("Paris") or unique ("the sun"); `form(word, feature)` gives every form a template may ask for.
"""

import re
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parent / "data"
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
HELD_OUT = 50  # one combination in 50 is kept for the validation split


def rows(name: str) -> list[list[str]]:
    """The tab-separated rows of a data file, comment lines left out."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def held_out(*key: object) -> bool:
    """Whether this combination (say: a name, a pet, a place) belongs to the validation split and never to training."""
    return zlib.crc32("|".join(map(str, key)).encode()) % HELD_OUT == 0


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


@cache
def lists() -> dict[str, tuple[str, ...]]:
    """Word lists by category, from words.tsv."""
    return {category: _split(text) for category, text in rows("words.tsv")}


@cache
def orders() -> dict[str, tuple[str, ...]]:
    """Things from least to most, by property (size, speed, height, weight, age)."""
    return {name: _split(text) for name, text in rows("orders.tsv")}


@cache
def scenes() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Scene -> (place with its preposition, what is found there), the marks of mass and plural-only nouns removed."""
    return {name: (place, tuple(w.rstrip("*+") for w in _split(text))) for name, place, text in rows("scenes.tsv")}


@cache
def verbs() -> dict[str, tuple[str, ...]]:
    """Base form -> (base, third person, past, -ing)."""
    return {row[0]: tuple(row) for row in rows("verbs.tsv")}


@cache
def gender() -> dict[str, str]:
    """Person's name -> "girl" or "boy"."""
    return {name: kind for kind in ("girl", "boy") for name in lists()[kind]}


@cache
def _kinds() -> dict[str, str]:
    kinds = {word: kind for kind in ("mass", "plural_only", "unique") for word in lists()[kind]}
    many = set(_irregular_plurals().values())
    for subject, relation, _ in rows("facts.tsv"):
        if relation == "group" or relation == "body" and (subject.endswith("s") or subject in many):
            kinds[subject] = "plural_only"
    for noun in ("sheep", "fish"):  # groups of them have a name, yet there is a sheep and a fish
        del kinds[noun]
    for _, _, text in rows("scenes.tsv"):
        for word in _split(text):
            if word[-1] in "*+":
                kinds.setdefault(word[:-1], "mass" if word[-1] == "*" else "plural_only")
    return kinds


@cache
def kind(noun: str) -> str:
    """count, mass, plural_only, proper or unique."""
    if noun in _kinds():
        return _kinds()[noun]
    return "proper" if noun[0].isupper() else "count"


@cache
def _irregular_plurals() -> dict[str, str]:
    return {row[0]: row[2] for row in rows("facts.tsv") if row[1] == "plural"}


@cache
def plural(noun: str) -> str:
    """The plural of a count noun ("city" -> "cities", "part of the body" -> "parts of the body"); others unchanged."""
    if kind(noun) in ("plural_only", "mass", "unique", "proper"):
        return noun
    head, of, rest = noun.partition(" of ")
    first, _, last = head.rpartition(" ")
    return (first + " " if first else "") + _plural_word(last) + of + rest


def _plural_word(word: str) -> str:
    if word in _irregular_plurals():
        return _irregular_plurals()[word]
    if word.endswith(("fish", "deer", "salmon", "trout", "dice")):
        return word
    for singular, many in (
        ("man", "men"),
        ("knife", "knives"),
        ("shelf", "shelves"),
        ("loaf", "loaves"),
        ("oasis", "oases"),
    ):
        if word.endswith(singular):
            return word[: -len(singular)] + many
    if word.endswith(("s", "sh", "ch", "x", "z")) or word in ("tomato", "mosquito", "volcano"):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return {"scarf": "scarves"}.get(word, word + "s")


def article(phrase: str) -> str:
    """ "a" or "an", by the sound of the phrase's first word."""
    first = re.split(r"[ -]", phrase, maxsplit=1)[0]
    if first in ("hour", "honest", "8", "11", "18") or len(first) == 1 and first in "aefhilmnorsx":
        return "an"
    if first.startswith(("uni", "use", "eu", "one", "ukulele")):
        return "a"
    return "an" if first[0] in "aeiouAEIOU" else "a"


@cache
def number_word(n: int) -> str:
    """A number below 1,000 in words: 47 -> "forty-seven", 120 -> "one hundred and twenty"."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + ("-" + ONES[n % 10] if n % 10 else "")
    return ONES[n // 100] + " hundred" + (" and " + number_word(n % 100) if n % 100 else "")


@cache
def verb(phrase: str, tense: str) -> str:
    """A verb phrase in another form, the first word inflected; tense: base, third, past or ing."""
    first, space, rest = phrase.partition(" ")
    return verbs()[first][("base", "third", "past", "ing").index(tense)] + space + rest


def _person(he: str, him: str, his: str, self: str, was: str) -> dict[str, str]:
    return {"": he, "he": he, "him": him, "obj": him, "poss": his, "own": his, "self": self, "was": was}


PRONOUNS = {
    "<she>": _person("she", "her", "her", "herself", "was"),
    "<he>": _person("he", "him", "his", "himself", "was"),
    "<it>": {"a": "it", "pl": "they", "his": "its", "it": "it", "be": "is", "do": "does", "have": "has"},
    "<i>": {"a": "I", "his": "my", "be": "am", "do": "do", "have": "have"},
    "<which>": {"be": "is"},
}


@cache
def form(word: str, feature: str = "") -> str:
    """The form of a word or pronoun that a template slot asks for.

    Nouns: "" bare, "a" generic singular ("a dog", "milk", "the sun", "Paris"), "an" one of it, "the", "pl" ("dogs"),
    "his" ("the dog's"), "in" ("at the beach"). People: "poss" ("Anna's"), "own" ("her"), "he", "obj" ("him"), "self".
    Verb phrases: "third". Numbers: "" digits, "word", "th". Lists: "" ("a, b and c"), "commas". A form that a word
    has not: `KeyError` or `ValueError`.
    """
    if word in PRONOUNS:
        return PRONOUNS[word][feature]
    return _FEATURES[feature](word)


def _indefinite(noun: str) -> str:
    what = kind(noun)
    if what == "count":
        return f"{article(noun)} {noun}"
    return f"the {noun}" if what == "unique" else noun


@cache
def _prepositions() -> dict[str, str]:
    return {place: prep for prep in ("at", "on") for place in lists()[f"{prep}_place"]}


def _inside(place: str) -> str:
    """A place with its preposition: "at the beach", "in the library", "in space"."""
    if place in scenes():
        return scenes()[place][0]
    return f"{_prepositions().get(place, 'in')} {form(place, 'the')}"


class Marks(NamedTuple):
    """The counting of a letter in a word, letter by letter."""

    word: str
    letter: str


def marks(word: str, letter: str) -> str:
    """ "apple", "p" -> "a 0, p 1, p 2, l 2, e 2"."""
    return ", ".join(f"{one} {word[: i + 1].count(letter)}" for i, one in enumerate(word))


def listing(words: tuple[str, ...]) -> str:
    """A list in words: "red, blue and green"."""
    return ", ".join(map(str, words[:-1])) + f" and {words[-1]}"


def _one(noun: str) -> str:
    if kind(noun) != "count" and noun not in lists()["colour"]:
        raise ValueError(f"no single {noun}")
    return f"{article(noun)} {noun}"


def _definite(noun: str) -> str:
    return noun if kind(noun) == "proper" else f"the {noun}"


def _agree(word: str, base: str) -> str:
    """The verb form that goes with `word` as a generic singular subject."""
    plain = kind(word) == "plural_only" or word == "<i>"
    if base == "be":
        return "are" if plain else "is"
    return base if plain else verbs()[base][1]


_FEATURES = {
    "": lambda w: (
        w if isinstance(w, str) else str(w) if isinstance(w, int) else marks(*w) if isinstance(w, Marks) else listing(w)
    ),
    "commas": lambda w: ", ".join(map(str, w)),
    "word": number_word,
    "th": lambda n: ORDINALS[n - 1],
    "spelled": lambda w: " ".join(w),
    "dashed": lambda w: "-".join(w),
    "an": _one,
    "girl": lambda w: gender()[w],
    "a": _indefinite,
    "the": _definite,
    "pl": lambda w: form(w, "the") if kind(w) == "unique" else plural(w),
    "his": lambda w: (form(w, "the") if w[0].islower() else w) + ("'" if kind(w) == "plural_only" else "'s"),
    "him": lambda w: w,
    "name": lambda w: w,
    "poss": lambda w: w + "'s",
    "own": lambda w: {"girl": "her", "boy": "his"}[gender()[w]],
    "obj": lambda w: {"girl": "her", "boy": "him"}[gender()[w]],
    "in": _inside,
    "on": lambda w: ("through " if w in ("the air", "space") else "on ") + w,
    "kind": lambda w: w.removeprefix("piece of ").replace("part of the body", "body part"),
    "head": lambda w: w.partition(" ")[0],
    "tail": lambda w: w.partition(" ")[2],
    "count": lambda w: "none" if w == "no" else w,
    "self": lambda w: {"girl": "herself", "boy": "himself"}[gender()[w]],
    "was": lambda w: "was",
    "they": lambda w: "they" if kind(w) in ("count", "plural_only") else "it",
    "are": lambda w: "are" if kind(w) in ("count", "plural_only") else "is",
    "he": lambda w: {"girl": "she", "boy": "he"}[gender()[w]],
    "it": lambda w: "they" if kind(w) == "plural_only" else "it",
    "cap": lambda w: w[:1].upper() + w[1:],
    "third": lambda w: verb(w, "third"),
    "past": lambda w: verb(w, "past"),
    "ing": lambda w: verb(w, "ing"),
    "base": lambda w: w,
}


def agree(word: str, base: str) -> str:
    """`base` ("be", "have", "say") as it stands after `word`: "a dog says", "scissors are", "I am"."""
    return PRONOUNS.get(word, {}).get(base) or _agree(word, base)
