"""Pretraining corpora: which documents there are, in which order, and which are kept for validation.

    climbmix, fineweb-edu   shards of the hub, fetched with `python -m nanochat.dataset -n 8 --dataset climbmix`
    tinyworld               embedded in the project, made as it is read, no download
    FOLDER                  any local folder of parquet files with a column `text`

A corpus is a list of shards a split; a document is a row of a shard. Validation is one shard, fixed by name, and no
training document ever comes from it: on the hub the published one; for a FOLDER `--val-shard`, else what its
manifest.json says, else the last name in sorted order. For a FOLDER the choice is written down in the artefact folder
at first use: it is a promise about the models kept there (and the data may lie on a disk that can't be written).

Reading a stream gives positions, small JSON objects from which it can be continued exactly. They count shards in the
list as it was when the run began: `frozen` gives that list to be saved with the position, `resumed` takes it back and
refuses when a shard has gone or changed. Shards added later therefore change nothing for a run under way.
"""

import abc
import hashlib
import itertools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import manifest
from nanochat.errors import UserError
from nanochat.paths import base_dir, read_json, write_json

SPLITS = ("train", "val")
BATCH = 128  # documents read at a time, as published
CACHE_BYTES = 256 * 2**20  # of decoded row groups kept, beyond the two newest
PATIENCE = 30.0  # seconds between two warnings that a shard has not arrived
TINYWORLD_SEED = 0
TINYWORLD_SHARD = 4096  # documents
TINYWORLD_TRAIN = 16_384  # shards: 67 million documents before the first repeats

log = logging.getLogger(__name__)

Position = dict[str, int]  # {"epoch" from 1, "shard", "index": where the next document is, "documents" so far}
Key = tuple[int, int, int]  # epoch, shard, index: one document of a stream
Docs = list[tuple[Key, str]]
START: Position = {"epoch": 1, "shard": 0, "index": 0, "documents": 0}


@dataclass(frozen=True)
class HubCorpus:
    """A data set on the hub in the published layout: shards numbered from 0, the last of them for validation."""

    repo: str
    train_shards: int
    folder: str  # below the artefact folder
    revision: str = "main"  # where a first download begins: the commit if it is known

    def shard(self, index: int) -> str:
        """The file name of a shard."""
        return f"shard_{index:05d}.parquet"

    @property
    def val_shard(self) -> str:
        """The published validation shard."""
        return self.shard(self.train_shards)


HUB = {
    "climbmix": HubCorpus(
        "karpathy/climbmix-400b-shuffle", 6542, "base_data_climbmix", "915333b4f8b8684f39aeaafea600fea6f43fb703"
    ),
    "fineweb-edu": HubCorpus("karpathy/fineweb-edu-100b-shuffle", 1822, "base_data"),
}


def open_corpus(name: str = "climbmix", val_shard: str | None = None, shards: int | None = None) -> "Corpus":
    """The corpus of `--dataset name`: climbmix, fineweb-edu, tinyworld or a folder. UserError: missing or unusable.

    `shards` of a hub's corpus: its first so many training shards, waited for if they are still arriving.
    """
    if name in HUB or name == "tinyworld":
        fixed = HUB[name].val_shard if name in HUB else None
        if val_shard and _with_suffix(val_shard) != fixed:
            raise UserError(f"--val-shard is for folders: the validation shard of {name} is fixed ({fixed}).")
        return _open_hub(name, shards) if name in HUB else TinyWorld()
    return _open_folder(name, val_shard)


def open_inherited(known: dict | None, name: str = "", val_shard: str = "", shards: int | None = None) -> "Corpus":
    """The corpus of the flags, else that of an earlier stage; `known` is its identity, in tokenizer or checkpoint.

    Its validation shard is inherited too, where none is asked for.
    """
    known = known or {"dataset": "climbmix"}
    if name in ("", known["dataset"]):
        name, val_shard = known["dataset"], val_shard or known.get("val_shard") or ""
    return open_corpus(name, val_shard or None, shards)


