"""A whole block, forward and backward by hand, for training on CPU: torch's matrix products and our C between them.

`gpt.Block` under autograd is the slow twin and defines what is right. By hand it is faster for three reasons. What lies
between two products is one pass over memory (cpu_train.c) where torch makes three to ten. Attention is one pass too:
scores of a block of queries never leave a core's caches, and since q and k are normed they are bounded (by
QK_SCALE^2 sqrt(D), 16.3 at 128 channels), so that the softmax needs no maximum. And rows do not meet inside a block, so
that a group of rows at a time goes through it, which bounds the memory of what does not outlive the group.
Step of the pocket run (2 threads of a Xeon with AMX): 1.4 times as fast in bf16, 1.5 in fp32, as with torch's own
operations between the products; `scripts.bench_model` compares with the plain block.

Shape letters as in nanochat/gpt.py; n rows of a group, N = n H. Norms and sums are taken in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from nanochat.kernels import cpu_train

GROUP = 2**20  # elements of a group's widest tensor, n T 4C, a thread: 4 MiB in fp32; 2^19 to 2^21 are as fast


class Shape(NamedTuple):
    """What a block is, beside its tensors."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int
    eps: float  # of the norms
    score_scale: float  # what the product of normed q and k is multiplied by
    gate_scale: float  # of the value embeddings


class Weights(NamedTuple):
    """A block's matrices, q, k and v joined; `gate` is None where the block has no value embedding."""

    qkv: torch.Tensor  # ((H + 2 Hkv) D, C)
    proj: torch.Tensor  # (C, C)
    fc: torch.Tensor  # (4C, C)
    out: torch.Tensor  # (C, 4C)
    gate: torch.Tensor | None  # (Hkv, 12)


class Group:
    """Some rows on their way through a block: the tensors that backward needs of forward, and C's view of them.

    x, x0 (n, T, C), scales (resid_lambda, x0_lambda) as floats, embedded (n, T, Hkv D) or None, rope (cos, sin), each
    (T, D/2) in the dtype of sums, w and s as in `run`. Tensors in one piece.
    """

    def __init__(self, x, x0, scales, embedded, rope, w: Weights, s: Shape):
        n, t, c = x.shape
        self.x, self.x0, self.embedded, self.rope, self.w = x, x0, embedded, rope, w
        self.tokens, self.dtype = n * t, x.dtype
        self.heads, self.kv_heads = s.heads, s.kv_heads
        self.head = (n * s.heads, t, s.head_dim)  # the shape of q, k and v
        self.c = cpu_train.Passes(
            x.dtype, n=n, t=t, c=c, heads=s.heads, kv_heads=s.kv_heads, dim=s.head_dim, window=s.window,
            channels=0 if w.gate is None else w.gate.size(1), eps=s.eps, score_scale=s.score_scale,
            gate_scale=s.gate_scale, scale=scales[0], scale0=scales[1],
        )  # fmt: skip
        self.c.see(x=x, x0=x0, embedded=embedded, gate_weight=w.gate, cos=rope[0], sin=rope[1])

    def new(self, *shape: int, sums: bool = False) -> torch.Tensor:
        """Memory for a tensor in the dtype of activations, or of sums."""
        return torch.empty(*shape, dtype=wide(self.dtype) if sums else self.dtype)

    def forward(self) -> torch.Tensor:
        """The block's output (n T, C)."""
        tokens, width, w = self.tokens, self.x.size(2), self.w
        mixed, self.normed1, self.normed2 = (self.new(tokens, width) for _ in range(3))
        self.inverse1, self.inverse2 = (self.new(tokens, sums=True) for _ in range(2))
        self.c.run("mix", mixed=mixed, normed=self.normed1, inverse=self.inverse1)
        joint = self.normed1 @ w.qkv.T
        self.q, self.k, self.v = (self.new(*self.head) for _ in range(3))
        self.inverse_q, self.inverse_k = (self.new(tokens * h, sums=True) for h in (self.heads, self.kv_heads))
        self.gate = None if w.gate is None else self.new(tokens, self.kv_heads, sums=True)
        factors = {"inverse_q": self.inverse_q, "inverse_k": self.inverse_k, "gate": self.gate}
        self.c.run("split", joint=joint, q=self.q, k=self.k, v=self.v, **factors)
        self.y, self.inverse_sum = self.new(tokens, width), self.new(*self.head[:2], sums=True)
        self.c.run("attend", y=self.y, inverse_sum=self.inverse_sum)
        x = torch.addmm(mixed, self.y, w.proj.T)
        self.c.run("mix", x=x, x0=None, normed=self.normed2, inverse=self.inverse2)
        self.hidden = self.normed2 @ w.fc.T
        squares = torch.empty_like(self.hidden)
        self.c.run("relu_squared", hidden=self.hidden, squares=squares)
        return x.addmm_(squares, w.out.T)

    def backward(self, grad, sums: Weights, by_x, by_x0):
        """grad, by the output (n T, C), is overwritten; fills by_x and by_x0 (n, T, C), adds to `sums` -> gradients by
        what is embedded (or None) and by the two scales (2,)."""
        w = self.w
        by_hidden = grad @ w.out
        self.c.run("relu_squared_back", hidden=self.hidden, squares=by_hidden)  # hidden is its square now
        add_product(sums.out, grad, self.hidden)
        add_product(sums.fc, by_hidden, self.normed2)
        by_normed = by_hidden @ w.fc
        self.c.run("norm_back", grad=by_normed, normed=self.normed2, inverse=self.inverse2, plus=grad)
        add_product(sums.proj, grad, self.y)
        by_q, by_k, by_v = (torch.empty_like(self.q) for _ in range(3))
        by_y = grad @ w.proj
        self.c.run("attend_back", grad=by_y, by_q=by_q, by_k=by_k, by_v=by_v)
        by_joint, by_embedded, by_gate = self.new(self.tokens, len(w.qkv)), None, None
        if w.gate is not None:
            by_embedded, by_gate = torch.empty_like(self.embedded), self.new(self.tokens, self.kv_heads)
        self.c.run("split_back", joint=by_joint, by_embedded=by_embedded, by_gate=by_gate)
        by_normed = by_joint @ w.qkv
        add_product(sums.qkv, by_joint, self.normed1)
        if w.gate is not None:
            channels = w.gate.size(1)
            by_normed[:, :channels].addmm_(by_gate, w.gate)
            add_product(sums.gate, by_gate, self.normed1[:, :channels])
        dots = torch.empty(self.c.items, 2, dtype=torch.float64)
        stream = {"x": self.x, "x0": self.x0, "normed": self.normed1, "inverse": self.inverse1}
        self.c.run("norm_back", grad=by_normed, plus=grad, by_x=by_x, by_x0=by_x0, dots=dots, **stream)
        return by_embedded, dots.sum(0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a^T b, summed in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a.T, b)
    else:
        total.add_(a.T @ b)


