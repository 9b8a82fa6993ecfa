"""From one dial, the depth, to everything a pretraining run needs: a frozen `Plan`.

Each law names where it comes from, and its constants stand here and nowhere else. "Published" is nanochat of July 2026,
tuned at depth 12 with batches of 2^19 tokens; a law is anchored there: N_REF is that model's scaling parameters (block
matrices and head, built with this run's own vocabulary, aspect ratio and head dimension), D_REF = ratio * N_REF.

The horizon is the first that is given of `num_iterations`, `target_flops`, `target_param_data_ratio`; batch, learning
rates and decay follow the horizon that is really used, never one that was overruled.
"""

import dataclasses
import math

from nanochat import cost, hardware, schedule
from nanochat.errors import UserError, refuse
from nanochat.gpt import GPTConfig

REF_DEPTH, DEFAULT_RATIO = 12, 10.5
B_REF = 2**19  # tokens a step at which the learning rates were tuned, published
BATCH_EXPONENT = 0.383  # best batch ~ tokens^0.383: "Power Lines", arXiv 2505.13738
SMALL_BATCH = 2**18  # below it sqrt(B/B_REF) starves the run; the laws below are ours
SMALL_LR_EXPONENT = 0.1  # lr ~ B^0.1 there: 0.5 at 8,192 tokens, 4 times the root law; the published code itself gains
# 0.16 bpb at 8,192 from 4 times its rates (measured, depth 4, 300 steps)
SHORT_RUN = 1000  # updates; a run of fewer, with batches under SMALL_BATCH, wants higher rates
SHORT_LR_EXPONENT = 0.32  # best lr ~ horizon^-0.32: arXiv 2409.19913. Ours (depth 4, 128 wide, 8,192 tokens an
# update of real text), bpb after 100: all rates x 1 2.058, matrix x 2 2.038, matrix and tables and head x 2 2.020
WARMUP_STEPS = 40  # published, for batches of 2^18 and more
SMALL_WARMUP_EXPONENT = 0.4  # 10 steps at 8,192 tokens
WIDTH_REF = 768  # AdamW rates go with width^-0.5, relative to this one: published
VALUE_EMBEDDING_LR = 0.5  # times the embedding rate: published
RESID_LR = 0.01  # times scalar_lr: published
SMEAR_BACKOUT_LR = 0.2  # fixed, scaled by nothing: published


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run decided. JSON-able with `dataclasses.asdict`; printed, recorded and stored in each checkpoint."""

    config: GPTConfig
    parameters: dict[str, int]  # by role, with "total" and "scaling"
    flops_per_token: float
    horizon: str  # which of the three set the length
    iterations: int  # updates
    tokens: int  # iterations * batch
    batch: int  # tokens an update, over all ranks
    device_batch_size: int  # rows of a micro-batch on one rank
    accum: int  # micro-batches an update on one rank
    world: int
    lr_mult: float  # what the batch law multiplies the learning rates by; the scalars follow `root_law`
    short_mult: float  # and what the law of short runs does
    lrs: dict[str, float]  # peak learning rate by role, all multipliers in
    weight_decay: float  # Muon's peak
    warmup_steps: int
    warmdown_ratio: float
    final_lr_frac: float
    flops: float  # of the whole run
    ratio: float  # tokens per scaling parameter, as really trained
    notes: tuple[str, ...] = ()  # what was adjusted, and why: one sentence each


def shape(depth: int, *, vocab_size: int, aspect_ratio: int = 64, head_dim: int = 128, n_kv_head: int | None = None,
          sequence_len: int = 2048, window_pattern: str = "SSSL") -> GPTConfig:  # fmt: skip
    """The model at this depth: width is depth * aspect_ratio rounded up to whole heads."""
    heads = -(-depth * aspect_ratio // head_dim)
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=heads,
        n_kv_head=heads if n_kv_head is None else n_kv_head,
        n_embd=heads * head_dim,
        window_pattern=window_pattern,
    )


def best_batch(tokens: float, reference_tokens: float) -> int:
    """The power of two nearest to B_REF * (D / D_REF)^0.383."""
    return 2 ** round(math.log2(B_REF * (tokens / reference_tokens) ** BATCH_EXPONENT))


def best_batch_for_steps(iterations: int, reference_tokens: float) -> int:
    """The same law when the number of updates is given, so that D = iterations * B: solved for B."""
    log2 = (math.log2(B_REF) + BATCH_EXPONENT * math.log2(iterations / reference_tokens)) / (1 - BATCH_EXPONENT)
    return 2 ** max(round(log2), 0)


def root_law(batch: int) -> float:
    """sqrt(B / B_REF): published for all rates; for the scalars it is right at small batches and in short runs too.

    Real text, depth 4, 300 updates of 8,192 tokens: published measure 1.7428 with the scalars by this law, 1.7614
    with the laws below for them as well.
    """
    return math.sqrt(batch / B_REF)


def lr_multiplier(batch: int) -> float:
    """sqrt(B / B_REF) for batches of 2^18 tokens and more (published), B^0.1 below, continuous where they meet."""
    if batch >= SMALL_BATCH:
        return root_law(batch)
    return root_law(SMALL_BATCH) * (batch / SMALL_BATCH) ** SMALL_LR_EXPONENT


def short_run_multiplier(batch: int, iterations: int) -> float:
    """How much higher the rates are in a run of few updates: (1000/n)^0.32, bounded by the like of 2^18/B.

    So it is 1 for 1,000 updates and more, and for batches of 2^18 tokens and more, and continuous where it begins.
    """
    return max(min(SMALL_BATCH / batch, SHORT_RUN / iterations), 1.0) ** SHORT_LR_EXPONENT


def scaled_weight_decay(weight_decay: float, batch: int, tokens: float, reference_tokens: float) -> float:
    """wd * (B/B_REF) / lr_mult * D_REF/D: the same decay over a run whatever its batch and learning rate.

    Equals the published wd * sqrt(B/B_REF) * D_REF/D where lr_mult is the root law; follows the constant time scale
    of decayed weights in arXiv 2405.13698.
    """
    return weight_decay * (batch / B_REF) / lr_multiplier(batch) * reference_tokens / tokens


def warmup_law(batch: int) -> int:
    """40 updates at 2^18 tokens and more (published), fewer below: a small batch has less to wait for."""
    return max(round(WARMUP_STEPS * min(batch / SMALL_BATCH, 1.0) ** SMALL_WARMUP_EXPONENT), 1)


def learning_rates(config: GPTConfig, lr_mult: float = 1.0, scalar_mult: float | None = None, *,
                   embedding_lr: float = 0.3, unembedding_lr: float = 0.008, matrix_lr: float = 0.02,
                   scalar_lr: float = 0.5) -> dict[str, float]:  # fmt: skip
    """Peak learning rate of each role of `GPT.roles()`; also what fine-tuning starts from.

    scalar_mult: what multiplies the rates of the residual stream's scalars; None: lr_mult.
    """
    width, scalar_mult = (config.n_embd / WIDTH_REF) ** -0.5, lr_mult if scalar_mult is None else scalar_mult
    return {
        "matrix": matrix_lr * lr_mult,
        "embedding": embedding_lr * width * lr_mult,
        "value_embedding": VALUE_EMBEDDING_LR * embedding_lr * width * lr_mult,
        "head": unembedding_lr * width * lr_mult,
        "resid": RESID_LR * scalar_lr * scalar_mult,
        "x0": scalar_lr * scalar_mult,
        "smear_backout": SMEAR_BACKOUT_LR,
    }


MOST_ROWS = 64  # of a micro-batch: more gain nothing, and a batch must be divided


def fitting_rows(config: GPTConfig, bytes_free: float | None, **options) -> int:
    """Rows of a micro-batch for --device-batch-size=auto: the most that fit (0: none), 32 where memory is unknown.

    options: those of cost.memory.
    """
    if bytes_free is None:
        return 32
    return min(cost.largest_rows(config, int(bytes_free), **options), MOST_ROWS)


def auto_rows(config: GPTConfig, runtime, **options) -> int:
    """Rows of a micro-batch that fit this run's devices (runtime: nanochat.runtime.Runtime); none is a UserError.

    options: shard and recompute of cost.memory.
    On a CPU the ranks share the machine's memory. The same on every rank: the smallest of their answers.
    """
    total = hardware.total_memory(runtime.device)
    shared = runtime.world if runtime.device.type == "cpu" else 1
    rows = fitting_rows(config, total and total * hardware.USABLE / shared, world=runtime.world,
                        bytes_per_value=runtime.dtype.itemsize, device=runtime.device.type, **options)  # fmt: skip
    rows = -runtime.max(-rows)
    if rows == 0:
        raise UserError(
            "Not even one row of this model fits the device's memory by the estimate: choose a smaller --depth or "
            "--max-seq-len, or try --device-batch-size=1."
        )
    return rows


def divide(batch: int, rows: int, sequence_len: int, world: int) -> tuple[int, int]:
    """Rows of a micro-batch (at most `rows`) and micro-batches an update, that come nearest to `batch` tokens."""
    wanted = batch / (sequence_len * world)  # rows an update on one rank
    accum = max(math.ceil(wanted / rows), 1)
    return max(round(wanted / accum), 1), accum


def nearest_batch(batch: int, rows: int, sequence_len: int, world: int) -> int:
    """The multiple of one global micro-batch that is nearest to `batch`, at least one."""
    unit = rows * sequence_len * world
    return max(round(batch / unit), 1) * unit


FLAGS = {"sequence_len": "--max-seq-len", "world": "the number of ranks, "}  # where the flag is named otherwise


def problems_with(values: dict) -> list[str]:
    """What is wrong with the arguments of `plan`, a sentence each."""
    found = []
    flag = lambda name: FLAGS.get(name, "--" + name.replace("_", "-"))
    whole = ("depth", "vocab_size", "aspect_ratio", "head_dim", "sequence_len", "device_batch_size", "world")
    optional = ("n_kv_head", "num_iterations", "target_flops", "total_batch_size")
    for name in (*whole, *(n for n in optional if values[n] is not None)):
        if not values[name] > 0:
            found.append(f"{flag(name)}={values[name]} must be at least 1.")
    for name in ("target_flops", "target_param_data_ratio"):
        if values[name] == math.inf:
            found.append(f"{flag(name)}=inf must be finite: a run has an end.")
    if values["sequence_len"] == 1:
        found.append("--max-seq-len=1 must be at least 2: the engine needs a place for what follows.")
    if not found and values["head_dim"] % 2:
        found.append(f"--head-dim={values['head_dim']} must be even: rotary positions turn pairs of channels.")
    overruled = values["num_iterations"] is not None or values["target_flops"] is not None
    if not (overruled or values["target_param_data_ratio"] > 0):
        found.append(f"--target-param-data-ratio={values['target_param_data_ratio']} must be above 0.")
    for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay"):
        if not (values[name] >= 0 and math.isfinite(values[name])):
            found.append(f"{flag(name)}={values[name]} must be a finite number, 0 or more.")
    for name in ("warmdown_ratio", "final_lr_frac"):
        if not 0 <= values[name] <= 1:
            found.append(f"{flag(name)}={values[name]} must lie in 0..1.")
    if values["warmup_steps"] is not None and values["warmup_steps"] < 0:
        found.append(f"--warmup-steps={values['warmup_steps']} must be 0 or more.")
    return found


def settle_batch(wanted: int, given: bool, rows: int, sequence_len: int, world: int) -> tuple[int, int, int, list[str]]:
    """Batch in tokens, rows, micro-batches an update, notes. A given batch must divide; an automatic one is fitted."""
    unit = rows * sequence_len * world
    if wanted % unit == 0:
        return wanted, rows, wanted // unit, []
    fitted_rows, accum = divide(wanted, rows, sequence_len, world)
    batch = fitted_rows * accum * sequence_len * world
    if given:
        other = f", or --device-batch-size={fitted_rows}" if batch == wanted else ""
        raise UserError(
            f"--total-batch-size={wanted} is not a multiple of {unit} tokens ({rows} rows x {sequence_len} x {world} "
            f"ranks): the nearest one that divides is {nearest_batch(wanted, rows, sequence_len, world)}{other}."
        )
    note = (
        f"device batch size {fitted_rows} instead of {rows}, so that {world} rank(s) share a batch of {batch:,} tokens"
    )
    if batch != wanted:
        note += f" (the law asks for {wanted:,})"
    return batch, fitted_rows, accum, [note + "."] if (fitted_rows, batch) != (rows, wanted) else []


def settle_warmup(given: int | None, batch: int, iterations: int, warmdown_ratio: float) -> tuple[int, list[str]]:
    """Warm-up updates and notes: the law's, at most what lies before the warm-down; a given number as it is."""
    room = max(iterations - schedule.warmdown_steps(iterations, warmdown_ratio), 1)
    if given is None:
        return min(warmup_law(batch), room), []
    late = (
        f"the warm-up of {given} updates is longer than the {room} before the warm-down: the peak rate is not reached."
    )
    return given, [late] if given > room else []


