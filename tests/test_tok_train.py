"""scripts/tok_train.py and scripts/tok_eval.py: whole stages on a small folder of parquet."""

import io
import json
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from tiny_model import TOKENIZER, save_checkpoint
from tqdm import tqdm

from nanochat import checkpoint, record
from nanochat.dataset import open_corpus
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer, kept_path, tokenizer_path
from scripts import tok_eval, tok_train

WORDS = "the cat sat on a mat while seven small hungry birds sang about the weather in Paris and 1234 more".split()


@pytest.fixture
def folder(tmp_path):
    """Two training shards and a validation shard of 40 documents each; every document says where it is from."""
    path = tmp_path / "corpus"
    path.mkdir()
    for shard in "abc":
        texts = [f"{shard}{i} " + " ".join(WORDS[(i + j) % 18] for j in range(i % 30)) for i in range(40)]
        pq.write_table(pa.table({"text": texts}), path / f"shard_{shard}.parquet", row_group_size=16)
    return path


@pytest.fixture
def offline(monkeypatch):
    def no_net(name):
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", no_net)


def texts_read(folder, **flags):
    cfg = tok_train.Config(dataset=str(folder), **flags)
    seen = tok_train.Seen()
    with tqdm(file=io.StringIO()) as bar:
        corpus = open_corpus(cfg.dataset)
        return list(tok_train.training_texts(corpus, cfg, seen, bar)), seen


def test_one_pass_over_the_training_shards_and_none_of_validation(folder, base_dir):
    texts, seen = texts_read(folder)
    assert [text.split()[0] for text in texts] == [f"{shard}{i}" for shard in "ab" for i in range(40)]
    assert seen == tok_train.Seen(80, sum(map(len, texts)))


def test_documents_are_capped_and_reading_stops_at_max_chars(folder, base_dir):
    texts, seen = texts_read(folder, doc_cap=10, max_chars=95)
    assert max(map(len, texts)) == 10
    assert 95 <= seen.chars == sum(map(len, texts)) < 95 + 10


def test_main_writes_a_tokenizer_that_remembers_its_corpus_pitfall_50(folder, base_dir, capsys):
    """Importing the script did nothing; main(cfg) is callable and returns what it did. Progress is shown (51)."""
    cfg = tok_train.Config(dataset=str(folder), vocab_size=300)
    result = tok_train.main(cfg)
    tokenizer = Tokenizer.load()
    assert result["fingerprint"] == tokenizer.fingerprint and result["vocab_size"] == tokenizer.vocab_size == 300
    assert tokenizer.meta == {
        "dataset": {"dataset": str(folder), "val_shard": "shard_c.parquet"},
        "doc_cap": 10_000,
        "documents": 80,
        "chars": result["chars"],
    }
    out, err = capsys.readouterr()
    assert "300 tokens from" in out and "chars" in err
    rows = record.read(base_dir / "tokenizer" / "record.jsonl")
    assert [row["kind"] for row in rows] == ["start", "summary"] and rows[1]["fingerprint"] == result["fingerprint"]
    before = (base_dir / "tokenizer" / "tokenizer.json").read_bytes()
    tok_train.main(cfg)
    assert (base_dir / "tokenizer" / "tokenizer.json").read_bytes() == before


def test_another_tokenizer_is_kept_for_the_models_that_need_it(folder, base_dir, capsys):
    save_checkpoint("base", "d3")  # with a tokenizer of its own
    before = tokenizer_path().read_bytes()
    new = tok_train.Config(dataset=str(folder), vocab_size=275)
    tok_train.main(new)
    kept = kept_path(TOKENIZER.fingerprint)
    assert kept.read_bytes() == before and str(kept) in capsys.readouterr().out
    with pytest.raises(UserError, match=f"another tokenizer.*copy {kept} to tokenizer.json"):
        checkpoint.build_model("base", "d3")
    shutil.copy(kept, tokenizer_path())  # as told
    checkpoint.build_model("base", "d3")
    tok_train.main(new), tok_train.main(new)  # the same again is no other one
    assert [path.name for path in kept.parent.glob("before_*")] == [kept.name]


def test_progress_is_a_bar_that_ends_full_and_names_the_phase_pitfall_51(folder, base_dir, capsys):
    tok_train.main(tok_train.Config(dataset=str(folder), vocab_size=280))
    err = capsys.readouterr().err
    assert "reading:" in err and "merging: 100%" in err


def test_a_tokenizer_that_loses_text_is_never_saved(folder, base_dir, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "something else")
    with pytest.raises(RuntimeError, match="does not give back"):
        tok_train.main(tok_train.Config(dataset=str(folder), vocab_size=280))
    assert not (base_dir / "tokenizer" / "tokenizer.json").exists()


