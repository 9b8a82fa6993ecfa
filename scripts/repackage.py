"""Turn a folder or a Hugging Face dataset into shuffled shards with a manifest, ready for `--dataset=FOLDER`.

    python -m scripts.repackage --source=FOLDER --output=OUT --shards=8
    python -m scripts.repackage --source=hf:HuggingFaceFW/fineweb-edu --subset=sample-10BT --output=OUT --shards=100

A folder may hold .parquet, .jsonl and .txt, also compressed (.gz), at any depth; a dataset is streamed. Every document
gets a shard by dice and each shard is shuffled, so any shard is a sample of all: an exact shuffle of data that does not
fit memory (one shard has to). One more shard than asked is written, the last, for validation: manifest.json names it,
with each shard's size, SHA-256, documents and characters. Stopped at any moment, the same command goes on.
"""

import dataclasses
import gzip
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import cli, manifest, paths
from nanochat.errors import UserError, refuse

ROW_GROUP = 1024  # documents, as published: what a reader decodes at a time
KINDS = (".parquet", ".jsonl", ".txt")
PARTS = ".parts"  # folder of the pieces read so far, beside the shards


@dataclasses.dataclass(frozen=True)
class Config:
    source: str = ""  # a folder, or hf:NAME for a dataset of the hub (or of a local folder it can read)
    output: str = ""  # folder for the shards
    shards: int = 8  # training shards; one more is written for validation
    column: str = "text"  # where a row's text is
    subset: str = ""  # of a hub dataset: its configuration
    split: str = "train"  # of a hub dataset
    revision: str = ""  # of a hub dataset: commit, to be written down; empty: the newest
    lines: bool = False  # .txt: each line is a document, not each file
    least: int = 1  # characters under which a document is left out
    seed: int = 0  # of the shuffle
    piece: int = 100_000  # documents read between two points from which it can go on


def main(cfg: Config) -> dict:
    """Write the shards; returns the manifest. UserError: nothing to read, or the output is of another command."""
    check(cfg)
    out = Path(cfg.output).expanduser()
    if (out / manifest.NAME).exists():
        return finished(out, cfg)
    files = [] if cfg.source.startswith("hf:") else inputs(Path(cfg.source).expanduser())
    order = {"settings": dataclasses.asdict(cfg), "files": [[str(p), p.stat().st_size] for p in files]}
    pieces = out / PARTS
    if (pieces / "order.json").exists() and paths.read_json(pieces / "order.json") != order:
        raise UserError(
            f"{out} holds a part of another command's work, or its source has changed: give another folder."
        )
    pieces.mkdir(parents=True, exist_ok=True)
    paths.write_json(pieces / "order.json", order)
    scatter(pieces, files, cfg)
    shards = {}
    for number in range(cfg.shards + 1):
        name = f"shard_{number:05d}.parquet"
        shards[name] = gather(out, pieces, name, number, cfg)
        print(f"{name}: {shards[name]['documents']:,} documents, {shards[name]['characters']:,} characters", flush=True)
    content = {"val_shard": f"shard_{cfg.shards:05d}.parquet", "made_by": "scripts.repackage", **order, "files": shards,
               "inputs": order["files"], "documents": sum(s["documents"] for s in shards.values())}  # fmt: skip
    manifest.write(out, content)
    shutil.rmtree(pieces)
    return content


def check(cfg: Config) -> None:
    """Refuse, all at once, what can be known to be wrong."""
    problems = [f"--{name} is missing." for name in ("source", "output") if not getattr(cfg, name)]
    problems += [
        f"--{name}={getattr(cfg, name)} must be 1 or more." for name in ("shards", "piece") if getattr(cfg, name) < 1
    ]
    if cfg.source and not cfg.source.startswith("hf:") and not Path(cfg.source).expanduser().is_dir():
        problems.append(f"--source={cfg.source} is no folder: give one, or hf:NAME for a Hugging Face dataset.")
    refuse(problems)


def finished(out: Path, cfg: Config) -> dict:
    """The manifest of what is already there. UserError: it was made by another command."""
    found = manifest.read(out)
    if found.get("settings") != dataclasses.asdict(cfg):
        raise UserError(f"{out} already holds shards made otherwise: give another --output, or remove it.")
    print(f"{out} is complete: {found['documents']:,} documents in {len(found['files'])} shards")
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def inputs(folder: Path) -> list[Path]:
    """The files of a folder that can be read, in an order that is the same everywhere."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and kind(p) and not p.name.startswith("."))
    if not found:
        raise UserError(f"{folder} holds none of {', '.join(KINDS)} (or .gz of them): give another --source.")
    return found


def kind(path: Path) -> str | None:
    """Which of KINDS a file is; None: another."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return suffix if suffix in KINDS else None


