"""cpu_train.c as a library, one a dtype: what kernels/cpu_block.py and kernels/loss.py do between matrix products."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from pathlib import Path

import torch

from nanochat.kernels import compiled
from nanochat.kernels.compiled import D, I, P, struct

SOURCE = Path(__file__).with_suffix(".c")
BITS = {torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}

# As in the source; the meaning of each member is said there.
Rows = struct(
    "Rows", n=I, t=I, c=I, heads=I, kv_heads=I, dim=I, window=I, channels=I, eps=D, score_scale=D, gate_scale=D,
    scale=D, scale0=D, x=P, x0=P, mixed=P, normed=P, inverse=P, cos=P, sin=P, embedded=P, gate_weight=P, joint=P,
    q=P, k=P, v=P, inverse_q=P, inverse_k=P, gate=P, inverse_sum=P, y=P, hidden=P, squares=P, grad=P, plus=P, by_q=P,
    by_k=P, by_v=P, by_embedded=P, by_gate=P, by_x=P, by_x0=P, dots=P,
)  # fmt: skip
Score = struct("Score", rows=I, vocab=I, line=I, only_losses=I, cap=D, logits=P, targets=P, losses=P)
PASSES = (
    "mix", "norm_back", "relu_squared", "relu_squared_back", "split", "split_back", "attend", "attend_back",
)  # fmt: skip

logger = logging.getLogger(__name__)


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The library for tensors of this dtype; None where it can't be had, which is told."""
    if dtype not in BITS:
        return None
    try:
        return load(compiled.made(SOURCE, f"-DREAL={BITS[dtype]}"))
    except compiled.Unavailable as why:
        logger.warning("Training on this CPU goes by torch alone, slower than with our C: %s", why)
        return None


def load(path: Path) -> ctypes.CDLL:
    """Load a compiled file and say what its functions take."""
    found = compiled.opened(path)
    for function, takes, gives in (
        (found.items, [I, P], I), (found.desk, [I, P], I), (found.run_pass, [I, P, I, P], None),
        (found.score_rows, [P, I, P], None), (found.borrow, [P], None),
    ):  # fmt: skip
        function.argtypes, function.restype = takes, gives
    with contextlib.suppress(AttributeError):  # another OpenMP than GNU's: by threads of our own
        # torch's matrix products run on these threads, which are awake; a second set would fight them for the cores
        found.borrow(ctypes.cast(ctypes.CDLL(None).GOMP_parallel, P))
    return found


class Passes:
    """The passes over one group of rows. sizes: the numbers of `Rows`.

    Tensors are CPU tensors in one piece; whoever calls keeps them alive while a pass that sees them is still to come.
    """

    def __init__(self, dtype: torch.dtype, **sizes: float):
        self.library, self.rows, self.sums = library(dtype), Rows(**sizes), torch.promote_types(dtype, torch.float32)
        self.at, self.threads = ctypes.byref(self.rows), torch.get_num_threads()
        self.items = self.library.items(PASSES.index("mix"), self.at)  # of the passes over tokens

    def see(self, **tensors: torch.Tensor | None) -> None:
        """Let C see these tensors, or see nothing, from now on."""
        for name, tensor in tensors.items():
            setattr(self.rows, name, None if tensor is None else tensor.data_ptr())

    def run(self, name: str, **tensors: torch.Tensor | None) -> None:
        """One pass over these tensors and those that it sees already."""
        self.see(**tensors)
        number = PASSES.index(name)
        desks = torch.empty(self.threads * self.library.desk(number, self.at), dtype=self.sums)
        self.library.run_pass(number, self.at, self.threads, desks.data_ptr())


def score(logits: torch.Tensor, targets: torch.Tensor, vocab: int, cap: float, gradient: bool = True) -> torch.Tensor:
    """logits (n, Vpadded) before the cap, targets (n,) int64, -1 = ignored -> losses (n,) in the dtype of sums, those
    of ignored rows 0. With `gradient` that by the logits takes their place. IndexError: a target beyond vocab."""
    targets = targets.to(torch.int64).contiguous()
    if len(targets) and int(targets.max()) >= vocab:  # C would write beside the row
        raise IndexError(f"target {int(targets.max())} is beyond the vocabulary of {vocab}")
    sums, threads = torch.promote_types(logits.dtype, torch.float32), torch.get_num_threads()
    losses, desks = torch.empty(len(logits), dtype=sums), torch.empty(threads, 2 * vocab, dtype=sums)
    job = Score(
        rows=len(logits), vocab=vocab, line=logits.size(1), only_losses=not gradient, cap=cap,
        logits=logits.data_ptr(), targets=targets.data_ptr(), losses=losses.data_ptr(),
    )  # fmt: skip
    library(logits.dtype).score_rows(ctypes.byref(job), threads, desks.data_ptr())
    return losses
