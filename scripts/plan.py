"""What a run takes, before it starts: size, tokens, batch, rates, memory by part, time and cost, as training counts.

    python -m scripts.plan --depth=24 --target-param-data-ratio=8 --fp8 --gpus=8 --gpu=h100
    python -m scripts.plan --hours=5 --gpus=1          # the deepest that fits the memory and the time here
    python -m scripts.plan --dollars=100 --gpus=8 --gpu=h100
    python -m scripts.plan --flops=1e18 --table --plot=options.png

Time is FLOPs / (peak x MFU). Prices come from a dated table (nanochat/prices.csv);
--prices gives your own.
"""

import dataclasses
import datetime
from pathlib import Path

import torch

from nanochat import cli, cost, hardware, paths, prices, record, runtime, scaling
from nanochat.errors import UserError, refuse

TOKENS_PER_SHARD = 250e6 / 4.5  # a hub shard holds about 250 M characters (published), about 4.5 a token
KEPT_BY_CROP = 0.65  # share of the tokens that crop packing keeps at a context of 2,048 (published: 34.6 % discarded)
DEPTHS = tuple(range(4, 42, 2))


@dataclasses.dataclass(frozen=True)
class Config:
    depth: int = 20  # layers; ignored with a budget
    # a budget instead of a depth: the deepest model that fits it (and the memory)
    hours: float = 0.0  # of the whole machine
    dollars: float = 0.0  # by the table of prices
    flops: float = 0.0  # of the whole run
    # model, as base_train takes them
    target_param_data_ratio: float = 10.5  # tokens per scaling parameter
    num_iterations: int = -1  # updates; -1: from the ratio
    aspect_ratio: int = 64  # width = depth * aspect_ratio
    head_dim: int = 128  # channels a head
    n_kv_head: int = -1  # key/value heads; -1: as many as query heads
    window_pattern: str = "SSSL"  # attention windows
    vocab_size: int = 32768  # tokens
    max_seq_len: int = 2048  # context, tokens
    total_batch_size: int = -1  # tokens an update; -1: from the batch law
    device_batch_size: int = -1  # rows of a micro-batch; -1: the most that fit
    # machine
    gpus: int = 1  # devices
    gpu: str = ""  # name, e.g. h100; empty: the one here
    memory_gib: float = 0.0  # of one device; 0: of the one here, or by its name
    prices: str = ""  # CSV like nanochat/prices.csv; empty: that one
    fp8: bool = False  # matmuls in fp8: counted against the bf16 peak, as published
    mfu: float = 0.0  # share of the bf16 peak that training reaches; 0: 0.5 in bf16, 0.593 in fp8 (published, 8xH100)
    # output
    table: bool = False  # also one line for every depth
    plot: str = ""  # PNG of the options: time, tokens and memory over depth
    output: str = ""  # JSON file for the choice; empty: only print


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run would have: its speed and memory, None where unknown."""

    name: str
    gpus: int
    peak: float | None  # bf16 FLOP/s of one device
    memory: float | None  # usable bytes of one device
    kind: str  # cuda, cpu or mps: what the memory estimate goes by
    value_bytes: int  # of an activation
    mfu: float
    price: prices.Price | None  # newest row of the table for this device


def check(cfg: Config) -> None:
    """Refuse more than one budget and what is not positive."""
    budgets = [name for name in ("hours", "dollars", "flops") if getattr(cfg, name)]
    problems = [f"--{name}={getattr(cfg, name)} must be above 0." for name in budgets if not getattr(cfg, name) > 0]
    if len(budgets) > 1:
        problems.append(f"Give one budget, not {' and '.join('--' + name for name in budgets)}.")
    if cfg.gpus < 1:
        problems.append(f"--gpus={cfg.gpus} must be 1 or more.")
    if not 0 <= cfg.mfu <= 1:
        problems.append(f"--mfu={cfg.mfu} must lie in 0..1.")
    refuse(problems)


def machine(cfg: Config) -> Machine:
    """The machine as told, or the one here."""
    device = runtime.pick_device()
    here = not cfg.gpu
    name = cfg.gpu or hardware.device_name(device)
    memory = cfg.memory_gib * 2**30 or (hardware.total_memory(device) if here else hardware.memory_of(name))
    kind = device.type if here else "cuda"
    dtype = torch.bfloat16 if kind == "cuda" else runtime.pick_dtype(device, training=True)[0]
    return Machine(name, cfg.gpus, hardware.peak_flops(name), memory and memory * hardware.USABLE, kind, dtype.itemsize,
                   cfg.mfu or (0.593 if cfg.fp8 else 0.5), newest_price(cfg, name))  # fmt: skip


def newest_price(cfg: Config, name: str) -> prices.Price | None:
    """The newest row of the price table for a device of this name."""
    rows = [row for row in prices.read(cfg.prices or prices.TABLE) if row.gpu.lower() in name.lower()]
    return max(rows, key=lambda row: row.date, default=None)


def price_text(price: prices.Price) -> str:
    """A price for people, with its age where that is great."""
    asked = f"{price.low:.2f}" if price.low == price.high else f"{price.low:.2f} to {price.high:.2f}"
    today = datetime.date.today()
    age = f"{price.days(today)} days old"
    age += ", STALE: look it up, and give your own table with --prices" if price.stale(today) else ""
    return f"${asked} a GPU and hour, {price.kind}, {price.source}, {price.date} ({age})"


def make_plan(cfg: Config, depth: int, rows: int) -> scaling.Plan:
    """base_train's plan for these flags."""
    off = lambda value: None if value == -1 else value
    return scaling.plan(
        depth, vocab_size=cfg.vocab_size, aspect_ratio=cfg.aspect_ratio, head_dim=cfg.head_dim,
        n_kv_head=off(cfg.n_kv_head), sequence_len=cfg.max_seq_len, window_pattern=cfg.window_pattern,
        num_iterations=off(cfg.num_iterations), target_param_data_ratio=cfg.target_param_data_ratio,
        total_batch_size=off(cfg.total_batch_size), device_batch_size=rows, world=cfg.gpus,
    )  # fmt: skip


