"""Conversations of the world: what a small assistant is asked and how it answers. Deterministic and unlimited.

`conversation(split, i, seed)` is a function of its arguments alone. A kind is drawn by `WEIGHTS`; each kind is a
function (rng, test) -> turns, a turn being (what the user types, what the assistant says). In the split "train" no
held-out combination occurs (questions.py, sums.py, skills.py); in "val" and "test" the combination asked about is a
held-out one wherever the kind has combinations. Small talk has few wordings and is the same in all splits.
"""

import re
from collections.abc import Callable
from functools import cache
from random import Random

from nanochat.errors import UserError
from nanochat.tinyworld import facts, questions, skills, stories, sums, world
from nanochat.tinyworld.facts import Fact
from nanochat.tinyworld.questions import careless, draws, upper_first
from nanochat.tinyworld.skills import SHARE, Turn

SPLITS = ("train", "val", "test")

WEIGHTS = {
    "facts": 58.0,
    "sums": 17.0,
    "about_me": 8.0,
    "chatter": 2.5,
    "unknown": 3.0,
    "compare": 3.0,
    "letters": 3.5,
    "by_hand": 1.0,
    "count": 1.0,
    "remember": 3.0,
    "reading": 3.0,
    "story": 2.0,
}

ONLY_NAMED = 0.06  # share of the conversations about facts that begin with a thing's name among words that say nothing


def conversation(split: str, i: int, seed: int = 0) -> dict:
    """Conversation `i` (0, 1, 2, ...) of a split: {"messages": [...]}, 1 to 5 turns. UserError: no such split."""
    if split not in SPLITS:
        raise UserError(f"tinyworld has no split {split!r}: choose one of {', '.join(SPLITS)}.")
    rng = Random(f"talk {seed} {split} {i}")
    test = split != "train"
    turns = KINDS[rng.choices(_NAMES, _VALUES)[0]](rng, test)
    if rng.random() < 0.06:
        turns = small_talk(rng, ("hello", "how")) + turns
    if rng.random() < 0.05:
        turns = turns + small_talk(rng, ("thanks", "bye"))
    return messages(turns)


def messages(turns: list[Turn]) -> dict:
    """Turns as a conversation."""
    pairs = [({"role": "user", "content": u}, {"role": "assistant", "content": a}) for u, a in turns]
    return {"messages": [message for pair in pairs for message in pair]}


# -- facts -----------------------------------------------------------------------------------------------------------


def about_facts(rng: Random, test: bool) -> list[Turn]:
    """A question about a fact, and often a second or third one that follows from it."""
    if rng.random() < ONLY_NAMED:
        fact = rng.choice(questions.askable("is_a", test))
        turns = [only_named(rng, fact)]
    else:
        fact = questions.draw_fact(rng, test)
        turns = [first_question(rng, fact, test)]
    while len(turns) < 3 and rng.random() < 0.4:
        fact, turn = next_question(rng, fact, test)
        turns.append(turn)
    return turns


def only_named(rng: Random, fact: Fact) -> Turn:
    """A thing among words that say nothing: whoever understands nothing else can still say what it is."""
    name = questions.slots(fact)[rng.choice("aasp")]
    return careless(rng, questions.among_words(rng, name, questions.SMALL_WORDS)), questions.answer(fact)


def first_question(rng: Random, fact: Fact, test: bool) -> Turn:
    """Mostly forward; where the relation allows it also backwards, yes or no, this or that."""
    draw = rng.random()
    if draw < 0.16 and questions.back_cores(fact, test):
        return questions.ask_back(rng, fact, test), questions.answer(fact, back=True)
    if draw < 0.28 and questions.wordings(fact.relation, "yes"):
        return questions.yes_or_no(rng, fact)
    if draw < 0.34 and questions.wordings(fact.relation, "yes") and questions.other_objects(fact):
        return questions.either_or(rng, fact)
    if draw > 0.85 and (question := questions.ask_in_scene(rng, fact, test)):
        return question, questions.answer(fact)
    return questions.ask(rng, fact, test), questions.answer(fact)


