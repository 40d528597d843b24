"""How far tuning moved the routers' decisions: held-out examples routed by the model as it was and as it is.

The measures are the lens' (:func:`abyssal.analysis.specialisation.drift`). Routing by the model as it was is kept in
the run's folder, since full tuning leaves no way back to that model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abyssal.analysis.lens import NONE, LayerRouting, Text, Texts, look
from abyssal.analysis.specialisation import Drift, drift
from abyssal.checkpoint import read_tensors, write_tensors
from abyssal.data.examples import Examples
from abyssal.errors import UserError
from abyssal.model import Transformer
from abyssal.training.hardware import autocast

FILE = "routing.safetensors"


@dataclass(frozen=True)
class Before:
    """Held-out tokens, and what the main model's layers decided for them before tuning."""

    texts: Texts
    routing: dict[int, LayerRouting]

    def write(self, folder: Path) -> None:
        """Into ``folder``, as FILE."""
        tensors = {name: torch.from_numpy(getattr(self.texts, name)) for name in ("ids", "document", "position")}
        for layer, kept in self.routing.items():
            tensors[f"layers.{layer}.indices"] = torch.from_numpy(kept.indices)
            tensors[f"layers.{layer}.weights"] = torch.from_numpy(kept.weights)
        write_tensors(tensors, folder / FILE)

    @classmethod
    def read(cls, folder: Path, model: Transformer) -> Before:
        """From ``folder``. Raises UserError where the file is damaged or of another model."""
        tensors = read_tensors(folder / FILE)
        try:
            ids, document, position = (tensors[name].numpy() for name in ("ids", "document", "position"))
            texts = _texts(ids, document, position)
            layers = [layer for layer in model.routers if layer < model.config.num_hidden_layers]
            routing = {layer: _layer(model, layer, tensors, len(ids)) for layer in layers}
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{folder / FILE}: not this run's routing ({error!r}); remove it to go on without"
            ) from None
        return cls(texts, routing)


def look_before(model: Transformer, examples: Examples, tokens: int, length: int, dtype: torch.dtype) -> Before | None:
    """What ``model`` decides for the first ``tokens`` tokens of ``examples``, no sequence longer than ``length``; None
    where it has no experts or there is nothing to look at."""
    if not model.routers or tokens == 0 or len(examples.tokens) == 0:
        return None
    ids, document, position, seen = [], [], [], 0
    for number, (start, end) in enumerate(zip(examples.starts[:-1], examples.starts[1:], strict=True)):
        count = min(int(end - start), length)
        if seen and seen + count > tokens:
            break
        ids.append(examples.tokens[start : start + count])
        document.append(np.full(count, number))
        position.append(np.arange(count))
        seen += count
    parts = (np.concatenate(part).astype(np.int32) for part in (ids, document, position))
    texts = _texts(*parts)
    routing = _look(model, texts, dtype)
    return Before(texts, {layer: kept for layer, kept in routing.items() if not kept.mtp})


def measure_drift(model: Transformer, before: Before, dtype: torch.dtype) -> dict[int, Drift]:
    """By layer, how far ``model``'s decisions lie from those ``before``."""
    after = _look(model, before.texts, dtype)
    return {layer: drift(kept, after[layer]) for layer, kept in before.routing.items()}


def figures(drifts: dict[int, Drift]) -> dict[str, dict[str, float]]:
    """The same as plain numbers, for summary.json."""
    return {
        str(layer): {key: value for key, value in asdict(d).items() if key != "by_token"} for layer, d in drifts.items()
    }


def _look(model: Transformer, texts: Texts, dtype: torch.dtype) -> dict[int, LayerRouting]:
    device = model.model.embed_tokens.weight.device
    with autocast(device, dtype):  # some weights may be BF16 and others FP32
        return look(model, texts)


def _texts(ids: Any, document: Any, position: Any) -> Texts:
    text = Text("held-out examples", int(document.max()) + 1, len(ids), cut=False)
    return Texts([text], int(position.max()) + 1, ids, document, np.zeros(len(ids), np.int32), position)


def _layer(model: Transformer, layer: int, tensors: dict[str, Tensor], count: int) -> LayerRouting:
    moe = model.config.moe
    assert moe is not None
    indices, weights = (tensors[f"layers.{layer}.{name}"].numpy() for name in ("indices", "weights"))
    shape = (count, moe.num_experts_per_tok * moe.segments)
    if (
        indices.shape != shape
        or weights.shape != shape
        or not NONE <= indices.min() <= indices.max() < moe.n_routed_experts
    ):
        raise ValueError(f"layer {layer}: {indices.shape}")
    nothing = np.zeros(count, np.float32)
    return LayerRouting(layer, 0, moe.n_routed_experts, moe.segments, indices, weights, None, nothing, nothing)
