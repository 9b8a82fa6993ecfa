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


@pytest.fixture
def torchrun(tmp_path):
    """Run Python code, or `-m module args`, on n gloo ranks of this machine; returns the completed process.

    `torchrun(2, code="...")` or `torchrun(2, module="scripts.x", args=[...])`; `env` adds variables.
    """

    def run(ranks, *, code=None, module=None, args=(), env=None, timeout=240, check=True):
        if code is not None:
            path = tmp_path / "ranks.py"
            path.write_text(code)
            target = [str(path)]
        else:
            target = ["-m", module]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        full = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        command = [*launcher, *target, *(["--"] if args and module else []), *map(str, args)]
        done = subprocess.run(command, cwd=ROOT, env=full, capture_output=True, text=True, timeout=timeout, check=False)
        if check:
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done

    return run
