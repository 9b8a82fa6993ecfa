"""scripts/bench_chat and tinyworld/exam: questions by a seed, verdicts by the printed rule, all answers written."""

import json
from pathlib import Path

import pytest

from nanochat import checkpoint
from nanochat.engine import Completion
from nanochat.errors import UserError
from nanochat.tinyworld import check, documents, exam, questions
from nanochat.tokenizer import Tokenizer
from scripts import bench_chat

TOK = Tokenizer.from_ranks([bytes([b]) for b in range(256)])


def call(expression, output, words):
    """The ids of a reply that uses the calculator."""
    ids = [TOK.special("<|python_start|>"), *TOK.encode(expression), TOK.special("<|python_end|>")]
    if output is not None:
        ids += [TOK.special("<|output_start|>"), *TOK.encode(output), TOK.special("<|output_end|>")]
    return ids + TOK.encode(words)


class Parrot:
    """An engine that answers each prompt with the ids a function of the user's words gives."""

    def __init__(self, answer):
        self.answer = answer

    def complete(self, prompts, sampling=None, n=1):
        return [[self.completion(ids)] for ids in prompts]

    def completion(self, ids):
        words = TOK.decode([i for i in ids if not TOK.is_special(i)])
        reply = self.answer(words)
        return Completion(reply, [1] * len(reply), TOK.decode(reply), "stop")


def perfect(seed, n):
    """Answers every item of the exam rightly, and continues documents with a true sentence."""
    items = {item.question: item for item in exam.fact_items(n, seed) + exam.sum_items(n, seed)}

    def answer(words):
        item = items.get(words)
        if item is None:
            return TOK.encode("I am nanochat, a small language model.")
        if item.section == "sums":
            return call("1 + 1", item.expected, f"The answer is {item.expected}.")
        return TOK.encode(questions.answer(item.fact, item.back))

    return answer


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_the_questions_depend_on_the_seed_alone_and_do_not_repeat():
    items = exam.fact_items(200, 5)
    assert items == exam.fact_items(200, 5) != exam.fact_items(200, 6)
    assert len({item.question for item in items}) == 200
    assert len({item.fact.relation for item in items}) > 25
    assert any(item.back for item in items)


def test_questions_use_held_out_wordings_only():
    trained = {text for r in questions.relations() for f in ("ask", "back") for text in questions.wordings(r, f)}
    held = {text for r in questions.relations() for f in ("ask", "back")
            for text in questions.wordings(r, f, exam.HELD_OUT)}  # fmt: skip
    assert len(held) > 180 and not trained & held


def test_sums_are_of_two_and_three_digits_from_held_out_pairs():
    items = exam.sum_items(200, 5)
    for item in items:
        numbers = [int(word.strip("?.,")) for word in item.question.split() if word.strip("?.,").isdigit()]
        assert len(numbers) == 2 and all(10 <= number < 1000 for number in numbers)
        assert exam.sums.held_out(*numbers)
        assert item.value in (numbers[0] + numbers[1], numbers[0] * numbers[1])
    assert sum(item.value == 0 for item in items) == 0 and len({item.question for item in items}) > 190


def test_there_are_ten_ways_to_ask_who_it_is():
    assert len({item.question for item in exam.identity_items()}) == 10


# -- the rules -------------------------------------------------------------------------------------------------------


def judge(item, *parts):
    return bench_chat.judged(item, [{"type": kind, "text": text} for kind, text in parts])["right"]


def test_a_sum_is_right_only_with_the_number_and_the_calculator():
    item = exam.Item("sums", "What is 40 + 2?", "42", value=42)
    used = (("python", "40 + 2"), ("python_output", "42"))
    assert judge(item, *used, ("text", "The answer is 42."))
    assert not judge(item, ("text", "The answer is 42."))
    assert not judge(item, ("python", "40 +"), ("text", "The answer is 42."))
    assert not judge(item, ("python", "40 + 3"), ("python_output", "43"), ("text", "The answer is 43."))
    assert not judge(item, *used)


