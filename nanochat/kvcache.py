"""Keys and values of the sequences in flight: one slot a sequence, grown as it is needed.

`SlotCache` owns the memory; `SlotCache.view(...)` gives the model the few slots of one forward through the contract of
nanochat/gpt.py: `positions`, `attend`, `previous`. A view takes either one new token a row, rows of any length
(decode), or many new tokens a row behind equally many old ones (prefill: fresh rows padded on the right, or one row's
next chunk). What padding writes lies past a row's length and is overwritten before anything can see it. Who calls the
model then reports the new lengths with `advance`.

Shape letters: L layers, S slots, B rows of a forward, T new positions, Tk positions attended, H heads, Hkv key/value
heads, D head dim, C width.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


class SlotCache:
    """Memory for up to `slots` sequences of up to `max_len` tokens; lengths are known on the host, so nothing syncs."""

    def __init__(self, slots: int, max_len: int, attend):
        self.slots, self.max_len = slots, max_len
        self.attend = attend  # the model's backend, for prefill
        self.lengths = [0] * slots
        self.layers: list[torch.Tensor] = []  # each (2, S', Hkv, L', D), S' <= slots and L' <= max_len by need
        self.last: torch.Tensor | None = None  # (S', C): each slot's newest embedding, for the model's smear

    def view(self, first: int, counts: list[int]) -> View:
        """The slots [first, first + len(counts)) for a forward of counts[b] new tokens in row b."""
        return View(self, first, counts)

    def advance(self, first: int, counts: list[int]) -> None:
        """The forward is done: row b is longer by counts[b]."""
        for slot, count in enumerate(counts, first):
            self.lengths[slot] += count

    def copy(self, source: int, target: int, length: int | None = None, newest: torch.Tensor | None = None) -> None:
        """Make `target` hold all of `source`, or its first `length` tokens, of which `newest` is the last embedding."""
        if length is None:
            length, newest = self.lengths[source], self.newest(source)
        for i in range(len(self.layers)):
            memory = self.room(i, target + 1, length, self.layers[i])
            memory[:, target, :, :length] = memory[:, source, :, :length]
        if newest is not None:
            self.last_rows(target + 1, newest)[target] = newest
        self.lengths[target] = length

    def newest(self, slot: int) -> torch.Tensor | None:
        """A copy of the slot's newest embedding (C,), if the model keeps one."""
        return None if self.last is None else self.last[slot].clone()

    def room(self, layer: int, slots: int, length: int, like: torch.Tensor) -> torch.Tensor:
        """The layer's memory, at least (2, slots, Hkv, length, D); doubled when too small. like: (..., Hkv, ., D).

        New memory is zero, not left as found: a NaN there would pass through a mask's weight of 0.
        """
        if layer == len(self.layers):
            self.layers.append(like.new_empty(2, 0, like.size(-3), 0, like.size(-1)))
        memory = self.layers[layer]
        if slots > memory.size(1) or length > memory.size(3):
            bigger = memory.new_zeros(
                2,
                _doubled(memory.size(1), slots, 1, self.slots),
                memory.size(2),
                _doubled(memory.size(3), length, 64, self.max_len),
                memory.size(4),
            )
            bigger[:, : memory.size(1), :, : memory.size(3)] = memory
            self.layers[layer] = memory = bigger
        return memory

    def last_rows(self, slots: int, like: torch.Tensor) -> torch.Tensor:
        """The (S', C) memory of newest embeddings with room for `slots`. like: (..., C)."""
        if self.last is None or slots > self.last.size(0):
            old = like.new_zeros(0, like.size(-1)) if self.last is None else self.last
            self.last = old.new_zeros(_doubled(old.size(0), slots, 1, self.slots), old.size(1))
            self.last[: old.size(0)] = old
        return self.last


def _doubled(have: int, need: int, smallest: int, limit: int) -> int:
    """The next capacity: the old one if enough, else doubled until it is, within the limit."""
    while have < need:
        have = max(smallest, 2 * have)
    return max(min(have, limit), need)


