"""Write report.md and report.html of the newest run (or of --model-tag) from its records.

python -m scripts.report
"""

import dataclasses
import os
import platform
import subprocess
from pathlib import Path

import torch

from nanochat import cli, hardware, paths, report, runtime


@dataclasses.dataclass(frozen=True)
class Config:
    model_tag: str = ""  # which run; empty: the newest
    output: str = ""  # folder for report.md and report.html; empty: the artefact folder's report/


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


def main(cfg: Config) -> dict:
    """Write both files; returns their paths and the table of scores."""
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
