"""How the server carries load: first token, time a token, goodput, health, memory; chat-shaped, over real sockets.

    python -m scripts.bench_serve open --rates=0.5,1,2,4 --seconds=60    # chats arrive at random, whatever is finished
    python -m scripts.bench_serve closed --clients=32 --seconds=60       # so many clients, each asks again at once
    python -m scripts.bench_serve soak --clients=64 --seconds=600        # the same, with pauses, for ten minutes
    python -m scripts.bench_serve scaling --clients=32 --repeats=3       # one worker and two, in turns

It starts scripts.chat_web with a model of random weights (depth 4, width 256, vocabulary 8192: the shape of the
baseline) and talks to its published endpoint as the page does. A chat has a few turns, each sent with all that came
before; half of them share a system prompt. Percentiles are over requests; goodput counts those whose first token came
within --slo-first seconds and whose tokens came within --slo-each on average. /health is asked ten times a second on
connections of its own all the while. Clients, front and engines share the cores of the machine.

Bars of issue 3 on 2 cores: 32 clients >= 3,300 tok/s together; two workers >= 1.6 times one; /health within 50 ms;
64 clients for 10 minutes without an error, p99 of the first token within 5 times p50, memory flat.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import torch
import tyro

from nanochat import checkpoint, cli, hardware, paths, saving
from nanochat.errors import UserError, refuse
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

WORDS = (
    "the sun is far and a cat sat on its mat when you ask me why water flows down to the sea I say that it must".split()
)
SYSTEM = "You are a helpful machine. " + " ".join(WORDS * 2)
START_SECONDS = 120
HEALTH_SECONDS = 0.1
MEMORY_SECONDS = 2.0


@dataclass(frozen=True)
class Config:
    """Which load, on which server."""

    kind: Annotated[str, tyro.conf.Positional] = "closed"  # open, closed, soak or scaling
    rates: str = "1,2,4"  # chats that arrive a second, one run each (open)
    clients: int = 32  # at once (closed, soak, scaling)
    seconds: float = 60.0  # of each run
    warmup: float = 5.0  # seconds before counting begins
    turns: int = 3  # of a chat
    words: int = 25  # of a question, about
    max_tokens: int = 96  # of a reply; random weights seldom end one sooner
    pause: float = 2.0  # mean seconds between a reply and the next question (open, soak)
    workers: int = 1  # engine processes (scaling: 1 and 2)
    slots: int = 32  # replies made together by one
    repeats: int = 3  # of each half (scaling)
    slo_first: float = 1.0  # seconds to a first token that count as good
    slo_each: float = 0.1  # seconds a token that count as good
    depth: int = 4
    width: int = 256
    vocab_size: int = 8192
    sequence_len: int = 512
    seed: int = 0
    html: bool = False  # ask as the page does, with HTML and log probabilities
    output: str = ""  # JSON of the results; empty: dev/bench/<date>_serve_<kind>.json

    def path(self) -> Path:
        """Where the results go."""
        return Path(self.output or f"dev/bench/{time.strftime('%Y-%m-%d')}_serve_{self.kind}.json")


def check(cfg: Config) -> None:
    """Refuse what makes no sense."""
    problems = [] if cfg.kind in ("open", "closed", "soak", "scaling") else [f"{cfg.kind} is no kind of load."]
    if min(cfg.clients, cfg.turns, cfg.words, cfg.max_tokens, cfg.workers, cfg.repeats) < 1 or cfg.seconds <= 0:
        problems.append("Clients, turns, words, tokens, workers, repeats and seconds must be 1 or more.")
    refuse(problems)


# -- a server ---------------------------------------------------------------------------------------------------------


def make_model(cfg: Config, base: Path) -> None:
    """A checkpoint of random weights, and a tokenizer of its size, in an artefact folder of their own."""
    ranks = [bytes([i]) for i in range(256)]
    for word in sorted({f" {word}".encode() for word in SYSTEM.split() + WORDS}):  # each word is a token, as in a chat
        ranks += [word[:end] for end in range(2, len(word) + 1) if word[:end] not in ranks]
    ranks += [pair for pair in (bytes([a, b]) for a in range(256) for b in range(256)) if pair not in ranks]
    tokenizer = Tokenizer.from_ranks(ranks[: cfg.vocab_size - 9])
    tokenizer.save(base / "tokenizer")
    heads = cfg.width // 64
    shape = (cfg.sequence_len, cfg.vocab_size, cfg.depth, heads, heads, cfg.width, "L")
    model = GPT(GPTConfig(*shape))
    model.init_weights(cfg.seed)
    meta = {"stage": "sft", "config": dataclasses.asdict(model.config), "tokenizer": tokenizer.fingerprint}
    root = base / checkpoint.folder("sft").relative_to(paths.base_dir()) / "bench"
    saving.save(root, 1, model=model, meta=meta, runtime=Runtime.single())


class Server:
    """scripts.chat_web in a process, with its engine processes."""

    def __init__(self, cfg: Config, base: Path, workers: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        flags = [f"-n={workers}", f"-p={self.port}", f"--slots={cfg.slots}", "--queue=256", "--temperature=1"]
        command = [sys.executable, "-m", "scripts.chat_web", *flags, "--device-type=cpu"]
        self.log = open(base / "server.log", "ab")
        env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=env)

    async def ready(self) -> None:
        """Wait until it answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(OSError, IndexError):
                if (await get(self.port, "/ready")) == 200 and (await stats(self.port))["available_workers"]:
                    return
            if self.process.poll() is not None:
                break
            await asyncio.sleep(0.2)
        raise UserError(f"The server did not start: see {self.log.name}.")

    def memory(self) -> dict[str, float]:
        """MiB of resident memory: the front, and all engine processes together."""
        front = psutil.Process(self.process.pid)
        engines = sum(child.memory_info().rss for child in front.children(recursive=True))
        return {"front": front.memory_info().rss / 2**20, "engines": engines / 2**20}

    def cpu(self) -> dict[str, float]:
        """Seconds of processor time so far: the front, all engine processes together, and the clients."""
        front = psutil.Process(self.process.pid)
        each = {"front": [front], "engines": front.children(recursive=True), "clients": [psutil.Process()]}
        return {name: sum(sum(p.cpu_times()[:2]) for p in those) for name, those in each.items()}

    def stop(self) -> None:
        """End it as an operator does."""
        self.process.terminate()
        self.process.wait(40)
        self.log.close()


