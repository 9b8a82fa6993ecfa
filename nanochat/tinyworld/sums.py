"""Arithmetic in conversation: questions whose answer comes from the calculator, and the verdict on a reply.

A problem is a question, the one expression that solves it, and its value. Where the question uses symbols, the call is
spelled as there, so that "482 + 37" is the very same token sequence in both (digits split in pairs from the left, and
spaces stand around the operator): copying is then all that a small model has to learn. A quarter of the questions stand
among words that say nothing, so that copying does not depend on the words around (dev/LOG.md). The first two numbers of
every problem are hashed: one pair in ten belongs to the test split and is never seen in training, in either order, with
any operator.

Kinds, easy first: plain ("What is 482 + 37?"), swapped ("Take 37 from 482."), story (one step in words), chain (three
numbers), large (four and five digits), two_step (a story with two steps). Of the kinds of BEYOND fine-tuning shows
few, so that something is left to reinforcement: long (six to eight digits), four (four numbers to add), products (two
products to add).
"""

import random
import re
import zlib
from dataclasses import dataclass
from functools import cache

from nanochat.tinyworld import facts, questions

EASY = ("plain", "swapped", "story")
HARD = ("chain", "large", "two_step")
BEYOND = ("long", "four", "products")
KINDS = EASY + HARD + BEYOND
SMALL = 25  # sums of smaller numbers are taught whole by the documents

NAMES = ("Anna", "Ben", "Clara", "David", "Ella", "Finn", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo", "Mia", "Noah")
THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "cookies",
    "eggs",
    "flowers",
    "marbles",
    "nuts",
    "pencils",
    "shells",
    "stamps",
)
BOXES = ("boxes", "bags", "baskets", "jars", "packs", "rows")


@dataclass(frozen=True)
class Problem:
    """A question as a person types it, the calculator's expression and value, the reply with "{v}" for the value."""

    kind: str
    question: str
    expression: str
    value: int
    reply: str = "The answer is {v}."

    def content(self) -> list[dict]:
        """The assistant's turn: the call, its output, one sentence."""
        return [
            {"type": "python", "text": self.expression},
            {"type": "python_output", "text": str(self.value)},
            {"type": "text", "text": self.reply.format(v=self.value)},
        ]

    def conversation(self) -> dict:
        return {
            "messages": [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.content()}]
        }


def held_out(a: int, b: int) -> bool:
    """Is the pair {a, b} of the test split? One in ten is; pairs below 25 never, they are the small table."""
    return max(a, b) >= SMALL and zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % 10 == 0


def final_number(text: str) -> float | None:
    """The last number written in `text`; thousands commas, a dollar sign and a closing full stop don't matter."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def right(problem_value: float, text: str) -> bool:
    """Is the last number in `text` the value (to 1e-6)?"""
    number = final_number(text)
    return number is not None and abs(number - problem_value) < 1e-6


# -- numbers ---------------------------------------------------------------------------------------------------------


def digits(rng: random.Random, n: int) -> int:
    """A number of exactly n digits."""
    return rng.randrange(10 ** (n - 1) if n > 1 else 2, 10**n)


def pair(rng: random.Random, test: bool, sizes_a: tuple[int, ...], sizes_b: tuple[int, ...]) -> tuple[int, int]:
    """Two numbers whose pair lies in the wanted split; sizes are the counts of digits to choose from."""
    while True:
        a, b = digits(rng, rng.choice(sizes_a)), digits(rng, rng.choice(sizes_b))
        if held_out(a, b) == test:
            return a, b


def operands(rng: random.Random, test: bool, op: str, sizes: tuple[int, ...]) -> tuple[int, int]:
    """(a, b) such that `a op b` is a whole number, not negative."""
    if op != "/":
        a, b = pair(rng, test, sizes, sizes)
        return (max(a, b), min(a, b)) if op == "-" else (a, b)
    while True:
        b, quotient = digits(rng, rng.choice((1, 1, 2))), digits(rng, rng.choice((1, 2)))
        if b > 1 and held_out(b * quotient, b) == test:
            return b * quotient, b


def value_of(a: int, op: str, b: int) -> int:
    """a op b in whole numbers."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]


