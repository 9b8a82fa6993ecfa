"""The four pictures of a run as PNG (matplotlib), drawn from the props that scripts/visualize_data.py writes.

The same props feed the animations in visualize/; the colours are theirs (visualize/src/theme.ts).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat import paths
from nanochat.errors import UserError

INK, SOFT, GROUND, PANEL, LINE = "#e8edf7", "#8fa0bf", "#0d1424", "#151f36", "#2a3858"
BLUE, TEAL, AMBER, CORAL, VIOLET = "#5aa9ff", "#4fd1c5", "#ffb454", "#ff7a70", "#a78bfa"
STAGE_COLORS = {"base": BLUE, "sft": TEAL, "rl": AMBER}
ROLE_COLORS = {"embedding": BLUE, "value_embedding": TEAL, "matrix": VIOLET, "head": AMBER}
STYLE = {
    "figure.facecolor": GROUND, "axes.facecolor": PANEL, "savefig.facecolor": GROUND, "text.color": INK,
    "axes.labelcolor": SOFT, "axes.edgecolor": LINE, "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": LINE,
    "axes.titlecolor": INK, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11,
    "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "legend.labelcolor": INK,
}  # fmt: skip


def draw(name: str, props: dict[str, Any], path: Path) -> None:
    """Draw the picture of this name into a PNG of 1,600 x 900. UserError: there is no such picture."""
    if name not in PICTURES:
        raise UserError(f"There is no picture {name!r}: choose one of {', '.join(PICTURES)}.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure = pyplot.figure(figsize=(16, 9))
        figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12, wspace=0.04, hspace=0.04)
        PICTURES[name](figure, props)
        with paths.atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=100)
        pyplot.close(figure)


def title(figure: Any, text: str, below: str) -> None:
    """The headline of a picture and a line under it."""
    figure.suptitle(f"{text}\n", x=0.02, ha="left", fontsize=24, fontweight="bold")
    figure.text(0.021, 0.925, below, color=SOFT, fontsize=13, ha="left", va="top")


def short(number: float) -> str:
    """1,384,124,976 -> 1.38 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


# -- the model ---------------------------------------------------------------------------------------------------------


def architecture(figure: Any, props: dict[str, Any]) -> None:
    """The stack from tokens to logits on the left; parameters by role and what a token costs on the right."""
    c = props["config"]
    title(figure, "The model", f"run {props['tag']}: {c['n_layer']} layers, {c['n_embd']} wide, {c['n_head']} heads of "
          f"{c['head_dim']}, {short(props['parameters']['total'])} parameters")  # fmt: skip
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    _stack(left, props)
    roles = {role: count for role, count in props["parameters"].items() if role in ROLE_COLORS}
    names = list(roles)[::-1]
    bars = right.barh(names, [roles[n] for n in names], color=[ROLE_COLORS[n] for n in names], height=0.6)
    right.bar_label(bars, [f" {short(roles[n])}" for n in names], color=INK)
    right.set(title="Parameters by role", xlim=(0, 1.25 * max(roles.values())))
    right.xaxis.set_major_formatter(lambda value, _: short(value))
    right.set_yticks(range(len(names)), [n.replace("_", " ") for n in names])
    facts = (
        f"{short(props['flops_per_token'])} training FLOPs a token\n{props['kv_bytes_per_token']:,} bytes of cache a "
        f"token (bf16)\nvocabulary {c['vocab_size']:,}, context {c['sequence_len']:,}\nsmear x {props['smear']:.3f}, "
        f"backout x {props['backout']:.3f} (learnt)"
    )
    right.set_ylim(-2.2, len(names) - 0.4)
    right.text(0.03, 0.04, facts, transform=right.transAxes, ha="left", va="bottom", color=SOFT, linespacing=1.7)


