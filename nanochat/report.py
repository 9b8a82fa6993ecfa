"""What runs did: plan, curves, scores, samples of each stage, and several runs compared, as tables and pictures.

Everything comes from the records (`record.jsonl`, see nanochat/record.py) that the stages wrote into the artefact
folder; nothing is measured again. A record of another version, cut off or damaged, gives what can be read of it.
nanochat/report_page.py puts it on paper.
"""

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import plots, record
from nanochat.errors import UserError
from nanochat.plots import Curve, Picture

STAGES = (("base", "base_checkpoints"), ("sft", "chatsft_checkpoints"), ("rl", "chatrl_checkpoints"))
Rows = list[dict]
Run = dict[str, Rows]  # rows of each stage's record by stage name: tok, base, sft, rl


class Reference(NamedTuple):
    """Another model's CORE: who and by which source, centred accuracy by task (perhaps not all), mean of all tasks."""

    label: str
    tasks: dict[str, float]
    core: float


GPT2 = Reference(  # (accuracy - chance) / (1 - chance); the published nanochat states these six and the mean of all 22
    "GPT-2 XL (published nanochat, dev/estimate_gpt3_core.ipynb)",
    {"hellaswag_zeroshot": (0.502 - 0.25) / 0.75, "lambada_openai": 0.523, "hellaswag": (0.512 - 0.25) / 0.75,
     "piqa": (0.725 - 0.5) / 0.5, "arc_easy": (0.595 - 0.25) / 0.75, "arc_challenge": (0.299 - 0.25) / 0.75},
    0.256525,
)  # fmt: skip
GPT2_TABLE = "openai-community-gpt2-xl.csv"  # GPT-2 XL on all 22, in the bundle that CORE is measured with
MORE = {  # of a step's row, beside the loss: title, unit
    "reward": ("mean reward", "share right"),
    "lr": ("learning-rate multiplier", "of the peak"),
    "grad_norm": ("gradient norm", ""),
    "tokens_per_second": ("throughput", "tokens/s"),
    "mfu": ("model FLOP utilisation", "share of the peak"),
    "memory": ("memory in use", "GiB"),
}
ERRORS = ("_se", "_stderr")  # endings of an evaluation's standard error
CURVES = {"loss": ("training loss", "nats a token"), **MORE}


# -- reading ----------------------------------------------------------------------------------------------------------


def sound(row: dict) -> bool:
    """Has the row what its kind is read for? Rows of other versions, and damaged ones, may not."""
    needed = {"step": {"step": int}, "eval": {"step": int}, "sample": {"step": int, "prompt": str, "text": str},
              "plan": {"plan": dict}}.get(row["kind"], {})  # fmt: skip
    return isinstance(row.get("time"), int | float) and all(isinstance(row.get(k), t) for k, t in needed.items())


def newest(base_dir: Path) -> str:
    """The tag of the run whose record was written last."""
    found = [path for _, folder in STAGES for path in (base_dir / folder).glob("*/record.jsonl")]
    if not found:
        raise UserError(f"No record of a run in {base_dir}: train first.")
    return max(found, key=lambda path: path.stat().st_mtime).parent.name


def collect(base_dir: Path, tag: str | None = None) -> Run:
    """Rows of each stage's record, by stage name, for `tag` (default: the newest); only rows that can be read."""
    tag = tag or newest(base_dir)
    places = [("tok", base_dir / "tokenizer")] + [(stage, base_dir / folder / tag) for stage, folder in STAGES]
    files = [(stage, folder / "record.jsonl") for stage, folder in places if (folder / "record.jsonl").is_file()]
    if not any(stage != "tok" for stage, _ in files):
        raise UserError(f"No record of a run named {tag} in {base_dir}: train first.")
    found = {stage: rows for stage, path in files if (rows := [row for row in record.read(path) if sound(row)])}
    if not any(stage != "tok" for stage in found):
        raise UserError(f"The records of {tag} in {base_dir} hold no row that can be read: nothing was trained yet.")
    return found


def plan_of(rows: Rows) -> dict[str, Any]:
    """The newest plan of a stage; empty if it recorded none."""
    return next((row["plan"] for row in reversed(rows) if row["kind"] == "plan"), {})


