"""Steps that must not count: a loss or gradient that is not finite, and, if asked, one that stands far out.

Nothing finite about a step: the run stops before the update and says which step, which data and which layer. A spike
(off by default): the update is skipped, or the run goes back to its last checkpoint and leaves out the data since.
All ranks decide alike, since they decide on the loss and the gradient norm over all ranks.
"""

import dataclasses
import math
import re
import statistics
from typing import Any

import torch

from nanochat.errors import UserError

WINDOW = 64  # steps that say what is usual
ENOUGH = 16  # steps before which nothing is judged
SHARE = 0.05  # a spike is also this much above the median: a flat curve has small deviations
PATIENCE = 8  # spikes without a good step between them after which the run stops
RETURNS = 3  # rollbacks to one checkpoint after which the run stops
REMEDY = "this is no outlier. Resume from an older checkpoint with a lower learning rate, or without --spike."
MAD = 1.4826  # times the median absolute deviation = the standard deviation of normal noise


def check_finite(loss: float, norm: float, *, step: int, position: Any, where: str = "") -> None:
    """Stop the run if the loss or the gradient is NaN or infinite; called before the update, so weights stay good."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
    where = f" ({where})" if where else ""
    raise UserError(
        f"Step {step}: {what}{where} at data position {position}; the weights were not updated. "
        "Resume from the last checkpoint with a lower learning rate, or look at that data."
    )


def natural(name: str) -> list:
    """Sort key by which h.2 comes before h.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def backward_culprit(names: list[str]) -> str:
    """Of the parameters whose gradients are not finite, where it began: backward comes to the last layer first."""
    if not names:
        return ""
    blocks = [n for n in names if re.search(r"\.h\.\d+\.", f".{n}")]
    first = max(blocks or names, key=natural)
    return f"{len(names)} gradients are not finite, backward met {first} first"


@torch.no_grad()
def forward_culprit(model: torch.nn.Module, *inputs: torch.Tensor) -> str:
    """Run forward once more and name the first module that makes something not finite, or the weight that is not."""
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            return f"the weight {name} is not finite"
    found: list[str] = []

    def look(name: str):
        def hook(_module, _inputs, output):
            if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return f"first in the output of {found[0]}" if found else ""


@dataclasses.dataclass
class Spikes:
    """The rule for spikes: how many deviations above the recent median loss or gradient norm; None: no rule.

    `state()` is JSON and part of a checkpoint; `Spikes(deviations, **state)` goes on.
    """

    deviations: float | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    in_a_row: int = 0
    back_at: int = -1  # the step last rolled back to, and how often
    back: int = 0

    def __post_init__(self):
        self.why = ""  # why the last judged step is a spike, in words; empty if it is not

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "deviations"}

    def judge(self, step: int, loss: float, norm: float) -> str:
        """Why this step is a spike; empty if it is not. UserError: too many in a row."""
        if self.deviations is None:
            return ""
        self.why = self._out("loss", loss, self.losses) or self._out("gradient norm", norm, self.norms)
        if self.why:
            self.in_a_row += 1
            if self.in_a_row >= PATIENCE:
                raise UserError(f"Step {step}: {PATIENCE} spikes without a good step between ({self.why}): {REMEDY}")
            return self.why
        self.in_a_row = 0
        for values, value in ((self.losses, loss), (self.norms, norm)):
            values.append(value)
            del values[:-WINDOW]
        return ""

    def rolled_back(self, step: int) -> None:
        """Note a return to `step`. UserError: it is the `RETURNS`-th, so other data did not help."""
        self.back = self.back + 1 if step == self.back_at else 1
        self.back_at = step
        if self.back >= RETURNS:
            raise UserError(f"{RETURNS} times back to step {step} and no way past the spike ({self.why}): {REMEDY}")

    def _out(self, name: str, value: float, recent: list[float]) -> str:
        if len(recent) < ENOUGH:
            return ""
        middle = statistics.median(recent)
        deviation = MAD * statistics.median(abs(x - middle) for x in recent)
        limit = middle + max(self.deviations * deviation, SHARE * abs(middle))
        return f"the {name} is {value:.4g}, {middle:.4g} is usual and {limit:.4g} the limit" if value > limit else ""
