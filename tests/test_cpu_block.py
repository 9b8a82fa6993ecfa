"""The block by hand, for training on CPU, against the plain one under autograd: values, gradients, groups, windows."""

import dataclasses
import functools

import pytest
import torch
from tiny_model import tiny_gpt

from nanochat import train
from nanochat.kernels import compiled, cpu_block, cpu_train
from nanochat.runtime import Runtime

CASES = {  # changes of tiny_gpt, rows, tokens a row
    "windows, few kv heads, value embeddings": ({}, 3, 40),
    "as many kv heads": ({"n_kv_head": 4, "window_pattern": "L"}, 3, 40),
    "one row, one token": ({}, 1, 1),
    "whole blocks of queries": ({"window_pattern": "16,L"}, 2, 32),
    "a window that leaves whole blocks of keys unseen": ({"window_pattern": "3,L", "sequence_len": 128}, 2, 101),
    "a usual head dim": ({"n_head": 2, "n_kv_head": 1, "n_embd": 64, "sequence_len": 128}, 3, 70),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Groups of two rows of 40 tokens, so that small cases have several; blocks of queries hold 32."""
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


def desk(tokens, name="attend_back"):
    """How many numbers a thread holds while it works on a head of rows of so many tokens."""
    sizes = {"n": 2, "t": tokens, "c": 64, "heads": 2, "kv_heads": 2, "dim": 32, "window": tokens}
    passes = cpu_train.Passes(torch.float32, **sizes)
    return passes.library.desk(cpu_train.PASSES.index(name), passes.at)


def test_scores_are_never_all_there_at_once_pitfall_16():
    """What attention holds grows with the tokens, not with their square."""
    assert desk(4096) < 2.1 * desk(2048) and desk(4096) < 4096**2 / 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing_to_the_last_bit_borrowed_or_our_own(dtype, monkeypatch):
    model = tiny_gpt()
    model.compute_dtype = dtype
    library, before, results = cpu_train.library(dtype), torch.get_num_threads(), []
    try:
        for threads, team in ((1, True), (2, True), (2, False)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(cpu_block, "GROUP", 2 * 40 * 4 * 32 // threads)  # the same groups
            if not team:
                library.borrow(None)
            results.append(both(model, 3, 40)[1])
    finally:
        torch.set_num_threads(before)
        cpu_train.library.cache_clear()
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-mavx2", "-mfma")], ids=str)
def test_other_vectors_compute_the_same(flags, tmp_path, monkeypatch):
    if flags and "avx2" not in compiled.processor():
        pytest.skip("this processor has no AVX2")
    made = functools.cache(lambda dtype: other(dtype, flags, tmp_path))
    monkeypatch.setattr(cpu_train, "library", made)
    for case in CASES:
        test_by_hand_equals_autograd_exactly_in_fp64(case)
    test_by_hand_is_as_close_as_the_dtype_allows_and_gradients_stay_fp32(torch.float32, 1e-4)
    test_by_hand_is_as_close_as_the_dtype_allows_and_gradients_stay_fp32(torch.bfloat16, 0.06)


def other(dtype, flags, folder):
    """The library, compiled quickly and with these flags in place of this machine's."""
    bits = cpu_train.BITS[dtype]
    path = folder / f"{bits}.so"
    flags = (*compiled.FLAGS, *flags, f"-DREAL={bits}", "-O1")
    assert compiled.build(compiled.find_compiler(), flags, cpu_train.SOURCE, path) == ""
    return cpu_train.load(path)


def test_without_a_compiler_the_plain_block_trains_and_one_line_says_so(monkeypatch, caplog):
    cpu_train.library.cache_clear()
    monkeypatch.setenv("NANOCHAT_KERNELS", "")
    model, runtime = tiny_gpt(), Runtime.single()
    assert train.fastest(model, dataclasses.replace(runtime, dtype=torch.float32)) == (
        model,
        "plain: blocks by hand need a C compiler",
    )
    (want, grads), (loss, found) = both(model, 3, 40)
    assert torch.equal(want, loss) and all(torch.equal(a, b) for a, b in zip(grads, found, strict=True))
    assert len(caplog.records) == 1 and "NANOCHAT_KERNELS" in caplog.text
    cpu_train.library.cache_clear()
