"""Who runs, who waits, and what a step reads: the engine's decisions about sequences and blocks, without the model.

Requests are taken in the order of their coming. A running sequence with one unread token gets a row, with guesses
behind it where speculation has some; one with more gets the next part of them read, as far as the step's budget goes.
When blocks run out, the youngest running sequence loses its own and waits, first in the queue, to be read again from
what the cache still knows of it: its draws depend only on its seed and place, so its text is the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from nanochat.kvcache import KVCache
from nanochat.sequence import Sequence

GUESS_ROWS = 16  # rows of a step up to which guesses are added: beyond, a row costs about as much as it may save


@dataclass
class Plan:
    """What a step reads: of each sequence, the tokens behind those in its pages."""

    rows: list[tuple[Sequence, list[int]]] = field(default_factory=list)  # its guesses
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)  # how many tokens
    twins: list[Sequence] = field(default_factory=list)  # they start from a running one with the same prompt


class Scheduler:
    """slots: sequences at a time. budget: most tokens read in a step beside the rows. guesses: most a row."""

    def __init__(self, cache: KVCache, slots: int, budget: int, guesses: int):
        self.cache, self.slots, self.budget, self.guesses = cache, slots, budget, guesses
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = self.cached_tokens = 0

    def plan(self) -> Plan:
        """Let waiting sequences in, find room for all; what is in the plan will be run."""
        plan = Plan(twins=self._admit())
        budget, rows = self.budget, len(self.running)
        for sequence in list(self.running):
            if sequence.pages is None or not sequence.pending:  # has just lost its place; is a twin
                continue
            if sequence.pending == 1:
                if self._room(sequence, len(sequence)):
                    guesses = self._guess(sequence, GUESS_ROWS - rows)
                    rows += len(guesses)
                    plan.rows.append((sequence, guesses))
                continue
            count = min(sequence.pending, budget)
            if count and self._room(sequence, sequence.pages.length + count):
                plan.chunks.append((sequence, count))
                budget -= count
        plan.twins = [twin for twin in plan.twins if twin.pages]
        return plan

    def _guess(self, sequence: Sequence, rows: int) -> list[int]:
        room = self.cache.max_len - len(sequence)
        if sequence.sampling.max_tokens is not None:
            room = min(room, sequence.sampling.max_tokens - len(sequence.tokens))
        most = min(self.guesses, rows, room - 1)
        guesses = sequence.draft(most) if most > 0 else []
        return guesses if guesses and sequence.pages.grow(len(sequence) + len(guesses)) else []

    # -- coming --------------------------------------------------------------------------------------------------------

    def _admit(self) -> list[Sequence]:
        """The first of the queue, as far as there are slots and blocks -> those that need no reading at all."""
        twins = []
        reading = {id(s.prompt) for s in self.running if s.pending > 1}
        for sequence in list(self.waiting)[: self.slots - len(self.running)]:
            if not sequence.started and id(sequence.prompt) in reading:
                continue  # it waits for its twin
            if self._fork(sequence):
                twins.append(sequence)
                continue
            if not self._begin(sequence):
                break
            self.waiting.remove(sequence)
            if sequence.pending > 1:
                reading.add(id(sequence.prompt))
        return twins

    def _begin(self, sequence: Sequence) -> bool:
        """Give it pages, with what the cache knows of its beginning; False where its prompt finds no room."""
        pages = self.cache.pages()
        asks_all = sequence.sampling.prompt_logprobs and len(sequence.prompt.law) < len(sequence.prompt.ids) - 1
        known = 0 if asks_all else pages.match(sequence.ids)
        largest = len(self.cache.windows) - 1
        if self.running and pages.need(len(sequence) + 1)[largest] > len(self.cache.pools[largest].free):
            pages.release()
            return False
        sequence.pages = pages
        self._enter(sequence, known)
        return True

    def _enter(self, sequence: Sequence, known: int) -> None:
        if not sequence.started:
            sequence.started, sequence.cached = True, known
            sequence.prompt.waiting -= 1
            self.cached_tokens += known
        self.running.append(sequence)

    def fork(self) -> list[Sequence]:
        """Let waiting twins of sequences whose prompt has been read start from it -> those that did."""
        return [sequence for sequence in list(self.waiting)[: self.slots - len(self.running)] if self._fork(sequence)]

    def _fork(self, sequence: Sequence) -> bool:
        """Start from a running twin that has read the prompt, while the logits behind it are kept."""
        prompt = sequence.prompt
        if sequence.started or prompt.logits is None:
            return False
        read = (s for s in self.running if s.prompt is prompt and s.pages.length >= len(prompt.ids))
        holder = next(read, None)
        forked = holder and holder.pages.fork(len(prompt.ids))
        if not forked:
            return False
        sequence.pages, copies = forked
        self.cache.copy(copies)
        self.waiting.remove(sequence)
        self._enter(sequence, len(prompt.ids))
        return True

    # -- going ---------------------------------------------------------------------------------------------------------

    def _room(self, sequence: Sequence, length: int) -> bool:
        """Blocks for `length` tokens, if need be those of the youngest; False where it was the youngest itself."""
        while not sequence.pages.grow(length):
            victim = self.running[-1]
            self.leave(victim)
            self.waiting.appendleft(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        return True

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and its blocks back."""
        if sequence.pages is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        sequence.pages.release()
        sequence.pages = None
