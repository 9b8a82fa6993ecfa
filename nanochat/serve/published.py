"""The published endpoint, which our page uses: POST /chat/completions, always a stream of events.

{"token": text, "gpu": number[, "type": python | python_output][, "tokens": [[text, log probability, [[text, log
    probability] ...]] ...]]}     some text; `tokens` where `logprobs` alternatives were asked for
{"html": [block ...], "from": i}  with `html`: the reply's blocks from the i-th on, in place of those shown before
{"done": true, "finish", "tokens", "parts", "dropped"}      `parts`: the reply as it comes back in the next turn
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request

from nanochat.serve import asks
from nanochat.serve.desk import Desk, EventStream, event
from nanochat.serve.pool import Item, Ticket
from nanochat.serve.renderer import Renderer

RESPONSES: dict[int | str, dict] = {code: {} for code in (400, 404, 429, 503)}
RESPONSES[200] = {"content": {"text/event-stream": {}}, "description": "a stream of events"}
VIEW_SECONDS = 0.08  # between two renderings of a growing reply,
VIEW_SHARE = 4  # or so many times what one takes


def add_published(app: FastAPI, desk: Desk) -> None:
    """The endpoint."""

    @app.post("/chat/completions", responses=RESPONSES)
    async def complete(ask: asks.Ask, request: Request):
        model = desk.model(ask.model)
        sampling = ask.sampling(desk.settings.sampling, top_logprobs=ask.logprobs)
        prompt = await desk.prompt(model, asks.conversation(ask.messages), sampling.max_tokens)
        ticket = desk.open_ticket(request, model, [prompt.ids], sampling)
        items, rest = await desk.first(ticket, request)
        view = View(desk.renderer) if ask.html else None
        return EventStream(events(ticket, items, rest, view, prompt.dropped))


async def events(
    ticket: Ticket, items: list[Item], rest: AsyncIterator[list[Item]], view: View | None, dropped: int
) -> AsyncIterator[str]:
    """One reply as events."""
    parts: list[dict] = []
    try:
        while items:
            made = [data for item in items for data in told(item, ticket.worker.number)]
            for item in items:
                add(parts, item.pieces)
            if end := items[-1].end:
                parts = end.parts or parts
                if view:
                    yield event(*made)  # the text does not wait for its last rendering
                    made = await view.last(parts)
                ended = {"finish": end.finish, "tokens": end.tokens, "parts": parts, "dropped": dropped}
                made.append({"done": True, **ended})
            elif view:
                made += view.offer(parts)
            yield event(*made)
            items = await anext(rest, [])
    finally:
        if view:
            view.close()
        await rest.aclose()


def told(item: Item, gpu: int) -> list[dict]:
    """The events of an item's pieces; token records go with the first."""
    records = [[text, logprob, [[t, value] for t, _, value in top]] for text, _, logprob, top in item.tokens]
    made = []
    for kind, text in item.pieces or ([["text", ""]] if records else []):
        data = {"token": text, "gpu": gpu}
        if kind != "text":
            data["type"] = kind
        if records:
            data["tokens"], records = records, []
        made.append(data)
    return made


def add(parts: list[dict], pieces: list[list[str]]) -> None:
    """Let the parts grow by some pieces."""
    for kind, text in pieces:
        if parts and parts[-1]["type"] == kind:
            parts[-1]["text"] += text
        else:
            parts.append({"type": kind, "text": text})


class View:
    """A growing reply as HTML: rendered beside the stream, only what has changed is sent."""

    def __init__(self, renderer: Renderer):
        self.renderer = renderer
        self.sent: list[str] = []
        self.task: asyncio.Task | None = None
        self.begun = self.due = 0.0

    def offer(self, parts: list[dict]) -> list[dict]:
        """The event of a rendering that is done, if any; begins another when it is time."""
        now, seen = time.monotonic(), []
        if self.task and self.task.done():
            seen, self.task = self._changes(self.task.result()), None
            self.due = now + max(VIEW_SECONDS, VIEW_SHARE * (now - self.begun))
        if self.task is None and now >= self.due:
            self.begun = now
            self.task = asyncio.create_task(self.renderer.blocks([dict(part) for part in parts]))
        return seen

    async def last(self, parts: list[dict]) -> list[dict]:
        """The event that makes the view complete, if it is not."""
        self.close()
        return self._changes(await self.renderer.blocks(parts))

    def close(self) -> None:
        """Wait for nothing more."""
        if self.task:
            self.task.cancel()
            self.task = None

    def _changes(self, blocks: list[str]) -> list[dict]:
        pairs = enumerate(zip(blocks, self.sent))
        same = next((i for i, (new, old) in pairs if new != old), min(len(blocks), len(self.sent)))
        changed = blocks != self.sent
        self.sent = blocks
        return [{"html": blocks[same:], "from": same}] if changed else []
