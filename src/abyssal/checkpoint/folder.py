"""Writing a model into a folder, in the published layout: config.json and safetensors.

A training checkpoint is such a folder too (with the optimizer's state beside), so whatever reads one reads the other.
No pickle is read, ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from abyssal.checkpoint.names import disk_tensors, stacked_name
from abyssal.checkpoint.packing import kind_of, model_tensors, settings
from abyssal.checkpoint.shards import WEIGHTS
from abyssal.checkpoint.writer import Entry, write_shard
from abyssal.config import ModelConfig, published_model_type, to_published
from abyssal.errors import UserError
from abyssal.kernels.adamw import merge
from abyssal.kernels.packed import Kind
from abyssal.model import Transformer
from abyssal.model.quantized import packed_matrices


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes ``tensors`` to a .safetensors file. Raises OSError where the disk does not take them."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps the system's error in text
        raise OSError(None, f"cannot be written: {error}", str(path)) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, on the CPU. Raises UserError where it is missing, truncated or corrupt."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def config_to_json(config: ModelConfig, dtype: torch.dtype, kind: Kind | None = None) -> str:
    """``config`` as config.json: in the published form where some published code computes it, else in our own. ``kind``
    is that of packed weights."""
    about = {} if kind is None else {"quantization_config": settings(kind, config)}
    try:
        data = to_published(config, published_model_type(config))
        for key in ("quantization_config", "dtype"):  # they describe the file that this config came from
            data.pop(key, None)
        data |= about | {"torch_dtype": str(dtype).removeprefix("torch.")}
    except UserError:
        data = config.model_dump()
        data["published"].pop("quantization_config", None)
        data["published"] |= about
    return json.dumps(data, indent=2) + "\n"


def save_model(model: Transformer, folder: Path, lows: Mapping[str, Tensor] | None = None) -> None:
    """Writes config.json and model.safetensors into ``folder`` (which exists).

    ``lows``, by parameter name, are the other halves of those that hold half of an FP32 number
    (:func:`abyssal.kernels.adamw.split`); these are written whole, each put together only when its turn comes. Packed
    weights are written as they are.
    """
    dtype, kind = model.model.embed_tokens.weight.dtype, kind_of(dict(packed_matrices(model)))
    (folder / "config.json").write_text(config_to_json(model.config, dtype, kind), encoding="utf-8")
    if not lows:
        write_tensors(dict(model_tensors(model)), folder / WEIGHTS)
        return
    halves = {name: lows.get(stacked_name(name)) for name, _ in disk_tensors(model)}
    entries = [
        Entry(name, tensor.dtype if halves[name] is None else torch.float32, tuple(tensor.shape))
        for name, tensor in disk_tensors(model)
    ]
    # An expert's matrix is a view of the stack of all; its other half lies at the same place of the stack's.
    whole = (
        (name, tensor)
        if (low := halves[name]) is None
        else (name, merge(tensor, low.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())))
        for name, tensor in disk_tensors(model)
    )
    write_shard(folder / WEIGHTS, entries, whole)
