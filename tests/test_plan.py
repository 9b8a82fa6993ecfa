"""The plan before a run: the published speedrun's figures, budgets, memory, dated prices; the trainer's numbers."""

import datetime
import json

import pytest

from nanochat import cost, hardware, prices, scaling
from nanochat.errors import UserError
from nanochat.runtime import Runtime
from scripts import base_train, bench_memory, plan

H100 = dict(gpus=8, gpu="h100")


def test_the_published_speedrun(base_dir, capsys):
    """1,384.12 M parameters, 5.838 B tokens in 5,568 batches of 2^20, 2.79e19 FLOPs, 99 minutes on 8 H100s in fp8."""
    row = plan.main(plan.Config(depth=24, target_param_data_ratio=8, fp8=True, **H100))
    p = row["plan"]
    assert round(p.parameters["total"] / 1e6, 2) == 1384.12 and round(p.tokens / 1e9, 3) == 5.838
    assert (p.batch, p.iterations, f"{p.flops:.3g}") == (2**20, 5568, "2.79e+19")
    assert 60 * row["hours"] == pytest.approx(99, rel=0.1) and row["device_batch_size"] == 16
    text = capsys.readouterr().out
    assert "1,384.12 M" in text and "(99 minutes) at 59.3 %" in text


def test_a_budget_gives_the_deepest_model_that_keeps_it(base_dir):
    for name, value, need in (("hours", 2.0, lambda r: r["hours"]), ("dollars", 50.0, lambda r: r["dollars"]),
                              ("flops", 1e19, lambda r: r["plan"].flops)):  # fmt: skip
        cfg = plan.Config(**{name: value}, **H100)
        row, rows = plan.choose(cfg, plan.machine(cfg))
        deeper = next(r for r in rows if r["depth"] == row["depth"] + 2)
        assert need(row) <= value < need(deeper)
    with pytest.raises(UserError, match="Not even depth 4"):
        plan.main(plan.Config(hours=1e-5, **H100))
    with pytest.raises(UserError, match="one budget"):
        plan.main(plan.Config(hours=1, flops=1e18, **H100))
    with pytest.raises(UserError, match="name one with --gpu"):
        plan.main(plan.Config(dollars=5, gpu="abacus"))


def test_the_plan_is_the_trainers_and_the_rows_are_the_most_that_fit(base_dir):
    cfg = plan.Config(depth=12, gpu="h100", memory_gib=24)
    m = plan.machine(cfg)
    row = plan.option(cfg, 12, m)
    fit = dict(bytes_per_value=2, device="cuda")
    assert cost.memory(row["plan"].config, row["device_batch_size"], **fit)["total"] <= 24 * 2**30 * hardware.USABLE
    assert cost.memory(row["plan"].config, 2 * row["device_batch_size"], **fit)["total"] > 24 * 2**30 * hardware.USABLE
    same = base_train.Config(depth=12, device_batch_size=row["device_batch_size"])
    assert base_train.make_plan(same, 32768, 1) == row["plan"]
    nothing = plan.option(plan.Config(depth=40, gpu="4090"), 40, plan.machine(plan.Config(gpu="4090")))
    assert nothing["device_batch_size"] == 0


def test_auto_rows_in_training_follow_the_memory_there_is(base_dir, monkeypatch):
    cfg = base_train.Config(depth=4, device_batch_size="auto", max_seq_len=256, num_iterations=5)
    found = []
    for gib in (2, 8):
        monkeypatch.setattr(hardware, "total_memory", lambda device, gib=gib: gib * 2**30)
        found.append(base_train.make_plan(base_train.with_rows(cfg, 4096, Runtime.single()), 4096, 1))
    config = found[0].config
    assert found[0].device_batch_size < found[1].device_batch_size or found[1].accum == 1
    fit = dict(bytes_per_value=4, device="cpu")
    assert cost.memory(config, found[0].device_batch_size, **fit)["total"] <= 2 * 2**30 * hardware.USABLE
    monkeypatch.setattr(hardware, "total_memory", lambda device: 2**20)
    with pytest.raises(UserError, match="Not even one row"):
        scaling.auto_rows(config, Runtime.single())
    monkeypatch.setattr(hardware, "total_memory", lambda device: None)
    assert scaling.auto_rows(config, Runtime.single()) == 32


def test_prices_carry_a_date_and_a_source_and_the_users_table_stands_before_ours(base_dir, tmp_path, capsys):
    mine = tmp_path / "mine.csv"
    today = datetime.date.today().isoformat()
    mine.write_text(f"{','.join(prices.COLUMNS)}\nH100,80,1,2,spot,{today},my bill\nH100,80,9,9,old,2020-01-01,x\n")
    row = plan.main(plan.Config(depth=24, prices=str(mine), **H100))
    assert row["dollars"] == pytest.approx(8 * 2 * row["hours"])
    assert f"$1.00 to 2.00 a GPU and hour, spot, my bill, {today} (0 days old)\n" in capsys.readouterr().out
    mine.write_text(f"{','.join(prices.COLUMNS)}\nH100,80,9,9,old,2020-01-01,x\n")
    capsys.readouterr()
    assert plan.main(plan.Config(depth=4, prices=str(mine), gpu="a100"))["dollars"] is None
    assert "\ncost       unknown: the price table lacks the device\n" in capsys.readouterr().out
    plan.main(plan.Config(depth=4, prices=str(mine), gpu="h100"))
    age = (datetime.date.today() - datetime.date(2020, 1, 1)).days
    assert f"2020-01-01 ({age} days old, STALE: look it up" in capsys.readouterr().out


def test_table_plot_and_json(base_dir, tmp_path, capsys):
    out = tmp_path / "plan.json"
    plan.main(plan.Config(hours=2, table=True, plot=str(tmp_path / "plan.png"), output=str(out), **H100))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("\n") > len(plan.DEPTHS) + 8
    row = json.loads(out.read_text())
    assert {"depth", "device_batch_size", "shards"} <= row.keys()  # runs/speedrun.sh reads these
    assert row["plan"]["config"]["n_layer"] == row["depth"] and row["memory"]["total"] > 0


@pytest.mark.slow
def test_the_memory_plan_of_a_small_model_is_near_its_measured_peak():
    """The bench's own way, in a fresh process; the bars are measured by scripts/bench_memory.py."""
    row = bench_memory.spawn(bench_memory.Config(), (4, 4, 4, 4096, 256, 8, 1, "float32"))
    assert max(parts["total"] for parts in row["plan"].values()) / row["peak"] == pytest.approx(1, abs=0.25)
