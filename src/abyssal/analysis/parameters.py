"""How many parameters a model has, all and active, by part and by layer: counted on the model itself, built on the
meta device."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from abyssal.analysis.blueprint import blueprint
from abyssal.checkpoint.names import layer_of
from abyssal.config import ModelConfig

_PARTS = (
    (r"^model\.embed_tokens\.", "embedding"),
    (r"\.self_attn\.", "attention"),
    (r"\.mlp\.gate\.", "router"),
    (r"\.mlp\.experts\.", "routed experts"),
    (r"\.mlp\.shared_experts\.", "shared experts"),
    (r"\.mlp\.", "dense MLP"),
    (r"\.eh_proj\.", "projection"),
    (r"norm\.", "norms"),
    (r"^lm_head\.", "head"),
)


@dataclass(frozen=True)
class LayerParameters:
    """One layer's parameters by part, and those that a token uses."""

    by_part: dict[str, int]
    active_by_part: dict[str, int]

    @property
    def total(self) -> int:
        """All of the layer."""
        return sum(self.by_part.values())

    @property
    def active(self) -> int:
        """What one token uses of it."""
        return sum(self.active_by_part.values())


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model; e_score_correction_bias is counted, a tied head once, MTP modules apart."""

    by_part: dict[str, int]
    active_by_part: dict[str, int]
    layers: tuple[LayerParameters, ...]
    """The main model's layers, without embedding, last norm and head."""
    mtp_layers: tuple[LayerParameters, ...]
    """The MTP modules, without the embedding and head that they share with the main model."""

    @property
    def total(self) -> int:
        """The main model."""
        return sum(self.by_part.values())

    @property
    def active(self) -> int:
        """What one token's forward pass uses of it, embedding and head included."""
        return sum(self.active_by_part.values())

    @property
    def active_without_embedding(self) -> int:
        """The same without the input embedding, which is a lookup (a tied head is still counted)."""
        tied = "head" not in self.active_by_part
        return self.active - (0 if tied else self.active_by_part["embedding"])

    @property
    def mtp(self) -> int:
        """All MTP modules."""
        return sum(layer.total for layer in self.mtp_layers)


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: attention, routed experts, …"""
    return next(part for pattern, part in _PARTS if re.search(pattern, name))


def count_parameters(config: ModelConfig) -> Parameters:
    """Counts ``config``'s parameters; takes no memory for weights."""
    model = blueprint(config)
    outside: dict[str, int] = {}
    layers: list[dict[str, int]] = [{} for _ in model.model.layers]
    # named_parameters drops the second name of a tied tensor; the only persistent buffer is the router's bias.
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layer, part = layer_of(name), part_of(name)
        counts = outside if layer is None else layers[layer]
        counts[part] = counts.get(part, 0) + tensor.numel()
    counted = [LayerParameters(parts, _active(config, parts)) for parts in layers]
    main, mtp = counted[: config.num_hidden_layers], counted[config.num_hidden_layers :]
    return Parameters(
        _sum([layer.by_part for layer in main], outside),
        _sum([layer.active_by_part for layer in main], outside),
        tuple(main),
        tuple(mtp),
    )


def _active(config: ModelConfig, parts: dict[str, int]) -> dict[str, int]:
    active, moe = dict(parts), config.moe
    if moe and "routed experts" in parts:
        # With segment routing each part of a token chooses for itself; at most all experts are used.
        used = min(moe.num_experts_per_tok * moe.segments, moe.n_routed_experts)
        active["routed experts"] = parts["routed experts"] // moe.n_routed_experts * used
    return active


def _sum(layers: list[dict[str, int]], outside: dict[str, int]) -> dict[str, int]:
    """All counts by part, embedding first and head last."""
    total = Counter[str](outside)
    for parts in layers:
        total.update(parts)
    order = [part for _, part in _PARTS]
    return {part: total[part] for part in sorted(total, key=order.index)}
