"""Attention by torch.nn.attention.varlen: FlashAttention 2 with a sliding window, in torch's own core, for sm80 and
later.

Ours needs no variable lengths: the rows are laid end to end with equal lengths, for the sake of `window_size`, which
scaled_dot_product_attention lacks (added by pytorch pull request 172238; whether this torch has it is read off the
signature).
"""

from __future__ import annotations

import inspect

import torch

MINIMUM = (8, 0)  # compute capability: Ampere


def needs(device: torch.device, dtype: torch.dtype) -> str | None:
    """A reason why it cannot run, or None."""
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < MINIMUM:
        return "needs compute capability 8.0 (Ampere) or later"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not {dtype}"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen attention"
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return f"the varlen attention of torch {torch.__version__} has no sliding window"
    return None


def _starts(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """(B + 1,) int32: where each row begins among all tokens laid end to end."""
    return torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """The contract of nanochat/attention.py: q, y (B, Tq, H, D), k, v (B, Tk, Hkv, D)."""
    from torch.nn.attention.varlen import varlen_attn

    rows, tq, tk = q.size(0), q.size(1), k.size(1)
    size = (-1, 0) if window >= tk - 1 else (window, 0)  # a window's right edge aligns with the last key, as ours
    y = varlen_attn(
        *(x.flatten(0, 1) for x in (q, k, v)), _starts(rows, tq, q.device), _starts(rows, tk, q.device), tq, tk,
        window_size=size, enable_gqa=q.size(2) != k.size(2),
    )  # fmt: skip
    return y.unflatten(0, (rows, tq))