def documents(files: list[Path], cfg: Config, state: Any) -> Iterator[tuple[str, Any]]:
    """(text, a function that says where this is) of every document after `state`."""
    if cfg.source.startswith("hf:"):
        yield from streamed(cfg, state)
        return
    first, row = state or (0, 0)
    for number in range(first, len(files)):
        for index, text in enumerate(texts(files[number], cfg)):
            if number > first or index >= row:
                yield text, lambda at=(number, index + 1): list(at)


def streamed(cfg: Config, state: Any) -> Iterator[tuple[str, Any]]:
    """The documents of a Hugging Face dataset, downloaded as they are read."""
    import datasets

    name = cfg.source.removeprefix("hf:")
    try:
        data = datasets.load_dataset(
            name, cfg.subset or None, split=cfg.split, streaming=True, revision=cfg.revision or None
        )
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(f"The dataset {name} can't be opened ({' '.join(str(error).split())[:200]}).") from error
    if state:
        data.load_state_dict(state)
    for row in data:
        yield value(row, cfg, name), data.state_dict


def texts(path: Path, cfg: Config) -> Iterator[str]:
    """The documents of one file. UserError: it is damaged or has no such column."""
    try:
        if kind(path) == ".parquet":
            with pq.ParquetFile(path) as file:
                if cfg.column not in file.schema_arrow.names:
                    raise UserError(f"{path} has no column {cfg.column!r}: it has {file.schema_arrow.names}.")
                for batch in file.iter_batches(columns=[cfg.column]):
                    yield from batch.column(0).to_pylist()
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            if kind(path) == ".txt" and not cfg.lines:
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if kind(path) == ".txt":
                    yield line.rstrip("\n")
                elif line.strip():
                    yield value(json.loads(line), cfg, f"{path} line {number}")
    except (OSError, EOFError, zlib.error, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{path} can't be read ({str(error).splitlines()[0]}): it is damaged; mend or remove it."
        ) from error


def value(row: Any, cfg: Config, where: str) -> str:
    """The text of a row."""
    if not isinstance(row, dict) or cfg.column not in row:
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} has no field {cfg.column!r} (it has {has}): name the right one with --column.")
    return row[cfg.column]


# --- scattering and gathering -----------------------------------------------------------------------------------------


def scatter(pieces: Path, files: list[Path], cfg: Config) -> None:
    """Read everything once into pieces of documents with their shards' numbers; what is there already is not read."""
    done = sorted(pieces.glob("piece_*.parquet"))
    state = paths.read_json(pieces / f"{done[-1].stem}.json") if done else None
    number, ended = len(done), state == "end"
    stream = iter(()) if ended else documents(files, cfg, state)
    while not ended:
        batch, where = [], None
        for text, position in stream:
            where = position
            if not isinstance(text or "", str):
                raise UserError(f"The column {cfg.column!r} holds {type(text).__name__} and not text: name another.")
            if len(text or "") >= cfg.least:
                batch.append(text)
            if len(batch) == cfg.piece:
                break
        ended = len(batch) < cfg.piece
        shard = np.random.default_rng([cfg.seed, number]).integers(0, cfg.shards + 1, len(batch))
        table = pa.table({"text": pa.array(batch, pa.large_string()), "shard": shard.astype(np.int32)})
        paths.write_json(pieces / f"piece_{number:06d}.json", "end" if ended else where())  # first: a piece has one
        with paths.atomic_write(pieces / f"piece_{number:06d}.parquet") as file:
            pq.write_table(table.sort_by("shard"), file, compression="zstd", row_group_size=4096)
        number += 1


def gather(out: Path, pieces: Path, name: str, number: int, cfg: Config) -> dict:
    """Write a shard from all pieces, shuffled -> its entry in the manifest; one that is there already is kept."""
    entry = pieces / f"{name}.json"
    if entry.exists() and (out / name).exists():
        return paths.read_json(entry)
    tables = [pq.read_table(p, filters=[("shard", "=", number)]) for p in sorted(pieces.glob("piece_*.parquet"))]
    column = pa.concat_tables(tables).column("text").cast(pa.large_string())
    if len(column) == 0:
        raise UserError(f"{name} would be empty: the source has too few documents for --shards={cfg.shards}.")
    order = np.random.default_rng([cfg.seed, 2**32 + number]).permutation(len(column))
    table = pa.table({"text": column.take(pa.array(order))})
    with paths.atomic_write(out / name) as file:
        pq.write_table(table, file, compression="zstd", compression_level=3, row_group_size=ROW_GROUP)
    characters = pa.compute.sum(pa.compute.utf8_length(column)).as_py()
    found = {"size": (out / name).stat().st_size, "sha256": paths.sha256(out / name), "documents": len(column),
             "characters": characters}  # fmt: skip
    paths.write_json(entry, found)
    return found


if __name__ == "__main__":
    cli.run(main, Config)
