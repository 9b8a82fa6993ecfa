"""Verify a pretraining corpus: every shard readable and as its manifest says, its documents worth training on.

    python -m scripts.verify_data --dataset=climbmix
    python -m scripts.verify_data --dataset=FOLDER --output=verdict.json

For each shard: readable, column `text` of strings, row groups, size and SHA-256 against manifest.json where there is
one, empty and duplicate documents, and the tokenizer's round trip on a sample. Then, over all: documents of the
validation shard that also stand in training, whole or in part (long lines). Exit status 1 if something must be mended.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanochat import cli, dataset, manifest, paths
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer, tokenizer_path

LONG_LINE = 80  # characters from which a line is worth comparing
SHARED_LINES = 0.5  # share of a validation document's long lines found in training from which it counts as known
EMPTY_SHARE, DUPLICATE_SHARE = 0.01, 0.05  # of all documents: more than that is a problem and not a note


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = ""  # climbmix, fineweb-edu, tinyworld or a folder of parquet; empty: the tokenizer's own
    val_shard: str = ""  # a folder's validation shard; empty: its manifest's, else the last by name
    shards: int = -1  # training shards to read, the first so many; -1: all (tinyworld: 2)
    sample: int = 64  # documents a shard that go through the tokenizer and back; 0: none
    checksums: bool = True  # compare SHA-256 with the manifest (reads every byte)
    output: str = ""  # JSON file for the verdict; empty: only print


@dataclasses.dataclass
class Shard:
    """What was found in one shard; `problems` must be mended, `notes` may stay."""

    name: str
    split: str
    documents: int = 0
    characters: int = 0
    groups: int = 0
    empty: int = 0
    duplicates: int = 0  # of a document seen before, in this shard or an earlier one
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def fingerprint(text: str) -> int:
    """64 bits of a text, blanks and case aside: equal for documents that differ only there."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest(), "big")


def long_lines(text: str) -> set[int]:
    """The fingerprints of a document's long lines."""
    return {fingerprint(line) for line in text.splitlines() if len(line) >= LONG_LINE}


def documents(corpus: dataset.Corpus, split: str, index: int) -> Iterator[str]:
    """Every document of a shard, a row group at a time. UserError: it can't be read."""
    for first, last in corpus.spans(split, index):
        for begin in range(first, last, 1024):
            yield from corpus.texts(split, index, range(begin, min(begin + 1024, last)))


class Seen:
    """Fingerprints of documents, 8 bytes each, in sorted runs that are merged like cards: n log n for any number."""

    def __init__(self):
        self.runs: list[np.ndarray] = []

    def known(self, prints: np.ndarray) -> np.ndarray:
        """Which of these (sorted, each once) were noted before: bool, one each."""
        found = np.zeros(len(prints), dtype=bool)
        for run in self.runs:
            places = np.minimum(np.searchsorted(run, prints), len(run) - 1)
            found |= run[places] == prints
        return found

    def add(self, prints: list[int]) -> int:
        """Note a shard's documents; returns how many were seen before, in it or in an earlier one."""
        own = np.unique(np.array(prints, dtype=np.uint64))
        new = own[~self.known(own)]
        if len(new):
            self.runs.append(new)
        while len(self.runs) > 1 and len(self.runs[-2]) <= 2 * len(self.runs[-1]):
            self.runs[-2:] = [np.union1d(*self.runs[-2:])]
        return len(prints) - len(new)


def against_manifest(folder: Path, name: str, manifest: dict, checksums: bool) -> list[str]:
    """What differs between a file and its entry in the manifest; nothing where it has none."""
    entry = manifest.get("files", {}).get(name)
    if entry is None:
        return [f"{name} is not in {folder / 'manifest.json'}"] if manifest.get("files") else []
    size = (folder / name).stat().st_size
    if size != entry.get("size", size):
        return [f"{name} has {size:,} bytes, the manifest says {entry['size']:,}"]
    if checksums and entry.get("sha256") not in (None, paths.sha256(folder / name)):
        return [f"{name} has another SHA-256 than the manifest says: its bytes have changed"]
    return []


def changed(folder: Path, checksums: bool) -> list[str]:
    """What differs between a folder's shards and its manifest, a sentence each."""
    listed, names = manifest.read(folder), sorted(path.name for path in folder.glob("*.parquet"))
    return [problem for name in names for problem in against_manifest(folder, name, listed, checksums)]


def round_trip(texts: list[str], tokenizer: Tokenizer) -> str | None:
    """What the tokenizer changed in one of these texts, or None."""
    for text, ids in zip(texts, tokenizer.encode(texts)):
        if tokenizer.decode(ids) != text:
            return f"a document of {len(text):,} characters is not itself after encode and decode: {text[:60]!r}"
    return None


def look(corpus: dataset.Corpus, split: str, index: int, tokenizer: Tokenizer | None, sample: int, seen: Seen,
         lines: list[set[int]] | None, known: set[int], met: set[int]) -> Shard:  # fmt: skip
    """Read one shard through. `lines` gathers the long lines of validation documents; `met` those met in training."""
    shard = Shard(corpus.shards(split)[index], split)
    prints, sampled = [], []
    try:
        shard.groups = len(corpus.spans(split, index))
        for text in documents(corpus, split, index):
            shard.documents += 1
            shard.characters += len(text)
            if not text.strip():
                shard.empty += 1
                continue
            prints.append(fingerprint(text))
            if len(sampled) < sample:
                sampled.append(text)
            if lines is not None:
                lines.append(long_lines(text))
            elif known:
                met |= long_lines(text) & known
    except UserError as error:
        shard.problems.append(str(error))
        return shard
    shard.duplicates = seen.add(prints)
    problem = round_trip(sampled, tokenizer) if tokenizer and sampled else None
    shard.problems += [problem] if problem else []
    if not shard.documents:
        shard.problems.append(f"{shard.name} has no document")
    return shard


