"""The engine process: reads requests from one file, batches them in an engine, writes to another what clients may see.

    python -m nanochat.serve.worker         # started by nanochat.serve.pool, which speaks the frames of wire.py with it

    in    {"load": {...}} once, then {"op": "submit", "ticket", "first", "n", "ids", "sampling"}
          and {"op": "cancel", "ticket"}
    out   {"ready": {...}} or {"refused": sentence} once, then {"out": [item ...], "stats": {...}}

An item is {"t": ticket, "r": reply, "p": [[kind, text] ...]}, with "l" (tokens and log probabilities) where asked, and
"end" (why, how many tokens, the parts) on a reply's last. A thread reads; the loop applies what it read between two
steps, so a cancelled reply gets no token beyond the one being made. Text that comes within FLUSH_SECONDS (longer where
many replies are made) travels together, but for a reply's first and last. A failing step ends the replies it served,
and MAX_FAILURES in a row the process. The end of the input ends it too: no engine outlives its server.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import BinaryIO

from nanochat.chat import parse_reply
from nanochat.engine import Engine, Event, Sequence
from nanochat.errors import UserError
from nanochat.sampling import Sampling
from nanochat.serve import wire
from nanochat.streaming import ReplyStream, StopFinder

FLUSH_SECONDS = 0.02  # no eye sees the difference, and the front handles fewer, larger pieces
FLUSH_SHARE = 0.0015  # or so many seconds for each reply in flight: no more than some 700 pieces a second in all,
FLUSH_MOST = 0.2  # until pieces would come so rarely that it shows
STATS_SECONDS = 0.25
MAX_FAILURES = 3  # steps that fail in a row, before the process gives up and the front starts another

logger = logging.getLogger(__name__)


class Reply:
    """One sequence's way back to the front: what was made and not yet sent."""

    def __init__(self, ticket: int, index: int, sequence: Sequence, tokenizer):
        self.ticket, self.index, self.sequence, self.tokenizer = ticket, index, sequence, tokenizer
        self.stream, self.stops = ReplyStream(tokenizer), StopFinder(sequence.sampling.stop)
        self.pieces: list[list[str]] = []
        self.tokens: list[list] = []  # [text, token's bytes, logprob, alternatives]
        self.held: deque[tuple[int, int, list]] = deque()  # records whose text is held back: where it begins and ends
        self.fed = self.shown = 0  # characters of text made, and safe to show
        self.over: dict | None = None
        self.urgent = True  # the first token is sent at once

    def feed(self, event: Event) -> None:
        """Take the engine's next token."""
        begin = self.fed
        self._show(self.stream.feed(event.token))
        if self.sequence.sampling.logprobs and not (
            event.finished == "stop" and event.token == self.sequence.stop_token
        ):
            record = token_record(self.tokenizer, event.token, event.logprob, event.top)
            self.held.append((begin, self.fed, record))
            self._release()
        if event.finished:
            self.close(event.finished)

    def _show(self, pieces: list[tuple[str, str]]) -> None:
        for kind, text in pieces:
            if kind == "text":
                self.fed += len(text)
                self._add(kind, self.stops.feed(text))
            else:
                self._add("text", self.stops.end())  # text held back comes before the part that follows it
                self._add(kind, text)

    def _release(self) -> None:
        """Records may go when their text may: none is of a stop string."""
        while self.held and (self.held[0][0] < self.shown or self.held[0][1] <= self.shown):
            self.tokens.append(self.held.popleft()[2])

    def _add(self, kind: str, text: str) -> None:
        self.shown += len(text) if kind == "text" else 0
        if text and self.pieces and self.pieces[-1][0] == kind:
            self.pieces[-1][1] += text
        elif text:
            self.pieces.append([kind, text])

    def close(self, finish: str) -> None:
        """The last word: why it ended, how many tokens, and the parts that the next turn will bring back."""
        self._show(self.stream.end())
        self._add("text", self.stops.end())
        self._release()
        sequence = self.sequence
        parts = parse_reply(sequence.tokens, self.tokenizer)
        if self.stops.hit:
            parts = [{"type": "text", "text": sequence.completion(self.tokenizer).text}]
        self.over = {"finish": finish, "tokens": len(sequence.tokens), "cached": sequence.cached, "parts": parts}
        if sequence.sampling.prompt_logprobs:
            self.over["prompt"] = self._prompt_records()
        self.urgent = True

    def _prompt_records(self) -> list[list]:
        done = self.sequence.completion(self.tokenizer)
        laws, tops = done.prompt_logprobs or [], done.prompt_top_logprobs or [None] * len(done.prompt_logprobs or [])
        return [token_record(self.tokenizer, *row) for row in zip(self.sequence.prompt.ids, laws, tops)]

    def item(self) -> dict:
        """What the front gets now."""
        item = {"t": self.ticket, "r": self.index, "p": self.pieces}
        if self.tokens:
            item["l"] = self.tokens
        if self.over:
            item["end"] = self.over
        self.pieces, self.tokens, self.urgent = [], [], False
        return item


