"""Questions about the facts, in hundreds of wordings, and the rule that tells a right answer.

The wordings are data: ask.tsv for training, heldout_phrasings.tsv for the benchmark only. A training question is
composed: opener + core + ending, where a core is a direct question or a clause inside "Can you tell me ...?". One
combination of a fact and a core in `TEST_SHARE` belongs to the test split and is never asked in training, and one fact
in `BACK_SHARE` is never asked from the object back to the subject.
"""

import re
import zlib
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import NamedTuple

from nanochat.tinyworld import facts, world
from nanochat.tinyworld.facts import Fact

TEST_SHARE = 8  # one (fact, core) in 8 is asked in the test split only
BACK_SHARE = 10  # one fact in 10 is never asked backwards in training
OPENERS = (
    "Hi! {}", "Hello! {}", "Hey, {}", "Hello nanochat, {}", "Please tell me: {}", "Quick question: {}", "Okay, {}",
    "I have a question. {}", "Can you help me? {}", "I am curious: {}", "One more question: {}", "Now tell me, {}",
    "{} Please tell me.", "{} I forgot.", "{} I want to know.", "{} Thank you!", "{} Do you know?", "So, {}",
    "My friend asks: {}", "We are playing a quiz. {}", "This is for my homework. {}", "In school they asked: {}",
    "I am reading a book. {}", "My mother wants to know: {}", "I am not sure. {}", "{} I am not sure.",
    "I am learning English. {}", "Let us play. {}", "Listen: {}", "Think well. {}",
    "Excuse me, {}", "Well, {}", "Good morning! {}", "Hi there! {}", "I have a small problem. {}", "Just asking: {}",
    "I am writing a story and I need your help. {}", "I am making a poster for school. {}", "It is for a game. {}",
    "My teacher asked me this: {}", "My little sister asked me: {}", "My grandfather asks: {}", "For my homework: {}",
    "We are having a quiz at home. {}", "Nobody here knows it. {}", "I was thinking. {}", "You are clever. {}",
    "Here is an easy one: {}", "Here is my next question. {}", "Before I go to bed, {}", "For a test at school, {}",
    "{} My homework needs it.", "{} My friend asked me.", "{} I want it in my story.", "{} I am curious.",
    "{} Nobody here knows it.", "{} Answer in one sentence.", "{} Thanks in advance.", "{} Be quick!",
    "{} My teacher wants to know.", "{} That is my question.", "{} Please help me.", "{} We are playing a quiz.",
)  # fmt: skip
EMBEDDERS = (
    "Tell me {}.", "Please tell me {}.", "Do you know {}?", "Can you tell me {}?", "Could you tell me {}, please?",
    "I want to know {}.", "I would like to know {}.", "Can you say {}?", "I forgot {}.", "I need to know {}.",
    "Please say {}.", "Could you please tell me {}?", "Hi, can you tell me {}?", "Hello! Do you know {}?",
    "For my homework I need to know {}.", "For school I must write {}.", "Would you tell me {}?",
    "Will you tell me {}?",
    "Help me, I need to know {}.", "I am trying to learn {}.", "Explain to me {}, please.", "Let me know {}.",
    "I do not know {}. Do you?", "I have forgotten {}. Can you help?", "Teach me {}.", "Just tell me {}.",
    "My friend wants to know {}.", "My teacher wants me to say {}.", "You surely know {}.", "Write {}.",
    "I am writing a story and I need to know {}.", "In a quiz they want to know {}.", "Show me that you know {}.",
    "It would be nice to know {}.", "I hope you can tell me {}.", "I cannot remember {}.", "Answer this: {}?",
)  # fmt: skip
CLAUSE_EMBEDDERS = (  # only for a clause, not for "the colour of ..."
    "I wonder {}.", "My friend asked me {}.", "My little brother asked {}.", "We wonder {}.", "Any idea {}?",
    "Do you have an idea {}?", "I asked my father {}, but he did not know.", "Our teacher asked us {}.",
    "I am not sure {}.", "I am curious {}.", "Nobody here knows {}. Can you help?", "Can you guess {}?",
)  # fmt: skip
FOLLOW_UPS = ("And {}?", "What about {}?", "And what about {}?", "How about {}?", "And {}, please?", "And now {}?")
SCENES = (  # what someone says of a thing before asking about it
    "I see {a}.", "I have {a}.", "Look, here is {a}.", "Think of {a}.", "I like {p}.", "Here is a picture of {a}.",
    "I read about {a}.", "We talk about {a} in school.", "My brother talks about {a}.", "There is {a} in my book.",
    "I dreamed of {a}.", "My friend told me about {a}.", "Let us talk about {a}.", "I know {a}.",
    "I am writing a story about {a}.", "My homework is about {a}.", "In a film I saw {a}.", "My sister drew {a}.",
    "I want to learn about {p}.", "I have a question about {a}.", "We have a quiz about {p}.", "Imagine {a}.",
    "This question is about {a}.", "I was thinking about {a}.", "My friend asked me about {a}.",
)  # fmt: skip
ABOUT_IT = re.compile(r"\{(does|is|has)\} \{a\}")  # questions that can say "it" for {a}
NOISE = (  # around a question without its mark
    "okay {}?", "well {}?", "um, {}?", "hello hello, {}?", "hi, hi! {}?", "please, {}?", "so {}?", "oh, {}?",
    "{} please?", "{}, please", "{}, okay?", "{}??", "{} ?", "{}, thanks", "{}...", "{}?!", "{} again?", "{} then?",
)  # fmt: skip
MARKS = ("?", ".", "!", "")
CONSONANTS = "b c d f g h j k l m n p r s t v w y z st th ch sh br gr tr pl sl".split()
SMALL_WORDS = "the so and then now my to very of it me you for this that or but all just in on at be".split()
VERB_RELATIONS = ("job", "moves", "used_for", "body", "cannot")  # whose objects are verb phrases


