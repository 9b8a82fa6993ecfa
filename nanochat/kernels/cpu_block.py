"""A whole block, forward and backward by hand, for training on CPU: nothing to compile, a cache's worth at a time.

`gpt.Block` under autograd is the slow twin and defines what is right. By hand it is faster for three reasons. Rows do
not meet inside a block, so a group of rows at a time goes through all of it and stays in a core's second cache; every
elementwise step works in place; and since q and k are normed their scores are bounded (by QK_SCALE^2 sqrt(D), 16.3 at
128 channels), so the softmax needs no maximum: attention is matmuls over blocks of queries and one exp. CPU time
of a forward and backward, one thread of a busy Xeon with AVX-512, fp32: depth 4, 128 wide, T=256, 4,096 tokens 484 ms
by hand, 540 plain, 492 compiled (after 95 s); 256 wide, T=512, 8,192 tokens 2.75 s by hand, 3.06 plain.

Shape letters as in nanochat/gpt.py; n rows of a group, N = n H, P = H + Hkv heads of q and k together, h = D/2. The
columns of the joint projection are [first halves of all q and k heads | their second halves | v], so that rotating is
four long multiplications. Norms and sums are taken in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

GROUP = 2**19  # elements of a group's widest tensor, n T 4C, a thread: 2 MiB in fp32, a core's second cache
QUERIES = 128  # a block of queries meets only the keys it can see


class Shape(NamedTuple):
    """What a block is, beside its tensors."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int
    eps: float  # of the norms
    score_scale: float  # what the product of normed q and k is multiplied by
    gate_scale: float  # of the value embeddings


class Weights(NamedTuple):
    """A block's matrices, q, k and v joined; `gate` is None where the block has no value embedding."""

    qkv: torch.Tensor  # (2 h P + Hkv D, C)
    proj: torch.Tensor  # (C, C)
    fc: torch.Tensor  # (4C, C)
    out: torch.Tensor  # (C, 4C)
    gate: torch.Tensor | None  # (Hkv, 12)


class Kept(NamedTuple):
    """What a group's backward needs of its forward."""

    inverse1: torch.Tensor  # (n T, 1)
    normed1: torch.Tensor  # (n T, C)
    q: torch.Tensor  # (N, T, D), with the score's scale
    k: torch.Tensor  # (N, T, D)
    v: torch.Tensor  # (N, T, D)
    inverse_q: torch.Tensor  # (N, T, 1)
    inverse_k: torch.Tensor  # (n Hkv, T, 1)
    gate: torch.Tensor | None  # (n, T, Hkv, 1), after the sigmoid
    y: torch.Tensor  # (N, T, D)
    inverse_sum: torch.Tensor  # (N, T, 1)
    inverse2: torch.Tensor  # (n T, 1)
    normed2: torch.Tensor  # (n T, C)
    hidden: torch.Tensor  # (n T, 4C), after the ReLU


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:  # (..., C) -> (..., 1)
    """1 / sqrt(mean(x^2) + eps) of the last dim."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    return length.square_().div_(x.size(-1)).add_(eps).rsqrt_().to(x.dtype)


def norm_back_(grad: torch.Tensor, y: torch.Tensor, factor: torch.Tensor, size: float = 1.0) -> torch.Tensor:
    """grad <- the gradient by x of y = x * factor, where factor (..., 1) is size / rms(x)."""
    mean = (grad * y).sum(-1, keepdim=True, dtype=wide(grad.dtype)).div_(grad.size(-1) * size**2)
    return grad.addcmul_(y, mean.to(grad.dtype), value=-1).mul_(factor)


def rotate_(a: torch.Tensor, b: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """(a, b) <- (a cos + b sin, b cos - a sin); -sin undoes it. a, b (n, T, P h), cos, sin (T, P h)."""
    turned = a * sin
    a.mul_(cos).addcmul_(b, sin)
    b.mul_(cos).sub_(turned)


# ---- attention ------------------------------------------------------------------------------------------------------


def _pieces(length: int, window: int) -> list[tuple[int, int, int]]:
    """(first query, query after the last, first key seen) of each block of queries."""
    return [(s, min(s + QUERIES, length), max(0, s - window)) for s in range(0, length, QUERIES)]


def _exp_scores(q, k, start: int, stop: int, first: int, window: int) -> torch.Tensor:
    """exp(q k^T) of the queries start..stop against the keys first..stop, 0 where a key is not seen."""
    scores = torch.bmm(q[:, start:stop], k[:, first:stop].mT).exp_()
    query, key = torch.arange(start, stop)[:, None], torch.arange(first, stop)[None, :]
    scores[..., start - first :].mul_((key[:, start - first :] <= query).to(q.dtype))
    if stop - 1 - first > window:  # some query does not see the first keys
        scores.mul_((key >= query - window).to(q.dtype))
    return scores


def attention(q, k, v, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q (with the score's scale), k, v (N, T, D) -> y (N, T, D) and each query's 1 / sum of exp, (N, T, 1)."""
    y, inverse = torch.empty_like(q), q.new_empty(*q.shape[:2], 1)
    for start, stop, first in _pieces(q.size(1), window):
        weights = _exp_scores(q, k, start, stop, first, window)
        inverse[:, start:stop] = weights.sum(-1, keepdim=True, dtype=wide(q.dtype)).reciprocal_()
        torch.mul(torch.bmm(weights, v[:, first:stop]), inverse[:, start:stop], out=y[:, start:stop])
    return y, inverse


