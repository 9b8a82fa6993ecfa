"""What a GPT costs, in closed form: parameters, FLOPs, bytes read while decoding, and an estimate of training memory.

Counts are exact (a test counts a model built on the meta device); the memory estimate says what it is made of.
Formulas: Kaplan et al. (arXiv 2001.08361) for 6 FLOPs a parameter and token, PaLM (arXiv 2204.02311) appendix B for
attention's. Shape letters: C width, H heads, Hkv key/value heads, D head dim, V vocabulary, L layers, T positions, N
scaling parameters.
"""

from __future__ import annotations

from nanochat.gpt import SMEAR_CHANNELS, VE_GATE_CHANNELS, GPTConfig

LOSS_CHUNK = (1024, 512)  # rows of logits alive at a time, GPU and CPU: CHUNK, CPU_CHUNK of nanochat/kernels/loss.py
CPU_PIECE = 2**21  # elements of matrices that Muon moves at once on a CPU: PIECE of nanochat/banks.py


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


# What is kept of a block for its backward, in values a token: so many widths, key/value widths and MLP widths; and
# outside the blocks, in widths. plain: autograd; compiled: torch.compile, which keeps fewer; by hand: kernels/cpu_block
# (keys and values are kept a query head). Counted: tests/test_cost.py counts the tensors of a real model.
KEPT = {"plain": (7.5, 3.5, 2, 6), "compiled": (7.5, 2.5, 2, 4), "by hand": (7, 0.5, 1, 6)}
FASTEST = {"cuda": "compiled", "cpu": "by hand", "mps": "plain"}  # what train.fastest chooses
STATS = 4  # bytes: norms' and attention's statistics, one a token, or a token and head, are fp32
# glibc can't reuse the hole of an aligned temporary for another of its size, and training keeps freed pages: on a CPU
# the blocks' holes are this share of the activations (measured; dev/bench/2026-11-28_memory.json has shapes that it was
# not chosen by), in 16 bits of fp32 ones. Since C makes the small operations by hand fp32 needs less:
# plans are up to 9 % above the peak.
HOLES = {"plain": 0.67, "by hand": 0.35}


def activations(config: GPTConfig, rows: int, bytes_per_value: int = 2, forward: str = "plain") -> int:
    """Bytes kept for the backward of `rows` rows of the whole context; forward: a key of KEPT."""
    width, kv, mlp, outside = KEPT[forward]
    block = width * config.n_embd + kv * config.kv_dim + mlp * 4 * config.n_embd
    stats = STATS * (2 + 2 * config.n_head + config.n_kv_head)
    token = bytes_per_value * (config.n_layer * block + outside * config.n_embd) + config.n_layer * stats
    return rows * int(config.sequence_len * token)


def recomputation(config: GPTConfig, rows: int, bytes_per_value: int = 2, forward: str = "plain") -> dict[str, int]:
    """What running each block again in the backward pass costs and saves.

    "flops": extra FLOPs a token, the blocks' forward. "saved": bytes that are not kept, all but each block's input and
    the inside of the one block at work.
    """
    again = 2 * parameters(config)["matrix"] + 4 * config.n_embd * _attended(config)
    width, kv, mlp, _ = KEPT[forward]
    block = width * config.n_embd + kv * config.kv_dim + mlp * 4 * config.n_embd
    kept = config.n_layer * (block - config.n_embd) - block
    return {"flops": again, "saved": max(int(rows * config.sequence_len * kept * bytes_per_value), 0)}


def largest_bank(config: GPTConfig) -> int:
    """Elements of the largest stack of block matrices of one shape."""
    width, layers = config.n_embd, config.n_layer
    square = layers * width * width * (4 if config.n_kv_head == config.n_head else 2)
    return max(square, 4 * layers * width * width)


def moved_at_once(config: GPTConfig, device: str, world: int) -> int:
    """Elements of matrices that Muon moves at once on a rank: its part of a stack; on a CPU a piece, or one matrix."""
    own = largest_bank(config) // world
    return min(own, max(CPU_PIECE, 4 * config.n_embd**2)) if device == "cpu" else own


# Bytes an element of what Muon moves at once for which the update needs room: direction, mask (1), mask as numbers and
# decayed direction; or, square and in fp32, two iterates and two Gram matrices of the polar step.
UPDATE_ROOM = {2: 13, 4: 16}


def memory(config: GPTConfig, rows: int, *, world: int = 1, bytes_per_value: int = 2, accum: int = 1,
           device: str = "cuda", forward: str = "",
           shard: str = "optimizer", recompute: bool = False) -> dict[str, int]:  # fmt: skip
    """Bytes a device needs at the peak of a training step, by part: the larger of `moments`, whose arguments it has."""
    both = moments(config, rows, world=world, bytes_per_value=bytes_per_value, accum=accum, device=device,
                   forward=forward, shard=shard, recompute=recompute)  # fmt: skip
    return max(both.values(), key=lambda parts: parts["total"])