def _stack(axes: Any, props: dict[str, Any]) -> None:
    c = props["config"]
    below = [("token ids", "", SOFT), ("embedding, RMS norm", f"{c['vocab_size']:,} x {c['n_embd']}", BLUE),
             ("smear: a little of the previous token", f"x {props['smear']:.3f}", TEAL)]  # fmt: skip
    layers = []
    for i, layer in enumerate(props["layers"]):
        sign = "-" if layer["x0"] < 0 else "+"
        note = f"x {layer['resid']:.2f} {sign} {abs(layer['x0']):.2f} x0   window {layer['window']:,}"
        layers.append((f"block {i}", note + ("   + value embedding" if layer["value_embedding"] else ""), VIOLET))
    above = [("minus backout of the middle, RMS norm", f"x {props['backout']:.3f}", TEAL),
             ("head, soft cap 15 tanh(z / 15)", f"{c['n_embd']} x {c['vocab_size']:,}", AMBER),
             ("logits of the next token", "", SOFT)]  # fmt: skip
    if len(layers) > 12:
        layers = [*layers[:5], (f"... {len(layers) - 10} more blocks ...", "", LINE), *layers[-5:]]
    rows = [*below, *layers, *above]
    axes.set(xlim=(0, 10), ylim=(-0.3, len(rows) + 0.1), title="From a token to the next")
    axes.axis("off")
    axes.title.set_visible(True)
    for y, (name, note, color) in enumerate(rows):
        axes.add_patch(_box(0.4, y + 0.12, 9.2, 0.72, color))
        axes.text(0.75, y + 0.48, name, va="center", fontsize=12, fontweight="bold")
        axes.text(9.35, y + 0.48, note, va="center", ha="right", color=INK, fontsize=10.5)
        if y:
            axes.annotate("", (5, y + 0.12), (5, y - 0.16), arrowprops={"arrowstyle": "-|>", "color": SOFT, "lw": 1.2})


def _box(x: float, y: float, width: float, height: float, color: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", facecolor=color + "33", edgecolor=color
    )


# -- training ----------------------------------------------------------------------------------------------------------


def loss(figure: Any, props: dict[str, Any]) -> None:
    """One column a stage: its loss (or reward) above, its learning rate below."""
    stages, total = props["stages"], sum(stage["minutes"] for stage in props["stages"])
    title(
        figure, "Training", f"run {props['tag']}: {', '.join(s['stage'] for s in stages)}; {total:.1f} minutes of steps"
    )
    grid = figure.subplots(2, len(stages), squeeze=False, height_ratios=[3.2, 1],
                           width_ratios=[1.7 if s["stage"] == "base" else 1 for s in stages])  # fmt: skip
    for (upper, lower), stage in zip(grid.T, stages):
        color = STAGE_COLORS.get(stage["stage"], VIOLET)
        _curve(upper, stage, color)
        if stage["val_bpb"]["x"]:
            _validation(upper.twinx(), stage["val_bpb"]["x"], stage["val_bpb"]["y"])
        lower.fill_between(stage["lr"]["x"], stage["lr"]["y"], color=color, alpha=0.3)
        lower.plot(stage["lr"]["x"], stage["lr"]["y"], color=color)
        lower.set(xlabel="step", ylabel="learning rate", ylim=(0, 1.1))
        for axes in (upper, lower):
            axes.grid(alpha=0.5)
            axes.margins(x=0.01)
            axes.xaxis.get_major_locator().set_params(integer=True)


def _curve(axes: Any, stage: dict[str, Any], color: str) -> None:
    smooth, x = stage["smooth"], stage["raw"]["x"]
    axes.plot(x, stage["raw"]["y"], color=color, alpha=0.35 if smooth["x"] else 1, linewidth=1.2)
    axes.plot(smooth["x"], smooth["y"], color=color, linewidth=2.4)
    axes.set(title=f"{stage['stage']} ({stage['minutes']:.1f} min)", ylabel=stage["unit"])
    if smooth["x"]:
        axes.set_ylim(bottom=0)
    if stage["chance"]:
        axes.axhline(stage["chance"], color=SOFT, linewidth=1, linestyle=":")
        axes.text(x[-1], stage["chance"], "ln V: knows nothing ", color=SOFT, ha="right", va="bottom")


def _validation(axes: Any, x: list, y: list) -> None:
    axes.plot(x, y, color=CORAL, marker="o", linestyle="none")
    axes.annotate(f"{y[-1]:.4f}", (x[-1], y[-1]), xytext=(-6, 10), textcoords="offset points", ha="right", color=CORAL,
                  fontweight="bold")  # fmt: skip
    axes.set_ylabel("validation, bits per byte", color=CORAL)
    axes.set_ylim(bottom=0)


# -- attention ---------------------------------------------------------------------------------------------------------


