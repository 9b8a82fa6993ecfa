"""Banks: nothing is lost when parameters move into one tensor, every part has one owner, gradients leave on time."""

import pytest
import torch
from tiny_model import tiny_gpt

from nanochat import banks
from nanochat.optim import ADAM_RULES, MuonAdamW, _adam_banks, _muon_banks
from nanochat.runtime import Runtime

RATES = dict.fromkeys(("matrix", *ADAM_RULES), 0.02)


def rank_of(world, rank=0):
    return Runtime(rank, rank, world, torch.device("cpu"), torch.float32, "")


def all_banks(runtime, **shape):
    roles = tiny_gpt(**shape).roles()
    return [*_muon_banks(roles["matrix"], RATES, runtime), *_adam_banks(roles, RATES, runtime)]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_work_is_dealt_evenly_pitfall_12(world):
    """Any world size: nobody has more than one matrix of a kind beyond another, nor more work than one matrix's."""
    counts, costs = [24, 6, 6, 3], [30.0, 90.0, 90.0, 0.1]
    shares = banks.deal(counts, costs, world)
    assert [sum(kind) for kind in shares] == counts
    assert all(max(kind) - min(kind) <= 1 for kind in shares)
    load = [sum(c * kind[rank] for c, kind in zip(costs, shares)) for rank in range(world)]
    assert max(load) - min(load) <= max(costs)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 64])
def test_every_element_has_one_owner_pitfall_12(world):
    """Also with more ranks than matrices. Each rank's view of its own part agrees with what the others think."""
    by_rank = [all_banks(rank_of(world, rank)) for rank in range(world)]
    for bank, *others in zip(*by_rank):
        covered = [torch.zeros(p.numel()) for p in bank.params]
        for _, i, a, b in bank.parts():
            covered[i][a:b] += 1
        assert all((c == 1).all() for c in covered)
        assert all(other.cuts == bank.cuts for other in others)
    moments = [sum(t.nbytes for b in own for stack in b.moments.values() for t in stack) for own in by_rank]
    alone = sum(t.nbytes for b in all_banks(rank_of(1)) for stack in b.moments.values() for t in stack)
    assert sum(moments) == alone


def test_parameters_are_views_that_keep_their_values_and_gradients_come_to_lie_beside_each_other_pitfall_15():
    """No stack is ever made: a step reads and writes the memory in which the parameters already are."""
    model, twin = tiny_gpt(), tiny_gpt()
    optimizer = MuonAdamW(model.roles(), RATES, rank_of(1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))
    ids = torch.arange(20)[None]
    for net in (model, twin):
        for last in (False, True):
            loss = net(ids[:, :-1], ids[:, 1:])
            optimizer.backward(loss, last) if net is model else loss.backward()
    for bank in optimizer.banks[:-1]:
        for view, p, q in zip(bank.views(bank.values), bank.params, bank.grad_views, strict=True):
            assert view.data_ptr() == p.data_ptr() and q.data_ptr() == p.grad.data_ptr()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters()))
    with pytest.raises(ValueError, match="zero_grad"):
        optimizer.backward(model(ids[:, :-1], ids[:, 1:]))


def test_matrices_that_move_a_few_at_a_time_move_as_all_at_once(monkeypatch):
    """Five matrices by twos: the same values and moments, and no temporary larger than two matrices."""
    made = []
    for piece in (2 * 24 * 16 + 1, 2**21):
        monkeypatch.setattr(banks, "PIECE", piece)
        dice = torch.Generator().manual_seed(0)
        named = [(f"p{i}", torch.nn.Parameter(torch.randn(24, 16, generator=dice))) for i in range(5)]
        bank = banks.MuonBank(named, 0.02, [5], rank_of(1), None)
        sizes = [len(range(5)[part]) for part in bank.pieces()]
        assert sizes == ([2, 2, 1] if piece < 1000 else [5])
        for step in range(2):
            bank.grads.normal_(generator=dice)
            bank.update(1.0, 0.9, 0.1, step + 1)
        made.append([bank.values, *bank.moments.values()])
    for few, all_ in zip(*made):
        assert few.abs().max() > 0
        torch.testing.assert_close(few, all_, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(banks, "PIECE", 5)  # less than one: one at a time
    assert len(bank.pieces()) == 5


class Wire:
    """Stands for torch.distributed: notes when each bucket leaves."""

    def __init__(self, log):
        self.log = log

    def reduce(self, tensor, owner, async_op):
        self.log.append(("sent", owner, tensor.numel()))
        return self

    def wait(self):
        self.log.append(("waited",))


def test_gradients_leave_during_the_backward_pass_pitfall_15(monkeypatch):
    """From the second update on most buckets are on their way before the last gradient is there; order is fixed."""
    log = []
    monkeypatch.setattr(banks, "dist", Wire(log))
    monkeypatch.setattr(banks, "BUCKET", 2048)
    monkeypatch.setattr(Runtime, "broadcast", lambda self, value: value)
    model, runtime = tiny_gpt(), rank_of(2)
    reducer = banks.Reducer(
        [*_muon_banks(model.roles()["matrix"], RATES, runtime), *_adam_banks(model.roles(), RATES, runtime)], runtime
    )
    table = model.transformer.wte.weight  # its gradient is the last one to come
    ids, sent = torch.arange(20)[None], []
    for _ in range(3):
        log.clear()
        handle = table.register_post_accumulate_grad_hook(lambda _: log.append(("end of backward",)))
        reducer.backward(model(ids[:, :-1], ids[:, 1:]), last=False)
        assert log == [("end of backward",)]  # an early micro-batch sends nothing
        reducer.backward(model(ids[:, :-1], ids[:, 1:]), last=True)
        handle.remove()
        sent.append([entry for entry in log if entry[0] == "sent"])
        before = [entry for entry in log[: len(log) - 1 - log[::-1].index(("end of backward",))] if entry[0] == "sent"]
        reducer.begin()
        model.zero_grad()
    assert len(sent[0]) == len(sent[1]) == len(reducer.buckets) and sent[1] == sent[2]
    assert sorted(sent[0]) == sorted(sent[1])
    assert len(before) > 0.6 * len(reducer.buckets)


def test_a_rank_without_a_gradient_sends_zeros_in_the_same_order(monkeypatch):
    log = []
    monkeypatch.setattr(banks, "dist", Wire(log))
    model, runtime = tiny_gpt(), rank_of(2)
    reducer = banks.Reducer(_muon_banks(model.roles()["matrix"], RATES, runtime), runtime)
    monkeypatch.setattr(Runtime, "broadcast", lambda self, value: value)
    reducer.banks[0].grads.fill_(7.0)  # what an earlier update left there
    reducer.flush()
    assert len(log) == len(reducer.buckets) and not reducer.ordered
    assert all(not p.grad.any() for p in reducer.banks[0].params)
