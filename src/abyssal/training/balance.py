"""Balancers: what keeps the routed experts evenly used. Each is a strategy beside the model; any can be combined.

The router reports its decisions (:class:`abyssal.model.Routing`); a balancer answers in one of two ways: with a loss
that is added to the training loss, so that the gradient reaches the router while the forward pass returns what it
always did; or by moving ``e_score_correction_bias`` after the optimizer's step, without any gradient.

Shapes: B sequences, T tokens, K experts a token, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abyssal.distributed.together import Alone
from abyssal.model import Routing
from abyssal.model.router import Router
from abyssal.training.recipe import BalanceConfig


class Balancer:
    """Does nothing; strategies override what they need."""

    together = Alone()
    """The processes that a micro-batch is divided among."""

    def loss(self, routing: Routing) -> Tensor | None:
        """A term for one layer of one micro-batch, to be added to the loss. Called before the backward pass. Of a
        micro-batch that processes share, it is what this one adds: the sum is the whole one's term."""
        return None

    def after_step(self, layer: int, router: Router, load: Tensor, progress: float = 0.0) -> None:
        """Called once a layer after the optimizer's step; ``load`` [E] is summed over the whole global batch,
        ``progress`` is how much of the run's steps were done before this one, 0 to 1."""

    def state_dict(self) -> dict[str, Tensor]:
        """What must survive a restart."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what :meth:`state_dict` gave."""


class BiasSign(Balancer):
    """b_i += rate · sign(mean load − load_i), after every step (V3 paper §2.1.2; arXiv 2408.15664, algorithm 1).

    The rate falls along a cosine to ``final`` · rate over the run; 1 keeps it constant.
    """

    def __init__(self, rate: float, final: float = 1.0) -> None:
        self.rate, self.final = rate, final

    @torch.no_grad()
    def after_step(self, layer: int, router: Router, load: Tensor, progress: float = 0.0) -> None:
        load = load.float()
        assert router.e_score_correction_bias is not None
        rate = self.rate * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress)))
        router.e_score_correction_bias += rate * (load.mean() - load).sign()


class BiasProportional(Balancer):
    """b_i −= rate · (load_i / total − 1/E), every ``every`` steps, of the load since the last time."""

    def __init__(self, rate: float, every: int) -> None:
        self.rate, self.every = rate, every
        self.pending: dict[int, Tensor] = {}
        self.steps: dict[int, int] = {}

    @torch.no_grad()
    def after_step(self, layer: int, router: Router, load: Tensor, progress: float = 0.0) -> None:
        self.pending[layer] = self.pending.get(layer, torch.zeros_like(load)) + load
        self.steps[layer] = self.steps.get(layer, 0) + 1
        if self.steps[layer] < self.every:
            return
        share = self.pending[layer].float() / self.pending[layer].sum()
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias -= self.rate * (share - 1 / share.numel())
        del self.pending[layer], self.steps[layer]

    def state_dict(self) -> dict[str, Tensor]:
        loads = {f"load.{layer}": load for layer, load in self.pending.items()}
        return loads | {f"steps.{layer}": torch.tensor(steps) for layer, steps in self.steps.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.pending = {int(k.removeprefix("load.")): v for k, v in state.items() if k.startswith("load.")}
        self.steps = {int(k.removeprefix("steps.")): int(v) for k, v in state.items() if k.startswith("steps.")}


class AuxiliaryLoss(Balancer):
    """alpha · Σ_i f_i · P_i, with f_i = (share of the assignments that went to i) · E and P_i the mean score of i.

    ``by_sequence`` takes the sum sequence by sequence and averages it over the batch (V3 paper eq. 17-20, and the first
    generation's ``seq_aux``); else over all tokens at once (DeepSeekMoE paper §3.3). ``normalize`` divides each token's
    scores by their sum first, as V3 does with its sigmoid scores; softmax scores have that sum already. Padding does
    not count. f_i has no gradient: it reaches the router through P_i, so processes that share a micro-batch need to
    tell each other f_i alone.
    """

    def __init__(self, alpha: float, by_sequence: bool, normalize: bool) -> None:
        self.alpha, self.by_sequence, self.normalize = alpha, by_sequence, normalize

    def loss(self, routing: Routing) -> Tensor:
        scores, indices = routing.scores, routing.indices
        experts, chosen = scores.shape[-1], indices.shape[-1]
        if self.normalize:
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        counted = torch.zeros_like(scores).scatter_(-1, indices, 1.0)  # an expert is chosen once a token at most
        real = scores.new_ones(scores.shape[:2]) if routing.valid is None else routing.valid.to(scores.dtype)
        dims = (1,) if self.by_sequence else (0, 1)
        tokens, assigned = real.sum(dims).unsqueeze(-1), (counted * real.unsqueeze(-1)).sum(dims)
        sum_over = self.together.sum_of_sequences if self.by_sequence else self.together.sum
        tokens, assigned = sum_over(tokens.clone()), sum_over(assigned)
        tokens = tokens.clamp_min(1)
        f = assigned * experts / (tokens * chosen)
        p = (scores * real.unsqueeze(-1)).sum(dims) / tokens
        term = self.alpha * (f * p).sum(-1).mean()
        return term / self.together.parts if self.by_sequence else term


def build_balancers(config: BalanceConfig, together: Alone | None = None) -> dict[str, Balancer]:
    """The balancers that ``config`` names, by name. ``together``: the processes that share a micro-batch."""
    balancers: dict[str, Balancer] = {}
    if config.bias_sign:
        balancers["bias_sign"] = BiasSign(config.bias_sign.rate, config.bias_sign.final)
    if config.bias_proportional:
        balancers["bias_proportional"] = BiasProportional(config.bias_proportional.rate, config.bias_proportional.every)
    if config.token_loss:
        balancers["token_loss"] = AuxiliaryLoss(config.token_loss.alpha, False, config.token_loss.normalize)
    if config.sequence_loss:
        balancers["sequence_loss"] = AuxiliaryLoss(config.sequence_loss.alpha, True, config.sequence_loss.normalize)
    if together is not None:
        for balancer in balancers.values():
            balancer.together = together
    return balancers
