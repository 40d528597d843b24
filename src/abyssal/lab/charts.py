"""Charts of an experiment, drawn by Matplotlib as SVG: points or curves over seeds, with error bars.

Every bar and band is one standard deviation over seeds; single seeds are drawn as small points beside their mean.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abyssal.analysis.charts import COLOURS
from abyssal.errors import UserError
from abyssal.lab.statistics import deviation, mean, signed

_INK = "#123456"  # stands for the page's own colour of text until the SVG is placed
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Chart:
    """``title`` and SVG whose text has the colour of what is around it."""

    title: str
    svg: str

    def inside(self, prefix: str) -> str:
        """The SVG for a page with others: its ids begin with ``prefix``, which no other's do."""
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", self.svg)

    def on_white(self) -> str:
        """The same as a file of its own, for places that know nothing of a page's colours."""
        text = self.svg.replace("currentColor", "#1b1f24")
        return re.sub(r"(<svg [^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', text, count=1)


def check_plotting() -> None:
    """Raises UserError where Matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("reports of labs need Matplotlib: pip install 'abyssal[plot]'") from None


def points(title: str, what: str, arms: Mapping[str, Sequence[float]], *, log: bool = False) -> Chart:
    """A row an arm: its mean, one standard deviation, and every seed."""
    figure, axes = _figure(0.42 * len(arms) + 1.1)
    for row, (_, values) in enumerate(arms.items()):
        colour = COLOURS[0]
        axes.errorbar([mean(values)], [row], xerr=[deviation(values)], fmt="o", color=colour, capsize=4, markersize=6)
        axes.plot(values, [row + 0.22] * len(values), ".", color=colour, alpha=0.55, markersize=5)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set_xlabel(what)
    if log:
        axes.set_xscale("log")
    return Chart(title, _svg(figure, title))


def curves(
    title: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[Sequence[float]]],
    *,
    across: str,
    up: str,
    log_x: bool = False,
    log_y: bool = False,
    ticks: Sequence[str] | None = None,
) -> Chart:
    """Curves over ``x``, each with a list of values a seed; the band is one standard deviation. ``ticks`` name the
    places of ``x``."""
    figure, axes = _figure(3.4)
    for number, (name, seeds) in enumerate(lines.items()):
        columns = list(zip(*seeds, strict=True))
        middle = [mean(column) for column in columns]
        off = [deviation(column) for column in columns]
        colour, mark = COLOURS[number % len(COLOURS)], _MARKS[number % len(_MARKS)]
        few = mark if len(x) <= 20 else ""
        axes.plot(x[: len(middle)], middle, marker=few, color=colour, label=name, markersize=4, linewidth=1.6)
        low, high = ([m + sign * o for m, o in zip(middle, off, strict=True)] for sign in (-1, 1))
        axes.fill_between(x[: len(middle)], low, high, color=colour, alpha=0.18, linewidth=0)
    if log_x:
        axes.set_xscale("symlog" if min(x) <= 0 else "log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if log_y:
        axes.set_yscale("log")
    if ticks is not None:
        axes.set_xticks(list(x), list(ticks))
        axes.minorticks_off()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=2 if len(lines) > 4 else 1)
    return Chart(title, _svg(figure, title))


def heat(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], *, digits: int = 2
) -> Chart:
    """A table of means as colours, the number in every cell; red is more than 0, blue is less."""
    figure, axes = _figure(0.34 * len(rows) + 1.2)
    reach = max((abs(v) for row in values for v in row), default=1.0) or 1.0
    # Not imshow, which would put a picture into the SVG: browsers blur one that is a few pixels wide.
    axes.pcolormesh(values, cmap="RdBu_r", vmin=-1.3 * reach, vmax=1.3 * reach, edgecolors="face", linewidth=0.3)
    axes.set_xticks([i + 0.5 for i in range(len(columns))], list(columns))
    axes.set_yticks([i + 0.5 for i in range(len(rows))], list(rows))
    axes.invert_yaxis()
    axes.grid(False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j + 0.5, i + 0.5, signed(value, digits), ha="center", va="center", fontsize=8, color="#1b1f24")
    return Chart(title, _svg(figure, title))


def _figure(height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "abyssal",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }
    matplotlib.rcParams.update(style)
    figure = Figure(figsize=(6.8, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.grid(True, color="#8a94a0", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return text.replace("DejaVu Sans", "system-ui").strip()
