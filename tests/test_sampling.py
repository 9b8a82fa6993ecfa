"""Cuts and draws: the right distribution, the same draw in any company, bounds as sentences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.sampling import Knobs, Sampling, _best, child_seed, sample, uniform

KINDS = [
    Sampling(temperature=0),
    Sampling(temperature=0.7),
    Sampling(top_k=5),
    Sampling(top_k=40, top_p=0.8, temperature=1.3),
    Sampling(top_p=0.6),
    Sampling(min_p=0.2),
    Sampling(top_p=0.9, min_p=0.05),
    Sampling(top_k=10_000),
]


def logits_of(rows, vocab=64, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def law(logits, params):
    """The distribution that the parameters ask for, computed plainly over the whole vocabulary: logits (V,) -> (V,)."""
    if params.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.numel()).double()
    p = (logits.double() / params.temperature).softmax(-1)
    order = p.argsort(descending=True)
    if params.top_k:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    if params.top_p:
        before = p[order].cumsum(0) - p[order]
        p[order[before >= params.top_p]] = 0
        p /= p.sum()
    if params.min_p:
        p[p < params.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("params", KINDS, ids=lambda p: f"{p.kind()}-{p.top_k}-{p.top_p}-{p.min_p}")
def test_draws_follow_the_law(params):
    logits = logits_of(1)
    grid = torch.arange(20_000) / 20_000  # evenly spaced u: frequencies are the probabilities, but for 1/20,000
    ids = sample(logits.expand(len(grid), -1), [params] * len(grid), grid)
    frequency = torch.bincount(ids, minlength=logits.size(1)).double() / len(grid)
    torch.testing.assert_close(frequency, law(logits[0], params), atol=1.1e-4, rtol=0)


def test_a_row_draws_the_same_in_any_company():
    logits, u = logits_of(len(KINDS)), torch.tensor([uniform(7, i) for i in range(len(KINDS))])
    together = sample(logits, KINDS, u)
    alone = torch.cat([sample(logits[i : i + 1], KINDS[i : i + 1], u[i : i + 1]) for i in range(len(KINDS))])
    reversed_ = sample(logits.flip(0), KINDS[::-1], u.flip(0)).flip(0)
    assert together.tolist() == alone.tolist() == reversed_.tolist()


def test_rows_with_different_top_k_each_keep_their_own():
    logits, ks = logits_of(3), [1, 4, 50]
    for i, k in enumerate(ks):
        allowed = set(logits[i].topk(k).indices.tolist())
        for u in torch.linspace(0, 0.9999, 50):
            assert int(sample(logits, [Sampling(top_k=k) for k in ks], u.expand(3))[i]) in allowed


@given(st.floats(0, 1, exclude_max=True, width=32), st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_no_draw_leaves_the_kept_tokens(u, which):
    logits = logits_of(1, seed=3)
    token = int(sample(logits, [KINDS[which]], torch.tensor([u])))
    assert law(logits[0], KINDS[which])[token] > 0


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((2, 100), -math.inf)
    logits[:, 3], logits[:, 60] = 1.0, 1.0
    for u in (0.0, 0.3, 0.7, 1 - 2**-24):
        for params in (Sampling(), Sampling(top_k=50), Sampling(top_p=1.0, min_p=0.1), Sampling(top_p=0.999)):
            assert set(sample(logits, [params] * 2, torch.tensor([u, u])).tolist()) <= {3, 60}


def test_the_knobs_can_be_kept_between_steps():
    knobs = Knobs(KINDS)
    for seed in range(3):
        logits, u = logits_of(len(KINDS), seed=seed), torch.full((len(KINDS),), 0.4)
        assert sample(logits, knobs, u).tolist() == sample(logits, KINDS, u).tolist()


def test_uniform_numbers_are_uniform_and_independent_of_each_other():
    draws = torch.tensor([[uniform(seed, index) for index in range(200)] for seed in range(200)], dtype=torch.float64)
    assert 0 <= draws.min() and draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01)
    assert draws.var().item() == pytest.approx(1 / 12, abs=0.005)
    along = torch.corrcoef(torch.stack([draws[:, :-1].flatten(), draws[:, 1:].flatten()]))[0, 1]
    across = torch.corrcoef(torch.stack([draws[:-1].flatten(), draws[1:].flatten()]))[0, 1]
    assert abs(along) < 0.02 and abs(across) < 0.02


def test_replies_to_one_prompt_have_seeds_of_their_own():
    seeds = [child_seed(42, i) for i in range(1000)]
    assert seeds[0] == 42 and len(set(seeds)) == 1000 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": 101}]
    + [{"top_k": -1}, {"top_k": 2.5}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": math.nan}, {"min_p": -0.1}, {"min_p": 2}]
    + [{"seed": -1}, {"seed": 2**63}, {"max_tokens": 0}, {"max_tokens": True}, {"stop": [""]}, {"stop": ["x"] * 99}],
    ids=str,
)
def test_wrong_parameters_are_refused_with_a_sentence_pitfall_29(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_every_wrong_parameter_is_named_at_once():
    with pytest.raises(UserError, match="(?s)temperature.*top_p"):
        Sampling(temperature=-1, top_p=3)


def test_zero_top_k_is_off_and_a_string_is_one_stop():
    assert Sampling(top_k=0).top_k is None
    assert Sampling(stop="\n").stop == ("\n",)


@pytest.mark.parametrize("rows,size,k", [(1, 8192, 50), (5, 8192, 64), (3, 8192, 65), (2, 320, 2), (2, 330, 2)])
def test_the_best_of_groups_are_the_best_of_all(rows, size, k):
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(size + k))
    values, ids = _best(logits, k)
    assert torch.equal(values, logits.topk(k).values) and torch.equal(logits.gather(1, ids), values)


def test_greedy_rows_may_have_any_cuts_beside_each_other():
    rows = [Sampling(temperature=0, top_k=k, top_p=p) for k, p in ((None, None), (5, 0.5), (1, None))]
    logits = torch.tensor([[0.0, 2.0, 1.0]]).repeat(3, 1)
    assert sample(logits, rows, torch.rand(3)).tolist() == [1, 1, 1]
