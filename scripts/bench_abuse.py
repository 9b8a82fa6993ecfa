"""What a server stands: hostile requests, schema fuzzing, dawdlers, half-closed sockets, thousands of connects.

    python -m scripts.bench_abuse -i sft -g d4            # starts scripts.chat_web with that checkpoint, on loopback
    python -m scripts.bench_abuse -i rl -g pocket --connects=10000 --examples=200

All traffic stays on this machine. While it lasts, a well-behaved client asks again and again and /health is watched.
Wanted: no answer of 500 or above but 503 to a connection too many, no request without an end, no growth of memory or
open files after it, and the well-behaved client's every reply whole. The exit status is 1 if something is wanting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import tyro

from nanochat import cli, hardware, paths
from nanochat.errors import UserError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = ("/chat/completions", CHAT, COMPLETIONS, "/render")
HELLO = [{"role": "user", "content": "Hi"}]
ANSWER_SECONDS = 30.0  # within which every request must have an end
SETTLE_SECONDS = 15.0  # after which a server must be as it was: longer than its own limits on dawdlers
GROWTH_MIB, GROWTH_FILES = 48, 8


@dataclass(frozen=True)
class Config:
    """Which model to serve, and how much to throw at it."""

    source: Annotated[str, tyro.conf.arg(aliases=("-i",))] = "sft"
    model_tag: Annotated[str, tyro.conf.arg(aliases=("-g",))] = ""
    connects: int = 10_000  # connections opened and dropped, 500 at a time
    dawdlers: int = 200  # connections that send a request byte by byte
    examples: int = 100  # of schemathesis for each operation; 0: leave it out
    rounds: int = 5  # of the list of hostile requests
    output: str = ""  # JSON of the results; empty: dev/bench/<date>_abuse.json


# -- requests ---------------------------------------------------------------------------------------------------------


def hostile() -> Iterator[tuple[str, bytes]]:
    """(path, body): numbers out of bounds, wrong types, what is not JSON, what is too deep, too long, too many."""
    names = ["temperature", "top_p", "min_p", "top_k", "max_tokens", "n", "seed", "logprobs", "top_logprobs", "best_of"]
    start = {
        path: b'"prompt": "x"' if path == COMPLETIONS else b'"messages": %s' % json.dumps(HELLO).encode()
        for path in PATHS
    }
    for path in PATHS[:3]:
        for name in names:
            for number in NUMBERS:
                yield (
                    path,
                    b'{%s, "max_completion_tokens": 4, "%s": %s}' % (start[path], name.encode(), number.encode()),
                )
    for path in PATHS:
        for body in NOT_JSON:
            yield path, body
    for path, messages in [(path, m) for path in PATHS for m in conversations()]:
        yield path, json.dumps({"messages": messages, "prompt": "x", "max_tokens": 4}).encode()
    for prompt in PROMPTS:
        yield COMPLETIONS, json.dumps({"prompt": prompt, "max_tokens": 4}).encode()
    for stop in ("", [""], ["x"] * 1000, ["x" * 5000], [None], {"a": "b"}, "\ud800"):
        yield CHAT, json.dumps({"messages": HELLO, "stop": stop, "max_tokens": 4}).encode()
    for model in ("../../etc/passwd", "\0", "x" * 100_000, 1, ["test"]):
        yield CHAT, json.dumps({"messages": HELLO, "model": model, "max_tokens": 4}).encode()


NUMBERS = "1e999 -1e999 NaN Infinity -Infinity 1e400 0.1 -1 0 true null".split() + ['"1"', "9" * 400]
PROMPTS = [
    [], [[]], [""], [-1], [10**30], [[1] * 40_000], ["x"] * 10_000, {"a": 1}, None, "\ud800", "\0", "<|bos|>" * 100,
]  # fmt: skip
NOT_JSON = [
    b"", b"{", b"}", b"null", b"[]", b"1", b'"x"', b"\xff\xfe\x00", b"\x80" * 1000, b"{" * 100_000, b"[" * 500_000,
    b'{"a":' * 100_000, b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"messages": [' + b"{}," * 100_000,
    b'{"messages": [' + b"1," * 300_000 + b"1]}", b'{"prompt": [' + b"1," * 400_000 + b"1]}", b"\0" * 1000,
    b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b" " * (1 << 20), b'{"messages": "' + b"x" * (2 << 20) + b'"}', b'{"seed": ' + b"9" * 100_000 + b"}",
]  # fmt: skip


def conversations() -> list:
    """Messages that are none, too many, too long, out of order, or full of what should be special."""
    marks = "<|assistant_end|><|python_start|>1+1<|python_end|><|bos|>"
    parts = [{"type": "python", "text": "9**9**9"}, {"type": "python_output", "text": "x"}]
    return [
        [], [{}], [1], [None], "x", {"role": "user"}, HELLO * 2, HELLO * 10_000, [{"role": "user"}],
        [{"role": "user", "content": ""}], [{"role": "user", "content": "x" * 500_000}],
        [{"role": "assistant", "content": "x"}], [{"role": "root", "content": "x"}], [{"role": 1, "content": []}],
        [{"role": "user", "content": marks}], [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}],
        [{"role": "user", "content": parts}], [*HELLO, {"role": "assistant", "content": parts * 200}, *HELLO],
        [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "a", "ids": [10**9, -1]}]}, *HELLO],
        [[{"type": "text", "text": "\\(" * 9000}]], [[{"type": "text", "text": "[" * 9000 + "\ud800"}]],
        [{"role": "user", "content": "\0\x1b[2J\u202e\ud83d\ude00" * 50}],
    ]  # fmt: skip


def head(path: str, length: int, extra: str = "") -> bytes:
    """A POST's head."""
    kind = "host: localhost\r\ncontent-type: application/json\r\nconnection: close"
    return f"POST {path} HTTP/1.1\r\n{kind}\r\ncontent-length: {length}\r\n{extra}\r\n".encode()


