"""Can these processes train together? Versions, code, ranks, clocks, and every collective's result, time and bandwidth.

    torchrun --standalone --nproc_per_node=8 -m scripts.preflight
    HEAD=10.0.0.1 NODES=2 SCRIPT=scripts.preflight bash runs/multinode.sh       # on every machine

Takes seconds and changes nothing. Run it before a long run on several devices or machines; with no torchrun it looks at
this one process only. What is wrong is listed and the exit status is 1; the last line is JSON.
"""

import dataclasses
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import cli, hardware, runtime
from nanochat.errors import refuse

ROOT = Path(__file__).resolve().parents[1]
SKEW = 1.0  # seconds between two machines' clocks that confuse records and heartbeats
SHOWN = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "NANOCHAT_DTYPE", "CUDA_VISIBLE_DEVICES")
SHOWN_PREFIX = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCHELASTIC_")


@dataclasses.dataclass(frozen=True)
class Config:
    device_type: str = ""  # cuda or cpu; empty: the best there is
    largest: int = 64 * 2**20  # bytes of the largest message; each step is 16 times the one before
    turns: int = 3  # each collective is timed so often; the best counts


def code_hash() -> str:
    """A hash of this checkout's Python files: equal on two ranks that run the same code."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in ("nanochat", "scripts", "tasks") for p in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def about(rt: runtime.Runtime) -> dict:
    """What one rank is and runs on."""
    device = torch.cuda.current_device() if rt.device.type == "cuda" else None
    return {
        "rank": rt.rank, "local_rank": rt.local_rank, "host": socket.gethostname(), "pid": os.getpid(),
        "device": hardware.device_name(rt.device), "index": device, "dtype": str(rt.dtype),
        "torch": torch.__version__, "python": platform.python_version(), "code": code_hash(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm_free": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        "env": {k: v for k, v in sorted(os.environ.items()) if k in SHOWN or k.startswith(SHOWN_PREFIX)},
    }  # fmt: skip


def clock_offsets(rt: runtime.Runtime, pings: int = 5) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's, on rank 0: by the quickest of a few round trips."""
    offsets = [0.0]
    for other in range(1, rt.world):
        best = (float("inf"), 0.0)
        for _ in range(pings):
            clock = torch.tensor([time.time()], dtype=torch.float64, device=rt.device)
            if rt.rank == 0:
                began = time.time()
                dist.send(clock, other)
                dist.recv(clock, other)
                ended = time.time()
                best = min(best, (ended - began, float(clock) - (began + ended) / 2))
            elif rt.rank == other:
                dist.recv(torch.empty_like(clock), 0)
                clock.fill_(time.time())
                dist.send(clock, 0)
        offsets.append(best[1])
    return rt.broadcast(offsets)


