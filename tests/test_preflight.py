"""What stands in the way of training together is named; every collective is checked for its result."""

import json

import pytest

from scripts import preflight

RANK = {"rank": 0, "host": "a", "index": 0, "torch": "2.13", "code": "1", "python": "3.11", "dtype": "bf16",
        "open_files": 65536}  # fmt: skip


def test_a_good_group_has_no_problem():
    ranks = [RANK, {**RANK, "rank": 1, "index": 1}]
    assert preflight.problems(ranks, [0.0, 0.2], [{"collective": "all_reduce", "bytes": 4, "right": True}]) == []


@pytest.mark.parametrize(
    ("change", "offset", "right", "said"),
    [
        ({"torch": "2.12"}, 0.0, True, "rank 1 on a has torch 2.12, rank 0 has 2.13"),
        ({"code": "2"}, 0.0, True, "check out the same commit"),
        ({"index": 0}, 0.0, True, "two ranks share GPU 0 of a"),
        ({"open_files": 256}, 0.0, True, "rank 1 may open only 256 files"),
        ({}, -3.0, True, "the clock of rank 1 is -3.0 s from rank 0's"),
        ({}, 0.0, False, "all_reduce of 4 bytes gives a wrong answer"),
    ],
)
def test_each_fault_is_told_with_its_remedy(change, offset, right, said):
    ranks = [RANK, {**RANK, "rank": 1, "index": 1, **change}]
    (text,) = preflight.problems(ranks, [0.0, offset], [{"collective": "all_reduce", "bytes": 4, "right": right}])
    assert said in text


@pytest.mark.slow
def test_two_ranks_measure_each_other(torchrun):
    done = torchrun(2, "scripts.preflight", ["--largest=4096", "--turns=1", "--device-type=cpu"])
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["world"] == 2 and found["problems"] == [] and len(found["rows"]) == 5
    assert all(row["right"] and row["seconds"] > 0 for row in found["rows"])
    assert [r["rank"] for r in found["ranks"]] == [0, 1] and "clock" in found
