"""The bench of the engine runs, counts right, and refuses what it cannot run."""

import json

import pytest

from nanochat.errors import UserError
from scripts import infer_bench
from scripts.infer_bench import Config

TINY = {"depth": 2, "aspect_ratio": 16, "head_dim": 16, "vocab_size": 300, "sequence_len": 64, "prompt_tokens": 8}


@pytest.mark.parametrize("hf", [False, pytest.param(True, marks=pytest.mark.slow)])  # transformers: seconds to import
def test_it_measures_each_batch_size_and_ends_with_json(capsys, tmp_path, hf):
    out = tmp_path / "bench.json"
    cfg = Config(**TINY, decode_tokens=6, batch_sizes="1,3", repeats=1, top_k=5, hf=hf, out=str(out), guesses=0)
    result = infer_bench.main(cfg)
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[-1]) == json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert [batch["rows"] for batch in result["batches"]] == [1, 3]
    assert set(result["batches"][1]) >= {"samples", "clients", "floor_ms", "naive_tokens_per_s"}
    for batch in result["batches"]:
        assert all(batch[load]["tokens_per_s"] > 0 for load in ("samples", "clients") if load in batch)
        assert batch["bytes_per_step"] > 0 and ("hf_tokens_per_s" in batch) == hf
    if hf:
        assert result["llama_parameters"] == pytest.approx(result["parameters"], rel=0.5)


@pytest.mark.parametrize(
    "wrong,words",
    [({"batch_sizes": "x"}, "batch-sizes"), ({"repeats": 0}, "repeats"), ({"prompt_tokens": 0}, "prompt-tokens")]
    + [({"clock": "sun"}, "clock"), ({"source": "mid"}, "mid")],
)
def test_wrong_settings_are_sentences(base_dir, wrong, words):
    with pytest.raises(UserError, match=words):
        infer_bench.main(Config(**{**TINY, **wrong}))
