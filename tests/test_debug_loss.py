"""scripts/debug_loss.py: each kind of trouble is found in a record that has it, at its step; a healthy one has none."""

import json
import math
import random

import pytest

from nanochat import record
from nanochat.errors import UserError
from scripts import debug_loss

STEPS = 400
LN_V = math.log(4096)


def write(path, losses, *, lr=None, shards=None, norms=None, evals=(), end="summary", vocab=4096, tag="d4", speed=None):
    """A record with these losses; lr, shards and norms are functions of the step."""
    rows = record.Record(
        path / "base_checkpoints" / tag / "record.jsonl", stage="base", config={"dataset": "tinyworld"}
    )
    rows.event("plan", plan={"config": {"vocab_size": vocab, "n_layer": 4}, "tokens": 1000})
    smooth = losses[0]
    for step, loss in enumerate(losses):
        smooth = 0.9 * smooth + 0.1 * (loss if math.isfinite(loss) else smooth)
        rows.step(
            step, loss=loss, smooth_loss=smooth, epoch=1, lr=lr(step) if lr else 1.0,
            grad_norm=norms(step) if norms else 1.0, shard=shards(step) if shards else 0,
            tokens_per_second=speed(step) if speed else 100.0,
        )  # fmt: skip
    for step, value in evals:
        rows.eval(step, val_bpb=value)
    if end == "summary":
        rows.close(seconds=1.0)
    elif end:
        rows.event("failed", error="UserError", message=end)
    return rows.path


def healthy(seed=0, start=LN_V):
    """A falling, noisy curve from ln V."""
    noise = random.Random(seed)
    return [2 + (start - 2) * math.exp(-step / 80) + noise.gauss(0, 0.03) * (step > 0) for step in range(STEPS)]


def kinds(path):
    return {finding.kind: finding for finding in debug_loss.diagnose(record.read(path))}


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_has_nothing_odd(tmp_path, seed):
    warm = lambda step: min((step + 1) / 10, 1.0) * min(1.0, (STEPS - step) / 200)
    assert kinds(write(tmp_path, healthy(seed), lr=warm)) == {}


def test_a_spike_is_found_with_what_happened_there(tmp_path):
    losses = healthy()
    for step, more in ((200, 1.5), (201, 1.0), (202, 0.4)):
        losses[step] += more
    path = write(tmp_path, losses, shards=lambda step: int(step >= 199), norms=lambda step: 9.0 if step == 200 else 1.0)
    (finding,) = kinds(path).values()
    assert (finding.kind, finding.step) == ("spike", 200)
    assert "was back after 3 steps" in finding.text
    assert "the data reached shard 1 at step 199" in finding.text and "9.0 times the usual" in finding.text


def test_a_jump_of_the_learning_rate_is_named(tmp_path):
    losses = healthy()
    losses[300] += 1.0
    found = kinds(write(tmp_path, losses, lr=lambda step: 1.0 if step < 300 else 0.5))
    assert "the warm-down began" in found["spike"].text or "jumped from x 1.000 to x 0.500" in found["spike"].text


def test_a_nan_is_found_where_it_begins(tmp_path):
    losses = healthy()
    losses[250:] = [math.nan] * (STEPS - 250)
    assert kinds(write(tmp_path, losses))["nan"].step == 250


def test_the_sentence_a_run_died_with_is_read(tmp_path):
    path = write(tmp_path, healthy()[:100], end="Step 100: the loss is nan at data position 7; weights kept.")
    assert "Step 100: the loss is nan" in kinds(path)["nan"].text


def test_divergence_is_found_from_where_it_was_best(tmp_path):
    losses = healthy()
    losses[260:] = [loss + (step - 260) * 0.02 for step, loss in enumerate(losses[260:], 260)]
    found = kinds(write(tmp_path, losses))
    assert 220 <= found["divergence"].step <= 280 and "halve" in found["divergence"].remedy


def test_a_plateau_counts_only_while_the_rate_is_worth_the_name(tmp_path):
    flat = healthy()[:100] + [healthy()[100] + 0.001 * math.sin(step) for step in range(300)]
    assert "plateau" in kinds(write(tmp_path, flat))
    assert "plateau" not in kinds(write(tmp_path, flat, lr=lambda step: 1.0 if step < 100 else 0.05))


def test_validation_that_rises_again_is_overfitting(tmp_path):
    found = kinds(write(tmp_path, healthy(), evals=[(0, 3.0), (200, 1.0), (400, 1.2)]))
    assert found["overfitting"].step == 200


def test_a_machine_that_was_shared_is_noticed(tmp_path):
    assert "slow" in kinds(write(tmp_path, healthy(), speed=lambda step: 30.0 if 100 < step < 200 else 100.0))


@pytest.mark.slow
def test_the_program_prints_draws_and_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(debug_loss, "EXPECTED", [("tinyworld", 4, 0.4, "a run")])
    write(tmp_path, healthy(1), evals=[(400, 0.5)], tag="other")
    write(tmp_path, healthy(), evals=[(0, 3.0), (400, 0.45)], tag="mine")
    result = debug_loss.main(debug_loss.Config(model_tag="mine"))
    shown = capsys.readouterr().out
    assert "nothing odd" in shown and "finished" in shown and "as it should be" in shown
    assert "run other: 0.5000 (-0.0500" in shown and "depth 4 on tinyworld: 0.4000 (+0.0500" in shown
    with open(result["picture"], "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_a_first_loss_that_is_not_ln_v_is_told(tmp_path):
    rows = record.read(write(tmp_path, healthy(start=4.0)))
    assert "NOT as it should be" in " ".join(debug_loss.expected(rows, "d4", {}))


def test_what_cannot_be_read_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="No record of a base run"):
        debug_loss.main(debug_loss.Config())
    with pytest.raises(UserError, match="not a stage"):
        debug_loss.main(debug_loss.Config(source="mid"))
    path = tmp_path / "record.jsonl"
    path.write_text(json.dumps({"kind": "start", "time": 0, "stage": "rl", "config": {}}) + "\n")
    with pytest.raises(UserError, match="no training step"):
        debug_loss.main(debug_loss.Config(record=str(path)))
    with open(path, "a") as file:
        file.write(json.dumps({"kind": "step", "time": 0, "step": 0, "reward": 0.5}) + "\n")
    with pytest.raises(UserError, match="rewards"):
        debug_loss.main(debug_loss.Config(record=str(path)))
