"""How fast the engine generates, over numbers of rows: first token, step, tokens/s; beside it what could be, what is.

    python -m scripts.infer_bench                                   # the shape of the baseline: depth 4, width 256
    python -m scripts.infer_bench -i sft --batch-sizes 1,8,32 -k 50 # a trained model
    python -m scripts.infer_bench --depth 20 --head-dim 128 --vocab-size 32768 --sequence-len 2048 --prompt-tokens 1024

Two kinds of load, each with `rows` sequences: "samples", all of one prompt (they share its keys and values), and
"clients", each with a prompt of its own. In the same run, in turns with the engine, best of `--repeats`:

    naive   GPT.generate_naive's way, a whole forward a token (a few tokens of it are timed, at half the length)
    hf      Hugging Face `generate` of a Llama with as many parameters in its blocks, random weights
    floor   the parts of a step that cannot be left out, measured here: the products, attention over keys and values
            that lie side by side, the draw. `of floor` is their time by the median step's
    bytes   what a step must read (weights once, keys and values of every row), by the bandwidth of a copy here

On a GPU `--eager` also measures decoding without CUDA graphs. Quote ratios from a busy machine. Reference, published
engine, 2-core x86 CPU, prompt 128, 128 new tokens, temperature 1, top-k 50: 417, 1,630 and 2,796 tokens/s at 1, 8 and
32 rows (one thread: 370, 1,148, 2,080). The last line of the output is one JSON document; --out writes it to a file.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated

import torch
import tyro
from torch.nn import functional as F

from nanochat import attention, checkpoint, cli, cost, hardware, paths, runtime
from nanochat.decode import Runner
from nanochat.engine import Engine
from nanochat.errors import refuse
from nanochat.gpt import GPT, GPTConfig
from nanochat.sampling import Knobs, Sampling, sample
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
    guesses: int = 4  # tokens guessed ahead by speculation, at most; 0: none
    int8: bool = False  # 8-bit weights (CPU)
    repeats: int = 3
    clock: str = "wall"  # or cpu: seconds of this process alone, for a busy machine (with --threads=1)
    threads: int = 0  # of torch on a CPU; 0: as torch chooses
    naive: bool = True  # time the naive way too
    hf: bool = True  # time Hugging Face generate too, where transformers is installed
    eager: bool = False  # on a GPU: also without CUDA graphs
    out: str = ""  # a file for the JSON document
    device_type: str = ""

    def rows(self) -> list[int]:
        """The batch sizes."""
        return [int(part) for part in self.batch_sizes.split(",") if part.strip().isdigit()]

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, max_tokens=self.decode_tokens, stop_tokens=(), seed=1
        )


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


class Clock:
    """A clock that reads true on a device that works ahead."""

    def __init__(self, rt: runtime.Runtime, cfg: Config):
        self.rt, self.read = rt, time.process_time if cfg.clock == "cpu" else time.perf_counter

    def __call__(self) -> float:
        self.rt.synchronize()
        return self.read()

    def best(self, work, times: int) -> float:
        """Seconds of the fastest of so many calls."""
        seconds = []
        for _ in range(times):
            begin = self()
            work()
            seconds.append(self() - begin)
        return min(seconds)


def prompts(cfg: Config, count: int) -> list[list[int]]:
    """Random prompts, the same in every run."""
    random = torch.Generator().manual_seed(0)
    return [torch.randint(256, (cfg.prompt_tokens,), generator=random).tolist() for _ in range(count)]


def engine_run(machine: Engine, load: str, rows: int, cfg: Config, clock: Clock) -> tuple[float, list[float], int]:
    """Seconds to the step with the last first token, seconds of each later step, tokens in all."""
    machine.cache.flush()  # every run reads its prompts
    begin, first, steps, tokens = clock(), None, [], 0
    if load == "samples":
        sequences = machine.submit(prompts(cfg, 1)[0], cfg.sampling(), rows)
    else:
        sequences = [machine.submit(ids, cfg.sampling())[0] for ids in prompts(cfg, rows)]
    while machine.busy:
        tokens += len(machine.step())
        now = clock()
        if first is None and all(sequence.tokens for sequence in sequences):
            first = now - begin
        elif first is not None:
            steps.append(now - begin - first - sum(steps))
    return first, steps, tokens


def summary(runs: list[tuple[float, list[float], int]]) -> dict:
    """Several runs -> the best of them, and how long a row waits for a token."""
    total = min(first + sum(steps) for first, steps, _ in runs)
    steps = sorted(step for _, steps, _ in runs for step in steps)
    return {
        "first_token_s": min(first for first, _, _ in runs),
        "step_ms": 1e3 * statistics.median(steps),
        "best_step_ms": 1e3 * steps[len(steps) // 10],
        "p99_step_ms": 1e3 * steps[len(steps) * 99 // 100],
        "tokens_per_s": runs[0][2] / total,
    }


@torch.inference_mode()
def naive_tokens_per_s(model: GPT, rows: int, cfg: Config, clock: Clock) -> float:
    """Whole forwards over rows of half the final length, and a draw."""
    length = cfg.prompt_tokens + cfg.decode_tokens // 2
    ids = torch.randint(256, (rows, length), device=model.lm_head.weight.device)
    return rows / clock.best(lambda: torch.multinomial(model(ids, last_only=True)[:, -1].softmax(-1), 1).tolist(), 3)


def llama(cfg: Config, rt: runtime.Runtime, model: GPT):
    """A Llama of the same width, depth, heads and vocabulary, its MLP as large as ours; None without transformers."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    ours = model.config
    shape = transformers.LlamaConfig(
        vocab_size=ours.padded_vocab, hidden_size=ours.n_embd, num_hidden_layers=ours.n_layer,
        num_attention_heads=ours.n_head, num_key_value_heads=ours.n_kv_head, intermediate_size=8 * ours.n_embd // 3,
        max_position_embeddings=ours.sequence_len, tie_word_embeddings=False, bos_token_id=0, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(shape).to(device=rt.device, dtype=model.lm_head.weight.dtype).eval()


@torch.inference_mode()
def hf_tokens_per_s(other, rows: int, cfg: Config, clock: Clock) -> float:
    """Hugging Face generate on prompts of their own."""
    ids = torch.tensor(prompts(cfg, rows), device=other.device)
    how = {"do_sample": True, "temperature": cfg.temperature, "top_k": cfg.top_k} if cfg.temperature else {}
    new = {"max_new_tokens": cfg.decode_tokens, "min_new_tokens": cfg.decode_tokens}
    mask = torch.ones_like(ids)
    return rows * cfg.decode_tokens / clock.best(lambda: other.generate(ids, attention_mask=mask, **how, **new), 2)


@torch.inference_mode()
def floor_ms(machine: Engine, rows: int, cfg: Config, clock: Clock) -> dict[str, float]:
    """Milliseconds of a step's products, of attention at half the length, and of the draw, each alone."""
    runner, config = Runner(machine.model, cfg.int8), machine.model.config
    runner.refresh()
    length = cfg.prompt_tokens + cfg.decode_tokens // 2
    new = {"dtype": runner.dtype, "device": runner.device}
    x, wide = torch.randn(rows, config.n_embd, **new), torch.randn(rows, 4 * config.n_embd, **new)
    q = torch.randn(rows, config.n_kv_head, config.n_head // config.n_kv_head, config.head_dim, **new)
    spans = [min(window + 1, length) for window in config.windows()]
    memory = [torch.randn(2, rows, config.n_kv_head, span, config.head_dim, **new) for span in spans]
    logits = torch.randn(rows, config.vocab_size, device=runner.device)
    knobs, u = Knobs([cfg.sampling()] * rows, runner.device), torch.rand(rows, device=runner.device)

    def products():
        for layer in runner.layers:
            layer.qkv(x), layer.out(x), layer.up(x), layer.down(wide)
        runner.head(x)

    def attend():
        for keys, values in memory:
            F.scaled_dot_product_attention(q, keys, values)

    parts = {"products": products, "attention": attend, "draw": lambda: sample(logits, knobs, u).tolist()}
    return {name: 1e3 * clock.best(work, 30) for name, work in parts.items()}


def bandwidth(rt: runtime.Runtime, clock: Clock) -> float:
    """Bytes/s that a large copy reads and writes here, best of five."""
    size = 1 << (26 if rt.device.type == "cpu" else 30)
    source = torch.ones(size // 4, device=rt.device)
    target = torch.empty_like(source)
    return 2 * size / clock.best(lambda: target.copy_(source), 5)


def measure(model, tokenizer, rows: int, cfg: Config, clock: Clock, speed: float, other) -> dict:
    """One batch size: the engine under both loads, in turns with the others."""
    kinds = {"graphs": None, "eager": False} if cfg.eager else {"graphs": None}
    kw = {"slots": rows, "frozen": True, "guesses": cfg.guesses, "int8": cfg.int8, "tools": False}
    result = {"rows": rows}
    for name, graphs in kinds.items():
        machine = Engine(model, tokenizer, graphs=graphs, **kw)
        for load in ("samples", "clients")[: 1 if rows == 1 else 2]:
            runs = [engine_run(machine, load, rows, cfg, clock) for _ in range(cfg.repeats + 1)][1:]  # first: warm up
            result[load if name == "graphs" else f"{load}_eager"] = summary(runs)
    result["floor_ms"] = floor_ms(machine, rows, cfg, clock)
    size = model.lm_head.weight.element_size()
    kv = cost.kv_bytes_read(model.config, cfg.prompt_tokens + cfg.decode_tokens // 2, size)
    weights = cost.weights_bytes_read(model.config, 1 if cfg.int8 else size)
    result["bytes_per_step"] = weights + rows * kv
    for load in ("samples", "clients"):
        if load in result:
            of = result[load]
            of["of_floor"] = sum(result["floor_ms"].values()) / of["step_ms"]
            of["of_bandwidth"] = result["bytes_per_step"] / speed / (of["step_ms"] / 1e3)
    if cfg.naive:
        result["naive_tokens_per_s"] = naive_tokens_per_s(model, rows, cfg, clock)
    if other is not None:
        result["hf_tokens_per_s"] = hf_tokens_per_s(other, rows, cfg, clock)
    return result


def lines(batch: dict) -> list[str]:
    """A batch size as rows of the table."""
    out = []
    for load in ("samples", "samples_eager", "clients", "clients_eager"):
        if load in batch:
            of = batch[load]
            shares = "".join(f"{of[key]:7.0%}" if key in of else "      -" for key in ("of_floor", "of_bandwidth"))
            times = [
                f"{of['tokens_per_s'] / batch[key]:8.2f}" if key in batch else "       -"
                for key in ("naive_tokens_per_s", "hf_tokens_per_s")
            ]
            out.append(
                f"{batch['rows']:4d}  {load:14s} {1e3 * of['first_token_s']:9.1f} {of['step_ms']:8.2f} "
                f"{of['p99_step_ms']:8.2f} {of['tokens_per_s']:9.0f} {shares} {''.join(times)}"
            )
    return out


def check(cfg: Config) -> None:
    """Refuse what cannot be measured."""
    refuse(
        [f"--{n.replace('_', '-')}={getattr(cfg, n)} must be 2 or more." for n in ("prompt_tokens", "decode_tokens")
         if getattr(cfg, n) < 2]
        + ([] if cfg.rows() and min(cfg.rows()) > 0 else [f"--batch-sizes={cfg.batch_sizes} names no batch size."])
        + ([] if cfg.clock in ("wall", "cpu") else [f"--clock={cfg.clock} is unknown: use wall or cpu."])
        + ([] if cfg.repeats > 0 else [f"--repeats={cfg.repeats} must be 1 or more."])
    )  # fmt: skip


def main(cfg: Config) -> dict:
    """Measure every batch size; returns what the JSON line says."""
    check(cfg)
    rt = runtime.start(cfg.device_type)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model, tokenizer = load(cfg, rt)
    clock = Clock(rt, cfg)
    speed, other = bandwidth(rt, clock), llama(cfg, rt, model) if cfg.hf else None
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m scripts.infer_bench", *sys.argv[1:]]),
        "device": f"{hardware.device_name(rt.device)} ({platform.machine()})",
        "torch": torch.__version__,
        "dtype": str(model.lm_head.weight.dtype),
        "threads": torch.get_num_threads(),
        "config": asdict(cfg),
        "parameters": cost.parameters(model.config)["total"],
        "llama_parameters": None if other is None else sum(p.numel() for p in other.parameters()),
        "copy_bytes_per_s": speed,
        "batches": [],
    }
    print(f"{result['device']}, {result['dtype']}, {result['threads']} threads, copies {speed / 1e9:.1f} GB/s")
    print("rows  load           first ms  step ms   p99 ms  tokens/s  floor  bytes   x naive    x hf")
    for rows in cfg.rows():
        batch = measure(model, tokenizer, rows, cfg, clock, speed, other)
        result["batches"].append(batch)
        print("\n".join(lines(batch)), flush=True)
        print("      floor ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in batch["floor_ms"].items()))
    document = json.dumps(result, allow_nan=False)
    if cfg.out:
        with paths.atomic_write(cfg.out, "w") as file:
            file.write(document + "\n")
    print(document)
    return result


if __name__ == "__main__":
    cli.run(main, Config)
