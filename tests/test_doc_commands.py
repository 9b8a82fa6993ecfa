"""Every command that a document, a skill, an agent or a script's help names: its program, flags and paths are there.

Here they are found, parsed and checked, as far as that goes without work; tests/test_doc_commands_run.py runs them.
"""

import ast
import dataclasses
import functools
import importlib
import re
import shlex

import pytest
from test_docs import DOCUMENTS, ROOT, config_of

from nanochat import cli
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


class Words(list):
    """The words of a command, and the `variables` set in front of it: {name: value}."""

    def __init__(self, words=()):
        super().__init__(words)
        self.variables = {}


def statements(lines):
    """Every single command of these lines, as Words; pipes and && part them, arguments and variables are made up."""
    for line in lines:
        line = re.sub(r"\$\{?\w+\}?", "12", line.replace("$ARGUMENTS", "gpt"))
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words = Words()
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                if words:
                    yield words
                words = Words()
            elif not words and re.match(r"^[A-Z_]+=", word):
                name, _, value = word.partition("=")
                words.variables[name] = value
            else:
                words.append(word)


def target(words):
    """(module, its arguments) of a command that runs one of our modules, else None."""
    if words[0] not in ("python", "python3", "torchrun") or "-m" not in words:
        return None
    at = words.index("-m") + 1
    return words[at], [word for word in words[at + 1 :] if word != "--"]


def sources():
    """Each file that may name commands, and its lines of shell."""
    for path in DOCUMENTS:
        yield path, code(path.read_text(encoding="utf-8"))
    for path in PROGRAMS:
        yield path, usage(path)


@functools.cache
def variables():
    """The environment variables that our programs and recipes read, and those of others that the documents set."""
    found = {"GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"}
    for folder in ("nanochat", "scripts", "tasks"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r"environ(?:\.get\(|\[)[\"']([A-Z_]+)", path.read_text(encoding="utf-8")))
    for path in (ROOT / "runs").iterdir():
        found |= set(re.findall(r"\$\{([A-Z_]+):?[-?]", path.read_text(encoding="utf-8")))
    return found


def check_training(module, arguments):
    """Assert that a program takes these flags, and, where it trains, that they go together."""
    cfg = cli.parse(config_of(module), arguments)
    assert dataclasses.is_dataclass(cfg)
    if module in ("scripts.base_train", "scripts.chat_sft", "scripts.chat_rl"):
        importlib.import_module(module).check(cfg)


def check_statement(words, where):
    """Assert that a documented command exists: a known program, a module with these flags, paths that are there."""
    unknown = set(words.variables) - variables()
    assert not unknown, f"{where}: nothing reads {unknown}"
    if words[0] == "torchrun":
        importlib.import_module("torch.distributed.run").get_args_parser().parse_args(words[1:])
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
    "flag of torchrun": "torchrun --nprocs=8 -m scripts.chat_sft",
    "flag behind &&": "cd x && python -m scripts.plan --dept=3",
    "flag through a recipe": "bash runs/multinode.sh --dept=3",
    "flag through SLURM": "sbatch --nodes=1 runs/slurm.sbatch --dept=3",
    "variable": "sky jobs launch runs/sky.yaml --env DEEP=3",
    "variable in front": "POCKETS=1 bash runs/speedrun.sh",
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
    """Of a copy's commands those are checked that the file has not: the file's own are checked above."""
    text = (ROOT / kind).read_text(encoding="utf-8")
    program = kind.endswith(".py")
    found_in = lambda path: usage(path) if program else code(path.read_text(encoding="utf-8"))
    known = [(words, words.variables) for words in statements(found_in(ROOT / kind))]
    places = [f"\n\n    {WRONG[wrong]}\n"] if program else [f"\n```bash\n{WRONG[wrong]}  # words\n```\n"]
    if not program and SPAN.fullmatch(f"`{WRONG[wrong]}`"):
        places.append(f"\nwrite `{WRONG[wrong]}` to see\n")
    for place in places:
        cut = text.index("\n\n", text.index('"""')) if program else len(text)
        (tmp_path / "copy").write_text(text[:cut] + place + text[cut:], encoding="utf-8")
        if program and not re.match(r"(?:[A-Z_]+=\S+ )?(?:python|torchrun|bash)", WRONG[wrong]):
            continue  # a script's help names our programs only
        found = statements(found_in(tmp_path / "copy"))
        with pytest.raises((AssertionError, SystemExit, ModuleNotFoundError, UserError)):
            for words in [words for words in found if (words, words.variables) not in known]:
                check_statement(words, "copy")


def test_commands_are_found_as_they_are_written():
    text = (
        "```bash\nOMP_NUM_THREADS=2 python -m scripts.base_train --depth=4 \\\n  --resume | tail -n 3  # words\n```\n"
    )
    assert list(statements(code(text + "and `A=1 python -m scripts.plan` too, not `plan`"))) == [
        ["python", "-m", "scripts.base_train", "--depth=4", "--resume"], ["tail", "-n", "3"],
        ["python", "-m", "scripts.plan"],
    ]  # fmt: skip
