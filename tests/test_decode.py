"""The engine's forward against GPT.forward, its slow twin: prompts in parts, rows, rows with nothing but tensors."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_model import TOKENIZER, tiny_gpt

from nanochat import native, paged
from nanochat.decode import INT8_ROWS, Batch, Runner
from nanochat.engine import Engine
from nanochat.graphs import StaticDecode, sizes
from nanochat.kvcache import KVCache
from nanochat.paged import Chunks, Rows
from nanochat.sampling import Sampling


@torch.inference_mode()
def both(model, lengths, steps=3, way="rows", shared=0, size=4, int8=False, parts=0):
    """Logits (steps, B, V) of the runner and of GPT.forward for rows that already hold `lengths` tokens.

    The first `shared` tokens are the same for all, and in the same blocks; size: tokens a block.
    parts: the decoder has read them too, so many at once.
    """
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(256, (length + steps,), generator=random) for length in lengths]
    runner, most = Runner(model, int8), model.config.sequence_len
    runner.refresh()
    room = len(rows) * (most if parts else 1)  # a part that is being read holds more than its window
    cache = KVCache(model.config, runner.device, runner.dtype, max_len=most, rows=room, size=size)
    decoder, owners = None, []
    if way == "native":
        decoder = native.find(runner, cache)
        assert decoder, "the tests of the C need a compiler, such as gcc"
        decoder.refresh()
    for row, length in zip(rows, lengths):
        row[:shared] = rows[0][:shared]
        pages = cache.pages()
        start = pages.match(row[: length + 1].tolist())
        assert start >= (shared if owners else 0)
        read(runner, cache, model, pages, row.tolist(), start, length, parts or 7, decoder=decoder if parts else None)
        owners.append(pages)
    if way == "static":
        decoder = StaticDecode(runner, cache, len(rows) + 3, graphs=False)
    fast, slow = [], []
    for step in range(steps):
        batch = Batch()
        for pages, row, length in zip(owners, rows, lengths):
            assert pages.grow(length + step + 1)
            batch.add(pages, row[max(0, length + step - 1) : length + step + 1].tolist(), length + step)
        if way == "rows":
            fast.append(runner(batch, Rows(cache, list(zip(batch.owners, batch.positions)))))
        else:
            fast.append(decoder(batch).clone())
        for pages, row, length in zip(owners, rows, lengths):
            pages.advance(row.tolist(), length + step + 1)
        slow.append(torch.cat([model(row[None, : length + step + 1])[:, -1] for row, length in zip(rows, lengths)]))
    return torch.stack(fast), torch.stack(slow)


def read(runner, cache, model, pages, ids, start, stop, chunk, decoder=None):
    """The tokens start to stop - 1 of ids into the pages, by the decoder where one is given."""
    for first in range(start, stop, chunk):
        count = min(chunk, stop - first)
        assert pages.grow(first + count)
        batch = Batch()
        batch.extend(pages, ids, first, count)
        if decoder:
            assert decoder(batch, []).shape == (0, model.config.vocab_size)
        else:
            runner(batch, Chunks(cache, model.attend, [(pages, first, count)]), [])
        pages.advance(ids, first + count)


@pytest.mark.parametrize("way", ["rows", "static", "native"])
@pytest.mark.parametrize("lengths", [[5], [0], [30, 3], [9, 9, 9], [40, 1, 0, 22, 7]], ids=str)
def test_a_step_equals_the_full_forward(lengths, way):
    fast, slow = both(tiny_gpt(), lengths, way=way)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)


@pytest.mark.parametrize("short", [0, 3, 128])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_rows_with_the_same_beginning_read_it_once(size, short, monkeypatch):
    monkeypatch.setattr("nanochat.paged.SHORT", short)
    fast, slow = both(tiny_gpt(window_pattern="L"), [32, 40, 33, 50, 36], shared=32, size=size)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)
    fast, slow = both(tiny_gpt(), [33, 40, 33], shared=32, size=size)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)


def test_the_sizes_of_graphs_reach_every_number_of_rows():
    for most in (1, 2, 16, 33, 256):
        assert sizes(most)[-1] == most and sizes(most) == sorted(set(sizes(most)))


@pytest.mark.parametrize(
    "shape",
    [{"n_kv_head": 4}, {"n_kv_head": 1}, {"n_layer": 1, "window_pattern": "L"}, {"n_layer": 4}, {"vocab_size": 300}]
    + [{"n_head": 1, "n_kv_head": 1, "n_embd": 8}, {"window_pattern": "1,2,L"}],
    ids=str,
)
@pytest.mark.parametrize("way", ["rows", "native"])
def test_every_shape(shape, way):
    fast, slow = both(tiny_gpt(2, **shape), [20, 3, 0, 9, 30], way=way)
    assert fast.shape[-1] == shape.get("vocab_size", TOKENIZER.vocab_size)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)


def test_double_precision_shows_that_the_two_compute_the_same():
    fast, slow = both(tiny_gpt().double(), [20, 3, 0, 9, 30])
    torch.testing.assert_close(fast.double(), slow, atol=1e-5, rtol=0)  # logits are given in fp32


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_half_precision_stays_near(stored):
    model = tiny_gpt().to(stored)
    model.compute_dtype = torch.bfloat16
    fast, slow = both(model, [20, 3])
    assert (fast - slow).abs().mean() < 0.1 and fast.dtype == torch.float32


def test_a_cpu_answers_in_fp32_while_it_trains_in_bf16():
    model = tiny_gpt()
    model.compute_dtype = torch.bfloat16
    engine = Engine(model, TOKENIZER)
    assert engine.runner.dtype == torch.float32 and isinstance(engine.decoder, native.Native)


def test_8_bit_weights_are_near_and_the_same_for_few_rows_and_many():
    few, slow = both(tiny_gpt(n_embd=64), [20, 3], int8=True)
    many, _ = both(tiny_gpt(n_embd=64), [20, 3] + [5] * INT8_ROWS, int8=True)
    assert (few - slow).abs().mean() < 0.1
    assert (few - many[:, :2]).abs().mean() < 0.03  # activations in bf16 for few rows


def test_the_engine_lays_changed_weights_out_anew():
    model, greedy = tiny_gpt(), Sampling(temperature=0, max_tokens=6, stop_tokens=())
    engine = Engine(model, TOKENIZER)
    engine.complete([[1, 2]], greedy)
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(-0.7)  # as an optimizer may, without a trace in the version counter
    assert engine.complete([[1, 2]], greedy)[0][0].ids == list(model.generate_naive([1, 2], 6, temperature=0))


def test_changed_weights_make_the_cache_forget():
    model, greedy = tiny_gpt(), Sampling(temperature=0, max_tokens=6, stop_tokens=())
    engine, ids = Engine(model, TOKENIZER), list(range(40))
    engine.complete([ids], greedy)
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(-0.7)
    [reply] = engine.complete([ids], greedy)[0]
    assert reply.ids == list(model.generate_naive(ids, 6, temperature=0)) and reply.cached_tokens == 0


@pytest.mark.parametrize(
    ("error", "answer"),
    [(RuntimeError("page size must be 256"), False), (torch.AcceleratorError("launch failed"), None),
     (torch.OutOfMemoryError("full"), None)],
)  # fmt: skip
def test_a_fault_of_the_gpu_is_not_taken_for_a_kernel_that_reads_no_blocks(monkeypatch, error, answer):
    def varlen_attn(*args, window_size, seqused_k, block_table):
        raise error

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
    for maker in ("zeros", "ones", "tensor"):
        real = getattr(torch, maker)
        monkeypatch.setattr(torch, maker, lambda *args, real=real, device, **how: real(*args, **how))
    with pytest.raises(type(error)) if answer is None else contextlib.nullcontext():
        assert paged.reads_blocks.__wrapped__(torch.float32, 16) is answer


def test_graphs_recorded_anew_ask_for_no_pool_whose_graphs_are_gone(monkeypatch):
    """torch asserts that another living graph uses the pool which a recording asks for."""
    pools = []

    @contextlib.contextmanager
    def recording(graph, pool):
        pools.append(pool)
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: None, pool=lambda: (0, len(pools)))
    fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": lambda: graph}
    fakes |= {"graph": recording, "stream": lambda one: contextlib.nullcontext()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    model = tiny_gpt()
    runner = Runner(model)
    cache = KVCache(model.config, runner.device, runner.dtype, max_len=8, rows=2, size=4)
    decoder, pages = StaticDecode(runner, cache, 2, graphs=True), cache.pages()
    assert pages.grow(1)
    with torch.inference_mode():
        decoder.refresh()
        for rows in (1, 2, 1):  # the second shares the first one's memory, the third is recorded already
            batch = Batch()
            for _ in range(rows):
                batch.add(pages, [5], 0)
            decoder(batch)
        assert pools == [None, (0, 1)]
        decoder.refresh()
        decoder(batch)
    assert pools[2:] == [None]
