"""The update rules of Muon and AdamW: each in plain form, which defines correct, and fast, in place on a stack.

Block matrices are moved by Muon: momentum, then the nearest (half-)orthogonal matrix, so that every direction of the
matrix learns at the same rate. Everything else is moved by AdamW. `muon_reference` and `adamw_reference` take one
tensor; `muon_update` and `adam_update` do the same for a stack of matrices and for any tensor. No ranks, no model.

Shape letters: K matrices of one shape m x n; s = min(m, n), l = max(m, n).
"""

import math
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw

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


def muon_reference(
    p, g, m, v, lr, momentum, weight_decay, beta2=MUON_BETA2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


def adamw_reference(p, g, m, v, t, lr, rule: AdamRule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


def muon_lr(lr: float, rows: int, cols: int) -> float:
    """The rate of a rows x cols matrix: tall ones move further."""
    return lr * math.sqrt(max(1, rows / cols))


def cautious_(p, update, lr, weight_decay) -> None:
    """p <- p - lr (update + weight_decay p [update p >= 0]), in place, element by element."""
    if weight_decay:
        agrees = (update * p) >= 0
        update = update.addcmul(p, agrees.to(p.dtype), value=weight_decay)
    p.add_(update, alpha=-lr)


def adam_update(p, g, m, v, steps, lr: float, rule: AdamRule) -> None:
    """AdamW by torch's fused kernel, in place on any tensor; `steps` (0-d fp32) counts the steps before this one."""
    lists = [p], [g], [m], [v], [], [steps]
    adamw(*lists, lr=lr, **rule._asdict(), fused=True, amsgrad=False, maximize=False)


def muon_cost(rows: int, cols: int) -> float:
    """FLOPs of a Muon step of one matrix, by its polar products: 20 s^2 l + 10 s^3."""
    short, long = sorted((rows, cols))
    return 20.0 * short**2 * long + 10.0 * short**3
