"""The decode step with nothing but tensors of fixed shapes: on a GPU, one CUDA graph a number of rows.

A step of a small model is hundreds of kernels that each take less time than their launch; a graph launches them all at
once. It can only replay what it has recorded: hence a few numbers of rows, the unused ones padded, and every input in
memory that stays. On a CPU the same step runs without a graph, which is how the tests know it.
"""

from __future__ import annotations

import torch

from nanochat.decode import Batch, Runner
from nanochat.kvcache import KVCache
from nanochat.paged import Tables


def sizes(most: int) -> list[int]:
    """The numbers of rows that have a graph: powers of two up to 8, then multiples of 8 up to 64, then of 32."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, most + 32, 32)]
    return [size for size in steps if size < most] + [most]


class StaticDecode:
    """Runs batches of up to `most` rows. graphs: record and replay them (CUDA only)."""

    def __init__(self, runner: Runner, cache: KVCache, most: int, graphs: bool):
        self.runner, self.cache, self.sizes, self.graphs = runner, cache, sizes(most), graphs
        self.width = -(-cache.max_len // cache.size)
        device, groups = runner.device, len(cache.windows)
        pinned = {"pin_memory": device.type == "cuda"}
        self.host = torch.zeros(3, most, dtype=torch.int64, **pinned)
        self.host_tables = torch.zeros(groups, most, self.width, dtype=torch.int32, **pinned)
        self.columns = torch.zeros(3, most, dtype=torch.int64, device=device)
        self.tables = torch.zeros(groups, most, self.width, dtype=torch.int32, device=device)
        self._written: list = []  # the tables' owners and lengths, as they are on the device
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = None  # the graphs never run at the same time: they share their memory

    def refresh(self) -> None:
        """The weights have changed: lay them out and record anew."""
        self.runner.refresh()
        self._recorded.clear()
        self._pool = None  # torch refuses to record into a pool whose graphs are all gone

    def __call__(self, batch: Batch) -> torch.Tensor:
        """fp32 logits (rows, V): of every row, valid until the next call."""
        rows = len(batch.ids)
        size = next(size for size in self.sizes if size >= rows)
        self._fill(batch, rows, size)
        if not self.graphs:
            return self._step(size)[:rows]
        if size not in self._recorded:
            self._record(size)
        graph, logits = self._recorded[size]
        graph.replay()
        return logits[:rows]

    def _fill(self, batch: Batch, rows: int, size: int) -> None:
        """The batch into the memory that stays: padding reads and writes block 0 at position 0."""
        columns = [[*column, *[0] * (size - rows)] for column in (batch.ids, batch.previous, batch.positions)]
        self.host[:, :size] = torch.tensor(columns)
        self.columns.copy_(self.host, non_blocking=True)  # all of it: only memory in one piece goes without waiting
        written = [(pages, *map(len, pages.tables), *pages.gone) for pages in batch.owners] + [None] * (size - rows)
        if written == self._written:
            return
        self._written = written
        for group, tables in enumerate(self.host_tables):
            lines = [pages.tables[group][: self.width] for pages in batch.owners]
            lines = [line + [0] * (self.width - len(line)) for line in lines] + [[0] * self.width] * (size - rows)
            tables[:size] = torch.tensor(lines, dtype=torch.int32)
        self.tables.copy_(self.host_tables, non_blocking=True)

    def _step(self, size: int) -> torch.Tensor:
        ids, previous, positions = self.columns[:, :size]
        attention = Tables(self.cache, positions, self.tables[:, :size])
        attention.prepare()
        return self.runner.logits(self.runner.hidden(ids, previous, positions, attention))

    def _record(self, size: int) -> None:
        """Run it once to warm up (kernels are chosen and loaded), then record."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(size)
        self._pool = self._pool or graph.pool()
        self._recorded[size] = graph, logits
