"""Batched generation: sequences join and leave at every step, each with its own sampling, tools, limits and seed.

    engine = Engine(model, tokenizer, slots=32)
    sequences = engine.submit(ids, Sampling(temperature=0.8, max_tokens=100), n=4)   # waits for its turn
    while engine.busy:
        for event in engine.step(): ...                                              # event.sequence, event.token, ...
    replies = engine.complete([ids, more_ids], Sampling(...), n=2)                   # the same, until all are done

A step feeds every running sequence its newest token and gives each one more, or several where guesses from its own text
prove right (nanochat/speculation.py). Prompts are read in the same step, `prefill_tokens` of them at most, so a long
one does not hold up the others; the step that reads its end brings the first token. Prompts that begin alike, such as
the turns of a chat, share what has been read (nanochat/blocks.py), the n replies to one prompt all of it. No forward
follows a last token. Positions never pass `max_len`: a longer prompt is refused, a reply that reaches it ends with
finish "length". Who runs when, and what happens when memory runs out: nanochat/scheduler.py.

One thread may use an engine at a time.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from nanochat import logprobs, native
from nanochat.decode import Batch, Runner
from nanochat.errors import UserError, refuse
from nanochat.gpt import GPT
from nanochat.graphs import StaticDecode
from nanochat.kvcache import KVCache
from nanochat.paged import Chunks, Rows, block_size
from nanochat.sampling import Knobs, Sampling, child_seed, uniform
from nanochat.scheduler import GUESS_ROWS, Plan, Scheduler
from nanochat.sequence import Completion, Event, Prompt, Sequence
from nanochat.tools import ToolState, ToolTokens


@dataclass(frozen=True)
class Stats:
    """What an engine is doing, and has done since it was made."""

    running: int  # sequences that get tokens, or whose prompt is being read
    waiting: int  # sequences that wait for room
    blocks_used: int  # of the cache, by sequences
    blocks_free: int  # that a sequence could get, those that hold reusable prefixes included
    prompt_tokens: int  # submitted
    cached_tokens: int  # of them, found in the cache
    generated_tokens: int
    preemptions: int  # sequences that lost their place to others and were taken up again
    forwards: int
    drafted_tokens: int  # proposed by speculation
    accepted_tokens: int  # of them, right


class Engine:
    """Runs a model for many sequences at once; see the module's docstring.

    slots: sequences decoded together. max_len: longest prompt and reply together, at most the model's context.
    prefill_tokens: most prompt tokens read in one step. tools: whether python blocks are answered by the calculator.
    guesses: most tokens guessed ahead for a sequence; 0 turns speculation off.
    cache_tokens: room for keys and values (None: slots whole sequences, if memory allows); block: tokens a block.
    frozen: promise that the weights never change again; else they are laid out anew, and the cache is forgotten,
    whenever work begins. int8: 8-bit weights (CPU). static: decode with fixed shapes, graphs: as CUDA graphs (both
    None: on a GPU). A CPU computes in C where it can (nanochat/native.py).
    """

    def __init__(
        self, model, tokenizer, *, slots=32, max_len=None, prefill_tokens=1024, tools=True, frozen=False,
        guesses=4, cache_tokens=None, block=None, int8=False, static=None, graphs=None,
    ):  # fmt: skip
        context = model.config.sequence_len
        self.max_len = context if max_len is None else max_len
        refuse(_problems(self.max_len, context, slots, prefill_tokens, guesses, block))
        self.model, self.tokenizer = model, tokenizer
        self.slots, self.prefill_tokens, self.frozen, self.guesses = slots, prefill_tokens, frozen, guesses
        self.runner = Runner(model, int8) if isinstance(model, GPT) else model  # tests bring models of their own
        self.device, dtype = model.lm_head.weight.device, getattr(self.runner, "dtype", torch.float32)
        size = block or block_size(self.device, dtype)
        self.cache = KVCache(
            model.config, self.device, dtype, max_len=self.max_len, rows=slots, size=size, tokens=cache_tokens
        )
        self.scheduler = Scheduler(self.cache, slots, prefill_tokens, guesses)
        on_gpu = self.device.type == "cuda"
        static = on_gpu if static is None else static
        graphs = on_gpu if graphs is None else graphs
        rows = max(slots, GUESS_ROWS)
        # what is faster than the runner, if anything is: fixed shapes on a GPU to decode with, C on a CPU for all
        self.decoder = (
            StaticDecode(self.runner, self.cache, rows, graphs) if static else native.find(self.runner, self.cache)
        )
        self.forwards = 0  # calls of the model so far
        self._stale = True  # whether the runner's layout may differ from the weights
        self._counts = dict.fromkeys(("prompt_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"), 0)
        self._tools = ToolTokens.of(tokenizer) if tools else None
        self._stop_tokens = frozenset((tokenizer.special("<|assistant_end|>"), tokenizer.bos))
        self._knobs: tuple[list[Sampling], Knobs | native.Knobs] | None = None  # of the last step's rows

    def reset(self) -> None:
        """Forget all sequences, without a word to them, and all that the cache holds: for after a step that failed."""
        self.cache.reset()
        self.scheduler = Scheduler(self.cache, self.slots, self.prefill_tokens, self.guesses)
        self._knobs = None

    def release(self) -> None:
        """Lay the weights out and empty the model, which holds them once more. The engine must be a frozen one."""
        if not self.frozen:
            raise ValueError("an engine that is not frozen reads the model's weights again")
        self._refresh()
        self.model.to("meta")

    # -- in and out ---------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def stats(self) -> Stats:
        """What is going on, and totals."""
        scheduler, pools = self.scheduler, self.cache.pools
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_used=sum(pool.used for pool in pools),
            blocks_free=sum(len(pool.free) for pool in pools),
            cached_tokens=scheduler.cached_tokens,
            preemptions=scheduler.preemptions,
            forwards=self.forwards,
            **self._counts,
        )

    def submit(self, ids: list[int], sampling: Sampling | None = None, n: int = 1) -> list[Sequence]:
        """Queue n replies to one prompt. UserError: prompt empty, of unknown ids, or longer than the context."""
        sampling = sampling or Sampling()
        self.check(ids, n)
        if not (self.busy or self.frozen):
            self._stale = True
        prompt = Prompt(list(ids), waiting=n)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        sequences = [self._sequence(prompt, sampling, child_seed(seed, i)) for i in range(n)]
        self.scheduler.waiting.extend(sequences)
        self._counts["prompt_tokens"] += n * len(ids)
        return sequences

    def check(self, ids: list[int], n: int = 1) -> None:
        """Refuse what `submit` would refuse."""
        if not ids:
            raise UserError("The prompt is empty: give at least one token, such as bos.")
        if len(ids) > self.max_len:
            raise UserError(f"The prompt has {len(ids)} tokens and the context holds {self.max_len}: shorten it.")
        if not 0 <= min(ids) <= max(ids) < self.model.config.vocab_size:
            raise UserError(f"The prompt has a token outside the vocabulary of {self.model.config.vocab_size}.")
        if n < 1:
            raise UserError(f"n is {n}, but at least 1 reply must be asked for.")

    def _sequence(self, prompt, sampling, seed):
        stops = self._stop_tokens if sampling.stop_tokens is None else frozenset(sampling.stop_tokens)
        tools = ToolState(self._tools) if self._tools else None
        sequence = Sequence(prompt, sampling, seed, stops, tools, list(prompt.ids))
        if sampling.stop:
            sequence.watch_text(self.tokenizer)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now, whatever it is doing: no further forward includes it. Nothing if it has ended."""
        if sequence.finished:
            return
        sequence.finished = "cancelled"
        if not sequence.started:
            sequence.prompt.waiting -= 1
        self.scheduler.leave(sequence)

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
        """Yield, a token, (tokens, mask) of the n replies to one prompt: mask 1 sampled, 0 forced.

        A row's last token may be its stop token; where a row has no token, as after its end, it is None. Closing the
        iterator cancels.
        """
        sequences = self.submit(ids, sampling, n)
        row = {id(sequence): i for i, sequence in enumerate(sequences)}
        try:
            while any(not sequence.finished for sequence in sequences):
                columns = []
                for event in self.step():
                    i = row.get(id(event.sequence))
                    if i is None:
                        continue
                    column = next((c for c in columns if c[0][i] is None), None)
                    if column is None:
                        column = [None] * n, [0] * n
                        columns.append(column)
                    column[0][i], column[1][i] = event.token, int(not event.forced)
                yield from columns
        finally:
            for sequence in sequences:
                self.cancel(sequence)

    # -- a step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token or more for every running sequence, and for those whose prompt was read to its end."""
        if self._stale and self.busy:
            self._refresh()
        plan, logits = self.scheduler.plan(), []
        rows = [*plan.rows, *((twin, []) for twin in plan.twins)]  # (sequence, its guesses)
        if plan.rows:
            logits.append(self._decode(plan))
        logits += [twin.prompt.logits for twin in plan.twins]
        if plan.chunks:
            logits.append(self._read(plan))
            rows += [(sequence, []) for sequence, _ in plan.chunks if not sequence.pending]
            twins = self.scheduler.fork()
            rows += [(twin, []) for twin in twins]
            logits += [twin.prompt.logits for twin in twins]
        for sequence, _ in rows:
            if not sequence.prompt.waiting:
                sequence.prompt.logits = None
        if not rows:
            return []
        return self._take(rows, logits[0] if len(logits) == 1 else _together(logits))

    def _refresh(self) -> None:
        """The weights may have changed: lay them out, forget what was computed with the old ones."""
        if isinstance(self.runner, Runner):
            (self.decoder or self.runner).refresh()
        self.cache.flush()
        self._stale = False

    def _decode(self, plan: Plan) -> torch.Tensor:
        """The newest token of each row and its guesses -> logits, a row of them for each."""
        batch = Batch()
        for sequence, guesses in plan.rows:
            batch.add(sequence.pages, sequence.ids[-2:], len(sequence) - 1)
            for i, guess in enumerate(guesses):
                batch.add(sequence.pages, [batch.ids[-1], guess], len(sequence) + i)
        self.forwards += 1
        if self.decoder:
            return self.decoder(batch)
        return self.runner(batch, Rows(self.cache, list(zip(batch.owners, batch.positions))))

    def _read(self, plan: Plan) -> torch.Tensor:
        """The next parts of prompts -> logits behind the prompts that are whole now."""
        batch, spans, wanted, ends, laws = Batch(), [], [], [], []
        for sequence, count in plan.chunks:
            start = sequence.pages.length
            batch.extend(sequence.pages, sequence.ids, start, count)
            spans.append((sequence.pages, start, count))
            if sequence.sampling.prompt_logprobs and len(sequence.prompt.law) < len(sequence.prompt.ids) - 1:
                laws.append((sequence, start, len(wanted), count))
                wanted += range(len(batch.ids) - count, len(batch.ids))
            elif count == sequence.pending:
                wanted.append(len(batch.ids) - 1)
            if count == sequence.pending:
                ends.append(len(wanted) - 1)
        if isinstance(self.decoder, native.Native):
            logits = self.decoder(batch, wanted)
        else:
            logits = self.runner(batch, Chunks(self.cache, self.model.attend, spans), wanted)
        self.forwards += 1
        for sequence, count in plan.chunks:
            sequence.pages.advance(sequence.ids, sequence.pages.length + count)
        for sequence, start, first, count in laws:
            self._learn_law(sequence, start, logits[first : first + count])
        logits = logits[ends] if len(ends) < len(logits) else logits
        for row, sequence in enumerate(s for s, _ in plan.chunks if not s.pending):
            if sequence.prompt.waiting and not sequence.tokens:
                sequence.prompt.logits = logits[row : row + 1].clone()
        return logits

    def _learn_law(self, sequence: Sequence, start: int, logits: torch.Tensor) -> None:
        """logits (T, V) behind the tokens from `start` on: the log probabilities of those that follow in the prompt."""
        ids, law = sequence.prompt.ids, sequence.prompt.law
        skip = len(law) - start  # known from before the sequence lost its place
        targets = ids[start + 1 + skip : start + 1 + len(logits)]
        if targets:
            top = sequence.sampling.top_logprobs
            law += logprobs.of_prompt(logits[skip : skip + len(targets)], torch.tensor(targets).to(self.device), top)

    def _take(self, rows: list[tuple[Sequence, list[int]]], logits: torch.Tensor) -> list[Event]:
        """Draw at every place, keep guesses while they are what was drawn -> events."""
        events, at, ended = [], 0, []
        drawn = list(zip(*self._sample(rows, logits)))
        for sequence, guesses in rows:
            length, first, right = len(sequence), len(events), 0
            for i in range(len(guesses) + 1):
                event = sequence.take(*drawn[at + i], self.max_len)
                events.append(event)
                if event.finished or i == len(guesses) or event.token != guesses[i]:
                    break
                right += 1
            at += len(guesses) + 1
            if guesses and not events[first].forced:
                sequence.drafter.learn(right)
                self._counts["drafted_tokens"] += len(guesses)
                self._counts["accepted_tokens"] += right
            sequence.pages.advance(sequence.ids, min(length + right, len(sequence)))
            if sequence.finished:
                ended.append(sequence)
        for sequence in ended:
            self.scheduler.leave(sequence)
        self._counts["generated_tokens"] += len(events)
        return events

    def _sample(self, rows, logits):
        """(n, V) -> ids, log probabilities and alternatives as lists: the one copy to the host of a step."""
        params = [sequence.sampling for sequence, guesses in rows for _ in range(len(guesses) + 1)]
        if self._knobs is None or self._knobs[0] != params:
            quick = self.decoder.knobs(params) if isinstance(self.decoder, native.Native) else None
            self._knobs = params, quick or Knobs(params, self.device)
        draws = [uniform(s.seed, len(s.tokens) + i) for s, guesses in rows for i in range(len(guesses) + 1)]
        ids = self._knobs[1].draw(logits, draws)
        asked = any(each.logprobs for each in params)
        top = max(each.top_logprobs for each in params)
        return logprobs.unpack(logprobs.pack(logits, ids, asked, top))


def _together(logits: list[torch.Tensor]) -> torch.Tensor:
    """torch.cat. On a CPU by numpy: it wakes no threads of torch's, which would then spin where our C's are to run."""
    if logits[0].device.type == "cpu":
        return torch.from_numpy(np.concatenate([part.numpy() for part in logits]))
    return torch.cat(logits)


def _problems(max_len, context, slots, prefill_tokens, guesses, block) -> list[str]:
    """What is wrong with an engine's sizes."""
    least = {"slots": (slots, 1), "prefill_tokens": (prefill_tokens, 1), "guesses": (guesses, 0)}
    if block is not None:
        least["block"] = (block, 1)
    problems = [f"{name} is {have}, but must be at least {low}." for name, (have, low) in least.items() if have < low]
    if not 2 <= max_len <= context:
        problems.append(f"max_len is {max_len}, but it must be 2 to {context}, the model's context.")
    return problems
