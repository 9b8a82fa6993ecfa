"""Attention over the blocks of a KVCache, for one forward: who wrote them says where, these classes write and read.

Three ways, with one contract, `attend(layer, q, k, v) -> y`, for N new tokens, q, y (N, H, D) and k, v (N, Hkv, D), in
which each token sees its sequence's tokens up to itself, within the layer's window:

    Chunks   spans of many tokens of few sequences, as when prompts are read: the model's backend, a span at a time
    Rows     any single tokens, on CPUs: over memory in one piece where it lies so, which it mostly does. Rows that
             share a beginning read it once, merged with what is their own by its weight (as flash decoding does)
    Tables   a fixed number of rows whose places and tables are tensors, so that nothing depends on the host: what a
             CUDA graph needs. By torch's varlen attention where it reads blocks, else by gathering (the slow twin)

Shape letters: N tokens, R rows, G = H / Hkv query heads a key/value head, S tokens a block, W blocks of a table.
"""

from __future__ import annotations

import functools
import inspect
import math

import torch
from torch.nn import functional as F

from nanochat.blocks import Pages

SHORT = 128  # tokens up to which gathering is cheaper than a call [estimated: 20 us a call, 0.3 us a token of d4]


class Chunks:
    """spans: (pages, start, count) for the count tokens from position start on, in the order of the new tokens."""

    def __init__(self, cache, attend, spans: list[tuple[Pages, int, int]]):
        self.cache, self._attend, self.spans = cache, attend, spans
        device, groups = cache.memory[0].device, range(len(cache.windows))
        slots = [[p.slot(g, i) for p, start, count in spans for i in range(start, start + count)] for g in groups]
        self.slots = torch.tensor(slots).to(device, non_blocking=True)  # (groups, N)
        self.read = [[self._pieces(span, g, device) for span in spans] for g in groups]

    def _pieces(self, span, group: int, device) -> slice | torch.Tensor:
        """Which of the group's tokens the span sees."""
        pages, start, count = span
        low = max(0, start - self.cache.windows[group])
        pieces = pages.ranges(group, low, start + count)
        if len(pieces) == 1:
            return slice(*pieces[0])
        return torch.cat([torch.arange(a, b) for a, b in pieces]).to(device, non_blocking=True)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See the module's docstring."""
        cache, group = self.cache, self.cache.groups[layer]
        keys, values = cache.keys[layer], cache.values[layer]
        keys.index_copy_(0, self.slots[group], k)
        values.index_copy_(0, self.slots[group], v)
        out, at = [], 0
        for (_, start, count), seen in zip(self.spans, self.read[group]):
            new = slice(at, at + count)
            at += count
            whole = start == 0  # then the new keys are all there are, side by side
            key, value = (k[new], v[new]) if whole else (keys[seen], values[seen])
            out.append(self._attend(q[None, new], key[None], value[None], cache.windows[group])[0])
        return out[0] if len(out) == 1 else torch.cat(out)


