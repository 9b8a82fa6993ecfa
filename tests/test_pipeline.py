"""Every stage through its main(cfg) on a tiny model, from nothing to a chat; and the equalities a run must keep."""

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from terminal import COLUMNS, Terminal
from test_core_eval import write_bundle

from nanochat import checkpoint, live, profiling, record, train
from nanochat.errors import UserError
from scripts import base_eval, base_train, bench_text, chat_eval, chat_rl, chat_sft, report, tok_train
from tasks import common

ROOT = Path(__file__).resolve().parents[1]
BASE = base_train.Config(
    depth=2, aspect_ratio=16, head_dim=16, max_seq_len=64, window_pattern="L", device_batch_size=4,
    total_batch_size=512, num_iterations=6, eval_every=3, eval_tokens=1024, core_metric_every=-1, sample_every=-1,
    save_every=2, keep=-1, model_tag="tiny", compile="off",
)  # fmt: skip
SFT = chat_sft.Config(
    model_tag="tiny", num_iterations=5, eval_every=-1, eval_tokens=1024, chatcore_every=-1, save_every=2, keep=-1,
    compile="off",
)  # fmt: skip
RL = chat_rl.Config(
    model_tag="tiny", num_iterations=3, examples_per_step=3, num_samples=3, max_new_tokens=12, device_batch_size=4,
    eval_every=3, eval_examples=5, eval_samples=2, save_every=1, keep=-1,
)  # fmt: skip


def odd_length(task, problem, reply):
    """What replies are paid here."""
    return float(len(str(reply)) % 2)


