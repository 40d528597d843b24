"""Sizes and numbers as people write and read them."""

from __future__ import annotations

import re

from abyssal.errors import UserError

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_BYTES = {"b": 1, **{u: 1000**i for i, u in enumerate(("kb", "mb", "gb", "tb"), 1)}}
_BYTES |= {u: 1024**i for i, u in enumerate(("kib", "mib", "gib", "tib"), 1)}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_bytes(text: str, field: str) -> float:
    """``80GB`` (10^9), ``80GiB`` (2^30), ``40960MB``. Raises UserError naming ``field``."""
    return _parse(text, field, _BYTES, "a size such as 80GB, 80GiB or 40960MB")


def parse_count(text: str, field: str) -> float:
    """``1T``, ``14.8T``, ``300M``, ``2e12``. Raises UserError naming ``field``."""
    return _parse(text, field, _COUNTS, "a number such as 300M, 14.8T or 2e12")


def _parse(text: str, field: str, units: dict[str, int], wanted: str) -> float:
    match = _SIZE.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in units:
        raise UserError(f"{field}: {text!r} is not {wanted}")
    number = float(match[1]) * units[unit]
    if not 0 < number < 1e24:
        raise UserError(f"{field}: {text!r} is {'not above 0' if number <= 0 else 'more than anything here'}")
    return number


def size(nbytes: float) -> str:
    """``76.00 GB``, ``0.95 MB``: powers of 1000, GB from 100 MB on."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale / 10:
            return f"{nbytes / scale:,.2f} {unit}"
    return f"{nbytes / 1e3:,.2f} kB"


def plural(number: int, noun: str) -> str:
    """``1 sequence``, ``2,048 sequences``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
