"""Training matmuls in fp8: twice the arithmetic rate of bf16 on Ada, Hopper and later. Tensorwise, dynamic scaling.

Each operand of a matmul is multiplied by one scale that takes its largest magnitude to the format's largest number,
rounded to 8 bits, multiplied with fp32 accumulation, and the scales divided out (arXiv 2209.05433). Activations and
weights are e4m3 (3 bits of mantissa), gradients e5m2 (more range). The backward reuses the forward's 8-bit copies,
which also halves what is kept. Weights stay fp32 outside; evaluation runs without fp8 (`disabled`).

Shape letters: M rows, K inputs, N outputs of a matmul.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from nanochat.errors import UserError

MINIMUM = (8, 9)  # compute capability: Ada
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE, SMALLEST = 16, 128  # the scaled matmul wants multiples of 16; below 128 quantising costs more than it saves
EPS = 1e-12  # of the largest magnitude: an all-zero tensor stays zero


def needs(device: torch.device | str) -> str | None:
    """A reason why fp8 cannot be used on this device, or None."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA GPU, and this run is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MINIMUM:
        return f"it needs compute capability 8.9 (Ada) or later, and this GPU has {major}.{minor}"
    return None


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x -> (x * scale rounded to `dtype`, 1 / scale as a fp32 scalar): the product of the two is x, nearly."""
    largest = torch.finfo(dtype).max
    amax = x.abs().amax().double().clamp(min=EPS)  # fp64: so that the scale's own rounding is nothing
    scaled = (x.float() * (largest / amax).float()).clamp(-largest, largest)  # saturate, not inf
    return scaled.to(dtype), (amax / largest).float()


def _matmul(a, a_inverse, b, b_inverse, dtype, fast):
    """a (M, K) @ b (K, N) of fp8 values, scales divided out -> (M, N). b must lie in memory by columns."""
    return torch._scaled_mm(a, b, scale_a=a_inverse, scale_b=b_inverse, out_dtype=dtype, use_fast_accum=fast)


def _by_columns(x):
    return x.t().contiguous().t()


class _Product(torch.autograd.Function):
    """x (M, K), weight (N, K) -> x @ weight.T (M, N), and both gradients, each one fp8 matmul."""

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_inverse = quantise(x, FORWARD)
        w8, w_inverse = quantise(weight, FORWARD)
        ctx.save_for_backward(x8, x_inverse, w8, w_inverse)
        ctx.dtype = x.dtype
        return _matmul(x8, x_inverse, w8.t(), w_inverse, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):
        x8, x_inverse, w8, w_inverse = ctx.saved_tensors
        g8, g_inverse = quantise(grad.contiguous(), BACKWARD)
        grad_x = _matmul(g8, g_inverse, _by_columns(w8), w_inverse, ctx.dtype, fast=False)
        grad_w = _matmul(g8.t().contiguous(), g_inverse, _by_columns(x8), x_inverse, ctx.dtype, fast=False)
        return grad_x, grad_w


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.linear in fp8: x (..., K), weight (N, K) of the same dtype -> (..., N). M not a multiple of 16: unquantised."""
    rows = x.numel() // x.size(-1)
    if rows % MULTIPLE:
        return F.linear(x, weight)
    return _Product.apply(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)


def _fits(weight: torch.Tensor) -> bool:
    return min(weight.shape) >= SMALLEST and all(size % MULTIPLE == 0 for size in weight.shape)


def convert(model: nn.Module, recipe: str = "tensorwise", simulate: bool = False) -> list[str]:
    """Switch the blocks' matrices of a GPT to fp8, in place; returns their names. UserError where that is impossible.

    The head stays exact: its loss is computed in chunks of its own. simulate: skip the hardware check (CPU tests).
    """
    if recipe != "tensorwise":
        raise UserError(f"--fp8-recipe={recipe} is not offered, use tensorwise (rowwise measured slower than bf16).")
    reason = None if simulate else needs(next(model.parameters()).device)
    if reason:
        raise UserError(f"--fp8 cannot be used here: {reason}; leave the flag out.")
    linears = [(name, m) for name, m in model.transformer.h.named_modules() if hasattr(m, "product")]
    chosen = [(name, linear) for name, linear in linears if _fits(linear.weight)]
    if not chosen:
        raise UserError(
            f"--fp8 has nothing to do: no matrix has both sides of at least {SMALLEST}; leave the flag out."
        )
    for _, module in chosen:
        module.product = product
    return [f"transformer.h.{name}" for name, _ in chosen]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model's matmuls are exact again: for evaluation and sampling."""
    converted = [module for module in model.modules() if getattr(module, "product", None) is product]
    for module in converted:
        module.product = F.linear
    try:
        yield
    finally:
        for module in converted:
            module.product = product
