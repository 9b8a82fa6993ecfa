"""Measure the data loader: tokens per second on the training thread and from the background. Prints one JSON line.

    python -m scripts.bench_loader                                 # synthetic documents, ids ready-made: packing alone
    python -m scripts.bench_loader --dataset=FOLDER                # real shards, the tokenizer of the artefact folder
    python -m scripts.bench_loader --dataset=FOLDER --lanes=1 --mode=lossless

Hardware: any CPU; 15 seconds. `training_thread`: each batch is made when it is asked for. `background`: batches are
made ahead while the consumer sleeps `--step-ms` a batch, as if a device computed; `waited_ms` is how long the consumer
then still had to wait for a batch.
"""

import json
import random
import time
from dataclasses import dataclass

import numpy as np

from nanochat import cli
from nanochat.dataloader import pretrain_loader
from nanochat.dataset import Corpus, open_corpus
from nanochat.errors import UserError
from nanochat.prefetch import Feeder
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """What to measure."""

    # synthetic, or a corpus as in base_train: climbmix, fineweb-edu, tinyworld or a folder
    dataset: str = "synthetic"
    # folder of the tokenizer; empty: the artefact folder's (not used for synthetic documents)
    tokenizer: str = ""
    # rows of a batch
    device_batch_size: int = 8
    # positions of a row
    max_seq_len: int = 2048
    # crop or lossless
    mode: str = "crop"
    # documents held by all lanes together
    buffer: int = 1024
    # lanes, see nanochat/lanes.py
    lanes: int = 8
    # seconds of each measurement
    seconds: float = 5.0
    # milliseconds a step takes on the device, for `background`
    step_ms: float = 20.0
    # cpu or cuda
    device_type: str = "cpu"


class Synthetic(Corpus):
    """Documents without text: what is left to measure is the loader itself. Lengths as on the web: log-normal, mean
    about 1,000 tokens, which reproduces the published shares of documents longer than a row (22.9 %) and of tokens lost
    by greedy cropping (39.4 %)."""

    def __init__(self):
        super().__init__("synthetic", {"dataset": "synthetic", "val_shard": None})
        rng = random.Random(0)
        self.lengths = [str(max(2, round(rng.lognormvariate(6.3, 1.1)))) for _ in range(16_384)]

    def shards(self, split: str) -> list[str]:
        return ["synthetic"]

    def spans(self, split: str, shard: int) -> list[tuple[int, int]]:
        return [(first, first + 1024) for first in range(0, len(self.lengths), 1024)]

    def texts(self, split: str, shard: int, rows: range) -> list[str]:
        return [self.lengths[i] for i in rows]


class ReadyMade:
    """A stand-in for a tokenizer: a text is a number, its ids are that many."""

    bos = 0
    ids = list(range(100_000))

    def encode(self, texts, prepend=None, threads=1):
        """As many ids as the text says, bos included."""
        return [self.ids[: int(text)] for text in texts]


def main(cfg: Config) -> dict:
    """Measure and print; returns the figures."""
    if min(cfg.seconds, cfg.step_ms, cfg.lanes) <= 0:
        raise UserError("--seconds, --step-ms and --lanes must be more than 0.")
    if cfg.mode not in ("crop", "lossless"):
        raise UserError(f"--mode={cfg.mode} is unknown: use crop or lossless.")
    synthetic = cfg.dataset == "synthetic"
    corpus = Synthetic() if synthetic else open_corpus(cfg.dataset)
    tokenizer = ReadyMade() if synthetic else Tokenizer.load(cfg.tokenizer or None)
    figures = {
        "dataset": cfg.dataset,
        "rows": cfg.device_batch_size,
        "seq_len": cfg.max_seq_len,
        "mode": cfg.mode,
        "lanes": cfg.lanes,
        "buffer": cfg.buffer,
        "training_thread": at_once(loader(cfg, corpus, tokenizer, 0), cfg.seconds),
        "background": ahead(loader(cfg, corpus, tokenizer, 2), cfg.seconds, cfg.step_ms / 1000),
    }
    print(json.dumps(figures))
    return figures


def loader(cfg: Config, corpus: Corpus, tokenizer: Tokenizer, prefetch: int) -> Feeder:
    """The loader of base_train, making batches `prefetch` ahead."""
    return pretrain_loader(
        corpus,
        tokenizer,
        rows=cfg.device_batch_size,
        seq_len=cfg.max_seq_len,
        device=cfg.device_type,
        mode=cfg.mode,
        buffer=cfg.buffer,
        lanes=cfg.lanes,
        prefetch=prefetch,
    )


def at_once(feeder: Feeder, seconds: float) -> dict:
    """Tokens per second when the consumer does nothing but ask; the first batch, which fills the buffers, apart."""
    with feeder:
        start = time.perf_counter()
        tokens = next(feeder).inputs.numel()
        first = time.perf_counter()
        batches = 0
        while time.perf_counter() - first < seconds:
            next(feeder)
            batches += 1
        spent = time.perf_counter() - first
    return {"tokens_per_second": round(batches * tokens / spent), "first_batch_ms": round(1000 * (first - start), 1)}


def ahead(feeder: Feeder, seconds: float, step: float) -> dict:
    """How long a consumer that computes for `step` seconds a batch waits for the next one."""
    waits = []
    with feeder:
        next(feeder)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            time.sleep(step)
            asked = time.perf_counter()
            tokens = next(feeder).inputs.numel()
            waits.append(time.perf_counter() - asked)
        spent = time.perf_counter() - start
    median, high = (round(1000 * float(np.quantile(waits, q)), 3) for q in (0.5, 0.99))
    figures = {"tokens_per_second": round(len(waits) * tokens / spent)}
    return figures | {"waited_ms_median": median, "waited_ms_p99": high, "waited_share": round(sum(waits) / spent, 4)}


if __name__ == "__main__":
    cli.run(main, Config)
