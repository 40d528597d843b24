"""Documents from files, one at a time.

A source is as `abyssal.data.files` has it: the name of a built-in corpus ("tinyshakespeare"), a file, or a folder.

- ``.txt``: one document, or several with ``<|endoftext|>`` alone on the line between them
- ``.jsonl``: a JSON object a line, the text in the field `text` (or another that the caller names)
- ``.parquet``: the same field as a column of strings
- ``.txt`` and ``.jsonl`` also compressed, as ``.gz`` or ``.xz``

Text is taken as it stands: nothing is stripped and line ends are kept; documents with nothing but blanks in them are
left out. Only one document is in memory at a time. Whatever is wrong with a file is a UserError that names it and the
place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from abyssal.data.files import File, find_files, json_lines, opened, parquet_rows, text_documents
from abyssal.data.tokenizer import check_unicode
from abyssal.errors import UserError, kind_of, nearest

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".txt.xz", ".jsonl.gz", ".jsonl.xz")


def documents(source: str | Path, *, field: str = "text") -> Iterator[str]:
    """The documents of `source`, in order. Raises UserError at once for a source that does not exist, and while
    reading for a file that is damaged, a record without the field, or a corpus with no text at all."""
    return _documents(source, find_files(source, SUFFIXES), field)


def corpus_fingerprint(source: str | Path) -> str:
    """sha256 in hex over the names (relative to the source) and contents of its files."""
    total = hashlib.sha256()
    for file in find_files(source, SUFFIXES):
        with opened(file, decompress=False) as stream:
            contents = hashlib.sha256()
            while block := stream.read(2**20):
                contents.update(block)
        total.update(os.fsencode(file.name) + b"\0" + contents.digest())
    return total.hexdigest()


def _documents(source: str | Path, files: list[File], field: str) -> Iterator[str]:
    empty = True
    for file in files:
        if file.ends((".txt", ".txt.gz", ".txt.xz")):
            texts = text_documents(file)
        else:
            rows = parquet_rows(file, [field]) if file.ends(".parquet") else json_lines(file)
            texts = (_field(record, field, place) for place, record in rows)
        for text in texts:
            if text and not text.isspace():
                empty = False
                yield text
    if empty:
        raise UserError(f"{source}: the corpus is empty; expected at least one document with text in it")


def _field(record: Any, field: str, place: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{place}: a JSON {type(record).__name__}; expected an object with the field {field!r}")
    if field not in record:
        raise UserError(f"{place}: no field {field!r}{nearest(field, record)}; it has {', '.join(record) or 'none'}")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{place}: field {field!r} is {kind_of(text)}; expected a string")
    try:
        check_unicode(text)
    except UserError as error:  # JSON may escape half a surrogate pair
        raise UserError(f"{place}: {error}") from error
    return text
