"""What a run did, as one Markdown file and one self-contained HTML page: plan, curves, samples, table of scores.

Everything comes from the records (`record.jsonl`, see nanochat/record.py) that the stages wrote into the artefact
folder; nothing is measured again. Pictures are SVG inside the page: no network, no files beside it.
"""

import html
import io
from pathlib import Path
from typing import Any

from nanochat import record
from nanochat.errors import UserError

STAGES = (("base", "base_checkpoints"), ("sft", "chatsft_checkpoints"), ("rl", "chatrl_checkpoints"))
CURVES = {  # of a step's row: title, unit
    "loss": ("training loss", "nats a token"),
    "reward": ("mean reward", "share right"),
    "lr": ("learning-rate multiplier", ""),
    "grad_norm": ("gradient norm", ""),
    "tokens_per_second": ("throughput", "tokens/s"),
}


def collect(base_dir: Path, tag: str | None = None) -> dict[str, list[dict]]:
    """Rows of each stage's record, by stage name, for `tag` (default: the tag whose base or SFT record is newest)."""
    found = {}
    if (base_dir / "tokenizer" / "record.jsonl").exists():
        found["tok"] = record.read(base_dir / "tokenizer" / "record.jsonl")
    records = {stage: list((base_dir / folder).glob(f"{tag or '*'}/record.jsonl")) for stage, folder in STAGES}
    if not any(records.values()):
        raise UserError(f"No record of a run{f' named {tag}' if tag else ''} in {base_dir}: train first.")
    if tag is None:
        newest = max((path for paths in records.values() for path in paths), key=lambda p: p.stat().st_mtime)
        return collect(base_dir, newest.parent.name)
    found |= {stage: record.read(paths[0]) for stage, paths in records.items() if paths}
    return found


