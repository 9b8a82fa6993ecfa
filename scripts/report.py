"""Write report.md and report.html of the newest run (or of --model-tag, or of several compared) from its records.

python -m scripts.report
python -m scripts.report --model-tag=pocket,other --series=miniseries.csv
python -m scripts.report --log=CLAUDE.md     # a row for the newest finished stage in the file's Experiment Log
"""

import contextlib
import csv
import dataclasses
import subprocess
from pathlib import Path

from nanochat import checkpoint, cli, core_eval, hardware, journal, paths, record, report, report_page
from nanochat.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    model_tag: str = ""  # which run, or several with commas between them, to be compared; empty: the newest
    series: str = ""  # CSV that scripts.series wrote: its scaling laws are fitted and drawn
    output: str = ""  # folder for report.md and report.html; empty: the artefact folder's report/
    log: str = ""  # Markdown file whose Experiment Log gets a row for the newest finished stage; no report then


def about() -> dict[str, str]:
    """When and where this report was made."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return hardware.about() | {"commit": git.stdout.strip() or "not a git checkout"}


def gather(tags: str) -> dict[str, report.Run]:
    """The runs by their tags; without tags the newest one."""
    names = [tag.strip() for tag in tags.split(",") if tag.strip()] or [report.newest(paths.base_dir())]
    return {tag: report.collect(paths.base_dir(), tag) for tag in names}


def gpt2() -> report.Reference:
    """GPT-2's CORE by task, from the bundle where that is here; else the six tasks that are published elsewhere too."""
    base = paths.base_dir()
    for path in (base / "eval_bundle", base / "eval_bundle.zip"):
        if path.exists():
            with contextlib.suppress(UserError):
                return report.reference(core_eval.Bundle(path).text(report.GPT2_TABLE))
    return report.GPT2


def read_series(path: str) -> list[dict[str, str]]:
    """The rows of the CSV."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--series={path} can't be read ({error}): make it with scripts.series.") from error
    if not rows or not {"flops", "val_bpb"} <= set(rows[0]):
        raise UserError(f"--series={path} has no rows with flops and val_bpb: make it with scripts.series.")
    return rows


def newest_row(tag: str) -> list[str]:
    """The Experiment Log's cells for the stage that ended last, of this tag or of any."""
    ended = []
    for stage in checkpoint.FOLDERS:
        for path in checkpoint.folder(stage).glob(f"{tag or '*'}/record.jsonl"):
            rows = record.read(path)
            times = [row["time"] for row in rows if row["kind"] == "summary" and "seconds" in row]
            ended += [(times[-1], path.parent.name, stage, rows)] if times else []
    if not ended:
        raise UserError(f"No finished run{f' named {tag}' if tag else ''} in {paths.base_dir()}: train first.")
    _, name, stage, rows = max(ended, key=lambda one: one[0])
    return journal.row(name, stage, rows)


def main(cfg: Config) -> dict:
    """Write both files; returns their paths and the table of scores. With --log: append the row and return it."""
    if cfg.log:
        row = newest_row(cfg.model_tag)
        written = journal.append(cfg.log, row)
        print(f"{cfg.log}: {'added' if written else 'has already'} | {' | '.join(row)} |")
        return {"row": row, "written": written}
    runs = gather(cfg.model_tag)
    series = read_series(cfg.series) if cfg.series else None
    folder = Path(cfg.output) if cfg.output else paths.base_dir() / "report"
    report_page.write(report.make(runs, about(), series, gpt2()), folder)
    print(f"report: {folder / 'report.md'} and {folder / 'report.html'}")
    return {"folder": str(folder), "scores": report.score_table(next(iter(runs.values())))}


if __name__ == "__main__":
    cli.run(main, Config)
