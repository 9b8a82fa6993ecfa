"""Several machines in one run: what all must have alike, and checkpoints for those whose disk is not rank 0's.

Rank 0 writes every checkpoint. Where the machines share a file system, all of them see it; where they don't, `fetch`
sends its files over the process group before they are read, from whichever machine has them: after an elastic restart
rank 0 may be on another one. A machine is known by the rank of its first process.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat import checkpoint, paths
from nanochat.errors import UserError
from nanochat.runtime import Runtime

CHUNK = 1 << 24  # bytes sent at a time


def same(runtime: Runtime, **things: Any) -> None:
    """Refuse, on all ranks alike, to go on where ranks differ in one of these JSON-able things. Collective."""
    rows = runtime.gather(things)
    for name in things:
        odd = [rank for rank, row in enumerate(rows) if row[name] != rows[0][name]]
        if odd:
            raise UserError(
                f"rank {odd[0]} has another {name} than rank 0 ({rows[odd[0]][name]!s:.80}, "
                f"not {rows[0][name]!s:.80}): copy rank 0's to every machine, or put NANOCHAT_BASE_DIR on a file "
                "system that all of them share."
            )


def leads(runtime: Runtime) -> bool:
    """Is this the first rank of its machine?"""
    return runtime.local_rank == 0


def each(runtime: Runtime, work: Callable[[], Any]) -> Any:
    """Do file work once on every machine, rank 0's first: the others find it done where the disk is shared."""
    result = work() if runtime.main else None
    runtime.barrier()
    if leads(runtime) and not runtime.main:
        result = work()
    runtime.barrier()
    return result


def find(source: str, tag: str | None, step: int | None, runtime: Runtime) -> Path:
    """`checkpoint.find`, whichever machine has it (the newest step wins), brought to all. Collective."""
    choice = {"tag": "", "step": "", "error": ""}
    if leads(runtime):
        try:
            path = checkpoint.find(source, tag, step)
            choice |= {"tag": path.parent.name, "step": path.name}
        except UserError as error:
            choice["error"] = str(error)
    rows = runtime.gather(choice)
    newest = max(range(len(rows)), key=lambda rank: (rows[rank]["step"], -rank))
    if not rows[newest]["step"]:
        raise UserError(rows[0]["error"])
    return fetch(checkpoint.folder(source) / rows[newest]["tag"] / rows[newest]["step"], runtime, newest)


def newest(root: Path, step: int | None, runtime: Runtime) -> int:
    """The rank whose machine has the newest complete step under `root`, or this one; 0 if none has. Collective."""
    steps = checkpoint.complete_steps(root) if leads(runtime) else []
    found = runtime.gather(max(steps, default=-1) if step is None else step if step in steps else -1)
    return found.index(max(found))


def fetch(path: Path, runtime: Runtime, source: int = 0) -> Path:
    """Bring the checkpoint of rank `source` to every machine that lacks it or has another there. Collective."""
    manifest = path / "manifest.json"
    rows = runtime.gather([_machine(runtime), paths.sha256(manifest) if manifest.is_file() else ""])
    lacking = {machine for machine, seen in rows if seen != rows[source][1]}
    if not lacking:
        return path
    names = [*sorted(checkpoint.load(path).files), "manifest.json"] if runtime.rank == source else []
    files = runtime.gather([[name, (path / name).stat().st_size] for name in names])[source]
    target = path.with_name(f".tmp-{path.name}") if _machine(runtime) in lacking and leads(runtime) else None
    problems = [text for text in runtime.gather(_receive(path, target, files, runtime, source)) if text]
    if problems:
        raise UserError(problems[0])
    return path


def _machine(runtime: Runtime) -> int:
    return runtime.rank - runtime.local_rank


def _receive(path: Path, target: Path | None, files: list, runtime: Runtime, source: int) -> str:
    """Send (rank `source`) or take (`target`) all files, check them, give them their name -> what went wrong."""
    problem = ""
    try:
        if target is not None:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
    except OSError as error:
        problem = _why(path, error)
    for name, size in files:
        goal = target / name if target and not problem else None
        problem = _send(path / name, goal, size, runtime, source) or problem
    if target is None or problem:
        return problem
    try:
        checkpoint.load(target).verify()
        if path.exists():  # half a checkpoint, or another run's
            shutil.rmtree(path)
        os.replace(target, path)
        paths.sync_folder(path.parent)
    except (OSError, UserError) as error:
        return _why(path, error)
    return ""


def _send(file_: Path, target: Path | None, size: int, runtime: Runtime, source: int) -> str:
    """One file from `source` to whoever has a target. Every rank takes part in every chunk, whatever has gone wrong."""
    problem = ""
    incoming = open(file_, "rb") if runtime.rank == source else None
    outgoing = open(target, "wb") if target else None
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        buffer = torch.empty(count, dtype=torch.uint8)
        if incoming:
            incoming.readinto(memoryview(buffer.numpy()))
        buffer = buffer.to(runtime.device)
        dist.broadcast(buffer, source)
        try:
            if outgoing and not problem:
                outgoing.write(memoryview(buffer.cpu().numpy()))
        except OSError as error:
            problem = _why(target.parent, error)
    for file in (incoming, outgoing):
        if file:
            file.close()
    return problem


def _why(path: Path, error: Exception) -> str:
    return f"{path} could not be brought to this machine ({error}): make room there, or share one NANOCHAT_BASE_DIR."
