"""What commands print with: one console, numbers as people read them."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Prints ``text`` as it is: a name in it is no markup."""
    console.print(text, markup=False)


def printable(text: str) -> str:
    """``text`` without control characters, which a file's or tensor's name may hold and a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table: the first column to the left, numbers to the right."""
    out = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return out


def show_table(out: Table) -> None:
    """Prints a table at its natural width: a figure cut short to fit the terminal would be no figure."""
    wide = console.options.update(width=1000, max_width=1000)
    Console(highlight=False, width=max(Measurement.get(console, wide, out).maximum, 1)).print(out)


def size(nbytes: float) -> str:
    """Bytes as ``1.23 GB`` (powers of 1000)."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.2f} GB"


def duration(seconds: float) -> str:
    """95 as ``1:35``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
