"""A run that goes on with another number of ranks learns what it would have learned on one (pitfall 9)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import checkpoint, record

ROOT = Path(__file__).resolve().parents[1]
LIVES = """
import json, shutil, signal, sys
from pathlib import Path
from nanochat import checkpoint, train
from scripts import bench_kill

stage, folder = sys.argv[1], Path(sys.argv[2])
MORE = ["--total-batch-size=768", "--device-batch-size=1", "--num-iterations=6", "--save-every=-1"]
RATES = ["--matrix-lr=0.005", "--embedding-lr=0.05"]
FLAGS = {"base": [*MORE, *RATES, "--scalar-lr=0.05"], "sft": [*MORE, *RATES],
         "rl": ["--num-iterations=6", "--examples-per-step=12", "--num-samples=3", "--save-every=-1"]}
bench_kill.warm_up()
if '"full"' in sys.argv[3]:
    import torch._dynamo, torch.distributed.fsdp  # before the ranks are forked: FSDP2 imports the first of them late
real, limit = train.StopSignal.agreed, 0

def agreed(self, rt):  # as if rank 0 had been sent SIGTERM before this update of this life
    self.steps = getattr(self, "steps", -1) + 1
    if self.steps == limit and rt.main:
        self.received = signal.SIGTERM
    return real(self, rt)

train.StopSignal.agreed = agreed

def life(base, stage, world, until, kind="optimizer", *more):
    global limit
    limit = until
    module, flags = bench_kill.STAGES[stage]
    port = bench_kill.free_port()
    arguments = [*[f for f in flags if f.split("=")[0] not in {g.split("=")[0] for g in FLAGS[stage]}], *FLAGS[stage]]
    arguments += ["--resume", f"--shard={kind}", *more]
    ranks = [bench_kill.start(base, module, arguments, r, world, port) for r in range(world)]
    statuses = bench_kill.wait_for(ranks)
    assert statuses == [0 if until is None else 128 + signal.SIGTERM] * world, (statuses, base)

def tokenizer(base):
    tok = ["--dataset=tinyworld", "--vocab-size=512", "--max-chars=100000"]
    assert bench_kill.wait_for([bench_kill.start(base, "scripts.tok_train", tok, 0, 1, 0)]) == [0]

(folder / "one").mkdir()
tokenizer(folder / "one")
for earlier in list(bench_kill.STAGES):
    life(folder / "one", earlier, 1, None)
    if earlier == stage:
        break
for name, world, kind, until, *more in json.loads(sys.argv[3]):
    base, own = folder / name, checkpoint.FOLDERS[stage]
    if not base.exists():
        base.mkdir()
        before = list(bench_kill.STAGES)[: list(bench_kill.STAGES).index(stage)]
        for shared in ("tokenizer", *(checkpoint.FOLDERS[one] for one in before)):
            (base / shared).symlink_to(folder / "one" / shared)
        if name == "cut":  # it goes on from what the whole one saved half way
            shutil.copytree(folder / "whole" / own, base / own, ignore=shutil.ignore_patterns("step_000006"))
    life(base, stage, world, until, kind, *more)
"""


def run(folder, stage, lives):
    """A run on one rank, and the lives of others: (name, ranks, --shard, stopped before this update, more flags)."""
    command = [sys.executable, "-c", LIVES, stage, str(folder), json.dumps(lives)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    logs = "".join(p.read_text()[-1500:] for p in folder.glob("*/rank_*.log"))
    assert done.returncode == 0, done.stderr + logs


def curve(folder, name, stage):
    """What each update of a run said: loss, or reward, and gradient norm."""
    rows = record.read(folder / name / checkpoint.FOLDERS[stage] / "k" / "record.jsonl")
    value = "reward" if stage == "rl" else "loss"
    return [(row[value], row["grad_norm"]) for row in rows if row["kind"] == "step"]


def alike(one, other, norms=1e-3):
    assert len(one) == len(other) == 6 and len(set(one)) > 1
    assert [pair[0] for pair in other] == pytest.approx([pair[0] for pair in one], rel=1e-4)
    assert [pair[1] for pair in other] == pytest.approx([pair[1] for pair in one], rel=norms)


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(checkpoint.FOLDERS))
def test_a_run_goes_on_with_4_then_3_then_1_ranks_pitfall_9(tmp_path, stage):
    """Six updates, stopped after each two; optimizer state, data and samples are those of one rank never stopped."""
    run(tmp_path, stage, [("chain", world, "optimizer", until) for world, until in ((4, 2), (3, 2), (1, None))])
    alike(curve(tmp_path, "one", stage), curve(tmp_path, "chain", stage))


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(checkpoint.FOLDERS))
def test_a_sharded_run_goes_on_bit_for_bit_and_on_other_worlds_pitfalls_8_9(tmp_path, stage):
    """--shard=full, saved and resumed: 2 ranks the very bits; 3, then unsharded on 1: the same curve."""
    lives = [("whole", 2, "full", None, "--save-every=3"), ("cut", 2, "full", None)]
    chain = [("chain", 3, "full", 3), ("chain", 1, "optimizer", None)]
    run(tmp_path, stage, [*lives, *(chain if stage == "base" else [])])
    straight, again = (tmp_path / name / checkpoint.FOLDERS[stage] / "k" / "step_000006" for name in ("whole", "cut"))
    for part in ("model.safetensors", "optim.safetensors"):
        assert (straight / part).read_bytes() == (again / part).read_bytes()
    rows = record.read(tmp_path / "cut" / checkpoint.FOLDERS[stage] / "k" / "record.jsonl")
    assert [row["resume_step"] for row in rows if row["kind"] == "start"][-1] == 3
    one = curve(tmp_path, "one", stage)
    for name in ("whole", "cut", "chain") if stage == "base" else ("whole", "cut"):
        alike(one, curve(tmp_path, name, stage), norms=1e-2)  # gradients of low rank: the polar step amplifies rounding
