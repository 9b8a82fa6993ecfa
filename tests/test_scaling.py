"""The plan: the published table, our law for small batches, horizons, fitting a batch to any world, refusals."""

import dataclasses
import json
import math

import pytest

from nanochat import scaling
from nanochat.errors import UserError

V = 32768
# depth: (width, heads, total M, N M, tokens B, batch, iterations, lr multiplier, weight decay); reference.md section 3
TABLE = {
    4: (256, 2, 36.70, 11.53, 0.138, 262_144, 528, 0.707, 1.890),
    6: (384, 3, 73.53, 23.20, 0.278, 262_144, 1_062, 0.707, 0.940),
    8: (512, 4, 125.83, 41.94, 0.503, 262_144, 1_920, 0.707, 0.520),
    10: (640, 5, 195.95, 70.12, 0.841, 524_288, 1_605, 1.0, 0.440),
    12: (768, 6, 286.26, 110.10, 1.321, 524_288, 2_520, 1.0, 0.280),
    16: (1024, 8, 536.87, 234.88, 2.819, 524_288, 5_376, 1.0, 0.131),
    20: (1280, 10, 896.53, 435.16, 5.222, 1_048_576, 4_980, 1.414, 0.100),
    24: (1536, 12, 1384.12, 729.81, 8.758, 1_048_576, 8_352, 1.414, 0.0597),
    26: (1664, 13, 1681.79, 918.42, 11.02, 1_048_576, 10_510, 1.414, 0.0475),
    32: (2048, 16, 2818.58, 1677.72, 20.13, 2_097_152, 9_600, 2.0, 0.0368),
}
FLOPS = {4: 8.02e7, 6: 1.68e8, 8: 2.96e8, 10: 4.96e8, 12: 7.60e8, 16: 1.59e9, 20: 2.89e9, 24: 4.78e9, 26: 5.99e9,
         32: 1.08e10}  # fmt: skip


@pytest.mark.parametrize("depth", TABLE)
def test_the_published_table(depth):
    width, heads, total, n, tokens, batch, iterations, lr_mult, decay = TABLE[depth]
    plan = scaling.plan(depth, vocab_size=V, target_param_data_ratio=12)
    assert (plan.config.n_embd, plan.config.n_head, plan.config.n_kv_head) == (width, heads, heads)
    assert plan.parameters["total"] / 1e6 == pytest.approx(total, abs=0.006)
    assert plan.parameters["scaling"] / 1e6 == pytest.approx(n, abs=0.006)
    assert plan.flops_per_token == pytest.approx(FLOPS[depth], rel=5e-3)
    assert plan.tokens / 1e9 == pytest.approx(tokens, rel=4e-3)
    assert (plan.batch, plan.iterations) == (batch, iterations)
    assert plan.lr_mult == pytest.approx(lr_mult, abs=5e-4)
    assert plan.weight_decay == pytest.approx(decay, rel=5e-3)
    assert plan.warmup_steps == 40 and not plan.notes
    assert plan.batch == plan.device_batch_size * 2048 * plan.accum


def test_default_ratio_and_rates_of_depth_12():
    plan = scaling.plan(12, vocab_size=V)
    assert plan.ratio == pytest.approx(10.5, rel=1e-3) and plan.iterations == 2205
    assert plan.lrs == pytest.approx(
        {"matrix": 0.02, "embedding": 0.3, "value_embedding": 0.15, "head": 0.008, "resid": 0.005, "x0": 0.5,
         "smear_backout": 0.2}
    )  # fmt: skip


def test_what_scales_the_rates():
    """Width the three tables', the batch all but smear and backout's."""
    wide = scaling.plan(24, vocab_size=V, target_param_data_ratio=12)
    width, root = (1536 / 768) ** -0.5, math.sqrt(2)
    assert wide.lrs["embedding"] == pytest.approx(0.3 * width * root)
    assert wide.lrs["matrix"] == pytest.approx(0.02 * root)
    assert wide.lrs["x0"] == pytest.approx(0.5 * root) and wide.lrs["smear_backout"] == 0.2


# --- small batches -------------------------------------------------------------------------------------------------


def test_small_batch_law():
    """Continuous at 2^18 and about 4 times the root law at 8,192 tokens; warm-up alike."""
    edge = scaling.SMALL_BATCH
    assert scaling.lr_multiplier(edge) == pytest.approx(scaling.lr_multiplier(edge - 1), rel=1e-5)
    assert scaling.lr_multiplier(edge) == pytest.approx(math.sqrt(0.5))
    assert scaling.lr_multiplier(8192) / math.sqrt(8192 / 2**19) == pytest.approx(4, rel=0.02)
    multipliers = [scaling.lr_multiplier(2**k) for k in range(10, 24)]
    assert multipliers == sorted(multipliers)
    assert [scaling.warmup_law(b) for b in (2**22, edge, 8192, 1)] == [40, 40, 10, 1]


