"""Bits per byte: the loss in a unit that does not depend on the tokenizer.

    bpb = sum of nats over the scored targets / (ln 2 x sum of their bytes)

A target is scored if it is a token with bytes: -1 (ignored) and special tokens are left out of both sums. The sums are
kept in fp64 and added over the ranks, so the figure does not depend on the batch size or the number of ranks, as long
as the rows are the same (`nanochat.dataloader.eval_batches`).
"""

import math
from collections.abc import Iterable

import torch
from tqdm import tqdm

from nanochat.errors import UserError
from nanochat.runtime import Runtime


@torch.no_grad()
def bits_per_byte(model, batches: Iterable, token_bytes: torch.Tensor, runtime: Runtime) -> float:
    """Bits per byte of `model` over finite `batches` (each with inputs and targets, both (B, T); any number a rank).

    token_bytes: (V,) bytes of each token, 0 for specials. UserError: no batch has a target with bytes.
    """
    # fp64 does not exist on MPS; there the sums live on the CPU.
    home = torch.device("cpu") if runtime.device.type == "mps" else runtime.device
    sizes = token_bytes.to(home)
    sums = torch.zeros(2, dtype=torch.float64, device=home)  # nats, bytes
    total = getattr(batches, "total", None)
    for batch in tqdm(batches, total=total, desc="bpb", leave=False, disable=None if runtime.main else True):
        losses = model(batch.inputs, batch.targets, reduction="none").flatten().to(home)  # (B T,)
        targets = batch.targets.flatten().to(home)
        counted = torch.where(targets >= 0, sizes[targets.clamp(min=0)], 0)
        sums[0] += torch.where(counted > 0, losses, 0).sum(dtype=torch.float64)
        sums[1] += counted.sum()
    nats, total = runtime.sum(sums).tolist()
    if total == 0:
        raise UserError(
            "Bits per byte can't be measured: the evaluation rows hold no text. Ask for more evaluation tokens "
            "(--eval-tokens or --split-tokens, at least one row), and check the validation data."
        )
    return nats / (math.log(2) * total)
