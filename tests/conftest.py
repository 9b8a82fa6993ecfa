"""What the tests share: one torch thread, a private artefact folder, real data where it is there, torchrun on gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NANOCHAT_DTYPE", "float32")  # some CPUs would train in bf16, too coarse for equalities
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("NANOCHAT_KERNELS", str(ROOT / ".pytest_cache" / "kernels"))  # one for all base folders


def lacking(reason):
    """Skip the test; where browsers are promised (NANOCHAT_REQUIRE_BROWSER, set by .ci/run) fail it."""
    (pytest.fail if os.environ.get("NANOCHAT_REQUIRE_BROWSER") else pytest.skip)(reason)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests are small: one thread is faster, and two workers then fit two cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    """A private, empty NANOCHAT_BASE_DIR."""
    path = tmp_path / "base"
    path.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    return path


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data for measuring; the test skips where it is missing."""
    path = Path(os.environ.get("NANOCHAT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not (path / "pretrain").is_dir():
        pytest.skip("real data not here: set NANOCHAT_SHARED_DATA to the folder that holds pretrain/ and tasks/")
    return path


@pytest.fixture(scope="session")
def chromium():
    """Path of this machine's Chromium or Chrome."""
    from scripts import visualize

    return visualize.find_browser("") or lacking("there is no Chromium on this machine")


@pytest.fixture(scope="module")
def browser(chromium):
    """A headless Chromium, driven by playwright."""
    try:
        from playwright import sync_api
    except ImportError:
        lacking("playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


def finished(command, env, timeout):
    """Run a command on gloo in the project's root; it must succeed."""
    full = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    full.pop("PYTHONUNBUFFERED", None)  # it writes a line in pieces, and those of two ranks mix
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=full, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.fixture
def on_ranks(tmp_path):
    """`on_ranks(3, code, arguments)`: Python code on so many gloo ranks; returns the completed process.

    What `load` names is imported before the ranks are forked.
    """

    def run(ranks, code, args=(), *, load="nanochat.optim", env=None, timeout=600):
        path = tmp_path / "ranks.py"
        path.write_text(code)
        return finished(["tests/forked.py", ranks, load, path, *args], env, timeout)

    return run


@pytest.fixture
def torchrun():
    """`torchrun(2, "scripts.x", arguments)`: a script as torchrun starts it, which costs seconds of imports a rank."""

    def run(ranks, module, args=(), *, env=None, timeout=600):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return finished([*launcher, "-m", module, "--", *args], env, timeout)

    return run
