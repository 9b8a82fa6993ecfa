"""Attention by torch's scaled_dot_product_attention: runs on every device, never builds a dense T x T mask.

Full causal attention is one call with `is_causal`. Everything else (a window, or new tokens behind a cache) goes in
blocks of queries, each against the slice of keys that it can see: a mask then has at most BLOCK x (BLOCK + window)
entries.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

BLOCK = (
    512  # queries per block [guess: large enough to keep a kernel busy, small enough that the masked corners are cheap]
)


def needs(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: it runs everywhere."""
    return None


def _sdpa(q, k, v, mask=None, causal=False):
    """Heads before positions, as torch wants it: q (B, H, Tq, D), k, v (B, Hkv, Tk, D) -> (B, H, Tq, D)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


def _block(q, k, v, window: int, start: int, stop: int):
    """Queries start..stop (of Tq) against the keys they can see."""
    past = k.size(2) - q.size(2)
    first, last = max(0, past + start - window), past + stop  # the keys that some query of the block sees
    q, k, v = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
    if stop - start == 1:
        return _sdpa(q, k, v)
    if q.size(2) == k.size(2) and window >= k.size(2) - 1:
        return _sdpa(q, k, v, causal=True)
    position = torch.arange(past + start, past + stop, device=q.device)[:, None]
    key = torch.arange(first, last, device=q.device)[None, :]
    return _sdpa(q, k, v, mask=(key <= position) & (key >= position - window))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """The contract of nanochat/attention.py: q, y (B, Tq, H, D), k, v (B, Tk, Hkv, D)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, positions, D)
    tq, tk = q.size(2), k.size(2)
    if tq == tk and window >= tk - 1:
        y = _sdpa(q, k, v, causal=True)
    else:
        y = torch.cat([_block(q, k, v, window, s, min(s + BLOCK, tq)) for s in range(0, tq, BLOCK)], dim=2)
    return y.transpose(1, 2)
