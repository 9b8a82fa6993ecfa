"""Kill the whole pocket recipe at random points, start it again, and see that it ends in the same place, bit for bit.

    python -m scripts.bench_recipe_kill                  # 8 runs killed twice each; 1 to 2 minutes a run on 2 cores
    python -m scripts.bench_recipe_kill --runs=2 --kills=1
    python -m scripts.bench_recipe_kill --start=DIR --runs=2 --kills=2     # RL at full size, after a finished run's SFT

runs/speedrun.sh at a tiny size (its sizes are environment variables) runs once untouched. Then each of --runs runs is
hit --kills times, by SIGKILL and SIGTERM in turn, sent to every process of the recipe: each time in another stage, at
a random moment of the time that the stage took untouched. The final weights of base, SFT and RL must have the same
bytes as those of the untouched run. So small a model earns no reward, so RL learns nothing in it; --start, the base
folder of a finished pocket run, lets the runs begin with that run's fine-tuned model, at its sizes. Writes
dev/bench/<date>_recipe_kill.json; the exit status is 1 if a run differs. (scripts.bench_kill kills single stages, more
often and on two ranks.)
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from nanochat import cli, hardware, paths, runtime
from nanochat.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "VOCAB": "600", "CHARS": "200000", "BASE_STEPS": "20", "SFT_STEPS": "14", "RL_STEPS": "6", "PROBLEMS": "16",
    "EVAL_TOKENS": "4096", "SAVE_EVERY": "5", "RL_SAVE_EVERY": "2",
}  # fmt: skip
KEPT = ("tokenizer", "base_checkpoints", "chatsft_checkpoints", "speedrun")
FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


@dataclasses.dataclass(frozen=True)
class Config:
    """How often to kill."""

    runs: int = 8  # runs that are killed
    kills: int = 2  # times a run is killed
    seed: int = 1  # of the moments
    start: str = ""  # base folder of a finished pocket run, to go on from after its SFT; empty: tiny, from nothing
    most_seconds: int = 1800  # of one run, kills included
    out: str = ""  # file of the results; empty: dev/bench/<date>_recipe_kill.json


@dataclasses.dataclass
class Recipe:
    """The recipe as a process group, its output in a file."""

    base: Path
    process: subprocess.Popen
    said: Path

    @classmethod
    def start(cls, base: Path, finished: str = "") -> "Recipe":
        """Start it in `base`, which gets what the finished run had after SFT if it is new."""
        if finished and not base.exists():
            for name in KEPT:
                shutil.copytree(Path(finished) / name, base / name)
            for name in ("chat_rl", "chat_eval_rl"):
                (base / "speedrun" / name).unlink(missing_ok=True)
        base.mkdir(parents=True, exist_ok=True)
        said = base / "output.log"
        own = {"POCKET": "1", "SKIP_SETUP": "1", "NANOCHAT_BASE_DIR": str(base), "PYTHONUNBUFFERED": "1"}
        sizes = {} if finished else TINY
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with open(said, "a", encoding="utf-8") as file:
            process = subprocess.Popen(
                ["bash", str(ROOT / "runs" / "speedrun.sh")], cwd=ROOT, env=os.environ | sizes | own | {"PATH": path},
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return cls(base, process, said)

    def lines(self) -> list[str]:
        return self.said.read_text(encoding="utf-8", errors="replace").splitlines()

    def stages(self) -> list[str]:
        """The stages begun so far, in order, those that were done before left out."""
        heads = [line[3:].split(": ", 1) for line in self.lines() if line.startswith("== ")]
        return [name for name, what in heads if what != "done before"]

    def ends_within(self, seconds: float) -> bool:
        """Wait so long, or until the recipe ends by itself: whether it did."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self, signum: int) -> int:
        """Hit the whole group and wait; what is left after a minute is killed. Returns the recipe's exit status."""
        os.killpg(self.process.pid, signum)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


def weights(base: Path) -> dict[str, str]:
    """sha256 of the newest weights of each stage."""
    found = {}
    for stage, folder in FOLDERS.items():
        steps = sorted((base / folder / "pocket").glob("step_*"))
        files = sorted(steps[-1].glob("model*.safetensors")) if steps else []
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else "none"
        found[stage] = f"{steps[-1].name if steps else ''} {digest}"
    return found


