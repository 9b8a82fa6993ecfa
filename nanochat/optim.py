"""Muon and AdamW update rules, and the one optimizer that applies them over any number of ranks.

Block matrices are moved by Muon: momentum, then the nearest (half-)orthogonal matrix, so that every direction of the
matrix learns at the same rate. Everything else is moved by AdamW. The model says what each tensor is (`GPT.roles()`),
this file how it moves. `muon_reference` and `adamw_reference` are the rules in plain form, one tensor at a time, and
define correct; `MuonAdamW` does the same stacked by shape and sharded over ranks.

Distribution: gradients are averaged inside `reduce()`. Muon's matrices of one shape form a stack (K, m, n) that is
split over the ranks by whole matrices; an AdamW tensor is split as one flat vector (n,), whatever its shape. Any world
size works: the last chunks are short or empty. Each rank keeps the state of its chunk only (ZeRO-1, arXiv 1910.02054);
`state()` gives whole tensors by parameter name, so a checkpoint fits any world.

Shape letters: K matrices of one shape m x n; s = min(m, n).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from nanochat.errors import refuse
from nanochat.runtime import Runtime

# Polar Express, arXiv 2505.16932: (a, b, c) of the five optimal odd polynomials, safety 2e-2, cushion 2
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.01  # the norm is over-estimated by 1 %, so that no singular value starts above 1
MUON_BETA2 = 0.9  # NorMuon's second moment, published
ROW_EPS, NORM_EPS, MOMENT_EPS = 1e-7, 1e-6, 1e-10


class AdamRule(NamedTuple):
    """What AdamW needs beside the learning rate; its decay is constant."""

    beta1: float
    beta2: float
    weight_decay: float
    eps: float = 1e-10


ADAM_RULES = {  # published, tuned at depth 12 to 24
    "head": AdamRule(0.8, 0.96, 0.01),
    "embedding": AdamRule(0.8, 0.995, 0.001),
    "value_embedding": AdamRule(0.8, 0.995, 0.01),
    "resid": AdamRule(0.8, 0.95, 0.05),
    "x0": AdamRule(0.96, 0.95, 0.0),
    "smear_backout": AdamRule(0.8, 0.95, 0.0),
}


# --- the rules in plain form: one tensor, nothing in place ---------------------------------------------------------


def polar_reference(g: torch.Tensor) -> torch.Tensor:  # (m, n) -> (m, n)
    """The orthogonal factor of g's polar decomposition: singular vectors kept, singular values brought near 1."""
    wide = g.shape[0] <= g.shape[1]
    x = g if wide else g.T
    x = x / (x.norm() * SAFETY + NORM_EPS)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T  # (s, s)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


def muon_reference(p, g, m, v, lr, momentum, weight_decay, beta2=MUON_BETA2):
    """One Muon step of one matrix p (m, n) with gradient g; m (m, n), v (m, 1) or (1, n). Returns the new p, m, v."""
    rows, cols = p.shape
    m = m + (1 - momentum) * (g - m)
    g = g + momentum * (m - g)  # Nesterov: look one momentum step ahead
    row = g.norm(dim=1, keepdim=True).clamp_min(ROW_EPS)
    g = g * (row.mean() / row)  # MuonEq: no row outweighs another before the polar step
    g = polar_reference(g)
    g = g * (math.sqrt(min(rows, cols)) / g.norm().clamp_min(NORM_EPS))  # Muon+, arXiv 2602.21545
    square = g.square().mean(dim=1 if rows >= cols else 0, keepdim=True)
    v = v + (1 - beta2) * (square - v)  # NorMuon, arXiv 2510.05491
    scaled = g * v.clamp_min(MOMENT_EPS).rsqrt()
    g = scaled * (g.norm() / scaled.norm().clamp_min(MOMENT_EPS))
    lr = lr * math.sqrt(max(1, rows / cols))
    return p - lr * (g + weight_decay * p * (g * p >= 0)), m, v  # cautious decay: only where it agrees with the step


def adamw_reference(p, g, m, v, t, lr, rule: AdamRule):
    """Step t (from 1) of AdamW, arXiv 1711.05101, on any tensor. Returns the new p, m, v."""
    p = p * (1 - lr * rule.weight_decay)
    m = m + (1 - rule.beta1) * (g - m)
    v = v + (1 - rule.beta2) * (g.square() - v)
    denominator = (v / (1 - rule.beta2**t)).sqrt() + rule.eps
    return p - lr * (m / (1 - rule.beta1**t)) / denominator, m, v


