"""Bits per byte: the definition by hand, what is left out, and that batches and ranks don't matter."""

import math
from types import SimpleNamespace

import pytest
import torch

from nanochat import loss_eval
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime

RT = Runtime.single()
BYTES = torch.tensor([0, 1, 2, 5], dtype=torch.int32)  # token 0 is special


def batch(targets):
    targets = torch.tensor(targets)
    return SimpleNamespace(inputs=torch.zeros_like(targets), targets=targets)


def uniform(losses):
    """A model whose loss at every position is given, and junk where the target is ignored."""

    def model(inputs, targets, reduction):
        assert reduction == "none"
        return torch.where(targets >= 0, torch.tensor(losses), float("nan"))

    return model


def test_nats_over_ln2_times_bytes():
    bpb = loss_eval.bits_per_byte(uniform([[1.0, 3.0]]), [batch([[1, 3]])], BYTES, RT)
    assert bpb == pytest.approx((1 + 3) / (math.log(2) * 6), rel=1e-12)


def test_special_and_ignored_targets_are_in_neither_sum():
    plain = loss_eval.bits_per_byte(uniform([[1.0, 3.0]]), [batch([[1, 3]])], BYTES, RT)
    mixed = loss_eval.bits_per_byte(uniform([[1.0, 7.0, 9.0, 3.0]]), [batch([[1, 0, -1, 3]])], BYTES, RT)
    assert mixed == plain


@pytest.mark.parametrize("batches", [[], [batch([[-1, 0]])]])
def test_no_text_is_a_sentence_and_not_infinity_pitfall_36(batches):
    with pytest.raises(UserError, match="hold no text.*--eval-tokens"):
        loss_eval.bits_per_byte(uniform([[1.0, 1.0]]), batches, BYTES, RT)


def test_the_figure_does_not_depend_on_the_batch_size_pitfall_37():
    model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, 64, (6, 17), generator=torch.Generator().manual_seed(0))
    sizes = torch.arange(64, dtype=torch.int32) % 5

    def bpb(rows):
        parts = [ids[i : i + rows] for i in range(0, 6, rows)]
        batches = [SimpleNamespace(inputs=part[:, :-1], targets=part[:, 1:]) for part in parts]
        return loss_eval.bits_per_byte(model, batches, sizes, RT)

    assert bpb(1) == pytest.approx(bpb(6), rel=1e-6) and bpb(4) == pytest.approx(bpb(6), rel=1e-6)


RANKS = """
import torch
from types import SimpleNamespace
from nanochat import loss_eval, runtime
rt = runtime.start("cpu")
def model(inputs, targets, reduction):
    return targets.float()
rows = torch.arange(1, 9).view(4, 2)[rt.rank::rt.world]
batches = [SimpleNamespace(inputs=row[None], targets=row[None]) for row in rows]
bpb = loss_eval.bits_per_byte(model, batches, torch.full((10,), 2), rt)
print(f"bpb {bpb:.12f}\\n", end="")
runtime.stop(rt)
"""


@pytest.mark.slow
def test_ranks_add_up_pitfall_37(on_ranks):
    out = on_ranks(3, RANKS).stdout
    assert out.count(f"bpb {36 / (math.log(2) * 16):.12f}") == 3, out  # ranks hold 2, 1 and 1 rows


def test_progress_is_shown_on_the_first_rank_only_pitfall_51(monkeypatch):
    seen = []
    monkeypatch.setattr(
        loss_eval, "tqdm", lambda batches, **how: seen.append((how["total"], how["disable"])) or batches
    )
    for main in (True, False):
        rt = SimpleNamespace(main=main, device=RT.device, sum=RT.sum)
        loss_eval.bits_per_byte(uniform([[1.0, 3.0]]), [batch([[1, 3]])], BYTES, rt)
    assert seen == [(None, None), (None, True)]
