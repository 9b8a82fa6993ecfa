"""What the documents say is true: the tree, every command's flags, every path."""

import dataclasses
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nanochat import cli, record
from scripts import series, tree

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [p for p in (ROOT / "README.md", ROOT / "CLAUDE.md", *sorted((ROOT / "docs").glob("*.md"))) if p.exists()]
RECIPES = sorted((ROOT / "runs").glob("*.sh"))


LAUNCH = re.compile(
    r"(?:python|torchrun|\$\{launch\[@\]\})(?:\s+--?[\w=${}:\"-]+)*?\s+(?:-m\s+)?((?:scripts|nanochat)\.\w+)([^;&|`)]*)"
)


def commands(text, fenced=False):
    """Every `python -m module flags` and `torchrun ... -m module -- flags`, as (module, flags).

    fenced: only those in code blocks (Markdown). Comments and what a recipe only prints are left out.
    """
    if fenced:
        text = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = line.split("  #")[0].strip()
        if not line.startswith(("#", "echo")) and (match := LAUNCH.search(line)):
            yield match[1], match[2].strip()


def values(flags):
    """The flags of a command with shell variables replaced by a number, without what is not a flag."""
    flags = flags.replace("${ARGS:-}", "").replace('"$@"', "")
    flags = re.sub(r"\$\{?\w+[^}\s\"]*\}?", "1", flags)
    parts = [part for part in shlex.split(flags) if part != "--"]
    return [
        p
        for i, p in enumerate(parts)
        if p.startswith("-") or (i and parts[i - 1].startswith("-") and "=" not in parts[i - 1])
    ]


def cases():
    for path in [*DOCUMENTS, *RECIPES]:
        for module, flags in commands(path.read_text(encoding="utf-8"), path.suffix == ".md"):
            yield pytest.param(module, flags, id=f"{path.name}: {module} {flags}"[:100])


@pytest.mark.parametrize(("module", "flags"), list(cases()))
def test_every_documented_command_parses(module, flags):
    config = importlib.import_module(module).Config if module != "nanochat.dataset" else None
    if config is None:
        config = importlib.import_module("nanochat.download").Config
    assert dataclasses.is_dataclass(cli.parse(config, values(flags)))


def test_the_parser_of_commands_sees_flags():
    text = 'torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- \\\n    --depth=12 --run="d12"\n'
    ((module, flags),) = commands(text)
    assert module == "scripts.base_train" and values(flags) == ["--depth=12", "--run=d12"]
    with pytest.raises(SystemExit):
        cli.parse(importlib.import_module(module).Config, ["--seq-len=3"])


def test_the_readme_tree_is_true():
    assert tree.PLACE.search((ROOT / "README.md").read_text())[2] == tree.tree(), "run `python -m scripts.tree`"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_named_file_exists(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:nanochat|scripts|tasks|runs|tests|dev|docs)/[\w./]+)`", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_are_valid_shell_that_stops_at_errors_pitfall_47(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert "set -euo pipefail" in text or "setup.sh" in text
    assert "curl" not in text and not re.search(r"\|\s*grep.*(step|loss|bpb|param)", text)


def test_setup_keeps_a_base_dir_that_is_set_pitfall_47(tmp_path):
    code = 'source runs/setup.sh; echo "$NANOCHAT_BASE_DIR"; false; echo unreachable'
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "SKIP_SETUP": "1",
        "NANOCHAT_BASE_DIR": str(tmp_path / "mine"),
    }
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(tmp_path / "mine") and done.returncode != 0


def test_the_series_reads_records_and_leaves_unfinished_runs_out_pitfall_47(base_dir):
    plan = {"config": {"n_layer": 4, "n_embd": 256}, "parameters": {"total": 9, "scaling": 5}, "batch": 8,
            "iterations": 2, "tokens": 16, "flops": 1e9}  # fmt: skip
    for tag, ended in (("s_d4", True), ("s_d6", False)):
        log = record.Record(base_dir / "base_checkpoints" / tag / "record.jsonl", stage="base", config={})
        log.event("plan", plan=plan)
        if ended:
            log.close(val_bpb=1.5, seconds=3.0, tokens_per_second=5.0)
    (row,) = series.main(series.Config(prefix="s_", output=str(base_dir / "s.csv")))["rows"]
    assert (row["tag"], row["depth"], row["scaling_parameters"], row["val_bpb"]) == ("s_d4", 4, 5, 1.5)
    assert (base_dir / "s.csv").read_text().count("\n") == 2
