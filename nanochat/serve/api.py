"""The HTTP interface: the page, the published endpoints, and OpenAI's chat completions, over one or more workers.

    GET  /                      the chat page               GET  /health  GET /stats  GET /logo.svg
    POST /chat/completions      always a stream of events: {"token", "gpu"[, "type"]} ..., {"done": true, "parts", ...}
    POST /v1/chat/completions   OpenAI's form, streamed or whole; GET /v1/models

No text of a conversation is logged. A client that leaves takes its replies with it. Answers to a full queue are 429.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import secrets
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from nanochat.errors import UserError
from nanochat.sampling import Sampling
from nanochat.serve import asks, prompts
from nanochat.serve.guard import Guard
from nanochat.serve.worker import Busy, End, Piece, Ticket, Worker

PAGE = Path(__file__).resolve().parents[1] / "ui.html"
LOGO = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#2f6f6b"/>'
    '<path d="M9 23V9l14 14V9" fill="none" stroke="#fff" stroke-width="3.5" stroke-linejoin="round"/></svg>'
)
RETRY_SECONDS = 2
FAILED = "The model failed: try again."
EVENTS = {"cache-control": "no-store", "x-accel-buffering": "no"}


@dataclass(frozen=True)
class Settings:
    """What the server is told: its model's name, how replies are drawn by default, who may come in."""

    model: str
    sampling: Sampling
    api_key: str | None = None
    local: bool = True


def create_app(workers: list[Worker], settings: Settings) -> FastAPI:
    """The application; it starts the workers when it starts and closes them when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        for worker in workers:
            worker.start()
        try:
            yield
        finally:
            for worker in workers:
                worker.close()

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=settings.api_key, max_body=asks.MAX_BODY, local=settings.local)
    app.exception_handler(UserError)(lambda request, error: refusal(400, str(error)))
    app.exception_handler(Busy)(lambda request, error: refusal(429, "The server is busy: try again in a moment."))
    app.exception_handler(HTTPException)(lambda request, error: refusal(error.status_code, str(error.detail)))
    app.exception_handler(RequestValidationError)(invalid)
    add_page(app)
    add_status(app, workers, settings)
    add_chat(app, workers, settings)
    add_openai(app, workers, settings)
    return app


# -- errors -----------------------------------------------------------------------------------------------------------


def refusal(status: int, message: str) -> JSONResponse:
    """An error in both forms, the published `detail` and OpenAI's `error`."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    headers = {"retry-after": str(RETRY_SECONDS)} if status == 429 else None
    return JSONResponse({"detail": message, "error": error}, status, headers)


async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """A body of wrong types: 422 as published, 400 under /v1 as OpenAI; never an echo of what was sent."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return refusal(400 if request.url.path.startswith("/v1/") else 422, f"{where or 'body'}: {first['msg']}")


# -- the page and the state -------------------------------------------------------------------------------------------


def add_page(app: FastAPI) -> None:
    """The chat page, whose own inline script and style are all that its policy lets run."""
    text = PAGE.read_text(encoding="utf-8")
    own = f"script-src {digests(text, 'script')}; style-src {digests(text, 'style')}"
    rest = "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    policy = f"default-src 'none'; {own}; {rest}"

    @app.get("/", response_class=HTMLResponse)
    async def page():
        return HTMLResponse(text, headers={"content-security-policy": policy, "cache-control": "no-cache"})

    @app.get("/logo.svg")
    async def logo():
        return Response(LOGO, media_type="image/svg+xml")


def digests(page: str, tag: str) -> str:
    """The content-security-policy sources of a page's inline elements."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)


def add_status(app: FastAPI, workers: list[Worker], settings: Settings) -> None:
    """Is it alive, and how busy."""

    def free() -> int:
        return sum(worker.alive and worker.load < worker.engine.slots for worker in workers)

    @app.get("/health")
    async def health():
        ready = any(worker.alive for worker in workers)
        return {"status": "ok", "ready": ready, "num_gpus": len(workers), "available_workers": free()}

    @app.get("/stats")
    async def stats():
        return {
            "total_workers": len(workers),
            "available_workers": free(),
            "busy_workers": len(workers) - free(),
            "workers": [
                {"gpu_id": w.gpu, "device": str(w.engine.device), "replies": w.load, "tokens": w.tokens}
                for w in workers
            ],
        }

    @app.get("/v1/models")
    async def models():
        model = {"id": settings.model, "object": "model", "created": 0, "owned_by": "nanochat"}
        return {"object": "list", "data": [model]}


# -- replies ----------------------------------------------------------------------------------------------------------


