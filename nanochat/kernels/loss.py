"""The language-model loss without the logits: head, soft cap and cross-entropy in chunks of rows (pitfall 18).

The whole matrix of fp32 logits, B x T x V x 4 bytes and its copies, would be the largest tensor of a training step.
Here a chunk of rows at a time is projected, capped, scored, and turned at once into its gradient (d loss / d hidden
and its share of d loss / d weight), so only one chunk of logits is ever alive and nothing is computed twice.

Shape letters: N = B T rows of hidden, C width, V vocabulary (the first V rows of the head's weight; the rest is
padding). `plain` is the slow twin and defines what is right.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -1  # a target that is not scored
CHUNK = 1024  # rows a chunk: 1024 x 32768 fp32 logits are 128 MiB [measured: see dev/bench]


def capped_logits(hidden: torch.Tensor, weight: torch.Tensor, vocab: int, cap: float) -> torch.Tensor:
    """hidden (..., C), weight (Vpadded, C) -> logits (..., vocab), fp32 (fp64 for fp64): cap * tanh(z / cap)."""
    z = F.linear(hidden, weight.to(hidden.dtype))[..., :vocab]
    return cap * torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / cap)


def plain(hidden, weight, targets, vocab: int, cap: float, reduction: str = "mean") -> torch.Tensor:
    """hidden (N, C), weight (Vpadded, C), targets (N,) -> loss: scalar, or (N,) with 0 where ignored for "none"."""
    logits = capped_logits(hidden, weight, vocab, cap)
    if reduction == "mean":
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / _count(targets)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)


def _count(targets: torch.Tensor) -> torch.Tensor:
    """How many targets are scored, at least 1: a batch without any target has loss 0, not NaN (pitfall 2)."""
    return (targets != IGNORE).sum().clamp(min=1)


class _Chunked(torch.autograd.Function):
    """Summed loss; the gradient is made in the forward and only scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab, cap, chunk):
        cast = weight.to(hidden.dtype)
        total_dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=total_dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        for start in range(0, hidden.size(0), chunk):
            rows, target = hidden[start : start + chunk], targets[start : start + chunk]
            loss, grad = _score(rows, cast[:vocab], target, cap)
            total = total + loss
            grad_hidden[start : start + chunk] = grad @ cast[:vocab]
            grad_weight[:vocab] += (grad.T @ rows).to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * upstream.to(grad_hidden.dtype), grad_weight * upstream.to(grad_weight.dtype), *[None] * 4


def _score(rows, weight, target, cap):
    """One chunk: the sum of its losses, and d loss / d (uncapped logits) in the dtype of `rows`, (n, V)."""
    z = F.linear(rows, weight)  # (n, V)
    tanh = torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / cap)
    logp = torch.log_softmax(cap * tanh, dim=-1)
    scored = (target != IGNORE)[:, None]
    index = target.clamp(min=0)[:, None]  # (n, 1)
    loss = -(logp.gather(1, index) * scored).sum()
    onehot = torch.arange(weight.size(0), device=rows.device)[None, :] == index
    grad = (logp.exp() - onehot.to(logp.dtype)) * (1 - tanh * tanh) * scored
    return loss, grad.to(rows.dtype)


def linear_cross_entropy(hidden, weight, targets, vocab: int, cap: float, reduction: str = "mean", chunk: int = CHUNK):
    """hidden (N, C), weight (Vpadded, C), targets (N,) with -1 = ignored -> loss, fp32 (fp64 for fp64 inputs).

    "mean" (over the scored targets; 0 when there is none) and "sum" make the gradient in the forward; "none" gives (N,),
    0 where ignored, and recomputes each chunk in the backward. At most chunk x V logits are alive.
    """
    if reduction == "none":
        return _per_row(hidden, weight, targets, vocab, cap, chunk)
    if not torch.is_grad_enabled():
        total = _per_row(hidden, weight, targets, vocab, cap, chunk).sum()
    else:
        total = _Chunked.apply(hidden, weight, targets, vocab, cap, chunk)
    return total / _count(targets) if reduction == "mean" else total


def _per_row(hidden, weight, targets, vocab, cap, chunk):
    """(N,) losses; under grad a chunk keeps its inputs only."""
    pieces = []
    for start in range(0, hidden.size(0), chunk):
        arguments = (hidden[start : start + chunk], weight, targets[start : start + chunk], vocab, cap, "none")
        keep = not torch.is_grad_enabled()
        pieces.append(plain(*arguments) if keep else checkpoint(plain, *arguments, use_reentrant=False))
    return torch.cat(pieces)
