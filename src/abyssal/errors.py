"""The one exception for what the user got wrong.

Raised where the cause is known, with a message of one line that names the field or file, the value, and what would be
right. The command line prints that line and exits with 2; from Python it is an ordinary ``ValueError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Something outside the program must change: an argument, a file, a disk that is full."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint ``" (did you mean 'x'?)"`` for a misspelt name, or an empty string where nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def kind_of(value: Any) -> str:
    """What ``value`` is, as a message says it: ``a str``, ``an int``; for None ``null``, as files have it."""
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
