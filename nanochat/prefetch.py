"""The next batches are made by a thread while the model works on this one, and copied to the device without waiting.

Legend: B rows, T positions.

On CUDA the thread writes into pinned memory, a ring of slots. The copy to the device is queued, not awaited, so the
slot may be written again only when the copy is done: an event recorded behind the copy says when (pitfalls 19, 20).
Elsewhere every batch gets memory of its own. The thread starts no work on the device.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

PATIENCE = 30.0  # seconds without a batch after which the consumer is told, again and again
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Note:
    """Where the loader stands behind a batch: cheap to make for each, its state is written only when called."""

    write: Callable[[], dict]
    epoch: int = 1
    shard: int = 0  # in the corpus' order; the furthest of this rank's lanes

    def __call__(self) -> dict:
        return self.write()


Fill = Callable[[np.ndarray, np.ndarray], Note | None]  # writes inputs and targets; returns None at the end


@dataclass(frozen=True)
class Batch:
    """What a step learns from. A loader given `state` goes on with the batch after this one.

    The state is written when it is first asked for: ask the batches at which you save, not each one.
    """

    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, -1 = ignored
    note: Note = field(repr=False)

    @cached_property
    def state(self) -> dict:
        """JSON: where the loader stands behind this batch."""
        return self.note()


class Feeder(Iterator[Batch]):
    """Batches made by `fill(inputs, targets)`, at most `prefetch` ahead; 0 makes each one when it is asked for.

    Ends when `fill` returns None. An error of the thread is raised here, at the batch it prevented. Close it, or use it
    in a `with`: closing waits for the batch being made and ends the thread; a closed feeder is at its end. `helper`
    is a pool that `fill` uses, to be ended with the thread. `total` is for who wants to know: at most so many batches.
    """

    def __init__(
        self,
        fill: Fill,
        rows: int,
        seq_len: int,
        device: torch.device | str,
        prefetch: int = 2,
        helper: ThreadPoolExecutor | None = None,
        total: int | None = None,
    ):
        self.total = total
        self.device = torch.device(device)
        self._fill = fill
        self._helper = helper
        self._shape = (2, rows, seq_len)
        self._slots = [_Slot(self._shape) for _ in range(max(1, prefetch))] if self.device.type == "cuda" else []
        self._made = 0
        self._closed = False
        self._jobs: deque[Future] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nanochat-data") if prefetch else None
        for _ in range(prefetch):
            self._order()

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            pair, slot, note = self._next()
        except BaseException:  # an error of the thread, or Ctrl-C while waiting
            self.close()
            raise
        if note is None:
            self.close()
            raise StopIteration
        pair = self._to_device(pair, slot)
        if self._pool:
            self._order()  # only now: it may write into the slot just copied from
        return Batch(pair[0], pair[1], note)

    def close(self) -> None:
        """End the thread. May be called twice."""
        self._closed = True
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._helper:
            self._helper.shutdown(wait=True, cancel_futures=True)
        self._jobs.clear()

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next(self) -> tuple[torch.Tensor, "_Slot | None", Note | None]:
        if not self._pool:
            return self._make()
        job = self._jobs.popleft()
        waited = 0.0
        while not wait([job], timeout=PATIENCE).done:
            waited += PATIENCE
            log.warning("still waiting for a batch after %.0f s: the disk with the data may be slow or hung", waited)
        return job.result()

    def _order(self) -> None:
        self._jobs.append(self._pool.submit(self._make))

    def _make(self) -> tuple[torch.Tensor, "_Slot | None", Note | None]:
        """Runs in the thread: the next batch in CPU memory, (2, B, T): inputs and targets."""
        slot = self._slots[self._made % len(self._slots)] if self._slots else None
        pair = slot.free() if slot else torch.empty(self._shape, dtype=torch.int64)
        self._made += 1
        inputs, targets = pair.numpy()
        return pair, slot, self._fill(inputs, targets)

    def _to_device(self, pair: torch.Tensor, slot: "_Slot | None") -> torch.Tensor:
        if slot:
            return slot.copy_to(self.device)
        return pair if self.device.type == "cpu" else pair.to(self.device)


class _Slot:
    """Pinned memory for one batch, and the event behind the last copy from it."""

    def __init__(self, shape: tuple[int, ...]):
        self.pair = torch.empty(shape, dtype=torch.int64, pin_memory=True)  # (2, B, T)
        self.copied: torch.cuda.Event | None = None

    def free(self) -> torch.Tensor:
        """The memory, once the last copy from it is done."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.pair

    def copy_to(self, device: torch.device) -> torch.Tensor:
        """Queue the copy on the device's current stream and return the copy."""
        there = self.pair.to(device, non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record(torch.cuda.current_stream(device))
        return there
