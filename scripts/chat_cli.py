"""Talk with a trained model in the terminal.

    python -m scripts.chat_cli                              # a conversation: quit or exit leaves, clear begins anew
    python -m scripts.chat_cli -p "Why is the sky blue?"    # one question, the answer on standard output
    python -m scripts.chat_cli -i rl -g d4 -t 0 -m 500      # the reinforced model of tag d4, greedy, up to 500 tokens

Needs a trained checkpoint (scripts.chat_sft). Any machine: on 2 CPU cores a depth-4 model writes several hundred tokens
a second. Ctrl-C stops an answer, not the program; Ctrl-D leaves. A chat longer than the model's context loses its
oldest whole turns. What the calculator was asked, and its answer, are shown faintly in brackets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from nanochat import attention, chat, checkpoint, cli, runtime
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.sampling import Sampling
from nanochat.serve import prompts
from nanochat.streaming import ReplyStream

FAINT, PLAIN = "\033[2m", "\033[0m"
OPEN = {"text": "", "python": "[", "python_output": " = "}
HELP = """quit, exit or Ctrl-D leave; clear begins a new conversation; Ctrl-C stops an answer."""


def flag(*aliases: str):
    """Short names of a flag."""
    return tyro.conf.arg(aliases=aliases)


@dataclass(frozen=True)
class Config:
    """Which model, and how it speaks."""

    source: Annotated[str, flag("-i")] = "sft"  # base, sft or rl: whose checkpoint
    model_tag: Annotated[str, flag("-g")] = ""  # e.g. d12; empty: the largest there is
    step: Annotated[int, flag("-s")] = -1  # of the checkpoint; -1: the newest
    prompt: Annotated[str, flag("-p")] = ""  # answer this and leave; empty: a conversation
    temperature: Annotated[float, flag("-t")] = 0.6  # 0 is greedy
    top_k: Annotated[int, flag("-k")] = 50  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the likeliest tokens that together have this probability; 1: all
    min_p: float = 0.0  # keep tokens with at least this share of the likeliest one's probability; 0: all
    seed: int = -1  # the same seed gives the same answers; -1: fresh ones every time
    max_tokens: Annotated[int, flag("-m")] = 256  # longest answer
    device_type: Annotated[str, flag("-d")] = ""  # cuda, mps or cpu; empty: the best there is

    def sampling(self, turn: int = 0) -> Sampling:
        """How the turn-th answer is drawn: with a seed, each turn has its own."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=None if self.top_p == 1 else self.top_p,
            min_p=self.min_p or None,
            seed=None if self.seed == -1 else self.seed + turn,
            max_tokens=self.max_tokens,
        )


class Screen:
    """Writes an answer as it comes; tool use faintly in brackets (colours only on a terminal)."""

    def __init__(self, out):
        self.out, self.kind = out, "text"
        self.colour = out.isatty() and not os.environ.get("NO_COLOR")

    def write(self, kind: str, text: str) -> None:
        """Show a piece of the answer at once."""
        self._turn_to(kind)
        self.out.write(text)
        self.out.flush()

    def end(self, note: str = "") -> None:
        """Close what is open, add a faint note, end the line."""
        self._turn_to("text")
        self.out.write(f"{self._faint(f' ({note})')}\n" if note else "\n")
        self.out.flush()

    def note(self, text: str) -> None:
        """A faint line of its own."""
        self.out.write(f"{self._faint(text)}\n")
        self.out.flush()

    def _turn_to(self, kind: str) -> None:
        if kind == self.kind:
            return
        if self.kind != "text" and (kind != "python_output"):
            self.out.write("]" + (PLAIN if self.colour else ""))
        if kind != "text":
            self.out.write((FAINT if self.colour and self.kind == "text" else "") + OPEN[kind])
        self.kind = kind

    def _faint(self, text: str) -> str:
        return f"{FAINT}{text}{PLAIN}" if self.colour else text


