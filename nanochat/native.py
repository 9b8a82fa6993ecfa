"""A step, prompts included, as one call of our C (kernels/cpu_forward.c), for fp32 and int8 weights on a CPU.

A step of a small model is a hundred small operations, each of which costs more in Python and torch than in arithmetic,
and attention was a call a row. In C they are one call: `Native` lays the weights out in panels, gives it the tokens and
the pieces of the cache that each sees, and gets logits. decode.Runner, whose layout it reads block by block, is its
slow twin.
"""

from __future__ import annotations

import ctypes
from array import array

import torch
from torch.nn import functional as F

from nanochat import gpt
from nanochat.decode import Batch, Int8Matrix, Matrix, Runner
from nanochat.kvcache import KVCache
from nanochat.runtime import prefer_huge_pages
from nanochat.sampling import MIN_TEMPERATURE, Sampling

LINE = 64  # bytes: what a processor's cache moves at once
ROOM = 1 << 24  # bytes taken at a time for weights, so that small ones too lie on large pages


def find(runner, cache: KVCache) -> Native | None:
    """What decodes for this runner; None where C can't: another device, dtype or model, no compiler."""
    if not isinstance(runner, Runner) or runner.device.type != "cpu" or runner.dtype != torch.float32:
        return None
    from nanochat.kernels import cpu_forward

    return Native(runner, cache, cpu_forward) if cpu_forward.library() else None


