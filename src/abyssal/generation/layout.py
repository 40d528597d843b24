"""How the tokens of many sequences lie side by side in one pass: from spans of sequences to what attention must
know."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from abyssal.model.paged import Piece, Ragged

FEW = 16  # rows of a sequence up to which each attends by itself; above, they share the work of their keys


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``end`` of the sequence whose latents are in ``pages``."""

    pages: Items[int]
    start: int
    end: int

    def attends_by_row(self, possible: bool) -> bool:
        """Whether its rows attend one by one, where the model has a way for that."""
        return possible and self.end - self.start <= FEW


def lay_out(spans: Items[Span], page: int, device: torch.device, by_row: bool) -> Ragged:
    """``spans`` one after the other, those first whose rows attend by themselves; ``page`` is tokens a page."""
    few = [span.attends_by_row(by_row) for span in spans]
    assert few == sorted(few, reverse=True)
    positions = np.concatenate([np.arange(span.start, span.end) for span in spans])
    held = np.concatenate([np.asarray(s.pages)[np.arange(s.start, s.end) // page] for s in spans])
    singles = [span for span, alone in zip(spans, few, strict=True) if alone]
    tables = np.zeros(
        (sum(s.end - s.start for s in singles), max((len(s.pages) for s in singles), default=0)), np.int32
    )
    row = 0
    for span in singles:
        tables[row : row + span.end - span.start, : len(span.pages)] = span.pages
        row += span.end - span.start
    lengths = (positions[:row] + 1).astype(np.int32)  # a row sees itself
    pieces = []
    for span in spans[len(singles) :]:
        count = span.end - span.start
        table = torch.tensor(span.pages[: -(-span.end // page)], device=device)
        pieces.append(Piece(row, row + count, span.end, table))
        row += count
    return Ragged(
        torch.from_numpy(positions).unsqueeze(0).to(device),
        torch.from_numpy(held * page + positions % page).to(device),
        torch.from_numpy(tables).to(device),
        torch.from_numpy(lengths).to(device),
        tuple(pieces),
    )
