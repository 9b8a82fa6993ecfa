"""Kill a small run on two ranks at random moments, resume it, and compare its end bit for bit with the untouched run.

    python -m scripts.bench_kill --kills=300 --output=dev/bench/2026-11-25_kill.jsonl
    python -m scripts.bench_kill --kills=10 --stages=base

Each stage runs once without being touched. Then the same command is started, killed (SIGKILL, SIGTERM, or SIGSTOP and
a while later SIGKILL; one rank or both; most often while a save is under way), started again with --resume, killed
again, until it ends by itself; its weights and moments must have the reference's checksums, and after each kill the
newest complete checkpoint must pass its own. What is left of a killed run is treated as torchrun does: it is waited
for, sent SIGTERM, and counts as a hang if it is still there after --patience. The ranks are forked from one process
that has torch loaded, so that a life costs about a second. One JSON row a life is appended to --output.
"""

import contextlib
import dataclasses
import gc
import json
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO

from nanochat import checkpoint, cli, dataset, paths, record
from nanochat.errors import UserError

WORLD = 2
IN_SAVE = 0.6  # share of the kills that wait for a save to begin
ASK_AFTER = 5.0  # seconds after which the ranks left over are sent SIGTERM
SHAPE = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64", "--window-pattern=L",
         "--device-batch-size=2", "--total-batch-size=256", "--core-metric-every=-1", "--sample-every=-1"]  # fmt: skip
STAGES = {  # stage: module, flags; each starts from the one before
    "base": ("scripts.base_train", [*SHAPE, "--num-iterations=24", "--eval-tokens=0", "--save-every=3", "--model-tag=k",
                                    "--compile=off"]),
    "sft": ("scripts.chat_sft", ["--model-tag=k", "--num-iterations=24", "--eval-tokens=0", "--chatcore-every=-1",
                                 "--save-every=3", "--compile=off"]),
    "rl": ("scripts.chat_rl", ["--model-tag=k", "--num-iterations=12", "--examples-per-step=4", "--num-samples=4",
                               "--max-new-tokens=8", "--device-batch-size=4", "--eval-every=-1", "--save-every=2"]),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    kills: int = 300  # over all stages
    stages: str = "base,sft,rl"  # which
    seed: int = 0  # of the moments
    patience: float = 60.0  # seconds after a kill in which all ranks must be gone
    folder: str = ""  # where the runs live, kept; empty: a temporary folder
    output: str = ""  # JSON lines, appended; empty: none


@dataclasses.dataclass
class Lab:
    """Where the runs of one bench live, its dice, and what it has seen."""

    folder: Path
    dice: random.Random
    patience: float
    out: IO | None = None
    lives: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds of an untouched run, by stage
    kills: int = 0
    bad: list[dict] = dataclasses.field(default_factory=list)  # rows of differences, unreadable checkpoints, hangs

    def row(self, **values) -> None:
        """Write down one life."""
        if self.out:
            self.out.write(json.dumps(values) + "\n")
            self.out.flush()
        if values["fault"]:
            self.bad.append(values)
            print(f"FAULT {values}", flush=True)


def main(cfg: Config) -> dict:
    """Run the bench; returns the counts. UserError: something was lost, differed or hung."""
    if unknown := [s for s in cfg.stages.split(",") if s not in STAGES]:
        raise UserError(f"--stages={cfg.stages} has unknown stages ({', '.join(unknown)}): use {', '.join(STAGES)}.")
    os.environ |= {"OMP_NUM_THREADS": "1", "NANOCHAT_DTYPE": "float32", "HF_HUB_OFFLINE": "1"}
    warm_up()
    with contextlib.ExitStack() as stack:
        folder = Path(cfg.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="nanochat_kill_")))
        out = stack.enter_context(open(cfg.output, "a", encoding="utf-8")) if cfg.output else None
        lab = Lab(folder, random.Random(cfg.seed), cfg.patience, out)
        began, wanted = time.time(), cfg.stages.split(",")
        prepare(lab, wanted)
        for number, stage in enumerate(wanted):
            share = cfg.kills * (number + 1) // len(wanted)
            while lab.kills < share:
                torment(lab, stage, share)
    summary = {"kills": lab.kills, "stages": cfg.stages, "seed": cfg.seed, "seconds": round(time.time() - began, 1),
               "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "argv": sys.argv[1:],
               "faults": len(lab.bad)}  # fmt: skip
    if cfg.output:
        with open(cfg.output, "a", encoding="utf-8") as file:
            file.write(json.dumps({"summary": summary}) + "\n")
    print(json.dumps(summary))
    if lab.bad:
        raise UserError(f"{len(lab.bad)} faults in {lab.kills} kills, the first: {lab.bad[0]}")
    return summary


