"""The engine says what the full forward says, whatever joins or leaves; it wastes no forward; it knows its ends."""

import pytest
import torch
from tiny_model import TOKENIZER, Scripted, ids_of, tiny_gpt

from nanochat import engine
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.sampling import Sampling

MODEL, WIDE = tiny_gpt(), tiny_gpt(window_pattern="L")
GREEDY = Sampling(temperature=0, max_tokens=8, stop_tokens=(), logprobs=True)
END = TOKENIZER.special("<|assistant_end|>")


def prompt(length, seed=0):
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(100 * seed + length)).tolist()


def check_greedy(model, ids, tokens, logprobs):
    """One full forward over the prompt and the reply: each token is its argmax, each log probability its own."""
    if not tokens:
        return
    with torch.no_grad():
        law = model(torch.tensor([ids + tokens]))[0, len(ids) - 1 : -1].log_softmax(-1)  # (T, V)
    chosen = law.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, law.amax(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(logprobs), chosen, atol=1e-4, rtol=0)


def scripted(text, **sampling):
    """What the engine makes of a model that says `text` after a one-token prompt."""
    engine = Engine(Scripted([0, *ids_of(text)]), TOKENIZER)
    return engine, engine.complete([[0]], Sampling(**{"temperature": 0, "max_tokens": len(ids_of(text)), **sampling}))[
        0
    ][0]


# -- equal to the full forward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots,chunk", [(1, 1024), (3, 16), (5, 7), (4, 1)])
def test_replies_equal_the_naive_ones(slots, chunk):
    prompts = [prompt(n, seed) for seed, n in enumerate([1, 2, 9, 30, 17, 1, 25])]
    engine = Engine(MODEL, TOKENIZER, slots=slots, prefill_tokens=chunk)
    for ids, [reply] in zip(prompts, engine.complete(prompts, GREEDY)):
        assert reply.ids == list(MODEL.generate_naive(ids, 8, temperature=0))
        check_greedy(MODEL, ids, reply.ids, reply.logprobs)
        assert reply.finish == "length" and reply.mask == [1] * 8


