"""Layer by layer, the new module is fitted to what the dense one gave for the same inputs.

The error of a token is |y − f(x)|² / |y|², so that loud tokens do not decide alone. Adam's steps are measured by each
weight's own size, since the factors of a factorisation differ in theirs by orders of magnitude.

Shapes: n windows, T time, D hidden.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abyssal.training.hardware import autocast

_WARMUP = 10
_WORSE = 1.25  # times the first step's loss, over three steps: the weights have gone astray


def fit(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """Trains ``module``'s parameters so that ``forward`` of ``x`` [n, T, D], ``batch`` windows a step, gives ``y``.
    ``rate`` is the length of a step, as a share of each weight's root mean square; halved where that does harm."""
    module.requires_grad_(True)
    beginning = copy.deepcopy(module.state_dict())
    optimizer = _adam(module, rate)
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(steps * batch // len(x) + 1)])
    first, recent = float("inf"), deque[float](maxlen=3)
    since = 0
    with torch.enable_grad():
        for step in range(steps):
            since += 1
            pace = min(1.0, since / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * pace
            rows = order[step * batch : (step + 1) * batch].to(x.device)
            with autocast(x.device, dtype):
                out = forward(x[rows])
            target = y[rows]
            error = (out.float() - target).square().sum(-1)
            loss = (error / target.square().sum(-1).clamp_min(1e-6)).mean()
            recent.append(float(loss.detach()))
            first = recent[0] if step == 0 else first
            if sum(recent) / len(recent) > _WORSE * first:
                # Some layers bear much smaller steps than others: back to the beginning, with steps half as long.
                rate /= 2
                module.load_state_dict(beginning)
                optimizer, since = _adam(module, rate), 0
                recent.clear()
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    module.requires_grad_(False)


def _adam(module: nn.Module, rate: float) -> torch.optim.Adam:
    groups = [{"params": [p], "rate": rate * float(p.detach().square().mean().sqrt())} for p in module.parameters()]
    return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95))


@torch.no_grad()
def outputs(forward: Callable[[Tensor], Tensor], x: Tensor, *, batch: int, dtype: torch.dtype) -> Tensor:
    """``forward`` of ``x`` [n, T, D], ``batch`` windows at a time, in FP32."""
    with autocast(x.device, dtype):
        return torch.cat([forward(rows).float() for rows in x.split(batch)])


def cosine(a: Tensor, b: Tensor) -> float:
    """The mean over tokens of the cosine between ``a`` and ``b`` [n, T, D]."""
    return float(F.cosine_similarity(a, b, dim=-1).mean())
