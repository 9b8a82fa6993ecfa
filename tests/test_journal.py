"""The Experiment Log: a finished stage's row comes from its record, stands in the table, and is written once."""

import pytest

from nanochat import journal, record
from nanochat.errors import UserError
from scripts import report

LOG = f"# Notes\n\n## Experiment Log\n\n| {' | '.join(journal.COLUMNS)} |\n|{' --- |' * 6}\n\n### After\n"
PLAN = {"config": {"n_layer": 4, "n_embd": 128}, "iterations": 900, "batch": 4096, "world": 1}


def write(base_dir, stage, folder, tag="pocket", ended=True, **summary):
    path = base_dir / folder / tag / "record.jsonl"
    log = record.Record(path, stage=stage, config={"matrix_lr": 0.04, "embedding_lr": 0.3, "seed": 7})
    log.event(
        "start", stage=stage, run="dummy", config={"matrix_lr": 0.04, "embedding_lr": 0.3}, argv=["--matrix-lr=0.04"]
    )
    log.event("plan", plan=PLAN, device="a processor")
    log.eval(900, core=0.1234)
    if ended:
        log.close(**summary)
    return record.read(path)


def test_a_finished_stage_becomes_a_row_of_the_table_and_only_once(base_dir, tmp_path):
    write(base_dir, "base", "base_checkpoints", val_bpb=0.41, seconds=300.0, tokens_per_second=13700.0)
    path = tmp_path / "CLAUDE.md"
    path.write_text(LOG)
    first = report.main(report.Config(log=str(path)))
    lines = path.read_text().splitlines()
    date, run, config, loss, core, notes = first["row"]
    assert lines[6] == "| " + " | ".join(first["row"]) + " |" and lines[7:] == ["", "### After"]
    assert (run, config, loss, core) == (
        "pocket (base)",
        "d=4 C=128, 900 x 4,096 tokens, matrix=0.04",
        "0.4100 bpb",
        "0.1234",
    )
    assert notes == "5.0 min, 13,700 tokens/s, 1 x a processor" and len(date) == 10
    assert report.main(report.Config(log=str(path)))["written"] is False
    assert path.read_text().splitlines() == lines


def test_the_stage_that_ended_last_is_meant(base_dir):
    write(base_dir, "base", "base_checkpoints", seconds=1.0, loss=1.0, time=1e9)
    write(base_dir, "sft", "chatsft_checkpoints", seconds=1.0, loss=2.0, time=2e9)
    write(base_dir, "rl", "chatrl_checkpoints", ended=False)
    assert report.newest_row("")[1] == "pocket (sft)"
    with pytest.raises(UserError, match="named other"):
        report.newest_row("other")


def test_an_unfinished_run_and_a_file_without_a_log_are_refused_in_a_sentence(base_dir, tmp_path):
    rows = write(base_dir, "base", "base_checkpoints", ended=False)
    with pytest.raises(UserError, match="has not finished"):
        journal.row("pocket", "base", rows)
    path = tmp_path / "x.md"
    with pytest.raises(UserError, match="does not exist"):
        journal.append(path, ["a"])
    path.write_text("# x\n")
    with pytest.raises(UserError, match="no heading"):
        journal.append(path, ["a"])
    path.write_text("## Experiment Log\n\n## Next\n\n| a |\n")
    with pytest.raises(UserError, match="no table"):
        journal.append(path, ["a"])
