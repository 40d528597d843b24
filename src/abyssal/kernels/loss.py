"""Cross-entropy of a linear head, in chunks: the [N, V] logits never stand in memory whole, nor their gradient.

The gradient is worked out chunk by chunk in the forward pass, in the place of the logits, so nothing is computed twice;
the price is that hidden and head gradients (each as large as its tensor) are held until the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from abyssal.kernels.backend import backend, product_dtype

IGNORED = -100
_CHUNK_VALUES = 2**24  # logits at a time: 32 MB in BF16; at least 256 rows, for the sake of the products


def rows_at_a_time(weight: Tensor) -> int:
    """How many positions' logits by the head ``weight`` [V, D] stand in memory at once."""
    return max(_CHUNK_VALUES // max(weight.shape[0], 1), 256)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        chunk: int,
        wants: tuple[bool, bool],
    ) -> Tensor:
        precise = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        head = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        whole = chunk >= hidden.shape[0]  # then the head's gradient is one product; else several, added in FP32
        grad_weight = None if whole or not wants[1] else torch.zeros_like(weight, dtype=precise)
        for start in range(0, hidden.shape[0], chunk):
            h = hidden[start : start + chunk].to(dtype)
            logits = h @ head.t()
            total += _cross_entropy_(logits, targets[start : start + chunk])
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = logits @ head
            if wants[1]:
                part = logits.t() @ h
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grads
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype) * scale.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ −log softmax(logits)[target] over the targets that count; ``logits`` [n, V] become its gradient."""
    ops = backend(logits)
    if ops is not None:
        nats: Tensor = ops.cross_entropy_(logits, targets, IGNORED)
        return nats
    counted = (targets != IGNORED).unsqueeze(1)
    index = targets.unsqueeze(1).masked_fill(~counted, 0)  # any other number outside 0…V-1 fails below
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    nats = -(log_p.gather(1, index) * counted).sum()
    # d(-log p_target)/d(logits) = softmax - one_hot(target)
    grad = log_p.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=log_p.dtype)).mul_(counted)
    logits.copy_(grad)
    return nats


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """Sum over tokens of −log softmax(hidden · weightᵀ)[target], in nats.

    ``hidden`` [N, D], ``weight`` [V, D], ``targets`` [N] int64 with -100 where nothing is predicted. Products run in
    the autocast dtype where autocast is on, else in ``hidden``'s; softmax and sums in FP32 (FP64 for FP64 input).
    """
    chunk = chunk or rows_at_a_time(weight)
    dtype = product_dtype(hidden)
    # Asked here: inside an autograd function gradients are off, and a weight under no_grad still says requires_grad.
    enabled = torch.is_grad_enabled()
    wants = (enabled and hidden.requires_grad, enabled and weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, dtype, chunk, wants)
    return loss


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same in one line, with all logits in memory."""
    return F.cross_entropy((hidden @ weight.t()).float(), targets, ignore_index=IGNORED, reduction="sum")


class _LinearTokenNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, chunk: int) -> Tensor:
        head, parts = weight.to(dtype), []
        for start in range(0, hidden.shape[0], chunk):
            logits = (hidden[start : start + chunk].to(dtype) @ head.t()).to(torch.promote_types(dtype, torch.float32))
            index = targets[start : start + chunk].unsqueeze(1)
            parts.append(logits.logsumexp(-1) - logits.gather(1, index).squeeze(1))
        ctx.save_for_backward(hidden, weight, targets)
        ctx.dtype, ctx.chunk = dtype, chunk
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.promote_types(dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets = ctx.saved_tensors
        dtype, precise = ctx.dtype, torch.promote_types(ctx.dtype, torch.float32)
        head = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            h = hidden[part].to(dtype)
            grad = (h @ head.t()).to(precise).softmax(-1)
            index = targets[part].unsqueeze(1)
            grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=precise))
            grad = (grad * grads[0][part].unsqueeze(1)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ head
            if grad_weight is not None:
                grad_weight += grad.t() @ h
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def linear_token_nats(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """−log softmax(hidden · weightᵀ)[target] of each token, in nats: [N], at least FP32.

    ``hidden`` [N, D], ``weight`` [V, D], ``targets`` [N] int64, each a token of the vocabulary. For what weighs tokens
    by more than one number, as preferences do: the logits are worked out anew in the backward pass.
    """
    dtype = product_dtype(hidden)
    chunk = chunk or rows_at_a_time(weight)
    out: Tensor = _LinearTokenNats.apply(hidden, weight, targets, dtype, chunk)
    return out
