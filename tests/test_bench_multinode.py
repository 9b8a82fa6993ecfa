"""A host that dies in mid-run and comes back: two network namespaces, two disks, one run (pitfalls 8 and 14)."""

import pytest

from nanochat.tokenizer import Tokenizer
from scripts import bench_multinode
from scripts.bench_multinode import Config, Hosts


@pytest.mark.slow
def test_a_host_that_is_killed_and_brought_back_changes_nothing_pitfall_8(tmp_path):
    """Steps taken again after the restart give the very loss they gave before; the lost host is sent the checkpoint."""
    reason = bench_multinode.why_not()
    if reason:
        pytest.skip(f"two hosts can't be made here: {reason}")
    Tokenizer.from_ranks([bytes([i]) for i in range(256)]).save(tmp_path / "tokenizer")
    cfg = Config(steps=62, save_every=30, down=0.0)  # killed after step 31, well before the checkpoint of step 60
    with Hosts(7) as hosts:
        found = bench_multinode.train_on(hosts, tmp_path / "run", cfg, kills=1)
    assert len(found["killed"]) == 1 and found["exit_codes"] == [0, 0]
    assert len(found["losses"]) == cfg.steps and found["steps_taken_twice"] == found["of_those_equal"] > 0
    assert found["checkpoints_sent"]