class Corpus(abc.ABC):
    """Documents of two splits. `identity` says in JSON which; equal identities mean the same documents.

    A subclass tells `shards`, `spans` and `texts`.
    """

    def __init__(self, name: str, identity: dict):
        self.name = name
        self.identity = identity

    @abc.abstractmethod
    def shards(self, split: str) -> list[str]:
        """The names of a split's shards, in reading order."""

    @abc.abstractmethod
    def spans(self, split: str, shard: int) -> list[tuple[int, int]]:
        """The runs [first, last) of documents that a shard stores together (row groups)."""

    @abc.abstractmethod
    def texts(self, split: str, shard: int, rows: range) -> list[str]:
        """These documents of a shard; `rows` lies within one span."""

    def matches(self, identity: dict) -> bool:
        """Whether positions of the corpus with this identity mean the same documents here."""
        return identity == self.identity

    def frozen(self, split: str) -> list:
        """What to save beside a position, JSON: the shards that its numbers mean."""
        return []

    def resumed(self, split: str, frozen: list) -> "Corpus":
        """This corpus with the shards of `frozen`. UserError: they are no longer all there, or have changed."""
        return self

    def batches(
        self, split: str, start: Position | None = None, lane: int = 0, lanes: int = 1, size: int = BATCH
    ) -> Iterator[tuple[Position, Docs]]:
        """The endless stream, epoch after epoch, as (position, documents); `start=position` continues after that one.

        The d-th document of the whole stream belongs to lane d % lanes; only the documents of `lane` are given (and
        read), about `size` at a time. UserError: a whole pass finds no document.
        """
        begin = start or START
        while True:
            last = begin
            for last, docs in self._rest_of_epoch(split, begin, lane, lanes, size):
                yield last, docs
            if begin["shard"] == begin["index"] == 0 and last is begin:
                raise UserError(f"The {split} split of {self.name} has no documents: all its shards are empty.")
            begin = last | {"epoch": last["epoch"] + 1, "shard": 0, "index": 0}

    def epoch_batches(
        self, split: str, lane: int = 0, lanes: int = 1, size: int = BATCH
    ) -> Iterator[tuple[Position, Docs]]:
        """One finite pass, as `batches` gives it."""
        yield from self._rest_of_epoch(split, START, lane, lanes, size)

    def read(self, split: str, key: Key) -> str:
        """The text of one document, by the key that came with it."""
        _, shard, index = key
        return self.texts(split, shard, range(index, index + 1))[0]

    def _rest_of_epoch(
        self, split: str, start: Position, lane: int, lanes: int, size: int
    ) -> Iterator[tuple[Position, Docs]]:
        epoch, seen = start["epoch"], start["documents"]
        for shard in range(start["shard"], len(self.shards(split))):
            done = start["index"] if shard == start["shard"] else 0
            for first, last in self.spans(split, shard):
                for begin in range(max(first, done), last, size * lanes):
                    end = min(begin + size * lanes, last)
                    own = range(begin + (lane - seen) % lanes, end, lanes)
                    docs = [((epoch, shard, i), text) for i, text in zip(own, self.texts(split, shard, own))]
                    seen += end - begin
                    yield {"epoch": epoch, "shard": shard, "index": end, "documents": seen}, docs


# -- parquet ----------------------------------------------------------------------------------------------------------


