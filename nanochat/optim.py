"""Muon and AdamW update rules, and the one optimizer that applies them over any number of ranks.

Block matrices are moved by Muon: momentum, then the nearest (half-)orthogonal matrix, so that every direction of the
matrix learns at the same rate. Everything else is moved by AdamW. The model says what each tensor is (`GPT.roles()`),
this file how it moves. `muon_reference` and `adamw_reference` are the rules in plain form, one tensor at a time, and
define correct; `MuonAdamW` does the same stacked by shape and sharded over ranks.

Distribution: parameters lie in banks (nanochat/banks.py), Muon's matrices of one shape as a stack (K, m, n) of which
every rank owns whole matrices, all that AdamW moves as one flat vector (n,) cut into equal parts. Gradients are summed
to their owners while the backward pass runs, an owner keeps the state of its part only and sends the new values to all.
Any world size works; `state()` gives whole tensors by parameter name, so a checkpoint fits any world.

Shape letters: K matrices of one shape m x n; s = min(m, n).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from nanochat.banks import ALIGN, Bank, Reducer, deal, offsets
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


ADAM_RULES = {  # published, tuned at depth 12 to 24; in the order in which a backward pass comes to them
    "head": AdamRule(0.8, 0.96, 0.01),
    "value_embedding": AdamRule(0.8, 0.995, 0.01),
    "embedding": AdamRule(0.8, 0.995, 0.001),
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


def muon_cost(rows: int, cols: int) -> float:
    """FLOPs of a Muon step of one matrix, by its polar products: 20 s^2 l + 10 s^3."""
    short, long = sorted((rows, cols))
    return 20.0 * short**2 * long + 10.0 * short**3


class MuonBank(Bank):
    """K block matrices of one shape as a stack (K, m, n); this rank moves the k of them that it owns."""

    def __init__(self, named, lr: float, shares: list[int], runtime: Runtime, dtype):
        size = named[0][1].numel()
        super().__init__(named, offsets([share * size for share in shares], 1), runtime)
        self.lr, self.dtype = lr, dtype
        shape = self.params[0].shape
        rows, cols = shape
        first = self.lo // size
        self.own = range(first, self.hi // size)
        stack = lambda flat: flat[self.lo : self.hi].view(-1, *shape)  # (k, m, n)
        self.values_own, self.grads_own = stack(self.values), stack(self.grads)
        self.moments = {
            "momentum": torch.zeros_like(self.values_own),
            "second": self.values.new_zeros(len(self.own), *((rows, 1) if rows >= cols else (1, cols))),
        }

    def gradients(self) -> list[torch.Tensor]:
        """This rank's part of the gradient, summed over the ranks."""
        return [self.grads_own] if len(self.own) else []

    def update(self, lr_mult: float, momentum: float, weight_decay: float, t: int) -> None:
        if len(self.own):
            direction = muon_update(self.grads_own, *self.moments.values(), momentum, dtype=self.dtype)
            cautious_(self.values_own, direction, self.lr * lr_mult, weight_decay)

    def state(self):
        """(name, whole tensor) of every moment of every matrix; collective."""
        for owner, i, _, _ in self.parts():
            for kind, stack in self.moments.items():
                mine = i in self.own
                tensor = stack[i - self.own.start] if mine else stack.new_empty(stack.shape[1:])
                yield f"{self.names[i]}.{kind}", send(tensor, owner, self.runtime)

    def load(self, state):
        for kind, stack in self.moments.items():
            for i, moment in zip(self.own, stack, strict=True):
                moment.copy_(state[f"{self.names[i]}.{kind}"])

    def shapes(self):
        return {f"{name}.{kind}": stack.shape[1:] for kind, stack in self.moments.items() for name in self.names}


