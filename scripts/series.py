"""One table over many pretraining runs, from their records: what runs/miniseries.sh and runs/scaling_laws.sh end with.

python -m scripts.series --prefix=miniseries_ --output=miniseries.csv
"""

import csv
import dataclasses
import io
from pathlib import Path

from nanochat import checkpoint, cli, paths, record
from nanochat.errors import UserError

COLUMNS = ("tag", "depth", "width", "parameters", "scaling_parameters", "tokens", "batch", "iterations", "flops",
           "val_bpb", "core", "seconds", "tokens_per_second")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    prefix: str = ""  # tags of the runs to list begin with this
    output: str = ""  # CSV file; empty: only print


def row(tag: str, rows: list[dict]) -> dict | None:
    """The table row of a run; None if it has not ended."""
    plan = next((r["plan"] for r in reversed(rows) if r["kind"] == "plan"), None)
    summary = next((r for r in reversed(rows) if r["kind"] == "summary"), None)
    if plan is None or summary is None:
        return None
    named = {
        "tag": tag,
        "depth": plan["config"]["n_layer"],
        "width": plan["config"]["n_embd"],
        "parameters": plan["parameters"]["total"],
        "scaling_parameters": plan["parameters"]["scaling"],
    }
    return named | {name: plan.get(name, summary.get(name)) for name in COLUMNS if name not in named}


def main(cfg: Config) -> dict:
    """Collect, print and write; returns {"rows": [...]}."""
    found = sorted(checkpoint.folder("base").glob(f"{cfg.prefix}*/record.jsonl"))
    rows = [r for path in found if (r := row(path.parent.name, record.read(path)))]
    if not rows:
        raise UserError(f"No finished base run has a tag that begins with {cfg.prefix!r}: train first.")
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda r: (r["flops"] or 0, r["depth"])))
    print(out.getvalue(), end="")
    if cfg.output:
        with paths.atomic_write(Path(cfg.output), "w") as file:
            file.write(out.getvalue())
    return {"rows": rows}


if __name__ == "__main__":
    cli.run(main, Config)
