"""The training loss: next-token cross-entropy, and the same further ahead for each MTP module (V3 paper eq. 24-25).

    L = L_main + λ/D · Σ_k L_k,   L_k = mean over tokens of −log p_k(t_{i+1+k})

Nothing is predicted across a document's border: where the target belongs to another document than the token that
predicts it, or is padding, it does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.data.loader import Batch
from abyssal.kernels.loss import IGNORED, linear_cross_entropy
from abyssal.model import Recorder, Transformer


@dataclass(frozen=True)
class Losses:
    """Sums in nats over the tokens predicted, and how many those are: main model first, then MTP by depth."""

    nats: list[Tensor]
    counts: list[int]


def targets(batch: Batch, length: int, depth: int) -> Tensor:
    """[B, length] targets of the main model (depth 0) or MTP module ``depth``; IGNORED where nothing is predicted."""
    ahead = batch.tokens[:, 1 + depth : 1 + depth + length]
    same = batch.documents[:, 1 + depth : 1 + depth + length] == batch.documents[:, :length]
    real = batch.documents[:, :length] >= 0
    return ahead.masked_fill(~(same & real), IGNORED)


def count_targets(batch: Batch, length: int, depths: int) -> list[int]:
    """How many tokens each of the main model and ``depths`` MTP modules predicts in ``batch``."""
    return [int((targets(batch, length, depth) != IGNORED).sum()) for depth in range(depths + 1)]


def compute_losses(
    model: Transformer,
    batch: Batch,
    length: int,
    *,
    mtp: bool = True,
    recorder: Recorder | None = None,
    recompute: bool = False,
    counts: list[int] | None = None,
) -> Losses:
    """Losses of ``batch`` (tokens [B, ≥ length + 1 + MTP depth]) as sums in nats with their token counts.

    ``counts`` is what :func:`count_targets` gave for it; without, they are read from the device, which is waited for.
    """
    hidden = [model.hidden(batch.tokens[:, :length], recorder=recorder, recompute=recompute)]
    if mtp and model.mtp_modules:
        tokens = batch.tokens[:, : length + len(model.mtp_modules)]
        hidden += model.mtp_hidden(hidden[0], tokens, recorder=recorder, recompute=recompute)
    nats = [
        linear_cross_entropy(h.flatten(0, 1), model.lm_head.weight, targets(batch, length, depth).flatten())
        for depth, h in enumerate(hidden)
    ]
    return Losses(nats, count_targets(batch, length, len(hidden) - 1) if counts is None else counts)


def total_loss(losses: Losses, step_counts: list[int], mtp_weight: float) -> Tensor:
    """The scalar to differentiate for one micro-batch; ``step_counts`` are the whole step's token counts."""
    main, *ahead = (n / max(count, 1) for n, count in zip(losses.nats, step_counts, strict=True))
    return main + mtp_weight / len(ahead) * torch.stack(ahead).sum() if ahead else main