def attention(figure: Any, props: dict[str, Any]) -> None:
    """A grid of maps, layers down, heads across; row: the reading token, column: the token that is read."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    layers, tokens = props["layers"], [token.replace("\n", "\\n") for token in props["tokens"]]
    title(figure, "What reads what", f"run {props['tag']}: attention on {''.join(props['tokens'][1:])!r}")
    colors = LinearSegmentedColormap.from_list("read", [PANEL, "#27457a", BLUE, "#fff3d6"])
    heads = max(len(layer["heads"]) for layer in layers)
    grid = figure.subplots(len(layers), heads, squeeze=False)
    size = min(10, 400 / len(layers) / len(tokens))  # of the letters: what a row of the map has room for
    for row, layer in zip(grid, layers):
        for axes, head in zip(row, layer["heads"]):
            axes.imshow(head["weights"], cmap=colors, norm=PowerNorm(0.5, 0, 1), aspect="auto")
            axes.set_title(f"layer {layer['layer']}, head {head['head']}", fontsize=10)
            axes.set(xticks=[], yticks=[])
        row[0].set_yticks(range(len(tokens)), tokens, fontsize=size)
    for axes in grid[-1]:
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=size)


# -- scaling -----------------------------------------------------------------------------------------------------------


def scaling(figure: Any, props: dict[str, Any]) -> None:
    """Left: measured runs, the compute frontier, its power law, residuals. Right: what the plan asks for by depth."""
    runs, law = props["runs"], props["law"]
    many = "" if len(runs) == 1 else "s"
    title(figure, "Scaling", f"{len(runs)} finished run{many} here; on the right what --depth implies "
          f"(vocabulary {props['vocab_size']:,})")  # fmt: skip
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 1])
    upper = figure.add_subplot(grid[0, 0])
    lower = figure.add_subplot(grid[1, 0], sharex=upper)
    right = figure.add_subplot(grid[:, 1])
    depths = sorted({run["depth"] for run in runs})
    palette = [BLUE, TEAL, VIOLET, CORAL, SOFT]
    for i, depth in enumerate(depths):
        own = [run for run in runs if run["depth"] == depth]
        upper.plot([r["flops"] for r in own], [r["bpb"] for r in own], marker="o", color=palette[i % len(palette)],
                   label=f"depth {depth}")  # fmt: skip
    best = [run for run in runs if run["tag"] in props["best"]]
    if law:
        x = [run["flops"] for run in best]
        between = [x[0] * (x[-1] / x[0]) ** (i / 60) for i in range(61)]  # the law is a curve here
        upper.plot(between, [law["a"] * value ** law["b"] for value in between], color=AMBER, linestyle="--",
                   linewidth=2.2, label=f"best: bpb = {law['a']:.3g} C^{law['b']:.4f}")  # fmt: skip
        lower.stem(x, [100 * r for r in law["residuals"]], linefmt=AMBER, markerfmt="o", basefmt=" ")
        lower.axhline(0, color=SOFT, linewidth=1)
    else:
        missing = "a law needs runs at three budgets or more"
        lower.text(0.5, 0.5, missing, transform=lower.transAxes, ha="center", color=SOFT)
        lower.set(yticks=[])
    upper.set(title="Measured", ylabel="validation, bits per byte", xscale="log")
    lower.set(ylabel="residual, %", xlabel="FLOPs of the run")
    if runs:
        upper.legend()
    _planned(right, props["plan"])
    for axes in (upper, lower, right):
        axes.grid(alpha=0.5)


def _planned(axes: Any, plan: list[dict[str, Any]]) -> None:
    parameters, tokens = [p["parameters"] for p in plan], [p["tokens"] for p in plan]
    axes.plot(parameters, tokens, color=AMBER, linewidth=1.5, zorder=1)
    axes.scatter(parameters, tokens, s=60, color=AMBER, zorder=2)
    for p in plan:
        axes.annotate(f"d{p['depth']}  {p['flops']:.1e} FLOPs", (p["parameters"], p["tokens"]), xytext=(10, -12),
                      textcoords="offset points", fontsize=9.5, color=INK)  # fmt: skip
    axes.set(title="Planned", xlabel="parameters", ylabel="training tokens", xscale="log", yscale="log")
    axes.set_xlim(right=max(parameters) * 8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: short(value))


PICTURES: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "TransformerArchitecture": architecture,
    "TrainingLoss": loss,
    "AttentionVisualization": attention,
    "ScalingLaws": scaling,
}
