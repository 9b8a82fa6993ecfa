"""Where the time of a step goes: `--profile` traces a few steps with torch.profiler and writes them to be looked at.

The first steps of a process are left out: they compile and fill caches. Only rank 0 is traced; what it waits for in a
collective shows. Traced steps are slower than the others, in the record too.
"""

import itertools
from pathlib import Path
from typing import Any

import torch

from nanochat import paths
from nanochat.record import Record
from nanochat.runtime import Runtime

BEFORE = 5  # steps of a process that are not traced; during the last of them the profiler warms up
STEPS = 3  # steps that are
MOST = 8  # operators that are named in the record and on the console
VIEWER = "https://ui.perfetto.dev"  # draws the file inside the browser


class Profile:
    """While entered, traces STEPS steps of the process after its first BEFORE; `step(number)` is called after each."""

    def __init__(self, log: Record, runtime: Runtime, on: bool):
        self.log, self.on = log, on and runtime.main
        self.steps: list[int] = []  # numbers of this process's steps
        self.path: Path | None = None  # of the trace, once it is written
        self.profiler: torch.profiler.profile | None = None
        if self.on:
            kinds = torch.profiler.ProfilerActivity
            self.profiler = torch.profiler.profile(
                activities=[kinds.CPU, kinds.CUDA] if runtime.device.type == "cuda" else [kinds.CPU],
                schedule=torch.profiler.schedule(wait=BEFORE - 1, warmup=1, active=STEPS, repeat=1),
                on_trace_ready=self._write, record_shapes=True,
                acc_events=True,  # there is one cycle; torch 2.11 warns without
            )  # fmt: skip

    def __enter__(self) -> "Profile":
        if self.profiler is not None:
            self.profiler.start()
        return self

    def step(self, number: int) -> None:
        """Step `number` has ended."""
        if self.profiler is not None:
            self.steps.append(number)
            self.profiler.step()
            if len(self.steps) == BEFORE + STEPS:
                self._stop()

    def __exit__(self, *_: Any) -> None:
        """A run that ends while it is traced gets a trace of fewer steps."""
        self._stop()
        if self.on and self.path is None:
            text = f"--profile wrote no trace: it begins after {BEFORE} steps, and the run had {len(self.steps)}."
            self.log.note("profile", text)

    def _stop(self) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None

    def _write(self, profiler: torch.profiler.profile) -> None:
        """Write the trace, and say where it is and which operators took the most time."""
        traced = self.steps[BEFORE:]
        if not traced:
            return
        path = self.log.path.parent / "profile" / f"steps_{traced[0]:06d}_to_{traced[-1]:06d}.json.gz"
        with paths.staged(path) as part:
            profiler.export_chrome_trace(str(part))
        self.path = path
        shares = own_time(profiler.key_averages())
        self.log.note("profile", f"the trace of steps {traced[0]} to {traced[-1]} is {path}: open it with {VIEWER} "
                      "(or chrome://tracing).", steps=traced, path=path, operators=shares)  # fmt: skip
        for one in shares:
            self.log.say(f"  {100 * one['share']:5.1f} % {one['operator']} ({one['calls']:,} calls)")


def own_time(averages: Any) -> list[dict[str, Any]]:
    """The operators with the most time of their own, on the device if there is one: name, share of it all, calls."""
    device = any(one.self_device_time_total for one in averages)
    times = {one: one.self_device_time_total if device else one.self_cpu_time_total for one in averages}
    total = sum(times.values())
    first = itertools.islice(sorted(times, key=lambda one: times[one], reverse=True), MOST)
    return [{"operator": one.key, "share": times[one] / total, "calls": one.count} for one in first if times[one]]
