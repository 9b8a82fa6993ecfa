"""--profile off costs and leaves nothing; a run that is too short for a trace says so. (Real traces: test_pipeline.)"""

import pytest

from nanochat import profiling, record
from nanochat.runtime import Runtime


@pytest.fixture
def log(tmp_path):
    return record.Record(tmp_path / "record.jsonl", stage="base", config={})


def test_without_the_flag_nothing_is_traced(log):
    with profiling.Profile(log, Runtime.single(), False) as traced:
        for step in range(20):
            traced.step(step)
    assert traced.profiler is None and len(record.read(log.path)) == 1 and not (log.path.parent / "profile").exists()


def test_a_run_that_ends_before_the_trace_says_so(log, capsys):
    with profiling.Profile(log, Runtime.single(), True) as traced:
        for step in range(profiling.BEFORE):
            traced.step(step)
    assert f"wrote no trace: it begins after {profiling.BEFORE} steps" in capsys.readouterr().out
    assert not (log.path.parent / "profile").exists()


def test_tracing_ends_after_its_steps_and_the_run_goes_on(log, monkeypatch):
    monkeypatch.setattr(profiling, "BEFORE", 2)
    with profiling.Profile(log, Runtime.single(), True) as traced:
        for step in range(100, 110):
            traced.step(step)
            assert (traced.profiler is None) == (step >= 100 + 2 + profiling.STEPS - 1)
    (row,) = [row for row in record.read(log.path) if row["kind"] == "profile"]
    assert row["steps"] == [102, 103, 104] and row["path"].endswith("steps_000102_to_000104.json.gz")
