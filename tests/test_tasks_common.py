"""tasks/common: views clamp, mixtures are deterministic and complete, multiple choice is rendered one way."""

import pytest

from nanochat.errors import UserError
from tasks import common


class Numbers(common.Task):
    """n conversations that say their own index."""

    def __init__(self, n, **view):
        super().__init__(**view)
        self.n = n

    def num_examples(self):
        return self.n

    def get_example(self, index):
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": str(index)}]}

    def evaluate(self, conversation, reply):
        return common.text_of(reply) == common.reference_of(conversation)


def said(task):
    return [int(common.reference_of(conversation)) for conversation in task]


@pytest.mark.parametrize(
    "view, expected",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"stop": 100}, [0, 1, 2, 3, 4]),
        ({"start": 3, "stop": 100}, [3, 4]),
        ({"start": 7, "stop": 9}, []),
        ({"start": 4, "stop": 2}, []),
        ({"step": 2}, [0, 2, 4]),
        ({"start": 1, "stop": 9, "step": 3}, [1, 4]),
    ],
)
def test_a_view_never_promises_what_is_not_there_pitfall_52(view, expected):
    task = Numbers(5, **view)
    assert len(task) == len(expected)
    assert said(task) == expected


def test_reading_past_the_end_is_an_index_error_and_not_another_example():
    with pytest.raises(IndexError):
        Numbers(5, stop=3)[3]


@pytest.mark.parametrize("view", [{"start": -1}, {"stop": -1}, {"step": 0}, {"step": -1}])
def test_a_senseless_view_is_refused_with_a_sentence(view):
    with pytest.raises(UserError, match=next(iter(view))):
        Numbers(5, **view)


def test_a_mixture_holds_every_example_of_every_task_once_per_mention():
    small, large = Numbers(3), Numbers(20, start=10)
    assert sorted(said(common.TaskMixture([small, large, small]))) == sorted([0, 1, 2] * 2 + list(range(10, 20)))


def test_a_mixture_is_shuffled_always_in_the_same_order_and_can_be_viewed():
    tasks = [Numbers(50), Numbers(90, start=50)]
    order = said(common.TaskMixture(tasks))
    assert order != sorted(order)
    assert order == said(common.TaskMixture(tasks))
    assert said(common.TaskMixture(tasks, start=5, stop=12)) == order[5:12]


def test_a_sequence_keeps_order_and_knows_where_an_example_comes_from():
    first, second = Numbers(2), Numbers(9, start=7)
    sequence = common.TaskSequence([first, second])
    assert said(sequence) == [0, 1, 7, 8]
    assert sequence.locate(3) == (second, 1)


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(UserError):
        common.TaskMixture([])


def test_multiple_choice_is_rendered_as_published():
    conversation = common.multiple_choice_conversation("What is the capital of France?", ["Rome", "Paris"], 1)
    assert conversation["messages"][0]["content"] == (
        "Multiple Choice question: What is the capital of France?\n"
        "- Rome=A\n"
        "- Paris=B\n"
        "\n"
        "Respond only with the letter of the correct answer."
    )
    assert conversation["messages"][1] == {"role": "assistant", "content": "B"}
    assert conversation["letters"] == ["A", "B"]


def test_the_words_of_a_reply_are_its_text_parts_and_its_calls_are_told_apart():
    parts = [
        {"type": "text", "text": "That is "},
        {"type": "python", "text": "2 + 3"},
        {"type": "python_output", "text": "5"},
        {"type": "text", "text": "5."},
        {"type": "python", "text": "1 / 0"},
    ]
    assert common.text_of(parts) == "That is 5."
    assert common.tool_calls(parts) == [("2 + 3", "5"), ("1 / 0", None)]
    assert common.text_of("plain") == "plain"
    assert common.tool_calls("plain") == []


def test_the_reward_is_one_for_a_right_answer_and_nothing_else():
    task = Numbers(4)
    assert [task.reward(task[2], reply) for reply in ("2", "3")] == [1.0, 0.0]


def test_a_task_without_right_answers_says_so_and_half_a_task_is_none():
    with pytest.raises(TypeError, match="TaskSequence is text to learn from"):
        common.TaskSequence([Numbers(2)]).evaluate({}, "A")
    with pytest.raises(TypeError, match="abstract"):
        common.Task()
