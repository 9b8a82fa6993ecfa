"""Corpora: order and positions, which shard is for validation, and every way a folder of data can be wrong."""

import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, manifest
from nanochat.dataset import HUB, SPLITS, open_corpus
from nanochat.errors import UserError


def write(folder, name, texts, group=4, column="text", kind=None):
    """A parquet file of these texts with row groups of `group`."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(texts, type=kind or pa.string())}), folder / name, row_group_size=group)


def fill(folder, shards=3, documents=10, group=4):
    for s in range(shards):
        write(folder, f"s{s}.parquet", [f"{s}:{i}" for i in range(documents)], group)
    return folder


@pytest.fixture
def folder(tmp_path, base_dir):
    return fill(tmp_path / "data")


@pytest.fixture
def fake_tinyworld(monkeypatch):
    module = types.ModuleType("nanochat.tinyworld")
    module.document = lambda split, i, seed: f"{split} {i} {seed}"
    monkeypatch.setitem(sys.modules, "nanochat.tinyworld", module)
    monkeypatch.setattr("nanochat.tinyworld", module, raising=False)


def take(stream, n):
    return [next(stream) for _ in range(n)]


def texts(batches):
    return [text for _, docs in batches for _, text in docs]


# -- order, positions, keys


def test_one_pass_reads_every_document_in_order(folder):
    corpus = open_corpus(str(folder))
    assert corpus.shards("train") == ["s0.parquet", "s1.parquet"] and corpus.shards("val") == ["s2.parquet"]
    assert texts(corpus.epoch_batches("train")) == [f"{s}:{i}" for s in (0, 1) for i in range(10)]
    assert texts(corpus.epoch_batches("val")) == [f"2:{i}" for i in range(10)]


def test_batches_stay_within_a_row_group_and_hold_at_most_128(tmp_path, base_dir):
    for name in ("a.parquet", "b.parquet"):
        write(tmp_path / "data", name, [str(i) for i in range(400)], group=300)
    sizes = [len(docs) for _, docs in open_corpus(str(tmp_path / "data")).epoch_batches("train")]
    assert sizes == [128, 128, 44, 100]  # as published: what the compared bits per byte depend on


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_position_continues_right_after_its_batch(folder, lanes):
    corpus = open_corpus(str(folder))
    for lane in range(lanes):
        whole = take(corpus.batches("train", lane=lane, lanes=lanes), 16)  # more than two epochs
        for done in range(1, 15):
            position = json.loads(json.dumps(whole[done - 1][0]))
            rest = take(corpus.batches("train", position, lane, lanes), 16 - done)
            assert rest == whole[done:]
    assert whole[-1][0]["epoch"] == 3


@pytest.mark.parametrize("lanes", [2, 3, 7])
def test_lanes_share_the_stream_out_document_by_document(folder, lanes):
    corpus = open_corpus(str(folder))
    stream = texts(take(corpus.batches("train"), 12))
    for lane in range(lanes):
        own = texts(take(corpus.batches("train", lane=lane, lanes=lanes), 12))
        assert own == stream[lane::lanes][: len(own)] and len(own) >= len(stream) // lanes


def test_a_key_reads_its_document_again(folder):
    corpus = open_corpus(str(folder))
    for _, docs in take(corpus.batches("train"), 9):
        for key, text in docs:
            assert corpus.read("train", json.loads(json.dumps(key))) == text
    with pytest.raises(UserError, match="has no document 10"):
        corpus.read("train", (1, 0, 10))


def test_empty_files_and_null_texts_are_no_trouble(tmp_path, base_dir):
    write(tmp_path / "d", "a.parquet", [])
    write(tmp_path / "d", "b.parquet", ["x", None, "y"])
    write(tmp_path / "d", "c.parquet", [])
    write(tmp_path / "d", "d.parquet", ["v"])
    assert texts(take(open_corpus(str(tmp_path / "d")).batches("train"), 2)) == ["x", "", "y"] * 2


# -- validation is one shard, for ever (pitfall 11)


def test_the_validation_shard_is_as_asked_else_the_manifests_else_the_last_name(tmp_path, base_dir):
    asked, listed, last = (fill(tmp_path / name) for name in ("asked", "listed", "last"))
    (listed / "manifest.json").write_text('{"val_shard": "s1.parquet"}')
    assert open_corpus(str(asked), val_shard="s0").shards("val") == ["s0.parquet"]
    assert open_corpus(str(listed)).shards("val") == ["s1.parquet"]
    assert open_corpus(str(last)).shards("val") == ["s2.parquet"]
    for folder in (asked, listed, last):
        corpus = open_corpus(str(folder))
        assert not set(corpus.shards("train")) & set(corpus.shards("val")) and len(corpus.shards("train")) == 2


def test_a_shard_added_later_never_takes_over_validation_pitfall_11(folder):
    open_corpus(str(folder))
    write(folder, "z.parquet", ["late"])
    corpus = open_corpus(str(folder))
    assert corpus.shards("val") == ["s2.parquet"] and "z.parquet" in corpus.shards("train")


def test_another_validation_shard_later_is_refused(folder, base_dir, monkeypatch, tmp_path):
    open_corpus(str(folder), val_shard="s0")
    with pytest.raises(UserError, match=r"has been s0.parquet so far \(written down in .*would now be s1.parquet"):
        open_corpus(str(folder), val_shard="s1")
    (folder / "manifest.json").write_text('{"val_shard": "s1"}')
    with pytest.raises(UserError, match="would now be s1.parquet"):
        open_corpus(str(folder))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))  # other models: another promise
    assert open_corpus(str(folder)).shards("val") == ["s1.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "s0.parquet",
        "s1.parquet",
        "s2.parquet",
    ]


def test_later_stages_inherit_corpus_and_validation_shard(folder, base_dir, monkeypatch, tmp_path):
    """From what tokenizer and checkpoint say, even where nothing else does: in another artefact folder."""
    known = open_corpus(str(folder), val_shard="s1").identity
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    assert dataset.open_inherited(known).identity == known
    assert dataset.open_inherited(known, known["dataset"]).identity == known
    with pytest.raises(UserError, match="would now be s0.parquet"):
        dataset.open_inherited(known, "", "s0")
    assert dataset.open_inherited(known, "tinyworld").name == "tinyworld"
    for nothing in (None, {}):
        with pytest.raises(UserError, match="The corpus climbmix has no"):
            dataset.open_inherited(nothing)


def test_a_validation_shard_that_is_missing_is_refused(folder):
    with pytest.raises(UserError, match="s9.parquet is not in"):
        open_corpus(str(folder), val_shard="s9")
    open_corpus(str(folder))
    (folder / "s2.parquet").unlink()
    with pytest.raises(UserError, match="s2.parquet is not in"):
        open_corpus(str(folder))


def test_the_hubs_validation_shard_is_the_published_one_whatever_else_is_there_pitfall_11(base_dir):
    data = base_dir / HUB["climbmix"].folder
    for name in ("shard_00000.parquet", "shard_00007.parquet", "stray.parquet"):
        write(data, name, ["t"])
    with pytest.raises(UserError, match="no validation shard .*python -m nanochat.dataset .*--dataset tinyworld"):
        open_corpus("climbmix")  # shard_00007 is not taken for it
    write(data, "shard_06542.parquet", ["v"])
    corpus = open_corpus("climbmix")
    assert corpus.shards("train") == ["shard_00000.parquet", "shard_00007.parquet"]
    assert corpus.shards("val") == ["shard_06542.parquet"]
    assert corpus.identity == {"dataset": "climbmix", "val_shard": "shard_06542.parquet"}
    with pytest.raises(UserError, match="is fixed"):
        open_corpus("climbmix", val_shard="shard_00000")


def test_the_published_layouts():
    climb, edu = HUB["climbmix"], HUB["fineweb-edu"]
    assert (climb.repo, climb.folder) == ("karpathy/climbmix-400b-shuffle", "base_data_climbmix")
    assert (climb.train_shards, climb.val_shard) == (6542, "shard_06542.parquet")
    assert (edu.repo, edu.folder) == ("karpathy/fineweb-edu-100b-shuffle", "base_data")
    assert (edu.train_shards, edu.val_shard) == (1822, "shard_01822.parquet")


# -- a run under way keeps the shards it began with


def test_shards_added_later_do_not_move_a_saved_position_pitfall_11(folder):
    corpus = open_corpus(str(folder))
    frozen = json.loads(json.dumps(corpus.frozen("train")))
    whole = take(corpus.batches("train"), 14)
    write(folder, "a_new.parquet", ["new"] * 9)  # sorts before all others
    later = open_corpus(str(folder))
    assert texts(take(later.batches("train", whole[3][0]), 4)) != texts(whole[4:8])  # what freezing prevents
    assert take(later.resumed("train", frozen).batches("train", whole[3][0]), 10) == whole[4:]


def test_a_shard_that_has_gone_or_changed_is_refused_at_resume(folder):
    frozen = open_corpus(str(folder)).frozen("train")
    write(folder, "s1.parquet", ["other"] * 30)
    with pytest.raises(UserError, match=r"1 shards .* changed .*\(s1.parquet\): put them back"):
        open_corpus(str(folder)).resumed("train", frozen)
    (folder / "s0.parquet").unlink()
    with pytest.raises(UserError, match="2 shards"):
        open_corpus(str(folder)).resumed("train", frozen)


def test_a_folder_may_be_moved_but_is_not_another_corpus(folder, tmp_path):
    identity = open_corpus(str(folder)).identity
    moved = open_corpus(str(folder.rename(tmp_path / "moved")))
    assert moved.matches(identity) and moved.identity != identity
    assert not moved.matches({"dataset": "climbmix", "val_shard": "s2.parquet"})
    assert not moved.matches(identity | {"val_shard": "s0.parquet"})


# -- what is wrong, in one sentence


def test_a_missing_corpus_names_the_download_and_tinyworld_pitfall_5(base_dir):
    with pytest.raises(UserError) as error:
        open_corpus("climbmix")
    assert "python -m nanochat.dataset -n 8 --dataset climbmix" in str(error.value)
    assert "`--dataset tinyworld`" in str(error.value) and "no training shard and no validation shard" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "holds no .parquet file"),
        ({"one.parquet": ["a"]}, "holds only one.parquet.*split it into two"),
        ({"a.parquet": ["a"], "b.parquet": []}, "validation shard .*b.parquet is empty: name another with --val-shard"),
    ],
)
def test_folders_that_cannot_be_split_are_refused_pitfall_4(tmp_path, base_dir, files, sentence):
    (tmp_path / "d").mkdir()
    for name, content in files.items():
        write(tmp_path / "d", name, content)
    with pytest.raises(UserError, match=sentence):
        open_corpus(str(tmp_path / "d"))


def test_a_name_that_is_nothing_is_refused(base_dir, tmp_path):
    with pytest.raises(UserError, match="neither a folder nor one of climbmix, fineweb-edu, tinyworld"):
        open_corpus(str(tmp_path / "nowhere"))


def test_a_split_of_empty_files_ends_with_a_sentence_and_does_not_spin_pitfall_4(tmp_path, base_dir):
    for name, content in (("a.parquet", []), ("b.parquet", []), ("v.parquet", ["v"])):
        write(tmp_path / "d", name, content)
    with pytest.raises(UserError, match="train split .* has no documents"):
        next(open_corpus(str(tmp_path / "d")).batches("train"))


@pytest.mark.parametrize("keep", [0, 3, 60, -20])
def test_a_cut_off_file_is_refused_when_the_corpus_is_opened(folder, keep):
    data = (folder / "s1.parquet").read_bytes()
    (folder / "s1.parquet").write_bytes(data[:keep])
    with pytest.raises(UserError, match="s1.parquet is not a whole parquet file: it is damaged"):
        open_corpus(str(folder))


def test_a_file_damaged_inside_is_refused_when_it_is_read(tmp_path, base_dir):
    fill(tmp_path / "d", documents=2000, group=2000)
    data = bytearray((tmp_path / "d" / "s1.parquet").read_bytes())
    data[4:400] = bytes(396)
    (tmp_path / "d" / "s1.parquet").write_bytes(data)
    with pytest.raises(UserError, match="s1.parquet can't be read as parquet .*damaged; replace or remove it"):
        list(open_corpus(str(tmp_path / "d")).epoch_batches("train"))


def test_a_file_without_text_is_refused(tmp_path, base_dir):
    write(tmp_path / "d", "a.parquet", ["x"], column="content")
    write(tmp_path / "d", "b.parquet", ["x"])
    with pytest.raises(UserError, match=r'no column "text" \(it has: content\)'):
        open_corpus(str(tmp_path / "d"))
    write(tmp_path / "d", "a.parquet", [1, 2], kind=pa.int64())
    with pytest.raises(UserError, match='"text" .* holds int64 and not strings'):
        open_corpus(str(tmp_path / "d"))


def test_text_that_is_not_utf8_is_refused(tmp_path, base_dir):
    bad = pa.array([b"\xff\xfe"], type=pa.binary()).view(pa.string())
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"text": bad}), tmp_path / "d" / "a.parquet")
    write(tmp_path / "d", "b.parquet", ["x"])
    with pytest.raises(UserError, match="a.parquet has text that is not UTF-8"):
        next(open_corpus(str(tmp_path / "d")).batches("train"))


# -- the embedded corpus


def test_tinyworld_is_read_as_made_in_virtual_shards(fake_tinyworld):
    corpus = open_corpus("tinyworld")
    batches = take(corpus.batches("train"), 40)
    assert texts(batches)[:3] == ["train 0 0", "train 1 0", "train 2 0"]
    assert texts(batches) == [f"train {i} 0" for i in range(40 * 128)]  # across the first shard's end
    assert corpus.read("train", batches[-1][1][5][0]) == batches[-1][1][5][1]
    assert take(corpus.batches("train", batches[20][0]), 5) == batches[21:26]
    assert len(list(corpus.epoch_batches("val"))) == 4096 // 128
    assert corpus.frozen("train") == [] and corpus.resumed("train", []) is corpus


def test_another_tinyworld_is_another_corpus(fake_tinyworld, monkeypatch):
    identity = open_corpus("tinyworld").identity
    assert open_corpus("tinyworld").matches(identity)
    monkeypatch.setattr(sys.modules["nanochat.tinyworld"], "document", lambda split, i, seed: "other")
    assert not open_corpus("tinyworld").matches(identity)


@pytest.mark.slow
def test_the_real_text(shared_data, base_dir):
    corpus = open_corpus(str(shared_data / "pretrain"))
    assert corpus.shards("val") == ["shard_00011.parquet"] and len(corpus.shards("train")) == 10
    counts = {split: sum(len(docs) for _, docs in corpus.epoch_batches(split)) for split in SPLITS}
    assert counts == {"train": 61_440, "val": 777}


# -- shards that are still arriving ------------------------------------------------------------------------------------


@pytest.fixture
def arriving(base_dir):
    """The hub's folder with the validation shard and the first of three; returns it and what makes a shard arrive."""
    source = HUB["climbmix"]
    folder = base_dir / source.folder
    folder.mkdir()

    def arrive(name):
        table = pa.table({"text": [f"{name} document {i}" for i in range(5)]})
        pq.write_table(table, folder / f".{name}.partial")
        (folder / f".{name}.partial").rename(folder / name)

    for name in (source.shard(0), source.val_shard):
        arrive(name)
    return folder, arrive, source