def number(value: Any) -> float:
    """The value, if it is a number; else 0."""
    return value if isinstance(value, int | float) else 0


def axes_of(rows: Rows) -> dict[int, dict[str, float]]:
    """For each training step how far the run was: step, tokens, flops and minutes of training up to its end."""
    plan, minutes, found = plan_of(rows), 0.0, {}
    each = number(plan.get("flops_per_token"))
    for row in (row for row in rows if row["kind"] == "step"):
        minutes += number(row.get("seconds")) / 60
        tokens = number(row.get("tokens")) or (row["step"] + 1) * number(plan.get("batch"))
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
    tasks = next((row["core_tasks"] for row in reversed(rows) if isinstance(row.get("core_tasks"), dict)), {})
    found = {name: one.get("centered") if isinstance(one, dict) else one for name, one in tasks.items()}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def seconds(rows: Rows) -> float:
    """Wall-clock seconds of a stage: of training itself where the summary says so, else from first to last row."""
    stated = [row["seconds"] for row in rows if row["kind"] == "summary" and number(row.get("seconds"))]
    return stated[-1] if stated else rows[-1]["time"] - rows[0]["time"]


def reference(text: str) -> Reference:
    """The scores in a table of CORE (Task, Accuracy, Centered; the mean in a row CORE); GPT2 if it can't be read."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines())]
    try:
        scores = {row[0]: float(row[2]) for row in rows if len(row) > 2 and row[0] != "Task"}
        return Reference("GPT-2 XL (published nanochat, in CORE's bundle)", scores, scores.pop("CORE"))
    except (KeyError, ValueError):
        return GPT2


# -- pictures ---------------------------------------------------------------------------------------------------------


def figures(runs: dict[str, Run], other: Reference = GPT2) -> list[tuple[str, list[Picture]]]:
    """(heading, pictures) of all runs: one line a run in each picture; `other`: whose CORE is drawn beside it."""
    found = []
    for stage, _ in STAGES:
        have = {name: run[stage] for name, run in runs.items() if stage in run}
        pictures = [*loss_pictures(stage, have), *more_pictures(stage, have), *eval_pictures(stage, have)]
        if pictures:
            found.append((stage, pictures))
    if spokes := core_of(runs):
        title, mean = "CORE by task (centred on chance)", f"its mean of 22 tasks, {other.core:.4f}"
        found.append(("CORE", [plots.radar(spokes, title, other.tasks, other.label, other.core, mean)]))
    return found


def core_of(runs: dict[str, Run]) -> dict[str, dict[str, float]]:
    """The runs that were judged by CORE, with their scores by task."""
    return {name: tasks for name, run in runs.items() if (tasks := core_tasks(run.get("base", [])))}


def drawn(curves: list[Curve], title: str, axis: str, unit: str, **how: bool) -> list[Picture]:
    """A picture of the curves that have two points at least; none if there is no such curve. how: see plots.lines."""
    curves = [one for one in curves if len(one.x) > 1]
    return [plots.lines(curves, title, axis, unit, **how)] if curves else []


def loss_pictures(stage: str, have: dict[str, Rows]) -> list[Picture]:
    """The smoothed loss, and validation bpb, over each axis."""
    pictures = []
    for kind, name, title, unit in (("step", "smooth_loss", "training loss", "nats a token"),
                                    ("eval", "val_bpb", "validation", "bits per byte")):  # fmt: skip
        for axis, label in (("step", "step"), ("tokens", "tokens"), ("flops", "FLOPs"), ("minutes", "minutes")):
            curves = [curve(run, rows, name, kind, axis) for run, rows in have.items()]
            pictures += drawn(curves, f"{stage}: {title} over {label}", label, unit, falling=True)
    return pictures


def more_pictures(stage: str, have: dict[str, Rows]) -> list[Picture]:
    """Rates, gradient norms, throughput, memory, reward over the steps."""
    pictures = []
    for name, (title, unit) in MORE.items():
        curves = [curve(run, rows, name) for run, rows in have.items()]
        if name == "memory":
            curves = [Curve(c.label, c.x, [y / 2**30 for y in c.y]) for c in curves]
        noisy = name in ("reward", "grad_norm", "tokens_per_second", "mfu")
        pictures += drawn(curves, f"{stage}: {title}", "step", unit, noisy=noisy)
    return pictures


def eval_pictures(stage: str, have: dict[str, Rows]) -> list[Picture]:
    """Every other evaluation that was made twice or more."""
    names = {k for rows in have.values() for row in rows if row["kind"] == "eval" for k in row}
    pictures = []
    for name in sorted(n for n in names - {"kind", "time", "step", "val_bpb", "core_tasks"} if not n.endswith(ERRORS)):
        pictures += drawn(
            [curve(run, rows, name, "eval") for run, rows in have.items()], f"{stage}: {name}", "step", ""
        )
    return pictures


UNITS = {"flops": "FLOPs", "scaling_parameters": "scaling parameters", "tokens": "tokens", "val_bpb": "bits per byte"}


def cell(row: dict[str, str], name: str) -> float:
    """A number of a table's row; NaN if it is none."""
    try:
        return float(row.get(name) or "nan")
    except ValueError:
        return math.nan


