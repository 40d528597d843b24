"""Routed experts as grouped matrix products: sort assignments by expert, gather, multiply slice by slice, combine.

The three steps are one seam each (:func:`plan`, :func:`gather`, :func:`grouped_linear`, :func:`combine`), so that
another dispatcher or kernel can take the place of any of them. :func:`experts_reference` is the plain account that they
are tested against.

Two facts of CPUs shape this file. BF16 matrix products run five times faster when the same shapes come again (each new
shape costs a new oneDNN primitive), so every expert's rows are padded to a multiple of 32 there, and where the load is
even enough all to the same number, which makes one batched product of many small ones. And the gradient that autograd
derives for a gather adds rows up one thread at a time, or in an order that changes between runs; the backward functions
here gather instead, since each assignment has a slot of its own. So training is reproducible bit by bit.

Shapes: N tokens, K experts a token, E experts, P rows of the sorted buffer (≥ N·K), D hidden, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BF16_ROWS = 32
_EVEN = 1.25  # with rows padded to the busiest expert's, at most so many times the work


@dataclass(frozen=True)
class Plan:
    """Where each assignment (token, choice) lies in the buffer sorted by expert."""

    slot: Tensor
    """[N·K] int64: row of assignment n·K + k."""
    source: Tensor
    """[P] int64: token that a row holds; padding rows hold token 0 and are never read."""
    ends: Tensor
    """[E] int32: end of each expert's rows."""
    bounds: list[int] | None
    """The same as E + 1 Python numbers on CPU; None on a GPU, where reading them would stop the device."""

    def host_bounds(self) -> list[int]:
        """``bounds``; on a GPU this waits for the device."""
        return self.bounds if self.bounds is not None else [0, *self.ends.tolist()]

    def slices(self) -> list[tuple[int, int, int]]:
        """(expert, start, end) of every expert that got rows; on a GPU this waits for the device."""
        return _slices(self.host_bounds())


def plan(indices: Tensor, n_experts: int, dtype: torch.dtype) -> Plan:
    """Sorts assignments by expert, keeping token order within each. ``indices`` [N, K] int64; ``dtype`` of the work."""
    flat = indices.reshape(-1)
    counts = torch.bincount(flat, minlength=n_experts)
    on_cpu = flat.device.type == "cpu"
    padded = counts
    if on_cpu and dtype in (torch.bfloat16, torch.float16):
        padded = (counts + _BF16_ROWS - 1) // _BF16_ROWS * _BF16_ROWS
        if padded.max() * n_experts <= _EVEN * flat.numel():
            padded = padded.max().expand(n_experts)
    ends = padded.cumsum(0)
    bounds = [0, *ends.tolist()] if on_cpu else None
    order = flat.argsort(stable=True)
    # Row of the i-th sorted assignment: its expert's start plus its rank among that expert's assignments.
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    rows = torch.arange(flat.numel(), device=flat.device) + shift[flat[order]]
    slot = torch.empty_like(flat).index_copy_(0, order, rows)
    total = bounds[-1] if bounds is not None else flat.numel()
    source = flat.new_zeros(total).index_copy_(0, rows, order // indices.shape[1])
    return Plan(slot, source, ends.to(torch.int32), bounds)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.tokens = x.shape[0]
        return x.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        (grad,) = grads
        return grad.index_select(0, slot).view(ctx.tokens, -1, grad.shape[-1]).sum(1), None, None


def gather(x: Tensor, where: Plan) -> Tensor:
    """Rows of ``x`` [N, D] in expert order, [P, D]."""
    return _Gather.apply(x, where.slot, where.source)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, slot)
        picked = rows.index_select(0, slot).view(*weights.shape, rows.shape[-1])
        return torch.bmm(weights.unsqueeze(1), picked).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights, slot = ctx.saved_tensors
        (grad,) = grads
        picked = rows.index_select(0, slot).view(*weights.shape, rows.shape[-1])
        grad_weights = torch.bmm(picked, grad.unsqueeze(-1)).squeeze(-1)
        spread = (weights.unsqueeze(-1) * grad.unsqueeze(1)).view(-1, rows.shape[-1])
        return torch.zeros_like(rows).index_copy_(0, slot, spread), grad_weights, None


def combine(rows: Tensor, weights: Tensor, where: Plan) -> Tensor:
    """Weighted sum of each token's expert outputs: ``rows`` [P, D], ``weights`` [N, K] of the same dtype -> [N, D]."""
    return _Combine.apply(rows, weights, where.slot)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        if _even(bounds):
            return torch.bmm(x.view(len(weight), -1, x.shape[1]), weight.transpose(1, 2)).flatten(0, 1)
        out = x.new_empty(x.shape[0], weight.shape[1])
        for expert, start, end in _slices(bounds):
            torch.mm(x[start:end], weight[expert].t(), out=out[start:end])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        if _even(ctx.bounds):
            x_e, grad_e = (tensor.view(len(weight), -1, tensor.shape[1]) for tensor in (x, grad))
            grad_x = torch.bmm(grad_e, weight).flatten(0, 1) if ctx.needs_input_grad[0] else None
            grad_weight = torch.bmm(grad_e.transpose(1, 2), x_e) if ctx.needs_input_grad[1] else None
            return grad_x, grad_weight, None
        grad_x = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            for expert in _idle(ctx.bounds):  # the others are written whole
                grad_weight[expert].zero_()
        for expert, start, end in _slices(ctx.bounds):
            if grad_x is not None:
                torch.mm(grad[start:end], weight[expert], out=grad_x[start:end])
            if grad_weight is not None:
                torch.mm(grad[start:end].t(), x[start:end], out=grad_weight[expert])
        return grad_x, grad_weight, None


def _even(bounds: list[int]) -> bool:
    """Whether every expert has the same number of rows (at least one)."""
    return bounds[1] > 0 and bounds == list(range(0, bounds[-1] + 1, bounds[1]))


def _idle(bounds: list[int]) -> list[int]:
    """Experts that got no rows."""
    return [expert for expert, (start, end) in enumerate(pairwise(bounds)) if end == start]


def _slices(bounds: list[int]) -> list[tuple[int, int, int]]:
    """(expert, start, end) of every expert that got rows."""
    return [(expert, start, end) for expert, (start, end) in enumerate(pairwise(bounds)) if end > start]


def grouped_linear(x: Tensor, weight: Tensor, where: Plan) -> Tensor:
    """Each expert's rows times its matrix: ``x`` [P, I], ``weight`` [E, O, I] -> [P, O], in the dtype of ``x``.

    On a GPU this is torch's grouped matmul where the dtype and sizes allow it (BF16, rows of a multiple of 16 bytes),
    and needs no word from the device; elsewhere one matrix product an expert.
    """
    if where.bounds is None and x.dtype == torch.bfloat16 and x.shape[1] % 8 == 0 and weight.shape[1] % 8 == 0:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=where.ends)
    return _GroupedLinear.apply(x, weight, where.host_bounds())


def experts_reference(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What routed experts compute, said plainly: every expert on the tokens that chose it (V3 paper eq. 12).

    ``x`` [N, D], ``indices`` and ``weights`` [N, K], ``gate_up`` [E, 2F, D], ``down`` [E, D, F] -> [N, D].
    """
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, choice = torch.where(indices == expert)
        gate, up = (x[token] @ gate_up[expert].t()).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ down[expert].t()
        out = out.index_add(0, token, y * weights[token, choice].unsqueeze(-1).to(y.dtype))
    return out
