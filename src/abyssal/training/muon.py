"""Muon (Keller Jordan et al., 2024) as Moonlight was trained with it (arXiv 2502.16982, §2.2).

    M ← μ M + (1 − μ) G                      momentum of the gradient G; Nesterov: look ahead by (1 − μ) G + μ M
    O = NewtonSchulz(look-ahead)             all singular values near 1, singular vectors kept
    W ← (1 − lr · λ) W − lr · 0.2 · √max(rows, columns) · O

The factor 0.2 · √max(rows, columns) makes the update's RMS that of a usual AdamW step, so ``lr`` and weight decay are
those of AdamW. Muon is for matrices: of linear layers, of the router, of every expert. In a stack of experts each
expert's gate, up and down is a matrix of its own; all of a stack are worked on at once, and so are single matrices of
equal shape. Embedding, head, norms and biases go by AdamW, as in Moonlight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.kernels.adamw import (
    Moment,
    chunks,
    if_on,
    read_gradient,
    read_moment,
    read_weight,
    workspaces,
    write_moment,
    write_weight,
)
from abyssal.model import Transformer
from abyssal.model.moe import Experts
from abyssal.model.router import Router
from abyssal.training.hardware import has_bfloat16
from abyssal.training.optimizer import AdamW, moment
from abyssal.training.recipe import OptimizerConfig

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_BATCH = 2**26  # numbers that Newton-Schulz takes at a time


def newton_schulz(matrices: Tensor) -> Tensor:
    """``matrices`` [..., M, N] with their singular values brought near 1 (to between 0.7 and 1.2 for most; very small
    ones stay smaller, a matrix of zeros stays zero), in their own dtype.

    Each step is X ← a X + (b A + c A²) X with A = X Xᵀ: the odd polynomial a s + b s³ + c s⁵ of every singular value.
    The coefficients are Keller Jordan's, chosen for a steep rise at 0 rather than to converge to 1.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return newton_schulz(matrices.mT).mT  # A is as small as it can be
    a, b, c = COEFFICIENTS
    precise = torch.promote_types(matrices.dtype, torch.float32)
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=precise).clamp_min(1e-7)
    x = (matrices / norm).to(matrices.dtype).reshape(-1, *matrices.shape[-2:])
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.reshape(matrices.shape)


class Muon(AdamW):
    """Muon for the groups that have ``parts``, AdamW for the others.

    ``parts`` is how many matrices a parameter's second to last dimension holds, one above the other. State of a
    parameter in such a group: ``step``; ``exp_avg``, the momentum, kept as the recipe's ``optimizer.state`` says;
    ``low`` beside a BF16 weight. Newton-Schulz runs in ``dtype``: None takes BF16 where the hardware has it, as
    published, else FP32 (FP64 for FP64 weights).
    """

    dtype: torch.dtype | None = None

    def moments_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",) if "parts" in group else super().moments_of(group)

    def update(self, parameters: list[nn.Parameter], group: dict[str, Any], scale: float | Tensor) -> None:
        if "parts" not in group:
            super().update(parameters, group, scale)
            return
        for batch in _batches(parameters):
            self._update_batch(batch, group, scale)

    def _update_batch(self, batch: list[nn.Parameter], group: dict[str, Any], scale: float | Tensor) -> None:
        """``batch`` are parameters of one shape and dtype."""
        shape = (*batch[0].shape[:-2], group["parts"], batch[0].shape[-2] // group["parts"], batch[0].shape[-1])
        updates = torch.empty(len(batch), batch[0].numel(), dtype=self._dtype(batch[0]), device=batch[0].device)
        for parameter, update in zip(batch, updates, strict=True):
            state = self.state[parameter]
            assert parameter.grad is not None
            step = int(state["step"])
            _look_ahead(parameter, moment(state, "exp_avg"), self.config.momentum, scale, step, update)
            parameter.grad = None
        matrices = updates.view(-1, *shape[-2:])
        for part in matrices.split(max(1, _BATCH // matrices[0].numel())):
            part.copy_(newton_schulz(part))
        factor = 0.2 * math.sqrt(max(shape[-2:]))
        for parameter, update in zip(batch, updates, strict=True):
            low = self.state[parameter].get("low")
            _add(parameter, low, update, group["lr"] * group["weight_decay"], group["lr"] * factor, scale)

    def _dtype(self, parameter: Tensor) -> torch.dtype:
        if parameter.dtype == torch.float64:
            return torch.float64
        return self.dtype or (torch.bfloat16 if has_bfloat16(parameter.device) else torch.float32)


def _batches(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one shape and dtype together, as long as they are not too large."""
    shapes: dict[tuple[torch.Size, torch.dtype], list[nn.Parameter]] = {}
    for parameter in parameters:
        shapes.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
    for alike in shapes.values():
        size = max(1, _BATCH // alike[0].numel())
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _look_ahead(
    parameter: nn.Parameter, momentum: Moment, mu: float, scale: float | Tensor, step: int, out: Tensor
) -> None:
    """Moves the momentum by the gradient, and puts what Newton-Schulz is to take into ``out`` [numel]."""
    assert parameter.grad is not None
    spaces, rate = workspaces(parameter, 2), if_on(scale, 1 - mu, 0.0)
    gradient = parameter.grad.reshape(-1)
    for part in chunks(gradient):
        g = read_gradient(gradient[part], spaces[0], scale)
        m = read_moment(momentum, part, spaces[1])
        m.lerp_(g, rate)
        out[part] = g.lerp_(m, mu)
        write_moment(m, momentum, part, spaces[1], step)


def _add(
    weight: Tensor, low: Tensor | None, update: Tensor, decay: float, factor: float, scale: float | Tensor
) -> None:
    """weight ← (1 − decay) · weight − factor · ``update`` [numel]."""
    spaces, keep, rate = workspaces(weight, 2), if_on(scale, 1 - decay, 1.0), if_on(scale, factor, 0.0)
    flat, flat_low = weight.view(-1), None if low is None else low.view(-1)
    for part in chunks(flat):
        w = read_weight(flat, flat_low, part, spaces[0])
        step = spaces[1][: len(w)].copy_(update[part]).mul_(rate)
        w.mul_(keep).sub_(step)
        write_weight(w, flat, flat_low, part)


def build_muon(model: Transformer, config: OptimizerConfig) -> Muon:
    """Muon for every matrix but embedding and head, AdamW for the rest; weight decay for matrices only. Parameters that
    want no gradient are in neither."""
    single: list[Tensor] = []
    stacked: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Experts):
            single.append(module.down_proj)
            stacked.append(module.gate_up_proj)
        elif isinstance(module, Router) or (isinstance(module, nn.Linear) and module is not model.lm_head):
            single.append(module.weight)
    taken = {id(parameter) for parameter in (*single, *stacked)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken and parameter.requires_grad]
    single, stacked = ([parameter for parameter in some if parameter.requires_grad] for some in (single, stacked))
    groups: list[dict[str, Any]] = [
        {"params": single, "weight_decay": config.weight_decay, "parts": 1},
        {"params": stacked, "weight_decay": config.weight_decay, "parts": 2},
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2]},
    ]
    return Muon([group for group in groups if group["params"]], config)
