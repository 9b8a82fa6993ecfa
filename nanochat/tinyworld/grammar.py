r"""The grammar: templates with slots, from data/*.txt, read in both directions: realised into text and parsed back.

A rule is a list of templates; `[colour.vp]` starts the rule "colour.vp", lines starting with "=" state its meaning (see
check.py), every other line is a template:

    (Then|After that,|) {A} walked to {p.the}.

    (a|b|)       one of the alternatives, the last one here being nothing
    {p.the}      the variable p in the form "the" (world.form); {p} is the bare word
    <eat>        the verb as it agrees with the variable S: "eats" after "a cow", "eat" after "I"
    {@q}         the rule "q", or "R.q" where R is the relation spoken of; shares the variables; {@q O=W}: W for its O
    {>do}        a rule "NAME.do", an event of its own that takes over only the subject (A or S)
    ^            after "{": begin with a capital letter (the beginning of a sentence or a quotation has one anyway)
    \n           a new line

From a relation's verb phrases ([R.vp]) come its clauses with a singular and with a plural subject ([R.cl]) and the
plural verb phrase ([R.vpp]) by themselves. Realising is choosing; parsing walks a trie of words and slots and returns
every reading.
"""

import re
from functools import cache
from random import Random
from typing import NamedTuple

from nanochat.tinyworld import lexicon, world
from nanochat.tinyworld.facts import relations

FILES = ("facts.txt", "stories.txt", "numbers.txt", "letters.txt", "lists.txt", "copying.txt")
TOKEN = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*|\d+|[^\w\s]")
_BEGIN = re.compile(r"((?:^|[.?!] |\n|(?:^|[ \n])\")$)")
_BEGIN_LITERAL = re.compile(r"(?:^|[.?!] |\n|(?:^|(?<=[ \n]))\")([a-z])")
_LINE = re.compile(r"(\w+)\(([\w,]*)\) (==|:=|-=|\+=) (\w+)$|ok (\w+)\(([\w,-]*)\)$")
_VARIABLE = re.compile(r"[A-Za-z]\d?$")
ALLOWED = {  # which forms of the subject S a template may use, by what S is
    "count": None,
    "mass": {"a", "the", "his", "it", "", "head", "tail"},
    "person": {"a", "the", "pl", "his", "", "head", "tail"},
    "it_count": {"a", "pl", "his", "it"},
    "it_mass": {"a", "his", "it"},
    "which": set(),
    "i": set(),
}
ABOUT_WORDS = ("opposite", "female", "plural", "past", "next_number", "how_many")  # relations between words
STAND_INS = {"which": "<which>", "me": "<i>"}  # for S: "which one says moo", "I say moo"
Binding = dict[str, object]


class Slot(NamedTuple):
    """A variable in one of its forms."""

    name: str
    feature: str
    capital: bool = False


class Agree(NamedTuple):
    """A verb that agrees with S."""

    base: str


class Ref(NamedTuple):
    """Another rule: shared variables (renamed where given), or an event of its own."""

    rule: str
    rename: tuple[tuple[str, str], ...]
    own: bool
    capital: bool = False


Part = str | Slot | Agree | Ref


