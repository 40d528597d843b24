"""How many parameters a model has, all and active, by part: counted on the model itself, built on the meta device."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from abyssal.config import ModelConfig
from abyssal.model import Transformer

_PARTS = (
    (r"^model\.embed_tokens\.", "embedding"),
    (r"^lm_head\.", "head"),
    (r"\.self_attn\.", "attention"),
    (r"\.mlp\.gate\.", "router"),
    (r"\.mlp\.experts\.", "routed experts"),
    (r"\.mlp\.shared_experts\.", "shared experts"),
    (r"\.mlp\.", "dense MLP"),
    (r"norm\.", "norms"),
)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model; e_score_correction_bias is counted, a tied head once, MTP modules apart."""

    by_part: dict[str, int]
    active_by_part: dict[str, int]
    mtp: int

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


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: attention, routed experts, …"""
    return next(part for pattern, part in _PARTS if re.search(pattern, name))


def count_parameters(config: ModelConfig) -> Parameters:
    """Counts ``config``'s parameters; takes no memory for weights."""
    with torch.device("meta"):
        model = Transformer(config)
    by_part: dict[str, int] = {}
    mtp = 0
    # named_parameters drops the second name of a tied tensor; the only persistent buffer is the router's bias.
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            mtp += tensor.numel()
            continue
        part = part_of(name)
        by_part[part] = by_part.get(part, 0) + tensor.numel()
    active = dict(by_part)
    if config.moe and "routed experts" in active:
        per_expert = active["routed experts"] // config.moe.n_routed_experts
        # With segment routing each part of a token chooses for itself; at most all experts are used.
        used = min(config.moe.num_experts_per_tok * config.moe.segments, config.moe.n_routed_experts)
        active["routed experts"] = per_expert * used
    return Parameters(by_part, active, mtp)
