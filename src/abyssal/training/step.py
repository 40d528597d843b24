"""One optimizer step, in order:

for each micro-batch: forward, loss (+ balancers' terms), backward → norm of the gradient, clipping → optimizer
→ balancers move the biases by the whole step's load

Trained are the parameters that want a gradient; the others stay as they are, in their dtype. With ``dtype`` BF16 those
of the trained weights that only products read are BF16 meanwhile (:mod:`abyssal.training.weights`).

Where processes share the batch, each differentiates its part of the loss, divided by the whole batch's tokens;
gradients, loads and figures are summed over them (:mod:`abyssal.distributed`).

On a GPU nothing here waits for the device: what a step came to stays there until somebody reads it. So it is not known
at once whether a number was not finite; a flag on the device then keeps this and every later step from being applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.data.loader import Batch
from abyssal.distributed.together import Alone
from abyssal.model import RoutingRecorder, Transformer
from abyssal.training import weights
from abyssal.training.balance import build_balancers
from abyssal.training.hardware import autocast
from abyssal.training.loss import Losses, Objective, hidden_states, total_loss, with_loss
from abyssal.training.optimizer import build_optimizer
from abyssal.training.recipe import BalanceConfig, OptimizerConfig


class NotFinite(ArithmeticError):
    """The loss or the gradient's norm is NaN or infinite; the step was not applied."""

    def __init__(self, what: str, value: float) -> None:
        super().__init__(f"{what} is {value}")
        self.what, self.value = what, value


@dataclass(frozen=True)
class StepResult:
    """What one step was. Reading a figure for the first time waits for the device, if they lie on one."""

    lr: float
    loads: dict[int, Tensor]
    """How many assignments each expert got, [E] by layer."""
    counts: list[int]
    """Tokens predicted (or what else the objective counts), by the main model and by each MTP module."""
    figures: Tensor
    """FP32: sums of nats by the main model and the MTP modules, balance loss, gradient's norm, sums of extras."""
    names: tuple[str, ...] = ()
    """Of the extras."""

    @cached_property
    def _numbers(self) -> list[float]:
        numbers: list[float] = self.figures.tolist()
        return numbers

    @property
    def loss(self) -> float:
        """Nats a token of the main model."""
        return self._means[0]

    @property
    def mtp_loss(self) -> list[float]:
        """Nats a token of each MTP module."""
        return self._means[1:]

    @property
    def balance_loss(self) -> float:
        """What balancers added to the loss."""
        return self._numbers[len(self.counts)]

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient before clipping."""
        return self._numbers[len(self.counts) + 1]

    @property
    def extras(self) -> dict[str, float]:
        """The objective's other figures, means over what ``counts`` counts."""
        sums = self._numbers[len(self.counts) + 2 :]
        return {name: total / max(self.counts[0], 1) for name, total in zip(self.names, sums, strict=True)}

    def check(self) -> None:
        """Raises NotFinite where a figure is not finite."""
        for what, value in (("loss", sum(self._means) + self.balance_loss), ("gradient norm", self.grad_norm)):
            if not math.isfinite(value):
                raise NotFinite(what, value)

    @property
    def _means(self) -> list[float]:
        return [nats / max(count, 1) for nats, count in zip(self._numbers, self.counts, strict=False)]


class _Sums:
    """What the micro-batches of a step add up to on this process."""

    def __init__(self, config: ModelConfig, targets: int, extras: int, device: torch.device) -> None:
        self.nats, self.extras = torch.zeros(targets, device=device), torch.zeros(extras, device=device)
        self.balance_loss = torch.zeros((), device=device)
        layers = config.num_hidden_layers + targets - 1  # MTP modules count where they are trained
        self.layers = [layer for layer in range(layers) if config.is_moe_layer(layer)]
        experts = config.moe.n_routed_experts if config.moe else 0
        self.loads = torch.zeros(len(self.layers), experts, dtype=torch.int64, device=device)

    def add(self, losses: Losses) -> None:
        self.nats += torch.stack([n.detach().float() for n in losses.nats])
        if losses.extras is not None:
            self.extras += losses.extras.detach().float()

    def count(self, layer: int, load: Tensor) -> None:
        self.loads[self.layers.index(layer)] += load

    def result(self, together: Alone, lr: float, norm: Tensor, counts: list[int], names: tuple[str, ...]) -> StepResult:
        """What they add up to on all processes."""
        sums = torch.cat((self.nats, self.balance_loss.unsqueeze(0), self.extras))
        sums = together.sum_of_stages(together.sum(sums))
        loads = together.sum_of_stages(together.sum(self.loads)) if self.layers else self.loads
        head = len(self.nats) + 1
        figures = torch.cat((sums[:head], norm.unsqueeze(0), sums[head:]))
        return StepResult(lr, dict(zip(self.layers, loads, strict=True)), counts, figures, names)