class Interrupt:
    """Whether Ctrl-C was pressed; while `watching`, that is all it does, so no step of the engine is torn apart."""

    def __init__(self):
        self.pressed = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take over Ctrl-C for the time of an answer (only the main thread can)."""
        self.pressed = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "pressed", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def answer(engine: Engine, ids: list[int], sampling: Sampling, screen: Screen, interrupt: Interrupt) -> list[int]:
    """Stream the reply to `ids` onto the screen -> its ids; Ctrl-C ends it early."""
    stream, [sequence] = ReplyStream(engine.tokenizer), engine.submit(ids, sampling)
    with interrupt.watching():
        while not sequence.finished and not interrupt.pressed:
            for event in engine.step():
                for piece in stream.feed(event.token):
                    screen.write(*piece)
        engine.cancel(sequence)
    for piece in stream.end():
        screen.write(*piece)
    notes = {"cancelled": "stopped", "length": f"cut after {len(sequence.tokens)} tokens: -m allows more"}
    screen.end(notes.get(sequence.finished, ""))
    return sequence.tokens


def converse(engine: Engine, cfg: Config, screen: Screen) -> int:
    """Ask and answer until the user leaves -> how many answers were given."""
    messages, turns, interrupt = [], 0, Interrupt()
    screen.note(HELP)
    while (text := ask(screen)) is not None:
        if text.lower() == "help":
            screen.note(HELP)
        elif text.lower() == "clear":
            messages = []
            screen.note("A new conversation.")
        elif text:
            before, messages = messages, [*messages, {"role": "user", "content": text}]
            reply = take_turn(engine, cfg.sampling(turns), messages, screen, interrupt)
            messages = [*messages, {"role": "assistant", "content": reply}] if reply else before
            turns += 1
    return turns


def take_turn(engine: Engine, sampling: Sampling, messages: list[dict], screen: Screen, interrupt: Interrupt) -> list:
    """Answer the last message -> the reply's parts; empty if there is none, and why is shown."""
    try:
        prompt = prompts.fit(messages, engine.tokenizer, engine.max_len, sampling.max_tokens)
    except UserError as error:
        screen.note(str(error))
        return []
    if prompt.dropped:
        screen.note(f"(the oldest {prompt.dropped} messages no longer fit the context)")
    return chat.parse_reply(answer(engine, prompt.ids, sampling, screen, interrupt), engine.tokenizer)


def ask(screen: Screen) -> str | None:
    """The user's next line, stripped; None when they leave."""
    try:
        text = input("\nUser: ").strip()
        if text.lower() in ("quit", "exit"):
            return None
        if text and text.lower() not in ("clear", "help"):
            screen.out.write("\nAssistant: ")
            screen.out.flush()
        return text
    except EOFError:
        screen.out.write("\n")
        return None
    except KeyboardInterrupt:
        screen.out.write("\n")
        screen.note("Ctrl-D or exit leaves.")
        return ""


def load_engine(cfg: Config) -> tuple[Engine, str]:
    """The trained model in an engine for one sequence, and its name."""
    rt = runtime.start(cfg.device_type)
    attend = attention.choose(rt.device, rt.dtype).attend
    model, tokenizer, meta = checkpoint.build_model(
        cfg.source,
        cfg.model_tag or None,
        None if cfg.step < 0 else cfg.step,
        device=rt.device,
        dtype=rt.dtype,
        attend=attend,
    )
    if rt.dtype != torch.float32:
        model = model.to(rt.dtype)  # resident once: nothing is cast at each step
    name = f"{cfg.source} {cfg.model_tag or ''} step {meta['step']}".replace("  ", " ")
    return Engine(model, tokenizer, slots=1, frozen=True), f"{name}, {model.config.n_layer} layers, on {rt.device}"


def main(cfg: Config) -> dict:
    """Answer cfg.prompt, or talk until the user leaves; returns what was said or how often."""
    # 1. model --------------------------------------------------------------------------------------------------------
    cfg.sampling()  # refuses wrong flags before anything is loaded
    engine, name = load_engine(cfg)
    screen = Screen(sys.stdout)
    # 2. one question -------------------------------------------------------------------------------------------------
    if cfg.prompt:
        prompt = prompts.fit(
            [{"role": "user", "content": cfg.prompt}], engine.tokenizer, engine.max_len, cfg.max_tokens
        )
        begin = time.perf_counter()
        ids = answer(engine, prompt.ids, cfg.sampling(), screen, Interrupt())
        seconds = time.perf_counter() - begin
        return {"reply": chat.parse_reply(ids, engine.tokenizer), "tokens": len(ids), "seconds": seconds}
    # 3. a conversation -----------------------------------------------------------------------------------------------
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history)
    screen.note(f"nanochat: {name}")
    return {"turns": converse(engine, cfg, screen)}


if __name__ == "__main__":
    cli.run(main, Config)
