"""The Experiment Log: one row of a Markdown table for each finished stage of a run, written from its record.

Nothing is typed twice: date, run, configuration, loss, CORE and notes all come from `record.jsonl`. The table is the
one under the heading `## Experiment Log` of a Markdown file (here CLAUDE.md). The same row is never written twice.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanochat import paths
from nanochat.errors import UserError

HEADING = "## Experiment Log"
COLUMNS = ("Date", "Run", "Config", "Loss", "CORE", "Notes")
KNOBS = (  # flags that a reader wants to see when they are not at their default: flag, short name
    ("dataset", "data"), ("aspect_ratio", "aspect"), ("head_dim", "head"), ("max_seq_len", "T"),
    ("window_pattern", "windows"), ("matrix_lr", "matrix"), ("embedding_lr", "embedding"),
    ("unembedding_lr", "unembedding"), ("weight_decay", "wd"), ("init_lr_frac", "lr x"), ("fp8", "fp8"),
    ("seed", "seed"),
)  # fmt: skip


def row(tag: str, stage: str, rows: list[dict]) -> list[str]:
    """The cells of a finished stage (base, sft or rl), from its record's rows; a UserError if it has not ended."""
    start = _last(rows, "start", stage)
    ended = next((r for r in reversed(rows) if r["kind"] == "summary" and "seconds" in r), None)
    if start is None or ended is None:
        raise UserError(f"The {stage} run {tag} has no summary in its record: it has not finished, so it has no row.")
    date = datetime.fromtimestamp(ended["time"], UTC).strftime("%Y-%m-%d")
    core = _value(rows, "core")
    score = "–" if core is None else f"{core:.4f}"
    return [date, f"{tag} ({stage})", _config(start, rows), _loss(ended), score, _notes(ended, rows)]


def append(path: Path | str, cells: list[str]) -> bool:
    """Put the row at the end of the log's table in the Markdown file; False if the same run's row is already there."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: name a Markdown file with the heading '{HEADING}'.")
    lines = path.read_text(encoding="utf-8").splitlines()
    end = _table_end(path, lines)
    text = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    if text in lines:
        return False
    lines.insert(end, text)
    with paths.atomic_write(path, "w") as file:
        file.write("\n".join(lines) + "\n")
    return True


def _table_end(path: Path, lines: list[str]) -> int:
    """The index of the line behind the table under the heading."""
    if HEADING not in lines:
        raise UserError(f"{path} has no heading '{HEADING}': add it, with the table {' | '.join(COLUMNS)} under it.")
    first = lines.index(HEADING) + 1
    while first < len(lines) and not lines[first].startswith("|"):
        if lines[first].startswith("#"):
            raise UserError(f"{path} has no table under '{HEADING}': add one with {' | '.join(COLUMNS)}.")
        first += 1
    while first < len(lines) and lines[first].startswith("|"):
        first += 1
    return first


def _last(rows: list[dict], kind: str, stage: str) -> dict | None:
    return next((r for r in reversed(rows) if r["kind"] == kind and r.get("stage") == stage), None)


def _value(rows: list[dict], name: str) -> Any:
    """The last evaluation of this name."""
    return next((r[name] for r in reversed(rows) if r["kind"] in ("eval", "summary") and r.get(name) is not None), None)


def _loss(ended: dict) -> str:
    """Bits per byte where they were measured, else the training loss."""
    for name, label in (("val_bpb", "bpb"), ("loss", "loss")):
        if ended.get(name) is not None:
            return f"{ended[name]:.4f} {label}"
    return "–"


def _config(start: dict, rows: list[dict]) -> str:
    """Depth, width, steps and batch, and the knobs that the command line set."""
    plan: dict[str, Any] = next((r["plan"] for r in reversed(rows) if r["kind"] == "plan"), {})
    shape = plan.get("config", {})
    parts = [f"d={shape['n_layer']} C={shape['n_embd']}"] if shape else []
    if plan.get("iterations"):
        parts.append(f"{plan['iterations']:,} x {plan['batch']:,} tokens")
    given = {flag.lstrip("-").split("=")[0].replace("-", "_") for flag in start.get("argv") or []}
    config = start.get("config") or {}
    parts += [f"{short}={config[name]}" for name, short in KNOBS if name in given and name in config]
    return ", ".join(parts) or "defaults"


def _notes(ended: dict, rows: list[dict]) -> str:
    plan_row = next((r for r in reversed(rows) if r["kind"] == "plan"), {})
    parts = [f"{ended['seconds'] / 60:.1f} min"]
    if ended.get("tokens_per_second"):
        parts.append(f"{ended['tokens_per_second']:,.0f} tokens/s")
    if plan_row.get("device"):
        parts.append(f"{plan_row['plan'].get('world', 1)} x {plan_row['device']}")
    for name, label in (("chatcore", "ChatCORE"), ("pass@1", "pass@1")):
        if (value := _value(rows, name)) is not None:
            parts.append(f"{label} {value:.4f}")
    return ", ".join(parts)