async def begin(ask: asks.Ask, n: int, workers: list[Worker], settings: Settings) -> tuple[Worker, Ticket, int]:
    """Check a request and give it to the least busy worker -> (worker, ticket, messages that did not fit)."""
    messages, sampling = ask.check(), ask.sampling(settings.sampling)
    worker = min((w for w in workers if w.alive), key=lambda w: w.load, default=None)
    if worker is None:
        raise HTTPException(503, "The server is not ready.")
    engine = worker.engine
    prompt = await asyncio.to_thread(prompts.fit, messages, engine.tokenizer, engine.max_len, sampling.max_tokens)
    return worker, worker.submit(prompt.ids, sampling, n), prompt.dropped


async def items_of(worker: Worker, ticket: Ticket, request: Request) -> AsyncIterator[Piece | End]:
    """A ticket's pieces and ends. When the client leaves, or whoever reads this stops, its replies end too."""
    left = asyncio.ensure_future(gone(request))
    left.add_done_callback(lambda _: worker.cancel(ticket))  # which does nothing to replies that have ended
    try:
        async for item in ticket:
            yield item
    finally:
        left.cancel()


async def gone(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(data: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def add_chat(app: FastAPI, workers: list[Worker], settings: Settings) -> None:
    """The published endpoint, which the page uses."""

    @app.post("/chat/completions")
    async def complete(ask: asks.Ask, request: Request):
        worker, ticket, dropped = await begin(ask, 1, workers, settings)

        async def stream():
            async with contextlib.aclosing(items_of(worker, ticket, request)) as items:
                async for item in items:
                    if isinstance(item, Piece):
                        kind = {} if item.kind == "text" else {"type": item.kind}
                        yield event({"token": item.text, "gpu": worker.gpu, **kind})
                    else:
                        last = {"finish": item.finish, "tokens": item.tokens, "parts": item.parts, "dropped": dropped}
                        yield event({"done": True, **last})

        return StreamingResponse(stream(), media_type="text/event-stream", headers=EVENTS)


def add_openai(app: FastAPI, workers: list[Worker], settings: Settings) -> None:
    """OpenAI's chat completions."""

    @app.post("/v1/chat/completions")
    async def complete(ask: asks.OpenAIAsk, request: Request):
        n = ask.n or 1
        if ask.model not in (None, settings.model):
            return refusal(404, f"There is no model of that name: this server has {settings.model}.")
        worker, ticket, dropped = await begin(ask, n, workers, settings)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": settings.model}
        headers = {"x-dropped-messages": str(dropped)}
        if ask.stream:
            usage = bool(ask.stream_options and ask.stream_options.include_usage)
            chunks = openai_chunks(worker, ticket, request, head, usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={**EVENTS, **headers})
        choices, tokens = await whole(worker, ticket, request)
        body = {**head, "object": "chat.completion", "choices": choices, "usage": usage_of(ticket, tokens)}
        return JSONResponse(body, headers=headers)


async def openai_chunks(
    worker: Worker, ticket: Ticket, request: Request, head: dict, usage: bool
) -> AsyncIterator[str]:
    """A reply as OpenAI streams it; a calculator step is a delta with `part` and no content."""
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(index: int, delta: dict, finish: str | None = None) -> str:
        return event({**head, "choices": [{"index": index, "delta": delta, "finish_reason": finish}]})

    for i in range(ticket.n):
        yield chunk(i, {"role": "assistant", "content": ""})
    tokens = 0
    async with contextlib.aclosing(items_of(worker, ticket, request)) as items:
        async for item in items:
            if isinstance(item, End) and item.finish == "error":
                yield event({"error": {"message": FAILED, "type": "server_error", "param": None, "code": None}})
            elif isinstance(item, End):
                tokens += item.tokens
                yield chunk(item.reply, {}, finish_reason(item))
            elif item.kind == "text":
                yield chunk(item.reply, {"content": item.text})
            else:
                yield chunk(item.reply, {"part": {"type": item.kind, "text": item.text}})
    if usage:
        yield event({**head, "choices": [], "usage": usage_of(ticket, tokens)})
    yield "data: [DONE]\n\n"


async def whole(worker: Worker, ticket: Ticket, request: Request) -> tuple[list[dict], int]:
    """Wait for every reply -> (OpenAI's choices, tokens)."""
    texts, ends = [""] * ticket.n, {}
    async with contextlib.aclosing(items_of(worker, ticket, request)) as items:
        async for item in items:
            if isinstance(item, End):
                ends[item.reply] = item
            elif item.kind == "text":
                texts[item.reply] += item.text
    if any(end.finish == "error" for end in ends.values()):
        raise HTTPException(500, FAILED)
    choices = []
    for i in range(ticket.n):
        message = {"role": "assistant", "content": texts[i], "parts": ends[i].parts}
        choices.append({"index": i, "message": message, "finish_reason": finish_reason(ends[i]), "logprobs": None})
    return choices, sum(end.tokens for end in ends.values())


def finish_reason(end: End) -> str:
    """OpenAI's word for why a reply ended."""
    return "length" if end.finish == "length" else "stop"


def usage_of(ticket: Ticket, tokens: int) -> dict:
    """OpenAI's count of tokens."""
    prompt = len(ticket.ids)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
