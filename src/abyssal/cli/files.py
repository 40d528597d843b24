"""What commands that write a page share: where it may go, and showing it."""

from __future__ import annotations

from pathlib import Path


def check_free(file: Path, option: str, mark: bytes) -> None:
    """Raises UserError, naming ``option``, where ``file`` can't be, or is there and none of ours, which have ``mark``
    near their beginning."""
    from abyssal.errors import UserError

    if file.is_dir():
        raise UserError(f"{option}: {file} is a folder; expected a file, such as {file / 'page.html'}")
    if not file.parent.is_dir():
        raise UserError(f"{option}: {file}: no such folder: {file.parent}")
    if file.exists():
        if not file.is_file():
            raise UserError(f"{option}: {file} is no file; expected a file")
        with file.open("rb") as existing:
            if mark not in existing.read(100_000):
                raise UserError(f"{option}: {file} exists and is none of ours; choose another file")


def write_page(file: Path, option: str, text: str, what: str, show: bool) -> None:
    """Writes a page and says where it is; ``show`` opens it in the browser. Raises UserError where it can't be
    written."""
    import webbrowser

    from abyssal.checkpoint import write_text
    from abyssal.cli.show import printable, say, size
    from abyssal.errors import UserError

    try:
        write_text(file, text)
    except OSError as error:
        raise UserError(f"{option}: {file}: {error.strerror}; choose another file") from None
    say(f"{what}  {printable(str(file))} ({size(file.stat().st_size)})")
    if show and not webbrowser.open(file.resolve().as_uri()):
        say("no browser was found here; open the file in one")
