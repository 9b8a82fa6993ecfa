"""Attention as plain matmuls over blocks of queries, for compiled training on CPU; everything else goes to `sdpa`.

The same algorithm as FlashAttention 2 (arXiv 2307.08691), which keeps no scores: the forward remembers each query's
log-sum-exp, the backward makes a block's scores again. A block of BLOCK queries meets only the keys it can see, so the
upper triangle and what lies before the window are skipped, and memory is bounded by one block's scores. On CPU the
matmul library and the fused elementwise code of torch.compile beat torch's own fused kernel: measured on one core of a
Zen 4 (B = 16, T = 512, 4 heads of 64, forward + backward), bf16 123 against 252 ms, fp32 185 against 213 ms. Without
torch.compile they would not, so eager calls are left to `sdpa`.
"""

from __future__ import annotations

import math

import torch

from nanochat.kernels import sdpa

BLOCK = 128  # queries a block, at least
MOST_BLOCKS = 8  # the compiler unrolls the loop over blocks: longer rows get longer blocks
HIDDEN = -1e30  # score of a key that is not seen


def needs(device: torch.device, dtype: torch.dtype) -> str | None:
    """A reason why it cannot run, or None."""
    return None if device.type == "cpu" else f"is for CPUs, {device.type} has fused kernels"


def _pieces(length: int, window: int) -> list[tuple[int, int, int]]:
    """(first query, query after the last, first key seen) of each block."""
    block = max(BLOCK, -(-length // MOST_BLOCKS))
    return [(s, min(s + block, length), max(0, s - window)) for s in range(0, length, block)]


def _scores(q, k, start: int, stop: int, first: int, window: int):
    """Scaled scores (B, H, n, m) in fp32 of the queries start..stop against the keys first..stop."""
    scores = q[:, :, start:stop] @ k[:, :, first:stop].transpose(-2, -1)
    query = torch.arange(start, stop, dtype=torch.int32, device=q.device)[:, None]
    key = torch.arange(first, stop, dtype=torch.int32, device=q.device)[None, :]
    unseen = key > query if first == 0 and window >= stop - 1 else (key > query) | (key < query - window)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.size(-1))
    return torch.where(unseen, HIDDEN, scores)


class _Blocks(torch.autograd.Function):
    """q, k, v (B, H, T, D) -> y (B, H, T, D)."""

    @staticmethod
    def forward(ctx, q, k, v, window):
        outputs, sums = [], []
        for start, stop, first in _pieces(q.size(2), window):
            scores = _scores(q, k, start, stop, first, window)
            largest = scores.amax(-1, keepdim=True)
            weights = (scores - largest).exp()
            total = weights.sum(-1, keepdim=True)  # (B, H, n, 1)
            outputs.append((weights.to(q.dtype) @ v[:, :, first:stop]) * (1 / total).to(q.dtype))
            sums.append(largest + total.log())
        y, logsumexp = torch.cat(outputs, dim=2), torch.cat(sums, dim=2)
        ctx.save_for_backward(q, k, v, y, logsumexp)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, y, logsumexp = ctx.saved_tensors
        wide, scale = logsumexp.dtype, 1 / math.sqrt(q.size(-1))
        inner = (grad.to(wide) * y.to(wide)).sum(-1, keepdim=True)  # (B, H, T, 1)
        grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
        for start, stop, first in _pieces(q.size(2), ctx.window):
            scores = _scores(q, k, start, stop, first, ctx.window)
            weights = (scores - logsumexp[:, :, start:stop]).exp()
            piece = grad[:, :, start:stop]
            by_weight = (piece @ v[:, :, first:stop].transpose(-2, -1)).to(wide) - inner[:, :, start:stop]
            by_score = (weights * by_weight * scale).to(q.dtype)
            grad_v[:, :, first:stop] += weights.to(q.dtype).transpose(-2, -1) @ piece
            grad_k[:, :, first:stop] += by_score.transpose(-2, -1) @ q[:, :, start:stop]
            grad_q.append(by_score @ k[:, :, first:stop])
        return torch.cat(grad_q, dim=2), grad_k, grad_v, None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """The contract of nanochat/attention.py: q, y (B, Tq, H, D), k, v (B, Tk, Hkv, D)."""
    if not torch.compiler.is_compiling() or not torch.is_grad_enabled() or q.size(1) != k.size(1):
        return sdpa.attend(q, k, v, window)
    group = q.size(2) // k.size(2)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    return _Blocks.apply(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window).transpose(1, 2)
