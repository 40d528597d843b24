"""Documents from files, one at a time.

A source is the name of a built-in corpus ("tinyshakespeare"), a file, or a folder of files (read in the order of their
relative names, subfolders included; hidden files and files of other kinds are passed over):

- ``.txt``: one document, or several with ``<|endoftext|>`` alone on the line between them
- ``.jsonl``: a JSON object a line, the text in the field `text` (or another that the caller names)
- ``.parquet``: the same field as a column of strings
- ``.txt`` and ``.jsonl`` also compressed, as ``.gz`` or ``.xz``

Text is taken as it stands: nothing is stripped and line ends are kept; only a byte-order mark at the start of a file is
dropped, and documents with nothing but blanks in them are left out. It must be UTF-8. Only one document is in memory at
a time. Whatever is wrong with a file is a UserError that names it and the place.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib.resources
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any

from abyssal.data.tokenizer import check_unicode
from abyssal.errors import UserError, nearest

BUILT_IN = {"tinyshakespeare": "tinyshakespeare.txt.gz"}
SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".txt.xz", ".jsonl.gz", ".jsonl.xz")
SEPARATOR = b"<|endoftext|>"


@dataclass(frozen=True)
class _File:
    name: str  # relative to the source, with forward slashes
    where: Path | Traversable

    def __str__(self) -> str:
        return str(self.where)


def documents(source: str | Path, *, field: str = "text") -> Iterator[str]:
    """The documents of `source`, in order. Raises UserError at once for a source that does not exist, and while
    reading for a file that is damaged, a record without the field, or a corpus with no text at all."""
    return _documents(source, _files(source), field)


def corpus_fingerprint(source: str | Path) -> str:
    """sha256 in hex over the names (relative to the source) and contents of its files."""
    total = hashlib.sha256()
    for file in _files(source):
        with _opened(file, decompress=False) as stream:
            contents = hashlib.sha256()
            while block := stream.read(2**20):
                contents.update(block)
        total.update(os.fsencode(file.name) + b"\0" + contents.digest())
    return total.hexdigest()


def _files(source: str | Path) -> list[_File]:
    if str(source) in BUILT_IN:
        name = BUILT_IN[str(source)]
        return [_File(name, importlib.resources.files("abyssal.data") / "corpora" / name)]
    path = Path(source)
    if path.is_dir():
        found = [(file.relative_to(path), file) for file in path.rglob("*") if _supported(file) and file.is_file()]
        visible = [(name, file) for name, file in found if not any(part.startswith(".") for part in name.parts)]
        if not visible:
            raise UserError(f"{path}: the folder holds no corpus file; expected one of {', '.join(SUFFIXES)}")
        return sorted((_File(name.as_posix(), file) for name, file in visible), key=lambda file: file.name)
    if not path.exists():
        hint = nearest(str(source), BUILT_IN) if path.name == str(source) else ""
        raise UserError(
            f"{source}: no such file or folder{hint}; expected a path or a built-in corpus ({', '.join(BUILT_IN)})"
        )
    if not _supported(path):
        raise UserError(f"{path}: files of this kind are not read; expected one of {', '.join(SUFFIXES)}")
    return [_File(path.name, path)]


def _supported(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _documents(source: str | Path, files: list[_File], field: str) -> Iterator[str]:
    empty = True
    for file in files:
        name = file.name.lower()
        if name.endswith(".parquet"):
            texts = _from_parquet(file, field)
        elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
            texts = _from_jsonl(file, field)
        else:
            texts = _from_text(file)
        for text in texts:
            if text and not text.isspace():
                empty = False
                yield text
    if empty:
        raise UserError(f"{source}: the corpus is empty; expected at least one document with text in it")


def _from_text(file: _File) -> Iterator[str]:
    with _opened(file) as stream:
        document, start = bytearray(), 0
        for offset, line in _lines(stream):
            if line.rstrip(b"\r\n") == SEPARATOR:
                yield _decode(file, document, start)
                document.clear()
            else:
                if not document:
                    start = offset
                document += line
        yield _decode(file, document, start)


def _from_jsonl(file: _File, field: str) -> Iterator[str]:
    with _opened(file) as stream:
        for number, (offset, line) in enumerate(_lines(stream), start=1):
            if not line.strip():
                continue
            text = _decode(file, line, offset)
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: not JSON ({error})") from error
            yield _field(record, field, f"{file}, line {number}")


def _from_parquet(file: _File, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file}: reading Parquet needs pyarrow: pip install 'abyssal[train]'") from error
    row = 0
    try:
        with _opened(file) as stream:
            table = pyarrow.parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            if field not in names:
                raise UserError(f"{file}: no column {field!r}{nearest(field, names)}; it has {', '.join(names)}")
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    yield _field({field: value.as_py()}, field, f"{file}, row {row}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: damaged, or no Parquet file ({' '.join(str(error).split())})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, row {row}: {field!r} is not UTF-8 at byte {error.start}") from error


def _field(record: Any, field: str, place: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{place}: a JSON {type(record).__name__}; expected an object with the field {field!r}")
    if field not in record:
        raise UserError(f"{place}: no field {field!r}{nearest(field, record)}; it has {', '.join(record) or 'none'}")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{place}: field {field!r} is {type(text).__name__}; expected a string")
    try:
        check_unicode(text)
    except UserError as error:  # JSON may escape half a surrogate pair
        raise UserError(f"{place}: {error}") from error
    return text


@contextmanager
def _opened(file: _File, decompress: bool = True) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The file's bytes; what goes wrong while they are read is said with the file's name."""
    name = file.name.lower()
    try:
        with file.where.open("rb") as raw:
            if decompress and name.endswith(".gz"):
                with gzip.open(raw) as stream:
                    yield stream
            elif decompress and name.endswith(".xz"):
                with lzma.open(raw) as stream:
                    yield stream
            else:
                yield raw
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: damaged or cut short ({error})") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for line in stream:
        start = len(codecs.BOM_UTF8) if offset == 0 and line.startswith(codecs.BOM_UTF8) else 0
        yield offset + start, line[start:]
        offset += len(line)


def _decode(file: _File, data: bytes | bytearray, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "uncompressed byte" if file.name.lower().endswith((".gz", ".xz")) else "byte"
        raise UserError(
            f"{file}: not UTF-8 at {where} {offset + error.start} (0x{data[error.start]:02x}: {error.reason})"
        ) from error
