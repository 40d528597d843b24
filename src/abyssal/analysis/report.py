"""A run, or several beside each other, as one page: figures, curves, what the experts did, samples, the config.

:func:`report` gives the page as text; :mod:`abyssal.analysis.live` serves the same page while a run trains.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from abyssal.analysis.charts import (
    COLOURS,
    MOST_POINTS,
    bias_chart,
    layer_charts,
    load_chart,
    overlaid_layer_charts,
    smoothing_window,
    training_charts,
)
from abyssal.analysis.history import CELLS, History
from abyssal.analysis.page import render_page
from abyssal.analysis.parameters import count_parameters
from abyssal.checkpoint.run import Run
from abyssal.config import ModelConfig, parse, read_mapping
from abyssal.errors import UserError

METRICS, RECIPE = "metrics.jsonl", "recipe.yaml"
# What a page holds of samples, in characters, and the most of one.
_SAMPLES, _SAMPLE = 1_000_000, 20_000


class ReportedRun:
    """A run folder as a report sees it: its history and what it was asked to do. Only :attr:`history` changes while
    the run trains. Raises UserError where ``path`` is no run; a recipe that can't be read is a note on the page."""

    def __init__(self, path: Path, cells: int = CELLS) -> None:
        run = Run(path)
        self.path, self.name = path, path.resolve().name
        self.history = History(path / METRICS, cells)
        self.notes: list[str] = []
        self.hardware: dict[str, Any] = {}
        self.recipe: dict[str, Any] = {}
        self.recipe_text: str | None = None
        self.config: ModelConfig | None = None
        self.model: list[tuple[str, str]] = []
        try:
            hardware = run.manifest.get("hardware")
            self.hardware = hardware if isinstance(hardware, dict) else {}
        except UserError as error:
            self.notes.append(str(error))
        try:
            self.recipe = read_mapping(path / RECIPE)
            self.recipe_text = (path / RECIPE).read_text(encoding="utf-8")
            self.config = parse(ModelConfig, self.recipe.get("model"), f"{path / RECIPE}: model")
            self.model = _describe_model(self.config)
        except UserError as error:
            self.notes.append(str(error))

    @property
    def steps(self) -> int | None:
        """How many steps the recipe asks for."""
        steps = _mapping(self.recipe, "training").get("steps")
        return steps if type(steps) is int else None

    def layer_names(self) -> dict[int, str]:
        """What each layer of experts is called: a number, and whether it is an MTP module's."""
        main = self.config.num_hidden_layers if self.config is not None else None
        layers = self.history.layers or ()
        return {n: f"layer {n} (MTP)" if main is not None and n >= main else f"layer {n}" for n in layers}


