"""The block by hand, for training on CPU, against the plain one under autograd: values, gradients, groups, windows."""

import pytest
import torch
from tiny_model import Sizes, tiny_gpt

from nanochat import gpt
from nanochat.kernels import cpu_block

CASES = {  # changes of tiny_gpt, rows, tokens a row
    "windows, few kv heads, value embeddings": ({}, 3, 40),
    "as many kv heads": ({"n_kv_head": 4, "window_pattern": "L"}, 3, 40),
    "one row, one token": ({}, 1, 1),
    "whole blocks of queries": ({"window_pattern": "16,L"}, 2, 32),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of 16 queries and groups of two rows of 40 tokens, so that small cases have several of both."""
    monkeypatch.setattr(cpu_block, "QUERIES", 16)
    monkeypatch.setattr(cpu_block, "GROUP", 2 * 40 * 4 * 32 // torch.get_num_threads())


def both(model, rows, length, **options):
    """Loss and gradients of the plain model and of its twin by hand."""
    draw = torch.Generator().manual_seed(rows)
    ids, targets = torch.randint(0, 256, (2, rows, length), generator=draw)
    results = []
    for forward in (model, model.by_hand()):
        loss = forward(ids, targets, **options)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), list(model.parameters()))))
    return results


@pytest.mark.parametrize("case", CASES)
def test_by_hand_equals_autograd_exactly_in_fp64(case):
    changes, rows, length = CASES[case]
    model = tiny_gpt(**changes).double()
    (loss, grads), (found, by_hand) = both(model, rows, length, reduction="none")
    torch.testing.assert_close(found, loss, atol=1e-12, rtol=1e-12)
    for (name, _), want, got in zip(model.named_parameters(), grads, by_hand, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_by_hand_is_as_close_as_the_dtype_allows_and_gradients_stay_fp32(dtype, tolerance):
    model = tiny_gpt()
    model.compute_dtype = dtype
    (loss, grads), (found, by_hand) = both(model, 3, 40)
    torch.testing.assert_close(found, loss, atol=tolerance, rtol=tolerance)
    for (name, p), want, got in zip(model.named_parameters(), grads, by_hand, strict=True):
        assert got.dtype == torch.float32
        if p.dim() == 2:  # the scalars' gradients are sums of what nearly cancels
            assert (got - want).norm() <= tolerance * want.norm(), name


def test_the_future_has_no_influence_by_gradients():
    """d loss[t] / d embedding[s] is zero for every s > t in each group, and not at t itself."""
    model = tiny_gpt().double()
    seen = []
    model.transformer.wte.register_forward_hook(lambda m, a, y: seen.append(y.requires_grad_()) or y)
    ids = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(1))
    for row, t in ((0, 0), (1, 16), (2, 31)):
        losses = model.by_hand()(ids, ids, reduction="none")
        (grad,) = torch.autograd.grad(losses[row, t], seen[-1])
        others = [r for r in range(3) if r != row]
        assert grad[row, t].any() and not grad[row, t + 1 :].any() and not grad[others].any()


def test_without_a_gradient_the_plain_block_runs(monkeypatch):
    model = tiny_gpt()
    ids = torch.randint(0, 256, (2, 20))
    expected = model(ids, ids)
    monkeypatch.setattr(cpu_block, "run", lambda *_: pytest.fail("by hand without a gradient"))
    with torch.no_grad():
        torch.testing.assert_close(model.by_hand()(ids, ids), expected)


@pytest.mark.parametrize("window", [20, 159])
def test_scores_are_never_all_there_at_once_pitfall_16(window):
    """Forward and backward, a block of 16 queries at a time: no tensor of a row's 160 x 160."""
    q, k, v = torch.randn(3, 2, 160, 8).unbind(0)
    with Sizes() as made:
        y, inverse = cpu_block.attention(q, k, v, window)
        empty = dict.fromkeys(cpu_block.Kept._fields)
        kept = cpu_block.Kept(**empty | {"q": q, "k": k, "v": v, "y": y, "inverse_sum": inverse})
        cpu_block.attention_back(torch.ones_like(y), kept, window)
    assert max(made.sizes) <= 2 * max(160 * 8, 16 * min(160, window + 32))


def test_joining_the_matrices_is_undone_by_parting_them():
    shape = cpu_block.Shape(4, 2, 8, 0, gpt.EPS, 1.0, 1.0)
    q, k, v = torch.randn(32, 5), torch.randn(16, 5), torch.randn(16, 5)
    joint = cpu_block.join(q, k, v, 4)
    assert all(torch.equal(a, b) for a, b in zip(cpu_block.part(joint, shape), (q, k, v), strict=True))
    assert torch.equal(joint[:4], q[:4]) and torch.equal(joint[4:8], q[8:12]) and torch.equal(joint[24:28], q[4:8])
