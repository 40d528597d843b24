"""All tensors of a model, and what decides how many bytes each takes: what plans of memory are counted on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from abyssal.analysis.blueprint import blueprint
from abyssal.checkpoint.names import layer_of
from abyssal.config import ModelConfig
from abyssal.model.moe import Experts
from abyssal.model.router import Router

Split = Literal["expert", "tensor", "none"]
_BY_TENSOR = (
    *("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "q_b_proj", "k_b_proj", "v_b_proj", "kv_b_proj"),
    *("o_proj", "gate_proj", "up_proj", "down_proj"),
)


@dataclass(frozen=True)
class Weight:
    """A tensor of the model, and what decides how many bytes it takes."""

    name: str
    shape: torch.Size
    layer: int | None
    product: bool
    """Read by matrix products only (BF16 while training in BF16)."""
    muon: bool
    """Updated by Muon where that is the optimizer."""
    trained: bool
    split: Split
    mtp: bool
    """Of an MTP module."""

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def adaptable(self) -> str | None:
        """The part that LoRA may be put on (:data:`abyssal.analysis.activations.ADAPTABLE`)."""
        if not self.product or "_proj" not in self.name or "eh_proj" in self.name:
            return None
        if ".self_attn." in self.name:
            return "attention"
        if ".shared_experts." in self.name:
            return "shared"
        return "experts" if ".experts." in self.name else "mlp"


class Inventory:
    """All tensors of a model, counted on one built without memory."""

    def __init__(self, config: ModelConfig) -> None:
        model = blueprint(config)
        products: set[int] = set()
        muon: set[int] = set()
        for module in model.modules():
            if isinstance(module, Experts):
                products |= {id(p) for p in module.parameters()}
            elif isinstance(module, nn.Linear):
                products.add(id(module.weight))
            if isinstance(module, Router) or (isinstance(module, nn.Linear) and module is not model.lm_head):
                muon.add(id(module.weight))
        muon |= {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
        products.discard(id(model.model.embed_tokens.weight))  # also where the head is tied to it
        muon.discard(id(model.lm_head.weight))
        self.config = config
        self.weights = [
            Weight(
                name, p.shape, layer_of(name), id(p) in products, id(p) in muon, True, _split(name), _mtp(name, config)
            )
            for name, p in model.named_parameters()
        ]
        self.weights += [
            Weight(name, b.shape, layer_of(name), False, False, False, "none", _mtp(name, config))
            for name, b in model.named_buffers()
        ]

    @cached_property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights)


def _mtp(name: str, config: ModelConfig) -> bool:
    return (layer_of(name) or 0) >= config.num_hidden_layers


def _split(name: str) -> Split:
    if ".mlp.experts." in name:
        return "expert"
    return "tensor" if any(f"{part}.weight" in name for part in _BY_TENSOR) else "none"