class Rule:
    """A rule's templates: `lines[i]` holds the variants (without alternatives) of the i-th template."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.meaning: list[str] = []
        self.lines: list[list[tuple[Part, ...]]] = []
        self.relation = name.split(".")[0] if name.split(".")[0] in relations() else ""
        self._by_class: dict[str, list[list[tuple[Part, ...]]]] = {}

    def choices(self, subject: str) -> list[list[tuple[Part, ...]]]:
        """The templates that fit a subject of this class (a key of ALLOWED)."""
        if subject not in self._by_class:
            fitting = ([v for v in line if _fits(v, subject)] for line in self.lines)
            self._by_class[subject] = [line for line in fitting if line]
        return self._by_class[subject]


def _fits(variant: tuple[Part, ...], subject: str) -> bool:
    allowed = ALLOWED.get(subject)
    if allowed is None:
        return True
    slots = [part for part in variant if isinstance(part, Slot)]
    return all(p.feature in allowed for p in slots if p.name == "S") and not (
        subject == "i" and any(p.feature == "third" for p in slots)
    )


# -- reading the data files ----------------------------------------------------------------------------------------


def _expand(template: str) -> list[str]:
    """All choices of the alternatives in parentheses, innermost first."""
    match = re.search(r"\(([^()]*)\)", template)
    if not match:
        return [re.sub(r" +([.,?!]| |$)", r"\1", template).strip()]
    before, after = template[: match.start()], template[match.end() :]
    return [text for option in match[1].split("|") for text in _expand(before + option + after)]


def _compile(text: str, sentence: bool) -> tuple[Part, ...]:
    """A template without alternatives as parts; in a sentence rule, a sentence or quotation begins with a capital."""
    text = text.replace("\\n", "\n")
    if sentence:
        text = _BEGIN_LITERAL.sub(lambda m: m[0][:-1] + m[1].upper(), text)
    parts: list[Part] = []
    at = 0
    for match in re.finditer(r"\{(\^?)([@>]?)([^}]*)\}|<(\w+)>", text):
        if match.start() > at:
            parts.append(text[at : match.start()])
        capital = bool(match[1]) or sentence and bool(_BEGIN.search(text[: match.start()]))
        parts.append(Agree(match[4]) if match[4] else _slot_or_ref(match[2], match[3], capital))
        at = match.end()
    if at < len(text):
        parts.append(text[at:])
    return tuple(parts)


def _slot_or_ref(mark: str, body: str, capital: bool) -> Slot | Ref:
    if mark:
        rule, *rename = body.split()
        return Ref(rule, tuple(tuple(pair.split("=")) for pair in rename), mark == ">", capital)
    name, _, feature = body.partition(".")
    return Slot(name, feature, capital)


def _plural_phrase(phrase: str) -> str:
    phrase = re.sub(r"<(\w+)>", lambda m: "are" if m[1] == "be" else m[1], phrase)
    return phrase.replace("{O.third}", "{O}").replace("{O.a}", "{O.pl}")


def _asked_for(name: str) -> str:
    """How the subject is named when it is asked for: a word as such, a thing with its article."""
    return "{S}" if name.split(".")[0] in ABOUT_WORDS else "{S.a}"


def _add(rules: dict[str, Rule], name: str, template: str) -> None:
    rule = rules.setdefault(name, Rule(name))
    rule.lines.append([_compile(text, name.endswith(".s")) for text in _expand(template)])


@cache
def rules() -> dict[str, Rule]:
    """Every rule of the data files by name, the derived clauses included."""
    found: dict[str, Rule] = {}
    name = ""
    for file in FILES:
        for line in (world.DATA / file).read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                name = line[1 : line.index("]")]
            elif line.startswith("="):
                found.setdefault(name, Rule(name)).meaning.append(line[1:].strip())
            elif line and not line.startswith("#"):
                _add(found, name, line)
                if name.endswith(".short") and f"{name[:-6]}.sa" not in found:
                    _add(found, f"{name[:-6]}.sa", _asked_for(name))
                if name.endswith(".vp"):
                    relation = name[:-3]
                    _add(found, f"{relation}.cl", "{S.a} " + line)
                    _add(found, f"{relation}.vpp", _plural_phrase(line))
                    _add(found, f"{relation}.cl", "{S.pl} " + _plural_phrase(line))
    return found


@cache
def meaning(rule: str) -> tuple[tuple, ...]:
    """The meaning of a rule, each line as (name, arguments, operator, value) or (name, arguments, "ok", "")."""
    found = []
    for line in rules()[rule].meaning:
        match = _LINE.match(line)
        if not match:
            raise ValueError(f"rule {rule}: cannot read the line {line!r}")
        name, arguments, operator, value, check, given = match.groups()
        text = given if check else arguments
        split = tuple(text.split(",")) if text else ()
        found.append((check or name, split, "ok" if check else operator, value or ""))
    return tuple(found)


def value(text: str, bound: Binding) -> object:
    """What a word of a meaning stands for: a variable's value (None where it has none), or the word itself."""
    if _VARIABLE.match(text) and text not in bound:
        return None
    return bound.get(text, text)


