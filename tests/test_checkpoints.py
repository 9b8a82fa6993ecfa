"""The tool that looks after checkpoints: it tells, mends, sets aside, converts, and never deletes what is complete."""

import json
import os
import shutil

import pytest
import torch
from test_checkpoint import CONFIG, tiny, write
from tiny_model import TOKENIZER

from nanochat import checkpoint
from nanochat.errors import UserError
from nanochat.gpt import GPT
from scripts import chat_sft
from scripts.checkpoints import Config, main


@pytest.fixture
def root(base_dir):
    return checkpoint.folder("base") / "d4"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_list_has_every_step_and_what_lies_about(root, capsys):
    write(root, 1)
    write(root, 20)
    shutil.copytree(root / "step_000001", root / ".tmp-step_000030")
    (root / "before_1").mkdir()
    rows = main(Config("list"))["rows"]
    assert [row["step"] for row in rows if "step" in row] == [1, 20]
    assert [row["for"] for row in rows if "step" in row] == ["resuming"] * 2
    assert sum("half a checkpoint" in row.get("note", "") for row in rows) == 1
    assert sum("set aside" in row.get("note", "") for row in rows) == 1
    assert "step      20" in capsys.readouterr().out


def test_verify_names_what_is_damaged(root, capsys):
    write(root, 1)
    path = write(root, 2)
    main(Config("verify"))
    flip(path / "optim.safetensors")
    with pytest.raises(UserError, match="1 of 2 checkpoints are damaged"):
        main(Config("verify"))
    out = capsys.readouterr().out
    assert "optim.safetensors is damaged" in out and f"{root / 'step_000001'} is good" in out
    main(Config("verify", step=1))


def test_repair_leaves_whole_ones_only_and_deletes_no_complete_one(root):
    for step in (1, 2, 3, 4):
        write(root, step)
    flip(root / "step_000003" / "model.safetensors")
    os.replace(root / "step_000004", root / ".old-step_000004")  # killed between the two renames of a save
    shutil.copytree(root / "step_000001", root / ".tmp-step_000005")
    shutil.copytree(root / "step_000001", root / "step_000006")
    (root / "step_000006" / "manifest.json").unlink()
    main(Config("repair"))
    assert checkpoint.complete_steps(root) == [1, 2, 4]
    assert (root / ".tmp-step_000005").exists()  # so young that it may be a save under way
    main(Config("repair", force=True))
    assert sorted(p.name for p in root.iterdir()) == ["quarantine", "step_000001", "step_000002", "step_000004"]
    assert (root / "quarantine" / "step_000003" / "model.safetensors").exists()
    assert main(Config("repair"))["rows"] == []


def test_one_can_be_set_aside_by_hand_more_than_once(root):
    for _ in range(2):
        write(root, 1)
        main(Config("quarantine", source="base", model_tag="d4", step=1))
    assert sorted(p.name for p in (root / "quarantine").iterdir()) == ["step_000001", "step_000001_1"]
    with pytest.raises(UserError, match="which checkpoint is meant"):
        main(Config("quarantine", source="base"))


# --- the older layout ------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path, base_dir):
    """A folder as the published code writes it: compiled prefix, embeddings in bf16, some keys not yet there."""
    TOKENIZER.save()
    config = {**CONFIG.__dict__, "vocab_size": TOKENIZER.vocab_size}
    model = GPT(type(CONFIG)(**config))
    model.init_weights(5)
    state = {f"_orig_mod.{name}": t.clone() for name, t in model.state_dict().items()}
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.transformer.wte.weight"].bfloat16()
    del state["_orig_mod.x0_lambdas"]
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(state, folder / "model_000700.pt")
    (folder / "meta_000700.json").write_text(json.dumps({"step": 700, "val_bpb": 1.1, "model_config": config}))
    return folder, model


def convert(folder, **more):
    return main(Config("convert", path=str(folder), source="base", model_tag="d2", **more))


def test_the_published_layout_is_converted(old):
    folder, model = old
    convert(folder)
    again, _, meta = checkpoint.build_model("base", "d2")
    assert meta["step"] == 700 and meta["published"]["val_bpb"] == 1.1
    ours, theirs = again.state_dict(), model.state_dict()
    assert torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"]) and not ours["x0_lambdas"].any()
    assert torch.equal(ours["transformer.wte.weight"], theirs["transformer.wte.weight"].bfloat16().float())
    assert checkpoint.load(checkpoint.find("base", "d2")).optimizer() is None
    with pytest.raises(UserError, match="already has a step 700"):
        convert(folder)


def test_a_converted_model_can_be_fine_tuned(old, monkeypatch):
    """As `scripts.checkpoints` says; rates and sizes are those of its meta file, else the published ones."""
    monkeypatch.setitem(TOKENIZER.meta, "dataset", {"dataset": "tinyworld", "val_shard": None})
    TOKENIZER.save()
    path = old[0] / "meta_000700.json"
    user = {"matrix_lr": 0.05, "total_batch_size": -1}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"user_config": user, "total_batch_size": 64}))
    convert(old[0])
    meta = checkpoint.load(checkpoint.find("base", "d2")).meta
    assert meta["user_config"] == {"embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.05}
    assert (meta["plan"]["batch"], meta["plan"]["device_batch_size"]) == (64, 32)
    cfg = chat_sft.Config(model_tag="d2", num_iterations=1, eval_tokens=0, chatcore_every=-1, compile="off")
    assert chat_sft.main(cfg)["step"] == 1


def test_a_pickle_that_would_run_code_is_not_read(old, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"x": Evil()}, old[0] / "model_000700.pt")
    with pytest.raises(UserError, match="can't be read as weights"):
        convert(old[0])
    assert not (tmp_path / "ran").exists()


def test_what_can_not_be_converted_is_a_sentence(old, tmp_path):
    with pytest.raises(UserError, match=r"no model_<step>\.pt of that step: there is \[700\]"):
        convert(old[0], step=3)
    with pytest.raises(UserError, match="needs --path"):
        main(Config("convert"))
    with pytest.raises(UserError, match="not a plain name"):
        main(Config("convert", path=str(old[0]), source="base", model_tag="../d2"))
    meta = json.loads((old[0] / "meta_000700.json").read_text())
    (old[0] / "meta_000700.json").write_text(json.dumps(meta | {"model_config": {"n_layer": 2}}))
    with pytest.raises(UserError, match="does not describe a model of ours"):
        convert(old[0])


def test_the_old_layout_says_how_to_convert_it(old, root):
    root.mkdir(parents=True)
    shutil.copy(old[0] / "model_000700.pt", root)
    with pytest.raises(UserError, match="scripts.checkpoints convert --path"):
        checkpoint.find("base", "d4")
    assert any("older layout: convert it" in row.get("note", "") for row in main(Config("list"))["rows"])


def test_senseless_requests(base_dir):
    with pytest.raises(UserError, match="'mend' is unknown: use list, verify, repair, quarantine, convert"):
        main(Config("mend"))
    with pytest.raises(UserError, match="no such run"):
        main(Config("verify", source="rl"))


def test_weights_alone_are_listed_as_such(root):
    from nanochat import saving
    from nanochat.runtime import Runtime

    saving.save(root, 1, model=tiny(), meta={"stage": "base"}, runtime=Runtime.single())
    assert [row["for"] for row in main(Config("list"))["rows"]] == ["use only (no optimizer)"]
