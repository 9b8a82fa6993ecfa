"""What a slot may hold: the values of each variable, and the reading of a slot's words.

The first letter of a variable's name says its type: S, T, U subjects of facts; O, W, X objects; A, B people; n numbers;
p places of stories; x, y possessions; c colours; k kinds of pet; m names of pets; f snacks; d drinks; g games;
r relatives; w weather; t parts of the day; h homes; j hobbies; i hiding places; v what is seen in a scene; P scenes;
Z things in orders; l letters; u any word; L lists of words; N lists of numbers; K the counting of a letter.
"""

from collections.abc import Iterator
from functools import cache

from nanochat.tinyworld import facts, world

LISTS = {
    "k": ("pet",),
    "m": ("pet_name",),
    "c": ("colour",),
    "x": ("toy", "thing"),
    "f": ("snack",),
    "g": ("game",),
    "w": ("weather",),
    "p": ("story_place",),
    "h": ("home",),
    "s": ("size",),
    "A": ("girl", "boy"),
    "r": ("relative",),
    "t": ("part_of_day",),
    "d": ("drink",),
    "j": ("hobby",),
    "i": ("hideout",),
}
SAME = {"y": "x", "B": "A", "T": "S", "U": "S", "W": "O", "X": "O"}
PEOPLE = ("<he>", "<she>")
PRONOUN_FORMS = ("he", "own", "obj", "self", "it", "they", "are")


@cache
def type_of(name: str) -> str:
    """The type letter of a variable."""
    return SAME.get(name[0], name[0])


@cache
def domain(name: str) -> tuple[str, ...]:
    """All values of a variable."""
    letter = type_of(name)
    if letter in "SO":
        values = dict.fromkeys(fact.subject if letter == "S" else fact.object for fact in facts.facts())
        return (*values, "<it>") if letter == "S" else tuple(values)
    if letter == "P":
        return tuple(world.scenes())
    if letter == "Z":
        return tuple(dict.fromkeys(thing for things in world.orders().values() for thing in things))
    if letter == "v":
        return tuple(dict.fromkeys(thing for _, things in world.scenes().values() for thing in things))
    values = tuple(word for category in LISTS[letter] for word in world.lists()[category])
    return values + PEOPLE if letter == "A" else values


def subject_class(subject: str) -> str:
    """The key of grammar.ALLOWED for a subject of facts."""
    if subject in ("<which>", "<i>"):
        return subject.strip("<>")
    if subject in _people():
        return "person"
    return "count" if world.kind(subject) == "count" else "plural" if world.kind(subject) == "plural_only" else "mass"


@cache
def _people() -> frozenset[str]:
    """Subjects who are he or she rather than it."""
    working = {f.subject for relation in ("job", "works_in") for f in facts.relations()[relation]}
    related = {f.subject for f in facts.relations()["female"]} | {f.object for f in facts.relations()["female"]}
    return frozenset(working | related | {"person", "knight", "child"}) - {"bull", "cow", "rooster", "hen"}


@cache
def verb_forms(base: str) -> frozenset[str]:
    """The present forms of a verb."""
    return frozenset(("am", "is", "are") if base == "be" else world.verbs()[base][:2])


@cache
def _phrases(letter: str, feature: str) -> dict:
    """A trie of the phrases of a slot: {word: {word: {..., "": [values]}}}."""
    from nanochat.tinyworld.grammar import TOKEN

    root: dict = {}
    for value in domain(letter):
        try:
            phrase = world.form(value, feature)
        except (KeyError, ValueError):
            continue  # a form that this word has not
        node = root
        for word in TOKEN.findall(phrase.lower()):
            node = node.setdefault(word, {})
        values = node.setdefault("", [])
        if feature in PRONOUN_FORMS:  # "his" says no more than that it is a he
            values[:] = [_pronoun(letter, value)]
        else:
            values.append(value)
    return root