def option(cfg: Config, depth: int, m: Machine) -> dict:
    """One depth as a row: the plan, rows that fit (0: none), memory, hours and dollars (None: unknown)."""
    fit = dict(world=m.gpus, bytes_per_value=m.value_bytes, device=m.kind)
    rows = cfg.device_batch_size
    if rows == -1:
        rows = scaling.fitting_rows(make_plan(cfg, depth, 1).config, m.memory, **fit)
    plan = make_plan(cfg, depth, max(rows, 1))
    memory = cost.memory(plan.config, plan.device_batch_size, accum=plan.accum, **fit)
    if m.memory is not None and memory["total"] > m.memory:
        rows = 0
    hours = plan.flops / (m.peak * m.mfu * m.gpus) / 3600 if m.peak else None
    return {
        "depth": depth, "device_batch_size": rows and plan.device_batch_size, "hours": hours,
        "dollars": hours * m.gpus * m.price.high if hours and m.price else None,
        "shards": int(plan.tokens / KEPT_BY_CROP / TOKENS_PER_SHARD) + 2, "memory": memory, "plan": plan,
        "serving": {"weights": m.value_bytes * plan.parameters["total"],
                    "cache_per_row": cost.kv_bytes_per_token(plan.config, m.value_bytes) * cfg.max_seq_len},
    }  # fmt: skip


def choose(cfg: Config, m: Machine) -> tuple[dict, list[dict]]:
    """The row asked for, or with a budget the deepest that fits it and the memory; and all rows looked at."""
    budget = {"hours": cfg.hours, "dollars": cfg.dollars, "flops": cfg.flops}
    name, limit = next(((n, v) for n, v in budget.items() if v), ("", 0.0))
    depths = DEPTHS if name or cfg.table or cfg.plot else ()
    rows = [option(cfg, depth, m) for depth in depths]
    if not name:
        return option(cfg, cfg.depth, m), rows
    need = lambda row: row["plan"].flops if name == "flops" else row[name]
    if any(need(row) is None for row in rows):
        known = "speed" if name == "hours" or m.peak is None else "price"
        raise UserError(f"--{name} needs a device whose {known} is known: name one with --gpu, e.g. --gpu=h100.")
    fitting = [row for row in rows if row["device_batch_size"] and need(row) <= limit]
    if not fitting:
        raise UserError(f"Not even depth {DEPTHS[0]} trains for {limit:g} {name} in this memory: give more of one.")
    return fitting[-1], rows


def amount(value: float | None, text: str) -> str:
    return "unknown" if value is None else text.format(value)


