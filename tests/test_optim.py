"""The optimizer: what its rules mean, that the fast form is the plain form, and that N ranks are one rank."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.optim.adamw import adamw

from nanochat import optim, rules, runtime
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime

SHAPES = [(16, 16), (8, 32), (32, 8), (12, 16), (1, 12)]
ROLES = ("matrix", *optim.ADAM_RULES)
RATES = {"matrix": 0.02, "embedding": 0.05, "value_embedding": 0.05, "head": 0.01, "resid": 0.01, "x0": 0.05,
         "smear_backout": 0.05}  # fmt: skip


def matrix(m, n, seed=0, dtype=torch.float64):
    return torch.randn(m, n, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def conditioned(m, n, decades):
    """A matrix whose singular values fall evenly over so many powers of ten; Frobenius norm just under 1."""
    s = min(m, n)
    left, right = (torch.linalg.qr(matrix(k, s, seed=k))[0] for k in (m, n))
    g = (left * 10 ** (-decades * torch.linspace(0, 1, s, dtype=torch.float64))) @ right.T
    return g / (g.norm() * rules.SAFETY)


def single(named, role="matrix", lr=0.02, dtype=torch.float32):
    return optim.MuonAdamW({role: named}, {role: lr}, Runtime.single(dtype=dtype))


# --- meanings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_polar_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    g = conditioned(*shape, decades=2)
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    x = rules.polar_reference(g)
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.8 and values.max() < 1.2
    inside = left.T @ x @ right.T
    assert torch.allclose(inside, torch.diag(inside.diagonal()), atol=1e-9)


def test_a_muon_step_moves_every_direction_alike():
    """The update of a badly conditioned gradient is near-orthogonal: no direction waits for a large gradient."""
    p = torch.zeros(32, 32, dtype=torch.float64)
    new, _, _ = rules.muon_reference(p, conditioned(32, 32, 1.5), p, torch.zeros(32, 1), 1.0, 0.0, 0.0)
    values = torch.linalg.svdvals(new)
    assert values.max() / values.min() < 1.7
    assert math.isclose(float(new.norm()), math.sqrt(32), rel_tol=1e-6)


def test_tall_matrices_move_further():
    """lr carries sqrt(rows / cols) for tall matrices, 1 for wide ones."""
    sizes = []
    for shape in ((64, 16), (16, 64)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        single([("p", p)], lr=1.0).step(momentum=0.9)
        sizes.append(float(p.detach().norm()) / math.sqrt(min(shape)))
    assert sizes == pytest.approx([2.0, 1.0], rel=1e-3)


def test_decay_is_cautious():
    """A weight is decayed only where the step already moves it towards zero."""
    p = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    update = torch.tensor([[0.5, 0.5, -0.5, -0.5]])
    q = p.clone()
    rules.cautious_(q, update, 0.1, 2.0)
    moved_without_decay = p - 0.1 * update
    assert torch.allclose(moved_without_decay - q, torch.tensor([[0.2, 0.0, 0.0, -0.2]]))


def test_momentum_at_one_step_is_nesterov():
    """With momentum mu the direction is that of (1 - mu^2) g at the first step, so only its sign and shape count."""
    g = matrix(8, 8)
    zero = torch.zeros_like(g)
    a, m, _ = rules.muon_reference(zero, g, zero, torch.zeros(8, 1), 1.0, 0.9, 0.0)
    b, _, _ = rules.muon_reference(zero, g, zero, torch.zeros(8, 1), 1.0, 0.0, 0.0)
    assert torch.allclose(m, 0.1 * g) and torch.allclose(a, b, atol=1e-4)


def test_moments_stay_fine_enough_for_slow_averages_pitfall_23():
    """beta2 = 0.995 moves the second moment by 0.5 % a step, less than half a bf16 step near its value."""
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = single([("e", p)], "embedding", lr=1e-6)
    for step in range(1500):
        p.grad = torch.full((4,), 1.0 if step < 2 else 2.0)
        optimizer.step()
    second = optimizer.state()["e.exp_avg_sq"]
    assert second.dtype == torch.float32 and torch.allclose(second, torch.full((4,), 4.0), rtol=1e-3)
    with pytest.raises(ValueError, match="not fp32 or fp64"):
        single([("e", torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)))], "embedding")
    double = single([("e", torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)))], "embedding")
    assert double.state()["e.exp_avg"].dtype == torch.float64


def test_the_published_adamw_table():
    assert {role: tuple(rule) for role, rule in optim.ADAM_RULES.items()} == {
        "head": (0.8, 0.96, 0.01, 1e-10),
        "embedding": (0.8, 0.995, 0.001, 1e-10),
        "value_embedding": (0.8, 0.995, 0.01, 1e-10),
        "resid": (0.8, 0.95, 0.05, 1e-10),
        "x0": (0.96, 0.95, 0.0, 1e-10),
        "smear_backout": (0.8, 0.95, 0.0, 1e-10),
    }


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="gate"):
        single([("g", torch.nn.Parameter(torch.zeros(4)))], "gate")


# --- fast is plain -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_fast_muon_is_the_reference(shape, dtype, tolerance):
    start = [matrix(*shape, seed=s, dtype=dtype) for s in range(3)]
    side = (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
    plain = [(p, torch.zeros_like(p), torch.zeros(side, dtype=dtype)) for p in start]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = single([(f"p{i}", p) for i, p in enumerate(params)])
    for step in range(6):
        grads = [
            matrix(*shape, seed=10 * step + i, dtype=dtype) * (step > 0) for i in range(3)
        ]  # the first is all zero
        for p, g in zip(params, grads):
            p.grad = g.clone()
        optimizer.step(0.7, 0.9, 0.3)
        plain = [rules.muon_reference(*(p, g, m, v), 0.014, 0.9, 0.3) for (p, m, v), g in zip(plain, grads)]
    for p, (q, _, _) in zip(params, plain):
        assert torch.allclose(p.detach(), q, atol=tolerance, rtol=0)


@pytest.mark.parametrize("decades", [1, 4, 8])
@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
def test_polar_by_gram_is_polar(shape, decades):
    g = conditioned(*shape, decades)[None]
    exact = torch.stack([rules.polar_reference(g[0])])
    start = g / (g.norm() * rules.SAFETY + rules.NORM_EPS)
    assert torch.allclose(rules.polar_by_gram(start), exact, atol=1e-9)
    error = (rules.polar_by_gram(start.float()).double() - exact).norm() / exact.norm()
    assert error < 5e-3


@pytest.mark.parametrize("role", list(optim.ADAM_RULES))
def test_fast_adamw_is_the_reference_and_torchs(role):
    rule = optim.ADAM_RULES[role]
    p = torch.nn.Parameter(matrix(5, 7))
    plain, m, v = p.detach().clone(), torch.zeros(5, 7), torch.zeros(5, 7)
    torchs, moments, count = p.detach().clone(), [torch.zeros(5, 7).double() for _ in range(2)], torch.zeros(())
    optimizer = single([("p", p)], role, lr=0.02)
    for t in range(1, 6):
        g = matrix(5, 7, seed=t)
        p.grad = g.clone()
        optimizer.step(0.5)
        plain, m, v = rules.adamw_reference(plain, g, m, v, t, 0.01, rule)
        lists = [torchs], [g], [moments[0]], [moments[1]], [], [count]
        adamw(*lists, foreach=False, amsgrad=False, maximize=False, lr=0.01, **rule._asdict())
    assert torch.allclose(p.detach(), plain, atol=1e-13) and torch.allclose(torchs, plain, atol=1e-13)


def test_bf16_polar_step_stays_close():
    """On hardware with fast bf16 only the polar products run in it; the direction differs by its rounding."""
    g = matrix(32, 32, dtype=torch.float32)[None]
    out = []
    for dtype in (None, torch.bfloat16):
        out.append(rules.muon_update(g.clone(), torch.zeros_like(g), torch.zeros(1, 32, 1), 0.9, dtype=dtype))
    assert out[1].dtype == torch.float32
    assert (out[0] - out[1]).norm() / out[0].norm() < 0.1


# --- gradients that are missing, zero, scaled, infinite ------------------------------------------------------------


def tiny(dtype=torch.float32):
    config = GPTConfig(sequence_len=16, vocab_size=50, n_layer=3, n_head=3, n_kv_head=3, n_embd=30)
    model = GPT(config)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():  # zero-initialised projections would hide the rest of the first gradient
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def rows(step, dtype_seed=0):
    """Twenty-four rows of 16 tokens with a pattern to learn: as many for each of 1, 2, 3 or 4 ranks."""
    generator = torch.Generator().manual_seed(step + dtype_seed)
    start = torch.randint(0, 50, (24, 1), generator=generator)
    return (start + 3 * torch.arange(17)) % 50


def test_missing_and_zero_gradients():
    a, b = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    e = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.MuonAdamW({"matrix": [("a", a), ("b", b)], "x0": [("e", e)]}, RATES, Runtime.single())
    a.grad = torch.zeros(4, 4)  # b and e have none
    optimizer.step()
    assert all(torch.equal(p.detach(), torch.ones_like(p)) for p in (a, b, e))
    optimizer.zero_grad()
    assert a.grad is None


def test_a_scaled_gradient_gives_the_same_step():
    """fp16: the loss was multiplied by the scale, reduce(scale) divides it out again, in the norm too."""
    out = []
    for scale in (1.0, 1024.0):
        model = tiny()
        optimizer = optim.MuonAdamW(model.roles(), RATES, Runtime.single())
        x = rows(0)
        (model(x[:, :-1], x[:, 1:]) * scale).backward()
        norm = optimizer.reduce(scale)
        optimizer.step()
        out.append((norm, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert out[0][0] == pytest.approx(out[1][0], rel=1e-5)
    assert torch.allclose(out[0][1], out[1][1], atol=1e-5)


def test_norm_is_that_of_the_whole_gradient_and_an_infinite_one_is_seen_before_the_step():
    model = tiny()
    optimizer = optim.MuonAdamW(model.roles(), RATES, Runtime.single())
    x = rows(0)
    model(x[:, :-1], x[:, 1:]).backward()
    whole = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert optimizer.reduce() == pytest.approx(whole, rel=1e-5)
    optimizer.zero_grad()
    model(x[:, :-1], x[:, 1:]).backward()
    model.x0_lambdas.grad[1] = math.inf
    before = [p.detach().clone() for p in model.parameters()]
    assert not math.isfinite(optimizer.reduce()) and optimizer.nonfinite() == ["x0_lambdas"]
    optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert optimizer.t == 0


# --- any number of ranks ---------------------------------------------------------------------------------------------


def train_some(model, rt, steps, optimizer=None, first=0):
    """Each rank takes its share of the same rows; returns the optimizer and the losses over all ranks."""
    optimizer = optimizer or optim.MuonAdamW(model.roles(), RATES, rt)
    losses = []
    for step in range(first, first + steps):
        halves = rows(step)[rt.rank :: rt.world].chunk(2)  # two micro-batches, of which the last one overlaps
        total = 0.0
        for x in halves:
            loss = model(x[:, :-1], x[:, 1:]) / len(halves)
            optimizer.backward(loss, last=x is halves[-1])
            total += loss.detach()
        losses.append(float(rt.mean(total)))
        optimizer.step(1.0, 0.9, 0.1)
        optimizer.zero_grad()
    return optimizer, losses


def rank_program(out):
    """What each rank of the tests on several does; also run in this process as the world of one."""
    from safetensors.torch import save_file

    rt = runtime.start("cpu", 0)
    double = tiny(torch.float64)
    optimizer, _ = train_some(double, rt, 1)
    state = optimizer.state()
    model = tiny()
    resumable, losses = train_some(model, rt, 25)
    middle = {n: p.detach().clone() for n, p in model.named_parameters()}
    middle_state = resumable.state()
    again = optim.MuonAdamW(model.roles(), RATES, rt)  # each rank takes its part of the whole state
    again.load_state(resumable.state(everywhere=True))
    losses += train_some(model, rt, 25, again, first=25)[1]

    lone = tiny()
    agreeing = optim.MuonAdamW(lone.roles(), RATES, rt)
    x = rows(0)[rt.rank :: rt.world]
    lone(x[:, :-1], x[:, 1:]).backward()
    if rt.rank == rt.world - 1:
        lone.lm_head.weight.grad[0, 0] = math.inf
        lone.transformer.h[0].mlp.c_fc.weight.grad = None
    norm = agreeing.reduce()
    finite_ranks = int(rt.sum(torch.tensor(int(math.isfinite(norm)))))
    most = rt.max(again.bytes()["moments"])
    if rt.main:
        save_file({n: p.detach() for n, p in double.named_parameters()}, f"{out}/double.safetensors")
        save_file(state, f"{out}/double_state.safetensors")
        save_file(middle, f"{out}/middle.safetensors")
        save_file(middle_state, f"{out}/middle_state.safetensors")
        Path(f"{out}/rest.json").write_text(json.dumps({"losses": losses, "finite": finite_ranks, "most": most}))
    runtime.stop(rt)


PROGRAM = """
import sys
sys.path.insert(0, "tests")
import torch, test_optim
torch.set_num_threads(1)
test_optim.rank_program(sys.argv[1])
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("world1")
    rank_program(str(out))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_n_ranks_are_one_rank_pitfalls_9_12_14(world, alone, tmp_path, on_ranks):
    """fp64 1e-10 after a step, fp32 losses 1e-4 over 50; uneven shapes, gloo; state goes from N ranks to one."""
    from safetensors.torch import load_file

    out = tmp_path / "out"
    out.mkdir()
    on_ranks(world, PROGRAM, [str(out)])
    for name in ("double", "double_state"):
        one, many = load_file(alone / f"{name}.safetensors"), load_file(out / f"{name}.safetensors")
        assert one.keys() == many.keys()
        for key in one:
            assert torch.allclose(one[key], many[key], atol=1e-10, rtol=1e-10), key
    one, many = (json.loads((folder / "rest.json").read_text()) for folder in (alone, out))
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert one["losses"][-1] < 0.9 * one["losses"][0]
    assert many["finite"] == 0, "one rank's infinity must stop all ranks"
    assert many["most"] < one["most"] / world * 1.2, "moments are sharded"

    model = tiny()
    model.load_state_dict(load_file(out / "middle.safetensors"), strict=False)
    optimizer = optim.MuonAdamW(model.roles(), RATES, Runtime.single())
    optimizer.load_state(load_file(out / "middle_state.safetensors"))
    _, losses = train_some(model, Runtime.single(), 25, optimizer, first=25)
    assert losses == pytest.approx(one["losses"][25:], rel=1e-4)


