"""Blocks of the cache: who holds which, what those that nobody holds still know, and one sequence's own list of them.

A block is room for the keys and values of `size` neighbouring tokens in every layer of one group (layers with the same
window). `BlockPool` counts references, so that sequences with the same beginning share its blocks; a block that nobody
holds keeps its content, under the name of all tokens up to its end, until its room is needed: oldest first. `Pages` is
what one sequence holds: a table a group, shared beginnings found by `match`, room by `grow`, and blocks that have
slid out of a window given back by `advance`.

Attention on CPUs is fastest over memory in one piece, so a sequence's next block is the neighbour of its last one when
that is free and long unused, and new sequences start far from each other.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

NOBODY = 0  # the block that rows of padding write to; never given out


class BlockPool:
    """References and names of `count` blocks, of which the first is NOBODY; `span` blocks make a longest sequence."""

    def __init__(self, count: int, span: int):
        self.refs = [0] * count
        self.names: list[bytes | None] = [None] * count
        self.known: dict[bytes, int] = {}
        self.freed = [0] * count  # when a block was given back, by `clock`
        self.clock = 0
        bits = span.bit_length()
        far = sorted(range(1, count), key=lambda b: int(f"{(b - 1) % span:0{bits}b}"[::-1], 2))
        self.free = OrderedDict.fromkeys(far)  # unused longest first

    def take(self, after: int | None = None) -> int | None:
        """A block, best the one behind `after`; what it knew is forgotten. None: every block is held."""
        if not self.free:
            return None
        block = after + 1 if after is not None and self._old(after + 1) else next(iter(self.free))
        self._forget(block)
        self.share(block)
        return block

    def _old(self, block: int) -> bool:
        """Whether it is free, and knows nothing or has been free for longer than half of the others' longest time."""
        if block not in self.free:
            return False
        return self.names[block] is None or 2 * self.freed[block] <= self.clock + self.freed[next(iter(self.free))]

    def _forget(self, block: int) -> None:
        name, self.names[block] = self.names[block], None
        if name is not None:
            del self.known[name]

    def share(self, block: int) -> None:
        """One more holder."""
        self.refs[block] += 1
        self.free.pop(block, None)

    def release(self, block: int) -> None:
        """One holder less; free when it was the last."""
        self.refs[block] -= 1
        if not self.refs[block]:
            self.free[block] = None
            self.clock += 1
            self.freed[block] = self.clock

    def name(self, block: int, name: bytes) -> None:
        """The block is full and will not change: who begins with the same tokens may share it."""
        if self.names[block] is None and name not in self.known:
            self.names[block], self.known[name] = name, block

    def flush(self) -> None:
        """Forget all content, as when the weights change."""
        self.names = [None] * len(self.names)
        self.known.clear()

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return len(self.refs) - 1 - len(self.free)


def chain(before: bytes, ids: list[int]) -> bytes:
    """The name of a block: of its tokens and all before it."""
    return blake2b(before + array("q", ids).tobytes(), digest_size=16).digest()


