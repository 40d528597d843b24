"""SwiGLU and RMSNorm: each one pass forward and one backward, where there is a backend for it.

Both keep their inputs for the backward pass and work the rest out anew: recomputing costs less than memory does.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from abyssal.kernels.backend import backend


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, row_weight: Tensor | None, ops: ModuleType) -> Tensor:
        ctx.save_for_backward(gate_up, row_weight)
        ctx.ops = ops
        out: Tensor = ops.swiglu(gate_up, row_weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate_up, row_weight = ctx.saved_tensors
        return *ctx.ops.swiglu_backward(grads[0], gate_up, row_weight), None


def swiglu(gate_up: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """silu(gate) · up, gate being the left half: [..., 2F] -> [..., F] in the same dtype (arXiv 2002.05202).

    ``row_weight`` [P], for ``gate_up`` [P, 2F], multiplies each row: a routed expert's weight, folded in here since
    down(w · h) = w · down(h).
    """
    ops = backend(gate_up)
    if ops is None:
        return swiglu_reference(gate_up, row_weight)
    row_weight = None if row_weight is None else row_weight.float()
    if not torch.is_grad_enabled():
        flat: Tensor = ops.swiglu(gate_up.reshape(-1, gate_up.shape[-1]), row_weight)
        return flat.view(*gate_up.shape[:-1], flat.shape[-1])
    out: Tensor = _SwiGLU.apply(gate_up.reshape(-1, gate_up.shape[-1]), row_weight, ops)
    return out.view(*gate_up.shape[:-1], out.shape[-1])


def swiglu_reference(gate_up: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = F.silu(gate) * up
    return out if row_weight is None else out * row_weight.to(out.dtype).unsqueeze(-1)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, ops: ModuleType) -> Tensor:
        out, rstd = ops.rms_norm(x, weight.float(), eps, dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.ops = ops
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = ctx.ops.rms_norm_backward(grads[0], x, weight.float(), rstd)
        return grad_x, grad_weight.to(weight.dtype), None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension, FP32 inside, as ``dtype``: [..., D], [D] -> [..., D]."""
    ops = backend(x, weight) if dtype in (x.dtype, torch.bfloat16) else None
    if ops is None:
        return rms_norm_reference(x, weight, eps).to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled():  # in decoding even what autograd asks of Python is to be seen
        out: Tensor = ops.rms_norm(rows, weight.float(), eps, dtype)[0]
    else:
        out = _RMSNorm.apply(rows, weight, eps, dtype, ops)
    return out.view(x.shape)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in plain PyTorch, in the dtype of ``x``."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
