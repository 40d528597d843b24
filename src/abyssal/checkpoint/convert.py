"""A checkpoint in another dtype, shard by shard, for checkpoints larger than memory.

Each shard of the source becomes one of the result, under the same name. The result grows in ``DST.partial``, with a
journal of the shards that are done and the sha256 of their tensors; when all are there they are read back, and only
then does the folder get its name. Interrupted, the same command goes on behind the last whole shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from abyssal.checkpoint.atomic import LOCK, PARTIAL, flush, lock_folder, write_text
from abyssal.checkpoint.export import Counted, check_space, check_target, dtype_keys, write_json
from abyssal.checkpoint.load import Progress, check_copy, read_model_config, wanted_tensors
from abyssal.checkpoint.names import repeated_names
from abyssal.checkpoint.packing import packings, stored_kind
from abyssal.checkpoint.precision import FP8, Plan
from abyssal.checkpoint.recast import Recast
from abyssal.checkpoint.shards import INDEX, PICKLES, Shards
from abyssal.checkpoint.writer import Entry, check_shard, write_index, write_shard
from abyssal.config import ModelConfig, read_mapping
from abyssal.errors import UserError
from abyssal.kernels.packed import Kind

JOURNAL = "convert.json"


def convert(
    source: Path,
    target: Path,
    to: torch.dtype | Kind,
    *,
    power_of_two: bool = False,
    allow_missing: Sequence[str] = (),
    progress: Progress | None = None,
    verifying: Progress | None = None,
) -> int:
    """Writes the checkpoint in ``source`` to ``target`` as BF16 (or another dtype), FP8 blocks, or packed ("int8",
    "int4": what is not packed stays as it is, FP8 there becomes BF16); returns the bytes.

    Other files of the folder are copied, pickles apart; config.json gets the new dtype. Memory: one shard of the source
    at most. ``progress`` counts bytes written, ``verifying`` bytes read back. Raises UserError, before anything is
    written, where the source is damaged or incomplete, the disk is too small, or ``target`` exists.
    """
    target = target.absolute()
    partial = target.with_name(target.name + PARTIAL)
    check_target(target)
    if source.resolve() in (partial.resolve(), *target.resolve().parents):
        raise UserError(f"{target}: lies in the source, or would be written into it; choose a folder outside {source}")
    shards = Shards(source)
    config = read_model_config(source)
    wanted = wanted_tensors(config, shards, allow_missing)
    were_powers = config.scales_are_powers_of_two
    kind, stored = to if isinstance(to, str) else None, stored_kind(config, source)
    if kind is not None and stored not in (None, kind):
        raise UserError(f"{source}: its weights are {stored}; convert what that was made from to {kind}")
    if kind is not None:  # copies of what is packed would not be equal to it; no reader of packed files needs them
        copies = {name: original for name, original in repeated_names(config).items() if name in wanted}
        for name, original in copies.items():
            check_copy(shards.read(name), name, original, shards)
        wanted -= copies.keys()
    recast = Recast(
        shards,
        wanted,
        Plan(None if isinstance(to, str) else to),
        power_of_two=power_of_two,
        were_powers=were_powers,
        packed=packings(config, stored),
        packing=packings(config, kind),
    )
    if power_of_two and to != FP8:
        raise UserError("scales that are powers of two: nothing is written in FP8 blocks; expected fp8 for the dtype")
    files = {file: [e for name in recast.names(file) for e in recast.group(name)] for file in shards.files}
    files = {file: entries for file, entries in files.items() if entries}
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    with _Journal(partial, {"source": shards.fingerprint(), "to": str(to), "power_of_two": power_of_two}) as journal:
        done = sum(entry.nbytes for file in journal.done for entry in files[file])
        check_space(target, total - done)
        counted = Counted(total, progress, done)
        for file, entries in files.items():
            if file not in journal.done:
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                journal.add(file, write_shard(partial / file, entries, counted(recast.tensors(entries))))
        checked = Counted(total, verifying)
        for file, entries in files.items():
            try:
                for nbytes in check_shard(partial / file, entries, journal.done[file]):
                    checked.add(nbytes)
            except UserError as error:
                journal.drop(file)
                raise UserError(f"{error}; run the same command again, it writes that file anew") from None
        _write_small_files(source, partial, config, files, recast, kind)
        written = Shards(partial)
        if written.tensors.keys() != {entry.name for entries in files.values() for entry in entries}:
            raise UserError(f"{partial}: the tensors read back are not those written")
    os.rename(partial, target)  # in the place of an empty folder, too
    flush(target.parent)
    journal.remove(target)
    return total


class _Journal:
    """Which shards are whole, in a file that is replaced after each; one process at a time."""

    def __init__(self, folder: Path, what: dict[str, Any]) -> None:
        self.folder = folder
        self.what = what
        self.done: dict[str, dict[str, str]] = {}

    def __enter__(self) -> _Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder, "converting there")
        path = self.folder / JOURNAL
        others = [found for found in self.folder.iterdir() if found.name != LOCK]
        if others and not path.is_file():
            self._lock.close()
            (self.folder / LOCK).unlink()
            raise UserError(f"{self.folder}: exists and is no interrupted conversion; move it away")
        data = read_mapping(path) if others else {}
        if data.get("what") == self.what and isinstance(data.get("done"), dict):
            self.done = {file: digests for file, digests in data["done"].items() if (self.folder / file).is_file()}
            return self
        for leftover in others:  # of another source or another dtype
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lock.close()
        if kind is not None and not self.done:  # nothing to go on with
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, file: str, digests: dict[str, str]) -> None:
        self.done[file] = digests
        self._write()

    def drop(self, file: str) -> None:
        del self.done[file]
        self._write()

    def _write(self) -> None:
        write_text(self.folder / JOURNAL, json.dumps({"what": self.what, "done": self.done}) + "\n")

    def remove(self, folder: Path) -> None:
        (folder / JOURNAL).unlink()
        (folder / LOCK).unlink()


def _write_small_files(
    source: Path, target: Path, config: ModelConfig, files: dict[str, list[Entry]], recast: Recast, kind: Kind | None
) -> None:
    for path in sorted(source.iterdir()):
        skipped = path.suffix in (*PICKLES, ".safetensors") or path.name in (INDEX, "config.json", "state.json")
        if path.is_file() and not skipped and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    data = read_mapping(source / "config.json")
    about = data if "model_type" in data else data.setdefault("published", {})  # in abyssal's own form it has a place
    spelling = "dtype" if "dtype" in about else "torch_dtype"  # transformers 5 and 4
    for key in ("quantization_config", "dtype", "torch_dtype"):
        about.pop(key, None)
    keys = dtype_keys(
        (entry for entries in files.values() for entry in entries), config, kind, power_of_two=recast.power_of_two
    )
    about |= {spelling: keys.pop("torch_dtype")} | keys
    write_json(target / "config.json", data)
    write_index(target, files)
    for path in target.iterdir():
        if path.is_file():
            flush(path)
