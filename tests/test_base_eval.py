"""base_eval: measures what is asked, writes it by tag and step, refuses nonsense before any work."""

import csv
import json

import pytest
from test_core_eval import write_bundle
from tiny_model import save_checkpoint

from nanochat import checkpoint, core_eval, record
from nanochat.errors import UserError
from scripts import base_eval


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path)


@pytest.mark.slow
def test_all_three_are_measured_and_written_by_tag_and_step_pitfall_35(base_dir, bundle, capsys):
    for tag in ("d3", "d4"):  # two models of the same step do not overwrite each other
        save_checkpoint("base", tag=tag, step=7, seed=len(tag))
        summary = base_eval.main(
            base_eval.Config(
                model_tag=tag,
                dataset="tinyworld",
                split_tokens=256,
                device_batch_size=2,
                max_per_task=5,
                bundle=str(bundle),
            )  # fmt: skip
        )
        assert 4 < summary["train_bpb"] < 40 and 4 < summary["val_bpb"] < 40  # 256 random bytes: 8 bits and more
    assert set(summary["core_tasks"]) == {"choose", "say"} and len(summary["samples"]) == 7 + 8
    root = checkpoint.folder("base") / "d4"
    assert json.loads((root / "base_eval_000007.json").read_text())["val_bpb"] == summary["val_bpb"]
    tables = sorted((base_dir / "base_eval").iterdir())
    assert [path.name for path in tables] == ["d3_000007.csv", "d4_000007.csv"]
    rows = [[cell.strip() for cell in row] for row in csv.reader(tables[1].read_text().splitlines())]
    assert [row[0] for row in rows] == ["Task", "choose", "say", "CORE"]
    assert float(rows[-1][2]) == pytest.approx(summary["core"], abs=1e-6)
    written = record.read(root / "record.jsonl")
    values = {name for row in written if row["kind"] == "eval" for name in row}
    assert {"core", "train_bpb", "val_bpb"} <= values and any(row["kind"] == "sample" for row in written)
    assert "CORE" in capsys.readouterr().out


def test_only_what_is_asked_is_done(base_dir):
    save_checkpoint("base", tag="d3", step=7)
    summary = base_eval.main(base_eval.Config(eval="bpb", dataset="tinyworld", split_tokens=64))
    assert "val_bpb" in summary and "core" not in summary and "samples" not in summary


def test_a_context_too_short_for_a_prompt_costs_that_prompt_and_not_the_run(base_dir):
    save_checkpoint("base", tag="d3", step=7, sequence_len=23, window_pattern="L")
    shown = base_eval.main(base_eval.Config(eval="sample"))["samples"]
    assert [one["prompt"] for one in shown] == ["My favorite color is", *[""] * 8]  # the others have 23 tokens or more


def test_bpb_does_not_depend_on_the_batch_pitfall_37(base_dir):
    save_checkpoint("base", tag="d3", step=7)
    found = [
        base_eval.main(base_eval.Config(eval="bpb", dataset="tinyworld", split_tokens=640, device_batch_size=rows))
        for rows in (1, 3, 32)
    ]
    assert found[0]["val_bpb"] == pytest.approx(found[1]["val_bpb"], rel=1e-6)
    assert found[0]["train_bpb"] == pytest.approx(found[2]["train_bpb"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"eval": "core,bbp"}, "no bbp: choose of core, bpb, sample"),
        ({"eval": " , "}, "--eval is empty"),
        ({"split_tokens": 0, "device_batch_size": 0}, "2 things are wrong"),
        ({"max_per_task": 0}, "1 or more, or -1"),
        ({"eval": "bpb"}, "No base checkpoint"),
        ({}, "No base checkpoint"),  # before anything is fetched
    ],
)
def test_what_cannot_be_done_is_said_at_once(base_dir, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        base_eval.main(base_eval.Config(**changes))


def test_a_bundle_that_cannot_be_had_is_said_before_the_model_is_read(base_dir, monkeypatch):
    save_checkpoint("base", tag="d3", step=7)
    monkeypatch.setattr(core_eval, "BUNDLE_URL", "file:///nowhere/eval_bundle.zip")
    monkeypatch.setattr(base_eval.checkpoint, "build_model", None)
    with pytest.raises(UserError, match="can't be fetched.*point NANOCHAT_EVAL_BUNDLE at a copy, or leave CORE out"):
        base_eval.main(base_eval.Config())
    with pytest.raises(UserError, match="nowhere.zip does not exist"):
        base_eval.main(base_eval.Config(bundle="nowhere.zip"))
