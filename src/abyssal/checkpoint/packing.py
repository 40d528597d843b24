"""Packed weights (:mod:`abyssal.kernels.packed`) in a checkpoint.

    X.weight         U8 [O, blocks, 64], a row's blocks of 64 numbers (int8) or 128 (int4)
    X.weight_scales  BF16 [O, groups]

config.json's quantization_config has quant_method "abyssal" and the kind. transformers does not know it and goes on as
if the file were dense; then the three dimensions, which no weight has, make it stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from abyssal.checkpoint.names import disk_tensors, layer_of
from abyssal.checkpoint.shards import Shards, Stored
from abyssal.config import ModelConfig
from abyssal.errors import UserError
from abyssal.kernels.packed import GROUP, Kind, Packed
from abyssal.model import Transformer
from abyssal.model.quantized import nf4_matrices, packed_buffers, packed_matrices, use_packed

SCALES = "_scales"
KINDS: tuple[Kind, ...] = get_args(Kind)
_METHOD = "abyssal"
_NOT_PACKED = ["*embed_tokens", "*norm", "*kv_b_proj", "*mlp.gate", "*eh_proj"]


def settings(kind: Kind, config: ModelConfig) -> dict[str, Any]:
    """The quantization_config of a checkpoint packed as ``kind``."""
    tied = config.tie_word_embeddings
    head = {} if tied else {"lm_head": "int8"}
    not_packed = [*_NOT_PACKED, *(["lm_head"] if tied else [])]
    return {"quant_method": _METHOD, "kind": kind, "group_size": GROUP, **head, "not_packed": not_packed}


def stored_kind(config: ModelConfig, folder: Path) -> Kind | None:
    """How the checkpoint in ``folder``, whose config this is, says that it is packed; None: not at all. Raises
    UserError for settings that are not :func:`settings`."""
    found = config.published.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != _METHOD:
        return None
    kind = found.get("kind")
    where = f"{folder / 'config.json'}: quantization_config"
    if kind not in KINDS:
        raise UserError(f"{where}.kind: {kind!r} is not one of {', '.join(KINDS)}")
    for key, right in settings(kind, config).items():
        if key in ("group_size", "lm_head") and found.get(key) != right:
            raise UserError(f"{where}.{key}: {found.get(key)!r} is not supported, only {right!r}")
    return kind


def packings(config: ModelConfig, kind: Kind | None) -> dict[str, Packed]:
    """What of ``config``'s model is packed as ``kind``, by published names and without numbers: on the meta device."""
    if kind is None:
        return {}
    with torch.device("meta"):
        model = Transformer(config)
    use_packed(model, kind)
    return dict(packed_matrices(model))


def kind_of(packed: Mapping[str, Packed]) -> Kind | None:
    """How a model with these packed matrices is called: the head is int8 in any."""
    kinds = {matrix.kind for matrix in packed.values()}
    return None if not kinds else "int4" if "int4" in kinds else "int8"


def on_disk(name: str, packed: Packed) -> list[tuple[str, Tensor]]:
    """The two tensors that hold ``packed``, the weight called ``name``; nothing is copied."""
    return [(name, packed.data.unflatten(-1, (-1, 64))), (name + SCALES, packed.scales)]


def from_disk(data: Tensor, scales: Tensor, like: Packed) -> Packed:
    """The other way; ``like`` has kind and shape."""
    return Packed(data.flatten(-2), scales, like.kind, like.shape)


def model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as it is stored, under its published name, layer by layer; nothing is copied. Raises UserError for
    weights in nf4, which is no way to store them."""
    if next(nf4_matrices(model), None) is not None:
        raise UserError("weights in nf4 are only held in memory; save the adapter, or load with weights='dense'")
    packed = dict(packed_matrices(model))
    if not packed:
        yield from disk_tensors(model)
        return
    hidden = packed_buffers(model)
    found = [(name, tensor) for name, tensor in disk_tensors(model) if name not in hidden]
    found += [pair for name, matrix in packed.items() for pair in on_disk(name, matrix)]
    yield from sorted(found, key=lambda pair: -1 if (layer := layer_of(pair[0])) is None else layer)


def check_packed_scales(scales: Tensor, name: str) -> None:
    """Raises UserError where a scale of the packed weight ``name`` is not finite."""
    if not scales.isfinite().all():
        raise UserError(f"{name}{SCALES}: holds NaN or infinite numbers; the file or the model is damaged")


def wrong_packed(name: str, shards: Shards, packed: Packed) -> list[str]:
    """What is wrong with how ``shards`` has the weight ``name``, which is to be ``packed``."""
    stored, scales = shards[name], shards.tensors.get(name + SCALES)
    rights = dict(on_disk(name, packed))
    if stored.dtype != torch.uint8:
        return [f"{name}: {stored.dtype}, but quantization_config says that it is {packed.kind}"]
    if scales is None:
        return [f"{name}: {packed.kind} without its scales ({name}{SCALES} is missing)"]
    if scales.dtype != torch.bfloat16:
        return [f"{name}{SCALES}: {scales.dtype}; expected torch.bfloat16"]
    found: list[tuple[str, Stored]] = [(name, stored), (name + SCALES, scales)]
    return [
        f"{part}: shape {list(there.shape)}, {packed.kind} of {list(packed.shape)} has {list(rights[part].shape)}"
        for part, there in found
        if there.shape != tuple(rights[part].shape)
    ]
