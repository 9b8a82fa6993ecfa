"""Evaluate a base model: samples to look at, bits per byte on both splits, and CORE (22 in-context tasks).

    python -m scripts.base_eval                                              # all three
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval
    python -m scripts.base_eval --eval core --max-per-task=100 --bundle=eval_bundle.zip

Needs a checkpoint of scripts.base_train, its corpus for bpb, and for CORE the bundle (--bundle, NANOCHAT_EVAL_BUNDLE,
or fetched once). GPT-2 XL has a CORE of 0.2565. Writes base_eval_<step>.json beside the checkpoint, the table of CORE
as base_eval/<tag>_<step>.csv in the artefact folder, and rows into record.jsonl.
"""

import dataclasses

from nanochat import (
    attention,
    checkpoint,
    cli,
    core_eval,
    dataloader,
    dataset,
    loss_eval,
    paths,
    record,
    runtime,
    samples,
    train,
)
from nanochat.errors import refuse

KINDS = ("core", "bpb", "sample")


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, and what of it is measured."""

    eval: str = "core,bpb,sample"  # what to do, separated by commas
    model_tag: str = ""  # e.g. d12; empty: the largest there is
    step: int = -1  # of the checkpoint; -1: the newest
    max_per_task: int = -1  # CORE items of each task; -1: all
    device_batch_size: int = 32  # rows of full context a forward; lower it when memory runs out
    split_tokens: int = 40 * 524288  # tokens of each split for bpb
    dataset: str = ""  # corpus for bpb; empty: the one the model was trained on
    val_shard: str = ""  # a folder's validation shard; empty: as it was trained
    bundle: str = ""  # CORE's data, a zip or a folder; empty: NANOCHAT_EVAL_BUNDLE, else in the artefact folder
    device_type: str = ""  # cuda, mps or cpu; empty: the best there is
    seed: int = 42  # of the samples


def check(cfg: Config) -> list[str]:
    """The kinds of evaluation asked for; what is wrong with the flags is refused all at once."""
    kinds = [kind.strip() for kind in cfg.eval.split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in KINDS]
    problems = [f"--eval has no {', '.join(unknown)}: choose of {', '.join(KINDS)}."] if unknown else []
    if not kinds:
        problems.append(f"--eval is empty: choose of {', '.join(KINDS)}.")
    refuse(problems + cli.too_small(cfg, ("max_per_task",), max_per_task=1, device_batch_size=1, split_tokens=1))
    return kinds


def bits(model, tokenizer, meta: dict, cfg: Config, rt: runtime.Runtime) -> dict[str, float]:
    """Bits per byte of the first --split-tokens tokens of both splits, the same rows whatever batch and world."""
    corpus = dataset.open_inherited(meta.get("dataset"), cfg.dataset, cfg.val_shard)
    found = {}
    for split in ("train", "val"):
        rows = dataloader.eval_batches(
            corpus, tokenizer, rows=cfg.device_batch_size, seq_len=model.config.sequence_len, tokens=cfg.split_tokens,
            rank=rt.rank, world=rt.world, device=rt.device, split=split,
        )  # fmt: skip
        with rows:
            found[f"{split}_bpb"] = loss_eval.bits_per_byte(model, rows, tokenizer.token_bytes(), rt)
    return found


def main(cfg: Config) -> dict:
    """Evaluate; returns what was measured, as written to disk."""
    kinds = check(cfg)
    # 1. runtime ------------------------------------------------------------------------------------------------------
    rt = runtime.start(cfg.device_type, cfg.seed)
    backend = attention.choose(rt.device, rt.dtype)
    # 2. model and tokenizer ------------------------------------------------------------------------------------------
    path = checkpoint.find("base", cfg.model_tag or None, cfg.step if cfg.step >= 0 else None)
    bundle = core_eval.bundle(rt, cfg.bundle or None) if "core" in kinds else None
    model, tokenizer, meta = checkpoint.build_model(path, device=rt.device, dtype=rt.dtype, attend=backend.attend)
    step, root = checkpoint.load(path).step, path.parent
    log = record.Record(root / "record.jsonl", stage="base_eval", config=cfg, main=rt.main)
    log.say(f"evaluating {path}: {', '.join(kinds)}")
    summary = {"tag": root.name, "step": step, "config": dataclasses.asdict(cfg)}
    # 3. measure ------------------------------------------------------------------------------------------------------
    with train.resting(model):
        if "sample" in kinds and rt.main:
            shown = samples.continuations(model, tokenizer, log, step)
            shown += samples.from_nothing(model, tokenizer, log, step, seed=cfg.seed)
            summary["samples"] = [{"prompt": prompt, "text": text} for prompt, text in shown]
        if "bpb" in kinds:
            summary |= (found := bits(model, tokenizer, meta, cfg, rt))
            log.eval(step, f"bits per byte: train {found['train_bpb']:.4f}, val {found['val_bpb']:.4f}", **found)
        if bundle is not None:
            core = core_eval.evaluate(
                model, tokenizer, bundle, max_per_task=cfg.max_per_task, device_batch_size=cfg.device_batch_size,
                runtime=rt, say=log.say,
            )  # fmt: skip
            summary |= {"core": core["core"], "core_tasks": core["tasks"], "bundle": core["bundle"]}
            log.eval(step, f"CORE {core['core']:.4f}", core=core["core"], core_tasks=core["tasks"])
            if rt.main:
                with paths.atomic_write(paths.base_dir() / "base_eval" / f"{root.name}_{step:06d}.csv", "w") as file:
                    file.write(core_eval.table(core))
    # 4. summary ------------------------------------------------------------------------------------------------------
    if rt.main:
        paths.write_json(root / f"base_eval_{step:06d}.json", record.plain(summary))
    log.close(results=str(root / f"base_eval_{step:06d}.json"))
    runtime.stop(rt)
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
