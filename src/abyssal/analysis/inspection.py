"""All that ``abyssal inspect`` tells of a model, worked out from its config without memory for weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abyssal.analysis.cache import DTYPES, CacheSize, cache_size
from abyssal.analysis.flops import Flops, count_flops
from abyssal.analysis.layers import LayerGroup, group_layers
from abyssal.analysis.parameters import Parameters, count_parameters
from abyssal.analysis.weights import Weights, count_weights
from abyssal.config import ModelConfig


@dataclass(frozen=True)
class Inspection:
    """A model's figures, those of its cache and operations for ``batch`` sequences of ``flops.context`` tokens."""

    config: ModelConfig
    counts: Parameters
    flops: Flops
    layers: list[LayerGroup]
    cache: CacheSize
    weights: dict[str, Weights]
    batch: int

    @property
    def context(self) -> int:
        """Tokens a sequence."""
        return self.flops.context

    def cache_bytes(self, *, expanded: bool = False, whole: bool = False) -> dict[str, int]:
        """Bytes by dtype that the cache of one token takes; ``whole``: of all tokens of the batch."""
        amount = {"context": self.context, "batch": self.batch} if whole else {}
        return {
            str(dtype).removeprefix("torch."): self.cache.nbytes(dtype, expanded=expanded, **amount) for dtype in DTYPES
        }

    def as_json(self) -> dict[str, Any]:
        """The figures as plain data; operations and bytes are a token's unless the key says otherwise."""
        counts, flops, cache = self.counts, self.flops, self.cache
        one, expanded = self.cache_bytes(), self.cache_bytes(expanded=True)
        return {
            "parameters": {"total": counts.total, **counts.by_part},
            "active": {"total": counts.active, **counts.active_by_part},
            "active_without_embedding": counts.active_without_embedding,
            "mtp": counts.mtp,
            "layers": [
                {
                    "kind": group.kind,
                    "layers": list(group.layers),
                    "parameters": {"total": group.parameters.total, **group.parameters.by_part},
                    "active": {"total": group.parameters.active, **group.parameters.active_by_part},
                    "flops": group.flops,
                }
                for group in self.layers
            ],
            "cached_values_per_token_and_layer": cache.values,
            "cached_bytes_per_token": {key: one[key] for key in ("bfloat16", "float32")},
            "expanded_bytes_per_token": {key: expanded[key] for key in ("bfloat16", "float32")},
            "cache": {
                "context": self.context,
                "batch": self.batch,
                "values_per_token_and_layer": {"cached": cache.values, "expanded": cache.expanded_values},
                "bytes_per_token": {"cached": one, "expanded": expanded},
                "bytes": {
                    "cached": self.cache_bytes(whole=True),
                    "expanded": self.cache_bytes(expanded=True, whole=True),
                },
                "ratio": cache.ratio,
            },
            "weights": {name: {"main": bytes_.main, "mtp": bytes_.mtp} for name, bytes_ in self.weights.items()},
            "flops": {
                "context": flops.context,
                "forward": {"total": flops.forward, **flops.by_part},
                "mtp": {"total": flops.mtp, **flops.mtp_by_part},
                "training": flops.training,
            },
            "config": self.config.model_dump(),
        }


def inspect_model(config: ModelConfig, *, context: int, batch: int = 1) -> Inspection:
    """The figures of ``config`` for ``batch`` sequences of ``context`` tokens. Raises ValueError for a context or
    batch below 1."""
    if batch < 1:
        raise ValueError(f"batch: {batch} is not at least 1")
    counts, flops = count_parameters(config), count_flops(config, context)
    layers = group_layers(config, counts, flops)
    return Inspection(config, counts, flops, layers, cache_size(config), count_weights(config), batch)
