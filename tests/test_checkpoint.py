"""Checkpoints: complete or absent, whatever happens while saving; damage is found and named; the right one chosen."""

import dataclasses
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from nanochat import checkpoint, optim, saving
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime

CONFIG = GPTConfig(sequence_len=16, vocab_size=40, n_layer=2, n_head=2, n_kv_head=1, n_embd=24)
RATES = dict.fromkeys(("matrix", *optim.ADAM_RULES), 0.02)
FILES = ["manifest.json", "meta.json", "model.safetensors", "optim.safetensors", "rank_0.json"]


def tiny(seed=0):
    model = GPT(CONFIG)
    model.init_weights(seed)
    return model


def meta(**more):
    return {"stage": "base", "config": dataclasses.asdict(CONFIG), "tokenizer": "f00d", **more}


def write(root, step, seed=0, keep=None, **more):
    """A checkpoint of a fresh tiny model."""
    model = tiny(seed)
    optimizer = optim.MuonAdamW(model.roles(), RATES, Runtime.single())
    return saving.save(
        root, step, model=model, optimizer=optimizer, meta=meta(**more), runtime=Runtime.single(),
        rank_state={"loader": {"epoch": 2}}, keep=keep,
    )  # fmt: skip


@pytest.fixture
def root(base_dir):
    return checkpoint.folder("base") / "d4"


# --- what is written -------------------------------------------------------------------------------------------------


