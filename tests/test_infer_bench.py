"""The bench of the engine runs, counts right, and refuses what it cannot run."""

import json

import pytest

from nanochat.errors import UserError
from scripts import infer_bench
from scripts.infer_bench import Config

TINY = {"depth": 2, "aspect_ratio": 16, "head_dim": 16, "vocab_size": 300, "sequence_len": 64, "prompt_tokens": 8}


def test_it_measures_each_batch_size_and_ends_with_json(capsys):
    result = infer_bench.main(Config(**TINY, decode_tokens=6, batch_sizes="1,3", repeats=1, top_k=5))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(result))
    assert [batch["rows"] for batch in result["batches"]] == [1, 3]
    for batch in result["batches"]:
        seconds = batch["first_token_s"] + 5 * batch["step_ms"] / 1e3
        assert batch["tokens_per_s"] == pytest.approx(batch["rows"] * 6 / seconds, rel=0.9)
        assert batch["ratio"] > 0 and batch["bytes_per_step"] > 0


@pytest.mark.parametrize(
    "wrong,words",
    [({"batch_sizes": "x"}, "batch-sizes"), ({"repeats": 0}, "repeats"), ({"prompt_tokens": 0}, "prompt-tokens")]
    + [({"clock": "sun"}, "clock"), ({"source": "mid"}, "mid")],
)
def test_wrong_settings_are_sentences(base_dir, wrong, words):
    with pytest.raises(UserError, match=words):
        infer_bench.main(Config(**{**TINY, **wrong}))
