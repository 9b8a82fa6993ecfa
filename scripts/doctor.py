"""Look at this machine, its packages, data, tokenizer and checkpoints, and say what to do. Status 1: it can't work.

    python -m scripts.doctor              # a few seconds
    python -m scripts.doctor --network    # also: can the hubs be reached?

Speed is measured (matmul, memory) and set against the table of data sheets. Nothing is changed.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import time
import tomllib
from pathlib import Path

import torch

from nanochat import attention, checkpoint, cli, dataset, execution, hardware, paths, record, runtime
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer, tokenizer_path

GOOD, WARN, BAD = "ok", "look", "BAD"
LEAST_FREE = 5e9  # bytes of disk below which a run will soon stop
HOSTS = ("huggingface.co", "openaipublic.blob.core.windows.net")  # data and models; tiktoken's vocabularies
SIZES = {"cuda": 8192, "cpu": 1024, "mps": 2048}  # of the square matmul that is timed


@dataclasses.dataclass(frozen=True)
class Config:
    device_type: str = ""  # cuda, mps or cpu; empty: the best there is
    speed: bool = True  # measure matmul and memory
    network: bool = False  # try to reach the hubs
    output: str = ""  # JSON file; empty: only print


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing looked at. `remedy` says what to do where it is not good."""

    name: str
    state: str  # GOOD, WARN or BAD
    text: str
    remedy: str = ""


def machine(device: torch.device) -> list[Finding]:
    """Processor or GPU, driver, dtypes."""
    about = hardware.about()
    found = [Finding("machine", GOOD, about["machine"]), Finding("software", GOOD, about["software"])]
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        driver = run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "unknown"
        found.append(Finding("gpu", GOOD, f"capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB, driver "
                                          f"{driver.splitlines()[0]}, CUDA {torch.version.cuda}"))  # fmt: skip
    elif shutil.which("nvidia-smi"):
        found.append(Finding("gpu", BAD, "there is an NVIDIA driver, but torch sees no GPU",
                             "install the CUDA build: uv sync --extra gpu"))  # fmt: skip
    for training, what in ((True, "training"), (False, "answering")):
        dtype, why = runtime.pick_dtype(device, training)
        found.append(Finding(f"dtype, {what}", GOOD, f"{dtype} ({why})"))
    return found


