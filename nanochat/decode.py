"""The model as the engine runs it: GPT.forward's twin over any tokens of any sequences, its weights laid out once.

`GPT.forward` is the slow twin and defines what is right (tests/test_decode.py). Here N tokens stand in one column,
whichever sequences they belong to; only attention (nanochat/paged.py) knows whose they are. A decode step reads every
weight for a few tokens, so what costs is memory traffic and the number of small operations. Hence: weights are in the
activations' dtype once; query, key, value and gate share one product; the embedding table is normed beforehand and
holds a row of zeros for "no token before"; rotation is two multiplications with a doubled table; the residual sums are
part of other operations.

Measured, one thread, fp32, V = 8192, C = 256, us for the head alone at 1, 8 and 32 rows: as stored 316, 1056, 1460;
transposed 321, 411, 1268; oneDNN's packed layout 361, 528, 1465; bf16 313, 661, 2244; int8 (bf16 activations) 163, 668,
2725. So on CPUs weights lie transposed, and int8 is for few rows.

Shape letters: N tokens, C width, H heads, Hkv key/value heads, D head dim, V vocabulary, L layers.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nanochat import gpt
from nanochat.blocks import Pages
from nanochat.errors import UserError
from nanochat.gpt import GPT

INT8_ROWS = 4  # up to so many, int8 products are the faster ones on a CPU


class Batch:
    """What a forward reads, as lists: N tokens, the one before each (-1: none), its position, whose pages it uses."""

    def __init__(self):
        self.ids: list[int] = []
        self.previous: list[int] = []
        self.positions: list[int] = []
        self.owners: list[Pages] = []

    def add(self, pages: Pages, newest: list[int], position: int) -> None:
        """One token, the last of newest; the one before it, if there is one, is the second last."""
        self.ids.append(newest[-1])
        self.previous.append(newest[-2] if len(newest) > 1 else -1)
        self.positions.append(position)
        self.owners.append(pages)

    def extend(self, pages: Pages, ids: list[int], start: int, count: int) -> None:
        """The count tokens of ids from `start` on."""
        self.owners += [pages] * count
        self.ids += ids[start : start + count]
        self.previous += ids[start - 1 : start + count - 1] if start else [-1, *ids[: count - 1]]
        self.positions += range(start, start + count)


class Matrix:
    """A weight (n, K) for products x (N, K) -> (N, n)."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        weight = weight.detach().to(dtype)
        self.transposed = weight.t().contiguous() if weight.device.type == "cpu" else weight.t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.transposed


