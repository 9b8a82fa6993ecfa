"""Documents become batches: tokenised, packed into rows, shared out over ranks, and resumed exactly.

Legend: B rows of one rank, T positions.

Pretraining, evaluation and fine-tuning differ in their source of documents and in the packing mode; nanochat/lanes.py
gives the rows an order that depends on neither B nor the number of ranks. A batch's state says where the stream stands
and which documents wait to be packed, by key: small, readable, and exact.
"""

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from nanochat.chat import render
from nanochat.dataset import BATCH, START, Corpus, Position
from nanochat.errors import UserError, refuse
from nanochat.lanes import Document, Lane, RowStream, own_lanes
from nanochat.prefetch import Batch, Feeder
from nanochat.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "conversation_eval_batches",
    "conversation_loader",
    "eval_batches",
    "merge_states",
    "pretrain_loader",
    "published_batches",
]

LANES = 8  # as many as a node has GPUs
THREADS = 4  # of the tokenizer, as published
PUBLISHED_BUFFER = 1000  # documents, in one lane
CONVERSATIONS = 32  # rendered at a time
FLAGS = {"seq_len": "--max-seq-len"}  # how a setting is called on the command line


# -- the three loaders ------------------------------------------------------------------------------------------------


def pretrain_loader(
    corpus: Corpus,
    tokenizer: Tokenizer,
    split: str = "train",
    *,
    rows: int,
    seq_len: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    mode: str = "crop",
    buffer: int = 1024,
    lanes: int = LANES,
    state: dict | None = None,
    prefetch: int = 2,
) -> Feeder:
    """Endless batches of packed documents; `state` (a batch's, or `merge_states` of all ranks') continues after it.

    `mode` crop discards what overhangs a row, as published; lossless keeps it. `buffer` is the number of documents
    that all lanes hold together. UserError: the state is of another corpus or other settings.
    """
    problems = _wrong(rows=rows, seq_len=seq_len, lanes=lanes, buffer=buffer // max(1, lanes))
    refuse(problems)
    settings = {"split": split, "mode": mode, "seq_len": seq_len, "lanes": lanes, "buffer": buffer}
    if state is not None:
        _check_same(state["settings"], settings)
        if not corpus.matches(state["corpus"]):
            raise UserError(
                f"The state to resume was made with {state['corpus']} and --dataset is now {corpus.identity}: "
                "give the same --dataset (and the same files), or begin a new run."
            )
        corpus = corpus.resumed(split, state["shards"])
    about = {"settings": settings, "corpus": corpus.identity, "shards": corpus.frozen(split)}
    helper = ThreadPoolExecutor(1, thread_name_prefix="nanochat-text") if prefetch else None
    mine = {
        lane: Lane(_Texts(corpus, tokenizer, split, lane, lanes, helper=helper), seq_len + 1, mode, buffer // lanes)
        for lane in own_lanes(lanes, rank, world)
    }
    stream = RowStream(mine, lanes, rank, world, tokenizer.bos, about, state)
    return Feeder(stream.fill, rows, seq_len, device, prefetch, helper)


def eval_batches(
    corpus: Corpus,
    tokenizer: Tokenizer,
    rows: int,
    seq_len: int,
    tokens: int | None,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    *,
    split: str = "val",
    mode: str = "lossless",
    buffer: int = 64,
    lanes: int = LANES,
    size: int = 16,
    prefetch: int = 2,
) -> Feeder:
    """A finite set of rows, the same whatever `rows` and `world`: the first ceil(tokens / T) of the split.

    `tokens` None means one whole pass. Lossless: every token of a document but its first is predicted once, and a split
    that is too short for `tokens` simply ends. The last batch is filled up with ignored rows, so that the shape never
    changes; a rank that has no row of the set gets no batch. Nothing is discarded, so a small `buffer`, filled `size`
    documents a lane at a time, does.
    """
    refuse(_wrong(rows=rows, seq_len=seq_len, tokens=1 if tokens is None else tokens, lanes=lanes))
    endless = mode == "crop" and tokens is not None  # as published: it begins again when the split is short
    mine = {
        lane: Lane(
            _Texts(corpus, tokenizer, split, lane, lanes, size, endless), seq_len + 1, mode, max(1, buffer // lanes)
        )
        for lane in own_lanes(lanes, rank, world)
    }
    limit = None if tokens is None else math.ceil(tokens / seq_len)
    stream = RowStream(mine, lanes, rank, world, tokenizer.bos, {}, None, limit)
    total = None if limit is None else math.ceil(limit / (rows * world))
    return Feeder(stream.fill, rows, seq_len, device, prefetch, total=total)


def published_batches(
    corpus: Corpus,
    tokenizer: Tokenizer,
    rows: int,
    seq_len: int,
    tokens: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Feeder:
    """The rows on which the published code measures validation loss on one rank, for comparing with its figures.

    Crop packing from a buffer of 1,000 documents, filled 128 at a time, the first `tokens` of it (reference.md 2.4).
    """
    options = {"mode": "crop", "buffer": PUBLISHED_BUFFER, "lanes": 1, "size": BATCH}
    return eval_batches(corpus, tokenizer, rows, seq_len, tokens, rank, world, device, **options)


def conversation_loader(
    task: Any,
    tokenizer: Tokenizer,
    *,
    rows: int,
    seq_len: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    state: dict | None = None,
    seed: int = 42,
    buffer: int = 128,
    lanes: int = 1,
    prefetch: int = 2,
) -> Feeder:
    """Endless batches of whole conversations, `task[i]` for each i below `len(task)` once an epoch, shuffled.

    Conversations are cut to a row (T + 1 tokens), packed best-fit, and rows filled up with ignored targets; every row
    has a target (pitfall 2). `state["consumed"]` counts the conversations given to all ranks so far and
    `state["epoch"]` the pass, from 1: an epoch is packed to its end before the next begins, so after its last row
    each conversation was given exactly once. With more than one lane, which makes ranks share the rendering, both are
    those of this rank's lanes, and a lane that is ahead begins its next pass while others finish theirs.
    """
    refuse(_wrong(rows=rows, seq_len=seq_len, lanes=lanes, buffer=buffer // max(1, lanes)))
    if len(task) < lanes:
        raise UserError(f"There are {len(task)} conversations to train on: give at least {lanes}.")
    settings = {"conversations": len(task), "seq_len": seq_len, "seed": seed, "lanes": lanes, "buffer": buffer}
    if state is not None:
        _check_same(state["settings"], settings)
    mine = {
        lane: Lane(_Conversations(task, tokenizer, seq_len + 1, seed, lane, lanes), seq_len + 1, "pad", buffer // lanes)
        for lane in own_lanes(lanes, rank, world)
    }
    stream = RowStream(mine, lanes, rank, world, tokenizer.bos, {"settings": settings}, state)
    return Feeder(stream.fill, rows, seq_len, device, prefetch)


def conversation_eval_batches(
    task: Any,
    tokenizer: Tokenizer,
    rows: int,
    seq_len: int,
    tokens: int | None,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    *,
    lanes: int = LANES,
    prefetch: int = 2,
) -> Feeder:
    """A finite set of rows of conversations, the same whatever `rows` and `world`: the first ceil(tokens / T) rows.

    Drawn from one pass in one shuffled order, so that few tokens are a sample of the whole `task`; `tokens` None means
    the whole pass. The last batch is filled up with ignored rows; a rank that has no row of the set gets no batch.
    """
    refuse(_wrong(rows=rows, seq_len=seq_len, tokens=1 if tokens is None else tokens, lanes=lanes))
    mine = {
        lane: Lane(_Conversations(task, tokenizer, seq_len + 1, 0, lane, lanes, endless=False), seq_len + 1, "pad", 16)
        for lane in own_lanes(lanes, rank, world)
    }
    limit = None if tokens is None else math.ceil(tokens / seq_len)
    stream = RowStream(mine, lanes, rank, world, tokenizer.bos, {}, None, limit)
    total = None if limit is None else math.ceil(limit / (rows * world))
    return Feeder(stream.fill, rows, seq_len, device, prefetch, total=total)


def merge_states(states: Iterable[dict]) -> dict:
    """One state with the lanes of all ranks, from which any number of ranks can continue (after the same batch)."""
    states = list(states)
    first = states[0]
    for other in states[1:]:
        if (other["rows"], other["settings"]) != (first["rows"], first["settings"]):
            raise UserError("The ranks' loader states are not of the same batch: take them from one checkpoint.")
    return first | {"lanes": {lane: saved for state in states for lane, saved in state["lanes"].items()}}


def _wrong(**values: int) -> list[str]:
    return [f"{name} must be 1 or more and is {value}." for name, value in values.items() if value < 1]


def _check_same(saved: dict, now: dict) -> None:
    refuse(
        [
            f"The run to be resumed used {FLAGS.get(name, name)}={saved.get(name)} and now it is {value}: "
            "give the same, or begin a new run."
            for name, value in now.items()
            if saved.get(name) != value
        ]
    )


# -- sources ----------------------------------------------------------------------------------------------------------


class _Texts:
    """A lane's documents of a corpus, each begun by bos.

    With a `helper` the next few are read and tokenised while the last ones are being packed, so that no batch has to
    wait for a whole refill. `position` is where the documents given out end, not those on their way.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        split: str,
        lane: int,
        lanes: int,
        size: int = BATCH,
        endless: bool = True,
        helper: ThreadPoolExecutor | None = None,
    ):
        self.position: Position = START
        self._corpus, self._tokenizer, self._split = corpus, tokenizer, split
        self._share = {"lane": lane, "lanes": lanes, "size": size}
        self._endless = endless
        self._helper = helper
        self._coming: Future | None = None
        self._stream: Any = None

    def pull(self) -> list[Document] | None:
        if self._helper is None:
            position, documents = self._next()
        else:
            job = self._coming or self._helper.submit(self._next)
            position, documents = job.result()
            self._coming = self._helper.submit(self._next)
        if position is None:
            return None
        self.position = position
        return documents

    def advance(self) -> bool:
        return False

    def fetch(self, keys: Sequence[tuple[int, ...]]) -> list[Document]:
        texts = {key: self._corpus.read(self._split, key) for key in sorted(set(keys))}  # sorted: as the files lie
        return self._tokenise([(key, texts[key]) for key in keys])

    def _next(self) -> tuple[Position | None, list[Document]]:
        """The next few documents and the position behind them; None at the end of the only pass."""
        if self._stream is None and self._endless:
            self._stream = self._corpus.batches(self._split, self.position, **self._share)
        elif self._stream is None:
            self._stream = self._corpus.epoch_batches(self._split, **self._share)
        position, docs = next(self._stream, (None, []))
        return position, self._tokenise(docs)

    def _tokenise(self, docs: Sequence[tuple[tuple[int, ...], str]]) -> list[Document]:
        bos = self._tokenizer.bos
        threads = min(THREADS, os.cpu_count() or 1)
        ids = self._tokenizer.encode([text for _, text in docs], prepend=bos, threads=threads)
        return [Document(key, np.array(tokens, dtype=np.int32)) for (key, _), tokens in zip(docs, ids)]


class _Conversations:
    """A lane's conversations of a task, in an order of their own each epoch."""

    def __init__(
        self, task: Any, tokenizer: Tokenizer, longest: int, seed: int, lane: int, lanes: int, endless: bool = True
    ):
        self.position: Position = {"epoch": 1, "index": 0}
        self._endless = endless
        self._task, self._tokenizer, self._longest = task, tokenizer, longest
        self._seed, self._lane, self._lanes = seed, lane, lanes
        self._order: tuple[int, np.ndarray] = (0, np.empty(0))

    def pull(self) -> list[Document] | None:
        epoch, begin = self.position["epoch"], self.position["index"]
        own = self._of_epoch(epoch)[begin : begin + CONVERSATIONS].tolist()
        if not own:
            return None
        self.position = {"epoch": epoch, "index": begin + len(own)}
        return self.fetch([(epoch, i) for i in own])

    def advance(self) -> bool:
        if not self._endless:
            return False
        self.position = {"epoch": self.position["epoch"] + 1, "index": 0}
        return True

    def fetch(self, keys: Sequence[tuple[int, ...]]) -> list[Document]:
        return [self._render(epoch, i) for epoch, i in keys]

    def _of_epoch(self, epoch: int) -> np.ndarray:
        """The lane's share of the task's indices, shuffled by seed and epoch."""
        if self._order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._task))
            self._order = epoch, order[self._lane :: self._lanes]
        return self._order[1]

    def _render(self, epoch: int, i: int) -> Document:
        try:
            ids, mask = render(self._task[i], self._tokenizer, max_tokens=self._longest)
        except UserError as error:
            raise UserError(f"Conversation {i} of the training data can't be used: {error}") from error
        if not any(mask[1:]):
            raise UserError(f"Conversation {i} of the training data has nothing to learn from within a row.")
        return Document((epoch, i), np.array(ids, dtype=np.int32), np.array(mask, dtype=bool))
