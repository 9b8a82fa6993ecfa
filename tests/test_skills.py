"""Claude Code's side of the project: skills, agents, settings and hooks are well-formed; the hooks do what they say."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nanochat import cost, paths, record
from scripts import base_train

ROOT = Path(__file__).resolve().parents[1]
CLAUDE = ROOT / ".claude"
SKILLS = set(
    "debug-oom debug-loss debug-distributed debug-stuck fix-checkpoint verify-data train gpu-check config-memory "
    "scaling explain rent-gpu visualize remotion-setup".split()
)
PORTABLE = {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}
AGENTS = sorted((CLAUDE / "agents").glob("*.md"))


def front(path):
    """(front matter, body) of a Markdown file."""
    match = re.fullmatch(r"---\n(.*?)\n---\n(.*)", path.read_text(encoding="utf-8"), re.DOTALL)
    assert match, f"{path} has no front matter"
    return yaml.safe_load(match[1]), match[2]


def bash(text):
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


def test_the_skills_are_the_missions():
    assert {p.parent.name for p in (CLAUDE / "skills").glob("*/SKILL.md")} == SKILLS
    assert not list((CLAUDE / "skills").glob("*.md"))  # a flat file is silently ignored


@pytest.mark.parametrize("name", sorted(SKILLS))
def test_a_skill_is_portable_and_drives_a_program(name):
    matter, body = front(CLAUDE / "skills" / name / "SKILL.md")
    assert matter["name"] == name and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) and len(name) <= 64
    assert set(matter) <= PORTABLE
    assert 40 < len(matter["description"]) <= 1024 and not set("<>") & set(matter["description"])
    assert "Use " in matter["description"]  # says when, not only what
    assert body.count("\n") < 500
    assert any(re.search(r"-m scripts\.\w+", block) for block in bash(body)), "no program behind it"
    assert not re.findall(r"(?<!\\)\$[2-9]", body)  # only $0, $1 and $ARGUMENTS are substituted
    tools = re.findall(r"Bash\(([^)]*)\)|(\w+)", matter["allowed-tools"])
    for command, other in tools:
        assert other in ("", "Read", "Grep") or command, matter["allowed-tools"]
        assert not re.search(r"base_train|chat_sft|chat_rl|\brm |repair|quarantine", command)  # hours, deleting: asks


def test_every_program_of_a_skill_is_allowed_or_asks():
    for name in sorted(SKILLS):
        matter, body = front(CLAUDE / "skills" / name / "SKILL.md")
        for module in {m for block in bash(body) for m in re.findall(r"python -m ([\w.]+)", block)}:
            asks = module in ("scripts.base_train", "scripts.chat_sft", "scripts.report")
            assert asks or f"Bash(python -m {module} " in matter["allowed-tools"], (name, module)


@pytest.mark.parametrize("path", AGENTS, ids=lambda p: p.stem)
def test_an_agent_has_what_claude_code_reads(path):
    matter, body = front(path)
    assert matter["name"] == path.stem and "Use " in matter["description"] and len(body) > 400
    assert {tool.strip() for tool in matter["tools"].split(",")} <= {"Read", "Grep", "Glob", "Bash", "Edit", "Write"}


def test_there_are_four_agents_and_only_the_experimenter_may_edit():
    assert len(AGENTS) == 4
    assert [p.stem for p in AGENTS if "Edit" in front(p)[0]["tools"]] == ["experimenter"]


# -- hooks -------------------------------------------------------------------------------------------------------------


def hook_commands():
    settings = json.loads((CLAUDE / "settings.json").read_text())
    for event, groups in settings["hooks"].items():
        for group in groups:
            assert set(group) == {"matcher", "hooks"} and group["matcher"] == "Bash"
            for hook in group["hooks"]:
                assert hook["type"] == "command" and hook["timeout"] <= 60
                yield event, hook["command"]


def test_settings_have_the_nested_shape_and_wire_every_hook():
    wired = [(event, re.search(r"hooks/(\w+\.py)", command)[1]) for event, command in hook_commands()]
    assert {name for _, name in wired} | {"common.py"} == {p.name for p in (CLAUDE / "hooks").glob("*.py")}
    assert dict((name, event) for event, name in wired)["log_run.py"] == "PostToolUse"
    assert all(event == "PreToolUse" for event, name in wired if name != "log_run.py")


@pytest.fixture
def hooks(monkeypatch):
    """Import a hook; `call(hook, command)` runs it on a Bash event in this process and returns its exit status."""
    monkeypatch.syspath_prepend(str(CLAUDE / "hooks"))

    def call(name, command, tool="Bash", **patches):
        module = importlib.import_module(name)
        for target, value in patches.items():
            monkeypatch.setattr(module, target, value)
        monkeypatch.setattr(
            sys, "stdin", io.StringIO(json.dumps({"tool_name": tool, "tool_input": {"command": command}}))
        )
        return module.main()

    return call


def test_launches_are_found_in_real_commands(hooks, monkeypatch):
    hooks("warn_tree", "ls")
    common = sys.modules["common"]
    (one,) = common.launches(
        'cd x && OMP_NUM_THREADS=1 python -m scripts.base_train --depth=12 --run="a b" > log 2>&1 &'
    )
    assert one == ("scripts.base_train", ["--depth=12", "--run=a b"], 1)
    (two,) = common.launches("torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- \\\n  --resume | tee log")
    assert two == ("scripts.chat_sft", ["--resume"], 8)
    (three,) = common.launches("torchrun --nnodes 2 --nproc-per-node 8 -m scripts.base_train -- --depth 24")
    assert three.world == 16
    for nothing in ("python -m scripts.plan --depth=90", "cat scripts/base_train.py", "echo 'unclosed", "",
                    "python -m scripts.base_train --help", "grep 'scripts.base_train' README.md"):  # fmt: skip
        assert common.launches(nothing) == []


def test_a_launch_that_cannot_fit_is_blocked_with_the_batch_that_fits(hooks, capsys, base_dir):
    config = base_train.make_plan(base_train.Config(depth=12), 32768, 1).config
    accum = base_train.make_plan(base_train.Config(depth=12, device_batch_size=8), 32768, 1).accum
    room = cost.memory(config, 8, bytes_per_value=4, device="cpu", accum=accum)["total"] / 0.95 + 1
    small = {"room": lambda: (int(room), "a card")}
    assert hooks("check_fit", "python -m scripts.base_train --depth=12 --device-batch-size=8", **small) == 0
    assert hooks("check_fit", "python -m scripts.base_train --depth=12 --device-batch-size=16", **small) == 2
    assert "--device-batch-size=8 fits" in (said := capsys.readouterr().err) and "a card" in said
    assert hooks("check_fit", "torchrun --nproc_per_node=8 -m scripts.base_train -- --depth=60", **small) == 2
    assert "smaller --depth" in capsys.readouterr().err
    for harmless in ("python -m scripts.plan --depth=90", "python -m scripts.base_train --no-such-flag=1", "ls"):
        assert hooks("check_fit", harmless, **small) == 0
    assert hooks("check_fit", "python -m scripts.base_train --depth=12", tool="Read", **small) == 0


def test_the_embedded_recipe_is_never_blocked(hooks, base_dir):
    recipe = re.search(
        r"(python -m scripts\.base_train.*?--resume)", (ROOT / "runs" / "speedrun.sh").read_text(), re.DOTALL
    )
    assert hooks("check_fit", recipe[1].replace('"$run"', "dummy").replace('"$seed"', "1")) == 0


def test_a_dirty_tree_is_a_warning_only_when_training_starts(hooks, capsys):
    train = "python -m scripts.base_train --depth=4"
    assert hooks("warn_tree", train, changed=lambda: ["nanochat/gpt.py"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "nanochat/gpt.py" in said["systemMessage"]
    assert said["hookSpecificOutput"]["hookEventName"] == "PreToolUse"
    assert hooks("warn_tree", "pytest", changed=lambda: ["nanochat/gpt.py"]) == 0
    assert hooks("warn_tree", train, changed=lambda: []) == 0
    assert capsys.readouterr().out == ""


def test_a_nearly_full_disk_is_a_warning_by_the_size_of_the_run(hooks, capsys, base_dir, monkeypatch):
    monkeypatch.setattr(paths, "free_bytes", lambda path: 20 * 2**30)
    assert hooks("warn_disk", "python -m scripts.base_train --depth=4 --aspect-ratio=32") == 0
    assert capsys.readouterr().out == ""
    assert hooks("warn_disk", "python -m scripts.base_train --depth=32") == 0
    assert "20.0 GiB free" in json.loads(capsys.readouterr().out)["systemMessage"]
    assert hooks("warn_disk", "ls") == 0 and capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_finished_run_is_appended_to_the_experiment_log_once(hooks, capsys, base_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rows = record.Record(base_dir / "base_checkpoints" / "try" / "record.jsonl", stage="base", config={"depth": 4})
    rows.step(0, loss=1.0)
    rows.close(seconds=60.0, loss=1.0, val_bpb=0.7)
    before = (ROOT / "CLAUDE.md").read_text(encoding="utf-8")
    (tmp_path / "CLAUDE.md").write_text(before, encoding="utf-8")
    hooks("log_run", "ls")
    monkeypatch.setattr(sys.modules["common"], "ROOT", tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    assert hooks("log_run", "python -m scripts.base_train --model-tag=try") == 0
    assert "added" in json.loads(capsys.readouterr().out)["systemMessage"]
    after = (tmp_path / "CLAUDE.md").read_text(encoding="utf-8")
    (new,) = set(after.splitlines()) - set(before.splitlines())
    assert new.startswith("|") and "try" in new and "0.7000 bpb" in new
    hooks("log_run", "bash runs/speedrun.sh")
    assert capsys.readouterr().out == "" and (tmp_path / "CLAUDE.md").read_text(encoding="utf-8") == after


@pytest.mark.slow
def test_the_hooks_run_as_claude_code_runs_them(base_dir):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("the hooks run with .venv/bin/python, which is not here: bash runs/setup.sh makes it")
    env = {**os.environ, "CLAUDE_PROJECT_DIR": str(ROOT)}
    event = json.dumps({"tool_name": "Bash", "tool_input": {"command": "python -m scripts.base_train --depth=200"}})
    for _, command in hook_commands():
        for text in (event, "not json") if "check_fit" in command else ("",):
            done = subprocess.run(
                ["sh", "-c", command], input=text, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == (2 if text == event else 0), (command, done.stderr)