class Native:
    """Runs batches of tokens, each seeing its sequence up to itself. Call `refresh` before the first, and whenever the
    weights have changed.
    """

    def __init__(self, runner: Runner, cache: KVCache, kernels):
        self.runner, self.cache, self.kernels = runner, cache, kernels
        self.library = kernels.library()
        self.columns = self.library.panel_columns()
        self.scratch = torch.empty(0)
        self.step, self._kept = kernels.Step(), []
        self._room = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def refresh(self) -> None:
        """Lay the weights out. d4: about 20 ms."""
        runner, config = self.runner, self.runner.model.config
        runner.prepare()
        self._kept = []  # tensors that only C points to
        self._room = self._room[:0]
        layers = (self.kernels.Layer * config.n_layer)(*(self._layer(runner.layer(i)) for i in range(config.n_layer)))
        self._kept.append(layers)
        half = config.head_dim // 2
        cos, sin = (self._keep(runner.rope[0, :, 0, :half]), self._keep(-runner.rope[1, :, 0, half:]))
        self.model = self.kernels.Model(
            layers=ctypes.addressof(layers), head=self._matrix(runner.output()), embedding=self._keep(runner.embedding),
            smear_gate=self._keep(runner.smear), cos=cos, sin=sin, depth=config.n_layer, width=config.n_embd,
            heads=config.n_head, kv_heads=config.n_kv_head, dim=config.head_dim, smear_channels=runner.smear_channels,
            gate_channels=min(gpt.VE_GATE_CHANNELS, config.n_embd), eps=gpt.EPS, qk_scale=gpt.QK_SCALE,
            gate_scale=gpt.VE_GATE_SCALE, softcap=gpt.SOFTCAP, smear_by=runner.smear_by, backout=runner.backout,
        )  # fmt: skip

    def _keep(self, tensor: torch.Tensor) -> int:
        """The address of its values in one piece, alive as long as these weights are used."""
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _copy(self, tensor: torch.Tensor) -> int:
        """The address of a copy, side by side with the other copies."""
        size = -(-tensor.nbytes // LINE) * LINE
        if size > len(self._room):
            self._room = prefer_huge_pages(torch.empty(max(size, ROOM) + LINE, dtype=torch.uint8))
            self._kept.append(self._room)
            self._room = self._room[-self._room.data_ptr() % LINE :]
        mine, self._room = self._room[: tensor.nbytes], self._room[size:]
        mine.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return mine.data_ptr()

    def _matrix(self, matrix: Matrix, count: int | None = None):
        """The first `count` columns of a runner's matrix, in panels."""
        whole = isinstance(matrix, Int8Matrix)
        columns = (matrix.whole.t() if whole else matrix.transposed)[:, :count]  # (K, n)
        depth, count = columns.shape
        spare = -count % self.columns
        panels = F.pad(columns, (0, spare)).view(depth, -1, self.columns).transpose(0, 1)  # (panels, K, columns)
        scale = self._keep(F.pad(matrix.scale[:count].float(), (0, spare))) if whole else None
        return self.kernels.Matrix(panels=self._copy(panels), scale=scale, depth=depth, columns=count)

    def _layer(self, layer):
        config, cache = self.runner.model.config, self.cache
        gate, table, end = None, None, config.n_embd + 2 * config.kv_dim
        if layer.table is not None:
            channels = min(gpt.VE_GATE_CHANNELS, config.n_embd)
            gate, table = self._keep(layer.qkv.transposed[:channels, end:].t()), self._keep(layer.table)
        return self.kernels.Layer(
            qkv=self._matrix(layer.qkv, end), out=self._matrix(layer.out),
            up=self._matrix(layer.up), down=self._matrix(layer.down), gate=gate, table=table, keep=layer.keep,
            keys=cache.keys[layer.index].data_ptr(), values=cache.values[layer.index].data_ptr(),
            first=float(self.runner.firsts[layer.index]), group=cache.groups[layer.index],
        )  # fmt: skip

    def __call__(self, batch: Batch, wanted: list[int] | None = None) -> torch.Tensor:
        """fp32 logits (rows, V), or (len(wanted), V) of these rows."""
        step, rows = self.step, len(batch.ids)
        starts, pieces, longest = self._pieces(batch)
        held = [array("q", x) for x in (batch.ids, batch.previous, batch.positions, starts, pieces)]
        step.ids, step.previous, step.positions, step.starts, step.pieces = (x.buffer_info()[0] for x in held)
        step.rows, step.threads, step.longest = rows, torch.get_num_threads(), longest
        need = self.library.scratch_floats(ctypes.byref(self.model), ctypes.byref(step))
        if len(self.scratch) < need:
            self.scratch = torch.empty(need)
        step.scratch = self.scratch.data_ptr()
        if wanted is not None:
            held.append(array("q", wanted))
            step.wanted_rows = rows = len(wanted)
        step.wanted = None if wanted is None else held[-1].buffer_info()[0] or 1  # of nothing there is no address
        logits = torch.empty(rows, self.model.head.columns)
        step.logits = logits.data_ptr()
        self.library.forward(ctypes.byref(self.model), ctypes.byref(step))
        return logits

    def knobs(self, rows: list[Sampling]) -> Knobs | None:
        """For drawing with these parameters; None where one of them needs all of the vocabulary sorted."""
        kinds = {row.kind() for row in rows}
        kept = max(row.top_k or 0 for row in rows)
        return Knobs(rows, self) if "sorted" not in kinds and kept <= self.library.most_kept() else None

    def _pieces(self, batch: Batch) -> tuple[list[int], list[int], int]:
        """For each group and row what it sees: where its pieces begin in the second list, which is (start, stop) of
        each, the last one's end the row's own place; and the most tokens that a row sees.
        """
        starts, pieces, longest = [], [], 0
        for group, window in enumerate(self.cache.windows):
            starts.append(len(pieces) // 2)
            for pages, position in zip(batch.owners, batch.positions):
                low = max(0, position - window)
                longest = max(longest, position + 1 - low)
                for piece in pages.ranges(group, low, position + 1):
                    pieces += piece
                starts.append(len(pieces) // 2)
        return starts, pieces, longest


class Knobs:
    """The parameters of a step's rows for C: sampling.Knobs' twin."""

    def __init__(self, rows: list[Sampling], native: Native):
        self.native = native
        self.held = {
            "temperature": array("f", [max(float(row.temperature), MIN_TEMPERATURE) for row in rows]),
            "top_p": array("f", [float(row.top_p or 1) for row in rows]),
            "min_p": array("f", [float(row.min_p or 0) for row in rows]),
            "top_k": array("q", [1 if row.greedy else row.top_k or 0 for row in rows]),
        }
        self.job = native.kernels.Draw(rows=len(rows), **{k: x.buffer_info()[0] for k, x in self.held.items()})

    def draw(self, logits: torch.Tensor, u: list[float]) -> torch.Tensor:
        """logits (B, V) fp32, u as sampling.uniform gives it, one a row -> ids (B,) int64."""
        logits, uniform, ids = logits.contiguous(), array("f", u), torch.empty(len(u), dtype=torch.int64)
        job = self.job
        job.threads, job.vocab, job.logits = torch.get_num_threads(), logits.size(1), logits.data_ptr()
        job.u, job.ids = uniform.buffer_info()[0], ids.data_ptr()
        self.native.library.draw(ctypes.byref(job))
        return ids