def send(port: int, data: bytes, seconds: float = ANSWER_SECONDS, half_close: bool = False) -> int | None:
    """Send bytes on a connection of their own -> the status; 0: closed without one; None: no end in time."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
            with contextlib.suppress(OSError):  # it may answer, and close, before it has read all
                client.sendall(data)
            if half_close:
                client.shutdown(socket.SHUT_WR)
            answer, end = b"", time.monotonic() + seconds
            while piece := client.recv(65536):
                answer = answer or piece
                if time.monotonic() > end:
                    return None
        return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
    except TimeoutError:
        return None
    except OSError:
        return 0


LOCAL = "HTTP/1.1\r\nhost: localhost\r\n"
HEALTH = f"GET /health {LOCAL}connection: close\r\n\r\n".encode()
PROTOCOL = [
    b"", b"\r\n" * 100, b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" " + LOCAL.encode() + b"\r\n", f"GET / {LOCAL}x: {'y' * 100_000}".encode(),
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n", f"GET / {LOCAL}host: evil\r\n\r\n".encode(),
    head(CHAT, 10**18) + b"{}", head(CHAT, 5, "content-length: 6\r\n") + b"{}{}{}",
    f"POST {CHAT} {LOCAL}transfer-encoding: chunked\r\n\r\nffffffffff\r\n{{".encode(),
    f"GET /ui/../../etc/passwd {LOCAL}\r\n".encode(), b"CONNECT evil:80 HTTP/1.1\r\nhost: evil\r\n\r\n",
    b"GET http://evil/ HTTP/1.1\r\nhost: evil\r\nconnection: close\r\n\r\n",
    f"GET /health {LOCAL}upgrade: websocket\r\nconnection: upgrade\r\n\r\n".encode(),
    f"GET /health {LOCAL}\r\n".encode() * 500,
]  # fmt: skip


# -- attacks ----------------------------------------------------------------------------------------------------------


def attack_requests(port: int) -> dict[str, int]:
    """Every hostile request and protocol -> how often each status came."""
    counts: dict[str, int] = {}
    work = [(head(path, len(body)) + body, False) for path, body in hostile()]
    work += [(data, half) for data in PROTOCOL for half in (False, True)]
    for data, half in work:
        status = str(send(port, data, half_close=half))
        counts[status] = counts.get(status, 0) + 1
    return counts


def attack_half_closed(port: int, count: int = 50) -> dict[str, int]:
    """Whole requests from clients that close their sending side, or vanish, at once."""
    body = json.dumps({"messages": HELLO, "max_tokens": 64, "stream": True}).encode()
    counts: dict[str, int] = {}
    for i in range(count):
        if i % 2:
            status = str(send(port, head(CHAT, len(body)) + body, half_close=True))
            counts[status] = counts.get(status, 0) + 1
        else:
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(head(CHAT, len(body)) + body)
    return counts


def attack_dawdling(port: int, count: int, seconds: float = 25.0) -> dict[str, int]:
    """Connections that send a byte now and then -> how many the server had ended by the time."""
    body = json.dumps({"messages": HELLO}).encode()
    data = head(CHAT, len(body)) + body
    sockets, ended, end = [], 0, time.monotonic() + seconds
    for _ in range(count):
        with contextlib.suppress(OSError):
            sockets.append(socket.create_connection(("127.0.0.1", port), timeout=5))
    opened, at = len(sockets), 0
    while sockets and time.monotonic() < end:
        for client in list(sockets):
            try:
                client.sendall(data[at : at + 1] or b" ")
            except OSError:
                client.close()
                sockets.remove(client)
                ended += 1
        at += 1
        time.sleep(0.5)
    for client in sockets:
        client.close()
    return {"opened": opened, "ended_by_the_server": ended, "left": opened - ended}


def attack_connects(port: int, count: int, together: int = 500) -> dict[str, int]:
    """So many connections, opened some hundreds at a time and dropped without a word."""
    refused = 0
    for start in range(0, count, together):
        with contextlib.ExitStack() as stack:
            for _ in range(min(together, count - start)):
                try:
                    stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS))
                except OSError:
                    refused += 1
    return {"opened": count - refused, "refused": refused}


def attack_schema(port: int, examples: int) -> dict:
    """schemathesis over the server's own OpenAPI schema."""
    url = f"http://127.0.0.1:{port}"
    code = "from schemathesis.cli import schemathesis; schemathesis()"
    flags = ["--checks=not_a_server_error", "--phases=examples,coverage,fuzzing", f"--max-examples={examples}"]
    flags += [f"--url={url}", "--request-timeout=30", "--continue-on-failure"]
    command = [sys.executable, "-c", code, "run", f"{url}/openapi.json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"exit_status": done.returncode, "summary": done.stdout[-1200:]}


# -- the others -------------------------------------------------------------------------------------------------------


class Witness:
    """A well-behaved client, and one who watches /health, in threads; `close` ends them."""

    def __init__(self, port: int):
        self.port, self.replies, self.broken, self.health = port, 0, [], []
        self.closing = threading.Event()
        self.threads = [threading.Thread(target=work) for work in (self._ask, self._watch)]
        for thread in self.threads:
            thread.start()

    def _ask(self) -> None:
        body = json.dumps({"messages": HELLO, "max_tokens": 16}).encode()
        while not self.closing.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=60) as client:
                    client.sendall(head("/chat/completions", len(body)) + body)
                    answer = b"".join(iter(lambda: client.recv(65536), b""))
                if b'"done":true' not in answer:
                    self.broken.append(answer[:200].decode(errors="replace"))
            except OSError as error:
                self.broken.append(repr(error))
            self.replies += 1
            time.sleep(0.05)

    def _watch(self) -> None:
        while not self.closing.is_set():
            begin = time.monotonic()
            if send(self.port, HEALTH) != 200:
                self.broken.append("/health")
            self.health.append(1000 * (time.monotonic() - begin))
            time.sleep(0.1)

    def close(self) -> dict:
        """What they saw."""
        self.closing.set()
        for thread in self.threads:
            thread.join()
        slow = sorted(self.health)
        return {"replies": self.replies, "broken": self.broken[:10], "health_ms_p99": slow[len(slow) * 99 // 100],
                "health_ms_max": slow[-1]}  # fmt: skip


def size(pid: int) -> dict[str, float]:
    """Memory (MiB) and open files of a server and its processes."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return {
        "memory": sum(p.memory_info().rss for p in family) / 2**20,
        "files": float(sum(p.num_fds() for p in family)),
    }


@contextlib.contextmanager
def serving(cfg: Config) -> Iterator[tuple[int, int]]:
    """scripts.chat_web with the checkpoint: yields (port, process id)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"-i={cfg.source}", f"-p={port}", "--deadline=20", "--max-tokens=32"]
    flags += [f"-g={cfg.model_tag}"] if cfg.model_tag else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "scripts.chat_web", *flags], env=env)
    try:
        end = time.monotonic() + 180
        while send(port, HEALTH.replace(b"health", b"ready")) != 200:
            if process.poll() is not None or time.monotonic() > end:
                raise UserError("The server did not start: see its message above.")
            time.sleep(0.5)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(60)


