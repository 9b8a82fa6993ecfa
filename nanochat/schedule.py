"""Learning rate, momentum and weight decay as pure functions of the step.

`step` counts finished updates, 0 before the first; `iterations` is the length of the run in updates. Every function is
defined for any step: one before the start or past the end is clamped, so a multiplier never turns negative. Nothing is
remembered between calls, so a resumed run needs no schedule state.

Sources: warm-up, flat, linear warm-down and the Muon momentum figures are the published nanochat's (July 2026).
"""

import math

MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.97, 0.90  # published
MOMENTUM_RAMP = 400  # steps from start to peak, published; short runs take the flat part of the learning rate instead
SFT_MOMENTUM_PEAK, SFT_MOMENTUM_RAMP = 0.95, 300  # published for fine-tuning


def progress(step: int, iterations: int) -> float:
    """The share of the run that is done, in [0, 1]."""
    return min(max(step / max(iterations, 1), 0.0), 1.0)


def warmdown_steps(iterations: int, warmdown_ratio: float) -> int:
    """How many of the last steps lie in the warm-down."""
    return round(min(max(warmdown_ratio, 0.0), 1.0) * iterations)


def down(step: int, iterations: int, warmdown_ratio: float) -> float:
    """How far the warm-down has come: 0 before it begins, 1 at the end of the run."""
    length = warmdown_steps(iterations, warmdown_ratio)
    if length == 0:
        return 0.0
    return min(max((step - (iterations - length)) / length, 0.0), 1.0)


def lr(
    step: int, iterations: int, warmup_steps: int = 0, warmdown_ratio: float = 0.65, final_frac: float = 0.05
) -> float:
    """Pretraining's learning-rate multiplier: linear up, flat at 1, linear down to `final_frac`.

    The first of n warm-up steps runs at 1/n, not at 0. Where the two ramps overlap the lower one holds.
    """
    up = min(max(step + 1, 1) / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    return min(up, 1.0 - (1.0 - final_frac) * down(step, iterations, warmdown_ratio))


def momentum(step: int, iterations: int, warmdown_ratio: float = 0.65) -> float:
    """Muon's momentum: up over the first 400 steps, flat, then down to 0.90 while the learning rate warms down.

    A run whose flat part is shorter than 400 steps ramps over that part, so the curve stays continuous.
    """
    ramp = min(MOMENTUM_RAMP, iterations - warmdown_steps(iterations, warmdown_ratio))
    up = min(max(step, 0) / ramp, 1.0) if ramp > 0 else 1.0
    rising = MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * up
    return rising - (MOMENTUM_PEAK - MOMENTUM_END) * down(step, iterations, warmdown_ratio)


def weight_decay(step: int, iterations: int) -> float:
    """Muon's weight-decay multiplier: a half cosine from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * progress(step, iterations)))


def sft_lr(done: float, warmup_ratio: float = 0.0, warmdown_ratio: float = 0.5, final_frac: float = 0.0) -> float:
    """Fine-tuning's multiplier from the share `done` of the run (of its data or of its steps, whichever ends it)."""
    done = min(max(done, 0.0), 1.0)
    up = min(done / warmup_ratio, 1.0) if warmup_ratio > 0 else 1.0
    fall = max(done - (1.0 - warmdown_ratio), 0.0) / warmdown_ratio if warmdown_ratio > 0 else 0.0
    return min(up, 1.0 - (1.0 - final_frac) * fall)


def sft_momentum(step: int, iterations: int | None = None) -> float:
    """Muon's momentum in fine-tuning: 0.85 to 0.95 over 300 steps, or over a third of a shorter run."""
    ramp = SFT_MOMENTUM_RAMP if iterations is None else max(min(SFT_MOMENTUM_RAMP, iterations // 3), 1)
    return MOMENTUM_START + (SFT_MOMENTUM_PEAK - MOMENTUM_START) * min(max(step, 0) / ramp, 1.0)


def rl_lr(step: int, iterations: int) -> float:
    """Reinforcement's multiplier: linear from 1 to 0."""
    return 1.0 - progress(step, iterations)