def test_short_runs_of_small_batches_have_higher_rates():
    """From 1,000 updates down, continuously, and only below 2^18 tokens, where it begins as continuously."""
    law, edge = scaling.short_run_multiplier, scaling.SMALL_BATCH
    assert law(8192, 1000) == law(8192, 5000) == law(edge, 1) == law(2**20, 10) == 1
    assert law(8192, 300) == pytest.approx((10 / 3) ** 0.32) and law(edge // 2, 300) == pytest.approx(2**0.32)
    assert law(8192, 999) == pytest.approx(1, abs=1e-3) and law(edge - 1, 10) == pytest.approx(1, abs=1e-3)
    same = {"vocab_size": 8192, "sequence_len": 512, "device_batch_size": 16, "total_batch_size": 8192}
    short, long = (scaling.plan(4, num_iterations=n, **same) for n in (100, 1000))
    assert short.lrs["matrix"] == pytest.approx(long.lrs["matrix"] * 10**0.32)
    assert short.lrs["smear_backout"] == long.lrs["smear_backout"] and short.lr_mult == long.lr_mult
    root = math.sqrt(short.batch / 2**19)  # of the scalars, in short runs and small batches too
    assert short.lrs["x0"] == long.lrs["x0"] == pytest.approx(0.5 * root)
    assert short.lrs["resid"] == pytest.approx(0.005 * root)


@pytest.mark.parametrize("batch", [2**12, 8192, 2**17, 2**18, 2**20])
def test_decay_keeps_its_time_scale(batch):
    """lr * decay * iterations is the same for every batch at one horizon: the law's meaning."""
    tokens = reference = 1e9
    strength = scaling.lr_multiplier(batch) * scaling.scaled_weight_decay(0.28, batch, tokens, reference)
    assert strength * (tokens / batch) == pytest.approx(0.28 * tokens / 2**19)
    published = 0.28 * math.sqrt(batch / 2**19)
    if batch >= 2**18:
        assert scaling.scaled_weight_decay(0.28, batch, tokens, reference) == pytest.approx(published)


def test_warm_up_fits_a_short_run():
    """300 updates are flat until 105; 20 until 7."""
    small = dict(vocab_size=512, total_batch_size=65536)
    assert scaling.plan(4, **small, num_iterations=300).warmup_steps == scaling.warmup_law(65536) == 23
    assert scaling.plan(4, **small, num_iterations=20).warmup_steps == 7
    assert scaling.plan(4, **small, num_iterations=1).warmup_steps == 1
    given = scaling.plan(4, **small, num_iterations=20, warmup_steps=15)
    assert given.warmup_steps == 15 and "the peak rate is not reached" in given.notes[0]


# --- horizons ------------------------------------------------------------------------------------------------------


def test_derived_values_follow_the_horizon_that_is_used_pitfall_24():
    """A short run by --num-iterations is planned as a short run, whatever the ratio flag says."""
    by_ratio = scaling.plan(12, vocab_size=V)
    short = scaling.plan(12, vocab_size=V, num_iterations=200)
    assert short.horizon == "num_iterations" and short.iterations == 200
    assert short.batch < by_ratio.batch and short.lrs["matrix"] < by_ratio.lrs["matrix"]
    assert short.weight_decay > by_ratio.weight_decay
    assert 0.5 <= short.batch / scaling.best_batch(short.tokens, 10.5 * 110.1e6) <= 2  # both are powers of two
    flops = scaling.plan(12, vocab_size=V, target_flops=by_ratio.flops / 8)
    assert flops.horizon == "target_flops" and flops.flops == pytest.approx(by_ratio.flops / 8, rel=0.01)
    assert flops.batch < by_ratio.batch


def test_horizons_that_agree_give_the_same_plan_pitfall_24():
    plan = scaling.plan(12, vocab_size=V)
    same = scaling.plan(12, vocab_size=V, num_iterations=plan.iterations)
    also = scaling.plan(12, vocab_size=V, target_flops=plan.flops)
    for other in (same, also):
        assert (other.batch, other.iterations) == (plan.batch, plan.iterations)
        assert other.weight_decay == pytest.approx(plan.weight_decay, rel=1e-3)


def test_precedence_of_horizons():
    plan = scaling.plan(4, vocab_size=V, num_iterations=7, target_flops=1e15, target_param_data_ratio=3)
    assert plan.iterations == 7
    plan = scaling.plan(4, vocab_size=V, target_flops=1e15, target_param_data_ratio=3)
    assert plan.horizon == "target_flops"


def test_a_horizon_shorter_than_a_batch_is_one_update():
    plan = scaling.plan(4, vocab_size=V, target_flops=1e9, total_batch_size=65536)
    assert plan.iterations == 1 and "shorter than one batch" in plan.notes[0]


def test_the_cpu_command_of_the_baseline():
    plan = scaling.plan(
        4, vocab_size=8192, head_dim=64, sequence_len=512, window_pattern="L", device_batch_size=16,
        total_batch_size=8192, num_iterations=300,
    )  # fmt: skip
    assert (plan.config.n_embd, plan.config.n_head, plan.tokens, plan.accum) == (256, 4, 2_457_600, 1)
    assert plan.lr_mult == pytest.approx(0.5, rel=1e-3) and plan.warmup_steps == 10
    assert plan.flops_per_token == pytest.approx(38e6, rel=0.01)


# --- batches and worlds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5, 6, 7, 8, 64])
@pytest.mark.parametrize("depth", [4, 12, 24])
def test_the_automatic_batch_fits_any_world_pitfalls_12_13(depth, world):
    alone = scaling.plan(depth, vocab_size=V)
    plan = scaling.plan(depth, vocab_size=V, world=world)
    assert plan.batch == plan.device_batch_size * 2048 * world * plan.accum
    assert plan.device_batch_size <= 32
    assert abs(plan.batch / alone.batch - 1) < 0.12
    assert plan.lr_mult == scaling.lr_multiplier(plan.batch)
    if (plan.batch, plan.device_batch_size) != (alone.batch, 32):
        assert "device batch size" in plan.notes[0]


def test_depth_4_on_eight_ranks_keeps_its_batch_pitfall_13():
    """262,144 tokens are half of 8 x 32 x 2048: the device batch shrinks, the batch does not."""
    plan = scaling.plan(4, vocab_size=V, world=8)
    assert (plan.batch, plan.device_batch_size, plan.accum) == (262_144, 16, 1)


def test_a_given_batch_that_does_not_divide_names_the_nearest():
    with pytest.raises(UserError, match="--total-batch-size=100000 .* nearest one that divides is 131072"):
        scaling.plan(4, vocab_size=V, total_batch_size=100_000)
    with pytest.raises(UserError, match="nearest one that divides is 589824"):
        scaling.plan(4, vocab_size=V, total_batch_size=524_288, world=3)
    with pytest.raises(UserError, match="or --device-batch-size=4"):
        scaling.plan(4, vocab_size=V, total_batch_size=8192)


# --- refusals and form -----------------------------------------------------------------------------------------------


def test_everything_wrong_is_listed_at_once_pitfall_50():
    with pytest.raises(UserError) as caught:
        scaling.plan(0, vocab_size=-5, target_param_data_ratio=0, device_batch_size=-1, matrix_lr=math.nan,
                     warmdown_ratio=1.5, n_kv_head=0)  # fmt: skip
    text = str(caught.value)
    for name in ("depth=0", "vocab-size=-5", "ratio=0", "device-batch-size=-1", "matrix-lr=nan", "warmdown-ratio=1.5",
                 "n-kv-head=0"):  # fmt: skip
        assert f"{name}" in text


@pytest.mark.parametrize(
    "wrong", [{"depth": -3}, {"sequence_len": 0}, {"num_iterations": 0}, {"target_flops": -1e9}, {"aspect_ratio": 0}]
)
def test_each_bad_size_is_a_sentence(wrong):
    with pytest.raises(UserError, match="must be at least 1"):
        scaling.plan(**{"vocab_size": V, **wrong})


def test_a_context_in_which_nothing_follows_is_refused():
    with pytest.raises(UserError, match="--max-seq-len=1 must be at least 2"):
        scaling.plan(4, vocab_size=V, sequence_len=1)


@pytest.mark.parametrize("name", ["target_flops", "target_param_data_ratio"])
def test_a_run_without_an_end_is_refused(name):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}=inf must be finite"):
        scaling.plan(4, vocab_size=V, **{name: math.inf})


def test_a_window_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="window"):
        scaling.plan(4, vocab_size=V, sequence_len=512, window_pattern="1024,L")


def test_the_plan_is_frozen_and_json():
    plan = scaling.plan(4, vocab_size=V, n_kv_head=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.batch = 1
    back = json.loads(json.dumps(dataclasses.asdict(plan), allow_nan=False))
    assert back["config"]["n_kv_head"] == 1 and back["lrs"]["matrix"] == plan.lrs["matrix"]
