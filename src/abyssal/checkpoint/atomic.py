"""Writing that is whole or not there at all: beside, flushed to the disk, renamed; and by one process at a time."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from abyssal.errors import UserError

PARTIAL = ".partial"
LOCK = ".lock"


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yields a new folder beside ``target`` to write into; it gets ``target``'s name when the block ends well.

    Killed at any moment, there is either no ``target`` or a whole one; what a kill leaves behind ends in ``.partial``.
    ``target`` must not exist yet, or be an empty folder.
    """
    partial = _new_folder(target)
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                flush(path)
        flush(partial)
        os.rename(partial, target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _new_folder(target: Path) -> Path:
    """Nobody else's: what is there under such a name may be another process's work, or somebody's files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        partial = target.with_name(target.name + (f".{number}" if number > 1 else "") + PARTIAL)
        try:
            partial.mkdir()
        except FileExistsError:
            continue
        return partial
    raise AssertionError


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``, replacing what was there only once the new content is on the disk."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def lock_folder(folder: Path, doing: str) -> IO[str]:
    """Holds ``folder`` for this process until what is returned is closed, or the process ends. Raises UserError where
    another one holds it; ``doing`` says what that one does ("converting there")."""
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{folder}: another process is {doing}") from None
    return file


def flush(path: Path) -> None:
    """Waits until ``path``, a file or a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