class ParquetCorpus(Corpus):
    """Parquet files of one folder, read a row group at a time."""

    def __init__(
        self, name: str, identity: dict, folder: Path, files: dict[str, list[str]], remedy: str, arriving: bool = False
    ):
        super().__init__(name, identity)
        self.arriving = arriving  # files may still be on their way
        self.folder = folder
        self.files = files
        self.remedy = remedy  # what to do about a file that can't be read
        self._spans: dict[str, list[tuple[int, int]]] = {}
        self._groups = _Recent()
        self._manifest = manifest.Checked(folder)

    def shards(self, split: str) -> list[str]:
        return self.files[split]

    def spans(self, split: str, shard: int) -> list[tuple[int, int]]:
        name = self.files[split][shard]
        if name not in self._spans:
            with self._open(name) as file:
                counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            ends = itertools.accumulate(counts)
            self._spans[name] = [(end - count, end) for count, end in zip(counts, ends)]
        return self._spans[name]

    def texts(self, split: str, shard: int, rows: range) -> list[str]:
        if not rows:
            return []
        spans = self.spans(split, shard)
        group = next((g for g, (first, last) in enumerate(spans) if first <= rows[0] and rows[-1] < last), None)
        name = self.files[split][shard]
        if group is None:
            raise UserError(f"{self.folder / name} has no document {rows[-1]}: it has changed since it was read.")
        column = self._groups.get((name, group), lambda: self._read(name, group))
        try:
            found = column.take(pa.array([i - spans[group][0] for i in rows])).to_pylist()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.folder / name} has text that is not UTF-8 ({error.reason}).") from error
        return [text or "" for text in found]  # null counts as an empty document

    def matches(self, identity: dict) -> bool:
        if self.name in HUB or identity["dataset"] in HUB:
            return identity == self.identity
        return identity["val_shard"] == self.identity["val_shard"]  # a folder may be moved; `resumed` checks its files

    def frozen(self, split: str) -> list:
        paths = {name: self.folder / name for name in self.files[split]}
        return [[name, path.stat().st_size if path.exists() else None] for name, path in paths.items()]

    def resumed(self, split: str, frozen: list) -> "ParquetCorpus":
        now = {path.name: path.stat().st_size for path in self.folder.glob("*.parquet")}
        other = [name for name, size in frozen if size is not None and now.get(name) != size]
        if other:
            some = ", ".join(other[:3]) + ", ..." * (len(other) > 3)
            raise UserError(
                f"{len(other)} shards of {self.name} have gone from {self.folder} or changed since the run to be "
                f"resumed began ({some}): put them back, or begin a new run."
            )
        files = self.files | {split: [name for name, _ in frozen]}
        arriving = self.arriving or any(size is None for _, size in frozen)
        return ParquetCorpus(self.name, self.identity, self.folder, files, self.remedy, arriving)

    def _open(self, name: str) -> pq.ParquetFile:
        """Open a shard. UserError: it is not what the manifest says, it is damaged, or it has no text."""
        path = self.folder / name
        if self.arriving:
            self._wait_for(path)
        try:
            file = pq.ParquetFile(self._manifest.path(name))
        except UserError as error:
            raise UserError(f"{error}: {self.remedy}.") from error
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(path, error) from error
        schema = file.schema_arrow
        if "text" not in schema.names:
            raise UserError(f'{path} has no column "text" (it has: {", ".join(schema.names)}): rename the right one.')
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f'The column "text" of {path} holds {kind} and not strings: write it again as strings.')
        return file

    def _wait_for(self, path: Path) -> None:
        """Until a shard has arrived, whole. UserError: nobody is fetching it."""
        seconds = 0.0
        while not path.exists():
            if not manifest.download_under_way(self.folder) and not path.exists():
                raise UserError(f"{path} is not there and no download into its folder is under way: {self.remedy}.")
            if seconds % PATIENCE == 0:
                log.warning("waiting for %s, which is still being downloaded (%.0f s so far)", path, seconds)
            time.sleep(1.0)
            seconds += 1.0

    def _read(self, name: str, group: int) -> pa.ChunkedArray:
        with self._open(name) as file:
            try:
                return file.read_row_group(group, columns=["text"]).column(0)
            except (OSError, pa.ArrowException) as error:
                raise self._unreadable(self.folder / name, error) from error

    def _unreadable(self, path: Path, error: BaseException) -> UserError:
        return UserError(f"{path} can't be read as parquet ({str(error).splitlines()[0]}): {self.remedy}.")


