"""A model in a folder, in the published layout: config.json, safetensors, and the tokenizer's files beside them.

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

from abyssal.checkpoint.names import copy_in, disk_tensors, is_repeated
from abyssal.config import ModelConfig, published_model_type, read_config, to_published
from abyssal.errors import UserError
from abyssal.model import Transformer

WEIGHTS = "model.safetensors"


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


def load_model(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Transformer:
    """The model in ``folder``, ready to use, in the dtype of the file unless ``dtype`` says otherwise.

    Raises UserError where a file is missing or corrupt, or the tensors are not those that config.json calls for.
    """
    config = read_config(folder)
    tensors = read_tensors(folder / WEIGHTS)
    with torch.device("meta"):
        model = Transformer(config)
    stored = tensors["model.embed_tokens.weight"].dtype if "model.embed_tokens.weight" in tensors else torch.float32
    model.to(dtype or stored)
    model.to_empty(device=device or "cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # to_empty gave each of the two its own memory
    load_state(model, tensors, str(folder / WEIGHTS))
    return model.eval()


def load_state(model: Transformer, tensors: dict[str, Tensor], where: str) -> None:
    """Copies ``tensors`` into ``model``. Raises UserError naming ``where`` and every tensor missing, left over or of
    another shape; then the model is unusable."""
    left = {name: tensor for name, tensor in tensors.items() if not is_repeated(name, model.config.num_hidden_layers)}
    if model.config.tie_word_embeddings:
        left.pop("lm_head.weight", None)
    missing, wrong = [], []
    for name, target in disk_tensors(model):
        source = left.pop(name, None)
        if source is None:
            missing.append(name)
        elif trouble := copy_in(target, source, name):
            wrong.append(trouble)
    for trouble, names in (("missing", missing), ("unexpected", list(left)), ("of the wrong shape", wrong)):
        if names:
            more = f", … ({len(names)} in all)" if len(names) > 5 else ""
            raise UserError(f"{where}: tensors {trouble}: {', '.join(names[:5])}{more}")
