"""Every attention backend against the plain fp32 reference, forward and backward; and how a backend is chosen."""

import pytest
import torch

from nanochat import attention
from nanochat.errors import UserError
from nanochat.kernels import flash3, flex, sdpa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {  # rows, Tq, Tk, H, Hkv, D, window
    "full": (2, 40, 40, 4, 4, 16, 64),
    "full, exactly": (1, 33, 33, 2, 2, 16, 32),
    "one token": (2, 1, 1, 2, 2, 16, 8),
    "window": (2, 150, 150, 4, 4, 16, 37),
    "window of one earlier token": (1, 20, 20, 2, 2, 16, 1),
    "window one short of full": (1, 40, 40, 2, 2, 16, 38),
    "window at a block's edge": (1, 129, 129, 2, 2, 16, 64),
    "grouped heads, full": (2, 40, 40, 6, 2, 16, 64),
    "grouped heads, window": (2, 70, 70, 6, 3, 16, 16),
    "one key/value head": (1, 24, 24, 4, 1, 16, 9),
    "cached decode": (3, 1, 57, 4, 2, 16, 100),
    "cached decode, window": (3, 1, 57, 4, 2, 16, 10),
    "chunked prefill": (2, 40, 97, 4, 4, 16, 200),
    "chunked prefill, grouped, window": (2, 70, 130, 6, 2, 16, 30),
    "chunk longer than the window": (1, 60, 61, 2, 2, 16, 5),
}


def inputs(rows, tq, tk, heads, kv_heads, dim, dtype, device):
    generator = torch.Generator().manual_seed(tq * tk + heads)
    shapes = (rows, tq, heads, dim), (rows, tk, kv_heads, dim), (rows, tk, kv_heads, dim)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def grads(attend, tensors, window, weight):
    y = attend(*tensors, window)
    return y, torch.autograd.grad((y * weight).sum(), tensors)


@pytest.fixture(params=attention.BACKENDS)
def backend(request):
    """Each backend, in the best dtype it takes on this machine; skips with its own reason."""
    module = attention.load(request.param)
    reasons = []
    for dtype in (torch.float32, torch.bfloat16):
        reason = module.needs(torch.device(DEVICE), dtype)
        if reason is None:
            return module, dtype
        reasons.append(reason)
    pytest.skip(f"{request.param}: {reasons[-1]}")


@pytest.mark.parametrize("case", CASES)
def test_backend_equals_the_reference(backend, case, monkeypatch):
    module, dtype = backend
    monkeypatch.setattr(sdpa, "BLOCK", 64)  # several blocks even in small cases
    *shape, window = CASES[case]
    if DEVICE == "cuda":
        shape[-1] = 64
    tensors = inputs(*shape, dtype, DEVICE)
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected, expected_grads = grads(attention.reference, exact, window, weight.double())
    y, found = grads(module.attend, tensors, window, weight)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for got, want in zip((y, *found), (expected, *expected_grads), strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def test_reference_by_hand():
    """Two keys with scores 0 and ln 3 (after the 1/sqrt(D)): the second weighs 3/4."""
    q = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    k = torch.tensor([[1.0, 0.0], [0.0, torch.tensor(3.0).log() * 2**0.5]]).view(1, 2, 1, 2)
    v = torch.tensor([[4.0, 0.0], [0.0, 8.0]]).view(1, 2, 1, 2)
    assert torch.allclose(attention.reference(q, k, v, 1).flatten(), torch.tensor([1.0, 6.0]))
    assert torch.allclose(attention.reference(q, k, v, 0).flatten(), torch.tensor([0.0, 8.0]))  # itself only


def test_visible_counts_earlier_tokens_besides_itself():
    assert attention.visible(3, 5, 2).int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_query_heads_read_their_own_group():
    """Query heads 0 and 1 read key/value head 0, heads 2 and 3 read head 1."""
    q, k = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 2, 8)
    v = torch.stack([torch.zeros(1, 4, 8), torch.ones(1, 4, 8)], dim=2)
    for attend in (attention.reference, sdpa.attend):
        torch.testing.assert_close(attend(q, k, v, 3)[0, :, :, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4))


