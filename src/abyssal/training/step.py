"""One optimizer step, in order:

for each micro-batch: forward, loss (+ balancers' terms), backward → clip → optimizer
→ balancers move the biases by the whole step's load
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.data.loader import Batch
from abyssal.model import RoutingRecorder, Transformer
from abyssal.training.balance import build_balancers
from abyssal.training.hardware import autocast
from abyssal.training.loss import compute_losses, count_targets, total_loss
from abyssal.training.optimizer import build_optimizer
from abyssal.training.recipe import BalanceConfig, OptimizerConfig


@dataclass(frozen=True)
class StepResult:
    """What one step was: losses in nats a token, of the main model and of each MTP module; loads [E] by layer."""

    loss: float
    mtp_loss: list[float]
    balance_loss: float
    grad_norm: float
    lr: float
    loads: dict[int, Tensor]


class NotFinite(ArithmeticError):
    """The loss or the gradient's norm is NaN or infinite; the step was not applied."""

    def __init__(self, what: str, value: float) -> None:
        super().__init__(f"{what} is {value}")
        self.what, self.value = what, value


class TrainingStep:
    """A model, its optimizer and its balancers: called, it makes one optimizer step over some micro-batches.

    ``dtype`` is what matrix products run in.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        optimizer: OptimizerConfig,
        balance: BalanceConfig,
        clip: float,
        mtp_weight: float,
        device: torch.device,
        dtype: torch.dtype,
        recompute: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = build_optimizer(model, optimizer)
        self.balancers = build_balancers(balance)
        self.clip, self.mtp_weight, self.recompute = clip, mtp_weight, recompute
        self.device, self.dtype = device, dtype

    def __call__(self, batches: Sequence[Batch], length: int, lr: float, progress: float) -> StepResult:
        """``batches`` (tokens [B, ≥ length + 1 + MTP depth]) are the micro-batches; ``progress`` is how much of the run
        is done, 0 to 1. Raises NotFinite, with nothing changed, where the loss or the gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        depths = len(self.model.mtp_modules)
        counts = [count_targets(batch, length, depths) for batch in batches]
        step_counts = [sum(column) for column in zip(*counts, strict=True)]
        nats = torch.zeros(1 + depths, device=self.device)
        balance_loss = torch.zeros((), device=self.device)
        loads: dict[int, Tensor] = {}
        for batch in batches:
            recorder = RoutingRecorder()
            loss = self._loss(batch.to(self.device), length, step_counts, recorder, nats)
            for layer, routings in recorder.routings.items():
                for routing in routings:
                    load = routing.load()
                    loads[layer] = loads[layer] + load if layer in loads else load
                    for balancer in self.balancers.values():
                        term = balancer.loss(routing)
                        if term is not None:
                            balance_loss += term.detach() / len(batches)
                            loss = loss + term / len(batches)
            loss.backward()
        # tolist and item wait for the device; from here on everything is known on the host
        means = [n / max(count, 1) for n, count in zip(nats.tolist(), step_counts, strict=True)]
        _check_finite("loss", sum(means) + balance_loss.item())
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip).item()
        _check_finite("gradient norm", grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        routers = self.model.routers
        for layer, load in loads.items():
            for balancer in self.balancers.values():
                balancer.after_step(layer, routers[layer], load, progress)
        return StepResult(means[0], means[1:], balance_loss.item(), grad_norm, lr, loads)

    def _loss(
        self, batch: Batch, length: int, step_counts: list[int], recorder: RoutingRecorder, nats: Tensor
    ) -> Tensor:
        with autocast(self.device, self.dtype):
            losses = compute_losses(self.model, batch, length, recorder=recorder, recompute=self.recompute)
        nats += torch.stack([n.detach().float() for n in losses.nats])
        return total_loss(losses, step_counts, self.mtp_weight)


def _check_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise NotFinite(what, value)
