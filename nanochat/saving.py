"""Saving a run while it goes on: a snapshot in host memory, written by one thread of rank 0, one save at a time.

The training thread is held up only while weights and moments are copied; writing, hashing and fsync happen beside the
next steps. Memory is bounded: one snapshot (12 bytes a parameter on rank 0), and a save that falls due while another
is under way waits for it. Rank 0 gathers and writes all: one layout for any number of ranks, one disk, and no
collective off the training thread, where it could overtake those of a step. (Every rank writing its own part would
share out the writing, which nobody waits for any more.)

What can't be saved (a full disk) is told at the next step and the run goes on; it stops when `PATIENCE` saves in a row
have failed, or when the last one has. What was saved before is never touched by a save that fails.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint, paths, record
from nanochat.errors import UserError
from nanochat.runtime import Runtime

PATIENCE = 3  # saves in a row that may fail before the run stops: so much work is at risk then
CHUNK = 1 << 24  # bytes hashed and written at a time: both let the training thread run meanwhile
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which complete steps stay: the newest `last` (None: all), every `every`-th step, and the `best`-scored one."""

    last: int | None = None
    every: int | None = None
    best: bool = False

    def stays(self, steps: list[int], scores: Mapping[int, float], written: int | None = None) -> set[int]:
        """Of `steps` those that stay; always the newest and the one just written. Lower scores are better."""
        if self.last is None:
            return set(steps)
        ordered = sorted(steps)
        kept = set(ordered[-max(self.last, 1) :]) | {step for step in steps if step == written}
        if self.every:
            kept |= {step for step in steps if step % self.every == 0}
        scored = [step for step in steps if step in scores]
        if self.best and scored:
            kept.add(min(scored, key=lambda step: (scores[step], step)))
        return kept


@dataclasses.dataclass
class Snapshot:
    """All that one checkpoint says, in host memory."""

    step: int
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor] | None
    meta: dict[str, Any]
    ranks: list[dict[str, Any]]  # what each rank alone knows

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return sum(t.nbytes for part in (self.weights, self.moments or {}) for t in part.values())