class TrainingStep:
    """A model, its optimizer and its balancers: called, it makes one optimizer step over some micro-batches.

    ``dtype`` is what matrix products run in; BF16 also changes the dtype of some of the model's parameters, until
    :meth:`finish`.
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
        objective: Objective | None = None,
        together: Alone | None = None,
    ) -> None:
        self.model, self.objective, self.together = model, objective or Objective(), together or Alone()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                # What the optimizer works on; begin() says what is kept in fewer bits meanwhile.
                parameter.data = parameter.data.float()
        self.optimizer = build_optimizer(model, optimizer)
        self.balancers = build_balancers(balance, self.together)
        self.clip, self.mtp_weight, self.recompute = clip, mtp_weight, recompute
        self.device, self.dtype = device, dtype
        self._waits = device.type == "cpu"  # where nothing is gained by not knowing
        self._fault = torch.zeros((), device=device)  # NaN from the first number on that is not finite
        self._begun = False
        self.begin()

    def begin(self) -> None:
        """Puts the weights in the dtype that they have while training; every step does so where it is not done yet."""
        if not self._begun and self.dtype == torch.bfloat16 and not self.together.sharded:
            weights.to_bfloat16(self.model, self.optimizer)
        self._begun = True

    def finish(self) -> None:
        """Makes all weights FP32, exactly those that the optimizer has worked on."""
        weights.to_float32(self.model, self.optimizer)
        self._begun = False

    def __call__(self, batches: Sequence[Batch], length: int, lr: float, progress: float) -> StepResult:
        """``batches`` (tokens [B, ≥ length + 1 + MTP depth]) are the micro-batches; ``progress`` is how much of the run
        is done, 0 to 1. Where the loss or the gradient is not finite nothing changes; on a CPU this raises NotFinite,
        else whoever reads the result has to ask (:meth:`StepResult.check`)."""
        self.begin()
        self.optimizer.zero_grad()  # what a step that was broken off has left
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        counts = [self.objective.counts(self.model, batch, length) for batch in batches]
        step_counts = self.together.counts([sum(column) for column in zip(*counts, strict=True)])
        weights.sum_gradients_in_float32(self.model, len(batches) > 1)
        sums = _Sums(self.model.config, len(step_counts), len(self.objective.names), self.device)

        def work(model: Transformer, index: int, states: Tensor | None = None, last: bool = True) -> Tensor:
            batch, recorder = replace(self._moved(batches[index]), states=states), RoutingRecorder()
            options: dict[str, Any] = {"recorder": recorder, "recompute": self.recompute}
            with autocast(self.device, self.dtype):
                if not last:
                    states = hidden_states(model, batch, length, **options)
                else:
                    losses = self.objective.losses(model, batch, length, counts[index], **options)
            balance = self._balance(recorder, sums, len(batches))
            if not last:
                assert states is not None
                return states if balance is None else with_loss(states, balance)
            sums.add(losses)
            loss = total_loss(losses, step_counts, self.mtp_weight)
            return loss if balance is None else loss + balance

        if (pipeline := self.together.pipeline) is not None:
            pipeline.run(work, len(batches), batches[0].at(batches[0].tokens, 0, length).shape)
        else:
            for index in range(len(batches)):
                work(self.model, index).backward()
        self.together.complete_gradients(self.model)
        norm = self.together.norm([p.grad for p in self.model.parameters() if p.grad is not None]).float()
        result = sums.result(self.together, lr, norm, step_counts, self.objective.names)
        self._apply(result, norm, progress)
        return result

    def _balance(self, recorder: RoutingRecorder, sums: _Sums, batches: int) -> Tensor | None:
        """What balancers add to the loss of one of ``batches`` micro-batches, whose loads are counted."""
        total: Tensor | None = None
        for layer, routings in recorder.routings.items():
            for routing in routings:
                sums.count(layer, routing.load())
                for balancer in self.balancers.values():
                    term = balancer.loss(routing)
                    if term is not None:
                        sums.balance_loss += term.detach() / batches
                        total = term / batches if total is None else total + term / batches
        return total

    def _apply(self, result: StepResult, norm: Tensor, progress: float) -> None:
        scale: float | Tensor = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        if self._waits:
            try:
                result.check()
            except NotFinite:
                self.optimizer.zero_grad(set_to_none=True)
                raise
            scale = float(scale)
        else:
            self._fault += 0.0 * result.figures.sum()
            scale = scale + self._fault
        self.optimizer.step(scale)
        routers = self.model.routers
        for layer, load in result.loads.items():
            if layer not in routers:
                continue  # another process's
            bias = routers[layer].e_score_correction_bias
            before = None if bias is None or self._waits else bias.clone()
            for balancer in self.balancers.values():
                balancer.after_step(layer, routers[layer], load, progress)
            if bias is not None and before is not None:
                bias.copy_(torch.where(self._fault == 0, bias, before))

    def _moved(self, batch: Batch) -> Batch:
        """``batch`` on the device. Memory that is not pinned could not be copied without waiting."""
        if self.device.type != "cuda":
            return batch.to(self.device)
        learned = None if batch.learned is None else self._sent(batch.learned)
        part = None if batch.part is None else batch.part.to(self.device)
        tokens, documents = self._sent(batch.tokens), self._sent(batch.documents)
        return replace(batch, tokens=tokens, documents=documents, learned=learned, part=part)

    def _sent(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self.device, non_blocking=True)