def lines(row: dict, m: Machine) -> list[tuple[str, str]]:
    """The choice, for people."""
    plan, gib = row["plan"], 2**30
    rates = ", ".join(f"{role} {lr:.4g}" for role, lr in plan.lrs.items())
    hours = row["hours"]
    time = (
        "unknown: name the device with --gpu"
        if hours is None
        else (
            f"{hours:.2f} h ({60 * hours:.0f} minutes) at {100 * m.mfu:.1f} % of {m.gpus} x {m.peak / 1e12:.0f} TFLOP/s"
        )
    )
    price = "unknown: the price table lacks the device" if m.price is None else price_text(m.price)
    fits = "" if m.memory is None else f" of {m.memory / gib:.1f} usable"
    if not row["device_batch_size"]:
        fits += ": DOES NOT FIT"
    return [
        ("depth", f"{row['depth']}: width {plan.config.n_embd}, {plan.config.n_head} heads"),
        ("parameters", f"{plan.parameters['total'] / 1e6:,.2f} M, {plan.parameters['scaling'] / 1e6:,.2f} M scaling"),
        ("tokens", f"{plan.tokens / 1e9:.3f} B in {plan.iterations:,} steps of {plan.batch:,}, {row['shards']} shards"),
        ("FLOPs", f"{plan.flops:.3g} ({plan.flops_per_token:.3g} a token)"),
        ("rates", f"x {plan.lr_mult:.3f}: {rates}; decay {plan.weight_decay:.4g}, {plan.warmup_steps} warm-up steps"),
        ("batch", f"{row['device_batch_size']} rows x {plan.accum} micro-batches on {m.gpus} device(s)"),
        ("memory", f"{row['memory']['total'] / gib:.2f} GiB{fits} (estimate): " + ", ".join(
            f"{name} {size / gib:.2f}" for name, size in row["memory"].items() if name != "total")),
        ("serving", f"weights {row['serving']['weights'] / gib:.2f} GiB, and "
                    f"{row['serving']['cache_per_row'] / gib:.3f} GiB a conversation of full length"),
        ("time", time),
        ("cost", price if m.price is None else amount(row["dollars"], "${:,.2f} at most") + f"; {price}"),
        *(("note", note) for note in plan.notes),
    ]  # fmt: skip


def listing(rows: list[dict]) -> str:
    """All depths, a line each."""
    columns = {
        "depth": 5,
        "params M": 9,
        "tokens B": 9,
        "batch": 9,
        "steps": 7,
        "rows": 4,
        "GiB": 6,
        "hours": 8,
        "$": 9,
    }
    text = [" ".join(f"{name:>{width}}" for name, width in columns.items()) + f"{'$':>10}"]
    for row in rows:
        plan = row["plan"]
        text.append(
            f"{row['depth']:>5} {plan.parameters['total'] / 1e6:>9.1f} {plan.tokens / 1e9:>9.3f} {plan.batch:>9,} "
            f"{plan.iterations:>7,} {row['device_batch_size']:>4} {row['memory']['total'] / 2**30:>6.1f} "
            f"{amount(row['hours'], '{:.2f}'):>8} {amount(row['dollars'], '{:,.0f}'):>9}"
        )
    return "\n".join(text)


def draw(path: Path, rows: list[dict], chosen: dict) -> None:
    """A PNG of the options: hours, tokens and memory over depth, the choice marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("hours", lambda r: r["hours"]), ("tokens, B", lambda r: r["plan"].tokens / 1e9),
              ("memory, GiB", lambda r: r["memory"]["total"] / 2**30)]  # fmt: skip
    fig, all_axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axes, (title, value) in zip(all_axes, panels):
        points = [(row["depth"], value(row)) for row in rows if value(row)]
        axes.plot(*zip(*points) if points else ([], []), marker="o", markersize=3)
        if value(chosen):
            axes.plot([chosen["depth"]], [value(chosen)], "o", markersize=9, label=f"depth {chosen['depth']}")
            axes.legend(frameon=False)
        axes.set(title=title, xlabel="depth", yscale="log" if points else "linear")
        axes.grid(alpha=0.3, which="both")
    with paths.atomic_write(path) as file:
        fig.savefig(file, format="png", dpi=130)
    pyplot.close(fig)


def main(cfg: Config) -> dict:
    """Plan, print, draw, write; returns the chosen row."""
    check(cfg)
    m = machine(cfg)
    row, rows = choose(cfg, m)
    for name, text in lines(row, m):
        print(f"{name:<11}{text}")
    if cfg.table:
        print(listing(rows))
    if cfg.plot:
        draw(Path(cfg.plot), rows, row)
    if cfg.output:
        about = dataclasses.asdict(m) | {"price": m.price and price_text(m.price)}
        paths.write_json(Path(cfg.output), record.plain(row | {"machine": about}))
    return row


if __name__ == "__main__":
    cli.run(main, Config)