# -- clients ----------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """What one request showed; times in seconds since the run began."""

    begin: float
    first: float = 0.0  # seconds to the first token
    each: float = 0.0  # seconds a token after it
    gap: float = 0.0  # the longest wait between two pieces
    tokens: int = 0
    status: int = 0
    failed: str = ""


@dataclass
class Load:
    """One run's clients and what they saw."""

    cfg: Config
    port: int
    begin: float = field(default_factory=time.perf_counter)
    requests: list[Request] = field(default_factory=list)
    health: list[float] = field(default_factory=list)  # milliseconds
    memory: list[dict] = field(default_factory=list)

    @property
    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.begin

    async def chat(self, random: random.Random, pause: float) -> None:
        """The turns of one chat."""
        messages = [{"role": "system", "content": SYSTEM}] if random.random() < 0.5 else []
        for turn in range(self.cfg.turns):
            if turn and pause:
                await asyncio.sleep(random.expovariate(1 / pause))
            words = random.choices(WORDS, k=random.randint(self.cfg.words // 2, self.cfg.words * 3 // 2))
            messages.append({"role": "user", "content": " ".join(words)})
            parts = await self.ask(messages)
            if not parts or self.now > self.cfg.seconds + self.cfg.warmup:
                return
            messages.append({"role": "assistant", "content": parts})

    async def ask(self, messages: list[dict]) -> list[dict]:
        """One request on a connection of its own -> the reply's parts."""
        request = Request(self.now)
        self.requests.append(request)
        more = {"html": True, "logprobs": 5} if self.cfg.html else {}
        body = json.dumps({"messages": messages, "max_tokens": self.cfg.max_tokens, **more}).encode()
        try:
            answer = await fetch(self.port, head("POST /chat/completions", len(body)) + body)
            request.status = answer.status
            done = json.loads(answer.data[answer.data.rindex(b'data: {"done"') + 6 :].split(b"\n\n", 1)[0])
        except (OSError, ValueError, IndexError) as error:
            request.failed = f"{request.status} {type(error).__name__}"
            return []
        request.tokens, request.gap, request.first = done["tokens"], answer.gap, answer.first - answer.begun
        request.each = (answer.latest - answer.first) / max(1, request.tokens - 1)
        if done["finish"] not in ("stop", "length"):
            request.failed = done["finish"]
        return done["parts"]

    async def watch_health(self) -> None:
        """Ask /health again and again."""
        while True:
            begin = time.perf_counter()
            await get(self.port, "/health")
            self.health.append(1000 * (time.perf_counter() - begin))
            await asyncio.sleep(HEALTH_SECONDS)

    async def watch_memory(self, server: Server) -> None:
        """Note how much memory the server has."""
        while True:
            self.memory.append({"at": self.now, **server.memory()})
            await asyncio.sleep(MEMORY_SECONDS)


class Answer(asyncio.Protocol):
    """One answer as it comes, with the times (by perf_counter) of its pieces. No stream: clients cost little so."""

    def __init__(self):
        self.data = bytearray()  # head and body
        self.over = asyncio.get_running_loop().create_future()
        self.begun = self.first = self.latest = 0.0  # of the request, the first piece of the body, and the newest
        self.gap = 0.0  # the longest wait between two pieces

    @property
    def status(self) -> int:
        """Of the HTTP answer."""
        return int(self.data.split(b" ", 2)[1])

    def data_received(self, data: bytes) -> None:
        """Another piece."""
        now = time.perf_counter()
        self.data += data
        if self.first:
            self.gap = max(self.gap, now - self.latest)
        elif self.data.partition(b"\r\n\r\n")[2]:
            self.first = now
        self.latest = now

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, or a broken connection."""
        if self.over.cancelled():
            return
        if exc:
            self.over.set_exception(exc)
        else:
            self.over.set_result(None)


async def fetch(port: int, request: bytes) -> Answer:
    """Send a request on a connection of its own -> the whole answer."""
    transport, answer = await asyncio.get_running_loop().create_connection(Answer, "127.0.0.1", port)
    try:
        transport.write(request)
        answer.begun = time.perf_counter()
        await answer.over
    finally:
        transport.close()
    return answer


def head(line: str, length: int = 0) -> bytes:
    """A request's head."""
    more = f"content-type: application/json\r\ncontent-length: {length}\r\n" if length else ""
    return f"{line} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{more}\r\n".encode()


async def get(port: int, path: str) -> int:
    """The status of a GET."""
    return (await fetch(port, head(f"GET {path}"))).status


async def stats(port: int) -> dict:
    """What /stats says."""
    return json.loads((await fetch(port, head("GET /stats"))).data.partition(b"\r\n\r\n")[2])


# -- runs -------------------------------------------------------------------------------------------------------------


async def run(cfg: Config, server: Server, rate: float | None = None) -> dict:
    """One run -> its figures. rate: chats a second that arrive at random; None: a fixed number of clients."""
    await server.ready()
    load = Load(cfg, server.port)
    watchers = [asyncio.create_task(load.watch_health()), asyncio.create_task(load.watch_memory(server))]
    end, before = cfg.warmup + cfg.seconds, server.cpu()
    if rate is None:
        clients = [asyncio.create_task(client(cfg, load, i, end)) for i in range(cfg.clients)]
    else:
        clients = await arrivals(cfg, load, rate, end)
    await asyncio.gather(*clients)
    for watcher in watchers:
        watcher.cancel()
    made = max(1, sum(request.tokens for request in load.requests))
    cpu = {name: round(1e6 * (used - before[name]) / made, 1) for name, used in server.cpu().items()}
    return {"clients" if rate is None else "chats_per_second": cfg.clients if rate is None else rate,
            **figures(cfg, load), "cpu_us_per_token": cpu,
            "engines": [w["engine"] for w in (await stats(server.port))["workers"]]}  # fmt: skip


async def client(cfg: Config, load: Load, number: int, end: float) -> None:
    """One who chats until the end; they begin one after the other."""
    dice = random.Random(f"{cfg.seed} {number}")
    await asyncio.sleep(cfg.warmup * number / cfg.clients)
    while load.now < end:
        await load.chat(dice, cfg.pause if cfg.kind == "soak" else 0.0)


async def arrivals(cfg: Config, load: Load, rate: float, end: float) -> list[asyncio.Task]:
    """Chats that begin at random times."""
    dice, tasks = random.Random(cfg.seed), []
    while load.now < end:
        tasks.append(asyncio.create_task(load.chat(random.Random(dice.random()), cfg.pause)))
        await asyncio.sleep(dice.expovariate(rate))
    return tasks


def figures(cfg: Config, load: Load) -> dict:
    """What a run showed between its warm-up and its end."""
    end = cfg.warmup + cfg.seconds
    counted = [r for r in load.requests if cfg.warmup <= r.begin < end]
    good = [r for r in counted if not r.failed]
    well = [r for r in good if r.first <= cfg.slo_first and r.each <= cfg.slo_each]
    tokens = sum(share(r, cfg.warmup, end) for r in load.requests if not r.failed)
    failures = [r.failed for r in counted if r.failed]
    first = spread([1000 * r.first for r in good])
    return {
        "requests": len(counted),
        "failed": {name: failures.count(name) for name in sorted(set(failures))},
        "tokens_per_second": round(tokens / cfg.seconds, 1),
        "requests_per_second": round(len(good) / cfg.seconds, 2),
        "goodput_per_second": round(len(well) / cfg.seconds, 2),
        "first_token_ms": first,
        "first_token_p99_by_p50": round(first["p99"] / first["p50"], 2) if first else None,
        "per_token_ms": spread([1000 * r.each for r in good if r.tokens > 1]),
        "longest_gap_ms": spread([1000 * r.gap for r in good]),
        "health_ms": spread(load.health),
        "memory_mib": memory_of(load.memory),
    }


def share(request: Request, low: float, high: float) -> float:
    """How many of a request's tokens came between two times, taking them as evenly spread."""
    begin = request.begin + request.first
    length = max(1e-9, request.each * max(1, request.tokens - 1))
    return request.tokens * max(0.0, min(high, begin + length) - max(low, begin)) / length


def spread(values: list[float]) -> dict[str, float]:
    """Percentiles; {} of nothing."""
    values = sorted(values)
    if not values:
        return {}
    at = {f"p{p}": round(values[min(len(values) - 1, len(values) * p // 100)], 2) for p in (50, 95, 99)}
    return {**at, "max": round(values[-1], 2)}


def memory_of(samples: list[dict]) -> dict:
    """MiB of each kind of process: means of the quarters of a run, and the peak."""
    parts = [samples[len(samples) * i // 4 : len(samples) * (i + 1) // 4] or samples for i in range(4)]
    return {
        kind: {
            "quarters": [round(statistics.mean(s[kind] for s in part), 1) for part in parts],
            "peak": round(max(s[kind] for s in samples), 1),
        }
        for kind in ("front", "engines")
        if samples
    }


def scaling(cfg: Config, base: Path) -> dict:
    """One worker and two in turns -> all runs, and the ratio of the medians of tokens a second."""
    runs: dict[int, list[dict]] = {1: [], 2: []}
    for _ in range(cfg.repeats):
        for workers, done in runs.items():
            done.append(served(cfg, base, workers, None))
    median = {n: statistics.median(r["tokens_per_second"] for r in done) for n, done in runs.items()}
    return {"one": runs[1], "two": runs[2], "ratio": round(median[2] / median[1], 3)}


def served(cfg: Config, base: Path, workers: int, rate: float | None) -> dict:
    """A run on a fresh server."""
    server = Server(cfg, base, workers)
    try:
        result = {"workers": workers, **asyncio.run(run(cfg, server, rate))}
    finally:
        server.stop()
    print(json.dumps({k: v for k, v in result.items() if k != "engines"}), flush=True)
    return result


def main(cfg: Config) -> dict:
    """Measure, print, and write the results."""
    check(cfg)
    with tempfile.TemporaryDirectory(prefix="bench_serve_") as folder:
        make_model(cfg, Path(folder))
        torch.set_num_threads(1)
        if cfg.kind == "scaling":
            results: dict | list = scaling(cfg, Path(folder))
        elif cfg.kind == "open":
            results = [served(cfg, Path(folder), cfg.workers, float(rate)) for rate in cfg.rates.split(",")]
        else:
            results = served(cfg, Path(folder), cfg.workers, None)
    command = "python -m scripts.bench_serve " + " ".join(sys.argv[1:])
    report = {**hardware.about(), "command": command, "config": dataclasses.asdict(cfg), "results": results}
    cfg.path().parent.mkdir(parents=True, exist_ok=True)
    paths.write_json(cfg.path(), report)
    print(f"written to {cfg.path()}")
    return report


if __name__ == "__main__":
    cli.run(main, Config)