def attention_back(grad, kept: Kept, window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad, by y (N, T, D), is overwritten -> gradients by q, k and v, (N, T, D). The scores are made again."""
    q, k, v = kept.q, kept.k, kept.v
    inner = (grad * kept.y).sum(-1, keepdim=True, dtype=wide(q.dtype)).to(q.dtype).mul_(kept.inverse_sum)
    grad.mul_(kept.inverse_sum)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start, stop, first in _pieces(q.size(1), window):
        weights, part = _exp_scores(q, k, start, stop, first, window), grad[:, start:stop]
        grad_v[:, first:stop].baddbmm_(weights.mT, part)
        by_score = torch.bmm(part, v[:, first:stop].mT).sub_(inner[:, start:stop]).mul_(weights)
        grad_k[:, first:stop].baddbmm_(by_score.mT, q[:, start:stop])
        grad_q[:, start:stop] = torch.bmm(by_score, k[:, first:stop])
    return grad_q, grad_k, grad_v


# ---- a group of rows ------------------------------------------------------------------------------------------------


def _by_head(x: torch.Tensor, repeat: int = 1) -> torch.Tensor:
    """(n, T, heads, ...) of D channels -> (n heads repeat, T, D), a copy."""
    x = x.transpose(1, 2)
    x = x.repeat_interleave(repeat, dim=1) if repeat > 1 else x
    return x.reshape(-1, x.size(2), x[0, 0, 0].numel()).contiguous()


def _by_token(x: torch.Tensor, heads: int, repeat: int = 1) -> torch.Tensor:
    """(n heads repeat, T, D) -> (n, T, heads, D), summed over the repeats."""
    x = x.view(-1, heads, repeat, *x.shape[1:])
    return (x.sum(2) if repeat > 1 else x[:, :, 0]).transpose(1, 2)


def forward_rows(x, x0, scales, embedded, rope, w: Weights, s: Shape) -> tuple[torch.Tensor, Kept]:
    """x, x0 (n, T, C), embedded (n, T, Hkv D) or None, rope (cos, sin) each (T, P h) -> (n T, C) and what is kept."""
    n, t, c = x.shape
    half, share = s.head_dim // 2, s.heads // s.kv_heads
    both = (s.heads + s.kv_heads) * half
    x = (x * scales[0]).addcmul_(x0, scales[1]).view(-1, c)
    inverse1 = inverse_rms(x, s.eps)
    normed1 = x * inverse1
    joint = (normed1 @ w.qkv.T).view(n, t, -1)
    rotate_(joint[..., :both], joint[..., both : 2 * both], *rope)
    halves = joint[..., : 2 * both].view(n, t, 2, -1, half).transpose(2, 3)  # (n, T, P, 2, h)
    q, k = (_by_head(part) for part in halves.split([s.heads, s.kv_heads], dim=2))
    inverse_q, inverse_k = inverse_rms(q, s.eps).mul_(s.score_scale), inverse_rms(k, s.eps)
    q.mul_(inverse_q)
    k.mul_(inverse_k)
    v, gate = joint[..., 2 * both :].view(n, t, s.kv_heads, -1), None
    if embedded is not None:
        gate = torch.sigmoid(normed1[:, : w.gate.size(1)] @ w.gate.T).view(n, t, -1, 1)
        v = torch.addcmul(v, gate, embedded.view_as(v), value=s.gate_scale)
    v = _by_head(v, share)
    if share > 1:
        k = k.view(n, s.kv_heads, t, -1).repeat_interleave(share, dim=1).flatten(0, 1)
    y, inverse_sum = attention(q, k, v, s.window)
    x = torch.addmm(x, _by_token(y, s.heads).reshape(-1, c), w.proj.T)
    inverse2 = inverse_rms(x, s.eps)
    normed2 = x * inverse2
    hidden = (normed2 @ w.fc.T).relu_()
    kept = Kept(inverse1, normed1, q, k, v, inverse_q, inverse_k, gate, y, inverse_sum, inverse2, normed2, hidden)
    return x.addmm_(hidden.square(), w.out.T), kept


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float = 1.0) -> None:
    """total += factor a^T b, summed in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a.T, b, alpha=factor)
    else:
        total.add_(a.T @ b, alpha=factor)