def steps(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    """The curve of a value over the steps, from the training rows."""
    points = {row["step"]: row[name] for row in rows if row["kind"] == "step" and row.get(name) is not None}
    return list(points), list(points.values())


def evals(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    """The curve of an evaluation over the steps; the last measurement of a step counts."""
    points = {row["step"]: row[name] for row in rows if row["kind"] == "eval" and row.get(name) is not None}
    return list(points), list(points.values())


def scores(rows: list[dict]) -> dict[str, float]:
    """The last value of every number that was evaluated."""
    last: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "eval":
            last |= {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("time", "step")}
    return last


def seconds(rows: list[dict]) -> float:
    """Wall-clock seconds of a stage: of training itself where the summary says so, else from first to last row."""
    stated = [row["seconds"] for row in rows if row["kind"] == "summary" and row.get("seconds")]
    return stated[-1] if stated else rows[-1]["time"] - rows[0]["time"]


def figure(curves: list[tuple[str, list[float], list[float]]], title: str, unit: str) -> str:
    """An SVG line plot: (label, x, y) a curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(figsize=(5.4, 3.0), layout="constrained")
    for label, x, y in curves:
        axes.plot(x, y, label=label, linewidth=1.4, marker="o" if len(x) < 12 else None, markersize=3)
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(frameon=False)
    out = io.StringIO()
    fig.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(fig)
    text = out.getvalue()
    return text[text.index("<svg") :]


def figures(found: dict[str, list[dict]]) -> list[str]:
    """Every curve that has at least two points, one picture each."""
    pictures = []
    for stage, rows in found.items():
        for name, (title, unit) in CURVES.items():
            x, y = steps(rows, name)
            if len(x) > 1:
                pictures.append(figure([(stage, x, y)], f"{stage}: {title}", unit))
        for name in sorted({k for row in rows if row["kind"] == "eval" for k in row} - {"kind", "time", "step"}):
            x, y = evals(rows, name)
            if len(x) > 1 and all(isinstance(value, int | float) for value in y):
                pictures.append(figure([(stage, x, y)], f"{stage}: {name}", ""))
    return pictures


def score_table(found: dict[str, list[dict]]) -> list[list[str]]:
    """Header and rows: a metric, then its last value after each stage (a dash where it was not measured)."""
    columns = [stage for stage, _ in STAGES if stage in found]
    last = {stage: scores(found[stage]) for stage in columns}
    names = sorted({name for values in last.values() for name in values})
    show = lambda value: "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
    return [["metric", *columns], *([name, *(show(last[s].get(name)) for s in columns)] for name in names)]


def stage_table(found: dict[str, list[dict]]) -> list[list[str]]:
    """Header and rows: a stage, its time, its last step and what it says of itself."""
    rows = [["stage", "minutes", "steps", "peak memory, GiB"]]
    for stage, lines in found.items():
        last = max((row["step"] for row in lines if row["kind"] == "step"), default=None)
        peak = next((row["peak_bytes"] for row in reversed(lines) if row.get("peak_bytes")), None)
        memory = "–" if peak is None else f"{peak / 2**30:.2f}"
        rows.append([stage, f"{seconds(lines) / 60:.1f}", "–" if last is None else str(last), memory])
    return rows


def samples(found: dict[str, list[dict]], most: int = 12) -> list[tuple[str, str, str]]:
    """(stage, prompt, text) of the newest samples of each stage."""
    out = []
    for stage, rows in found.items():
        lines = [row for row in rows if row["kind"] == "sample"]
        out += [(stage, row["prompt"], row["text"]) for row in lines if row["step"] == lines[-1]["step"]][:most]
    return out


def plan_lines(found: dict[str, list[dict]]) -> list[list[str]]:
    """What pretraining decided, name and value."""
    plan: dict[str, Any] = next((row["plan"] for row in found.get("base", []) if row["kind"] == "plan"), {})
    flat = [["what", "value"]]
    for name, value in plan.items():
        for key, item in value.items() if isinstance(value, dict) else [("", value)]:
            flat.append([f"{name} {key}".strip(), f"{item:,}" if isinstance(item, int) else str(item)])
    return flat if len(flat) > 1 else []


def grid(rows: list[list[str]]) -> str:
    """Header and rows as a Markdown table."""
    cell = lambda text: text.replace("|", "\\|").replace("\r", " ").replace("\n", " ")
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def markdown(found: dict[str, list[dict]], machine: dict[str, str]) -> str:
    """The report as Markdown."""
    parts = ["# Report of a nanochat run", *(f"- {name}: {value}" for name, value in machine.items())]
    for title, rows in (("Stages", stage_table(found)), ("Scores", score_table(found)), ("Plan", plan_lines(found))):
        if rows:
            parts += [f"\n## {title}\n", grid(rows)]
    if shown := samples(found):
        parts += ["\n## Samples\n", grid([["stage", "prompt", "text"], *([*row] for row in shown)])]
    return "\n".join(parts) + "\n"


STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: left; vertical-align: top; }
td:not(:first-child) { font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem; }
.figures svg { width: 100%; height: auto; background: white; border-radius: 6px; }
"""


def page(found: dict[str, list[dict]], machine: dict[str, str]) -> str:
    """The report as one HTML page that needs nothing else."""
    cell = html.escape
    grid = lambda rows: (
        "<table><tr>" + "".join(f"<th>{cell(c)}</th>" for c in rows[0]) + "</tr>"
        + "".join("<tr>" + "".join(f"<td>{cell(c)}</td>" for c in row) + "</tr>" for row in rows[1:]) + "</table>"
    )  # fmt: skip
    body = [grid([["machine", ""], *([k, v] for k, v in machine.items())])]
    for title, rows in (("Stages", stage_table(found)), ("Scores", score_table(found))):
        body += [f"<h2>{title}</h2>", grid(rows)]
    body += ["<h2>Curves</h2><div class=figures>", *figures(found), "</div>"]
    if shown := samples(found):
        body += ["<h2>Samples</h2>", grid([["stage", "prompt", "text"], *([*row] for row in shown)])]
    if rows := plan_lines(found):
        body += ["<details><summary>Plan</summary>", grid(rows), "</details>"]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>nanochat report</title><style>{STYLE}</style>"
    return head + "<h1>Report of a nanochat run</h1>" + "\n".join(body) + "</html>\n"
