"""Some of a model's tensors, to be laid over those of another checkpoint: what a run that trains a few experts saves.

overlay.json           the base (a path or a name on the hub) and its identity
overlay.safetensors    whole tensors under their published names, in place of the base's
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abyssal.checkpoint.folder import read_tensors, write_tensors
from abyssal.checkpoint.names import disk_tensors, layer_of
from abyssal.errors import UserError
from abyssal.model import Transformer

OVERLAY = "overlay.json"
TENSORS = "overlay.safetensors"


@dataclass(frozen=True)
class Overlay:
    """What an overlay folder holds."""

    base: str
    identity: str
    """Of the base: :func:`abyssal.checkpoint.adapter.base_identity`."""
    tensors: dict[str, Tensor]


def write_overlay(overlay: Overlay, folder: Path) -> None:
    """Writes ``overlay`` into ``folder``, which exists."""
    write_tensors({name: tensor.contiguous() for name, tensor in overlay.tensors.items()}, folder / TENSORS)
    about = {"base": overlay.base, "identity": overlay.identity}
    (folder / OVERLAY).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def read_overlay(folder: Path) -> Overlay:
    """The overlay in ``folder``. Raises UserError where it is damaged."""
    try:
        about = json.loads((folder / OVERLAY).read_text(encoding="utf-8"))
        base, identity = str(about["base"]), str(about["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / OVERLAY}: damaged ({error!r}); expected the base and its identity") from None
    return Overlay(base, identity, read_tensors(folder / TENSORS))


def is_overlay(folder: Path) -> bool:
    """Whether ``folder`` holds an overlay and no model."""
    return (folder / OVERLAY).is_file() and not (folder / "config.json").is_file()


@torch.no_grad()
def lay_over(model: Transformer, overlay: Overlay, source: Path) -> None:
    """Puts the overlay's tensors, which ``source`` holds, in the place of those of ``model``, dense, in its dtypes.
    Layers that were not loaded are left out. Raises UserError where a name or shape does not fit."""
    places = dict(disk_tensors(model))
    loaded = {layer_of(name) for name in places}
    for name, tensor in overlay.tensors.items():
        if layer_of(name) not in loaded:
            continue
        if name not in places or places[name].shape != tensor.shape:
            there = list(places[name].shape) if name in places else "no such tensor"
            raise UserError(f"{source / TENSORS}: {name}: {list(tensor.shape)}, the base has {there}")
        places[name].copy_(tensor)
