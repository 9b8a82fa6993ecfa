"""Conversations that ask for a skill: comparing, spelling, counting, adding by hand, remembering, reading.

Each is a function (rng, test) -> turns; one combination in `SHARE` (a pair compared, a word spelled, a person's name)
is used in the test split only.
"""

from functools import cache
from random import Random

from nanochat.tinyworld import facts, lessons, sums, world
from nanochat.tinyworld.questions import careless, draws, upper_first

SHARE = 8
Turn = tuple[str, str | list[dict]]  # what the user types, what the assistant says

# -- comparing -------------------------------------------------------------------------------------------------------

COMPARED = {
    "size": ("bigger", "smaller"),
    "speed": ("faster", "slower"),
    "height": ("taller", "shorter"),
    "weight": ("heavier", "lighter"),
    "age": ("older", "younger"),
}
COMPARE_ASKS = (
    "Which is {more}, {x} or {y}?", "What is {more}: {x} or {y}?", "Which one is {more}, {x} or {y}?",
    "{X} or {y}: which is {more}?", "Tell me which is {more}, {x} or {y}.", "Do you know which is {more}, {x} or {y}?",
)  # fmt: skip


def compare(rng: Random, test: bool) -> list[Turn]:
    """Which is bigger? Is a mouse bigger than a horse?"""
    while True:
        name = rng.choice(tuple(world.orders()))
        low, high = sorted(rng.sample(range(len(world.orders()[name])), 2))
        less, more = (world.form(world.orders()[name][k], "a") for k in (low, high))
        if draws(SHARE, "compare", name, less, more) == test:
            break
    up = rng.random() < 0.5
    x, y = (more, less) if up else (less, more)
    word = COMPARED[name][0 if up else 1]
    truth = f"{x} is {word} than {y}."
    if rng.random() < 0.3:
        said = rng.random() < 0.5
        question = f"Is {x} {word} than {y}?" if said else f"Is {y} {word} than {x}?"
        return [(careless(rng, question), ("Yes, " if said else "No, ") + truth)]
    first, second = rng.sample((x, y), 2)
    question = rng.choice(COMPARE_ASKS).format(more=word, x=first, y=second, X=upper_first(first))
    return [(careless(rng, question), upper_first(truth))]


@cache
def short_words(test: bool) -> tuple[str, ...]:
    """Words of the facts with three to five letters, to spell."""
    names = sorted({name for f in facts.facts() for name in (f.subject, f.object)})
    return tuple(
        w for w in names if w.isalpha() and w.islower() and 3 <= len(w) <= 5 and draws(SHARE, "spell", w) == test
    )


BY_HAND_ASKS = (
    "How do you add {} and {} by hand?", "Add {} and {} by hand.", "Show me how to add {} and {} step by step.",
    "How can I add {} and {} on paper?", "Explain step by step how to add {} and {}.", "Add {} and {} step by step.",
)  # fmt: skip


def by_hand(rng: Random, test: bool) -> list[Turn]:
    """A sum worked digit by digit, without the calculator."""
    while True:
        a, b = rng.randrange(10, 50), rng.randrange(10, 50)
        if sums.held_out(a, b) == test:
            return [(careless(rng, rng.choice(BY_HAND_ASKS).format(a, b)), lessons.steps_of_sum(a, b, rng))]


def letters(rng: Random, test: bool) -> list[Turn]:
    """Spelling a word, its first and last letter, its length; a letter in it counted with the tool."""
    word, draw = rng.choice(short_words(test)), rng.random()
    if draw < 0.4:
        return [count_letter(rng, test)]
    if draw < 0.65:
        return [(rng.choice(SPELL_ASKS).format(word), f"The word {word} is spelled {'-'.join(word)}.")]
    if draw < 0.85:
        end, verb, letter = rng.choice((("first", "begins", word[0]), ("last", "ends", word[-1])))
        return [(f"What is the {end} letter of {word}?", f"The word {word} {verb} with the letter {letter}.")]
    length = world.number_word(len(word))
    return [(rng.choice(LENGTH_ASKS).format(word), f"{'-'.join(word)}: {length} letters.")]


SPELL_ASKS = (
    "Spell {}.", "How do you spell {}?", "Can you spell {}?", "Please spell the word {}.", "How is {} spelled?",
    "Can you spell the word {} for me?", "Tell me how to spell {}.", "What are the letters of {}?",
)  # fmt: skip
LENGTH_ASKS = ("How many letters are in {}?", "How many letters does {} have?", "Count the letters of {}.")
COUNT_ASKS = (
    'How many times is the letter {l} in "{w}"?', 'How many {l} are in "{w}"?', 'How many letters {l} are in "{w}"?',
    'How often does {l} come in "{w}"?', 'Count the letter {l} in "{w}".', 'How often is {l} in the word "{w}"?',
)  # fmt: skip


