"""One reply being made: what it was asked, what it has, when it ends, and what the caller gets to see of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nanochat.blocks import Pages
from nanochat.logprobs import Top
from nanochat.sampling import Sampling
from nanochat.speculation import Drafter
from nanochat.streaming import StopFinder, TextStream
from nanochat.tools import ToolState


@dataclass
class Completion:
    """A finished reply. `ids` has neither the prompt nor the stop token, which is `stop_token` (None if none came)."""

    ids: list[int]
    mask: list[int]  # 1: sampled by the model, 0: forced by a tool
    text: str  # decoded ids, cut before a stop string
    finish: str  # "stop", "length" or "cancelled"
    stop_token: int | None = None
    logprobs: list[float | None] | None = None  # of `ids` and then of the stop token; None where forced
    top_logprobs: list[Top | None] | None = None  # as long as `logprobs`; None where forced
    prompt_logprobs: list[float | None] | None = None  # one a prompt token; the first has none
    prompt_top_logprobs: list[Top | None] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # how many of the prompt's tokens were not computed for this reply


class Event(NamedTuple):
    """One token of one sequence. `finished` is None or why it ended; the last token may be the stop token.

    A step may bring several of one sequence, in order. logprob and top are as the Sampling asks, None where forced.
    """

    sequence: Sequence
    token: int
    forced: bool
    finished: str | None
    logprob: float | None = None
    top: Top | None = None


@dataclass
class Prompt:
    """What the n sequences of one request share."""

    ids: list[int]
    waiting: int  # sequences that have not started
    law: list[tuple[float, Top]] = field(default_factory=list)  # log probability, alternatives: of all but the first
    logits: torch.Tensor | None = None  # (1, V) behind the prompt, kept while others wait


@dataclass(eq=False)
class Sequence:
    """One reply. Made by Engine.submit; `take` is the only way to lengthen it."""

    prompt: Prompt
    sampling: Sampling
    seed: int
    stop_tokens: frozenset[int]
    tools: ToolState | None
    ids: list[int]  # the prompt's and the reply's
    pages: Pages | None = None  # None while it waits
    started: bool = False  # whether it has ever been given pages
    cached: int = 0  # tokens of the prompt that were not computed for it
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[Top | None] = field(default_factory=list)
    finished: str | None = None
    stop_token: int | None = None
    drafter: Drafter = field(default_factory=Drafter)
    _text: TextStream | None = None
    _stops: StopFinder | None = None
    _shown: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pending(self) -> int:
        """Tokens that the model has not read, at least the newest one."""
        return len(self.ids) - self.pages.length

    def draft(self, most: int) -> list[int]:
        """Tokens that may well come next: those that a tool forces, else what followed the newest ones before."""
        if self.tools is not None and self.tools.forced:
            return list(self.tools.forced)[:most]
        return self.drafter.propose(self.ids, most)

    def watch_text(self, tokenizer) -> None:
        """Follow the text, for stop strings."""
        self._text, self._stops = TextStream(tokenizer), StopFinder(self.sampling.stop)

    def take(self, token: int, logprob: float | None, top: Top, limit: int) -> Event:
        """Accept this step's sampled token, or the one that a tool forces; sets `finished`."""
        forced = bool(self.tools is not None and self.tools.forced)
        if forced:
            token = self.tools.forced.popleft()
        logprob = logprob if self.sampling.logprobs and not forced else None
        alternatives = top[: self.sampling.top_logprobs] if self.sampling.top_logprobs and not forced else None
        if self.sampling.logprobs:
            self.logprobs.append(logprob)
            self.top_logprobs.append(alternatives)
        self._append(token, forced, limit)
        return Event(self, token, forced, self.finished, logprob, alternatives)

    def _append(self, token: int, forced: bool, limit: int) -> None:
        if not forced and token in self.stop_tokens:
            self.finished, self.stop_token = "stop", token
            return
        self.ids.append(token)
        self.tokens.append(token)
        self.mask.append(int(not forced))
        if self.tools is not None:
            self.tools.feed(token)
        if self._stops is not None and self._stopped(token):
            self.finished = "stop"
        elif len(self.tokens) == self.sampling.max_tokens or len(self.ids) >= limit:
            self.finished = "length"

    def _stopped(self, token: int) -> bool:
        self._shown += self._stops.feed(self._text.feed(token))
        return self._stops.hit

    def completion(self, tokenizer) -> Completion:
        """The reply as a value."""
        text = tokenizer.decode(self.tokens)
        if self._stops is not None and self._stops.hit:
            text = self._shown
        sampling, law = self.sampling, self.prompt.law
        return Completion(
            list(self.tokens),
            list(self.mask),
            text,
            self.finished or "cancelled",
            self.stop_token,
            list(self.logprobs) if sampling.logprobs else None,
            list(self.top_logprobs) if sampling.top_logprobs else None,
            [None, *(logprob for logprob, _ in law)] if sampling.prompt_logprobs else None,
            [None, *(top for _, top in law)] if sampling.prompt_logprobs and sampling.top_logprobs else None,
            len(self.prompt.ids),
            self.cached,
        )