class Saver:
    """Saves of one run under `root`. All of its methods but `news` and closing are called by every rank together."""

    def __init__(self, root: Path | str, runtime: Runtime, keep: Keep | None = None, scores: Mapping | None = None):
        self.root, self.runtime, self.keep = Path(root), runtime, keep or Keep()
        self.scores = {int(step): score for step, score in (scores or {}).items()}  # from JSON, whose keys are text
        self.blocked = 0.0  # seconds that the training thread has waited for saves
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nanochat-save") if runtime.main else None
        self._job: Future | None = None
        self._host: dict[str, torch.Tensor] = {}
        self._failed, self._error = 0, ""  # saves in a row, and why the last; known on rank 0
        self._news: list[dict] = []

    def save(self, step: int, *, model: torch.nn.Module, optimizer: Any = None, meta: Mapping[str, Any],
             rank_state: Mapping[str, Any] | None = None, wait: bool = False) -> Path:  # fmt: skip
        """Begin to write `root/step_<step>`. UserError: too many have failed, or with `wait` this one."""
        began = time.perf_counter()
        self._settle()
        self._stop_if(self._failed >= PATIENCE)
        snap = self._snapshot(step, model, optimizer, meta, rank_state or {})
        if self._pool is not None:
            self._job = self._pool.submit(self._write, snap, dict(self.scores))
        if wait:
            self.wait()
        self.blocked += time.perf_counter() - began
        return self.root / f"step_{step:06d}"

    def wait(self) -> None:
        """Wait for the save under way. UserError: it has failed."""
        self._settle()
        self._stop_if(self._failed > 0)

    def news(self) -> list[dict]:
        """What has become of saves since the last call: {"step", "seconds"} or {"step", "error"}; rank 0 only."""
        if self._job is not None and self._job.done():
            self._settle()
        found, self._news = self._news, []
        return found

    def score(self, step: int, value: float) -> None:
        """Note how good the weights of `step` are (lower is better), for `Keep.best`."""
        self.scores[step] = value

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: Any) -> None:
        """Let a save under way finish, whatever ended the run."""
        if self._pool:
            self._pool.shutdown(wait=True)

    def _snapshot(self, step, model, optimizer, meta, rank_state) -> Snapshot | None:
        moments = optimizer.state() if optimizer is not None else None
        weights = {}
        for name, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # collective where sharded
            if self.runtime.main:
                weights[name] = self._to_host(name, whole.detach())
        ranks = self.runtime.gather(dict(rank_state))
        self.runtime.synchronize()  # copies from a GPU are queued
        if not self.runtime.main:
            return None
        scores = {str(k): v for k, v in self.scores.items()}
        meta = {**meta, "format": checkpoint.FORMAT, "step": step, "world": self.runtime.world, "scores": scores}
        return Snapshot(step, weights, moments, meta, ranks)

    def _to_host(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in memory that is used again by the next save (pinned, so that a GPU copies at full speed)."""
        if name not in self._host:
            self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._host[name].copy_(tensor, non_blocking=True)

    def _settle(self) -> None:
        """Wait for the save under way, if there is one, and note how it went."""
        job, self._job = self._job, None
        if job is not None:
            result = job.exception() or job.result()
            if isinstance(result, Exception) and not isinstance(result, UserError):
                raise result
            self._failed = self._failed + 1 if isinstance(result, UserError) else 0
            self._error = str(result) if self._failed else ""
            self._news.append({"error": self._error} if self._failed else result)

    def _stop_if(self, failed: bool) -> None:
        """Stop every rank with the sentence of rank 0's last failure, if it says so."""
        sentence = self.runtime.broadcast(self._error if failed else "")
        if sentence:
            raise UserError(sentence)

    def _write(self, snap: Snapshot, scores: dict[int, float]) -> dict:
        done = write(self.root, snap)
        prune(self.root, self.keep, scores, snap.step)
        return done


def save(root: Path | str, step: int, *, model: torch.nn.Module, optimizer=None, meta: Mapping[str, Any],
         runtime: Runtime, rank_state: Mapping[str, Any] | None = None, keep: int | None = None) -> Path:  # fmt: skip
    """Write `root/step_<step>` and wait for it; every rank calls it. UserError, on all alike: it could not be saved."""
    with Saver(root, runtime, Keep(keep)) as saver:
        return saver.save(step, model=model, optimizer=optimizer, meta=meta, rank_state=rank_state, wait=True)


# --- writing, without other ranks ---------------------------------------------------------------------------------


def write(root: Path, snap: Snapshot) -> dict:
    """Write a complete checkpoint -> {"step", "seconds", "bytes"}. UserError: it can't be, and nothing is left half."""
    began = time.perf_counter()
    final, tmp = root / f"step_{snap.step:06d}", root / f".tmp-step_{snap.step:06d}"
    try:
        for stale in (tmp, final.with_name(f".old-{final.name}")):
            shutil.rmtree(stale, ignore_errors=True)
        tmp.mkdir(parents=True)
        seal(tmp, final, write_files(tmp, snap))
    except OSError as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise UserError(_why(error, root)) from error
    return {"step": snap.step, "seconds": time.perf_counter() - began, "bytes": snap.bytes}


def _why(error: OSError, root: Path) -> str:
    full = error.errno in paths.FULL
    remedy = "free some space or lower --keep" if full else "make it writable"
    what = "the disk is full" if full else f"{error.strerror or error}"
    return f"The checkpoint in {root} could not be saved ({what}): {remedy}; older ones are untouched."


def write_files(tmp: Path, snap: Snapshot) -> dict[str, dict]:
    """Write every file but the manifest into `tmp`; returns the manifest's entries."""
    label = {name: snap.meta.get(name) for name in ("stage", "step", "tokenizer")}
    files = {"model.safetensors": write_tensors(tmp / "model.safetensors", snap.weights, label)}
    if snap.moments is not None:
        files["optim.safetensors"] = write_tensors(tmp / "optim.safetensors", snap.moments, label)
    files["meta.json"] = write_json(tmp / "meta.json", snap.meta)
    for rank, state in enumerate(snap.ranks):
        files[f"rank_{rank}.json"] = write_json(tmp / f"rank_{rank}.json", state)
    return dict(sorted(files.items()))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], label: Mapping[str, Any], **more: str) -> dict:
    """Write a safetensors file (https://huggingface.co/docs/safetensors: length, JSON header, data) -> its entry.

    label, more: what its header says: `label` as JSON under "nanochat", `more` as it is.

    Written here because the library's writer copies every tensor and keeps the interpreter's lock until all of it is on
    disk, so that training would stand still. Equal tensors give equal bytes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned, as the library does
    header: dict[str, Any] = {"__metadata__": {"nanochat": json.dumps(dict(label)), **more}}
    end = 0
    for name in order:
        t = tensors[name]
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = (memoryview(tensors[n].contiguous().reshape(-1).view(torch.uint8).numpy()) for n in order)
    return _write_bytes(path, (len(text).to_bytes(8, "little"), text), parts)


def write_json(path: Path, value: Any) -> dict:
    """Write strict JSON -> its entry. What is not finite becomes null: no save is lost to a NaN."""
    return _write_bytes(path, [json.dumps(record.plain(value), indent=1, allow_nan=False).encode()])


def _write_bytes(path: Path, *pieces: Any) -> dict:
    """Write, hash and fsync in one pass -> {"bytes", "sha256"}."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for piece in (piece for group in pieces for piece in group):
            for start in range(0, len(piece), CHUNK):
                chunk = memoryview(piece)[start : start + CHUNK]
                digest.update(chunk)
                size += len(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def seal(tmp: Path, final: Path, files: dict[str, dict]) -> None:
    """Write the manifest, make the folder durable, give it its name."""
    write_json(tmp / "manifest.json", {"format": checkpoint.FORMAT, "files": files, "sha256": checkpoint.digest(files)})
    paths.sync_folder(tmp)
    before = final.with_name(f".old-{final.name}")
    if final.exists():
        os.replace(final, before)
    os.replace(tmp, final)
    paths.sync_folder(final.parent)
    paths.sync_folder(final.parent.parent)
    shutil.rmtree(before, ignore_errors=True)


def prune(root: Path, keep: Keep, scores: Mapping[int, float] | None = None, written: int | None = None) -> list[int]:
    """Remove the complete steps that `keep` lets go; returns them. One that can't be removed stays."""
    steps = checkpoint.complete_steps(root)
    removed = [step for step in steps if step not in keep.stays(steps, scores or {}, written)]
    for step in removed:
        path = root / f"step_{step:06d}"
        try:
            (path / "manifest.json").unlink()  # from here on it does not count, wherever the removal stops
        except OSError:
            continue
        shutil.rmtree(path, ignore_errors=True)
    return removed


def set_aside(root: Path, beyond: int = -1) -> Path | None:
    """Move checkpoints of steps past `beyond` into `root/before_<n>`: what goes on now must not resume from them."""
    found = {p: checkpoint.STEP.fullmatch(p.name.removeprefix(".tmp-")) for p in sorted(root.glob("*step_*"))}
    earlier = [path for path, match in found.items() if match and int(match[1]) > beyond]
    if not earlier:
        return None
    target = root / f"before_{1 + len(list(root.glob('before_*')))}"
    target.mkdir()
    for path in earlier:
        os.replace(path, target / path.name)
    return target
