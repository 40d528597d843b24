"""The charts of a report as Plotly figures: plain dicts ``{"data": […], "layout": {…}}``, drawn by the page.

Text of users in a figure goes through :func:`label`: Plotly reads labels as a kind of HTML. Long curves keep the lowest
and the highest value of every stretch of steps, so that no spike is lost.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abyssal.analysis.history import History

Figure = dict[str, Any]

# Told apart on white and on black, and by most who see colours otherwise.
COLOURS = ("#2f81d8", "#e0731d", "#2a9d5c", "#c4499b", "#8468d6", "#b08a00", "#1aa0ad", "#d0453f")
MOST_POINTS = 1000
_FEW_LAYERS = 8
_DASHES = ("solid", "dot", "dash", "dashdot")


def label(text: str, length: int = 40) -> str:
    """``text`` for a figure: in one line, no markup in it, cut in the middle where it is long."""
    text = " ".join(text.split())
    if len(text) > length:
        text = f"{text[: length // 2]}…{text[-length // 2 :]}"
    return html.escape(text, quote=False)


def training_charts(runs: Sequence[tuple[str, History]]) -> dict[str, Figure]:
    """Curves of one run, or of several one over the other; charts with nothing to show are left out."""
    charts = {
        "loss": _loss(runs),
        "bits_per_byte": _validation(runs),
        "mtp_loss": _mtp(runs),
        "lr": _curves(runs, "lr", "Learning rate", small=True),
        "grad_norm": _curves(runs, "grad_norm", "Gradient norm", smoothed=True),
        "tokens_per_s": _curves(runs, "tokens_per_s", "Throughput, tokens a second", smoothed=True),
        "memory": _memory(runs),
    }
    if any(value for _, history in runs for value in history.scalars["balance_loss"]):
        charts["balance_loss"] = _curves(runs, "balance_loss", "Balance loss", smoothed=True, small=True)
    return {name: figure for name, figure in charts.items() if figure["data"]}


def layer_charts(history: History, names: dict[int, str]) -> dict[str, Figure]:
    """CV, MaxVio and dead experts of all layers over time; ``names`` says what a layer is called."""
    layers = list(history.layers or ())
    steps = [(b.first + b.last) // 2 for b in history.bins]
    many = len(layers) > _FEW_LAYERS
    charts: dict[str, Figure] = {}
    for key, title, hover in (
        ("cv", "CV of the load, a step", ".3f"),
        ("max_vio", "MaxVio", ".3f"),
        ("dead", "Dead experts", ".0f"),
    ):
        traces = []
        for i, layer in enumerate(layers):
            # Blue the first, red the last: where layers are many their colour tells the depth.
            colour = f"hsl({220 - 220 * i / (len(layers) - 1):.0f},70%,50%)" if many else _colour(i)
            values = [getattr(b, key)[i] / (1 if key == "dead" else b.steps) for b in history.bins]
            traces.append(
                _line(steps, values, names[layer], colour, width=1.2, showlegend=not many)
                | {"hovertemplate": f"%{{fullData.name}}<br>step %{{x}}: %{{y:{hover}}}<extra></extra>"}
            )
        suffix = " (blue: the first layer, red: the last)" if many else ""
        charts[key] = {"data": traces, "layout": _layout(title + suffix, rangemode="tozero", hovermode="closest")}
    if all(int(b.dead.max()) <= 8 for b in history.bins):
        charts["dead"]["layout"]["yaxis"] |= {"dtick": 1}
    return charts


def load_chart(history: History, layer: int, name: str) -> Figure:
    """Heatmap: experts over steps, their load relative to the mean; 1 is an even share."""
    steps, loads, _ = history.bins_of(layer)
    mean = loads.mean(1, keepdims=True)
    share = np.divide(loads, mean, out=np.full(loads.shape, np.nan), where=mean > 0)
    experts = loads.shape[1]
    heatmap = {
        "type": "heatmap",
        "x": steps.tolist(),
        "y": list(range(experts)),
        "z": [_rounded(row, 2) for row in share.T],
        "zmin": 0,
        "zmid": 1,
        "zmax": 2,
        "colorscale": [[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2562a"]],
        "colorbar": {"thickness": 10, "tickvals": [0, 0.5, 1, 1.5, 2], "ticktext": ["0", "0.5", "1", "1.5", "≥ 2"]},
        "hovertemplate": "expert %{y}, step %{x}<br>%{z:.2f} × the mean<extra></extra>",
    }
    layout = _layout(f"{name}: load of every expert, relative to the mean", hovermode="closest")
    layout["height"] = min(max(280, 120 + 2 * experts), 560)
    layout["yaxis"] |= {"title": {"text": "expert"}, "showgrid": False, "tickformat": "d"}
    layout["yaxis"] |= {"dtick": 1} if experts <= 16 else {}
    layout["xaxis"] |= {"showgrid": False}
    return {"data": [heatmap], "layout": layout}


def bias_chart(history: History, layer: int, name: str) -> Figure | None:
    """The bias of every expert over steps; None for a router without one."""
    steps, _, bias = history.bins_of(layer)
    if np.isnan(bias).all():
        return None
    experts = bias.shape[1]
    scale = float(np.nanmax(np.abs(bias)))
    digits = 4 if experts <= 32 else 3  # of the largest; they are most of what a large model's page holds
    decimals = digits - 1 - math.floor(math.log10(scale)) if scale > 0 else digits
    traces = []
    for expert in range(experts):
        colour = _colour(expert) if experts <= len(COLOURS) else f"hsl({360 * expert / experts:.0f},60%,50%)"
        trace = _line(
            steps.tolist(), [], f"expert {expert}", colour, width=1.2 if experts <= 16 else 0.8, showlegend=experts <= 8
        )
        trace["y"] = _rounded(bias[:, expert], decimals)
        trace["hovertemplate"] = "%{fullData.name}<br>step %{x}: %{y}<extra></extra>"
        traces.append(trace)
    layout = _layout(f"{name}: bias of every expert", hovermode="closest")
    layout["height"] = min(max(280, 120 + 2 * experts), 560)  # beside the heatmap
    return {"data": traces, "layout": layout}


def overlaid_layer_charts(runs: Sequence[tuple[str, History]], layer: int, name: str) -> dict[str, Figure]:
    """CV and MaxVio of one layer in all runs that have it."""
    charts = {}
    for key, title in (("cv", "CV of the load, a step"), ("max_vio", "MaxVio")):
        traces = []
        for i, (run, history) in enumerate(runs):
            if not history.layers or layer not in history.layers:
                continue
            row = list(history.layers).index(layer)
            steps = [(b.first + b.last) // 2 for b in history.bins]
            values = [getattr(b, key)[row] / b.steps for b in history.bins]
            traces.append(_line(steps, values, label(run), _colour(i)))
        charts[key] = {"data": traces, "layout": _layout(f"{name}: {title}, all runs", rangemode="tozero")}
    return charts


def picked(values: Sequence[float | None], most: int = MOST_POINTS) -> list[int]:
    """Which of ``values`` to draw: all, or lowest and highest of each of ``most`` / 2 stretches, and the ends."""
    if len(values) <= most:
        return list(range(len(values)))
    chosen = {0, len(values) - 1}
    numbers = np.array([math.nan if v is None else v for v in values], dtype=np.float64)
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    for start, end in itertools.pairwise(edges):
        stretch = numbers[start:end]
        if not np.isnan(stretch).all():
            chosen |= {start + int(np.nanargmin(stretch)), start + int(np.nanargmax(stretch))}
    return sorted(chosen)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over about ``window`` values, as many before as after, so that it does not lag behind; fewer after the last
    ones, and as few before as after the first ones, since losses fall steeply there."""
    place = np.arange(len(values))
    after = np.minimum(np.minimum(window // 2, place), len(values) - 1 - place)
    before = np.minimum(window // 2, place)
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return ((total[place + after + 1] - total[place - before]) / (before + after + 1)).tolist()


def smoothing_window(records: int) -> int:
    """Over how many records curves are smoothed; 1 is not at all."""
    return 1 if records < 20 else max(5, records // 50)


def _loss(runs: Sequence[tuple[str, History]]) -> Figure:
    alone = len(runs) == 1
    traces = []
    for i, (run, history) in enumerate(runs):
        traces += _with_smoothed(history, history.scalars["loss"], label(run), i, alone)
        if history.validations:
            steps, losses, _ = zip(*history.validations, strict=True)
            name = "validation" if alone else f"{label(run)}: validation"
            line = _line(steps, losses, name, _colour(1 if alone else i), showlegend=alone, dash="dot")
            traces.append(_marked(line))
    return {"data": traces, "layout": _layout("Loss, nats a token" + ("" if alone else " (dotted: validation)"))}


def _validation(runs: Sequence[tuple[str, History]]) -> Figure:
    traces = []
    for i, (run, history) in enumerate(runs):
        known = [(step, bits) for step, _, bits in history.validations if bits is not None]
        if known:
            steps, bits = zip(*known, strict=True)
            colour = _colour(1 if len(runs) == 1 else i)
            line = _line(steps, bits, label(run), colour, showlegend=len(runs) > 1)
            traces.append(_marked(line))
    return {"data": traces, "layout": _layout("Validation, bits a byte")}


def _mtp(runs: Sequence[tuple[str, History]]) -> Figure:
    alone, deep = len(runs) == 1, any(len(history.mtp_loss) > 1 for _, history in runs)
    traces = []
    for i, (run, history) in enumerate(runs):
        for depth, values in enumerate(history.mtp_loss):
            name = f"depth {depth + 1}" if alone else label(run) + (f", depth {depth + 1}" if deep else "")
            at = picked(values)
            values = smooth(values, smoothing_window(len(values)))
            colour, dash = (_colour(depth), "solid") if alone else (_colour(i), _DASHES[depth % len(_DASHES)])
            traces.append(_line([history.steps[k] for k in at], [values[k] for k in at], name, colour, dash=dash))
    return {"data": traces, "layout": _layout("MTP loss, nats a token (smoothed)", showlegend=True)}


def _memory(runs: Sequence[tuple[str, History]]) -> Figure:
    alone = len(runs) == 1
    both = any(amount is not None for _, history in runs for amount in history.memory["device"])
    traces = []
    for i, (run, history) in enumerate(runs):
        for k, (where, amounts) in enumerate(history.memory.items()):
            if all(amount is None for amount in amounts):
                continue
            at = picked(amounts)
            values = [None if amounts[j] is None else amounts[j] / 1e9 for j in at]  # type: ignore[operator]
            name = where if alone else label(run) + (f", {where}" if both else "")
            colour, dash = (_colour(k), "solid") if alone else (_colour(i), _DASHES[k])
            traces.append(_line([history.steps[j] for j in at], values, name, colour, dash=dash))
    return {"data": traces, "layout": _layout("Memory, GB", showlegend=True, rangemode="tozero")}


def _curves(
    runs: Sequence[tuple[str, History]], key: str, title: str, *, smoothed: bool = False, small: bool = False
) -> Figure:
    alone = len(runs) == 1
    traces = []
    for i, (run, history) in enumerate(runs):
        values = history.scalars[key]
        if smoothed:
            traces += _with_smoothed(history, values, label(run), i, alone)
        else:
            at = picked(values)
            x, y = [history.steps[k] for k in at], [values[k] for k in at]
            traces.append(_line(x, y, label(run), _colour(i), showlegend=not alone))
    layout = _layout(title, rangemode="tozero" if small else "normal")
    layout["yaxis"] |= {"exponentformat": "e"} if small else {}  # 3e-5, not 30µ
    return {"data": traces, "layout": layout}


def _with_smoothed(history: History, values: list[float], run: str, i: int, alone: bool) -> list[dict[str, Any]]:
    if not values:
        return []
    at, window = picked(values), smoothing_window(len(values))
    steps = [history.steps[k] for k in at]
    raw = _line(steps, [values[k] for k in at], "as logged" if alone else run, _colour(i))
    if window == 1:
        return [raw]
    means = smooth(values, window)
    raw |= {"opacity": 0.35, "showlegend": alone, "line": raw["line"] | {"width": 1}}
    raw["name"] = raw["name"] if alone else f"{run}: as logged"
    raw["hoverinfo"] = "all" if alone else "skip"  # one line a run in the box is enough
    name = "smoothed" if alone else run
    return [raw, _line(steps, [means[k] for k in at], name, _colour(i), width=2.2)]


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _line(
    x: Iterable[int],
    y: Iterable[float | None],
    name: str,
    colour: str,
    *,
    width: float = 1.6,
    dash: str = "solid",
    showlegend: bool = True,
) -> dict[str, Any]:
    steps = list(x)
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(steps) < 20 else "lines",  # a single point is no line
        "x": steps,
        "y": [None if value is None else float(f"{value:.5g}") for value in y],
        "name": name,
        "line": {"color": colour, "width": width, "dash": dash},
        "marker": {"size": 4},
        "showlegend": showlegend,
    }


def _marked(line: dict[str, Any]) -> dict[str, Any]:
    return line | {"mode": "lines+markers" if len(line["x"]) <= 40 else "lines", "marker": {"size": 6}}


def _layout(title: str, *, rangemode: str = "normal", hovermode: str = "x unified", **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title},
        "xaxis": {"title": {"text": "step", "standoff": 4}, "tickformat": ","},
        "yaxis": {"rangemode": rangemode},
        "hovermode": hovermode,
        **more,
    }


def _rounded(values: NDArray, decimals: int) -> list[float | None]:
    return [None if math.isnan(v) else v for v in np.round(values, decimals).tolist()]
