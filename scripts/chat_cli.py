"""Talk with a trained model in the terminal.

    python -m scripts.chat_cli                              # a conversation: quit or exit leaves, clear begins anew
    python -m scripts.chat_cli -p "Why is the sky blue?"    # one question, the answer on standard output
    python -m scripts.chat_cli -i rl -g d4 -t 0 -m 500      # the reinforced model of tag d4, greedy, up to 500 tokens

Needs a trained checkpoint (scripts.chat_sft). Any machine: on 2 CPU cores a depth-4 model writes several hundred tokens
a second. Ctrl-C stops an answer, not the program; Ctrl-D leaves. A chat longer than the model's context loses its
oldest whole turns. What the calculator was asked, and its answer, are shown faintly in brackets. /help tells how to
change the sampler, save the conversation and write several lines; what you typed is remembered for the next time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from nanochat import attention, chat, checkpoint, cli, paths, runtime
from nanochat.engine import Engine
from nanochat.errors import Stopped, UserError
from nanochat.sampling import Sampling
from nanochat.serve import prompts
from nanochat.streaming import ReplyStream

QUOTES = '"""'
FAINT, PLAIN = "\033[2m", "\033[0m"
OPEN = {"text": "", "python": "[", "python_output": " = "}
SETTABLE = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "seed": int, "max_tokens": int}
HELP = """quit, exit or Ctrl-D leave; clear begins a new conversation; Ctrl-C stops an answer; /help tells the rest."""
COMMANDS = """\
/set NAME VALUE   how answers are drawn: temperature, top_k, top_p, min_p, seed, max_tokens; /set alone shows them
/save [FILE]      the conversation as JSON, in the form that training reads
/again            another answer to the last question
A line that ends with \\ goes on in the next one; a line of three quotes begins and ends a text of several lines."""
HISTORY, HISTORY_LINES = "chat_cli_history", 1000  # in the artefact folder, for your eyes only (mode 600)


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
    int8: bool = False  # 8-bit weights, on a CPU: a quarter of the memory, faster, slightly less exact

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
        after_tool = self.kind != "text" and kind == "text"
        self._turn_to(kind)
        if after_tool and text[:1].isalnum():
            self.out.write(" ")  # the model needs none behind its calculator, readers do
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


def answer(
    engine: Engine, ids: list[int], sampling: Sampling, screen: Screen, interrupt: Interrupt, rate: bool = False
) -> list[int]:
    """Stream the reply to `ids` onto the screen -> its ids; Ctrl-C ends it early. rate: tell the tokens a second."""
    stream, [sequence] = ReplyStream(engine.tokenizer), engine.submit(ids, sampling)
    first = None
    with interrupt.watching():
        while not sequence.finished and not interrupt.pressed:
            for event in engine.step():
                first = first or time.perf_counter()
                for piece in stream.feed(event.token):
                    screen.write(*piece)
        engine.cancel(sequence)
    for piece in stream.end():
        screen.write(*piece)
    made = len(sequence.tokens)
    notes = {"cancelled": "stopped", "length": f"cut after {made} tokens: -m allows more"}
    note = [notes[sequence.finished]] if sequence.finished in notes else []
    if rate and first is not None and made > 1:
        note.append(f"{made} tokens, {(made - 1) / max(1e-9, time.perf_counter() - first):.0f} tok/s")
    screen.end("; ".join(note))
    return sequence.tokens


