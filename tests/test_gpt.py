"""The model: shape and names, first values, causality, the cached forward, precision, and the loss without logits."""

import dataclasses
import math

import pytest
import torch
from tiny_model import Sizes, tiny_gpt
from torch.nn import functional as F

from nanochat import attention
from nanochat.errors import UserError
from nanochat.gpt import GPT, SOFTCAP, GPTConfig, norm, rotate
from nanochat.kernels import loss
from scripts import bench_model

SMALL = GPTConfig(sequence_len=48, vocab_size=70, n_layer=4, n_head=4, n_kv_head=2, n_embd=32, window_pattern="9,17,L")


def build(config=SMALL, seed=0, **options):
    """A model whose every parameter matters: what starts at zero is given random values."""
    model = GPT(config, **options)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("c_proj.weight", "ve_gate.weight")) or name.startswith(("smear", "backout")):
                p.normal_(0, 0.3, generator=generator)
        model.lm_head.weight.normal_(0, 0.3, generator=generator)
    return model.eval()


def tokens(rows=2, length=40, seed=1, config=SMALL):
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


class DenseCache:
    """The cache contract in its simplest form: rows of one length, keys and values concatenated."""

    def __init__(self):
        self.length, self.kv, self.last = 0, {}, None

    def positions(self, rows, new):
        return torch.arange(self.length, self.length + new).expand(rows, new)

    def previous(self, x):
        before = torch.zeros_like(x[:, :1]) if self.last is None else self.last
        self.last = x[:, -1:]
        return before

    def attend(self, layer, q, k, v, window):
        if layer in self.kv:
            k, v = (torch.cat([old, new], dim=1) for old, new in zip(self.kv[layer], (k, v)))
        self.kv[layer] = (k, v)
        return attention.reference(q, k, v, window)

    def advance(self, new):
        self.length += new


def cached_logits(model, ids, pieces):
    cache, out, start = DenseCache(), [], 0
    for size in pieces:
        out.append(model(ids[:, start : start + size], cache=cache))
        cache.advance(size)
        start += size
    return torch.cat(out, dim=1)


# ---- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_layer": 0}, "n_layer is 0"),
        ({"sequence_len": -5, "vocab_size": 0}, "2 things are wrong"),
        ({"n_head": 5}, "n_embd 32 must be an even multiple of n_head 5"),
        ({"n_kv_head": 3}, "n_kv_head 3 must divide n_head 4"),
        ({"window_pattern": "SSX"}, "'X' is not S, L or a number of tokens"),
        ({"window_pattern": ""}, "window_pattern is empty"),
        ({"window_pattern": "64,L"}, "window of 64 tokens must lie between 1 and the context, 48"),
        ({"window_pattern": "0,L"}, "window of 0 tokens"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(SMALL, **change)


def test_short_window_is_a_quarter_of_the_context_rounded_up_to_128_pitfall_48():
    short = {t: GPTConfig(sequence_len=t).short_window for t in (16, 100, 512, 600, 2048, 2049, 4096)}
    assert short == {16: 16, 100: 100, 512: 128, 600: 256, 2048: 512, 2049: 640, 4096: 1024}


def test_the_pattern_repeats_and_the_last_layer_sees_everything():
    config = GPTConfig(n_layer=6, window_pattern="SSL")
    assert config.windows() == [512, 512, 2048, 512, 512, 2048]
    assert dataclasses.replace(config, window_pattern="s").windows() == [512] * 5 + [2048]
    assert dataclasses.replace(config, window_pattern="300").windows() == [300] * 5 + [2048]
    assert GPT(SMALL).windows() == [9, 17, 48, 48]


# ---- parameters -----------------------------------------------------------------------------------------------------


def test_state_dict_names_and_shapes():
    with torch.device("meta"):
        state = GPT(GPTConfig(n_layer=3, n_kv_head=2)).state_dict()
    c, v, kv = 768, 32768, 256
    names = {"transformer.wte.weight": (v, c), "lm_head.weight": (v, c), "smear_gate.weight": (1, 24)}
    names |= {"resid_lambdas": (3,), "x0_lambdas": (3,), "smear_lambda": (1,), "backout_lambda": (1,)}
    for i in range(3):
        block = f"transformer.h.{i}."
        names |= {block + "attn.c_q.weight": (c, c), block + "attn.c_proj.weight": (c, c)}
        names |= {block + "attn.c_k.weight": (kv, c), block + "attn.c_v.weight": (kv, c)}
        names |= {block + "mlp.c_fc.weight": (4 * c, c), block + "mlp.c_proj.weight": (c, 4 * c)}
    for i in (0, 2):  # every other layer, the last included
        names |= {f"value_embeds.{i}.weight": (v, kv), f"transformer.h.{i}.attn.ve_gate.weight": (2, 12)}
    assert {name: tuple(t.shape) for name, t in state.items()} == names


def test_no_parameter_is_left_without_a_first_value():
    with torch.device("meta"):
        model = GPT(SMALL)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    model.init_weights(seed=3)
    assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []
    assert all(p.dtype == torch.float32 for p in model.parameters())  # pitfall 23: so are the moments


def test_first_values_are_the_published_ones():
    config = GPTConfig(sequence_len=64, vocab_size=4096, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)
    model = GPT(config)
    model.init_weights(seed=0)
    block, bound = model.transformer.h[1], math.sqrt(3 / 256)
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.8, rel=0.01)
    assert model.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.01)
    uniform = {block.attn.c_q: bound, block.attn.c_k: bound, block.attn.c_v: bound, block.mlp.c_fc: 0.4 * bound}
    for module, limit in [*uniform.items(), (model.value_embeds["1"], bound)]:
        assert module.weight.abs().max().item() == pytest.approx(limit, rel=0.01)
        assert module.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert not block.attn.c_proj.weight.any() and not block.mlp.c_proj.weight.any()
    assert torch.allclose(model.resid_lambdas, torch.tensor([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05]))
    assert torch.allclose(model.x0_lambdas, torch.tensor([0.20, 0.15, 0.10, 0.05]))
    assert model.backout_lambda.item() == pytest.approx(0.2) and model.smear_lambda.item() == 0
    for gate in (block.attn.ve_gate.weight, model.smear_gate.weight):
        assert 0 <= gate.min() and gate.max() <= 0.02 and gate.std() > 0.004


