"""Attention by FlexAttention: a kernel compiled for our mask that skips the blocks outside the window. CUDA only.

On CPU and MPS it has no backward (torch 2.13 raises NotImplementedError; pytorch issues 148752, 169224). It serves
the windowed layers of training. Full layers go to `sdpa`, and all where no gradient is wanted: evaluation and prompts
have a length of their own each time, and each would be compiled.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nanochat.kernels import sdpa


def needs(device: torch.device, dtype: torch.dtype) -> str | None:
    """A reason why it cannot run, or None."""
    if device.type != "cuda":
        return f"has no backward on {device.type}"
    if dtype == torch.float64:
        return "does not compute in float64"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "needs triton"
    return None


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _mask(length: int, window: int, device: torch.device):
    """The sparse block mask of a window over `length` positions; made once, it is small (blocks of 128)."""
    see = lambda b, h, i, j: (j <= i) & (j >= i - window)
    return create_block_mask(see, None, None, length, length, device=device)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """The contract of nanochat/attention.py: q, y (B, Tq, H, D), k, v (B, Tk, Hkv, D)."""
    length = k.size(1)
    if q.size(1) != length or window >= length - 1 or not torch.is_grad_enabled():
        return sdpa.attend(q, k, v, window)
    mask = _mask(length, window, q.device)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return _compiled()(*heads_first, block_mask=mask, enable_gqa=q.size(2) != k.size(2)).transpose(1, 2)
