"""Read a run's record and say what is odd about its loss: NaN, spikes, plateau, divergence; with a picture.

    python -m scripts.debug_loss                          # the newest base run
    python -m scripts.debug_loss -i sft --model-tag=pocket

For each finding: the step, what else changed there (learning rate, epoch or shard of the data, gradient norm) and what
to do. Ends with the loss that was to be expected: ln V at the first step, and the bits per byte of comparable runs.
"""

import dataclasses
import math
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro

from nanochat import checkpoint, cli, paths, record, report
from nanochat.errors import UserError

# Expected validation bpb by corpus and depth, with its source. Only runs on the same corpus can be compared.
EXPECTED = [
    ("climbmix", 24, 0.71800, "published leaderboard, 8xH100, ratio 8, fp8, mean of 5 runs (July 2026)"),
    ("tinyworld", 4, 0.3727, "pocket run of 2026-11-25, width 128, 1,300 updates: dev/LOG.md"),
]
WINDOW = 64  # steps before a step that say what is usual there
SPIKE_DEVIATIONS, SPIKE_SHARE = 8.0, 0.05  # a spike stands out by so many deviations, and by this share of the loss
DIVERGED_SHARE = 0.05  # the loss ends this much above its best
FLAT_SHARE = 0.005  # a quarter of the run that improves by less than this is a plateau
FLAT_LR = 0.2  # ... unless the learning rate was below this share of its peak, where little is to be expected
NEAR = 2  # steps around a finding in which a boundary counts as its companion
SLOW = 0.5  # share of the usual speed below which a stretch is reported