# -- wordings: {e} is the expression, in symbols or in words --------------------------------------------------------

WORDS = {
    "+": ("plus", "plus", "added to", "and"),
    "-": ("minus", "minus", "take away", "less"),
    "*": ("times", "times", "multiplied by", "x"),
    "/": ("divided by", "divided by", "over"),
}
NOUNS = {
    "+": ("the sum of {a} and {b}", "the total of {a} and {b}"),
    "-": ("the difference between {a} and {b}", "the difference of {a} and {b}"),
    "*": ("the product of {a} and {b}", "{a} groups of {b}"),
    "/": ("the quotient of {a} and {b}", "{a} shared by {b}"),
}
ASKS = (
    "What is {e}?",
    "What is {e}?",
    "How much is {e}?",
    "Calculate {e}.",
    "Please calculate {e}.",
    "Can you work out {e}?",
    "What does {e} make?",
    "Tell me what {e} is.",
    "Could you compute {e} for me?",
    "I need to know {e}.",
    "Find {e}.",
    "Work out {e}, please.",
    "Do you know what {e} is?",
    "Please tell me what {e} is.",
    "My homework says {e}. What is it?",
)
BARE = ("{e} = ?", "{e} is what?", "{e}", "{e}?")
SWAPPED = {
    "+": ("Add {b} to {a}.", "Please add {b} to {a}.", "What do I get if I add {b} to {a}?"),
    "-": ("Take {b} from {a}.", "Subtract {b} from {a}.", "What is left if I take {b} away from {a}?"),
    "*": ("Multiply {a} by {b}.", "Please multiply {a} by {b}.", "What do I get if I multiply {a} by {b}?"),
    "/": ("Divide {a} by {b}.", "Please divide {a} by {b}.", "What do I get if I divide {a} by {b}?"),
}
STORIES = {
    "+": (
        ("{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?", "{n} has {v} {t} now."),
        ("{n} has {a} {t} and {m} has {b} {t}. How many {t} do they have together?", "Together they have {v} {t}."),
        (
            "There are {a} {t} in one box and {b} {t} in another. How many are there in all?",
            "There are {v} {t} in all.",
        ),
        ("{n} found {a} {t} on Monday and {b} on Tuesday. How many {t} is that?", "That is {v} {t}."),
    ),
    "-": (
        ("{n} has {a} {t}. {n} gives {b} of them to {m}. How many {t} are left?", "There are {v} {t} left."),
        ("There were {a} {t} in the shop. {n} bought {b} of them. How many {t} are left?", "There are {v} {t} left."),
        ("{n} has {a} {t} and {m} has {b}. How many more {t} does {n} have?", "{n} has {v} more {t}."),
        ("{n} had {a} {t} and lost {b}. How many {t} does {n} still have?", "{n} still has {v} {t}."),
    ),
    "*": (
        ("{n} has {a} {x} with {b} {t} in each. How many {t} does {n} have?", "{n} has {v} {t}."),
        ("There are {a} {x} and each has {b} {t}. How many {t} are there?", "There are {v} {t}."),
        ("One box holds {a} {t}. How many {t} do {b} boxes hold?", "They hold {v} {t}."),
    ),
    "/": (
        ("{n} shares {a} {t} among {b} friends. How many {t} does each friend get?", "Each friend gets {v} {t}."),
        ("{n} puts {a} {t} into {b} {x}, the same in each. How many {t} are in each?", "There are {v} {t} in each."),
    ),
}
TWO_STEPS = {
    "{a} * {b} - {c}": (
        (
            "{n} has {a} {x} with {b} {t} in each. {n} gives away {c} {t}. How many {t} are left?",
            "There are {v} {t} left.",
        ),
    ),
    "{a} * {b} + {c}": (
        ("{n} has {a} {x} with {b} {t} in each and finds {c} more. How many {t} does {n} have?", "{n} has {v} {t}."),
    ),
    "{a} + {b} - {c}": (
        ("{n} had {a} {t}, got {b} more and lost {c}. How many {t} does {n} have now?", "{n} has {v} {t} now."),
        ("{n} has {a} {t} and {m} has {b}. Together they sell {c}. How many {t} are left?", "There are {v} {t} left."),
    ),
    "({a} + {b}) * {c}": (
        (
            "{n} reads {a} pages in the morning and {b} at night. How many pages is that in {c} days?",
            "That is {v} pages.",
        ),
    ),
}
CHAINS = {
    "{a} + {b} + {c}": lambda a, b, c: a + b + c,
    "{a} + {b} - {c}": lambda a, b, c: a + b - c,
    "{a} * {b} + {c}": lambda a, b, c: a * b + c,
    "{a} * {b} - {c}": lambda a, b, c: a * b - c,
    "({a} + {b}) * {c}": lambda a, b, c: (a + b) * c,
}
AMONG_WORDS = 0.25  # share of the questions in symbols or words whose other words say nothing
REPLIES = ("The answer is {v}.", "The answer is {v}.", "That makes {v}.")

