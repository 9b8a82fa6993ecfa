"""Validation bits per byte as the published code measures it, beside our own, for comparing runs on real text.

    python -m scripts.bench_text --model-tag=d4 --output=dev/bench/real_text.json

The published measure: crop packing from a buffer of 1,000 documents, one rank, the first --tokens tokens; it sees
mostly the beginnings of documents. Ours: every token of the validation shard once. Run it after base_train.
"""

import dataclasses
import json
from pathlib import Path

from nanochat import attention, checkpoint, cli, dataloader, dataset, loss_eval, paths, record, runtime, train
from nanochat.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    model_tag: str = ""  # base run; empty: the deepest
    step: int = -1  # of the checkpoint; -1: the newest
    tokens: int = 262144  # of the published measure
    rows: int = 16  # a batch
    whole: bool = True  # also our measure over the whole validation shard
    output: str = ""  # JSON file; empty: only print
    device_type: str = ""  # cuda, mps or cpu; empty: the best there is


def main(cfg: Config) -> dict:
    """Measure and print; returns the figures with those of the run's record."""
    if cfg.tokens < 1 or cfg.rows < 1:
        raise UserError("--tokens and --rows must be 1 or more.")
    rt = runtime.start(cfg.device_type)
    path = checkpoint.find("base", cfg.model_tag or None, cfg.step if cfg.step >= 0 else None)
    backend = attention.choose(rt.device, rt.dtype)
    model, tokenizer, meta = checkpoint.build_model(path, device=rt.device, dtype=rt.dtype, attend=backend.attend)
    corpus = dataset.open_corpus(meta["dataset"]["dataset"], meta["dataset"].get("val_shard"))
    size = {"rows": cfg.rows, "seq_len": model.config.sequence_len, "device": rt.device}
    nbytes = tokenizer.token_bytes()
    with train.resting(model):
        published = dataloader.published_batches(corpus, tokenizer, tokens=cfg.tokens, **size)
        figures = {"published_measure_bpb": loss_eval.bits_per_byte(model, published, nbytes, rt)}
        if cfg.whole:
            rows = dataloader.eval_batches(corpus, tokenizer, tokens=None, **size)
            figures["whole_shard_bpb"] = loss_eval.bits_per_byte(model, rows, nbytes, rt)
    rows = record.read(path.parent / "record.jsonl")
    steps = [row["seconds"] for row in rows if row["kind"] == "step"]
    figures |= {
        "step": meta["step"],
        "minutes_of_steps": sum(steps) / 60,
        "median_step_seconds": sorted(steps)[len(steps) // 2],
        "first_step_seconds": steps[0],
        "minutes_start_to_end": (rows[-1]["time"] - rows[0]["time"]) / 60,
        "dtype": next(row["dtype"] for row in rows if row["kind"] == "plan"),
        "config": meta["user_config"],
    }
    print(json.dumps({k: v for k, v in figures.items() if k != "config"}, indent=1))
    if cfg.output:
        paths.write_json(Path(cfg.output), figures)
    return figures


if __name__ == "__main__":
    cli.run(main, Config)
