"""The verbs of a training loop. The script owns the loop; nothing here calls back into it or writes a file.

A stage's loop reads, with `with StopSignal(rt) as stop, calm_gc() as calm:` around it:
forward and backward of each micro-batch with `meter.add`, then `loss = meter.mean(runtime)`,
`norm = optimizer_step(...)`, `meter.tick(...)`, `calm()`, and `stop.agreed(runtime)` before the next step.
Losses are nats a token. What must survive a restart (Meter, Scaler, the random state) is JSON-able.
"""

import base64
import contextlib
import dataclasses
import gc
import importlib.util
import math
import os
import random
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nanochat import cli, faults, shard
from nanochat.errors import UserError
from nanochat.kernels import cpu_train
from nanochat.runtime import Runtime

SMOOTHING = 0.9  # of the logged loss: the last 10 steps, roughly
UNTIMED = 10  # first steps of a process that the mean speed leaves out: compilation, page faults
GRACE = 2.0  # seconds in which further signals count as the same wish to stop
PATIENCE = 25.0  # seconds after which one of several ranks that can't stop leaves; torchrun kills after 30
GC_EVERY = 5000  # steps between collections while the collector is off


def due(step: int, every: int | None, last: bool = False, first: bool = False) -> bool:
    """Is something that happens each `every` steps due now? None or <= 0: never; `last` always, step 0 if `first`."""
    if every is None or every <= 0:
        return False
    return last or (step % every == 0 and (step > 0 or first))


def per_token(targets: list[torch.Tensor], runtime: Runtime) -> float:
    """What to multiply each micro-batch's summed loss by, so that the gradient is of the mean over all tokens.

    `targets`: this rank's micro-batches of one update, -1 = ignored. The optimizer averages over
    ranks, hence world / tokens.
    """
    count = torch.tensor(float(sum(int((t >= 0).sum()) for t in targets)), device=runtime.device)
    total = float(runtime.sum(count))
    if total == 0:
        raise UserError(
            "An update has no token to learn from: all its rows are ignored; use longer rows or other data."
        )
    return runtime.world / total


