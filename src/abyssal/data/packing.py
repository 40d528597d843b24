"""Examples packed into rows: as many as fit, each whole, none cut.

A row is T + L tokens: T inputs and a lookahead of L = 1 + MTP depth, as in `abyssal.data.loader`. Only its first T + 1
hold examples, so that every token of them that has one before it is a main target; the rest is padding. An example's
sequences lie in one row, as documents of their own: attention stays within each and positions begin anew
(``isolated``). `documents` holds the number of the sequence in the data set, `learned` what counts as a target.

Training (`PackedLoader`): each epoch shuffles the examples and packs them anew, window by window, best fit: the longest
first, each into the row in which it leaves the least room. The order of the rows is random too. All follows from the
seed and the epoch's number alone, as the loader's does.

Validation (`packed_batches`): in order, a row begun wherever an example does not fit into the last one.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from abyssal.data.examples import Examples
from abyssal.data.loader import Batch, check_positive
from abyssal.errors import UserError

WINDOW = 1024  # examples that are packed together: more hardly fill rows better


class PackedLoader:
    """Endless training batches of `examples`; `next` gives one. `epoch` counts from 0, `index` the rows taken from it,
    `epoch_rows` how many it has. Raises UserError where there is no example, or one longer than T + 1 tokens."""

    def __init__(self, examples: Examples, *, batch_size: int, sequence_length: int, lookahead: int, seed: int) -> None:
        check_positive(batch_size=batch_size, sequence_length=sequence_length, lookahead=lookahead)
        _check_lengths(examples, sequence_length)
        if len(examples) == 0:
            raise UserError("the data set has no examples to train on")
        self.examples = examples
        self.batch_size, self.sequence_length, self.lookahead = batch_size, sequence_length, lookahead
        self.seed = seed
        self._begin(epoch=0, index=0)

    @property
    def epoch_rows(self) -> int:
        """The rows in this epoch; in another there may be a few more or fewer."""
        return len(self._rows)

    @property
    def padding(self) -> float:
        """The share of this epoch's T + 1 places a row that hold no token."""
        return padding_share(self.examples, self.sequence_length, len(self._rows))

    def next(self) -> Batch:
        """The next B rows; a batch may span the end of an epoch."""
        rows = []
        for _ in range(self.batch_size):
            if self.index == len(self._rows):
                self._begin(self.epoch + 1, 0)
            rows.append(self._rows[self.index])
            self.index += 1
        return _batch(self.examples, rows, self.sequence_length + self.lookahead)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is (epoch, index), and what that position depends on."""
        return {**self._identity(), "epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises UserError for a state of another seed, batch size, sequence length,
        lookahead or other examples, under which the order would not be the same."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(f"the loader's saved state has {name} {state.get(name)}, this run has {value}")
        epoch, index = state.get("epoch", -1), state.get("index", -1)
        if epoch < 0 or not 0 <= index <= len(self._plan(epoch)):
            raise UserError(f"the loader's saved state is at epoch {epoch}, index {index}, which does not exist")
        self._begin(epoch, index)

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "lookahead": self.lookahead,
            "examples": self.examples.fingerprint,
        }

    def _begin(self, epoch: int, index: int) -> None:
        self.epoch, self.index = epoch, index
        self._rows = self._plan(epoch)

    def _plan(self, epoch: int) -> list[list[int]]:
        # A hash, since seed + epoch would give seed 1 the second epoch of seed 0.
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        lengths = self.examples.lengths()
        windows = (order[n : n + WINDOW] for n in range(0, len(order), WINDOW))
        rows = [row for window in windows for row in best_fit(window, lengths, self.sequence_length + 1)]
        # Each window's first rows hold its longest examples.
        return [rows[n] for n in torch.randperm(len(rows), generator=generator).tolist()]


def packed_batches(
    examples: Examples, *, batch_size: int, sequence_length: int, lookahead: int, limit: int | None = None
) -> Iterator[Batch]:
    """Every example once and in order, at most `limit` batches; the last batch may have fewer rows. Raises UserError
    for an example longer than T + 1 tokens."""
    check_positive(batch_size=batch_size, sequence_length=sequence_length, lookahead=lookahead)
    _check_lengths(examples, sequence_length)
    rows: list[list[int]] = []
    room = 0
    for index, length in enumerate(examples.lengths().tolist()):
        if length > room:
            rows.append([])
            room = sequence_length + 1
        rows[-1].append(index)
        room -= length
    batches = (rows[n : n + batch_size] for n in range(0, len(rows), batch_size))
    for batch in itertools.islice(batches, limit):
        yield _batch(examples, batch, sequence_length + lookahead)


def best_fit(indices: Sequence[int], lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """These examples in rows of at most `capacity` tokens."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens free, row), in order
    for index in sorted(indices, key=lambda index: -int(lengths[index])):
        length = int(lengths[index])
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(rooms, (room - length, row))
    return rows


def padding_share(examples: Examples, sequence_length: int, rows: int) -> float:
    """The share of the places in so many rows of T + 1 that the examples leave empty."""
    return 1 - len(examples.tokens) / (rows * (sequence_length + 1)) if rows else 0.0


def _batch(examples: Examples, rows: Sequence[Sequence[int]], length: int) -> Batch:
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    documents = np.full((len(rows), length), -1, dtype=np.int64)
    learned = np.zeros((len(rows), length), dtype=np.bool_)
    for row, contents in enumerate(rows):
        place = 0
        for index in contents:
            for number in range(index * examples.per_example, (index + 1) * examples.per_example):
                ids, wanted = examples.sequence(number)
                span = slice(place, place + len(ids))
                tokens[row, span], documents[row, span], learned[row, span] = ids, number, wanted
                learned[row, place] = False
                place += len(ids)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(documents), torch.from_numpy(learned), isolated=True)


def _check_lengths(examples: Examples, sequence_length: int) -> None:
    longest = int(examples.lengths().max(initial=0))
    if longest > sequence_length + 1:
        raise UserError(
            f"an example has {longest} tokens; a row of sequence_length {sequence_length} holds {sequence_length + 1}"
        )
