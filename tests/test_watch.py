"""A step that hangs leaves every rank's stack; heartbeats say that a run is alive; a quiet run leaves nothing."""

import errno
import os
import time

import pytest

from nanochat import record, watch
from nanochat.runtime import Runtime

RT = Runtime.single()


@pytest.fixture
def log(tmp_path):
    return record.Record(tmp_path / "record.jsonl", stage="base", config={})


def stuck_here(seconds):
    time.sleep(seconds)


def test_a_slow_step_leaves_its_stack_and_a_row(log, monkeypatch, capsys):
    monkeypatch.setattr(watch, "FLOOR", 0.2)
    with watch.Watch(log, RT, times=3) as watched:
        for step, seconds in enumerate((0.0, 0.0, 0.5, 0.0)):
            watched.begin(step)
            stuck_here(seconds)
            watched.end()
    stacks = (log.path.parent / "stacks" / "rank_0.txt").read_text()
    assert "in stuck_here" in stacks and "during step 2: it took 0.5" in stacks and stacks.count("^ during") == 1
    (row,) = [row for row in record.read(log.path) if row["kind"] == "slow_step"]
    assert row["step"] == 2 and row["seconds"] >= 0.5 and row["limit"] == 0.2
    assert "step 2 took" in capsys.readouterr().out


def test_a_full_disk_costs_the_watch_not_the_run(log, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(log.path), "mkdir", full)
    with watch.Watch(log, RT, times=3) as watched:
        for step in range(2):
            watched.begin(step)
            watched.end()
    assert "(No space left on device): no step is watched" in capsys.readouterr().out


def test_the_limit_is_of_the_median_step(log, monkeypatch):
    monkeypatch.setattr(watch, "FLOOR", 0.0)
    with watch.Watch(log, RT, times=5) as watched:
        watched.steps.extend([0.1, 0.1, 0.1, 9.0])
        watched.begin(4)
        assert watched.limit == pytest.approx(0.5)
        watched.end()


@pytest.mark.parametrize("times", [None, 10.0])
def test_a_quiet_run_leaves_nothing_and_what_is_not_a_step_is_not_timed(log, monkeypatch, times):
    monkeypatch.setattr(watch, "FLOOR", 0.1)
    with watch.Watch(log, RT, times) as watched:
        for step in range(3):
            watched.begin(step)
            watched.end()
            stuck_here(0.15)  # an evaluation
    assert not (log.path.parent / "stacks").exists() and len(record.read(log.path)) == 1


def test_heartbeats_go_on_while_a_step_hangs(log, monkeypatch):
    monkeypatch.setattr(watch, "HEARTBEAT", 0.05)
    with watch.Watch(log, RT) as watched:
        watched.begin(7)
        stuck_here(0.4)
    beats = [row for row in record.read(log.path) if row["kind"] == "heartbeat"]
    assert len(beats) >= 3 and beats[-1]["step"] == 7 and beats[-1]["seconds"] > beats[0]["seconds"] > 0


HANG = """
import sys, time
from pathlib import Path
from nanochat import record, runtime, watch
watch.FLOOR = 0.5
rt = runtime.start("cpu")
log = record.Record(Path(sys.argv[1]) / "record.jsonl", stage="base", config={}, main=rt.main)
stacks = [log.path.parent / "stacks" / f"rank_{rank}.txt" for rank in range(2)]
def only_one_hangs():  # until both have written their stacks
    while not all(path.is_file() and path.stat().st_size for path in stacks):
        time.sleep(0.1)
with watch.Watch(log, rt, times=2) as watched:
    for step in range(3):
        watched.begin(step)
        if step == 2 and rt.rank == 1:
            only_one_hangs()
        rt.barrier()
        watched.end()
runtime.stop(rt)
"""


@pytest.mark.slow
def test_when_one_rank_hangs_all_ranks_show_their_stacks(on_ranks, tmp_path):
    on_ranks(2, HANG, [tmp_path])
    waiting, hanging = ((tmp_path / "stacks" / f"rank_{rank}.txt").read_text() for rank in (0, 1))
    assert "in only_one_hangs" in hanging and "in barrier" in waiting and "only_one_hangs" not in waiting
