"""Routed experts as grouped matrix products: sort assignments by expert, gather, multiply slice by slice, add up.

The steps are one seam each (:func:`plan`, :func:`gather`, :func:`grouped_linear`, :func:`combine`), so that another
dispatcher or kernel can take the place of any of them. :func:`experts_reference` is the plain account that they are
tested against.

The routing weights go in between the two products (:func:`row_weights`, :func:`abyssal.kernels.fused.swiglu`): an
expert's second matrix is linear, so a token's output is then a plain sum of rows, and gathering and summing are each
other's gradient. No step adds rows up with atomics, so training is reproducible bit by bit.

A fact of CPUs shapes the plan: BF16 matrix products run five times faster when the same shapes come again (each new
shape costs a new oneDNN primitive), so every expert's rows are padded to a multiple of 32 there. That is also what our
own products want (kernels/native_amx.cpp); without them, where the load is even enough, all experts are padded to the
same number, which makes one batched product of many small ones. On a GPU nothing here waits for the device: counts stay
there, and the buffer's size is a bound known beforehand.

Shapes: N tokens, K experts a token, E experts, P rows of the sorted buffer (≥ N·K), D hidden, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from abyssal.kernels import native
from abyssal.kernels.backend import backend

_BF16_ROWS = 32
_GPU_ROWS = 8  # torch's grouped products want the rows of an expert in multiples of 16 bytes
_EVEN = 1.5  # with rows padded to the busiest expert's, at most so many times the work


@dataclass(frozen=True)
class Plan:
    """Where each assignment (token, choice) lies in the buffer sorted by expert."""

    k: int
    """Assignments a token has."""
    slot: Tensor
    """[N·K] int32: row of assignment n·K + k."""
    assignment: Tensor
    """[P] int32: the assignment that a row holds; -1 in padding rows, whose weight is 0."""
    ends: Tensor
    """[E] int32: end of each expert's rows, padding included."""
    bounds: list[int] | None
    """The same as E + 1 Python numbers on CPU; None on a GPU, where reading them would stop the device, and inside
    torch.compile, which they would cut in two."""

    def host_bounds(self) -> list[int]:
        """``bounds``; on a GPU this waits for the device."""
        return self.bounds if self.bounds is not None else [0, *self.ends.tolist()]

    def slices(self) -> list[tuple[int, int, int]]:
        """(expert, start, end) of every expert that got rows; on a GPU this waits for the device."""
        return _slices(self.host_bounds())


def plan(indices: Tensor, n_experts: int, dtype: torch.dtype) -> Plan:
    """Sorts assignments by expert, keeping token order within each. ``indices`` [N, K] int64; ``dtype`` of the work."""
    flat, k = indices.reshape(-1).long().contiguous(), indices.shape[1]
    if flat.device.type != "cpu" or torch.compiler.is_compiling():
        return plan_on_device(indices, n_experts)
    compiled = native.library() is not None
    counts = native.expert_counts(flat, n_experts) if compiled else torch.bincount(flat, minlength=n_experts)
    padded = counts
    if dtype in (torch.bfloat16, torch.float16):
        padded = (counts + _BF16_ROWS - 1) // _BF16_ROWS * _BF16_ROWS
        if not native.has_tiles() and padded.max() * n_experts <= _EVEN * flat.numel():
            padded = padded.max().expand(n_experts)
    ends = padded.cumsum(0)
    bounds = [0, *ends.tolist()]
    if compiled:
        slot, assignment = native.expert_places(flat, ends - padded, bounds[-1])
    else:
        slot, assignment = _places(*_sorted(flat), counts, ends - padded, bounds[-1])
    return Plan(k, slot, assignment, ends.to(torch.int32), bounds)


def plan_without_padding(indices: Tensor, n_experts: int) -> Plan:
    """The same with N·K rows, no more: what is sent to other processes."""
    on_cpu = indices.device.type == "cpu"
    return plan(indices, n_experts, torch.float32) if on_cpu else plan_on_device(indices, n_experts, multiple=1)


