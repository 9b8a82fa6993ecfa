"""Log probabilities of tokens and of their likeliest alternatives, packed for one copy to the host.

They are the model's own: of the logits before any temperature or cut. Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import torch

Top = list[tuple[int, float]]  # the likeliest tokens at a place, best first, with their log probabilities


def pack(logits: torch.Tensor, ids: torch.Tensor, logprobs: bool, top: int) -> torch.Tensor:
    """logits (B, V) fp32, ids (B,) -> int32 (B, 1), with logprobs (B, 2), with top > 0 (B, 2 + 2 top); see `unpack`."""
    ids = ids.unsqueeze(1)
    if not logprobs:
        return ids.int()
    total = logits.logsumexp(-1, keepdim=True)
    parts = [ids.int(), _bits(logits.gather(1, ids) - total)]
    if top:
        values, best = logits.topk(min(top, logits.size(1)))
        parts += [best.int(), _bits(values - total)]
    return torch.cat(parts, 1)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.float().contiguous().view(torch.int32)


def unpack(packed: torch.Tensor) -> tuple[list[int], list[float | None], list[Top]]:
    """What `pack` made -> ids, log probabilities (None without) and alternatives ([] without), each of B rows."""
    packed = packed.cpu()
    ids, width = packed[:, 0].tolist(), packed.size(1)
    if width == 1:
        return ids, [None] * len(ids), [[]] * len(ids)
    floats, top = packed.view(torch.float32), (width - 2) // 2
    best, values = packed[:, 2 : 2 + top].tolist(), floats[:, 2 + top :].tolist()
    return ids, floats[:, 1].tolist(), [list(zip(*row)) for row in zip(best, values)]


def of_prompt(logits: torch.Tensor, ids: torch.Tensor, top: int) -> list[tuple[float | None, Top]]:
    """logits (T, V) behind tokens, ids (T,) what came next -> for each its log probability and alternatives."""
    _, logprobs, tops = unpack(pack(logits, ids, True, top))
    return list(zip(logprobs, tops))
