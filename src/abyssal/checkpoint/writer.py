"""Safetensors written tensor by tensor, so that a shard larger than memory can be written too.

The library's own ``save_file`` wants all of a file's tensors at once. The format needs less: a header that says where
each tensor will lie (its length in 8 bytes, little-endian, then JSON), and the bytes behind it. What is written here
is read by the library.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from abyssal.checkpoint.shards import DTYPES, INDEX, WEIGHTS
from abyssal.errors import UserError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 2**24


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def split(groups: Iterable[Sequence[Entry]], limit: int) -> list[list[Entry]]:
    """Groups of entries (a weight and its scales stay together) cut in shards of at most ``limit`` bytes, in order. A
    group that is larger gets a shard of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for group in groups:
        more = sum(entry.nbytes for entry in group)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1] += group
        size += more
    return shards


def file_names(count: int) -> list[str]:
    """Names of ``count`` shards, as transformers has them."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_shard(path: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Writes ``tensors``, which are those of ``entries`` in any order, and flushes them to the disk.

    Returns sha256 in hex of each tensor's bytes. Raises OSError where the disk does not take them; the space is claimed
    before anything is written.
    """
    try:
        return _write_shard(path, entries, tensors)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror or str(error), error.filename or str(path)) from None


def _write_shard(path: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    header, offsets, size = _layout(entries)
    described = {entry.name: entry for entry in entries}
    digests: dict[str, str] = {}
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, len(header) + size)
        file.write(header)
        for name, tensor in tensors:
            entry = described[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), name
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.seek(len(header) + offsets[name])
            file.write(data)
            digests[name] = hashlib.sha256(data).hexdigest()
        missing = described.keys() - digests.keys()
        assert not missing, missing
        file.flush()
        os.fsync(file.fileno())
    return digests


def check_shard(path: Path, entries: Sequence[Entry], digests: dict[str, str]) -> Iterator[int]:
    """Reads ``path`` back and compares every tensor's bytes with ``digests``; yields bytes read, tensor by tensor.

    Raises UserError where the file is not what was written.
    """
    header, offsets, size = _layout(entries)
    if path.stat().st_size != len(header) + size:
        raise UserError(f"{path}: {path.stat().st_size} bytes, {len(header) + size} were written: the disk lost some")
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise UserError(f"{path}: the header read back is not the one written")
        for entry in entries:
            file.seek(len(header) + offsets[entry.name])
            digest, left = hashlib.sha256(), entry.nbytes
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    break
                digest.update(chunk)
                left -= len(chunk)
            if digest.hexdigest() != digests.get(entry.name):
                raise UserError(f"{path}: {entry.name} read back is not what was written")
            yield entry.nbytes


def index_json(files: Mapping[str, Sequence[Entry]]) -> str | None:
    """model.safetensors.index.json for shards by name; None where one file holds all."""
    if list(files) == [WEIGHTS]:
        return None
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
    data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(data, indent=2) + "\n"


def write_index(folder: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    """Writes the index beside the shards, where there are several."""
    text = index_json(files)
    if text is not None:
        (folder / INDEX).write_text(text, encoding="utf-8")


def parse_size(text: str, field: str) -> int:
    """``"5GB"`` as bytes (KB, MB, GB, TB are powers of 1000, KiB … of 1024). Raises UserError naming ``field``."""
    pattern = r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT])(i?))?B?\s*"
    if match := re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII):
        unit = (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper())
        size = int(Fraction(match[1]) * unit)  # exact: as a float 1.001KB is 1000 bytes
        if size > 0:
            return size
    raise UserError(f"{field}: {text!r} is not a size; expected for instance 5GB or 500MB")


def _layout(entries: Sequence[Entry]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, offset of each tensor behind it, and bytes in all. Wide dtypes first, so that all are aligned."""
    offsets: dict[str, int] = {}
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
        offsets[entry.name] = position
        described[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, position
