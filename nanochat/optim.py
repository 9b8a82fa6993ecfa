"""The optimizer: Muon for block matrices, AdamW for the rest, over any number of ranks.

The model says what each tensor is (`GPT.roles()`), nanochat/rules.py how such a tensor moves, this file brings the two
together. Parameters lie in banks (nanochat/banks.py), Muon's matrices of one shape as a stack (K, m, n) of which every
rank owns whole matrices, all that AdamW moves as one flat vector (n,) cut into equal parts. Gradients are summed to
their owners while the backward pass runs, an owner keeps the state of its part only and sends the new values to all.
A model that nanochat/shard.py has sharded is moved part by part as it lies. Any world size works; `state()` gives
whole tensors by parameter name, so a checkpoint fits any world.
"""

import math
from collections.abc import Mapping

import torch

from nanochat import rules, shard
from nanochat.banks import AdamBank, MuonBank, Reducer, deal
from nanochat.errors import refuse
from nanochat.rules import ADAM_RULES
from nanochat.runtime import Runtime


class MuonAdamW:
    """The optimizer of a whole model.

    `roles` is `GPT.roles()`, `lrs` the peak learning rate of each role (`Plan.lrs`). One update is `backward(loss)` of
    each micro-batch (`last=True` with the last, which then overlaps with the reduction), `reduce()` (average, unscale,
    norm), the caller's checks, `step(...)`, `zero_grad()`. Plain `loss.backward()` does too, without overlap, and
    `step` alone reduces itself. The parameters' memory is the banks' from here on: don't move the model afterwards.
    """

    def __init__(self, roles: Mapping[str, list], lrs: Mapping[str, float], runtime: Runtime):
        unknown = [role for role in roles if role not in ("matrix", *ADAM_RULES)]
        coarse = [n for pairs in roles.values() for n, p in pairs if p.dtype not in (torch.float32, torch.float64)]
        if unknown or coarse:  # a mistake in the code: in bf16 a second moment with beta2 0.995 stands still
            raise ValueError(f"roles without a rule: {unknown}; parameters that are not fp32 or fp64: {coarse}")
        self.runtime, self.t, self.reduced = runtime, 0, False
        self.banks: list[MuonBank | AdamBank] = [
            *_muon_banks(roles.get("matrix", []), lrs, runtime), *_adam_banks(roles, lrs, runtime)
        ]  # fmt: skip
        self.reducer = Reducer(self.banks, runtime)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._begin()
        for bank in self.banks:
            for p in bank.params:
                p.grad = None

    def _begin(self) -> None:
        self.reduced = False
        self.reducer.begin()

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Backward pass of one micro-batch; during the `last` one gradients travel as they come. Collective if last."""
        self.reducer.backward(loss, last)

    @torch.no_grad()
    def reduce(self, scale: float = 1.0) -> float:
        """Average the gradients over the ranks and divide them by `scale` (the fp16 loss scale).

        Returns the norm of the whole gradient, the same on every rank; it is not finite if any element on any rank was
        not, and then the caller either stops or drops this update with `zero_grad` and no `step`.
        """
        self.reducer.flush()
        self.reducer.wait()
        own = [grad for bank in self.banks for grad in bank.gradients()]
        factor = 1.0 / (self.runtime.world * scale)
        if factor != 1.0 and own:
            torch._foreach_mul_(own, factor)
        device = self.runtime.device
        square = sum((torch.linalg.vector_norm(g).float().square() for g in own), torch.zeros((), device=device))
        self.reduced = True
        return math.sqrt(float(self.runtime.sum(square)))

    @torch.no_grad()
    def step(self, lr_mult: float = 1.0, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        """Move the parameters: `lr_mult` times the peak rates, Muon's momentum and (already scaled) weight decay."""
        if not self.reduced:
            self.reduce()
        self.t, works = self.t + 1, []
        for bank in self.banks:
            bank.update(lr_mult, momentum, weight_decay, self.t)
            works += bank.share()
        for work in works:
            work.wait()
        self._begin()

    def nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient holds a NaN or an infinity on any rank; collective."""
        pairs = [pair for bank in self.banks for pair in zip(bank.names, bank.params, strict=True)]
        here = [name for name, p in pairs if p.grad is not None and not torch.isfinite(p.grad).all()]
        everywhere = {name for names in self.runtime.gather(here) for name in names}
        return [name for name, _ in pairs if name in everywhere]

    def bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps between steps: weights, gradients (while there are any) and moments."""
        params = [p for bank in self.banks for p in bank.params]
        here = sum((p.to_local() if shard.is_part(p) else p).nbytes for p in params)
        moments = sum(t.nbytes for bank in self.banks for stack in bank.moments.values() for t in stack)
        return {"weights": here, "gradients": here, "moments": moments}

    def state(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """Whole moments by `<parameter>.<moment>` and the step count, on the CPU of rank 0 (or of all); collective."""
        keep = self.runtime.main or everywhere
        state = {"step": torch.tensor(self.t)}
        for bank in self.banks:
            for name, whole in bank.state():
                if keep:
                    state[name] = whole.detach().to("cpu", copy=True)
        return state if keep else {}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's part of a whole state, written in any world size."""
        wanted = {name: shape for bank in self.banks for name, shape in bank.shapes().items()}
        refuse(_state_problems({"step": torch.Size([])} | wanted, state))
        self.t = int(state["step"])
        for bank in self.banks:
            bank.load(state)


def _muon_banks(named: list, lrs: Mapping[str, float], runtime: Runtime) -> list:
    """A bank for each shape, the last matrix first: a backward pass comes to it first."""
    dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else None  # of the polar step; else the parameters'
    kinds: dict[tuple, list] = {}
    for name, p in reversed(named):
        kinds.setdefault((tuple(p.shape), p.dtype), []).append((name, p))
    costs = [rules.muon_cost(*shape) for shape, _ in kinds]
    shares = deal([len(pairs) for pairs in kinds.values()], costs, runtime.world)
    each = [(pairs, lrs["matrix"], share, runtime, dtype) for pairs, share in zip(kinds.values(), shares, strict=True)]
    if any(shard.is_part(p) for _, p in named):
        return [shard.MuonParts(*arguments) for arguments in each]
    return [MuonBank(*arguments) for arguments in each]


def _adam_banks(roles: Mapping[str, list], lrs: Mapping[str, float], runtime: Runtime) -> list:
    """One bank, or one for each dtype there is."""
    entries = [(pair, lrs[role], rule) for role, rule in ADAM_RULES.items() for pair in reversed(roles.get(role, []))]
    kinds: dict[torch.dtype, list] = {}
    for entry in entries:
        kinds.setdefault(entry[0][1].dtype, []).append(entry)
    each = [(*map(list, zip(*kind, strict=True)), runtime) for kind in kinds.values()]
    if any(shard.is_part(p) for (_, p), _, _ in entries):
        return [shard.AdamParts(*arguments) for arguments in each]
    return [AdamBank(*arguments) for arguments in each]


def _state_problems(wanted: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor]) -> list[str]:
    if missing := [name for name in wanted if name not in state]:
        return [f"the optimizer state lacks {len(missing)} tensors, {missing[0]} first: it belongs to another model."]
    return [
        f"the optimizer state's {name} is {tuple(state[name].shape)}, the model needs {tuple(shape)}: other model."
        for name, shape in wanted.items()
        if state[name].shape != shape
    ][:3]