def token_record(tokenizer, token: int, logprob: float | None, top) -> list:
    """[text, its bytes, log probability or None, [[text, bytes, log probability] ...]] of a token."""
    return [*spelled(tokenizer, token), logprob, [[*spelled(tokenizer, t), value] for t, value in top or []]]


def spelled(tokenizer, token: int) -> tuple[str, list[int]]:
    """A token as text (a broken character as U+FFFD) and as bytes."""
    data = tokenizer.decode_bytes([token])
    return data.decode("utf-8", "replace"), list(data)


class Worker:
    """Serves an engine over two blocking files until the input ends; it is one of `workers` that share a front."""

    def __init__(self, engine: Engine, source: BinaryIO, sink: BinaryIO, workers: int = 1):
        self.engine, self.source, self.sink, self.workers = engine, source, sink, workers
        self.replies: dict[Sequence, Reply] = {}
        self.inbox: deque[dict] = deque()
        self.wake = threading.Condition()
        self.closing = False
        self.pending: dict[Reply, None] = {}  # replies with something to send, in order
        self.flushed = self.told = 0.0
        self.failures = 0

    def run(self) -> None:
        """Serve."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        while not self.closing and self.failures < MAX_FAILURES:
            try:
                self._take_inbox()
                self._feed(self.engine.step())
                self.failures = 0
            except Exception:  # out of memory, or a fault of ours: these replies fail, others need not
                logger.exception("a step failed; its replies end")
                self._fail()
            self._flush()

    def _read(self) -> None:
        while not self.closing:
            message = wire.read(self.source)
            with self.wake:
                self.closing = message is None
                self.inbox.append(message or {})
                self.wake.notify()

    def _take_inbox(self) -> None:
        """Wait for work and take what was asked."""
        with self.wake:
            while not (self.inbox or self.engine.busy or self.closing):
                self.wake.wait()
            messages = list(self.inbox)
            self.inbox.clear()
        for message in messages:
            if message.get("op") == "submit":
                self._submit(message)
            elif message.get("op") == "cancel":
                self._cancel(message["ticket"])

    def _submit(self, message: dict) -> None:
        ticket, first, n = message["ticket"], message["first"], message["n"]
        try:
            sequences = self.engine.submit(message["ids"], Sampling(**message["sampling"]), n)
        except UserError as error:
            over = {"finish": "refused", "why": str(error), "tokens": 0, "cached": 0, "parts": []}
            self._send([{"t": ticket, "r": first + i, "p": [], "end": over} for i in range(n)])
            return
        for i, sequence in enumerate(sequences):
            self.replies[sequence] = Reply(ticket, first + i, sequence, self.engine.tokenizer)

    def _cancel(self, ticket: int) -> None:
        for sequence, reply in [pair for pair in self.replies.items() if pair[1].ticket == ticket]:
            self.engine.cancel(sequence)
            self._end(sequence, reply, "cancelled")

    def _end(self, sequence: Sequence, reply: Reply, finish: str) -> None:
        reply.close(finish)
        self.pending[reply] = None
        del self.replies[sequence]

    def _feed(self, events: list[Event]) -> None:
        for event in events:
            reply = self.replies.get(event.sequence)
            if reply is None:
                continue
            reply.feed(event)
            self.pending[reply] = None
            if event.finished:
                del self.replies[event.sequence]

    def _fail(self) -> None:
        """A step went wrong: all in flight is over, and the engine's state with it."""
        self.failures += 1
        for sequence, reply in list(self.replies.items()):
            self._end(sequence, reply, "error")
        self.engine.reset()

    def _flush(self) -> None:
        """Send what is due."""
        now = time.monotonic()
        wait = max(FLUSH_SECONDS, min(FLUSH_MOST, FLUSH_SHARE * len(self.replies) * self.workers))
        everything = now - self.flushed >= wait or not self.engine.busy
        due = [reply for reply in self.pending if everything or reply.urgent]
        if everything:
            self.flushed = now
        for reply in due:
            del self.pending[reply]
        if due:
            self._send([reply.item() for reply in due])

    def _send(self, items: list[dict]) -> None:
        message: dict = {"out": items}
        now = time.monotonic()
        if now - self.told >= STATS_SECONDS or not self.engine.busy:
            self.told, message["stats"] = now, dataclasses.asdict(self.engine.stats())
        try:
            wire.write(self.sink, message)
        except (BrokenPipeError, ConnectionError, ValueError):  # the front has gone
            self.closing = True


