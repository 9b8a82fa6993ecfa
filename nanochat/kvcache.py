"""The memory of keys and values: blocks of tokens, a pool of them for every kind of window.

Layers with the same window form a group; its sequences hold the same blocks in each of its layers (nanochat/blocks.py
says who holds which), and those with a short window hold few. Memory is taken at once, up to a limit.

Shape letters: N blocks, S tokens a block, Hkv key/value heads, D head dim.
"""

from __future__ import annotations

import psutil
import torch

from nanochat.blocks import BlockPool, Pages
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.runtime import prefer_huge_pages

SHARE = 0.4  # of the free memory of a device that a cache takes at most [guess: leaves room for prefill and logits]
MOST_ON_CPU = 2 << 30  # bytes


class KVCache:
    """Blocks for sequences of up to max_len tokens; `tokens` is how many the largest group holds (None: as fits).

    None means room for `rows` whole sequences, or four (a chat's turns should outlive one reply), if memory allows.
    """

    def __init__(self, config: GPTConfig, device, dtype, *, max_len: int, rows: int, size: int, tokens=None):
        self.size, self.max_len = size, max_len
        windows = [min(window, max_len) for window in config.windows()]
        self.windows = sorted(set(windows))
        self.groups = [self.windows.index(window) for window in windows]  # of each layer
        span = -(-max_len // size) + 1
        self.spans = [min(span, -(-window // size) + 2) if window < max_len else span for window in self.windows]
        per_layer = 2 * size * config.kv_dim * torch.empty((), dtype=dtype).element_size()
        layers = [self.groups.count(group) for group in range(len(self.windows))]
        whole = sum(span * per_layer * count for span, count in zip(self.spans, layers))  # bytes of one sequence
        sequences = self._sequences(device, whole, rows) if tokens is None else tokens / (span * size)
        counts = [1 + max(int(sequences * span), self._least(span, max_len)) for span in self.spans]
        self.pools = [BlockPool(count, span) for count, span in zip(counts, self.spans)]
        shape = (size, config.n_kv_head, config.head_dim)
        # zeros, not empty: a NaN there would pass through a mask's weight of 0
        new = {"dtype": dtype, "device": device}
        self.memory = [prefer_huge_pages(torch.empty(2, counts[g], *shape, **new)).zero_() for g in self.groups]
        self.keys, self.values = ([memory[i].flatten(0, 1) for memory in self.memory] for i in (0, 1))  # (N S, Hkv, D)

    def _least(self, span: int, max_len: int) -> int:
        """Blocks that one sequence can need, with a chunk being read while the window's older blocks are still held."""
        return max(span, -(-max_len // self.size)) + 1

    def _sequences(self, device, whole: int, rows: int) -> float:
        """How many whole sequences fit the share of memory."""
        if torch.device(device).type == "cuda":  # what torch holds and nobody uses is free, though not to the driver
            held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            limit = SHARE * (torch.cuda.mem_get_info(device)[0] + held)
        else:
            limit = min(SHARE * psutil.virtual_memory().available, MOST_ON_CPU)
        if whole > limit:
            raise UserError(
                f"One sequence of {self.max_len} tokens needs {whole / 1e6:.0f} MB of cache, but there are only "
                f"{limit / 1e6:.0f} MB: lower max_len, or use a device with more memory."
            )
        return min(max(rows, 4), limit / whole)

    def pages(self) -> Pages:
        """Nothing held yet."""
        return Pages(self.pools, self.windows, self.size)

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        """Copy blocks, each (group, from, to), in every layer of the group."""
        for group, source, target in copies:
            for layer, memory in enumerate(self.memory):
                if self.groups[layer] == group:
                    memory[:, target] = memory[:, source]

    def reset(self) -> None:
        """Empty: nobody holds a block, no value of before is left, however odd."""
        self.pools = [BlockPool(len(pool.refs), span) for pool, span in zip(self.pools, self.spans)]
        for memory in self.memory:
            memory.zero_()

    def flush(self) -> None:
        """Forget what blocks that nobody holds still know."""
        for pool in self.pools:
            pool.flush()
