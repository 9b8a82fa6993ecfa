"""chat_eval: letters by their logits whatever the batch, replies judged and written down, pass@k unbiased, ChatCORE."""

import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from tiny_model import TOKENIZER, save_checkpoint, tiny_gpt

from nanochat import chat, chat_eval, checkpoint, execution, record
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.runtime import Runtime
from scripts import chat_eval as script
from scripts import chat_sft
from tasks import common

RT = Runtime.single()


class Choices(common.Task):
    """Ten questions of different length with two to four letters."""

    eval_type = "categorical"

    def num_examples(self):
        return 10

    def get_example(self, i):
        return common.multiple_choice_conversation("x" * (i * 3 % 7), "abcd"[: 2 + i % 3], i % 2)

    def evaluate(self, conversation, reply):
        return reply == common.reference_of(conversation)


class Wishes(common.Task):
    """Questions whose right answer is anything with an even number of letters e; reply parts are kept."""

    eval_type = "generative"

    def __init__(self, n=7, **view):
        super().__init__(**view)
        self.n, self.seen = n, []

    def num_examples(self):
        return self.n

    def get_example(self, i):
        return {"messages": [{"role": "user", "content": "ask " * (i + 1)}, {"role": "assistant", "content": "e"}]}

    def evaluate(self, conversation, reply):
        self.seen.append(reply)
        return common.text_of(reply).count("e") % 2 == 0


@pytest.fixture(scope="module")
def model():
    return tiny_gpt(sequence_len=192, window_pattern="L")


@pytest.fixture
def engine(model):
    return Engine(model, TOKENIZER, slots=4)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- pass@k and ChatCORE ---------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_mean_over_all_draws_of_k_pitfall_40():
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (6, 1, 6)]:
        samples = [True] * c + [False] * (n - c)
        draws = list(itertools.combinations(samples, k))
        assert chat_eval.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_is_unbiased_where_any_of_the_first_k_is_noisier_pitfall_40():
    random.seed(0)
    p, n, k, runs = 0.3, 8, 4, 4000
    counts = [sum(random.random() < p for _ in range(n)) for _ in range(runs)]
    estimate = sum(chat_eval.pass_at_k(n, c, k) for c in counts) / runs
    assert estimate == pytest.approx(1 - (1 - p) ** k, abs=0.02)
    with pytest.raises(ValueError):
        chat_eval.pass_at_k(2, 1, 3)


def test_chatcore_is_the_mean_of_the_centred_accuracies():
    results = {"a": {"centered": 0.5}, "b": {"centered": -0.1}}
    assert chat_eval.chat_core(results) == pytest.approx(0.2)


# ---- categorical -----------------------------------------------------------------------------------------------------


class Sums:
    """A model whose likeliest letter is the sum of all (id + 1) so far, modulo 4: a padding token would change it."""

    config = SimpleNamespace(sequence_len=512)

    def __call__(self, ids, last):
        sums = (ids + 1).cumsum(1).gather(1, last[:, None]) % 4  # (B, 1)
        letters = torch.tensor([TOKENIZER.encode(letter)[0] for letter in "ABCD"])
        return torch.eye(TOKENIZER.vocab_size)[letters[sums]] + torch.linspace(0, 0.5, TOKENIZER.vocab_size)


def letter_of(task, i):
    """What `Sums` says to example i alone: its letter if it is listed, else the last one listed."""
    letters, place = task[i]["letters"], sum(id + 1 for id in chat.render_for_completion(task[i], TOKENIZER)) % 4
    return letters[min(place, len(letters) - 1)]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_likeliest_letter_is_taken_whatever_the_batch(tmp_path, batch_size):
    task, path, engine = Choices(), tmp_path / "out.jsonl", SimpleNamespace(model=Sums())
    result = chat_eval.evaluate(task, engine, TOKENIZER, runtime=RT, batch_size=batch_size, path=path)
    rows = read(path)
    assert [row["index"] for row in rows] == list(range(10))
    replies = [row["replies"][0] for row in rows]
    assert replies == [letter_of(task, i) for i in range(10)] and len(set(replies)) > 2
    right = [row["replies"][0] == "AB"[row["index"] % 2] for row in rows]
    assert [row["verdicts"] for row in rows] == [[r] for r in right]
    assert result["accuracy"] == sum(right) / 10 and result["n"] == 10
    chance = sum(1 / (2 + i % 3) for i in range(10)) / 10  # the task states none, so: one over the letters
    assert result["centered"] == pytest.approx((result["accuracy"] - chance) / (1 - chance))


