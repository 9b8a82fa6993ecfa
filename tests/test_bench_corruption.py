"""Damage to any file of a checkpoint, corpus or tokenizer is found and told (the exhaustive run is the bench)."""

import random

import pytest

from nanochat.errors import UserError
from scripts import bench_corruption, bench_save


@pytest.mark.slow
@pytest.mark.parametrize("make", [bench_corruption.make_checkpoints, bench_corruption.make_shards,
                                  bench_corruption.make_tokenizer])  # fmt: skip
def test_every_file_at_many_places_pitfalls_6_10(base_dir, make):
    what, files, use = make(base_dir)
    use(None)
    assert len(files) >= {"checkpoint": 5, "corpus": 3, "tokenizer": 1}[what]
    for file in files:
        counts, missed = bench_corruption.torment(file, use, random.Random(1), max(file.stat().st_size // 12, 1))
        assert missed == [] and counts["flipped"] >= 12 and counts["removed"] == counts["emptied"] == 1


def test_a_damage_that_is_not_found_or_told_badly_is_a_miss(tmp_path):
    file = tmp_path / "part.json"
    file.write_text("content")

    def says(error):
        def use(damaged):
            if damaged is not None and error is not None:
                raise error

        return use

    assert bench_corruption.complaint(file, says(UserError("part.json is damaged: restore it."))) == ""
    assert bench_corruption.complaint(file, says(None)) == "not found"
    assert "KeyError" in bench_corruption.complaint(file, says(KeyError("x")))
    assert "told badly" in bench_corruption.complaint(file, says(UserError("something is wrong")))
    counts, missed = bench_corruption.torment(file, says(None), random.Random(0), 3)
    assert len(missed) == sum(counts.values()) and file.read_text() == "content"


def test_the_saving_bench_gives_its_figures(tmp_path):
    cfg = bench_save.Config(depth=1, vocab_size=300, max_seq_len=16, batch=64, every=3, rounds=1, folder=str(tmp_path))
    found = bench_save.main(cfg)
    assert found["share_beside"] >= 0 and found["share_waiting"] > 0
    assert len(found["runs"]["waiting"][0]["writing"]) == 2 and found["runs"]["none"][0]["blocked"] == 0
    assert list(tmp_path.iterdir()) == []
