"""Whoever joins, leaves, loses its place, shares a beginning or is guessed for: replies are those of whole forwards."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import GREEDY, MODEL, WIDE, check_greedy, prompt
from tiny_model import TOKENIZER, Scripted, ids_of, tiny_gpt

from nanochat.blocks import BlockPool, Pages
from nanochat.engine import Engine
from nanochat.kvcache import KVCache
from nanochat.sampling import Sampling
from nanochat.scheduler import GUESS_ROWS
from scripts import bench_engine_schedules as schedules

GREEDY_LONG = Sampling(temperature=0, max_tokens=50)

# -- any schedule -----------------------------------------------------------------------------------------------------

MODELS = {double: schedules.tiny(double) for double in (False, True)}
LIMITS = st.sampled_from([1, 3, 12, None])


@st.composite
def samplings(draw, double):
    """Greedy with log probabilities; in fp64 also drawn."""
    common = {"max_tokens": draw(LIMITS), "stop": draw(st.sampled_from([(), ("a1", "bb+")]))}
    if not double or draw(st.booleans()):
        return Sampling(temperature=0, logprobs=True, **common)
    cuts = {"top_k": draw(st.sampled_from([None, 5])), "top_p": draw(st.sampled_from([None, 0.9]))}
    return Sampling(temperature=draw(st.sampled_from([0.2, 1.0])), seed=draw(st.integers(0, 3)), **cuts, **common)


@st.composite
def plans(draw):
    """An engine, often too small for what is asked of it, and requests, steps and cancellations."""
    double = draw(st.booleans())
    requests = st.builds(
        schedules.Request, st.integers(0, 1), st.integers(1, 60), st.sampled_from([1, 2, 3]), samplings(double)
    )
    cancels = st.tuples(st.just("cancel"), st.integers(0, 9))
    actions = draw(st.lists(st.one_of(requests, requests, st.integers(1, 5), cancels), min_size=1, max_size=8))
    return schedules.Schedule(
        tuple(actions),
        slots=draw(st.integers(1, 4)),
        chunk=draw(st.sampled_from([1, 5, 16, 1024])),
        block=draw(st.sampled_from([1, 4, 16])),
        tokens=draw(st.sampled_from([None, 100, 200])),
        guesses=draw(st.sampled_from([0, 4])),
        static=draw(st.booleans()),
        double=double,
    )


@given(plans())
@settings(max_examples=20, deadline=None)
def test_any_schedule_gives_the_replies_of_whole_forwards_pitfall_26(plan):
    schedules.run(plan, MODELS[plan.double])


@pytest.mark.slow
@given(plans())
@settings(max_examples=60, deadline=None)
def test_more_schedules(plan):
    schedules.run(plan, MODELS[plan.double])


@pytest.mark.slow
def test_the_random_schedules_meet_everything():
    calls = Sampling(temperature=3.0, top_k=4, max_tokens=70, seed=2, stop_tokens=())  # the calculator's, mostly
    plans = [schedules.random_schedule(seed) for seed in range(6)]
    plans += [schedules.Schedule(tuple(schedules.Request(text, 20, 4, calls) for text in range(3)), tokens=200)]
    counts = sum((schedules.run(plan, MODELS[plan.double]) for plan in plans), Counter())
    met = {"preemptions", "cached_tokens", "accepted_tokens", "forced_tokens", "stop", "length", "cancelled"}
    assert {name for name in met if not counts[name]} == set()


# -- prefixes, scarce memory, guesses ---------------------------------------------------------------------------------


def test_the_turns_of_a_chat_read_only_what_is_new():
    engine, ids = Engine(MODEL, TOKENIZER, frozen=True, block=4), prompt(20)
    first = engine.complete([ids], GREEDY)[0][0]
    turn = ids + first.ids + prompt(5)
    second = engine.complete([turn], GREEDY)[0][0]
    assert second.cached_tokens == 24 and second.ids == list(MODEL.generate_naive(turn, 8, temperature=0))
    check_greedy(MODEL, turn, second.ids, second.logprobs)


def test_prompts_with_the_same_beginning_share_its_blocks():
    engine, system = Engine(WIDE, TOKENIZER, slots=4, block=4), prompt(32)
    prompts = [system + prompt(6, seed) for seed in range(4)]
    engine.complete(prompts[:1], GREEDY)
    engine._stale, engine.frozen = False, True  # the weights are the same
    sequences = [engine.submit(ids, GREEDY)[0] for ids in prompts]
    engine.step()
    assert [sequence.cached for sequence in sequences] == [36, 32, 32, 32]
    assert engine.stats().blocks_used < 4 * 10 and len({sequence.pages.tables[0][7] for sequence in sequences}) == 1
    while engine.busy:
        engine.step()
    for ids, sequence in zip(prompts, sequences):
        check_greedy(WIDE, ids, sequence.tokens, sequence.logprobs)


def test_a_short_window_keeps_only_its_blocks():
    engine = Engine(tiny_gpt(window_pattern="7,7,L"), TOKENIZER, block=4)
    [sequence] = engine.submit(prompt(40), Sampling(temperature=0, max_tokens=10, stop_tokens=()))
    engine.step()
    short, whole = (sum(map(bool, table)) for table in sequence.pages.tables)
    assert short <= 3 and whole == 10


def test_scarce_blocks_make_the_youngest_wait_and_change_nothing_pitfall_26():
    draw = Sampling(temperature=1.0, seed=3, max_tokens=30, stop_tokens=())
    small = Engine(MODEL, TOKENIZER, slots=4, block=4, cache_tokens=80)
    prompts = [prompt(20, seed) for seed in range(4)]
    replies = small.complete(prompts, draw)
    assert small.stats().preemptions > 0
    assert [r[0].ids for r in replies] == [r[0].ids for r in Engine(MODEL, TOKENIZER).complete(prompts, draw)]
    assert small.stats().blocks_used == 0


def test_guesses_save_forwards_and_change_nothing():
    ids = [1, 2, 3, 4, 5, 6, 7] * 4
    draw = Sampling(temperature=0.3, seed=1, max_tokens=30, stop_tokens=())
    plain, quick = (Engine(Scripted(ids * 3), TOKENIZER, guesses=guesses) for guesses in (0, 4))
    assert plain.complete([ids], draw)[0][0].ids == quick.complete([ids], draw)[0][0].ids
    assert quick.stats().accepted_tokens > 20 and quick.forwards < plain.forwards / 2


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_new_sequences_start_far_apart_and_grow_in_one_piece():
    pools = [BlockPool(1 + 4 * 8, 8)]
    all_pages = [Pages(pools, [99], 2) for _ in range(4)]
    for length in (1, 3, 9, 16):
        assert all(pages.grow(length) for pages in all_pages)
    assert all(len(pages.runs[0]) == 1 and len(pages.tables[0]) == 8 for pages in all_pages)
    assert not Pages(pools, [99], 2).grow(1) and pools[0].used == 32
    for pages in all_pages:
        pages.release()
    assert pools[0].used == 0


def test_a_block_is_forgotten_when_it_is_taken_again_oldest_first():
    pools = [BlockPool(1 + 4, 4)]
    first, second = Pages(pools, [99], 2), Pages(pools, [99], 2)
    for pages, ids in ((first, [1, 2, 3, 4]), (second, [5, 6, 7, 8])):
        assert pages.grow(4)
        pages.advance(ids, 4)
        pages.release()
    again = Pages(pools, [99], 2)
    assert again.match([5, 6, 7, 8, 9]) == 4 and again.grow(6)  # takes the oldest, which was the first's
    assert Pages(pools, [99], 2).match([1, 2, 3, 4, 9]) == 0
    again.release()
    assert Pages(pools, [99], 2).match([5, 6, 9]) == 2


def test_a_beginning_is_never_all_of_a_prompt_and_must_be_the_same_from_the_start():
    pools = [BlockPool(9, 8)]
    pages = Pages(pools, [99], 2)
    assert pages.grow(4)
    pages.advance([1, 2, 3, 4], 4)
    assert [Pages(pools, [99], 2).match(ids) for ids in ([1, 2, 3, 4], [1, 2, 3, 4, 5], [0, 2, 3, 4, 5])] == [2, 4, 0]
    assert max(pools[0].refs) == 3


def test_two_share_full_blocks_and_copy_the_last():
    pools = [BlockPool(9, 8)]
    pages = Pages(pools, [99], 2)
    assert pages.grow(5)
    pages.advance([1, 2, 3, 4, 5], 5)
    twin, copies = pages.fork(5)
    assert twin.tables[0][:2] == pages.tables[0][:2] and copies == [(0, pages.tables[0][2], twin.tables[0][2])]
    pages.release()
    assert pools[0].used == 3
    twin.release()
    assert pools[0].used == 0


def test_what_a_tool_forces_takes_no_rows_that_are_not_there():
    """A GPU's graphs end at the larger of slots and GUESS_ROWS: one row more, and every reply of the step fails."""
    slots = GUESS_ROWS + 4
    said = ids_of("«9999999*9999999»‹99999980000001›")
    model = Scripted([0, *said, *ids_of(".")])
    engine = Engine(model, TOKENIZER, slots=slots)
    (replies,) = engine.complete([[0]], GREEDY_LONG, n=slots)
    assert all(reply.ids == said and not all(reply.mask) for reply in replies)
    assert max(model.rows) == slots


def test_memory_that_torch_holds_for_nobody_is_a_caches_too(monkeypatch):
    """After a training step most of a GPU is held by torch's allocator, free for whoever asks it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    cache = object.__new__(KVCache)
    assert cache._sequences("cuda", whole=10, rows=4) == pytest.approx(0.4 * (10 + 60 - 20) / 10)
