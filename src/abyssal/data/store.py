"""What a prepared corpus is on disk: its manifest, and the writer of a split's files (`shards` says what they hold)."""

from __future__ import annotations

import json
import os
import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from abyssal.errors import UserError

FORMAT = 1


class Shard(BaseModel):
    """One file of token ids."""

    model_config = ConfigDict(frozen=True)
    file: str
    tokens: NonNegativeInt


class Split(BaseModel):
    """What a split holds: `tokens` over all shards, `documents`, and `bytes` of text as UTF-8, without BOS and EOS
    (for bits a byte)."""

    model_config = ConfigDict(frozen=True)
    dtype: Literal["uint16", "uint32"]
    shards: tuple[Shard, ...]
    tokens: NonNegativeInt
    documents: NonNegativeInt
    bytes: NonNegativeInt


class Manifest(BaseModel):
    """manifest.json. `tokenizer`, `corpus` and `validation_corpus` are fingerprints; `validation_fraction` is None
    where the validation text has a source of its own."""

    model_config = ConfigDict(frozen=True)
    format: int
    tokenizer: str
    vocab_size: int
    corpus: str
    validation_corpus: str | None
    validation_fraction: float | None
    splits: dict[str, Split]


def read_manifest(folder: str | Path) -> Manifest:
    """manifest.json of a prepared folder. Raises UserError where it is missing, damaged or of another version."""
    file = Path(folder) / "manifest.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected the manifest of a prepared corpus")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT:
            raise UserError(f"{file}: format is {version!r}; this version reads {FORMAT}: prepare the corpus again")
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a manifest ({' '.join(str(error).split())})") from error


class SplitWriter:
    """Writes the files of one split; a context manager that closes them. `begin_document`, then `write` ids, for each
    document; add its text's length to `bytes`; `result` says what was written. Raises OSError where writing fails."""

    # Plain writes and no writable memory maps: on a full disk a write raises OSError, a map kills the process.
    def __init__(self, folder: Path, split: str, dtype: Literal["uint16", "uint32"], shard_tokens: int) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.bytes = self.tokens = self.documents = 0
        self.starts: BinaryIO = (folder / f"{split}.documents.bin").open("wb")
        self.file: BinaryIO | None = None

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:  # closes both even where the first raises
            for file in (self.starts, self.file):
                if file is not None:
                    stack.callback(_close, file)

    def begin_document(self) -> None:
        self.starts.write(struct.pack("<q", self.tokens))
        self.documents += 1

    def write(self, ids: list[int]) -> None:
        rest = np.asarray(ids, dtype=np.dtype(self.dtype).newbyteorder("<"))
        while len(rest):
            used = self.tokens % self.shard_tokens
            if used == 0:
                if self.file is not None:
                    _close(self.file)
                self.file = (self.folder / self._name(self.tokens // self.shard_tokens)).open("wb")
            assert self.file is not None
            part = rest[: self.shard_tokens - used]
            self.file.write(part.tobytes())
            self.tokens += len(part)
            rest = rest[len(part) :]

    def result(self) -> Split:
        counts = [min(self.shard_tokens, self.tokens - n) for n in range(0, self.tokens, self.shard_tokens)]
        return Split(
            dtype=self.dtype,
            shards=tuple(Shard(file=self._name(n), tokens=count) for n, count in enumerate(counts)),
            tokens=self.tokens,
            documents=self.documents,
            bytes=self.bytes,
        )

    def _name(self, number: int) -> str:
        return f"{self.split}-{number:05d}.bin"


def _close(file: BinaryIO) -> None:
    if file.closed:  # by a write that failed before it could open the next
        return
    with file:
        file.flush()
        os.fsync(file.fileno())
