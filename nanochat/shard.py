"""Parameters, gradients and moments all sharded over the ranks, for a model that one device can't hold: --shard=full.

torch's FSDP2 (`torch.distributed.fsdp.fully_shard`; ZeRO-3, arXiv 1910.02054) keeps of each parameter this rank's rows
only, gathers a block's whole parameters just before they are used, forward and backward, and leaves each rank its rows
of the summed gradient. AdamW moves rows as they are. Muon needs whole matrices: each matrix has an owner, who is sent
everybody's rows of its gradient, finds the direction, keeps the moments, and sends everybody their rows of it.

The two kinds of banks have the verbs of nanochat/optim.py's, so the optimizer is the same; torch's parts are imported
only where a model is sharded. What is sent a step: 2 x the parameters gathered and 1 x the gradients for each
micro-batch, and 2 x the matrices for the update, where banks send 2 x the parameters.

Shape letters: K matrices of one shape m x n, of which this rank owns k and of each of which it keeps r rows.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from nanochat import rules
from nanochat.banks import AdamBank, MuonBank
from nanochat.errors import UserError
from nanochat.runtime import Runtime

KINDS = ("optimizer", "full")  # what --shard shares out over the ranks: moments (nanochat/banks.py), or all


def cradle(kind: str, runtime: Runtime) -> torch.device:
    """Where to build a model: on the CPU if it will be sharded, since whole it may not fit the device."""
    return torch.device("cpu") if kind == "full" else runtime.device


def apply(model: torch.nn.Module, runtime: Runtime) -> None:
    """Shard a GPT whose values are set, in place: each block and each value table is gathered by itself, then the rest.

    Blocks move over to the device one at a time.
    """
    if runtime.world == 1:
        raise UserError("--shard=full shares a model out over ranks, but there is only one: start it with torchrun.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(runtime.device.type, (runtime.world,))
    for part in (*model.transformer.h, *model.value_embeds.values(), model):
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)  # a sum, as the banks make it: the optimizer divides
        part.set_force_sum_reduction_for_comms(True)


def compile_blocks(model: torch.nn.Module) -> None:
    """Compile each block's forward for fixed shapes; the gathering around it stays outside of the graphs."""
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward, dynamic=False)


def sharded(model: torch.nn.Module) -> bool:
    """Has `apply` been here?"""
    return any(is_part(p) for p in model.parameters())


def is_part(p: torch.Tensor) -> bool:
    """Is it a DTensor, of which this rank has a part?"""
    return hasattr(p, "to_local")


