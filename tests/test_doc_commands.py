"""Every command that a document, a skill, an agent or a script's help names: its program, flags and paths are there.

Those of training and of the world outside are parsed and checked, as far as that goes without work; whatever only looks
at what is there is really run, on an artefact folder with tiny models under the names that the documents use.
"""

import ast
import contextlib
import dataclasses
import importlib
import re
import shlex
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_docs import DOCUMENTS, ROOT, config_of
from tiny_model import TOKENIZER, save_checkpoint

from nanochat import cli, record
from nanochat.errors import UserError

PROGRAMS = sorted((ROOT / "scripts").glob("*.py"))
KNOWN = {  # programs that a document may name besides ours
    "apt", "cd", "cp", "docker", "export", "git", "mkdir", "node", "npm", "nvidia-smi", "pip", "pytest", "rsync",
    "scancel", "scp", "source", "squeue", "ssh", "tail", "tmux", "uv",
}  # fmt: skip
OURS = re.compile(r"^(?:nanochat|scripts|tasks|runs|tests|dev|docs|visualize|\.claude)/[\w./-]+$")
RECIPES_OF_PRETRAINING = ("runs/multinode.sh", "runs/slurm.sbatch")  # hand their arguments on to scripts.base_train
SPAN = re.compile(r"(?<!`)`((?:[A-Z_]+=\S+ )*(?:python -m|torchrun(?= -)|bash|sbatch|sky jobs) [^`\n]+)`(?!`)")


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def code(text):
    """The shell code of a Markdown document: its ```bash blocks, and what stands in backticks and is a command."""
    for language, block in FENCE.findall(text):
        if language == "bash":
            yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    yield from SPAN.findall(FENCE.sub("", text))