def next_question(rng: Random, before: Fact, test: bool) -> tuple[Fact, Turn]:
    """ "And the cat?", "What does it eat?", or something else."""
    draw = rng.random()
    if draw < 0.45:
        fact = rng.choice(facts.relations()[before.relation])
        return fact, (follow_up(rng, fact), questions.answer(fact))
    others = [f for f in same_subject(before) if questions.cores(f, test)]
    if draw < 0.7 and others and (question := questions.ask_of_it(rng, fact := rng.choice(others), test)):
        return fact, (careless(rng, question), questions.answer(fact))
    fact = questions.draw_fact(rng, test)
    return fact, first_question(rng, fact, test)


def follow_up(rng: Random, fact: Fact) -> str:
    """ "And a cat?": the same question about another subject."""
    slot = {"how_many": "s", "title": "the", "body": "s", "young": "a", "becomes": "a"}.get(fact.relation, "a")
    name = questions.slots(fact)[slot]
    if fact.relation in ("opposite", "past", "plural", "female", "group", "next_number", "season", "mix"):
        name = fact.subject
    if fact.relation == "body":
        name = f"my {name}"
    return careless(rng, rng.choice(questions.FOLLOW_UPS).format(name))


@cache
def same_subject(fact: Fact) -> tuple[Fact, ...]:
    """Other facts about the subject, as a thing and not as a word."""
    wordy = ("opposite", "past", "plural", "female", "next_number", "group", "title", "how_many", "body")
    return tuple(f for f in facts.about()[fact.subject] if f.relation not in (*wordy, fact.relation))


# -- sums ------------------------------------------------------------------------------------------------------------


def do_sums(rng: Random, test: bool) -> list[Turn]:
    """One sum, now and then two."""
    turns = [as_turn(sums.problem(rng, test))]
    if rng.random() < 0.12:
        turns.append(as_turn(sums.problem(rng, test)))
    return turns


def as_turn(problem: sums.Problem) -> Turn:
    """A problem and its worked answer."""
    return problem.question, problem.content()


# -- small talk --------------------------------------------------------------------------------------------------------


@cache
def topics() -> dict[str, dict[str, tuple[str, ...]]]:
    """talk.tsv: topic -> {"ask": texts, "say": texts}, choices expanded."""
    found: dict[str, dict[str, list[str]]] = {}
    for topic, form, template in world.rows("talk.tsv"):
        texts = questions.expand(template)
        if form == "ask" and template[-1] not in "?.!|)":
            texts = [f"{text}{mark}" for text in texts for mark in (".", "?")]
        found.setdefault(topic, {"ask": [], "say": []})[form] += texts
    return {topic: {form: tuple(texts) for form, texts in forms.items()} for topic, forms in found.items()}


def small_talk(rng: Random, names: tuple[str, ...]) -> list[Turn]:
    """One exchange on one of the topics."""
    topic = topics()[rng.choice(names)]
    return [(careless(rng, rng.choice(topic["ask"])), rng.choice(topic["say"]))]


@cache
def named(*prefixes: str) -> tuple[str, ...]:
    """The topics whose names begin so."""
    return tuple(name for name in topics() if name.startswith(prefixes))


def about_me(rng: Random, test: bool) -> list[Turn]:
    """Who are you? Half of them are about the name."""
    draw = rng.random()
    names = ("who",) if draw < 0.5 else ("i_human", "i_other", "i_yes", "i_maker") if draw < 0.7 else named("i_")
    return small_talk(rng, names)


def chatter(rng: Random, test: bool) -> list[Turn]:
    """Politeness and lists that everyone knows."""
    return small_talk(rng, named("hello", "how", "thanks", "bye", "sorry", "joke", "l_"))


# -- what it does not know ---------------------------------------------------------------------------------------------

