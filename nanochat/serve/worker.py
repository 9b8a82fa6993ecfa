"""One engine in a thread of its own, serving requests of an event loop: continuous batching off the loop.

The event loop submits and cancels; the thread applies that between two steps, so a cancelled request gets no further
token than the one being made. What a step yields goes back to the loop in one call. The number of replies in flight is
bounded: beyond it `submit` raises Busy at once. A failing step ends the requests it was serving, not the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from nanochat.chat import parse_reply
from nanochat.engine import Engine, Event, Sequence
from nanochat.sampling import Sampling
from nanochat.streaming import ReplyStream, StopFinder

logger = logging.getLogger(__name__)


class Busy(Exception):
    """Too many requests are waiting; come back later."""


class Piece(NamedTuple):
    """Some text of one reply of a request: kind is text, python or python_output."""

    reply: int
    kind: str
    text: str


class End(NamedTuple):
    """A reply has ended: why (stop, length, cancelled or error), its tokens, and its parts: a message's content."""

    reply: int
    finish: str
    tokens: int
    parts: list[dict]


@dataclass(eq=False)
class Ticket:
    """A request in flight. Iterate over it in its event loop: Pieces, and one End for each of its n replies."""

    ids: list[int]
    sampling: Sampling
    n: int
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    sequences: list[Sequence] = field(default_factory=list)  # the worker thread's
    cancelled: bool = False
    open: int = 0  # replies that have not ended, as the event loop sees it

    def __aiter__(self):
        return self

    async def __anext__(self) -> Piece | End:
        if not self.open:
            raise StopAsyncIteration
        item = await self.queue.get()
        self.open -= isinstance(item, End)
        return item


class _Reply:
    """One sequence's way back to its ticket."""

    def __init__(self, ticket: Ticket, index: int, tokenizer):
        self.ticket, self.index, self.tokenizer = ticket, index, tokenizer
        self.stream, self.stops = ReplyStream(tokenizer), StopFinder(ticket.sampling.stop)

    def feed(self, event: Event) -> list[Piece | End]:
        """What the event's token lets the client see."""
        pieces = self.stream.feed(event.token)
        if not event.finished:
            return self._visible(pieces)
        return self._visible(pieces + self.stream.end()) + self._rest() + [self.end(event.sequence)]

    def _visible(self, pieces: list[tuple[str, str]]) -> list[Piece]:
        shown = []
        for kind, text in pieces:
            if kind != "text":
                shown += self._rest()  # text held back comes before the part that follows it
            text = self.stops.feed(text) if kind == "text" else text
            shown += [Piece(self.index, kind, text)] if text else []
        return shown

    def _rest(self) -> list[Piece]:
        text = self.stops.end()
        return [Piece(self.index, "text", text)] if text else []

    def end(self, sequence: Sequence, finish: str | None = None) -> End:
        """The last word on a reply."""
        parts = parse_reply(sequence.tokens, self.tokenizer)
        if self.stops.hit:
            parts = [{"type": "text", "text": sequence.completion(self.tokenizer).text}]
        return End(self.index, finish or sequence.finished or "cancelled", len(sequence.tokens), parts)


class Worker:
    """See the module's docstring. `start` it, and `close` it at the end.

    waiting: how many replies may wait beyond those that run. gpu: the number that clients are told.
    """

    def __init__(self, engine: Engine, waiting: int = 64, gpu: int = 0):
        self.engine, self.waiting, self.gpu = engine, waiting, gpu
        self.alive = False
        self.tokens = 0  # generated since the start
        self.load = 0  # replies in flight
        self._replies: dict[Sequence, _Reply] = {}
        self._inbox: deque[tuple[str, Ticket]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"engine-{gpu}", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self.alive = True
        self._thread.start()

    def close(self) -> None:
        """End every request and the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # -- the event loop's side ----------------------------------------------------------------------------------------

    def submit(self, ids: list[int], sampling: Sampling, n: int = 1) -> Ticket:
        """Queue a request. UserError: refused by the engine. Busy: too many are waiting, or the worker is gone."""
        self.engine.check(ids, n)
        ticket = Ticket(ids, sampling, n, asyncio.get_running_loop(), open=n)
        with self._wake:
            if not self.alive or self.load + n > self.engine.slots + self.waiting:
                raise Busy
            self.load += n
            self._inbox.append(("submit", ticket))
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """The client has gone: end its replies before the next step. Nothing if they have ended."""
        with self._wake:
            self._inbox.append(("cancel", ticket))
            self._wake.notify()

    # -- the thread's side --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    self._turn()
                except Exception:  # out of memory, or a fault of ours: these requests fail, others need not
                    logger.exception("a step of engine %d failed; its requests end", self.gpu)
                    self._fail()
        finally:
            self.alive = False
            self._fail()

    def _turn(self) -> None:
        self._apply_inbox()
        self._answer(self.engine.step())

    def _apply_inbox(self) -> None:
        """Wait for work, take what was asked."""
        with self._wake:
            while not (self._inbox or self.engine.busy or self._closing):
                self._wake.wait()
            commands = list(self._inbox)
            self._inbox.clear()
        for command, ticket in commands:
            if command == "submit":
                self._admit(ticket)
            else:
                self._drop(ticket)

    def _admit(self, ticket: Ticket) -> None:
        ticket.sequences = self.engine.submit(ticket.ids, ticket.sampling, ticket.n)
        for index, sequence in enumerate(ticket.sequences):
            self._replies[sequence] = _Reply(ticket, index, self.engine.tokenizer)

    def _drop(self, ticket: Ticket) -> None:
        ended = []
        for sequence in ticket.sequences:
            if sequence in self._replies:
                self.engine.cancel(sequence)
                ended.append((ticket, self._forget(sequence).end(sequence)))
        self._deliver(ended)

    def _answer(self, events: list[Event]) -> None:
        items = []
        self.tokens += len(events)
        for event in events:
            reply = self._replies[event.sequence]
            items += [(reply.ticket, item) for item in reply.feed(event)]
            if event.finished:
                self._forget(event.sequence)
        self._deliver(items)

    def _fail(self) -> None:
        """A step went wrong, or the worker ends: all in flight is over."""
        ended = []
        for sequence in list(self._replies):
            reply = self._forget(sequence)
            ended.append((reply.ticket, reply.end(sequence, "error")))
        with self._wake:
            unseen = [ticket for command, ticket in self._inbox if command == "submit"] if not self.alive else []
        ended += [(ticket, End(i, "error", 0, [])) for ticket in unseen for i in range(ticket.n)]
        self._deliver(ended)
        if self.alive:
            self.engine = self.engine.fresh()

    def _forget(self, sequence: Sequence) -> _Reply:
        with self._wake:
            self.load -= 1
        return self._replies.pop(sequence)

    def _deliver(self, items: list[tuple[Ticket, Piece | End]]) -> None:
        """Hand over what happened, in one call for each event loop."""
        for loop in dict.fromkeys(ticket.loop for ticket, _ in items):
            mine = [(ticket, item) for ticket, item in items if ticket.loop is loop]
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                loop.call_soon_threadsafe(_put, mine)


def _put(items: list[tuple[Ticket, Piece | End]]) -> None:
    for ticket, item in items:
        ticket.queue.put_nowait(item)
