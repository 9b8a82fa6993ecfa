"""Saves beside the training: what is written is the moment of the call; bounded, told when it fails, pruned by rule."""

import errno
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import RATES, meta, tiny, write

from nanochat import checkpoint, optim, saving
from nanochat.errors import UserError
from nanochat.runtime import Runtime

RT = Runtime.single()


@pytest.fixture
def root(base_dir):
    return checkpoint.folder("base") / "d4"


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until the gate is opened; `gate.full` then makes it fail."""
    opened, real = threading.Event(), saving.write_files

    def slow(tmp, snap):
        assert opened.wait(120)
        if opened.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tmp, snap)

    opened.full = False
    monkeypatch.setattr(saving, "write_files", slow)
    return opened


def begin(saver, step, model, optimizer=None, **more):
    return saver.save(step, model=model, optimizer=optimizer, meta=meta(), **more)


def test_a_save_is_of_the_moment_it_was_asked_for_whatever_the_next_steps_do(root, gate):
    model = tiny(3)
    optimizer = optim.MuonAdamW(model.roles(), RATES, RT)
    with saving.Saver(root, RT) as saver:
        path = begin(saver, 1, model, optimizer)
        assert not path.exists() and saver.news() == []  # nothing has been waited for
        model(torch.arange(16)[None], torch.arange(16)[None]).backward()
        optimizer.step()
        gate.set()
    saved = checkpoint.load(path)
    assert all(torch.equal(saved.weights()[name], t) for name, t in tiny(3).state_dict().items())
    assert int(saved.optimizer()["step"]) == 0 and not any(
        t.any() for name, t in saved.optimizer().items() if name != "step"
    )


def test_one_save_at_a_time_and_no_more_memory_than_one(root, gate):
    model = tiny()
    with saving.Saver(root, RT) as saver:
        begin(saver, 1, model)
        first = {name: t.data_ptr() for name, t in saver._host.items()}
        waited, settle = [], saver._settle

        def settle_after_opening():  # the second save comes here first: only then may the first one be written
            waited.append((saver._job.done(), checkpoint.complete_steps(root)))
            gate.set()
            settle()

        saver._settle, before = settle_after_opening, saver.blocked
        begin(saver, 2, model)
        saver._settle = settle
        assert waited == [(False, [])]
        assert checkpoint.complete_steps(root)[0] == 1  # it has waited for the first, which held the memory
        assert {name: t.data_ptr() for name, t in saver._host.items()} == first
    assert checkpoint.complete_steps(root) == [1, 2] and saver.blocked > before


def test_a_failed_save_is_told_at_the_next_step_and_the_run_goes_on(root, gate):
    write_first = tiny(1)
    gate.set()
    with saving.Saver(root, RT) as saver:
        begin(saver, 1, write_first, wait=True)
        gate.full = True
        begin(saver, 2, write_first)
        saver._job.exception()  # done
        (told,) = [one for one in saver.news() if "error" in one]
        assert "the disk is full" in told["error"] and saver.news() == []
        gate.full = False
        begin(saver, 3, write_first, wait=True)
        assert [one["step"] for one in saver.news()] == [3]
    assert checkpoint.complete_steps(root) == [1, 3] and checkpoint.leftovers(root) == []


def test_after_three_failures_or_if_the_last_fails_the_run_stops_and_what_was_saved_stays(root, gate):
    gate.set()
    with saving.Saver(root, RT) as saver:
        begin(saver, 1, tiny(), wait=True)
        gate.full = True
        for step in (2, 3, 4):
            begin(saver, step, tiny())
        with pytest.raises(UserError, match="the disk is full"):
            begin(saver, 5, tiny())
    with saving.Saver(root, RT) as saver, pytest.raises(UserError, match="the disk is full"):
        begin(saver, 6, tiny(), wait=True)
    checkpoint.load(root / "step_000001").verify()
    assert checkpoint.complete_steps(root) == [1]


def test_an_error_that_ends_the_run_does_not_lose_the_save_under_way(root, gate):
    with pytest.raises(KeyError), saving.Saver(root, RT) as saver:
        begin(saver, 1, tiny())
        gate.set()
        raise KeyError
    assert checkpoint.complete_steps(root) == [1]


def test_the_file_is_the_librarys_file(tmp_path):
    """Read by safetensors, whatever the dtype and shape; of what we save, the bytes that it would write."""
    tensors = {f"t.{str(d)[6:]}": torch.ones(3, 5).to(d) for d in saving.DTYPES}
    tensors |= {"none": torch.zeros(0, 4), "step": torch.tensor(7), "turned": torch.arange(6.0).view(2, 3).T}
    entry = saving.write_tensors(tmp_path / "a", tensors, {"stage": "base"})
    back = load_file(tmp_path / "a")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], tensors[n]) and back[n].dtype == tensors[n].dtype for n in tensors)
    assert entry["bytes"] == (tmp_path / "a").stat().st_size
    ours = {name: t.contiguous() for name, t in tensors.items() if t.dtype in (torch.float32, torch.int64)}
    saving.write_tensors(tmp_path / "a", ours, {"stage": "base"})
    save_file(ours, tmp_path / "b", metadata={"nanochat": '{"stage": "base"}'})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- retention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "stays"),
    [
        (saving.Keep(None), [10, 20, 30, 40, 50]),
        (saving.Keep(1), [50]),
        (saving.Keep(0), [50]),
        (saving.Keep(2), [40, 50]),
        (saving.Keep(1, every=20), [20, 40, 50]),
        (saving.Keep(1, best=True), [30, 50]),
        (saving.Keep(2, every=25, best=True), [30, 40, 50]),
    ],
)
def test_which_steps_stay(keep, stays):
    scores = {10: 1.2, 30: 0.9, 40: 1.1, 60: 0.1}  # that of 60 was never saved, that of 20 and 50 never measured
    assert sorted(keep.stays([10, 20, 30, 40, 50], scores)) == stays


def test_the_newest_and_the_one_just_written_always_stay():
    for keep in (saving.Keep(1), saving.Keep(1, every=7, best=True)):
        for written in (10, 30, None):
            stays = keep.stays([10, 20, 30], {20: 0.0}, written)
            assert 30 in stays and (written is None or written in stays)


def test_the_best_is_still_known_after_a_resume(root):
    with saving.Saver(root, RT, saving.Keep(1, best=True)) as saver:
        begin(saver, 1, tiny(), wait=True)
        saver.score(1, 0.5)
        begin(saver, 2, tiny(), wait=True)
        saver.score(2, 0.9)
        begin(saver, 3, tiny(), wait=True)
    assert checkpoint.complete_steps(root) == [1, 3]
    scores = checkpoint.load(root / "step_000003").meta["scores"]
    with saving.Saver(root, RT, saving.Keep(1, best=True), scores) as saver:
        begin(saver, 4, tiny(), wait=True)
    assert checkpoint.complete_steps(root) == [1, 4]


def test_going_back_sets_the_later_steps_aside(root):
    for step in (1, 2, 3):
        write(root, step)
    assert saving.set_aside(root, beyond=2) == root / "before_1"
    assert checkpoint.complete_steps(root) == [1, 2] and checkpoint.complete_steps(root / "before_1") == [3]
