"""What a source of data is made of, and the kinds of file it may hold: text, JSON a line, Parquet.

A source is the name of a built-in corpus, a file, or a folder of files (read in the order of their relative names,
subfolders included; hidden files and files of other kinds are passed over). Text and JSON may be compressed, as .gz or
.xz, and must be UTF-8; a byte-order mark at the start of a file is dropped. Only a line, a document or a batch of rows
is in memory at a time. Whatever is wrong with a file is a UserError that names it and the place.
"""

from __future__ import annotations

import codecs
import gzip
import importlib.resources
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any

from abyssal.errors import UserError, nearest

BUILT_IN = {"tinyshakespeare": "tinyshakespeare.txt.gz"}
SEPARATOR = b"<|endoftext|>"


@dataclass(frozen=True)
class File:
    """A file of a source. `name` is relative to the source, with forward slashes."""

    name: str
    where: Path | Traversable

    def __str__(self) -> str:
        return str(self.where)

    def ends(self, suffixes: str | tuple[str, ...]) -> bool:
        """Whether it is of such a kind; case does not count."""
        return self.name.lower().endswith(suffixes)


def find_files(source: str | Path, suffixes: Sequence[str]) -> list[File]:
    """The files of `source` of these kinds. Raises UserError for a source that does not exist or has none."""
    if str(source) in BUILT_IN:
        name = BUILT_IN[str(source)]
        return [File(name, importlib.resources.files("abyssal.data") / "corpora" / name)]
    path = Path(source)
    if path.is_dir():
        below = [File(file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file()]
        found = [file for file in below if file.ends(tuple(suffixes)) and not _hidden(file.name)]
        if not found:
            raise UserError(f"{path}: the folder holds no file that is read; expected one of {', '.join(suffixes)}")
        return sorted(found, key=lambda file: file.name)
    if not path.exists():
        hint = nearest(str(source), BUILT_IN) if path.name == str(source) else ""
        raise UserError(
            f"{source}: no such file or folder{hint}; expected a path or a built-in corpus ({', '.join(BUILT_IN)})"
        )
    file = File(path.name, path)
    if not file.ends(tuple(suffixes)):
        raise UserError(f"{path}: files of this kind are not read; expected one of {', '.join(suffixes)}")
    return [file]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def text_documents(file: File) -> Iterator[str]:
    """The documents of a text file: what stands between lines of ``<|endoftext|>``, untouched, empty ones too."""
    with opened(file) as stream:
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


def json_lines(file: File) -> Iterator[tuple[str, Any]]:
    """(place, value) for each line that is not blank; a place reads ``file, line 3``."""
    with opened(file) as stream:
        for number, (offset, line) in enumerate(_lines(stream), start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            yield place, _parse_json(_decode(file, line, offset), place)


def json_file(file: File) -> Any:
    """The one value that a file of JSON holds."""
    with opened(file) as stream:
        data = stream.read()
    return _parse_json(_decode(file, data.removeprefix(codecs.BOM_UTF8), 0), str(file))


def parquet_rows(file: File, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for each row, of these columns or all; a place reads ``file, row 3``."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file}: reading Parquet needs pyarrow: pip install 'abyssal[train]'") from error
    row, name = 0, ""
    try:
        with opened(file) as stream:
            table = pyarrow.parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            for column in columns or ():
                if column not in names:
                    raise UserError(f"{file}: no column {column!r}{nearest(column, names)}; it has {', '.join(names)}")
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for values in zip(*batch.columns, strict=True):
                    row += 1
                    fields = {}
                    for name, value in zip(batch.schema.names, values, strict=True):
                        fields[name] = value.as_py()
                    yield f"{file}, row {row}", fields
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: damaged, or no Parquet file ({' '.join(str(error).split())})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, row {row}: {name!r} is not UTF-8 at byte {error.start}") from error


@contextmanager
def opened(file: File, decompress: bool = True) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The file's bytes; what goes wrong while they are read is said with the file's name."""
    try:
        with file.where.open("rb") as raw:
            if decompress and file.ends(".gz"):
                with gzip.open(raw) as stream:
                    yield stream
            elif decompress and file.ends(".xz"):
                with lzma.open(raw) as stream:
                    yield stream
            else:
                yield raw
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: damaged or cut short ({error})") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from error


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for line in stream:
        start = len(codecs.BOM_UTF8) if offset == 0 and line.startswith(codecs.BOM_UTF8) else 0
        yield offset + start, line[start:]
        offset += len(line)


def _decode(file: File, data: bytes | bytearray, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "uncompressed byte" if file.ends((".gz", ".xz")) else "byte"
        raise UserError(
            f"{file}: not UTF-8 at {where} {offset + error.start} (0x{data[error.start]:02x}: {error.reason})"
        ) from error
