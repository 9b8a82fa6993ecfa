"""What devices can do on paper: peak matmul FLOP/s and memory bytes/s by name, from data sheets (dense)."""

import datetime
import os
import platform
from pathlib import Path

import torch

# (part of the device's name in lower case, bf16 dense FLOP/s, memory bytes/s); the first row that matches wins, so the
# more particular name stands first. Sources: the vendors' data sheets; fp8 is twice bf16 where there is fp8.
PEAKS = [
    ("gb200", 2.5e15, 8.0e12),  # NVIDIA GB200 data sheet
    ("b200", 2.25e15, 8.0e12),  # NVIDIA DGX B200 data sheet
    ("b100", 1.8e15, 8.0e12),
    ("h200 nvl", 836e12, 4.8e12),  # NVIDIA H200 data sheet
    ("h200", 989e12, 4.8e12),
    ("h100 nvl", 835e12, 3.9e12),  # NVIDIA H100 data sheet
    ("h100 pcie", 756e12, 2.0e12),
    ("h100", 989e12, 3.35e12),
    ("h800 nvl", 989e12, 3.35e12),
    ("h800", 756e12, 2.0e12),
    ("a100", 312e12, 2.0e12),  # NVIDIA A100 data sheet (80 GB)
    ("a800", 312e12, 2.0e12),
    ("a40", 149.7e12, 0.696e12),
    ("a30", 165e12, 0.933e12),
    ("l40s", 362e12, 0.864e12),
    ("l4", 121e12, 0.3e12),
    ("mi355", 2.5e15, 8.0e12),  # AMD Instinct data sheets
    ("mi325", 1.3074e15, 6.0e12),
    ("mi300a", 980.6e12, 5.3e12),
    ("mi300", 1.3074e15, 5.3e12),
    ("mi250x", 383e12, 3.28e12),
    ("mi250", 362.1e12, 3.28e12),
    ("5090", 209.5e12, 1.79e12),  # NVIDIA RTX white papers (fp32 accumulation)
    ("4090", 165.2e12, 1.01e12),
    ("3090", 71e12, 0.936e12),
]


def _row(name: str) -> tuple[str, float, float] | None:
    return next((row for row in PEAKS if row[0] in name.lower()), None)


def peak_flops(name: str, fp8: bool = False) -> float | None:
    """Dense bf16 (or fp8) FLOP/s of a device by its name; None when the table does not know it."""
    row = _row(name)
    return None if row is None else row[1] * (2 if fp8 else 1)


def peak_bandwidth(name: str) -> float | None:
    """Memory bytes/s of a device by its name; None when the table does not know it."""
    row = _row(name)
    return None if row is None else row[2]


# (part of the name in lower case, GiB of one device), from the same data sheets; the smaller one where there are two
MEMORIES = [("gb200", 186), ("b200", 180), ("b100", 180), ("h200", 141), ("h100 nvl", 94), ("h100", 80), ("h800", 80),
            ("a100", 40), ("a800", 80), ("a40", 48), ("a30", 24), ("l40s", 48), ("l4", 24), ("mi355", 288),
            ("mi325", 256), ("mi300a", 128), ("mi300", 192), ("mi250", 128), ("5090", 32),
            ("4090", 24), ("3090", 24)]  # fmt: skip


def memory_of(name: str) -> int | None:
    """Bytes of memory of a device by its name (nominal: the driver keeps a little); None when the table lacks it."""
    return next((gib * 2**30 for part, gib in MEMORIES if part in name.lower()), None)


USABLE = 0.85  # share of a device's memory that a plan may fill: fragments, libraries and others use some


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory of the device here: its own on CUDA, else the machine's; None where it can't be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory_bytes() or None


def device_name(device: torch.device) -> str:
    """The device's marketing name, e.g. "NVIDIA H100 80GB HBM3"; the processor's name for CPU and MPS."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """The processor's name as it gives it (Linux), else what the platform says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Main memory of this machine; 0 where it can't be asked."""
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    if not hasattr(os, "sysconf") or any(name not in os.sysconf_names for name in names):
        return 0
    return os.sysconf(names[0]) * os.sysconf(names[1])


def about() -> dict[str, str]:
    """Date and machine, as the head of a report or a measurement."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = f"{count} x {torch.cuda.get_device_name(0)}, " if count else ""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{devices}{cores()} cores of {cpu_name()}, {memory_bytes() / 2**30:.0f} GiB",
        "software": f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}",
    }
