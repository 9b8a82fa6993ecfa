"""Banks: parameters of one kind in one tensor, their gradients in another, each part owned by one rank.

A parameter and its gradient are views into their bank, so an optimizer works on a stack without stacking anything, and
a part travels as it lies: gradients are reduced to the part's owner, new values are broadcast from it. There is no
padding and nothing to divide: any world size and any shape will do. Banks with one owner a rank make ZeRO-1
(arXiv 1910.02054); where the parameters themselves are sharded, nanochat/shard.py takes the banks' place.

`Reducer` starts the reductions while the backward pass is still running, as DDP does (arXiv 2006.15704): a bucket of
adjacent gradients leaves as soon as all of them are there, in one order that is the same on every rank.

Shape letters: K matrices of one shape m x n; W ranks.
"""

from itertools import accumulate

import torch
import torch.distributed as dist

from nanochat import rules
from nanochat.runtime import Runtime

BUCKET = 8 * 2**20  # bytes that travel at once, roughly: large enough for the wire, small enough to leave early
# Elements of matrices that Muon moves at once on a CPU: its temporaries, four times as large, then find room among what
# the backward pass has freed, and a core's caches hold more of them. A GPU wants to be filled.
PIECE = 2**21
ALIGN = 16  # elements: each tensor of a flat bank begins on a cache line


def deal(counts: list[int], costs: list[float], world: int) -> list[list[int]]:
    """Share out whole matrices: of each kind (`counts` of them at `costs` each) how many every rank gets.

    Everybody gets the same number of each kind; what is left over goes to whoever has least to do, dearest kind first.
    """
    load = [0.0] * world
    shares: list[list[int]] = [[] for _ in counts]
    for kind in sorted(range(len(counts)), key=lambda k: -costs[k]):
        each, rest = divmod(counts[kind], world)
        lucky = sorted(range(world), key=lambda rank: load[rank])[:rest]
        shares[kind] = [each + (rank in lucky) for rank in range(world)]
        load = [sum_ + share * costs[kind] for sum_, share in zip(load, shares[kind], strict=True)]
    return shares


class Bank:
    """Parameters that lie in one flat tensor `values`; rank r owns the elements [cuts[r], cuts[r + 1]).

    `grads` is the same for gradients, or None in a world of one whose gradients need not lie together. Making a bank
    moves the parameters' data into it: the Parameter objects stay, their values too.
    """

    def __init__(self, named: list[tuple[str, torch.Tensor]], cuts: list[int], runtime: Runtime, *, align: int = 1,
                 grads: bool = True):  # fmt: skip
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.offsets = offsets([p.numel() for p in self.params], align)
        self.cuts, self.runtime = cuts, runtime
        self.lo, self.hi = cuts[runtime.rank], cuts[runtime.rank + 1]
        self.values = self.params[0].new_zeros(self.offsets[-1])
        for p, view in zip(self.params, self.views(self.values), strict=True):
            view.copy_(p.data)
            p.data = view
        self.grads = torch.zeros_like(self.values) if grads else None
        self.grad_views = self.views(self.grads) if self.grads is not None else [None] * len(self.params)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The parameters' places in a tensor like `values`."""
        return [flat[o : o + p.numel()].view_as(p) for o, p in zip(self.offsets, self.params)]

    def take(self, i: int) -> None:
        """Put parameter i's gradient in its place; what autograd adds later then goes there of itself."""
        p, view = self.params[i], self.grad_views[i]
        if view is None or (p.grad is not None and p.grad.data_ptr() == view.data_ptr()):
            return
        if p.grad is None:
            view.zero_()  # a missing gradient counts as zero
        else:
            view.copy_(p.grad)
        p.grad = view

    def parts(self) -> list[tuple[int, int, int, int]]:
        """(owner, parameter, first element, end) of every stretch of a parameter that one rank owns."""
        found = []
        for i, p in enumerate(self.params):
            first, end = self.offsets[i], self.offsets[i] + p.numel()
            for owner, (lo, hi) in enumerate(zip(self.cuts, self.cuts[1:], strict=False)):
                if max(first, lo) < min(end, hi):
                    found.append((owner, i, max(first, lo) - first, min(end, hi) - first))
        return found

    def buckets(self) -> list["Bucket"]:
        """What travels at once: neighbours with one owner, up to BUCKET bytes or one parameter."""
        found: list[Bucket] = []
        for owner, i, a, b in sorted(self.parts(), key=lambda part: (part[0], part[1])):
            lo, hi = self.offsets[i] + a, self.offsets[i] + b
            last = found[-1] if found else None
            if last and last.owner == owner and (hi - last.lo) * self.values.element_size() <= BUCKET:
                last.hi = hi
                last.members.append(i)
            else:
                found.append(Bucket(self, owner, lo, hi, [i]))
        return found

    def share(self) -> list:
        """Start sending every owner's new values to all; returns what to wait for."""
        if self.runtime.world == 1:
            return []
        spans = [(owner, lo, hi) for owner, (lo, hi) in enumerate(zip(self.cuts, self.cuts[1:], strict=False))]
        return [dist.broadcast(self.values[lo:hi], owner, async_op=True) for owner, lo, hi in spans if lo < hi]


