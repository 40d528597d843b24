"""State dict in memory <-> tensors on disk: the one difference is that experts are stacked in memory.

    mlp.experts.gate_up_proj [E, 2F, D]  <->  mlp.experts.{e}.gate_proj.weight, mlp.experts.{e}.up_proj.weight [F, D]
    mlp.experts.down_proj    [E, D, F]   <->  mlp.experts.{e}.down_proj.weight [D, F]

Everything else has the same name in both. A tied head is written once, as the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_STACKED = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)$")


def disk_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its published name; experts as views of the stacked tensors, so that nothing is copied."""
    for name, tensor in _state(model):
        match = _STACKED.match(name)
        if not match:
            yield name, tensor
            continue
        prefix, kind = match.groups()
        for expert in range(tensor.shape[0]):
            if kind == "down_proj":
                yield f"{prefix}{expert}.down_proj.weight", tensor[expert]
            else:
                width = tensor.shape[1] // 2
                yield f"{prefix}{expert}.gate_proj.weight", tensor[expert, :width]
                yield f"{prefix}{expert}.up_proj.weight", tensor[expert, width:]


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers without gradient history, each once."""
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())
    yield from model.named_buffers()


def is_repeated(name: str, n_layers: int) -> bool:
    """Whether ``name`` is a tensor that published checkpoints repeat under an MTP module: its embedding or its head."""
    match = re.match(r"model\.layers\.(\d+)\.(embed_tokens|shared_head\.head)\.weight$", name)
    return match is not None and int(match[1]) >= n_layers


@torch.no_grad()
def copy_in(target: Tensor, source: Tensor, name: str) -> str | None:
    """Copies ``source`` over ``target``, cast to its dtype; the trouble as a message where the shapes differ."""
    if target.shape != source.shape:
        return f"{name}: shape {list(source.shape)}, the config says {list(target.shape)}"
    target.copy_(source)
    return None
