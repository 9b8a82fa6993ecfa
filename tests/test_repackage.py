"""Any folder or dataset becomes shuffled shards: nothing lost, nothing twice, the same bytes however often stopped."""

import dataclasses
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, manifest
from nanochat.errors import UserError
from scripts import repackage

TEXTS = [f"Document {i} says {'word ' * (i % 7)}." for i in range(500)]


@pytest.fixture
def source(tmp_path):
    """Parquet, JSON lines (one compressed) and plain text, at two depths."""
    folder = tmp_path / "source"
    (folder / "deep").mkdir(parents=True)
    pq.write_table(pa.table({"text": TEXTS[:200], "url": ["x"] * 200}), folder / "a.parquet", row_group_size=64)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[200:350]))
    with gzip.open(folder / "deep" / "c.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": t}) + "\n\n" for t in TEXTS[350:498])
    for i in (498, 499):
        (folder / f"d{i}.txt").write_text(TEXTS[i])
    (folder / "notes.md").write_text("not a document")
    return folder


def run(source, out, **more):
    cfg = repackage.Config(source=str(source), output=str(out), shards=3, piece=64)
    return repackage.main(dataclasses.replace(cfg, **more))


def read(out):
    return {p.name: pq.read_table(p)["text"].to_pylist() for p in sorted(out.glob("*.parquet"))}


def test_every_document_once_shuffled_and_the_manifest_says_what_there_is(source, tmp_path, base_dir):
    out = tmp_path / "out"
    said = run(source, out)
    shards = read(out)
    flat = [text for texts in shards.values() for text in texts]
    assert sorted(flat) == sorted(TEXTS) and flat != TEXTS
    assert [len(texts) for texts in shards.values()] == [said["files"][name]["documents"] for name in shards]
    assert all(60 < len(texts) < 190 for texts in shards.values())  # 125 each, by dice
    first = [TEXTS.index(text) for text in shards["shard_00000.parquet"]]
    assert first != sorted(first) and min(first) < 100 and max(first) > 400
    assert said["val_shard"] == "shard_00003.parquet" and said["documents"] == 500
    assert sum(one["characters"] for one in said["files"].values()) == sum(map(len, TEXTS))
    corpus = dataset.open_corpus(str(out))
    assert corpus.shards("val") == ["shard_00003.parquet"] and len(corpus.shards("train")) == 3
    assert {p.name for p in out.iterdir()} == {*shards, "manifest.json"}


@pytest.mark.parametrize("after", [0, 1, 4, 9, 16, 19, 22, 25])
def test_stopped_anywhere_the_same_command_gives_the_same_bytes(source, tmp_path, monkeypatch, after):
    """The process ends at its n-th atomic write, half a file lying about."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(source, whole)
    real, count = repackage.paths.atomic_write, [0]

    def dies(path, mode="wb"):
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        return real(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(repackage.paths, "atomic_write", dies)
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    run(source, out)
    names = [p.name for p in whole.glob("*.parquet")]
    assert len(names) == 4 and all((whole / n).read_bytes() == (out / n).read_bytes() for n in names)


def test_done_is_done_and_another_command_is_refused(source, tmp_path):
    out = tmp_path / "out"
    first = run(source, out)
    assert run(source, out) == manifest.read(out) == first | {"digest": manifest.digest(first)}
    with pytest.raises(UserError, match="already holds shards made otherwise"):
        run(source, out, seed=1)


def test_a_source_that_has_changed_is_not_mixed_with_what_was_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(repackage, "gather", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(source, tmp_path / "out")
    (source / "b.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(UserError, match="its source has changed"):
        run(source, tmp_path / "out")


@pytest.mark.slow
def test_a_dataset_is_streamed_and_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    """A local folder stands for the hub: the same library, the same stream."""
    only = tmp_path / "only"
    only.mkdir()
    (source / "b.jsonl").rename(only / "b.jsonl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(f"hf:{only}", whole)
    assert sorted(sum(read(whole).values(), [])) == sorted(TEXTS[200:350])
    real, count = repackage.streamed, [0]

    def breaks(cfg, state):
        for pair in real(cfg, state):
            count[0] += 1
            if count[0] == 100:
                raise ConnectionError
            yield pair

    with monkeypatch.context() as patch:
        patch.setattr(repackage, "streamed", breaks)
        with pytest.raises(ConnectionError):
            run(f"hf:{only}", out)
    run(f"hf:{only}", out)
    assert read(out) == read(whole)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.parquet", b"PAR1 no", r"x\.parquet can't be read"),
        ("x.jsonl", b'{"text": "a"}\n{"te', r"x\.jsonl can't be read"),
        ("x.jsonl", b'{"body": "a"}\n', r"x\.jsonl line 1 has no field 'text' \(it has body\).*--column"),
        ("x.jsonl", b'{"text": 3}\n', "holds int and not text"),
        ("x.jsonl.gz", b"\x1f\x8b\x08\x00", r"x\.jsonl\.gz can't be read"),
        ("x.txt", b"\xff\xfe\xfa", r"x\.txt can't be read"),
        ("x.md", b"", "holds none of"),
    ],
)
def test_what_can_not_be_read_is_a_sentence(tmp_path, name, content, said):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_senseless_settings_are_refused_together(tmp_path):
    with pytest.raises(UserError, match=r"(?s)--output is missing.*--shards=0 must be.*--source=nowhere is no folder"):
        repackage.main(repackage.Config(source="nowhere", shards=0))


def test_too_few_documents_for_so_many_shards(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one\n\ntwo\n")
    with pytest.raises(UserError, match="too few documents for --shards=3"):
        run(tmp_path / "in", tmp_path / "out", lines=True)