# --- the same, fast: a stack of matrices at once, in place ---------------------------------------------------------


def polar(x: torch.Tensor) -> torch.Tensor:  # (K, m, n), Frobenius norms under 1 -> (K, m, n)
    """Polar Express on a stack, on the smaller Gram side."""
    tall, (short, long) = x.shape[-2] > x.shape[-1], sorted(x.shape[-2:])
    if long > 1.5 * short and x.device.type == "cpu" and x.dtype != torch.bfloat16:
        return polar_by_gram(x)
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)  # (K, s, s)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
    return x


def polar_by_gram(x: torch.Tensor) -> torch.Tensor:  # (K, m, n), Frobenius norms under 1 -> (K, m, n)
    """The same polynomials multiplied up as s x s matrices (they commute: all are polynomials in one Gram matrix).

    With r = long/short side it costs (4r + 34) s^3 flops, not (20r + 10) s^3: half the time at 1024 x 256. It needs
    true fp32 products; within 6e-4 of `polar` for singular values over ten decades, 1e-5 for random ones (measured).
    """
    tall = x.shape[-2] > x.shape[-1]
    gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)  # (K, s, s)
    product = None
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)  # a I + b A + c A^2
        product = factor if product is None else torch.bmm(product, factor)
        if i + 1 < len(POLAR_EXPRESS):
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    return torch.bmm(x, product) if tall else torch.bmm(product, x)


def norms(x: torch.Tensor) -> torch.Tensor:  # (K, m, n) -> (K, 1, 1)
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


def muon_update(g, m, v, momentum, beta2=MUON_BETA2, dtype=None) -> torch.Tensor:
    """The direction of a Muon step for a stack; g (K, m, n) is overwritten, m and v move in place."""
    rows, cols = g.shape[-2:]
    m.lerp_(g, 1 - momentum)
    g.lerp_(m, momentum)
    row = torch.linalg.vector_norm(g, dim=-1, keepdim=True).clamp_min_(ROW_EPS)  # (K, m, 1)
    g.mul_(row.mean(dim=-2, keepdim=True).div(row))
    g.div_(norms(g).mul_(SAFETY).add_(NORM_EPS))
    x = polar(g.to(dtype or g.dtype)).to(g.dtype)
    x.mul_(math.sqrt(min(rows, cols)) / norms(x).clamp_min_(NORM_EPS))
    side = -1 if rows >= cols else -2
    v.lerp_(x.square().mean(dim=side, keepdim=True), 1 - beta2)
    before = norms(x)
    x.mul_(v.clamp_min(MOMENT_EPS).rsqrt_())
    return x.mul_(before.div_(norms(x).clamp_min_(MOMENT_EPS)))


def cautious_(p, update, lr, weight_decay) -> None:
    """p <- p - lr (update + weight_decay p [update p >= 0]), in place on a stack."""
    rows, cols = p.shape[-2:]
    lr = lr * math.sqrt(max(1, rows / cols))
    if weight_decay:
        agrees = (update * p) >= 0
        update = update.addcmul(p, agrees.to(p.dtype), value=weight_decay)
    p.add_(update, alpha=-lr)


# --- who owns what ------------------------------------------------------------------------------------------------


def padded(x: torch.Tensor, length: int) -> torch.Tensor:  # (n, ...) -> (length, ...), zeros at the end
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])]) if len(x) < length else x


