"""Who may import whom (CONTRIBUTING.md), kept by reading the imports; and that importing does nothing."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = {"errors", "cli", "paths", "runtime", "hardware", "prices", "record"}
LAYERS = [
    GROUND,
    {"kernels"},
    {"attention", "gpt", "cost"},
    {"rules", "banks", "shard", "optim", "schedule", "scaling", "train", "faults", "watch", "profiling", "live"},
    {"tokenizer", "chat", "packing", "manifest", "download", "dataset", "tinyworld", "lanes", "prefetch", "dataloader"},
    {"checkpoint", "nodes", "saving", "resume"},
    {"sampling", "logprobs", "tools", "streaming", "speculation", "sandbox", "execution"},
    {"blocks", "kvcache", "prefix", "paged", "decode", "graphs", "native", "sequence", "scheduler", "engine"},
    {
        "loss_eval",
        "core_eval",
        "chat_eval",
        "samples",
        "plots",
        "report",
        "report_page",
        "pictures",
        "journal",
        "export",
    },
    {"serve"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LAZY_MAY = {"kernels"}  # lower code may import kernels/* inside a function, when chosen


def modules():
    return [p for folder in ("nanochat", "scripts", "tasks") for p in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path):
    """(dotted name, is it at module level) of every import in a file."""
    tree, found = parsed(path), []
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(name, id(node) in top) for name in names]
    return found


def noun(dotted):
    """The second part of nanochat.<noun>...; None for other packages."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "nanochat" and len(parts) > 1 else None


def test_the_library_imports_neither_scripts_nor_tasks_and_scripts_never_scripts():
    for path in modules():
        home = path.relative_to(ROOT).parts[0]
        banned = {"nanochat": ("scripts", "tasks"), "scripts": ("scripts",), "tasks": ("scripts",)}[home]
        for name, _ in imports(path):
            assert name.split(".")[0] not in banned, f"{path.name} imports {name}"


def test_no_module_imports_a_higher_layer():
    for path in sorted((ROOT / "nanochat").rglob("*.py")):
        own = path.relative_to(ROOT / "nanochat").with_suffix("").parts[0]
        if own == "__init__":
            continue
        assert own in LEVEL, f"give nanochat/{own} a layer in {Path(__file__).name}"
        for name, top in imports(path):
            other = noun(name)
            if other in LEVEL and other != own and not (other in LAZY_MAY and not top):
                assert LEVEL[other] <= LEVEL[own], f"nanochat/{own} (layer {LEVEL[own]}) imports {name}"


def test_the_ground_imports_nothing_of_ours_but_errors():
    for own in GROUND:
        for name, _ in imports(ROOT / "nanochat" / f"{own}.py"):
            assert noun(name) in (None, "errors"), f"nanochat/{own}.py imports {name}"


def test_the_model_knows_no_optimizer():
    for name, _ in imports(ROOT / "nanochat" / "gpt.py"):
        assert noun(name) not in ("optim", "schedule", "train") and not name.startswith("torch.optim")


def test_no_pickle_and_no_eval_anywhere_pitfall_45():
    for path in modules():
        tree = parsed(path)
        for name, _ in imports(path):
            assert name.split(".")[0] not in ("pickle", "dill", "cloudpickle", "marshal"), f"{path.name} imports {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path.name}:{node.lineno} calls {node.func.id}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert options.get("weights_only") == "True", f"{path.name}:{node.lineno} calls torch.load unsafely"


@pytest.mark.slow
def test_every_script_can_be_imported_without_doing_anything_pitfall_50(tmp_path):
    names = [f"scripts.{p.stem}" for p in (ROOT / "scripts").glob("*.py") if p.stem != "__init__"]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    env = {"HOME": str(tmp_path), "PATH": "", "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_every_module_is_named_by_a_test_pitfall_43():
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    for path in modules():
        name = (
            path.parent.name if path.parent.name in ("serve", "tinyworld", "export") else path.stem
        )  # packages tested as one
        assert name == "__init__" or re.search(rf"\b{name}\b", text), f"no test speaks of {path.relative_to(ROOT)}"


def test_every_import_is_declared_pitfall_49():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = (
        " ".join(sum(project["optional-dependencies"].values(), project["dependencies"])).lower().replace("-", "_")
    )
    renamed = {"yaml": "pyyaml", "triton": "torch"}  # triton comes with the CUDA build of torch
    for path in modules():
        for name, _ in imports(path):
            package = name.split(".")[0]
            if package not in sys.stdlib_module_names and package not in ("nanochat", "scripts", "tasks", "__future__"):
                assert renamed.get(package, package).lower() in declared, f"{path.name} imports undeclared {package}"


@pytest.mark.slow
def test_stages_run_from_any_folder_pitfall_49(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "scripts.plan", "--depth=4"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr
