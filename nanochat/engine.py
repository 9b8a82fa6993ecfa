"""Batched generation: sequences join and leave at every step, each with its own sampling, tools, limits and seed.

    engine = Engine(model, tokenizer, slots=32)
    sequences = engine.submit(ids, Sampling(temperature=0.8, max_tokens=100), n=4)   # waits for a free slot
    while engine.busy:
        for sequence, token, forced, finished in engine.step(): ...
    replies = engine.complete([ids, more_ids], Sampling(...), n=2)                   # the same, until all are done

A step feeds every running sequence its newest token and gives each exactly one more; new sequences get their prompt
prefilled in the same step (up to `prefill_tokens` of them a step, so a long prompt does not hold up the others) and
with it their first token. Running sequences lie in neighbouring slots, so a finished one costs nothing from the next
step on, and no forward follows a last token. The n replies to one prompt share its prefill. Positions never pass
`max_len`: a longer prompt is refused, a reply that reaches it ends with finish "length".

Slot 0 is where a prompt longer than `prefill_tokens` is read chunk by chunk; row i of the batch lives in slot i + 1.
One thread may use an engine at a time.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nanochat import logprobs
from nanochat.decode import Decoder
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.kvcache import SlotCache
from nanochat.logprobs import Top
from nanochat.sampling import Knobs, Sampling, child_seed, sample, uniform
from nanochat.streaming import StopFinder, TextStream
from nanochat.tools import ToolState, ToolTokens


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


@dataclass(frozen=True)
class Stats:
    """What an engine is doing, and has done since it was made."""

    running: int  # sequences that get tokens
    waiting: int  # sequences that wait for room, or whose prompt is being read
    blocks_used: int  # of the cache, by sequences
    blocks_free: int  # that a sequence could get, those that hold reusable prefixes included
    prompt_tokens: int  # submitted
    cached_tokens: int  # of them, found in the cache
    generated_tokens: int
    preemptions: int  # sequences that lost their place to others and were taken up again
    forwards: int
    drafted_tokens: int  # proposed by speculation
    accepted_tokens: int  # of them, right


@dataclass
class _Prompt:
    """What the n sequences of one request share."""

    ids: list[int]
    waiting: int  # sequences that have not started
    law: list[tuple[float, Top]] | None = None  # log probability and alternatives of all tokens but the first
    logits: torch.Tensor | None = None  # (1, V) behind the prompt, kept while others wait
    last: torch.Tensor | None = None  # (C,) the cache's newest embedding at that point


@dataclass(eq=False)
class Sequence:
    """One reply being made: its prompt, its parameters and what it has so far. Made by Engine.submit."""

    prompt: _Prompt
    sampling: Sampling
    seed: int
    stop_tokens: frozenset[int]
    tools: ToolState | None
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[Top | None] = field(default_factory=list)
    cached: int = 0  # tokens of the prompt that were not computed for it
    finished: str | None = None
    stop_token: int | None = None
    _text: TextStream | None = None
    _stops: StopFinder | None = None
    _shown: str = ""

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.tokens)

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
        tools = self.tools
        if not forced and token in self.stop_tokens:
            self.finished, self.stop_token = "stop", token
            return
        self.tokens.append(token)
        self.mask.append(int(not forced))
        if tools is not None:
            tools.feed(token)
        if self._stops is not None and self._stopped(token):
            self.finished = "stop"
        elif len(self.tokens) == self.sampling.max_tokens or len(self) >= limit:
            self.finished = "length"

    def _stopped(self, token: int) -> bool:
        self._shown += self._stops.feed(self._text.feed(token))
        return self._stops.hit

    def completion(self, tokenizer) -> Completion:
        """The reply as a value."""
        text = tokenizer.decode(self.tokens)
        if self._stops is not None and self._stops.hit:
            text = self._shown
        sampling, law = self.sampling, self.prompt.law or []
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


class Engine:
    """Runs a model for many sequences at once; see the module's docstring.

    slots: sequences decoded together. max_len: longest prompt and reply together, at most the model's context.
    prefill_tokens: most prompt tokens read in one step. tools: whether python blocks are answered by the calculator.
    frozen: promise that the weights never change again; else they are laid out anew whenever work begins.
    """

    def __init__(self, model, tokenizer, *, slots=32, max_len=None, prefill_tokens=1024, tools=True, frozen=False):
        context = model.config.sequence_len
        self.max_len = context if max_len is None else max_len
        if not 2 <= self.max_len <= context:
            raise UserError(f"max_len is {self.max_len}, but it must be 2 to {context}, the model's context.")
        if slots < 1 or prefill_tokens < 1:
            raise UserError(f"slots is {slots} and prefill_tokens {prefill_tokens}, but both must be at least 1.")
        self.model, self.tokenizer = model, tokenizer
        self.slots, self.prefill_tokens = slots, prefill_tokens
        self.device = model.lm_head.weight.device
        self.cache = SlotCache(slots + 1, self.max_len, model.attend)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.reading: Sequence | None = None  # its prompt is in slot 0, in part
        self.frozen, self._stale = frozen, True  # whether the decoder's layout may differ from the weights
        self._decoder = Decoder(model) if isinstance(model, GPT) else None
        self.forwards = 0  # calls of the model so far, for tests and benches
        self._counts = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}
        self._tools = ToolTokens.of(tokenizer) if tools else None
        self._stop_tokens = frozenset((tokenizer.special("<|assistant_end|>"), tokenizer.bos))
        self._knobs: Knobs | None = None  # of the running rows; None after a change

    def fresh(self) -> Engine:
        """An empty engine of the same kind, for after a step that failed half way."""
        kind = {"slots": self.slots, "max_len": self.max_len, "prefill_tokens": self.prefill_tokens}
        return Engine(self.model, self.tokenizer, **kind, tools=self._tools is not None, frozen=self.frozen)

    # -- in and out ---------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting or self.reading)

    def stats(self) -> Stats:
        """What is going on, and totals."""
        running, waiting = len(self.running), len(self.waiting) + bool(self.reading)
        blocks = {"blocks_used": running + bool(self.reading), "blocks_free": self.slots - running}
        idle = {"preemptions": 0, "drafted_tokens": 0, "accepted_tokens": 0}
        return Stats(running=running, waiting=waiting, forwards=self.forwards, **blocks, **self._counts, **idle)

    def submit(self, ids: list[int], sampling: Sampling | None = None, n: int = 1) -> list[Sequence]:
        """Queue n replies to one prompt. UserError: empty prompt, unknown ids, no room for a reply in the context."""
        sampling = sampling or Sampling()
        self.check(ids, n)
        prompt = _Prompt(list(ids), waiting=n)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        sequences = [self._sequence(prompt, sampling, child_seed(seed, i)) for i in range(n)]
        self._stale = self._stale or not (self.busy or self.frozen)
        self.waiting.extend(sequences)
        self._counts["prompt_tokens"] += n * len(ids)
        return sequences

    def check(self, ids: list[int], n: int = 1) -> None:
        """Refuse what `submit` would refuse."""
        if not ids:
            raise UserError("The prompt is empty: give at least one token, such as bos.")
        if len(ids) >= self.max_len:
            raise UserError(
                f"The prompt has {len(ids)} tokens and the context holds {self.max_len}, with the reply: shorten it."
            )
        if not 0 <= min(ids) <= max(ids) < self.model.config.vocab_size:
            raise UserError(f"The prompt has a token outside the vocabulary of {self.model.config.vocab_size}.")
        if n < 1:
            raise UserError(f"n is {n}, but at least 1 reply must be asked for.")

    def _sequence(self, prompt, sampling, seed):
        stops = self._stop_tokens if sampling.stop_tokens is None else frozenset(sampling.stop_tokens)
        tools = ToolState(self._tools) if self._tools else None
        sequence = Sequence(prompt, sampling, seed, stops, tools)
        if sampling.stop:
            sequence._text, sequence._stops = TextStream(self.tokenizer), StopFinder(sampling.stop)
        return sequence

    @torch.inference_mode()
    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now, whatever it is doing: no further forward includes it. Nothing if it has ended."""
        if sequence.finished:
            return
        sequence.finished = "cancelled"
        if sequence in self.running:
            self._leave(self.running.index(sequence))
            return
        sequence.prompt.waiting -= 1
        if sequence is self.reading:
            self.reading = None
        else:
            self.waiting.remove(sequence)

    def complete(
        self, prompts, sampling: Sampling | list[Sampling] | None = None, n: int = 1
    ) -> list[list[Completion]]:
        """n replies to each prompt (list of ids), in order; one Sampling for all or one a prompt."""
        params = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        if len(params) != len(prompts):
            raise UserError(f"{len(prompts)} prompts came with {len(params)} samplings: give one for all or one each.")
        groups = []
        try:
            groups.extend(self.submit(ids, each, n) for ids, each in zip(prompts, params))
            while any(not sequence.finished for group in groups for sequence in group):
                self.step()
        finally:
            for sequence in (sequence for group in groups for sequence in group):
                self.cancel(sequence)
        return [[sequence.completion(self.tokenizer) for sequence in group] for group in groups]

    def generate(self, ids: list[int], sampling: Sampling | None = None, n: int = 1) -> Iterator[tuple[list, list]]:
        """Yield, a step, (tokens, mask) of the n replies to one prompt: mask 1 sampled, 0 forced.

        A row's last token may be its stop token; after it the row's token is None. Closing the iterator cancels.
        """
        sequences = self.submit(ids, sampling, n)
        row = {id(sequence): i for i, sequence in enumerate(sequences)}
        try:
            while any(not sequence.finished for sequence in sequences):
                tokens, mask = [None] * n, [0] * n
                for event in self.step():
                    i = row.get(id(event.sequence))
                    if i is not None:
                        tokens[i], mask[i] = event.token, int(not event.forced)
                if any(token is not None for token in tokens):
                    yield tokens, mask
        finally:
            for sequence in sequences:
                self.cancel(sequence)

    # -- a step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for every running sequence, and for those whose prompt was read in this step; [] when idle."""
        if self._stale and self.busy and self._decoder:
            self._decoder.refresh()
            self._stale = False
        logits = [self._decode()] if self.running else []  # each (b, V), in the order of the rows
        logits += self._start()
        if not logits:
            return []
        logits = logits[0] if len(logits) == 1 else torch.cat(logits)
        drawn = self._sample(logits)
        events = [sequence.take(*draw, self.max_len) for sequence, *draw in zip(self.running, *drawn)]
        self._counts["generated_tokens"] += len(events)
        for i in range(len(self.running) - 1, -1, -1):
            if self.running[i].finished:
                self._leave(i)
        return events

    def _forward(self, rows: list[list[int]], first: int) -> torch.Tensor:
        """Feed rows of new ids to the slots from `first` on -> fp32 logits (b, V) behind each row's last."""
        counts = [len(row) for row in rows]
        width = max(counts)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows]).to(self.device, non_blocking=True)
        view = self.cache.view(first, counts)
        if width == 1 and self._decoder:
            logits = self._decoder(ids, view)
        else:
            last = None
            if min(counts) < width:
                last = torch.tensor(counts).sub_(1).to(self.device, non_blocking=True)
            logits = self.model(ids, cache=view, last_only=True, last=last)[:, 0]
        self.cache.advance(first, counts)
        self.forwards += 1
        return logits

    def _decode(self):
        return self._forward([[sequence.tokens[-1]] for sequence in self.running], 1)

    def _sample(self, logits):
        """(b, V) -> ids, log probabilities and alternatives as lists: the one copy to the host of a step."""
        if self._knobs is None:
            self._knobs = Knobs([sequence.sampling for sequence in self.running], self.device)
        u = torch.tensor([uniform(sequence.seed, len(sequence.tokens)) for sequence in self.running])
        ids = sample(logits, self._knobs, u.to(self.device, non_blocking=True))
        asked = any(sequence.sampling.logprobs for sequence in self.running)
        top = max(sequence.sampling.top_logprobs for sequence in self.running)
        return logprobs.unpack(logprobs.pack(logits, ids, asked, top))

    # -- joining and leaving ------------------------------------------------------------------------------------------

    def _start(self) -> list[torch.Tensor]:
        """Let waiting sequences join the running ones -> the logits of those who did, in the order of their rows."""
        if self.reading:
            return self._read_on()
        logits, batch, twins, widest = [], [], [], 0
        while self.waiting and len(self.running) + len(batch) + len(twins) < self.slots:
            prompt = self.waiting[0].prompt
            widest = max(widest, len(prompt.ids))
            if any(sequence.prompt is prompt for sequence in batch):
                twins.append(self.waiting.popleft())
            elif self._holder(prompt) is not None:
                logits.append(self._fork(self.waiting.popleft()))
            elif (len(batch) + 1) * widest <= self.prefill_tokens:
                batch.append(self.waiting.popleft())
            elif not batch and not logits:
                self.reading, self.cache.lengths[0] = self.waiting.popleft(), 0
                return self._read_on()
            else:
                break
        return logits + self._read(batch) + [self._fork(sequence) for sequence in twins]

    def _read(self, batch: list[Sequence]) -> list[torch.Tensor]:
        """Prefill whole prompts together."""
        if not batch:
            return []
        first = len(self.running) + 1
        self.cache.lengths[first : first + len(batch)] = [0] * len(batch)
        logits = self._forward([sequence.prompt.ids for sequence in batch], first)
        for i, sequence in enumerate(batch):
            self._join(sequence, logits[i : i + 1])
        return [logits]

    def _read_on(self) -> list[torch.Tensor]:
        """Prefill the next chunk of a long prompt; when it is whole, its sequence joins."""
        sequence, done = self.reading, self.cache.lengths[0]
        logits = self._forward([sequence.prompt.ids[done : done + self.prefill_tokens]], 0)
        if self.cache.lengths[0] < len(sequence.prompt.ids):
            return []
        self.cache.copy(0, len(self.running) + 1)
        self.reading = None
        self._join(sequence, logits)
        return [logits]

    def _join(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Its prompt is in the next free slot: run it. What its twins will need is kept while there are any."""
        prompt = sequence.prompt
        self.running.append(sequence)
        self._knobs = None
        prompt.waiting -= 1
        if sequence.sampling.prompt_logprobs and prompt.law is None:
            self._read_law(sequence)
        if not prompt.waiting:
            prompt.logits = prompt.last = None
        elif prompt.logits is None:
            prompt.logits, prompt.last = logits.clone(), self.cache.newest(len(self.running))

    def _read_law(self, sequence: Sequence) -> None:
        """The log probabilities of a prompt's tokens."""
        ids = torch.tensor([sequence.prompt.ids], device=self.device)
        top = sequence.sampling.top_logprobs
        sequence.prompt.law = logprobs.of_prompt(self.model(ids)[0, :-1], ids[0, 1:], top) if ids.size(1) > 1 else []

    def _holder(self, prompt: _Prompt) -> int | None:
        """The slot of a running sequence with the same prompt."""
        if prompt.logits is None:
            return None
        return next((slot for slot, sequence in enumerate(self.running, 1) if sequence.prompt is prompt), None)

    def _fork(self, sequence: Sequence) -> torch.Tensor:
        """Start from a running twin's prompt without reading it again."""
        prompt, slot = sequence.prompt, len(self.running) + 1
        logits = prompt.logits
        self.cache.copy(self._holder(prompt), slot, len(prompt.ids), prompt.last)
        sequence.cached = len(prompt.ids)
        self._counts["cached_tokens"] += sequence.cached
        self._join(sequence, logits)
        return logits

    def _leave(self, row: int) -> None:
        """Take a running sequence out; the last one moves into its slot, so that the slots in use stay neighbours."""
        mover = self.running.pop()
        if row < len(self.running):
            self.cache.copy(len(self.running) + 1, row + 1)
            self.running[row] = mover
        self._knobs = None