def collectives(count: int, rt: runtime.Runtime) -> dict:
    """Each collective that training uses, on `count` fp32 numbers a rank: {name: (call, right answer's check)}."""
    x = torch.full((count,), rt.rank + 1.0, device=rt.device)
    many = torch.empty(count * rt.world, device=rt.device)
    total = rt.world * (rt.world + 1) / 2

    def reduce_to_last():
        y = x.clone()
        dist.reduce(y, rt.world - 1)
        return rt.rank != rt.world - 1 or bool((y == total).all())

    def all_reduce():
        y = x.clone()
        dist.all_reduce(y)
        return bool((y == total).all())

    def broadcast():
        y = x.clone()
        dist.broadcast(y, rt.world - 1)
        return bool((y == rt.world).all())

    def all_gather():
        dist.all_gather_into_tensor(many, x)
        return [float(part[0]) for part in many.chunk(rt.world)] == [r + 1.0 for r in range(rt.world)]

    def all_to_all():
        size = -(-count // rt.world) * rt.world
        y, z = torch.full((size,), float(rt.rank), device=rt.device), torch.empty(size, device=rt.device)
        dist.all_to_all_single(z, y)
        return [float(part[0]) for part in z.chunk(rt.world)] == [float(r) for r in range(rt.world)]

    return {f.__name__: f for f in (reduce_to_last, all_reduce, broadcast, all_gather, all_to_all)}


def measure(cfg: Config, rt: runtime.Runtime) -> list[dict]:
    """A row for each collective and size: did it give the right answer everywhere, seconds, bytes a second."""
    rows, size = [], 4096
    while size <= cfg.largest:
        for name, call in collectives(size // 4, rt).items():
            right, best = True, float("inf")
            for _ in range(cfg.turns + 1):  # the first one opens connections
                rt.barrier()
                rt.synchronize()
                began = time.perf_counter()
                right &= call()
                rt.synchronize()
                best = min(best, time.perf_counter() - began)
            slowest = max(rt.gather(best))
            rows.append({"collective": name, "bytes": size, "right": not rt.any(not right), "seconds": slowest,
                         "gigabytes_per_second": size / slowest / 1e9})  # fmt: skip
        size *= 16
    return rows


def problems(ranks: list[dict], offsets: list[float], rows: list[dict]) -> list[str]:
    """What is wrong, a sentence each."""
    found = []
    for name, remedy in (("torch", "install the same version"), ("code", "check out the same commit"),
                         ("python", "use the same Python"), ("dtype", "set NANOCHAT_DTYPE alike")):  # fmt: skip
        odd = [r for r in ranks if r[name] != ranks[0][name]]
        if odd:
            found.append(f"rank {odd[0]['rank']} on {odd[0]['host']} has {name} {odd[0][name]}, rank 0 has "
                         f"{ranks[0][name]}: {remedy} on every machine.")  # fmt: skip
    places = [(r["host"], r["index"]) for r in ranks if r["index"] is not None]
    found += [f"two ranks share GPU {i} of {host}: start as many processes as there are GPUs."
              for host, i in sorted({p for p in places if places.count(p) > 1})]  # fmt: skip
    found += [f"the clock of rank {rank} is {offset:+.1f} s from rank 0's: run an NTP client on every machine."
              for rank, offset in enumerate(offsets) if abs(offset) > SKEW]  # fmt: skip
    found += [f"{row['collective']} of {row['bytes']} bytes gives a wrong answer: the network or driver corrupts data."
              for row in rows if not row["right"]]  # fmt: skip
    found += [f"rank {r['rank']} may open only {r['open_files']} files: raise `ulimit -n` to 4096 or more."
              for r in ranks if 0 <= r["open_files"] < 1024]  # fmt: skip
    return found


def main(cfg: Config) -> dict:
    """Look, measure, print; a UserError lists what is wrong."""
    # 1. runtime: joining the group is itself the test of address and port --------------------------------------------
    began = time.perf_counter()
    rt = runtime.start(cfg.device_type, training=True)
    joined = time.perf_counter() - began
    # 2. look ---------------------------------------------------------------------------------------------------------
    ranks = rt.gather(about(rt))
    offsets = clock_offsets(rt) if rt.world > 1 else [0.0]
    rows = measure(cfg, rt) if rt.world > 1 else []
    wrong = problems(ranks, offsets, rows)
    # 3. say ----------------------------------------------------------------------------------------------------------
    if rt.main:
        print(f"{rt.world} rank(s) joined in {joined:.1f} s; torch {ranks[0]['torch']}, code {ranks[0]['code']}")
        for r, offset in zip(ranks, offsets, strict=True):
            print(f"rank {r['rank']:3d} = {r['host']}:{r['local_rank']}  {r['device']}  clock {offset:+.4f} s")
        for row in rows:
            print(f"{row['collective']:15s} {row['bytes']:>12,} bytes  {1000 * row['seconds']:9.3f} ms  "
                  f"{row['gigabytes_per_second']:8.3f} GB/s  {'right' if row['right'] else 'WRONG'}")  # fmt: skip
        print(json.dumps({"world": rt.world, "ranks": ranks, "clock": offsets, "rows": rows, "problems": wrong}))
    runtime.stop(rt)
    refuse(wrong if rt.main else [])
    return {"world": rt.world, "problems": wrong, "rows": rows}


if __name__ == "__main__":
    cli.run(main, Config)
