"""Thousands of random schedules through the engine, every reply compared with a whole forward token by token.

    python -m scripts.bench_engine_schedules --schedules 3000 --out dev/bench/2026-11-25_engine_schedules.json

A schedule is a small engine (slots, block size, part size, memory so scarce that sequences lose their place, guesses,
eager rows or fixed shapes) and a list of requests, steps and cancellations. Prompts share beginnings; the model likes
to call the calculator and to repeat itself. `run` replays what each reply should have been: the draw from the logits of
one forward over prompt and reply, the calculator's tokens, stop tokens and strings, the limit. In fp64 the tokens must
be equal; in fp32 (half of the schedules, greedy) log probabilities within 1e-4. What happened is counted, so that
nothing is proved by not happening. tests/test_engine.py runs a few of these by hypothesis.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import torch

from nanochat import cli, paths
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.sampling import Knobs, Sampling, sample, uniform
from nanochat.sequence import Sequence
from nanochat.tokenizer import Tokenizer
from nanochat.tools import ToolState, ToolTokens

CONTEXT = 96
TOLERANCE = 1e-4  # of fp32 log probabilities


@dataclass(frozen=True)
class Request:
    """n replies to the first `length` tokens of text number `text`."""

    text: int
    length: int
    n: int
    sampling: Sampling


@dataclass(frozen=True)
class Schedule:
    """An engine's sizes and what is asked of it: a Request, a number of steps, or ("cancel", which)."""

    actions: tuple
    slots: int = 3
    chunk: int = 16
    block: int = 4
    tokens: int | None = None
    guesses: int = 4
    static: bool = False
    double: bool = True


@dataclass(frozen=True)
class Config:
    """How many, from which seed on."""

    schedules: int = 1000  # schedules
    seed: int = 0  # of the first
    out: str = ""  # a file for the JSON document


def tokenizer() -> Tokenizer:
    """Bytes and special tokens."""
    return Tokenizer.from_ranks([bytes([i]) for i in range(256)])


def tiny(double: bool, pattern: str = "7,20,L") -> GPT:
    """A small random model, every feature alive, fond of short calculations."""
    tok = tokenizer()
    model = GPT(GPTConfig(CONTEXT, tok.vocab_size, 3, 4, 2, 32, pattern)).eval()
    model.init_weights(0)
    noise = torch.Generator().manual_seed(1)
    liked = [tok.special(f"<|{name}|>") for name in ("python_start", "python_end", "assistant_end")] + [*b"12+ab"]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "wte" not in name:
                p.normal_(0, 0.2, generator=noise)
        model.smear_lambda.fill_(0.7)
        model.lm_head.weight *= 0.1
        model.lm_head.weight[liked] *= 20
    return model.double() if double else model


def text(number: int, length: int) -> list[int]:
    """The beginning of a random text."""
    return torch.randint(97, 103, (CONTEXT,), generator=torch.Generator().manual_seed(number)).tolist()[:length]


def run(schedule: Schedule, model: GPT) -> Counter:
    """Replay a schedule; AssertionError where a reply is not what it should be -> what happened, counted."""
    tok = tokenizer()
    engine = Engine(
        model, tok, slots=schedule.slots, prefill_tokens=schedule.chunk, block=schedule.block, frozen=True,
        cache_tokens=schedule.tokens, guesses=schedule.guesses, static=schedule.static,
    )  # fmt: skip
    sequences, ended = [], {}
    for action in schedule.actions:
        if isinstance(action, Request):
            sequences += engine.submit(text(action.text, action.length), action.sampling, action.n)
        elif isinstance(action, int):
            for _ in range(action):
                step(engine, ended)
        elif sequences:
            victim = sequences[action[1] % len(sequences)]
            engine.cancel(victim)
            ended.setdefault(victim, victim.finished)
    for _ in range(100 * CONTEXT):
        if not engine.busy:
            break
        step(engine, ended)
    assert not engine.busy and len(ended) == len(sequences), "some sequence never ended"
    assert not engine.stats().blocks_used and not any(any(pool.refs[1:]) for pool in engine.cache.pools)
    counts = Counter(
        {name: getattr(engine.stats(), name) for name in ("preemptions", "cached_tokens", "accepted_tokens")}
    )
    for sequence in sequences:
        counts += check(sequence, model, tok, engine.max_len)
    return counts


def step(engine: Engine, ended: dict) -> None:
    """A step whose events come in order, none of a sequence that has ended."""
    for event in engine.step():
        assert event.sequence not in ended, "a token after the end"
        if event.finished:
            ended[event.sequence] = event.finished


