"""Attention: what it means here, a slow reference that defines it, and the table of fast backends.

Shape letters: B rows, T positions (Tq new, Tk all), H heads, Hkv key/value heads (H is a multiple of it), D head dim.

A backend is a function `attend(q, k, v, window) -> y` with q, y (B, Tq, H, D) and k, v (B, Tk, Hkv, D), all of one
dtype. Query i stands at the absolute position p = Tk - Tq + i and sees key j iff p - window <= j <= p: `window`
counts the earlier tokens it sees besides itself, so a window of Tk - 1 or more is full causal attention. Scores are
scaled by 1/sqrt(D). Query head h reads key/value head h // (H // Hkv). Whoever owns a cache writes k and v into it; a
backend only reads.

A backend is a file in `kernels/`, imported when asked for, with `needs(device, dtype) -> reason | None` and `attend`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from nanochat.errors import UserError

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]

# Preference, best first. FlashAttention 3 first on Hopper; varlen (FlashAttention 2 in torch's core) on sm80+;
# flex is a compiled kernel for other CUDA cards; sdpa works everywhere. Training on CPU has its own: kernels/cpu_block.
BACKENDS = ("flash3", "varlen", "flex", "sdpa")


class Backend(NamedTuple):
    """A chosen backend, and why those preferred to it were passed over: [(name, reason)]."""

    name: str
    attend: Attend
    passed_over: list[tuple[str, str]]


def visible(tq: int, tk: int, window: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The (Tq, Tk) bool mask of the contract: True where query i may see key j. For references and tests only."""
    position = torch.arange(tk - tq, tk, device=device)[:, None]
    key = torch.arange(tk, device=device)[None, :]
    return (key <= position) & (key >= position - window)


def weights(q: torch.Tensor, k: torch.Tensor, window: int) -> torch.Tensor:
    """How much each query reads of each key: (B, H, Tq, Tk), rows sum to 1, in fp32 (fp64 for fp64 inputs)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    query = q.to(dtype).transpose(1, 2)  # (B, H, Tq, D)
    key = k.to(dtype).repeat_interleave(q.size(2) // k.size(2), dim=2).transpose(1, 2)  # (B, H, Tk, D)
    scores = query @ key.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, Tq, Tk)
    return scores.masked_fill(~visible(q.size(1), k.size(1), window, q.device), -math.inf).softmax(-1)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """The definition: plain softmax attention, in fp32 (fp64 for fp64 inputs), O(Tq Tk) memory. Returns q's dtype."""
    read = weights(q, k, window)
    value = v.to(read.dtype).repeat_interleave(q.size(2) // v.size(2), dim=2).transpose(1, 2)  # (B, H, Tk, D)
    return (read @ value).transpose(1, 2).to(q.dtype)


def load(name: str) -> ModuleType:
    """Import the backend's module `nanochat.kernels.<name>`. An unknown name is a UserError."""
    if name not in BACKENDS:
        raise UserError(f"unknown attention backend {name!r}: choose auto or one of {', '.join(BACKENDS)}.")
    return importlib.import_module(f"nanochat.kernels.{name}")


def choose(device: torch.device | str, dtype: torch.dtype, name: str = "auto") -> Backend:
    """The first backend that can run on this device in this dtype; one asked for by name is used, or a UserError.

    Nothing is fetched for a backend that is not about to be chosen (pitfall 17): flash3's `needs` downloads its pinned
    kernel only after all else holds, and says in one line why it could not.
    """
    device = torch.device(device)
    passed_over = []
    for candidate in BACKENDS if name == "auto" else (name,):
        module = load(candidate)
        reason = module.needs(device, dtype)
        if reason is None:
            return Backend(candidate, module.attend, passed_over)
        passed_over.append((candidate, reason))
    raise UserError(f"attention backend {name} cannot be used here: {passed_over[0][1]}.")