def law_pictures(table: list[dict[str, str]]) -> list[Picture]:
    """The laws of a series (scripts.series' CSV as dicts): loss over FLOPs and parameters, tokens over FLOPs."""
    pictures = []
    for x, y, title in (("flops", "val_bpb", "bits per byte over compute"),
                        ("scaling_parameters", "val_bpb", "bits per byte over scaling parameters"),
                        ("flops", "tokens", "tokens over compute")):  # fmt: skip
        points = [(f"d{row.get('depth', '')}", cell(row, x), cell(row, y)) for row in table]
        points = [p for p in points if 0 < p[1] < math.inf and 0 < p[2] < math.inf]
        if len({p[1] for p in points}) > 1:
            pictures.append(plots.law(points, title, UNITS[x], UNITS[y]))
    return pictures


# -- tables -----------------------------------------------------------------------------------------------------------


def shown(values: dict[str, float]) -> dict[str, str]:
    """Every metric as text, with its standard error where one was measured: 0.8800 ± 0.0125."""
    text = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in values.items()}
    errors = {name.removesuffix(end): value for name, value in text.items() for end in ERRORS if name.endswith(end)}
    return {name: f"{value} ± {errors[name]}" if name in errors else value
            for name, value in text.items() if not name.endswith(ERRORS)}  # fmt: skip


def before_and_after(rows: Rows) -> dict[str, str]:
    """Every metric's last value in a stage; behind its value before the first update, where that was measured."""
    first = shown(scores([row for row in rows if row.get("step") == 0]))
    last = shown(scores(rows))
    return {name: f"{first[name]} → {value}" if first.get(name, value) != value else value
            for name, value in last.items()}  # fmt: skip


def score_table(run: Run) -> list[list[str]]:
    """Header and rows: a metric, then its value after each stage (a dash where it was not measured)."""
    columns = {stage: before_and_after(run[stage]) for stage, _ in STAGES if stage in run}
    names = sorted({name for values in columns.values() for name in values})
    return [["metric", *columns], *([name, *(values.get(name, "–") for values in columns.values())] for name in names)]


def ending(rows: Rows) -> str:
    """How the stage ended, by the last of its rows that tells."""
    for row in reversed(rows):
        if row["kind"] == "step" or row["kind"] == "plan":
            return "no end in its record: it still runs, or was killed"
        if row["kind"] == "failed":
            return f"failed: {str(row.get('message')).splitlines()[0][:120]}"
        if row["kind"] == "stopped":
            return f"stopped by signal {row.get('signal')}"
        if row["kind"] == "summary" and "seconds" in row:
            return "finished"
    return "never began"


def stage_table(run: Run) -> list[list[str]]:
    """Header and rows: a stage, its time, its updates, its memory and how it ended."""
    rows = [["stage", "minutes", "updates", "peak memory, GiB", "end"]]
    for stage, lines in run.items():
        done = max((row["step"] + 1 for row in lines if row["kind"] == "step"), default=0)
        peak = next((row["peak_bytes"] for row in reversed(lines) if number(row.get("peak_bytes"))), None)
        memory = "–" if peak is None else f"{peak / 2**30:.2f}"
        end, updates = ("–", "–") if stage == "tok" else (ending(lines), f"{done:,}")
        rows.append([stage, f"{seconds(lines) / 60:.1f}", updates, memory, end])
    return rows