def test_no_dense_mask_is_built_for_a_window_pitfall_16(monkeypatch):
    """Whatever the length, a mask has at most BLOCK x (BLOCK + window) entries, and full attention has none."""
    masks = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(sdpa, "BLOCK", 32)
    q, k, v = inputs(1, 200, 200, 2, 2, 8, torch.float32, "cpu")
    sdpa.attend(q, k, v, 48)
    assert len(masks) == 7 and all(m is None or (m[0] <= 32 and m[1] <= 32 + 48) for m in masks)
    masks.clear()
    sdpa.attend(q, k, v, 199)
    assert masks == [None]


def test_keys_outside_the_window_are_not_even_read():
    """NaN keys before the window leave the result finite: they are sliced off, not multiplied by zero."""
    q, k, v = (x.detach() for x in inputs(1, 1, 50, 2, 2, 8, torch.float32, "cpu"))
    k[:, :40], v[:, :40] = float("nan"), float("nan")
    assert sdpa.attend(q, k, v, 9).isfinite().all()


def test_choose_tells_why_others_were_passed_over_pitfall_17():
    chosen = attention.choose("cpu", torch.float32)
    assert chosen.name == "sdpa" and chosen.attend is sdpa.attend
    assert [name for name, _ in chosen.passed_over] == ["flash3", "varlen", "flex"]
    assert all(reason and "\n" not in reason for _, reason in chosen.passed_over)


def test_a_backend_asked_for_by_name_is_used_or_refused():
    assert attention.choose("cpu", torch.float32, "sdpa").passed_over == []
    with pytest.raises(UserError, match="flash3 cannot be used here: needs an NVIDIA GPU"):
        attention.choose("cpu", torch.bfloat16, "flash3")
    with pytest.raises(UserError, match="unknown attention backend 'fast'"):
        attention.choose("cpu", torch.float32, "fast")


def test_flash3_is_pinned_and_fetched_only_when_all_else_holds_pitfall_17(monkeypatch):
    """On a Hopper GPU without the package, or without the hub, the reason is one line; elsewhere nothing is tried."""
    assert len(flash3.REVISION) == 40 and int(flash3.REVISION, 16)
    tried = []
    monkeypatch.setattr(flash3, "FOUND", {})
    monkeypatch.setattr(flash3, "_fetch", lambda: (tried.append(1), "could not be fetched: offline"))
    assert flash3.needs(torch.device("cpu"), torch.bfloat16) and not tried
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "Hopper" in flash3.needs(torch.device("cuda"), torch.bfloat16) and not tried
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "float32" in flash3.needs(torch.device("cuda"), torch.float32) and not tried
    for _ in range(2):
        assert flash3.needs(torch.device("cuda"), torch.bfloat16) == "could not be fetched: offline"
    assert tried == [1]  # once a process


def test_flash3_reports_a_failed_fetch_in_one_line_pitfall_17(monkeypatch):
    class Hub:
        @staticmethod
        def get_kernel(repository, revision):
            assert (repository, revision) == (flash3.REPOSITORY, flash3.REVISION)
            raise OSError("no\nroute to\nthe hub")

    monkeypatch.setitem(__import__("sys").modules, "kernels", Hub)
    kernel, reason = flash3._fetch()
    assert kernel is None and reason == "could not be fetched: no route to the hub"


@pytest.mark.slow  # for its imports
def test_flash3_is_compiled_without_the_fetching(monkeypatch):
    """torch.compile looks through functools.cache: then each layer would trace the hub's client, or break its graph."""
    fetched = []

    def kernel(q, k, v, causal, window_size):
        return attention.reference(q, k, v, window_size[0])

    monkeypatch.setattr(flash3, "FOUND", {})
    monkeypatch.setattr(flash3, "_fetch", lambda: (fetched.append(1), (kernel, None))[1])
    assert flash3.found()["why"] is None  # as `choose` does
    tensors = [x.detach() for x in inputs(1, 20, 20, 2, 2, 8, torch.float32, "cpu")]
    y = torch.compile(flash3.attend, fullgraph=True, backend="eager")(*tensors, 5)
    torch.testing.assert_close(y, attention.reference(*tensors, 5))
    assert fetched == [1]


def test_flex_compiles_nothing_where_no_gradient_is_wanted(monkeypatch):
    """Prompts and evaluations have a length of their own each time: a kernel for each would take half a minute."""
    monkeypatch.setattr(flex, "_compiled", lambda: pytest.fail("it compiles"))
    tensors = [x.detach() for x in inputs(1, 40, 40, 2, 2, 8, torch.float32, "cpu")]
    with torch.no_grad():
        torch.testing.assert_close(flex.attend(*tensors, 7), attention.reference(*tensors, 7))
