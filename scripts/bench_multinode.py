"""Two "hosts" on one machine lose each other in mid-run, and the run must end as if nothing had happened.

    sudo python -m scripts.bench_multinode --output=dev/bench/2026-11-25_multinode.json    # about 3 minutes, 2 cores

Each host is a network namespace (`ip netns`, so root is needed; they meet over a veth pair) that runs the recipe,
runs/multinode.sh, and has a disk of its own: NANOCHAT_BASE_DIR is not shared, so a checkpoint exists only where rank 0
ran and must be sent. A host is killed with SIGKILL, agent and workers at once, and started again with the very same
command; the other host's agent restarts its worker and waits (c10d rendezvous). Compared: the final weights with those
of a run that was left alone, bit for bit, and the loss of every step that was taken twice.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file

from nanochat import cli, hardware, paths
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # this Python's torchrun
ADDRESS = "10.77.{}.{}"  # of a pair of hosts: network, host 1 or 2
TRAIN = (
    "--dataset=tinyworld --depth=2 --aspect-ratio=16 --head-dim=16 --max-seq-len=64 --window-pattern=L --compile=off "
    "--device-batch-size=4 --total-batch-size=512 --eval-every=-1 --eval-tokens=0 --core-metric-every=-1 "
    "--sample-every=-1 --keep=-1 --model-tag=hosts"
)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 40  # updates of each run
    save_every: int = 5  # updates between checkpoints
    kills: int = 2  # times that the second host is killed, evenly over the run
    down: float = 3.0  # seconds before it is started again
    timeout: float = 400.0  # seconds a run may take before it counts as hung
    output: str = ""  # JSON file of the raw output; empty: printed only


class Hosts:
    """Two namespaces that see each other only over one wire; entering makes them, leaving removes them."""

    def __init__(self, number: int):
        self.names = [f"nanochat{number}a", f"nanochat{number}b"]
        self.wires = [f"nc{number}a", f"nc{number}b"]
        self.ips = [ADDRESS.format(number % 250, host) for host in (1, 2)]

    def __enter__(self) -> "Hosts":
        self.__exit__()
        for name in self.names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", self.wires[0], "type", "veth", "peer", "name", self.wires[1])
        for name, wire, ip in zip(self.names, self.wires, self.ips, strict=True):
            run("ip", "link", "set", wire, "netns", name)
            run("ip", "-n", name, "addr", "add", f"{ip}/24", "dev", wire)
            for device in (wire, "lo"):
                run("ip", "-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def start(self, host: int, base: Path, cfg: Config, log: Path) -> subprocess.Popen:
        """The recipe on one host: an agent in a process group of its own, with its worker."""
        train = [*TRAIN.split(), f"--num-iterations={cfg.steps}", f"--save-every={cfg.save_every}"]
        command = ["ip", "netns", "exec", self.names[host], "bash", "runs/multinode.sh", *train]
        env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "GLOO_SOCKET_IFNAME": self.wires[host], "SKIP_SETUP": "1",
               "HEAD": self.ips[0], "NODES": "2", "GPUS": "1", "HEARTBEAT": "1", "AGENT": "--monitor-interval=0.3",
               "OMP_NUM_THREADS": "1", "NANOCHAT_DTYPE": "float32", "PYTHONPATH": str(ROOT), "PATH": PATH}  # fmt: skip
        with open(log, "a") as out:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)


def run(*command: str) -> None:
    """Run a command of iproute2; what it refuses is a UserError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` was refused ({done.stderr.strip()}): network namespaces need root.")


def why_not() -> str | None:
    """Why two hosts can't be made here, or None."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "needs Linux and iproute2 (`ip`)"
    try:
        with Hosts(os.getpid()):
            return None
    except UserError as error:
        return str(error)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL an agent and its workers, which torchrun starts in sessions of their own."""
    tree = [process.pid]
    for pid in tree:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            tree += map(int, task.read_text().split())
    for pid in tree:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def losses(base: Path) -> dict[int, list[float]]:
    """Every loss that a run's record holds, by step: two where a step was taken twice."""
    path = base / "base_checkpoints" / "hosts" / "record.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["kind"] == "step":
            found.setdefault(row["step"], []).append(row["loss"])
    return found


def train_on(hosts: Hosts, folder: Path, cfg: Config, kills: int) -> dict:
    """One run on both hosts, the second of which is killed so often -> what is left of it."""
    bases = [folder / "a", folder / "b"]
    for base in bases:
        base.mkdir(parents=True)
        shutil.copytree(folder.parent / "tokenizer", base / "tokenizer")
    logs = [folder / "a.log", folder / "b.log"]
    agents = [hosts.start(host, bases[host], cfg, logs[host]) for host in (0, 1)]
    began, left = time.monotonic(), [round(cfg.steps * (k + 1) / (kills + 1)) for k in range(kills)]
    killed = []
    try:
        while any(agent.poll() is None for agent in agents):
            time.sleep(0.05)
            if time.monotonic() - began > cfg.timeout:
                raise UserError(f"the run hangs: see {logs[0]} and {logs[1]}.")
            if left and max(losses(bases[0]), default=0) >= left[0]:
                kill(agents[1])
                killed.append({"step": max(losses(bases[0])), "seconds": time.monotonic() - began})
                left.pop(0)
                time.sleep(cfg.down)
                agents[1] = hosts.start(1, bases[1], cfg, logs[1])
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill(agent)
    codes = [agent.returncode for agent in agents]
    if any(codes):
        raise UserError(f"agents left with {codes}: {logs[0].read_text()[-1500:]}")
    seen = losses(bases[0])
    return {
        "seconds": round(time.monotonic() - began, 1), "killed": killed, "exit_codes": codes,
        "steps_taken_twice": sum(len(values) > 1 for values in seen.values()),
        "of_those_equal": sum(len(values) > 1 and len(set(values)) == 1 for values in seen.values()),
        "checkpoints_sent": sorted(p.name for p in (bases[1] / "base_checkpoints/hosts").glob("step_*")),
        "losses": [values[-1] for _, values in sorted(seen.items())],
        "weights": str(bases[0] / "base_checkpoints/hosts" / f"step_{cfg.steps:06d}" / "model.safetensors"),
    }  # fmt: skip


def main(cfg: Config) -> dict:
    """Train once in peace and once with kills; returns and writes both and their difference."""
    reason = why_not()
    if reason:
        raise UserError(f"Two hosts can't be made here: {reason}.")
    with tempfile.TemporaryDirectory(prefix="nanochat_hosts_") as folder, Hosts(os.getpid()) as hosts:
        Tokenizer.from_ranks([bytes([i]) for i in range(256)]).save(Path(folder) / "tokenizer")
        peace = train_on(hosts, Path(folder) / "peace", cfg, 0)
        war = train_on(hosts, Path(folder) / "war", cfg, cfg.kills)
        one, two = load_file(peace.pop("weights")), load_file(war.pop("weights"))
        different = [name for name in one if not torch.equal(one[name], two[name])]
    summary = {
        "what": "two hosts (network namespaces, own disks), the second killed with SIGKILL and brought back",
        "date": str(date.today()), "device": hardware.device_name(torch.device("cpu")), "torch": torch.__version__,
        "command": "python -m scripts.bench_multinode " + " ".join(sys.argv[1:]), "config": dataclasses.asdict(cfg),
        "tensors": len(one), "tensors_that_differ": different, "losses_equal": peace["losses"] == war["losses"],
        "uninterrupted": peace, "killed": war,
    }  # fmt: skip
    if cfg.output:
        paths.write_json(Path(cfg.output), summary)
    print(json.dumps({k: v for k, v in summary.items() if k not in ("uninterrupted", "killed")}))
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
