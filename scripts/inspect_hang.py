"""Is a run stuck, and where? Every rank's process, stack and state, the age of its record, and who keeps whom waiting.

    python -m scripts.inspect_hang                       # the newest base run on this machine
    python -m scripts.inspect_hang --source=sft --model-tag=d24

Changes nothing: stacks are read with py-spy (dev extra; needs root or ptrace rights), or, without it, from the files
that the watchdog writes beside the record. Run it on every machine of a run. The last line is JSON.
"""

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from nanochat import checkpoint, cli
from nanochat.errors import UserError

SCRIPTS = {"base": "scripts.base_train", "sft": "scripts.chat_sft", "rl": "scripts.chat_rl"}
SLOW = 10.0  # times the median step without a new row: probably stuck
COLLECTIVE = ("torch/distributed/", "runtime.py", "banks.py")  # in whose files a waiting rank stands
LOADER = ("prefetch.py", "dataloader.py", "download.py")
STATES = {"R": "running", "S": "sleeping", "D": "waiting for the disk", "T": "stopped by a signal", "Z": "dead"}


@dataclasses.dataclass(frozen=True)
class Config:
    source: str = "base"  # base, sft or rl
    model_tag: str = ""  # the run; empty: the one whose record is newest
    pid: int = -1  # look at this process only; -1: every rank on this machine


def newest_record(cfg: Config) -> Path | None:
    """The record of the run that is meant."""
    root = checkpoint.folder(cfg.source)
    if cfg.model_tag:
        found = [root / cfg.model_tag / "record.jsonl"]
    else:
        found = sorted(root.glob("*/record.jsonl"), key=lambda p: p.stat().st_mtime)
    return found[-1] if found and found[-1].is_file() else None


def last_rows(path: Path, size: int = 1 << 18) -> list[dict]:
    """The rows at the end of a record; a line cut short by a crash is left out."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        lines = file.read().decode("utf-8", "replace").splitlines()
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "kind" in row:
            rows.append(row)
    return rows


def pulse(path: Path, now: float) -> dict:
    """Age of the last row, the last step and how long steps take: seconds."""
    rows = last_rows(path)
    steps = [row for row in rows if row["kind"] == "step"]
    usual = statistics.median(row["seconds"] for row in steps) if steps else None
    last = rows[-1] if rows else {}
    since = now - steps[-1]["time"] if steps else None
    ended = last.get("kind") in ("summary", "stopped", "failed")
    return {
        "record": str(path), "last_kind": last.get("kind"), "last_row_age": now - last["time"] if last else None,
        "last_step": steps[-1]["step"] if steps else None, "since_last_step": since, "median_step": usual,
        "ended": ended, "late": bool(steps and not ended and since > max(SLOW * usual, 60.0)),
    }  # fmt: skip


def ranks_here(cfg: Config) -> list[dict]:
    """The processes of such a run on this machine: pid, rank, state. Only RANK and LOCAL_RANK are read of what they
    were given."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            given = dict(w.split("=", 1) for w in (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                         if w.startswith(("RANK=", "LOCAL_RANK=")))  # fmt: skip
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # gone, or another user's
            continue
        pid = int(folder.name)
        launcher = any(word.endswith("torchrun") or word == "torch.distributed.run" for word in words)
        wanted = pid == cfg.pid if cfg.pid >= 0 else SCRIPTS[cfg.source] in words and not launcher
        if wanted and "python" in Path(words[0]).name and pid != os.getpid():
            found.append({"pid": pid, "rank": int(given.get("RANK", 0)), "state": STATES.get(state, state)})
    return sorted(found, key=lambda p: (p["rank"], p["pid"]))


def stack_of(pid: int) -> tuple[str, str]:
    """A process's Python stacks by py-spy, innermost call first, or "" and why not."""
    tool = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if tool is None:
        return "", "py-spy is not installed (it is in the dev extra)"
    try:
        done = subprocess.run(
            [tool, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        return "", "py-spy did not answer within 20 s"
    return (done.stdout, "") if done.returncode == 0 else ("", done.stderr.strip().splitlines()[-1])


def place(stack: str) -> str:
    """Where the main thread stands: in a collective, waiting for data, or elsewhere."""
    threads = [part for part in stack.split("Thread ") if "MainThread" in part.partition("\n")[0]]
    frames = threads[0].splitlines()[1:] if threads else []
    if not frames:
        return "unknown"
    for frame in frames[:12]:
        if any(name in frame for name in LOADER):
            return "waiting for data"
        if any(name in frame for name in COLLECTIVE):
            return "in a collective"
    return f"at {frames[0].strip()}"


def verdict(beat: dict | None, ranks: list[dict]) -> str:
    """One sentence: is it stuck, and who is to blame."""
    if beat and beat["ended"]:
        return f"The run is over: its record ends with {beat['last_kind']!r}."
    if not ranks:
        return "No process of such a run is on this machine: it has died (see its log), or runs elsewhere."
    stopped = [r for r in ranks if r["state"] in (STATES["T"], STATES["D"], STATES["Z"])]
    if stopped:
        return f"Rank {stopped[0]['rank']} is {stopped[0]['state']}: the others wait for it."
    waiting = [r["rank"] for r in ranks if r["place"] == "in a collective"]
    others = [r for r in ranks if r["rank"] not in waiting]
    if beat and not beat["late"]:
        return "It is not stuck: its last step is as recent as its steps are long."
    if waiting and others:
        return f"Rank {others[0]['rank']} keeps rank {waiting[0]} waiting: it is {others[0]['place']}."
    if waiting:
        return "All ranks here are in a collective: the missing one is on another machine, or they call different ones."
    return f"Rank {ranks[0]['rank']} is {ranks[0]['place']}: no step for longer than usual."


def main(cfg: Config) -> dict:
    """Look and print."""
    if cfg.source not in SCRIPTS:
        raise UserError(f"--source={cfg.source} is unknown: use one of {', '.join(SCRIPTS)}.")
    path = newest_record(cfg)
    beat = pulse(path, time.time()) if path else None
    ranks = ranks_here(cfg)
    for one in ranks:
        one["stack"], one["why_no_stack"] = stack_of(one["pid"])
        one["place"] = place(one["stack"])
        print(f"== rank {one['rank']}, pid {one['pid']}, {one['state']}, {one['place']}")
        print(one["stack"] or f"no stack: {one['why_no_stack']}")
    written = sorted(str(p) for p in (path.parent / "stacks").glob("rank_*.txt")) if path else []
    if beat:
        for name, value in beat.items():
            print(f"{name:<16}{value:.1f} s" if isinstance(value, float) else f"{name:<16}{value}")
    if written:
        print("stacks that the watchdog wrote: " + ", ".join(written))
    said = verdict(beat, ranks)
    print(said)
    slim = [{k: v for k, v in one.items() if k != "stack"} for one in ranks]
    summary = {"verdict": said, "pulse": beat, "ranks": slim, "watchdog_stacks": written}
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