def test_chunked_prefill_equals_one_shot_pitfall_28():
    ids = prompt(40)
    whole = Engine(MODEL, TOKENIZER).complete([ids], GREEDY)[0][0]
    for chunk in (1, 3, 13, 39):
        engine = Engine(MODEL, TOKENIZER, prefill_tokens=chunk)
        parts = engine.complete([ids], GREEDY)[0][0]
        assert engine.forwards == -(-40 // chunk) + 7
        assert parts.ids == whole.ids
        torch.testing.assert_close(torch.tensor(parts.logprobs), torch.tensor(whole.logprobs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{"n_kv_head": 4}, {"n_kv_head": 1}, {"n_layer": 2, "window_pattern": "1,L"}])
def test_other_shapes_of_heads_and_windows(changes):
    model = tiny_gpt(1, **changes)
    prompts = [prompt(n) for n in (3, 20, 1)]
    for ids, [reply] in zip(prompts, Engine(model, TOKENIZER, slots=2, prefill_tokens=8).complete(prompts, GREEDY)):
        check_greedy(model, ids, reply.ids, reply.logprobs)


@pytest.mark.slow  # only for what the switch imports
def test_memory_never_written_does_not_leak_into_replies():
    prompts = [prompt(n) for n in (2, 33, 17)]
    torch.use_deterministic_algorithms(True)  # among other things: torch.empty is full of NaN
    try:
        replies = Engine(MODEL, TOKENIZER, slots=3).complete(prompts, GREEDY)
    finally:
        torch.use_deterministic_algorithms(False)
    for ids, [reply] in zip(prompts, replies):
        check_greedy(MODEL, ids, reply.ids, reply.logprobs)


# -- sampling in company ----------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_reply_in_any_batch():
    draw = Sampling(temperature=1.2, top_k=40, seed=11, max_tokens=12, stop_tokens=())
    alone = Engine(MODEL, TOKENIZER).complete([prompt(9)], draw)[0][0].ids
    others = [Sampling(seed=i, max_tokens=3 + i, top_p=0.9 if i % 2 else None, stop_tokens=()) for i in range(5)]
    engine = Engine(MODEL, TOKENIZER, slots=4, prefill_tokens=16)
    batch = engine.complete([prompt(5 + i) for i in range(5)] + [prompt(9)], [*others, draw])
    assert batch[-1][0].ids == alone


def test_without_a_seed_every_reply_differs_pitfall_29():
    draw = Sampling(temperature=2.0, max_tokens=12, stop_tokens=())
    engine = Engine(MODEL, TOKENIZER)
    assert engine.complete([prompt(9)], draw)[0][0].ids != engine.complete([prompt(9)], draw)[0][0].ids


def test_the_samples_of_a_prompt_share_its_prefill_and_differ():
    engine = Engine(MODEL, TOKENIZER, slots=4)
    draw = Sampling(temperature=1.5, seed=3, max_tokens=6, stop_tokens=())
    replies = engine.complete([prompt(20)], draw, n=4)[0]
    assert engine.forwards == 1 + 5
    assert len({tuple(reply.ids) for reply in replies}) == 4
    assert replies[0].ids == Engine(MODEL, TOKENIZER).complete([prompt(20)], draw)[0][0].ids


def test_samples_that_wait_for_a_slot_start_from_a_running_twin():
    engine = Engine(WIDE, TOKENIZER, slots=2, guesses=0)
    waiting = engine.submit(prompt(20), Sampling(**{**vars(GREEDY), "max_tokens": 3}))
    twins = engine.submit(prompt(21), GREEDY, n=3)
    while engine.busy:
        engine.step()
    assert (
        engine.forwards == 1 + 2 + 7 + 6
    )  # one prefill for both; 2 steps with both rows; the third twin waits for room
    assert len({tuple(twin.tokens) for twin in twins}) == 1 and waiting[0].finished == "length"
    check_greedy(WIDE, prompt(21), twins[2].tokens, twins[2].logprobs)


def test_of_a_prompt_only_the_end_reaches_the_head_pitfall_18(monkeypatch):
    engine, rows = Engine(MODEL, TOKENIZER), []
    engine.decoder = None  # else C reads it, which is told what is wanted
    logits = engine.runner.logits
    monkeypatch.setattr(engine.runner, "logits", lambda x: rows.append(len(x)) or logits(x))
    engine.complete([prompt(40), prompt(30)], Sampling(temperature=0, max_tokens=1))
    assert rows == [2]


# -- nothing is wasted ------------------------------------------------------------------------------------------------


def test_no_forward_follows_the_last_token_pitfall_26():
    engine = Engine(MODEL, TOKENIZER)
    assert len(engine.complete([prompt(4)], Sampling(**{**vars(GREEDY), "max_tokens": 5}))[0][0].ids) == 5
    assert engine.forwards == 5


def test_finished_rows_are_not_decoded_pitfall_26():
    model = Scripted([0] * 40)
    engine = Engine(model, TOKENIZER, guesses=0)
    limits = [2, 4, 4, 9]
    params = [Sampling(temperature=0, stop_tokens=(), max_tokens=limit) for limit in limits]
    engine.complete([[5]] * 4, params)
    assert model.rows == [4, 4, 3, 3, 1, 1, 1, 1, 1]


def test_a_cancelled_sequence_gets_no_further_forward_pitfall_32():
    model = Scripted([0] * 60)
    engine = Engine(model, TOKENIZER, slots=2, guesses=0)
    first, second, third = (
        engine.submit([5], Sampling(temperature=0, stop_tokens=(), max_tokens=20))[0] for _ in range(3)
    )
    engine.step()
    engine.cancel(first)
    engine.cancel(third)
    model.rows.clear()
    assert [event.sequence for event in engine.step()] == [second]
    assert model.rows == [1] and first.finished == third.finished == "cancelled" and len(first.tokens) == 1
    engine.cancel(first)  # again: nothing
    engine.cancel(second)
    assert not engine.busy and engine.step() == []


def test_rows_of_a_step_are_joined_without_torchs_threads(monkeypatch):
    parts = [torch.randn(3, 7), torch.randn(1, 7), torch.randn(2, 7)]
    wanted = torch.cat(parts)
    monkeypatch.setattr(torch, "cat", None)  # it would wake them
    assert torch.equal(engine._together(parts), wanted)


def test_a_long_prompt_is_read_in_parts_while_others_go_on():
    engine = Engine(MODEL, TOKENIZER, slots=3, prefill_tokens=8)
    [short] = engine.submit(prompt(4), GREEDY)
    engine.step()
    [long] = engine.submit(prompt(30), GREEDY)
    counts = []
    while not long.tokens:
        engine.step()
        counts.append(len(short.tokens))
    assert counts == [2, 3, 4, 5]


def test_leaving_the_generator_early_frees_the_slots():
    engine = Engine(MODEL, TOKENIZER)
    for tokens, mask in engine.generate(prompt(5), GREEDY, n=2):
        assert len(tokens) == len(mask) == 2
        break
    assert not engine.busy


# -- the end of the context -------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_refused_with_a_sentence_pitfall_27():
    engine = Engine(MODEL, TOKENIZER)
    for length in (65, 700):
        with pytest.raises(UserError, match=f"{length} tokens.*context"):
            engine.submit(prompt(length))
    assert not engine.busy


def test_a_reply_ends_at_the_end_of_the_context_pitfall_27():
    engine = Engine(MODEL, TOKENIZER, slots=3)
    lengths = (63, 60, 10, 64)
    replies = engine.complete([prompt(n) for n in lengths], Sampling(**{**vars(GREEDY), "max_tokens": 500}), n=2)
    for length, pair in zip(lengths, replies):
        for reply in pair:
            assert (len(reply.ids), reply.finish) == (max(1, 64 - length), "length")
            assert reply.ids == list(MODEL.generate_naive(prompt(length), len(reply.ids), temperature=0))


@pytest.mark.parametrize("ids,match", [([], "empty"), ([999], "vocabulary"), ([-1], "vocabulary")])
def test_prompts_that_are_none_are_refused(ids, match):
    with pytest.raises(UserError, match=match):
        Engine(MODEL, TOKENIZER).submit(ids)


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"max_len": 65}, {"max_len": 1}, {"prefill_tokens": 0}], ids=str)
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(UserError):
        Engine(MODEL, TOKENIZER, **wrong)


