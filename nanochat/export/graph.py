"""The forward pass as a graph for other runtimes: torch.export (.pt2) and ONNX (.onnx), ids (B, T) -> logits (B, T, V).

Rows are free, positions from 3 to the context (pad shorter rows on the right: nothing before it changes). No cache: a
graph for scoring, fine-tuning elsewhere and short replies. The model is traced with attention written as plain matmuls
and a mask, which every runtime knows.
"""

import contextlib
import io
import math
import warnings
from pathlib import Path

import torch

from nanochat import attention, paths
from nanochat.errors import UserError
from nanochat.gpt import GPT


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """attention.reference for equal lengths, without anything that depends on a size: (B, T, H, D) -> (B, T, H, D)."""
    t, group = q.size(1), q.size(2) // k.size(2)
    if group > 1:  # before heads and positions change places: torch 2.11 else ties T to the heads' strides
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    query, key, value = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
    scores = query @ key.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, T)
    scores = scores.masked_fill(~attention.visible(t, t, window, q.device), -1e30)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def exported(model: GPT) -> torch.export.ExportedProgram:
    """The model's forward, traced with free sizes."""
    twin = GPT(model.config, attend=plain_attention)
    twin.load_state_dict(model.state_dict())
    twin.rope = torch.cat([twin.rope, twin.rope[:, :1]], dim=1)  # so that no T takes the whole table: a special case
    rows = torch.export.Dim("rows", min=1, max=4096)
    positions = torch.export.Dim("positions", min=3, max=model.config.sequence_len)
    example = torch.zeros(2, min(8, model.config.sequence_len), dtype=torch.int64)
    with torch.no_grad():
        return torch.export.export(twin.eval(), (example,), dynamic_shapes=({0: rows, 1: positions},), strict=False)


def write_torch(path: Path | str, model: GPT) -> Path:
    """Write the graph for `torch.export.load`."""
    whole = io.BytesIO()  # on a full disk torch's own file ends the process
    torch.export.save(exported(model), whole)
    with paths.atomic_write(path) as file:
        file.write(whole.getbuffer())
    return Path(path)


def write_onnx(path: Path | str, model: GPT) -> Path:
    """Write the graph for ONNX runtimes, the weights inside (beside it, as `<name>.data`, from 2 GB on)."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("--format=onnx needs the package onnxscript: install nanochat[export].") from error
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the converter talks and warns
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            exported(model), input_names=["ids"], output_names=["logits"], dynamo=True, optimize=True, verbose=False
        )
        with paths.staged(path) as part:
            program.save(str(part), external_data=size > 1.9e9)
    return Path(path)
