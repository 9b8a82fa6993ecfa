"""The recipes as shell: stages run in order, a killed run goes on with the stage it was in, sizes come from outside."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from nanochat.errors import UserError
from scripts import bench_recipe_kill

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["tok_train", "base_train", "base_eval", "chat_sft", "chat_eval", "chat_rl", "chat_eval", "report"]
PYTHON = '() { echo "$*" >>"$CALLS"; if [ "$(wc -l <"$CALLS")" = "$KILL_AT" ]; then kill -$HOW $$; sleep 1; fi; }'


def speedrun(folder: Path, kill_at: int = 0, how: str = "KILL", **sizes: str) -> tuple[int, list[str]]:
    """(exit status, commands it gave to python so far) of runs/speedrun.sh with a python that only takes notes."""
    calls = folder / "calls"
    own = {
        "BASH_FUNC_python%%": PYTHON, "CALLS": str(calls), "KILL_AT": str(kill_at), "HOW": how, "SKIP_SETUP": "1",
        "POCKET": "1", "OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(folder / "base"),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(ROOT / "runs" / "speedrun.sh")], env=os.environ | own | sizes, capture_output=True, timeout=60
    )
    return done.returncode, calls.read_text().splitlines()


def stages(calls: list[str]) -> list[str]:
    return [call.split()[1].removeprefix("scripts.") for call in calls]


def test_the_pocket_run_chains_every_stage_and_runs_none_twice(tmp_path):
    assert speedrun(tmp_path)[0] == 0
    status, calls = speedrun(tmp_path)
    assert status == 0 and stages(calls) == [*STAGES, "report"]  # the second time only the report is made anew


@pytest.mark.parametrize("how", ["KILL", "TERM"])
@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_killed_recipe_goes_on_with_the_stage_it_was_in(tmp_path, how, at):
    status, calls = speedrun(tmp_path, kill_at=at, how=how)
    assert status == -getattr(signal, f"SIG{how}") and stages(calls) == STAGES[:at]
    status, calls = speedrun(tmp_path)
    assert status == 0 and stages(calls) == STAGES[:at] + STAGES[at - 1 :]


def test_a_stage_whose_command_changed_runs_again(tmp_path):
    speedrun(tmp_path)
    _, calls = speedrun(tmp_path, SFT_STEPS="7")
    assert stages(calls)[len(STAGES) :] == ["chat_sft", "report"] and "--num-iterations=7" in calls[len(STAGES)]


def test_every_training_stage_can_go_on(tmp_path):
    _, calls = speedrun(tmp_path)
    trained = [call for call in calls if "_train " in call or "chat_sft" in call or "chat_rl" in call][1:]
    assert len(trained) == 3 and all("--resume" in call and "--save-every" in call for call in trained)


def node_of_gpus(folder: Path) -> dict[str, str]:
    """What makes the recipe see eight GPUs."""
    card = folder / "bin" / "nvidia-smi"
    card.parent.mkdir()
    card.write_text("#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i; done\n")
    card.chmod(0o755)
    return {"PATH": f"{card.parent}:{os.environ['PATH']}", "BASH_FUNC_torchrun%%": PYTHON, "POCKET": ""}


def machine_without(folder: Path) -> dict[str, str]:
    """What makes it see none, wherever the tests run."""
    cards = node_of_gpus(folder)
    (folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho no devices were found >&2\nexit 9\n")
    return cards


def test_without_a_gpu_real_text_is_a_matter_of_asking(tmp_path):
    machine = machine_without(tmp_path)
    status, calls = speedrun(tmp_path, **machine, DATASET="/my/shards")
    assert status == 0 and "tok_train --dataset=/my/shards" in calls[0] and "chat_sft" in calls[-2]
    (tmp_path / "calls").unlink()
    assert stages(speedrun(tmp_path, **machine)[1]) == STAGES


def test_a_node_of_gpus_chains_the_same_stages_over_all_of_them(tmp_path):
    status, calls = speedrun(tmp_path, **node_of_gpus(tmp_path))
    assert status == 0
    told = [call for call in calls if "nanochat.dataset" not in call]  # the shards arrive beside the tokenizer
    assert len(calls) - len(told) == 2
    launched = [
        call.split(" -m ")[1].split()[0] for call in told if call.startswith("--standalone --nproc_per_node=8 ")
    ]
    assert launched == [f"scripts.{name}" for name in STAGES[1:7]]
    assert "--depth=24" in next(call for call in told if "base_train" in call)
    assert stages(told[:2]) == ["tok_train", "tok_eval"] and stages(told[-1:]) == ["report"]


@pytest.mark.parametrize(("gpus", "extra"), [(False, "cpu"), (True, "gpu")])
def test_set_up_asks_uv_for_the_extra_that_the_machine_wants(tmp_path, gpus, extra):
    """And for wheels where pip looks for them."""
    path = (node_of_gpus if gpus else machine_without)(tmp_path)["PATH"]
    if gpus:  # more than a pipe holds, should somebody leave after the first line
        (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nseq -f 'GPU %g' 100000\n")
    uv = tmp_path / "bin" / "uv"
    uv.write_text('#!/bin/sh\necho "$* from $UV_FIND_LINKS"\n')
    uv.chmod(0o755)
    env = {"PATH": path, "HOME": str(tmp_path), "PIP_FIND_LINKS": "/one /two"}
    command = ["bash", "-c", "source runs/setup.sh"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[0] == f"sync --quiet --extra {extra} from /one,/two"
    assert (tmp_path / ".cache" / "nanochat").is_dir()


FETCHES = """() { echo "$*" >>"$CALLS"; case "$*" in
*"-n 170"*) trap 'touch "$CALLS.stopped"; exit' TERM; touch "$CALLS.fetching"
    for i in $(seq 200); do sleep 0.05; done;;