@cache
def literal_words() -> frozenset[str]:
    """The words that templates write with a small letter."""
    texts = [p for rule in rules().values() for line in rule.lines for v in line for p in v if isinstance(p, str)]
    return frozenset(word for text in texts for word in TOKEN.findall(text) if word.islower())


# -- realising -----------------------------------------------------------------------------------------------------


def realise(name: str, env: Binding, rng: Random) -> str:
    """One text of the rule `name` (or of the relation env["R"]) with the variables of `env`.

    env["class"]: a key of ALLOWED, what S is; env["queue"]: the events {>do} tells in order, (rule name, env) each.
    """
    table, random = rules(), rng.random
    rule = table.get(name) or table[f"{env['R']}.{name}"]
    lines = rule.choices(env.get("class", "count"))
    line = lines[int(random() * len(lines))]
    variant = line[int(random() * len(line))] if len(line) > 1 else line[0]
    return "".join([part if type(part) is str else _say(part, env, rng) for part in variant])


def _say(part: Slot | Agree | Ref, env: Binding, rng: Random) -> str:
    if type(part) is Slot:
        text = world.form(env[part.name], part.feature)
        if part.name[0] in "lK" or part.feature in ("spelled", "dashed"):
            return text  # letters stay small
    elif type(part) is Agree:
        return world.agree(env["S"], part.base)
    elif part.own:
        name, child = env["queue"].pop(0)
        text = realise(name, child, rng)
    else:
        text = realise(part.rule, _renamed(env, part), rng)
    return text[:1].upper() + text[1:] if part.capital else text


def _renamed(env: Binding, ref: Ref) -> Binding:
    if not ref.rename:
        return env
    child = dict(env)
    for inner, outer in ref.rename:
        child[inner] = STAND_INS.get(outer) or env[outer]
        if inner == "S":
            child["class"] = lexicon.subject_class(child["S"])
    return child


# -- parsing -------------------------------------------------------------------------------------------------------


class Node:
    """A node of the trie of all templates of some rules; `after(word)`: the slots that may begin with this word."""

    __slots__ = ("_after", "ends", "slots", "words")

    def __init__(self) -> None:
        self.words: dict[str, Node] = {}
        self.slots: dict[tuple, Node] = {}
        self.ends: list[Rule] = []
        self._after: dict[str, list] = {}

    def after(self, word: str) -> list:
        if word not in self._after:
            self._after[word] = [(p, node) for p, node in self.slots.items() if _may_begin(p, word)]
        return self._after[word]


@cache
def _may_begin(part: Part, word: str) -> bool:
    if type(part) is Agree:
        return word in lexicon.verb_forms(part.base)
    if type(part) is Slot:
        return lexicon.may_begin(part.name, part.feature, word)
    root = _trie(part.rule)
    return word in root.words or any(_may_begin(first, word) for first in root.slots)


@cache
def _trie(name: str) -> Node:
    """The trie of the rule `name`, or of all rules "*.name"."""
    root = Node()
    chosen = [rules()[name]] if name in rules() else [r for n, r in rules().items() if n.endswith("." + name)]
    for rule in chosen:
        for variant in (v for line in rule.lines for v in line):
            node = root
            for part in variant:
                node = _advance(node, part)
            if rule not in node.ends:
                node.ends.append(rule)
    return root


def _advance(node: Node, part: Part) -> Node:
    if not isinstance(part, str):
        if isinstance(part, Slot | Ref):
            part = part._replace(capital=False)
        return node.slots.setdefault(part, Node())
    for word in TOKEN.findall(part.lower()):
        node = node.words.setdefault(word, Node())
    return node


Reading = tuple[int, Binding]