# -- stops and tools --------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_the_reply_and_is_told_apart():
    _, reply = scripted("hi.more", logprobs=True)
    assert (reply.text, reply.finish, reply.stop_token) == ("hi", "stop", END)
    assert len(reply.ids) == len(reply.mask) == 2 and len(reply.logprobs) == 3


def test_other_stop_tokens_replace_the_usual_ones():
    _, reply = scripted("hi.more", stop_tokens=(ord("r"),))
    assert reply.ids == ids_of("hi.mo") and reply.stop_token == ord("r")


def test_a_stop_string_ends_the_reply_before_it():
    _, reply = scripted("one two three", stop=("xx", "o t"))
    assert (reply.text, reply.finish, reply.stop_token) == ("one tw", "stop", None)
    _, reply = scripted("one two", stop=("two!",))
    assert (reply.text, reply.finish) == ("one two", "length")


def test_the_calculator_answers_inside_the_reply_and_is_masked():
    _, reply = scripted(
        "is «2*3»xxx6.", max_tokens=50
    )  # xxx: what the model would have said while the answer is forced
    assert reply.ids == ids_of("is «2*3»‹6›6")
    assert reply.mask == [1] * 8 + [0] * 3 + [1]
    assert reply.finish == "stop"


def test_a_failed_call_forces_nothing():
    _, reply = scripted("«1/0» no.", max_tokens=50)
    assert reply.ids == ids_of("«1/0» no") and set(reply.mask) == {1}


def test_tools_can_be_off():
    engine = Engine(Scripted([0, *ids_of("«2*3»no.")]), TOKENIZER, tools=False)
    assert engine.complete([[0]], Sampling(temperature=0))[0][0].ids == ids_of("«2*3»no")


