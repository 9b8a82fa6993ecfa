"""What stands before the endpoints: body size and time, same origin, API key, headers of every answer. Plain ASGI.

The server keeps no cookies, so what a foreign page could abuse is a browser that can reach it: a request with an
Origin that is not the server's own is refused, and so, on a loopback address, is a Host that is not local (DNS
rebinding).
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException

LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/", "/health", "/ready", "/logo.svg")  # need no key; nor do the page's files under /ui/
BODY_SECONDS = 20.0  # a request's body must have come by then
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware. api_key: None lets everyone in. local: the server listens on a loopback address only.

    count(path, status) is told of every answer.
    """

    def __init__(self, app, *, api_key: str | None, max_body: int, local: bool, count: Callable[[str, int], None]):
        self.app, self.api_key, self.max_body, self.local, self.count = app, api_key, max_body, local, count

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal:
            self.count(scope["path"], refusal[0])
            await answer(send, *refusal)
            return

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        await self.app(scope, self._limited(receive), send_with_headers)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.local and hostname(host) not in LOCAL:
            return 403, "This server answers to its local name only."
        origin = headers.get("origin")
        if origin is not None and origin.split("://")[-1] != host:
            return 403, "Requests from other sites are refused."
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or len(length) > 15 or int(length) > self.max_body:
            return 413, f"The request is larger than {self.max_body} bytes."
        is_open = path in OPEN_PATHS or path.startswith("/ui/")
        if self.api_key and not is_open and not self._knows_the_key(headers):
            return 401, "This server needs its API key: send Authorization: Bearer KEY."
        return None

    def _knows_the_key(self, headers: dict[str, str]) -> bool:
        given = headers.get("authorization", "").strip()
        given = given[7:].strip() if given[:7].lower() == "bearer " else given
        return hmac.compare_digest(given.encode(), self.api_key.encode())

    def _limited(self, receive):
        """Count and time the body while it comes: a client need not tell its length, nor tell it truly."""
        seen, whole, end = 0, False, asyncio.get_running_loop().time() + BODY_SECONDS

        async def count():
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "The request took too long to arrive.") from None
            seen += len(message.get("body", b""))
            if seen > self.max_body:
                raise HTTPException(413, f"The request is larger than {self.max_body} bytes.")
            whole = not message.get("more_body", False)
            return message

        return count


def hostname(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].split("]")[0]
    return host.rsplit(":", 1)[0] if host.count(":") == 1 else host


def problem(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error's body in both forms, the published `detail` and OpenAI's `error`."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"detail": message, "error": {"message": message, "type": kind, "param": param, "code": code}}


async def answer(send, status: int, message: str) -> None:
    """Send an error."""
    body = json.dumps(problem(status, message, code="invalid_api_key" if status == 401 else None)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
