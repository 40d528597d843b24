"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a finished model: modules that stand in the place of projections and
routed experts and add s · B A to their weights, which stay as they are. Only A and B are trained.

    y = W x + s · B (A x),   s = α / r, or α / √r (rank-stabilised, arXiv 2312.03732)

W may be dense, packed (:mod:`abyssal.model.quantized`: QLoRA) or, where nothing is trained, FP8. The routed experts of
a layer have one A and B each, multiplied as they themselves are: all in one grouped product. Traps: the loss reads the
head's weight and not its module, and routers decide in FP32 by code of their own, so neither can be adapted.

Parameters are FP32 and are named ``lora_A`` [r, I] and ``lora_B`` [O, r]; of experts ``gate_up_lora_A`` [E, r, D],
``gate_up_lora_B`` [E, 2F, r], ``down_lora_A`` [E, r, F], ``down_lora_B`` [E, D, r]. What was replaced is ``base``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from abyssal.kernels import grouped, native
from abyssal.kernels.backend import product_dtype
from abyssal.kernels.fused import swiglu
from abyssal.kernels.grouped import Plan
from abyssal.model.fp8 import dense_weight
from abyssal.model.layers import Linear
from abyssal.model.moe import Experts
from abyssal.model.quantized import QuantizedExperts

STACKED = ("gate_up", "down")