*tok_train*) until [ -e "$CALLS.fetching" ]; do sleep 0.05; done; kill -TERM $$; sleep 1;;
esac; }"""


def test_a_recipe_that_is_stopped_stops_its_download(tmp_path):
    """It runs in the background, where Ctrl-C is not heard; started again, the recipe would find it under way."""
    status, calls = speedrun(tmp_path, **node_of_gpus(tmp_path), **{"BASH_FUNC_python%%": FETCHES})
    assert status == -signal.SIGTERM and sorted(stages(calls))[2:] == ["tok_train"]  # besides twice the data
    assert (tmp_path / "calls.stopped").exists()


# -- scripts.bench_recipe_kill, on a recipe whose python only writes "weights" ---------------------------------------

WRITES = """() { case "$2" in
scripts.base_train) at=base_checkpoints;; scripts.chat_sft) at=chatsft_checkpoints;;
scripts.chat_rl) at=chatrl_checkpoints;;
*) return;; esac; sleep 0.4; mkdir -p "$NANOCHAT_BASE_DIR/$at/pocket/step_000007"
echo "$2 $SALT" >"$NANOCHAT_BASE_DIR/$at/pocket/step_000007/model.safetensors"; }"""


@pytest.mark.slow
def test_the_kill_bench_tells_equal_from_different_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("BASH_FUNC_python%%", WRITES)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SALT", "")
    cfg = bench_recipe_kill.Config(runs=2, kills=1, out=str(tmp_path / "out.json"))
    whole = bench_recipe_kill.main(cfg)
    assert whole["same"] == whole["of"] == 2 and "none" not in " ".join(whole["untouched"].values())
    assert {kill["signal"] for run in whole["runs"] for kill in run["kills"][:-1]} == {"SIGKILL", "SIGTERM"}
    monkeypatch.setenv("BASH_FUNC_python%%", WRITES.replace("$SALT", "$RANDOM"))
    with pytest.raises(UserError, match="2 of 2 runs ended elsewhere"):
        bench_recipe_kill.main(cfg)
