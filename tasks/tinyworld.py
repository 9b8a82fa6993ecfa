"""The embedded world as tasks: conversations to learn from, questions and sums to be judged by. No download.

    TinyWorldTalk("train", size=40_000)          everything that a small assistant is asked, multiple choice included
    TinyWorldFacts("open" | "choice", "test")    facts asked in combinations never seen in training
    TinyWorldSums("train" | "test")              arithmetic for reinforcement: sums, stories, two steps, larger numbers

Example i of a split is a function of (split, i, seed) alone, so a size is only a view on an unlimited supply. In "test"
the combination of fact and wording, and the pair of numbers, never occur in "train".
"""

from random import Random

from nanochat.errors import UserError
from nanochat.tinyworld import questions, sums, talk
from tasks import common

SPLITS = ("train", "test")
CHOICE_SHARE = 28  # one conversation of TinyWorldTalk in 28 is a multiple-choice question


class TinyWorld(common.Task):
    """What the three share: a split, a size, a seed."""

    def __init__(self, split: str = "train", size: int = 1000, seed: int = 0, **view):
        super().__init__(**view)
        if split not in SPLITS:
            raise UserError(f"tinyworld has no split {split!r}: choose one of {', '.join(SPLITS)}.")
        if size < 1:
            raise UserError(f"A tinyworld task of {size} examples can't be made: ask for 1 or more.")
        self.split, self.size, self.seed = split, size, seed

    @property
    def test(self) -> bool:
        return self.split == "test"

    def num_examples(self) -> int:
        return self.size

    def rng(self, index: int) -> Random:
        """The source of example `index`."""
        return Random(f"{type(self).__name__} {self.seed} {self.split} {index}")


class TinyWorldTalk(TinyWorld):
    """Conversations of all kinds, for fine-tuning."""

    def get_example(self, index: int) -> dict:
        if index % CHOICE_SHARE == CHOICE_SHARE - 1:
            return choice_example(self.rng(index), self.test)
        return talk.conversation(self.split, index, self.seed)


class TinyWorldFacts(TinyWorld):
    """One question about a fact: "open" (judged by `questions.right`) or "choice" (four choices, by letter)."""

    def __init__(self, kind: str = "open", split: str = "test", size: int = 200, seed: int = 0, **view):
        super().__init__(split, size, seed, **view)
        if kind not in ("open", "choice"):
            raise UserError(f"TinyWorldFacts asks open or choice, not {kind!r}.")
        self.kind = kind
        self.eval_type = "generative" if kind == "open" else "categorical"
        self.baseline = 0.0 if kind == "open" else 0.25

    def get_example(self, index: int) -> dict:
        rng = self.rng(index)
        if self.kind == "choice":
            return choice_example(rng, self.test, least=4)
        fact = questions.draw_fact(rng, self.test)
        turn = (questions.ask(rng, fact, self.test), questions.answer(fact))
        return talk.messages([turn]) | {"fact": list(fact)}

    def evaluate(self, conversation: dict, reply) -> bool:
        text = common.text_of(reply)
        if self.kind == "choice":
            return text.strip() == common.reference_of(conversation)
        return questions.right(questions.Fact(*conversation["fact"]), text)


class TinyWorldSums(TinyWorld):
    """Arithmetic, the calculator at hand; right if the last number of the reply is."""

    eval_type = "generative"
    baseline = 0.0

    def get_example(self, index: int) -> dict:
        problem = sums.problem(self.rng(index), self.test, sums.HARD_WEIGHTS)
        return problem.conversation() | {"value": problem.value, "kind": problem.kind}

    def evaluate(self, conversation: dict, reply) -> bool:
        return sums.right(conversation["value"], common.text_of(reply))


def choice_example(rng: Random, test: bool, least: int = 2) -> dict:
    """A multiple-choice question about a fact of the split, with `least` to 4 choices."""
    while True:
        fact = questions.draw_fact(rng, test)
        wordings = [c.template for c in questions.cores(fact, test) if c.form == "ask"]
        choices, answer = questions.choices(rng, fact, max(least, rng.randrange(3, 5)))
        if wordings and len(choices) >= least:
            break
    question = questions.fill(rng.choice(wordings), fact)
    return common.multiple_choice_conversation(question, choices, answer) | {"fact": list(fact)}
