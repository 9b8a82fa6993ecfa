"""Machines that don't share a disk: checkpoints reach all of them, differences are refused before anything is lost."""

import json

import pytest

from nanochat import nodes, resume
from nanochat.errors import UserError
from nanochat.runtime import Runtime

PROGRAM = """
import dataclasses, json, os, sys
from pathlib import Path
sys.path.insert(0, "tests")
out = Path(sys.argv[1])
os.environ["NANOCHAT_BASE_DIR"] = str(out / os.environ["RANK"])  # a disk of its own: two machines of one rank each
import torch
from nanochat import checkpoint, nodes, resume, runtime
from nanochat.errors import UserError
from tiny_model import save_checkpoint
torch.set_num_threads(1)
rt = dataclasses.replace(runtime.start("cpu", 0), local_rank=0)
root = checkpoint.folder("sft") / "d3"
if rt.rank == 0:
    save_checkpoint(step=5)
else:
    save_checkpoint(step=9, seed=4)  # the newest step lies on the other machine: it was rank 0's in an earlier life
said = {"found": resume.point(root, True, None, rt)[0].path.name, "asked": resume.point(root, False, 5, rt)[0].step}
said["steps"] = checkpoint.complete_steps(root)
weights = checkpoint.load(root / "step_000009").weights()["lm_head.weight"]
said["sum"] = float(weights.double().sum())
said["base"] = nodes.find("sft", None, None, rt).name
for name, things in (("alike", {"tokenizer": 1}), ("other", {"tokenizer": rt.rank})):
    try:
        nodes.same(rt, **things)
        said[name] = ""
    except UserError as error:
        said[name] = str(error)
try:
    nodes.find("base", None, None, rt)
except UserError as error:
    said["none"] = str(error)
(out / f"{rt.rank}.json").write_text(json.dumps(said))
runtime.stop(rt)
"""


@pytest.mark.slow
def test_a_checkpoint_reaches_every_machine_whichever_has_it_pitfall_8(tmp_path, on_ranks):
    on_ranks(2, PROGRAM, [str(tmp_path)])
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["found"] == two["found"] == "step_000009" and one["asked"] == two["asked"] == 5
    assert one["steps"] == two["steps"] == [5, 9] and one["sum"] == two["sum"]
    assert one["base"] == two["base"] == "step_000009"
    assert one["alike"] == two["alike"] == ""
    assert one["other"] == two["other"] and "rank 1 has another tokenizer than rank 0" in one["other"]
    assert one["none"] == two["none"] and "No base checkpoint" in one["none"]


def test_one_machine_needs_no_sending(base_dir, tmp_path):
    nodes.same(Runtime.single(), tokenizer="x")
    assert nodes.fetch(tmp_path, Runtime.single()) == tmp_path
    assert nodes.newest(tmp_path, None, Runtime.single()) == 0
    with pytest.raises(UserError, match="No sft checkpoint"):
        nodes.find("sft", None, None, Runtime.single())
    assert resume.point(tmp_path, True, None, Runtime.single()) == (None, [])
