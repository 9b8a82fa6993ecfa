"""scripts/rent.py and nanochat/prices.py: cost is hours times GPUs times a dated price; old prices are called stale."""

import datetime

import pytest

from nanochat import hardware, prices, scaling
from nanochat.errors import UserError
from scripts import rent

HEAD = "gpu,memory_gib,low,high,kind,date,source\n"


def table(tmp_path, *lines):
    path = tmp_path / "prices.csv"
    path.write_text(HEAD + "".join(f"{line}\n" for line in lines))
    return str(path)


def test_every_row_of_our_table_is_dated_sourced_and_of_a_known_gpu():
    rows = prices.read()
    assert {row.gpu for row in rows} >= {"H100", "H200", "A100", "4090"}
    for row in rows:
        assert row.source and row.date <= datetime.date.today() and hardware.peak_flops(row.gpu)


def test_cost_is_hours_times_gpus_times_price(tmp_path, capsys):
    mine = table(tmp_path, "H100,80,2,3,mine,2026-11-01,bill", "A100,80,1,1,mine,2026-11-01,bill")
    cfg = rent.Config(depth=12, gpus=8, mfu=0.5, extra_hours=1.0, prices=mine, today="2026-11-25")
    rows = {row["gpu"]: row for row in rent.main(cfg)["rows"]}
    flops = scaling.plan(12, vocab_size=32768, world=8).flops
    hours = flops / (989e12 * 0.5 * 8) / 3600 + 1
    assert rows["H100"]["hours"] == pytest.approx(hours)
    assert rows["H100"]["dollars"] == pytest.approx((hours * 8 * 2, hours * 8 * 3))
    assert rows["A100"]["hours"] > rows["H100"]["hours"] and not rows["H100"]["stale"]
    assert "STALE" not in capsys.readouterr().out


def test_the_published_run_costs_about_what_was_published():
    cfg = rent.Config(depth=24, gpus=8, target_param_data_ratio=8, mfu=0.593, extra_hours=0)
    (row,) = (r for r in rent.main(cfg)["rows"] if r["source"].endswith("(report)"))
    assert row["hours"] == pytest.approx(99 / 60, rel=0.1) and row["dollars"][0] == pytest.approx(24 * 99 / 60, rel=0.1)


def test_old_prices_are_marked(tmp_path, capsys):
    mine = table(tmp_path, "H100,80,2,3,mine,2026-08-01,bill")
    rent.main(rent.Config(prices=mine, today="2026-11-25"))
    assert "STALE, 116 days old" in (shown := capsys.readouterr().out) and "every price is stale" in shown


def test_a_gpu_that_is_too_small_or_unknown_is_said_and_comes_last(tmp_path, capsys):
    mine = table(
        tmp_path, "3090,24,0.1,0.1,x,2026-11-01,y", "Frob,80,0.1,0.1,x,2026-11-01,y", "H100,80,2,3,x,2026-11-01,y"
    )
    rows = rent.main(rent.Config(depth=26, gpus=1, prices=mine))["rows"]
    assert rows[0]["gpu"] == "H100" and [row["hours"] for row in rows[1:]] == [None, None]
    shown = capsys.readouterr().out
    assert "does not fit its memory" in shown and "peak unknown" in shown


@pytest.mark.parametrize(
    ("line", "why"),
    [("H100,80,3,2,x,2026-11-01,y", "low 3"), ("H100,80,a,2,x,2026-11-01,y", "could not convert"),
     ("H100,80,1,2,x,yesterday,y", "isoformat"), ("H100,80,1,2,x,2026-11-01,", "a source")],
)  # fmt: skip
def test_rows_that_make_no_sense_are_named(tmp_path, line, why):
    with pytest.raises(UserError, match=f"line 2 of .*{why}"):
        prices.read(table(tmp_path, line))


def test_wrong_flags_are_refused(tmp_path):
    with pytest.raises(UserError, match="--gpus"):
        rent.main(rent.Config(gpus=0))
    with pytest.raises(UserError, match="--today"):
        rent.main(rent.Config(today="soon"))
    with pytest.raises(UserError, match="can't be read"):
        prices.read(tmp_path / "none.csv")