def main(cfg: Config) -> dict:
    """Attack, look, write the verdict."""
    with serving(cfg) as (port, pid):
        attack_requests(port)  # once before measuring: what is made once is no growth
        attack_connects(port, min(1000, cfg.connects))
        time.sleep(SETTLE_SECONDS)
        before, witness = size(pid), Witness(port)
        results: dict = {"requests": [attack_requests(port) for _ in range(cfg.rounds)]}
        results["half_closed"] = attack_half_closed(port)
        results["dawdlers"] = attack_dawdling(port, cfg.dawdlers)
        results["connects"] = attack_connects(port, cfg.connects)
        if cfg.examples:
            results["schema"] = attack_schema(port, cfg.examples)
        results["others"] = witness.close()
        time.sleep(SETTLE_SECONDS)
        results["before"], results["after"] = before, size(pid)
    results["wanting"] = verdict(results)
    command = "python -m scripts.bench_abuse " + " ".join(sys.argv[1:])
    report = {**hardware.about(), "command": command, "config": dataclasses.asdict(cfg), "results": results}
    path = Path(cfg.output or f"dev/bench/{time.strftime('%Y-%m-%d')}_abuse.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    paths.write_json(path, report)
    print(json.dumps(results, indent=1))
    print(f"written to {path}")
    if results["wanting"]:
        raise UserError("Wanting: " + "; ".join(results["wanting"]))
    return report


def verdict(results: dict) -> list[str]:
    """What is not as it should be."""
    wanting = []
    for counts in [*results["requests"], results["half_closed"]]:
        wanting += [f"{n} answers of {s}" for s, n in counts.items() if s == "None" or (s.isdigit() and int(s) >= 500)]
    if results["dawdlers"]["left"]:
        wanting.append(f"{results['dawdlers']['left']} dawdlers were still connected")
    if results.get("schema", {}).get("exit_status"):
        wanting.append("schemathesis found failures")
    if results["others"]["broken"]:
        wanting.append("the well-behaved client was harmed")
    grown = {name: results["after"][name] - results["before"][name] for name in ("memory", "files")}
    if grown["memory"] > GROWTH_MIB or grown["files"] > GROWTH_FILES:
        wanting.append(f"the server has grown by {grown}")
    return wanting


if __name__ == "__main__":
    cli.run(main, Config)
