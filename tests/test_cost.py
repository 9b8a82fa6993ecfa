"""Closed-form costs: equal to the published table, to a counted model, and to what autograd really keeps."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanochat import banks, cost
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import loss

# depth: width, heads, total and value-embedding parameters (M), scaling parameters N (M), FLOPs a token
PUBLISHED = {
    4: (256, 2, 36.70, 16.78, 11.53, 8.02e7),
    6: (384, 3, 73.53, 37.75, 23.20, 1.68e8),
    8: (512, 4, 125.83, 67.11, 41.94, 2.96e8),
    10: (640, 5, 195.95, 104.86, 70.12, 4.96e8),
    12: (768, 6, 286.26, 150.99, 110.10, 7.60e8),
    16: (1024, 8, 536.87, 268.44, 234.88, 1.59e9),
    20: (1280, 10, 896.53, 419.43, 435.16, 2.89e9),
    24: (1536, 12, 1384.12, 603.98, 729.81, 4.78e9),
    26: (1664, 13, 1681.79, 708.84, 918.42, 5.99e9),
    32: (2048, 16, 2818.58, 1073.74, 1677.72, 1.08e10),
}
VARIED = [
    GPTConfig(sequence_len=256, vocab_size=300, n_layer=3, n_head=4, n_kv_head=1, n_embd=64, window_pattern="SL"),
    GPTConfig(sequence_len=1024, vocab_size=1000, n_layer=4, n_head=2, n_kv_head=2, n_embd=16),
    GPTConfig(sequence_len=64, vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"),
]


def published(depth):
    width, heads, *_ = PUBLISHED[depth]
    return GPTConfig(n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=width)


@pytest.mark.parametrize("depth", PUBLISHED)
def test_the_published_table_is_reproduced(depth):
    _, _, total, values, scaling, flops = PUBLISHED[depth]
    count = cost.parameters(published(depth))
    found = [round(count[role] / 1e6, 2) for role in ("total", "value_embedding", "scaling")]
    assert found == pytest.approx([total, values, scaling], abs=0.0051)
    assert cost.flops_per_token(published(depth)) == pytest.approx(flops, rel=0.005)


@pytest.mark.parametrize("config", [*VARIED, GPTConfig()], ids=str)
def test_closed_form_equals_counting_a_model(config):
    with torch.device("meta"):
        roles = GPT(config).roles()
    counted = {role: sum(p.numel() for _, p in group) for role, group in roles.items()}
    found = cost.parameters(config)
    sums = {"total": sum(counted.values()), "scaling": counted["matrix"] + counted["head"]}
    assert found == counted | sums


@pytest.mark.slow  # for its imports
def test_flops_agree_with_torchs_counter():
    """The matmuls of a forward and backward, attention without windows, as torch counts them (but in-place ones)."""
    config = GPTConfig(sequence_len=64, vocab_size=128, n_layer=3, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L")

    def dense(q, k, v, window):  # matmuls that the counter sees
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
        return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)

    model = GPT(config, attend=dense)
    model.init_weights(0)
    ids = torch.randint(128, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    assert counter.get_total_flops() / ids.numel() == pytest.approx(cost.flops_per_token(config), rel=0.02)


def test_decoding_reads_only_the_windows():
    config = GPTConfig(sequence_len=2048, n_layer=4)  # windows 512, 512, 512, 2048
    assert cost.kv_bytes_per_token(config) == 2 * 4 * 768 * 2
    assert cost.kv_bytes_read(config, 100) == 100 * cost.kv_bytes_per_token(config)
    assert cost.kv_bytes_read(config, 2000) == (3 * 512 + 2000) * 2 * 768 * 2
    assert cost.kv_bytes_read(config, 2000, 1) * 2 == cost.kv_bytes_read(config, 2000)
    matrices = 2 * cost.parameters(config)["scaling"]
    assert cost.weights_bytes_read(config) == matrices + 2 * (768 + 2 * 768)


def test_published_decode_figures_of_depth_24():
    """1.46 GB of bf16 weights and 132 MB of keys and values at 2k context: at 3.35 TB/s, 2105 tokens/s."""
    config = published(24)
    weights, kv = cost.weights_bytes_read(config), cost.kv_bytes_read(config, 2048)
    assert weights == pytest.approx(1.46e9, rel=0.005) and kv == pytest.approx(132e6, rel=0.01)
    assert 3.35e12 / (weights + kv) == pytest.approx(2105, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_activation_estimate_is_what_autograd_keeps(kv_heads):
    config = GPTConfig(
        sequence_len=64, vocab_size=64, n_layer=6, n_head=4, n_kv_head=kv_heads, n_embd=128, window_pattern="L"
    )
    measured, less = (kept_bytes(config, recompute) for recompute in (False, True))
    assert cost.activations(config, 2, bytes_per_value=4) == pytest.approx(measured, rel=0.1)
    saved = cost.recomputation(config, 2, bytes_per_value=4)["saved"]
    inside = cost.activations(config, 2, bytes_per_value=4) / config.n_layer  # of the one block at work, not seen here
    assert saved + inside == pytest.approx(measured - less, rel=0.1)


def kept_bytes(config, recompute):
    """What autograd keeps of a forward pass of 2 rows, parameters left out."""
    model = GPT(config)
    model.init_weights(0)
    model.recompute = recompute
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        alive.append(tensor)  # so that no address is used twice
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(torch.randint(64, (2, 64)))
    return sum(size for address, size in kept.items() if address not in known)


def test_recomputation_costs_the_blocks_forward():
    """A third of the training FLOPs of all but the head."""
    config = published(12)
    extra, head = cost.recomputation(config, 1)["flops"], 6 * config.n_embd * config.padded_vocab
    assert 3 * extra == pytest.approx(cost.flops_per_token(config) - head)


def test_memory_is_one_moment_whose_parts_add_up():
    assert cost.LOSS_CHUNK == (loss.CHUNK, loss.CPU_CHUNK)
    short = dataclasses.replace(published(12), sequence_len=64)
    small, large = cost.memory(short, 1), cost.memory(published(12), 32)
    for part in (small, large):
        assert part["total"] == sum(size for name, size in part.items() if name != "total")
        assert part["weights"] == 4 * cost.parameters(published(12))["total"]
    # a short row: the update is the peak, all gradients and no activation; 32 long ones: the backward pass is
    assert small["activations"] == 0 and small["gradients"] == small["weights"]
    assert large["activations"] == cost.activations(published(12), 32, 2, "compiled")
    assert large["activations"] == 32 * cost.activations(published(12), 1, 2, "compiled")
    assert large["gradients"] == 4 * cost.parameters(published(12))["matrix"]
    assert cost.memory(published(12), 32, accum=2)["gradients"] == large["weights"]
    assert cost.memory(short, 1, world=8)["optimizer"] == small["optimizer"] // 8
    assert cost.memory(published(12), 32, bytes_per_value=4)["casts"] == 0
    assert cost.memory(published(12), 32, device="cpu")["holes"] > 0 == large["holes"]


def test_tables_larger_than_what_two_blocks_free_lie_beside_all_that_was_there():
    """On a CPU: with few rows none of the tables' gradients finds a hole, with many all do."""
    config = dataclasses.replace(published(6), sequence_len=256, vocab_size=32768)
    count = cost.parameters(config)
    head, coming = 4 * count["head"], 4 * (count["total"] - count["matrix"] - count["head"])
    for rows, expected in ((1, coming), (64, head)):
        kept = cost.activations(config, rows, 4, "by hand")
        part = cost.moments(config, rows, bytes_per_value=4, device="cpu")["backward"]
        assert part["holes"] == int(0.35 * kept) + expected


def test_the_updates_room_is_what_a_square_stack_needs():
    few, many = (GPTConfig(n_layer=4, n_head=6, n_kv_head=kv, n_embd=768) for kv in (1, 6))
    assert cost.largest_bank(many) == cost.largest_bank(few) == 4 * 4 * 768**2
    many = dataclasses.replace(many, sequence_len=64)
    assert cost.memory(many, 1)["room"] == 13 * 4 * 4 * 768**2
    assert cost.moments(many, 1, world=2)["update"]["room"] == 13 * 2 * 4 * 768**2
    assert cost.CPU_PIECE == banks.PIECE
    on_cpu = cost.moments(many, 1, bytes_per_value=4, device="cpu")["update"]["room"]
    assert on_cpu == 16 * 4 * 768**2  # a matrix of the MLP is larger than a piece


def test_largest_rows_is_the_last_power_of_two_that_fits():
    config = published(12)
    for rows in (1, 8, 32):
        need = cost.memory(config, rows)["total"]
        assert cost.largest_rows(config, need) == rows
        assert cost.largest_rows(config, need - 1) == rows // 2
