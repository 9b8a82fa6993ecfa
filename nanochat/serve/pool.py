"""The front's side of the engine processes: start them, share the requests out, tell the clients when one dies.

A request goes to the worker that has read the longest beginning of its prompt before (the turns of a chat, a shared
system prompt), if that one is not much busier than the idlest; else to the idlest. A worker that dies, or says nothing
for STALL_SECONDS while it has work, ends its requests with "error" and is started anew. All of it runs in the event
loop; nothing here waits for an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from nanochat.errors import UserError
from nanochat.serve import wire

BLOCK = 32  # tokens; beginnings of prompts are remembered at its multiples
REMEMBERED = 20_000  # beginnings, newest kept
SLACK = 4  # replies by which a worker may be busier than the idlest and still get a chat that it knows
RESTART_SECONDS, LONGEST_RESTART = 0.5, 30.0  # pause before a dead worker's successor, doubled while they die young
YOUNG_SECONDS = 60.0
LAST_WORDS_SECONDS = 2.0  # that a cancelled reply's end may take
STALL_SECONDS = 300.0  # the first step of a GPU worker may compile for minutes

logger = logging.getLogger(__name__)


class Busy(Exception):
    """Too many requests are waiting: come back later."""


class NotReady(Exception):
    """No worker of this model is up."""


@dataclass
class Process:
    """A running engine process, or a stand-in for tests: its two streams, and how to end it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    kill: Callable[[], None]
    wait: Callable[[], Awaitable[Any]]


async def spawn(order: dict) -> Process:
    """Start nanochat.serve.worker and give it its order."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nanochat.serve.worker",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 20,
    )  # fmt: skip
    process.stdin.write(wire.pack({"load": order}))

    def kill():
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    return Process(process.stdout, process.stdin, kill, process.wait)


@dataclass
class End:
    """A reply has ended: stop, length, cancelled, closing, deadline, error, or refused (and why)."""

    finish: str
    tokens: int = 0
    cached: int = 0
    parts: list[dict] = field(default_factory=list)
    why: str = ""
    prompt: list[list] | None = None  # token records of the prompt, where asked


@dataclass
class Item:
    """News of one reply: pieces of text ([kind, text]), token records where asked, and its end."""

    reply: int
    pieces: list[list[str]]
    tokens: list[list]
    end: End | None


@dataclass(eq=False)
class Ticket:
    """A request in flight: n replies to each prompt, all by one worker. `next` gives the news, until `open` is 0."""

    number: int
    prompts: list[list[int]]
    sampling: dict
    n: int
    worker: Worker
    over: set[int] = field(default_factory=set)  # replies that have ended
    news: list[Item] = field(default_factory=list)
    signal: asyncio.Event = field(default_factory=asyncio.Event)
    begun: float = field(default_factory=time.monotonic)
    first: float | None = None  # when the first token came
    tokens: int = 0
    cached: int = 0
    ends: list[str] = field(default_factory=list)  # why each reply that is over has ended
    why: str = "cancelled"  # what a cancelled reply's end is called
    mute: bool = False  # only the prompt is scored: what the engine makes besides is neither told nor counted
    said: list[list[dict]] = field(default_factory=list)  # the parts of each reply that has ended

    @property
    def replies(self) -> int:
        """How many there will be."""
        return len(self.prompts) * self.n

    @property
    def open(self) -> int:
        """How many have not ended."""
        return self.replies - len(self.over)

    async def next(self) -> list[Item]:
        """What has happened since the last call, at least one item; [] when all is over and told."""
        while not self.news and self.open:
            self.signal.clear()
            await self.signal.wait()
        items, self.news = self.news, []
        return items

    def put(self, item: Item) -> None:
        """A worker's news."""
        if self.mute:
            item = silent(item)
        if self.first is None and item.pieces:
            self.first = time.monotonic()
        if item.end is not None:
            self.over.add(item.reply)
            self.ends.append(item.end.finish)
            self.tokens += item.end.tokens
            self.cached += item.end.cached
            self.said.append(item.end.parts)
        self.news.append(item)
        self.signal.set()

    def cancel(self, finish: str = "cancelled") -> None:
        """End every reply that is not over: the worker stops before its next step. Nothing if all are over."""
        if self.open:
            self.worker.cancel(self, finish)


