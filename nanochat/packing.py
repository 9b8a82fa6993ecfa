"""Best-fit packing of documents into rows of equal length: pure, shared by pretraining, evaluation and fine-tuning.

A packer holds a buffer of documents and gives out rows. Filling a row, it always places the largest document that fits
whole into what is left of it. What happens when none fits is the mode:

    crop      the shortest document is cut to fill the row, its rest is discarded (as published)
    lossless  the longest document is cut to fill the row, its rest goes back into the buffer
    pad       the rest of the row stays empty (fine-tuning; no document is longer than a row)

In `lossless` the rest begins with the last token already given, which stands in for the missing beginning: in a row of
which every token predicts the next, each token of a document but its first is then predicted exactly once. Why the
longest: it stops being the longest, so no document waits for ever, and it leaves the fewest pieces.

The buffer is sorted, so placing a document costs a bisection and not a scan (the published loader scans about a
thousand documents in Python for each one placed). Among equals the one that came first is taken.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from typing import Any, NamedTuple

MODES = ("crop", "lossless", "pad")


class Piece(NamedTuple):
    """`item`'s tokens [start, stop) stand in the row from position `at` on."""

    item: Any
    start: int
    stop: int
    at: int


class Entry(NamedTuple):
    """A buffered document, or what is left of it from `start` on. Sorted by tokens left, then by arrival."""

    left: int
    arrival: int
    start: int
    item: Any


class Packer:
    """A buffer of documents and the rows of `capacity` tokens made of them. Deterministic: same calls, same rows."""

    def __init__(self, capacity: int, mode: str):
        if capacity < 2:
            raise ValueError(f"a row holds at least 2 tokens, not {capacity}")
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, not {mode!r}")
        self.capacity = capacity
        self.mode = mode
        self.discarded = 0  # tokens cut off so far
        self._entries: list[Entry] = []
        self._arrivals = 0

    def __len__(self) -> int:
        """How many documents are buffered."""
        return len(self._entries)

    def add(self, item: Any, length: int, start: int = 0) -> None:
        """Put a document of `length` tokens, of which those from `start` on are left, into the buffer."""
        left = length - start
        if left < 1:
            raise ValueError(f"nothing is left of a document of {length} tokens from {start} on")
        if self.mode == "pad" and left > self.capacity:
            raise ValueError(f"a document of {left} tokens never fits a row of {self.capacity}")
        insort(self._entries, Entry(left, self._arrivals, start, item), key=_order)
        self._arrivals += 1

    def row(self, top_up: Callable[[], None] | None = None) -> list[Piece]:
        """The pieces of the next row, in order. `top_up` is called before each placement and may `add`.

        The row is full unless the mode is `pad` or the buffer runs dry; it is empty only if the buffer is.
        """
        pieces: list[Piece] = []
        at = 0
        while at < self.capacity:
            if top_up is not None:
                top_up()
            piece = self._place(at, self.capacity - at)
            if piece is None:
                break
            pieces.append(piece)
            at += piece.stop - piece.start
        return pieces

    def contents(self) -> list[Entry]:
        """What is buffered, in an order in which adding it to a new packer continues this one."""
        return self._entries.copy()

    def _place(self, at: int, room: int) -> Piece | None:
        """The next piece of a row with `room` tokens left from `at` on; None if nothing goes there."""
        fits = bisect_right(self._entries, room, key=_left)
        if fits:
            largest = bisect_left(self._entries, self._entries[fits - 1].left, hi=fits, key=_left)
            return self._take(largest, at, room)
        if self.mode == "pad" or not self._entries:
            return None
        longest = bisect_left(self._entries, self._entries[-1].left, key=_left)
        return self._take(longest if self.mode == "lossless" else 0, at, room)

    def _take(self, index: int, at: int, room: int) -> Piece:
        """Remove entry `index` and place what fits of it; the rest is put back or counted as discarded."""
        entry = self._entries.pop(index)
        piece = Piece(entry.item, entry.start, entry.start + min(entry.left, room), at)
        over = entry.left - (piece.stop - piece.start)
        if over and self.mode == "lossless":
            self.add(entry.item, length=piece.stop + over, start=piece.stop - 1)
        else:
            self.discarded += over
        return piece


def _order(entry: Entry) -> tuple[int, int]:
    return entry.left, entry.arrival


def _left(entry: Entry) -> int:
    return entry.left
