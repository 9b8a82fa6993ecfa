"""The feeder: a thread makes the batches, its errors arrive, it ends when asked, no slot is written too early."""

import logging
import threading
import time

import pytest
import torch

from nanochat import prefetch
from nanochat.errors import UserError
from nanochat.prefetch import Feeder


class Counter:
    """Fills batch k with k; ends after `batches`; may fail or take its time."""

    def __init__(self, batches=10**9, fail_at=None, seconds=0.0):
        self.made, self.batches, self.fail_at, self.seconds = 0, batches, fail_at, seconds
        self.threads = set()

    def __call__(self, inputs, targets):
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if self.made == self.fail_at:
            raise UserError("the shard is damaged")
        if self.made == self.batches:
            return None
        inputs[:], targets[:] = self.made, -self.made
        self.made += 1
        return dict(made=self.made).copy


def feeders():
    return [t for t in threading.enumerate() if t.name.startswith("nanochat-data")]


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_batches_come_in_order_with_their_state_and_end(ahead):
    with Feeder(Counter(batches=6), 2, 3, "cpu", ahead) as feeder:
        batches = list(feeder)
    assert [b.state["made"] for b in batches] == [1, 2, 3, 4, 5, 6]
    for k, batch in enumerate(batches):  # none was overwritten by a later one
        assert (batch.inputs == k).all() and (batch.targets == -k).all() and batch.inputs.shape == (2, 3)
        assert batch.inputs.dtype == torch.int64
    assert next(feeder, "end") == "end" and not feeders()


def test_batches_are_made_by_a_thread_ahead_of_the_consumer_pitfall_20():
    fill = Counter()
    with Feeder(fill, 1, 1, "cpu", 2) as feeder:
        next(feeder)
        deadline = time.monotonic() + 60
        while fill.made < 3 and time.monotonic() < deadline:  # one taken, two ahead
            time.sleep(0.005)
        time.sleep(0.02)
        assert fill.made == 3
    assert threading.current_thread().name not in fill.threads and len(fill.threads) == 1


def test_an_error_of_the_thread_is_raised_at_its_batch_and_ends_the_feeder():
    feeder = Feeder(Counter(fail_at=3), 1, 1, "cpu", 2)
    assert [next(feeder).state["made"] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="the shard is damaged"):
        next(feeder)
    assert next(feeder, "end") == "end" and not feeders()


def test_closing_ends_the_thread_at_once_and_twice_is_fine():
    fill = Counter(seconds=0.5)
    feeder = Feeder(fill, 1, 1, "cpu", 4)
    start = time.monotonic()
    feeder.close()
    feeder.close()
    assert time.monotonic() - start < 30 and fill.made <= 1 and not feeders()


def test_a_feeder_left_unclosed_does_not_keep_its_thread():
    import gc

    feeder = Feeder(Counter(), 1, 1, "cpu", 2)
    next(feeder)
    del feeder
    gc.collect()
    deadline = time.monotonic() + 60
    while feeders() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not feeders()


def test_a_long_wait_is_told_pitfall_4(monkeypatch, caplog):
    monkeypatch.setattr(prefetch, "PATIENCE", 0.02)
    with caplog.at_level(logging.WARNING), Feeder(Counter(seconds=0.1), 1, 1, "cpu", 1) as feeder:
        next(feeder)
    assert "still waiting for a batch" in caplog.text and "slow or hung" in caplog.text


class FakeSlot:
    """Pinned memory and an event that a machine without CUDA can have; `delay` is how long the copy takes to happen."""

    made = []

    def __init__(self, shape):
        self.pair = torch.empty(shape, dtype=torch.int64)
        self.copies, self.done = [], threading.Event()
        self.done.set()
        FakeSlot.made.append(self)

    def free(self):
        assert self.done.wait(5)
        return self.pair

    def copy_to(self, device):
        """Queue a copy that happens later, as on a busy device: it must still find the batch."""
        there = torch.empty_like(self.pair)
        self.done.clear()

        def late():
            there.copy_(self.pair)
            self.done.set()

        threading.Timer(0.02, late).start()
        self.copies.append(there)
        return there


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda"), torch.device("cuda", 0)])
def test_a_cuda_device_gets_pinned_slots_however_it_is_named_pitfall_19(monkeypatch, device):
    FakeSlot.made = []
    monkeypatch.setattr(prefetch, "_Slot", FakeSlot)
    with Feeder(Counter(batches=9), 2, 3, device, 2) as feeder:
        batches = list(feeder)
        for slot in FakeSlot.made:
            slot.free()
    assert len(FakeSlot.made) == 2 and [len(slot.copies) for slot in FakeSlot.made] == [5, 4]
    for k, batch in enumerate(batches):  # no slot was written again before its copy was done
        assert (batch.inputs == k).all() and (batch.targets == -k).all()


def test_other_devices_need_no_slots():
    assert Feeder(Counter(), 1, 1, torch.device("cpu"), 0)._slots == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_batches_arrive_whole_while_the_device_is_busy():
    busy = torch.randn(4096, 4096, device="cuda")
    seen = []
    with Feeder(Counter(batches=40), 32, 2048, torch.device("cuda", 0), 2) as feeder:
        assert feeder._slots[0].pair.is_pinned()
        for batch in feeder:
            busy = busy @ busy.clamp(-1, 1) / 4096
            seen.append((batch.inputs, batch.targets))
    for k, (inputs, targets) in enumerate(seen):
        assert inputs.is_cuda and (inputs == k).all() and (targets == -k).all()
