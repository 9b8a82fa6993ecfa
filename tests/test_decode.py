"""The decode step with its own weight layout against GPT.forward, its slow twin."""

import pytest
import torch
from tiny_model import TOKENIZER, tiny_gpt

from nanochat.decode import PACKED_ROWS, Decoder
from nanochat.engine import Engine
from nanochat.kvcache import SlotCache
from nanochat.sampling import Sampling


@torch.inference_mode()
def both(model, lengths, steps=3):
    """Logits (steps, B, V) of the decoder and of GPT.forward for rows that already hold `lengths` tokens."""
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(256, (length + steps,), generator=random) for length in lengths]
    cache = SlotCache(len(rows), model.config.sequence_len, model.attend)
    for slot, (row, length) in enumerate(zip(rows, lengths)):
        if length:
            model(row[None, :length], cache=cache.view(slot, [length]))
            cache.advance(slot, [length])
    decoder, fast, slow = Decoder(model), [], []
    decoder.refresh()
    for step in range(steps):
        ids = torch.stack([row[length + step] for row, length in zip(rows, lengths)]).unsqueeze(1)
        fast.append(decoder(ids, cache.view(0, [1] * len(rows))))
        cache.advance(0, [1] * len(rows))
        slow.append(torch.cat([model(row[None, : length + step + 1])[:, -1] for row, length in zip(rows, lengths)]))
    return torch.stack(fast), torch.stack(slow)


@pytest.mark.parametrize("lengths", [[5], [0], [30, 3], [9, 9, 9], [40, 1, 0, 22, 7], [12] * PACKED_ROWS], ids=str)
def test_a_step_equals_the_full_forward(lengths):
    fast, slow = both(tiny_gpt(), lengths)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "shape",
    [{"n_kv_head": 4}, {"n_kv_head": 1}, {"n_layer": 1, "window_pattern": "L"}, {"n_layer": 4}, {"vocab_size": 300}]
    + [{"n_head": 1, "n_kv_head": 1, "n_embd": 8}, {"window_pattern": "1,2,L"}],
    ids=str,
)
def test_every_shape(shape):
    fast, slow = both(tiny_gpt(2, **shape), [20, 3, 0, 9, 30])
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


def test_the_engine_lays_changed_weights_out_anew():
    model, greedy = tiny_gpt(), Sampling(temperature=0, max_tokens=6, stop_tokens=())
    engine = Engine(model, TOKENIZER)
    engine.complete([[1, 2]], greedy)
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(-0.7)  # as an optimizer may, without a trace in the version counter
    assert engine.complete([[1, 2]], greedy)[0][0].ids == list(model.generate_naive([1, 2], 6, temperature=0))