def plan_on_device(indices: Tensor, n_experts: int, multiple: int = _GPU_ROWS) -> Plan:
    """The same without a word from the device: each expert's rows padded to a ``multiple``, the buffer as long as that
    can come to at most, N·K + E·(multiple - 1) rounded up."""
    flat, k = indices.reshape(-1), indices.shape[1]
    experts, order = _sorted(flat)
    # How many stand below each expert's end is a binary search; bincount would read its result on the host.
    numbers = torch.arange(n_experts, dtype=experts.dtype, device=flat.device)
    counts = torch.searchsorted(experts, numbers, right=True).diff(prepend=flat.new_zeros(1))
    padded = (counts + multiple - 1) // multiple * multiple
    ends = padded.cumsum(0)
    most = -(-(flat.numel() + n_experts * (multiple - 1)) // multiple) * multiple
    return Plan(k, *_places(experts, order, counts, ends - padded, most), ends.to(torch.int32), None)


def _sorted(flat: Tensor) -> tuple[Tensor, Tensor]:
    """The experts in order and where each stood; 16 bits of key are half the sorting passes of 32 on a GPU."""
    experts, order = torch.sort(flat.to(torch.int16), stable=True)
    return experts, order


def _places(experts: Tensor, order: Tensor, counts: Tensor, starts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    # Row of the i-th sorted assignment: its expert's start plus its rank among that expert's assignments.
    shift = starts - (counts.cumsum(0) - counts)
    row = torch.arange(len(order), device=order.device) + shift.index_select(0, experts.to(torch.int32))
    slot = torch.empty_like(order, dtype=torch.int32).scatter_(0, order, row.to(torch.int32))
    assignment = torch.full((rows,), -1, dtype=torch.int32, device=order.device)
    return slot, assignment.scatter_(0, row, order.to(torch.int32))


class _Gather(torch.autograd.Function):
    """x[assignment // k]; backward: the sum over a token's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, assignment: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.k = k
        return _gather(x, assignment, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slot,) = ctx.saved_tensors
        return _sum(grads[0], slot, ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """The sum over a token's rows; backward: its gradient, gathered."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slot: Tensor, assignment: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(assignment)
        ctx.k = k
        return _sum(rows, slot, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (assignment,) = ctx.saved_tensors
        return _gather(grads[0], assignment, ctx.k), None, None, None


def _gather(x: Tensor, assignment: Tensor, k: int) -> Tensor:
    ops: ModuleType | None = backend(x)
    if ops is not None:
        rows: Tensor = ops.gather_rows(x, assignment, k)
        return rows
    # Padding rows get token 0: their weight is 0, so neither they nor their gradients reach anything.
    return x.index_select(0, assignment.clamp_min(0) // k)


def _sum(rows: Tensor, slot: Tensor, k: int) -> Tensor:
    ops: ModuleType | None = backend(rows)
    if ops is not None:
        out: Tensor = ops.sum_rows(rows, slot, k)
        return out
    return rows.index_select(0, slot).unflatten(0, (-1, k)).sum(1)


def gather(x: Tensor, where: Plan) -> Tensor:
    """Rows of ``x`` [N, D] in expert order, [P, D]."""
    out: Tensor = _Gather.apply(x, where.slot, where.assignment, where.k)
    return out


def combine(rows: Tensor, where: Plan) -> Tensor:
    """Sum of each token's expert outputs, which carry their weights already: ``rows`` [P, D] -> [N, D]."""
    out: Tensor = _Combine.apply(rows, where.slot, where.assignment, where.k)
    return out


class _RowWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, slot: Tensor, assignment: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.shape = weights.shape
        return weights.reshape(-1).index_select(0, assignment.clamp_min(0)).masked_fill(assignment < 0, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, *ctx.saved_tensors).view(ctx.shape), None, None


def row_weights(weights: Tensor, where: Plan) -> Tensor:
    """Each row's routing weight: ``weights`` [N, K] -> [P], 0 in padding rows."""
    out: Tensor = _RowWeights.apply(weights, where.slot, where.assignment)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        return product(x, weight, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = product_backward(grad, weight, ctx.bounds) if ctx.needs_input_grad[0] else None
        return grad_x, weight_gradient(grad, x, weight, ctx.bounds) if ctx.needs_input_grad[1] else None, None


def product(x: Tensor, weight: Tensor, bounds: list[int], onto: Tensor | None = None) -> Tensor:
    """Each expert's rows times its matrix, without a gradient: ``x`` [P, I], ``weight`` [E, O, I] -> [P, O]; expert e
    has the rows ``bounds[e]`` to ``bounds[e + 1]``. Rows behind the last one's are left as they come. With ``onto``
    [P, O], contiguous, the products are added to it, in place."""
    if native.multiplies(x, weight, bounds):
        return native.grouped_product(x, weight, bounds, onto)
    if onto is not None:
        for expert, start, end in _slices(bounds):
            onto[start:end].addmm_(x[start:end], weight[expert].t())
        return onto
    if _even(bounds, len(x)):
        return torch.bmm(x.view(len(weight), -1, x.shape[1]), weight.transpose(1, 2)).flatten(0, 1)
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, start, end in _slices(bounds):
        torch.mm(x[start:end], weight[expert].t(), out=out[start:end])
    return out


def product_backward(grad: Tensor, weight: Tensor, bounds: list[int], onto: Tensor | None = None) -> Tensor:
    """:func:`product`'s gradient for ``x``, [P, I], from ``grad`` [P, O], contiguous; ``onto`` as there."""
    if native.multiplies(grad, weight, bounds):
        return native.grouped_product_backward_x(grad, weight, bounds, onto)
    if onto is not None:
        for expert, start, end in _slices(bounds):
            onto[start:end].addmm_(grad[start:end], weight[expert])
        return onto
    if _even(bounds, len(grad)):
        return torch.bmm(grad.view(len(weight), -1, grad.shape[1]), weight).flatten(0, 1)
    out = grad.new_empty(grad.shape[0], weight.shape[2])
    for expert, start, end in _slices(bounds):
        torch.mm(grad[start:end], weight[expert], out=out[start:end])
    return out


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
    """:func:`product`'s gradient for ``weight``, [E, O, I], of which only shape and dtype count."""
    if native.multiplies(x, weight, bounds):
        return native.grouped_product_backward_weight(grad, x, bounds)
    if _even(bounds, len(x)):
        x_e, grad_e = (tensor.view(len(weight), -1, tensor.shape[1]) for tensor in (x, grad))
        return torch.bmm(grad_e.transpose(1, 2), x_e)
    out = torch.empty_like(weight)
    for expert in _idle(bounds):  # the others are written whole
        out[expert].zero_()
    for expert, start, end in _slices(bounds):
        torch.mm(grad[start:end].t(), x[start:end], out=out[expert])
    return out


def _even(bounds: list[int], rows: int) -> bool:
    """Whether every expert has the same number of ``rows`` (at least one), and none is left over, as on a GPU."""
    return bounds[1] > 0 and bounds[-1] == rows and bounds == list(range(0, rows + 1, bounds[1]))


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
    out: Tensor = _GroupedLinear.apply(x, weight, where.host_bounds())
    return out


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