@contextlib.contextmanager
def whole(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every rank has all parameters whole and may run the model on its own, without the others. Collective."""
    if not sharded(model):
        yield
        return
    parts = [m for m in model.modules() if hasattr(m, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with torch.compiler.set_stance("force_eager"):  # else each shape that is evaluated compiles the blocks anew
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


@torch.no_grad()
def put(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a sharded model whole values by name: each rank keeps its rows."""
    for name, p in model.named_parameters():
        part = p.to_local()
        part.copy_(weights[name][rows_of(p)])


def rows_of(p: torch.Tensor) -> slice:
    """The rows of a sharded tensor that this rank keeps: ceil(m / W) each, the last ranks fewer or none."""
    return rows_at(p, p.device_mesh.get_local_rank())


def rows_at(p: torch.Tensor, rank: int) -> slice:
    """The rows that `rank` keeps."""
    size = -(-len(p) // p.device_mesh.size())
    return slice(min(rank * size, len(p)), min((rank + 1) * size, len(p)))


class Parts:
    """Sharded parameters: what the reducer asks of a bank is done already, by FSDP2 during the backward pass."""

    grads = None

    def __init__(self, named: list[tuple[str, torch.Tensor]], runtime: Runtime):
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.runtime = runtime

    def take(self, i: int) -> None:
        """Nothing: the gradient lies where FSDP2 has put it; a missing one counts as zero."""
        p = self.params[i]
        if p.grad is None:
            p.grad = torch.zeros_like(p)

    def buckets(self) -> list:
        return []

    def share(self) -> list:
        return []

    def gradients(self) -> list[torch.Tensor]:
        """This rank's rows of every gradient."""
        return [p.grad.to_local() for p in self.params if p.to_local().numel()]


class MuonParts(Parts):
    """K sharded matrices of one shape."""

    def __init__(self, named, lr: float, share: list[int], runtime: Runtime, dtype):
        super().__init__(named, runtime)
        self.lr, self.dtype, self.shares = lr, dtype, share
        self.shape = self.params[0].shape
        first = sum(share[: runtime.rank])
        self.own = range(first, first + share[runtime.rank])
        self.heights = [s.stop - s.start for s in (rows_at(self.params[0], r) for r in range(runtime.world))]
        rows, cols = self.shape
        blank = self.params[0].to_local().new_zeros
        self.moments = {
            "momentum": blank(len(self.own), rows, cols),
            "second": blank(len(self.own), *((rows, 1) if rows >= cols else (1, cols))),
        }

    def update(self, lr_mult: float, momentum: float, weight_decay: float, t: int) -> None:
        direction = self.collect()
        if len(self.own):
            direction = rules.muon_update(direction, *self.moments.values(), momentum, dtype=self.dtype)
        rows = self.scatter(direction)
        if rows.numel():
            values = torch.stack([p.to_local() for p in self.params])  # (K, r, n): this rank's rows of all
            rules.cautious_(values, rows, rules.muon_lr(self.lr * lr_mult, *self.shape), weight_decay)
            torch._foreach_copy_([p.to_local() for p in self.params], list(values.unbind(0)))

    def _sizes(self) -> tuple[list[int], list[int]]:
        """Elements of the gradients that go to, and come from, each rank."""
        cols, mine = self.shape[1], self.heights[self.runtime.rank]
        return [share * mine * cols for share in self.shares], [len(self.own) * h * cols for h in self.heights]

    def collect(self) -> torch.Tensor:  # (k, m, n)
        """The whole gradients of the matrices that this rank owns."""
        out, back = self._sizes()
        sent = torch.cat([p.grad.to_local().reshape(-1) for p in self.params])
        got = sent.new_empty(sum(back))
        dist.all_to_all_single(got, sent, back, out)
        parts = [part.view(len(self.own), h, self.shape[1]) for part, h in zip(got.split(back), self.heights)]
        return torch.cat(parts, dim=1)

    def scatter(self, stack: torch.Tensor) -> torch.Tensor:  # (k, m, n) -> (K, r, n)
        """This rank's rows of all matrices, of which every owner has some whole."""
        back, out = self._sizes()
        sent = torch.cat([part.reshape(-1) for part in stack.split(self.heights, dim=1)])
        got = sent.new_empty(sum(back))
        dist.all_to_all_single(got, sent, back, out)
        return got.view(len(self.params), self.heights[self.runtime.rank], self.shape[1])

    def parts(self) -> list[tuple[int, int, int, int]]:
        """(owner, matrix, first element, end) of every matrix."""
        owners = [rank for rank, share in enumerate(self.shares) for _ in range(share)]
        return [(owner, i, 0, self.shape.numel()) for i, owner in enumerate(owners)]

    state, load, shapes = MuonBank.state, MuonBank.load, MuonBank.shapes  # owners keep whole matrices there too


class AdamParts(Parts):
    """Sharded tensors that AdamW moves: each rank its rows."""

    def __init__(self, named, rates: list[float], table: list[rules.AdamRule], runtime: Runtime):
        super().__init__(named, runtime)
        self.rates, self.table = rates, table
        fresh = lambda: [torch.zeros_like(p.to_local()) for p in self.params]
        self.moments = {"exp_avg": fresh(), "exp_avg_sq": fresh()}
        self.steps = torch.zeros((), dtype=torch.float32, device=runtime.device)

    def update(self, lr_mult: float, momentum: float, weight_decay: float, t: int) -> None:
        for i, (p, *moments) in enumerate(zip(self.params, *self.moments.values(), strict=True)):
            if p.to_local().numel():
                rules.adam_update(p.to_local(), p.grad.to_local(), *moments, self.steps.fill_(t - 1),
                                       self.rates[i] * lr_mult, self.table[i])  # fmt: skip

    def state(self):
        """(name, whole tensor) of every moment of every tensor; collective."""
        for kind, own in self.moments.items():
            for name, p, moment in zip(self.names, self.params, own, strict=True):
                whole = moment.new_empty(p.shape)
                for rank in range(self.runtime.world):
                    part = whole[rows_at(p, rank)]
                    if part.numel():
                        dist.broadcast(part.copy_(moment) if rank == self.runtime.rank else part, rank)
                yield f"{name}.{kind}", whole

    def load(self, state):
        for kind, own in self.moments.items():
            for name, p, moment in zip(self.names, self.params, own, strict=True):
                moment.copy_(state[f"{name}.{kind}"][rows_of(p)])

    shapes = AdamBank.shapes
