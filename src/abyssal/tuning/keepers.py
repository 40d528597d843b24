"""What a tuning run's checkpoints hold where it is not the whole model: an adapter, or the experts that are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from abyssal.checkpoint.adapter import copy_adapter, read_adapter, write_adapter
from abyssal.checkpoint.names import BIAS
from abyssal.checkpoint.overlay import TENSORS, Overlay, read_overlay, write_overlay
from abyssal.errors import UserError
from abyssal.kernels.adamw import merge
from abyssal.model import Transformer
from abyssal.model.partial import PartialExperts
from abyssal.training.trainer import Keeper


class AdapterKeeper(Keeper):
    """An adapter as PEFT reads it. ``base`` is where the model came from, ``identity`` tells it from others."""

    def __init__(self, base: str, identity: str) -> None:
        self.base, self.identity = base, identity

    def write(self, model: Transformer, folder: Path, lows: Mapping[str, Tensor]) -> None:
        write_adapter(folder, model, base=self.base, identity=self.identity)

    def read(self, model: Transformer, folder: Path) -> None:
        copy_adapter(read_adapter(folder), model)


class ExpertsKeeper(Keeper):
    """The tensors that are trained (experts one by one, as published), in FP32, and the routers' biases."""

    def __init__(self, base: str, identity: str) -> None:
        self.base, self.identity = base, identity

    def write(self, model: Transformer, folder: Path, lows: Mapping[str, Tensor]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, tensor in _trained(model).items():
            low = lows.get(name)
            whole = tensor if low is None else merge(tensor, low)
            tensors |= {published: part.clone() for published, part in _published(model, name, whole)}
        biases = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(BIAS))
        write_overlay(Overlay(self.base, self.identity, tensors | dict(biases)), folder)

    @torch.no_grad()
    def read(self, model: Transformer, folder: Path) -> None:
        stored = read_overlay(folder).tensors
        places = {
            published: part
            for name, tensor in _trained(model).items()
            for published, part in _published(model, name, tensor)
        }
        places |= {name: buffer for name, buffer in model.named_buffers() if name.endswith(BIAS)}
        if places.keys() != stored.keys():
            odd = sorted(places.keys() ^ stored.keys())[0]
            raise UserError(f"{folder / TENSORS}: {odd}: in only one of this file and the run")
        for name, place in places.items():
            if stored[name].shape != place.shape:
                raise UserError(f"{folder / TENSORS}: {name}: {list(stored[name].shape)}, expected {list(place.shape)}")
            place.copy_(stored[name])


def _trained(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _published(model: Transformer, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A trained parameter as the tensors that a checkpoint has: an expert's as views, each by its own number."""
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    if not isinstance(module, PartialExperts):
        return [(name, tensor)]
    out = []
    for expert, part in zip(module.trained, tensor, strict=True):
        if own == "down_proj":
            out.append((f"{parent}.{expert}.down_proj.weight", part))
        else:
            gate, up = part.chunk(2)
            out += [(f"{parent}.{expert}.gate_proj.weight", gate), (f"{parent}.{expert}.up_proj.weight", up)]
    return out
