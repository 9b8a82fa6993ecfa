"""The web server: uvicorn, made patient with readers, impatient with those who dawdle, and orderly at its end.

uvicorn waits for ever for a request's head and for a reader that does not read; `Connection` does not, and has a short
way for the pieces of a stream. At SIGTERM or SIGINT the server refuses new requests (503) and lets running replies
finish for `drain` seconds before it ends them; a second signal ends at once. A worker that can never start ends the
server too.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import weakref

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.serve.pool import Pool

HEAD_SECONDS = 10.0  # from connecting, or the last answer, to a whole request head
WRITE_SECONDS = 30.0  # that a reader may leave a full buffer unread
MAX_CONNECTIONS = 4096
SPARE_FILES = 128  # file descriptors for all that is no connection
FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 2\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Connection(H11Protocol):
    """One client's connection, with an end to waiting."""

    limit = MAX_CONNECTIONS

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, "connection": weakref.proxy(self)}  # of every request's scope
        self.head_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        """Refuse one too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limit:
            transport.write(FULL)
            transport.close()
        else:
            self._await_head()

    def data_received(self, data) -> None:
        """A head that is whole stops its clock."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("head_timer")

    def on_response_complete(self) -> None:
        """The next head's clock starts; uvicorn's own for idle connections is shorter."""
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._await_head()

    async def stream(self, piece: bytes) -> None:
        """Send a piece of a body whose head, without a length, has been sent: past five layers and h11, which take
        longer over it than all the rest. h11 keeps no count of pieces; it sees the head and the end.
        """
        if self.flow.write_paused:
            await self.flow.drain()
        if piece and not self.cycle.disconnected:
            old = self.scope["http_version"] == "1.0"  # knows no chunks
            self.transport.write(piece if old else b"%x\r\n%b\r\n" % (len(piece), piece))

    def pause_writing(self) -> None:
        """The reader is slow: give it time."""
        super().pause_writing()
        self._stop("write_timer")
        self.write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        self._stop("write_timer")

    def connection_lost(self, exc) -> None:
        """No clock outlives the connection."""
        super().connection_lost(exc)
        self._stop("head_timer")
        self._stop("write_timer")

    def _await_head(self) -> None:
        self._stop("head_timer")
        self.head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it goes."""

    def __init__(self, config: uvicorn.Config, pool: Pool, drain: float):
        super().__init__(config)
        self.pool, self.drain = pool, drain
        self.closing: asyncio.Task | None = None

    def handle_exit(self, sig, frame) -> None:
        """The first signal begins to drain, a second one ends at once."""
        if self.pool.draining:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
        self.pool.draining = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to end."""
        if self.pool.failed:
            return True
        if self.pool.draining and self.closing is None:
            self.closing = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        end = asyncio.get_running_loop().time() + self.drain
        while self.pool.load and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        self.pool.cancel_all()
        self.should_exit = True


def config_of(app, host: str, port: int) -> uvicorn.Config:
    """How uvicorn runs: no access log (requests have counters), our connections."""
    return uvicorn.Config(
        app, host=host, port=port, http=Connection, ws="none", log_level="error", access_log=False, server_header=False,
        timeout_keep_alive=5, timeout_graceful_shutdown=2, backlog=1024, h11_max_incomplete_event_size=32 * 1024,
    )  # fmt: skip


def run(app, pool: Pool, host: str, port: int, drain: float) -> None:
    """Serve until a signal. UserError: a worker can never start."""
    raise_file_limit()
    Server(config_of(app, host, port), pool, drain).run()
    if pool.failed:
        raise pool.failed


def raise_file_limit() -> None:
    """Let the process hold as many connections as it means to."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, top), hard))
    Connection.limit = max(16, min(MAX_CONNECTIONS, max(soft, top) - SPARE_FILES))
