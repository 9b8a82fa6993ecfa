"""The language-model loss without the logits: head, soft cap and cross-entropy in chunks of rows (pitfall 18).

The whole matrix of fp32 logits, B x T x V x 4 bytes and its copies, would be the largest tensor of a training step.
Here a chunk of rows at a time is projected, capped and scored, and turned at once into its gradient (d loss / d hidden
and its share of d loss / d weight), so only one chunk of logits is ever alive and nothing is computed twice. The cap
bounds a logit, so exp needs no maximum taken off first: exp(15) V stays far below fp32's largest number.

Shape letters: N = B T rows of hidden, C width, V vocabulary (the first V rows of the head's weight; the rest is
padding), n rows of a chunk. `plain` is the slow twin and defines what is right.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nanochat.kernels import cpu_train

IGNORE = -1  # a target that is not scored
CHUNK = 1024  # rows a chunk: 1024 x 32768 fp32 logits are 128 MiB
CPU_CHUNK = 512  # on a CPU: 512 x 4096 are 8 MiB in fp32; 256 to 1024 are as fast


def _wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: the dtype of logits and losses."""
    return torch.promote_types(dtype, torch.float32)


def capped_logits(hidden: torch.Tensor, weight: torch.Tensor, vocab: int, cap: float) -> torch.Tensor:
    """hidden (..., C), weight (Vpadded, C) -> logits (..., vocab), fp32 (fp64 for fp64): cap * tanh(z / cap)."""
    z = F.linear(hidden, weight.to(hidden.dtype))[..., :vocab]
    return cap * torch.tanh(z.to(_wide(z.dtype)) / cap)


def plain(hidden, weight, targets, vocab: int, cap: float, reduction: str = "mean") -> torch.Tensor:
    """hidden (N, C), weight (Vpadded, C), targets (N,) -> loss: scalar, or (N,) with 0 where ignored for "none"."""
    logits = capped_logits(hidden, weight, vocab, cap)
    if reduction == "mean":
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / _count(targets)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)


def _count(targets: torch.Tensor) -> torch.Tensor:
    """How many targets are scored, at least 1: a batch without any target has loss 0, not NaN (pitfall 2)."""
    return (targets != IGNORE).sum().clamp(min=1)


def _in_c(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our C scores: on a CPU, where there is a compiler, and outside of what torch compiles."""
    return device.type == "cpu" and not torch.compiler.is_compiling() and cpu_train.library(dtype) is not None


def score_chunk(rows, weight, target, vocab, cap):
    """A chunk: rows (n, C), weight (Vpadded, C), target (n,) -> (losses (n,), gradients by the uncapped logits)."""
    if _in_c(rows.dtype, rows.device):
        z = rows @ weight.T
        return cpu_train.score(z, target, vocab, cap), z
    z = torch.addmm(rows.new_zeros(1, 1), rows, weight.T, beta=0, alpha=1 / cap)
    tanh = z.to(_wide(z.dtype)).tanh_()  # (n, Vpadded); in place: eagerly, memory is the cost
    scored, index = (target != IGNORE).unsqueeze(1), target.clamp(min=0).unsqueeze(1)  # (n, 1)
    weights = (cap * tanh).exp_()
    weights[:, vocab:] = 0.0
    total = weights.sum(-1, keepdim=True)  # (n, 1)
    loss = torch.where(scored, total.log() - cap * tanh.gather(1, index), 0.0).squeeze(1)
    grad = weights.mul_(scored / total).scatter_add_(1, index, -scored.to(tanh.dtype))
    return loss, grad.addcmul_(grad, tanh.square_(), value=-1).to(rows.dtype)


def _add_product(total, a, b):
    """total += a @ b, in one go where the dtypes agree."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


class _Chunked(torch.autograd.Function):
    """Summed loss; its gradient is made in the forward and only scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab, cap, chunk):
        used = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=_wide(hidden.dtype))
        grad_hidden, grad_weight = [], torch.zeros_like(weight)
        for start in range(0, hidden.size(0), chunk):
            rows = hidden[start : start + chunk]
            loss, grad = score_chunk(rows, used, targets[start : start + chunk], vocab, cap)
            total = total + loss.sum()
            grad_hidden.append(grad @ used)
            _add_product(grad_weight, grad.T, rows)
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight)
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * upstream.to(grad_hidden.dtype), grad_weight * upstream.to(grad_weight.dtype), *[None] * 4


class _PerRow(torch.autograd.Function):
    """Each row's loss; its gradient, which hangs on what each loss is multiplied by, is made in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab, cap, chunk):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.options = vocab, cap, chunk
        return _per_row(hidden, weight, targets, vocab, cap, chunk)

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, targets = ctx.saved_tensors
        vocab, cap, chunk = ctx.options
        used, grad_hidden, grad_weight = weight.to(hidden.dtype), [], torch.zeros_like(weight)
        for start in range(0, hidden.size(0), chunk):
            rows, factor = hidden[start : start + chunk], upstream[start : start + chunk].unsqueeze(1)
            grad = score_chunk(rows, used, targets[start : start + chunk], vocab, cap)[1] * factor.to(rows.dtype)
            grad_hidden.append(grad @ used)
            _add_product(grad_weight, grad.T, rows)
        return torch.cat(grad_hidden), grad_weight, *[None] * 4


def linear_cross_entropy(
    hidden, weight, targets, vocab: int, cap: float, reduction: str = "mean", chunk: int | None = None
):
    """hidden (N, C), weight (Vpadded, C), targets (N,) with -1 = ignored -> loss, fp32 (fp64 for fp64 inputs).

    "mean" (over the scored targets; 0 when there is none) and "sum" make the gradient in the forward; "none" gives
    (N,), 0 where ignored, and recomputes each chunk in the backward. At most chunk x V logits are alive.
    chunk: rows a chunk, None for CHUNK or CPU_CHUNK.
    """
    chunk = chunk or (CPU_CHUNK if hidden.device.type == "cpu" else CHUNK)
    arguments = (hidden, weight, targets, vocab, cap, chunk)
    if not torch.is_grad_enabled():
        losses = _per_row(*arguments)
    elif reduction == "none":
        losses = _PerRow.apply(*arguments)
    else:
        losses = _Chunked.apply(*arguments)
    if reduction == "none":
        return losses
    return losses.sum() / _count(targets) if reduction == "mean" else losses.sum()


def _per_row(hidden, weight, targets, vocab, cap, chunk):
    """(N,) losses without a graph, a chunk of logits at a time."""
    if _in_c(hidden.dtype, hidden.device):
        used = weight.to(hidden.dtype)
        score = lambda rows, target: cpu_train.score(rows @ used.T, target, vocab, cap, gradient=False)
    else:
        score = lambda rows, target: plain(rows, weight, target, vocab, cap, "none")
    return torch.cat([score(hidden[i : i + chunk], targets[i : i + chunk]) for i in range(0, len(hidden), chunk)])