class Pages:
    """The blocks of one sequence. windows: of each group; size: tokens a block. `length` tokens are computed."""

    def __init__(self, pools: list[BlockPool], windows: list[int], size: int):
        self.pools, self.windows, self.size = pools, windows, size
        self.tables: list[list[int]] = [[] for _ in pools]
        self.runs: list[list[tuple[int, int]]] = [[] for _ in pools]  # (index, block) where neighbours begin
        self.gone = [0] * len(pools)  # how many of a table's first blocks have left the window
        self.names: list[bytes] = []  # of the full blocks
        self.length = 0

    def _first(self, group: int, length: int) -> int:
        """The first block that the token at position `length` can see."""
        return max(0, length - self.windows[group]) // self.size

    def match(self, ids: list[int]) -> int:
        """Share the longest known beginning of ids, never all of it -> its tokens."""
        names = []
        for start in range(0, (len(ids) - 1) // self.size * self.size, self.size):
            names.append(chain(names[-1] if names else b"", ids[start : start + self.size]))
        count = len(names)
        while count and not self._all_known(names, count):
            count -= 1
        for group, pool in enumerate(self.pools):
            self.gone[group] = self._first(group, count * self.size)
            for index in range(count):
                block = pool.known[names[index]] if index >= self.gone[group] else NOBODY
                if block:
                    pool.share(block)
                self._append(group, block)
        self.names, self.length = names[:count], count * self.size
        return self.length

    def _all_known(self, names: list[bytes], count: int) -> bool:
        """Whether every group still has what the token behind `count` blocks can see."""
        return all(
            name in pool.known
            for group, pool in enumerate(self.pools)
            for name in names[self._first(group, count * self.size) : count]
        )

    def _append(self, group: int, block: int) -> None:
        table = self.tables[group]
        if not table or block != table[-1] + 1:
            self.runs[group].append((len(table), block))
        table.append(block)

    def need(self, length: int) -> list[int]:
        """How many more blocks of each group `length` tokens take."""
        return [max(0, -(-length // self.size) - len(table)) for table in self.tables]

    def grow(self, length: int) -> bool:
        """Room for `length` tokens in every group; False: the blocks did not suffice (those taken are kept)."""
        for group, (pool, table) in enumerate(zip(self.pools, self.tables)):
            while len(table) * self.size < length:
                block = pool.take(table[-1] if table else None)
                if block is None:
                    return False
                self._append(group, block)
        return True

    def advance(self, ids: list[int], length: int) -> None:
        """The first `length` of ids are computed: name the blocks that are full, give back those that left a window."""
        self.length = length
        while (len(self.names) + 1) * self.size <= length:
            index = len(self.names)
            before = self.names[-1] if index else b""
            self.names.append(chain(before, ids[index * self.size : (index + 1) * self.size]))
            for pool, table in zip(self.pools, self.tables):
                if table[index]:
                    pool.name(table[index], self.names[index])
        for group, (pool, table) in enumerate(zip(self.pools, self.tables)):
            first = self._first(group, length)
            for index in range(self.gone[group], first):
                pool.release(table[index])
                table[index] = NOBODY
            self.gone[group] = max(first, self.gone[group])

    def fork(self, length: int) -> tuple[Pages, list[tuple[int, int, int]]] | None:
        """Pages with the first `length` tokens of these: full blocks shared; the last one, if not full, to be copied.

        -> pages and the copies to make, (group, from, to); None where a block was missing or has left the window.
        """
        pages, copies = Pages(self.pools, self.windows, self.size), []
        full = length // self.size
        for group, (pool, table) in enumerate(zip(self.pools, self.tables)):
            pages.gone[group] = self._first(group, length)
            for index in range(full):
                seen = index >= pages.gone[group]
                if seen and not table[index]:
                    pages.release()
                    return None
                if seen:
                    pool.share(table[index])
                pages._append(group, table[index] if seen else NOBODY)
            if length % self.size:
                block = pool.take(pages.tables[group][-1] if full else None) if table[full] else None
                if block is None:
                    pages.release()
                    return None
                pages._append(group, block)
                copies.append((group, table[full], block))
        pages.names, pages.length = self.names[:full], length
        return pages, copies

    def release(self) -> None:
        """Give every block back; what is named may be found again."""
        for pool, table in zip(self.pools, self.tables):
            for block in table:
                if block:
                    pool.release(block)
            table.clear()

    def slot(self, group: int, position: int) -> int:
        """Where the token at `position` lies among all tokens of the group's memory."""
        return self.tables[group][position // self.size] * self.size + position % self.size

    def ranges(self, group: int, low: int, stop: int) -> list[tuple[int, int]]:
        """The pieces of the group's memory, in tokens, that hold the positions low to stop - 1."""
        runs, size, pieces = self.runs[group], self.size, []
        end = len(self.tables[group])
        for index, block in reversed(runs):
            a, b = max(low, index * size), min(stop, end * size)
            if a < b:
                shift = (block - index) * size
                pieces.append((a + shift, b + shift))
            if index * size <= low:
                break
            end = index
        return pieces[::-1]