@pytest.fixture(scope="module", autouse=True)
def paid_by_length():
    """A model this small answers nothing right: replies of an odd length are paid, so that reinforcement teaches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Task, "reward", odd_length)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, paid_by_length):
    """A base folder in which every stage has run once."""
    base = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        tok_train.main(tok_train.Config(dataset="tinyworld", vocab_size=512, max_chars=100_000))
        base_train.main(BASE)
        chat_sft.main(SFT)
        chat_rl.main(RL)
    return base


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(trained))
    return trained


def weights(base, folder, step):
    return load_file(base / folder / "tiny" / f"step_{step:06d}" / "model.safetensors")


def test_each_stage_leaves_a_complete_checkpoint_and_a_record(here):
    for source, steps in (("base", [2, 4, 6]), ("sft", [2, 4, 5]), ("rl", [1, 2, 3])):
        root = checkpoint.folder(source) / "tiny"
        assert checkpoint.complete_steps(root) == steps
        rows = record.read(root / "record.jsonl")
        assert rows[0]["kind"] == "start" and rows[-1]["kind"] == "summary"
    losses = [r["loss"] for r in record.read(here / "base_checkpoints/tiny/record.jsonl") if r["kind"] == "step"]
    assert losses[-1] < losses[0]  # it learns, if only a little


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "cfg", "source", "evaluation"),
    [
        (base_train, BASE, "base", "bpb"),
        (chat_sft, dataclasses.replace(SFT, chatcore_every=1, eval_tokens=0), "sft", "chat_core"),
        (chat_rl, dataclasses.replace(RL, eval_every=100), "rl", "evaluate"),
    ],
)
def test_the_last_checkpoint_is_saved_before_anything_is_evaluated_pitfall_1(
    here, tmp_path, monkeypatch, stage, cfg, source, evaluation
):
    for name in ("tokenizer", "base_checkpoints", "chatsft_checkpoints"):
        shutil.copytree(here / name, tmp_path / name)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    real, steps = getattr(stage, evaluation), []

    def breaks_at_the_end(*args, **kwargs):
        if checkpoint.complete_steps(checkpoint.folder(source) / "tiny") != [1]:
            return real(*args, **kwargs)  # that of the model it starts from
        steps.append(1)
        raise RuntimeError("the evaluation broke")

    monkeypatch.setattr(stage, evaluation, breaks_at_the_end)
    with pytest.raises(RuntimeError, match="the evaluation broke"):
        stage.main(dataclasses.replace(cfg, save_every=-1, num_iterations=1))
    assert steps == [1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "cfg", "source", "evaluation"),
    [(base_train, BASE, "base", "bpb"), (chat_sft, SFT, "sft", "validation_bpb"), (chat_rl, RL, "rl", "evaluate")],
)
def test_a_run_in_a_terminal_is_one_line_below_what_it_says_and_its_trace_is_written(
    here, tmp_path, monkeypatch, stage, cfg, source, evaluation
):
    for name in ("tokenizer", "base_checkpoints", "chatsft_checkpoints"):
        shutil.copytree(here / name, tmp_path / name)
    for name, value in (("NANOCHAT_BASE_DIR", tmp_path), ("TERM", "xterm"), ("COLUMNS", COLUMNS)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(live, "REDRAW", 0.0)
    monkeypatch.setattr(profiling, "BEFORE", 1)

    def warns(*_):
        print("a warning of a library", file=sys.stderr)
        return {"pass@1": 0.5, "pass@1_se": 0.1} if stage is chat_rl else 1.0

    monkeypatch.setattr(stage, evaluation, warns)
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal.streams[0])
        patch.setattr(sys, "stderr", terminal.streams[1])
        stage.main(dataclasses.replace(cfg, profile=True, num_iterations=3, save_every=-1, eval_every=100))
    shown = terminal.close()
    bars = [line for line in shown if "█" in line]
    name = "reward" if stage is chat_rl else "loss"
    assert len(bars) == 1 and bars[0].startswith(f" 100 % {'█' * 10}") and f"| {name}" not in bars[0], shown
    assert f"{name} " in bars[0] and not [line for line in shown if "| lr x" in line], shown  # no lines of steps
    assert "a warning of a library" in shown  # alone on its line
    rows = record.read(checkpoint.folder(source) / "tiny" / "record.jsonl")
    (traced,) = [row for row in rows if row["kind"] == "profile"]
    assert traced["steps"] == [1, 2]  # the run ends before a third
    with gzip.open(traced["path"]) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"ProfilerStep#1", "ProfilerStep#2", "aten::mm"} <= names and "ProfilerStep#0" not in names
    assert traced["operators"][0]["share"] >= traced["operators"][-1]["share"] > 0
    assert [line for line in shown if "open it with https://ui.perfetto.dev" in line], shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "cfg", "folder", "cut", "end"),
    [
        (base_train, BASE, "base_checkpoints", 4, 6),
        (chat_sft, SFT, "chatsft_checkpoints", 2, 5),
        (chat_rl, RL, "chatrl_checkpoints", 2, 3),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit_pitfalls_7_8(
    here, monkeypatch, stage, cfg, folder, cut, end
):
    straight, before = weights(here, folder, end), weights(here, folder, cut)
    assert any(not torch.equal(straight[name], before[name]) for name in straight)  # something is learned in between
    moments = load_file(here / folder / "tiny" / f"step_{end:06d}" / "optim.safetensors")
    saved, put_back = checkpoint.load(here / folder / "tiny" / f"step_{cut:06d}").rank_states(), []
    monkeypatch.setattr(train, "set_rng_state", put_back.append)  # no stage draws from it, so no weight would tell
    root = here / folder / "tiny" / "record.jsonl"
    measured = [row.get("min_val_bpb") for row in record.read(root) if row["kind"] == "summary"]
    best = stage.main(dataclasses.replace(cfg, resume_from_step=cut)).get("min_val_bpb")
    assert [best] == measured  # of both lives
    assert put_back == [saved[0]["rng"]]
    again = weights(here, folder, end)
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    other = load_file(here / folder / "tiny" / f"step_{end:06d}" / "optim.safetensors")
    assert all(torch.equal(moments[name], other[name]) for name in moments)


@pytest.mark.parametrize(
    ("stage", "cfg", "source"), [(base_train, BASE, "base"), (chat_sft, SFT, "sft"), (chat_rl, RL, "rl")]
)
def test_a_run_that_cannot_begin_leaves_the_one_of_its_name_where_it_is(here, monkeypatch, stage, cfg, source):
    root = checkpoint.folder(source) / "tiny"
    before = sorted(path.name for path in root.iterdir()), record.read(root / "record.jsonl")

    def broken(*args, **kwargs):
        raise UserError("the disk is gone")

    monkeypatch.setattr(stage.saving, "Saver", broken)  # the last thing that is made
    with pytest.raises(UserError, match="the disk is gone"):
        stage.main(cfg)
    assert (sorted(path.name for path in root.iterdir()), record.read(root / "record.jsonl")) == before


@pytest.mark.parametrize("stage", [base_train, chat_sft, chat_rl])
@pytest.mark.parametrize("tag", ["../tiny", "/tmp/tiny", "a/b", "..", ".", "tiny/"])
def test_a_tag_is_a_name_and_never_a_place(here, stage, tag):
    cfg = {base_train: BASE, chat_sft: SFT, chat_rl: RL}[stage]
    with pytest.raises(UserError, match="is not a plain name"):
        stage.main(dataclasses.replace(cfg, model_tag=tag))


@pytest.mark.parametrize("stage", [base_train, chat_sft, chat_rl])
def test_flags_of_all_stages_are_checked_together_before_any_work(here, stage):
    wrong = dataclasses.replace({base_train: BASE, chat_sft: SFT, chat_rl: RL}[stage], shard="half", keep=-2,
                                resume=True, resume_from_step=3)  # fmt: skip
    with pytest.raises(UserError, match="(?s)3 things.*--keep=-2 must be.*not both.*--shard=half is unknown"):
        stage.main(wrong)


def test_resume_with_other_flags_is_refused_and_lists_them_pitfall_8(here):
    cfg = dataclasses.replace(BASE, resume=True, matrix_lr=0.5, seed=7)
    with pytest.raises(UserError, match=r"(?s)--seed is 7 now.*--matrix-lr is 0\.5 now.*--force"):
        base_train.main(cfg)


@pytest.mark.slow
def test_core_that_is_due_at_the_end_only_may_be_out_of_reach(here, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE", str(here / "nowhere.zip"))
    cfg = dataclasses.replace(BASE, num_iterations=2, eval_tokens=0, core_metric_every=3, model_tag="offline")
    assert "core" not in base_train.main(cfg)
    assert "CORE is not measured at the end: " in capsys.readouterr().out
    with pytest.raises(UserError, match="CORE bundle"):
        base_train.main(dataclasses.replace(cfg, core_metric_every=2))


@pytest.mark.parametrize(("stage", "cfg"), [(base_train, BASE), (chat_sft, SFT), (chat_rl, RL)])
def test_a_run_that_is_already_longer_than_it_shall_be_ends_where_it_is(here, monkeypatch, stage, cfg):
    """Forced to fewer updates than are done, it must not go on for ever, nor name a checkpoint that is not there."""

    def begin(watch, step):
        raise AssertionError(f"step {step} is begun")

    monkeypatch.setattr(stage.watch.Watch, "begin", begin)
    summary = stage.main(dataclasses.replace(cfg, num_iterations=1, resume=True, force=True))
    assert summary["step"] == cfg.num_iterations and checkpoint.load(summary["checkpoint"]).step == cfg.num_iterations


def flags(cfg, **changed):
    """The command line of a config."""
    values = dataclasses.asdict(dataclasses.replace(cfg, **changed))
    given = {k: v for k, v in values.items() if not isinstance(v, bool) and v != ""}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def stop_at(step, signum, arguments):
    """Run pretraining as a command, send it a signal when it reports `step`; returns (exit status, what it said)."""
    command = [sys.executable, "-m", "scripts.base_train", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), **pipes) as process:
        for line in process.stdout:
            if line.startswith(f"step {step:5d}/"):
                process.send_signal(signum)
                break
        _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.slow
def test_a_signal_saves_and_leaves_with_its_code(here):
    arguments = flags(BASE, num_iterations=200, save_every=-1, model_tag="signalled")
    status, said = stop_at(3, signal.SIGTERM, arguments)
    assert status == 128 + signal.SIGTERM, said
    assert "--resume goes on from here" in said and "Traceback" not in said
    root = checkpoint.folder("base") / "signalled"
    (step,) = checkpoint.complete_steps(root)
    checkpoint.load(root / f"step_{step:06d}").verify()


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_in_the_same_place_pitfalls_6_8(here):
    arguments = flags(BASE, num_iterations=12, save_every=3, model_tag="killed")
    for step in (4, 8):
        status, said = stop_at(step, signal.SIGKILL, [*arguments, "--resume"])
        assert status == -signal.SIGKILL, said
    cfg = dataclasses.replace(BASE, num_iterations=12, save_every=3)
    base_train.main(dataclasses.replace(cfg, model_tag="killed", resume=True))
    base_train.main(dataclasses.replace(cfg, model_tag="straight"))
    one, other = (checkpoint.load(checkpoint.find("base", tag)).weights() for tag in ("killed", "straight"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def spiking(monkeypatch, step):
    """The loss of every rank reads 50 once, at this step of a run."""
    real, seen = train.Meter.mean, []

    def mean(meter, rt):
        loss = real(meter, rt)
        if meter.steps == step and not seen:
            seen.append(step)
            return 50.0
        return loss

    monkeypatch.setattr(train.Meter, "mean", mean)


@pytest.mark.slow
@pytest.mark.parametrize(("action", "steps"), [("skip", 22), ("rollback", 22)])
def test_a_spike_is_skipped_or_gone_back_from(here, monkeypatch, action, steps):
    spiking(monkeypatch, 20)
    cfg = dataclasses.replace(BASE, num_iterations=steps, save_every=18, eval_tokens=0, model_tag=action)
    base_train.main(dataclasses.replace(cfg, spike=8.0, spike_action=action))
    root = checkpoint.folder("base") / action
    rows = record.read(root / "record.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "spike"] == ([20] if action == "skip" else [])
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(steps))
    assert [row["step"] for row in rows if row["kind"] == "rollback"] == ([18] if action == "rollback" else [])
    final = checkpoint.load(root / f"step_{steps:06d}")
    updates = {"skip": steps - 1, "rollback": steps}[action]  # what the optimizer has counted
    assert int(final.optimizer()["step"]) == updates
    read = {"skip": steps, "rollback": steps + 3}[action]  # batches read: the three since the checkpoint are left out
    assert final.rank_state(0)["loader"]["rows"] == read * 8


@pytest.mark.slow
def test_rolling_back_without_a_checkpoint_is_a_sentence(here, monkeypatch):
    spiking(monkeypatch, 20)
    cfg = dataclasses.replace(BASE, num_iterations=22, save_every=-1, eval_tokens=0, model_tag="nowhere", spike=8.0)
    with pytest.raises(UserError, match=r"the loss is 50.*no checkpoint to go back to: set --save-every"):
        base_train.main(dataclasses.replace(cfg, spike_action="rollback"))


@pytest.mark.slow
def test_core_and_samples_are_taken_while_training_and_chatcore_while_fine_tuning(here, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE", str(write_bundle(tmp_path)))
    cfg = dataclasses.replace(BASE, num_iterations=4, eval_tokens=0, core_metric_every=3, core_metric_max_per_task=4,
                              sample_every=2, model_tag="watched")  # fmt: skip
    assert "core" in base_train.main(cfg)
    rows = record.read(here / "base_checkpoints" / "watched" / "record.jsonl")
    assert [row["step"] for row in rows if row.get("core_tasks")] == [3, 4]  # the last step always
    assert "core" in base_train.main(dataclasses.replace(cfg, core_metric_every=999999, sample_every=-1))
    assert [row["step"] for row in rows if row["kind"] == "sample"] == [2] * 7 + [4] * 7
    cfg = dataclasses.replace(SFT, model_tag="watched", num_iterations=2, eval_tokens=0, chatcore_every=1,
                              chatcore_max_cat=4, chatcore_max_sample=2)  # fmt: skip
    assert {"facts", "choice", "sums", "chatcore"} <= chat_sft.main(cfg).keys()
    rows = record.read(here / "chatsft_checkpoints" / "watched" / "record.jsonl")
    assert [row["step"] for row in rows if "chatcore" in row and row["kind"] == "eval"] == [1, 2]


def test_base_and_chat_evaluations_write_what_they_measured(here):
    result = base_eval.main(base_eval.Config(model_tag="tiny", eval="bpb,sample", split_tokens=1024))
    assert result
    result = chat_eval.main(chat_eval.Config(source="sft", model_tag="tiny", max_problems=4, max_new_tokens=8))
    assert result


def test_the_report_has_every_stage_and_stands_alone(here, tmp_path):
    out = report.main(report.Config(model_tag="tiny", output=str(tmp_path)))
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 5 and "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", "").replace("http://creativecommons.org", "")  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    assert "| metric | base | sft | rl |" in text and out["scores"][0] == ["metric", "base", "sft", "rl"]


def test_no_record_means_a_sentence(base_dir):
    with pytest.raises(UserError, match="train first"):
        report.main(report.Config())


def test_training_without_a_tokenizer_is_one_sentence(base_dir):
    with pytest.raises(UserError, match="scripts.tok_train"):
        base_train.main(BASE)


def test_bad_flags_are_all_told_before_any_work(base_dir):
    cfg = dataclasses.replace(BASE, packing="loose", compile="maybe", fp8=True, fp8_recipe="rowwise", eval_tokens=-5)
    with pytest.raises(UserError, match="(?s)4 things.*--packing=loose.*--compile=maybe.*rowwise.*--eval-tokens=-5"):
        base_train.main(cfg)
    assert list(base_dir.iterdir()) == []


def test_bad_flags_of_fine_tuning_and_reinforcement_are_all_told_before_any_work(base_dir):
    wrong = {"num_iterations": 0, "max_seq_len": 3, "eval_tokens": -5, "warmdown_ratio": 3.0, "spike_action": "jump",
             "matrix_lr": -2.0, "save_every": -7}  # fmt: skip
    with pytest.raises(UserError) as error:
        chat_sft.main(dataclasses.replace(SFT, **wrong))
    for name, value in wrong.items():
        assert f"--{name.replace('_', '-')}={value} " in str(error.value)
    wrong = {"num_iterations": -9, "matrix_lr": float("nan"), "task": "foo", "eval_every": -2, "num_samples": 0}
    with pytest.raises(UserError) as error:
        chat_rl.main(dataclasses.replace(RL, **wrong))
    for name, value in wrong.items():
        assert f"--{name.replace('_', '-')}={value} " in str(error.value)
    with pytest.raises(UserError, match="temperature is -1"):
        chat_rl.main(dataclasses.replace(RL, temperature=-1.0))
    assert list(base_dir.iterdir()) == []


def test_more_problems_an_update_than_there_are_is_a_sentence(here):
    with pytest.raises(UserError, match="--examples-per-step=100000 is more than the 4096 problems"):
        chat_rl.main(dataclasses.replace(RL, num_iterations=-1, examples_per_step=100_000))


def test_bad_depth_is_refused_after_the_tokenizer_but_before_any_file(here):
    before = sorted(p.name for p in (here / "base_checkpoints").iterdir())
    with pytest.raises(UserError, match="--depth=0"):
        base_train.main(dataclasses.replace(BASE, depth=0, model_tag="none"))
    assert sorted(p.name for p in (here / "base_checkpoints").iterdir()) == before


BASE_RANKS = """
import json, sys
from scripts import base_train

