"""scripts/verify_data.py: each kind of damage in a corpus is found and named; good data is called good."""

import hashlib
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import paths
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from scripts import verify_data
from tests.tiny_model import TOKENIZER

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards play chess near old rivers".split()


def texts(n, seed, lines=3):
    draw = random.Random(seed)
    line = lambda: " ".join(draw.choice(WORDS) for _ in range(20))
    return ["\n".join(line() for _ in range(lines)) for _ in range(n)]


def shard(folder, name, documents, group=50):
    pq.write_table(pa.table({"text": documents}), folder / f"{name}.parquet", row_group_size=group)


@pytest.fixture
def corpus(tmp_path, base_dir):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        shard(folder, f"shard_{i}", texts(200, seed=i))
    return folder


def verify(folder, **options):
    return verify_data.main(verify_data.Config(dataset=str(folder), **options))


def complaint(folder, capsys, **options):
    with pytest.raises(UserError, match="must be mended"):
        verify(folder, **options)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem")]


def test_good_data_is_good_and_its_manifest_is_compared(corpus, capsys):
    TOKENIZER.save()
    result = verify(corpus, output=str(corpus / "verdict.json"))
    assert result["problems"] == [] and "no manifest.json" in result["notes"][0]
    assert [(s["name"], s["split"], s["documents"], s["groups"]) for s in result["shards"]] == [
        ("shard_2.parquet", "val", 200, 4), ("shard_0.parquet", "train", 200, 4), ("shard_1.parquet", "train", 200, 4)
    ]  # fmt: skip
    assert paths.read_json(corpus / "verdict.json") == result
    files = {p.name: {"size": p.stat().st_size, "sha256": paths.sha256(p)} for p in corpus.glob("*.parquet")}
    paths.write_json(corpus / "manifest.json", {"val_shard": "shard_2.parquet", "files": files})
    assert verify(corpus)["notes"] == []


def test_bytes_that_changed_since_the_manifest_are_found(corpus, capsys):
    files = {p.name: {"size": p.stat().st_size, "sha256": paths.sha256(p)} for p in corpus.glob("*.parquet")}
    files["shard_0.parquet"]["sha256"] = hashlib.sha256(b"other").hexdigest()
    files["shard_1.parquet"]["size"] += 1
    paths.write_json(corpus / "manifest.json", {"files": files})
    said = complaint(corpus, capsys)
    assert "shard_0.parquet has another SHA-256" in said[0] and "shard_1.parquet has" in said[1] and len(said) == 2
    assert len(complaint(corpus, capsys, checksums=False)) == 1


def test_a_damaged_row_group_is_named_and_the_others_are_still_read(corpus, capsys):
    path = corpus / "shard_1.parquet"
    data = bytearray(path.read_bytes())
    data[200:2000] = bytes(1800)
    path.write_bytes(data)
    said = complaint(corpus, capsys)
    assert len(said) == 1 and "shard_1.parquet can't be read" in said[0]


def test_a_missing_column_is_named(corpus, capsys):
    pq.write_table(pa.table({"content": ["a"]}), corpus / "shard_1.parquet")
    assert 'no column "text" (it has: content)' in complaint(corpus, capsys)[0]


def test_empty_and_duplicate_documents_are_counted(corpus, capsys):
    twice = texts(200, seed=0)
    shard(corpus, "shard_1", [*twice[:60], *[t.upper() for t in twice[60:80]], "", "  \n", None, *texts(100, seed=9)])
    said = complaint(corpus, capsys)
    assert said == ["problem: 80 of 583 documents are duplicates of others (most in shard_1.parquet)."]
    result = pytest.raises(UserError, verify, corpus, shards=2, output=str(corpus / "v.json")) and paths.read_json(
        corpus / "v.json"
    )
    (other,) = (s for s in result["shards"] if s["name"] == "shard_1.parquet")
    assert (other["empty"], other["duplicates"], other["documents"]) == (3, 80, 183)
    assert any("3 of 583 documents are empty" in note for note in result["notes"])


def test_validation_that_stands_in_training_is_found_whole_and_in_part(corpus, capsys):
    held_out = texts(200, seed=2)
    lines = [text.split("\n") for text in held_out]
    patched = [f"Something else.\n{a}\n{b}" for a, b, _ in lines[10:40]]  # two of three lines
    shard(corpus, "shard_1", [*held_out[:5], *patched, *texts(100, seed=9)])
    said = complaint(corpus, capsys)
    assert "5 of 200 validation documents also stand in training" in said[0]
    assert "35 validation documents share half of their long lines" in said[1]


def test_a_tokenizer_that_changes_text_is_caught(corpus, capsys, monkeypatch):
    TOKENIZER.save()
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids: TOKENIZER.decode_bytes(ids).decode().replace("quick", "slow")
    )
    assert "is not itself after encode and decode" in complaint(corpus, capsys)[0]


@pytest.mark.slow
def test_the_embedded_corpus_and_a_limit_on_shards(base_dir, capsys):
    result = verify_data.main(verify_data.Config(dataset="tinyworld", shards=1, sample=0))
    assert [s["split"] for s in result["shards"]] == ["val", "train"] and result["problems"] == []


def test_many_shards_are_as_one_set():
    random_numbers = np.random.default_rng(0).integers(0, 3000, size=(40, 200))
    seen, plain, counts = verify_data.Seen(), set(), []
    for row in random_numbers.tolist():
        counts.append(sum(1 for i, x in enumerate(row) if x in plain or x in row[:i]))
        assert seen.add(row) == counts[-1]
        plain |= set(row)
    assert len(seen.runs) < 8 and sum(map(len, seen.runs)) == len(plain)
    assert seen.known(np.arange(3000, dtype=np.uint64)).tolist() == [x in plain for x in range(3000)]


@pytest.mark.slow
def test_real_shards_are_good(shared_data, base_dir, tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("shard_00000.parquet", "shard_00011.parquet"):
        (folder / name).symlink_to(shared_data / "pretrain" / name)
    result = verify(folder, sample=0)
    assert result["problems"] == [] and result["overlap"]["whole"] == 0
