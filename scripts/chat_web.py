"""Serve trained models: a chat page, a stream of events, and OpenAI's API, each device with a process of its own.

    python -m scripts.chat_web                          # http://localhost:8000, this machine only
    python -m scripts.chat_web -i rl -g d4 -t 0.6       # the reinforced model of tag d4
    python -m scripts.chat_web -i sft,rl                # two models, to be chosen in the page
    python -m scripts.chat_web -n 8 --host 0.0.0.0 --api-key SECRET     # 8 GPUs, one model each, open to the network

Needs a trained checkpoint (scripts.chat_sft). Requests are batched token by token, so many people share a device; a
reader that leaves is dropped within a token; the turns of a chat go where the beginning is still known. On a CPU -n is
the number of processes, which share the cores but one. Without --host only this machine can connect. The key
can also come from the environment variable NANOCHAT_API_KEY. No text of a conversation is logged unless --log-text.
SIGTERM and Ctrl-C let running replies finish for --drain seconds; a second one ends at once.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Annotated

import tyro

from nanochat import checkpoint, cli, hardware, runtime
from nanochat.errors import refuse
from nanochat.sampling import Sampling
from nanochat.serve import server
from nanochat.serve.api import create_app
from nanochat.serve.asks import MAX_TOKENS
from nanochat.serve.desk import Desk, Settings
from nanochat.serve.guard import LOCAL
from nanochat.serve.pool import Pool, Worker
from nanochat.tokenizer import Tokenizer

OPEN_AT_ONCE, OPEN_PER_MINUTE = 8, 60  # a client's limits where the network can come in


def flag(*aliases: str):
    """Short names of a flag."""
    return tyro.conf.arg(aliases=aliases)


@dataclass(frozen=True)
class Config:
    """Which models, how they speak by default, and who may connect."""

    num_gpus: Annotated[int, flag("-n")] = 1  # engine processes, one a GPU; on a CPU so many share its cores
    source: Annotated[str, flag("-i")] = "sft"  # base, sft or rl: whose checkpoint; several with commas
    temperature: Annotated[float, flag("-t")] = 0.8  # unless a request says otherwise; 0 is greedy
    top_k: Annotated[int, flag("-k")] = 50  # likewise; 0: off
    max_tokens: Annotated[int, flag("-m")] = 512  # likewise: longest reply
    model_tag: Annotated[str, flag("-g")] = ""  # e.g. d12; empty: the largest there is
    step: Annotated[int, flag("-s")] = -1  # of the checkpoint; -1: the newest
    port: Annotated[int, flag("-p")] = 8000
    dtype: Annotated[str, flag("-d")] = ""  # bfloat16, float16 or float32; empty: what suits the device
    device_type: str = ""  # cuda, mps or cpu; empty: the best there is
    host: str = "127.0.0.1"  # 0.0.0.0 lets the whole network in
    api_key: str = ""  # clients must send it; empty: NANOCHAT_API_KEY, else none
    int8: bool = False  # 8-bit weights, on a CPU: a quarter of the memory, faster for few replies, slightly less exact
    slots: int = 32  # replies made together on a device
    queue: int = 64  # replies that may wait for a slot of a device; more are told to come back (429)
    deadline: float = 300.0  # seconds that a request may take, waiting included
    at_once: int = -1  # replies one address may have in the making; 0: no limit; -1: 8 where --host opens the server
    per_minute: int = -1  # requests of one address; 0: no limit; -1: 60 where --host opens the server
    drain: float = 20.0  # seconds that running replies may take to finish after SIGTERM
    log_text: bool = False  # write what is asked and answered into the log

    def sampling(self) -> Sampling:
        """How replies are drawn unless a request says otherwise."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, max_tokens=self.max_tokens)

    def settings(self) -> Settings:
        """What the front needs to know."""
        local = self.host in LOCAL
        at_once = self.at_once if self.at_once >= 0 else 0 if local else OPEN_AT_ONCE
        per_minute = self.per_minute if self.per_minute >= 0 else 0 if local else OPEN_PER_MINUTE
        key = self.api_key or os.environ.get("NANOCHAT_API_KEY") or None
        return Settings(self.sampling(), key, local, self.deadline, at_once, per_minute, self.log_text)

    def threads(self) -> int:
        """Of each engine process on a CPU: the front keeps a core, for threads that wait for each other stop all."""
        return max(1, (hardware.cores() - 1) // (self.num_gpus * len(self.sources())))

    def sources(self) -> list[str]:
        """The kinds of checkpoint."""
        return [name.strip() for name in self.source.split(",")]


def check(cfg: Config) -> None:
    """Refuse what makes no sense, all at once."""
    problems = [f"--{name.replace('_', '-')}={getattr(cfg, name)} must be 1 or more."
                for name in ("slots", "num_gpus") if getattr(cfg, name) < 1]  # fmt: skip
    if cfg.queue < 0 or cfg.drain < 0 or not cfg.deadline > 0:
        problems.append("--queue and --drain must be 0 or more, and --deadline more than 0.")
    if not 1 <= cfg.max_tokens <= MAX_TOKENS:
        problems.append(f"--max-tokens={cfg.max_tokens} must be 1 to {MAX_TOKENS}.")
    if not 1 <= cfg.port <= 65535:
        problems.append(f"--port={cfg.port} must be 1 to 65535.")
    if cfg.dtype and cfg.dtype not in runtime.DTYPES:
        problems.append(f"--dtype={cfg.dtype} is unknown: use {', '.join(runtime.DTYPES)}.")
    key = cfg.settings().api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
        problems.append("The API key must be printable ASCII without blanks at its ends: headers carry nothing else.")
    if len(set(cfg.sources())) < len(cfg.sources()):
        problems.append(f"--source={cfg.source} names a model twice.")
    refuse(problems)
    cfg.sampling()


def workers(cfg: Config) -> list[Worker]:
    """An engine process to be for each model and device. UserError: there is no such checkpoint or device."""
    runtime.pick_device(cfg.device_type)
    made = []
    for source in cfg.sources():
        path = checkpoint.find(source, cfg.model_tag or None, None if cfg.step < 0 else cfg.step)
        for number in range(cfg.num_gpus):
            order = {"path": str(path), "number": number, "device_type": cfg.device_type, "dtype": cfg.dtype}
            order |= {"slots": cfg.slots, "threads": cfg.threads(), "workers": cfg.num_gpus, "int8": cfg.int8}
            made.append(Worker(f"nanochat-{source}-{path.parent.name}", number, order))
    return made


def main(cfg: Config) -> dict:
    """Serve until a signal; returns how many tokens were generated."""
    check(cfg)
    # 1. models -------------------------------------------------------------------------------------------------------
    pool = Pool(workers(cfg), cfg.queue)
    # 2. application --------------------------------------------------------------------------------------------------
    settings = cfg.settings()
    logging.basicConfig(level=logging.INFO if cfg.log_text else logging.WARNING, format="%(levelname)s: %(message)s")
    app = create_app(Desk.of(pool, Tokenizer.load(), settings))
    # 3. serve --------------------------------------------------------------------------------------------------------
    where = f"http://{'localhost' if settings.local else cfg.host}:{cfg.port}"
    print(f"{', '.join(pool.models)} at {where}" + (" (API key needed)" if settings.api_key else ""), flush=True)
    if not settings.local and not settings.api_key:
        print("warning: anyone who can reach this address can use the model: set --api-key, or leave --host out.")
    server.run(app, pool, cfg.host, cfg.port, cfg.drain)
    return {"tokens": sum(worker.tokens for worker in pool.workers)}


if __name__ == "__main__":
    cli.run(main, Config)
