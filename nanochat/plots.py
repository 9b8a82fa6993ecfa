"""Pictures of runs as SVG text: curves over steps, tokens, FLOPs or time, a radar of CORE, a law with its residuals.

matplotlib draws; text stays text, so that a page can be searched. Nothing is read here: callers bring the numbers.
"""

import io
import math
import re
import statistics
from itertools import count
from typing import NamedTuple

from nanochat.pictures import short

MOST_POINTS = 1500  # of a drawn curve; more can't be seen and make a page heavy
SERIAL = count()


class Curve(NamedTuple):
    """One line: a label and its points."""

    label: str
    x: list[float]
    y: list[float]


class Picture(NamedTuple):
    """A drawing: its title and its <svg> element."""

    title: str
    svg: str


class Fit(NamedTuple):
    """y = a x^b, fitted in logarithms; residuals are log(y / fit)."""

    a: float
    b: float
    residuals: list[float]

    def at(self, x: float) -> float:
        return self.a * x**self.b


def fit(x: list[float], y: list[float]) -> Fit:
    """Least squares of log y on log x; two different x at least (ValueError)."""
    lx, ly = [math.log(v) for v in x], [math.log(v) for v in y]
    mx, my = sum(lx) / len(lx), sum(ly) / len(ly)
    spread = sum((v - mx) ** 2 for v in lx)
    if spread == 0:
        raise ValueError("a law needs runs of two sizes at least")
    b = sum((u - mx) * (v - my) for u, v in zip(lx, ly)) / spread
    a = math.exp(my - b * mx)
    return Fit(a, b, [v - math.log(a) - b * u for u, v in zip(lx, ly)])


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
                                "axes.spines.right": False, "font.family": "sans-serif"})  # fmt: skip
    from matplotlib import pyplot

    return pyplot


