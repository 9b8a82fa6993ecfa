"""What the documents say is true: the tree, every command's flags, every path."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import cli, dataset, download, record, tools
from scripts import (
    base_eval,
    base_train,
    chat_eval,
    chat_rl,
    chat_sft,
    infer_bench,
    series,
    tok_train,
    tree,
)
from tasks.customjson import CustomJSON

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
SKILLS = sorted((ROOT / ".claude").glob("skills/*/SKILL.md")) + sorted((ROOT / ".claude").glob("agents/*.md"))
PAGES = [ROOT / name for name in ("README.md", "CLAUDE.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCUMENTS = [*PAGES, *GUIDES, *SKILLS]
RECIPES = sorted((ROOT / "runs").glob("*.sh"))

LAUNCH = re.compile(
    r"(?:python|torchrun|\$\{launch\[@\]\})(?:\s+--?[\w=${}:\"-]+)*?\s+(?:-m\s+)?((?:scripts|nanochat)\.\w+)([^;&|`)]*)"
)


def commands(text):
    """Every `python -m module flags` and `torchrun ... -m module -- flags` of a recipe, as (module, flags)."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = line.split("  #")[0].strip()
        if not line.startswith(("#", "echo")) and (match := LAUNCH.search(line)):
            yield match[1], match[2].strip()


def values(flags):
    """The flags of a recipe's command with shell variables replaced by a number, without what is not a flag."""
    flags = flags.replace("${ARGS:-}", "").replace('"$@"', "")
    flags = re.sub(r"\$\{?\w+[^}\s\"]*\}?", "1", flags)
    parts = [part for part in shlex.split(flags) if part != "--"]
    return [
        p
        for i, p in enumerate(parts)
        if p.startswith("-") or (i and parts[i - 1].startswith("-") and "=" not in parts[i - 1])
    ]


def config_of(module):
    """The Config of a module of ours that is run with -m."""
    return importlib.import_module("nanochat.download" if module == "nanochat.dataset" else module).Config


def cases():
    for path in RECIPES:
        for module, flags in commands(path.read_text(encoding="utf-8")):
            yield pytest.param(module, flags, id=f"{path.name}: {module} {flags}"[:100])


@pytest.mark.parametrize(("module", "flags"), list(cases()))
def test_every_command_of_a_recipe_parses(module, flags):
    assert dataclasses.is_dataclass(cli.parse(config_of(module), values(flags)))