class View:
    """Some neighbouring slots during one forward: the `cache` argument of GPT.forward."""

    def __init__(self, cache: SlotCache, first: int, counts: list[int]):
        self.cache, self.first, self.counts = cache, first, counts
        self.starts = cache.lengths[first : first + len(counts)]
        self.end = first + len(counts)
        self.decode = max(counts) == 1
        if not self.decode and len(set(self.starts)) > 1:
            raise ValueError("rows of one prefill must have equally many tokens before")
        self._masks: dict[int, torch.Tensor | None] = {}
        self._index: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None

    def positions(self, rows: int, new: int) -> torch.Tensor:
        """(B, T) int64, on the host: the absolute positions of the new tokens."""
        if self.decode:
            self._positions = torch.tensor(self.starts).unsqueeze(1)
        else:
            self._positions = torch.arange(self.starts[0], self.starts[0] + new).expand(rows, new)
        return self._positions

    def previous(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) normed embeddings -> (B, 1, C) of the token before each row's first new one: 0 for none."""
        memory = self.cache.last_rows(self.end, x)[self.first : self.end]
        before = memory.unsqueeze(1).clone() if any(self.starts) else torch.zeros_like(x[:, :1])
        if self.decode:
            if not all(self.starts):
                before[[b for b, start in enumerate(self.starts) if start == 0]] = 0
            memory.copy_(x[:, 0])
        else:
            memory.copy_(x[torch.arange(len(self.counts)), torch.tensor(self.counts) - 1])
        return before

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Write k, v (B, T, Hkv, D) behind each row's tokens; q (B, T, H, D) -> y (B, T, H, D), causal, windowed."""
        stop = max(self.starts) + q.size(1)
        memory = self.cache.room(layer, self.end, stop, k.transpose(1, 2))
        if self.decode:
            return self._decode(memory, q, k, v, window, stop)
        start = self.starts[0]
        keys, values = memory[:, self.first : self.end, :, :stop].transpose(2, 3)  # each (B, Tk, Hkv, D)
        keys[:, start:] = k
        values[:, start:] = v
        return self.cache.attend(q, k, v, window) if start == 0 else self.cache.attend(q, keys, values, window)

    def _decode(self, memory, q, k, v, window, stop):
        """One new token a row: the H // Hkv query heads of a key/value head stand where queries would."""
        rows, _, heads, dim = q.shape
        kv_heads = k.size(2)
        index = self._write_index(memory)
        memory[0].view(-1, dim).index_copy_(0, index, k.reshape(-1, dim))
        memory[1].view(-1, dim).index_copy_(0, index, v.reshape(-1, dim))
        low = max(0, min(self.starts) - window)
        keys, values = memory[:, self.first : self.end, :, low:stop].unbind()  # each (B, Hkv, Tk, D)
        q = q.reshape(rows, kv_heads, heads // kv_heads, dim)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask(window, low, stop, q))
        return y.reshape(rows, 1, heads, dim)

    def _write_index(self, memory) -> torch.Tensor:
        """(B Hkv,) int64: where each row's new key goes in the layer's memory seen as (S' Hkv L', D)."""
        if self._index is None:
            _, _, heads, length, _ = memory.shape
            at = (torch.arange(self.first, self.end).unsqueeze(1) * heads + torch.arange(heads)) * length
            self._index = (at + torch.tensor(self.starts).unsqueeze(1)).flatten().to(memory.device)
        return self._index

    def _mask(self, window: int, low: int, stop: int, q: torch.Tensor) -> torch.Tensor | None:
        """(B, 1, 1, stop - low) of 0 and -inf, made once a forward; None when every row sees every key."""
        if min(self.starts) + 1 == stop:
            return None
        window = min(window, stop)
        if window not in self._masks:
            position = torch.tensor(self.starts).unsqueeze(1)  # (B, 1)
            key = torch.arange(low, stop)
            hidden = (key > position) | (key < position - window)
            mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -math.inf)
            self._masks[window] = mask[:, None, None].to(q.device)
        return self._masks[window]
