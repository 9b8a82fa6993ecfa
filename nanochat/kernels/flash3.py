"""Attention by FlashAttention 3 (arXiv 2407.08608), Hopper only, from the hub of kernels.

It is executable code fetched at run time, so the revision is pinned, and nothing is fetched until all else speaks for
it (pitfall 17). Where it cannot be had, `needs` says why in one line and the next backend is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

REPOSITORY = "kernels-community/flash-attn3"
# A commit, not a branch: what runs here does not change under us. [cited from the hub's history, 2025; never run by us]
# It can't be had any more: it is older than torch 2.11, and since 0.15 `kernels` looks for repositories of another kind
# (huggingface.co/docs/kernels/migration); `needs` says so, and varlen is taken. Who reaches the hub can renew it:
# `kernels versions kernels-community/flash-attn3` lists the builds, those for torch's stable ABI serve any torch.
REVISION = "cdde5f42030606c40df258eebc1d73216b117e93"
# What the one try of this process has found: "kernel", the function, and "why" there is none. Not functools.cache:
# torch.compile looks through it, and would trace the fetching in every layer.
FOUND: dict[str, Any] = {}


def needs(device: torch.device, dtype: torch.dtype) -> str | None:
    """A reason why it cannot run, or None; fetches the kernel when nothing else speaks against it."""
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a Hopper GPU (compute capability 9.x)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not {dtype}"
    return found()["why"]


def found() -> dict[str, Any]:
    """FOUND, after the first call."""
    if not FOUND:
        kernel, why = _fetch()
        FOUND.update(kernel=kernel, why=why)
    return FOUND


def _fetch() -> tuple[Callable | None, str | None]:
    """(kernel function, None) or (None, why not)."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        from kernels import get_kernel
    except ImportError:
        return None, "the package `kernels` is not installed (uv sync --extra gpu)"
    try:  # the HTTP library's root error is the first base of the hub's own, whichever library that is
        module = get_kernel(REPOSITORY, revision=REVISION)
        return getattr(module, "flash_attn_interface", module).flash_attn_func, None
    except (ImportError, OSError, ValueError, RuntimeError, AttributeError, *HfHubHTTPError.__bases__) as error:
        return None, f"could not be fetched: {' '.join(str(error).split())[:160]}"


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """The contract of nanochat/attention.py: q, y (B, Tq, H, D), k, v (B, Tk, Hkv, D)."""
    size = (-1, 0) if window >= k.size(1) - 1 else (window, 0)
    y = found()["kernel"](q, k, v, causal=True, window_size=size)
    return y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp too
