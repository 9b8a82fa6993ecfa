"""Each recipe as the documents call it, dry: its programs only take notes; every command it would run is checked."""

import shutil
import subprocess
import sys

import pytest
import yaml
from test_doc_commands import Words, check_statement, sources, statements
from test_docs import ROOT

NOTE = """#!/bin/bash
(IFS=$'\\t'; echo "${0##*/}"$'\\t'"$*") >>"$CALLS"
"""
FAKES = {  # what the recipes call
    "python": NOTE.replace("#!/bin/bash", '#!/bin/bash\n[ "$1" = -m ] || exec "$PYTHON" "$@"') + """
case "$2" in
scripts.plan) exec "$PYTHON" "$@" --gpu=h100 --memory-gib=80;;  # as on a machine with such a GPU
scripts.tok_train) mkdir -p "$NANOCHAT_BASE_DIR/tokenizer";;  # runs/sky.yaml waits for it
esac
""",
    "torchrun": NOTE, "ruff": NOTE, "chromium": NOTE, "uv": NOTE,
    "nvidia-smi": '#!/bin/sh\nfor i in $(seq "${CARDS:-0}"); do echo "GPU $i"; done\n',
    "srun": '#!/bin/bash\nwhile [[ "$1" = -* ]]; do shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/sh\necho 127.0.0.1\n",
}  # fmt: skip


def documented():
    """Each call of a recipe that a document names, once; runs/speedrun.sh on a machine with 0, 1 (HOURS) or 8 GPUs."""
    found = {}
    for _, lines in sources():
        for words in statements(lines):
            recipe = next((word for word in words if word.startswith("runs/")), None)
            if recipe and words[0] in ("bash", "sbatch", "sky"):
                called = [f"{name}={value}" for name, value in words.variables.items()] + words
                cards = (1,) if "HOURS" in words.variables else (0, 8) if "speedrun" in recipe else (0,)
                found |= {f"{' '.join(called)}, {n} GPUs": (words, recipe, n) for n in cards}
    return [pytest.param(*case, id=name) for name, case in found.items()]


def dry(top, words, recipe, cards):
    """The commands that a call of a recipe would run, on a machine with so many GPUs."""
    programs = top / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in FAKES.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name in {"nanochat", "runs", "scripts"} - {path.name for path in top.iterdir()}:
        (top / name).symlink_to(ROOT / name)
    own = {"CALLS": str(top / "calls"), "PYTHON": sys.executable, "CARDS": str(cards), "HOME": str(top),
           "PATH": f"{programs}:/usr/bin:/bin"}  # fmt: skip
    command = ["bash", recipe, *words[words.index(recipe) + 1 :]]
    if words[0] == "sbatch":
        own |= {
            "SLURM_SUBMIT_DIR": str(top),
            "SLURM_JOB_NODELIST": "a",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_ID": "7",
        }
    if words[0] == "sky":
        task = yaml.safe_load((ROOT / recipe).read_text())
        asked = dict(value.split("=") for flag, value in zip(words, words[1:]) if flag == "--env")
        own |= task["envs"] | asked | {"SKYPILOT_NODE_IPS": "127.0.0.1", "SKYPILOT_NUM_NODES": "2",
                                       "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "0"}  # fmt: skip
        command = ["bash", "-euc", task["setup"] + task["run"]]
    here = {"HEAD": "127.0.0.1"} if "HEAD" in words.variables else {}
    env = own | words.variables | here | {"NANOCHAT_BASE_DIR": str(top / "base")}
    done = subprocess.run(command, cwd=top, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [Words(line.split("\t")) for line in (top / "calls").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "recipe", "cards"), documented())
def test_every_command_of_a_documented_recipe_exists(words, recipe, cards, tmp_path):
    calls = dry(tmp_path, words, recipe, cards)
    ours = [call for call in calls if call[0] in ("python", "torchrun")]
    assert ours or recipe == "runs/setup.sh"
    for call in ours:
        check_statement(call, recipe)


@pytest.mark.slow
def test_a_wrong_flag_in_a_recipe_is_noticed(tmp_path):
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    recipe = tmp_path / "runs" / "runcpu.sh"
    recipe.write_text(recipe.read_text().replace("--eval-every", "--evaluate-every"))
    calls = dry(tmp_path, Words(["bash", "runs/runcpu.sh"]), "runs/runcpu.sh", 0)
    with pytest.raises(SystemExit):
        for call in calls:
            check_statement(call, "runcpu.sh")