class Split:
    """A first dimension of n cut into `world` equal chunks, the last ones short or empty; [lo, hi) is this rank's."""

    def __init__(self, n: int, runtime: Runtime):
        self.n, self.world = n, runtime.world
        self.chunk = -(-n // runtime.world)
        self.lo = min(runtime.rank * self.chunk, n)
        self.hi = min(self.lo + self.chunk, n)

    def scatter(self, full: torch.Tensor):  # (n, ...) on each rank -> (chunk, ...) sum over ranks
        """Start the reduction; returns the tensor to be filled and what to wait for (None in a world of one)."""
        if self.world == 1:
            return full, None
        part = full.new_empty(self.chunk, *full.shape[1:])
        return part, dist.reduce_scatter_tensor(part, padded(full, self.chunk * self.world), async_op=True)

    def gather(self, part: torch.Tensor):  # (hi - lo, ...) -> (chunk * world, ...), of which the first n count
        """Start the collection of every rank's part; returns as `scatter`."""
        if self.world == 1:
            return part, None
        full = part.new_empty(self.chunk * self.world, *part.shape[1:])
        return full, dist.all_gather_into_tensor(full, padded(part, self.chunk), async_op=True)

    def whole(self, part: torch.Tensor) -> torch.Tensor:  # (hi - lo, ...) -> (n, ...)
        full, work = self.gather(part)
        if work is not None:
            work.wait()
        return full[: self.n]


class Group:
    """Tensors reduced, moved and gathered together; `grad` is this rank's averaged part between reduce and step."""

    def __init__(self, named: list[tuple[str, torch.Tensor]], lr: float, split: Split):
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.lr, self.split = lr, split
        self.grad = self.full = self.work = None

    def launch(self) -> None:
        """Start averaging the gradients over the ranks; a missing gradient counts as zero."""
        full = self.collect([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params])
        self.grad, self.work = self.split.scatter(full)

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        self.work = None

    def settle(self, factor: float) -> torch.Tensor:
        """Wait for the sum, multiply it by `factor`; returns the norm of this rank's part."""
        self.wait()
        self.grad = self.grad[: self.split.hi - self.split.lo]
        if factor != 1.0:
            self.grad.mul_(factor)
        return torch.linalg.vector_norm(self.grad)

    def release(self) -> None:
        """Wait for the new values of all ranks' parts and put them in place."""
        self.wait()
        self.spread(self.full)
        self.grad = self.full = None


class MuonGroup(Group):
    """K block matrices of one shape, split over the ranks by whole matrices."""

    def __init__(self, named, lr, runtime, dtype):
        super().__init__(named, lr, Split(len(named), runtime))
        self.dtype = dtype
        p, count = self.params[0], self.split.hi - self.split.lo
        rows, cols = p.shape
        self.moments = {
            "momentum": p.new_zeros(count, rows, cols),
            "second": p.new_zeros(count, rows, 1) if rows >= cols else p.new_zeros(count, 1, cols),
        }

    def collect(self, grads):  # K of (m, n) -> (K, m, n), a copy
        return torch.stack(grads)

    def update(self, lr_mult: float, momentum: float, weight_decay: float, t: int) -> None:
        own, values = self.params[self.split.lo : self.split.hi], self.grad
        if own:
            direction = muon_update(self.grad, *self.moments.values(), momentum, dtype=self.dtype)
            values = torch.stack([p.data for p in own])
            cautious_(values, direction, self.lr * lr_mult, weight_decay)
        self.full, self.work = self.split.gather(values)

    def spread(self, values):  # (>= K, m, n)
        torch._foreach_copy_([p.data for p in self.params], list(values[: len(self.params)].unbind(0)))

    def state(self):
        """(name, moment, whole tensor) of every matrix; collective."""
        for kind, part in self.moments.items():
            for name, whole in zip(self.names, self.split.whole(part), strict=True):
                yield f"{name}.{kind}", whole

    def load(self, state):
        for kind, part in self.moments.items():
            for own, name in zip(part, self.names[self.split.lo : self.split.hi], strict=True):
                own.copy_(state[f"{name}.{kind}"])

    def shapes(self):
        return {f"{name}.{kind}": part.shape[1:] for kind, part in self.moments.items() for name in self.names}


class AdamGroup(Group):
    """One tensor of any shape, split over the ranks as a flat vector (n,)."""

    def __init__(self, named, lr, runtime, rule: AdamRule):
        super().__init__(named, lr, Split(named[0][1].numel(), runtime))
        self.rule, (self.param,) = rule, self.params
        count = self.split.hi - self.split.lo
        self.moments = {"exp_avg": self.param.new_zeros(count), "exp_avg_sq": self.param.new_zeros(count)}
        self.steps = torch.zeros((), dtype=torch.float32, device=self.param.device)

    def collect(self, grads):
        return grads[0].reshape(-1)

    def update(self, lr_mult: float, momentum: float, weight_decay: float, t: int) -> None:
        own = self.param.data.view(-1)[self.split.lo : self.split.hi]
        if own.numel():
            adamw(
                [own], [self.grad], *([moment] for moment in self.moments.values()), [], [self.steps.fill_(t - 1)],
                lr=self.lr * lr_mult, **self.rule._asdict(), fused=True, amsgrad=False, maximize=False,
            )  # fmt: skip
        self.full, self.work = self.split.gather(own)

    def spread(self, values):  # (>= n,); in a world of one `values` is the parameter itself
        if self.split.world > 1:
            self.param.data.view(-1).copy_(values[: self.split.n])

    def state(self):
        for kind, part in self.moments.items():
            yield f"{self.names[0]}.{kind}", self.split.whole(part).view_as(self.param)

    def load(self, state):
        for kind, part in self.moments.items():
            part.copy_(state[f"{self.names[0]}.{kind}"].reshape(-1)[self.split.lo : self.split.hi])

    def shapes(self):
        return {f"{self.names[0]}.{kind}": self.param.shape for kind in self.moments}


class MuonAdamW:
    """The optimizer of a whole model.

    `roles` is `GPT.roles()`, `lrs` the peak learning rate of each role (`Plan.lrs`). One update is
    `reduce()` (average, unscale, norm), the caller's checks, `step(...)`, `zero_grad()`; `step` alone reduces itself.
    """

    def __init__(self, roles: Mapping[str, list], lrs: Mapping[str, float], runtime: Runtime):
        unknown = [role for role in roles if role not in ("matrix", *ADAM_RULES)]
        coarse = [n for pairs in roles.values() for n, p in pairs if p.dtype not in (torch.float32, torch.float64)]
        if unknown or coarse:  # a mistake in the code: in bf16 a second moment with beta2 0.995 stands still
            raise ValueError(f"roles without a rule: {unknown}; parameters that are not fp32 or fp64: {coarse}")
        self.runtime, self.t, self.reduced = runtime, 0, False
        dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else None  # of the polar step; else the parameters'
        shapes: dict[tuple, list] = {}
        for name, p in roles.get("matrix", []):
            shapes.setdefault((tuple(p.shape), p.dtype), []).append((name, p))
        self.groups: list[Group] = [MuonGroup(named, lrs["matrix"], runtime, dtype) for named in shapes.values()]
        for role, rule in ADAM_RULES.items():
            self.groups += [AdamGroup([pair], lrs[role], runtime, rule) for pair in roles.get(role, [])]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.reduced = False
        for group in self.groups:
            group.grad = None
            for p in group.params:
                p.grad = None

    @torch.no_grad()
    def reduce(self, scale: float = 1.0) -> float:
        """Average the gradients over the ranks and divide them by `scale` (the fp16 loss scale).

        Returns the norm of the whole gradient, the same on every rank; it is not finite if any element on any rank was
        not, and then the caller either stops or drops this update with `zero_grad` and no `step`.
        """
        for group in self.groups:
            group.launch()
        factor = 1.0 / (self.runtime.world * scale)
        parts = torch.stack([group.settle(factor).float() for group in self.groups])
        self.reduced = True
        return math.sqrt(float(self.runtime.sum(parts.square().sum())))

    @torch.no_grad()
    def step(self, lr_mult: float = 1.0, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        """Move the parameters: `lr_mult` times the peak rates, Muon's momentum and (already scaled) weight decay."""
        if not self.reduced:
            self.reduce()
        self.t, self.reduced = self.t + 1, False
        for group in self.groups:
            group.update(lr_mult, momentum, weight_decay, self.t)
        for group in self.groups:
            group.release()

    def nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient on this rank holds a NaN or an infinity."""
        pairs = [pair for group in self.groups for pair in zip(group.names, group.params, strict=True)]
        return [name for name, p in pairs if p.grad is not None and not torch.isfinite(p.grad).all()]

    def state(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """Whole moments by `<parameter>.<moment>` and the step count, on the CPU of rank 0 (or of all); collective."""
        keep = self.runtime.main or everywhere
        state = {"step": torch.tensor(self.t)}
        for group in self.groups:
            for name, whole in group.state():
                if keep:
                    state[name] = whole.detach().to("cpu", copy=True)
        return state if keep else {}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's part of a whole state, written in any world size."""
        wanted = {name: shape for group in self.groups for name, shape in group.shapes().items()}
        refuse(_state_problems({"step": torch.Size([])} | wanted, state))
        self.t = int(state["step"])
        for group in self.groups:
            group.load(state)


def _state_problems(wanted: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor]) -> list[str]:
    if missing := [name for name in wanted if name not in state]:
        return [f"the optimizer state lacks {len(missing)} tensors, {missing[0]} first: it belongs to another model."]
    return [
        f"the optimizer state's {name} is {tuple(state[name].shape)}, the model needs {tuple(shape)}: other model."
        for name, shape in wanted.items()
        if state[name].shape != shape
    ][:3]
