"""The training loss: next-token cross-entropy, and the same further ahead for each MTP module (V3 paper eq. 24-25).

    L = L_main + λ/D · Σ_k L_k,   L_k = mean over tokens of −log p_k(t_{i+1+k})

Nothing is predicted across a document's border: where the target belongs to another document than the token that
predicts it, or is padding, it does not count. Neither does a token that is not to be learned (a prompt's, in tuning).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from abyssal.data.loader import Batch
from abyssal.kernels.loss import IGNORED, linear_cross_entropy
from abyssal.model import Recorder, Transformer
from abyssal.model.fp8 import dense_weight

_ROWS = 256


@dataclass(frozen=True)
class Losses:
    """Sums in nats over what is predicted, and how many those are: main model first, then MTP by depth."""

    nats: list[Tensor]
    counts: list[int]
    extras: Tensor | None = None
    """Sums of an objective's other figures (:attr:`Objective.names`), over as many as ``counts[0]``."""


def targets(batch: Batch, length: int, depth: int) -> Tensor:
    """[B, length] targets of the main model (depth 0) or MTP module ``depth``; IGNORED where nothing is predicted. Of a
    part of the sequences, those of its positions."""
    here = batch.at(batch.documents, 0, length)
    counted = (batch.at(batch.documents, 1 + depth, length) == here) & (here >= 0)
    if batch.learned is not None:
        counted &= batch.at(batch.learned, 1 + depth, length)
    return batch.at(batch.tokens, 1 + depth, length).masked_fill(~counted, IGNORED)


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
    hidden = [hidden_states(model, batch, length, recorder=recorder, recompute=recompute)]
    if mtp and model.mtp_modules:
        tokens, apart = batch.tokens[:, : length + len(model.mtp_modules)], documents_apart(batch, length)
        options: dict[str, Any] = {"recorder": recorder, "recompute": recompute, "documents": apart}
        hidden += model.mtp_hidden(hidden[0], tokens, part=batch.part, **options)
    nats = [
        _cross_entropy(model, h.flatten(0, 1), targets(batch, length, depth).flatten(), batch)
        for depth, h in enumerate(hidden)
    ]
    return Losses(nats, count_targets(batch, length, len(hidden) - 1) if counts is None else counts)


def hidden_states(
    model: Transformer, batch: Batch, length: int, *, recorder: Recorder | None = None, recompute: bool = False
) -> Tensor:
    """What ``model`` makes of the first ``length`` positions of ``batch`` (of its part of them), [B, length, D]."""
    return model.hidden(
        batch.at(batch.tokens, 0, length),
        recorder=recorder,
        recompute=recompute,
        documents=documents_apart(batch, length),
        part=batch.part,
        states=batch.states,
    )


def head_weight(model: Transformer) -> Tensor:
    """The head's [V, D], also where it is packed (int8 below adapters)."""
    if isinstance(model.lm_head, nn.Linear):
        return model.lm_head.weight
    return dense_weight(model.lm_head, model.model.embed_tokens.weight.dtype)


def _cross_entropy(model: Transformer, hidden: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
    """Over ``hidden`` [N, D] and ``wanted`` [N]. Where prompts are not learned, the head is spared them."""
    if batch.learned is None or wanted.device.type != "cpu":  # on a GPU, looking would stop the device
        return _nats(model, hidden, wanted)
    rows = (wanted != IGNORED).nonzero().squeeze(1)
    # In steps of 256: each new shape costs a BF16 product more than a few rows too many.
    spare = -len(rows) % _ROWS
    if not 0 < len(rows) + spare < len(wanted):
        return _nats(model, hidden, wanted)
    padded = torch.cat((rows, rows.new_zeros(spare)))
    some = wanted[padded]
    some[len(rows) :] = IGNORED
    return _nats(model, hidden[padded], some)


def _nats(model: Transformer, hidden: Tensor, wanted: Tensor) -> Tensor:
    if (own := getattr(model.lm_head, "nats", None)) is not None:  # a head divided among processes
        nats: Tensor = own(hidden, wanted)
        return nats
    return linear_cross_entropy(hidden, head_weight(model), wanted)


def documents_apart(batch: Batch, length: int) -> Tensor | None:
    """[B, length]: what attention has to stay within; None where it may look across documents."""
    return batch.documents[:, :length] if batch.isolated else None


class Objective:
    """What a step minimises: next-token cross-entropy here; preferences in :mod:`abyssal.tuning.dpo`."""

    names: tuple[str, ...] = ()
    """Of the figures beside the loss, each reported as a mean."""
    unit = "token"
    """What the loss is a mean over."""

    def __init__(self, mtp: bool = True) -> None:
        self.mtp = mtp

    def counts(self, model: Transformer, batch: Batch, length: int, *, mtp: bool = True) -> list[int]:
        """How many of its units ``batch`` has: main model first, then, with ``mtp``, MTP modules that are trained."""
        depths = model.config.mtp.num_nextn_predict_layers
        return count_targets(batch, length, depths if self.mtp and mtp else 0)

    def losses(
        self,
        model: Transformer,
        batch: Batch,
        length: int,
        counts: list[int],
        *,
        recorder: Recorder | None = None,
        recompute: bool = False,
    ) -> Losses:
        """The losses of ``batch``, for which :meth:`counts` gave ``counts``."""
        mtp = len(counts) > 1
        return compute_losses(model, batch, length, mtp=mtp, recorder=recorder, recompute=recompute, counts=counts)


def total_loss(losses: Losses, step_counts: list[int], mtp_weight: float) -> Tensor:
    """The scalar to differentiate for one micro-batch; ``step_counts`` are the whole step's token counts."""
    main, *ahead = (n / max(count, 1) for n, count in zip(losses.nats, step_counts, strict=True))
    return main + mtp_weight / len(ahead) * torch.stack(ahead).sum() if ahead else main


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return states.clone()  # schedules that split the backward pass do not take a view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), dtype=ctx.dtype, device=grads[0].device)


def with_loss(states: Tensor, loss: Tensor) -> Tensor:
    """``states``; where a gradient comes back to them, ``loss`` (a scalar) is differentiated too."""
    out: Tensor = _Joined.apply(states, loss)
    return out
