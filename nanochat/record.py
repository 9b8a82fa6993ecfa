"""A run's record: one JSON line an event in `record.jsonl`, a console line for people, and Weights & Biases if asked.

The file is the truth that reports, recipes and resumes read; the console is for watching. Only rank 0 writes. A row:
`{"kind": "start"|"step"|"eval"|..., "time": unix seconds, "step": ..., ...}`. Values that JSON can't hold (NaN,
infinities) become null. After a resume at step s, or a rollback to it, rows of later steps are superseded, and a fresh
start under the same name supersedes all: `read` drops them. Evaluations (stage `*_eval`) only add.
"""

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from nanochat.errors import Stopped, UserError


def plain(value: Any) -> Any:
    """`value` as strict JSON: dataclasses become dicts, paths strings, numbers that JSON can't hold become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # NumPy and torch scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Record:
    """The record of one stage of one run. `run="dummy"` keeps it local; any other name also goes to wandb."""

    def __init__(
        self,
        path: Path | str,
        *,
        stage: str,
        config: Any,
        run: str = "dummy",
        main: bool = True,
        resume_step: int | None = None,
        wandb_id: str | None = None,
    ):
        self.main = main
        self.wandb = None
        self.view: Any = None  # in a terminal: what shows steps in place of lines (nanochat/live.py)
        self.lost = 0  # rows in a row that could not be written
        self.path = Path(path)
        if not main:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise UserError(f"The record {self.path} can't be written ({error.strerror}).") from error
        if run != "dummy":
            self.wandb = self._wandb(run, stage, plain(config), wandb_id)
        self.event("start", stage=stage, run=run, config=config, argv=sys.argv[1:], resume_step=resume_step,
                   wandb=self.wandb_id)  # fmt: skip

    @staticmethod
    def _wandb(run: str, stage: str, config: dict, known: str | None) -> Any:
        import wandb

        signed_in = os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").exists()
        mode = os.environ.get("WANDB_MODE") or ("online" if signed_in else "offline")
        again = {"id": known, "resume": "allow"} if known else {}
        about = {"project": "nanochat", "name": run, "group": stage, "config": config, **again}
        try:
            return wandb.init(mode=mode, **about)
        except wandb.errors.Error as error:  # no network, or a key that is not taken: no reason not to train
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            print(f"note: wandb is not to be had ({reason}): logging offline, `wandb sync` sends it later.", flush=True)
            return wandb.init(mode="offline", **about)

    @property
    def wandb_id(self) -> str | None:
        """The run's id at wandb, for a resume to go on in the same run; None where it is not used."""
        return self.wandb.id if self.wandb is not None else None

    def event(self, kind: str, **values: Any) -> None:
        """Append one row; the file is open only for that long, so a run that dies leaves nothing behind.

        A disk that is full costs rows, not the run: it is told once, and the next row that fits begins a new line.
        """
        if not self.main:
            return
        row = {"kind": kind, "time": round(time.time(), 3), **plain(values)}
        text = json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8", errors="replace") as file:
                file.write("\n" + text if self.lost else text)
            self.lost = 0
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                self.say(f"note: {self.path} can't be written ({error.strerror}): rows are lost until it can.")

    def note(self, kind: str, text: str, **values: Any) -> None:
        """Append a row about something out of the ordinary, and tell people."""
        self.event(kind, text=text, **values)
        self.say(f"note: {text}")

    def saves(self, news: list[dict]) -> None:
        """Append what became of saves (`Saver.news`): one that failed is told, the run goes on."""
        for one in news:
            if "error" in one:
                self.note("save_failed", f"{one['error']} The run goes on.")
            else:
                self.event("saved", **one)

    def step(self, step: int, console: str = "", done: float | None = None, **values: Any) -> None:
        """Append a training step; `console` is the line for people, `done` the share of the run behind it.

        In a terminal the line that stays at the bottom takes the place of `console`.
        """
        self.event("step", step=step, **values)
        if self.main and self.wandb is not None:
            self.wandb.log(plain(values), step=step)
        if self.view is not None and done is not None:
            self.view.show(done, values)
        elif console:
            self.say(console)

    def eval(self, step: int, console: str = "", **values: Any) -> None:
        """Append an evaluation at `step`."""
        self.event("eval", step=step, **values)
        if self.main and self.wandb is not None:
            numbers = {k: v for k, v in plain(values).items() if isinstance(v, int | float)}
            self.wandb.log(numbers, step=step)
        if console:
            self.say(console)

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.main:
            print(text, flush=True)

    def stop(self, step: int, signum: int) -> NoReturn:
        """Leave a run that a signal asked to stop, when all is saved: a row, and Stopped, which says how to go on."""
        self.event("stopped", step=step, signal=signum)
        raise Stopped(signum, f"stopped by signal {signum} at step {step}: saved; --resume goes on from here.")

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _trace: Any) -> None:
        """An error that ends the run becomes its last row, so that whoever reads the record knows why it ends."""
        if error is not None and not isinstance(error, Stopped):
            self.event("failed", error=type(error).__name__, message=str(error)[:2000])

    def close(self, **summary: Any) -> None:
        """Append the summary row and let wandb go."""
        self.event("summary", **summary)
        if self.main and self.wandb is not None:
            self.wandb.finish()


def _stands(row: dict, step: int) -> bool:
    """Does an earlier life's row still count after a resume at `step`? What was measured at `step` itself does."""
    own = row.get("step")
    return not isinstance(own, int) or own < step or (own == step and row["kind"] == "eval")


def read(path: Path | str) -> list[dict]:
    """The rows of a record in order, without those that a resume or a fresh start superseded, nor torn lines."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")  # a text may hold others
    except FileNotFoundError as error:
        raise UserError(f"No record at {path}: run the stage first.") from error
    rows: list[dict] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the process died while writing this line
            continue
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str):  # a damaged one
            continue
        begins = row["kind"] == "start" and not str(row.get("stage")).endswith("_eval")
        step = row.get("resume_step") if begins else row.get("step")
        if begins and step is None:
            rows = []
        elif (begins or row["kind"] == "rollback") and isinstance(step, int):
            rows = [old for old in rows if _stands(old, step)]
        rows.append(row)
    return rows
