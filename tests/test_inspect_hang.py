"""The hang inspector names the rank that keeps the others waiting, and does not cry wolf."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat import checkpoint, record
from scripts import inspect_hang

WAITS = """Thread 1 (active): "MainThread"
    wait (torch/distributed/distributed_c10d.py:3252)
    sum (nanochat/runtime.py:56)
Thread 2 (idle): "nanochat-heartbeat"
    wait (threading.py:10)"""
READS = """Thread 7 (idle): "MainThread"
    get (queue.py:171)
    __next__ (nanochat/prefetch.py:90)"""
COMPUTES = """Thread 7 (active): "MainThread"
    linear (torch/nn/functional.py:1)"""


def rank(number, stack, state="sleeping"):
    return {"rank": number, "state": state, "place": inspect_hang.place(stack)}


def test_a_stack_says_where_its_rank_stands():
    places = [inspect_hang.place(stack) for stack in (WAITS, READS, COMPUTES, "")]
    assert places == ["in a collective", "waiting for data", "at linear (torch/nn/functional.py:1)", "unknown"]


@pytest.mark.parametrize(
    ("beat", "ranks", "said"),
    [
        ({"ended": True, "last_kind": "summary"}, [], "is over"),
        (None, [], "No process"),
        ({"ended": False, "late": False}, [rank(0, COMPUTES)], "not stuck"),
        ({"ended": False, "late": True}, [rank(0, WAITS), rank(1, READS)], "Rank 1 keeps rank 0 waiting: it"),
        ({"ended": False, "late": True}, [rank(0, WAITS), rank(1, WAITS, "stopped by a signal")], "Rank 1 is stopped"),
        ({"ended": False, "late": True}, [rank(0, WAITS), rank(1, WAITS)], "another machine"),
    ],
)  # fmt: skip
def test_the_verdict_names_the_culprit(beat, ranks, said):
    assert said in inspect_hang.verdict(beat, ranks)


def test_a_late_step_is_told_from_a_slow_one(base_dir, monkeypatch):
    path = checkpoint.folder("base") / "run" / "record.jsonl"
    with record.Record(path, stage="base", config={}) as log:
        for step in range(3):
            log.step(step, None, loss=1.0, seconds=20.0)
    assert inspect_hang.newest_record(inspect_hang.Config()) == path
    assert not inspect_hang.pulse(path, time.time() + 150)["late"]
    late = inspect_hang.pulse(path, time.time() + 250)
    assert late["late"] and late["last_step"] == 2 and 249 < late["since_last_step"] < 400


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_stopped_rank_is_found_among_living_ones(base_dir):
    command = [sys.executable, "-c", "import time; time.sleep(60)", "scripts.chat_rl"]
    ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(r)}) for r in (0, 1)]
    try:
        os.kill(ranks[1].pid, signal.SIGSTOP)
        while "T (stopped)" not in Path(f"/proc/{ranks[1].pid}/status").read_text():
            time.sleep(0.01)
        found = inspect_hang.main(inspect_hang.Config(source="rl"))
        assert [one["pid"] for one in found["ranks"]] == [process.pid for process in ranks]
        assert found["verdict"].startswith("Rank 1 is stopped by a signal")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
