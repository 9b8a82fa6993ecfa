"""Where a stopped run goes on: which checkpoint, whether the flags still say the same, and putting everything back.

Shared by pretraining, fine-tuning and reinforcement, so all three resume by one rule: the newest step whose every file
passes its checksum, decided on rank 0 and followed by all.
"""

import dataclasses
from pathlib import Path
from typing import Any

from nanochat import checkpoint, train
from nanochat.errors import UserError
from nanochat.runtime import Runtime

# Flags that may differ between the two lives of a run: they don't change what is learned.
FREE = {
    "run", "device_type", "resume", "resume_from_step", "force", "keep", "save_every", "eval_every", "eval_tokens",
    "sample_every", "core_metric_every", "core_metric_max_per_task", "compile", "attention", "model_tag", "bundle",
    "chatcore_every", "chatcore_max_cat", "chatcore_max_sample", "eval_examples",
}  # fmt: skip


def point(
    root: Path, resume: bool, step: int | None, runtime: Runtime
) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint to go on from (None: start afresh) and a sentence for each one passed over. Collective."""
    if not resume and step is None:
        aside = checkpoint.set_aside(root) if runtime.main and root.is_dir() else None
        runtime.barrier()
        return None, [f"an earlier run of this name was moved to {aside}."] if aside else []
    choice: dict[str, Any] = {"path": None, "notes": [], "error": ""}
    if runtime.main:
        try:
            path, notes = (root / f"step_{step:06d}", []) if step is not None else checkpoint.newest_good(root)
            if step is not None:
                checkpoint.load(path).verify()
            choice |= {"path": str(path) if path else None, "notes": notes}
        except UserError as error:
            choice["error"] = str(error)
    choice = runtime.broadcast(choice)
    if choice["error"]:
        raise UserError(choice["error"])
    found = checkpoint.load(Path(choice["path"])) if choice["path"] else None
    return found, choice["notes"]


def conflicts(cfg: Any, saved: dict[str, Any]) -> list[str]:
    """A sentence for each flag that would change the rest of the run."""
    own = dataclasses.asdict(cfg)
    return [
        f"--{name.replace('_', '-')} is {own[name]!r} now, but the run was started with {saved[name]!r}."
        for name in own
        if name in saved and name not in FREE and own[name] != saved[name]
    ]


def check(cfg: Any, found: checkpoint.Checkpoint, tokenizer: Any, force: bool = False) -> None:
    """Refuse to go on with other flags (unless forced) or with another tokenizer."""
    checkpoint.check_tokenizer(found, tokenizer)
    differ = conflicts(cfg, found.meta["user_config"])
    if differ and not force:
        remedy = "Give the old flags, another --model-tag, or --force to go on with the new ones."
        raise UserError("\n  ".join([f"{found.path} can't be resumed with these flags:", *differ, remedy]))


def restore(
    found: checkpoint.Checkpoint, model: Any, optimizer: Any, runtime: Runtime
) -> tuple[train.Meter, train.Scaler, list[dict]]:
    """Put weights, moments, meter, scaler and random state back -> (meter, scaler, each rank's loader state).

    On another world size each rank begins a random state of its own; loader states can be merged from all ranks.
    """
    checkpoint.restore(model, found.weights(runtime.device), found.path)
    moments = found.optimizer()
    if moments is None:
        raise UserError(f"{found.path} holds no optimizer state: it can be used, but not resumed.")
    optimizer.load_state(moments)
    states = found.rank_states()
    if found.world == runtime.world:
        train.set_rng_state(states[runtime.rank]["rng"])
    loaders = [state.get("loader") or {} for state in states]
    return train.Meter(**found.meta["meter"]), train.Scaler(**found.meta["scaler"]), loaders
