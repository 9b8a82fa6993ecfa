"""The way of a request through the front: a prompt that fits, the limits, a worker, its news, and the end of it.

`open_ticket` and `news` are what the endpoints use; whoever stops reading `news`, or whose client has left, or who took
longer than the deadline, ends the replies with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import Response

from nanochat.errors import UserError
from nanochat.sampling import Sampling
from nanochat.serve import prompts
from nanochat.serve.limits import Clients
from nanochat.serve.metrics import Metrics
from nanochat.serve.pool import Busy, Item, Pool, Ticket
from nanochat.serve.renderer import Renderer

SOON_CHARS = 8000  # of a conversation, which are encoded in a millisecond or two: a thread would cost nearly that
FAILED = "The model failed: try again."
logger = logging.getLogger("nanochat.serve")


@dataclass(frozen=True)
class Settings:
    """What the server is told: how replies are drawn by default, who may come in, how long it may take."""

    sampling: Sampling
    api_key: str | None = None
    local: bool = True  # listens on a loopback address only
    deadline: float = 300.0  # seconds a request may take in all
    at_once: int = 0  # replies in flight a client; 0: no limit
    per_minute: int = 0  # requests of a client; 0: no limit
    log_text: bool = False  # conversations into the log


class Failed(Exception):
    """An engine failed under a request: nothing was wrong with what was asked."""


class Gone(Exception):
    """The client has left before there was anything to tell it."""


class UnknownModel(Exception):
    """The client asks for a model that is not served."""


@dataclass
class Desk:
    """What the endpoints share."""

    pool: Pool
    tokenizer: Any
    settings: Settings
    clients: Clients
    metrics: Metrics
    renderer: Renderer = field(default_factory=Renderer)

    @classmethod
    def of(cls, pool: Pool, tokenizer: Any, settings: Settings) -> Desk:
        """With limits and metrics as the settings say."""
        return cls(pool, tokenizer, settings, Clients(settings.at_once, settings.per_minute), Metrics(pool))

    def model(self, asked: str | None) -> str:
        """The model asked for, or the first."""
        if asked is None:
            return self.pool.models[0]
        if asked not in self.pool.models:
            raise UnknownModel(f"There is no model of that name: this server has {', '.join(self.pool.models)}.")
        return asked

    async def prompt(self, model: str, messages: list[dict], max_tokens: int) -> prompts.Prompt:
        """The conversation as ids, without the oldest turns that don't fit."""
        ask = messages, self.tokenizer, self.pool.context(model), max_tokens
        if sum(len(str(message["content"])) for message in messages) <= SOON_CHARS:
            return prompts.fit(*ask)
        return await asyncio.to_thread(prompts.fit, *ask)

    def open_ticket(self, request: Request, model: str, ids: list[list[int]], sampling: Sampling, n: int = 1) -> Ticket:
        """Hand a request to a worker. Busy, TooMany, NotReady: not now."""
        address, replies = request.client.host if request.client else "", n * len(ids)
        self.clients.enter(address, replies)
        try:
            ticket = self.pool.submit(model, ids, vars(sampling), n)
        except BaseException:
            self.clients.leave(address, replies)
            raise
        if self.settings.log_text:
            logger.info("asked: %s", json.dumps([self.tokenizer.decode(prompt) for prompt in ids], ensure_ascii=False))
        return ticket

    async def news(self, ticket: Ticket, request: Request) -> AsyncIterator[list[Item]]:
        """What a ticket brings, until all its replies are over."""
        left = asyncio.ensure_future(gone(request.receive))
        left.add_done_callback(lambda _: ticket.cancel())
        alarm = asyncio.get_running_loop().call_later(self.settings.deadline, ticket.cancel, "deadline")
        try:
            while items := await ticket.next():
                yield items
        finally:
            left.cancel()
            alarm.cancel()
            ticket.cancel()
            self._close(ticket, request)

    def _close(self, ticket: Ticket, request: Request) -> None:
        self.clients.leave(request.client.host if request.client else "", ticket.replies)
        self.metrics.finished(ticket)
        if self.settings.log_text:
            logger.info("answered: %s", json.dumps(ticket.said, ensure_ascii=False))

    async def first(self, ticket: Ticket, request: Request) -> tuple[list[Item], AsyncIterator[list[Item]]]:
        """The first news, and the rest of them. A request that fails before it has said anything is an error."""
        rest = self.news(ticket, request)
        items = await anext(rest, [])
        end = items[0].end if items else None
        if end and not items[0].pieces and end.finish in ("refused", "error", "deadline", "cancelled"):
            await rest.aclose()
            raise {
                "refused": UserError(end.why),
                "error": Failed(FAILED),
                "deadline": Busy(),
                "cancelled": Gone(),
            }[end.finish]
        return items, rest


async def gone(receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from an async generator, which is closed when the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], headers: dict[str, str] | None = None):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope, receive, send):
        """Send each event as it comes, by the short way of server.Connection where that is the server."""
        connection = scope.get("state", {}).get("connection")
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self.events:
                if connection is not None:
                    await connection.stream(event.encode())
                else:
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self.events.aclose()


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


def event(*data: dict) -> str:
    """Server-sent events, to be sent as one piece."""
    return "".join(f"data: {_json(each)}\n\n" for each in data)
