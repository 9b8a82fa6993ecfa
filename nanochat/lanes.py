"""One global order of packed rows for any number of ranks, and a state from which it continues exactly.

Legend: B rows of one rank, T positions, L lanes, W ranks. A row holds T + 1 tokens: inputs are its first T, targets its
last T; a target of -1 is ignored. The order depends on neither B nor W:

    document d of the stream  ->  lane d % L, which packs its own rows with a buffer of its own
    global row g              <-  the next row of lane g % L
    rank r                    <-  the rows g with g % W == r

So N ranks see together what one would, and where W divides L each rank makes only its own lanes' documents. (Measured:
8 lanes with an eighth of the buffer each discard the same share as one lane with all of it.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from nanochat.errors import UserError
from nanochat.packing import Entry, Packer, Piece
from nanochat.prefetch import Note


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens to pack. `key` is what a source needs to make them again."""

    key: tuple[int, ...]
    tokens: np.ndarray  # int32
    mask: np.ndarray | None = None  # bool: which tokens are targets; None: all


class Source(Protocol):
    """Where one lane's documents come from; `position` is where the stream stands, JSON, with its "epoch"."""

    position: dict

    def pull(self) -> list[Document] | None:
        """The next few documents; None at the end of a pass."""

    def advance(self) -> bool:
        """Begin the next pass, after the end of one; False if there is none."""

    def fetch(self, keys: Sequence[tuple[int, ...]]) -> list[Document]:
        """These documents again."""


def own_lanes(lanes: int, rank: int, world: int) -> range:
    """The lanes of which some row falls to this rank: all that share its remainder by gcd(L, W)."""
    step = math.gcd(lanes, world)
    return range(rank % step, lanes, step)


class Lane:
    """One source, one packer: rows of `capacity` tokens, with at least `buffer` documents to choose from."""

    def __init__(self, source: Source, capacity: int, mode: str, buffer: int):
        self.source = source
        self.packer = Packer(capacity, mode)
        self.buffer = buffer
        self.placed = 0  # pieces given out so far
        self.ended = False

    def row(self) -> list[Piece]:
        """The pieces of the next row; empty if the source has ended."""
        pieces = self.packer.row(self._top_up)
        if not pieces and self.source.advance():
            pieces = self.packer.row(self._top_up)
        self.placed += len(pieces)
        self.ended = not pieces
        return pieces

    def note(self) -> Callable[[], dict]:
        """A function that writes this moment's state as JSON: where the source stands and what is held.

        It costs little to make one for each batch; few are ever called.
        """
        return partial(_lane_state, self.source.position, self.placed, self.packer.contents())

    def restore(self, saved: dict) -> None:
        """Become the lane that had this state."""
        self.source.position = saved["position"]
        self.placed = saved["placed"]
        keys = [tuple(key) for *key, _ in saved["held"]]
        for document, (*_, start) in zip(self.source.fetch(keys), saved["held"]):
            self.packer.add(document, len(document.tokens), start)

    def _top_up(self) -> None:
        while len(self.packer) < self.buffer:
            documents = self.source.pull()
            if documents is None:
                return
            for document in documents:
                self.packer.add(document, len(document.tokens))


def _lane_state(position: dict, placed: int, contents: list[Entry]) -> dict:
    return {"position": position, "placed": placed, "held": [[*entry.item.key, entry.start] for entry in contents]}


class RowStream:
    """One rank's rows of the global order, written into arrays. `limit` ends it before global row `limit`."""

    def __init__(
        self,
        mine: dict[int, Lane],
        lanes: int,
        rank: int,
        world: int,
        filler: int,
        about: dict,
        state: dict | None = None,
        limit: int | None = None,
    ):
        self.mine, self.lanes = mine, lanes
        self.rank, self.world = rank, world
        self.filler = filler  # what stands in the unused end of a row
        self.about = about  # goes into every state
        self.limit = limit
        self.rows = 0  # global rows passed
        if state is not None:
            self._restore(state)

    def fill(self, inputs: np.ndarray, targets: np.ndarray) -> Note | None:
        """Write the next B rows, (B, T) each; returns what gives the state behind them, None if there is no row left.

        When only some rows are left the others are filled up and ignored.
        """
        written = 0
        while not written and not self._ended():
            written = self._fill(inputs, targets)
        return self.note() if written else None

    def _fill(self, inputs: np.ndarray, targets: np.ndarray) -> int:
        """Pass B x W global rows and write ours of them; returns how many have content."""
        written = 0
        for g in range(self.rows, self.rows + len(inputs) * self.world):
            lane = self.mine.get(g % self.lanes)
            if lane is None:
                continue
            pieces = lane.row() if self.limit is None or g < self.limit else []
            if g % self.world == self.rank:
                i = (g - self.rows) // self.world
                write_row(pieces, inputs[i], targets[i], self.filler)
                written += bool(pieces)
        self.rows += len(inputs) * self.world
        return written

    def _ended(self) -> bool:
        past_limit = self.limit is not None and self.rows >= self.limit
        return past_limit or all(lane.ended for lane in self.mine.values())

    def note(self) -> Note:
        """What writes the state of this moment as JSON, to go on from here."""
        lanes = {str(index): lane.note() for index, lane in self.mine.items()}
        where = max((p["epoch"], p.get("shard", 0)) for p in (lane.source.position for lane in self.mine.values()))
        return Note(partial(_stream_state, self.about, self.rows, lanes), *where)

    def _restore(self, state: dict) -> None:
        missing = [str(index) for index in self.mine if str(index) not in state["lanes"]]
        if missing:
            raise UserError(
                f"The loader state lacks lanes {', '.join(missing)}: it is another rank's, or of another number of "
                "ranks; merge the states of all ranks (merge_states)."
            )
        self.rows = state["rows"]
        for index, lane in self.mine.items():
            lane.restore(state["lanes"][str(index)])


def _stream_state(about: dict, rows: int, notes: dict[str, Callable]) -> dict:
    lanes = {index: note() for index, note in notes.items()}
    return {
        **about,
        "rows": rows,
        "epoch": max(lane["position"]["epoch"] for lane in lanes.values()),
        "consumed": sum(lane["placed"] for lane in lanes.values()),
        "lanes": lanes,
    }


def write_row(pieces: list[Piece], inputs: np.ndarray, targets: np.ndarray, filler: int) -> None:
    """Write a row's pieces as inputs (T,) and targets (T,); the unused end holds `filler` and is ignored."""
    row = np.full(len(inputs) + 1, filler, dtype=np.int64)
    known = np.zeros(len(row), dtype=bool)  # which tokens are worth predicting
    for document, start, stop, at in pieces:
        end = at + stop - start
        row[at:end] = document.tokens[start:stop]
        known[at:end] = True if document.mask is None else document.mask[start:stop]
        if start:
            known[at] = False  # repeated from the piece before, as context
    inputs[:] = row[:-1]
    targets[:] = np.where(known[1:], row[1:], -1)