def untouched(base: Path, cfg: Config) -> tuple[dict[str, str], dict[str, float]]:
    """(weights, seconds of each stage) of a run that nobody disturbs."""
    recipe, began = Recipe.start(base, cfg.start), {}
    first = time.monotonic()
    while recipe.process.poll() is None and time.monotonic() - first < cfg.most_seconds:
        for name in recipe.stages():
            began.setdefault(name, time.monotonic())
        time.sleep(0.1)
    if recipe.process.returncode != 0:
        recipe.kill(signal.SIGKILL)
        raise UserError(f"The untouched run ended with {recipe.process.returncode}: read {recipe.said}.")
    ends = [*list(began.values())[1:], time.monotonic()]
    return weights(base), {name: end - start for (name, start), end in zip(began.items(), ends, strict=True)}


def disturbed(base: Path, plan: list[tuple[str, float, int]], cfg: Config) -> tuple[list[dict], dict[str, str]]:
    """(what each kill met, weights at the end) of a run hit at `plan`: (stage, seconds after its start, signal)."""
    told, first = [], time.monotonic()
    for stage, delay, signum in plan:
        recipe = Recipe.start(base, cfg.start)
        before = recipe.stages().count(stage)
        while recipe.process.poll() is None and recipe.stages().count(stage) <= before:
            time.sleep(0.1)
        ended = recipe.ends_within(delay)
        status = recipe.process.returncode if ended else recipe.kill(signum)
        told.append({"stage": stage, "seconds": round(delay, 2), "signal": signal.Signals(signum).name,
                     "in": (recipe.stages() or [""])[-1], "status": status})  # fmt: skip
        if time.monotonic() - first > cfg.most_seconds:
            break
    last = Recipe.start(base, cfg.start)
    status = last.process.wait(cfg.most_seconds)
    told.append({"stage": "to the end", "status": status, "done before": sum("done before" in x for x in last.lines())})
    return told, weights(base)


def main(cfg: Config) -> dict:
    """Run, kill, compare, write; returns what it writes."""
    if min(cfg.runs, cfg.kills, cfg.most_seconds) < 1:
        raise UserError("--runs, --kills and --most-seconds must each be at least 1.")
    rng, results = random.Random(cfg.seed), []
    with tempfile.TemporaryDirectory(prefix="recipe_kill_") as folder:
        wanted, seconds = untouched(Path(folder) / "untouched", cfg)
        print(f"untouched: {sum(seconds.values()):.0f} s: " + ", ".join(f"{n} {s:.1f}" for n, s in seconds.items()))
        names, count = list(seconds), 0
        for run in range(cfg.runs):
            places = sorted((count + k) * 3 % len(names) for k in range(cfg.kills))
            signals = [(signal.SIGKILL, signal.SIGTERM)[(count + k) % 2] for k in range(cfg.kills)]
            plan = [(names[at], rng.random() * seconds[names[at]], s) for at, s in zip(places, signals, strict=True)]
            count += cfg.kills
            told, got = disturbed(Path(folder) / f"run{run}", plan, cfg)
            same = got == wanted and told[-1]["status"] == 0
            results.append({"kills": told, "same": same, "weights": got})
            print(f"run {run}: {'the same' if same else 'DIFFERENT'}: {told}", flush=True)
    whole = {
        "date": date.today().isoformat(), "command": "python -m scripts.bench_recipe_kill " + " ".join(sys.argv[1:]),
        "hardware": hardware.device_name(runtime.pick_device("cpu")), "sizes": "full" if cfg.start else TINY,
        "seconds": seconds,
        "untouched": wanted, "runs": results, "same": sum(r["same"] for r in results), "of": len(results),
    }  # fmt: skip
    out = Path(cfg.out) if cfg.out else ROOT / "dev" / "bench" / f"{date.today().isoformat()}_recipe_kill.json"
    paths.write_json(out, whole)
    print(json.dumps({"same": whole["same"], "of": whole["of"], "written": str(out)}))
    if whole["same"] < whole["of"]:
        raise UserError(f"{whole['of'] - whole['same']} of {whole['of']} runs ended elsewhere: see {out}.")
    return whole


if __name__ == "__main__":
    cli.run(main, Config)
