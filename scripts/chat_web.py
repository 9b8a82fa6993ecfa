"""Serve a trained model: a chat page, a stream of events, and OpenAI's chat API.

    python -m scripts.chat_web                          # http://localhost:8000, this machine only
    python -m scripts.chat_web -i rl -g d4 -t 0.6       # the reinforced model of tag d4
    python -m scripts.chat_web -n 8 --host 0.0.0.0 --api-key SECRET     # 8 GPUs, one model each, open to the network

Needs a trained checkpoint (scripts.chat_sft). Requests are batched token by token, so many people share a device; a
reader that leaves is dropped within a token. Without --host only this machine can connect. The key can also come from
the environment variable NANOCHAT_API_KEY. No text of a conversation is logged.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from nanochat import attention, checkpoint, cli, runtime
from nanochat.engine import Engine
from nanochat.errors import UserError, refuse
from nanochat.sampling import Sampling
from nanochat.serve.api import Settings, create_app
from nanochat.serve.asks import MAX_TOKENS
from nanochat.serve.guard import LOCAL
from nanochat.serve.worker import Worker

DRAIN_SECONDS = 10  # how long running replies may finish after a SIGTERM


def flag(*aliases: str):
    """Short names of a flag."""
    return tyro.conf.arg(aliases=aliases)


@dataclass(frozen=True)
class Config:
    """Which model, how it speaks by default, and who may connect."""

    num_gpus: Annotated[int, flag("-n")] = 1  # devices, a copy of the model on each
    source: Annotated[str, flag("-i")] = "sft"  # base, sft or rl: whose checkpoint
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
    slots: int = 32  # replies made together on a device
    queue: int = 64  # replies that may wait for a slot; more are told to come back (429)

    def sampling(self) -> Sampling:
        """How replies are drawn unless a request says otherwise."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, max_tokens=self.max_tokens)


def check(cfg: Config) -> None:
    """Refuse what makes no sense, all at once."""
    problems = [f"--{name}={getattr(cfg, name)} must be 1 or more." for name in ("slots",) if getattr(cfg, name) < 1]
    if cfg.num_gpus < 1 or cfg.queue < 0:
        problems.append("--num-gpus must be 1 or more and --queue 0 or more.")
    if not 1 <= cfg.max_tokens <= MAX_TOKENS:
        problems.append(f"--max-tokens={cfg.max_tokens} must be 1 to {MAX_TOKENS}.")
    if not 1 <= cfg.port <= 65535:
        problems.append(f"--port={cfg.port} must be 1 to 65535.")
    if cfg.dtype and cfg.dtype not in runtime.DTYPES:
        problems.append(f"--dtype={cfg.dtype} is unknown: use {', '.join(runtime.DTYPES)}.")
    refuse(problems)
    cfg.sampling()


def devices(cfg: Config, first: torch.device) -> list[torch.device]:
    """The devices to serve from."""
    if cfg.num_gpus == 1:
        return [first]
    if first.type != "cuda" or torch.cuda.device_count() < cfg.num_gpus:
        count = torch.cuda.device_count() if first.type == "cuda" else 0
        raise UserError(f"--num-gpus={cfg.num_gpus} was asked for, but there are {count} GPUs: ask for what there is.")
    return [torch.device("cuda", i) for i in range(cfg.num_gpus)]


def load_workers(cfg: Config) -> tuple[list[Worker], str]:
    """A worker for each device, with the model on it, and the model's name."""
    rt = runtime.start(cfg.device_type)
    dtype = runtime.DTYPES[cfg.dtype] if cfg.dtype else rt.dtype
    path = checkpoint.find(cfg.source, cfg.model_tag or None, None if cfg.step < 0 else cfg.step)
    workers = []
    for number, device in enumerate(devices(cfg, rt.device)):
        attend = attention.choose(device, dtype).attend
        model, tokenizer, meta = checkpoint.build_model(path, device=device, dtype=dtype, attend=attend)
        model = model.to(dtype) if dtype != torch.float32 else model
        engine = Engine(model, tokenizer, slots=cfg.slots, frozen=True)
        workers.append(Worker(engine, waiting=cfg.queue, gpu=number))
    return workers, f"nanochat-{cfg.source}-{path.parent.name}"


def main(cfg: Config) -> dict:
    """Serve until a signal; returns how many tokens were generated."""
    import uvicorn

    check(cfg)
    # 1. models -------------------------------------------------------------------------------------------------------
    workers, name = load_workers(cfg)
    # 2. application --------------------------------------------------------------------------------------------------
    local = cfg.host in LOCAL
    key = cfg.api_key or os.environ.get("NANOCHAT_API_KEY") or None
    app = create_app(workers, Settings(name, cfg.sampling(), key, local))
    # 3. serve --------------------------------------------------------------------------------------------------------
    print(f"{name} at http://{'localhost' if local else cfg.host}:{cfg.port}" + (" (API key needed)" if key else ""))
    if not local and not key:
        print("warning: anyone who can reach this address can use the model: set --api-key, or leave --host out.")
    uvicorn.run(
        app, host=cfg.host, port=cfg.port, log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )  # fmt: skip
    return {"tokens": sum(worker.tokens for worker in workers)}


if __name__ == "__main__":
    cli.run(main, Config)
