"""Cross-entropy of a head whose vocabulary is divided among processes: each has the logits of its own tokens, and they
tell each other three numbers a position.

    m = max over all of the logits,  s = Σ over all exp(logit − m),  nats = m + ln s − the target's logit

As in :mod:`abyssal.kernels.loss` the logits never stand in memory whole and their gradient takes their place.

Shapes: N positions, D hidden, v tokens of the vocabulary here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from abyssal.kernels.backend import product_dtype
from abyssal.kernels.loss import IGNORED, rows_at_a_time


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first: int,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        wants: tuple[bool, bool],
    ) -> Tensor:
        precise = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        head, chunk = weight.to(dtype), rows_at_a_time(weight)
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if wants[1] else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h = hidden[part].to(dtype)
            nats, grad = _nats((h @ head.t()).to(precise), targets[part], first, group)
            total += nats
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ head
            if grad_weight is not None:
                grad_weight += grad.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grads
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype) * scale.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _nats(logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Σ nats over the targets that count, and its gradient by ``logits`` [n, v], which are used up."""
    highest = logits.amax(-1, keepdim=True)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    counted = targets != IGNORED
    own = targets - first
    here = (counted & (own >= 0) & (own < logits.shape[1])).unsqueeze(1)
    index = own.unsqueeze(1).masked_fill(~here, 0)
    aimed = (logits.gather(1, index) - highest) * here
    exp = logits.sub_(highest).exp_()
    both = torch.cat((exp.sum(-1, keepdim=True), aimed), dim=1)
    dist.all_reduce(both, group=group)
    everything, target = both.unbind(1)
    nats = ((everything.log() - target) * counted).sum()
    grad = exp.div_(everything.unsqueeze(1)).scatter_add_(1, index, -here.to(exp.dtype))
    return nats, grad.mul_(counted.unsqueeze(1))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup
) -> Tensor:
    """Σ −log softmax(hidden · headᵀ)[target] in nats; ``weight`` [v, D] are the rows of the head from ``first`` on.

    ``hidden`` [N, D] and ``targets`` [N] (-100: nothing is predicted) are the same on all processes of ``group``; so
    is the result. The gradient of ``hidden`` is this process's summand of it.
    """
    dtype = product_dtype(hidden)
    enabled = torch.is_grad_enabled()
    wants = (enabled and hidden.requires_grad, enabled and weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, first, group, dtype, wants)
    return loss
