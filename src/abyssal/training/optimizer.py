"""AdamW and the learning rate's schedule."""

from __future__ import annotations

import math

import torch

from abyssal.model import Transformer
from abyssal.training.recipe import OptimizerConfig, ScheduleConfig


def build_optimizer(model: Transformer, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, fused; weight decay on matrices (experts included), none on norms and biases."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


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