# -- problems --------------------------------------------------------------------------------------------------------


def operator(rng: random.Random, ops: str = "+++--***/") -> str:
    """One operator, sums and products more often."""
    return rng.choice(ops)


def ask(rng: random.Random, expression: str, wording: str) -> str:
    """A question about `wording`, which is the expression in symbols or words; bare forms only fit symbols."""
    draw = rng.random()
    if draw < AMONG_WORDS:
        return questions.among_words(rng, wording, _some_words())
    asks = ASKS + BARE if wording == expression else ASKS
    text = rng.choice(asks).format(e=wording)
    return questions.opened(rng, text) if draw > 0.8 else text


@cache
def _some_words() -> tuple[str, ...]:
    return tuple(sorted(facts.common_words()))


def make_plain(rng: random.Random, test: bool, sizes=(1, 2, 2, 2, 3, 3, 3), ops="+++--***/") -> Problem:
    """One operation, in symbols ("482 + 37"), words ("482 plus 37") or as a noun ("the sum of 482 and 37")."""
    op = operator(rng, ops)
    a, b = operands(rng, test, op, sizes)
    expression, draw = f"{a} {op} {b}", rng.random()
    wording = expression
    if draw > 0.85:
        wording = rng.choice(NOUNS[op]).format(a=a, b=b)
    elif draw > 0.5:
        wording = f"{a} {rng.choice(WORDS[op])} {b}"
    question = ask(rng, expression, wording)
    return Problem("plain", question, expression, value_of(a, op, b), rng.choice(REPLIES))


def make_swapped(rng: random.Random, test: bool) -> Problem:
    """One operation as a command, where the numbers may stand in the other order."""
    op = operator(rng)
    a, b = operands(rng, test, op, (2, 2, 3))
    question = rng.choice(SWAPPED[op]).format(a=a, b=b)
    return Problem("swapped", question, f"{a} {op} {b}", value_of(a, op, b), rng.choice(REPLIES))


def cast(rng: random.Random) -> dict:
    """Who and what a story is about."""
    n, m = rng.sample(NAMES, 2)
    return {"n": n, "m": m, "t": rng.choice(THINGS), "x": rng.choice(BOXES), "v": "{v}"}


def make_story(rng: random.Random, test: bool) -> Problem:
    """One step told in words."""
    op = operator(rng)
    a, b = operands(rng, test, op, (2, 2, 2, 3) if op != "*" else (1, 2, 2))
    question, reply = rng.choice(STORIES[op])
    who = cast(rng)
    return Problem("story", question.format(a=a, b=b, **who), f"{a} {op} {b}", value_of(a, op, b), reply.format(**who))


