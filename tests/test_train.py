"""The verbs of a loop: when things are due, what the meter means, stopping on NaN and signals, leaving no trace."""

import gc
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_model import tiny_gpt

from nanochat import gpt, optim, train
from nanochat.errors import UserError
from nanochat.runtime import Runtime

RT = Runtime.single()


# --- due -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 0, -1])
def test_off_is_never_due(every):
    assert not any(train.due(step, every, last=True, first=True) for step in range(5))


def test_due_at_multiples_at_the_end_and_at_the_start_if_asked():
    assert [s for s in range(10) if train.due(s, 3)] == [3, 6, 9]
    assert train.due(7, 3, last=True) and not train.due(7, 3)
    assert train.due(0, 3, first=True) and not train.due(0, 3)


# --- meter -----------------------------------------------------------------------------------------------------------


def test_smoothed_loss_has_no_bias_pitfall_38():
    """A constant loss is that constant from the first step on (the published fine-tuning showed 0.526 of it)."""
    meter = train.Meter()
    for _ in range(5):
        meter.tick(4.0, 100, 1.0)
        assert meter.loss == pytest.approx(4.0)
    meter.tick(2.0, 100, 1.0)
    assert 2.0 < meter.loss < 4.0
    assert math.isnan(train.Meter().loss)


def test_mean_loss_is_over_all_micro_batches_and_tokens_pitfall_38():
    """Weighted by tokens, not the last micro-batch."""
    meter = train.Meter()
    meter.add(torch.tensor(2.0), 30)
    meter.add(torch.tensor(6.0), 10)
    assert meter.mean(RT) == pytest.approx(3.0)
    meter.add(torch.tensor(5.0), 10)
    assert meter.mean(RT) == pytest.approx(5.0)


def test_meter_goes_on_from_its_state_pitfall_8():
    whole = train.Meter()
    for loss in (3.0, 2.0, 1.0):
        whole.tick(loss, 10, 0.5)
    part = train.Meter()
    part.tick(3.0, 10, 0.5)
    part = train.Meter(**json.loads(json.dumps(part.state())))
    for loss in (2.0, 1.0):
        part.tick(loss, 10, 0.5)
    assert part.state() == whole.state() and part.loss == whole.loss


def test_speed_leaves_the_first_steps_out():
    meter = train.Meter()
    meter.tick(1.0, 100, 50.0)  # compilation
    assert meter.tokens_per_second == 2.0
    for _ in range(train.UNTIMED + 4):
        meter.tick(1.0, 100, 1.0)
    assert meter.tokens_per_second == 100.0
    assert meter.seconds_left(7) == pytest.approx(7.0)
    assert meter.seconds == 50.0 + train.UNTIMED + 4


def test_mfu():
    assert train.mfu(1000, 2.0, 1e9, 1e12, 2) == pytest.approx(0.25)
    assert train.mfu(1000, 2.0, 1e9, None) is None


def test_per_token_weighs_every_token_alike():
    """Accumulated gradients of unequal micro-batches equal the gradient of the mean over all their tokens."""
    w = torch.ones(3, requires_grad=True)
    x = torch.randn(10, 3)
    targets = [torch.tensor([[1, -1, -1]]), torch.tensor([[4, 5, 6, 7, 8, 9, -1]])]
    factor = train.per_token(targets, RT)
    ((x[:1] @ w).sum() * factor).backward()
    ((x[1:7] @ w).sum() * factor).backward()
    assert torch.allclose(w.grad, x[:7].mean(0))
    with pytest.raises(UserError, match="no token to learn from"):
        train.per_token([torch.full((2, 4), -1)], RT)


# --- stopping on what is not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_nothing_is_updated_when_something_is_not_finite_pitfall_38(loss, norm):
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = optim.MuonAdamW({"matrix": [("layer.w", p)]}, {"matrix": 0.1}, RT)
    p.grad = torch.full((2, 2), norm)
    with pytest.raises(UserError, match=r"Step 12: .*data position \{'epoch': 3\}; the weights were not updated") as e:
        train.optimizer_step(optimizer, train.Scaler(), loss, step=12, position={"epoch": 3}, lr_mult=1.0, momentum=0.9)
    assert ("layer.w" in str(e.value)) == (not math.isfinite(norm) and math.isfinite(loss))
    assert torch.equal(p.detach(), torch.ones(2, 2))