@torch.inference_mode()
def check(sequence: Sequence, model: GPT, tok: Tokenizer, limit: int) -> Counter:
    """What the reply should have been, from one forward over all of it."""
    ids, params, tools = list(sequence.prompt.ids), sequence.sampling, ToolState(ToolTokens.of(tok))
    tokens = sequence.tokens + ([] if sequence.stop_token is None else [sequence.stop_token])
    logits = model(torch.tensor([ids + tokens]))[0, len(ids) - 1 :].float()  # (T + 1, V)
    knobs, finish, reply = Knobs([params]), None, []
    for i, token in enumerate(tokens):
        assert finish is None, "a token after the end"
        forced = bool(tools.forced)
        if forced:
            should = tools.forced.popleft()
        else:
            u = torch.tensor([uniform(sequence.seed, i)])
            should = int(sample(logits[i : i + 1], knobs, u))
        if should != token and model.lm_head.weight.dtype == torch.float32:  # two tokens as likely as each other
            assert logits[i, should] - logits[i, token] < TOLERANCE, "not the likeliest token"
            should = token
        assert token == should, f"token {i} is {token}, not {should}"
        if params.logprobs and not forced:
            assert abs(sequence.logprobs[i] - logits[i].log_softmax(-1)[token]) < TOLERANCE, "log probability"
        if not forced and token in sequence.stop_tokens:
            finish = "stop"
            continue
        reply.append(token)
        tools.feed(token)
        if any(stop in tok.decode(reply) for stop in params.stop):
            finish = "stop"
        elif len(reply) == params.max_tokens or len(ids) + len(reply) == limit:
            finish = "length"
    assert sequence.finished in (finish, "cancelled") and (finish or sequence.finished == "cancelled")
    return Counter(replies=1, tokens=len(tokens), forced_tokens=sequence.mask.count(0), **{sequence.finished: 1})


def random_schedule(seed: int) -> Schedule:
    """One of many."""
    pick = random.Random(seed)
    double = bool(seed % 2)
    actions = []
    for _ in range(pick.randint(1, 14)):
        kind = pick.random()
        if kind < 0.5:
            length = pick.choice([1, 2, pick.randint(1, 60), pick.randint(1, CONTEXT - 1)])
            actions.append(
                Request(pick.randint(0, 2), length, pick.choice([1, 1, 2, 4]), random_sampling(pick, double))
            )
        elif kind < 0.85:
            actions.append(pick.randint(1, 6))
        else:
            actions.append(("cancel", pick.randint(0, 30)))
    return Schedule(
        tuple(actions), pick.choice([1, 2, 3, 6]), pick.choice([1, 3, 16, 40, 1024]), pick.choice([1, 4, 16]),
        pick.choice([None, 100, 200]), pick.choice([0, 1, 4, 7]), pick.random() < 0.3, double,
    )  # fmt: skip


def random_sampling(pick: random.Random, double: bool) -> Sampling:
    """Greedy with log probabilities in fp32, anything in fp64."""
    common = {
        "max_tokens": pick.choice([1, 3, 12, 30, None]), "stop": pick.choice([(), (), ("a1", "bb+"), ("2",)]),
        "stop_tokens": pick.choice([None, ()]),
    }  # fmt: skip
    if not double or pick.random() < 0.3:
        return Sampling(temperature=0, logprobs=True, **common)
    return Sampling(
        temperature=pick.choice([0.2, 1.0, 3.0]), seed=pick.randint(0, 9), top_k=pick.choice([None, 4, 4, 50]),
        top_p=pick.choice([None, None, 0.9]), min_p=pick.choice([None, None, 0.02]), **common,
    )  # fmt: skip


def main(cfg: Config) -> dict:
    """Run them; a failing one ends it and is named."""
    began, counts, models = time.monotonic(), Counter(), {double: tiny(double) for double in (False, True)}
    for seed in range(cfg.seed, cfg.seed + cfg.schedules):
        schedule = random_schedule(seed)
        try:
            counts += run(schedule, models[schedule.double])
        except Exception:
            print(f"schedule {seed} failed: {schedule}", file=sys.stderr)
            raise
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m scripts.bench_engine_schedules", *sys.argv[1:]]),
        "config": asdict(cfg),
        "failures": 0,
        **counts,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(result))
    if cfg.out:
        with paths.atomic_write(cfg.out, "w") as file:
            file.write(json.dumps(result) + "\n")
    return result


if __name__ == "__main__":
    cli.run(main, Config)
