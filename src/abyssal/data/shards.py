"""A tokenised corpus on disk: written once, then read by position.

A prepared folder holds, for each split ("train" and "validation"):

- ``{split}-00000.bin``, ``-00001.bin``, …: the token ids of all documents end to end, each document as BOS, its tokens,
  EOS (where the tokenizer has them); little-endian uint16, or uint32 where the vocabulary is larger than 65,536
- ``{split}.documents.bin``: the position at which each document begins, little-endian int64

and one ``manifest.json`` that says what belongs to it. It is written under another name beside its place and renamed
when it is whole, so that an interruption leaves nothing that looks finished.

The held-out text is the end of the corpus: of all documents end to end, the first ``int(characters * (1 - fraction))``
characters are for training; a document that straddles this is cut in two there.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from abyssal.data.corpus import corpus_fingerprint, documents
from abyssal.data.store import FORMAT, Manifest, Split, SplitWriter, read_manifest
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError

SPLITS = ("train", "validation")
BATCH_CHARACTERS = 2**22  # text in flight while encoding: enough to keep every core busy, little memory
BATCH_PIECES = 2**12


@dataclass(frozen=True)
class Prepared:
    """A folder that `prepare` wrote."""

    folder: Path
    manifest: Manifest

    @property
    def train(self) -> Split:
        return self.manifest.splits["train"]

    @property
    def validation(self) -> Split:
        return self.manifest.splits["validation"]


def train_split(source: str | Path, fraction: float, *, field: str = "text") -> Iterator[str]:
    """The documents of the training split, for what may not see the held-out text, such as a BPE vocabulary.
    Raises UserError for a fraction outside [0, 1) and as `documents` does."""
    cut = _cut(_characters(source, field), fraction)
    for split, text in _split_at(documents(source, field=field), cut):
        if split == "validation":
            return
        yield text


def prepare(
    source: str | Path,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    validation_fraction: float = 0.1,
    validation_source: str | Path | None = None,
    field: str = "text",
    shard_tokens: int = 2**27,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Tokenise `source` into a new `folder`: read once to count its characters, once to encode.

    With `validation_source` that is the validation split and all of `source` the training split. `progress` is called
    with the characters done and in all. Raises UserError for a folder that already holds something, a fraction that
    leaves no training text, and as `documents` does; OSError where writing fails (a full disk), and then nothing is
    left behind.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: already exists; remove it or choose another folder for the prepared corpus")
    if shard_tokens < 1:
        raise UserError(f"shard_tokens is {shard_tokens}; expected at least 1")
    total = _characters(source, field)
    if validation_source is None:
        texts = _split_at(documents(source, field=field), _cut(total, validation_fraction))
    else:
        total += _characters(validation_source, field)
        texts = itertools.chain(
            (("train", text) for text in documents(source, field=field)),
            (("validation", text) for text in documents(validation_source, field=field)),
        )

    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        manifest = Manifest(
            format=FORMAT,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            corpus=corpus_fingerprint(source),
            validation_corpus=None if validation_source is None else corpus_fingerprint(validation_source),
            validation_fraction=validation_fraction if validation_source is None else None,
            splits=_write_splits(partial, texts, tokenizer, shard_tokens, progress, total),
        )
        with (partial / "manifest.json").open("w", encoding="utf-8") as file:
            file.write(manifest.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Prepared(folder, manifest)


class TokenShards:
    """The tokens of one split as one sequence, read-only; `len` is their number, `bytes` that of the UTF-8 text."""

    def __init__(self, shards: Sequence[npt.NDArray[np.integer]], starts: npt.NDArray[np.int64], text_bytes: int):
        self._shards = list(shards)
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        self._starts = starts
        self.bytes = text_bytes

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + count), int64 [count]. Raises IndexError outside the split."""
        self._check(start, count)
        out = np.empty(count, dtype=np.int64)
        done = 0
        index = int(np.searchsorted(self._ends, start, side="right"))
        while done < count:
            shard = self._shards[index]
            inside = start + done - (int(self._ends[index]) - len(shard))
            part = shard[inside : inside + count - done]
            out[done : done + len(part)] = part
            done += len(part)
            index += 1
        return out

    def documents(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """The number, from 0, of the document that each of these tokens is in, int64 [count]. Raises IndexError
        outside the split."""
        self._check(start, count)
        return np.searchsorted(self._starts, np.arange(start, start + count), side="right").astype(np.int64) - 1

    def _check(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of a split of {len(self)}")


def open_shards(folder: str | Path, split: str, *, tokenizer_fingerprint: str | None = None) -> TokenShards:
    """Map one split of a prepared folder, read-only. Raises UserError, naming the file, where something is missing, of
    another size than the manifest says, empty, or (if given) made with another tokenizer."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    file = folder / "manifest.json"
    if tokenizer_fingerprint is not None and manifest.tokenizer != tokenizer_fingerprint:
        raise UserError(
            f"{file}: prepared with tokenizer {manifest.tokenizer[:12]}…, not with {tokenizer_fingerprint[:12]}…: "
            "prepare the corpus again with this tokenizer"
        )
    if split not in manifest.splits:
        raise UserError(f"{file}: no split {split!r}; it has {', '.join(manifest.splits)}")
    content = manifest.splits[split]
    if content.tokens == 0:
        raise UserError(f"{file}: the split {split!r} holds no tokens; prepare with a larger validation_fraction")
    if content.tokens != sum(shard.tokens for shard in content.shards):
        raise UserError(
            f"{file}: the split {split!r} says {content.tokens} tokens, its shards add up to another number"
        )
    dtype = np.dtype(content.dtype).newbyteorder("<")
    shards = [_map(folder / shard.file, dtype, shard.tokens) for shard in content.shards]
    starts = _map(folder / f"{split}.documents.bin", np.dtype("<i8"), content.documents)
    return TokenShards(shards, starts, content.bytes)


def _map(file: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if not file.is_file():
        raise UserError(f"{file}: missing; the manifest beside it lists it: prepare the corpus again")
    size = file.stat().st_size
    if size != count * dtype.itemsize:
        raise UserError(
            f"{file}: {size} bytes, where the manifest says {count * dtype.itemsize} "
            f"({count} of {dtype.itemsize} bytes): prepare the corpus again"
        )
    return np.memmap(file, dtype=dtype, mode="r")


def _characters(source: str | Path, field: str) -> int:
    return sum(len(text) for text in documents(source, field=field))


def _cut(characters: int, fraction: float) -> int:
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction is {fraction}; expected at least 0 and less than 1")
    cut = int(characters * (1 - fraction))
    if cut == 0:
        raise UserError(f"validation_fraction is {fraction}, which leaves none of {characters} characters for training")
    return cut


def _split_at(texts: Iterator[str], cut: int) -> Iterator[tuple[str, str]]:
    """(split, document) in order; `cut` counts characters over all documents."""
    for text in texts:
        if cut > 0:
            yield "train", text[:cut]
        if len(text) > cut:
            yield "validation", text[cut:]
        cut = max(0, cut - len(text))


class _Piece(NamedTuple):
    split: str
    text: str
    first: bool  # of its document
    last: bool


def _pieces(texts: Iterator[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[_Piece]:
    for split, text in texts:
        held, first = "", True
        for piece in tokenizer.pieces(text):
            if held:
                yield _Piece(split, held, first, last=False)
                first = False
            held = piece
        yield _Piece(split, held, first, last=True)


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_splits(
    folder: Path,
    texts: Iterator[tuple[str, str]],
    tokenizer: Tokenizer,
    shard_tokens: int,
    progress: Callable[[int, int], None] | None,
    total: int,
) -> dict[str, Split]:
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    done = 0
    with ExitStack() as stack:
        writers = {split: stack.enter_context(SplitWriter(folder, split, dtype, shard_tokens)) for split in SPLITS}
        for batch in _batches(_pieces(texts, tokenizer)):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                writer = writers[piece.split]
                if piece.first:
                    writer.begin_document()
                    ids = [*_optional(tokenizer.bos_id), *ids]
                if piece.last:
                    ids = [*ids, *_optional(tokenizer.eos_id)]
                writer.write(ids)
                writer.bytes += len(piece.text.encode())
                done += len(piece.text)
            if progress is not None:
                progress(done, total)
    return {split: writer.result() for split, writer in writers.items()}


def _optional(token_id: int | None) -> list[int]:
    return [] if token_id is None else [token_id]