def _walk(node: Node, words: list[str], at: int, bound: Binding, out: list[Reading]) -> list[Reading]:
    """Appends every reading that starts here to `out`; one that reaches the end of the words too early is "partial"."""
    for rule in node.ends:
        relation = rule.relation
        if not relation or bound.get("R", relation) == relation:
            out.append((at, {**bound, "rule": rule.name, "R": relation} if relation else {**bound, "rule": rule.name}))
    if at >= len(words):
        if node.words or node.slots:
            out.append((at, {**bound, "partial": True}))
        return out
    word = words[at]
    if (after := node.words.get(word)) is not None:
        _walk(after, words, at + 1, bound, out)
    for part, after in node.after(word):
        for end, now in _match(part, words, at, bound):
            if "partial" in now:
                out.append((end, now))
            else:
                _walk(after, words, end, now, out)
    return out


def _match(part: Slot | Agree | Ref, words: list[str], at: int, bound: Binding) -> list[Reading]:
    if type(part) is Agree:
        return [(at + 1, {**bound, "agree": (*bound.get("agree", ()), (part.base, words[at]))})]
    if type(part) is Slot:
        return _match_slot(part, words, at, bound)
    return _match_event(part, words, at, bound) if part.own else _match_rule(part, words, at, bound)


def _match_slot(slot: Slot, words: list[str], at: int, bound: Binding) -> list[Reading]:
    found = lexicon.match(slot.name, slot.feature, words, at)
    if slot.name not in bound:
        return [(end, {**bound, slot.name: value}) for end, value in found]
    known = bound[slot.name]
    return [(e, bound) for e, value in found if value == known or lexicon.says(known, slot.feature, words[at:e])]


def _match_rule(ref: Ref, words: list[str], at: int, bound: Binding) -> list[Reading]:
    rename = dict(ref.rename)
    inner = {k: v for k, v in bound.items() if k not in rename}
    inner.pop("agree", None)
    for a, b in ref.rename:
        if b in bound or b in STAND_INS:
            inner[a] = STAND_INS.get(b) or bound[b]
    found = _walk(_trie(ref.rule), words, at, inner, [])
    return [(end, _merged(ref, bound, now)) for end, now in found if "partial" in now or not rename or _agrees(now)]


def _merged(ref: Ref, bound: Binding, found: Binding) -> Binding:
    """What is known after a shared rule: its variables under the names they have outside."""
    if "partial" in found:
        return found
    result = {**found, "rule": bound.get("rule", ""), "agree": bound.get("agree", ())}
    if not ref.rename:
        result["agree"] += found.get("agree", ())
    for a, b in ref.rename:
        del result[a]
        if a in bound:
            result[a] = bound[a]
        if b not in STAND_INS:
            result[b] = found[a]
    return result


def _match_event(ref: Ref, words: list[str], at: int, bound: Binding) -> list[Reading]:
    names = ("A", "B", "S") if ref.rule == "both" else ("A", "S")
    inner = {name: bound[name] for name in names if name in bound}
    readings = []
    for end, found in _walk(_trie(ref.rule), words, at, inner, []):
        if "partial" in found:
            readings.append((end, found))
        elif _agrees(found):
            readings.append((end, {**bound, "events": (*bound.get("events", ()), found)}))
    return readings


def _agrees(bound: Binding) -> bool:
    """Whether the verbs of a reading fit its subject."""
    subject = bound.get("S")
    return subject is None or all(world.agree(subject, base) == word for base, word in bound.get("agree", ()))


def parse(words: list[str], at: int = 0) -> list[Reading]:
    """All readings of a sentence (rule "NAME.s") that starts at `words[at]` (lower-case tokens), the longest first.

    A reading is (end, binding); binding holds the variables, "rule", "R" (the relation, if any) and "events" (the
    readings of its {>...} parts); or "partial" where the words end before the sentence does.
    """
    readings = _walk(_trie("s"), words, at, {}, [])
    found = [(end, bound) for end, bound in readings if "partial" in bound or _agrees(bound)]
    return sorted(found, key=lambda reading: ("partial" in reading[1], -reading[0]))
