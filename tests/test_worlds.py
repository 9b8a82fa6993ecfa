"""A run that goes on with another number of ranks learns what it would have learned on one (pitfall 9)."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import record

ROOT = Path(__file__).resolve().parents[1]
CHAIN = """
import signal, sys
from pathlib import Path
from nanochat import train
from scripts import bench_kill

stage, folder = sys.argv[1], Path(sys.argv[2])
MORE = ["--total-batch-size=768", "--device-batch-size=1", "--num-iterations=6", "--save-every=-1"]
RATES = ["--matrix-lr=0.005", "--embedding-lr=0.05"]
FLAGS = {"base": [*MORE, *RATES, "--scalar-lr=0.05"], "sft": [*MORE, *RATES],
         "rl": ["--num-iterations=6", "--examples-per-step=12", "--num-samples=3", "--save-every=-1"]}
bench_kill.warm_up()
real, limit = train.StopSignal.agreed, 0

def agreed(self, rt):  # as if rank 0 had been sent SIGTERM during the second step of this life
    self.steps = getattr(self, "steps", -1) + 1
    if self.steps == limit and rt.main:
        self.received = signal.SIGTERM
    return real(self, rt)

train.StopSignal.agreed = agreed

def life(base, stage, world, until):
    global limit
    limit = until
    module, flags = bench_kill.STAGES[stage]
    port = bench_kill.free_port()
    arguments = [*[f for f in flags if f.split("=")[0] not in {g.split("=")[0] for g in FLAGS[stage]}], *FLAGS[stage]]
    ranks = [bench_kill.start(base, module, [*arguments, "--resume"], r, world, port) for r in range(world)]
    statuses = bench_kill.wait_for(ranks)
    assert statuses == [0 if until is None else 128 + signal.SIGTERM] * world, (statuses, base)

one, chain = folder / "one", folder / "chain"
one.mkdir(), chain.mkdir()
tok = ["--dataset=tinyworld", "--vocab-size=512", "--max-chars=100000"]
assert bench_kill.wait_for([bench_kill.start(one, "scripts.tok_train", tok, 0, 1, 0)]) == [0]
for earlier in list(bench_kill.STAGES):
    life(one, earlier, 1, None)
    if earlier == stage:
        break
    (chain / f"{bench_kill.checkpoint.FOLDERS[earlier]}").symlink_to(one / bench_kill.checkpoint.FOLDERS[earlier])
(chain / "tokenizer").symlink_to(one / "tokenizer")
for world, until in ((4, 2), (3, 2), (1, None)):
    life(chain, stage, world, until)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "value"), [("base", "loss"), ("sft", "loss"), ("rl", "reward")])
def test_a_run_goes_on_with_4_then_3_then_1_ranks_pitfall_9(tmp_path, stage, value):
    """Six updates, stopped after each two; optimizer state, data and samples are those of one rank never stopped."""
    done = subprocess.run(
        [sys.executable, "-c", CHAIN, stage, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    logs = "".join(p.read_text()[-1500:] for p in tmp_path.glob("*/rank_*.log"))
    assert done.returncode == 0, done.stderr + logs
    folder = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}[stage]
    curves = []
    for run in ("one", "chain"):
        rows = [row for row in record.read(tmp_path / run / folder / "k" / "record.jsonl") if row["kind"] == "step"]
        curves.append([(row[value], row["grad_norm"]) for row in rows])
    assert len(curves[0]) == 6 and len(set(curves[0])) > 1
    assert [pair[0] for pair in curves[1]] == pytest.approx([pair[0] for pair in curves[0]], rel=1e-4)
    assert [pair[1] for pair in curves[1]] == pytest.approx([pair[1] for pair in curves[0]], rel=1e-3)