@dataclasses.dataclass(frozen=True)
class Config:
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "base"  # base, sft or rl
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""  # which run; empty: the newest of that stage
    record: str = ""  # a record.jsonl to read instead
    output: str = ""  # PNG; empty: loss.png beside the record


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something odd: what, where (step), the sentence for people, and what to do about it."""

    kind: str
    step: int | None
    text: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Curve:
    """The training steps of a record, in order; lists of one length. Values that were not recorded are None."""

    step: list[int]
    loss: list[float | None]
    smooth: list[float | None]
    lr: list[float | None]
    norm: list[float | None]
    speed: list[float | None]
    where: list[tuple]  # (epoch, shard) of the data

    def index(self, step: int) -> int:
        return self.step.index(step)


def curve(rows: list[dict]) -> Curve:
    """The steps of a record."""
    steps = [row for row in rows if row["kind"] == "step"]
    column = lambda name: [row.get(name) for row in steps]
    where = [(row.get("epoch"), row.get("shard")) for row in steps]
    names = ("loss", "smooth_loss", "lr", "grad_norm", "tokens_per_second")
    return Curve(column("step"), *map(column, names), where)


# -- findings ----------------------------------------------------------------------------------------------------------


def not_finite(c: Curve, rows: list[dict]) -> list[Finding]:
    """Where the loss stopped being a number, or the run ended with an error."""
    found = []
    for step, loss in zip(c.step, c.loss):
        if loss is None or not math.isfinite(loss):
            remedy = "resume from the checkpoint before it with half the rates (--matrix-lr, --embedding-lr)."
            found.append(Finding("nan", step, f"the loss is not a number{companions(c, step)}", remedy))
            break
    for row in rows:
        if row["kind"] == "failed":
            step = c.step[-1] if c.step else None
            kind = "nan" if any(word in row["message"] for word in ("nan", "inf", "not finite")) else "failed"
            found.append(Finding(kind, step, f"the run ended: {row['message'].splitlines()[0]}", "see that sentence."))
    return found


def spikes(c: Curve) -> list[Finding]:
    """Stretches in which the loss stands far above what is usual before them."""
    found, last = [], -1
    for i, loss in enumerate(c.loss):
        before = [x for x in c.loss[max(0, i - WINDOW) : i] if x is not None]
        if loss is None or len(before) < WINDOW // 4:
            continue
        middle = median(before[-WINDOW // 4 :])
        spread = 1.4826 * median(abs(a - b) for a, b in zip(before[1:], before)) / math.sqrt(2)  # of neighbours
        height = loss - middle
        if height <= max(SPIKE_DEVIATIONS * spread, SPIKE_SHARE * middle) or i <= last:
            continue
        back = next(
            (j for j in range(i, len(c.loss)) if c.loss[j] is not None and c.loss[j] < middle + height / 10), None
        )
        last = len(c.loss) if back is None else back
        until = "and did not come back" if back is None else f"and was back after {back - i} steps"
        text = f"the loss rose from {middle:.3f} to {loss:.3f} {until}{companions(c, c.step[i])}"
        remedy = (
            "one spike that heals is harmless; several: lower --matrix-lr, or look at that data (scripts.verify_data)."
        )
        found.append(Finding("spike", c.step[i], text, remedy))
    return found


def companions(c: Curve, step: int) -> str:
    """What else changed within NEAR steps: gradient norm, learning rate, epoch or shard; as the end of a sentence."""
    i = c.index(step)
    said = []
    norms = [x for x in c.norm[max(0, i - WINDOW) : i] if x is not None]
    if norms and c.norm[i] is not None and c.norm[i] > 3 * median(norms):
        said.append(f"the gradient norm is {c.norm[i] / median(norms):.1f} times the usual")
    for j in range(max(1, i - NEAR), min(len(c.step), i + NEAR + 1)):
        if c.where[j] != c.where[j - 1] and None not in (c.where[j][0], c.where[j - 1][0]):
            what = "epoch" if c.where[j][0] != c.where[j - 1][0] else "shard"
            number = c.where[j][0] if what == "epoch" else c.where[j][1]
            said.append(f"the data reached {what} {number} at step {c.step[j]}")
    said += [f"{what} at step {at}" for at, what in boundaries(c) if abs(at - step) <= NEAR]
    return f" ({'; '.join(said)})" if said else " (no boundary of data or learning rate is near)"


def boundaries(c: Curve) -> list[tuple[int, str]]:
    """(step, what) where the learning rate changes its course: end of the warm-up, start of the warm-down, a jump."""
    out = []
    for i in range(1, len(c.step) - 1):
        a, b, d = c.lr[i - 1 : i + 2]
        if None in (a, b, d):
            continue
        if a < b and not b < d:
            out.append((c.step[i], "the warm-up ended"))
        elif abs(a - b) < 1e-12 and d < b:
            out.append((c.step[i], "the warm-down began"))
        elif a and abs(b - a) > 0.2 * a and b < a:
            out.append((c.step[i], f"the learning rate jumped from x {a:.3f} to x {b:.3f}"))
    return out


def divergence(c: Curve) -> list[Finding]:
    """The loss ends clearly above its best, by medians of a twentieth of the run, and further than its noise."""
    known = [(s, x) for s, x in zip(c.step, c.loss) if x is not None]
    size = max(len(known) // 20, 16)
    if len(known) < 4 * size:
        return []
    parts = [known[i : i + size] for i in range(len(known) % size, len(known), size)]
    middles = [(median(x for _, x in part), part[-1][0]) for part in parts]
    (best, step), (end, _) = min(middles), middles[-1]
    noise = median(abs(x - end) for _, x in parts[-1])
    if end < best * (1 + DIVERGED_SHARE) or end < best + noise:
        return []
    text = f"the loss was {best:.3f} until step {step} and ends at {end:.3f}{companions(c, step)}"
    remedy = "the rates are too high for this batch: halve them, or raise --total-batch-size; resume before that step."
    return [Finding("divergence", step, text, remedy)]


def plateau(c: Curve) -> list[Finding]:
    """A quarter of the run, at a learning rate worth the name, in which nothing was learnt."""
    known = [(s, x, lr) for s, x, lr in zip(c.step, c.smooth, c.lr) if x is not None]
    size = len(known) // 4
    if size < 16:
        return []
    peak = max((lr for *_, lr in known if lr is not None), default=0)
    for begin in range(0, len(known) - size + 1, size):
        part = known[begin : begin + size]
        third = max(size // 3, 1)
        first, last = (median(x for _, x, _ in piece) for piece in (part[:third], part[-third:]))
        awake = all(lr is None or lr >= FLAT_LR * peak for *_, lr in part)
        if awake and abs(first - last) < FLAT_SHARE * first:
            text = f"the loss stayed at {last:.3f} from step {part[0][0]} to {part[-1][0]}"
            return [Finding("plateau", part[0][0], text, PLATEAU)]
    return []


PLATEAU = (
    "rates too low (compare with another run: scripts.report), the data too easy or repeated (scripts.verify_data), or "
    "the model too small: a larger --depth."
)


def overfitting(rows: list[dict]) -> list[Finding]:
    """Validation rises while training falls."""
    steps, values = report.evals(rows, "val_bpb")
    if len(values) < 3 or values[-1] <= 1.01 * min(values):
        return []
    best = steps[values.index(min(values))]
    text = f"validation bpb was {min(values):.4f} at step {best} and ends at {values[-1]:.4f}"
    return [Finding("overfitting", best, text, "more data or fewer steps: the model repeats what it has seen.")]


def slowness(c: Curve) -> list[Finding]:
    """Stretches at less than half the usual speed: not a matter of the loss, but often asked with it."""
    known = [(s, v) for s, v in zip(c.step, c.speed) if v][10:]
    if len(known) < WINDOW:
        return []
    usual = median(v for _, v in known)
    slow = [s for s, v in known if v < SLOW * usual]
    if len(slow) < len(known) / 10:
        return []
    text = (
        f"{len(slow)} of {len(known)} steps ran at less than half the usual {usual:,.0f} tokens/s, first step {slow[0]}"
    )
    return [Finding("slow", slow[0], text, "something else used the machine, or the disk waited: scripts.doctor.")]


def diagnose(rows: list[dict]) -> list[Finding]:
    """Every finding of a record, in order of steps."""
    c = curve(rows)
    if not c.step:
        raise UserError("The record has no training step yet: wait for the first, or name another run.")
    if "loss" not in next(row for row in rows if row["kind"] == "step"):
        raise UserError("The record has rewards and no losses: `python -m scripts.report` draws those.")
    found = not_finite(c, rows) + spikes(c) + divergence(c) + plateau(c) + overfitting(rows) + slowness(c)
    return sorted(found, key=lambda finding: -1 if finding.step is None else finding.step)


# -- what was to be expected -------------------------------------------------------------------------------------------


def expected(rows: list[dict], tag: str, others: dict[str, list[dict]]) -> list[str]:
    """Sentences that compare a base run's first loss with ln V, and validation bpb with runs of the same stage."""
    config, c, out = shape_of(rows), curve(rows), []
    if config and c.step[0] == 0 and c.loss[0] is not None:
        ideal = math.log(config["vocab_size"])
        verdict = (
            "as it should be" if abs(c.loss[0] - ideal) < 0.05 * ideal else "NOT as it should be: look at the data"
        )
        out.append(f"first loss {c.loss[0]:.3f}, ln V = {ideal:.3f}: {verdict}.")
    bpb = report.scores(rows).get("val_bpb")
    if bpb is None:
        return [*out, "no validation bpb in the record: nothing to compare it with."]
    corpus, depth = corpus_of(rows), config.get("n_layer", 0)
    fits = [(abs(d - depth), f"depth {d} on {corpus}", value, why) for name, d, value, why in EXPECTED
            if config and name == corpus]  # fmt: skip
    for other, lines in others.items():
        value = report.scores(lines).get("val_bpb")
        if value is not None and corpus_of(lines) == corpus and other != tag:
            away = abs(shape_of(lines).get("n_layer", depth) - depth)
            fits.append((away, f"run {other}", value, f"{len(curve(lines).step):,} steps, in this folder"))
    out += [f"val bpb {bpb:.4f}; {what}: {v:.4f} ({bpb - v:+.4f}; {why})." for _, what, v, why in sorted(fits)[:3]]
    return out if fits else [*out, f"val bpb {bpb:.4f}; no figure on {corpus or 'this corpus'} to compare it with."]


