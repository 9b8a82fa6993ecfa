"""A run in a terminal: what is printed scrolls, below it one line stays: a bar, the loss so far, speed, time left.

Only where standard output is a terminal; in a file or a pipe each step has a line of its own (nanochat/record.py).
While the line is there, whatever Python writes to the terminal goes above it: prints, warnings, logs, other bars.
"""

import logging
import math
import os
import shutil
import sys
import threading
import time
from typing import Any

from nanochat.record import Record

BLOCKS = "▁▂▃▄▅▆▇█"
POINTS = 8  # of the sparkline at least, and fewer than twice as many, once there are so many steps
WIDEST = 30  # columns of the bar, at most
REDRAW = 0.1  # seconds between two drawings, at least: more can't be read
CLEAR = "\r\x1b[K"  # to the line's begin, and empty it


class History:
    """The mean of a value over equal stretches of the run: POINTS to 2 POINTS - 1 of them, however long it gets."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self.each, self.part = 1, []  # values of a stretch, and those of the one that is not full yet

    def add(self, value: float) -> None:
        self.part.append(value)
        if len(self.part) == self.each:
            self.means.append(sum(self.part) / self.each)
            self.part = []
        if len(self.means) == 2 * POINTS:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2])]
            self.each *= 2

    def drawn(self) -> str:
        """As a row of blocks, the lowest value the lowest block."""
        if not self.means:
            return ""
        low, high = min(self.means), max(self.means)
        scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
        return "".join(BLOCKS[round((value - low) * scale)] for value in self.means)


def duration(seconds: float) -> str:
    """A time in the unit that it is felt in: 42 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class Above:
    """A standard stream of a terminal whose text is written above the line."""

    def __init__(self, stream: Any, view: "View"):
        self.stream, self.view = stream, view

    def write(self, text: str) -> int:
        with self.view.lock:
            self.view.hide()
            count = self.stream.write(text)
            self.stream.flush()
            if text:
                self.view.open = not text.endswith(("\n", "\r"))  # somebody's line that is not finished
            if text.endswith("\n"):
                self.view.draw()
        return count

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class View:
    """The line of a record's run, while entered; nothing where there is no terminal. Its last state is left there."""

    def __init__(self, log: Record):
        self.log, self.lock = log, threading.RLock()
        self.out = sys.stdout
        self.history = History()
        self.line, self.shown, self.open = "", False, False
        self.guest = False  # in the terminal of rank 0
        self.first: tuple[float, float] | None = None  # when the first step had ended, and the share done by then
        self.drawn_at = -math.inf
        self.taken: list[tuple[str, Any, Above]] = []  # streams of the terminal: name, what it was, what it is

    def __enter__(self) -> "View":
        """Take the terminal's streams over, and those log handlers that keep the stream they began with.

        Other ranks than 0 have no line, but share its terminal: what they write empties the line first.
        """
        if wanted():
            self.out, self.guest = sys.stdout, not self.log.main
            self.log.view = None if self.guest else self
            streams = [(name, getattr(sys, name)) for name in ("stdout", "stderr")]
            self.taken = [(name, old, Above(old, self)) for name, old in streams if old is not None and old.isatty()]
        for name, old, new in self.taken:
            setattr(sys, name, new)
            for handler in _handlers_of(old):
                handler.setStream(new)
        return self

    def __exit__(self, *_: Any) -> None:
        self.log.view = None
        with self.lock:
            if self.line:
                self.draw()
                self.out.write("\n")
                self.out.flush()
            self.line, self.shown = "", False
        for name, old, new in self.taken:
            setattr(sys, name, old)
            for handler in _handlers_of(new):
                handler.setStream(old)

    def show(self, done: float, values: dict[str, Any]) -> None:
        """A step has ended: `done` of the run (0 to 1), and what its row in the record says."""
        now, name = time.monotonic(), "loss" if "loss" in values else "reward"
        done = min(max(done, 0.0), 1.0)  # an epoch ends a few conversations late
        value = values.get(f"smooth_{name}", values.get(name))
        pace, seconds = values.get("tokens_per_second"), values.get("seconds")
        speed = f"{pace:,.0f} tok/s" if pace else f"{seconds:.1f} s a step" if seconds else ""
        with self.lock:
            if value is not None and math.isfinite(value):
                self.history.add(value)
            self.first = self.first or (now, done)
            shown = "" if value is None else f"{name} {value:.4f} {self.history.drawn()}"
            self.line = self._fitted(done, [part for part in (shown, speed, self._left(now, done)) if part])
            if now - self.drawn_at >= REDRAW or done >= 1:
                self.draw()

    def _left(self, now: float, done: float) -> str:
        """Time left at the pace since the first step, which compiles: evaluations and saving count, they come again."""
        began, share = self.first or (now, done)
        if not share < done < 1:
            return ""
        return f"{duration((1 - done) * (now - began) / (done - share))} left"

    def _fitted(self, done: float, parts: list[str]) -> str:
        """The line at the terminal's width, less one column, in which some terminals would begin a new line."""
        columns = shutil.get_terminal_size().columns - 1
        text = " | ".join(parts)
        wide = min(WIDEST, columns - len(text) - 9)
        full = round(wide * done)
        bar = f"{'█' * full}{'░' * (wide - full)} " if wide > 3 else ""
        return f"{100 * done:4.0f} % {bar}{text}"[:columns]

    def hide(self) -> None:
        """Empty the line, for other text to stand there."""
        if self.shown or self.guest and not self.open:
            self.out.write(CLEAR)
            self.out.flush()
            self.shown = False

    def draw(self) -> None:
        """Write the line; not into somebody's unfinished one."""
        if self.line and not self.open:
            self.out.write(CLEAR + self.line)
            self.out.flush()
            self.shown, self.drawn_at = True, time.monotonic()


def wanted() -> bool:
    """Is standard output a terminal that can go back to the begin of a line, and say the blocks?"""
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
        return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    except (UnicodeError, LookupError, AttributeError, ValueError):  # closed, or replaced by something simpler
        return False


def _handlers_of(stream: Any) -> list[logging.StreamHandler]:
    """The log handlers that write to this stream."""
    loggers = [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]
    handlers = {handler for one in loggers for handler in getattr(one, "handlers", [])}
    return [one for one in handlers if isinstance(one, logging.StreamHandler) and one.stream is stream]