def offsets(sizes: list[int], align: int) -> list[int]:
    """Where tensors of these sizes begin when each begins at a multiple of `align`; the last number is the end."""
    return [0, *accumulate(-(-size // align) * align for size in sizes)]


def send(tensor: torch.Tensor, owner: int, runtime: Runtime) -> torch.Tensor:
    """The owner's values of `tensor`, on every rank."""
    if runtime.world > 1:
        dist.broadcast(tensor, owner)
    return tensor


class MuonBank(Bank):
    """K block matrices of one shape as a stack (K, m, n); this rank moves the k of them that it owns."""

    def __init__(self, named, lr: float, shares: list[int], runtime: Runtime, dtype):
        size = named[0][1].numel()
        super().__init__(named, offsets([share * size for share in shares], 1), runtime)
        self.lr, self.dtype = lr, dtype
        shape = self.params[0].shape
        rows, cols = shape
        first = self.lo // size
        self.own = range(first, self.hi // size)
        stack = lambda flat: flat[self.lo : self.hi].view(-1, *shape)  # (k, m, n)
        self.values_own, self.grads_own = stack(self.values), stack(self.grads)
        self.moments = {
            "momentum": torch.zeros_like(self.values_own),
            "second": self.values.new_zeros(len(self.own), *((rows, 1) if rows >= cols else (1, cols))),
        }

    def gradients(self) -> list[torch.Tensor]:
        """This rank's part of the gradient, summed over the ranks."""
        return [self.grads_own] if len(self.own) else []

    def update(self, lr_mult: float, momentum: float, weight_decay: float, t: int) -> None:
        lr = rules.muon_lr(self.lr * lr_mult, *self.values_own.shape[1:])
        for piece in self.pieces():
            moments = (moment[piece] for moment in self.moments.values())
            direction = rules.muon_update(self.grads_own[piece], *moments, momentum, dtype=self.dtype)
            rules.cautious_(self.values_own[piece], direction, lr, weight_decay)

    def pieces(self) -> list[slice]:
        """This rank's matrices, so many at a time as the update moves: on a CPU no more than PIECE elements."""
        k = len(self.own)
        each = max(PIECE // self.params[0].numel(), 1) if self.values.device.type == "cpu" else max(k, 1)
        return [slice(at, at + each) for at in range(0, k, each)]

    def state(self):
        """(name, whole tensor) of every moment of every matrix; collective."""
        for owner, i, _, _ in self.parts():
            for kind, stack in self.moments.items():
                mine = i in self.own
                tensor = stack[i - self.own.start] if mine else stack.new_empty(stack.shape[1:])
                yield f"{self.names[i]}.{kind}", send(tensor, owner, self.runtime)

    def load(self, state):
        for kind, stack in self.moments.items():
            for i, moment in zip(self.own, stack, strict=True):
                moment.copy_(state[f"{self.names[i]}.{kind}"])

    def shapes(self):
        return {f"{name}.{kind}": stack.shape[1:] for kind, stack in self.moments.items() for name in self.names}


class AdamBank(Bank):
    """Tensors of any shape as one flat vector, each rank's part of it an equal stretch, whatever tensors it cuts."""

    def __init__(self, named, rates: list[float], table: list[rules.AdamRule], runtime: Runtime):
        total = offsets([p.numel() for _, p in named], ALIGN)[-1]
        chunk = -(-total // (ALIGN * runtime.world)) * ALIGN
        cuts = [min(rank * chunk, total) for rank in range(runtime.world + 1)]
        super().__init__(named, cuts, runtime, align=ALIGN, grads=runtime.world > 1)
        self.rates, self.table = rates, table
        self.own = [(i, a, b) for owner, i, a, b in self.parts() if owner == runtime.rank]
        fresh = lambda: [self.values.new_zeros(b - a) for _, a, b in self.own]
        self.moments = {"exp_avg": fresh(), "exp_avg_sq": fresh()}
        self.steps = torch.zeros((), dtype=torch.float32, device=self.values.device)

    def gradients(self) -> list[torch.Tensor]:
        """This rank's parts of the gradients, summed over the ranks."""
        for i in {i for i, _, _ in self.own}:
            if self.params[i].grad is None:
                self.params[i].grad = torch.zeros_like(self.params[i])
        return [self.params[i].grad.view(-1)[a:b] for i, a, b in self.own]

    def update(self, lr_mult: float, momentum: float, weight_decay: float, t: int) -> None:
        for (i, a, b), grad, *moments in zip(self.own, self.gradients(), *self.moments.values(), strict=True):
            own = self.params[i].data.view(-1)[a:b]
            rules.adam_update(own, grad, *moments, self.steps.fill_(t - 1), self.rates[i] * lr_mult, self.table[i])

    def state(self):
        """(name, whole tensor) of every moment of every tensor; collective."""
        for kind, own in self.moments.items():
            mine = {(i, a): moment for (i, a, _), moment in zip(self.own, own, strict=True)}
            whole = [None] * len(self.params)
            for owner, i, a, b in self.parts():
                if whole[i] is None:
                    whole[i] = self.values.new_empty(self.params[i].numel())
                part = whole[i][a:b]
                if (i, a) in mine:
                    part.copy_(mine[i, a])
                send(part, owner, self.runtime)
                if b == len(whole[i]):
                    yield f"{self.names[i]}.{kind}", whole[i].view_as(self.params[i])
                    whole[i] = None

    def load(self, state):
        for kind, own in self.moments.items():
            for (i, a, b), moment in zip(self.own, own, strict=True):
                moment.copy_(state[f"{self.names[i]}.{kind}"].reshape(-1)[a:b])

    def shapes(self):
        return {f"{name}.{kind}": p.shape for kind in self.moments for name, p in zip(self.names, self.params)}


class Bucket:
    """Neighbouring gradients of one owner: the elements [lo, hi) of the bank, which are those of `members`."""

    def __init__(self, bank: Bank, owner: int, lo: int, hi: int, members: list[int]):
        self.bank, self.owner, self.lo, self.hi, self.members = bank, owner, lo, hi, members
        self.missing = len(members)

    def launch(self):
        """Start the sum over all ranks into the owner's bank; elsewhere the stretch holds nothing of use afterwards."""
        for i in self.members:
            self.bank.take(i)
        return dist.reduce(self.bank.grads[self.lo : self.hi], self.owner, async_op=True)


class Reducer:
    """Sums the banks' gradients to their owners: during the last backward pass of an update, the rest in `flush`.

    The order of the buckets is the one in which rank 0's first backward pass completed them, told to all: collectives
    must come in one order everywhere. A bucket that is ready early waits for those before it.
    """

    def __init__(self, banks: list[Bank], runtime: Runtime):
        self.banks, self.runtime = banks, runtime
        self.buckets = [bucket for bank in banks for bucket in bank.buckets()] if runtime.world > 1 else []
        self.homes = [(p, bank, i) for bank in banks for i, p in enumerate(bank.params)]
        self.waiting_for: dict[tuple[int, int], list[Bucket]] = {}  # (bank, parameter) -> its buckets
        for bucket in self.buckets:
            for i in bucket.members:
                self.waiting_for.setdefault((id(bucket.bank), i), []).append(bucket)
        self.ordered = False  # is the order of `buckets` the observed one?
        self.works: list = []
        self.begin()

    def begin(self) -> None:
        """Forget what was sent: a new update begins."""
        self.wait()
        self.next, self.done = 0, False
        self.seen: list[tuple[int, int]] = []
        for bucket in self.buckets:
            bucket.missing = len(bucket.members)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """loss.backward(); with `last` gradients travel as soon as their bucket is full, and all have left after."""
        if self.done:
            raise ValueError("backward after the last micro-batch of an update: call zero_grad() first")
        handles = [
            p.register_post_accumulate_grad_hook(lambda _, bank=bank, i=i: self._arrived(bank, i, last))
            for p, bank, i in self.homes
            if bank.grads is not None
        ]
        try:
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        if last:
            self.flush()

    def _arrived(self, bank: Bank, i: int, last: bool) -> None:
        bank.take(i)
        if not last:
            return
        self.seen.append((self.banks.index(bank), i))
        for bucket in self.waiting_for.get((id(bank), i), ()):
            bucket.missing -= 1
        while self.ordered and self.next < len(self.buckets) and self.buckets[self.next].missing == 0:
            self._launch_next()

    def _launch_next(self) -> None:
        self.works.append(self.buckets[self.next].launch())
        self.next += 1

    def flush(self) -> None:
        """Send what has not been sent; every rank comes here, whatever its backward passes were. Collective."""
        if self.done:
            return
        for _, bank, i in self.homes:
            bank.take(i)
        while self.next < len(self.buckets):
            self._launch_next()
        self.done = True
        if self.buckets and not self.ordered:
            self._learn_order()

    def _learn_order(self) -> None:
        when = {key: position for position, key in enumerate(self.seen)}
        ready = [
            max(when.get((self.banks.index(b.bank), i), len(when)) for i in b.members) for b in self.buckets
        ]  # when the last of a bucket came
        order = self.runtime.broadcast(sorted(range(len(ready)), key=ready.__getitem__) if when else [])
        if order:
            self.buckets, self.ordered = [self.buckets[k] for k in order], True

    def wait(self) -> None:
        """Wait for everything that travels."""
        for work in self.works:
            work.wait()
        self.works = []