def compared(runs: dict[str, Run]) -> list[list[str]]:
    """Header and rows: what the runs end with, stage by stage, one column a run."""
    rows = [["", *runs]]
    for stage, _ in STAGES:
        ends = {name: shown(scores(run[stage])) | {"minutes": f"{seconds(run[stage]) / 60:.1f}"}
                for name, run in runs.items() if stage in run}  # fmt: skip
        for metric in sorted({metric for cells in ends.values() for metric in cells}):
            rows.append([f"{stage} {metric}", *(ends.get(name, {}).get(metric, "–") for name in runs)])
    return rows


def samples(run: Run, most: int = 8, times: int = 4) -> list[list[str]]:
    """Header and rows: stage, step, prompt, text; of each stage the first, the last and steps between."""
    out = [["stage", "step", "prompt", "text"]]
    for stage, rows in run.items():
        lines = [row for row in rows if row["kind"] == "sample"]
        steps = sorted({row["step"] for row in lines})
        chosen = {steps[round(i * (len(steps) - 1) / max(times - 1, 1))] for i in range(times)} if steps else set()
        for step in sorted(chosen):
            pairs = dict.fromkeys((row["prompt"], row["text"]) for row in lines if row["step"] == step)
            out += [[stage, str(step), *pair] for pair in list(pairs)[:most]]
    return out


def core_table(runs: dict[str, Run], other: Reference) -> list[list[str]]:
    """Header and rows: a CORE task, its centred accuracy in each run that was judged, and that of `other`."""
    columns = core_of(runs) | {other.label: other.tasks}
    names = dict.fromkeys(task for name in columns if name in runs for task in columns[name])
    show = lambda value: "–" if value is None else f"{value:.4f}"
    rows = [[name, *(show(tasks.get(name)) for tasks in columns.values())] for name in names]
    return [["task", *columns], *rows]


def plan_lines(run: Run) -> list[list[str]]:
    """What pretraining decided, name and value."""
    flat = [["what", "value"]]
    show = lambda item: (
        f"{item:,}" if isinstance(item, int) else f"{item:.6g}" if isinstance(item, float) else str(item)
    )
    for name, value in plan_of(run.get("base", [])).items():
        for key, item in value.items() if isinstance(value, dict) else [("", value)]:
            if item != []:  # no notes
                flat.append([f"{name} {key}".strip(), show(item)])
    return flat


def tables(runs: dict[str, Run], other: Reference) -> list[tuple[str, list[list[str]]]]:
    """(title, rows) of every table that has a row."""
    found = [("Compared", compared(runs))] if len(runs) > 1 else []
    for name, run in runs.items():
        of = f" of {name}" if len(runs) > 1 else ""
        found += [(f"Stages{of}", stage_table(run)), (f"Scores{of}", score_table(run)), (f"Samples{of}", samples(run)),
                  (f"Plan{of}", plan_lines(run))]  # fmt: skip
    found.append(("CORE by task", core_table(runs, other)))
    return [(title, rows) for title, rows in found if len(rows) > 1]


def grid(rows: list[list[str]]) -> str:
    """Header and rows as a Markdown table."""
    cell = lambda text: text.replace("|", "\\|").replace("\r", " ").replace("\n", " ")
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


# -- together ----------------------------------------------------------------------------------------------------------

TITLES = {"base": "Pretraining", "sft": "Fine-tuning", "rl": "Reinforcement"}


class Report(NamedTuple):
    """What nanochat/report_page.py writes: a name, facts about its making, tables and pictures by their headings."""

    name: str
    about: dict[str, str]
    tables: list[tuple[str, list[list[str]]]]
    figures: list[tuple[str, list[Picture]]]


def make(runs: dict[str, Run], about: dict[str, str], series: list[dict[str, str]] | None = None,
         other: Reference = GPT2) -> Report:  # fmt: skip
    """The report of one run, or of several compared. series: rows of scripts.series' CSV, whose laws are drawn."""
    groups = [(TITLES.get(heading, heading), pictures) for heading, pictures in figures(runs, other)]
    if series and (laws := law_pictures(series)):
        groups.append(("Scaling laws", laws))
    return Report(", ".join(runs), about, tables(runs, other), groups)
