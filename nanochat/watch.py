"""Is the run alive? Heartbeats in the record, and every rank's stack where a step takes far too long.

A step that takes `times` as long as the median one, and at least `FLOOR` seconds, makes each rank write the stacks of
all its threads to `stacks/rank_<r>.txt` beside the record. Each rank times itself: in a hang of one, all the others
wait in a collective, so all but a stopped process write. The timer is faulthandler's, a thread outside Python: it works
although the interpreter's lock is held. Rank 0 adds a heartbeat row to the record each `HEARTBEAT` seconds: a file
whose last row is older than that belongs to a run that is dead or hung.
"""

import contextlib
import faulthandler
import statistics
import threading
import time
from collections import deque
from typing import IO, Any

from nanochat.record import Record
from nanochat.runtime import Runtime

FLOOR = 60.0  # seconds under which no step counts as hung
WINDOW = 50  # steps of which the median is taken
HEARTBEAT = 60.0  # seconds between two heartbeats


class Watch:
    """Watches the steps between `begin(step)` and `end()`; evaluations and saves are not timed. `times` None: off."""

    def __init__(self, log: Record, runtime: Runtime, times: float | None = 10.0):
        self.log, self.times = log, times
        self.path = log.path.parent / "stacks" / f"rank_{runtime.rank}.txt"
        self.step, self.steps = -1, deque(maxlen=WINDOW)
        self.began = self.limit = 0.0
        self._file: IO | None = None
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="nanochat-heartbeat", daemon=True)

    def __enter__(self) -> "Watch":
        if self.times is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "a", encoding="utf-8")  # open from now on: a hung disk opens nothing
            except OSError as error:  # a full disk: no reason not to train
                self.log.note("watchdog", f"{self.path} can't be written ({error.strerror}): no step is watched.")
        if self.log.main:
            self._heart.start()
        return self

    def __exit__(self, *_: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._over.set()
        if self._heart.ident is not None:
            self._heart.join()
        if self._file is not None:
            self._file.close()
            if self.path.stat().st_size == 0:
                self.path.unlink()
            with contextlib.suppress(OSError):  # where another rank's stacks are
                self.path.parent.rmdir()

    def begin(self, step: int) -> None:
        """A step begins. The first ones of a process are not watched: they compile."""
        self.step, self.began = step, time.monotonic()
        self.limit = max(FLOOR, self.times * statistics.median(self.steps)) if self._file and self.steps else 0.0
        if self.limit:
            faulthandler.dump_traceback_later(self.limit, file=self._file)

    def end(self) -> None:
        """The step is done; if it was so slow that stacks were written, the record says so."""
        faulthandler.cancel_dump_traceback_later()
        seconds = time.monotonic() - self.began
        self.steps.append(seconds)
        if not self.limit or seconds < self.limit:
            return
        self._file.write(f"^ during step {self.step}: it took {seconds:.1f} s, the limit was {self.limit:.1f} s\n\n")
        self._file.flush()
        text = f"step {self.step} took {seconds:.1f} s (limit {self.limit:.1f} s): stacks are in {self.path.parent}."
        self.log.note("slow_step", text, step=self.step, seconds=seconds, limit=self.limit)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            self.log.event("heartbeat", step=self.step, seconds=time.monotonic() - self.began)
