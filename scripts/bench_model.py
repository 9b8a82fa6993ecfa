"""How fast the model trains here: tokens/s plain, as training runs it, and by part, against twins in the same run.

python -m scripts.bench_model                                    # the depth-4 model of dev/bench on CPU, about a minute
python -m scripts.bench_model --depth=12 --head-dim=128 --window-pattern=SSSL --sequence-len=2048 --vocab-size=32768

Everything compared is measured in turns and the best of the turns counts, so that a noisy machine disturbs both alike.
The last line is one JSON document.
"""

import dataclasses
import json
import time
from collections.abc import Callable

import torch

from nanochat import attention, cli, cost, hardware, runtime
from nanochat.errors import UserError
from nanochat.gpt import GPT, SOFTCAP, GPTConfig
from nanochat.kernels import loss


@dataclasses.dataclass(frozen=True)
class Config:
    depth: int = 4
    aspect_ratio: int = 64  # width = depth x aspect ratio, rounded up to whole heads
    head_dim: int = 64
    vocab_size: int = 8192
    sequence_len: int = 512  # tokens a row
    rows: int = 16  # rows a batch
    window_pattern: str = "L"
    attention: str = "auto"  # backend
    turns: int = 4  # each thing is timed so often; the best counts
    threads: int = 0  # CPU threads; 0: as torch chooses
    compile: bool = False  # also by torch.compile (training uses it on CUDA; on CPU compiling takes a minute or two)
    parts: bool = True  # also by part
    device_type: str = ""  # cuda, cpu, mps; empty: the best there is


def shape(cfg: Config) -> GPTConfig:
    """The model that the flags describe."""
    heads = -(-cfg.depth * cfg.aspect_ratio // cfg.head_dim)
    return GPTConfig(
        cfg.sequence_len, cfg.vocab_size, cfg.depth, heads, heads, heads * cfg.head_dim, cfg.window_pattern
    )


def best_seconds(things: dict[str, Callable[[], object]], rt: runtime.Runtime, turns: int) -> dict[str, float]:
    """Time the things in turns after one run each for warming up: {name: its best seconds}."""
    for thing in things.values():
        thing()
    seconds = {name: float("inf") for name in things}
    for _ in range(turns):
        for name, thing in things.items():
            rt.synchronize()
            began = time.perf_counter()
            thing()
            rt.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def training(forward: Callable, model: GPT, ids: torch.Tensor, targets: torch.Tensor) -> Callable:
    """A forward and backward of `forward(ids, targets)`, as a thing to time."""

    def step():
        for p in model.parameters():
            p.grad = None
        forward(ids, targets).backward()

    return step


def plainly(model: GPT) -> Callable:
    """The same model with the loss of all logits at once: what the chunked loss is compared with."""
    vocab = model.config.vocab_size

    def forward(ids, targets):
        return loss.plain(model.hidden(ids).flatten(0, 1), model.lm_head.weight, targets.flatten(), vocab, SOFTCAP)

    return forward


def parts(model: GPT, ids: torch.Tensor, targets: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward of the model's parts, eagerly, in the activations' dtype: attention, MLP, head, tables."""
    config, device, dtype = model.config, ids.device, model.compute_dtype
    draw = lambda *size: torch.randn(*ids.shape, *size, device=device).to(dtype).requires_grad_()
    q, k, v = (draw(config.n_head, config.head_dim) for _ in range(3))
    x, block = draw(config.n_embd), model.transformer.h[-1]
    flat, vocab = x.flatten(0, 1), config.vocab_size
    tables = [model.transformer.wte, *model.value_embeds.values()]

    def back(y):
        return torch.autograd.grad(y, [q, k, v] if y.shape == q.shape else x, torch.ones_like(y))

    return {
        "attention kernel, one layer": lambda: back(model.attend(q, k, v, config.windows()[-1])),
        "MLP, one layer": lambda: torch.autograd.grad(block.mlp(x).sum(), [x, *block.mlp.parameters()]),
        "head and loss, chunked": lambda: torch.autograd.grad(
            loss.linear_cross_entropy(flat, model.lm_head.weight, targets.flatten(), vocab, SOFTCAP), x),
        "head and loss, plain": lambda: torch.autograd.grad(
            loss.plain(flat, model.lm_head.weight, targets.flatten(), vocab, SOFTCAP), x),
        "all embedding tables": lambda: [
            torch.autograd.grad(table(ids, dtype).sum(), table.weight) for table in tables],
    }  # fmt: skip


def matmul(rt: runtime.Runtime, size: int = 2048) -> Callable[[], object]:
    """A square matmul of 2 size^3 FLOPs: the machine's speed, beside which the model's is judged."""
    a, b = (torch.randn(size, size, device=rt.device, dtype=rt.dtype) for _ in range(2))
    return lambda: a @ b


def main(cfg: Config) -> dict:
    """Measure and print; returns what it prints."""
    if cfg.rows < 1 or cfg.turns < 1 or cfg.depth < 1:
        raise UserError("--rows, --turns and --depth must each be at least 1.")
    # 1. runtime ------------------------------------------------------------------------------------------------------
    rt = runtime.start(cfg.device_type)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    backend = attention.choose(rt.device, rt.dtype, cfg.attention)
    # 2. model --------------------------------------------------------------------------------------------------------
    config = shape(cfg)
    with torch.device(rt.device):
        model = GPT(config, attend=backend.attend)
    model.init_weights(0)
    model.compute_dtype = rt.dtype
    ids, targets = torch.randint(config.vocab_size, (2, cfg.rows, cfg.sequence_len), device=rt.device)
    tokens = ids.numel()
    # 3. training steps -----------------------------------------------------------------------------------------------
    steps = {
        "plain": training(model, model, ids, targets),
        "plain, all logits at once": training(plainly(model), model, ids, targets),
    }
    compile_seconds = {}
    if rt.device.type == "cpu":
        steps["blocks by hand"] = training(model.by_hand(), model, ids, targets)
    for name, forward in (("compiled", model), ("compiled, all logits at once", plainly(model))) if cfg.compile else ():
        steps[name] = training(torch.compile(forward, dynamic=False), model, ids, targets)
        began = time.perf_counter()
        steps[name]()
        compile_seconds[name] = time.perf_counter() - began
    seconds = best_seconds(steps | {"matmul": matmul(rt)}, rt, cfg.turns)
    peak = 2 * 2048**3 / seconds.pop("matmul")
    flops = cost.flops_per_token(config) * tokens
    # 4. parts --------------------------------------------------------------------------------------------------------
    by_part = best_seconds(parts(model, ids, targets), rt, cfg.turns) if cfg.parts else {}
    # 5. summary ------------------------------------------------------------------------------------------------------
    summary = {
        "device": hardware.device_name(rt.device), "dtype": str(rt.dtype), "threads": torch.get_num_threads(),
        "attention": backend.name, "config": dataclasses.asdict(config), "tokens": tokens,
        "matmul_gflops": peak / 1e9,
        "tokens_per_second": {name: tokens / s for name, s in seconds.items()},
        "share_of_matmul_speed": {name: flops / s / peak for name, s in seconds.items()},
        "first_step_seconds": compile_seconds,
        "milliseconds_by_part": {name: 1000 * s for name, s in by_part.items()},
    }  # fmt: skip
    print(json.dumps(summary))
    runtime.stop(rt)
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
