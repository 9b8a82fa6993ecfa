"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, one seed a row.

A row's draw depends on its own logits, its own parameters and one uniform number made from its seed and the count of
its tokens (`uniform`), never on the rows beside it: the same seed gives the same text in any batch. There is no
generator state, so a row can be moved, resumed or forked freely.

Order of the cuts: temperature, then top-k, then top-p on what is left, then min-p; the draw inverts the cumulated
probabilities. Shape letters: B rows, V vocabulary, K candidates kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nanochat.errors import refuse

MIN_TEMPERATURE = 1e-3  # below it the draw is greedy in all but name; keeps logits / temperature finite
MAX_TEMPERATURE = 100.0
MAX_STOPS, MAX_STOP_CHARS = 16, 200
MAX_TOP_LOGPROBS = 20
GROUP = 64  # neighbours in the vocabulary of which only the best counts at first, see _best

_GOLDEN, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1  # SplitMix64 (Steele, Lea, Flood 2014)


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn and when it ends; checks itself (UserError with every problem).

    Off is None (0 also turns top_k off). `stop_tokens` None means the tokenizer's assistant_end and bos. A stop string
    or token ends the reply and is not part of its text.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # keep the k likeliest
    top_p: float | None = None  # keep the likeliest that together reach this probability
    min_p: float | None = None  # keep those with at least this share of the likeliest one's probability
    seed: int | None = None  # None: fresh randomness for every request
    max_tokens: int | None = None  # longest reply; None: to the end of the context
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    logprobs: bool = False  # also return the model's own log probability (before any cut) of each token
    top_logprobs: int = 0  # and those of the so many likeliest tokens at its place; implies logprobs
    prompt_logprobs: bool = False  # both for the prompt's tokens too (the first has none)

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "top_k", self.top_k or None)
        object.__setattr__(self, "logprobs", bool(self.logprobs or self.top_logprobs))
        refuse(self._problems())

    def _problems(self) -> list[str]:
        rules = (
            ("temperature", _real(self.temperature) and 0 <= self.temperature <= MAX_TEMPERATURE, "0 to 100"),
            ("top_k", self.top_k is None or (_whole(self.top_k) and self.top_k >= 1), "at least 1, or 0 for off"),
            ("top_p", self.top_p is None or (_real(self.top_p) and 0 < self.top_p <= 1), "above 0 and at most 1"),
            ("min_p", self.min_p is None or (_real(self.min_p) and 0 <= self.min_p <= 1), "0 to 1"),
            ("seed", self.seed is None or (_whole(self.seed) and 0 <= self.seed < 2**63), "0 to 2**63 - 1"),
            ("max_tokens", self.max_tokens is None or (_whole(self.max_tokens) and self.max_tokens >= 1), "at least 1"),
            ("top_logprobs", _whole(self.top_logprobs) and 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS, "0 to 20"),
        )
        problems = [f"{name} is {getattr(self, name)}, but must be {range_}." for name, ok, range_ in rules if not ok]
        stops_ok = all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in self.stop)
        if len(self.stop) > MAX_STOPS or not stops_ok:
            problems.append(f"stop must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters.")
        return problems

    @property
    def greedy(self) -> bool:
        """No randomness: the likeliest token each time."""
        return self.temperature == 0

    def kind(self) -> str:
        """Which way of drawing serves these parameters; depends on nothing else, so a batch cannot change it."""
        if self.greedy:
            return "greedy"
        if self.top_k is not None:
            return "top_k"
        return "whole" if self.top_p in (None, 1) else "sorted"