def backward_rows(grad, kept: Kept, embedded, rope, w: Weights, sums: Weights, s: Shape):
    """grad, by the output (n T, C) -> gradients by the mixed stream (n T, C) and by embedded; adds to `sums`."""
    c, t = grad.size(1), kept.q.size(1)
    half, share = s.head_dim // 2, s.heads // s.kv_heads
    both, n = (s.heads + s.kv_heads) * half, grad.size(0) // t
    # MLP: d relu(z)^2 = 2 relu(z) dz, its 2 put where it is cheapest
    by_hidden = (grad @ w.out).mul_(kept.hidden)
    add_product(sums.out, grad, kept.hidden.square())
    add_product(sums.fc, by_hidden, kept.normed2, 2.0)
    grad = norm_back_(by_hidden @ w.fc, kept.normed2, kept.inverse2 * 2).add_(grad)
    # attention
    add_product(sums.proj, grad, _by_token(kept.y, s.heads).reshape(-1, c))
    by_q, by_k, by_v = attention_back(_by_head((grad @ w.proj).view(n, t, s.heads, -1)), kept, s.window)
    by_joint = grad.new_empty(n, t, 2 * both + s.kv_heads * s.head_dim)
    halves = by_joint[..., : 2 * both].view(n, t, 2, -1, half).permute(0, 1, 3, 2, 4)  # (n, T, P, 2, h)
    norm_back_(by_q, kept.q, kept.inverse_q, s.score_scale)
    if share > 1:
        by_k = by_k.view(-1, share, t, s.head_dim).sum(1)
    norm_back_(by_k, kept.k[::share], kept.inverse_k)
    for part, x, heads in zip(halves.split([s.heads, s.kv_heads], dim=2), (by_q, by_k), (s.heads, s.kv_heads)):
        part.copy_(_by_token(x, heads).unflatten(3, (2, half)))
    rotate_(by_joint[..., :both], by_joint[..., both : 2 * both], rope[0], -rope[1])
    by_v, by_embedded, by_normed = _by_token(by_v, s.kv_heads, share), None, None
    by_joint[..., 2 * both :].unflatten(2, (s.kv_heads, -1)).copy_(by_v)
    by_normed = by_joint.view(n * t, -1) @ w.qkv
    add_product(sums.qkv, by_joint.view(n * t, -1), kept.normed1)
    if embedded is not None:
        by_gate = (by_v * embedded.view(by_v.shape)).sum(-1, keepdim=True, dtype=wide(grad.dtype)).to(grad.dtype)
        by_gate = by_gate.mul_(kept.gate).mul_(1 - kept.gate).mul_(s.gate_scale).view(n * t, -1)
        by_embedded = (by_v * (kept.gate * s.gate_scale)).flatten(2)
        channels = w.gate.size(1)
        by_normed[:, :channels].addmm_(by_gate, w.gate)
        add_product(sums.gate, by_gate, kept.normed1[:, :channels])
    return norm_back_(by_normed, kept.normed1, kept.inverse1).add_(grad), by_embedded


