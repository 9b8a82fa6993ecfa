"""One more token for each row, fast: GPT.forward's twin for T = 1, with the weights laid out for it once.

`GPT.forward` is the slow twin and defines what is right (tests/test_decode.py compares them). A decode step reads every
weight for a few rows only, so what costs is memory traffic and the number of small operations. Hence: query, key, value
and gate share one matrix product; rotation is two multiplications with a doubled table; the residual sums are part of
the products; weights are cast to the activations' dtype once, not at each step; and on CPUs in fp32 the products use
the layout that is fastest for the number of rows. Measured with one thread of a Zen 4 core, V = 8192, C = 256, the head
alone: 1 row 325 -> 164 us transposed, 8 rows 2.3 -> 0.6 ms and 32 rows 3.3 -> 1.7 ms by oneDNN's packed layout.

Shape letters: B rows, C width, H heads, Hkv key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nanochat import gpt
from nanochat.gpt import GPT, norm

PACKED_ROWS = 4  # from so many rows on, oneDNN's packed layout is the faster one on a CPU


class Matrix:
    """A weight (N, K) for products x (B, K) -> (B, N); aliases the model's own memory where no other layout is needed.

    wide: a tall matrix such as the head, for which even a few rows are faster against its transpose.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, wide: bool = False):
        self.weight = weight.detach().to(dtype)
        on_cpu = weight.device.type == "cpu" and dtype == torch.float32
        self.packs = on_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        self.transposed = self.weight.t().contiguous() if on_cpu and wide else None
        self.packed: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packs and x.size(0) >= PACKED_ROWS:
            if self.packed is None:
                self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return F.linear(x, self.weight) if self.transposed is None else x @ self.transposed


class Layer:
    """A block's weights and its step."""

    def __init__(self, model: GPT, index: int, window: int, dtype: torch.dtype):
        block, config = model.transformer.h[index], model.config
        attn = block.attn
        self.index, self.window = index, window
        self.heads, self.kv_heads, self.dim = config.n_head, config.n_kv_head, config.head_dim
        parts = [attn.c_q.weight, attn.c_k.weight, attn.c_v.weight]
        self.table = None
        if hasattr(attn, "ve_gate"):
            self.table = model.value_embeds[str(index)].weight.detach()  # (V, Hkv D)
            gate = attn.ve_gate.weight
            parts.append(F.pad(gate, (0, config.n_embd - gate.size(1))))  # reads the first channels only
        self.qkv = Matrix(torch.cat([part.detach() for part in parts]), dtype)
        self.out = Matrix(attn.c_proj.weight, dtype)
        self.up, self.down = Matrix(block.mlp.c_fc.weight, dtype), Matrix(block.mlp.c_proj.weight, dtype)
        self.keep, self.first = (float(p[index].to(dtype)) for p in (model.resid_lambdas, model.x0_lambdas))

    def __call__(self, x, x0, ids, cos, sin, view):
        """x, x0 (B, C), ids (B,), cos and sin (B, 1, D) -> x (B, C)."""
        x = (x * self.keep).add_(x0, alpha=self.first)
        x.add_(self.out(self._attend(norm(x), ids, cos, sin, view)))
        return x.add_(self.down(self.up(norm(x)).relu_().square_()))

    def _attend(self, x, ids, cos, sin, view):
        rows, both = len(x), self.heads + self.kv_heads
        qkv = self.qkv(x)  # (B, H D + 2 Hkv D [+ Hkv])
        qk = qkv[:, : both * self.dim].view(rows, both, self.dim)
        qk = norm(torch.addcmul(qk * cos, qk.roll(self.dim // 2, -1), sin)) * gpt.QK_SCALE
        q, k = qk.unsqueeze(1).split([self.heads, self.kv_heads], 2)  # (B, 1, H, D), (B, 1, Hkv, D)
        end = (both + self.kv_heads) * self.dim
        v = qkv[:, both * self.dim : end].view(rows, self.kv_heads, self.dim)
        if self.table is not None:
            gate = qkv[:, end:].sigmoid().unsqueeze(-1)  # (B, Hkv, 1)
            embedded = F.embedding(ids, self.table).to(v.dtype).view_as(v)
            v = torch.addcmul(v, gate, embedded, value=gpt.VE_GATE_SCALE)
        return view.attend(self.index, q, k, v.unsqueeze(1), self.window).reshape(rows, -1)


class Decoder:
    """A GPT's decode step. Call `refresh` before the first step and whenever the weights have changed."""

    def __init__(self, model: GPT):
        self.model = model

    @torch.no_grad()
    def refresh(self) -> None:
        """Lay the weights out; packed layouts follow when first needed. d4 on a CPU: about 5 ms."""
        model, config = self.model, self.model.config
        stored = model.lm_head.weight.dtype
        self.dtype = model.compute_dtype if stored == torch.float32 else stored
        self.layers = [Layer(model, i, window, self.dtype) for i, window in enumerate(model.windows())]
        self.head = Matrix(model.lm_head.weight, self.dtype, wide=True)
        self.embedding = model.transformer.wte.weight.detach()
        gate = model.smear_gate.weight
        self.smear = F.pad(gate.detach(), (0, config.n_embd - gate.size(1))).to(self.dtype)  # (1, C)
        self.smear_by, self.backout = (float(p.to(self.dtype)) for p in (model.smear_lambda, model.backout_lambda))
        cos, sin = model.rope.to(self.dtype)  # (T, D/2)
        self.rope = torch.stack([torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1)]).unsqueeze(2)  # (2, T, 1, D)

    def __call__(self, ids: torch.Tensor, view) -> torch.Tensor:
        """ids (B, 1) int64, view: the cache's (nanochat/kvcache.py) -> fp32 logits (B, V)."""
        rows, ids = len(ids), ids.view(-1)
        positions = view.positions(rows, 1).view(-1).to(ids.device, non_blocking=True)
        cos, sin = self.rope[:, positions]  # each (B, 1, D)
        x = norm(F.embedding(ids, self.embedding).to(self.dtype))
        before = view.previous(x.unsqueeze(1)).squeeze(1)
        x = x0 = torch.addcmul(x, F.linear(x, self.smear).sigmoid(), before, value=self.smear_by)
        middle = None
        for layer in self.layers:
            x = layer(x, x0, ids, cos, sin, view)
            if layer.index == len(self.layers) // 2:
                middle = x
        x = norm(x.sub(middle, alpha=self.backout))
        logits = self.head(x)[:, : self.model.config.vocab_size]
        return logits.float().div(gpt.SOFTCAP).tanh_().mul_(gpt.SOFTCAP)
