"""A run on a disk that fills up, or turns read-only under it: what was saved stays, and it goes on or stops cleanly.

The disk is a small tmpfs, mounted in a namespace of the test's own; where that is not allowed the tests skip.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import contextlib, dataclasses, io, os, sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_pipeline as t
from nanochat import checkpoint, record
from nanochat.errors import UserError
from scripts import base_train, tok_train

base = Path(os.environ["NANOCHAT_BASE_DIR"])
tok_train.main(tok_train.Config(dataset="tinyworld", vocab_size=512, max_chars=100_000))
root = base / "base_checkpoints" / "full"
cfg = dataclasses.replace(t.BASE, model_tag="full", num_iterations=30, save_every=2, eval_tokens=0, keep=-1)
said = io.StringIO()
try:
    with contextlib.redirect_stdout(said):
        base_train.main(cfg)
except UserError as error:
    print("stopped:", error)
steps = checkpoint.complete_steps(root)
print("saved", steps, "told", said.getvalue().count("The run goes on."))
assert steps == list(range(2, 2 * len(steps) + 1, 2)) and steps and not checkpoint.leftovers(root)
for step in steps:
    checkpoint.load(root / f"step_{step:06d}").verify()
lines = [line for line in said.getvalue().splitlines() if line.startswith("step ")]
print("trained", max(int(line.split()[1].split("/")[0]) for line in lines))
"""
READ_ONLY = """
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_checkpoint as t
from nanochat import checkpoint, saving
from nanochat.runtime import Runtime

base = Path(os.environ["NANOCHAT_BASE_DIR"])
root = base / "base_checkpoints" / "d4"
with saving.Saver(root, Runtime.single()) as saver:
    for step, mode in ((1, "rw"), (2, "ro"), (3, "rw")):
        subprocess.run(["mount", "-o", f"remount,{mode}", str(base)], check=True)
        saver.save(step, model=t.tiny(), meta=t.meta())
        saver._job.exception()
        print(step, saver.news())
print(checkpoint.complete_steps(root), checkpoint.leftovers(root))
checkpoint.load(root / "step_000001").verify()
"""

EXPORT = """
import os
from pathlib import Path
from tiny_model import save_checkpoint
from nanochat import checkpoint, paths
from nanochat.errors import UserError
from scripts import export

disk = Path(os.environ["NANOCHAT_BASE_DIR"])
os.environ["NANOCHAT_BASE_DIR"] = str(disk.parent / "roomy")
save_checkpoint("base", n_layer=1, window_pattern="L")  # tracing takes seconds a layer
paths.free_bytes = lambda path: 10**12  # the check before the export is deceived
for kind in ("hf", "gguf", "torch"):
    try:
        export.main(export.Config(source="base", format=kind, output=str(disk / "out"), check=False))
    except UserError as error:
        print(kind, str(error).replace(str(disk), "DISK"), sorted(p.name for p in disk.iterdir()))
"""


def on_small_disk(base, size, code):
    """Run code with NANOCHAT_BASE_DIR on a tmpfs of this size -> the finished process."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size} tmpfs {base}"
    if not shutil.which("unshare") or subprocess.run([*namespace, mount], check=False, capture_output=True).returncode:
        pytest.skip("a small disk can't be mounted here: no user namespaces")
    script = base.parent / "on_disk.py"
    script.write_text(code)
    command = [*namespace, f"{mount} && exec {sys.executable} {script}"]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": "float32",
           "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_a_full_disk_does_not_end_the_run_at_once_and_costs_nothing_that_was_saved(base_dir):
    done = on_small_disk(base_dir, "4m", RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in ("saved", "trained"))
    assert "stopped: The checkpoint in" in done.stdout and "the disk is full" in done.stdout
    saved = len(lines["saved"].split("]")[0].split(","))
    assert 1 <= saved < 12 and int(lines["saved"].split()[-1]) >= 2  # it went on after failures, then stopped
    assert int(lines["trained"]) > 2 * saved + 2


@pytest.mark.slow
def test_a_disk_that_is_read_only_for_a_while(base_dir):
    done = on_small_disk(base_dir, "4m", READ_ONLY)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two, three, end = done.stdout.splitlines()
    assert "seconds" in one and "Read-only file system" in two and "make it writable" in two and "seconds" in three
    assert end == "[1, 3] []"


@pytest.mark.slow
def test_an_export_that_fills_the_disk_is_a_sentence_and_leaves_nothing(base_dir):
    done = on_small_disk(base_dir, "64k", EXPORT)
    assert done.returncode == 0, done.stdout + done.stderr
    said = "DISK/out can't be written (No space left on device): free some space and run this again. []"
    assert [line.split(" ", 1) for line in done.stdout.splitlines()] == [
        [kind, said] for kind in ("hf", "gguf", "torch")
    ]