def shape_of(rows: list[dict]) -> dict[str, Any]:
    """The model's configuration, as a base run's plan tells it; empty for other stages."""
    return next((row["plan"].get("config", {}) for row in rows if row["kind"] == "plan" and "plan" in row), {})


def corpus_of(rows: list[dict]) -> str:
    """The corpus that a base run names itself; empty where it took the tokenizer's."""
    config: dict[str, Any] = next((row["config"] for row in rows if row["kind"] == "start"), {}) or {}
    name = config.get("dataset") or ""
    if not name and (paths.base_dir() / "tokenizer" / "tokenizer.json").exists():
        meta = paths.read_json(paths.base_dir() / "tokenizer" / "tokenizer.json").get("meta", {})
        name = meta.get("dataset", {}).get("dataset", "")
    return name


# -- output ------------------------------------------------------------------------------------------------------------


def draw(rows: list[dict], found: list[Finding], title: str, path: Path) -> None:
    """Loss with its findings, learning rate with gradient norm, speed: three panels over the steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    c = curve(rows)
    fig, axes = pyplot.subplots(3, 1, figsize=(10, 9), sharex=True, layout="constrained", height_ratios=[3, 1.4, 1])
    nan = lambda values: [math.nan if x is None else x for x in values]
    axes[0].plot(c.step, nan(c.loss), color="#9db7d5", linewidth=0.8, label="loss of each step")
    axes[0].plot(c.step, nan(c.smooth), color="#1f4e8c", linewidth=1.6, label="smoothed")
    axes[0].set(title=title, ylabel="nats a token")
    for i in range(1, len(c.where)):
        if None not in (*c.where[i], *c.where[i - 1]) and c.where[i] != c.where[i - 1]:
            axes[0].axvline(c.step[i], color="#bbbbbb", linewidth=0.6, zorder=0)
    for finding in found:
        if finding.step is not None:
            axes[0].axvline(finding.step, color="#c1432e", linewidth=1.0, linestyle="--")
            axes[0].text(finding.step, 0.98, f" {finding.kind}", color="#c1432e", fontsize=9, va="top",
                         transform=axes[0].get_xaxis_transform())  # fmt: skip
    axes[0].legend(frameon=False)
    axes[1].plot(c.step, nan(c.lr), color="#2f7d4f", label="learning rate (multiplier)")
    axes[1].set(ylabel="multiplier")
    norm = axes[1].twinx()
    norm.plot(c.step, nan(c.norm), color="#b07d2b", linewidth=0.8, label="gradient norm")
    norm.set(ylabel="gradient norm")
    axes[1].legend([axes[1].lines[0], norm.lines[0]], ["learning rate", "gradient norm"], frameon=False)
    axes[2].plot(c.step, nan(c.speed), color="#666666", linewidth=0.8)
    axes[2].set(ylabel="tokens/s", xlabel="step")
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.margins(x=0.01)
    with paths.atomic_write(path) as file:
        fig.savefig(file, format="png", dpi=110)
    pyplot.close(fig)


def locate(cfg: Config) -> Path:
    """The record meant. UserError: there is none."""
    if cfg.record:
        return Path(cfg.record)
    if cfg.source not in checkpoint.FOLDERS:
        raise UserError(f"-i {cfg.source} is not a stage: use {', '.join(checkpoint.FOLDERS)}.")
    found = list(checkpoint.folder(cfg.source).glob(f"{cfg.model_tag or '*'}/record.jsonl"))
    if not found:
        named = f" named {cfg.model_tag}" if cfg.model_tag else ""
        raise UserError(f"No record of a {cfg.source} run{named} in {checkpoint.folder(cfg.source)}: train first.")
    return max(found, key=lambda path: path.stat().st_mtime)


def main(cfg: Config) -> dict:
    """Print the findings and draw; returns {"findings", "expected", "record", "picture"}."""
    path = locate(cfg)
    rows = record.read(path)
    found = diagnose(rows)
    others = {p.parent.name: record.read(p) for p in sorted(path.parent.parent.glob("*/record.jsonl"))}
    against = expected(rows, path.parent.name, others)
    c, ends = curve(rows), {"summary": "finished", "stopped": "stopped by a signal", "failed": "failed"}
    end = next((ends[row["kind"]] for row in reversed(rows) if row["kind"] in ends), "still running, or killed")
    print(f"{path}\n{len(c.step)} steps, the last {c.step[-1]}; {end}")
    for finding in found:
        print(f"{finding.kind:<12}step {finding.step}: {finding.text}\n{'':<12}-> {finding.remedy}")
    if not found:
        print("nothing odd: no NaN, spike, divergence or plateau")
    print("\n".join(f"expected    {line}" for line in against))
    picture = Path(cfg.output) if cfg.output else path.with_name("loss.png")
    draw(rows, found, f"{path.parent.name}: {path.parent.parent.name}", picture)
    print(f"picture     {picture}")
    return {"findings": found, "expected": against, "record": str(path), "picture": str(picture)}


if __name__ == "__main__":
    cli.run(main, Config)