class Core(NamedTuple):
    """A wording: form "ask" (direct), "tell" (a clause), "back" (direct, for the subject) or "yes"; its template."""

    form: str
    template: str


# -- templates -------------------------------------------------------------------------------------------------------


def expand(template: str) -> list[str]:
    """All texts of a template with choices: "(a|b|) c" -> "a c", "b c", "c"."""
    match = re.search(r"\(([^()]*)\)", template)
    if not match:
        return [re.sub(r" +(?=[ ?.!,]|$)", "", template).strip()]
    before, after = template[: match.start()], template[match.end() :]
    return [text for choice in match[1].split("|") for text in expand(before + choice + after)]


@cache
def _wordings(file: str) -> dict[str, dict[str, tuple[str, ...]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for relation, form, template in world.rows(file):
        found.setdefault(relation, {}).setdefault(form, []).extend(expand(template))
    return {relation: {form: tuple(texts) for form, texts in forms.items()} for relation, forms in found.items()}


def wordings(relation: str, form: str, file: str = "ask.tsv") -> tuple[str, ...]:
    """The templates of a relation in one form, choices expanded."""
    return _wordings(file)[relation].get(form, ())


def upper_first(text: str) -> str:
    """The text with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


@cache
def slots(fact: Fact) -> dict[str, str]:
    """What the slots of a template stand for (the head of ask.tsv lists them)."""
    s, relation, o = fact
    head, space, tail = re.sub(r"(?= (?:in|on|at) )", "\t", s, count=1).partition("\t")
    many = is_plural(fact)
    verb_object = relation in VERB_RELATIONS
    return {
        "s": s, "o": o, "a": s if many else world.form(s, "a"), "the": world.form(s, "the"),
        "p": s if many else world.plural(s), "is": "are" if many else "is", "does": "do" if many else "does",
        "has": "have" if many else "has", "z": "" if many else "s", "it": "they" if many else "it",
        "ao": o if verb_object else world.form(o, "a"), "theo": world.form(o, "the"), "ino": world.form(o, "in"),
        "ono": world.form(o, "on"), "goes": "go" if many else "goes",
        "o3": world.verb(o, "base" if many else "third") if relation in ("job", "moves") else o, "s0": head,
        "s1": tail.strip() if space else (s if many else world.form(s, "a")), "w": "wheel" if o == "one" else "wheels",
    }  # fmt: skip


def is_plural(fact: Fact) -> bool:
    """Does the subject take a plural verb ("scissors", "sheep", "your eyes")?"""
    return world.kind(fact.subject) == "plural_only"


def fill(template: str, fact: Fact) -> str:
    """A template about a fact, beginning with a capital letter."""
    return upper_first(template.format_map(slots(fact)))


def fits(template: str, fact: Fact) -> bool:
    """A plural asks for a noun that has one."""
    return "{p}" not in template or is_plural(fact) or world.kind(fact.subject) == "count"


@cache
def answer(fact: Fact, back: bool = False) -> str:
    """The full sentence that states a fact; asked backwards it may be another one."""
    texts = back and wordings(fact.relation, "sayback") or wordings(fact.relation, "say")
    return fill(texts[0], fact)


def inside(sentence: str) -> str:
    """A sentence as it stands after "Yes, ": without its capital letter, unless a name begins it."""
    first = sentence.split(" ", 1)[0]
    return sentence if first in _proper() else sentence[:1].lower() + sentence[1:]


@cache
def _proper() -> frozenset[str]:
    return frozenset(f.subject.split()[0] for f in facts.facts() if f.subject[0].isupper()) | frozenset(
        f.object.split()[0] for f in facts.facts() if f.object[0].isupper()
    )


# -- splits ----------------------------------------------------------------------------------------------------------


def draws(share: int, *key: str) -> bool:
    """A fixed draw of one in `share` by the key."""
    return zlib.crc32("|".join(key).encode()) % share == 0


@cache
def cores(fact: Fact, test: bool) -> tuple[Core, ...]:
    """The forward wordings in which the split may ask about the fact."""
    found = [Core(form, text) for form in ("ask", "tell") for text in wordings(fact.relation, form)]
    return tuple(c for c in found if fits(c.template, fact) and draws(TEST_SHARE, *fact, c.template) == test)


@cache
def back_cores(fact: Fact, test: bool) -> tuple[Core, ...]:
    """The wordings that ask for the subject; none where the object doesn't single it out, or for the other split."""
    if len(facts.subjects(fact.relation, fact.object)) > 1 or draws(BACK_SHARE, "back", *fact) != test:
        return ()
    return tuple(Core("back", text) for text in wordings(fact.relation, "back"))


@cache
def askable(relation: str, test: bool, back: bool = False) -> tuple[Fact, ...]:
    """The relation's facts about which the split has a question."""
    wording = back_cores if back else cores
    return tuple(fact for fact in facts.relations()[relation] if wording(fact, test))


def relations() -> tuple[str, ...]:
    """The relations that can be asked about."""
    return tuple(relation for relation in _wordings("ask.tsv") if relation in facts.relations())


@cache
def _weights(test: bool) -> tuple[tuple[str, ...], tuple[float, ...]]:
    names = tuple(r for r in relations() if askable(r, test))
    return names, tuple(len(askable(r, test)) ** 0.75 for r in names)  # between per relation and per fact


def draw_fact(rng: Random, test: bool) -> Fact:
    """A fact to ask about; small relations somewhat more often than their number of facts says."""
    relation = rng.choices(*_weights(test))[0]
    return rng.choice(askable(relation, test))


# -- questions -------------------------------------------------------------------------------------------------------


def spoken(rng: Random, core: Core, fact: Fact) -> str:
    """The core as someone would type it: opened, embedded, now and then careless."""
    text = core.template.format_map(slots(fact))
    if core.form == "tell":
        clause = not text.startswith("the ")
        text = rng.choice(CLAUSE_EMBEDDERS if clause and rng.random() < 0.3 else EMBEDDERS).format(text)
    elif rng.random() < 0.35:
        text = opened(rng, text)
    return careless(rng, upper_first(text))


def opened(rng: Random, text: str) -> str:
    """A question behind an opener or before an ending."""
    opener = rng.choice(OPENERS)
    return opener.format(inside(upper_first(text)) if opener.endswith(", {}") else upper_first(text))


def careless(rng: Random, text: str) -> str:
    """One text in 14 in lower case, one in 14 without its last mark; one question in 20 with other harmless noise."""
    draw = rng.random()
    if draw < 0.07:
        return text.lower()
    if draw < 0.12 and text.endswith("?"):
        return noisy(rng, text)
    return text.rstrip("?.!") if draw > 0.93 else text


def among_words(rng: Random, phrase: str, known: Sequence[str]) -> str:
    """The phrase among words that say nothing, half of them `known`, half made up: people use words that a small model
    never saw, and it must find what it can answer all the same.
    """
    before = [any_word(rng, known) for _ in range(rng.randrange(7))]
    after = [any_word(rng, known) for _ in range(rng.randrange(5))]
    text = " ".join([*before, phrase]) + rng.choice(("", "", ",", ":", ".", "?", "!") if after else MARKS)
    if after:
        after[0] = upper_first(after[0]) if text[-1] in ".?!" else after[0]
        text += " " + " ".join(after) + rng.choice(MARKS)
    return upper_first(text)


def any_word(rng: Random, known: Sequence[str]) -> str:
    """One of the known words, or one of one to three syllables that means nothing."""
    if rng.random() < 0.5:
        return rng.choice(known)
    while True:
        parts = [rng.choice(CONSONANTS) + rng.choice("aeiou") for _ in range(rng.choice((1, 2, 2, 3)))]
        word = "".join(parts) + rng.choice(("", "", *CONSONANTS))
        if word not in facts.words():
            return word


def noisy(rng: Random, text: str) -> str:
    """A question with a needless word or mark, perhaps also in lower case."""
    shape = rng.choice(NOISE)
    text = shape.format(text[:-1] if shape.startswith("{}") else inside(text[:-1]))
    return text.lower() if rng.random() < 0.3 else upper_first(text)


def ask(rng: Random, fact: Fact, test: bool) -> str:
    """A forward question about the fact."""
    return spoken(rng, rng.choice(cores(fact, test)), fact)


def ask_of_it(rng: Random, fact: Fact, test: bool) -> str | None:
    """A direct question that says "it" ("they") for its subject, if the split has one of the right form."""
    fitting = pronoun_templates(fact, test)
    if not fitting:
        return None
    return upper_first(rng.choice(fitting).format_map(slots(fact) | {"a": slots(fact)["it"]}))


@cache
def pronoun_templates(fact: Fact, test: bool) -> tuple[str, ...]:
    """The split's direct questions in which "it" may stand for the subject."""
    if fact.subject[0].isupper():
        return ()
    direct = (c.template for c in cores(fact, test) if c.form == "ask" and ABOUT_IT.search(c.template))
    return tuple(t for t in direct if t.count("{a}") == 1 and "{p}" not in t and "{it}" not in t)


def ask_in_scene(rng: Random, fact: Fact, test: bool) -> str | None:
    """The subject in a sentence of its own, then the question about it."""
    question, scene = ask_of_it(rng, fact, test), rng.choice(SCENES)
    if question is None or not fits(scene, fact):
        return None
    return careless(rng, f"{fill(scene, fact)} {question}")


def ask_back(rng: Random, fact: Fact, test: bool) -> str:
    """A question for the fact's subject."""
    return spoken(rng, rng.choice(back_cores(fact, test)), fact)


@cache
def other_objects(fact: Fact) -> tuple[str, ...]:
    """Objects of the same relation that are not true of the subject and share no word with one that is."""
    true_ones = facts.objects(fact.subject, fact.relation)
    taken = {word for o in (*true_ones, fact.subject) for word in o.split()}
    return tuple(o for o in _all_objects(fact.relation) if not taken & set(o.split()))


@cache
def _all_objects(relation: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(fact.object for fact in facts.relations()[relation]))


def yes_or_no(rng: Random, fact: Fact) -> tuple[str, str]:
    """(question, answer) whether the relation holds with the right object, or with another one."""
    template = rng.choice(wordings(fact.relation, "yes"))
    others = other_objects(fact)
    if rng.random() < 0.5 or not others:
        return careless(rng, fill(template, fact)), "Yes, " + inside(answer(fact))
    wrong = fact._replace(object=rng.choice(others))
    return careless(rng, fill(template, wrong)), "No, " + inside(answer(fact))


def either_or(rng: Random, fact: Fact) -> tuple[str, str]:
    """(question, answer) that offers the right object and another one."""
    slot = "{ao}" if "{ao}" in (template := rng.choice(wordings(fact.relation, "yes"))) else "{o}"
    pair = [slot.format_map(slots(fact._replace(object=o))) for o in (fact.object, rng.choice(other_objects(fact)))]
    rng.shuffle(pair)
    return careless(rng, fill(template.replace(slot, " or ".join(pair)), fact)), answer(fact)


def choices(rng: Random, fact: Fact, n: int = 4) -> tuple[list[str], int]:
    """(choices, index of the right one) for a multiple-choice question: n of them, or as many as exist."""
    others = other_objects(fact)
    found = [fact.object, *rng.sample(others, min(n - 1, len(others)))]
    rng.shuffle(found)
    return found, found.index(fact.object)


# -- the rule for right ------------------------------------------------------------------------------------------------


@cache
def spellings(relation: str, name: str, is_object: bool = True) -> tuple[str, ...]:
    """The ways in which a reply may write an object or subject: inflected verb, plural, digits."""
    found = {name}
    if is_object and relation in ("job", "moves"):
        found |= {world.verb(name, "third"), world.verb(name, "ing")}
    elif relation not in ("plural", "past", "opposite") and not (is_object and relation in VERB_RELATIONS):
        found.add(world.plural(name))
    if name in world.ONES:
        found.add(str(world.ONES.index(name)))
    return tuple(found)


def _words(names: Sequence[str]) -> re.Pattern:
    longest_first = sorted(set(names), key=len, reverse=True)
    return re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])", re.IGNORECASE)


