"""What a task is: examples that are conversations, a view on them, and a verdict on a reply.

A task gives conversations (`nanochat.chat` format, the last message being the reference answer) by index, says how
replies are asked for (`eval_type`), and judges them:

    categorical   the reply is one of `conversation["letters"]`; the evaluation compares the logits of the letters
    generative    the reply is text, or content parts as `nanochat.chat.parse_reply` gives them

`TaskMixture` shuffles several tasks into one (the diet of fine-tuning), `TaskSequence` puts them one after the other.
"""

import abc
import random
from collections.abc import Sequence

from nanochat.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MIXTURE_SEED = 42  # as published: the order of a mixture is part of the recipe


class Task(abc.ABC):
    """A view [start:stop:step] on `num_examples()` conversations; it clamps to what exists, as slices do (pitfall 52).

    A task defines `num_examples`, `get_example(index)` and, when it can be evaluated, `eval_type` and `evaluate`.
    """

    eval_type = "generative"

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        wrong = [
            f"{name}={value}"
            for name, value, least in (("start", start, 0), ("stop", stop, 0), ("step", step, 1))
            if value is not None and value < least
        ]
        if wrong:
            raise UserError(
                f"A view on {type(self).__name__} cannot have {', '.join(wrong)}: "
                "start and stop are 0 or more, step is 1 or more."
            )
        self.start, self.stop, self.step = start, stop, step

    @abc.abstractmethod
    def num_examples(self) -> int:
        """The number of examples of the whole dataset, before the view."""

    @abc.abstractmethod
    def get_example(self, index: int) -> dict:
        """Conversation number `index` of the whole dataset, 0 <= index < num_examples()."""

    def evaluate(self, conversation: dict, reply) -> bool:
        """Is `reply` (a letter, a text, or content parts) a right answer to `conversation`? TypeError: none is."""
        raise TypeError(f"{type(self).__name__} is text to learn from: its replies are neither right nor wrong.")

    def reward(self, conversation: dict, reply) -> float:
        """What reinforcement pays for `reply`, in [0, 1]; by default 1 for a right answer."""
        return float(self.evaluate(conversation, reply))

    def view(self) -> range:
        """The dataset's indices that this view shows, in order."""
        return range(self.num_examples())[self.start : self.stop : self.step]

    def __len__(self) -> int:
        return len(self.view())

    def __getitem__(self, i: int) -> dict:
        return self.get_example(self.view()[i])  # raises IndexError past the end, so that `for` stops


class TaskSequence(Task):
    """Tasks one after the other, each in its own order."""

    def __init__(self, tasks: Sequence[Task], start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(start, stop, step)
        if not tasks:
            raise UserError("A mixture or sequence of tasks needs at least one task.")
        self.tasks = list(tasks)
        self.places = self._places()

    def _places(self) -> list[tuple[int, int]]:
        return [(t, i) for t, task in enumerate(self.tasks) for i in range(len(task))]

    def num_examples(self) -> int:
        return len(self.places)

    def get_example(self, index: int) -> dict:
        task, i = self.locate(index)
        return task[i]

    def locate(self, index: int) -> tuple[Task, int]:
        """The task that example `index` comes from, and its index there."""
        t, i = self.places[index]
        return self.tasks[t], i


class TaskMixture(TaskSequence):
    """Tasks shuffled into one, deterministically; name a task twice in the list to see it twice."""

    def _places(self) -> list[tuple[int, int]]:
        places = super()._places()
        random.Random(MIXTURE_SEED).shuffle(places)
        return places


def multiple_choice(question: str, choices: Sequence[str], letters: Sequence[str] = LETTERS) -> str:
    """The one way a multiple-choice question is asked here.

    The letter stands after the choice and with no space before it: small models bind it better, and "=A" holds the very
    token "A" that the answer begins with (as published).
    """
    lines = [f"- {choice}={letter}\n" for choice, letter in zip(choices, letters)]
    return (
        f"Multiple Choice question: {question}\n{''.join(lines)}\nRespond only with the letter of the correct answer."
    )


def multiple_choice_conversation(question: str, choices: Sequence[str], answer: int) -> dict:
    """A whole multiple-choice example; `answer` is the right choice's index. "letters" stays for the evaluation."""
    letters = list(LETTERS[: len(choices)])
    messages = [
        {"role": "user", "content": multiple_choice(question, choices, letters)},
        {"role": "assistant", "content": letters[answer]},
    ]
    return {"messages": messages, "letters": letters}


def text_of(reply) -> str:
    """The words of a reply: `reply` itself, or the text parts of its content, without tool calls and their output."""
    if isinstance(reply, str):
        return reply
    return "".join(part["text"] for part in reply if part["type"] == "text")


def tool_calls(reply) -> list[tuple[str, str | None]]:
    """The calls that a reply made, as (expression, output); output None when the tool had no answer."""
    if isinstance(reply, str):
        return []
    calls = []
    for k, part in enumerate(reply):
        if part["type"] == "python":
            after = reply[k + 1] if k + 1 < len(reply) else {"type": None}
            calls.append((part["text"], after["text"] if after["type"] == "python_output" else None))
    return calls


def reference_of(conversation: dict):
    """The content of the reference answer: the last message's."""
    return conversation["messages"][-1]["content"]