def test_fp16_overflow_skips_the_update_and_halves_the_scale():
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = optim.MuonAdamW({"matrix": [("w", p)]}, {"matrix": 0.1}, RT)
    scaler = train.Scaler.of(torch.float16)
    p.grad = torch.full((2, 2), math.inf)
    train.optimizer_step(optimizer, scaler, 1.0, step=1, position=0, lr_mult=1.0, momentum=0.9)
    assert torch.equal(p.detach(), torch.ones(2, 2)) and scaler.scale == 2.0**15 and p.grad is None
    p.grad = torch.eye(2) * scaler.scale
    norm = train.optimizer_step(optimizer, scaler, 1.0, step=2, position=0, lr_mult=1.0, momentum=0.9)
    assert norm == pytest.approx(math.sqrt(2)) and not torch.equal(p.detach(), torch.ones(2, 2))


def test_scaler_grows_gives_up_and_remembers_pitfall_8():
    scaler = train.Scaler.of(torch.float16)
    for _ in range(3):
        assert scaler.accept(1.0, interval=3)
    assert scaler.scale == 2.0**17
    back = train.Scaler(**json.loads(json.dumps(scaler.state())))
    assert back == scaler
    with pytest.raises(UserError, match="NANOCHAT_DTYPE"):
        for _ in range(40):
            scaler.accept(math.nan)
    assert train.Scaler.of(torch.bfloat16).accept(math.nan) and train.Scaler.of(torch.float32).scale == 1.0


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_sets_a_flag_and_handlers_come_back_pitfall_7(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with train.StopSignal() as stop:
        assert stop.agreed(RT) == 0
        os.kill(os.getpid(), number)
        assert stop.agreed(RT) == number
    assert signal.getsignal(number) is before


def test_the_same_wish_sent_twice_still_saves():
    """Ctrl-C under torchrun: the terminal and the launcher both signal each rank within moments."""
    with train.StopSignal() as stop:
        for name in ("SIGINT", "SIGINT", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, name))
        assert stop.agreed(RT) == signal.SIGINT


def test_a_signal_is_answered_at_once_where_asked_pitfall_51(capfd):
    for runtime in (None, RT):
        with train.StopSignal(runtime):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err.count("stopping after this step") == (runtime is RT)