class Talk:
    """A conversation, and how its answers are drawn."""

    def __init__(self, engine: Engine, cfg: Config, screen: Screen):
        self.engine, self.cfg, self.screen = engine, cfg, screen
        self.interrupt, self.messages, self.turns = Interrupt(), [], 0

    def say(self, text: str) -> None:
        """Ask something; a question without an answer is forgotten."""
        before, self.messages = self.messages, [*self.messages, {"role": "user", "content": text}]
        reply = self._answer()
        self.messages = [*self.messages, {"role": "assistant", "content": reply}] if reply else before

    def _answer(self) -> list:
        """The parts of an answer to the last message; none if it is refused, and why is shown."""
        self.screen.out.write("\nAssistant: ")
        self.screen.out.flush()
        sampling = self.cfg.sampling(self.turns)
        self.turns += 1
        try:
            prompt = prompts.fit(self.messages, self.engine.tokenizer, self.engine.max_len, sampling.max_tokens)
        except UserError as error:
            self.screen.note(str(error))
            return []
        if prompt.dropped:
            self.screen.note(f"(the oldest {prompt.dropped} messages no longer fit the context)")
        ids = answer(self.engine, prompt.ids, sampling, self.screen, self.interrupt, rate=True)
        return chat.parse_reply(ids, self.engine.tokenizer)

    def command(self, line: str) -> None:
        """Do what a line that begins with / says."""
        name, *words = line.split()
        try:
            if name == "/set":
                self._set(words)
            elif name == "/save":
                self._save(words)
            elif name == "/again":
                if not self.messages:
                    raise UserError("There is no question yet that could be answered again.")
                text = self.messages[-2]["content"]
                self.messages = self.messages[:-2]
                self.say(text)
            elif name in ("/clear", "/new"):
                self.clear()
            elif name == "/help":
                self.help()
            else:
                raise UserError(f"There is no command {name}: /help tells which there are.")
        except (UserError, OSError) as error:
            self.screen.note(str(error))

    def help(self) -> None:
        """Tell what can be typed."""
        self.screen.note(f"{HELP}\n{COMMANDS}")

    def clear(self) -> None:
        """Forget all that was said."""
        self.messages = []
        self.screen.note("A new conversation.")

    def _set(self, words: list[str]) -> None:
        if words and (len(words) != 2 or words[0] not in SETTABLE):
            raise UserError(f"/set takes one of {', '.join(SETTABLE)}, and its value.")
        if words:
            try:
                value = SETTABLE[words[0]](words[1])
            except ValueError:
                raise UserError(f"{words[0]} can't be {words[1]!r}: give a number.") from None
            changed = dataclasses.replace(self.cfg, **{words[0]: value})
            changed.sampling()
            self.cfg = changed
        self.screen.note(", ".join(f"{name} {getattr(self.cfg, name)}" for name in SETTABLE))

    def _save(self, words: list[str]) -> None:
        if not self.messages:
            raise UserError("There is nothing to save yet: say something first.")
        path = Path(" ".join(words) or time.strftime("chat_%Y-%m-%d_%H%M%S.json")).expanduser()
        paths.write_json(path, {"messages": self.messages})
        self.screen.note(f"Saved to {path}.")


def converse(engine: Engine, cfg: Config, screen: Screen) -> int:
    """Ask and answer until the user leaves -> how many answers were given."""
    talk = Talk(engine, cfg, screen)
    screen.note(HELP)
    while (text := ask(screen)) is not None:
        if text.lower() == "help":
            talk.help()
        elif text.lower() == "clear":
            talk.clear()
        elif text.startswith("/"):
            talk.command(text)
        elif text:
            talk.say(text)
    return talk.turns


def ask(screen: Screen) -> str | None:
    """What the user types next, stripped; None when they leave."""
    try:
        line = input("\nUser: ")
        if line.strip() == QUOTES:
            return block().strip()
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input("... "))
        text = "\n".join(lines).strip()
        return None if text.lower() in ("quit", "exit") else text
    except EOFError:
        screen.out.write("\n")
        return None
    except KeyboardInterrupt:
        screen.out.write("\n")
        screen.note("Ctrl-D or exit leaves.")
        return ""


def block() -> str:
    """Lines up to one of three quotes."""
    lines = []
    while (line := input("... ")).strip() != QUOTES:
        lines.append(line)
    return "\n".join(lines)


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Line editing, and what was typed in earlier talks, where the machine has readline and a terminal."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = paths.base_dir() / HISTORY
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.touch(mode=0o600)
            readline.write_history_file(path)


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
    engine = Engine(model, tokenizer, slots=1, frozen=True, int8=cfg.int8)
    engine.release()
    return engine, f"{name}, {model.config.n_layer} layers, on {rt.device}"


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
        begin, interrupt = time.perf_counter(), Interrupt()
        ids = answer(engine, prompt.ids, cfg.sampling(), screen, interrupt)
        if interrupt.pressed:  # a shell that asks many questions is to stop too
            raise Stopped(signal.SIGINT, "stopped by Ctrl-C: the answer is not whole.")
        seconds = time.perf_counter() - begin
        return {"reply": chat.parse_reply(ids, engine.tokenizer), "tokens": len(ids), "seconds": seconds}
    # 3. a conversation -----------------------------------------------------------------------------------------------
    screen.note(f"nanochat: {name}")
    with history() if sys.stdin.isatty() else contextlib.nullcontext():
        return {"turns": converse(engine, cfg, screen)}


if __name__ == "__main__":
    cli.run(main, Config)