@pytest.mark.parametrize(
    "reply, verdict",
    [("I am nanochat, a small language model.", True), ("My name is Nanochat!", True), ("I am a cat.", False)],
)
def test_identity_is_the_name(reply, verdict):
    assert judge(exam.Item("identity", "Who are you?", "nanochat"), ("text", reply)) is verdict


def test_a_fact_is_judged_by_the_world_s_rule_in_its_direction():
    back = next(item for item in exam.fact_items(400, 2) if item.back)
    assert judge(back, ("text", back.fact.subject)) and not judge(back, ("text", "I do not know."))


def test_a_continuation_is_good_if_it_ends_a_sentence_and_has_no_problem():
    good = exam.verdict("A banana is", " yellow. A cow says")
    assert good["grammatical"] and good["consistent"] and good["sentences"] == 1
    false = exam.verdict("A banana is", " blue. A cow says")
    assert false["grammatical"] and not false["consistent"]
    broken = exam.verdict("A banana is", " yellow. Cow the of says runs.")
    assert not broken["grammatical"] and broken["consistent"]
    assert not exam.verdict("A banana is", " yellow")["grammatical"]


def test_an_opening_is_a_true_beginning_and_leaves_something_to_say():
    rng = exam.Random(1)
    for i in range(50):
        document = documents.document("val", i)
        prompt = exam.opening(document, rng)
        assert document.startswith(prompt) and 0 < len(prompt) < len(document)
        assert len(prompt.split()) <= 12


def test_shares_come_with_their_standard_error():
    assert exam.share([True] * 3 + [False]) == (0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5))
    assert exam.share([]) == (0.0, 0.0)


# -- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path):
    def go(answer, **flags):
        engine = Parrot(answer)
        monkeypatch.setattr(checkpoint, "find", lambda source, tag, step: tmp_path / "d4" / "step_000007")
        monkeypatch.setattr(bench_chat, "load", lambda source, cfg, rt, tag, step: (engine, TOK, {"step": 7}))
        cfg = bench_chat.Config(out=str(tmp_path), num=30, train_documents=50, **flags)
        return bench_chat.main(cfg)

    return go


def test_who_answers_everything_gets_everything_and_all_answers_are_listed(run, capsys):
    result = run(perfect(1, 30))
    assert result["facts, held-out wordings"] == result["sums through the calculator"] == 1.0
    assert result["says it is nanochat"] == 1.0
    printed = capsys.readouterr().out
    assert all(rule in printed for rule in exam.RULES.values())
    assert "| facts, held-out wordings | 30 | 30 | 100.0 | 0.0 |" in printed
    written = json.loads(Path(result["answers"]).with_suffix(".json").read_text())
    assert len(written["answers"]) == 70 and len(written["free"]) == 30
    listed = Path(result["answers"]).read_text()
    assert all(answer["question"] in listed for answer in written["answers"])


def test_who_says_nothing_gets_nothing_and_the_wrong_answers_are_shown(run, capsys):
    result = run(lambda words: [], source="rl", show=2)
    assert [value for name, value in result.items() if name != "answers"] == [0.0] * 7
    printed = capsys.readouterr().out
    assert printed.count("WRONG: ") == 6 and printed.count("BAD: ") == 2


def test_copies_of_training_documents_are_counted(run):
    source = documents.document("train", 3)
    assert run(lambda words: TOK.encode(source))["continuations verbatim"] == 1.0
    assert check.verbatim(["A banana is a very new sentence here."], [source]) == [False]


def test_senseless_flags_are_refused_all_at_once():
    with pytest.raises(UserError) as refusal:
        bench_chat.main(bench_chat.Config(source="base", num=-1, slots=0))
    assert all(name in str(refusal.value) for name in ("--source", "--num", "--slots"))


def test_a_missing_model_ends_with_a_sentence(base_dir):
    with pytest.raises(UserError):
        bench_chat.main(bench_chat.Config(device_type="cpu"))


def test_the_table_says_n_and_standard_error():
    text = bench_chat.table([("x", [True, False])])
    assert text.splitlines()[-1] == "| x | 2 | 1 | 50.0 | 35.4 |"
