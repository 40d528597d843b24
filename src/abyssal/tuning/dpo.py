"""Direct preference optimisation (DPO, arXiv 2305.18290, eq. 7), for pairs of a chosen and a rejected answer:

    L = −log σ(β · m),   m = (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x))

With label smoothing ε: (1 − ε) of this and ε of the same with −m. π_ref is the model as it was before the first step;
its log-probabilities are worked out once and kept. A pair's two sequences lie in one row of a batch as two documents,
2i chosen and 2i + 1 rejected (:mod:`abyssal.data.examples`).

Shapes: B rows, T tokens, S sequences of the data set, P pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.data.loader import Batch
from abyssal.kernels.loss import IGNORED, linear_token_nats
from abyssal.model import Recorder, Transformer
from abyssal.model.modes import evaluating
from abyssal.training.hardware import autocast
from abyssal.training.loss import Losses, Objective, documents_apart, head_weight, targets
from abyssal.tuning.recipe import DPOConfig


class Preference(Objective):
    """The DPO loss of the pairs in a batch. ``reference`` [S] FP32: log π_ref of every sequence, by its number.

    Figures beside the loss: ``accuracy``, the share of pairs with a positive margin; ``margin``, β · m;
    ``chosen_reward`` and ``rejected_reward``, β · log(π / π_ref) of each side.
    """

    names = ("accuracy", "margin", "chosen_reward", "rejected_reward")
    unit = "pair"

    def __init__(self, config: DPOConfig, reference: Tensor | None = None) -> None:
        super().__init__(mtp=False)
        self.config, self.reference = config, reference

    def counts(self, model: Transformer, batch: Batch, length: int, *, mtp: bool = True) -> list[int]:
        return [len(_places(batch.documents[:, :length])[0]) // 2]

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
        assert self.reference is not None
        numbers, log_p = sequence_log_probabilities(model, batch, length, recorder=recorder, recompute=recompute)
        return preference_losses(log_p, self.reference.to(log_p.device)[numbers], self.config, counts)


def preference_losses(log_p: Tensor, reference: Tensor, config: DPOConfig, counts: list[int]) -> Losses:
    """Loss and figures, summed over pairs: ``log_p`` and ``reference`` [2P], chosen and rejected in turn."""
    rewards = config.beta * (log_p - reference)
    chosen, rejected = rewards[0::2], rewards[1::2]
    margin = chosen - rejected
    loss = -(1 - config.label_smoothing) * F.logsigmoid(margin) - config.label_smoothing * F.logsigmoid(-margin)
    figures = ((margin > 0).to(margin.dtype), margin, chosen, rejected)
    return Losses([loss.sum()], counts, torch.stack([figure.detach().sum() for figure in figures]))


def sequence_log_probabilities(
    model: Transformer, batch: Batch, length: int, *, recorder: Recorder | None = None, recompute: bool = False
) -> tuple[Tensor, Tensor]:
    """log π of what is learned of every sequence in ``batch``: their numbers, a pair's side by side, and [that many]
    FP32."""
    hidden = model.hidden(
        batch.tokens[:, :length], documents=documents_apart(batch, length), recorder=recorder, recompute=recompute
    )
    wanted = targets(batch, length, 0).flatten()
    counted = (wanted != IGNORED).nonzero().squeeze(1)
    nats = linear_token_nats(hidden.flatten(0, 1)[counted], head_weight(model), wanted[counted])
    numbers, place = _places(batch.documents[:, :length])
    return numbers, -nats.new_zeros(len(numbers)).index_add(0, place[counted], nats)


def _places(documents: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences in ``documents`` [B, T], row by row and in order, and which of them each of the B·T tokens is of
    (padding: any). Where an epoch ends within a batch, one pair may be in two rows; each counts."""
    most = documents.max() + 1
    rows = torch.arange(len(documents), device=documents.device).unsqueeze(1)
    keys = (documents + rows * most).flatten()
    found = keys[documents.flatten() >= 0].unique()
    return found % most, torch.searchsorted(found, keys).clamp_max(len(found) - 1)


@torch.no_grad()
def reference_log_probabilities(
    model: Transformer, batches: Iterable[Batch], length: int, sequences: int, dtype: torch.dtype
) -> Tensor:
    """[S] FP32 on the CPU: log π of each of ``sequences`` by ``model`` as it is; 0 for those that ``batches`` lack."""
    out = torch.zeros(sequences)
    device = model.model.embed_tokens.weight.device
    with evaluating(model), autocast(device, dtype):
        for batch in batches:
            numbers, log_p = sequence_log_probabilities(model, batch.to(device), length)
            out[numbers.cpu()] = log_p.float().cpu()
    return out
