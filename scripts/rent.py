"""What a training run would cost on rented GPUs: hours and dollars for each row of a dated price table, cheapest first.

    python -m scripts.rent --depth=24 --gpus=8 --target-param-data-ratio=8
    python -m scripts.rent --depth=12 --gpus=1 --prices=my_prices.csv

Hours are FLOPs / (peak x MFU x GPUs) of the same plan that training uses, and do not count evaluation and set-up (give
--extra-hours). Prices come only from the table, with their date and source; rows older than 90 days are marked stale:
copy nanochat/prices.csv, put in what your provider asks today, and give it with --prices. How to launch, for a machine
over ssh, SLURM and SkyPilot: docs/rent_gpu.md.
"""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from nanochat import cli, hardware, paths, prices, record, scaling
from nanochat.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    depth: int = 24  # layers
    target_param_data_ratio: float = 10.5  # tokens per scaling parameter
    vocab_size: int = 32768  # tokens
    gpus: int = 8  # rented together
    mfu: float = 0.5  # share of the bf16 peak that training reaches
    extra_hours: float = 0.5  # of set-up, data, evaluation and fine-tuning, paid for as well
    prices: str = ""  # CSV like nanochat/prices.csv; empty: that one
    today: str = ""  # date to judge staleness by, YYYY-MM-DD; empty: today
    output: str = ""  # JSON file for the rows; empty: only print


def offer(price: prices.Price, plan: scaling.Plan, cfg: Config, today: datetime.date) -> dict[str, Any]:
    """A row: hours and dollars on this GPU; hours None where its peak is unknown or the model does not fit."""
    peak = hardware.peak_flops(price.gpu)
    rows = scaling.fitting_rows(plan.config, price.memory_gib * 2**30 * hardware.USABLE, world=cfg.gpus)
    hours = plan.flops / (peak * cfg.mfu * cfg.gpus) / 3600 + cfg.extra_hours if peak and rows else None
    dollars = None if hours is None else (hours * cfg.gpus * price.low, hours * cfg.gpus * price.high)
    why = "" if hours else "peak unknown to nanochat/hardware.py" if not peak else "does not fit its memory"
    return {"gpu": price.gpu, "hours": hours, "dollars": dollars, "device_batch_size": rows, "kind": price.kind,
            "date": price.date.isoformat(), "days": price.days(today), "stale": price.stale(today),
            "source": price.source, "why": why}  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """The table for people."""
    print(f"{'GPU':<6}{'hours':>8}{'dollars':>16}{'batch':>7}  price of")
    for row in rows:
        hours = row["why"] or f"{row['hours']:>8.1f}{row['dollars'][0]:>8.0f} to {row['dollars'][1]:<5.0f}"
        age = f" STALE, {row['days']} days old" if row["stale"] else ""
        where = f"{row['date']}{age}: {row['kind']} ({row['source']})"
        print(f"{row['gpu']:<6}{hours:<24}{row['device_batch_size']:>7}  {where}")


def main(cfg: Config) -> dict:
    """Print and write; returns {"rows", "plan"}."""
    if cfg.gpus < 1 or not 0 < cfg.mfu <= 1 or cfg.extra_hours < 0:
        raise UserError("--gpus must be 1 or more, --mfu lie in 0..1 and --extra-hours be 0 or more.")
    try:
        today = datetime.date.fromisoformat(cfg.today) if cfg.today else datetime.date.today()
    except ValueError as error:
        raise UserError(f"--today={cfg.today} is not a date: write it as YYYY-MM-DD.") from error
    ratio = cfg.target_param_data_ratio
    plan = scaling.plan(cfg.depth, vocab_size=cfg.vocab_size, world=cfg.gpus, target_param_data_ratio=ratio)
    rows = [offer(price, plan, cfg, today) for price in prices.read(cfg.prices or prices.TABLE)]
    rows.sort(key=lambda row: (row["dollars"] is None, row["dollars"]))
    print(f"depth {cfg.depth}: {plan.parameters['total'] / 1e6:,.0f} M parameters, {plan.tokens / 1e9:.2f} B tokens, "
          f"{plan.flops:.3g} FLOPs on {cfg.gpus} GPU(s) at {100 * cfg.mfu:.0f} % MFU, "
          f"{cfg.extra_hours:g} h around it")  # fmt: skip
    show(rows)
    if all(row["stale"] for row in rows):
        print(f"note: every price is stale: copy {prices.TABLE.name}, edit it, and give it with --prices.")
    if cfg.output:
        paths.write_json(Path(cfg.output), record.plain(rows))
    return {"rows": rows, "plan": plan}


if __name__ == "__main__":
    cli.run(main, Config)
