"""The machine this process sees: rank and world, device, compute dtype, seeds, and the few collectives the rest needs.

One process a device. `torchrun` sets RANK, LOCAL_RANK and WORLD_SIZE; without them the world is one process. The
process group is NCCL on CUDA and gloo on CPU, so distributed code runs, and is tested, without a GPU.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import random
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanochat.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MADV_HUGEPAGE, HUGE_PAGE = 14, 2**21  # sys/mman.h; bytes
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What this process is in the run. Collectives are no-ops in a world of one."""

    rank: int
    local_rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # activations and matmuls; parameters stay fp32
    dtype_reason: str

    @classmethod
    def single(cls, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "Runtime":
        """One process, no process group: for tests, tools and inference."""
        return cls(0, 0, 1, torch.device(device), dtype, "single process")

    @property
    def main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks, in place; returns it."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Average `tensor` over the ranks, in place; returns it."""
        return self.sum(tensor).div_(self.world) if self.world > 1 else tensor

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        return self.max(int(flag)) > 0

    def max(self, value: int) -> int:
        """The largest of the ranks' integers."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's JSON-able value, on every rank."""
        if self.world == 1:
            return value
        data = torch.tensor(list(json.dumps(value).encode()) if self.main else [], dtype=torch.uint8)
        size = self.max(data.numel())
        buffer = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if self.main:
            buffer.copy_(data)
        dist.broadcast(buffer, src=0)
        return json.loads(bytes(buffer.cpu().tolist()).decode())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        buffer = torch.full((self.max(data.numel()),), 32, dtype=torch.uint8, device=self.device)  # JSON ignores spaces
        buffer[: data.numel()] = data
        parts = [torch.empty_like(buffer) for _ in range(self.world)]
        dist.all_gather(parts, buffer)
        return [json.loads(bytes(part.cpu().tolist()).decode()) for part in parts]

    def synchronize(self) -> None:
        """Wait until the device has done what was asked, so that a clock reads true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def bytes_now(self) -> int:
        """Memory in use now: the device allocator's on CUDA, the process's resident set on Linux, else 0."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if sys.platform != "linux":
            return 0
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def peak_bytes(self) -> int:
        """Peak memory so far: the device allocator's on CUDA, the process's resident set elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == "win32":
            return 0
        if sys.platform == "linux":  # ru_maxrss would begin with what the process that started this one had
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            return int(status.partition("VmHWM:")[2].split()[0]) * 1024
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def pick_device(device_type: str = "", local_rank: int = 0) -> torch.device:
    """The device asked for, or the best there is (CUDA, then MPS, then CPU)."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device_type == "":
        device_type = next(name for name, there in available.items() if there)
    if device_type not in available:
        raise UserError(f"--device-type={device_type} is unknown: use cuda, mps, cpu or leave it empty.")
    if not available[device_type]:
        raise UserError(f"--device-type={device_type} was asked for, but torch sees no such device: leave it empty.")
    return torch.device("cuda", local_rank) if device_type == "cuda" else torch.device(device_type)


def pick_dtype(device: torch.device, training: bool = False) -> tuple[torch.dtype, str]:
    """Compute dtype and the reason for it: `NANOCHAT_DTYPE`, else bf16 where the hardware is fast at it, else fp32.

    A CPU with bf16 dot products trains in bf16: its matmuls are 2.7 times as fast as fp32 (measured on a Zen 4); it
    answers in fp32, because decoding would cast every weight for every token.
    """
    name = os.environ.get("NANOCHAT_DTYPE")
    if name:
        if name not in DTYPES:
            raise UserError(f"NANOCHAT_DTYPE={name} is unknown: use one of {', '.join(DTYPES)}.")
        return DTYPES[name], "NANOCHAT_DTYPE"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 0):
            return torch.bfloat16, f"CUDA capability {major}.{minor}"
        return torch.float32, f"CUDA capability {major}.{minor} has no fast bf16"
    if device.type == "cpu" and training and cpu_has_fast_bf16():
        return torch.bfloat16, "the CPU has bf16 dot products"
    return torch.float32, f"{device.type}: fp32 is the fastest right choice"


def cpu_has_fast_bf16() -> bool:
    """Does the processor multiply bf16 faster than fp32: by AMX, or by AVX512-BF16 on AMD?

    Measured, GFLOP/s of one core: Zen 4 bf16 186, fp32 66; Intel Xeon with AVX512-BF16 but no AMX bf16 84, fp32 160
    (its dot products have one port, its fp32 multiply-adds two). Without bf16 instructions it is 2 to 4 times slower.
    """
    has = {name: getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("amx_tile", "avx512_bf16")}
    return has["amx_tile"] or has["avx512_bf16"] and cpu_vendor() != "GenuineIntel"


def cpu_vendor() -> str:
    """The processor's maker, as /proc/cpuinfo names it; empty where there is no such file."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("vendor_id")), "")
    return ""


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch. UserError: none of theirs (NumPy's generators take no negative one)."""
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed={seed} must be 0 to 2**63 - 1.")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keep_pages() -> None:
    """Tell glibc to keep freed memory: on a CPU each step else maps its large temporaries, and faults them in, anew."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def prefer_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, not yet written, on pages of 2 MiB where Linux gives them: long lines are read without look-ups."""
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE - begin
    if tensor.device.type == "cpu" and sys.platform == "linux" and size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), MADV_HUGEPAGE)
    return tensor


def start(device_type: str = "", seed: int = 42, training: bool = False) -> Runtime:
    """Look at the machine, join the process group if torchrun started us, seed; returns the Runtime.

    training: the process will train, which on some machines wants another compute dtype than answering.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    rank, local_rank, world = (int(os.environ[n]) for n in names) if all(n in os.environ for n in names) else (0, 0, 1)
    device = pick_device(device_type, local_rank)
    if world > 1 and device.type == "mps":
        raise UserError("Several processes can't share one MPS device: run without torchrun, or --device-type=cpu.")
    dtype, reason = pick_dtype(device, training)
    seed_everything(seed)
    if device.type == "cpu":
        keep_pages()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        extra = {"device_id": device} if backend == "nccl" else {}
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **extra)
    return Runtime(rank, local_rank, world, device, dtype, reason)


def stop(runtime: Runtime) -> None:
    """Leave the process group, if there is one."""
    if runtime.world > 1 and dist.is_initialized():
        dist.destroy_process_group()
