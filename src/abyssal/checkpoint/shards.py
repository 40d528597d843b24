"""The tensors of a checkpoint folder: one safetensors file, or several with an index, read one tensor at a time.

Nothing is believed unseen: the index against the files' own headers, the files against their lengths, names of files
against the folder. Pickled weights are refused, whatever they are called.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from abyssal.checkpoint.names import layer_of
from abyssal.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_BATCH = 2**26  # bytes
_SAMPLE, _SAMPLES = 2**16, 32  # bytes, places
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}
"""The dtypes that weights and their scales are stored in, by safetensors' names; U8 is for packed ones."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a file's header describes it."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Shards:
    """A folder's tensors by name. Opening one reads the index and the headers, no weights.

    ``layers`` limits it to the embedding, final norm and head and to these layers; only the files that hold them have
    to be there. Raises UserError, one line with file and reason, for whatever is missing, cut, doubled, or out of
    place.
    """

    def __init__(self, folder: Path, layers: Iterable[int] | None = None) -> None:
        self.folder = folder
        self._only = None if layers is None else set(layers)
        self._files: dict[str, list[str]] = {}
        if os.path.lexists(folder / INDEX):
            if (why := _why_absent(folder / INDEX)) is not None:
                raise UserError(f"{folder / INDEX}: {why}")
            self.source = folder / INDEX
            self._read_index()
        else:
            self.source = folder / WEIGHTS
            self._check_single()
            self._files[WEIGHTS] = []
        self.tensors: dict[str, Stored] = {}
        for file, listed in self._files.items():
            self._read_header(file, listed)

    @property
    def files(self) -> list[str]:
        """Names of the files, in the order of the index."""
        return list(self._files)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def names(self, file: str) -> list[str]:
        """The tensors in ``file`` that are looked at, in the order of its header."""
        return self._files[file]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Stored:
        return self.tensors[name]

    def read(self, name: str, part: tuple[slice, ...] = ()) -> Tensor:
        """One tensor, or a ``part`` of it, on the CPU, in a memory of its own."""
        with self.open(self.tensors[name].file) as file:
            return file.get_tensor(name)[part].clone()

    @contextmanager
    def open(self, file: str) -> Iterator[Any]:
        """``file`` opened by safetensors: ``get_tensor(name)`` gives a view of mapped memory, valid as long as it is
        held. Let go of them before the next file is opened, and no more than one shard is ever in memory."""
        path = self.folder / file
        try:
            opened = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None
        with opened:
            try:
                yield opened
            except SafetensorError as error:
                raise _unreadable(path, error) from None

    def batches(self, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
        """``names`` by file, some at a time: open the file anew for each, and the pages of the last are given back.
        Pages of a mapped file count as the process's memory as long as it is open."""
        file, batch, size = "", list[str](), 0
        for name in names:
            stored = self.tensors[name]
            if batch and (stored.file != file or size + stored.nbytes > _BATCH):
                yield file, batch
                batch, size = [], 0
            file = stored.file
            batch.append(name)
            size += stored.nbytes
        if batch:
            yield file, batch

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and time of change of every file: what tells this checkpoint from another."""
        stats = {file: os.stat(self.folder / file) for file in sorted(self._files)}
        return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()]

    def _wanted(self, name: str) -> bool:
        layer = layer_of(name)
        return self._only is None or layer is None or layer in self._only

    def _read_index(self) -> None:
        weight_map = read_index(self.folder)
        for name, file in weight_map.items():
            if self._wanted(name):
                self._files.setdefault(file, []).append(name)
        if WEIGHTS not in weight_map.values() and (self.folder / WEIGHTS).is_file():
            raise UserError(
                f"{self.folder}: holds {WEIGHTS} and {INDEX}, which does not name it; remove one of the two"
            )
        if not weight_map:
            raise UserError(f"{self.source}: weight_map is empty; expected tensor names and their files")

    def _check_single(self) -> None:
        path = self.folder / WEIGHTS
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: {_why_absent(self.folder) or 'not a folder'}")
        if os.path.lexists(path):
            return
        pickles = sorted(
            p.name for p in self.folder.iterdir() if p.suffix in PICKLES or p.name.endswith(".bin.index.json")
        )
        if pickles:
            raise UserError(
                f"{self.folder}: holds {pickles[0]} but no {WEIGHTS}; pickled weights are never loaded (reading "
                "one runs the code inside), expected safetensors"
            )
        parts = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if parts:
            raise UserError(f"{self.folder}: holds {parts[0]} but neither {WEIGHTS} nor {INDEX}")
        raise UserError(f"{path}: no such file, and no {INDEX}; expected weights in safetensors")

    def _read_header(self, file: str, listed: list[str]) -> None:
        path = self.folder / file
        if (why := _why_absent(path)) is not None:
            by = f" ({INDEX} names it)" if self.source.name == INDEX else ""
            raise UserError(f"{path}: {why}{by}")
        if not path.is_file():
            raise UserError(f"{path}: not a file")
        with self.open(file) as opened:
            there = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            described = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in there.items()}
            del there
        if self.source.name == INDEX:
            for name in listed:
                if name not in described:
                    raise UserError(f"{path}: {name} is not in it, but {INDEX} says so")
            for name in described.keys() - set(listed):
                if self._wanted(name):
                    raise UserError(f"{path}: holds {name}, which {INDEX} {self._elsewhere(name)}")
        names = [name for name in described if self._wanted(name)]
        self._files[file] = names
        for name in names:
            dtype, shape = described[name]
            if dtype not in DTYPES:
                raise UserError(f"{path}: {name} is {dtype}; expected one of {', '.join(DTYPES)}")
            self.tensors[name] = Stored(file, DTYPES[dtype], shape)

    def _elsewhere(self, name: str) -> str:
        other = next((file for file, names in self._files.items() if name in names), None)
        return f"places in {other}: a tensor twice" if other else "does not name"


def files_of(folder: Path, layers: set[int] | None) -> list[str]:
    """The files that the index names for the embedding, norm and head and for ``layers`` (None: all)."""
    weight_map = read_index(folder)
    wanted = {file for name, file in weight_map.items() if layers is None or layer_of(name) in {None, *layers}}
    return sorted(wanted)


def tensor_names(folder: Path) -> list[str]:
    """Names of all tensors in ``folder``, from the index where there is one. Raises UserError as :class:`Shards`."""
    return list(read_index(folder)) if (folder / INDEX).is_file() else list(Shards(folder).tensors)


def read_index(folder: Path) -> dict[str, str]:
    """The index's weight_map, tensor name to file name, each checked to lie in the folder. Raises UserError."""
    path = folder / INDEX
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except _Doubled as error:
        raise UserError(f"{path}: {error} is named twice") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({' '.join(str(error).split())})") from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict):
        raise UserError(f"{path}: weight_map: missing; expected tensor names and their files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise UserError(f"{path}: {name}: {file!r} is not the name of a file")
        where = PurePosixPath(file)
        if where.is_absolute() or ".." in where.parts or "\\" in file or "\0" in file:
            raise UserError(f"{path}: {name}: {file!r} leaves the folder; expected a file in it")
        if where.suffix in PICKLES:
            raise UserError(f"{path}: {name}: {file!r} is pickled; never loaded, expected a .safetensors file")
        if where.suffix != ".safetensors":
            raise UserError(f"{path}: {name}: {file!r} is not a .safetensors file")
    return weight_map


class _Doubled(Exception):
    pass


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise _Doubled(key)
        out[key] = value
    return out


def _why_absent(path: Path) -> str | None:
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a loop of symbolic links"
        if error.errno == errno.ENOENT:
            return "a symbolic link to nothing" if path.is_symlink() else "no such file"
        return error.strerror or "cannot be read"
    return None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})")


def weights_fingerprint(folder: Path) -> str:
    """sha256 in hex of what the weights' files hold: their headers, sizes, and some of their bytes, 64 kB at 32 places
    of each. Other weights of the same shapes are told by it in a moment, a few changed numbers perhaps not. Raises
    UserError as :class:`Shards` does."""
    total = hashlib.sha256()
    for name in sorted(Shards(folder).files):
        with (folder / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            total.update(f"{name} {size}\n".encode())
            for part in range(_SAMPLES):
                file.seek(max(size - _SAMPLE, 0) * part // (_SAMPLES - 1))
                total.update(file.read(_SAMPLE))
    return total.hexdigest()
