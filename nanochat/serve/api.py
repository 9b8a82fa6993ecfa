"""The HTTP interface: the page, health, errors in one form, and the endpoints of published.py and openai.py.

GET  /  /ui/{file}  /logo.svg            the chat page (nanochat/ui.html and nanochat/ui/)
GET  /health  /ready  /stats  /metrics   alive; whether models are loaded (503 if not); how busy; for Prometheus
POST /chat/completions  /render          the published stream; messages as safe HTML
POST /v1/chat/completions  /v1/completions   GET /v1/models      OpenAI's
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from nanochat.errors import UserError
from nanochat.serve import asks
from nanochat.serve.desk import Desk, Failed, Gone, UnknownModel
from nanochat.serve.guard import Guard, problem
from nanochat.serve.limits import TooMany
from nanochat.serve.openai import add_openai
from nanochat.serve.pool import Busy, NotReady
from nanochat.serve.published import add_published

PAGE = Path(__file__).resolve().parents[1]
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types nanochat"
)
LOGO = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#2f6f6b"/>'
    '<path d="M9 23V9l14 14V9" fill="none" stroke="#fff" stroke-width="3.5" stroke-linejoin="round"/></svg>'
)
RETRY_SECONDS = 2
BUSY = "The server is busy: try again in a moment."


def create_app(desk: Desk, run_workers: bool = True) -> FastAPI:
    """The application. run_workers: it starts the engine processes when it starts, and ends them when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        if run_workers:
            desk.pool.start()
            desk.renderer.start()
        try:
            yield
        finally:
            await desk.renderer.close()
            await desk.pool.close()

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None)
    settings = desk.settings
    app.add_middleware(
        Guard, api_key=settings.api_key, max_body=asks.MAX_BODY, local=settings.local, count=counter(app, desk)
    )
    add_errors(app)
    add_published(app, desk)  # first: paths are tried in this order
    add_openai(app, desk)
    add_status(app, desk)
    add_page(app)
    return app


# -- errors -----------------------------------------------------------------------------------------------------------


def refusal(status: int, message: str, seconds: int = RETRY_SECONDS, **more: Any) -> JSONResponse:
    """An error in both forms, the published `detail` and OpenAI's `error`."""
    headers = {"retry-after": str(seconds)} if status in (429, 503) else None
    return JSONResponse(problem(status, asks.whole(message), **more), status, headers)


def add_errors(app: FastAPI) -> None:
    """What becomes of each kind of error."""
    answers = {
        UserError: lambda error: refusal(400, str(error)),
        UnknownModel: lambda error: refusal(404, str(error), param="model", code="model_not_found"),
        Gone: lambda error: refusal(499, "The client has left."),
        Busy: lambda error: refusal(429, BUSY, code="server_busy"),
        TooMany: lambda error: refusal(429, str(error), error.seconds, code="rate_limit_exceeded"),
        Failed: lambda error: refusal(500, str(error)),
        NotReady: lambda error: refusal(503, str(error), code="not_ready"),
        HTTPException: lambda error: refusal(error.status_code, str(error.detail)),
    }
    for kind, answer in answers.items():
        app.exception_handler(kind)(lambda request, error, answer=answer: answer(error))
    app.exception_handler(RequestValidationError)(invalid)


async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """A body of wrong types: 422 as published, 400 under /v1 as OpenAI; never an echo of what was sent."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    status = 400 if request.url.path.startswith("/v1/") else 422
    return refusal(status, f"{where or 'body'}: {first['msg']}", param=where[:100] or None)


def counter(app: FastAPI, desk: Desk) -> Callable[[str, int], None]:
    """Counts a request under its path; unknown paths together, so that nobody can make new series."""

    def count(path: str, status: int) -> None:
        known = path in COUNTED or path.startswith("/ui/")
        desk.metrics.requests.labels(path if known else "other", str(status)).inc()

    return count


COUNTED = (
    "/", "/health", "/ready", "/stats", "/metrics", "/logo.svg", "/render", "/chat/completions",
    "/v1/chat/completions", "/v1/completions", "/v1/models",
)  # fmt: skip


# -- the page and the state -------------------------------------------------------------------------------------------


def add_page(app: FastAPI) -> None:
    """The chat page: its files are read once, so no name of a request ever reaches the disk."""
    files = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in sorted((PAGE / "ui").iterdir())}
    files["/"] = ((PAGE / "ui.html").read_bytes(), TYPES[".html"])

    def send(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404, "There is no such file.")
        content, kind = files[name]
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {"cache-control": "no-cache", "etag": tag, "content-security-policy": POLICY}
        same = request.headers.get("if-none-match") == tag
        return Response(b"" if same else content, 304 if same else 200, headers, kind)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request):
        return send("/", request)

    @app.get("/ui/{name}", include_in_schema=False)
    async def file(name: str, request: Request):
        return send(name, request)

    @app.get("/logo.svg", include_in_schema=False)
    async def logo():
        return Response(LOGO, media_type="image/svg+xml")


def add_status(app: FastAPI, desk: Desk) -> None:
    """Is it alive, is it ready, how busy is it, what has it done."""
    pool = desk.pool

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health():
        return {"status": "ok", "ready": pool.ready, "num_gpus": len(pool.workers), "available_workers": pool.free()}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={503: {}})
    async def ready():
        if not pool.ready:
            raise NotReady("The server is closing." if pool.draining else "The model is loading.")
        return {"status": "ready"}

    @app.get("/stats")
    async def stats():
        workers = [
            {"gpu_id": w.number, "model": w.model, "device": w.facts.get("device"), "ready": w.ready, "replies": w.load,
             "tokens": w.tokens, "restarts": w.restarts, "engine": w.stats}
            for w in pool.workers
        ]  # fmt: skip
        free = pool.free()
        counts = {"total_workers": len(workers), "available_workers": free, "busy_workers": len(workers) - free}
        return {**counts, "workers": workers}

    @app.get("/metrics", include_in_schema=False)
    async def metrics():
        return Response(desk.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/render", responses={400: {}, 429: {}})
    async def render(ask: asks.RenderAsk, request: Request):
        messages, address = ask.check(), request.client.host if request.client else ""
        desk.clients.enter(address, 1, asks=0)  # a chat that is opened is no question, but costs as much as a reply
        try:
            return {"messages": [await desk.renderer.blocks(parts) for parts in messages]}
        finally:
            desk.clients.leave(address, 1)
