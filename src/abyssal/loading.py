"""``abyssal.load``: a model and its tokenizer from a run, a model folder, or the hub."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from abyssal import hub
from abyssal.checkpoint import load_model
from abyssal.checkpoint.adapter import CONFIG, TENSORS, apply_adapter, is_adapter, read_adapter, read_adapter_settings
from abyssal.checkpoint.load import Progress, Weights, kept_layers, read_model_config
from abyssal.checkpoint.overlay import is_overlay, lay_over, read_overlay
from abyssal.checkpoint.parts import WHOLE, Part
from abyssal.checkpoint.run import MANIFEST, Run
from abyssal.checkpoint.sharded import gather, is_sharded
from abyssal.checkpoint.shards import INDEX, WEIGHTS, files_of
from abyssal.config import ModelConfig, preset, preset_names, read_config, read_mapping
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.model import Transformer
from abyssal.model.adapting import merge_lora, mergeable


def load(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    weights: Weights = "auto",
    allow_missing: Sequence[str] = (),
    threads: int = 1,
    progress: Progress | None = None,
) -> tuple[Transformer, Tokenizer | None]:
    """The model in ``source``, in eval mode, and its tokenizer (None where the folder has no tokenizer files).

    ``source`` is a run (its best checkpoint by validation loss is taken), a checkpoint of one, a folder in the
    published layout, or a name on the hub (``owner/name``, ``owner/name@revision``). The other arguments are those of
    :func:`abyssal.checkpoint.load_model`; with ``layers`` only the files that hold them are downloaded. ``source`` may
    hold an adapter (or be a run that made one): then its base is loaded, see :func:`load_weights`. Raises UserError
    where something is missing, corrupt, or does not fit together.
    """
    folder = find(source, layers=layers)
    tokenizer = find_tokenizer(folder)  # first: it takes less time to find out that it is damaged
    model = load_weights(
        folder,
        dtype=dtype,
        device=device,
        layers=layers,
        weights=weights,
        allow_missing=allow_missing,
        threads=threads,
        progress=progress,
    )
    return model, tokenizer


def find(source: str | Path, *, layers: int | Sequence[int] | None = None, weights: bool = True) -> Path:
    """The folder with config.json, weights and tokenizer that ``source`` names, as in :func:`load`; fetched from the
    hub where it is a name there, without ``weights`` only config and tokenizer. Raises UserError."""
    folder = Path(source)
    if folder.is_file():
        raise UserError(f"{folder}: a file; expected the folder that holds config.json and the weights")
    if os.path.lexists(folder):
        return _in_run(folder) if (folder / MANIFEST).is_file() else folder
    name = str(source)
    if name in preset_names():
        raise UserError(f"{name}: a preset is a config without weights; expected a run, a folder or a name on the hub")
    if not hub.is_hub_id(name):
        raise UserError(f"{name}: no such run or folder, and not a name on the hub (owner/name)")
    folder = _fetch(name, hub.SMALL)
    if is_adapter(folder):
        return _fetch(name, (TENSORS,))
    if not weights:
        return folder
    if not (folder / INDEX).is_file():
        return _fetch(name, (WEIGHTS,))
    return _fetch(name, files_of(folder, kept_layers(layers, read_model_config(folder))))


def base_of(folder: Path, *, layers: int | Sequence[int] | None = None, weights: bool = True) -> Path:
    """The folder of the model that the adapter or overlay in ``folder`` is for; any other ``folder`` itself. It is
    looked for beside the adapter, then as a source of its own (:func:`find`). Raises UserError where it is not there,
    or is an adapter too."""
    if is_adapter(folder):
        name = read_adapter_settings(folder).get("base_model_name_or_path")
    elif is_overlay(folder):
        name = read_overlay(folder).base
    else:
        return folder
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / CONFIG}: base_model_name_or_path: {name!r}; expected a path or a name on the hub")
    beside = folder / name
    try:
        base = find(beside if beside.is_dir() else name, layers=layers, weights=weights)
    except UserError as error:
        raise UserError(f"{folder}: its base is not there: {error}") from None
    if is_adapter(base) or is_overlay(base):
        raise UserError(f"{folder}: its base {base} has a base itself; merge that one first: abyssal export")
    return base


def load_weights(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    layers: int | Sequence[int] | None = None,
    weights: Weights = "auto",
    allow_missing: Sequence[str] = (),
    part: Part = WHOLE,
    threads: int = 1,
    progress: Progress | None = None,
) -> Transformer:
    """The model in a ``folder`` that :func:`find` gave, in eval mode, by :func:`abyssal.checkpoint.load_model`.

    An adapter or overlay is laid over its base: an adapter becomes part of dense weights, and is kept beside packed and
    FP8 ones (:mod:`abyssal.model.lora`); an overlay needs dense ones. With a ``part`` it can be neither. Raises
    UserError.
    """
    base = base_of(folder, layers=layers)
    if base != folder and not part.whole:
        raise UserError(
            f"{folder}: an adapter or overlay; on several processes it has to be part of its base: abyssal export"
        )
    adapter = read_adapter(folder) if is_adapter(folder) else None
    overlay = read_overlay(folder) if is_overlay(folder) else None
    if overlay is not None and weights not in ("auto", "dense"):
        raise UserError(f"{folder}: experts to be laid over a base need weights='dense'; export it, then quantise that")
    model = load_model(
        base,
        dtype=dtype,
        device=device,
        layers=layers,
        weights=weights,
        allow_missing=allow_missing,
        part=part,
        threads=threads,
        progress=progress,
    )
    if overlay is not None:
        lay_over(model, overlay, folder)
    if adapter is not None:
        wanted = [p for p in model.parameters() if p.requires_grad]
        apply_adapter(adapter, model, trainable=False)
        if mergeable(model):
            merge_lora(model)
            for parameter in wanted:
                parameter.requires_grad_(True)
        else:
            model.requires_grad_(False)
    return model.eval()


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in ``folder``, with the ends of text that its generation_config.json lists; of an adapter without
    one, that of its base; None where there is no tokenizer.json and no tiktoken.model. Raises UserError where one of
    the files is damaged."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tiktoken.model")):
        base = base_of(folder, weights=False)
        return None if base == folder else find_tokenizer(base)
    tokenizer = Tokenizer.load(folder)
    file = folder / "generation_config.json"
    ends = read_mapping(file).get("eos_token_id") if file.is_file() else None
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in listed):
        raise UserError(f"{file}: eos_token_id: {ends!r}; expected a token id or a list of them")
    tokenizer.end_ids = frozenset(listed)
    return tokenizer


def find_config(source: str) -> ModelConfig:
    """The config of a preset, a config.json or its folder, a run, or a name on the hub. Raises UserError."""
    path = Path(source)
    if source in preset_names():
        return preset(source)
    if os.path.lexists(path):
        return read_config(base_of(_in_run(path) if (path / MANIFEST).is_file() else path, weights=False))
    if path.suffix == ".json" or not hub.is_hub_id(source):
        return preset(source) if "/" not in source and not path.suffix else read_config(path)
    return read_config(_fetch(source, hub.CONFIG))


def _fetch(name: str, patterns: Sequence[str]) -> Path:
    try:
        return hub.fetch(name, patterns, progress=sys.stderr.isatty())
    except UserError as error:
        raise UserError(f"{name}: no such folder here; on the hub: {str(error).removeprefix(f'{name}: ')}") from None


def _in_run(path: Path) -> Path:
    run = Run(path)
    step = run.best()
    if step is None:
        raise UserError(f"{path}: this run has no checkpoint yet")
    folder = run.checkpoint(step)
    if is_sharded(folder):
        gather(folder)  # the first time that somebody wants to read it
    return folder
