"""Checkpoints that every process writes its part of, and that any number of processes can read
(torch.distributed.checkpoint). The files are safetensors: nothing in them is executed when they are read.

Tensors have the names that they have in memory, but for a layer's experts: three stacked matrices, gate_proj and
up_proj [E, F, D] and down_proj [E, D, F], of which processes can have any part. An optimizer's state is
``optimizer.{key}.{parameter}``. :func:`gather` writes the published layout beside them, for everyone else.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from abyssal.checkpoint.atomic import PARTIAL
from abyssal.checkpoint.names import disk_tensors, stacked_matrix
from abyssal.checkpoint.shards import WEIGHTS
from abyssal.checkpoint.writer import Entry, write_shard
from abyssal.config import read_config
from abyssal.errors import UserError
from abyssal.model import Transformer

if TYPE_CHECKING:
    import torch.distributed as dist

SHARDED = "sharded"
"""The folder of a checkpoint that has the parts."""
_OFFSETS = "DCP_SHARDING_INFO"  # in a file's metadata: where each of its tensors begins in the whole one


def is_sharded(folder: Path) -> bool:
    """Whether ``folder`` is such a checkpoint."""
    return (folder / SHARDED).is_dir()


def write(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes ``tensors`` (DTensors, or the same on every process), which lie in the host's memory, into ``folder``. All
    processes have to call it; they talk through ``group``. Raises UserError, on all of them, where one could not write
    its part."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder / SHARDED), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # nothing is to be fetched from a GPU, whose context a thread would make anew
    with _readable(folder):
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy in the host's memory, which stays as it is while training goes on."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def read(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fills ``tensors`` from ``folder``, however many processes wrote it. All processes have to call it; outside of a
    process group, one does. Raises UserError where the folder's tensors are not these."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    reader, stored = _stored(folder)
    for name, tensor in tensors.items():
        if name not in stored:
            raise UserError(f"{folder / SHARDED}: no {name}")
        if stored[name].size != tensor.shape:
            raise UserError(f"{folder / SHARDED}: {name}: {list(stored[name].size)}, expected {list(tensor.shape)}")
    with torch.no_grad(), _readable(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked
        dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())


def read_all(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors in ``folder`` whose names begin with ``prefix``, whole."""
    _, stored = _stored(folder)
    wanted = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in stored.items()
        if name.startswith(prefix)
    }
    if wanted:
        read(wanted, folder)
    return wanted


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """What the disk, or a file's content, made fail on any process becomes a UserError on every one."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else cause
        raise UserError(f"{folder / SHARDED}: process {rank}: {reason}") from None


def _stored(folder: Path) -> tuple[Any, dict[str, Any]]:
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder / SHARDED))
    try:
        return reader, reader.read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / SHARDED}: not a readable checkpoint ({error})") from None


def gather(folder: Path) -> None:
    """Writes model.safetensors beside the parts in ``folder``, a tensor at a time; nothing is done where it is there.

    Raises UserError where parts are missing or damaged, OSError where the disk does not take it.
    """
    target = folder / WEIGHTS
    if target.exists():
        return
    with torch.device("meta"):
        model = Transformer(read_config(folder))
    entries = [Entry(name, torch.float32, tuple(tensor.shape)) for name, tensor in disk_tensors(model)]
    partial = target.with_name(f"{WEIGHTS}.{os.getpid()}{PARTIAL}")
    try:
        with ExitStack() as stack:
            pieces = _pieces(folder, stack)
            tensors = ((name, _read(pieces, name, list(tensor.shape))) for name, tensor in disk_tensors(model))
            write_shard(partial, entries, tensors)
        os.replace(partial, target)
    except SafetensorError as error:
        raise UserError(f"{folder / SHARDED}: not a readable checkpoint ({error})") from None
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor in an open file, and where it begins in the whole."""

    file: Any
    offsets: list[int]
    shape: list[int]


def _pieces(folder: Path, stack: ExitStack) -> dict[str, list[_Piece]]:
    found: dict[str, list[_Piece]] = {}
    for path in sorted((folder / SHARDED).glob("*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        offsets = json.loads((file.metadata() or {}).get(_OFFSETS, "{}"))
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            shape = file.get_slice(name).get_shape()
            begin = offsets.get(name, {}).get("saved_offsets", [0] * len(shape))
            found.setdefault(name, []).append(_Piece(file, begin, shape))
    return found


def _read(pieces: dict[str, list[_Piece]], published: str, size: list[int]) -> Tensor:
    """The ``published`` tensor of ``size``, from the pieces of what holds it."""
    name, expert = stacked_matrix(published)
    shape, begin = (size, [0] * len(size)) if expert is None else ([1, *size], [expert, 0, 0])
    out, filled = torch.empty(shape, dtype=torch.float32), 0
    for piece in pieces.get(name, ()):
        spans = list(_overlap(begin, shape, piece))
        if all(stop > start for start, stop in spans):
            own = tuple(slice(a - o, b - o) for (a, b), o in zip(spans, piece.offsets, strict=True))
            there = tuple(slice(a - o, b - o) for (a, b), o in zip(spans, begin, strict=True))
            part = piece.file.get_slice(name)[own] if own else piece.file.get_tensor(name)
            out[there] = part
            filled += part.numel()
    if filled != out.numel():
        raise UserError(
            f"{name}: the checkpoint's parts have {filled:,} of its {out.numel():,} numbers; some are missing"
        )
    return out.view(size)


def _overlap(begin: list[int], shape: list[int], piece: _Piece) -> Iterator[tuple[int, int]]:
    for start, size, offset, length in zip(begin, shape, piece.offsets, piece.shape, strict=True):
        yield max(start, offset), min(start + size, offset + length)