def overlap(validation: Seen, training: Seen, lines: list[set[int]], met: set[int]) -> dict:
    """How much of validation stands in training: whole documents, and documents with half of their long lines."""
    known = validation.runs[0] if validation.runs else np.empty(0, dtype=np.uint64)
    whole = int(training.known(known).sum())
    partly = sum(len(own & met) >= SHARED_LINES * len(own) for own in lines if own)
    return {"documents": len(known), "whole": whole, "by_lines": partly, "with_long_lines": sum(map(bool, lines))}


def verdict(shards: list[Shard], shared: dict, listed: bool, tokenizer: bool) -> tuple[list[str], list[str]]:
    """(problems, notes) over the whole corpus, a sentence each."""
    problems = [problem for shard in shards for problem in shard.problems]
    notes = [note for shard in shards for note in shard.notes]
    total = max(sum(shard.documents for shard in shards), 1)
    for name, most in (("empty", EMPTY_SHARE), ("duplicates", DUPLICATE_SHARE)):
        count = sum(getattr(shard, name) for shard in shards)
        worst = max(shards, key=lambda shard: getattr(shard, name))
        if count:
            text = f"{count:,} of {total:,} documents are {name.replace('duplicates', 'duplicates of others')}"
            (problems if count > most * total else notes).append(f"{text} (most in {worst.name}).")
    if shared["whole"]:
        problems.append(f"{shared['whole']} of {shared['documents']} validation documents also stand in training: "
                        "validation loss would flatter the model; take them out of training.")  # fmt: skip
    if shared["by_lines"] > shared["whole"]:
        text = f"{shared['by_lines']} validation documents share half of their long lines with training"
        (problems if shared["by_lines"] > 0.05 * max(shared["documents"], 1) else notes).append(f"{text}.")
    if not listed:
        notes.append("there is no manifest.json beside the shards, so their bytes could not be compared with it.")
    if not tokenizer:
        notes.append("there is no tokenizer yet: the round trip was not tried (python -m scripts.tok_train).")
    return problems, notes


def name_of(cfg: Config) -> str:
    """The corpus meant: as told, else the tokenizer's own, else climbmix."""
    if cfg.dataset or not tokenizer_path().exists():
        return cfg.dataset or "climbmix"
    return Tokenizer.load().meta.get("dataset", {}).get("dataset", "climbmix")


def main(cfg: Config) -> dict:
    """Read, print, write; returns {"shards", "overlap", "problems", "notes"}. UserError: something must be mended."""
    began = time.perf_counter()
    name = name_of(cfg)
    damaged = changed(Path(name), cfg.checksums) if Path(name).is_dir() else []
    if damaged:  # the corpus would not open
        report([], damaged, [], time.perf_counter() - began)
        raise UserError(f"{len(damaged)} files in {name} must be mended: they are listed above.")
    corpus = dataset.open_corpus(name, cfg.val_shard or None)
    tokenizer = Tokenizer.load() if cfg.sample and tokenizer_path().exists() else None
    folder = getattr(corpus, "folder", None)
    listed = manifest.read(folder) if folder else {}
    most = 2 if cfg.shards == -1 and folder is None else cfg.shards
    count = len(corpus.shards("train")) if most == -1 else min(most, len(corpus.shards("train")))
    validation, training = Seen(), Seen()
    lines: list[set[int]] = []
    met: set[int] = set()
    shards = [look(corpus, "val", 0, tokenizer, cfg.sample, validation, lines, set(), met)]
    known = set().union(*lines) if lines else set()
    for index in tqdm(range(count), desc="shards", disable=None):
        shards.append(look(corpus, "train", index, tokenizer, cfg.sample, training, None, known, met))
    shared = overlap(validation, training, lines, met)
    problems, notes = verdict(shards, shared, bool(listed) or folder is None, tokenizer is not None or not cfg.sample)
    report(shards, problems, notes, time.perf_counter() - began)
    result = {"dataset": corpus.name, "shards": [dataclasses.asdict(shard) for shard in shards], "overlap": shared,
              "problems": problems, "notes": notes}  # fmt: skip
    if cfg.output:
        paths.write_json(Path(cfg.output), result)
    if problems:
        raise UserError(f"{len(problems)} things in {corpus.name} must be mended: they are listed above.")
    return result


def report(shards: list[Shard], problems: list[str], notes: list[str], seconds: float) -> None:
    """The table of shards, then problems and notes, for people."""
    print(f"{'shard':<24}{'split':<7}{'documents':>10}{'characters':>14}{'groups':>8}{'empty':>7}{'dup.':>7}  verdict")
    for shard in shards:
        state = f"{len(shard.problems)} problem(s)" if shard.problems else "good"
        print(f"{shard.name:<24}{shard.split:<7}{shard.documents:>10,}{shard.characters:>14,}{shard.groups:>8}"
              f"{shard.empty:>7}{shard.duplicates:>7}  {state}")  # fmt: skip
    for label, sentences in (("problem", problems), ("note", notes)):
        for sentence in sentences:
            print(f"{label}: {sentence}")
    total, end = sum(shard.documents for shard in shards), "something must be mended" if problems else "good"
    print(f"{end}: {len(shards)} shards, {total:,} documents, {seconds:.0f} s")


if __name__ == "__main__":
    cli.run(main, Config)
