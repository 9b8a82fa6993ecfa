"""The kill bench, in small: five kills of a run on two ranks lose nothing, and a loss would be seen."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import checkpoint
from scripts import bench_kill

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_five_kills_lose_nothing_pitfalls_6_7_8(tmp_path):
    """In a process of its own: the ranks are forked from it, and a test runner has threads."""
    command = [sys.executable, "-m", "scripts.bench_kill", "--kills=5", "--stages=base", f"--output={tmp_path / 'o'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "o").read_text().splitlines()]
    kills = [row for row in rows if "kill" in row]
    assert len(kills) == 5 and any(row["in_save"] for row in kills)
    assert any(row.get("end") for row in rows) and rows[-1]["summary"]["faults"] == 0


@pytest.fixture
def lab(tmp_path):
    return bench_kill.Lab(tmp_path, random.Random(0), 1.0)


def end(root, step, weights, moments="same"):
    """A finished run, as far as the bench reads it."""
    files = {"model.safetensors": {"sha256": weights}, "optim.safetensors": {"sha256": moments}}
    path = root / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize(
    ("step", "weights", "moments", "said"),
    [(24, "w", "same", ""), (24, "x", "same", "model"), (24, "w", "other", "optim"), (21, "w", "same", "step_000021")],
)
def test_a_difference_would_be_seen(lab, step, weights, moments, said):
    (lab.folder / "reference" / "tokenizer").mkdir(parents=True)
    end(bench_kill.root(lab, "base", False), 24, "w")
    end(bench_kill.root(lab, "base", True), step, weights, moments)
    found = bench_kill.differs(lab, "base")
    assert (said in found) and bool(found) == bool(said)


def test_an_unreadable_newest_checkpoint_and_a_hang_would_be_seen(lab):
    root = bench_kill.root(lab, "base", True)
    end(root, 3, "w")
    assert checkpoint.complete_steps(root) == [3]
    step, fault = bench_kill.inspect(lab, "base")
    assert step == 3 and fault.startswith("unreadable")
    deaf = subprocess.Popen(["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"])
    bench_kill.ASK_AFTER, before = 0.1, bench_kill.ASK_AFTER
    try:
        assert bench_kill.finish_off(lab, [deaf.pid]) == [None]  # and it is killed
    finally:
        bench_kill.ASK_AFTER = before
        deaf.wait()
