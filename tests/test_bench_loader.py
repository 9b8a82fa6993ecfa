"""The loader's bench prints one line of JSON with sensible figures."""

import json

import pytest

from nanochat.errors import UserError
from scripts import bench_loader
from scripts.bench_loader import Config, main


@pytest.mark.parametrize("mode", ["crop", "lossless"])
def test_the_figures_are_one_json_line(capsys, mode):
    main(Config(seconds=0.1, step_ms=1, device_batch_size=2, max_seq_len=256, mode=mode))
    figures = json.loads(capsys.readouterr().out)
    assert figures["training_thread"]["tokens_per_second"] > 0
    assert 0 <= figures["background"]["waited_share"] <= 1


def test_a_real_corpus_needs_its_tokenizer(tmp_path, base_dir, monkeypatch):
    monkeypatch.setattr(bench_loader, "open_corpus", lambda name: None)
    with pytest.raises(UserError, match="no tokenizer"):
        main(Config(dataset="tinyworld"))
    with pytest.raises(UserError, match="more than 0"):
        main(Config(seconds=0))