def test_generate_yields_the_forced_tokens_with_mask_zero():
    engine = Engine(Scripted([0, *ids_of("«1+1»xxx!.")]), TOKENIZER)
    columns = list(engine.generate([0], Sampling(temperature=0)))
    assert [tokens[0] for tokens, _ in columns] == ids_of("«1+1»‹2›!.")
    assert [mask[0] for _, mask in columns] == [1] * 5 + [0] * 3 + [1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replies_equal_the_naive_ones_on_cuda():
    model = tiny_gpt().cuda()
    prompts = [prompt(n) for n in (1, 9, 30)]
    for ids, [reply] in zip(prompts, Engine(model, TOKENIZER, slots=2, prefill_tokens=16).complete(prompts, GREEDY)):
        check_greedy(model.cpu(), ids, reply.ids, reply.logprobs)
        model.cuda()


# -- log probabilities and counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [3, 1024])
def test_log_probabilities_and_alternatives_of_prompt_and_reply(chunk):
    ids, ask = prompt(12), Sampling(seed=5, max_tokens=4, stop_tokens=(), top_logprobs=3, prompt_logprobs=True)
    engine = Engine(MODEL, TOKENIZER, prefill_tokens=chunk)
    for reply in engine.complete([ids], ask, n=2)[0]:
        with torch.no_grad():
            law = MODEL(torch.tensor([ids + reply.ids]))[0, :-1].log_softmax(-1)  # (T, V)
        best = law.topk(3)
        said = reply.prompt_logprobs[1:] + reply.logprobs
        chosen = law.gather(1, torch.tensor(ids[1:] + reply.ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(said), chosen, atol=1e-4, rtol=0)
        tops = reply.prompt_top_logprobs[1:] + reply.top_logprobs
        assert [[token for token, _ in top] for top in tops] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([[p for _, p in top] for top in tops]), best.values, atol=1e-4, rtol=0)
        assert reply.prompt_logprobs[0] is reply.prompt_top_logprobs[0] is None


def test_log_probabilities_come_only_where_asked_for():
    engine = Engine(MODEL, TOKENIZER)
    asked, plain = Sampling(temperature=0, max_tokens=3, stop_tokens=(), top_logprobs=2), Sampling(max_tokens=3)
    [first], [second] = engine.submit(prompt(4), asked), engine.submit(prompt(5), plain)
    events = [event for _ in range(3) for event in engine.step()]
    assert all((event.top is None) == (event.sequence is second) for event in events)
    assert [len(event.top) for event in events if event.sequence is first] == [2, 2, 2]
    reply = second.completion(TOKENIZER)
    assert reply.logprobs is reply.top_logprobs is reply.prompt_logprobs is None and first.logprobs[0] < 0


def test_a_forced_token_has_no_log_probability():
    _, reply = scripted("«1+1»xxx.", max_tokens=50, top_logprobs=1)
    assert [p is None for p in reply.logprobs] == [t is None for t in reply.top_logprobs]
    assert [p is None for p in reply.logprobs] == [False] * 5 + [True] * 3 + [False]


def test_the_counts_add_up():
    engine = Engine(MODEL, TOKENIZER, slots=3)
    [replies] = engine.complete([prompt(20)], Sampling(max_tokens=5, stop_tokens=(), seed=1), n=3)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.forwards) == (60, 15, engine.forwards)
    assert stats.running == stats.waiting == stats.blocks_used == 0 < stats.blocks_free
    assert [reply.prompt_tokens for reply in replies] == [20] * 3
    assert stats.cached_tokens == sum(reply.cached_tokens for reply in replies) > 0


def greedy_ids(engine):
    return [reply.ids for [reply] in engine.complete([prompt(n) for n in (1, 9, 30)], GREEDY)]


def test_a_released_engine_has_the_weights_alone():
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, frozen=True)
    engine.release()
    assert all(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert greedy_ids(engine) == greedy_ids(Engine(MODEL, TOKENIZER))
        engine.reset()
    with pytest.raises(ValueError, match="frozen"):
        Engine(tiny_gpt(), TOKENIZER).release()


@pytest.mark.parametrize("static", [None, True])
def test_after_a_reset_nothing_is_left_of_before(static):
    engine = Engine(MODEL, TOKENIZER, static=static, graphs=False, frozen=True)
    engine.submit(prompt(20), GREEDY, n=2)
    engine.step()
    for memory in engine.cache.memory:
        memory.fill_(float("nan"))
    engine.reset()
    assert not engine.busy and engine.stats().blocks_used == 0
    assert greedy_ids(engine) == greedy_ids(Engine(MODEL, TOKENIZER))


@pytest.mark.parametrize("top", [-1, 21, 1.5])
def test_too_many_alternatives_are_refused(top):
    with pytest.raises(UserError, match="top_logprobs"):
        Sampling(top_logprobs=top)