def _pronoun(letter: str, value: str) -> str:
    if letter == "S":
        return "<it>"
    return value if value in PEOPLE else {"girl": "<she>", "boy": "<he>"}[world.gender()[value]]


def match(name: str, feature: str, words: list[str], at: int) -> Iterator[tuple[int, object]]:
    """Every (end, value) such that words[at:end] is a value of the variable in this form."""
    letter = type_of(name)
    if letter in _SPECIAL:
        yield from _SPECIAL[letter](feature, words, at)
        return
    node = _phrases(letter, feature)
    while True:
        for value in node.get("", ()):
            yield at, value
        if at >= len(words) or words[at] not in node:
            return
        node = node[words[at]]
        at += 1


def may_begin(name: str, feature: str, word: str) -> bool:
    """Whether a slot may begin with this word; True where that is not easily said."""
    letter = type_of(name)
    return letter in _SPECIAL or word in _phrases(letter, feature)


def says(value: object, feature: str, words: list[str]) -> bool:
    """Whether `words` are the form `feature` of `value` (a pronoun form of a known person, for instance)."""
    from nanochat.tinyworld.grammar import TOKEN

    try:
        return TOKEN.findall(world.form(value, feature).lower()) == words
    except (KeyError, ValueError, AttributeError):
        return False


@cache
def _number_words() -> dict[str, int]:
    return {world.number_word(n): n for n in range(100)}


def _is_number(word: str) -> bool:
    return word.isdecimal() and len(word) < 16 and (word == "0" or word[0] != "0")


def _match_number(feature: str, words: list[str], at: int) -> Iterator[tuple[int, int]]:
    if feature == "word":
        if words[at] in _number_words():
            yield at + 1, _number_words()[words[at]]
    elif feature == "th":
        if words[at] in world.ORDINALS:
            yield at + 1, world.ORDINALS.index(words[at]) + 1
    elif _is_number(words[at]):
        yield at + 1, int(words[at])


def _match_letter(feature: str, words: list[str], at: int) -> Iterator[tuple[int, str]]:
    if len(words[at]) == 1 and words[at].isalpha():
        yield at + 1, words[at]


def _match_word(feature: str, words: list[str], at: int) -> Iterator[tuple[int, str]]:
    if feature == "spelled":
        end = at
        while end < len(words) and len(words[end]) == 1 and words[end].isalpha():
            end += 1
        yield from ((stop, "".join(words[at:stop])) for stop in range(end, at + 1, -1))
    elif feature == "dashed":
        letters = words[at].split("-")
        if len(letters) > 1 and all(len(letter) == 1 for letter in letters):
            yield at + 1, "".join(letters)
    elif words[at] in facts.words():
        yield at + 1, words[at]


def _match_list(feature: str, words: list[str], at: int) -> Iterator[tuple[int, tuple]]:
    items = []
    while at < len(words) and (
        words[at] in facts.words() or _is_number(words[at]) or len(words[at]) == 1 and words[at].isalpha()
    ):
        items.append(int(words[at]) if _is_number(words[at]) else words[at])
        at += 1
        if feature == "commas" and len(items) > 1 or feature == "" and len(items) > 1 and words[at - 2] == "and":
            yield at, tuple(items)
            if feature == "":
                return
        if at >= len(words) or words[at] not in (",", "and") or feature == "commas" and words[at] == "and":
            return
        at += 1


def _match_marks(feature: str, words: list[str], at: int) -> Iterator[tuple[int, world.Marks]]:
    letters, letter, count = "", "", 0
    while at + 1 < len(words) and len(words[at]) == 1 and _is_number(words[at + 1]):
        letters += words[at]
        if int(words[at + 1]) > count:
            letter = words[at]
        count = int(words[at + 1])
        at += 2
        if at >= len(words) or words[at] != ",":
            break
        at += 1
    if letters:
        yield at, world.Marks(letters, letter)


_SPECIAL = {
    "K": _match_marks,
    "n": _match_number,
    "l": _match_letter,
    "u": _match_word,
    "L": _match_list,
    "N": _match_list,
}