def three_numbers(rng: random.Random, test: bool, form: str) -> tuple[int, int, int]:
    """Numbers for a form of CHAINS, its value not negative."""
    product = "*" in form
    while True:
        a, b = pair(rng, test, (2,), (1, 2) if product else (2, 3))
        c = digits(rng, 1 if form.startswith("(") else 2)
        if CHAINS[form](a, b, c) >= 0:
            return a, b, c


def make_chain(rng: random.Random, test: bool) -> Problem:
    """Three numbers in symbols."""
    form = rng.choice(tuple(CHAINS))
    a, b, c = three_numbers(rng, test, form)
    expression = form.format(a=a, b=b, c=c)
    return Problem("chain", ask(rng, expression, expression), expression, CHAINS[form](a, b, c), rng.choice(REPLIES))


def make_large(rng: random.Random, test: bool) -> Problem:
    """Plain, with numbers of four and five digits."""
    problem = make_plain(rng, test, sizes=(3, 4, 4, 5), ops="++-*")
    return Problem("large", problem.question, problem.expression, problem.value, problem.reply)


def make_two_step(rng: random.Random, test: bool) -> Problem:
    """A story with two steps."""
    form = rng.choice(tuple(TWO_STEPS))
    a, b, c = three_numbers(rng, test, form)
    question, reply = rng.choice(TWO_STEPS[form])
    who = cast(rng)
    return Problem(
        "two_step",
        question.format(a=a, b=b, c=c, **who),
        form.format(a=a, b=b, c=c),
        CHAINS[form](a, b, c),
        reply.format(**who),
    )


def make_long(rng: random.Random, test: bool) -> Problem:
    """Plain, in symbols, with numbers of six to eight digits."""
    op = operator(rng, "+-")
    a, b = operands(rng, test, op, (6, 7, 8))
    expression = f"{a} {op} {b}"
    return Problem("long", ask(rng, expression, expression), expression, value_of(a, op, b), rng.choice(REPLIES))


def many(rng: random.Random, test: bool, kind: str, form: str, last: tuple[int, int]) -> Problem:
    """Four numbers in symbols: a pair of the split and two more, of as many digits as `last` says."""
    a, b = pair(rng, test, (2, 3), (2,))
    c, d = (digits(rng, n) for n in last)
    value = a + b + c + d if kind == "four" else a * b + c * d
    expression = form.format(a=a, b=b, c=c, d=d)
    return Problem(kind, ask(rng, expression, expression), expression, value, rng.choice(REPLIES))


def make_four(rng: random.Random, test: bool) -> Problem:
    """Four numbers to add."""
    return many(rng, test, "four", "{a} + {b} + {c} + {d}", (2, 3))


def make_products(rng: random.Random, test: bool) -> Problem:
    """A product and another one to add."""
    return many(rng, test, "products", "{a} * {b} + {c} * {d}", (2, 2))


MAKERS = {
    "plain": make_plain,
    "swapped": make_swapped,
    "story": make_story,
    "chain": make_chain,
    "large": make_large,
    "two_step": make_two_step,
    "long": make_long,
    "four": make_four,
    "products": make_products,
}
TALK_WEIGHTS = {
    "plain": 55, "swapped": 8, "story": 15, "chain": 5, "large": 5, "two_step": 5, "long": 3, "four": 1, "products": 1,
}  # fmt: skip
HARD_WEIGHTS = dict.fromkeys(EASY + HARD, 5) | {
    "long": 40,
    "four": 15,
    "products": 15,
}  # what reinforcement learns and is judged by


def problem(rng: random.Random, test: bool, weights: dict[str, int] = TALK_WEIGHTS) -> Problem:
    """A problem of the split, its kind drawn by `weights`."""
    kind = rng.choices(tuple(weights), tuple(weights.values()))[0]
    return MAKERS[kind](rng, test)