class Rows:
    """rows: (pages, position) of each token; positions before it are in the cache, or among the rows.

    What a row sees are pieces of memory, (start, stop), mostly one. A piece that several rows see is read once for all
    of them; rows whose own part is one short piece are gathered and padded, since a call each would cost more; the
    others are read where they lie.
    """

    def __init__(self, cache, rows: list[tuple[Pages, int]]):
        self.cache, self.device = cache, cache.memory[0].device
        slots = [[pages.slot(g, position) for pages, position in rows] for g in range(len(cache.windows))]
        self.slots = torch.tensor(slots).to(self.device)  # (groups, N)
        self.plans = [self._plan(g, rows) for g in range(len(cache.windows))]

    def _plan(self, group: int, rows):
        """([(where to read, rows that see it)], the rows in that order, whether a row has several entries).

        Where: a list of pieces to read as one, or for M rows together indices (M, T) and a mask (M, 1, 1, T).
        """
        window = self.cache.windows[group]
        seen = [pages.ranges(group, max(0, position - window), position + 1) for pages, position in rows]
        readers: dict[tuple[int, int], list[int]] = {}
        for row, pieces in enumerate(seen):
            for piece in pieces:
                readers.setdefault(piece, []).append(row)
        plan = [([piece], members) for piece, members in readers.items() if len(members) > 1]
        own = [([piece for piece in pieces if len(readers[piece]) == 1], [row]) for row, pieces in enumerate(seen)]
        short = [row for row, (p, _) in enumerate(own) if len(p) == 1 and p[0][1] - p[0][0] <= SHORT]
        if len(short) > 1:
            plan.append((self._together([own[row][0][0] for row in short]), short))
            own = [own[row] for row in sorted(set(range(len(rows))) - set(short))]
        plan += [entry for entry in own if entry[0]]
        order = [row for _, members in plan for row in members]
        several = len(order) > len(rows)
        return plan, None if order == list(range(len(rows))) else torch.tensor(order).to(self.device), several

    def _together(self, pieces: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        start, stop = torch.tensor(pieces).t().unsqueeze(-1)  # each (M, 1)
        at = start + torch.arange(int((stop - start).max()))
        mask = torch.zeros(at.shape, dtype=self.cache.memory[0].dtype).masked_fill_(at >= stop, -math.inf)
        return torch.minimum(at, stop - 1).to(self.device), mask[:, None, None].to(self.device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See the module's docstring."""
        cache, group = self.cache, self.cache.groups[layer]
        keys, values = cache.keys[layer], cache.values[layer]
        keys.index_copy_(0, self.slots[group], k)
        values.index_copy_(0, self.slots[group], v)
        count, heads, dim = q.shape
        q = q.view(count, k.size(1), -1, dim)  # (N, Hkv, G, D)
        plan, order, several = self.plans[group]
        parts = [_look(q, keys, values, where, members, several) for where, members in plan]
        if several:
            return _merge(parts, order, q).reshape(count, heads, dim)
        y = parts[0][0] if len(parts) == 1 else torch.cat([y for y, _ in parts])  # (N, Hkv, G, D)
        return (y if order is None else torch.empty_like(y).index_copy_(0, order, y)).reshape(count, heads, dim)


def _look(q, keys, values, where, members, weigh: bool):
    """q (N, Hkv, G, D), keys, values (., Hkv, D) -> what the rows M see there (M, Hkv, G, D), and if it is to be
    weighed the log of the sum of their weights (M, Hkv, G).
    """
    rows, (_, kv_heads, group, dim) = len(members), q.shape
    mine = q if rows == len(q) else q.narrow(0, members[0], 1) if rows == 1 else q[members]
    mask = None
    if isinstance(where, tuple):  # rows together: they are the batch
        at, mask = where
        keys, values = (x.index_select(0, at.view(-1)).unflatten(0, at.shape).transpose(1, 2) for x in (keys, values))
    else:
        keys, values = _read(keys, where), _read(values, where)
        if rows > 1:  # rows that see the same: further queries
            mine = mine.transpose(0, 1).reshape(1, kv_heads, rows * group, dim)
    if not weigh:
        y, total = F.scaled_dot_product_attention(mine, keys, values, attn_mask=mask), None
    elif mine.device.type == "cpu":
        y, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(mine, keys, values, attn_mask=mask)
    else:
        scores = (mine @ keys.transpose(-2, -1)).float() / math.sqrt(dim) + (0 if mask is None else mask)
        y, total = scores.softmax(-1).to(values.dtype) @ values, scores.logsumexp(-1)
    if len(y) == rows:
        return y, total
    y = y.view(kv_heads, rows, group, dim).transpose(0, 1)
    return y, total if total is None else total.view(kv_heads, rows, group).transpose(0, 1)


def _read(memory: torch.Tensor, pieces: list[tuple[int, int]]) -> torch.Tensor:
    """memory (., Hkv, D) -> (1, Hkv, T, D): a view where there is one piece."""
    parts = [memory.narrow(0, start, stop - start) for start, stop in pieces]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1).unsqueeze(0)


def _merge(parts, order, q):
    """Weigh the parts of each row: parts from `_look`, order (P,) their rows -> (N, Hkv, G, D)."""
    y, total = torch.cat([y for y, _ in parts]), torch.cat([total for _, total in parts])
    wide = torch.promote_types(q.dtype, torch.float32)
    weight = (total - total.amax()).exp_().to(wide).unsqueeze(-1)  # QK norm bounds their differences
    sums = weight.new_zeros(len(q), *weight.shape[1:]).index_add_(0, order, weight)
    mixed = weight.new_zeros(q.shape).index_add_(0, order, y * weight)
    return mixed.div_(sums).to(q.dtype)


class Tables:
    """positions (R,) int64 and tables (groups, R, W) int32 live on the device and are filled anew for each step."""

    def __init__(self, cache, positions: torch.Tensor, tables: torch.Tensor):
        self.cache, self.positions, self.tables = cache, positions, tables
        self.starts = torch.arange(len(positions) + 1, dtype=torch.int32, device=positions.device)
        self.by_blocks = positions.is_cuda and reads_blocks(cache.memory[0].dtype, cache.size)

    def prepare(self) -> None:
        """What all layers share; part of the graph."""
        size = self.cache.size
        block = self.tables.gather(2, (self.positions // size).expand(len(self.tables), -1).unsqueeze(-1)).squeeze(-1)
        self.slots = block.long() * size + self.positions % size  # (groups, R)
        self.used = (self.positions + 1).int()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See the module's docstring."""
        group = self.cache.groups[layer]
        self.cache.keys[layer].index_copy_(0, self.slots[group], k)
        self.cache.values[layer].index_copy_(0, self.slots[group], v)
        way = self._by_varlen if self.by_blocks else self._by_gathering
        return way(q, *self.cache.memory[layer], self.tables[group], self.cache.windows[group])

    def _by_varlen(self, q, keys, values, table, window):
        from torch.nn.attention.varlen import varlen_attn

        size = (window, 0) if window < self.cache.max_len else (-1, 0)
        return varlen_attn(
            q, keys, values, self.starts, None, 1, table.size(1) * self.cache.size, window_size=size,
            enable_gqa=q.size(1) != keys.size(2), seqused_k=self.used, block_table=table,
        )  # fmt: skip

    def _by_gathering(self, q, keys, values, table, window):
        rows, heads, dim = q.shape
        keys, values = (x[table].flatten(1, 2).transpose(1, 2) for x in (keys, values))  # (R, Hkv, W S, D)
        key, last = torch.arange(keys.size(2), device=q.device), self.positions.unsqueeze(1)
        seen = (key <= last) & (key >= last - window)
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -math.inf)
        q = q.view(rows, keys.size(1), -1, dim)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None, None]).reshape(rows, heads, dim)


@functools.cache
def reads_blocks(dtype: torch.dtype, size: int) -> bool:
    """Whether torch's varlen attention can read a cache of blocks of this size on this GPU; found by trying once."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        if not {"block_table", "seqused_k", "window_size"} <= inspect.signature(varlen_attn).parameters.keys():
            return False
        q = torch.zeros(1, 1, 64, dtype=dtype, device="cuda")
        memory = torch.zeros(2, size, 1, 64, dtype=dtype, device="cuda")
        starts = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        table = torch.ones(1, 1, dtype=torch.int32, device="cuda")
        varlen_attn(
            q, memory, memory, starts, None, 1, size, window_size=(-1, 0), seqused_k=starts[1:], block_table=table
        )
        return True
    except (torch.AcceleratorError, torch.OutOfMemoryError):  # RuntimeErrors too, but a fault of the GPU is no answer
        raise
    except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError):
        return False


def block_size(device: torch.device, dtype: torch.dtype) -> int:
    """Tokens a block: small ones share more; on a GPU the smallest that varlen attention reads."""
    if device.type != "cuda":
        return 16
    return next((size for size in (16, 64, 256) if reads_blocks(dtype, size)), 16)
