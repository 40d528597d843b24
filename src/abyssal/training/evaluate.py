"""Validation: the mean loss over the held-out split, in nats a token and in bits a byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from abyssal.data.loader import validation_batches
from abyssal.data.shards import TokenShards
from abyssal.model import Transformer
from abyssal.training.hardware import autocast
from abyssal.training.loss import compute_losses


@dataclass(frozen=True)
class Evaluation:
    """``loss`` in nats a token; ``bits_per_byte`` of UTF-8 text, which does not depend on the tokenizer."""

    loss: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: Transformer,
    shards: TokenShards,
    *,
    batch_size: int,
    sequence_length: int,
    dtype: torch.dtype,
    batches: int | None = None,
) -> Evaluation:
    """Loss of ``model`` on ``shards``, in windows that do not overlap, every token counted once.

    The first token of a document has nothing before it and is not predicted; that is its BOS where the tokenizer has
    one. With ``batches`` only so many are looked at, and the bytes are the split's, in proportion.
    """
    device = next(model.parameters()).device
    nats, tokens, seen = 0.0, 0, 0
    for cpu_batch in validation_batches(
        shards, batch_size=batch_size, sequence_length=sequence_length, lookahead=1, limit=batches
    ):
        with autocast(device, dtype):
            losses = compute_losses(model, cpu_batch.to(device), sequence_length, mtp=False)
        nats += float(losses.nats[0])
        tokens += losses.counts[0]
        seen += int((cpu_batch.documents[:, 1:] >= 0).sum())
    share = min(seen / max(len(shards) - 1, 1), 1.0)
    return Evaluation(nats / max(tokens, 1), nats / math.log(2) / max(shards.bytes * share, 1), tokens)