class AdamBank(Bank):
    """Tensors of any shape as one flat vector, each rank's part of it an equal stretch, whatever tensors it cuts."""

    def __init__(self, named, rates: list[float], rules: list[AdamRule], runtime: Runtime):
        total = offsets([p.numel() for _, p in named], ALIGN)[-1]
        chunk = -(-total // (ALIGN * runtime.world)) * ALIGN
        cuts = [min(rank * chunk, total) for rank in range(runtime.world + 1)]
        super().__init__(named, cuts, runtime, align=ALIGN, grads=runtime.world > 1)
        self.rates, self.rules = rates, rules
        self.own = [(i, a, b) for owner, i, a, b in self.parts() if owner == runtime.rank]
        fresh = lambda: [self.values.new_zeros(b - a) for _, a, b in self.own]
        self.moments = {"exp_avg": fresh(), "exp_avg_sq": fresh()}
        self.steps = torch.zeros((), dtype=torch.float32, device=self.values.device)

    def gradients(self) -> list[torch.Tensor]:
        """This rank's parts of the gradients, summed over the ranks."""
        for i in {i for i, _, _ in self.own}:
            if self.params[i].grad is None:
                self.params[i].grad = torch.zeros_like(self.params[i])
        return [self.params[i].grad.view(-1)[a:b] for i, a, b in self.own]

    def update(self, lr_mult: float, momentum: float, weight_decay: float, t: int) -> None:
        for (i, a, b), grad, *moments in zip(self.own, self.gradients(), *self.moments.values(), strict=True):
            adamw(
                [self.params[i].data.view(-1)[a:b]], [grad], *([moment] for moment in moments), [],
                [self.steps.fill_(t - 1)], lr=self.rates[i] * lr_mult, **self.rules[i]._asdict(), fused=True,
                amsgrad=False, maximize=False,
            )  # fmt: skip

    def state(self):
        """(name, whole tensor) of every moment of every tensor; collective."""
        for kind, own in self.moments.items():
            mine = {(i, a): moment for (i, a, _), moment in zip(self.own, own, strict=True)}
            whole = [None] * len(self.params)
            for owner, i, a, b in self.parts():
                if whole[i] is None:
                    whole[i] = self.values.new_empty(self.params[i].numel())
                part = whole[i][a:b]
                if (i, a) in mine:
                    part.copy_(mine[i, a])
                send(part, owner, self.runtime)
                if b == len(whole[i]):
                    yield f"{self.names[i]}.{kind}", whole[i].view_as(self.params[i])
                    whole[i] = None

    def load(self, state):
        for kind, own in self.moments.items():
            for (i, a, b), moment in zip(self.own, own, strict=True):
                moment.copy_(state[f"{self.names[i]}.{kind}"].reshape(-1)[a:b])

    def shapes(self):
        return {f"{name}.{kind}": p.shape for kind in self.moments for name, p in zip(self.names, self.params)}


def send(tensor: torch.Tensor, owner: int, runtime: Runtime) -> torch.Tensor:
    """The owner's values of `tensor`, on every rank."""
    if runtime.world > 1:
        dist.broadcast(tensor, owner)
    return tensor


class MuonAdamW:
    """The optimizer of a whole model.

    `roles` is `GPT.roles()`, `lrs` the peak learning rate of each role (`Plan.lrs`). One update is `backward(loss)` of
    each micro-batch (`last=True` with the last, which then overlaps with the reduction), `reduce()` (average, unscale,
    norm), the caller's checks, `step(...)`, `zero_grad()`. Plain `loss.backward()` does too, without overlap, and
    `step` alone reduces itself. The parameters' memory is the banks' from here on: don't move the model afterwards.
    """

    def __init__(self, roles: Mapping[str, list], lrs: Mapping[str, float], runtime: Runtime):
        unknown = [role for role in roles if role not in ("matrix", *ADAM_RULES)]
        coarse = [n for pairs in roles.values() for n, p in pairs if p.dtype not in (torch.float32, torch.float64)]
        if unknown or coarse:  # a mistake in the code: in bf16 a second moment with beta2 0.995 stands still
            raise ValueError(f"roles without a rule: {unknown}; parameters that are not fp32 or fp64: {coarse}")
        self.runtime, self.t, self.reduced = runtime, 0, False
        self.banks: list[MuonBank | AdamBank] = [
            *_muon_banks(roles.get("matrix", []), lrs, runtime), *_adam_banks(roles, lrs, runtime)
        ]  # fmt: skip
        self.reducer = Reducer(self.banks, runtime)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._begin()
        for bank in self.banks:
            for p in bank.params:
                p.grad = None

    def _begin(self) -> None:
        self.reduced = False
        self.reducer.begin()

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Backward pass of one micro-batch; during the `last` one gradients travel as they come. Collective if last."""
        self.reducer.backward(loss, last)

    @torch.no_grad()
    def reduce(self, scale: float = 1.0) -> float:
        """Average the gradients over the ranks and divide them by `scale` (the fp16 loss scale).

        Returns the norm of the whole gradient, the same on every rank; it is not finite if any element on any rank was
        not, and then the caller either stops or drops this update with `zero_grad` and no `step`.
        """
        self.reducer.flush()
        self.reducer.wait()
        own = [grad for bank in self.banks for grad in bank.gradients()]
        factor = 1.0 / (self.runtime.world * scale)
        if factor != 1.0 and own:
            torch._foreach_mul_(own, factor)
        device = self.runtime.device
        square = sum((torch.linalg.vector_norm(g).float().square() for g in own), torch.zeros((), device=device))
        self.reduced = True
        return math.sqrt(float(self.runtime.sum(square)))

    @torch.no_grad()
    def step(self, lr_mult: float = 1.0, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        """Move the parameters: `lr_mult` times the peak rates, Muon's momentum and (already scaled) weight decay."""
        if not self.reduced:
            self.reduce()
        self.t, works = self.t + 1, []
        for bank in self.banks:
            bank.update(lr_mult, momentum, weight_decay, self.t)
            works += bank.share()
        for work in works:
            work.wait()
        self._begin()

    def nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient holds a NaN or an infinity on any rank; collective."""
        pairs = [pair for bank in self.banks for pair in zip(bank.names, bank.params, strict=True)]
        here = [name for name, p in pairs if p.grad is not None and not torch.isfinite(p.grad).all()]
        everywhere = {name for names in self.runtime.gather(here) for name in names}
        return [name for name, _ in pairs if name in everywhere]

    def bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps between steps: weights, gradients (while there are any) and moments."""
        params = [p for bank in self.banks for p in bank.params]
        whole = sum(p.nbytes for p in params)
        moments = sum(t.nbytes for bank in self.banks for stack in bank.moments.values() for t in stack)
        return {"weights": whole, "gradients": whole, "moments": moments}

    def state(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """Whole moments by `<parameter>.<moment>` and the step count, on the CPU of rank 0 (or of all); collective."""
        keep = self.runtime.main or everywhere
        state = {"step": torch.tensor(self.t)}
        for bank in self.banks:
            for name, whole in bank.state():
                if keep:
                    state[name] = whole.detach().to("cpu", copy=True)
        return state if keep else {}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's part of a whole state, written in any world size."""
        wanted = {name: shape for bank in self.banks for name, shape in bank.shapes().items()}
        refuse(_state_problems({"step": torch.Size([])} | wanted, state))
        self.t = int(state["step"])
        for bank in self.banks:
            bank.load(state)


def _muon_banks(named: list, lrs: Mapping[str, float], runtime: Runtime) -> list[MuonBank]:
    """A bank for each shape, the last matrix first: a backward pass comes to it first."""
    dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else None  # of the polar step; else the parameters'
    kinds: dict[tuple, list] = {}
    for name, p in reversed(named):
        kinds.setdefault((tuple(p.shape), p.dtype), []).append((name, p))
    costs = [muon_cost(*shape) for shape, _ in kinds]
    shares = deal([len(pairs) for pairs in kinds.values()], costs, runtime.world)
    return [MuonBank(*(pairs, lrs["matrix"], share, runtime, dtype)) for pairs, share in zip(kinds.values(), shares)]


def _adam_banks(roles: Mapping[str, list], lrs: Mapping[str, float], runtime: Runtime) -> list[AdamBank]:
    """One bank, or one for each dtype there is."""
    entries = [(pair, lrs[role], rule) for role, rule in ADAM_RULES.items() for pair in reversed(roles.get(role, []))]
    kinds: dict[torch.dtype, list] = {}
    for entry in entries:
        kinds.setdefault(entry[0][1].dtype, []).append(entry)
    return [AdamBank(*map(list, zip(*kind, strict=True)), runtime) for kind in kinds.values()]


def _state_problems(wanted: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor]) -> list[str]:
    if missing := [name for name in wanted if name not in state]:
        return [f"the optimizer state lacks {len(missing)} tensors, {missing[0]} first: it belongs to another model."]
    return [
        f"the optimizer state's {name} is {tuple(state[name].shape)}, the model needs {tuple(shape)}: other model."
        for name, shape in wanted.items()
        if state[name].shape != shape
    ][:3]
