"""A model layer by layer, those that are alike folded into one line: "3-60 MoE"."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from abyssal.analysis.flops import Flops
from abyssal.analysis.parameters import LayerParameters, Parameters
from abyssal.config import ModelConfig


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one kind (dense, MoE or MTP) with equal figures, which are those of each of them."""

    kind: str
    layers: tuple[int, ...]
    parameters: LayerParameters
    flops: int
    """Of a forward pass a token; an MTP module's with the head that it applies once more."""

    @property
    def label(self) -> str:
        """Their numbers as ranges: ``3-60``, or ``2, 4, 6, … 26`` where they do not follow one another."""
        starts = [self.layers[0], *(b for a, b in pairwise(self.layers) if b != a + 1)]
        ends = [*(a for a, b in pairwise(self.layers) if b != a + 1), self.layers[-1]]
        runs = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
        return ", ".join(runs) if len(runs) <= 4 else f"{', '.join(runs[:3])}, … {runs[-1]}"


def group_layers(config: ModelConfig, counts: Parameters, flops: Flops) -> list[LayerGroup]:
    """The layers of ``config`` by kind, in the order of their first; ``counts`` and ``flops`` are this config's."""
    groups: dict[tuple[str, int, int, int], LayerGroup] = {}
    for layer, parameters in enumerate((*counts.layers, *counts.mtp_layers)):
        kind = "MoE" if config.is_moe_layer(layer) else "dense"
        kind = "MTP" if layer >= config.num_hidden_layers else kind
        cost = flops.by_layer[layer]
        key = (kind, parameters.total, parameters.active, cost)
        known = groups[key].layers if key in groups else ()
        groups[key] = LayerGroup(kind, (*known, layer), parameters, cost)
    return list(groups.values())
