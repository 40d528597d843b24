"""Windows of tokens for training and validation.

A window is T + L tokens: T inputs, and a lookahead of L = 1 + MTP depth. Position i predicts i + 1 in the main loss and
up to i + L in the MTP modules, so the main loss has the targets ``tokens[:, 1 : T + 1]``; what lies beyond is there for
MTP only. Windows start T apart: every token is a main target in at most one of them.

Training (`Loader`): each epoch begins at a random offset below T, so that the borders fall elsewhere each time, and
takes its windows in a random order. Both follow from the seed and the epoch's number alone, so three numbers say where
a run is, and a resumed run sees the very batches it would have seen. Processes that share a batch take a part of its
windows each and count all of them: where the run is does not depend on how many they are.

Validation (`validation_batches`): the whole split in order, the last window padded, every token but the very first a
target exactly once.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from abyssal.data.shards import TokenShards
from abyssal.errors import UserError

if TYPE_CHECKING:
    from abyssal.model.attention import SequencePart


@dataclass
class Batch:
    """`tokens` int64 [B, T + L]; `documents` int64 [B, T + L], the number of the document each token is in, -1 for
    padding (where `tokens` is 0). `learned` bool [B, T + L]: the tokens that count as targets, or None for all of
    them. `isolated`: attention stays within a document, and positions begin anew in each. `part`: of the T positions
    of a sequence those that are worked out here, the others being somebody else's; None: all. `states` [B, T, D]: what
    earlier layers, worked out elsewhere, have made of these positions."""

    tokens: torch.Tensor
    documents: torch.Tensor
    learned: torch.Tensor | None = None
    isolated: bool = False
    part: SequencePart | None = None
    states: torch.Tensor | None = None

    def at(self, x: torch.Tensor, ahead: int, length: int) -> torch.Tensor:
        """Of `x` [B, T + L] what stands `ahead` tokens behind each of the `length` positions (of `part`, if there is
        one)."""
        return x[:, ahead : ahead + length] if self.part is None else x[:, self.part.places + ahead]

    def rows(self, part: int, parts: int) -> Batch:
        """Every `parts`-th row from `part` on; where there is none, a row of padding."""
        chosen = slice(part, None, parts)
        tokens, documents = self.tokens[chosen], self.documents[chosen]
        learned = None if self.learned is None else self.learned[chosen]
        if len(tokens) == 0:
            tokens, documents = torch.zeros_like(self.tokens[:1]), torch.full_like(self.documents[:1], -1)
            learned = None if self.learned is None else torch.zeros_like(self.learned[:1])
        return replace(self, tokens=tokens, documents=documents, learned=learned)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        learned = None if self.learned is None else self.learned.to(device)
        part = None if self.part is None else self.part.to(device)
        tokens, documents = self.tokens.to(device), self.documents.to(device)
        return replace(self, tokens=tokens, documents=documents, learned=learned, part=part)


class Loader:
    """Endless training batches from `shards`; `next` gives one. `epoch` counts from 0, `index` the windows taken from
    it, `epoch_windows` how many it has. `part` (i, n): of each batch only its i-th n-th, from 0, is read. Raises
    UserError for a split shorter than one window, and for a batch that n does not divide."""

    def __init__(
        self,
        shards: TokenShards,
        *,
        batch_size: int,
        sequence_length: int,
        lookahead: int,
        seed: int,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        check_positive(batch_size=batch_size, sequence_length=sequence_length, lookahead=lookahead)
        needed = sequence_length + lookahead
        if len(shards) < needed:
            raise UserError(
                f"the corpus has {len(shards)} tokens; one sequence needs {needed} "
                f"(sequence_length {sequence_length} + lookahead {lookahead}): use more text or a shorter sequence"
            )
        which, parts = part
        if batch_size % parts:
            raise UserError(f"batch_size is {batch_size}; expected a multiple of {parts}, the processes that share it")
        self._own = slice(which * batch_size // parts, (which + 1) * batch_size // parts)
        self.shards = shards
        self.batch_size, self.sequence_length, self.lookahead = batch_size, sequence_length, lookahead
        self.seed = seed
        self._begin(epoch=0, index=0)

    @property
    def epoch_windows(self) -> int:
        """The windows in this epoch; the random offset may make it one fewer than in another."""
        return len(self._order)

    def next(self) -> Batch:
        """The next B windows, or the part of them that is this process's; a batch may span the end of an epoch."""
        starts = []
        for _ in range(self.batch_size):
            if self.index == len(self._order):
                self._begin(self.epoch + 1, 0)
            starts.append(self._offset + int(self._order[self.index]) * self.sequence_length)
            self.index += 1
        return _batch(self.shards, starts[self._own], self.sequence_length + self.lookahead)

    def state_dict(self) -> dict[str, int]:
        """Where the loader is (epoch, index), and what that position depends on."""
        return {**self._identity(), "epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken. Raises UserError for a state of another seed, batch size, sequence length,
        lookahead or corpus size, under which the order would not be the same."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(f"the loader's saved state has {name} {state.get(name)}, this run has {value}")
        epoch, index = state.get("epoch", -1), state.get("index", -1)
        if epoch < 0 or not 0 <= index <= len(self._plan(epoch)[1]):
            raise UserError(f"the loader's saved state is at epoch {epoch}, index {index}, which does not exist")
        self._begin(epoch, index)

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "lookahead": self.lookahead,
            "tokens": len(self.shards),
        }

    def _begin(self, epoch: int, index: int) -> None:
        self.epoch, self.index = epoch, index
        self._offset, self._order = self._plan(epoch)

    def _plan(self, epoch: int) -> tuple[int, torch.Tensor]:
        # A hash, since seed + epoch would give seed 1 the second epoch of seed 0.
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        spare = len(self.shards) - self.sequence_length - self.lookahead
        offset = int(torch.randint(min(self.sequence_length, spare + 1), (), generator=generator))
        windows = (len(self.shards) - offset - self.lookahead) // self.sequence_length
        return offset, torch.randperm(windows, generator=generator)


def validation_batches(
    shards: TokenShards, *, batch_size: int, sequence_length: int, lookahead: int, limit: int | None = None
) -> Iterator[Batch]:
    """The split from its first token to its last in windows of T + L, at most `limit` batches; the last batch may hold
    fewer windows. A target counts where ``documents[:, 1 : T + 1]`` is not -1: each token but the very first once.
    Raises UserError for a split of fewer than two tokens."""
    check_positive(batch_size=batch_size, sequence_length=sequence_length, lookahead=lookahead)
    if len(shards) < 2:
        raise UserError(f"the corpus has {len(shards)} tokens; validation needs at least 2, one to predict the other")
    starts = range(0, len(shards) - 1, sequence_length)
    batches = (starts[n : n + batch_size] for n in range(0, len(starts), batch_size))
    for batch in itertools.islice(batches, limit):
        yield _batch(shards, batch, sequence_length + lookahead)


def _batch(shards: TokenShards, starts: list[int] | range, length: int) -> Batch:
    tokens = np.zeros((len(starts), length), dtype=np.int64)
    documents = np.full((len(starts), length), -1, dtype=np.int64)
    for row, start in enumerate(starts):
        count = min(length, len(shards) - start)
        tokens[row, :count] = shards.read(start, count)
        documents[row, :count] = shards.documents(start, count)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(documents))


def check_positive(**values: int) -> None:
    """Raises UserError, with the name, for a value below 1."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
