"""Validation: the mean loss over the held-out split, in nats a token and in bits a byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from abyssal.data.loader import Batch, validation_batches
from abyssal.data.shards import TokenShards
from abyssal.distributed.together import Alone
from abyssal.model import Transformer
from abyssal.training.hardware import autocast
from abyssal.training.loss import Losses, Objective, hidden_states


@dataclass(frozen=True)
class Evaluation:
    """``loss`` in nats a token; ``bits_per_byte`` of UTF-8 text, which does not depend on the tokenizer (None where the
    loss is not one of text). ``tokens`` were predicted (for preferences: pairs compared)."""

    loss: float
    bits_per_byte: float | None
    tokens: int
    extras: dict[str, float] = field(default_factory=dict)
    """Means of the objective's other figures."""

    def figures(self) -> dict[str, Any]:
        """All of it, flat."""
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "tokens": self.tokens, **self.extras}


@dataclass(frozen=True)
class HeldOut:
    """A held-out split: its batches, at most so many; how many tokens they hold that may be predicted, and how many
    bytes of text those are."""

    batches: Callable[[int | None], Iterator[Batch]]
    tokens: int
    bytes: int

    @classmethod
    def of_shards(cls, shards: TokenShards, *, batch_size: int, sequence_length: int) -> HeldOut:
        """The split in windows that do not overlap, every token counted once."""

        def batches(limit: int | None) -> Iterator[Batch]:
            size, length = batch_size, sequence_length
            return validation_batches(shards, batch_size=size, sequence_length=length, lookahead=1, limit=limit)

        return cls(batches, max(len(shards) - 1, 1), shards.bytes)


@torch.no_grad()
def evaluate(
    model: Transformer,
    held_out: HeldOut,
    *,
    sequence_length: int,
    dtype: torch.dtype,
    batches: int | None = None,
    objective: Objective | None = None,
    together: Alone | None = None,
) -> Evaluation:
    """Loss of ``model`` on ``held_out``; processes that are ``together`` share every batch's rows.

    The first token of a document has nothing before it and is not predicted; that is its BOS where the tokenizer has
    one. With ``batches`` only so many are looked at, and the bytes are the split's, in proportion.
    """
    objective, together = objective or Objective(), together or Alone()
    device = together.device or next(model.parameters()).device
    nats, counted, seen = 0.0, 0, 0
    extras = [0.0] * len(objective.names)
    for whole in held_out.batches(batches):
        batch = whole.rows(together.part, together.parts) if together.parts > 1 else whole
        batch = together.own_part(batch, sequence_length)
        counts = objective.counts(model, batch, sequence_length, mtp=False)
        losses = _losses(model, batch.to(device), sequence_length, counts, objective, dtype, together)
        if losses is not None:
            nats += float(losses.nats[0])
            if losses.extras is not None:
                extras = [total + float(more) for total, more in zip(extras, losses.extras, strict=True)]
        counted += counts[0]
        real = batch.at(batch.documents, 1, sequence_length) >= 0
        if batch.learned is not None:
            real &= batch.at(batch.learned, 1, sequence_length)
        seen += int(real.sum())
    sums = together.sum(torch.tensor([nats, *extras], dtype=torch.float64))
    nats, *extras = together.sum_of_stages(sums).tolist()
    counted, seen = together.counts([counted, seen])
    size = held_out.bytes * min(seen / held_out.tokens, 1.0)
    bits = nats / math.log(2) / max(size, 1) if objective.unit == "token" else None
    means = {name: total / max(counted, 1) for name, total in zip(objective.names, extras, strict=True)}
    return Evaluation(nats / max(counted, 1), bits, counted, means)


def _losses(
    model: Transformer,
    batch: Batch,
    length: int,
    counts: list[int],
    objective: Objective,
    dtype: torch.dtype,
    together: Alone,
) -> Losses | None:
    """The losses of ``batch``; None on processes of a pipeline that have not its last stage."""
    found: list[Losses] = []

    def work(model: Transformer, index: int, states: Tensor | None = None, last: bool = True) -> Tensor:
        own = replace(batch, states=states)
        with autocast(batch.tokens.device, dtype):
            if not last:
                return hidden_states(model, own, length)
            found.append(objective.losses(model, own, length, counts))
        return found[0].nats[0]

    if together.pipeline is None:
        work(model, 0)
    else:
        together.pipeline.forward(work, batch.at(batch.tokens, 0, length).shape)
    return found[0] if found else None