@dataclass(frozen=True)
class LowRank:
    """How a matrix is changed: by ``scale`` · B A."""

    a: Tensor
    """[r, I], or [E, r, I] for stacked experts."""
    b: Tensor
    """[O, r] or [E, O, r]."""
    alpha: float
    rslora: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def scale(self) -> float:
        return scaling(self.alpha, self.rank, self.rslora)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return (*self.a.shape[:-2], self.b.shape[-2], self.a.shape[-1])

    def delta(self, expert: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The change of the matrix, or of one expert's, [O, I]."""
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        return self.scale * (b.detach().to(dtype) @ a.detach().to(dtype))


def scaling(alpha: float, rank: int, rslora: bool) -> float:
    """What B A is multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoRALinear(nn.Module):
    """A linear layer ``base`` and what is added to it: [..., I] -> [..., O], in the dtype that ``base`` computes in."""

    def __init__(self, base: nn.Module, change: LowRank) -> None:
        super().__init__()
        self.base = base
        self.alpha, self.rslora = change.alpha, change.rslora
        self.lora_A, self.lora_B = nn.Parameter(change.a), nn.Parameter(change.b)

    @property
    def change(self) -> LowRank:
        return LowRank(self.lora_A, self.lora_B, self.alpha, self.rslora)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(product_dtype(x))
        rows, scale = x.reshape(-1, x.shape[-1]), self.change.scale
        if type(self.base) is Linear and torch.is_grad_enabled():
            out = _LowRank.apply(rows, self.lora_A, self.lora_B, scale, None, self.base.weight, self.base.bias)
        else:
            onto = self.base(x).reshape(len(rows), -1)
            out = _LowRank.apply(rows, self.lora_A, self.lora_B, scale, onto, None, None)
        return out.view(*x.shape[:-1], -1)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight with what is added to it, [O, I]."""
        a, b = self.lora_A.to(dtype), _scaled(self.lora_B, self.change.scale, dtype)
        return torch.addmm(dense_weight(self.base, dtype), b, a)

    def extra_repr(self) -> str:
        return f"rank={self.change.rank}, scale={self.change.scale:.4g}"


class _LowRank(torch.autograd.Function):
    """``onto``, or ``x`` · weightᵀ + bias, plus scale · (x Aᵀ) Bᵀ. For the backward pass ``x`` [N, I] and x Aᵀ [N, r]
    are kept; a ``weight`` gets no gradient, and is cast anew where it must be."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        onto: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        inner = x @ a.to(x.dtype).t()
        ctx.save_for_backward(x, inner, a, b, weight)
        ctx.scale = scale
        raised = _scaled(b, scale, x.dtype).t()
        if weight is None:
            assert onto is not None
            return torch.addmm(onto, inner, raised)
        out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return out.addmm_(inner, raised)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b, weight = ctx.saved_tensors
        grad = grads[0]
        grad_inner = grad @ _scaled(b, ctx.scale, grad.dtype)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            lowered = a.to(grad.dtype)
            if weight is None:
                grad_x = grad_inner @ lowered
            else:
                grad_x = (grad @ weight.to(grad.dtype)).addmm_(grad_inner, lowered)
        if ctx.needs_input_grad[1]:
            grad_a = (grad_inner.t() @ x).to(a.dtype)
        if ctx.needs_input_grad[2]:
            grad_b = (grad.t() @ inner).to(b.dtype).mul_(ctx.scale)
        return grad_x, grad_a, grad_b, None, grad if ctx.needs_input_grad[4] else None, None, None


class LoRAExperts(nn.Module):
    """Routed experts ``base`` and what is added to one or both of their stacked matrices."""

    def __init__(self, base: nn.Module, gate_up: LowRank | None, down: LowRank | None) -> None:
        super().__init__()
        self.base = base
        self._scalings: dict[str, tuple[float, bool]] = {}
        for which, change in (("gate_up", gate_up), ("down", down)):
            if change is not None:
                self._scalings[which] = change.alpha, change.rslora
            tensors = (None, None) if change is None else (nn.Parameter(change.a), nn.Parameter(change.b))
            for end, tensor in zip("AB", tensors, strict=True):
                self.register_parameter(f"{which}_lora_{end}", tensor)

    def change(self, which: str) -> LowRank | None:
        """What is added to ``gate_up`` or ``down``."""
        if which not in self._scalings:
            return None
        a, b = (getattr(self, f"{which}_lora_{end}") for end in "AB")
        return LowRank(a, b, *self._scalings[which])

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """As :class:`~abyssal.model.moe.Experts`."""
        dtype = product_dtype(x)
        where = grouped.plan(indices, stacked_shapes(self.base)[0][0], dtype)
        rows = grouped.gather(x.to(dtype), where)
        hidden = swiglu(self.gate_up(rows, where), grouped.row_weights(weights, where))
        return grouped.combine(self.down(hidden, where), where)

    def gate_up(self, rows: Tensor, where: Plan) -> Tensor:
        """Both first products of ``rows`` [P, D], side by side: [P, 2F]."""
        return self._product("gate_up", rows, where)

    def down(self, rows: Tensor, where: Plan) -> Tensor:
        """The second product of ``rows`` [P, F], [P, D]."""
        return self._product("down", rows, where)

    def _product(self, which: str, rows: Tensor, where: Plan) -> Tensor:
        change = self.change(which)
        weight = getattr(self.base, f"{which}_proj") if type(self.base) is Experts else None
        if weight is None or change is None or where.bounds is None:
            out: Tensor = getattr(self.base, which)(rows, where)
            weight = None
        if change is None:
            return out
        a, b, onto = (
            _padded(change.a, rows.dtype, 1),
            _padded(_scaled(change.b, change.scale, rows.dtype), rows.dtype, 2),
            None,
        )
        if where.bounds is None:
            return out + grouped.grouped_linear(grouped.grouped_linear(rows, a, where), b, where)
        if weight is None:
            onto = out
        out = _GroupedLowRank.apply(rows, a, b, where.bounds, onto, weight)
        return out

    def extra_repr(self) -> str:
        changes = ((which, self.change(which)) for which in STACKED)
        return ", ".join(f"{which}: rank={c.rank}, scale={c.scale:.4g}" for which, c in changes if c is not None)


class _GroupedLowRank(torch.autograd.Function):
    """:class:`_LowRank` for the rows of experts: ``x`` [P, I], ``a`` [E, r, I], ``b`` [E, O, r], ``weight`` [E, O, I]
    or ``onto`` [P, O], which is changed in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, bounds: list[int], onto: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        inner = grouped.product(x, a, bounds)
        ctx.save_for_backward(x, inner, a, b, weight)
        ctx.bounds = bounds
        if weight is not None:
            onto = grouped.product(x, weight.to(x.dtype), bounds)
        else:
            assert onto is not None
            ctx.mark_dirty(onto)
        return grouped.product(inner, b, bounds, onto)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b, weight = ctx.saved_tensors
        grad, bounds = grads[0].contiguous(), ctx.bounds
        grad_inner = grouped.product_backward(grad, b, bounds)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = None if weight is None else grouped.product_backward(grad, weight.to(grad.dtype), bounds)
            grad_x = grouped.product_backward(grad_inner, a, bounds, grad_x)
        if ctx.needs_input_grad[1]:
            grad_a = grouped.weight_gradient(grad_inner, x, a, bounds)
        if ctx.needs_input_grad[2]:
            grad_b = grouped.weight_gradient(grad, inner, b, bounds)
        return grad_x, grad_a, grad_b, None, grad if ctx.needs_input_grad[4] else None, None


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · B, rounded once."""
    return (b.to(torch.promote_types(b.dtype, dtype)) * scale).to(dtype)


def _padded(x: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """``x`` with zeros up to a rank that the grouped products multiply fast."""
    x, multiple = x.to(dtype), 1
    if x.dtype == torch.bfloat16:
        multiple = 8 if x.device.type == "cuda" else 32 if native.has_tiles() else 1
    more = -x.shape[dim] % multiple
    return F.pad(x, (0, more) if dim == 2 else (0, 0, 0, more)) if more else x


def stacked_shapes(experts: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """[E, 2F, D] and [E, D, F]."""
    if isinstance(experts, QuantizedExperts):
        return tuple(experts.shapes[0]), tuple(experts.shapes[1])
    assert isinstance(experts, Experts)
    return tuple(experts.gate_up_proj.shape), tuple(experts.down_proj.shape)
