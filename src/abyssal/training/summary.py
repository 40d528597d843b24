"""The final figures of a run, read from its metrics: losses, the balance of every MoE layer, how the biases settled."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from abyssal.analysis.balance import balance


@dataclass(frozen=True)
class LayerSummary:
    """Balance of one layer over the last ``window`` steps.

    ``cv``, ``max_vio`` and ``dead`` are of the load summed over the window, ``cv_per_step`` is the mean of each step's
    CV. ``bias_first`` and ``bias_last`` are the net movement of the bias (mean over experts of its absolute change)
    over the first and the last ``window`` steps; None for a router without one, or a run with no steps besides these.
    """

    cv: float
    cv_per_step: float
    max_vio: float
    dead: int
    bias_range: list[float] | None
    bias_first: float | None
    bias_last: float | None


def summarize(records: list[dict[str, Any]], window: int) -> dict[str, Any]:
    """Summary of a run's metrics records (:func:`abyssal.checkpoint.run.read_metrics`)."""
    train = [r for r in records if r["kind"] == "train"]
    if train:
        window = min(window, train[-1]["step"])
    validations = [r for r in records if r["kind"] == "validation"]
    summary: dict[str, Any] = {"window": window, "layers": {}}
    if validations:
        last, best = validations[-1], min(validations, key=lambda r: r["loss"])
        for name, record in (("validation", last), ("best_validation", best)):
            summary[name] = {key: value for key, value in record.items() if key not in ("kind", "tokens")}
    if train:
        summary["step"] = train[-1]["step"]
        summary["loss"] = train[-1]["loss"]
        summary["tokens"] = train[-1]["tokens"]
        summary["seconds"] = sum(r["step_time"] * r["steps"] for r in train)
        for layer in train[-1]["layers"]:
            summary["layers"][layer] = asdict(_summarize_layer(train, layer, window))
    return summary


def _summarize_layer(train: list[dict[str, Any]], layer: str, window: int) -> LayerSummary:
    end = train[-1]["step"]
    recent = [(r["steps"], r["layers"][layer]) for r in train if r["step"] > end - window]
    total = balance(torch.tensor([r["load"] for _, r in recent], dtype=torch.float64).sum(0))
    cv_per_step = sum(steps * r["cv"] for steps, r in recent) / sum(steps for steps, _ in recent)
    bias = {r["step"]: torch.tensor(r["layers"][layer]["bias"]) for r in train if r["layers"][layer].get("bias")}
    bias_range = [float(bias[end].min()), float(bias[end].max())] if end in bias else None
    first = last = None
    if {window, end - window, end} <= bias.keys():
        first = float(bias[window].abs().mean())  # biases start at 0
        last = float((bias[end] - bias[end - window]).abs().mean())
    return LayerSummary(total.cv, cv_per_step, total.max_vio, total.dead, bias_range, first, last)
