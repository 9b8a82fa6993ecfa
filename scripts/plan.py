"""What a depth takes, before it is trained: size, tokens, batch, rates, memory, time. The numbers are the trainer's.

    python -m scripts.plan --depth=24 --target-param-data-ratio=8 --gpus=8 --gpu=h100
    python -m scripts.plan --hours=5 --gpus=1          # the largest depth that fits the memory and the time here

Time is FLOPs / (peak x MFU). The default MFU of 0.5 is what the published code reaches at depth 24 in bf16 on H100s.
"""

import dataclasses
from pathlib import Path

import torch

from nanochat import cli, cost, hardware, paths, record, runtime, scaling
from nanochat.errors import UserError

TOKENS_PER_SHARD = 250e6 / 4.5  # a hub shard holds about 250 M characters (published), about 4.5 a token
KEPT_BY_CROP = 0.65  # share of the tokens that crop packing keeps at a context of 2,048 (published: 34.6 % discarded)
MEMORY_SHARE = 0.85  # of the device's memory that a plan may fill: the estimate is not exact, and others use some
ROWS = (32, 16, 8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class Config:
    depth: int = 20  # layers; ignored with --hours
    hours: float = 0.0  # choose the largest even depth that trains within this time; 0: plan --depth
    target_param_data_ratio: float = 10.5  # tokens per scaling parameter
    vocab_size: int = 32768  # tokens
    max_seq_len: int = 2048  # context, tokens
    gpus: int = 1  # devices
    gpu: str = ""  # name, e.g. h100; empty: the one here
    memory_gib: float = 0.0  # of one device; 0: of the one here, else not checked
    mfu: float = 0.5  # share of the bf16 peak that training reaches
    output: str = ""  # JSON file for the choice; empty: only print


def options(cfg: Config, depth: int, peak: float | None, memory: float | None) -> dict:
    """One depth as a row: the plan, the largest device batch that fits (0: none), hours (None: peak unknown)."""
    world = max(cfg.gpus, 1)
    same = dict(vocab_size=cfg.vocab_size, sequence_len=cfg.max_seq_len, world=world)
    plan = scaling.plan(depth, **same, target_param_data_ratio=cfg.target_param_data_ratio)
    fits = [rows for rows in ROWS if memory is None or cost.memory(plan.config, rows, world=world)["total"] <= memory]
    rows = fits[0] if fits else 0
    if rows:
        plan = scaling.plan(depth, **same, target_param_data_ratio=cfg.target_param_data_ratio, device_batch_size=rows)
    hours = plan.flops / (peak * cfg.mfu * world) / 3600 if peak else None
    shards = int(plan.tokens / KEPT_BY_CROP / TOKENS_PER_SHARD) + 2
    return {"depth": depth, "device_batch_size": rows, "hours": hours, "shards": shards, "plan": plan}


def machine(cfg: Config) -> tuple[float | None, float | None]:
    """Peak FLOP/s and usable bytes of one device: as told, or of the device here; None where unknown."""
    device = runtime.pick_device()
    peak = hardware.peak_flops(cfg.gpu or hardware.device_name(device))
    total = cfg.memory_gib * 2**30
    if not total and not cfg.gpu and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    return peak, total * MEMORY_SHARE or None


def choose(cfg: Config, peak: float | None, memory: float | None) -> dict:
    """The row asked for, or with --hours the deepest that fits both limits."""
    if not cfg.hours:
        return options(cfg, cfg.depth, peak, memory)
    if peak is None:
        raise UserError("--hours needs a device whose speed is known: name one with --gpu, e.g. --gpu=h100.")
    rows = [options(cfg, depth, peak, memory) for depth in range(4, 42, 2)]
    fitting = [row for row in rows if row["device_batch_size"] and row["hours"] <= cfg.hours]
    if not fitting:
        raise UserError(f"Not even depth 4 trains in {cfg.hours} hours in this memory: give more of one of them.")
    return fitting[-1]


def main(cfg: Config) -> dict:
    """Plan, print, write; returns the chosen row."""
    row = choose(cfg, *machine(cfg))
    plan = row["plan"]
    hours = "unknown (name the device with --gpu)" if row["hours"] is None else f"{row['hours']:.2f} h"
    part = cost.memory(plan.config, max(row["device_batch_size"], 1), world=max(cfg.gpus, 1))
    lines = [
        ("depth", f"{row['depth']}: width {plan.config.n_embd}, {plan.config.n_head} heads"),
        ("parameters", f"{plan.parameters['total'] / 1e6:,.2f} M, {plan.parameters['scaling'] / 1e6:,.2f} M scaling"),
        ("tokens", f"{plan.tokens / 1e9:.3f} B in {plan.iterations:,} steps of {plan.batch:,}, {row['shards']} shards"),
        ("FLOPs", f"{plan.flops:.3g} ({plan.flops_per_token:.3g} a token)"),
        ("rates", f"x {plan.lr_mult:.3f}, decay {plan.weight_decay:.4g}, {plan.warmup_steps} warm-up steps"),
        ("memory", ", ".join(f"{name} {size / 2**30:.1f}" for name, size in part.items()) + " GiB (estimate)"),
        ("batch", f"{row['device_batch_size']} rows x {plan.accum} micro-batches on {cfg.gpus} device(s)"),
        ("time", hours),
    ]  # fmt: skip
    for name, text in lines:
        print(f"{name:<11}{text}")
    if cfg.output:
        paths.write_json(Path(cfg.output), record.plain(row))
    return row


if __name__ == "__main__":
    cli.run(main, Config)
