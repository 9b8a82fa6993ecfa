"""The GPT: its configuration, every parameter's first value, and the forward pass. No optimizer, no prints, no globals.

A decoder-only Transformer (arXiv 1706.03762) with the modern changes, each small enough to read here: rotary
positions (RoFormer, arXiv 2104.09864), RMS norms without weights, QK norm, ReLU^2 (Primer, arXiv 2109.08668), grouped
key/value heads (arXiv 2305.13245), sliding windows, value embeddings (ResFormer, arXiv 2410.17897), soft-capped
logits (Gemma 2, arXiv 2408.00118), and from the modded-nanogpt speedruns: scaled residual stream, smear and backout.

Shape letters: B rows, T positions, C width, H heads, Hkv key/value heads, D head dim, V vocabulary, L layers.
Parameters are fp32; activations are in `model.compute_dtype` and each weight is cast where it is used. Logits and
loss are fp32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanochat import attention
from nanochat.errors import UserError, refuse

EPS = 2.0**-23  # of the RMS norms: fp32's machine epsilon, whatever the dtype
ROPE_BASE = 100_000  # slowest rotation: one turn in 2 pi 100,000 positions
QK_SCALE = 1.2  # both q and k, after their norm: sharper attention
VE_GATE_SCALE, VE_GATE_CHANNELS = 3.0, 12  # gate = 3 sigmoid(W x[:12]) per kv head
SMEAR_CHANNELS = 24
SOFTCAP = 15.0  # logits = 15 tanh(z / 15)
VOCAB_MULTIPLE = 64  # tables and head are padded to it: matmul kernels like round sizes
SHORT_MULTIPLE = 128  # short windows are whole attention tiles


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. It checks itself: what cannot be built is refused with every reason at once (UserError)."""

    sequence_len: int = 2048  # longest context, tokens
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6  # query heads
    n_kv_head: int = 6  # key/value heads: a divisor of n_head
    n_embd: int = 768  # width C
    # One entry a layer, repeated over the layers, the last layer always L: L sees the whole context, S the last quarter
    # of it (rounded up to 128 tokens). A list such as "256,1024,L" gives windows in tokens.
    window_pattern: str = "SSSL"

    def __post_init__(self):
        sizes = {
            n: getattr(self, n) for n in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
        }
        refuse([f"{name} is {value}, but it must be at least 1." for name, value in sizes.items() if value < 1])
        problems = []
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            problems.append(f"n_embd {self.n_embd} must be an even multiple of n_head {self.n_head}.")
        if self.n_head % self.n_kv_head:
            problems.append(f"n_kv_head {self.n_kv_head} must divide n_head {self.n_head}.")
        refuse(problems + self._window_problems())

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def short_window(self) -> int:
        """Tokens an S layer sees behind a token: a quarter of the context, rounded up to 128, at most all of it."""
        quarter = -(-self.sequence_len // 4)
        return min(-(-quarter // SHORT_MULTIPLE) * SHORT_MULTIPLE, self.sequence_len)

    def _pattern(self) -> list[str]:
        text = self.window_pattern.strip().upper()
        return [part.strip() for part in text.split(",")] if "," in text or text.isdigit() else list(text)

    def _window_problems(self) -> list[str]:
        problems = [] if self._pattern() else ["window_pattern is empty: give letters S and L, such as SSSL."]
        for part in self._pattern():
            if part.isdigit() and not 1 <= int(part) <= self.sequence_len:
                problems.append(f"the window of {part} tokens must lie between 1 and the context, {self.sequence_len}.")
            if not part.isdigit() and part not in ("S", "L"):
                problems.append(f"window_pattern {self.window_pattern!r}: {part!r} is not S, L or a number of tokens.")
        return problems

    def windows(self) -> list[int]:
        """The window of each layer, in tokens (see nanochat/attention.py); sequence_len means all."""
        size = {"S": self.short_window, "L": self.sequence_len}
        pattern = [size[part] if part in size else int(part) for part in self._pattern()]
        return [pattern[i % len(pattern)] for i in range(self.n_layer - 1)] + [self.sequence_len]

    def has_value_embedding(self, layer: int) -> bool:
        """Every other layer, such that the last has one."""
        return layer % 2 == (self.n_layer - 1) % 2


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS norm over the last dim, without a weight."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: channel d pairs with d + D/2 and turns by minus the angle.

    x (B, T, H, D); cos, sin (1|B, T, 1, D/2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class Linear(nn.Linear):
    """A matrix without a bias, kept in fp32 and cast to the activations' dtype in each forward.

    `product` multiplies: F.linear, or kernels/fp8.py's twin of it.
    """

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)
        self.product = F.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.weight.to(x.dtype))

    def reset_parameters(self):
        """Nothing: GPT.init_weights is the one place that gives values."""


class Table(nn.Embedding):
    """An embedding whose rows come out in the given dtype."""

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return super().forward(ids).to(dtype)

    def reset_parameters(self):
        """Nothing: GPT.init_weights is the one place that gives values."""


class Attention(nn.Module):
    """Causal self-attention with QK norm, grouped heads and, in every other layer, value embeddings."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if config.has_value_embedding(layer):
            self.ve_gate = Linear(min(VE_GATE_CHANNELS, config.n_embd), config.n_kv_head)

    def forward(self, x, embedded, rope, window, attend, cache):
        """x (B, T, C), embedded (B, T, Hkv D) or None, rope (cos, sin) -> (B, T, C)."""
        b, t, _ = x.shape
        q = self.c_q(x).view(b, t, -1, self.head_dim)  # (B, T, H, D)
        k = self.c_k(x).view(b, t, -1, self.head_dim)  # (B, T, Hkv, D)
        v = self.c_v(x).view(b, t, -1, self.head_dim)
        if embedded is not None:
            gate = VE_GATE_SCALE * torch.sigmoid(self.ve_gate(x[..., : self.ve_gate.in_features]))  # (B, T, Hkv)
            v = v + gate.unsqueeze(-1) * embedded.view_as(v)
        q, k = norm(rotate(q, *rope)) * QK_SCALE, norm(rotate(k, *rope)) * QK_SCALE
        y = attend(q, k, v, window) if cache is None else cache.attend(self.layer, q, k, v, window)
        return self.c_proj(y.reshape(b, t, -1))


class MLP(nn.Module):
    """Two matrices, four times wider inside, with a squared ReLU between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """The stream scaled and mixed with its beginning; then attention, then MLP, each normed before and added after."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, x0, scales, embedded, rope, window, attend, cache):
        """x, x0 (B, T, C), scales (resid_lambda, x0_lambda); the rest as for Attention -> (B, T, C)."""
        x = scales[0].to(x.dtype) * x + scales[1].to(x.dtype) * x0
        x = x + self.attn(norm(x), embedded, rope, window, attend, cache)
        return x + self.mlp(norm(x))


def run_block(block: Block, *arguments) -> torch.Tensor:
    """A block's forward; `GPT.by_hand` puts its twin in its place."""
    return block(*arguments)


def run_block_by_hand(block: Block, x, x0, scales, embedded, rope, window, attend, cache) -> torch.Tensor:
    """The same by kernels/cpu_block.py, which has its own attention, where a gradient is wanted; else, and in a dtype
    or on a machine for which there is no compiled C, the block's."""
    from nanochat.kernels import cpu_block, cpu_train

    if cache is not None or not torch.is_grad_enabled() or cpu_train.library(x.dtype) is None:
        return block(x, x0, scales, embedded, rope, window, attend, cache)

    a, m = block.attn, block.mlp
    heads, kv_heads = (matrix.out_features // a.head_dim for matrix in (a.c_q, a.c_k))
    score_scale = QK_SCALE**2 / math.sqrt(a.head_dim)
    shape = cpu_block.Shape(heads, kv_heads, a.head_dim, window, EPS, score_scale, VE_GATE_SCALE)
    parts = (a.c_q, a.c_k, a.c_v, a.c_proj, m.c_fc, m.c_proj, a.ve_gate if embedded is not None else None)
    return cpu_block.run(x, x0, scales, embedded, rope, shape, [p if p is None else p.weight for p in parts])


def smear(x, before, gate: Linear, scale) -> torch.Tensor:
    """Mix a little of the previous token's embedding into each token's: x (B, T, C), before (B, 1, C) -> (B, T, C)."""
    previous = torch.cat([before, x[:, :-1]], dim=1)
    return x + scale.to(x.dtype) * torch.sigmoid(gate(x[..., : gate.in_features])) * previous


def finish(x, middle, backout) -> torch.Tensor:
    """Take part of the middle of the stream out of its end and norm it: x, middle (B, T, C) -> (B, T, C)."""
    return norm(x - backout.to(x.dtype) * middle)


class GPT(nn.Module):
    """The model. It may be built under torch.device("meta"), then `.to_empty(device=...)` and `.init_weights()`.

    attend: the attention backend's function (attention.choose(...).attend); None means SDPA, which runs everywhere.
    compute_dtype: dtype of the activations while the parameters are fp32; parameters in another dtype (model.double(),
    model.bfloat16()) are computed in theirs.
    """

    def __init__(self, config: GPTConfig, attend: attention.Attend | None = None):
        super().__init__()
        self.config = config
        self.attend = attend or attention.load("sdpa").attend
        self.compute_dtype = torch.float32
        self.recompute = False  # keep only each block's input for the backward pass, and run the block again there
        self.run_block = run_block  # or its twin, see by_hand()
        layers, padded = range(config.n_layer), config.padded_vocab
        self.transformer = nn.ModuleDict(
            {"wte": Table(padded, config.n_embd), "h": nn.ModuleList(Block(config, i) for i in layers)}
        )
        self.lm_head = Linear(config.n_embd, padded)
        self.value_embeds = nn.ModuleDict(
            {str(i): Table(padded, config.kv_dim) for i in layers if config.has_value_embedding(i)}
        )
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.smear_gate = Linear(min(SMEAR_CHANNELS, config.n_embd), 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        self.register_buffer("rope", torch.empty(0), persistent=False)
        self._fill_rope()

    # ---- values -----------------------------------------------------------------------------------------------------

    def _fill_rope(self):
        """The (2, sequence_len, D/2) cos and sin table, computed in fp64, on the parameters' device."""
        device, dtype = self.lm_head.weight.device, torch.promote_types(self.lm_head.weight.dtype, torch.float32)
        half = self.config.head_dim // 2
        speed = ROPE_BASE ** -(torch.arange(half, dtype=torch.float64, device="cpu") / half)
        angle = torch.arange(self.config.sequence_len, dtype=torch.float64, device="cpu")[:, None] * speed
        self.rope = torch.stack([angle.cos(), angle.sin()]).to(device=device, dtype=dtype)

    def _apply(self, fn, recurse=True):
        """Moving or casting the model makes the rotary table anew, so that it is never unset or rounded."""
        super()._apply(fn, recurse)
        self._fill_rope()
        return self

    def to_empty(self, *, device, recurse: bool = True):
        """Memory without values on `device`, as nn.Module's, but without the second of imports that its way costs."""
        return self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), recurse)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Give every parameter its first value (a test proves that none is missed). seed None: the global generator."""
        device = self.lm_head.weight.device
        random = None if seed is None else torch.Generator(device).manual_seed(seed)
        bound = math.sqrt(3 / self.config.n_embd)  # a uniform of this bound has standard deviation 1/sqrt(C)
        layers = self.config.n_layer

        def uniform(p, low, high):
            p.uniform_(low, high, generator=random)

        self.transformer.wte.weight.normal_(0, 0.8, generator=random)
        self.lm_head.weight.normal_(0, 0.001, generator=random)
        for block in self.transformer.h:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                uniform(matrix.weight, -bound, bound)
            uniform(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if hasattr(block.attn, "ve_gate"):
                uniform(block.attn.ve_gate.weight, 0, 0.02)
        for table in self.value_embeds.values():
            uniform(table.weight, -bound, bound)
        self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, layers))
        self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, layers))
        uniform(self.smear_gate.weight, 0, 0.02)
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)

    def roles(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """What each parameter is, each listed once. How a role moves is the optimizer's to say."""
        places = (
            ("matrix", "transformer.h."),
            ("embedding", "transformer.wte."),
            ("value_embedding", "value_embeds."),
            ("head", "lm_head."),
            ("resid", "resid_lambdas"),
            ("x0", "x0_lambdas"),
            ("smear_backout", ("smear_", "backout_")),
        )
        named = list(self.named_parameters())
        return {role: [(n, p) for n, p in named if n.startswith(prefix)] for role, prefix in places}

    def windows(self) -> list[int]:
        """The attention window of each layer, in tokens."""
        return self.config.windows()

    def by_hand(self) -> GPT:
        """A twin that shares every parameter, for training on CPU: its blocks' derivatives are written out by hand."""
        twin = copy.copy(self)
        twin.run_block = run_block_by_hand
        return twin

    def block_by_block(self) -> GPT:
        """A twin that shares every parameter, its blocks compiled one by one: so their gradients come one by one."""
        twin = copy.copy(self)
        twin.run_block = torch.compile(run_block, dynamic=False)
        return twin

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(self, ids, targets=None, cache=None, reduction="mean", last_only=False, last=None):
        """ids (B, T) int64 -> fp32 logits (B, T, V), or with targets (B, T; -1 = ignored) the fp32 cross-entropy loss.

        cache: the new tokens stand behind those already in it (its contract: nanochat/prefix.py).
        reduction: "mean" over the scored targets, "sum", or "none" for (B, T) losses, 0 where ignored.
        last_only: only the logits of the last position, (B, 1, V). last (B,) or (B, K) int64: those of these positions
        of each row, (B, K, V), K = 1 for (B,).
        """
        x = self.hidden(ids, cache)
        if targets is not None:
            return self._loss(x, targets, reduction)
        if last is not None:
            x = x.gather(1, last.view(x.size(0), -1, 1).expand(-1, -1, x.size(-1)))
        elif last_only:
            x = x[:, -1:]
        return _loss_module().capped_logits(x, self.lm_head.weight, self.config.vocab_size, SOFTCAP)

    def _loss(self, x, targets, reduction):
        loss = _loss_module().linear_cross_entropy(
            x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.vocab_size, SOFTCAP, reduction
        )
        return loss.view_as(targets) if reduction == "none" else loss

    def hidden(self, ids: torch.Tensor, cache=None) -> torch.Tensor:
        """ids (B, T) -> the final normed hidden states (B, T, C) in the activations' dtype."""
        rope = self._rope(ids, cache)
        dtype = self._activation_dtype()
        x = norm(self.transformer.wte(ids, dtype))
        before = torch.zeros_like(x[:, :1]) if cache is None else cache.previous(x).to(dtype)  # (B, 1, C)
        x = x0 = smear(x, before, self.smear_gate, self.smear_lambda)
        middle = None
        run = self._run_again if self.recompute and torch.is_grad_enabled() else self.run_block
        for i, (block, window) in enumerate(zip(self.transformer.h, self.windows())):
            scales = self.resid_lambdas[i], self.x0_lambdas[i]
            embedded = self.value_embeds[str(i)](ids, dtype) if str(i) in self.value_embeds else None
            x = run(block, x, x0, scales, embedded, rope, window, self.attend, cache)
            if i == self.config.n_layer // 2:
                middle = x
        return finish(x, middle, self.backout_lambda)

    def _run_again(self, *arguments) -> torch.Tensor:
        """run_block with activation checkpointing (arXiv 1604.06174); there is no randomness to repeat."""
        return checkpoint(self.run_block, *arguments, use_reentrant=False, preserve_rng_state=False)

    def _activation_dtype(self) -> torch.dtype:
        stored = self.lm_head.weight.dtype
        return self.compute_dtype if stored == torch.float32 else stored

    def _rope(self, ids, cache):
        """(cos, sin), each (1|B, T, 1, D/2), of the tokens' absolute positions; one past the context is refused."""
        limit, dtype = self.config.sequence_len, self._activation_dtype()
        if cache is None:
            _check_position(ids.size(1), limit)
            return self.rope[:, None, : ids.size(1), None].to(dtype).unbind(0)
        positions = cache.positions(*ids.shape)  # (B, T)
        if positions.device.type == "cpu":  # elsewhere the engine, which knows the lengths on the host, has checked
            _check_position(int(positions.max()) + 1, limit)
        return self.rope[:, positions.to(self.rope.device)].unsqueeze(-2).to(dtype).unbind(0)

    @torch.no_grad()
    def generate_naive(self, ids, max_tokens: int, temperature=1.0, top_k=None, seed=42) -> Iterator[int]:
        """Continue one prompt (list of ids) without a cache, a whole forward a token: the slow twin of the engine."""
        row = torch.tensor([list(ids)], device=self.lm_head.weight.device)
        random = torch.Generator(row.device).manual_seed(seed)
        for _ in range(max_tokens):
            logits = self(row, last_only=True)[:, -1]  # (1, V)
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature > 0:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)
            else:
                new = logits.argmax(-1, keepdim=True)
            row = torch.cat([row, new], dim=1)
            yield int(new)


def _check_position(length: int, limit: int) -> None:
    if length > limit:
        raise UserError(
            f"{length} tokens do not fit the model's context of {limit}: "
            "shorten the text, or train with a longer --max-seq-len."
        )


def _loss_module():
    from nanochat.kernels import loss

    return loss