def report(paths: Sequence[Path]) -> str:
    """The page on the runs in ``paths``, whole or still training.

    Raises UserError for a folder that is no run, a run without metrics, and where Plotly is missing.
    """
    runs = [ReportedRun(path, CELLS // len(paths)) for path in paths]
    for run in runs:
        run.history.read(whole=True)
        file = run.path / METRICS
        if not file.is_file():
            raise UserError(f"{file}: no such file; this run has no metrics yet")
        if not run.history.steps:
            why = f" ({run.history.first_fault})" if run.history.first_fault else ""
            raise UserError(f"{file}: no training step in it{why}; nothing to report")
    for run, name in zip(runs, unique_names([run.path for run in runs]), strict=True):
        run.name = name
    return render_page("report", f"abyssal: {', '.join(run.name for run in runs)}", report_data(runs))


def report_data(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    """What the page shows, figures included."""
    named = [(run.name, run.history) for run in runs]
    several = len(runs) > 1
    overlaid = []
    if several:
        found = {n for run in runs for n in run.history.layers or ()}
        for layer in sorted(found):
            # Layer 4 may be an MTP module's in one model and not in another.
            names = {run.layer_names()[layer] for run in runs if layer in (run.history.layers or ())}
            name = names.pop() if len(names) == 1 else f"layer {layer}"
            overlaid.append({"layer": layer, "name": name, "charts": overlaid_layer_charts(named, layer, name)})
    return {
        "runs": [
            _run_data(run, _SAMPLES // len(runs)) | {"colour": COLOURS[i % len(COLOURS)]} for i, run in enumerate(runs)
        ],
        "charts": training_charts(named) if any(run.history.steps for run in runs) else {},
        "overlaid": overlaid,
        "differences": _differences(runs) if several else [],
    }


def unique_names(paths: Sequence[Path]) -> list[str]:
    """What runs are called: the folder's name, with as many folders above it as it takes to tell them apart; the same
    folder twice is numbered."""
    whole = [path.resolve().parts[1:] or ("/",) for path in paths]
    names: list[str] = []
    for parts in whole:
        length = 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in whole if other != parts):
            length += 1
        name = "/".join(parts[-length:])
        again = sum(parts == other for other in whole[: len(names)])
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def _run_data(run: ReportedRun, characters: int) -> dict[str, Any]:
    history, names = run.history, run.layer_names()
    experts = None
    if history.bins:
        layers = [
            {
                "layer": layer,
                "name": name,
                "load": load_chart(history, layer, name),
                "bias": bias_chart(history, layer, name),
            }
            for layer, name in names.items()
        ]
        experts = {"layers": layers, "curves": layer_charts(history, names)}
    samples, thinned = _samples(history, characters)
    return {
        "name": run.name,
        "path": str(run.path),
        "figures": _figures(run),
        "notes": [*run.notes, *_notes(run), *thinned],
        "done": bool(history.steps) and run.steps is not None and history.steps[-1] >= run.steps,
        "experts": experts,
        "samples": samples,
        "recipe": run.recipe_text,
        "model": run.model,
    }


def _figures(run: ReportedRun) -> list[tuple[str, str]]:
    history = run.history
    done = history.steps[-1] if history.steps else 0
    figures = [row for row in run.model if row[0] in ("parameters", "active a token")]
    if not figures:
        figures = [("parameters", "–"), ("active a token", "–")]
    figures += [
        ("steps", f"{done:,} of {run.steps:,}" if run.steps is not None else f"{done:,}"),
        ("tokens", f"{history.tokens:,}"),
        ("training time", _duration(history.seconds)),
        ("tokens a second", f"{history.tokens / history.seconds:,.0f}" if history.seconds > 0 else "–"),
    ]
    final = best = None
    if history.validations:
        final, best = history.validations[-1], min(history.validations, key=lambda row: row[1])
    for name, row in (("last", final), ("best", best)):
        where = f" (step {row[0]:,})" if row else ""
        figures.append((f"{name} validation loss", f"{row[1]:.4f}{where}" if row else "–"))
        figures.append((f"{name} bits a byte", f"{row[2]:.4f}{where}" if row and row[2] is not None else "–"))
    for where, amounts in history.memory.items():
        peak = max((amount for amount in amounts if amount is not None), default=None)
        name = "most memory of the process" if where == "process" else "most memory on the device"
        figures.append((name, f"{peak / 1e9:.2f} GB" if peak is not None else "–"))
    device = str(run.hardware.get("device_name") or run.hardware.get("device") or "–")
    return [*figures, ("device", device), ("computed in", str(run.hardware.get("dtype", "–")))]


def _notes(run: ReportedRun) -> Iterator[str]:
    history = run.history
    if history.skipped:
        lines = "line was" if history.skipped == 1 else "lines were"
        yield f"{METRICS}: {history.skipped:,} {lines} skipped; the first: {history.first_fault}"
    if history.cut:
        yield f"{METRICS}: its last line was cut off; the rest is here"
    records = len(history.steps)
    if records > MOST_POINTS:
        yield f"Curves show the lowest and the highest of every {2 * records / MOST_POINTS:,.0f} records."
    if (window := smoothing_window(records)) > 1:
        yield f"Smoothed: mean over {window:,} records."
    if history.records_a_bin > 1:
        yield (
            f"Experts are shown in {len(history.bins):,} stretches of {history.records_a_bin:,} records each: loads "
            "added up, CV and MaxVio averaged, the bias as it was at the end, the most experts that were dead."
        )


def _samples(history: History, most: int) -> tuple[list[dict[str, Any]], list[str]]:
    notes = []
    steps = sorted(history.samples)
    shown = {
        step: [[_cut(prompt), _cut(text)] for prompt, text in samples] for step, samples in history.samples.items()
    }
    size = sum(len(prompt) + len(text) for rows in shown.values() for prompt, text in rows)
    if size > most:
        count = max(2, len(steps) * most // size)
        kept = sorted({round(i * (len(steps) - 1) / (count - 1)) for i in range(count)})
        notes.append(f"Samples of {len(kept):,} of {len(steps):,} steps are shown.")
        steps = [steps[i] for i in kept]
    return [{"step": step, "samples": shown[step]} for step in steps], notes


def _cut(text: str) -> str:
    return text if len(text) <= _SAMPLE else text[:_SAMPLE] + f" … ({len(text) - _SAMPLE:,} characters more)"


def _describe_model(config: ModelConfig) -> list[tuple[str, str]]:
    counts = count_parameters(config)
    rows = [("parameters", _millions(counts.total)), ("active a token", _millions(counts.active))]
    if counts.mtp:
        modules = config.mtp.num_nextn_predict_layers
        rows.append(("MTP modules", f"{modules} of {_millions(counts.mtp)} parameters in all"))
    rows += [("layers", f"{config.num_hidden_layers}"), ("hidden size", f"{config.hidden_size:,}")]
    attention = config.attention
    rows.append(("attention", f"{attention.kind.upper()}, {attention.num_attention_heads} heads"))
    if moe := config.moe:
        shared = f", {moe.n_shared_experts} shared" if moe.n_shared_experts else ""
        rows.append(("experts", f"{moe.n_routed_experts} routed, {moe.num_experts_per_tok} a token{shared}"))
        rows.append(("router", f"{moe.scoring_func}, {moe.topk_method}"))
    else:
        rows.append(("experts", "none"))
    return [*rows, ("vocabulary", f"{config.vocab_size:,}"), ("context", f"{config.max_position_embeddings:,} tokens")]


def _differences(runs: Sequence[ReportedRun]) -> list[list[str]]:
    """Rows of a recipe's field and what it is in each run, for fields that are not the same in all."""
    flat = [
        {key: value for key, value in _flat(run.recipe) if not key.startswith("model.published")} for run in runs
    ]  # published: what a config.json said besides, which changes nothing that is computed
    fields = list(dict.fromkeys(field for fields in flat for field in fields))
    rows = [[field, *(fields.get(field, "–") for fields in flat)] for field in fields]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", json.dumps(value, default=str, ensure_ascii=False)


def _mapping(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _millions(count: int) -> str:
    return f"{count / 1e9:,.2f}B" if count >= 1e9 else f"{count / 1e6:,.2f}M"


def _duration(seconds: float) -> str:
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:,.1f} days"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d} h" if hours else f"{minutes}:{seconds:02d} min"
