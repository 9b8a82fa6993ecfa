"""Attention by FlashAttention 3 (arXiv 2407.08608), Hopper only, from the hub of kernels.

It is executable code fetched at run time, so the revision is pinned, and nothing is fetched until all else speaks for
it (pitfall 17). Where it cannot be had, `needs` says why in one line and the next backend is taken.
"""

from __future__ import annotations

import functools

import torch

REPOSITORY = "kernels-community/flash-attn3"
# A commit, not a branch: what runs here does not change under us. [cited from the hub's history; not yet run by us: the
# hub was out of reach when this was written, and it may have no build for the newest torch, which `needs` then reports]
REVISION = "cdde5f42030606c40df258eebc1d73216b117e93"


def needs(device: torch.device, dtype: torch.dtype) -> str | None:
    """A reason why it cannot run, or None; fetches the kernel when nothing else speaks against it."""
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a Hopper GPU (compute capability 9.x)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not {dtype}"
    return _fetched()[1]


@functools.cache
def _fetched():
    """(kernel function, None) or (None, why not); once a process."""
    try:
        from kernels import get_kernel
    except ImportError:
        return None, "the package `kernels` is not installed (uv sync --extra gpu)"
    try:
        module = get_kernel(REPOSITORY, revision=REVISION)
        return getattr(module, "flash_attn_interface", module).flash_attn_func, None
    except (ImportError, OSError, ValueError, RuntimeError, AttributeError) as error:
        return None, f"could not be fetched: {' '.join(str(error).split())[:160]}"


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """The contract of nanochat/attention.py: q, y (B, Tq, H, D), k, v (B, Tk, Hkv, D)."""
    size = (-1, 0) if window >= k.size(1) - 1 else (window, 0)
    y = _fetched()[0](q, k, v, causal=True, window_size=size)
    return y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp too