def usage(path):
    """The commands in a script's docstring: lines that are set in, with what continues them."""
    text = re.sub(r"\\\n\s*", " ", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    found = re.findall(r"^ *((?:[A-Z_]+=\S+ )*(?:python -m|torchrun -|bash ).*)$", text, re.MULTILINE)
    return [line.removesuffix("'") if line.count("'") == 1 else line for line in found]  # the end of bash -c '...'


def statements(lines):
    """Every single command of these lines, as words; pipes and && part them, arguments and variables are made up."""
    for line in lines:
        line = re.sub(r"\$\{?\w+\}?", "12", line.replace("$ARGUMENTS", "gpt"))
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                while words and re.match(r"^[A-Z_]+=", words[0]):  # VARIABLE=value in front
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def target(words):
    """(module, its arguments) of a command that runs one of our modules, else None."""
    if words[0] not in ("python", "python3", "torchrun") or "-m" not in words:
        return None
    at = words.index("-m") + 1
    return words[at], [word for word in words[at + 1 :] if word != "--"]


def check_training(module, arguments):
    """Assert that a program takes these flags, and, where it trains, that they go together."""
    cfg = cli.parse(config_of(module), arguments)
    assert dataclasses.is_dataclass(cfg)
    if module in ("scripts.base_train", "scripts.chat_sft", "scripts.chat_rl"):
        importlib.import_module(module).check(cfg)


def check_statement(words, where):
    """Assert that a documented command exists: a known program, a module with these flags, paths that are there."""
    for before, word in zip(["", *words], words):
        made = word.startswith("--out") or before.startswith("--out")  # by the command itself
        for part in (word, word.partition("=")[2]):
            if OURS.match(part) and not made:
                assert (ROOT / part).exists(), f"{where} names {part}"
    if words[0] in ("bash", "sbatch", "sky"):
        recipe = next((word for word in words if word.startswith("runs/")), None)
        assert recipe and (ROOT / recipe).exists(), f"{where}: {words}"
        if recipe in RECIPES_OF_PRETRAINING:
            check_training("scripts.base_train", words[words.index(recipe) + 1 :])
        elif recipe == "runs/sky.yaml":
            named = [word.partition("=")[0] for flag, word in zip(words, words[1:]) if flag == "--env"]
            assert all(f"  {name}:" in (ROOT / recipe).read_text() for name in named), f"{where}: {words}"
    elif found := target(words):
        module, arguments = found
        if module.split(".")[0] in ("scripts", "nanochat"):
            check_training(module, arguments)
        else:
            assert module in ("pip", "venv", "pytest"), f"{where}: python -m {module}"
    else:
        assert words[0] in KNOWN, f"{where}: what is {words[0]}?"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_command_of_a_document_exists(path):
    text = path.read_text(encoding="utf-8")
    found = list(statements(code(text)))
    for words in found:
        check_statement(words, path.name)
    prose = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # what a skill may run: tests/test_skills.py
    prose = FENCE.sub(lambda block: block[2] if block[1] == "bash" else "", prose)  # others: output, the tree, Python
    seen = [named[0] for words in found if (named := target(words))]
    named = re.findall(r"(?:python|python3|torchrun)(?: --?[\w=.-]+)*? -m ([\w.]+)", prose)
    assert sorted(seen) == sorted(named), "a command that stands where none is looked for"
    for language, block in FENCE.findall(text):
        assert language in ("", "bash", "python"), "write commands as ```bash"
        shown = language == "" and re.search(r"^(?:\$ )?(?:python|torchrun|bash) ", block, re.MULTILINE)
        assert not shown, "write commands as ```bash"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_every_command_of_a_scripts_help_exists(path):
    for words in statements(usage(path)):
        check_statement(words, path.name)


WRONG = {  # by what is wrong with it
    "flag": "python -m scripts.base_train --seq-len=3",
    "flag behind torchrun": "torchrun --nproc_per_node=8 -m scripts.chat_sft -- --lr=1",
    "flag behind &&": "cd x && python -m scripts.plan --dept=3",
    "flag through a recipe": "bash runs/multinode.sh --dept=3",
    "flag through SLURM": "sbatch --nodes=1 runs/slurm.sbatch --dept=3",
    "variable": "sky jobs launch runs/sky.yaml --env DEEP=3",
    "value": "python -m scripts.chat_rl --num-samples=many",
    "values together": "python -m scripts.base_train --fp8 --shard=full",
    "module": "python -m scripts.no_such",
    "recipe": "bash runs/no_such.sh",
    "program": "frobnicate now",
    "path": "cp docs/no_such.md x",
    "path of a flag": "python -m scripts.rent --prices=nanochat/no_such.csv",
}
KINDS = (
    "README.md",
    "docs/one_gpu.md",
    ".claude/skills/train/SKILL.md",
    ".claude/agents/experimenter.md",
    "scripts/plan.py",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_command_is_caught_in_every_kind_of_file(kind, wrong, tmp_path):
    text = (ROOT / kind).read_text(encoding="utf-8")
    program = kind.endswith(".py")
    places = [f"\n\n    {WRONG[wrong]}\n"] if program else [f"\n```bash\n{WRONG[wrong]}  # words\n```\n"]
    if not program and WRONG[wrong].startswith(("python", "torchrun", "bash", "sbatch", "sky")):
        places.append(f"\nwrite `{WRONG[wrong]}` to see\n")
    for place in places:
        cut = text.index("\n\n", text.index('"""')) if program else len(text)
        (tmp_path / "copy").write_text(text[:cut] + place + text[cut:], encoding="utf-8")
        lines = usage(tmp_path / "copy") if program else code((tmp_path / "copy").read_text(encoding="utf-8"))
        if program and not WRONG[wrong].startswith(("python", "torchrun", "bash")):
            continue  # a script's help names our programs only
        with pytest.raises((AssertionError, SystemExit, ModuleNotFoundError, UserError)):
            for words in statements(lines):
                check_statement(words, "copy")


def test_commands_are_found_as_they_are_written():
    text = (
        "```bash\nOMP_NUM_THREADS=2 python -m scripts.base_train --depth=4 \\\n  --resume | tail -n 3  # words\n```\n"
    )
    assert list(statements(code(text + "and `A=1 python -m scripts.plan` too, not `plan`"))) == [
        ["python", "-m", "scripts.base_train", "--depth=4", "--resume"], ["tail", "-n", "3"],
        ["python", "-m", "scripts.plan"],
    ]  # fmt: skip


# -- really run --------------------------------------------------------------------------------------------------------

RUN = (  # programs that only look, or write what a test can throw away
    "scripts.checkpoints", "scripts.debug_loss", "scripts.doctor", "scripts.explain", "scripts.export",
    "scripts.inspect_hang", "scripts.plan", "scripts.preflight", "scripts.rent", "scripts.report", "scripts.series",
    "scripts.verify_data", "scripts.visualize_data",
)  # fmt: skip
LONG = ("scripts.export", "scripts.report", "scripts.visualize_data")  # draw, or load other libraries: seconds
NOT_RUN = {  # of those, commands that need what no test has
    ("scripts.checkpoints", "convert"): "a checkpoint of the published code (test_checkpoints)",
    ("scripts.doctor", "--network"): "the network",
    ("scripts.export", "--push=USER/NAME"): "an account",
    ("scripts.export", "--import-from=FOLDER"): "an exported folder (test_export)",
    ("scripts.export", "--format=onnx"): "half a minute (test_export)",
    ("scripts.verify_data", "--dataset=climbmix"): "the corpus",
}
TAGS = ("12", "d12", "pocket", "other", "a", "b", "try_a", "scaling_d4", "miniseries_d4")  # 12 stands for $0


def runnable():
    """Each command that is really run, once, with the first place that names it."""
    found = {}
    sources = [(path, code(path.read_text(encoding="utf-8"))) for path in DOCUMENTS]
    for path, lines in [*sources, *((path, usage(path)) for path in PROGRAMS)]:
        for words in statements(lines):
            module, arguments = target(words) or ("", [])
            if module in RUN and not any(module == m and flag in arguments for m, flag in NOT_RUN):
                found.setdefault((module, *arguments), path.name)
    slow = {module: [pytest.mark.slow] for module in LONG}
    names = {key: f"{name}: {' '.join(key)}"[:90] for key, name in found.items()}
    return [pytest.param(key[0], key[1:], id=names[key], marks=slow.get(key[0], [])) for key in found]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """A project folder with artefacts: tiny models of every stage and name, their records, a corpus, a series."""
    top = tmp_path_factory.mktemp("artefacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(top / "base"))
        patch.setitem(TOKENIZER.meta, "dataset", {"dataset": "tinyworld"})
        for source, folder in (("base", "base"), ("sft", "chatsft"), ("rl", "chatrl")):
            root = top / "base" / f"{folder}_checkpoints"
            save_checkpoint(source, tag=TAGS[0], step=300)
            write_record(root / TAGS[0] / "record.jsonl", source)
            for tag in TAGS[1:]:
                shutil.copytree(root / TAGS[0], root / tag)
    for folder in ("shards", "FOLDER"):
        (top / folder).mkdir()
        for i in range(2):
            text = pa.table({"text": [f"Text {i} {j} of {folder}." for j in range(20)]})
            pq.write_table(text, top / folder / f"shard_{i:05d}.parquet")
    shutil.copy(ROOT / "CLAUDE.md", top)
    shutil.copy(ROOT / "nanochat" / "prices.csv", top / "my_prices.csv")
    (top / "miniseries.csv").write_text("depth,flops,val_bpb\n4,1e12,1.0\n6,1e13,0.9\n")
    (top / "nanochat").symlink_to(ROOT / "nanochat")  # paths of the project
    return top


def write_record(path, stage):
    """The record of a short run that has ended."""
    log = record.Record(path, stage=stage, config={})
    config = {"n_layer": 3, "n_embd": 32, "vocab_size": 265}
    log.event("plan", plan={"config": config, "parameters": {"total": 9, "scaling": 5}, "batch": 8, "iterations": 40,
                            "tokens": 320, "flops": 1e9})  # fmt: skip
    for step in range(40):
        log.step(step, loss=5.0 / (step + 1), smooth_loss=5.0 / (step + 1), lr=1.0, grad_norm=0.1, seconds=0.1,
                 tokens_per_second=80.0)  # fmt: skip
    log.eval(40, val_bpb=1.5)
    log.close(seconds=4.0, val_bpb=1.5, tokens_per_second=80.0)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "arguments"), runnable())
def test_a_command_that_only_looks_really_runs(module, arguments, artefacts, tmp_path, monkeypatch, capsys):
    shutil.copytree(artefacts, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "here" / "base"))
    script = importlib.import_module(module)
    cfg = cli.parse(script.Config, list(arguments))
    needs_gpu = module == "scripts.plan" and "--gpu" not in " ".join(arguments).replace("--gpus", "")
    refusal = contextlib.suppress(UserError) if needs_gpu else contextlib.nullcontext()
    with refusal:  # a plan by hours wants to know for which GPU
        script.main(cfg)
    assert capsys.readouterr().out.strip() or needs_gpu