def warm_up() -> None:
    """Import what the stages import, once: the forked ranks then have it. Starts no thread.

    A model this small answers nothing right, so reinforcement is paid by the length of replies: odd is good.
    """
    import importlib

    import torch

    from tasks import common

    torch.set_num_threads(1)
    for module, flags in STAGES.values():
        cli.parse(importlib.import_module(module).Config, flags)
        del sys.modules[module]  # it is run, not imported, later
    dataset.open_corpus("tinyworld")
    common.Task.reward = lambda task, problem, reply: float(len(str(reply)) % 2)
    gc.collect()
    gc.freeze()  # what is there stays: each rank's first collection would go through all of torch


def home(lab: Lab, stage: str, trial: bool) -> Path:
    """The artefact folder of a reference or a trial; trials of a stage see the reference's earlier stages."""
    reference = lab.folder / "reference"
    if not trial:
        return reference
    folder = lab.folder / f"trial_{stage}"
    if not folder.exists():
        folder.mkdir()
        earlier = list(STAGES)[: list(STAGES).index(stage)]
        for name in ("tokenizer", *(checkpoint.FOLDERS[s] for s in earlier)):
            (folder / name).symlink_to(reference / name)
    return folder


def root(lab: Lab, stage: str, trial: bool) -> Path:
    """Where the checkpoints of a run are."""
    return home(lab, stage, trial) / checkpoint.FOLDERS[stage] / "k"


def prepare(lab: Lab, wanted: list[str]) -> None:
    """Train the tokenizer and run every stage up to the last wanted one, untouched, anew each time."""
    lab.folder.mkdir(parents=True, exist_ok=True)
    (lab.folder / "reference").mkdir(exist_ok=True)
    if not (lab.folder / "reference" / "tokenizer").exists():
        command = ["--dataset=tinyworld", "--vocab-size=512", "--max-chars=100000"]
        wait_for([start(lab.folder / "reference", "scripts.tok_train", command, 0, 1, 0)])
    for stage in list(STAGES)[: 1 + max(list(STAGES).index(s) for s in wanted)]:
        began = time.perf_counter()
        shutil.rmtree(root(lab, stage, False), ignore_errors=True)
        statuses = wait_for(life(lab, stage, trial=False))
        if statuses != [0] * WORLD:
            raise UserError(f"The untouched {stage} run failed, statuses {statuses}: {tail(lab, stage, False)}")
        rows = record.read(root(lab, stage, False) / "record.jsonl")
        if not any(row.get("grad_norm") for row in rows):
            raise UserError(f"The untouched {stage} run has learned nothing: there would be nothing to compare.")
        lab.lives[stage] = time.perf_counter() - began
        print(f"{stage}: an untouched run takes {lab.lives[stage]:.1f} s", flush=True)


def life(lab: Lab, stage: str, trial: bool) -> list[int]:
    """Start a run, or resume it -> process ids by rank."""
    module, flags = STAGES[stage]
    port, arguments = free_port(), [*flags, "--resume"]
    return [start(home(lab, stage, trial), module, arguments, rank, WORLD, port) for rank in range(WORLD)]


