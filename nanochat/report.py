"""What runs did, as one Markdown file and one self-contained HTML page: plan, curves, samples, scores; runs compared.

Everything comes from the records (`record.jsonl`, see nanochat/record.py) that the stages wrote into the artefact
folder; nothing is measured again. Pictures are SVG inside the page: no network, no scripts, no files beside it.
"""

import html
from pathlib import Path
from typing import Any

from nanochat import plots, record
from nanochat.errors import UserError
from nanochat.plots import Curve

STAGES = (("base", "base_checkpoints"), ("sft", "chatsft_checkpoints"), ("rl", "chatrl_checkpoints"))
Rows = list[dict]
Run = dict[str, Rows]  # rows of each stage's record by stage name: tok, base, sft, rl

GPT2_CORE = 0.256525  # GPT-2 XL (1.6 B): the published nanochat's reference for its leaderboard
GPT2_SOURCE = "GPT-2 XL, mean 0.2565 (published nanochat)"
MORE = {  # of a step's row, beside the loss: title, unit
    "reward": ("mean reward", "share right"),
    "lr": ("learning-rate multiplier", "of the peak"),
    "grad_norm": ("gradient norm", ""),
    "tokens_per_second": ("throughput", "tokens/s"),
    "mfu": ("model FLOP utilisation", "share of the peak"),
    "memory": ("memory in use", "GiB"),
}
CURVES = {"loss": ("training loss", "nats a token"), **MORE}


# -- reading ----------------------------------------------------------------------------------------------------------


def collect(base_dir: Path, tag: str | None = None) -> Run:
    """Rows of each stage's record, by stage name, for `tag` (default: the tag whose record is newest)."""
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


def plan_of(rows: Rows) -> dict[str, Any]:
    """The newest plan of a stage; empty if it recorded none."""
    return next((row["plan"] for row in reversed(rows) if row["kind"] == "plan"), {})


def axes_of(rows: Rows) -> dict[int, dict[str, float]]:
    """For each training step how far the run was: step, tokens, flops and minutes of training up to its end."""
    plan, minutes, found = plan_of(rows), 0.0, {}
    each = plan.get("flops_per_token")
    for row in (row for row in rows if row["kind"] == "step"):
        minutes += (row.get("seconds") or 0.0) / 60
        tokens = row.get("tokens") or (row["step"] + 1) * plan.get("batch", 0)
        found[row["step"]] = {"step": row["step"], "tokens": tokens, "minutes": minutes}
        if each:
            found[row["step"]]["flops"] = tokens * each
    return found


def curve(label: str, rows: Rows, name: str, kind: str = "step", axis: str = "step") -> Curve:
    """The curve of a value over an axis (step, tokens, flops, minutes); the last row of a step counts.

    An evaluation at step s has seen the s steps before it, so it stands where step s - 1 ended.
    """
    where, points = axes_of(rows), {}
    for row in rows:
        value = row.get(name)
        if row["kind"] != kind or not isinstance(value, int | float):
            continue
        if axis == "step":
            points[row["step"]] = value
        else:
            at = where.get(row["step"] - (kind == "eval"), {}).get(axis)
            if at is None and kind == "eval" and row["step"] == 0:
                at = 0.0
            if at is not None:
                points[at] = value
    keys = sorted(points)
    return Curve(label, keys, [points[key] for key in keys])