# ---- the whole block ------------------------------------------------------------------------------------------------


def join(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, half: int) -> torch.Tensor:
    """The matrices (heads D, C) of q, k and v as one, (2 h P + Hkv D, C)."""
    halves = torch.cat([q, k]).unflatten(0, (-1, 2, half)).transpose(0, 1)
    return torch.cat([halves.flatten(0, 2), v])


def part(joint: torch.Tensor, s: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`join` undone."""
    both, half = (s.heads + s.kv_heads) * s.head_dim, s.head_dim // 2
    q_and_k = joint[:both].unflatten(0, (2, -1, half)).transpose(0, 1).flatten(0, 2)
    return *q_and_k.split([s.heads * s.head_dim, s.kv_heads * s.head_dim]), joint[both:]


class _Block(torch.autograd.Function):
    """Forward group by group, then backward; the matrices' gradients are summed over the groups in their dtype."""

    @staticmethod
    def forward(ctx, x, x0, scale, scale0, embedded, cos, sin, s, q, k, v, proj, fc, out, gate):
        dtype = x.dtype
        cast = lambda matrix: None if matrix is None else matrix.to(dtype)
        ctx.w = Weights(join(q, k, v, s.head_dim // 2).to(dtype), cast(proj), cast(fc), cast(out), cast(gate))
        widen = lambda table: table.view(x.size(1), 1, -1).expand(-1, s.heads + s.kv_heads, -1).flatten(1)
        ctx.rope, ctx.s, ctx.scales = (widen(cos), widen(sin)), s, (scale.to(dtype), scale0.to(dtype))
        ctx.n = max(GROUP * torch.get_num_threads() // (x.size(1) * fc.size(0)), 1)
        pieces, ctx.kept = [], []
        for at in range(0, x.size(0), ctx.n):
            rows = slice(at, at + ctx.n)
            found = None if embedded is None else embedded[rows]
            y, kept = forward_rows(x[rows], x0[rows], ctx.scales, found, ctx.rope, ctx.w, s)
            pieces.append(y)
            ctx.kept.append(kept)
        ctx.save_for_backward(x, x0, embedded)
        ctx.wide = q.dtype
        return torch.cat(pieces).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, x0, embedded = ctx.saved_tensors
        sums = Weights(*(None if m is None else torch.zeros(m.shape, dtype=ctx.wide) for m in ctx.w))
        streams, tables = [], []
        for i, kept in enumerate(ctx.kept):
            rows = slice(i * ctx.n, (i + 1) * ctx.n)
            found = None if embedded is None else embedded[rows]
            stream, table = backward_rows(
                grad[rows].reshape(-1, grad.size(2)), kept, found, ctx.rope, ctx.w, sums, ctx.s
            )
            streams.append(stream)
            tables.append(table)
        ctx.kept = None
        stream = torch.cat(streams).view_as(x)
        by_scales = [(stream * other).sum(dtype=ctx.wide) for other in (x, x0)]
        by_table = None if embedded is None else torch.cat(tables)
        return (
            stream * ctx.scales[0], stream * ctx.scales[1], *by_scales, by_table, None, None, None,
            *part(sums.qkv, ctx.s), *sums[1:],
        )  # fmt: skip


def run(x, x0, scales, embedded, rope, shape: Shape, matrices) -> torch.Tensor:
    """x, x0 (B, T, C), scales two 0-d tensors, embedded (B, T, Hkv D) or None, rope (cos, sin) each (1, T, 1, h);
    matrices: the weights of q, k, v, proj, fc, out and gate (or None) -> the block's output (B, T, C)."""
    return _Block.apply(x, x0, *scales, embedded, *rope, shape, *matrices)