def test_everything_comes_back(root):
    model = tiny(3)
    optimizer = optim.MuonAdamW(model.roles(), RATES, Runtime.single())
    model(torch.arange(16)[None], torch.arange(16)[None]).backward()
    optimizer.step()
    path = saving.save(
        root, 300, model=model, optimizer=optimizer, meta=meta(metrics={"val_bpb": 1.5}), runtime=Runtime.single(),
        rank_state={"rng": [1, 2]},
    )  # fmt: skip
    assert path == root / "step_000300" and sorted(p.name for p in path.iterdir()) == FILES
    saved = checkpoint.load(path)
    saved.verify()
    assert (saved.step, saved.world, saved.meta["metrics"]) == (300, 1, {"val_bpb": 1.5})
    assert saved.rank_state(0) == {"rng": [1, 2]} and saved.rank_states() == [{"rng": [1, 2]}]
    other = tiny(4)
    checkpoint.restore(other, saved.weights(), path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    twin = optim.MuonAdamW(other.roles(), RATES, Runtime.single())
    twin.load_state(saved.optimizer())
    one, two = optimizer.state(), twin.state()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_weights_alone_can_be_saved(root):
    path = saving.save(root, 1, model=tiny(), meta=meta(), runtime=Runtime.single())
    assert checkpoint.load(path).optimizer() is None


def test_weights_say_what_they_are_and_equal_runs_write_equal_bytes(root):
    """One metadata key: with several, safetensors writes them in a random order."""
    first, second = write(root, 5), write(root.with_name("again"), 5)
    with safe_open(first / "model.safetensors", "pt") as file:
        label = json.loads(file.metadata()["nanochat"])
    assert label == {"stage": "base", "step": 5, "tokenizer": "f00d"}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


def test_a_metric_that_is_not_finite_loses_no_checkpoint_and_stays_json(root):
    path = write(root, 1, metrics={"bpb": math.inf})
    assert "Infinity" not in (path / "meta.json").read_text()
    assert checkpoint.load(path).meta["metrics"] == {"bpb": None}


def test_saving_a_step_again_replaces_it(root):
    write(root, 7, seed=1)
    path = write(root, 7, seed=2)
    weights = checkpoint.load(path).weights()
    assert torch.equal(weights["lm_head.weight"], tiny(2).lm_head.weight)
    assert [p.name for p in root.iterdir()] == ["step_000007"]


RANKS = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
import test_checkpoint as t
from nanochat import checkpoint, optim, runtime, saving
from nanochat.errors import UserError
rt = runtime.start("cpu")
model = t.tiny()
optimizer = optim.MuonAdamW(model.roles(), t.RATES, rt)
save = lambda root: saving.save(Path(root), 4, model=model, optimizer=optimizer, meta=t.meta(), runtime=rt,
                                    rank_state={"me": rt.rank})
checkpoint.load(save(sys.argv[1])).verify()
try:
    save("/proc/nowhere/d4")
except UserError as error:
    print("all told", rt.rank, "could not be saved" in str(error), flush=True)
runtime.stop(rt)
"""


@pytest.mark.slow
def test_every_rank_writes_its_own_and_all_hear_of_a_failure(root, on_ranks):
    out = on_ranks(2, RANKS, [str(root)]).stdout
    assert "all told 0 True" in out and "all told 1 True" in out
    saved = checkpoint.load(root / "step_000004")
    assert saved.world == 2 and [s["me"] for s in saved.rank_states()] == [0, 1]
    with pytest.raises(UserError, match="written by 2 ranks, it has no state of rank 2"):
        saved.rank_state(2)


# --- half is nothing (pitfall 6) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["write_tensors", "write_json", "seal", "mkdir", "replace"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_pitfall_6(root, monkeypatch, failing):
    write(root, 1)
    before = {p: p.read_bytes() for p in (root / "step_000001").iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"mkdir": saving.Path, "replace": os}.get(failing, saving)
    monkeypatch.setattr(owner, failing, full)
    with pytest.raises(UserError, match="could not be saved .the disk is full.: free some space"):
        write(root, 2)
    monkeypatch.undo()
    assert [p.name for p in root.iterdir()] == ["step_000001"]
    assert {p: p.read_bytes() for p in (root / "step_000001").iterdir()} == before


SMALL_DISK = """
import os, sys
sys.path.insert(0, "tests")
from pathlib import Path
import test_checkpoint as t
from nanochat.errors import UserError
root = Path(os.environ["NANOCHAT_BASE_DIR"]) / "base_checkpoints" / "d4"
for step in range(1, 100):
    try:
        t.write(root, step)
    except UserError as error:
        print(step, error)
        break
from nanochat import checkpoint
assert checkpoint.complete_steps(root) == list(range(1, step)) and not checkpoint.leftovers(root)
for done in range(1, step):
    checkpoint.load(root / f"step_{done:06d}").verify()
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(base_dir):
    inner = f"mount -t tmpfs -o size=400k tmpfs {base_dir} && exec {sys.executable} -c '{SMALL_DISK}'"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no user namespaces here: a small disk can't be mounted")
    environment = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run(
        [*command, inner.replace('"', '"')], capture_output=True, text=True, env=environment, check=False
    )
    if "mount" in done.stderr and "permi" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout and int(done.stdout.split()[0]) > 1


KILLED = """
import os, sys
sys.path.insert(0, "tests")
from pathlib import Path
import test_checkpoint as t
from nanochat import saving
count = 0
def die_at(event, args):
    global count
    if event in ("os.remove", "os.rmdir") or event in ("open", "os.rename", "os.mkdir") and "d4" in str(args[:1]):
        count += 1
        if count == int(sys.argv[2]):
            os._exit(9)
root = Path(sys.argv[1])
model = t.tiny(2)
sys.addaudithook(die_at)
saving.save(root, 2, model=model, meta=t.meta(), runtime=t.Runtime.single(), keep=1)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 and a test runner with threads
def test_a_kill_at_any_moment_leaves_whole_checkpoints_pitfall_6(root):
    """The saving process ends at its k-th touch of the folder, for every k: a complete step is always there."""
    write(root, 1, seed=1)
    clean = shutil.copytree(root, root.with_name("clean"))
    deaths, k = 0, 1
    while True:
        shutil.rmtree(root)
        shutil.copytree(clean, root)
        child = os.fork()
        if child == 0:  # the parent has torch loaded: no 2 s start for each death
            try:
                sys.argv = ["", str(root), str(k)]
                exec(KILLED, {"__name__": "killed"})
            finally:
                os._exit(3)  # never back into pytest
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        path, _ = checkpoint.newest_good(root)
        assert path is not None and path.name in ("step_000001", "step_000002")
        for step in checkpoint.complete_steps(root):
            checkpoint.load(root / f"step_{step:06d}").verify()
        seed = checkpoint.load(path).step
        assert torch.equal(checkpoint.load(path).weights()["lm_head.weight"], tiny(seed).lm_head.weight)
        if status == 0:
            break
        deaths, k = deaths + 1, k + 1
    assert deaths > 10 and path.name == "step_000002"


def test_a_half_checkpoint_is_ignored_with_a_notice_pitfall_6(root):
    write(root, 1)
    shutil.copytree(root / "step_000001", root / ".tmp-step_000002")
    shutil.copytree(root / "step_000001", root / "step_000003")
    (root / "step_000003" / "manifest.json").unlink()
    assert checkpoint.complete_steps(root) == [1]
    path, notes = checkpoint.newest_good(root)
    assert path.name == "step_000001" and len(notes) == 2 and all("half a checkpoint" in n for n in notes)
    assert checkpoint.find("base", "d4").name == "step_000001"
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.load(root / "step_000003")
    write(root, 2)
    assert checkpoint.complete_steps(root) == [1, 2] and not (root / ".tmp-step_000002").exists()


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_every_damaged_file_is_named_and_the_newest_good_step_used(root, name, damage):
    write(root, 1)
    path = write(root, 2)
    file = path / name
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(UserError, match=name) as caught:
        checkpoint.load(path).verify()
    assert "\n" not in str(caught.value)
    good, notes = checkpoint.newest_good(root)
    assert good.name == "step_000001" and len(notes) == 1


def test_a_changed_manifest_is_itself_named(root):
    """Else the blame would fall on a file that is whole."""
    path = write(root, 1)
    text = (path / "manifest.json").read_text()
    size = str((path / "meta.json").stat().st_size)
    (path / "manifest.json").write_text(text.replace(size, str(int(size) + 1)))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        checkpoint.load(path)


def test_damage_is_found_when_a_file_is_used_too(root):
    path = write(root, 1)
    saved = checkpoint.load(path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(
        UserError, match=r"model\.safetensors is damaged \(its checksum differs\): remove .* older step"
    ):
        saved.weights()


def test_no_good_checkpoint_at_all(root):
    path = write(root, 1)
    (path / "meta.json").unlink()
    found, notes = checkpoint.newest_good(root)
    assert found is None and "meta.json is missing" in notes[0]
    assert checkpoint.newest_good(root.with_name("none")) == (None, [])


def test_a_newer_format_is_refused(root):
    path = write(root, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        checkpoint.load(path)


# --- which one -------------------------------------------------------------------------------------------------------


def test_steps_are_numbers_not_names_pitfall_6(root):
    for step in (999_999, 1_000_000, 300):
        write(root, step)
    assert checkpoint.complete_steps(root) == [300, 999_999, 1_000_000]
    assert checkpoint.find("base", "d4").name == "step_1000000"
    assert checkpoint.find("base", "d4", 300).name == "step_000300"


def test_retention_keeps_the_newest_and_the_one_just_written(root):
    for step in (1, 2, 3):
        write(root, step, keep=2)
    assert checkpoint.complete_steps(root) == [2, 3]
    assert saving.prune(root, saving.Keep(0)) == [2] and checkpoint.complete_steps(root) == [3]
    write(root, 1, keep=1)  # a run that started again under the same tag
    assert checkpoint.complete_steps(root) == [1, 3]
    (root / "step_000003" / "manifest.json").unlink()
    write(root, 2, keep=1)
    assert checkpoint.complete_steps(root) == [2] and (root / "step_000003").exists()


def test_a_fresh_run_sets_earlier_checkpoints_aside(root):
    assert saving.set_aside(root) is None
    write(root, 5)
    (root / "record.jsonl").write_text("{}\n")
    assert saving.set_aside(root) == root / "before_1" and checkpoint.complete_steps(root) == []
    assert checkpoint.complete_steps(root / "before_1") == [5] and (root / "record.jsonl").exists()
    write(root, 6)
    assert saving.set_aside(root).name == "before_2" and checkpoint.tags("base") == []


def test_the_tag_is_the_deepest_else_the_latest(base_dir):
    top = checkpoint.folder("base")
    for number, tag in enumerate(("zebra", "d4", "d12", "apple")):
        write(top / tag, 1)
        os.utime(top / tag, (number, number))
    (top / "d99").mkdir()  # empty: holds nothing to load
    assert checkpoint.find("base").parent.name == "d12"
    for tag in ("d4", "d12"):
        shutil.rmtree(top / tag)
    assert checkpoint.find("base").parent.name == "apple"


def test_what_is_not_there_is_a_sentence_listing_what_is(root):
    with pytest.raises(UserError, match=r"No base checkpoint in .* first with `python -m scripts\.base_train`"):
        checkpoint.find("base")
    write(root, 3)
    with pytest.raises(UserError, match="no complete step 4: there is 3"):
        checkpoint.find("base", "d4", 4)
    with pytest.raises(UserError, match="has the tag 'd8': there is d4"):
        checkpoint.find("base", "d8")
    with pytest.raises(UserError, match=r"make one first with `python -m scripts\.chat_sft`"):
        checkpoint.find("sft")
    with pytest.raises(UserError, match="Source 'mid' is unknown: use one of base, sft, rl"):
        checkpoint.find("mid")


def test_the_older_layout_is_refused_by_name_pitfall_44(root):
    root.mkdir(parents=True)
    for name in ("model_000300.pt", "meta_000300.json", "optim_000300_rank0.pt"):
        (root / name).write_bytes(b"x")
    for tag in (None, "d4"):
        with pytest.raises(UserError, match=r"older nanochat layout \(model_<step>\.pt, pickled\).*train again"):
            checkpoint.find("base", tag)


# --- building --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(monkeypatch):
    from nanochat.tokenizer import Tokenizer

    fake = SimpleNamespace(fingerprint="f00d", vocab_size=40)
    monkeypatch.setattr(Tokenizer, "load", lambda *_: fake)
    return fake


def test_build_model_gives_the_saved_model(root, tokenizer):
    path = write(root, 3, seed=9)
    model, its_tokenizer, its_meta = checkpoint.build_model("base", dtype=torch.bfloat16)
    ids = torch.arange(16)[None]
    assert its_tokenizer is tokenizer and its_meta["step"] == 3 and not model.training
    assert model.compute_dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
    model.compute_dtype = torch.float32
    assert torch.equal(model(ids), tiny(9)(ids))
    assert torch.equal(checkpoint.build_model(path)[0](ids), tiny(9)(ids))


def test_another_tokenizer_is_refused(root, tokenizer):
    write(root, 3)
    tokenizer.fingerprint = "beef"
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        checkpoint.build_model("base")


def test_weights_of_another_shape_are_refused(root):
    path = write(root, 1)
    other = GPT(dataclasses.replace(CONFIG, n_embd=48))
    with pytest.raises(UserError, match="does not fit this model"):
        checkpoint.restore(other, checkpoint.load(path).weights(), path)
