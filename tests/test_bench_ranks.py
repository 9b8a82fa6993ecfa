"""The benches of several ranks: closed forms by hand, and what each refuses."""

import pytest
import torch

from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from scripts import bench_optimizer_memory, bench_overlap, bench_worlds

SMALL = GPTConfig(sequence_len=64, vocab_size=64, n_layer=4, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L")


def test_the_published_scheme_stacks_and_pads_what_banks_do_not_pitfall_15():
    alone, three = (bench_optimizer_memory.closed_form(SMALL, world) for world in (1, 3))
    assert alone["published_adds"]["sum"] == 2 * 16 * 64 * 64 * 4  # 16 square ones weigh as much as 4 of 256 x 64
    matrices = 12 * 4 * 64 * 64 * 4 + 2 * 2 * 12 * 4
    assert three["published_adds"]["stacked gradients"] == matrices
    padded = 18 * 64 * 64 * 4 + 2 * 6 * 256 * 64 * 4 + 3 * 2 * 12 * 4  # 16, 4 and 4, and 2 gates to multiples of 3
    assert three["published_adds"]["padded copies"] == padded
    assert three["banks_add"] == 0


def test_curves_are_compared_by_their_worst_step():
    assert bench_worlds.apart([2.0, 4.0], [2.0, 4.4]) == pytest.approx(0.1)
    assert bench_worlds.fresh(torch.float64).lm_head.weight.dtype == torch.float64


def test_overlap_needs_somebody_to_talk_to():
    with pytest.raises(UserError, match="torchrun"):
        bench_overlap.main(bench_overlap.Config(device_type="cpu"))