def test_resuming_is_bitwise_on_the_same_world_pitfall_8():
    whole, part = tiny(), tiny()
    optimizer, losses = train_some(whole, Runtime.single(), 6)
    first, _ = train_some(part, Runtime.single(), 3)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    fresh = optim.MuonAdamW(part.roles(), RATES, Runtime.single())
    fresh.load_state(state)
    _, rest = train_some(part, Runtime.single(), 3, fresh, first=3)
    assert rest == losses[3:]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), part.parameters()))


def test_a_state_of_another_model_is_refused_pitfall_9():
    optimizer = optim.MuonAdamW(tiny().roles(), RATES, Runtime.single())
    state = optimizer.state()
    short = dict(state)
    short.pop("lm_head.weight.exp_avg")
    with pytest.raises(UserError, match=r"lacks 1 tensors, lm_head\.weight\.exp_avg"):
        optimizer.load_state(short)
    with pytest.raises(UserError, match=r"x0_lambdas\.exp_avg is \(5,\), the model needs \(3,\)"):
        optimizer.load_state({**state, "x0_lambdas.exp_avg": torch.zeros(5)})


def test_every_role_of_the_model_has_a_rule():
    model = tiny()
    named = [name for pairs in model.roles().values() for name, _ in pairs]
    assert set(model.roles()) == set(ROLES)
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