def test_the_parser_of_commands_sees_flags():
    text = 'torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- \\\n    --depth=12 --run="d12"\n'
    ((module, flags),) = commands(text)
    assert module == "scripts.base_train" and values(flags) == ["--depth=12", "--run=d12"]
    with pytest.raises(SystemExit):
        cli.parse(importlib.import_module(module).Config, ["--seq-len=3"])


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_guides_python_makes_what_they_say(tmp_path, base_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        (tmp_path / f"text_{i}.txt").write_text(f"Text number {i}. " * 50)
    (shards,) = python_blocks("custom_data.md")
    subprocess.run([sys.executable, "-c", shards], check=True)
    corpus = dataset.open_corpus("shards")
    assert [len(list(corpus.epoch_batches(split))[0][1]) for split in ("train", "val")] == [2, 1]
    (ability,) = python_blocks("add_ability.md")
    subprocess.run([sys.executable, "-c", ability], check=True)
    task = CustomJSON("strawberry.jsonl")
    assert len(task) == 2000
    for i in range(50):
        question, answer = task[i]["messages"]
        letter, word = re.search(r"How many (\w) are in (\w+)", question["content"]).groups()
        assert answer["content"][2]["text"] == str(word.count(letter)) == tools.calculator(answer["content"][1]["text"])


FIGURE = re.compile(r"\d\s?(?:tokens/s|tok/s|[GT]FLOP/s|ms\b|minutes\b|bpb\b|% (?:MFU|of \d+ right))")
SOURCES = ("dev/bench/", "dev/LOG.md", "published", "data sheet", "by `python -m scripts.plan`")


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "SECURITY.md", *GUIDES], ids=lambda p: p.name)
def test_every_figure_names_its_source(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for section in re.split(r"\n#+ ", text):
        for paragraph in section.split("\n\n"):
            if FIGURE.search(paragraph):
                named = any(source in paragraph for source in SOURCES) or "dev/bench/" in section
                assert named, f"{path.name} states a figure without its source: {paragraph[:200]}"


def test_the_readme_tree_is_true():
    assert tree.PLACE.search((ROOT / "README.md").read_text())[2] == tree.tree(), "run `python -m scripts.tree`"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_named_file_exists(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:nanochat|scripts|tasks|runs|tests|dev|docs|visualize|\.claude)/[\w./-]+)`", text):
        assert "NAME" in name or (ROOT / name).exists(), f"{path.name} names {name}"


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


PUBLISHED = {  # every flag of the published scripts (July 2026) in their forms
    base_train: "--run dummy --device-type= --fp8 --fp8-recipe tensorwise --depth 20 --aspect-ratio 64 --head-dim 128 "
    "--max-seq-len 2048 --window-pattern SSSL --num-iterations -1 --target-flops -1 --target-param-data-ratio 12 "
    "--device-batch-size 32 --total-batch-size -1 --embedding-lr 0.3 --unembedding-lr 0.008 --weight-decay 0.28 "
    "--matrix-lr 0.02 --scalar-lr 0.5 --warmup-steps 40 --warmdown-ratio 0.65 --final-lr-frac 0.05 "
    "--resume-from-step -1 --eval-every 250 --eval-tokens 41943040 --core-metric-every 2000 "
    "--core-metric-max-per-task 500 --sample-every 2000 --save-every -1 --model-tag d20",
    base_eval: "--eval core,bpb,sample --model-tag d20 --step 1 --max-per-task -1 --device-batch-size 32 "
    "--split-tokens 20971520 --device-type cpu",
    chat_sft: "--run dummy --device-type= --model-tag d20 --model-step 1 --load-optimizer 1 --num-iterations -1 "
    "--max-seq-len 2048 --device-batch-size 32 --total-batch-size 524288 --embedding-lr 0.3 --unembedding-lr 0.004 "
    "--matrix-lr 0.02 --init-lr-frac 0.8 --warmup-ratio 0 --warmdown-ratio 0.5 --final-lr-frac 0 --eval-every 200 "
    "--eval-tokens 20971520 --chatcore-every 200 --chatcore-max-cat -1 --chatcore-max-sample 24 --mmlu-epochs 3 "
    "--gsm8k-epochs 4",
    chat_rl: "--run dummy --device-type= --model-tag d20 --model-step 1 --num-epochs 1 --device-batch-size 8 "
    "--examples-per-step 16 --num-samples 16 --max-new-tokens 256 --temperature 1.0 --top-k 50 --embedding-lr 0.2 "
    "--unembedding-lr 0.004 --matrix-lr 0.02 --weight-decay 0 --init-lr-frac 0.05 --eval-every 60 --eval-examples 400 "
    "--save-every 60",
    chat_eval: "-i sft -a GSM8K|MMLU -t 0.0 -m 512 -n 1 -k 50 -b 8 -g d20 -s 1 -x 10 --device-type cpu",
    tok_train: "--max-chars 2000000000 --doc-cap 10000 --vocab-size 32768",
    download: "-n 8 -w 4 --num-files 8 --num-workers 4",
    infer_bench: "-i base -g d20 -s 1 --prompt-tokens 2048 --decode-tokens 256 --batch-sizes 1,8,32,128 -t 0.0",
}


@pytest.mark.parametrize("stage", PUBLISHED)
def test_published_flags_are_taken_and_pass_the_checks(stage):
    cfg = cli.parse(stage.Config, PUBLISHED[stage].split())
    if hasattr(stage, "check"):
        stage.check(cfg)