def silent(item: Item) -> Item:
    """News without what the reply says; its end is that of a reply of 0 tokens."""
    end = item.end
    if end is not None:
        end = replace(end, tokens=0, parts=[], finish="length" if end.finish == "stop" else end.finish)
    return Item(item.reply, [], [], end)


class Worker:
    """One engine process and the requests it serves; `run` keeps it alive."""

    def __init__(self, model: str, number: int, order: dict, start: Callable[[dict], Awaitable[Process]] = spawn):
        self.model, self.number, self.order, self.start = model, number, order, start
        self.facts: dict = {}  # context, vocab, slots, device, once it has been ready
        self.stats: dict = {}  # the engine's, as last told
        self.ready, self.restarts, self.load, self.tokens = False, 0, 0, 0  # load: replies in flight
        self.tickets: dict[int, Ticket] = {}
        self.process: Process | None = None
        self.heard = time.monotonic()

    async def run(self) -> None:
        """Start the process, read what it says, start another when it ends. UserError: it can never start."""
        pause = RESTART_SECONDS
        while True:
            begun = time.monotonic()
            try:
                self.process = await self.start(self.order)
                await self._serve()
            finally:
                self.ready = False
                self._end_all("error")
                if self.process:
                    self.process.kill()
                    self.process.writer.close()
                    await self.process.wait()
            pause = RESTART_SECONDS if time.monotonic() - begun > YOUNG_SECONDS else min(2 * pause, LONGEST_RESTART)
            self.restarts += 1
            logger.error("engine process %d of %s has died; another starts in %.1f s", self.number, self.model, pause)
            await asyncio.sleep(pause)

    async def _serve(self) -> None:
        while (message := await wire.receive(self.process.reader)) is not None:
            self.heard = time.monotonic()
            if "refused" in message:
                raise UserError(message["refused"])
            if "ready" in message:
                self.facts, self.ready = message["ready"], True
            self.stats = message.get("stats", self.stats)
            for raw in message.get("out", ()):
                self._hand_over(raw)

    def _hand_over(self, raw: dict) -> None:
        ticket = self.tickets.get(raw["t"])
        if ticket is None:  # cancelled: its last words come too late
            return
        end = End(**raw["end"]) if "end" in raw else None
        if end is not None and end.finish == "cancelled":
            end.finish = ticket.why
        ticket.put(Item(raw["r"], raw["p"], raw.get("l", []), end))
        if end is not None:
            self.load -= 1
            self.tokens += end.tokens
        if not ticket.open:
            del self.tickets[ticket.number]

    def submit(self, ticket: Ticket) -> None:
        """Send a request to the process."""
        if not self.load:
            self.heard = time.monotonic()
        self.load += ticket.replies
        self.tickets[ticket.number] = ticket
        for i, ids in enumerate(ticket.prompts):
            frame = {"op": "submit", "ticket": ticket.number, "first": i * ticket.n, "n": ticket.n}
            self._say({**frame, "ids": ids, "sampling": ticket.sampling})

    def cancel(self, ticket: Ticket, finish: str) -> None:
        """Tell the process to stop. If it has spoken and somebody listens, its last words are awaited for a moment."""
        self._say({"op": "cancel", "ticket": ticket.number})
        if finish == "cancelled" or ticket.first is None:
            self._end(ticket, finish)
        else:
            ticket.why = finish
            asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, self._end, ticket, finish)

    def check_pulse(self) -> None:
        """Kill a process that has work and says nothing; `run` does the rest."""
        if self.load and self.ready and time.monotonic() - self.heard > STALL_SECONDS:
            logger.error("engine process %d of %s hangs", self.number, self.model)
            self.process.kill()

    def _say(self, message: dict) -> None:
        if self.process and not self.process.writer.is_closing():
            self.process.writer.write(wire.pack(message))

    def _end(self, ticket: Ticket, finish: str) -> None:
        if self.tickets.pop(ticket.number, None) is None:
            return
        self.load -= ticket.open
        for reply in sorted(set(range(ticket.replies)) - ticket.over):
            ticket.put(Item(reply, [], [], End(finish)))

    def _end_all(self, finish: str) -> None:
        for ticket in list(self.tickets.values()):
            self._end(ticket, finish)