def horizon(num_iterations, target_flops, ratio, flops_per_token, n) -> tuple[str, float | None]:
    """Which of the three sets the length of the run, and its tokens (None: iterations * batch, once that is known)."""
    if num_iterations is not None:
        return "num_iterations", None
    if target_flops is not None:
        return "target_flops", target_flops / flops_per_token
    return "target_param_data_ratio", ratio * n


def length(name: str, tokens: float, batch: int) -> int:
    """Updates: the published code rounds for a FLOP budget and rounds down for a ratio."""
    return round(tokens / batch) if name == "target_flops" else int(tokens // batch)


def plan(depth: int = 20, *, vocab_size: int, aspect_ratio: int = 64, head_dim: int = 128,
         n_kv_head: int | None = None, sequence_len: int = 2048, window_pattern: str = "SSSL",
         num_iterations: int | None = None, target_flops: float | None = None, target_param_data_ratio: float = 10.5,
         total_batch_size: int | None = None, device_batch_size: int = 32, world: int = 1, embedding_lr: float = 0.3,
         unembedding_lr: float = 0.008, matrix_lr: float = 0.02, scalar_lr: float = 0.5, weight_decay: float = 0.28,
         warmup_steps: int | None = None, warmdown_ratio: float = 0.65, final_lr_frac: float = 0.05
         ) -> Plan:  # fmt: skip
    """Turn the dial and its overrides into a Plan; every argument that makes no sense is listed in one UserError."""
    refuse(problems_with(dict(locals())))
    family = dict(vocab_size=vocab_size, aspect_ratio=aspect_ratio, head_dim=head_dim, sequence_len=sequence_len,
                  window_pattern=window_pattern)  # fmt: skip
    config = shape(depth, **family, n_kv_head=n_kv_head)
    counts, flops_per_token = cost.parameters(config), cost.flops_per_token(config)
    ratio = target_param_data_ratio if target_param_data_ratio > 0 else DEFAULT_RATIO  # it may be overruled and 0
    reference_tokens = ratio * cost.parameters(shape(REF_DEPTH, **family))["scaling"]

    name, tokens = horizon(num_iterations, target_flops, ratio, flops_per_token, counts["scaling"])
    if tokens is None:
        wanted = best_batch_for_steps(num_iterations, reference_tokens)
    else:
        wanted = best_batch(tokens, reference_tokens)
    given = total_batch_size is not None
    batch, rows, accum, notes = settle_batch(total_batch_size if given else wanted, given, device_batch_size,
                                             sequence_len, world)  # fmt: skip
    iterations = num_iterations if tokens is None else length(name, tokens, batch)
    if iterations < 1:
        iterations, tokens = 1, None
        notes.append(f"the horizon is shorter than one batch of {batch:,} tokens: the run has 1 update.")
    warmup, more = settle_warmup(warmup_steps, batch, iterations, warmdown_ratio)
    lr_mult, short_mult = lr_multiplier(batch), short_run_multiplier(batch, iterations)
    rates = dict(embedding_lr=embedding_lr, unembedding_lr=unembedding_lr, matrix_lr=matrix_lr, scalar_lr=scalar_lr)
    return Plan(
        config=config, parameters=counts, flops_per_token=flops_per_token, horizon=name, iterations=iterations,
        tokens=iterations * batch, batch=batch, device_batch_size=rows, accum=accum, world=world, lr_mult=lr_mult,
        short_mult=short_mult, lrs=learning_rates(config, lr_mult * short_mult, root_law(batch), **rates),
        weight_decay=scaled_weight_decay(weight_decay, batch, tokens or iterations * batch, reference_tokens),
        warmup_steps=warmup, warmdown_ratio=warmdown_ratio, final_lr_frac=final_lr_frac,
        flops=float(iterations) * batch * flops_per_token,
        ratio=iterations * batch / counts["scaling"], notes=tuple(notes + more),
    )  # fmt: skip
