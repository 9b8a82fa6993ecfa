"""Train the tokenizer: byte-level BPE on the first characters of the training text.

    python -m scripts.tok_train                                     # 2 billion characters of climbmix, 32,768 tokens
    python -m scripts.tok_train --dataset=tinyworld --max-chars=20_000_000 --vocab-size=4096

Any CPU. Measured on 2 cores that had other work too: 100 million characters into 8,192 tokens take 19 s (14 s of CPU),
370 MB resident; the time of 2 billion is that of reading them. Writes <artefacts>/tokenizer/tokenizer.json, which
remembers the data set: later stages use the same one unless told otherwise.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tqdm import tqdm

from nanochat import cli, dataset
from nanochat.errors import refuse
from nanochat.paths import base_dir
from nanochat.record import Record
from nanochat.tokenizer import SMALLEST, Tokenizer, keep_other

# Several scripts, digits, blanks, an emoji of several code points, and specials spelled as text.
ROUND_TRIP = """Hello world! It's 12345 = 3 * 4115, isn't it?\tTabs,\r\nbreaks,   blanks   \n
naïve café — “quoted” … 안녕하세요 你好 Привет مرحبا नमस्ते 👩‍🚀🌍 \\x00 <|bos|><|user_start|> <|assistant_end|>"""


@dataclass(frozen=True)
class Config:
    """Flags of tok_train."""

    dataset: str = "climbmix"  # climbmix, fineweb-edu, tinyworld, or a folder of parquet files
    val_shard: str = ""  # a folder's validation shard; empty: its manifest's, else the last by name
    max_chars: int = 2_000_000_000  # characters to learn from; less if one pass over the corpus holds less
    doc_cap: int = 10_000  # characters taken of one document, so that a few giants don't set the merges
    vocab_size: int = 32_768  # tokens, the 9 special ones included


@dataclass
class Seen:
    """How much text was read."""

    documents: int = 0
    chars: int = 0


def check(cfg: Config) -> None:
    """Refuse what can't work, all of it at once."""
    refuse(cli.too_small(cfg, max_chars=1, doc_cap=1, vocab_size=SMALLEST))


def training_texts(corpus, cfg: Config, seen: Seen, bar: tqdm) -> Iterator[str]:
    """One pass over the training documents, each cut to `doc_cap`, until `max_chars` are reached; counts in `seen`."""
    for text in (text for _, documents in corpus.epoch_batches("train") for _, text in documents):
        text = text[: cfg.doc_cap]
        seen.documents += 1
        seen.chars += len(text)
        bar.update(len(text))
        yield text
        if seen.chars >= cfg.max_chars:
            break
    bar.set_description("merging")


def check_round_trip(tokenizer: Tokenizer) -> None:
    """A tokenizer that loses text would spoil every later stage: stop here."""
    ids = tokenizer.encode(ROUND_TRIP)
    if tokenizer.decode(ids) != ROUND_TRIP or any(map(tokenizer.is_special, ids)):
        raise RuntimeError("The trained tokenizer does not give back the text it was given.")


def main(cfg: Config) -> dict:
    """Train, check and save a tokenizer; returns its figures."""
    # 1. what is asked for
    check(cfg)
    corpus = dataset.open_corpus(cfg.dataset, cfg.val_shard or None)

    # 2. learn the merges (rustbpe counts in parallel while Python reads)
    seen, started = Seen(), time.perf_counter()
    bar = tqdm(total=cfg.max_chars, unit=" chars", unit_scale=True, desc="reading", file=sys.stderr)
    with bar, cli.interruptible():
        tokenizer = Tokenizer.train(training_texts(corpus, cfg, seen, bar), cfg.vocab_size)
        bar.total = seen.chars
    seconds = time.perf_counter() - started

    # 3. check and save
    check_round_trip(tokenizer)
    tokenizer.meta = {"dataset": corpus.identity, "doc_cap": cfg.doc_cap, **asdict(seen)}
    kept = keep_other(tokenizer.fingerprint)
    path = tokenizer.save()

    # 4. summary
    record = Record(base_dir() / "tokenizer" / "record.jsonl", stage="tok_train", config=cfg)
    lengths = [len(token) for token in tokenizer.ranks]
    summary = {
        "path": str(path),
        "fingerprint": tokenizer.fingerprint,
        "dataset": corpus.identity,
        "vocab_size": tokenizer.vocab_size,
        **asdict(seen),
        "seconds": round(seconds, 2),
        "token_bytes_mean": round(sum(lengths) / len(lengths), 3),
        "token_bytes_max": max(lengths),
    }
    record.say(
        f"{tokenizer.vocab_size:,} tokens from {seen.chars:,} characters of {seen.documents:,} documents "
        f"in {seconds:.1f} s -> {path}"
    )
    if kept:
        record.say(f"the tokenizer that was there is kept as {kept}: models trained with it need it")
    record.close(**summary)
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
