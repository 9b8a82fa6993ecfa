"""How fast the engine generates: time to first token, time a step, tokens/s over batch sizes; a naive loop beside it.

    python -m scripts.infer_bench                                   # the shape of the baseline: depth 4, width 256
    python -m scripts.infer_bench -i sft --batch-sizes 1,8,32 -k 50 # a trained model
    python -m scripts.infer_bench --depth 20 --head-dim 128 --vocab-size 32768 --sequence-len 2048 --prompt-tokens 1024

The naive loop is what the published engine does: one cache with one length for all rows, GPT.forward for each token,
and a draw from the whole softmaxed vocabulary. Both run in turns, `--repeats` times; the best counts, and `ratio` is
the engine's tokens/s by the loop's, which is what to quote from a busy machine. `floor_share`: the bytes that a step
must read (weights once, keys and values of every row) by the bandwidth of a copy here, over the median step time.

Reference, published engine, 2-core x86 CPU, prompt 128, 128 new tokens, temperature 1, top-k 50: 417, 1,630 and 2,796
tokens/s at 1, 8 and 32 rows (one thread: 370, 1,148, 2,080). The last line of the output is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from nanochat import attention, checkpoint, cli, cost, hardware, runtime
from nanochat.engine import Engine
from nanochat.errors import refuse
from nanochat.gpt import GPT, GPTConfig
from nanochat.kvcache import SlotCache
from nanochat.sampling import Sampling
from nanochat.tokenizer import Tokenizer


def flag(*aliases: str):
    """Short names of a flag."""
    return tyro.conf.arg(aliases=aliases)


@dataclass(frozen=True)
class Config:
    """What to run, and how often."""

    source: Annotated[str, flag("-i")] = ""  # base, sft or rl; empty: random weights of the shape below
    model_tag: Annotated[str, flag("-g")] = ""  # empty: the largest there is
    step: Annotated[int, flag("-s")] = -1  # -1: the newest
    depth: int = 4  # layers, when random
    aspect_ratio: int = 64  # width = depth x this
    head_dim: int = 64
    vocab_size: int = 8192
    sequence_len: int = 512  # context, tokens
    window_pattern: str = "L"
    prompt_tokens: int = 128
    decode_tokens: int = 128
    batch_sizes: str = "1,8,32"
    temperature: Annotated[float, flag("-t")] = 1.0
    top_k: Annotated[int, flag("-k")] = 50  # 0: all
    repeats: int = 3
    clock: str = "wall"  # or cpu: seconds of this process alone, for a busy machine (with --threads=1)
    threads: int = 0  # of torch on a CPU; 0: as torch chooses
    naive: bool = True  # run the naive loop beside the engine
    device_type: str = ""

    def rows(self) -> list[int]:
        """The batch sizes."""
        return [int(part) for part in self.batch_sizes.split(",") if part.strip().isdigit()]


def byte_like_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of this size that was never trained: bytes, then pairs and triples of them."""
    ranks = [bytes([i]) for i in range(256)]
    ranks += [bytes([a, b]) for a in range(256) for b in range(256)]
    return Tokenizer.from_ranks(ranks[: vocab_size - 9])


def load(cfg: Config, rt: runtime.Runtime) -> tuple[GPT, Tokenizer]:
    """The trained model, or one with random weights."""
    attend = attention.choose(rt.device, rt.dtype).attend
    if cfg.source:
        step = None if cfg.step < 0 else cfg.step
        model, tokenizer, _ = checkpoint.build_model(
            cfg.source, cfg.model_tag or None, step, device=rt.device, dtype=rt.dtype, attend=attend
        )
    else:
        width = cfg.depth * cfg.aspect_ratio
        heads = width // cfg.head_dim
        with torch.device(rt.device):
            shape = (cfg.sequence_len, cfg.vocab_size, cfg.depth, heads, heads, width, cfg.window_pattern)
            model = GPT(GPTConfig(*shape), attend).eval()
        model.init_weights(0)
        tokenizer = byte_like_tokenizer(cfg.vocab_size)
    return model.to(rt.dtype) if rt.dtype != torch.float32 else model, tokenizer