@dataclasses.dataclass
class Meter:
    """Loss, speed and time of a run, over all micro-batches and ranks. `state()` is JSON; `Meter(**state)` goes on."""

    average: float = 0.0  # exponential mean of the loss before its correction for starting at 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, evaluations and saving left out
    timed_tokens: int = 0  # the same without the first steps of each process
    timed_seconds: float = 0.0

    def __post_init__(self):
        self.pending: torch.Tensor | None = None  # (2,) float64: nats and tokens of this rank's micro-batches
        self.here = 0  # steps of this process

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        """Note one micro-batch: its mean loss (0-d tensor; not read, so nothing waits) and its tokens."""
        part = torch.stack([loss.detach().float() * tokens, torch.full_like(loss, tokens, dtype=torch.float32)])
        self.pending = part if self.pending is None else self.pending + part

    def mean(self, runtime: Runtime) -> float:
        """Mean loss over every token of the update, on all ranks; forgets the micro-batches. Collective."""
        nats, tokens = runtime.sum(self.pending).tolist()
        self.pending = None
        return nats / tokens if tokens else math.nan

    def tick(self, loss: float, tokens: int, seconds: float) -> None:
        """Note one finished update of `tokens` (all ranks) that took `seconds`."""
        self.average = SMOOTHING * self.average + (1 - SMOOTHING) * loss
        self.steps, self.here = self.steps + 1, self.here + 1
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        if self.here > UNTIMED:
            self.timed_tokens, self.timed_seconds = self.timed_tokens + tokens, self.timed_seconds + seconds

    @property
    def loss(self) -> float:
        """The smoothed loss; after one step it is that step's loss."""
        return self.average / (1 - SMOOTHING**self.steps) if self.steps else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Mean speed over all ranks, the first steps of each process left out once there are others."""
        tokens, seconds = self.timed_tokens, self.timed_seconds
        if not seconds:
            tokens, seconds = self.tokens, self.seconds
        return tokens / seconds if seconds else 0.0

    def seconds_left(self, steps: int) -> float:
        """Expected time of `steps` more updates."""
        return steps * (self.tokens / self.steps) / self.tokens_per_second if self.tokens_per_second else math.nan

    def state(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def mfu(tokens: int, seconds: float, flops_per_token: float, peak: float | None, world: int = 1) -> float | None:
    """Share of the devices' peak FLOP/s that the model's own FLOPs make up; None where the peak is unknown."""
    return flops_per_token * tokens / seconds / (peak * world) if peak and seconds else None


@dataclasses.dataclass
class Scaler:
    """Dynamic loss scale for fp16 (arXiv 1710.03740): halved when gradients overflow, doubled after 2,000 good steps.

    All ranks decide alike because they decide on the gradient norm over all ranks. Off, it scales by 1 and accepts all.
    """

    enabled: bool = False
    scale: float = 1.0
    good: int = 0  # updates since the scale last changed

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Scaler":
        """A scaler for this compute dtype: on for fp16 only."""
        return cls(True, 2.0**16) if dtype == torch.float16 else cls()

    def accept(self, norm: float, interval: int = 2000) -> bool:
        """May the update with this gradient norm be made? Adapts the scale."""
        if not self.enabled:
            return True
        if not math.isfinite(norm):
            self.scale, self.good = self.scale / 2, 0
            if self.scale < 2.0**-14:
                raise UserError("fp16 gradients overflow at any loss scale: set NANOCHAT_DTYPE=bfloat16 or float32.")
            return False
        self.good += 1
        if self.good >= interval:
            self.scale, self.good = self.scale * 2, 0
        return True

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def optimizer_step(optimizer, scaler: Scaler, loss: float, *, step: int, position: Any, lr_mult: float,
                   momentum: float, weight_decay: float = 0.0, spikes: faults.Spikes | None = None,
                   suspect: tuple = ()) -> float:  # fmt: skip
    """Average the gradients, check them, update, forget them. Returns the gradient norm.

    The update is left out where fp16 overflows and where `spikes` says so. `loss` is that of all ranks; `suspect` is
    the model and what to run it on to find where a loss that is not finite comes from.
    """
    norm = optimizer.reduce(scaler.scale)
    if not math.isfinite(loss):
        where = faults.forward_culprit(*suspect) if suspect else ""
        where = next(filter(None, optimizer.runtime.gather(where)), "")  # perhaps only one rank's data is to blame
        faults.check_finite(loss, norm, step=step, position=position, where=where)
    elif not math.isfinite(norm) and not scaler.enabled:
        where = faults.backward_culprit(optimizer.nonfinite())
        faults.check_finite(loss, norm, step=step, position=position, where=where)
    if spikes:
        spikes.why = ""  # the last step's, if fp16 lets this one not come to judgement
    if scaler.accept(norm) and not (spikes and spikes.judge(step, loss, norm)):
        optimizer.step(lr_mult, momentum, weight_decay)
    optimizer.zero_grad()
    return norm


class StopSignal:
    """While entered, SIGTERM, SIGINT and SIGUSR1 only set a flag, so that the run can finish its step and save.

    On rank 0 of `runtime` the first one is answered by a line: what is under way may be a long evaluation.

    A second signal, GRACE seconds later or more, leaves at once; what is saved stays whole (checkpoints are atomic).
    The grace is there because Ctrl-C under torchrun reaches a rank twice: from the terminal and from the launcher.

    Python runs handlers between two bytecodes, so a rank that waits in a collective for one that hangs runs none. A
    thread therefore reads the signals from a socket: it hears the second one, and lets one of several ranks that is
    still inside PATIENCE seconds after SIGTERM or SIGINT leave without saving. torchrun would kill it 5 s later: a
    step and a save must fit into that.

    The run ends with status 128 + n (143, 130, 138), which a scheduler may restart: SLURM lists them in RequeueExit,
    Kubernetes' OnFailure and torchrun's --max-restarts take any status; 1 is a mistake to be mended first.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")

    def __init__(self, runtime: Runtime | None = None):
        self.tell = runtime is not None and runtime.main
        self.several = runtime is not None and runtime.world > 1
        self.received = 0  # signal number on this rank, 0 = none
        self.before: dict[int, Any] = {}
        self._listening: contextlib.AbstractContextManager | None = None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are not ours to take
        self._listening = cli.listening(self._listen)
        self._listening.__enter__()
        for number in (getattr(signal, name) for name in self.NAMES if hasattr(signal, name)):
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self._listening:
            self._listening.__exit__(None, None, None)

    def _note(self, number: int, _frame) -> None:
        if not self.received:
            self.received = number
            if self.tell:  # past Python's buffers, which the signal may have interrupted
                text = b"stopping after this step; once more stops at once, without saving\n"
                os.write(2, b"\n" + text if os.isatty(2) else text)  # a terminal's last line may not have ended

    def _listen(self, listener: socket.socket) -> None:
        """Leave by a deadline that the signals set."""
        first, number, deadline = 0.0, 0, math.inf
        while True:
            now = time.monotonic()
            listener.settimeout(None if deadline == math.inf else max(deadline - now, 1e-3))
            try:
                numbers = listener.recv(64)
            except TimeoutError:
                os.write(2, b"not at the end of the step after the signal: leaving without saving\n")
                os._exit(128 + number)
            if not numbers:
                return
            now = time.monotonic()
            for number in (n for n in numbers if n in self.before):
                if not first:
                    first = now
                    if self.several and number != getattr(signal, "SIGUSR1", 0):
                        deadline = now + PATIENCE
                elif now - first >= GRACE:
                    os._exit(128 + number)

    def agreed(self, runtime: Runtime) -> int:
        """The signal that any rank received, on every rank; 0 if none. Collective: call it once a step."""
        return runtime.max(self.received)