class Pool:
    """All workers: where a request goes, and how many may wait.

    queue: replies a worker may have beyond its slots; more are Busy.
    """

    def __init__(self, workers: list[Worker], queue: int = 64):
        self.workers, self.queue = workers, queue
        self.failed: UserError | None = None  # why a worker can never start
        self.draining = False
        self._known: OrderedDict[tuple[str, int], Worker] = OrderedDict()  # (model, hash of a beginning) -> who read it
        self._numbers = iter(range(1, 2**62))
        self._tasks: list[asyncio.Task] = []

    @property
    def models(self) -> list[str]:
        """The models served, the default first."""
        return list(dict.fromkeys(worker.model for worker in self.workers))

    @property
    def ready(self) -> bool:
        """Whether every model has a worker that answers."""
        return not self.draining and all(any(w.ready for w in self.workers if w.model == m) for m in self.models)

    @property
    def load(self) -> int:
        """Replies in flight."""
        return sum(worker.load for worker in self.workers)

    def context(self, model: str) -> int:
        """The most tokens of prompt and reply together. NotReady: nobody can say yet."""
        facts = next((worker.facts for worker in self.workers if worker.model == model and worker.facts), None)
        if facts is None:
            raise NotReady("The model is loading: try again in a moment.")
        return facts["context"]

    def free(self) -> int:
        """Workers that would begin a new reply at once."""
        return sum(w.ready and w.load < w.facts["slots"] for w in self.workers)

    def start(self) -> None:
        """Run the workers as tasks of this event loop."""
        self._tasks = [asyncio.create_task(self._run(worker)) for worker in self.workers]
        self._tasks.append(asyncio.create_task(self._watch()))

    async def _run(self, worker: Worker) -> None:
        try:
            await worker.run()
        except UserError as error:
            self.failed = error

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(STALL_SECONDS / 10)
            for worker in self.workers:
                worker.check_pulse()

    def cancel_all(self) -> None:
        """End every reply in flight."""
        for ticket in [ticket for worker in self.workers for ticket in worker.tickets.values()]:
            ticket.cancel("closing")

    async def close(self) -> None:
        """End every request and every process."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def submit(self, model: str, prompts: list[list[int]], sampling: dict, n: int = 1) -> Ticket:
        """Give a request to a worker. Busy: too many are waiting. NotReady: nobody is up, or the server is closing."""
        if self.draining:
            raise NotReady("The server is closing.")
        able = [worker for worker in self.workers if worker.model == model and worker.ready]
        if not able:
            raise NotReady("The model is loading: try again in a moment.")
        worker = self._choose(model, able, prompts[0])
        ticket = Ticket(next(self._numbers), prompts, sampling, n, worker)
        if worker.load + ticket.replies > worker.facts["slots"] + self.queue:
            raise Busy
        worker.submit(ticket)
        return ticket

    def _choose(self, model: str, able: list[Worker], ids: list[int]) -> Worker:
        """The worker that knows the longest beginning of the prompt, if not much busier than the idlest."""
        least = min(able, key=lambda worker: worker.load)
        if len(able) == 1:
            return least
        keys = [(model, key) for key in beginnings(ids)]
        known = next((self._known[key] for key in reversed(keys) if key in self._known), least)
        worker = known if known in able and known.load <= least.load + SLACK else least
        for key in keys:
            self._known[key] = worker
            self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return worker


def beginnings(ids: list[int]) -> list[int]:
    """A hash of each beginning of the ids that is a multiple of BLOCK long."""
    keys, key = [], 0
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        key = hash((key, *ids[end - BLOCK : end]))
        keys.append(key)
    return keys