def test_impossible_flags_are_all_listed_before_anything_is_read(base_dir):
    with pytest.raises(UserError) as error:
        tok_train.main(tok_train.Config(dataset="tinyworld", max_chars=0, doc_cap=-1, vocab_size=264))
    for flag in ("--max-chars=0", "--doc-cap=-1", "--vocab-size=264 must be 265 or more"):
        assert flag in str(error.value)
    assert list(base_dir.iterdir()) == []


def run_module(module, *args, **env):
    command = [sys.executable, "-m", module, *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)


def test_a_missing_corpus_ends_the_command_with_one_sentence(base_dir):
    done = run_module("scripts.tok_train", NANOCHAT_BASE_DIR=str(base_dir))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert "python -m nanochat.dataset" in done.stderr and "--dataset tinyworld" in done.stderr
    assert not (base_dir / "tokenizer").exists()


def test_more_vocabulary_than_the_text_gives_is_refused_and_nothing_is_saved(folder, base_dir):
    with pytest.raises(UserError, match="give --vocab-size="):
        tok_train.main(tok_train.Config(dataset=str(folder), vocab_size=30_000))
    assert not (base_dir / "tokenizer" / "tokenizer.json").exists()


# -- tok_eval ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(folder, base_dir):
    return tok_train.main(tok_train.Config(dataset=str(folder), vocab_size=300))


def test_eval_measures_ours_and_says_why_the_others_are_missing(trained, folder, offline, capsys):
    capsys.readouterr()
    result = tok_eval.main(tok_eval.Config())
    assert set(result["bytes_per_token"]) == {"ours"} and set(result["missing"]) == {"gpt2", "cl100k_base"}
    ours = result["bytes_per_token"]["ours"]
    assert set(ours) == {"news", "korean", "code", "math", "science", "train", "val"}
    assert ours["train"] > 2 > ours["korean"] >= 1  # learnt the one, never saw the other
    assert result["dataset"]["dataset"] == str(folder)
    out = capsys.readouterr().out
    assert "ours (300)" in out and "gpt2 can't be fetched" in out and f"{ours['news']:.3f}" in out


def test_eval_says_nothing_of_a_split_without_text(folder, base_dir, offline):
    for shard in "ab":
        table = pa.table({"text": pa.array([], type=pa.string())})
        pq.write_table(table, folder / f"shard_{shard}.parquet")
    tok_train.main(tok_train.Config(dataset=str(folder), vocab_size=265))
    assert set(tok_eval.main(tok_eval.Config())["bytes_per_token"]["ours"]) == {*tok_eval.TEXTS, "val"}


def test_eval_compares_where_the_others_can_be_had(trained, monkeypatch, capsys):
    ranks = {bytes([b]): b for b in range(256)}
    specials = {"<|endoftext|>": 256}
    bytewise = tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=specials)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bytewise)
    result = tok_eval.main(tok_eval.Config())
    assert result["missing"] == {} and set(result["bytes_per_token"]["gpt2"].values()) == {1.0}
    lead = 100 * (result["bytes_per_token"]["ours"]["train"] - 1)
    assert f"1.000 (+{lead:.1f} %)" in capsys.readouterr().out


def test_eval_refuses_a_tokenizer_that_loses_text():
    lossy = Tokenizer.from_ranks([bytes([b]) for b in range(256)])
    lossy.decode = lambda ids: "lost"
    with pytest.raises(RuntimeError, match="does not give back"):
        tok_eval.bytes_per_token(lossy, "text")


def test_eval_without_a_tokenizer_is_one_sentence(base_dir):
    with pytest.raises(UserError, match=r"python -m scripts\.tok_train"):
        tok_eval.main(tok_eval.Config())


def test_the_texts_are_long_enough_to_measure_and_in_their_scripts():
    assert all(len(text.encode()) > 600 for text in tok_eval.TEXTS.values())
    assert sum("가" <= c <= "힣" for c in tok_eval.KOREAN) > 200


@pytest.mark.slow
def test_on_real_text_the_tokenizer_compresses_english_over_three_and_a_half_fold(shared_data, base_dir, offline):
    folder = shared_data / "pretrain"
    tok_train.main(tok_train.Config(dataset=str(folder), vocab_size=8192, max_chars=10_000_000))
    ours = tok_eval.main(tok_eval.Config())["bytes_per_token"]["ours"]
    assert ours["val"] > 3.5 and ours["news"] > 3.3 > ours["code"]
    assert json.loads((base_dir / "tokenizer" / "tokenizer.json").read_text())["meta"]["doc_cap"] == 10_000