class _Block(torch.autograd.Function):
    """Forward group by group, then backward; the matrices' gradients are summed over the groups in their dtype."""

    @staticmethod
    def forward(ctx, x, x0, scale, scale0, embedded, cos, sin, s, q, k, v, proj, fc, out, gate):
        cast = lambda matrix: None if matrix is None else matrix.detach().to(x.dtype).contiguous()
        w = Weights(cast(torch.cat([q, k, v])), cast(proj), cast(fc), cast(out), cast(gate))
        rope = [table.reshape(x.size(1), -1).to(wide(x.dtype)) for table in (cos, sin)]
        ctx.n = max(GROUP * torch.get_num_threads() // (x.size(1) * len(w.fc)), 1)
        x, x0, embedded = (None if tensor is None else tensor.contiguous() for tensor in (x, x0, embedded))
        pieces, ctx.groups = [], []
        for at in range(0, x.size(0), ctx.n):
            rows = slice(at, at + ctx.n)
            found = None if embedded is None else embedded[rows]
            group = Group(x[rows], x0[rows], (float(scale), float(scale0)), found, rope, w, s)
            pieces.append(group.forward())
            ctx.groups.append(group)
        ctx.wide, ctx.parts = q.dtype, [len(q), len(k), len(v)]
        return torch.cat(pieces).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        w = ctx.groups[0].w
        sums = Weights(*(None if m is None else torch.zeros(m.shape, dtype=ctx.wide) for m in w))
        by_x, by_x0 = (torch.empty(grad.shape, dtype=grad.dtype) for _ in range(2))
        tables, dots = [], torch.zeros(2, dtype=torch.float64)
        for i, group in enumerate(ctx.groups):
            rows = slice(i * ctx.n, (i + 1) * ctx.n)
            mine = grad[rows].reshape(-1, grad.size(2)).clone(memory_format=torch.contiguous_format)
            table, dot = group.backward(mine, sums, by_x[rows], by_x0[rows])
            tables.append(table)
            dots += dot
        ctx.groups = None
        by_table = None if tables[0] is None else torch.cat(tables)
        return (
            by_x, by_x0, *dots.to(ctx.wide), by_table, None, None, None, *sums.qkv.split(ctx.parts), *sums[1:]
        )  # fmt: skip


def run(x, x0, scales, embedded, rope, shape: Shape, matrices) -> torch.Tensor:
    """x, x0 (B, T, C), scales two 0-d tensors, embedded (B, T, Hkv D) or None, rope (cos, sin) each (1, T, 1, h);
    matrices: the weights of q, k, v, proj, fc, out and gate (or None) -> the block's output (B, T, C)."""
    return _Block.apply(x, x0, *scales, embedded, *rope, shape, *matrices)
