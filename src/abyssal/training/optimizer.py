"""The optimizers, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.distributed.together import local
from abyssal.kernels.adamw import EightBit, Moment, adamw_
from abyssal.model import Transformer
from abyssal.training.recipe import OptimizerConfig, ScheduleConfig

TINY = 4096  # numbers; a tensor of fewer keeps FP32 moments where others have 8 bits


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) for weights that are FP32, or BF16 with the rest of their master in the state
    (:mod:`abyssal.training.weights`).

    State of a parameter: ``step``; ``exp_avg`` and ``exp_avg_sq``, in FP32 or what the recipe's ``optimizer.state``
    says (8 bits: each with an ``…_scale``, and the root of ``exp_avg_sq`` in its place); ``low`` beside a BF16 weight.
    Of a weight that processes share, each has the state of its own part.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.lr, "weight_decay": 0.0})
        self.config = config
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"step": torch.zeros(())}
                for key in self.moments_of(group):
                    self.state[parameter] |= _zeros(key, local(parameter), config.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave, every tensor in its own dtype, where torch would cast it."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            self.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in state_dict["state"][number].items()
            }

    def moments_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the moments that the parameters of ``group`` have."""
        return ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step(self, scale: float | Tensor = 1.0) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient, and drops the gradient. ``scale`` multiplies gradients; a tensor
        that holds NaN turns the update off (:func:`abyssal.kernels.adamw.adamw_`)."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                self.state[parameter]["step"] += 1
            self.update(parameters, group, scale)

    def update(self, parameters: list[nn.Parameter], group: dict[str, Any], scale: float | Tensor) -> None:
        """Updates ``parameters``, which are of ``group`` and have gradients."""
        c = self.config
        for parameter in parameters:
            state = self.state[parameter]
            assert parameter.grad is not None
            adamw_(
                local(parameter),
                state.get("low"),
                local(parameter.grad),
                moment(state, "exp_avg"),
                moment(state, "exp_avg_sq"),
                lr=group["lr"],
                beta1=c.beta1,
                beta2=c.beta2,
                eps=c.eps,
                weight_decay=group["weight_decay"],
                step=int(state["step"]),
                scale=scale,
            )
            parameter.grad = None


def moment(state: dict[str, Tensor], key: str) -> Moment:
    """The moment ``key`` of a parameter's state, to be worked on."""
    return EightBit(state[key], state[f"{key}_scale"]) if f"{key}_scale" in state else state[key]


def _zeros(key: str, parameter: Tensor, kind: str) -> dict[str, Tensor]:
    precise = torch.promote_types(parameter.dtype, torch.float32)
    if kind == "8bit" and precise == torch.float32 and parameter.numel() >= TINY:
        zeros = EightBit.zeros(parameter)
        return {key: zeros.values, f"{key}_scale": zeros.scales}
    dtype = torch.bfloat16 if kind == "bfloat16" else precise
    return {key: torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)}


def build_optimizer(model: Transformer, config: OptimizerConfig) -> AdamW:
    """The optimizer of all parameters that want a gradient. Weight decay is for matrices (experts included), not for
    norms and biases."""
    if config.name == "muon":
        from abyssal.training.muon import build_muon

        return build_muon(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2]
    plain = [p for p in trained if p.ndim < 2]
    return AdamW([{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain}], config)


def learning_rate(step: int, steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """The learning rate of step ``step`` (from 0) out of ``steps``."""
    if step < schedule.warmup:
        return lr * (step + 1) / schedule.warmup
    final = schedule.final
    if schedule.kind == "cosine":
        # The last step, steps − 1, is at final · lr.
        progress = (step - schedule.warmup) / max(steps - 1 - schedule.warmup, 1)
        return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    start = steps - round(schedule.decay * steps)
    progress = max(step + 1 - start, 0) / max(steps - start, 1)
    return lr * (1 - (1 - final) * min(progress, 1.0))
