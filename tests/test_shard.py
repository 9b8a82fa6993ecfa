"""Parameters sharded with FSDP2 learn what whole ones learn, and a rank can still use the whole model by itself."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_optim import RATES, rows, tiny, train_some

from nanochat import checkpoint, resume, shard, train
from nanochat.errors import UserError
from nanochat.optim import MuonAdamW
from nanochat.runtime import Runtime

PROGRAM = """
import sys, json
import torch, test_shard
from nanochat import runtime
torch.set_num_threads(1)
rt = runtime.start("cpu", 0)
test_shard.rank_program(rt, sys.argv[1])
runtime.stop(rt)
"""


def apart(one, other):
    """The largest difference between two dicts of tensors."""
    assert one.keys() == other.keys()
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


def rank_program(rt, out):
    """The same updates with banks and sharded; what differs goes to a file."""
    plain, model = tiny(torch.float64), tiny(torch.float64)
    shard.apply(model, rt)
    whole, parts = MuonAdamW(plain.roles(), RATES, rt), MuonAdamW(model.roles(), RATES, rt)
    found = {}
    for count in (1, 4):
        _, losses = train_some(plain, rt, count, whole)
        _, same = train_some(model, rt, count, parts)
        found[f"losses_{count}"] = max(abs(a - b) for a, b in zip(losses, same, strict=True))
        weights = {n: t.full_tensor() for n, t in model.state_dict().items()}
        found[f"weights_{count}"] = apart(dict(plain.state_dict()), weights)
        found[f"moments_{count}"] = apart(whole.state(True), parts.state(True))
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        p.grad, q.grad = None, None
    x = rows(0)[rt.rank :: rt.world]
    parts.backward(model(x[:, :-1], x[:, 1:]))
    plain(x[:, :-1], x[:, 1:]).backward()
    found["norm"] = abs(whole.reduce() - parts.reduce())
    parts.zero_grad()
    # another life: a state written by banks goes into shards
    again = tiny(torch.float64)
    shard.apply(again, rt)
    checkpoint.restore(again, {n: t.clone() for n, t in plain.state_dict().items()}, out)
    fresh = MuonAdamW(again.roles(), RATES, rt)
    fresh.load_state(whole.state(True))
    found["resumed"] = apart(dict(plain.state_dict()), {n: t.full_tensor() for n, t in again.state_dict().items()})
    found["resumed_moments"] = apart(whole.state(True), fresh.state(True))
    # each rank runs the model as often as it likes
    with torch.no_grad(), shard.whole(model):
        for _ in range(rt.rank + 1):
            logits = model(rows(1)[:1, :5])
        found["alone"] = float((logits - plain(rows(1)[:1, :5])).abs().max())
    train_some(model, rt, 1, parts)  # and it trains on afterwards
    mine, all_ = parts.bytes(), whole.bytes()
    found |= {f"share_{kind}": mine[kind] / all_[kind] for kind in ("weights", "gradients")}
    worst = {name: max(values) for name, values in zip(found, zip(*rt.gather(list(found.values())), strict=True))}
    if rt.main:
        with open(f"{out}/found.json", "w") as file:
            json.dump(worst, file)


@pytest.mark.slow
def test_a_sharded_run_is_the_unsharded_run_pitfalls_9_15(tmp_path, on_ranks):
    """3 ranks, uneven rows: losses, weights and moments to 1e-10 in fp64, whichever of the two wrote the checkpoint."""
    on_ranks(3, PROGRAM, [str(tmp_path)], load="torch._dynamo,torch.distributed.fsdp")
    found = json.loads((tmp_path / "found.json").read_text())
    shares = {name: found.pop(name) for name in list(found) if name.startswith("share")}
    assert found.pop("norm") < 1e-6  # which is summed in fp32
    assert found and all(value < 1e-10 for value in found.values()), found
    assert all(value < 0.45 for value in shares.values()), shares  # a third and what does not divide


def test_sharding_over_one_rank_is_refused():
    with pytest.raises(UserError, match="torchrun"):
        shard.apply(tiny(), Runtime.single())


def test_a_model_that_is_not_sharded_is_whole():
    model = tiny()
    assert not shard.sharded(model)
    with shard.whole(model):
        assert model(rows(0)[:1, :5]).shape[:2] == (1, 5)


@pytest.mark.parametrize("sharded", [True, False])
def test_a_model_too_large_for_a_device_is_resumed_by_way_of_host_memory(monkeypatch, sharded):
    asked = []
    found = SimpleNamespace(path="there", world=1, meta={"meter": {}, "scaler": {}}, optimizer=dict)
    found.weights, found.rank_states = asked.append, lambda: [{"rng": train.rng_state()}]
    monkeypatch.setattr(shard, "sharded", lambda model: sharded)
    monkeypatch.setattr(checkpoint, "restore", lambda *_: None)
    optimizer, rt = SimpleNamespace(load_state=lambda moments: None), Runtime.single("cuda")
    resume.restore(found, None, optimizer, rt)
    assert asked == ["cpu" if sharded else rt.device]


@pytest.mark.slow  # for its imports
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own imports use what torch deprecates
def test_evaluating_a_sharded_model_compiles_nothing(monkeypatch):
    """Its blocks are compiled for the shape of a training batch; what is evaluated has others."""
    from torch._dynamo.utils import counters

    model = tiny()
    ids = rows(0)[:1, :5]
    expected = model(ids)
    monkeypatch.setattr(shard, "sharded", lambda model: True)
    shard.compile_blocks(model)
    counters.clear()
    with train.resting(model):
        assert torch.equal(model(ids), expected)
    assert not counters["frames"]