LOOP = """
import sys, time
from nanochat import train
from nanochat.runtime import Runtime
train.GRACE = 0.2
with train.StopSignal() as stop:
    print("ready", flush=True)
    while not stop.agreed(Runtime.single()):
        time.sleep(0.02)
    print("asked", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_signal_leaves_at_once():
    child = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "asked\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 128 + signal.SIGTERM
    child.stdout.close()


STUCK = """
import ctypes, sys, torch
from nanochat import train
from nanochat.runtime import Runtime
train.GRACE, train.PATIENCE = 0.2, float(sys.argv[2])
with train.StopSignal(Runtime(1, 1, int(sys.argv[1]), torch.device("cpu"), torch.float32, "")):
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)  # for ever, and no handler runs: so does a collective whose peer hangs
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="blocks on glibc's mutex")
@pytest.mark.parametrize(("world", "patience", "names", "status", "said"), [
    (2, 0.2, ["SIGTERM"], 143, "leaving without saving"),
    (2, 0.2, ["SIGINT"], 130, "leaving without saving"),
    (2, 600, ["SIGTERM", "SIGTERM"], 143, ""),
    (1, 0.0, ["SIGTERM", "SIGUSR1"], 138, ""),  # one rank waits for nobody: only the second wish ends it
    (2, 0.0, ["SIGUSR1", "SIGTERM"], 143, ""),  # nobody kills after SIGUSR1: a long step may end
])  # fmt: skip
def test_a_rank_that_waits_for_one_that_hangs_still_leaves_pitfall_7(world, patience, names, status, said):
    child = subprocess.Popen([sys.executable, "-c", STUCK, str(world), str(patience)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert child.stdout.readline() == "ready\n"
    for number, name in enumerate(names):
        if number:
            time.sleep(0.5)
            assert child.poll() is None
        child.send_signal(getattr(signal, name))
    _, err = child.communicate(timeout=60)
    assert child.returncode == status and said in err


RANKS = """
import os, signal, sys, json, torch
from nanochat import runtime, train
rt = runtime.start("cpu")
with train.StopSignal() as stop:
    seen = []
    for step in range(3):
        if step == 1 and rt.rank == rt.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(stop.agreed(rt))
meter = train.Meter()
meter.add(torch.tensor(float(1 + rt.rank)), 10 * (1 + rt.rank))
mean = meter.mean(rt)
factor = train.per_token([torch.arange(5) - rt.rank], rt)
print(json.dumps([seen, mean, factor]), flush=True)
runtime.stop(rt)
"""


@pytest.mark.slow
def test_ranks_agree_on_signals_and_means(on_ranks):
    lines = re.findall(r"\[\[[^\]]*\][^\]]*\]", on_ranks(2, RANKS).stdout)  # two ranks may share a line
    assert len(lines) == 2 and lines[0] == lines[1]
    seen, mean, factor = json.loads(lines[0])
    assert seen == [0, signal.SIGTERM, signal.SIGTERM]
    assert mean == pytest.approx((1 * 10 + 2 * 20) / 30)
    assert factor == pytest.approx(2 / 9)


# --- contexts that leave no trace ------------------------------------------------------------------------------------


def test_calm_gc_is_off_inside_and_back_after():
    assert gc.isenabled()
    with train.calm_gc() as calm:
        assert gc.isenabled()
        calm()
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        calm()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_resting_evaluates_without_gradients_and_comes_back_even_from_an_error():
    model = torch.nn.Dropout()
    with pytest.raises(KeyError), train.resting(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and torch.is_grad_enabled()
    model.eval()
    with train.resting(model):
        pass
    assert not model.training


def test_random_state_survives_json_pitfall_8():
    state = json.loads(json.dumps(train.rng_state()))
    first = torch.rand(3), random.random(), random.gauss(0, 1)
    train.set_rng_state(state)
    second = torch.rand(3), random.random(), random.gauss(0, 1)
    assert torch.equal(first[0], second[0]) and first[1:] == second[1:]


# --- the fastest form -------------------------------------------------------------------------------------------------


def test_on_cpu_blocks_by_hand_train_and_plain_ones_where_asked_or_elsewhere():
    model = tiny_gpt()
    forward, how = train.fastest(model, RT)
    assert forward.run_block is gpt.run_block_by_hand and how.startswith("blocks by hand")
    assert all(a is b for a, b in zip(forward.parameters(), model.parameters(), strict=True))
    assert model.run_block is gpt.run_block  # evaluation goes on with the plain one
    assert train.fastest(model, RT, wanted=False) == (model, "plain: --compile=off")
    assert train.fastest(model, Runtime.single("mps"))[0] is model


def test_on_cpu_scores_as_high_as_they_get_are_finite_in_fp16():
    """Query and key alike: QK_SCALE^2 sqrt(64) = 11.5, and exp of it is more than fp16's 65,504."""
    runtime = Runtime.single("cpu", torch.float16)
    model = tiny_gpt(n_head=1, n_kv_head=1, n_embd=64, n_layer=1, window_pattern="L")
    attn = model.transformer.h[0].attn
    attn.c_k.weight.data.copy_(attn.c_q.weight)
    model.compute_dtype = runtime.dtype
    forward, how = train.fastest(model, runtime)
    ids = torch.arange(20)[None]
    assert (
        how == "plain: blocks by hand don't compute in fp16"
        and forward(ids, ids).isfinite()
        and model.by_hand()(ids, ids).isfinite()
    )


def test_a_gpu_without_triton_trains_plain(monkeypatch):
    model = tiny_gpt()
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert train.fastest(model, Runtime.single("cuda")) == (
        model,
        "plain: torch.compile needs triton, which is not installed",
    )