def test_a_real_models_letter_is_that_of_its_full_logits(model, engine, tmp_path):
    task, path = Choices(), tmp_path / "out.jsonl"
    chat_eval.evaluate(task, engine, TOKENIZER, runtime=RT, path=path)
    for row in read(path):
        ids = chat.render_for_completion(task[row["index"]], TOKENIZER)
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        assert row["replies"] == [max(row["letters"], key=lambda one: float(logits[TOKENIZER.encode(one)[0]]))]


def test_a_prompt_longer_than_the_context_loses_its_beginning_and_does_not_stop_the_evaluation(engine):
    class Long(Choices):
        def get_example(self, i):
            return common.multiple_choice_conversation("y" * 900, "ab", 0)

    assert chat_eval.evaluate(Long(stop=2), engine, TOKENIZER, runtime=RT)["n"] == 2


def test_an_answer_of_several_tokens_cannot_be_compared(engine):
    class Words(Choices):
        def get_example(self, i):
            return super().get_example(i) | {"letters": ["yes", "no"]}

    with pytest.raises(UserError, match="'yes' is 3 tokens"):
        chat_eval.evaluate(Words(), engine, TOKENIZER, runtime=RT)


# ---- generative ------------------------------------------------------------------------------------------------------


def test_every_problem_is_answered_judged_and_written_down_pitfall_35(engine, tmp_path):
    task, path = Wishes(), tmp_path / "deep" / "out.jsonl"
    result = chat_eval.evaluate(
        task, engine, TOKENIZER, runtime=RT, num_samples=3, max_new_tokens=9, temperature=1.0, path=path
    )
    rows = read(path)
    assert [row["index"] for row in rows] == list(range(7)) and all(len(row["replies"]) == 3 for row in rows)
    assert rows[2]["prompt"].count("ask") == 3
    assert len(task.seen) == 21 and all(isinstance(reply, list) for reply in task.seen)  # content parts
    counts = [sum(row["verdicts"]) for row in rows]
    assert result["accuracy"] == pytest.approx(sum(counts) / 21)
    assert result["pass_at_k"]["3"] == pytest.approx(sum(c > 0 for c in counts) / 7)
    mean = result["accuracy"]
    spread = sum((c / 3 - mean) ** 2 for c in counts) / 6
    assert result["stderr"] == pytest.approx(math.sqrt(spread / 7))


def test_replies_depend_on_the_seed_and_not_on_how_many_run_together(model, tmp_path):
    replies = {}
    for name, slots, seed in (("few", 2, 1), ("many", 16, 1), ("other", 16, 2)):
        path = tmp_path / f"{name}.jsonl"
        chat_eval.evaluate(
            Wishes(), Engine(model, TOKENIZER, slots=slots), TOKENIZER, runtime=RT, num_samples=2, max_new_tokens=8,
            temperature=1.0, seed=seed, path=path,
        )  # fmt: skip
        replies[name] = [row["replies"] for row in read(path)]
    assert replies["few"] == replies["many"] != replies["other"]
    assert replies["few"][0][0] != replies["few"][0][1]  # the samples of a problem differ


def test_a_limit_asks_the_first_problems_only(engine):
    task = Wishes()
    assert chat_eval.evaluate(task, engine, TOKENIZER, runtime=RT, max_problems=2, max_new_tokens=2)["n"] == 2
    with pytest.raises(UserError, match="no problem to ask"):
        chat_eval.evaluate(Wishes(n=0), engine, TOKENIZER, runtime=RT)


def test_a_judge_that_breaks_ends_the_evaluation_and_leaves_the_engine_idle(engine, tmp_path):
    class Broken(Wishes):
        def evaluate(self, conversation, reply):
            raise RuntimeError("broken judge")

    with pytest.raises(RuntimeError, match="broken judge"):
        chat_eval.evaluate(Broken(), engine, TOKENIZER, runtime=RT, max_new_tokens=2, path=tmp_path / "x.jsonl")
    assert not engine.busy and not (tmp_path / "x.jsonl").exists()


RANKS = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_chat_eval import *
from nanochat import runtime
rt = runtime.start("cpu")
engine = Engine(tiny_gpt(sequence_len=192, window_pattern="L"), TOKENIZER)
for task in (Choices(), Wishes()):
    result = chat_eval.evaluate(task, engine, TOKENIZER, runtime=rt, num_samples=2, max_new_tokens=6, temperature=1.0,
                                path=Path({folder!r}) / f"{{task.eval_type}}.jsonl")
    print(f"{{task.eval_type}} {{result['accuracy']:.9f}} {{result['n']}}\\n", end="")