def _svg(fig, title: str) -> Picture:
    """The figure as a Picture whose ids are its own, with a title for those who can't see it."""
    out = io.StringIO()
    fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    _pyplot().close(fig)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    own = f"p{next(SERIAL)}-"
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{own}", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return Picture(title, text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def thin(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS of the points, evenly, the last one always."""
    every = -(-len(x) // MOST_POINTS)
    keep = sorted({*range(0, len(x), every), len(x) - 1}) if x else []
    return [x[i] for i in keep], [y[i] for i in keep]


def middle(y: list[float]) -> list[float]:
    """The running median over a fortieth of the points: what noise hides."""
    half = max(1, len(y) // 80)
    return [statistics.median(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]


def window(curves: list[Curve]) -> tuple[float, float] | None:
    """The y that curves keep to behind the first twentieth of their way; None if all fits into twice that."""
    late = [y for c in curves for x, y in zip(c.x, c.y) if x >= c.x[0] + 0.05 * (c.x[-1] - c.x[0])]
    low, high = min(late), max(late)
    if max(max(c.y) for c in curves) - low <= 2 * (high - low):
        return None
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - room, high + 2 * room


NUMBERS = {  # how an axis of this label writes its numbers
    "tokens": lambda value, _: short(value),
    "tokens/s": lambda value, _: short(value),
    "FLOPs": lambda value, _: f"{value:.3g}".replace("e+", "e"),
}


def lines(curves: list[Curve], title: str, x_label: str, y_label: str, *, noisy: bool = False,
          falling: bool = False) -> Picture:  # fmt: skip
    """A line plot. noisy: long curves are drawn pale, with their running median; falling: a steep start is cut off."""
    fig, axes = _pyplot().subplots(figsize=(5.2, 3.1), layout="constrained")
    kept = window(curves) if falling else None
    for curve in curves:
        x, y = thin(curve.x, curve.y)
        marker, pale = "o" if len(x) < 15 else None, noisy and len(x) > 100
        (line,) = axes.plot(
            x, y, linewidth=0.6 if pale else 1.3, alpha=0.35 if pale else 1, marker=marker, markersize=3
        )
        if pale:
            (line,) = axes.plot(x, middle(y), linewidth=1.5, color=line.get_color())
        line.set_label(curve.label + (f" (starts at {y[0]:.3g})" if kept else ""))
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    for axis, label in ((axes.xaxis, x_label), (axes.yaxis, y_label)):
        if label in NUMBERS:
            axis.set_major_formatter(NUMBERS[label])
    if kept:
        axes.set_ylim(*kept)
    if kept or len(curves) > 1:
        axes.legend(frameon=False, fontsize=8, loc="upper right" if kept else "best")
    return _svg(fig, title)


def radar(scores: dict[str, dict[str, float]], title: str, other: dict[str, float], other_label: str,
          circle: float, circle_label: str) -> Picture:  # fmt: skip
    """Scores by axis for each label, on spokes from -0.1 to 1; `other`: known scores, perhaps not on every spoke.

    `circle`: a value that is the same on every spoke.
    """
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    fig, axes = _pyplot().subplots(figsize=(6.4, 6.2), layout="constrained", subplot_kw={"polar": True})
    for label, values in scores.items():
        points = [max(values.get(name, math.nan), -0.1) for name in names]
        axes.plot([*angles, angles[0]], [*points, points[0]], linewidth=1.4, label=label)
        axes.fill([*angles, angles[0]], [*points, points[0]], alpha=0.12)
    known = [(angle, max(other[name], -0.1)) for angle, name in zip(angles, names) if name in other]
    if known:
        line = "--" if len(known) == len(names) else "none"
        axes.plot(*zip(*known, known[0]), linestyle=line, marker="D", markersize=4, color="0.35", label=other_label)
    ring = [2 * math.pi * i / 180 for i in range(181)]
    axes.plot(ring, [circle] * len(ring), linestyle=":", linewidth=1.2, color="0.35", label=circle_label)
    axes.set_xticks(angles, [""] * len(names))
    for angle, name in zip(angles, names):  # beside the circle: to its right on the right, to its left on the left
        side = "center" if abs(math.cos(angle)) < 0.1 else "left" if math.cos(angle) > 0 else "right"
        shown = name.removeprefix("bigbench_").replace("_", " ")
        axes.text(angle, 1.06, shown, fontsize=7, ha=side, va="center")
    axes.set_ylim(-0.1, 1.0)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", ".25", ".5", ".75", "1"], fontsize=7)
    axes.set_title(title, pad=24)
    fig.legend(frameon=False, fontsize=8, loc="outside lower center")
    return _svg(fig, title)


def law(points: list[tuple[str, float, float]], title: str, x_label: str, y_label: str) -> Picture:
    """(label, x, y) of runs with the fitted power law, and the residuals in percent below it."""
    from matplotlib.ticker import LogLocator

    x, y = [p[1] for p in points], [p[2] for p in points]
    found = fit(x, y)
    fig, (above, below) = _pyplot().subplots(
        2, 1, figsize=(5.2, 4.4), layout="constrained", sharex=True, height_ratios=[3, 1]
    )
    above.loglog(x, y, "o", markersize=4, label="runs")
    ends = [min(x), max(x)]
    above.loglog(ends, [found.at(v) for v in ends], linewidth=1.2, label=f"{found.a:.3g} x^{found.b:.3f}")
    for label, at, value in points:
        above.annotate(label, (at, value), fontsize=6, xytext=(3, 3), textcoords="offset points")
    above.legend(frameon=False, fontsize=8)
    above.set(title=title, ylabel=y_label)
    if max(y) < 20 * min(y):  # too few powers of ten: name values between them
        few = (1, 2, 5) if max(y) > 3 * min(y) else range(1, 10)
        above.yaxis.set_minor_locator(LogLocator(subs=few))
        for name in (above.yaxis.set_minor_formatter, above.yaxis.set_major_formatter):
            name(lambda value, _: short(value))
    below.axhline(0, color="0.5", linewidth=0.8)
    below.semilogx(x, [100 * (math.exp(r) - 1) for r in found.residuals], "o", markersize=4)
    below.set(xlabel=x_label, ylabel="off, %")
    for axes in (above, below):
        axes.grid(alpha=0.25, which="both")
    return _svg(fig, title)
