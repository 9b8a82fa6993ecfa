"""Where a stopped run goes on: which checkpoint, whether the flags still say the same, and putting everything back.

Shared by pretraining, fine-tuning and reinforcement, so all three resume by one rule: the newest step whose every file
passes its checksum, decided on rank 0 and followed by all.
"""

import dataclasses
from pathlib import Path
from typing import Any

from nanochat import checkpoint, cli, dataloader, faults, nodes, record, saving, shard, train
from nanochat.errors import UserError
from nanochat.runtime import Runtime

# Flags that may differ between the two lives of a run: they don't change what is learned.
FREE = {
    "run", "device_type", "resume", "resume_from_step", "force", "keep", "save_every", "eval_every", "eval_tokens",
    "sample_every", "core_metric_every", "core_metric_max_per_task", "compile", "attention", "model_tag", "bundle",
    "chatcore_every", "chatcore_max_cat", "chatcore_max_sample", "eval_examples", "keep_every", "keep_best",
    "watchdog", "profile", "spike", "spike_action", "device_batch_size", "shard", "recompute",
}  # fmt: skip


def problems(cfg: Any) -> list[str]:
    """What is wrong with the flags that all stages of training have, a sentence each."""
    off = ("eval_every", "save_every", "keep", "keep_every", "resume_from_step", "watchdog")
    found = cli.too_small(cfg, off, **dict.fromkeys(off, 0))
    if cfg.resume and cfg.resume_from_step >= 0:
        found.append("give --resume or --resume-from-step, not both.")
    if cfg.shard not in shard.KINDS:
        found.append(f"--shard={cfg.shard} is unknown: use {' or '.join(shard.KINDS)}.")
    return found


def point(
    root: Path, resume: bool, step: int | None, runtime: Runtime
) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint to go on from (None: start afresh) and a sentence for each one passed over. Collective."""
    if not resume and step is None:
        return None, []
    choice: dict[str, Any] = {"name": None, "notes": [], "error": ""}
    source = nodes.newest(root, step, runtime)
    if runtime.rank == source:
        try:
            path, notes = (root / f"step_{step:06d}", []) if step is not None else checkpoint.newest_good(root)
            if step is not None:
                checkpoint.load(path).verify()
            choice |= {"name": path.name if path else None, "notes": notes}
        except UserError as error:
            choice["error"] = str(error)
    choice = runtime.gather(choice)[source]
    if choice["error"]:
        raise UserError(choice["error"])
    found = checkpoint.load(nodes.fetch(root / choice["name"], runtime, source)) if choice["name"] else None
    return found, choice["notes"]


def make_way(root: Path, found: checkpoint.Checkpoint | None, resume: bool, runtime: Runtime) -> list[str]:
    """Set aside the checkpoints past the one gone on from, or all where nothing was to be resumed.

    A later resume would take them for this run's. Called when nothing but the run itself can fail any more; a sentence
    if something was moved. Collective.
    """
    if resume and not found:  # there is none, or none that is whole
        return []
    beyond = found.step if found else -1
    aside = nodes.each(runtime, lambda: saving.set_aside(root, beyond) if root.is_dir() else None)
    what = f"what was saved past step {beyond}" if found else "an earlier run of this name"
    return [f"{what} was moved to {aside}."] if aside else []


def conflicts(cfg: Any, saved: dict[str, Any]) -> list[str]:
    """A sentence for each flag that would change the rest of the run."""
    own = dataclasses.asdict(cfg)
    return [
        f"--{name.replace('_', '-')} is {own[name]!r} now, but the run was started with {saved[name]!r}."
        for name in own
        if name in saved and name not in FREE and own[name] != saved[name]
    ]


def check(
    cfg: Any, found: checkpoint.Checkpoint, tokenizer: Any, force: bool = False, batch: int | None = None
) -> None:
    """Refuse to go on with other flags or another `batch` (tokens an update) unless forced, or another tokenizer."""
    checkpoint.check_tokenizer(found, tokenizer)
    differ = conflicts(cfg, found.meta["user_config"])
    plan = found.meta.get("plan") or {}
    was = (plan.get("sft") or plan).get("batch")
    if batch is not None and was not in (None, batch):  # fitted to another number of ranks, say
        differ.append(f"an update has {batch:,} tokens now, but {was:,} so far: give --total-batch-size={was}.")
    if differ and not force:
        remedy = "Give the old flags, another --model-tag, or --force to go on with the new ones."
        raise UserError("\n  ".join([f"{found.path} can't be resumed with these flags:", *differ, remedy]))


@dataclasses.dataclass
class Progress:
    """Where a run stands beside its weights and moments: what `restore` gives back and a checkpoint's meta keeps."""

    meter: train.Meter
    scaler: train.Scaler
    spikes: faults.Spikes
    loader: dict | None = None  # to continue the data after
    scores: dict = dataclasses.field(default_factory=dict)  # by step, for retention
    wandb: str | None = None  # the run's id there

    @classmethod
    def fresh(cls, dtype: Any, deviations: float | None = None) -> "Progress":
        """That of a run which begins."""
        return cls(train.Meter(), train.Scaler.of(dtype), faults.Spikes(deviations))

    def meta(self, log: record.Record) -> dict[str, Any]:
        """What a checkpoint's meta keeps of it; the loader's state is each rank's own."""
        parts = {name: getattr(self, name).state() for name in ("meter", "scaler", "spikes")}
        return parts | {"wandb": log.wandb_id}

    def summary(self, step: int, saver: saving.Saver, runtime: Runtime) -> dict[str, Any]:
        """What the summary of every stage says: how far, how long, how much memory, and where the end is."""
        return {
            "step": step, "seconds": self.meter.seconds, "seconds_saving": saver.blocked,
            "peak_bytes": runtime.peak_bytes(), "checkpoint": str(saver.root / f"step_{step:06d}"),
        }  # fmt: skip


