"""Do 1, 2, 3 and 4 ranks learn the same? A step in fp64, 50 steps in fp32, with banks and with shards.

    python -m scripts.bench_worlds --output=dev/bench/2026-11-25_worlds.json       # gloo on this machine, a few minutes

Starts torchrun for each world size on a small model whose shapes divide by none of them. Compared with one rank: the
largest difference of any weight after 1 step (fp64; wanted 1e-10) and of the loss over the steps (fp32, relative;
wanted 1e-4), at an equal global batch. Then a chain: some steps on 4 ranks, the rest on 3, then 1, each from the last
one's state. Bytes are those a rank keeps between steps.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanochat import cli, hardware, paths, runtime, shard
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import ADAM_RULES, MuonAdamW

ROOT = Path(__file__).resolve().parents[1]
ROWS = 24  # of a global batch: a multiple of 1, 2, 3 and 4
RATES = dict.fromkeys(("matrix", *ADAM_RULES), 0.02)
CHAIN = (4, 3, 1)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 50  # updates in fp32
    worlds: str = "1,2,3,4"  # numbers of ranks
    full: bool = True  # also with parameters and gradients sharded (FSDP2)
    output: str = ""  # JSON file of the raw output; empty: printed only
    part: str = ""  # used by the script itself: what a rank does, "<banks or full> <first step> <end> <folder>"


def fresh(dtype: torch.dtype) -> GPT:
    """A small model of uneven shapes, alike on every rank, in which no gradient is zero."""
    model = GPT(GPTConfig(sequence_len=16, vocab_size=50, n_layer=3, n_head=3, n_kv_head=3, n_embd=30))
    model.init_weights(1)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=random))
    return model.to(dtype)


def learn(model: GPT, optimizer: MuonAdamW, rt: runtime.Runtime, first: int, end: int) -> list[float]:
    """Updates first..end-1 on this rank's share of the same rows, in two micro-batches -> losses over all ranks."""
    losses = []
    for step in range(first, end):
        random = torch.Generator().manual_seed(step)
        rows = (torch.randint(0, 50, (ROWS, 1), generator=random) + 3 * torch.arange(17)) % 50
        halves, total = rows[rt.rank :: rt.world].chunk(2), 0.0
        for half in halves:
            loss = model(half[:, :-1], half[:, 1:]) / len(halves)
            optimizer.backward(loss, last=half is halves[-1])
            total += loss.detach()
        losses.append(float(rt.mean(total)))
        optimizer.step(1.0, 0.9, 0.1)
        optimizer.zero_grad()
    return losses


def weights(model: GPT) -> dict[str, torch.Tensor]:
    """Whole weights; collective where they are sharded."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    return {name: (p.full_tensor() if shard.is_part(p) else p).contiguous() for name, p in state.items()}


def rank_part(kind: str, first: int, end: int, folder: Path) -> dict:
    """What each rank does: from the state in `folder`, or from nothing, to the state, losses and bytes there."""
    rt = runtime.start("cpu", 0)
    double, model = fresh(torch.float64), fresh(torch.float32)
    if (folder / "weights.safetensors").is_file():
        model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    for one in (double, model) if kind == "full" else ():
        shard.apply(one, rt)
    learn(double, MuonAdamW(double.roles(), RATES, rt), rt, 0, 1)
    optimizer = MuonAdamW(model.roles(), RATES, rt)
    if (folder / "moments.safetensors").is_file():
        optimizer.load_state(load_file(folder / "moments.safetensors"))
    rt.barrier()
    losses = learn(model, optimizer, rt, first, end)
    kept = {name: max(rt.gather(value)) for name, value in optimizer.bytes().items()}
    found = {"double": weights(double), "weights": weights(model), "moments": optimizer.state()}
    if rt.main:
        for name, tensors in found.items():
            save_file({k: t.clone() for k, t in tensors.items()}, folder / f"{name}.safetensors")
        paths.write_json(folder / "said.json", {"losses": losses, "bytes": kept})
    runtime.stop(rt)
    return {}


def launch(world: int, kind: str, first: int, end: int, folder: Path) -> dict:
    """Run `rank_part` on so many ranks; returns what it said and the fp64 weights."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
               "-m", "scripts.bench_worlds", "--", f"--part={kind} {first} {end} {folder}"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NANOCHAT_DTYPE": "float32"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{world} ranks failed: {done.stderr[-2000:]}")
    return paths.read_json(folder / "said.json") | {"double": load_file(folder / "double.safetensors")}


def apart(one: list[float], other: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a - b) / a for a, b in zip(one, other, strict=True))


def main(cfg: Config) -> dict:
    """Start all worlds, compare, print."""
    if cfg.part:
        kind, first, end, folder = cfg.part.split(" ", 3)
        return rank_part(kind, int(first), int(end), Path(folder))
    rows = []
    with tempfile.TemporaryDirectory(prefix="nanochat_worlds_") as name:
        root = Path(name)
        one = launch(1, "banks", 0, cfg.steps, root / "one")
        for world in map(int, cfg.worlds.split(",")):
            for kind in ("banks", "full") if cfg.full and world > 1 else ("banks",):
                said = launch(world, kind, 0, cfg.steps, root / f"{kind}{world}")
                off = max(float((one["double"][n] - said["double"][n]).abs().max()) for n in one["double"])
                rows.append({"ranks": world, "kind": kind, "fp64_weights_after_1_step": off, "bytes": said["bytes"],
                             "fp32_losses_relative": apart(one["losses"], said["losses"])})  # fmt: skip
        cuts = [round(cfg.steps * k / len(CHAIN)) for k in range(len(CHAIN) + 1)]
        chain = [loss for world, a, b in zip(CHAIN, cuts, cuts[1:], strict=False)
                 for loss in launch(world, "banks", a, b, root / "chain")["losses"]]  # fmt: skip
    summary = {
        "what": "differences from one rank at an equal global batch; gloo", "date": str(date.today()),
        "device": hardware.device_name(torch.device("cpu")), "torch": torch.__version__,
        "command": "python -m scripts.bench_worlds " + " ".join(sys.argv[1:]), "config": dataclasses.asdict(cfg),
        "worlds": rows, "chain": {"ranks": CHAIN, "fp32_losses_relative": apart(one["losses"], chain)},
    }  # fmt: skip
    if cfg.output:
        paths.write_json(Path(cfg.output), summary)
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