def run(command: list[str]) -> str:
    """The program's output, or "" if it can't be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except OSError:
        return ""


def backends(device: torch.device) -> list[Finding]:
    """Which attention is chosen, why the preferred ones are not, and what the training forward is."""
    dtype, _ = runtime.pick_dtype(device, training=True)
    chosen = attention.choose(device, dtype)
    passed = "".join(f"; {name} not: {why}" for name, why in chosen.passed_over)
    found = [Finding("attention", GOOD, chosen.name + passed)]
    if device.type == "cuda":
        triton = importlib.util.find_spec("triton") is not None
        found.append(Finding("compiler", GOOD if triton else WARN, "triton is there" if triton else "triton is missing",
                             "" if triton else "training runs uncompiled: install triton"))  # fmt: skip
    return found


def cage() -> Finding:
    """Can code that a model writes be run?"""
    try:
        return Finding("cage for code", GOOD, execution.isolation())
    except UserError as error:
        return Finding("cage for code", WARN, str(error).partition(": allow")[0],
                       "HumanEval is left out; allow user namespaces, or install bubblewrap")  # fmt: skip


def timed(work, synchronize) -> float:
    """Seconds of the fastest of five, after one to warm up."""
    work()
    best = float("inf")
    for _ in range(5):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def speed(device: torch.device) -> list[Finding]:
    """Measured matmul FLOP/s and memory bytes/s beside the data sheet's."""
    rt = dataclasses.replace(runtime.Runtime.single(), device=device)
    dtype, _ = runtime.pick_dtype(device, training=True)
    n = SIZES[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * n**3 / timed(lambda: a @ b, rt.synchronize)
    source = torch.empty(2**28 if device.type == "cuda" else 2**25, dtype=torch.float32, device=device).fill_(1)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / timed(lambda: target.copy_(source), rt.synchronize)
    name = hardware.device_name(device)
    return [compare(f"matmul, {str(dtype).removeprefix('torch.')}", flops, hardware.peak_flops(name), 1e12, "TFLOP/s"),
            compare("memory", moved, hardware.peak_bandwidth(name), 1e9, "GB/s")]  # fmt: skip


def compare(name: str, measured: float, peak: float | None, unit: float, label: str) -> Finding:
    """A rate against its peak; under half of it is worth a look."""
    text = f"{measured / unit:.3g} {label}"
    if peak is None:
        return Finding(name, GOOD, f"{text} (no data sheet for this device)")
    share = measured / peak
    remedy = "" if share >= 0.5 else "something else uses the device, or it is hot or power-capped: see nvidia-smi"
    return Finding(name, GOOD if share >= 0.5 else WARN, f"{text}, {100 * share:.0f} % of {peak / unit:.3g}", remedy)


def packages() -> list[Finding]:
    """What pyproject.toml asks for and is not there."""
    try:
        needs = importlib.metadata.requires("nanochat") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        needs = tomllib.loads(project.read_text())["project"]["dependencies"] if project.exists() else []
    names = [re.split(r"[ ;<>=!~\[(]", need)[0] for need in needs if "extra ==" not in need]
    missing = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return [Finding("packages", BAD, f"missing: {', '.join(missing)}", "run: uv sync --extra cpu (or --extra gpu)")]
    return [Finding("packages", GOOD, f"all {len(names)} are there")]


def storage() -> list[Finding]:
    """The artefact folder and its disk."""
    base = paths.base_dir()
    free = paths.free_bytes(base)
    state = GOOD if free > LEAST_FREE else WARN
    remedy = "" if state == GOOD else "free some space, or set NANOCHAT_BASE_DIR to a larger disk"
    found = [Finding("disk", state, f"{free / 1e9:.0f} GB free in {base}", remedy)]
    if not os.access(base, os.W_OK):
        found.append(Finding("artefacts", BAD, f"{base} can't be written", "set NANOCHAT_BASE_DIR to your own"))
    return found


def artefacts() -> list[Finding]:
    """Tokenizer, data, checkpoints."""
    found = []
    try:
        tokenizer = Tokenizer.load()
        corpus = tokenizer.meta.get("dataset", {}).get("dataset", "unknown")
        found.append(Finding("tokenizer", GOOD, f"{tokenizer.vocab_size:,} tokens, trained on {corpus}"))
        found.append(data(corpus))
    except UserError as error:
        there = tokenizer_path().exists()
        found.append(Finding("tokenizer", BAD if there else WARN, str(error), "python -m scripts.tok_train"))
    for stage, folder in checkpoint.FOLDERS.items():
        for root in sorted((paths.base_dir() / folder).glob("*/")):
            found.append(run_state(stage, root))
    return found


def data(corpus: str) -> Finding:
    """Can the tokenizer's corpus be opened?"""
    try:
        opened = dataset.open_corpus(corpus)
        return Finding("data", GOOD, f"{corpus}: {len(opened.shards('train')):,} training shards")
    except UserError as error:
        return Finding("data", WARN, str(error), "python -m nanochat.dataset -n 8, or --dataset=FOLDER")


def run_state(stage: str, root: Path) -> Finding:
    """A run's checkpoints: the newest step, half ones, whether the manifest is whole."""
    name, steps, half = f"{stage} {root.name}", checkpoint.complete_steps(root), checkpoint.leftovers(root)
    if not steps:
        return Finding(name, WARN, "no complete checkpoint", "train, or resume it with --resume")
    try:
        checkpoint.load(root / f"step_{steps[-1]:06d}")
    except UserError as error:
        return Finding(name, BAD, str(error), "look at older steps; --resume passes over damaged ones")
    more = f", {len(half)} half ones" if half else ""
    return Finding(name, GOOD, f"step {steps[-1]}{more}")


def network() -> list[Finding]:
    """Can the hubs' hosts be connected to?"""
    found = []
    for host in HOSTS:
        try:
            socket.create_connection((host, 443), timeout=5).close()
            found.append(Finding(f"network {host}", GOOD, "reachable"))
        except OSError as error:
            found.append(Finding(f"network {host}", WARN, f"not reachable ({error})",
                                 "work offline: --dataset=tinyworld or a folder needs no network"))  # fmt: skip
    return found


def main(cfg: Config) -> dict:
    """Look, print, write; exit status 1 if something is BAD."""
    device = runtime.pick_device(cfg.device_type)
    found = [*machine(device), *packages(), *backends(device), cage()]
    found += speed(device) if cfg.speed else []
    found += [*storage(), *artefacts(), *(network() if cfg.network else [])]
    for one in found:
        print(f"{one.state:<5}{one.name:<21} {one.text}")
        if one.remedy:
            print(f"{'':<27}-> {one.remedy}")
    bad = [one.name for one in found if one.state == BAD]
    print(f"\n{'Not ready: ' + ', '.join(bad) if bad else 'Ready.'}")
    if cfg.output:
        paths.write_json(Path(cfg.output), record.plain([dataclasses.asdict(one) for one in found]))
    if bad:
        raise UserError(f"{len(bad)} thing(s) must be put right: {', '.join(bad)}.")
    return {"findings": found}


if __name__ == "__main__":
    cli.run(main, Config)