def test_the_seed_decides_the_first_values():
    first, again, other = (build(seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_roles_name_each_parameter_once():
    model = GPT(SMALL)
    listed = [name for group in model.roles().values() for name, _ in group]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    roles = {role: [name for name, _ in group] for role, group in model.roles().items()}
    assert roles["smear_backout"] == ["smear_lambda", "backout_lambda", "smear_gate.weight"]
    assert "transformer.h.1.attn.ve_gate.weight" in roles["matrix"] and roles["head"] == ["lm_head.weight"]


def test_every_parameter_gets_a_gradient():
    model = build()
    model(tokens(), tokens(seed=2)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- forward --------------------------------------------------------------------------------------------------------


def test_rotation_is_by_minus_the_angle_in_half_split_pairs():
    """A quarter turn takes (a, b) to (b, -a)."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    assert rotate(x, cos, sin).flatten().tolist() == [3.0, 4.0, -1.0, -2.0]


def test_attention_sees_only_distances():
    """Rotated queries and keys have the same product wherever the pair stands."""
    model = GPT(GPTConfig(sequence_len=64, n_head=1, n_kv_head=1, n_embd=32, n_layer=1))
    cos, sin = model.rope[:, None, :, None].unbind(0)
    q, k = (rotate(torch.randn(32).expand(1, 64, 1, 32), cos, sin)[0, :, 0] for _ in range(2))
    products = q @ k.T
    torch.testing.assert_close(products.diagonal(-3), products[3, 0].expand(61), atol=1e-4, rtol=1e-4)
    assert cos[0, 1, 0, 0] == pytest.approx(math.cos(1)) and cos[0, 1, 0, 8] == pytest.approx(math.cos(100_000**-0.5))


def test_the_future_has_no_influence_by_gradients():
    """d logits[t] / d embedding[s] is zero for every s > t, and not for s <= t within reach."""
    model = build().double()
    embedded = []
    model.transformer.wte.register_forward_hook(lambda m, a, y: embedded.append(y.requires_grad_()) or y)
    logits = model(tokens(1, 24))
    for t in (0, 7, 22):
        (grad,) = torch.autograd.grad(logits[0, t].square().sum(), embedded[0], retain_graph=True)
        size = grad[0].abs().sum(-1)
        assert (size[: t + 1] > 0).all() and (size[t + 1 :] == 0).all()


def test_a_short_window_hides_what_lies_behind_it():
    """One windowed layer, no full one: a token more than window + 1 (smear) back has no gradient."""
    config = dataclasses.replace(SMALL, n_layer=2, window_pattern="4,L")
    model = build(config).double()
    model.transformer.h[1].attn.c_proj.weight.data.zero_()
    embedded = []
    model.transformer.wte.register_forward_hook(lambda m, a, y: embedded.append(y.requires_grad_()) or y)
    (grad,) = torch.autograd.grad(model(tokens(1, 20))[0, 15].square().sum(), embedded[0])
    assert grad[0].abs().sum(-1).nonzero().flatten().tolist() == list(range(15 - 4 - 1, 16))


def test_logits_are_capped_and_fp32_and_without_padding():
    model = build()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    logits = model(tokens())
    assert logits.shape == (2, 40, 70) and logits.dtype == torch.float32 and model.lm_head.weight.size(0) == 128
    assert logits.abs().max() <= SOFTCAP and logits.abs().max() > 14.9


def test_a_layer_by_hand():
    """The forward of a one-layer model, written out straight from the description."""
    config = GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=32, window_pattern="L")
    model, ids = build(config).double(), tokens(1, 6, config=config)
    p = {name: t.double() for name, t in model.state_dict().items()}
    e = norm(p["transformer.wte.weight"][ids[0]])  # (T, C)
    shifted = torch.cat([torch.zeros(1, 32), e[:-1]])
    x0 = e + p["smear_lambda"] * torch.sigmoid(e[:, :24] @ p["smear_gate.weight"].T) * shifted
    x = p["resid_lambdas"] * x0 + p["x0_lambdas"] * x0
    h, block = norm(x), "transformer.h.0."
    gate = 3 * torch.sigmoid(h[:, :12] @ p[block + "attn.ve_gate.weight"].T)  # (T, 1)
    v = h @ p[block + "attn.c_v.weight"].T + gate * p["value_embeds.0.weight"][ids[0]]
    cos, sin = model.rope[:, :6].unbind(0)
    turn = lambda z: torch.cat([z[:, :8] * cos + z[:, 8:] * sin, z[:, 8:] * cos - z[:, :8] * sin], dim=1)
    k = 1.2 * norm(turn(h @ p[block + "attn.c_k.weight"].T))
    heads = []
    for q in (h @ p[block + "attn.c_q.weight"].T).split(16, dim=1):
        scores = 1.2 * norm(turn(q)) @ k.T / 4
        heads.append(scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf).softmax(-1) @ v)
    x = x + torch.cat(heads, dim=1) @ p[block + "attn.c_proj.weight"].T
    x = x + F.relu(norm(x) @ p[block + "mlp.c_fc.weight"].T) ** 2 @ p[block + "mlp.c_proj.weight"].T
    z = norm(x - p["backout_lambda"] * x) @ p["lm_head.weight"].T
    torch.testing.assert_close(model(ids)[0], 15 * torch.tanh(z / 15), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_model_computes_in_its_dtype_with_an_exact_rotary_table(dtype):
    model = build().to(dtype)
    expected = build()(tokens())
    logits = model(tokens())
    assert model.rope.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    limit = 1e-4 if dtype == torch.float64 else 0.3
    assert (logits.float() - expected).abs().max() < limit


def test_fp32_weights_with_bf16_activations():
    model, exact = build(), build()(tokens())
    model.compute_dtype = torch.bfloat16
    assert model.hidden(tokens()).dtype == torch.bfloat16 and model(tokens()).dtype == torch.float32
    assert 0 < (model(tokens()) - exact).abs().max() < 0.3
    model(tokens(), tokens(seed=2)).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_more_tokens_than_the_context_are_refused_pitfall_27():
    model = build()
    with pytest.raises(UserError, match="49 tokens do not fit the model's context of 48"):
        model(tokens(1, 49))
    cache = DenseCache()
    model(tokens(1, 48), cache=cache)
    cache.advance(48)
    with pytest.raises(UserError, match="49 tokens do not fit"):
        model(tokens(1, 1), cache=cache)


# ---- cached forward -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[40], [39, 1], [1] * 40, [7, 13, 1, 1, 18], [1, 39], [20, 20]])
def test_prefill_in_chunks_and_decoding_equal_one_shot_pitfall_28(pieces):
    model = build()
    with torch.no_grad():
        model.smear_lambda.fill_(0.9)
        torch.testing.assert_close(cached_logits(model, tokens(), pieces), model(tokens()), atol=1e-4, rtol=1e-4)


class RaggedCache(DenseCache):
    """Decoding rows of different lengths: each row's keys are its own, kept in a list."""

    def __init__(self, caches):
        self.caches = caches

    def positions(self, rows, new):
        return torch.cat([cache.positions(1, new) for cache in self.caches])

    def previous(self, x):
        return torch.cat([cache.previous(x[b : b + 1]) for b, cache in enumerate(self.caches)])

    def attend(self, layer, q, k, v, window):
        rows = [cache.attend(layer, *(z[b : b + 1] for z in (q, k, v)), window) for b, cache in enumerate(self.caches)]
        return torch.cat(rows)


def test_rows_of_different_lengths_decode_together():
    model, lengths = build(), [3, 11, 1]
    with torch.no_grad():
        caches = [DenseCache() for _ in lengths]
        for cache, length in zip(caches, lengths):
            model(tokens(1, length, seed=length), cache=cache)
            cache.advance(length)
        new = tokens(3, 1, seed=9)
        logits = model(new, cache=RaggedCache(caches))
        for b, length in enumerate(lengths):
            whole = torch.cat([tokens(1, length, seed=length), new[b : b + 1]], dim=1)
            torch.testing.assert_close(logits[b, 0], model(whole)[0, -1], atol=1e-4, rtol=1e-4)


def test_only_the_wanted_positions_reach_the_head_pitfall_18():
    model, ids = build(), tokens(3)
    full = model(ids)
    assert model(ids, last_only=True).shape == (3, 1, 70)
    torch.testing.assert_close(model(ids, last_only=True), full[:, -1:])
    at = torch.tensor([5, 0, 39])
    torch.testing.assert_close(model(ids, last=at)[:, 0], full[torch.arange(3), at])
    several = torch.tensor([[1, 2], [0, 7], [39, 38]])
    torch.testing.assert_close(model(ids, last=several), full[torch.arange(3)[:, None], several])


def test_naive_generation_takes_a_prompt_of_one_token_pitfall_28():
    model = build()
    greedy = list(model.generate_naive([5], 6, temperature=0))
    assert greedy[0] == int(model(torch.tensor([[5]]))[0, -1].argmax()) and len(greedy) == 6
    drawn = [list(model.generate_naive([5], 12, top_k=5, seed=s)) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert list(model.generate_naive([5], 6, top_k=1)) == greedy


# ---- loss -----------------------------------------------------------------------------------------------------------


def head(dtype, rows=37, width=16, vocab=50, padded=64):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(padded, width, generator=generator).requires_grad_()
    if dtype == torch.float64:
        weight = weight.detach().double().requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[::5] = -1
    return hidden, weight, targets, vocab, SOFTCAP


@pytest.mark.parametrize("chunk", [8, 37, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("in_c", [True, False])
def test_loss_in_chunks_equals_the_plain_one_pitfall_18(in_c, dtype, reduction, chunk, monkeypatch):
    if not in_c:  # as on a GPU, and on a CPU without a compiler
        monkeypatch.setattr(loss.cpu_train, "library", lambda dtype: None)
    assert loss._in_c(dtype, torch.device("cpu")) is in_c
    arguments = head(dtype)
    hidden, weight, targets = arguments[:3]
    upstream = torch.randn(37 if reduction == "none" else (), generator=torch.Generator().manual_seed(1))
    results = []
    for value in (
        loss.plain(*arguments, reduction=reduction),
        loss.linear_cross_entropy(*arguments, reduction=reduction, chunk=chunk),
    ):
        results.append((value, *torch.autograd.grad((value * upstream).sum(), (hidden, weight))))
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 0.05}[dtype]
    for expected, found in zip(*results):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    if reduction == "none":
        assert (results[1][0][targets == -1] == 0).all()
    with torch.no_grad():
        again = loss.linear_cross_entropy(*arguments, reduction=reduction, chunk=chunk)
    torch.testing.assert_close(again, results[0][0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("wrong", [50, 63, 10**6])
def test_a_target_beyond_the_vocabulary_is_refused_and_nothing_is_written_beside(wrong):
    hidden, weight, targets, vocab, cap = head(torch.float32)
    targets[3] = wrong
    with pytest.raises(IndexError):
        loss.linear_cross_entropy(hidden, weight, targets, vocab, cap)


def test_targets_need_not_lie_in_one_piece():
    hidden, weight, targets, vocab, cap = head(torch.float32)
    apart = torch.stack([targets, targets.flip(0)], dim=1)[:, 0]
    assert not apart.is_contiguous()
    whole = loss.linear_cross_entropy(hidden, weight, targets, vocab, cap)
    assert torch.equal(loss.linear_cross_entropy(hidden, weight, apart, vocab, cap), whole)


def test_plain_loss_is_torch_cross_entropy_of_the_capped_logits():
    hidden, weight, targets, vocab, cap = head(torch.float32)
    logits = cap * torch.tanh((hidden @ weight.T)[:, :vocab] / cap)
    expected = F.cross_entropy(logits, targets, ignore_index=-1)
    torch.testing.assert_close(loss.plain(hidden, weight, targets, vocab, cap), expected)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_loss_is_finite_at_the_cap(scale):
    """No maximum is taken off before exp: the cap is what keeps it finite."""
    hidden, weight, targets, vocab, cap = head(torch.float32)
    value = loss.linear_cross_entropy(hidden * scale, weight, targets, vocab, cap)
    torch.testing.assert_close(value, loss.plain(hidden * scale, weight, targets, vocab, cap))


def test_a_batch_without_targets_has_loss_zero_and_no_gradient_pitfall_2():
    model = build()
    value = model(tokens(), torch.full((2, 40), -1))
    value.backward()
    assert value.item() == 0 and not model.lm_head.weight.grad.any()


def test_the_logits_of_a_training_step_are_never_whole_pitfall_18(monkeypatch):
    """With 8 rows a chunk, no tensor of the step has 80 x vocabulary entries."""
    monkeypatch.setattr(loss, "CPU_CHUNK", 8)
    config = GPTConfig(sequence_len=40, vocab_size=2048, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
    model = build(config)
    with Sizes() as made:
        model(tokens(config=config), tokens(seed=2, config=config)).backward()
    assert max(made.sizes) == 2048 * 16  # the tables and their gradients; all logits at once would be 80 x 2048


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_model_loss_is_cross_entropy_of_its_logits(reduction):
    model, ids, targets = build(), tokens(), tokens(seed=2)
    targets[:, ::3] = -1
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
    found = model(ids, targets, reduction=reduction)
    assert found.shape == (targets.shape if reduction == "none" else ())
    torch.testing.assert_close(found.flatten(), expected.flatten(), atol=1e-5, rtol=1e-5)


def test_it_learns():
    """Twenty steps of plain AdamW on one batch take the loss from ln V well down."""
    model = GPT(SMALL)
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        value = model(tokens(4, 32), tokens(4, 32, seed=2))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[0] == pytest.approx(math.log(70), rel=0.02) and losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own tracer uses what torch deprecates
def test_the_training_step_compiles_into_one_graph():
    model = build()
    expected = model(tokens(), tokens(seed=2))
    step = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")  # inductor takes half a minute
    found = step(tokens(), tokens(seed=2))
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_bench_of_the_model_compares_with_plain_twins(capsys):
    tiny = bench_model.Config(depth=1, aspect_ratio=16, head_dim=16, vocab_size=64, sequence_len=32, rows=1, turns=1,
                              compile=False)  # fmt: skip
    assert bench_model.main(tiny)


def test_recomputed_blocks_give_the_same_gradient_bit_for_bit():
    ids = torch.arange(24)[None] % 50
    gradients = []
    for recompute in (False, True):
        model = tiny_gpt()
        model.recompute = recompute
        model(ids[:, :-1], ids[:, 1:]).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