def moments(config: GPTConfig, rows: int, *, world: int = 1, bytes_per_value: int = 2, accum: int = 1,
            device: str = "cuda", forward: str = "",
            shard: str = "optimizer", recompute: bool = False) -> dict[str, dict[str, int]]:  # fmt: skip
    """Bytes that the two moments of a training step need that can be its peak, by part, for `rows` whole rows.

    "backward": it begins, all activations are there, the head's gradient is being made. "update": all gradients are
    there, and the optimizer needs room.
    weights, gradients: fp32; matrices' gradients stay allocated, others come in the backward pass (with accum > 1 they
    are there in the next micro-batch). optimizer: two fp32 moments for AdamW, one for Muon, shared by `world` ranks.
    casts: the matrices once more in the activations' dtype. logits: what the loss needs beside the hidden states.
    holes: what the CPU's allocator can't reuse. room: what the moment itself needs beside all these.
    device: cuda, cpu or mps; forward: a key of KEPT, by default what training chooses there. shard, recompute: as
    base_train's flags; with "full" weights and gradients are shared too, and the largest tensor is gathered.
    """
    count, tokens = parameters(config), rows * config.sequence_len
    adam, muon = count["total"] - count["matrix"], count["matrix"]
    full = shard == "full" and world > 1
    share, gathered = (world, 8 * config.padded_vocab * config.n_embd) if full else (1, 0)
    lasting = {"weights": 4 * count["total"] // share + gathered, "optimizer": (8 * adam + 4 * muon) // world}
    gradients = 4 * (muon + adam * (accum > 1 or world > 1)) // share
    forward = forward or FASTEST[device]
    kept = activations(config, rows, bytes_per_value, forward)
    kept -= recomputation(config, rows, bytes_per_value, forward)["saved"] * recompute
    coming = 4 * (adam - config.padded_vocab * config.n_embd) // share if gradients == 4 * muon // share else 0
    joined = 4 * config.n_layer * config.n_embd * (config.n_embd + 2 * config.kv_dim)  # by hand: q, k and v in one
    backward = lasting | {
        "gradients": gradients,
        "casts": bytes_per_value * muon if bytes_per_value < 4 else joined * (forward == "by hand"),
        "activations": kept,
        "logits": loss_room(config, tokens, bytes_per_value, device),
        "holes": holes(config, kept, bytes_per_value, forward, coming) if device == "cpu" else 0,
        # the gradients of one block's widest tensors, and by hand of all its matrices at once
        "room": tokens * 8 * config.n_embd * bytes_per_value + 4 * muon // config.n_layer * (forward == "by hand"),
    }
    update = lasting | {"gradients": 4 * count["total"] // share, "casts": 0, "activations": 0, "logits": 0, "holes": 0,
                        "room": UPDATE_ROOM[bytes_per_value] * moved_at_once(config, device, world)}  # fmt: skip
    return {name: parts | {"total": sum(parts.values())} for name, parts in
            (("backward", backward), ("update", update))}  # fmt: skip


def holes(config: GPTConfig, kept: int, bytes_per_value: int, forward: str, coming: int) -> int:
    """Bytes that a CPU's allocator can't reuse when the backward pass is at its peak; kept: the activations.

    coming: bytes of gradients that are not there when it begins. A table's comes when two blocks' activations have been
    freed. If it is larger, none of them finds room there, and all lie beside what was there at the beginning; else the
    hole that the head's gradient of the step before has left is too small for this step's.
    """
    blocks = HOLES.get(forward, 0) * kept * 4 / bytes_per_value
    table, freed = 4 * config.padded_vocab * config.kv_dim, kept / _value_layers(config)
    return int(blocks + (4 * config.padded_vocab * config.n_embd if table <= freed else coming))


def loss_room(config: GPTConfig, tokens: int, bytes_per_value: int, device: str) -> int:
    """Bytes the loss holds at its peak: a chunk of logits, or afterwards the head's gradient and its scaled copy."""
    head, hidden = config.padded_vocab * config.n_embd, tokens * config.n_embd * bytes_per_value
    wide = 8 if bytes_per_value == 4 else 12  # a chunk's logits and their gradient: fp32 twice, and 16 bits twice
    chunk = min(LOSS_CHUNK[device == "cpu"], tokens) * config.padded_vocab * wide
    cast = (bytes_per_value < 4) * bytes_per_value * head
    return max(4 * head + 2 * cast + chunk + hidden, 8 * head + 2 * hidden)


def largest_rows(config: GPTConfig, bytes_free: int, **options) -> int:
    """The largest power of two of rows whose peak fits in `bytes_free`, or 0 when not even one row does."""
    rows = 0
    while memory(config, max(1, 2 * rows), **options)["total"] <= bytes_free:
        rows = max(1, 2 * rows)
    return rows