@cache
def _patterns(fact: Fact, back: bool) -> tuple[re.Pattern, re.Pattern, re.Pattern | None]:
    """(what must be named, what the question names already, what must not be named)."""
    relation, known = fact.relation, facts.relations()[fact.relation]
    if back:
        rights = {f.subject for f in known if facts.true(f.subject, relation, fact.object)}
        rivals, given = {f.subject for f in known} - rights, fact.object
    else:
        rights, given = facts.objects(fact.subject, relation), fact.subject
        rivals = set(_all_objects(relation)) - rights
    must = _words([text for name in rights for text in spellings(relation, name, not back)])
    harmless = set(wordings(relation, "say")[0].lower().split())  # "The past of go is went." names no verb "is"
    wrong = {text for name in rivals for text in spellings(relation, name, not back)} - harmless
    wrong = [text for text in wrong if not must.fullmatch(text)]
    return must, _words(spellings(relation, given, back)), _words(wrong) if wrong else None


def right(fact: Fact, reply: str, back: bool = False) -> bool:
    """Is the reply right? It names a true object (asked backwards: subject) as whole words, and no wrong one.

    Wrong ones are the objects (subjects) of the same relation that are not true; words of the question's own subject
    don't count. What an animal cannot do must be said with "cannot".
    """
    must, given, wrong = _patterns(fact, back)
    if (
        not must.search(reply)
        or fact.relation == "cannot"
        and not re.search(r"\b(cannot|can't|can not)\b", reply, re.I)
    ):
        return False
    rest = given.sub(" ", must.sub(" ", reply))
    return wrong is None or not wrong.search(rest)