@torch.inference_mode()
def naive(model: GPT, ids: list[int], rows: int, cfg: Config, rt: runtime.Runtime) -> tuple[float, list[float]]:
    """The loop of the published engine -> seconds to the first tokens, seconds of each later step."""
    marks = [now(rt, cfg)]
    cache = SlotCache(rows, model.config.sequence_len, model.attend)
    logits = model(torch.tensor([ids], device=rt.device), cache=cache.view(0, [len(ids)]), last_only=True)[:, 0]
    cache.advance(0, [len(ids)])
    for row in range(1, rows):
        cache.copy(0, row)
    logits = logits.expand(rows, -1)
    for _ in range(cfg.decode_tokens):
        if cfg.top_k:
            kth = logits.topk(cfg.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        new = torch.multinomial((logits / max(cfg.temperature, 1e-3)).softmax(-1), 1)
        new.tolist()
        marks.append(now(rt, cfg))
        logits = model(new, cache=cache.view(0, [1] * rows))[:, 0]
        cache.advance(0, [1] * rows)
    return marks[1] - marks[0], [b - a for a, b in zip(marks[1:], marks[2:])]


def engine(machine: Engine, ids: list[int], rows: int, cfg: Config, rt: runtime.Runtime) -> tuple[float, list[float]]:
    """The same by the engine."""
    sampling = Sampling(temperature=cfg.temperature, top_k=cfg.top_k, max_tokens=cfg.decode_tokens, stop_tokens=())
    marks = [now(rt, cfg)]
    machine.submit(ids, sampling, rows)
    while machine.busy:
        machine.step()
        marks.append(now(rt, cfg))
    return marks[1] - marks[0], [b - a for a, b in zip(marks[1:], marks[2:])]


def now(rt: runtime.Runtime, cfg: Config) -> float:
    """A clock that reads true on a device that works ahead."""
    rt.synchronize()
    return time.process_time() if cfg.clock == "cpu" else time.perf_counter()


def bandwidth(rt: runtime.Runtime, cfg: Config) -> float:
    """Bytes/s that a large copy reads and writes here, best of five."""
    size = 1 << (26 if rt.device.type == "cpu" else 30)
    source = torch.ones(size // 4, device=rt.device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        begin = now(rt, cfg)
        target.copy_(source)
        seconds.append(now(rt, cfg) - begin)
    return 2 * size / min(seconds)


def summary(runs: list[tuple[float, list[float]]], rows: int) -> dict:
    """Several runs of one batch size -> the best of them."""
    total = min(first + sum(steps) for first, steps in runs)
    steps = [step for _, steps in runs for step in steps]
    return {
        "first_token_s": min(first for first, _ in runs),
        "step_ms": 1e3 * statistics.median(steps),
        "best_step_ms": 1e3 * statistics.quantiles(steps, n=10)[0],
        "tokens_per_s": rows * (len(runs[0][1]) + 1) / total,
    }


def measure(model, tokenizer, rows: int, cfg: Config, rt: runtime.Runtime, speed: float) -> dict:
    """One batch size: engine and naive loop in turns."""
    ids = torch.randint(256, (cfg.prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    runs, loops, machine = [], [], Engine(model, tokenizer, slots=rows, frozen=True)
    for repeat in range(cfg.repeats + 1):  # the first warms up
        run = engine(machine, ids, rows, cfg, rt)
        loop = naive(model, ids, rows, cfg, rt) if cfg.naive else None
        if repeat:
            runs.append(run)
            loops.append(loop)
    result = {"rows": rows, **summary(runs, rows)}
    size = model.lm_head.weight.element_size()
    kv = cost.kv_bytes_read(model.config, cfg.prompt_tokens + cfg.decode_tokens // 2, size)
    result["bytes_per_step"] = cost.weights_bytes_read(model.config, size) + rows * kv
    result["floor_share"] = result["bytes_per_step"] / speed / (result["step_ms"] / 1e3)
    if cfg.naive:
        result["naive"] = summary(loops, rows)
        result["ratio"] = result["tokens_per_s"] / result["naive"]["tokens_per_s"]
    return result


def main(cfg: Config) -> dict:
    """Measure every batch size; returns what the JSON line says."""
    refuse(
        [f"--{n.replace('_', '-')}={getattr(cfg, n)} must be 2 or more." for n in ("prompt_tokens", "decode_tokens")
         if getattr(cfg, n) < 2]
        + ([] if cfg.rows() and min(cfg.rows()) > 0 else [f"--batch-sizes={cfg.batch_sizes} names no batch size."])
        + ([] if cfg.clock in ("wall", "cpu") else [f"--clock={cfg.clock} is unknown: use wall or cpu."])
        + ([] if cfg.repeats > 0 else [f"--repeats={cfg.repeats} must be 1 or more."])
    )  # fmt: skip
    rt = runtime.start(cfg.device_type)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model, tokenizer = load(cfg, rt)
    speed = bandwidth(rt, cfg)
    result = {
        "device": hardware.device_name(rt.device),
        "dtype": str(model.lm_head.weight.dtype),
        "threads": torch.get_num_threads(),
        "parameters": cost.parameters(model.config)["total"],
        "copy_bytes_per_s": speed,
        "batches": [],
    }
    print(f"{result['device']}, {result['dtype']}, {result['threads']} threads, copies {speed / 1e9:.1f} GB/s")
    print("rows  first token s  step ms (median, best tenth)  tokens/s  of floor  naive tokens/s  ratio")
    for rows in cfg.rows():
        batch = measure(model, tokenizer, rows, cfg, rt, speed)
        result["batches"].append(batch)
        other = f"{batch['naive']['tokens_per_s']:14.0f}  {batch['ratio']:5.2f}" if cfg.naive else ""
        print(
            f"{rows:4d}  {batch['first_token_s']:13.4f}  {batch['step_ms']:15.2f} {batch['best_step_ms']:12.2f}  "
            f"{batch['tokens_per_s']:8.0f}  {batch['floor_share']:8.0%}  {other}",
            flush=True,
        )
    print(json.dumps(result, allow_nan=False))
    return result


if __name__ == "__main__":
    cli.run(main, Config)
