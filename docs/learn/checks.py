"""What a chapter claims, said line by line as it runs; one that does not hold ends the script with exit code 1."""

from __future__ import annotations

import sys


class Checks:
    """The checks of one chapter. :meth:`end` belongs at its end."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.late: list[str] = []

    def __call__(self, claim: str, holds: bool, figure: str = "") -> None:
        """Says whether ``claim`` holds, and the ``figure`` behind it."""
        self._say(claim, bool(holds), figure)
        if not holds:
            self.failed.append(claim)

    def measured(self, claim: str, holds: bool, figure: str = "") -> None:
        """The same of a time, which another program on the machine may spoil: said, here and at the end, but nothing
        fails by it."""
        self._say(claim, bool(holds), figure)
        if not holds:
            self.late.append(claim)

    def end(self) -> None:
        """Exits with 1 where a check has failed; in a notebook it raises."""
        if not self.failed:
            print("\nall checks hold" + (f"; of the times not: {'; '.join(self.late)}" if self.late else ""))
            return
        message = f"{len(self.failed)} checks do not hold: " + "; ".join(self.failed)
        if "ipykernel" in sys.modules:
            raise AssertionError(message)
        sys.exit(message)

    @staticmethod
    def _say(claim: str, holds: bool, figure: str) -> None:
        print(f"{'✓' if holds else '✗'} {claim}{': ' + figure if figure else ''}")