@contextlib.contextmanager
def calm_gc() -> Iterator[Callable[[], None]]:
    """Keep Python's garbage collector out of the steps: yields a function to call after each step.

    After the first step everything alive is frozen and the collector switched off; it then runs each 5,000 steps.
    """
    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1
        if done == 1:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif done % GC_EVERY == 0:
            gc.collect()

    enabled = gc.isenabled()
    try:
        yield after_step
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


@contextlib.contextmanager
def resting(model: torch.nn.Module) -> Iterator[None]:
    """Evaluate inside: eval mode, no gradients, fp8 layers replaced by their exact twins; afterwards as before.

    A sharded model is whole on every rank inside, so ranks need not run it equally often; entering is then collective.
    """
    was_training = model.training
    fp8 = sys.modules.get("nanochat.kernels.fp8")  # imported only where a run converted its model
    model.eval()
    try:
        with torch.no_grad(), shard.whole(model), fp8.disabled(model) if fp8 else contextlib.nullcontext():
            yield
    finally:
        model.train(was_training)


def rng_state() -> dict[str, Any]:
    """This process's random state (Python, torch CPU and CUDA) as JSON."""
    version, numbers, gauss = random.getstate()
    pack = lambda t: base64.b64encode(t.numpy().tobytes()).decode()
    state = {"python": [version, list(numbers), gauss], "torch": pack(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = pack(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on with the random numbers where `rng_state` was taken."""
    unpack = lambda text: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(unpack(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(unpack(state["cuda"]))


def fastest(model: torch.nn.Module, runtime: Runtime, wanted: bool = True) -> tuple[Callable, str]:
    """The model in the form that trains fastest on this device, or the model itself, and a line that says which.

    Block by block where there are several ranks: a whole backward pass in one graph gives all gradients at its end,
    and their reduction would hide behind nothing.
    """
    if not wanted:
        return model, "plain: --compile=off"
    if runtime.device.type == "cpu" and shard.sharded(model):
        return model, "plain: blocks by hand don't gather shards"
    if runtime.device.type == "cpu" and cpu_train.library(runtime.dtype) is None:
        lacking = "need a C compiler" if runtime.dtype in cpu_train.BITS else "don't compute in fp16"
        return model, f"plain: blocks by hand {lacking}"
    if runtime.device.type == "cpu":
        return model.by_hand(), "blocks by hand, with their own attention, in our C between torch's matrix products"
    if runtime.device.type == "mps":
        return model, "plain: torch.compile is not used on MPS"
    if importlib.util.find_spec("triton") is None:
        return model, "plain: torch.compile needs triton, which is not installed"
    with warnings.catch_warnings():  # torch's own imports use what torch deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        if shard.sharded(model):
            shard.compile_blocks(model)
            return model, "torch.compile, block by block"
        if runtime.world > 1:
            return model.block_by_block(), "torch.compile, block by block"
        return torch.compile(model, dynamic=False), "torch.compile"