def free_port() -> int:
    """A port on which the ranks of one life can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(base: Path, module: str, arguments: list[str], rank: int, world: int, port: int) -> int:
    """Fork a rank that runs `python -m module arguments`; its output goes to base/rank_<r>.log."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the bench's: a rank waiting for a dead one must die of it
    try:
        log = os.open(base / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {"NANOCHAT_BASE_DIR": str(base), "MASTER_ADDR": "127.0.0.1"}
        if world > 1:
            os.environ |= {name: str(value) for name, value in ranks.items()}
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    finally:
        if sys.exc_info()[1] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # never back into the bench


def wait_for(ranks: list[int], seconds: float | None = None) -> list[int | None]:
    """Exit statuses by rank (-n: by signal n); None for one that is still there after `seconds`."""
    until = None if seconds is None else time.monotonic() + seconds
    statuses: list[int | None] = [None] * len(ranks)
    while None in statuses and (until is None or time.monotonic() < until):
        for i, pid in enumerate(ranks):
            if statuses[i] is None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                statuses[i] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if None in statuses:
            time.sleep(0.005)
    return statuses


def torment(lab: Lab, stage: str, share: int) -> None:
    """One run, killed again and again (while fewer than `share` kills were made) until it ends by itself."""
    shutil.rmtree(root(lab, stage, True), ignore_errors=True)
    while True:
        began = time.perf_counter()
        ranks = life(lab, stage, trial=True)
        blow = strike(lab, stage, ranks) if lab.kills < share else {}
        statuses = wait_for(ranks) if not blow else finish_off(lab, ranks)
        seconds = round(time.perf_counter() - began, 2)
        newest, fault = inspect(lab, stage)
        if not blow:  # it ended by itself
            fault = fault or ("" if statuses == [0] * WORLD else f"ended with {statuses}: {tail(lab, stage, True)}")
            fault = fault or differs(lab, stage)
            lab.row(stage=stage, end=True, newest=newest, statuses=statuses, seconds=seconds, fault=fault)
            return
        lab.kills += 1
        fault = fault or ("hang" if None in statuses else "")
        lab.row(stage=stage, kill=lab.kills, **blow, newest=newest, statuses=statuses, seconds=seconds, fault=fault)


def strike(lab: Lab, stage: str, ranks: list[int]) -> dict:
    """Wait for the moment and signal one rank or both -> what was done; empty if the run ended before."""
    dice = lab.dice
    how = dice.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP"])
    victims = dice.choice([[0], [1], [0, 1]])
    in_save, moment = dice.random() < IN_SAVE, dice.uniform(0, lab.lives[stage])
    if in_save:
        moment = dice.uniform(0, 0.03)
        until = time.monotonic() + 20 * lab.lives[stage]
        seen = half(lab, stage)  # what an earlier kill left behind is no save
        skip = dice.randrange(3)
        while time.monotonic() < until:
            now = half(lab, stage)
            if now - seen:
                if not skip:
                    break
                skip -= 1
            seen = now
            if gone(ranks):
                return {}
            time.sleep(0.001)
    until = time.monotonic() + moment
    while time.monotonic() < until:
        if gone(ranks):
            return {}
        time.sleep(min(0.002, max(until - time.monotonic(), 0)))
    saving = bool(half(lab, stage))
    number = getattr(signal, how)
    for victim in victims:
        os.kill(ranks[victim], number)  # not reaped yet, so the number is still its own
    if how == "SIGSTOP":
        time.sleep(dice.uniform(0.02, 0.3))
        for victim in victims:
            os.kill(ranks[victim], signal.SIGKILL)
    return {"signal": how, "ranks": victims, "in_save": saving, "after": round(moment, 3)}


def half(lab: Lab, stage: str) -> set[tuple[str, int]]:
    """The temporary folders that are there: one that is new is a save under way."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(root(lab, stage, True)):
            if entry.name.startswith(".tmp-step_"):
                with contextlib.suppress(FileNotFoundError):
                    found.add((entry.name, entry.inode()))
    return found


def gone(ranks: list[int]) -> bool:
    """Has some rank ended? It is not reaped."""
    return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in ranks)


def finish_off(lab: Lab, ranks: list[int]) -> list[int | None]:
    """Wait for all ranks as torchrun does: a while, then SIGTERM, then the patience; a hang is None, and killed."""
    statuses = wait_for(ranks, ASK_AFTER)
    left = [pid for pid, status in zip(ranks, statuses, strict=True) if status is None]
    for pid in left:
        os.kill(pid, signal.SIGTERM)
    more = iter(wait_for(left, lab.patience))
    statuses = [next(more) if status is None else status for status in statuses]
    for pid, status in zip(ranks, statuses, strict=True):
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return statuses


def inspect(lab: Lab, stage: str) -> tuple[int | None, str]:
    """The newest complete step and, if it does not pass its checksums, the sentence that says so."""
    steps = checkpoint.complete_steps(root(lab, stage, True))
    if not steps:
        return None, ""
    try:
        checkpoint.load(root(lab, stage, True) / f"step_{steps[-1]:06d}").verify()
    except UserError as error:
        return steps[-1], f"unreadable: {error}"
    return steps[-1], ""


def differs(lab: Lab, stage: str) -> str:
    """Which files of the last checkpoint are not the reference's; empty: weights and moments are the same bits."""
    ends = [r / f"step_{checkpoint.complete_steps(r)[-1]:06d}" for r in (root(lab, stage, t) for t in (False, True))]
    one, other = (paths.read_json(end / "manifest.json")["files"] for end in ends)
    names = ("model.safetensors", "optim.safetensors")
    unlike = [name for name in names if one[name] != other[name]]
    if ends[0].name != ends[1].name:
        return f"it ended at {ends[1].name} instead of {ends[0].name}"
    return f"{ends[1].name} differs from the reference in {', '.join(unlike)}" if unlike else ""


def tail(lab: Lab, stage: str, trial: bool) -> str:
    """The end of what the ranks said."""
    logs = [home(lab, stage, trial) / f"rank_{rank}.log" for rank in range(WORLD)]
    return " | ".join(log.read_text(errors="replace")[-600:] for log in logs if log.exists())


if __name__ == "__main__":
    cli.run(main, Config)