runtime.stop(rt)
"""


@pytest.mark.slow
def test_any_number_of_ranks_asks_the_same_and_writes_one_file(engine, tmp_path, on_ranks):
    out = on_ranks(3, RANKS.format(folder=str(tmp_path))).stdout
    for task in (Choices(), Wishes()):
        path = tmp_path / "one.jsonl"
        one = chat_eval.evaluate(
            task, engine, TOKENIZER, runtime=RT, num_samples=2, max_new_tokens=6, temperature=1.0, path=path
        )
        assert out.count(f"{task.eval_type} {one['accuracy']:.9f} {one['n']}") == 3, out
        assert read(tmp_path / f"{task.eval_type}.jsonl") == read(path)


# ---- the script ------------------------------------------------------------------------------------------------------


def test_the_script_judges_by_the_suite_of_the_corpus_and_writes_everything(base_dir, capsys):
    save_checkpoint("sft", tag="d3", step=5, sequence_len=256)
    root = checkpoint.folder("sft") / "d3"
    meta = root / "step_000005" / "meta.json"
    assert "dataset" not in json.loads(meta.read_text())  # so the suite is named here
    cfg = script.Config(
        task_name="facts|choice | sums", max_problems=3, max_new_tokens=4, num_samples=2, temperature=1.0
    )
    summary = script.main(cfg)
    assert list(summary["tasks"]) == ["facts", "choice", "sums"] and summary["chatcore"] is None
    on_disk = json.loads((root / "chat_eval_000005_facts+choice+sums.json").read_text())
    assert on_disk["tasks"]["sums"]["n"] == 3 and on_disk["step"] == 5
    assert len(read(root / "chat_eval_000005_facts+choice+sums" / "sums.jsonl")) == 3
    rows = record.read(root / "record.jsonl")
    assert {name for row in rows if row["kind"] == "eval" for name in row} >= {
        "facts",
        "facts_stderr",
        "choice",
        "sums",
    }
    assert "pass@2" in capsys.readouterr().out


def test_a_tinyworld_model_gets_its_own_suite_and_a_chatcore(base_dir, monkeypatch):
    save_checkpoint("rl", tag="d3", step=1, sequence_len=256)
    built = checkpoint.build_model

    def tinyworld(*args, **more):
        model, tokenizer, meta = built(*args, **more)
        return model, tokenizer, meta | {"dataset": {"dataset": "tinyworld"}}

    monkeypatch.setattr(checkpoint, "build_model", tinyworld)
    summary = script.main(script.Config(source="rl", max_problems=2, max_new_tokens=2))
    centred = [one["centered"] for one in summary["tasks"].values()]
    assert summary["chatcore"] == pytest.approx(sum(centred) / 3)
    assert (checkpoint.folder("rl") / "d3" / "chat_eval_000001.json").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task_name": "GSM9K|MMLU"}, "no task GSM9K"),
        ({"source": "mid"}, "-i mid is no stage"),
        ({"num_samples": 0, "batch_size": -1}, "2 things are wrong"),
        ({"max_problems": 0}, "1 or more, or -1"),
        ({}, "No sft checkpoint"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(base_dir, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        script.main(script.Config(**changes))


def test_without_a_cage_the_rest_of_the_suite_is_judged_and_there_is_no_chatcore(base_dir, monkeypatch, capsys):
    save_checkpoint("sft", sequence_len=256)
    monkeypatch.setattr(execution, "_isolation", lambda: ("none", ["no"]))
    monkeypatch.setattr(script.suite, "names", lambda dataset: ("sums", "HumanEval"))
    summary = script.main(script.Config(max_problems=2, max_new_tokens=2))
    assert list(summary["tasks"]) == ["sums"] and summary["chatcore"] is None
    assert "HumanEval is left out" in capsys.readouterr().out
    judges = {"sums": script.suite.make("sums")}
    model = tiny_gpt(sequence_len=256)
    scores = chat_sft.chat_core(model, TOKENIZER, judges, chat_sft.Config(chatcore_max_sample=2), RT)
    assert list(scores) == ["sums"]  # and none that is called ChatCORE


def test_a_task_that_one_machine_cannot_cage_is_left_out_by_all(monkeypatch):
    """Otherwise its ranks would wait for each other in it."""
    monkeypatch.setattr(script.suite, "names", lambda dataset: ("facts", "sums"))
    there = SimpleNamespace(gather=lambda mine: [mine, [["facts"], ["sums is left out."]]])
    tasks, notes = script.suite.whole("", there)
    assert list(tasks) == ["facts"] and notes == ["sums is left out."]


def test_code_that_cannot_be_caged_is_refused_before_anything_is_asked(base_dir, monkeypatch, tmp_path):
    save_checkpoint("sft", sequence_len=64)
    monkeypatch.setattr(
        script.suite.HumanEval.__init__.__globals__["execution"], "_isolation", lambda: ("none", ["no"])
    )
    with pytest.raises(UserError, match="can't isolate code.*--allow-unsafe-code"):
        script.main(script.Config(task_name="HumanEval"))
