"""fp8 matmuls: the scaling and rounding against a simulation, gradients, what is converted, and evaluation without."""

import pytest
import torch
from torch.nn import functional as F

from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU_REASON = fp8.needs(DEVICE)
# Small: where a CPU has no kernel for torch's fp8 products, 16 rows take 0.1 s each, and more in proportion.
SMALL = GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=128, window_pattern="L")
CONFIG = GPTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=256, window_pattern="L")


def rounded(x, dtype):
    """The slow twin: x at the 8-bit format's precision after tensorwise scaling, as exact fp64 numbers."""
    scale = torch.finfo(dtype).max / x.double().abs().amax().clamp(min=fp8.EPS)
    return (x.double() * scale).float().to(dtype).double() / scale


def operands(m=32, k=64, n=48, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    return draw(m, k), draw(n, k), draw(m, n)


def model(config=CONFIG):
    gpt = GPT(config)
    gpt.init_weights(0)
    with torch.no_grad():
        for block in gpt.transformer.h:
            block.attn.c_proj.weight.normal_(0, 0.05)
            block.mlp.c_proj.weight.normal_(0, 0.05)
        gpt.lm_head.weight.normal_(0, 0.05)
    gpt.compute_dtype = torch.bfloat16
    return gpt


@pytest.mark.parametrize("dtype, bits", [(torch.float8_e4m3fn, 3), (torch.float8_e5m2, 2)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_quantising_uses_the_whole_range_and_rounds_by_the_mantissa(dtype, bits, size):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * size
    q, inverse = fp8.quantise(x, dtype)
    assert q.float().abs().max() == torch.finfo(dtype).max and inverse.dtype == torch.float32
    back = q.double() * inverse.double()
    torch.testing.assert_close(back, rounded(x, dtype), rtol=1e-6, atol=0)
    large = x.abs() > x.abs().max() / 100  # well above the subnormal numbers
    assert ((back - x).abs() / x.abs())[large].max() <= 2.0 ** -(bits + 1) * 1.001


def test_zeros_stay_zeros_and_the_largest_value_does_not_overflow():
    q, inverse = fp8.quantise(torch.zeros(16, 16), fp8.FORWARD)
    assert not q.float().any() and inverse.isfinite()
    for value in (3.0, 1e30, 1e-30, 65504.0):
        q, inverse = fp8.quantise(torch.tensor([value, -value]), fp8.FORWARD)
        assert q.float().isfinite().all()


def test_product_and_gradients_equal_the_simulation():
    x, weight, grad = (t.to(DEVICE) for t in operands())
    x.requires_grad_(), weight.requires_grad_()
    y = fp8.product(x, weight)
    y.backward(grad)
    x8, w8, g8 = rounded(x.detach(), fp8.FORWARD), rounded(weight.detach(), fp8.FORWARD), rounded(grad, fp8.BACKWARD)
    for found, expected in ((y, x8 @ w8.T), (x.grad, g8 @ w8), (weight.grad, g8.T @ x8)):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=0.01 * expected.abs().max().item())


def test_leading_dimensions_are_kept_and_odd_rows_go_unquantised():
    x, weight, _ = (t.to(DEVICE) for t in operands())
    torch.testing.assert_close(fp8.product(x.view(2, 16, 64), weight), fp8.product(x, weight).view(2, 16, 48))
    assert torch.equal(fp8.product(x[:5], weight), F.linear(x[:5], weight))


def test_large_enough_matrices_of_the_blocks_are_converted():
    gpt = model()
    names = fp8.convert(gpt, simulate=True)
    expected = {f"transformer.h.{i}.{part}" for i in (0, 1) for part in (
        "attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip
    assert set(names) == expected  # not the gates, nor smear_gate, nor the head
    assert set(gpt.state_dict()) == set(model().state_dict())


@pytest.mark.slow
def test_a_converted_model_stays_close_and_learns():
    gpt = model(SMALL).to(DEVICE)
    ids = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    exact = gpt(ids)
    fp8.convert(gpt, simulate=True)
    assert 0 < (gpt(ids) - exact).abs().max() < 0.3 * exact.abs().max()
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=2e-3)
    losses = []
    for _ in range(4):
        value = gpt(ids, ids)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in gpt.parameters())


@pytest.mark.slow
def test_evaluation_is_exact_and_training_goes_on_afterwards():
    gpt = model(SMALL).to(DEVICE)
    ids = torch.arange(16, device=DEVICE).view(1, 16)
    exact = gpt(ids)
    fp8.convert(gpt, simulate=True)
    quantised = gpt(ids)
    with fp8.disabled(gpt):
        assert torch.equal(gpt(ids), exact)
    assert torch.equal(gpt(ids), quantised) and not torch.equal(quantised, exact)
    with pytest.raises(ZeroDivisionError), fp8.disabled(gpt):
        raise ZeroDivisionError
    assert torch.equal(gpt(ids), quantised)


def test_missing_hardware_is_told_in_a_sentence_pitfall_22(monkeypatch):
    with pytest.raises(UserError, match="--fp8 cannot be used here: it needs an NVIDIA GPU, and this run is on cpu"):
        fp8.convert(model())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fp8.needs("cuda") == "it needs compute capability 8.9 (Ada) or later, and this GPU has 8.0"
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert fp8.needs("cuda") is None


def test_the_rowwise_recipe_is_refused_before_anything_happens_pitfall_22():
    gpt = model()
    with pytest.raises(UserError, match="--fp8-recipe=rowwise is not offered"):
        fp8.convert(gpt, recipe="rowwise", simulate=True)


def test_a_model_too_small_for_fp8_is_refused():
    tiny = GPT(GPTConfig(sequence_len=8, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=64))
    with pytest.raises(UserError, match="no matrix has both sides of at least 128"):
        fp8.convert(tiny, simulate=True)


@pytest.mark.skipif(GPU_REASON is not None, reason=f"fp8 on this machine: {GPU_REASON}")
def test_fp8_training_step_compiles_on_the_gpu():
    gpt = model().cuda()
    ids = torch.randint(64, (4, 32), device="cuda")
    exact = gpt(ids, ids)
    fp8.convert(gpt)
    value = torch.compile(gpt, dynamic=False)(ids, ids)
    value.backward()
    torch.testing.assert_close(value, exact, rtol=0.05, atol=0.05)
