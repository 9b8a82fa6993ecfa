"""What must not count as a step: NaN is named by step, data and layer; a spike is skipped or gone back from."""

import json
import math
import random

import pytest
import torch

from nanochat import faults, optim, train
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime

RT = Runtime.single()
CONFIG = GPTConfig(sequence_len=16, vocab_size=40, n_layer=3, n_head=2, n_kv_head=2, n_embd=24)
IDS = torch.arange(16)[None]


def model_and_optimizer():
    model = GPT(CONFIG)
    model.init_weights(0)
    return model, optim.MuonAdamW(model.roles(), dict.fromkeys(("matrix", *optim.ADAM_RULES), 0.02), RT)


def step(model, optimizer, loss, **more):
    return train.optimizer_step(
        optimizer, train.Scaler(), loss, step=12, position="epoch 3, shard 5", lr_mult=1.0, momentum=0.9,
        suspect=(model, IDS), **more,
    )  # fmt: skip


def test_a_nan_loss_names_step_data_and_the_layer_it_comes_from_pitfall_38():
    model, optimizer = model_and_optimizer()
    model.transformer.h[1].mlp.register_forward_hook(lambda module, args, output: output * math.nan)
    loss = model(IDS, IDS)
    loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=r"Step 12: the loss is nan .*transformer\.h\.1\.mlp.* epoch 3, shard 5; "):
        step(model, optimizer, float(loss.detach()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_weight_that_is_not_finite_is_named():
    model, optimizer = model_and_optimizer()
    model.transformer.h[2].attn.c_q.weight.data[0, 0] = math.inf
    with pytest.raises(UserError, match=r"the weight transformer\.h\.2\.attn\.c_q\.weight is not finite"):
        step(model, optimizer, float(model(IDS, IDS).detach()))


def test_a_nan_gradient_names_the_layer_that_backward_met_first():
    model, optimizer = model_and_optimizer()

    def break_gradient(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.nan)

    model.transformer.h[1].mlp.c_proj.register_forward_hook(break_gradient)
    loss = model(IDS, IDS)
    loss.backward()
    with pytest.raises(UserError, match=r"gradient norm is nan .*met transformer\.h\.1\.mlp.* first\) at data"):
        step(model, optimizer, float(loss.detach()))


def test_of_many_layers_the_last_by_number_is_blamed():
    names = [f"transformer.h.{i}.mlp.c_fc.weight" for i in range(11)] + ["transformer.wte.weight"]
    assert "met transformer.h.10.mlp.c_fc.weight first" in faults.backward_culprit(names)
    assert faults.backward_culprit([]) == ""


# --- spikes ----------------------------------------------------------------------------------------------------------


def usual(rule, steps=40, seed=1):
    dice = random.Random(seed)
    for i in range(steps):
        assert rule.judge(i, 3.0 + dice.gauss(0, 0.02), 1.0 + dice.gauss(0, 0.05)) == ""
    return rule


def test_no_rule_judges_nothing():
    rule = faults.Spikes()
    assert all(rule.judge(i, 10.0**i, 10.0**i) == "" for i in range(30))


def test_what_stands_out_is_a_spike_noise_and_a_falling_curve_are_not():
    rule = usual(faults.Spikes(8.0))
    assert "the loss is 3.6" in rule.judge(40, 3.6, 1.0)
    assert "the gradient norm is 4" in rule.judge(41, 3.0, 4.0)
    assert rule.judge(42, 3.1, 1.1) == "" and rule.in_a_row == 0
    falling = faults.Spikes(8.0)
    assert all(falling.judge(i, 8.0 * 0.98**i, 1.0) == "" for i in range(200))


def test_a_spike_is_no_measure_for_the_next():
    rule = usual(faults.Spikes(8.0))
    assert rule.judge(40, 9.0, 1.0) and 9.0 not in rule.losses


def test_a_level_that_stays_is_no_outlier_and_stops_the_run():
    rule = usual(faults.Spikes(8.0))
    with pytest.raises(UserError, match="8 spikes without a good step between"):
        for i in range(20):
            rule.judge(40 + i, 6.0, 1.0)


def test_going_back_to_one_step_again_and_again_stops_the_run():
    rule = usual(faults.Spikes(8.0))
    rule.judge(40, 6.0, 1.0)
    for at in (20, 40, 40):
        rule.rolled_back(at)
    with pytest.raises(UserError, match="3 times back to step 40 and no way past the spike"):
        rule.rolled_back(40)


def test_the_rule_goes_on_from_a_checkpoint_pitfall_8():
    rule = usual(faults.Spikes(8.0))
    again = faults.Spikes(8.0, **json.loads(json.dumps(rule.state())))
    assert again == rule and again.judge(40, 3.6, 1.0) == rule.judge(40, 3.6, 1.0) != ""


def test_a_spike_skips_the_update():
    model, optimizer = model_and_optimizer()
    rule = usual(faults.Spikes(8.0))
    before = [p.detach().clone() for p in model.parameters()]
    for loss, moves in ((9.0, False), (3.0, True)):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.0 / math.sqrt(sum(q.numel() for q in model.parameters())))
        norm = step(model, optimizer, loss, spikes=rule)
        assert norm == pytest.approx(1.0, rel=1e-3) and all(p.grad is None for p in model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters())) == moves


def test_a_step_that_overflows_after_a_spike_is_no_second_spike():
    """In fp16: a rollback for it would throw good steps away."""
    model, optimizer = model_and_optimizer()
    rule, scaler = usual(faults.Spikes(8.0)), train.Scaler.of(torch.float16)
    for loss, size, spike in ((9.0, 1.0, True), (3.0, math.inf, False)):
        for p in model.parameters():
            p.grad = torch.full_like(p, size)
        train.optimizer_step(optimizer, scaler, loss, step=1, position="", lr_mult=1.0, momentum=0.9, spikes=rule)
        assert bool(rule.why) == spike