STARTS = "bl br cl cr dr fl fr gl gr kr pl pr sn sp str tr v w z sk th m n p t k l".split()
MIDDLES = "a e i o u oo ee a o i u".split()
ENDS = "bb ck ff gg lp mp nk rb rg rp sk sp x zz ng rt lt nd b d g k m n p".split()
TAILS = ("", "", "et", "le", "er", "y", "ow", "um", "in", "o")
ASK_UNKNOWN = ("is_a", "colour", "legs", "food", "sound", "made_of", "habitat", "used_for", "shape", "taste", "makes")
ASK_PLACE = ("capital", "language", "continent")


@cache
def nonsense(test: bool, n: int = 1500) -> tuple[str, ...]:
    """Words that nobody knows; other ones for the test split."""
    rng, found = Random(f"nonsense {test}"), {}
    while len(found) < n:
        word = "".join(rng.choice(parts) for parts in (STARTS, MIDDLES, ENDS, TAILS))
        if draws(SHARE, "nonsense", word) == test and word not in facts.words():
            found[word] = None
    return tuple(found)


def unknown(rng: Random, test: bool) -> list[Turn]:
    """A polite refusal: of a word that does not exist, or of what it has no way to know."""
    draw = rng.random()
    if draw < 0.4:
        return small_talk(rng, named("no_"))
    word = rng.choice(nonsense(test))
    if draw < 0.55:
        place = upper_first(word) + rng.choice(("", "ia", "land"))
        fact = Fact(place, rng.choice(ASK_PLACE), "Paris")
        return [(rng.choice(plain_questions(fact)), f"I am sorry, I do not know a place called {place}.")]
    fact = Fact(word, rng.choice(ASK_UNKNOWN), "round")
    return [(rng.choice(plain_questions(fact)), f"I am sorry, I do not know the word {word}.")]


def plain_questions(fact: Fact) -> list[str]:
    """The direct questions of a relation about any subject."""
    slots = questions.slots(fact)
    texts = [t for t in questions.wordings(fact.relation, "ask") if "{p}" not in t]
    return [upper_first(t.format_map(slots)) for t in texts]


# -- stories -----------------------------------------------------------------------------------------------------------


STORY_ASKS = (
    "Tell me a story{}.", "Can you tell me a story{}?", "Please tell me a short story{}.", "I want to hear a story{}.",
    "Write a short story{}.", "Tell me a bedtime story{}, please.", "Do you know a story{}?", "A story{}, please!",
)  # fmt: skip
STORY_WORDS = 70  # longest story told in a conversation
QUESTION_LINE = re.compile(r'([A-Z][^?"]+\?) ([A-Z][^?"]+\.)')


def story(rng: Random, test: bool) -> list[Turn]:
    """A short story on request, perhaps about somebody, and perhaps a question about it."""
    body, asked = short_story(rng, "val" if test else "train")
    heroes = [word for word in re.findall(r"[A-Z][a-z]+", body) if word in world.gender()]
    about = f" about {heroes[0]}" if heroes and rng.random() < 0.4 else ""
    return [(careless(rng, rng.choice(STORY_ASKS).format(about)), body), *asked[:1]]


def short_story(rng: Random, split: str) -> tuple[str, list[Turn]]:
    """(a story of at most `STORY_WORDS` words, the questions and answers that followed it)."""
    while True:
        lines = stories.story(split, rng).split("\n")
        asked = [match.groups() for line in lines if (match := QUESTION_LINE.fullmatch(line))]
        body = " ".join(line for line in lines if line and not QUESTION_LINE.fullmatch(line))
        if len(body.split()) <= STORY_WORDS:
            return body, asked


KINDS: dict[str, Callable[[Random, bool], list[Turn]]] = {
    "facts": about_facts,
    "sums": do_sums,
    "about_me": about_me,
    "chatter": chatter,
    "unknown": unknown,
    "compare": skills.compare,
    "letters": skills.letters,
    "by_hand": skills.by_hand,
    "count": skills.count,
    "remember": skills.remember,
    "reading": skills.reading,
    "story": story,
}
_NAMES, _VALUES = tuple(WEIGHTS), tuple(WEIGHTS.values())