def _real(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def child_seed(seed: int, sample: int) -> int:
    """The seed of the sample-th reply to one prompt; sample 0 has the seed itself, as if it were asked for alone."""
    return seed if sample == 0 else _mix((seed + sample * _GOLDEN) & _MASK) >> 1


def uniform(seed: int, index: int) -> float:
    """The uniform number in [0, 1) for a row's index-th token: 24 bits, so that fp32 holds it exactly."""
    return (_mix((_mix((seed + _GOLDEN) & _MASK) + (index + 1) * _GOLDEN) & _MASK) >> 40) * 2.0**-24


class Knobs:
    """The parameters of B rows as tensors on the logits' device: made when the batch changes, used every step."""

    def __init__(self, rows: list[Sampling], device: torch.device | str = "cpu"):
        kinds = [row.kind() for row in rows]
        self.groups = []
        for kind in dict.fromkeys(kinds):
            members = [i for i, k in enumerate(kinds) if k == kind]
            where = None if len(members) == len(rows) else torch.tensor(members, device=device)
            self.groups.append((where, _Group(kind, [rows[i] for i in members], device)))

    def draw(self, logits: torch.Tensor, u: list[float]) -> torch.Tensor:
        """logits (B, V) fp32, u from `uniform`, one a row -> ids (B,) int64, on the logits' device."""
        return sample(logits, self, torch.tensor(u).to(logits.device, non_blocking=True))


class _Group:
    """Rows of one kind and their parameters, each a (B, 1) column or None when no row uses it."""

    def __init__(self, kind: str, rows: list[Sampling], device):
        def column(values):
            return torch.tensor([[v] for v in values], device=device)

        self.kind = kind
        self.temperature = column([max(float(row.temperature), MIN_TEMPERATURE) for row in rows])
        self.largest_k = max(row.top_k for row in rows) if kind == "top_k" else None
        several = kind == "top_k" and len({row.top_k for row in rows}) > 1
        self.top_k = column([row.top_k for row in rows]) if several else None
        self.top_p = column([float(row.top_p or 1) for row in rows]) if any(row.top_p for row in rows) else None
        self.min_p = column([float(row.min_p or 0) for row in rows]) if any(row.min_p for row in rows) else None

    def draw(self, logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """logits (B, V), u (B,) -> ids (B,)."""
        if self.kind == "greedy":
            return logits.argmax(-1)
        return self._whole(logits, u) if self.kind == "whole" else self._ranked(logits, u)

    def _whole(self, logits, u):
        p = (logits / self.temperature).softmax(-1)
        if self.min_p is not None:
            p = torch.where(p >= self.min_p * p.amax(-1, keepdim=True), p, 0)
        return _invert(p, u)

    def _ranked(self, logits, u):
        """Only the candidates that a cut can keep, best first: the kept ones are a prefix of them."""
        k = min(self.largest_k or logits.size(-1), logits.size(-1))
        values, ids = _best(logits, k) if k < logits.size(-1) else logits.sort(dim=-1, descending=True)  # (B, K)
        values = values / self.temperature
        if self.top_k is not None:
            rank = torch.arange(k, device=logits.device)
            values = values.masked_fill(rank >= self.top_k, -math.inf)
        p = values.softmax(-1)
        if self.top_p is not None:
            p = torch.where(p.cumsum(-1) - p < self.top_p, p, 0)
        if self.min_p is not None:
            p = torch.where(p >= self.min_p * p[:, :1], p, 0)
        return ids.gather(1, _invert(p, u).unsqueeze(1)).squeeze(1)


def _best(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk(k) along rows (B, V): values and ids (B, k), best first. On CPUs from the k groups with the largest maxima.

    The k largest lie in at most k groups, and those have the k largest maxima. topk alone takes 1.03 ms for 32 rows of
    8192, k = 50, one thread.
    """
    rows, size = logits.shape
    if logits.is_cuda or size % GROUP or size < 2 * GROUP * k:
        return logits.topk(k)
    groups = logits.view(rows, -1, GROUP)
    best = groups.amax(-1).topk(k).indices  # (B, k)
    values, at = groups.gather(1, best.unsqueeze(-1).expand(-1, -1, GROUP)).view(rows, -1).topk(k)
    return values, best.gather(1, at // GROUP) * GROUP + at % GROUP


def _invert(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulated probability passes u times the total. p (B, K) of any sum; u (B,) in [0, 1)."""
    cumulated = p.cumsum(-1)
    target = u.unsqueeze(1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).squeeze(1).clamp_(max=p.size(-1) - 1)


def sample(logits: torch.Tensor, knobs: Knobs | list[Sampling], u: torch.Tensor) -> torch.Tensor:
    """Draw one token a row, on the logits' device. logits (B, V) fp32, u (B,) fp32 from `uniform` -> ids (B,) int64."""
    if not isinstance(knobs, Knobs):
        knobs = Knobs(knobs, logits.device)
    if len(knobs.groups) == 1:
        return knobs.groups[0][1].draw(logits, u)
    ids = torch.empty(logits.size(0), dtype=torch.int64, device=logits.device)
    for where, group in knobs.groups:
        ids[where] = group.draw(logits[where], u[where])
    return ids
