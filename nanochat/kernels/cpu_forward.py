"""cpu_forward.c as a library. nanochat/native.py calls it, and whoever has no compiler decodes by torch."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

from nanochat.kernels import compiled
from nanochat.kernels.compiled import F, I, P, struct

SOURCE = Path(__file__).with_suffix(".c")

logger = logging.getLogger(__name__)


# As in the source; the meaning of each member is said there.
Matrix = struct("Matrix", panels=P, scale=P, depth=I, columns=I)
Layer = struct(
    "Layer", qkv=Matrix, out=Matrix, up=Matrix, down=Matrix, table=P, gate=P, keys=P, values=P, keep=F, first=F, group=I
)
Model = struct(
    "Model", layers=P, head=Matrix, embedding=P, smear_gate=P, cos=P, sin=P, depth=I, width=I, heads=I, kv_heads=I,
    dim=I, smear_channels=I, gate_channels=I, eps=F, qk_scale=F, gate_scale=F, softcap=F, smear_by=F, backout=F,
)  # fmt: skip
Step = struct(
    "Step", rows=I, threads=I, longest=I, ids=P, previous=P, positions=P, starts=P, pieces=P, wanted=P, wanted_rows=I,
    logits=P, scratch=P,
)  # fmt: skip
Draw = struct("Draw", rows=I, threads=I, vocab=I, logits=P, u=P, temperature=P, top_p=P, min_p=P, top_k=P, ids=P)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None where it can't be had, which is told once."""
    try:
        return load(compiled.made(SOURCE))
    except compiled.Unavailable as why:
        logger.warning("Decoding on this CPU goes by torch, slower than by our C: %s", why)
        return None


def load(path: Path) -> ctypes.CDLL:
    """Load a compiled file and say what its functions take."""
    found = compiled.opened(path)
    found.panel_columns.restype = found.scratch_floats.restype = found.most_kept.restype = I
    found.scratch_floats.argtypes = found.forward.argtypes = [P, P]
    found.draw.argtypes = [P]
    found.forward.restype = found.draw.restype = None
    return found
