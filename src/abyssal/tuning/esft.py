"""Expert-specialised fine-tuning (ESFT, arXiv 2407.01906): train only the routed experts that a task's data uses.

A layer's experts are scored on a sample of the data (§3.2): each token gives an expert its gate weight (average gate
score), or 1/K where it is among its K choices (token selection ratio); tokens are averaged within an example, then
examples, so that a long one counts no more than a short one. From the best on, experts are taken until their scores add
up to a share p of the layer's (§3.3). The paper's scores add up to 1 by themselves where gate weights do; here they are
divided by their sum.

Shapes: E experts, K experts a token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abyssal.data.loader import Batch
from abyssal.errors import UserError
from abyssal.model import Routing, Transformer
from abyssal.model.modes import evaluating
from abyssal.tuning.recipe import ESFTConfig


@dataclass(frozen=True)
class Choice:
    """The experts chosen, by layer (best first), and every layer's scores [E], which add up to 1."""

    experts: dict[int, list[int]]
    scores: dict[int, list[float]]
    tokens: int
    """That were looked at."""

    def lines(self, model: Transformer) -> list[str]:
        """The report: which experts, what their scores add up to, how much of the model that is."""
        out = []
        for layer, chosen in self.experts.items():
            share = sum(self.scores[layer][expert] for expert in chosen)
            named = ", ".join(map(str, sorted(chosen)))
            out.append(f"layer {layer}: {len(chosen)} of {len(self.scores[layer])} experts, {share:.1%}: {named}")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        chosen_, all_ = sum(map(len, self.experts.values())), sum(map(len, self.scores.values()))
        parts = f"{trained:,} parameters, {trained / total:.2%} of the model's {total:,}"
        out.append(f"trained: {chosen_} of {all_} experts, {parts}; chosen on {self.tokens:,} tokens of the data")
        return out

    def to_json(self) -> dict[str, Any]:
        """As esft.json has it."""
        return {"tokens": self.tokens, "experts": _keys(self.experts), "scores": _keys(self.scores)}

    @classmethod
    def from_json(cls, file: Path) -> Choice:
        """Reads it back. Raises UserError where it is damaged."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            experts, scores = (
                {int(layer): list(row) for layer, row in data[key].items()} for key in ("experts", "scores")
            )
            return cls(experts, scores, int(data["tokens"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: damaged ({error!r}); it says which experts this run trains") from None


def _keys(table: dict[int, list[Any]]) -> dict[str, list[Any]]:
    return {str(layer): row for layer, row in table.items()}


class _Scorer:
    """Adds up what the routers of one batch at a time decide."""

    keeps = False

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.sums: dict[int, Tensor] = {}
        self.examples = 0
        self._example = torch.empty(0, dtype=torch.long)  # [B·T], which of the batch's examples a token is of
        self._lengths = torch.empty(0)

    def begin(self, documents: Tensor) -> None:
        """``documents`` [B, T] of the batch that comes."""
        flat = documents.reshape(-1)
        real, self._example = torch.unique(flat[flat >= 0], return_inverse=True)
        self._real = flat >= 0
        self._lengths = torch.bincount(self._example, minlength=len(real)).double()
        self.examples += len(real)

    def record(self, layer: int, routing: Routing) -> None:
        experts = routing.scores.shape[-1]
        weights = routing.weights.double() if self.kind == "gate" else torch.ones_like(routing.weights).double()
        given = torch.zeros(*routing.scores.shape[:2], experts, dtype=torch.float64, device=weights.device)
        given = given.scatter_add(-1, routing.indices, weights / routing.indices.shape[-1])
        # Where tokens are cut in segments, a token is the mean of its segments.
        segments = given.shape[1] * given.shape[0] // len(self._real)
        tokens = given.flatten(0, 1).unflatten(0, (-1, segments)).mean(1).cpu()[self._real]
        by_example = torch.zeros(len(self._lengths), experts, dtype=torch.float64)
        by_example.index_add_(0, self._example, tokens)
        total = (by_example / self._lengths.unsqueeze(1)).sum(0)
        self.sums[layer] = self.sums[layer] + total if layer in self.sums else total


@torch.no_grad()
def score_experts(
    model: Transformer, batches: Iterable[Batch], length: int, kind: str, limit: int
) -> tuple[dict[int, Tensor], int]:
    """Every layer's scores [E] float64, which add up to 1, over some ``limit`` tokens of ``batches``; and how many
    tokens that were. MTP modules are left out. Raises UserError where there are no tokens."""
    scorer, tokens = _Scorer(kind), 0
    device = model.model.embed_tokens.weight.device
    with evaluating(model):
        for batch in batches:
            if tokens >= limit:
                break
            documents = batch.documents[:, :length]
            scorer.begin(documents)
            model.hidden(batch.tokens[:, :length].to(device), documents=documents.to(device), recorder=scorer)
            tokens += int((documents >= 0).sum())
    if not tokens:
        raise UserError("esft: there is no example to score experts on")
    return {layer: total / total.sum() for layer, total in scorer.sums.items()}, tokens


def choose(scores: dict[int, Tensor], p: float) -> dict[int, list[int]]:
    """By layer the fewest experts, best first, whose ``scores`` [E] add up to ``p`` or more of their sum. Of equal
    scores the expert with the lower number comes first."""
    chosen = {}
    for layer, score in scores.items():
        order = score.argsort(descending=True, stable=True)
        reached = (score[order].cumsum(0) / score.sum()) >= p - 1e-12
        count = int(reached.int().argmax()) + 1 if bool(reached.any()) else len(order)
        chosen[layer] = order[:count].tolist()
    return chosen


def choose_experts(model: Transformer, batches: Iterable[Batch], length: int, config: ESFTConfig) -> Choice:
    """Scores ``model``'s experts on ``batches`` and chooses as ``config`` says."""
    scores, tokens = score_experts(model, batches, length, config.score, config.tokens)
    return Choice(choose(scores, config.p), {layer: score.tolist() for layer, score in scores.items()}, tokens)
