"""Reinforcement's own parts: what is learned, what is left out; nothing depends on how it is cut (pitfall 41)."""

import dataclasses

import pytest
import torch

from nanochat.engine import Completion
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import ADAM_RULES, MuonAdamW
from nanochat.runtime import Runtime
from scripts import chat_rl
from scripts.chat_rl import Config, Rollout


class FakeTokenizer:
    """Ids are what they are."""


@pytest.fixture
def model():
    net = GPT(
        GPTConfig(sequence_len=16, vocab_size=32, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, window_pattern="L")
    )
    net.init_weights(1)
    torch.nn.init.normal_(net.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    return net


ROLLOUTS = [
    Rollout([1, 2, 3], [4, 5, 6, 31], [1, 0, 1, 1], 0.5),
    Rollout([7, 8], [9, 31], [1, 1], -0.5),
    Rollout([1], [2, 3, 4], [1, 1, 1], 0.25),
]


def by_hand(model, rollouts):
    """The loss token by token, without padding or batches: advantage times minus log probability of sampled tokens."""
    total = 0.0
    for r in rollouts:
        logits = model(torch.tensor([r.prompt + r.reply]))[0].log_softmax(-1)
        for j, (token, sampled) in enumerate(zip(r.reply, r.mask, strict=True)):
            total = total - sampled * r.advantage * logits[len(r.prompt) - 1 + j, token]
    return total


def gradient(model, loss=None):
    model.zero_grad()
    if loss is not None:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_the_gradient_is_the_written_formula_however_it_is_batched(model, rows):
    expected = by_hand(model, ROLLOUTS)
    wanted = gradient(model, expected * 0.1)
    model.zero_grad()
    cfg = dataclasses.replace(Config(), device_batch_size=rows)
    optimizer = MuonAdamW(model.roles(), dict.fromkeys(("matrix", *ADAM_RULES), 0.0), Runtime.single())
    total = chat_rl.learn(model, optimizer, ROLLOUTS, cfg, 0.1, Runtime.single())
    assert total == pytest.approx(float(expected.detach()), abs=1e-4)
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-3)


def test_forced_tokens_and_prompts_are_not_learned_but_the_stop_token_is():
    inputs, targets, weights = chat_rl.rows_of(ROLLOUTS[:2], torch.device("cpu"))
    assert inputs[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert targets.tolist() == [[-1, -1, 4, -1, 6, 31], [-1, 9, 31, -1, -1, -1]]
    assert weights[:, 0].tolist() == [0.5, -0.5]


class Sums:
    """Problem i is right when the reply holds token i."""

    def __getitem__(self, i):
        return i

    def reward(self, problem, reply):
        return float(problem in reply)


class FakeEngine:
    """Replies by script: one list of replies a prompt."""

    max_len = 64

    def __init__(self, replies):
        self.replies, self.asked = replies, []

    def complete(self, prompts, params, n):
        self.asked.append((prompts, [p.seed for p in params], n))
        return [[Completion(ids, [1] * len(ids), "", "stop", 31) for ids in self.replies[p[0]]] for p in prompts]


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(chat_rl.chat, "render_for_completion", lambda problem, *a, **k: [problem])
    monkeypatch.setattr(chat_rl.chat, "parse_reply", lambda ids, tokenizer: ids)
    return FakeEngine({1: [[1], [2], [1, 2]], 2: [[5], [5], [5]], 3: [[3], [3], [3]]})


def test_groups_that_all_earn_the_same_teach_nothing_and_the_rest_is_centred(scripted):
    cfg = dataclasses.replace(Config(), num_samples=3)
    rollouts, rewards = chat_rl.draw(scripted, Sums(), [1, 2, 3], cfg, 0, FakeTokenizer())
    assert rewards == [[1, 0, 1], [0, 0, 0], [1, 1, 1]]
    assert [r.prompt for r in rollouts] == [[1]] * 3  # groups 2 and 3 cost no forward
    assert sum(r.advantage for r in rollouts) == pytest.approx(0)
    assert rollouts[0].reply == [1, 31] and rollouts[0].mask == [1, 1]  # the token that ends a reply is learned


def test_any_number_of_samples_is_drawn_whatever_the_batch_and_seeds_differ_by_step(scripted):
    cfg = dataclasses.replace(Config(), num_samples=3, device_batch_size=8)
    chat_rl.draw(scripted, Sums(), [1, 2], cfg, 0, FakeTokenizer())
    chat_rl.draw(scripted, Sums(), [1, 2], cfg, 1, FakeTokenizer())
    (_, first, n), (_, second, _) = scripted.asked
    assert n == 3 and len(set(first + second)) == 4


def test_senseless_settings_are_refused_together():
    with pytest.raises(UserError, match="(?s)2 things.*--examples-per-step=0.*--num-samples=1 has no group"):
        chat_rl.check(dataclasses.replace(Config(), examples_per_step=0, num_samples=1))