def restore(
    found: checkpoint.Checkpoint, model: Any, optimizer: Any, runtime: Runtime, deviations: float | None = None
) -> Progress:
    """Put weights, moments and random state back, and say where the run stood.

    On another world size each rank begins a random state of its own, and the loader's states are merged.
    """
    moments = found.optimizer()
    if moments is None:
        raise UserError(f"{found.path} holds no optimizer state: it can be used, but not resumed.")
    where = "cpu" if shard.sharded(model) else runtime.device  # a model that is sharded does not fit a device whole
    checkpoint.restore(model, found.weights(where), found.path)
    optimizer.load_state(moments)
    states = found.rank_states()
    if found.world == runtime.world:
        train.set_rng_state(states[runtime.rank]["rng"])
    meta, loaders = found.meta, [state.get("loader") for state in states]
    return Progress(
        train.Meter(**meta["meter"]), train.Scaler(**meta["scaler"]),
        faults.Spikes(deviations, **(meta.get("spikes") or {})),
        dataloader.merge_states(loaders) if loaders[0] else None, meta.get("scores") or {}, meta.get("wandb"),
    )  # fmt: skip


def roll_back(saver: saving.Saver, model: Any, optimizer: Any, at: Progress, runtime: Runtime) -> tuple[Progress, int]:
    """Go back to the newest checkpoint but leave the data where it is -> (where the run stands, its step)."""
    saver.wait()
    found, _ = point(saver.root, True, None, runtime)
    if found is None:
        raise UserError(f"There is a spike ({at.spikes.why}) and no checkpoint to go back to: set --save-every.")
    at.spikes.rolled_back(found.step)
    back = restore(found, model, optimizer, runtime, at.spikes.deviations)
    make_way(saver.root, found, True, runtime)
    return dataclasses.replace(back, spikes=at.spikes, loader=at.loader, scores=at.scores), found.step
