"""How much of the gradients' communication hides behind the backward pass, against the same sent after it.

    torchrun --standalone --nproc_per_node=2 -m scripts.bench_overlap --output=dev/bench/2026-11-25_overlap.json

Three ways take turns on the same model and batch; the best of the turns counts, the slowest rank's: "published" (all
after the backward pass: stack by shape, pad, reduce-scatter), "after" (banks, all buckets after the backward pass) and
"during" (banks, each bucket as soon as its gradients are there). Exposed is the time between the end of the backward
pass and the last gradient's arrival; the hidden share is 1 - exposed / exposed of "after". On a CPU that has no core to
spare for it, communication that is hidden still slows the backward pass: the whole time tells. Real-time priority takes
the network's threads their turns; use none. A wire as between machines, on one (root, Linux; --note says so):

    unshare -n bash -c 'ip link set lo up; tc qdisc add dev lo root tbf rate 4gbit burst 4mb latency 400ms;
        GLOO_SOCKET_IFNAME=lo torchrun --master_addr=127.0.0.1 --nproc_per_node=2 -m scripts.bench_overlap'
"""

import dataclasses
import json
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import cli, hardware, paths, runtime
from nanochat.banks import BUCKET
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import ADAM_RULES, MuonAdamW


@dataclasses.dataclass(frozen=True)
class Config:
    depth: int = 4  # layers
    width: int = 256  # channels
    vocab_size: int = 8192  # rows of the tables
    rows: int = 4  # rows a rank
    sequence_len: int = 512  # tokens a row
    turns: int = 8  # each way is timed so often
    device_type: str = ""  # cuda or cpu; empty: the best there is
    note: str = ""  # written into the output: how the network was slowed, for instance
    output: str = ""  # JSON file of the raw output; empty: printed only


def published(model: GPT, rt: runtime.Runtime) -> None:
    """The published scheme's first phase: stacked and padded copies of each shape's gradients, reduce-scatter."""
    kinds: dict[tuple, list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        key = tuple(p.shape) if name.startswith("transformer.h.") else (name,)
        kinds.setdefault(key, []).append(p.grad)
    works = []
    for grads in kinds.values():
        stack = torch.stack(grads) if len(grads) > 1 else grads[0].reshape(-1)
        short = -len(stack) % rt.world
        full = torch.cat([stack, stack.new_zeros(short, *stack.shape[1:])]) if short else stack
        part = full.new_empty(len(full) // rt.world, *full.shape[1:])
        works.append((dist.reduce_scatter_tensor(part, full, async_op=True), full))
    for work, _ in works:
        work.wait()


def one_turn(way: str, model: GPT, forward, optimizer: MuonAdamW, batch, rt: runtime.Runtime) -> tuple[float, float]:
    """Backward pass and reduction of one update: (whole seconds, seconds after the backward pass), slowest rank's."""
    loss = forward(*batch)
    rt.barrier()
    rt.synchronize()
    began = time.perf_counter()
    if way == "during":
        optimizer.backward(loss, last=True)
    elif way == "after":
        optimizer.backward(loss, last=False)
    else:
        loss.backward()
    rt.synchronize()
    middle = time.perf_counter()
    if way == "published":
        published(model, rt)
    else:
        optimizer.reducer.flush()
        optimizer.reducer.wait()
    rt.synchronize()
    ended = time.perf_counter()
    optimizer.zero_grad()
    return max(rt.gather(ended - began)), max(rt.gather(ended - middle))


def main(cfg: Config) -> dict:
    """Measure and print; returns what it prints."""
    rt = runtime.start(cfg.device_type, training=True)
    if rt.world == 1:
        raise UserError("One process has nobody to talk to: start this with torchrun and two or more.")
    heads = max(cfg.width // 64, 1)
    with torch.device(rt.device):
        model = GPT(GPTConfig(cfg.sequence_len, cfg.vocab_size, cfg.depth, heads, heads, cfg.width, "L"))
    model.init_weights(0)
    model.compute_dtype = rt.dtype
    forward = model.by_hand() if rt.device.type == "cpu" else model.block_by_block()
    optimizer = MuonAdamW(model.roles(), dict.fromkeys(("matrix", *ADAM_RULES), 0.0), rt)
    batch = torch.randint(cfg.vocab_size, (2, cfg.rows, cfg.sequence_len), device=rt.device)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ("published", "after", "during")}
    for turn in range(cfg.turns + 2):  # the first two warm up, and teach the reducer its order
        for way, found in times.items():
            seconds = one_turn(way, model, forward, optimizer, batch, rt)
            if turn > 1:
                found.append(seconds)
    best = {way: {"whole": min(w for w, _ in found), "exposed": min(e for _, e in found)}
            for way, found in times.items()}  # fmt: skip
    total = best["after"]["exposed"]
    summary = {
        "what": "seconds of a backward pass and of its gradients' reduction, the slowest rank's, best of the turns",
        "date": str(date.today()), "device": f"{rt.world} x {hardware.device_name(rt.device)}", "dtype": str(rt.dtype),
        "torch": torch.__version__, "command": "torchrun -m scripts.bench_overlap " + " ".join(sys.argv[1:]),
        "config": dataclasses.asdict(cfg), "gradient_bytes": optimizer.bytes()["gradients"],
        "buckets": len(optimizer.reducer.buckets), "bucket_bytes": BUCKET, "best": best,
        "hidden_share": {way: 1 - best[way]["exposed"] / total for way in best}, "turns": times,
    }  # fmt: skip
    if rt.main:
        if cfg.output:
            paths.write_json(Path(cfg.output), summary)
        print(json.dumps({k: v for k, v in summary.items() if k != "turns"}))
    runtime.stop(rt)
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
