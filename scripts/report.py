"""Write report.md and report.html of the newest run (or of --model-tag) from its records.

python -m scripts.report
python -m scripts.report --log=CLAUDE.md     # a row for the newest finished stage in the file's Experiment Log
"""

import dataclasses
import os
import platform
import subprocess
from pathlib import Path

import torch

from nanochat import checkpoint, cli, hardware, journal, paths, record, report, runtime
from nanochat.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    model_tag: str = ""  # which run; empty: the newest
    output: str = ""  # folder for report.md and report.html; empty: the artefact folder's report/
    log: str = ""  # Markdown file whose Experiment Log gets a row for the newest finished stage; no report then


def machine() -> dict[str, str]:
    """What this run ran on, for the report's head."""
    device = runtime.pick_device()
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    count = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count()
    return {
        "commit": git.stdout.strip() or "not a git checkout",
        "device": f"{count} x {hardware.device_name(device)} ({device.type})",
        "software": f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}",
    }


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
    found = report.collect(paths.base_dir(), cfg.model_tag or None)
    folder = Path(cfg.output) if cfg.output else paths.base_dir() / "report"
    about = machine()
    for name, text in (("report.md", report.markdown(found, about)), ("report.html", report.page(found, about))):
        with paths.atomic_write(folder / name, "w") as file:
            file.write(text)
    print(f"report: {folder / 'report.md'} and {folder / 'report.html'}")
    return {"folder": str(folder), "scores": report.score_table(found)}


if __name__ == "__main__":
    cli.run(main, Config)
