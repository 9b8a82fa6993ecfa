"""Damage every file that a run depends on, at every place, and see that each damage is found and told in a sentence.

    python -m scripts.bench_corruption --output=dev/bench/2026-11-25_corruption.json

For a small checkpoint (and an older one beside it), a shard with its manifest, and the tokenizer: one bit of every byte
is flipped (`--every=n`: of every n-th), the file is cut at every such place, emptied, and removed. Each time the part
is used as a run would: `newest_good` must choose the older checkpoint, the loader and the tokenizer must refuse with a
UserError that names the file; anything else (another exception, no complaint) is a miss. A damage that a reader can not
tell because nothing of what it means has changed (blanks in JSON) would count as a miss too.
"""

import dataclasses
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from nanochat import checkpoint, cli, dataset, manifest, optim, paths, saving
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    every: int = 1  # damage every n-th byte of a file; 1: all of them
    seed: int = 0  # of the bits
    output: str = ""  # JSON of the counts; empty: only print


def main(cfg: Config) -> dict:
    """Damage everything; returns the counts by file. UserError: some damage was not found."""
    began, dice, results, misses = time.time(), random.Random(cfg.seed), {}, []
    with tempfile.TemporaryDirectory(prefix="nanochat_damage_") as name:
        os.environ["NANOCHAT_BASE_DIR"] = name
        for what, files, use in (make_checkpoints(Path(name)), make_shards(Path(name)), make_tokenizer(Path(name))):
            use(None)  # undamaged: no complaint
            for file in files:
                counts, missed = torment(file, use, dice, cfg.every)
                results[f"{what}/{file.name}"] = counts
                misses += missed
                print(f"{what}/{file.name}: {counts}", flush=True)
    summary = {"date": time.strftime("%Y-%m-%d"), "argv": sys.argv[1:], "seconds": round(time.time() - began, 1),
               "damages": sum(sum(c.values()) for c in results.values()), "missed": misses,
               "files": results}  # fmt: skip
    if cfg.output:
        paths.write_json(cfg.output, summary)
    print(f"{summary['damages']:,} damages, {len(misses)} missed, {summary['seconds']} s")
    if misses:
        raise UserError(f"{len(misses)} damages were not found, the first: {misses[0]}")
    return summary


def damages(data: bytes, dice: random.Random, every: int):
    """(kind, place, the damaged bytes or None for no file) of every damage to be tried."""
    yield "removed", 0, None
    yield "emptied", 0, b""
    for place in range(dice.randrange(every), len(data), every):
        flipped = bytearray(data)
        flipped[place] ^= 1 << dice.randrange(8)
        yield "flipped", place, bytes(flipped)
        if place:
            yield "cut", place, data[:place]


def torment(file: Path, use: Callable, dice: random.Random, every: int) -> tuple[dict[str, int], list[str]]:
    """Every damage to one file, one after the other -> how many of each kind, and those that were missed."""
    data, counts, missed = file.read_bytes(), {}, []
    for kind, place, damaged in tqdm(list(damages(data, dice, every)), desc=file.name, disable=None):
        file.unlink(missing_ok=True)
        if damaged is not None:
            file.write_bytes(damaged)
        counts[kind] = counts.get(kind, 0) + 1
        if problem := complaint(file, use):
            missed.append(f"{file.name} {kind} at {place}: {problem}")
    file.write_bytes(data)
    use(None)  # whole again
    return counts, missed


def complaint(file: Path, use: Callable) -> str:
    """What is wrong with how a damage was met; empty: it was found and told."""
    try:
        use(file)
    except UserError as error:
        text = str(error)
        return "" if "\n" not in text and (file.name in text or file.parent.name in text) else f"told badly: {text}"
    except Exception as error:  # noqa: BLE001  any other exception is the miss that is looked for
        return f"{type(error).__name__}: {error}"
    return "not found"


def make_checkpoints(base: Path) -> tuple[str, list[Path], Callable]:
    """An older and a newer checkpoint; damage to the newer must lead to the older."""
    config = GPTConfig(sequence_len=8, vocab_size=16, n_layer=1, n_head=1, n_kv_head=1, n_embd=4)
    model = GPT(config)
    model.init_weights(0)
    optimizer = optim.MuonAdamW(model.roles(), dict.fromkeys(("matrix", *optim.ADAM_RULES), 0.1), Runtime.single())
    root = base / "base_checkpoints" / "d1"
    for step in (1, 2):
        path = saving.save(
            root, step, model=model, optimizer=optimizer, meta={"stage": "base", "config": dataclasses.asdict(config)},
            runtime=Runtime.single(), rank_state={"rng": torch.get_rng_state()[:64].tolist()},
        )  # fmt: skip

    def use(damaged: Path | None) -> None:
        found, notes = checkpoint.newest_good(root)
        if damaged is None:
            assert found == path and not notes
            return
        if found is None or found.name != "step_000001" or len(notes) != 1:
            raise RuntimeError(f"{found} was chosen, with {notes}")
        raise UserError(notes[0])

    return "checkpoint", sorted(path.iterdir()), use


def make_shards(base: Path) -> tuple[str, list[Path], Callable]:
    """A folder of two shards and its manifest, read as training reads it."""
    folder = base / "corpus"
    folder.mkdir()
    for number in range(2):
        table = pa.table({"text": [f"document {i} of shard {number}" for i in range(20)]})
        pq.write_table(table, folder / f"shard_{number:05d}.parquet", compression="zstd", row_group_size=10)
    files = sorted(folder.glob("*.parquet"))
    entries = {p.name: {"size": p.stat().st_size, "sha256": paths.sha256(p)} for p in files}
    manifest.write(folder, {"files": entries, "val_shard": files[-1].name})

    def use(damaged: Path | None) -> None:
        corpus = dataset.open_corpus(str(folder))
        for split in dataset.SPLITS:
            for _ in corpus.epoch_batches(split):
                pass

    return "corpus", [*files, folder / manifest.NAME], use


def make_tokenizer(base: Path) -> tuple[str, list[Path], Callable]:
    """The smallest tokenizer, saved and loaded."""
    Tokenizer.from_ranks([bytes([i]) for i in range(256)]).save()
    folder = base / "tokenizer"

    def use(damaged: Path | None) -> None:
        Tokenizer.load()

    return "tokenizer", sorted(p for p in folder.iterdir() if p.is_file()), use


if __name__ == "__main__":
    cli.run(main, Config)