def test_shards_are_read_while_the_next_ones_are_downloaded(arriving, monkeypatch):
    folder, arrive, source = arriving
    monkeypatch.setattr(
        dataset.time, "sleep", lambda _: arrive(source.shard(2 if (folder / source.shard(1)).exists() else 1))
    )
    corpus = open_corpus("climbmix", shards=3)
    frozen = corpus.frozen("train")
    assert [size is None for _, size in frozen] == [False, True, True]
    with manifest.lock(folder):
        texts = [text for _, docs in corpus.epoch_batches("train") for _, text in docs]
    assert texts == [f"{source.shard(s)} document {i}" for s in range(3) for i in range(5)]
    again = open_corpus("climbmix").resumed("train", frozen)  # a state saved before they had arrived
    assert [text for _, docs in again.epoch_batches("train") for _, text in docs] == texts


def test_a_shard_that_nobody_fetches_is_a_sentence_not_a_wait_pitfall_4(arriving):
    corpus = open_corpus("climbmix", shards=3)
    with pytest.raises(UserError, match="is not there and no download into its folder is under way.*nanochat.dataset"):
        list(corpus.epoch_batches("train"))


def test_a_short_look_at_the_lock_does_not_stop_a_download_that_begins(arriving):
    folder, _, _ = arriving
    assert not manifest.download_under_way(folder)
    with manifest.lock(folder):
        assert manifest.download_under_way(folder)
