"""A manifest says what each shard should be, and the loader believes nothing else."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, manifest
from nanochat.errors import UserError


@pytest.fixture
def folder(tmp_path, base_dir):
    path = tmp_path / "corpus"
    path.mkdir()
    for i in range(3):
        pq.write_table(pa.table({"text": [f"shard {i} document {d}" for d in range(40)]}), path / f"s{i}.parquet")
    sizes = {p.name: {"size": p.stat().st_size, "sha256": manifest.sha256(p)} for p in sorted(path.glob("*.parquet"))}
    manifest.write(path, {"files": sizes, "val_shard": "s2.parquet"})
    return path


def read_all(folder):
    corpus = dataset.open_corpus(str(folder))
    for split in dataset.SPLITS:
        for _ in corpus.epoch_batches(split):
            pass


@pytest.mark.parametrize("name", ["s0.parquet", "s1.parquet", "s2.parquet", "manifest.json"])
@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_is_found_before_the_shard_is_used(folder, name, at):
    read_all(folder)
    data = bytearray((folder / name).read_bytes())
    data[int(at * len(data))] ^= 4
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is (damaged|not)") as said:
        read_all(folder)
    assert "\n" not in str(said.value)


def test_damage_to_the_name_of_the_checksum_is_found_too(folder):
    """Else the manifest would count as one that never had a checksum."""
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"digest"', '"digesu"'))
    with pytest.raises(UserError, match="manifest.json is damaged"):
        manifest.read(folder)


@pytest.mark.parametrize("name", ["s0.parquet", "s1.parquet", "s2.parquet"])
def test_a_cut_shard_is_found(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{name} is (damaged|not a whole parquet file)"):
        read_all(folder)


def test_a_shard_is_read_through_once_a_process(folder, monkeypatch):
    corpus, count = dataset.open_corpus(str(folder)), []
    monkeypatch.setattr(manifest, "sha256", lambda path: count.append(path.name))
    monkeypatch.setattr(corpus._manifest, "files", {name: {"sha256": None} for name in ("s0.parquet", "s1.parquet")})
    for _ in range(2):
        list(corpus.epoch_batches("train"))
    assert count.count("s1.parquet") <= 1


def test_no_manifest_no_check_and_an_old_one_without_a_digest_still_counts(folder):
    content = json.loads((folder / "manifest.json").read_text())
    del content["digest"]
    (folder / "manifest.json").write_text(json.dumps(content))
    assert manifest.read(folder) == content
    (folder / "manifest.json").unlink()
    assert manifest.read(folder) == {}
    read_all(folder)


def test_a_manifest_that_has_gone_is_missed(folder):
    read_all(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing.*restore it"):
        read_all(folder)