def serve(engine: Engine, source: BinaryIO, sink: BinaryIO, workers: int) -> None:
    """Say what the engine can do, then serve it until the input ends."""
    config = engine.model.config
    facts = {"context": engine.max_len, "vocab": config.vocab_size, "slots": engine.slots, "device": str(engine.device)}
    wire.write(sink, {"ready": {**facts, "pid": os.getpid()}})
    Worker(engine, source, sink, workers).run()


def load(order: dict) -> Engine:
    """The engine that the front ordered: {"path", "number", "device_type", "dtype", "slots", "threads",
    "workers", "int8"}.
    """
    import torch

    from nanochat import attention, checkpoint, runtime

    if order["threads"]:
        torch.set_num_threads(order["threads"])
    rt = runtime.start(order["device_type"])
    device = torch.device("cuda", order["number"]) if rt.device.type == "cuda" else rt.device
    if device.type == "cuda":
        if order["number"] >= torch.cuda.device_count():
            have = torch.cuda.device_count()
            raise UserError(f"--num-gpus asks for GPU {order['number']}, but there are {have}: ask for what there is.")
        torch.cuda.set_device(device)
    dtype = runtime.DTYPES[order["dtype"]] if order["dtype"] else rt.dtype
    attend = attention.choose(device, dtype).attend
    model, tokenizer, _ = checkpoint.build_model(Path(order["path"]), device=device, dtype=dtype, attend=attend)
    model = model.to(dtype) if dtype != torch.float32 else model
    engine = Engine(model, tokenizer, slots=order["slots"], frozen=True, int8=order["int8"])
    engine.release()
    return engine


def main() -> None:
    """Load what the first frame orders and serve it over standard input and output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front, which ends us when it is done
    source = os.fdopen(0, "rb", closefd=False)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints goes to standard error, not between the frames
    order = wire.read(source)
    if order is None:
        return
    try:
        engine = load(order["load"])
    except UserError as error:
        wire.write(sink, {"refused": str(error)})
        return
    serve(engine, source, sink, order["load"]["workers"])


if __name__ == "__main__":
    sys.exit(main())