def steps(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """The curve of a value over the steps, from the training rows."""
    return curve("", rows, name)[1:]


def evals(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """The curve of an evaluation over the steps; the last measurement of a step counts."""
    return curve("", rows, name, "eval")[1:]


def scores(rows: Rows) -> dict[str, float]:
    """The last value of every number that was evaluated."""
    last: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "eval":
            last |= {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("time", "step")}
    return last


def core_tasks(rows: Rows) -> dict[str, float]:
    """Centred accuracy by CORE task of the newest evaluation; empty if there is none."""
    tasks = next((row["core_tasks"] for row in reversed(rows) if row.get("core_tasks")), {})
    found = {name: one.get("centered") if isinstance(one, dict) else one for name, one in tasks.items()}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def seconds(rows: Rows) -> float:
    """Wall-clock seconds of a stage: of training itself where the summary says so, else from first to last row."""
    stated = [row["seconds"] for row in rows if row["kind"] == "summary" and row.get("seconds")]
    return stated[-1] if stated else rows[-1]["time"] - rows[0]["time"]


# -- pictures ---------------------------------------------------------------------------------------------------------


def figures(runs: dict[str, Run]) -> list[tuple[str, list[str]]]:
    """(heading, pictures) of all runs: one line a run in each picture."""
    found = []
    for stage, _ in STAGES:
        have = {name: run[stage] for name, run in runs.items() if stage in run}
        pictures = [*loss_pictures(stage, have), *more_pictures(stage, have), *eval_pictures(stage, have)]
        if pictures:
            found.append((stage, pictures))
    spokes = {name: tasks for name, run in runs.items() if (tasks := core_tasks(run.get("base", [])))}
    if spokes:
        title = "CORE by task (centred on chance)"
        found.append(("CORE", [plots.radar(spokes, title, GPT2_CORE, GPT2_SOURCE)]))
    return found


def drawn(curves: list[Curve], title: str, axis: str, unit: str) -> list[str]:
    """A picture of the curves that have two points at least; none if there is no such curve."""
    curves = [one for one in curves if len(one.x) > 1]
    return [plots.lines(curves, title, axis, unit)] if curves else []


def loss_pictures(stage: str, have: dict[str, Rows]) -> list[str]:
    """The smoothed loss, and validation bpb, over each axis."""
    pictures = []
    for kind, name, title, unit in (("step", "smooth_loss", "training loss", "nats a token"),
                                    ("eval", "val_bpb", "validation", "bits per byte")):  # fmt: skip
        for axis, label in (("step", "step"), ("tokens", "tokens"), ("flops", "FLOPs"), ("minutes", "minutes")):
            curves = [curve(run, rows, name, kind, axis) for run, rows in have.items()]
            pictures += drawn(curves, f"{stage}: {title} over {label}", label, unit)
    return pictures


def more_pictures(stage: str, have: dict[str, Rows]) -> list[str]:
    """Rates, gradient norms, throughput, memory, reward over the steps."""
    pictures = []
    for name, (title, unit) in MORE.items():
        curves = [curve(run, rows, name) for run, rows in have.items()]
        if name == "memory":
            curves = [Curve(c.label, c.x, [y / 2**30 for y in c.y]) for c in curves]
        pictures += drawn(curves, f"{stage}: {title}", "step", unit)
    return pictures


def eval_pictures(stage: str, have: dict[str, Rows]) -> list[str]:
    """Every other evaluation that was made twice or more."""
    names = {k for rows in have.values() for row in rows if row["kind"] == "eval" for k in row}
    pictures = []
    for name in sorted(names - {"kind", "time", "step", "val_bpb", "core_tasks"}):
        pictures += drawn(
            [curve(run, rows, name, "eval") for run, rows in have.items()], f"{stage}: {name}", "step", ""
        )
    return pictures


def law_pictures(table: list[dict[str, str]]) -> list[str]:
    """The laws of a series (scripts.series' CSV as dicts): loss over FLOPs and parameters, tokens over FLOPs."""
    number = lambda row, name: float(row.get(name) or "nan")
    pictures = []
    for x, y, title in (("flops", "val_bpb", "bits per byte over compute"),
                        ("scaling_parameters", "val_bpb", "bits per byte over scaling parameters"),
                        ("flops", "tokens", "tokens over compute")):  # fmt: skip
        points = [(f"d{row.get('depth', '')}", number(row, x), number(row, y)) for row in table]
        points = [p for p in points if p[1] > 0 and p[2] > 0]
        if len({p[1] for p in points}) > 1:
            pictures.append(plots.law(points, title, x.replace("_", " "), y.replace("_", " ")))
    return pictures


# -- tables -----------------------------------------------------------------------------------------------------------


def score_table(run: Run) -> list[list[str]]:
    """Header and rows: a metric, then its last value after each stage (a dash where it was not measured)."""
    columns = [stage for stage, _ in STAGES if stage in run]
    last = {stage: scores(run[stage]) for stage in columns}
    names = sorted({name for values in last.values() for name in values})
    show = lambda value: "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
    return [["metric", *columns], *([name, *(show(last[s].get(name)) for s in columns)] for name in names)]


def stage_table(run: Run) -> list[list[str]]:
    """Header and rows: a stage, its time, its last step and what it says of itself."""
    rows = [["stage", "minutes", "steps", "peak memory, GiB"]]
    for stage, lines in run.items():
        last = max((row["step"] for row in lines if row["kind"] == "step"), default=None)
        peak = next((row["peak_bytes"] for row in reversed(lines) if row.get("peak_bytes")), None)
        memory = "–" if peak is None else f"{peak / 2**30:.2f}"
        rows.append([stage, f"{seconds(lines) / 60:.1f}", "–" if last is None else str(last), memory])
    return rows


def compared(runs: dict[str, Run]) -> list[list[str]]:
    """Header and rows: what the runs end with, one column a run."""
    cells: dict[str, dict[str, str]] = {}
    for name, run in runs.items():
        for stage in (stage for stage, _ in STAGES if stage in run):
            for metric, value in scores(run[stage]).items():
                cells.setdefault(f"{stage} {metric}", {})[name] = (
                    f"{value:.4f}" if isinstance(value, float) else str(value)
                )
            cells.setdefault(f"{stage} minutes", {})[name] = f"{seconds(run[stage]) / 60:.1f}"
    return [["", *runs], *([what, *(by.get(name, "–") for name in runs)] for what, by in sorted(cells.items()))]


def samples(run: Run, most: int = 8, times: int = 4) -> list[list[str]]:
    """Header and rows: stage, step, prompt, text; of each stage the first, the last and steps between."""
    out = [["stage", "step", "prompt", "text"]]
    for stage, rows in run.items():
        lines = [row for row in rows if row["kind"] == "sample"]
        steps = sorted({row["step"] for row in lines})
        chosen = {steps[round(i * (len(steps) - 1) / max(times - 1, 1))] for i in range(times)} if steps else set()
        for step in sorted(chosen):
            shown = [row for row in lines if row["step"] == step][:most]
            out += [[stage, str(step), row["prompt"], row["text"]] for row in shown]
    return out


def plan_lines(run: Run) -> list[list[str]]:
    """What pretraining decided, name and value."""
    flat = [["what", "value"]]
    for name, value in plan_of(run.get("base", [])).items():
        for key, item in value.items() if isinstance(value, dict) else [("", value)]:
            flat.append([f"{name} {key}".strip(), f"{item:,}" if isinstance(item, int) else str(item)])
    return flat


def tables(runs: dict[str, Run]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows) of every table that has a row."""
    found = [("Compared", compared(runs))] if len(runs) > 1 else []
    for name, run in runs.items():
        of = f" of {name}" if len(runs) > 1 else ""
        found += [(f"Stages{of}", stage_table(run)), (f"Scores{of}", score_table(run)), (f"Samples{of}", samples(run)),
                  (f"Plan{of}", plan_lines(run))]  # fmt: skip
    return [(title, rows) for title, rows in found if len(rows) > 1]


# -- the two files ----------------------------------------------------------------------------------------------------


def grid(rows: list[list[str]]) -> str:
    """Header and rows as a Markdown table."""
    cell = lambda text: text.replace("|", "\\|").replace("\r", " ").replace("\n", " ")
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def markdown(runs: dict[str, Run], about: dict[str, str]) -> str:
    """The report as Markdown."""
    parts = [f"# Report of {', '.join(runs)}\n", *(f"- {name}: {value}" for name, value in about.items())]
    for title, rows in tables(runs):
        parts += [f"\n## {title}\n", grid(rows)]
    return "\n".join(parts) + "\n"


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.2rem; font-size: 1.25rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: left; vertical-align: top; }
th { background: var(--soft); } td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.figures figure { margin: 0; } svg { width: 100%; height: auto; background: white; border-radius: 6px; }
.figures.few { max-width: 42rem; }
"""


def table_html(rows: list[list[str]]) -> str:
    """Header and rows as HTML."""
    line = lambda row, tag: "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"
    return f"<div class=wide><table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table></div>"


def page(runs: dict[str, Run], about: dict[str, str], series: list[dict[str, str]] | None = None) -> str:
    """The report as one HTML page that needs nothing else. series: the rows of scripts.series' CSV."""
    groups = figures(runs)
    if series and (laws := law_pictures(series)):
        groups.append(("scaling laws", laws))
    titles = {"base": "Pretraining", "sft": "Fine-tuning", "rl": "Reinforcement", "scaling laws": "Scaling laws"}
    sections = []
    for heading, pictures in groups:
        few = " few" if len(pictures) == 1 else ""
        inside = "".join(f"<figure>{picture}</figure>" for picture in pictures)
        sections.append((titles.get(heading, heading), f"<div class='figures{few}'>{inside}</div>"))
    long = ("Plan", "Samples")
    grids = [(title, table_html(rows)) for title, rows in tables(runs)]
    short = [(t, g) for t, g in grids if not t.startswith(long)]
    rest = [(t, g) for t, g in grids if t.startswith("Samples")]
    folded = [(t, f"<details><summary>show</summary>{g}</details>") for t, g in grids if t.startswith("Plan")]
    body = [*short, *sections, *rest, *folded]
    name = html.escape(", ".join(runs))
    facts = " · ".join(html.escape(f"{key}: {value}") for key, value in about.items())
    links = "".join(f"<a href='#s{i}'>{html.escape(title)}</a>" for i, (title, _) in enumerate(body))
    text = "".join(f"<h2 id=s{i}>{html.escape(title)}</h2>{inside}\n" for i, (title, inside) in enumerate(body))
    head = "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    icon = "<link rel=icon href='data:,'>"
    return (
        f"{head}{icon}<title>nanochat: {name}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>Report of {name}</h1><p>{facts}</p><nav>{links}</nav>{text}</main></body></html>\n"
    )
