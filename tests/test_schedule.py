"""Schedules: where they begin, peak and end, for long runs and short, and that no step takes them out of range."""

import pytest

from nanochat import schedule

LONG, SHORT = 5000, 300


def test_learning_rate_of_a_long_run_is_the_published_one():
    lr = lambda step: schedule.lr(step, LONG, 40, 0.65, 0.05)
    assert lr(0) == 1 / 40 and lr(19) == 0.5 and lr(39) == 1.0
    assert lr(40) == lr(1749) == lr(1750) == 1.0  # 65 % of 5,000 are the last 3,250
    assert lr(1750 + 1625) == pytest.approx(1 - 0.95 / 2)
    assert lr(5000) == pytest.approx(0.05)


@pytest.mark.parametrize("step", [-1000, -1, 0, LONG, LONG + 1, 65 * LONG])
def test_no_multiplier_is_ever_negative_pitfall_3(step):
    values = [
        schedule.lr(step, LONG, 40),
        schedule.sft_lr(step / LONG),
        schedule.rl_lr(step, LONG),
        schedule.weight_decay(step, LONG),
    ]
    assert all(0.0 <= v <= 1.0 for v in values)
    assert 0.85 <= schedule.momentum(step, LONG) <= 0.97
    assert 0.85 <= schedule.sft_momentum(step) <= 0.95


@pytest.mark.parametrize("iterations", [1, 2, 7, 40, 300, 1000])
@pytest.mark.parametrize("warmdown", [0.0, 0.65, 1.0])
def test_short_runs_are_sane(iterations, warmdown):
    """Every step learns, and momentum and rate never jump by more than their ramps allow."""
    rates = [schedule.lr(s, iterations, min(10, iterations), warmdown, 0.05) for s in range(iterations)]
    momenta = [schedule.momentum(s, iterations, warmdown) for s in range(iterations)]
    assert all(0 < r <= 1 for r in rates) and all(0.85 <= m <= 0.97 for m in momenta)
    if iterations >= 300:
        assert max(abs(a - b) for a, b in zip(momenta, momenta[1:])) < 0.005
        assert max(rates) > 0.9


def test_momentum_of_a_long_run_is_the_published_one():
    assert schedule.momentum(0, LONG) == 0.85
    assert schedule.momentum(200, LONG) == pytest.approx(0.91)
    assert schedule.momentum(400, LONG) == schedule.momentum(1750, LONG) == pytest.approx(0.97)
    assert schedule.momentum(5000, LONG) == pytest.approx(0.90)


def test_momentum_of_a_short_run_ramps_over_the_flat_part():
    """300 steps, 105 of them flat: the published 400-step ramp would still be rising when the run is over."""
    assert schedule.momentum(105, SHORT) == pytest.approx(0.97)
    assert schedule.momentum(300, SHORT) == pytest.approx(0.90)
    assert schedule.momentum(0, SHORT) == 0.85


def test_momentum_without_a_flat_part():
    assert schedule.momentum(0, 100, warmdown_ratio=1.0) == pytest.approx(0.97)
    assert schedule.momentum(100, 100, warmdown_ratio=1.0) == pytest.approx(0.90)


def test_weight_decay_is_half_a_cosine():
    values = [schedule.weight_decay(s, 100) for s in (0, 25, 50, 75, 100)]
    assert values == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])


def test_fine_tuning_is_flat_then_falls_to_zero():
    assert [schedule.sft_lr(p) for p in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 0.5, 0])
    assert schedule.sft_lr(0.05, warmup_ratio=0.1) == pytest.approx(0.5)
    assert schedule.sft_lr(1.0, final_frac=0.1) == pytest.approx(0.1)
    assert schedule.sft_lr(1.0, warmdown_ratio=0.0) == 1.0
    assert [schedule.sft_momentum(s) for s in (0, 150, 300, 900)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert schedule.sft_momentum(20, iterations=60) == pytest.approx(0.95)


def test_reinforcement_falls_linearly():
    assert [schedule.rl_lr(s, 10) for s in (0, 5, 10)] == [1.0, 0.5, 0.0]
