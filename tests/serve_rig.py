"""A whole server in this process for the tests: uvicorn on a free port, engine workers as threads over socket pairs."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx
from tiny_model import TOKENIZER, Chain

from nanochat.engine import Engine
from nanochat.sampling import Sampling
from nanochat.serve import server
from nanochat.serve.api import create_app
from nanochat.serve.desk import Desk, Settings
from nanochat.serve.pool import Pool, Process, Worker
from nanochat.serve.worker import Worker as EngineWorker

ALPHABET = "abcdefghijklmnopqrstuvwxyz"  # said for ever
HELLO = [{"role": "user", "content": "Hi"}]


class Thread:
    """Stands in for an engine process: the same loop over a socket pair, in a thread."""

    def __init__(self, engine):
        self.engine, self.worker, self.starts, self.held = engine, None, 0, False

    async def start(self, order):
        """What nanochat.serve.pool.spawn does; waits while it is held."""
        while self.held:
            await asyncio.sleep(0.005)
        mine, its = socket.socketpair()
        self.starts += 1
        self.mine = mine
        config = self.engine.model.config
        facts = {
            "context": self.engine.max_len,
            "vocab": config.vocab_size,
            "slots": self.engine.slots,
            "device": "cpu",
        }
        source, sink = its.makefile("rb"), its.makefile("wb")
        self.worker = EngineWorker(self.engine, source, sink)
        thread = threading.Thread(target=self._run, args=(its, source, sink, facts), daemon=True)
        thread.start()
        reader, writer = await asyncio.open_connection(sock=mine)

        async def wait():
            while thread.is_alive():
                await asyncio.sleep(0.005)

        return Process(reader, writer, self.kill, wait)

    def _run(self, its, source, sink, facts):
        from nanochat.serve import wire

        wire.write(sink, {"ready": facts})
        self.worker.run()
        its.shutdown(socket.SHUT_RDWR)
        its.close()

    def kill(self):
        """End the connection, as the death of a process does."""
        with contextlib.suppress(OSError):
            self.mine.shutdown(socket.SHUT_RDWR)


class Rig:
    """What a test may look at: url, pool, desk, and of worker 0 the engine and the thread."""

    def __init__(self, url, desk, threads, uvicorn):
        self.url, self.desk, self.pool, self.threads, self.uvicorn = url, desk, desk.pool, threads, uvicorn

    @property
    def engine(self):
        """The engine of the first worker."""
        return self.threads[0].worker.engine

    @property
    def load(self):
        """Replies in flight."""
        return self.pool.load


@contextlib.contextmanager
def serving(
    text=ALPHABET,
    seconds=0.0,
    slots=4,
    queue=4,
    workers=1,
    models=("test",),
    drain=1.0,
    max_tokens=30,
    port=0,
    **settings,
):
    """A server whose models say `text` (see tiny_model.Chain): yields a Rig."""
    threads = [
        Thread(Engine(Chain(text, seconds), TOKENIZER, slots=slots, frozen=True, guesses=0))
        for _ in range(workers * len(models))
    ]
    fronts = [
        Worker(model, i, {}, threads[m * workers + i].start) for m, model in enumerate(models) for i in range(workers)
    ]
    desk = Desk.of(Pool(fronts, queue), TOKENIZER, Settings(Sampling(temperature=0, max_tokens=max_tokens), **settings))
    desk.renderer.seconds = 60.0  # a loaded machine may take long to start it, and would show plain text
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    config = server.config_of(create_app(desk), "127.0.0.1", 0)
    uvicorn = server.Server(config, desk.pool, drain)
    thread = threading.Thread(target=uvicorn.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: uvicorn.started and desk.pool.ready, 20)
        yield Rig(f"http://127.0.0.1:{listener.getsockname()[1]}", desk, threads, uvicorn)
    finally:
        uvicorn.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive() and desk.pool.load == 0


def post(url, path="/chat/completions", status=200, headers=None, **body):
    """POST a JSON body and expect a status."""
    answer = httpx.post(url + path, json=body, timeout=60, headers=headers)
    assert answer.status_code == status, answer.text
    return answer


def events(answer):
    """The data of a stream's events."""
    return [json.loads(line[6:]) for line in answer.text.split("\n\n") if line and line != "data: [DONE]"]


def said(events):
    """The text of the published stream."""
    return "".join(event.get("token", "") for event in events)


def halted(rig):
    """Let no step of the first engine end before the event that is returned is set."""
    model, gate = rig.engine.model, threading.Event()
    forward = model.forward
    model.forward = lambda *a, **more: gate.wait(60) and forward(*a, **more)
    return gate


def until(condition, seconds=30):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