def count_letter(rng: Random, test: bool) -> Turn:
    """A letter counted with the tool; its quotation marks, used in both places, keep the word in the same tokens."""
    while True:
        fact = rng.choice(facts.facts())
        word = rng.choice((fact.subject, fact.object)).split()[-1].lower()
        letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("aeiost")
        if word.isalpha() and draws(SHARE, "letter", word, letter) == test:
            break
    n = word.count(letter)
    parts = [
        {"type": "python", "text": f'"{word}".count("{letter}")'},
        {"type": "python_output", "text": str(n)},
        {"type": "text", "text": f"The letter {letter} is in {word} {n} {'time' if n == 1 else 'times'}."},
    ]
    return rng.choice(COUNT_ASKS).format(w=word, l=letter), parts


COUNT_UP = (
    "Count from {a} to {b}.", "Please count from {a} to {b}.", "Can you count from {a} to {b}?",
    "Say the numbers from {a} to {b}.", "Which numbers are there from {a} to {b}?",
)  # fmt: skip


def count(rng: Random, test: bool) -> list[Turn]:
    """Counting in words, up or down, at most ten numbers."""
    while True:
        start, stop = rng.randrange(1, 15), rng.randrange(1, 21)
        if 2 <= abs(stop - start) <= 9 and draws(SHARE, "count", str(start), str(stop)) == test:
            break
    step = 1 if stop > start else -1
    numbers = [world.number_word(n) for n in range(start, stop + step, step)]
    question = rng.choice(COUNT_UP).format(a=numbers[0], b=numbers[-1])
    return [(careless(rng, question), upper_first(", ".join(numbers)) + ".")]


# -- what was just said ----------------------------------------------------------------------------------------------

INTRODUCE = (
    "My name is {}.",
    "I am {}.",
    "Hi, I am {}.",
    "Hello, my name is {}.",
    "Hi! My name is {}.",
    "I am called {}.",
)
MY_NAME = ("What is my name?", "Who am I?", "Do you remember my name?", "Tell me my name.", "What am I called?")


@cache
def people(test: bool) -> tuple[str, ...]:
    """First names of the split."""
    names = world.lists()["girl"] + world.lists()["boy"]
    return tuple(name for name in names if draws(SHARE, "person", name) == test)


def remember(rng: Random, test: bool) -> list[Turn]:
    """The user says something about himself and asks for it later."""
    kind = rng.randrange(3)
    if kind == 0:
        name = rng.choice(people(test))
        told = (rng.choice(INTRODUCE).format(name), f"Nice to meet you, {name}!")
        asked = (rng.choice(MY_NAME), f"Your name is {name}.")
    elif kind == 1:
        pet, name = rng.choice(world.lists()["pet"]), rng.choice(world.lists()["pet_name"])
        told = (f"{rng.choice(('I have', 'We have'))} a {pet} called {name}.", f"{name} is a nice name for a {pet}.")
        asked = (f"What is my {pet} called?", f"Your {pet} is called {name}.")
    else:
        colour = rng.choice(world.lists()["colour"])
        told = (
            f"{rng.choice(('My favourite colour is', 'I like'))} {colour}.",
            f"{upper_first(colour)} is a nice colour.",
        )
        asked = ("Which colour do I like?", f"You like {colour}.")
    return [told] if rng.random() < 0.3 else [told, asked]


def reading(rng: Random, test: bool) -> list[Turn]:
    """Two sentences and a question that they answer."""
    first, second = rng.sample(people(test), 2)
    one, two = rng.sample(world.lists()["toy"], 2)
    c, d = rng.sample(world.lists()["colour"], 2)
    told = f"{first} has {world.article(c)} {c} {one} and {second} has {world.article(d)} {d} {two}."
    who, colour, thing = rng.choice(((first, c, one), (second, d, two)))
    question, reply = rng.choice(
        (
            (f"Who has the {thing}?", f"{who} has the {thing}."),
            (f"What does {who} have?", f"{who} has {world.article(colour)} {colour} {thing}."),
            (f"What colour is the {thing}?", f"The {thing} is {colour}."),
        )
    )
    return [(f"{told} {question}", reply)]