class _Recent:
    """The newest row groups, decoded: at least two, more while they are small. For use by several threads."""

    def __init__(self):
        self._kept: OrderedDict[Any, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, read: Any) -> pa.ChunkedArray:
        """The row group `key`, by `read()` if it is not here."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = read()
            self._kept.move_to_end(key)
            while len(self._kept) > 2 and sum(column.nbytes for column in self._kept.values()) > CACHE_BYTES:
                self._kept.popitem(last=False)
            return self._kept[key]


def _open_hub(name: str, shards: int | None = None) -> ParquetCorpus:
    source = HUB[name]
    folder = base_dir() / source.folder
    fetch = f"python -m nanochat.dataset -n 8 --dataset {name}"
    names = set(_parquet_names(folder))
    train = [shard for shard in map(source.shard, range(source.train_shards)) if shard in names]
    if shards is not None:
        train = [source.shard(i) for i in range(min(shards, source.train_shards))]
    there = {"training shard": bool(train), "validation shard": source.val_shard in names}
    missing = [what for what, is_there in there.items() if not is_there]
    if missing:
        raise UserError(
            f"The corpus {name} has no {' and no '.join(missing)} in {folder}: download it with `{fetch}`, "
            "or use `--dataset tinyworld`, which needs no download."
        )
    identity = {"dataset": name, "val_shard": source.val_shard}
    remedy = f"it is damaged; delete it and run `{fetch}` again"
    files = {"train": train, "val": [source.val_shard]}
    return _checked(ParquetCorpus(name, identity, folder, files, remedy, arriving=shards is not None))


def _open_folder(name: str, val_shard: str | None) -> ParquetCorpus:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"--dataset={name} is neither a folder nor one of {', '.join(HUB)}, tinyworld: give one of these."
        )
    folder = folder.resolve()
    names = _parquet_names(folder)
    if not names:
        raise UserError(f"The folder {folder} holds no .parquet file: put some there, or use `--dataset tinyworld`.")
    if len(names) == 1:
        raise UserError(
            f"The folder {folder} holds only {names[0]}, and one whole file is kept for validation: "
            "split it into two or more."
        )
    val = _validation_shard(folder, names, val_shard)
    files = {"train": [shard for shard in names if shard != val], "val": [val]}
    identity = {"dataset": str(folder), "val_shard": val}
    return _checked(ParquetCorpus(str(folder), identity, folder, files, "it is damaged; replace or remove it"))


def _parquet_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.glob("*.parquet") if not path.name.startswith("."))


def _checked(corpus: ParquetCorpus) -> ParquetCorpus:
    """The same corpus, once every file begins and ends as parquet does and validation has documents."""
    for name in corpus.files["train"] + corpus.files["val"]:
        if corpus.arriving and not (corpus.folder / name).exists():
            continue
        with open(corpus.folder / name, "rb") as file:
            head = file.read(4)
            file.seek(-min(4, os.fstat(file.fileno()).st_size), os.SEEK_END)
            if (head, file.read(4)) != (b"PAR1", b"PAR1"):
                raise UserError(f"{corpus.folder / name} is not a whole parquet file: {corpus.remedy}.")
    corpus.spans("train", 0)
    if not any(last > first for first, last in corpus.spans("val", 0)):
        raise UserError(
            f"The validation shard {corpus.folder / corpus.files['val'][0]} is empty: name another with --val-shard."
        )
    return corpus


# -- which shard of a folder is for validation ------------------------------------------------------------------------


def _validation_shard(folder: Path, names: list[str], asked: str | None) -> str:
    """The validation shard: as asked, else by the manifest, else as written down before, else the last name."""
    pin = base_dir() / "corpora" / f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}.json"
    before = read_json(pin) if pin.exists() else {}
    pinned = before.get("val_shard")
    if before.get("manifest") and not (folder / manifest.NAME).exists():
        raise UserError(f"{folder / manifest.NAME} is missing, by which the shards were checked so far: restore it.")
    chosen = _with_suffix(asked) or _manifest_choice(folder) or pinned or names[-1]
    if pinned and chosen != pinned:
        raise UserError(
            f"The validation shard of {folder} has been {pinned} so far (written down in {pin}) and would now be "
            f"{chosen}, which models of this artefact folder may have been trained on: keep {pinned}, or set "
            "NANOCHAT_BASE_DIR to a new folder."
        )
    if chosen not in names:
        raise UserError(f"The validation shard {chosen} is not in {folder}: put it back, or name another file of it.")
    if not pinned:
        write_json(pin, {"folder": str(folder), "val_shard": chosen, "manifest": bool(manifest.read(folder))})
    return chosen


def _manifest_choice(folder: Path) -> str | None:
    return _with_suffix(manifest.read(folder).get("val_shard"))


def _with_suffix(name: str | None) -> str | None:
    return name if not name or name.endswith(".parquet") else f"{name}.parquet"


# -- the embedded corpus ----------------------------------------------------------------------------------------------


class TinyWorld(Corpus):
    """The embedded corpus behind virtual shards of 4,096 documents; every document is made when it is read."""

    def __init__(self):
        from nanochat import tinyworld

        self._document = tinyworld.document
        sample = "\0".join(self._document("train", i, TINYWORLD_SEED) for i in range(64))
        version = hashlib.sha256(sample.encode()).hexdigest()[:12]  # another text is another corpus
        super().__init__("tinyworld", {"dataset": "tinyworld", "val_shard": None, "version": version})
        counts = {"train": TINYWORLD_TRAIN, "val": 1}
        self._names = {split: [f"tinyworld_{split}_{i:05d}" for i in range(n)] for split, n in counts.items()}

    def shards(self, split: str) -> list[str]:
        return self._names[split]

    def spans(self, split: str, shard: int) -> list[tuple[int, int]]:
        return [(0, TINYWORLD_SHARD)]

    def texts(self, split: str, shard: int, rows: range) -> list[str]:
        return [self._document(split, shard * TINYWORLD_SHARD + i, TINYWORLD_SEED) for i in rows]


if __name__ == "__main__":
    from nanochat import cli, download

    cli.run(download.main, download.Config)