base_train.main(base_train.Config(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns_pitfall_14(here, on_ranks, tmp_path):
    """And three. At these rates the curve is no chaos, in which rounding grows."""
    slow = {"matrix_lr": 0.0015, "embedding_lr": 0.015, "unembedding_lr": 0.002, "scalar_lr": 0.015}
    cfg = dataclasses.replace(BASE, total_batch_size=768, num_iterations=12, eval_every=-1, save_every=-1, **slow)
    curves, bpbs = {}, {}
    for world, rows in ((1, 4), (2, 2), (3, 4)):
        asked = dataclasses.replace(cfg, device_batch_size=rows, model_tag=f"ranks{world}")
        if world == 1:
            base_train.main(asked)
        else:
            on_ranks(world, BASE_RANKS, [json.dumps(dataclasses.asdict(asked))], load="scripts.base_train")
        rows = record.read(here / "base_checkpoints" / asked.model_tag / "record.jsonl")
        curves[world] = [row["loss"] for row in rows if row["kind"] == "step"]
        bpbs[world] = rows[-1]["val_bpb"]
    for world in (2, 3):
        assert len(curves[1]) == 12 and curves[world] == pytest.approx(curves[1], rel=1e-4)
        assert bpbs[world] == pytest.approx(bpbs[1], rel=1e-4)


RANKS = """
import sys
sys.path.insert(0, "tests")
import test_pipeline
from tasks import common
common.Task.reward = test_pipeline.odd_length
stages = {"sft": (test_pipeline.chat_sft, test_pipeline.SFT), "rl": (test_pipeline.chat_rl, test_pipeline.RL)}
stage, cfg = stages[sys.argv[1]]
stage.main(cfg)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("source", "figure"), [("sft", "loss"), ("rl", "grad_norm")])
def test_two_ranks_fine_tune_and_reinforce_as_one_does_pitfall_14(here, on_ranks, tmp_path, source, figure):
    base = tmp_path / "two"
    for name in ("tokenizer", *(checkpoint.FOLDERS[earlier] for earlier in ("base", "sft"))):
        shutil.copytree(here / name, base / name)
    on_ranks(2, RANKS, [source], env={"NANOCHAT_BASE_DIR": str(base)})
    records = [record.read(root / checkpoint.FOLDERS[source] / "tiny" / "record.jsonl") for root in (here, base)]
    one, two = ([row for row in rows if row["kind"] == "step"] for rows in records)
    assert len(one) == len(two) >= 3 and one[0][figure] > 0
    for a, b in zip(one, two, strict=True):
        assert abs(a[figure] - b[figure]) <= 1e-4 * a[figure] and a["targets"] == b["targets"]
        assert a.get("taught") == b.get("taught") and a.get("reward") == b.get("reward")


@pytest.mark.slow
def test_grouped_heads_are_reachable_from_the_command_line_pitfall_25(here):
    cfg = dataclasses.replace(BASE, n_kv_head=1, num_iterations=1, eval_tokens=0, model_tag="gqa")
    base_train.main(cfg)
    found = checkpoint.load(checkpoint.find("base", "gqa"))
    assert found.meta["config"]["n_kv_head"] == 1 and found.meta["config"]["n_head"] == 2
    assert found.weights()["transformer.h.0.attn.c_k.weight"].shape == (16, 32)


def test_an_unknown_device_has_no_mfu_rather_than_zero_pitfall_25(here):
    rows = record.read(here / "base_checkpoints/tiny/record.jsonl")
    assert all(row["mfu"] is None for row in rows if row["kind"] == "step")


def test_bench_text_gives_both_measures_of_a_run(here, tmp_path):
    out = bench_text.main(
        bench_text.Config(model_tag="tiny", tokens=1024, rows=4, whole=False, output=str(tmp_path / "a"))
    )
    assert 0 < out["published_measure_bpb"] < 10 and out["step"] == 6 and (tmp_path / "a").exists()
