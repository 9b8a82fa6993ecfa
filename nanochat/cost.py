"""What a GPT costs, in closed form: parameters, FLOPs, bytes read while decoding, and an estimate of training memory.

Counts are exact (a test counts a model built on the meta device); the memory estimate says what it is made of.
Formulas: Kaplan et al. (arXiv 2001.08361) for 6 FLOPs a parameter and token, PaLM (arXiv 2204.02311) appendix B for
attention's. Shape letters: C width, H heads, Hkv key/value heads, D head dim, V vocabulary, L layers, T positions, N
scaling parameters.
"""

from __future__ import annotations

from nanochat.gpt import SMEAR_CHANNELS, VE_GATE_CHANNELS, GPTConfig

LOSS_CHUNK = 1024  # rows of logits alive at a time: CHUNK of nanochat/kernels/loss.py
ROLES = ("matrix", "embedding", "value_embedding", "head", "resid", "x0", "smear_backout")


def _value_layers(config: GPTConfig) -> int:
    """How many layers have a value embedding: every other, the last included."""
    return (config.n_layer + 1) // 2


def parameters(config: GPTConfig) -> dict[str, int]:
    """Parameters by role (the names of GPT.roles), "total", and "scaling" = matrix + head: N of the scaling laws."""
    width, kv, layers, table = config.n_embd, config.kv_dim, config.n_layer, config.padded_vocab
    attention_and_mlp = 2 * width * width + 2 * width * kv + 8 * width * width
    gates = _value_layers(config) * config.n_kv_head * min(VE_GATE_CHANNELS, width)
    count = {
        "matrix": layers * attention_and_mlp + gates,
        "embedding": table * width,
        "value_embedding": _value_layers(config) * table * kv,
        "head": table * width,
        "resid": layers,
        "x0": layers,
        "smear_backout": min(SMEAR_CHANNELS, width) + 2,
    }
    return count | {"total": sum(count.values()), "scaling": count["matrix"] + count["head"]}


def _attended(config: GPTConfig, context: int | None = None) -> int:
    """Keys that a token at the end of the context sees, summed over layers: min(window, context) each."""
    return sum(min(window, context or config.sequence_len) for window in config.windows())


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs (forward and backward) a token: 6 a matmul parameter, 12 a head channel and key that is seen.

    Every token is charged the full window, as is usual and as published, though early tokens see fewer keys.
    """
    return 6 * parameters(config)["scaling"] + 12 * config.n_embd * _attended(config)


def decode_flops(config: GPTConfig, context: int) -> int:
    """FLOPs of generating one token behind `context` tokens: 2 a matmul parameter, 4 a head channel and key."""
    return 2 * parameters(config)["scaling"] + 4 * config.n_embd * _attended(config, context)


def kv_bytes_per_token(config: GPTConfig, bytes_per_value: int = 2) -> int:
    """Bytes that one token adds to a cache that keeps every layer's keys and values for the whole context."""
    return 2 * config.n_layer * config.kv_dim * bytes_per_value


def kv_bytes_read(config: GPTConfig, context: int, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values read to generate one token of one row: short windows read only their window."""
    return 2 * config.kv_dim * _attended(config, context) * bytes_per_value


def weights_bytes_read(config: GPTConfig, bytes_per_value: int = 2) -> int:
    """Bytes of weights read to generate one token (whatever the number of rows): matrices and head, one row a table."""
    rows = config.n_embd + _value_layers(config) * config.kv_dim
    return (parameters(config)["scaling"] + rows) * bytes_per_value


# What autograd keeps of a block, in values a token: so many widths, key/value widths and MLP widths; and outside the
# blocks, in widths. Measured: tests/test_cost.py counts the saved tensors of a real model.
KEPT_WIDTH, KEPT_KV, KEPT_MLP, KEPT_OUTSIDE = 8, 4, 2, 6


def activations(config: GPTConfig, rows: int, bytes_per_value: int = 2) -> int:
    """Bytes kept for the backward of `rows` rows of the whole context, without compilation, which keeps fewer."""
    block = KEPT_WIDTH * config.n_embd + KEPT_KV * config.kv_dim + KEPT_MLP * 4 * config.n_embd
    return rows * config.sequence_len * (config.n_layer * block + KEPT_OUTSIDE * config.n_embd) * bytes_per_value


def recomputation(config: GPTConfig, rows: int, bytes_per_value: int = 2) -> dict[str, int]:
    """What running each block again in the backward pass costs and saves.

    "flops": extra FLOPs a token, the blocks' forward. "saved": bytes that are not kept, all but each block's input and
    the inside of the one block at work.
    """
    forward = 2 * parameters(config)["matrix"] + 4 * config.n_embd * _attended(config)
    block = KEPT_WIDTH * config.n_embd + KEPT_KV * config.kv_dim + KEPT_MLP * 4 * config.n_embd
    kept = config.n_layer * (block - config.n_embd) - block
    return {"flops": forward, "saved": max(rows * config.sequence_len * kept * bytes_per_value, 0)}


def memory(config: GPTConfig, rows: int, *, world: int = 1, bytes_per_value: int = 2) -> dict[str, int]:
    """Bytes a device needs at the peak of a training step, by part, for `rows` rows of the whole context. An estimate.

    weights and gradients in fp32; casts: the matrices and the head once more in the activations' dtype; optimizer: two
    fp32 moments for AdamW, one and a half for Muon (a momentum, and work space), shared by `world` ranks; logits: one
    chunk of the loss, three times in fp32 and once in the activations' dtype.
    """
    count, tokens = parameters(config), rows * config.sequence_len
    adam, muon = count["total"] - count["matrix"], count["matrix"]
    part = {
        "weights": 4 * count["total"],
        "gradients": 4 * count["total"],
        "casts": bytes_per_value * count["scaling"] if bytes_per_value < 4 else 0,
        "optimizer": (8 * adam + 6 * muon) // world,
        "activations": activations(config, rows, bytes_per_value),
        "logits": min(LOSS_CHUNK, tokens) * config.padded_vocab * (3 * 4 + bytes_per_value),
    }
    return part | {"total": sum(part.values())}


def largest_rows(config: GPTConfig, bytes_free: int, *, world: int = 1, bytes_per_value: int = 2) -> int:
    """The largest power of two of rows whose estimated peak fits in `bytes_free`, or 0 when not even one row does."""
    rows = 0
    while memory(config, max(1, 2 * rows), world=world, bytes_per_value=bytes_per_value)["total"] <= bytes_free:
        rows = max(1, 2 * rows)
    return rows
