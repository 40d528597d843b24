"""Heads laid out for attention: position put into them, and every head's rows side by side.

Linear layers give [B, T, H, …], attention wants [B, H, T, …]; what lies between is copying, and each element should be
copied once. Shapes: B batch, T time, H heads, N dims without position, R rotary dims, V value dims.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abyssal.kernels.backend import backend

Tables = tuple[Tensor, Tensor]
"""Cosine and sine of positions, each [B or 1, T, 1, R/2], FP32 or wider."""


def rotate(x: Tensor, tables: Tables, interleaved: bool) -> Tensor:
    """``x`` [B, T, H, R] turned by its position: pairs (x0,x1), (x2,x3), … or (x0,x_{R/2}), …; dtype of ``x`` kept."""
    cos, sin = tables
    if interleaved:
        a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class _TurnHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, ops: ModuleType) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.ops = interleaved, ops
        out: Tensor = ops.turn_heads(x, cos, sin, interleaved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad: Tensor = ctx.ops.turn_heads(grads[0], *ctx.saved_tensors, ctx.interleaved, back=True)
        return grad, None, None, None, None


def turn_heads(x: Tensor, tables: Tables, interleaved: bool) -> Tensor:
    """``x`` [B, T, H, N + R] with its last R dims turned by position (:func:`rotate`), as [B, H, T, N + R]."""
    ops = backend(x, *tables)
    if ops is None or not hasattr(ops, "turn_heads"):
        return turn_heads_reference(x, tables, interleaved)
    if not torch.is_grad_enabled():
        turned: Tensor = ops.turn_heads(x, *tables, interleaved)
        return turned
    out: Tensor = _TurnHeads.apply(x, *tables, interleaved, ops)
    return out


def turn_rows(x: Tensor, tables: Tables, interleaved: bool) -> Tensor:
    """The same for rows that stay where they are: ``x`` [N, H, N' + R], ``tables`` [1, N, 1, R/2], one shape out."""
    count = x.shape[0]
    cos, sin = (y.view(count, 1, 1, -1) for y in tables)
    return turn_heads(x.unsqueeze(1), (cos, sin), interleaved).squeeze(2)


def turn_heads_reference(x: Tensor, tables: Tables, interleaved: bool) -> Tensor:
    """The same in plain PyTorch."""
    rope = 2 * tables[0].shape[-1]
    nope, rotary = x.split((x.shape[-1] - rope, rope), dim=-1)
    return torch.cat((nope, rotate(rotary, tables, interleaved)), dim=-1).transpose(1, 2)


class _KeysValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, rotary: Tensor, nope: int, ops: ModuleType) -> tuple[Tensor, Tensor]:
        ctx.nope, ctx.ops = nope, ops
        k, v = ops.keys_values(kv, rotary, nope)
        return k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_kv, grad_rotary = ctx.ops.keys_values_backward(grads[0], grads[1], ctx.nope)
        return grad_kv, grad_rotary, None, None


def keys_values(kv: Tensor, rotary: Tensor, nope: int) -> Tables:
    """Every head's key and value (V3 paper eq. 4): ``kv`` [B, T, H, N + V] and the rotary key of all heads [B, T, R],
    already turned, -> [B, H, T, N + R] and [B, H, T, V]."""
    ops = backend(kv, rotary) if kv.dtype == rotary.dtype else None
    if ops is None or not hasattr(ops, "keys_values"):
        return keys_values_reference(kv, rotary, nope)
    k, v = _KeysValues.apply(kv, rotary, nope, ops) if torch.is_grad_enabled() else ops.keys_values(kv, rotary, nope)
    return k, v


def keys_values_reference(kv: Tensor, rotary: Tensor, nope: int) -> Tables:
    """The same in plain PyTorch."""
    k_nope, v = kv.split((nope, kv.shape[-1] - nope), dim=-1)
    shared = rotary.to(kv.dtype).unsqueeze(2).expand(-1, -1, kv.shape[2], -1)
    return torch.cat((k_nope, shared), dim=-1).transpose(1, 2), v.transpose(1, 2)
