"""The memory plan against measured peaks: a few training steps of many configurations, each in a fresh process.

    python -m scripts.bench_memory                        # CPU: peak resident set beside cost.memory
    python -m scripts.bench_memory --device-type=cuda     # GPU: the allocator's peak

A child builds the model and the optimizer as base_train does and makes --steps updates on random tokens. On a CPU what
the process holds before it builds the model (interpreter, libraries) is measured there and taken off the peak.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch

from nanochat import attention, cli, cost, hardware, optim, paths, runtime, scaling, train
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig

# depth, width / 64, kv heads of the heads of 64, vocabulary, context, rows, micro-batches, dtype
CASES = {
    "cpu": [
        (4, 4, 4, 4096, 256, 16, 1, "float32"), (8, 4, 4, 8192, 512, 8, 1, "float32"),
        (6, 6, 6, 8192, 512, 4, 2, "float32"), (4, 8, 8, 16384, 512, 4, 1, "float32"),
        (8, 8, 4, 8192, 512, 8, 1, "float32"), (12, 8, 8, 4096, 256, 16, 1, "float32"),
        (4, 8, 2, 32768, 256, 8, 1, "float32"), (12, 12, 12, 32768, 256, 1, 1, "float32"),
        (6, 8, 8, 8192, 1024, 8, 1, "float32"), (16, 8, 8, 8192, 512, 2, 1, "float32"),
        (6, 6, 6, 8192, 512, 8, 1, "bfloat16"), (8, 8, 8, 16384, 512, 4, 1, "bfloat16"),
        # not measured while the constants of the plan were chosen
        (4, 6, 6, 4096, 1024, 4, 2, "float32"), (10, 4, 2, 16384, 256, 8, 1, "float32"),
        (6, 8, 4, 8192, 512, 8, 1, "bfloat16"), (8, 6, 6, 32768, 256, 4, 1, "float32"),
        (6, 10, 10, 32768, 256, 2, 1, "float32"), (4, 6, 6, 32768, 512, 2, 1, "bfloat16"),
    ],
    "cuda": [
        (12, 12, 12, 32768, 2048, 32, 1, "bfloat16"), (12, 12, 12, 32768, 2048, 16, 2, "bfloat16"),
        (20, 20, 20, 32768, 2048, 16, 1, "bfloat16"), (24, 24, 24, 32768, 2048, 16, 1, "bfloat16"),
        (24, 24, 12, 32768, 2048, 8, 1, "bfloat16"), (26, 26, 26, 32768, 2048, 8, 2, "bfloat16"),
    ],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    device_type: str = "cpu"  # cpu or cuda
    steps: int = 2  # updates
    fast: bool = True  # the forward that training chooses; --no-fast: plain autograd
    only: int = -1  # one case by its number; -1: all
    output: str = ""  # JSON file; empty: only print
    child: str = ""  # internal: a case as JSON, measured in this process


def resident() -> int:
    """Bytes of this process in main memory now."""
    import psutil

    return psutil.Process().memory_info().rss


def measure(cfg: Config) -> dict:
    """Train on one case; returns bytes before the model was built, and at the peak."""
    depth, heads, kv, vocab, context, rows, accum, dtype = json.loads(cfg.child)
    rt = dataclasses.replace(runtime.start(cfg.device_type, training=True), dtype=getattr(torch, dtype))
    backend = attention.choose(rt.device, rt.dtype)
    small = scaling.shape(2, vocab_size=512, aspect_ratio=32, head_dim=64, sequence_len=64)
    steps(small, 1, 1, rt, backend.attend, cfg, 1)  # so that libraries are there, whatever the case
    before = 0 if rt.device.type == "cuda" else resident()
    shape = scaling.shape(depth, vocab_size=vocab, aspect_ratio=1, head_dim=64, sequence_len=context)
    config = dataclasses.replace(shape, n_embd=64 * heads, n_head=heads, n_kv_head=kv)
    seen: dict[str, int] = {}
    how = steps(config, rows, accum, rt, backend.attend, cfg, cfg.steps, seen)
    plan = cost.moments(config, rows, bytes_per_value=rt.dtype.itemsize, accum=accum, device=rt.device.type,
                        forward="" if cfg.fast else "plain")  # fmt: skip
    seen = {name: size - before for name, size in seen.items()}
    return {"config": dataclasses.asdict(config), "rows": rows, "accum": accum, "dtype": dtype, "forward": how,
            "before": before, "peak": max(seen.values()), "moments": seen, "plan": plan}  # fmt: skip


def peak_since(rt: runtime.Runtime) -> int:
    """Peak bytes since the last call."""
    found = rt.peak_bytes()
    if rt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rt.device)
    else:  # Linux: the highest resident set begins anew with the present one
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return found


def steps(config: GPTConfig, rows: int, accum: int, rt: runtime.Runtime, attend, cfg: Config, count: int,
          seen: dict[str, int] | None = None) -> str:  # fmt: skip
    """Build a model and an optimizer as base_train does and make `count` updates; returns what the forward was.

    seen: gets the peak bytes of forward and backward, and of the update.
    """
    seen = {} if seen is None else seen
    note = lambda name: seen.update({name: max(seen.get(name, 0), peak_since(rt))})
    with torch.device(rt.device):
        model = GPT(config, attend=attend)
    model.init_weights(0)
    model.compute_dtype = rt.dtype
    optimizer = optim.MuonAdamW(model.roles(), scaling.learning_rates(config), rt)
    forward, how = train.fastest(model, rt, cfg.fast)
    ids = torch.randint(config.vocab_size, (rows, config.sequence_len), device=rt.device)
    for _ in range(count):
        for micro in range(accum):
            optimizer.backward(forward(ids, ids, reduction="sum") / ids.numel(), last=micro + 1 == accum)
        note("backward")
        optimizer.step(1.0, 0.9, 0.1)
        note("update")
        optimizer.zero_grad()
    return how


def spawn(cfg: Config, case: tuple) -> dict:
    """Measure one case in a process of its own."""
    own = [f"--child={json.dumps(case)}", f"--device-type={cfg.device_type}", f"--steps={cfg.steps}"]
    own += ["--no-fast"] if not cfg.fast else []
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench_memory", *own], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(cfg: Config) -> dict:
    """Measure, print, write; returns the rows."""
    if cfg.child:
        found = measure(cfg)
        print(json.dumps(found))
        return found
    if cfg.device_type not in CASES:
        raise UserError(f"--device-type={cfg.device_type} has no cases: use {' or '.join(CASES)}.")
    runtime.pick_device(cfg.device_type)
    cases = CASES[cfg.device_type]
    rows = []
    for case in cases if cfg.only < 0 else [cases[cfg.only]]:
        row = spawn(cfg, case)
        row["ratio"] = max(parts["total"] for parts in row["plan"].values()) / row["peak"]
        rows.append(row)
        print(f"{case}: peak {row['peak'] / 2**20:.0f} MiB, plan x {row['ratio']:.3f}", flush=True)
        for name, parts in row["plan"].items():
            text = ", ".join(f"{k} {v / 2**20:.0f}" for k, v in parts.items())
            print(f"    {name} {row['moments'][name] / 2**20:.0f} MiB, planned {text}", flush=True)
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"worst: {100 * worst:.1f} %")
    result = hardware.about() | {"command": cli.command(main), "worst": worst, "rows": rows}
    if cfg.output:
        paths.write_json(Path(cfg.output), result)
    return result


if __name__ == "__main__":
    cli.run(main, Config)
