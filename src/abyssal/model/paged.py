"""The cache as the engine keeps it: pages of tokens in one pool, and one ragged pass over tokens of many sequences.

A page holds ``page`` tokens of one layer; a sequence has a list of pages, its table, and its token t lies in
table[t // page] at t % page. A pass computes N tokens laid side by side, [1, N]: linear layers and experts see one
batch of tokens, only attention asks which sequence a token is of. What it needs to know is said in :class:`Ragged`.

Shapes: N tokens of the pass, S tokens of a sequence so far, R rows that attend one by one, M pages a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.kernels import decode
from abyssal.model.cache import cached_shapes


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``end`` of the pass are the next tokens of one sequence, which has ``length`` with them."""

    start: int
    end: int
    length: int
    table: Tensor
    """[M] int64."""


@dataclass(frozen=True)
class Ragged:
    """Which sequence each token of a pass is of, and where it lies.

    The first R rows attend each by itself to ``lengths`` [R] int32 tokens of the sequence with the table ``tables``
    [R, M] int32: decoding, and the few rows of a draft that is verified (each sees one token more than the one before).
    Rows behind them belong to ``pieces``: prompts, many rows that share their keys.
    """

    positions: Tensor
    """[1, N] int64."""
    slots: Tensor
    """[N] int64: page · page size + place in it."""
    tables: Tensor
    lengths: Tensor
    pieces: tuple[Piece, ...]

    @property
    def singles(self) -> int:
        """R."""
        return self.lengths.shape[0]


class PagedLayer:
    """One layer's pages, as one pass sees them."""

    def __init__(self, pools: list[Tensor], ragged: Ragged) -> None:
        self.pools = pools
        """[pages, page, …] each: MLA has one (latent and rotary key), MHA two (keys, values)."""
        self.ragged = ragged

    def write(self, *new: Tensor) -> None:
        """Puts the pass's tokens [N, …] where they belong."""
        for pool, values in zip(self.pools, new, strict=True):
            decode.write_rows(values, self.ragged.slots, pool)

    def past(self, piece: Piece) -> list[Tensor]:
        """All tokens so far of a piece's sequence, [1, S, …] each; copied together from its pages."""
        return [pool[piece.table].flatten(0, 1)[: piece.length].unsqueeze(0) for pool in self.pools]


class PagedCache:
    """The pool of all layers, MTP modules' included, as one pass sees it; takes the place of :class:`Cache`."""

    def __init__(self, pools: list[list[Tensor]], ragged: Ragged) -> None:
        self.layers = [PagedLayer(layer, ragged) for layer in pools]
        self.ragged = ragged


def make_pools(
    config: ModelConfig, pages: int, page: int, *, layers: int, dtype: torch.dtype, device: torch.device
) -> list[list[Tensor]]:
    """Room for ``pages`` pages of ``page`` tokens in each of ``layers`` layers."""
    return [
        [torch.empty(pages, page, *shape, dtype=dtype, device=device) for shape in cached_shapes(config)]
        for _ in range(layers)
    ]


def attends_by_row(config: ModelConfig) -> bool:
    """Whether attention has a way for single rows (:attr:`Ragged.singles`); without one, all are pieces."""
    return config.attention.kind in ("mla", "mha")