class Int8Matrix(Matrix):
    """The same with the weight as whole numbers from -127 to 127 and a scale a row of it."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        weight = weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp_(min=1e-12) / 127
        self.whole, self.scale = (weight / scale).round().to(torch.int8), scale.squeeze(1).bfloat16()
        super().__init__(self.whole * self.scale.float().unsqueeze(1), dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > INT8_ROWS:
            return x @ self.transposed
        return torch._weight_int8pack_mm(x.bfloat16(), self.whole, self.scale).to(x.dtype)


class Layer:
    """A block's weights and its forward."""

    def __init__(self, model: GPT, index: int, kind: type[Matrix], dtype: torch.dtype, norm):
        block, config = model.transformer.h[index], model.config
        attn = block.attn
        self.index, self.norm = index, norm
        self.heads, self.kv_heads, self.dim = config.n_head, config.n_kv_head, config.head_dim
        parts = [attn.c_q.weight, attn.c_k.weight, attn.c_v.weight]
        self.table = None
        if hasattr(attn, "ve_gate"):
            self.table = model.value_embeds[str(index)].weight.detach().to(dtype)  # (V, Hkv D)
            gate = attn.ve_gate.weight
            parts.append(F.pad(gate, (0, config.n_embd - gate.size(1))))  # reads the first channels only
        self.qkv = kind(torch.cat([part.detach() for part in parts]), dtype)
        self.out = kind(attn.c_proj.weight, dtype)
        self.up, self.down = kind(block.mlp.c_fc.weight, dtype), kind(block.mlp.c_proj.weight, dtype)
        self.keep = float(model.resid_lambdas[index].to(dtype))

    def __call__(self, x, first, ids, cos, sin, attention):
        """x, first (N, C): the stream, and its beginning's share; ids (N,), cos and sin (N, 1, D) -> (N, C)."""
        x = torch.add(first, x, alpha=self.keep)
        x += self.out(self._attend(self.norm(x), ids, cos, sin, attention))
        inner = self.up(self.norm(x)).relu_()
        x += self.down(inner.mul_(inner))
        return x

    def _attend(self, x, ids, cos, sin, attention):
        both = self.heads + self.kv_heads
        qkv = self.qkv(x)  # (N, H D + 2 Hkv D [+ Hkv])
        qk = qkv[:, : both * self.dim].view(-1, both, self.dim)
        qk = self.norm(torch.addcmul(qk * cos, qk.roll(self.dim // 2, -1), sin), gpt.QK_SCALE)
        end = (both + self.kv_heads) * self.dim
        v = qkv[:, both * self.dim : end].view(-1, self.kv_heads, self.dim)
        if self.table is not None:
            gate = qkv[:, end:].sigmoid().unsqueeze(-1)  # (N, Hkv, 1)
            v = torch.addcmul(v, gate, F.embedding(ids, self.table).view_as(v), value=gpt.VE_GATE_SCALE)
        return attention.attend(self.index, qk[:, : self.heads], qk[:, self.heads :], v).flatten(1)


class Norm:
    """gpt.norm times a scale. On CPUs by few small operations: torch's is five times as many (9.4 against 4.8 us)."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.quick = device.type == "cpu" and dtype in (torch.float32, torch.float64)
        self._eps: dict[float, torch.Tensor] = {}
        self.dtype = dtype

    def __call__(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        if not self.quick:
            return gpt.norm(x) if scale == 1.0 else gpt.norm(x) * scale
        if scale not in self._eps:
            self._eps[scale] = torch.tensor(gpt.EPS / scale**2, dtype=self.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self._eps[scale], length, length, value=1 / (x.size(-1) * scale**2)).rsqrt_()


class Runner:
    """A GPT for the engine. Call `refresh` before the first forward and whenever the weights have changed.

    int8: matrices and head as 8-bit whole numbers (CPU only), which reads a quarter of the bytes for a few rows.
    """

    def __init__(self, model: GPT, int8: bool = False):
        self.model, self._kind = model, Int8Matrix if int8 else Matrix
        stored, self.device = model.lm_head.weight.dtype, model.lm_head.weight.device
        # a CPU answers in fp32 while it trains in bf16 too: each step reads all weights, and our C reads those fastest
        cast = stored == torch.float32 and self.device.type != "cpu"
        self.dtype = model.compute_dtype if cast else stored
        if int8 and self.device.type != "cpu":
            raise UserError("int8 weights are for CPUs: leave int8 out on this device.")

    @torch.no_grad()
    def refresh(self) -> None:
        """Lay the weights out. d4 on a CPU: about 10 ms."""
        self.prepare()
        self.layers = [self.layer(i) for i in range(self.model.config.n_layer)]
        self.head = self.output()

    def layer(self, index: int) -> Layer:
        """A block's weights, laid out."""
        return Layer(self.model, index, self._kind, self.dtype, self.norm)

    def output(self) -> Matrix:
        """The head's."""
        return self._kind(self.model.lm_head.weight[: self.model.config.vocab_size], self.dtype)

    @torch.no_grad()
    def prepare(self) -> None:
        """Lay out all but blocks and head."""
        model = self.model
        self.norm = Norm(self.device, self.dtype)
        table = gpt.norm(model.transformer.wte.weight.detach().to(self.dtype))
        self.embedding = F.pad(table, (0, 0, 0, 1))  # its last row, of zeros, is index -1's
        self.smear_channels = model.smear_gate.in_features
        self.smear = model.smear_gate.weight.detach().t().to(self.dtype).contiguous()  # (channels, 1)
        self.smear_by, self.backout = (float(p.to(self.dtype)) for p in (model.smear_lambda, model.backout_lambda))
        self.firsts = model.x0_lambdas.detach().to(self.dtype).view(-1, 1, 1)  # (L, 1, 1)
        cos, sin = model.rope.to(self.dtype)  # (T, D/2)
        self.rope = torch.stack([torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1)]).unsqueeze(2)  # (2, T, 1, D)

    def hidden(self, ids: torch.Tensor, previous: torch.Tensor, positions: torch.Tensor, attention) -> torch.Tensor:
        """ids, previous (-1: none), positions (N,) int64 -> final normed states (N, C)."""
        cos, sin = self.rope.index_select(1, positions).unbind(0)  # each (N, 1, D)
        x = F.embedding(ids, self.embedding)
        before = F.embedding(previous % len(self.embedding), self.embedding)
        gate = (x[:, : self.smear_channels] @ self.smear).sigmoid_()
        x = torch.addcmul(x, gate, before, value=self.smear_by)
        firsts, middle = (x * self.firsts).unbind(0), None
        for layer in self.layers:
            x = layer(x, firsts[layer.index], ids, cos, sin, attention)
            if layer.index == len(self.layers) // 2:
                middle = x
        return self.norm(torch.sub(x, middle, alpha=self.backout))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """States (N, C) -> fp32 logits (N, V)."""
        return self.head(x).float().div_(gpt.SOFTCAP).tanh_().mul_(gpt.SOFTCAP)

    def __call__(self, batch: Batch, attention, wanted: list[int] | None = None) -> torch.Tensor:
        """fp32 logits (N, V), or (len(wanted), V); attention: of nanochat/paged.py."""
        columns = torch.tensor([batch.ids, batch.previous, batch.positions]).to(self.device, non_blocking=True)
        x = self.hidden(*columns, attention)
        if wanted is not None and len(wanted) < len(x):
            x = x.index_select(0, torch.tensor(wanted, dtype=torch.int64).to(self.device, non_blocking=True))
        return self.logits(x)
