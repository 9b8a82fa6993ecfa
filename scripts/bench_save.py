"""How long does saving hold up training? The same steps without saves, with saves beside them, waiting for each.

    python -m scripts.bench_save --output=dev/bench/2026-11-25_save.json

A model of --depth on random tokens; every --every steps a whole checkpoint (weights and moments) is written. The share
is the seconds that the training thread waited for its saves, of the seconds of all steps. Two rounds of the three
modes in turn, so that other load on the machine meets all alike. The bar is 2 % at depth 4 on a CPU.
"""

import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanochat import attention, checkpoint, cli, hardware, optim, paths, runtime, saving, scaling
from nanochat.gpt import GPT

MODES = ("none", "beside", "waiting")


@dataclasses.dataclass(frozen=True)
class Config:
    depth: int = 4  # layers; sets the width
    vocab_size: int = 32768  # tokens
    max_seq_len: int = 512  # tokens
    batch: int = 4096  # tokens an update
    every: int = 50  # updates between two saves
    saves: int = 2  # of each mode and round
    rounds: int = 2  # of the three modes in turn
    folder: str = ""  # disk to write to; empty: a temporary folder
    output: str = ""  # JSON; empty: only print


def main(cfg: Config) -> dict:
    """Measure; returns the figures of each mode."""
    rt = runtime.start("cpu", training=True)
    plan = scaling.plan(cfg.depth, vocab_size=cfg.vocab_size, sequence_len=cfg.max_seq_len, num_iterations=1000,
                        total_batch_size=cfg.batch, device_batch_size=cfg.batch // cfg.max_seq_len)  # fmt: skip
    model = GPT(plan.config, attend=attention.choose(rt.device, rt.dtype).attend)
    model.init_weights(0)
    model.compute_dtype = rt.dtype
    optimizer = optim.MuonAdamW(model.roles(), plan.lrs, rt)
    runs: dict[str, list[dict]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory(prefix="nanochat_save_", dir=cfg.folder or None) as name:
        step(model, optimizer, plan)  # page faults and first-time work
        for number in range(cfg.rounds):
            for mode in MODES:
                found = measure(Path(name) / f"{mode}_{number}", mode, model, optimizer, plan, rt, cfg)
                runs[mode].append(found)
                print(f"round {number + 1}, {mode:<8} {found}", flush=True)
    result = {"date": time.strftime("%Y-%m-%d"), "argv": sys.argv[1:], "device": hardware.device_name(rt.device),
              "cores": os.cpu_count(), "threads": torch.get_num_threads(), "dtype": str(rt.dtype),
              "parameters": plan.parameters["total"], "runs": runs, **figures(runs, cfg)}  # fmt: skip
    print({key: result[key] for key in ("share_beside", "share_waiting", "slower_beside", "slower_waiting")})
    if cfg.output:
        paths.write_json(cfg.output, result)
    return result


def step(model, optimizer, plan) -> None:
    """One update on random tokens."""
    ids = torch.randint(plan.config.vocab_size, (plan.device_batch_size, plan.config.sequence_len + 1))
    optimizer.backward(model(ids[:, :-1], ids[:, 1:]), last=True)
    optimizer.reduce()
    optimizer.step(0.1)
    optimizer.zero_grad()


def measure(root: Path, mode: str, model, optimizer, plan, rt, cfg: Config) -> dict:
    """`saves` times `every` steps, each lot begun by a save -> seconds of steps, waiting and writing."""
    lengths, written = [], []
    with saving.Saver(root, rt, saving.Keep(1)) as saver:
        began = time.perf_counter()
        for number in range(cfg.saves * cfg.every):
            if mode != "none" and number % cfg.every == 0:
                saver.save(number, model=model, optimizer=optimizer, meta={}, wait=mode == "waiting")
            before = time.perf_counter()
            step(model, optimizer, plan)
            lengths.append(time.perf_counter() - before)
            written += saver.news()
        total, blocked = time.perf_counter() - began, saver.blocked
        saver.wait()
    assert mode == "none" or len(checkpoint.complete_steps(root)) == 1
    shutil.rmtree(root, ignore_errors=True)
    return {"seconds": round(total, 2), "blocked": round(blocked, 3), "step": round(statistics.median(lengths), 4),
            "writing": [round(one["seconds"], 2) for one in written],
            "megabytes": round(written[0]["bytes"] / 1e6, 1) if written else 0}  # fmt: skip


def figures(runs: dict[str, list[dict]], cfg: Config) -> dict[str, float]:
    """Shares of the steps' time that saving held up the training thread, and how much longer the whole took."""
    total = {mode: sum(run["seconds"] for run in found) for mode, found in runs.items()}
    blocked = {mode: sum(run["blocked"] for run in found) for mode, found in runs.items()}
    found = {}
    for mode in ("beside", "waiting"):
        found[f"share_{mode}"] = round(blocked[mode] / (total[mode] - blocked[mode]), 5)
        found[f"slower_{mode}"] = round(total[mode] / total["none"] - 1, 5)
    return found


if __name__ == "__main__":
    cli.run(main, Config)
