"""Writing a model for others: the published layout, in shards, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.checkpoint.atomic import replace_folder
from abyssal.checkpoint.load import Progress
from abyssal.checkpoint.names import SCALE, repeated_names
from abyssal.checkpoint.packing import SCALES, kind_of, model_tensors, settings
from abyssal.checkpoint.precision import FP8, Plan
from abyssal.checkpoint.recast import Recast, Source
from abyssal.checkpoint.shards import Stored
from abyssal.checkpoint.writer import Entry, file_names, split, write_index, write_shard
from abyssal.config import ModelConfig
from abyssal.config.published import for_export
from abyssal.errors import UserError
from abyssal.kernels.packed import Kind, Packed
from abyssal.model import Transformer
from abyssal.model.quantized import packed_matrices

SHARD_SIZE = 5 * 10**9


class InMemory:
    """A model's tensors as a :class:`~abyssal.checkpoint.recast.Source`."""

    def __init__(self, model: Transformer) -> None:
        for i, layer in enumerate(model.model.layers):
            if isinstance(layer, nn.Identity):
                raise UserError(f"layer {i} was not loaded; expected the whole model")
        self._tensors = dict(model_tensors(model))
        self.packed = dict(packed_matrices(model))
        quantized = {name for name, tensor in self._tensors.items() if tensor.dtype == FP8}
        self.wanted = self._tensors.keys() - {name + SCALE for name in quantized} - {n + SCALES for n in self.packed}
        self.files = [""]

    def names(self, file: str) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Stored:
        return Stored("", self._tensors[name].dtype, tuple(self._tensors[name].shape))

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def batches(self, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
        yield "", list(names)

    @contextmanager
    def open(self, file: str) -> Iterator[InMemory]:
        yield self


def write_model(
    source: Source,
    wanted: Collection[str],
    config: ModelConfig,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    packed: Mapping[str, Packed] | None = None,
    shard_size: int = SHARD_SIZE,
    power_of_two: bool = False,
    repeat_shared: bool = True,
    generation_config: dict[str, Any],
    write_others: Callable[[Path], None] | None = None,
    written: Callable[[str, Tensor], None] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the tensors ``wanted`` of ``source`` as a published checkpoint into ``folder``, which must not exist:
    config.json, generation_config.json, one tensor an expert, shards of at most ``shard_size`` bytes and their index.

    ``dtype`` None keeps what is stored, weights that are ``packed`` included; FP8 writes blocks of 128 × 128 (with
    scales that are powers of two on request).
    ``repeat_shared`` repeats embedding and head under the MTP modules, where serving engines look for them.
    ``write_others`` adds what else belongs there, the tokenizer. ``written`` is :class:`Recast`'s. A failure leaves
    nothing behind. Raises UserError where the layout cannot express the model or the disk is too small.
    """
    data = for_export(config, force=force)
    check_target(folder)
    packing = packed if dtype is None else None
    copies = repeated_names(config) if repeat_shared and not packing else {}
    copies = {name: original for name, original in copies.items() if name not in source and name != "lm_head.weight"}
    were_powers = config.scales_are_powers_of_two
    recast = Recast(
        source,
        wanted,
        Plan(dtype),
        power_of_two=power_of_two,
        were_powers=were_powers,
        copies=copies,
        packed=packed,
        packing=packing,
        written=written,
    )
    names = [name for file in source.files for name in recast.names(file)]
    shards = split([recast.group(name) for name in (*names, *copies)], shard_size)
    entries = [entry for shard in shards for entry in shard]
    total = sum(entry.nbytes for entry in entries)
    if power_of_two and not any(entry.dtype == FP8 for entry in entries):
        raise UserError("scales that are powers of two: nothing is written in FP8 blocks; expected fp8 for the dtype")
    check_space(folder, total)
    data |= dtype_keys(entries, config, kind_of(packing or {}), power_of_two=recast.power_of_two)
    counted = Counted(total, progress)
    with replace_folder(folder) as partial:
        write_json(partial / "config.json", data)
        write_json(partial / "generation_config.json", generation_config)
        if write_others is not None:
            write_others(partial)
        files: dict[str, Sequence[Entry]] = dict(zip(file_names(len(shards)), shards, strict=True))
        for file, shard in files.items():
            write_shard(partial / file, shard, counted(recast.tensors(shard)))
        write_index(partial, files)


class Counted:
    """Hands tensors on and reports their bytes."""

    def __init__(self, total: int, progress: Progress | None, done: int = 0) -> None:
        self.total, self.progress, self.done = total, progress, done

    def __call__(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            yield name, tensor
            self.add(tensor.nbytes)

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)


def dtype_keys(
    entries: Iterable[Entry], config: ModelConfig, kind: Kind | None, *, power_of_two: bool
) -> dict[str, Any]:
    """What config.json says of the dtypes of ``entries``, packed as ``kind``."""
    out: dict[str, Any] = {}
    dtypes = {entry.dtype for entry in entries if kind is None or not entry.name.endswith(SCALES)}
    if kind is not None:
        out["quantization_config"] = settings(kind, config)
    elif FP8 in dtypes:
        out["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            **({"scale_fmt": "ue8m0"} if power_of_two else {}),
            "weight_block_size": [128, 128],
        }
    # FP32 stands beside the others only for the routers' bias and FP8 scales.
    main = next((d for d in (torch.bfloat16, torch.float16, torch.float32) if d in dtypes), torch.float32)
    return out | {"torch_dtype": str(main).removeprefix("torch.")}


def check_target(folder: Path) -> None:
    """Raises UserError where ``folder`` is taken (an empty folder is not), or cannot be made."""
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists; choose a new folder, nothing is overwritten")
    if folder.resolve() == Path.cwd():
        raise UserError(f"{folder}: the folder you are in; choose a new one")
    parent = next(p for p in folder.absolute().parents if os.path.lexists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be made, {parent} is not a folder that you can write to")


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError where the disk that ``folder`` will lie on has less than ``needed`` bytes and 1% free."""
    parent = next(p for p in folder.absolute().parents if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed * 1.01:
        raise UserError(f"{folder}: needs {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes ``data`` as readable JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
