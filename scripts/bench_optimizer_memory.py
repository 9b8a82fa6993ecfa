"""What an update keeps and adds on each rank: banks against the published scheme, depth 12 and 24, one rank and eight.

    python -m scripts.bench_optimizer_memory --output=dev/bench/2026-11-25_optimizer_memory.json       # seconds, CPU

Closed form, everything in fp32 so that only the schemes differ: weights and gradients whole on every rank, moments
shared out, and what an update adds to them before Muon's own work space, which both need for the matrices of one owner.
The published scheme stacks the gradients of all shapes at once, pads those stacks that the ranks don't divide, and
reduces each into a tensor of its own; alone, it stacks gradients and weights shape by shape. Banks add nothing. The
tensors that a step really allocates are counted on a small model, ours and the published way.
"""

import dataclasses
import json
import sys
from collections import Counter
from datetime import date
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import cli, cost, hardware, paths, scaling
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import ADAM_RULES, MuonAdamW
from nanochat.runtime import Runtime

FP32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Config:
    depths: str = "12,24"  # of the published family: aspect ratio 64, head dim 128, vocabulary 32,768
    worlds: str = "1,8"  # numbers of ranks
    output: str = ""  # JSON file of the raw output; empty: printed only


def shapes(config: GPTConfig) -> Counter:
    """How many block matrices there are of each shape; the model is built without memory."""
    with torch.device("meta"):
        model = GPT(config)
    return Counter(tuple(p.shape) for _, p in model.roles()["matrix"])


def closed_form(config: GPTConfig, world: int) -> dict:
    """Bytes a rank: kept by both, moments, and what an update adds under each scheme."""
    count, kinds = cost.parameters(config), shapes(config)
    adam, muon = count["total"] - count["matrix"], count["matrix"]
    size = {shape: shape[0] * shape[1] * FP32 for shape in kinds}
    if world == 1:
        added = max(2 * k * size[shape] for shape, k in kinds.items())
        parts = {"stacked gradients and weights of the largest shape": added}
    else:
        chunk = {shape: -(-k // world) for shape, k in kinds.items()}
        parts = {
            "stacked gradients": sum(k * size[shape] for shape, k in kinds.items()),
            "padded copies": sum(chunk[s] * world * size[s] for s, k in kinds.items() if k % world),
            "reduced parts": sum(chunk[s] * size[s] for s in kinds) + FP32 * adam // world,
        }
    return {
        "depth": config.n_layer, "ranks": world, "weights": FP32 * count["total"], "gradients": FP32 * count["total"],
        "moments": FP32 * (2 * adam + muon) // world, "published_adds": parts | {"sum": sum(parts.values())},
        "banks_add": 0,
    }  # fmt: skip


class Allocations(TorchDispatchMode):
    """Counts the bytes of every new tensor of at least `least` elements made inside, by operation."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.found = least, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs))
                  if isinstance(t, torch.Tensor)}  # fmt: skip
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.numel() >= self.least:
                if t.untyped_storage().data_ptr() not in before:
                    self.found[str(func)] += t.nbytes
        return out


def measured() -> dict:
    """Bytes of stacks and copies that one reduce and step really make on a small model: ours, and the published way."""
    model = GPT(GPTConfig(64, 512, 4, 2, 2, 64, "L"))
    model.init_weights(0)
    optimizer = MuonAdamW(model.roles(), dict.fromkeys(("matrix", *ADAM_RULES), 0.01), Runtime.single())
    ids = torch.randint(512, (2, 65))
    optimizer.backward(model(ids[:, :-1], ids[:, 1:]))
    names = ("aten.stack.default", "aten.cat.default", "aten.clone.default", "aten._to_copy.default")
    with Allocations(64 * 64) as ours:
        optimizer.reduce()
        optimizer.step()
    kinds: dict = {}
    for _, p in model.roles()["matrix"]:
        kinds.setdefault(tuple(p.shape), []).append(p)
    with Allocations(64 * 64) as theirs, torch.no_grad():
        for group in kinds.values():
            torch.stack([p.grad for p in group])
            torch.stack([p.data for p in group])
    pick = lambda found: {name: found[name] for name in names if found[name]}
    return {"muon_bytes": sum(p.nbytes for group in kinds.values() for p in group),
            "banks_copy": pick(ours.found), "published_copies": pick(theirs.found)}  # fmt: skip


def main(cfg: Config) -> dict:
    """Compute, count, print."""
    family = dict(vocab_size=32768, aspect_ratio=64, head_dim=128, sequence_len=2048, window_pattern="SSSL")
    rows = [closed_form(scaling.shape(int(depth), **family), int(world))
            for depth in cfg.depths.split(",") for world in cfg.worlds.split(",")]  # fmt: skip
    summary = {
        "what": "bytes a rank, all in fp32", "date": str(date.today()),
        "device": hardware.device_name(torch.device("cpu")), "torch": torch.__version__,
        "command": "python -m scripts.bench_optimizer_memory " + " ".join(sys.argv[1:]),
        "closed_form": rows, "measured_on_a_small_model": measured(),
    }  # fmt: skip
    if cfg.output:
        paths.write_json(Path(cfg.output), summary)
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
