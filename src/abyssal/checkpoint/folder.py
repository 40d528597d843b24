"""Writing a model into a folder, in the published layout: config.json and safetensors.

A training checkpoint is such a folder too (with the optimizer's state beside), so whatever reads one reads the other.
No pickle is read, ever.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from abyssal.checkpoint.names import disk_tensors
from abyssal.checkpoint.shards import WEIGHTS
from abyssal.config import ModelConfig, published_model_type, to_published
from abyssal.errors import UserError
from abyssal.model import Transformer


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


def config_to_json(config: ModelConfig, dtype: torch.dtype) -> str:
    """``config`` as config.json: in the published form where some published code computes it, else in our own."""
    try:
        data = to_published(config, published_model_type(config))
        for key in ("quantization_config", "dtype"):  # they describe the file that this config came from
            data.pop(key, None)
        data["torch_dtype"] = str(dtype).removeprefix("torch.")
    except UserError:
        data = config.model_dump()
    return json.dumps(data, indent=2) + "\n"


def save_model(model: Transformer, folder: Path) -> None:
    """Writes config.json and model.safetensors into ``folder`` (which exists)."""
    (folder / "config.json").write_text(config_to_json(model.config, model.lm_head.weight.dtype), encoding="utf-8")
    write_tensors(dict(disk_tensors(model)), folder / WEIGHTS)
