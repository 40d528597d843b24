"""Products in FP8 for training, as DeepSeek-V3 does them (paper §3.3): E4M3 throughout, FP32 sums, three GEMMs a layer.

    forward   y  = x Wᵀ     x in tiles of 1 × 128 along the inputs,  W in blocks of 128 × 128
    dgrad     dx = dy W     dy in tiles of 1 × 128 along the outputs, the same blocks of W, transposed
    wgrad     dW = dyᵀ x    both in tiles of 128 × 1 along the tokens, counted from the start of an expert's rows

A tile's numbers are ``stored · scale``, scale = max |·| / 448. What the backward pass keeps of x is its FP8 form (half
of BF16's memory); wgrad dequantises it and quantises it again along the tokens, as the paper does (§3.3.3, §3.5.2). The
scales of x are therefore powers of two, rounded up: going from one tiling to the other then only moves exponents, so
nothing is rounded twice but numbers that fall below E4M3's smallest normal one. W and dy are quantised from what is at
hand and have plain FP32 scales; so an export to FP8 (:func:`abyssal.kernels.fp8.quantize`) has the numbers that were
trained with. Weights are quantised whenever they are used and never kept: one pass over them, nothing to go stale.

Gradients come in the dtype of what they belong to and are straight through: of the product of rounded numbers.

On a GPU with FP8 and Triton the work is done by :mod:`abyssal.kernels.fp8_gpu`, for one weight whose sizes are
multiples of 128 by cuBLAS; elsewhere by the functions called ``…_reference``, which round the same and multiply in
FP32. The sizes need not be multiples of 128: the last tiles are shorter.

Shapes: P rows (sorted by expert), E experts, O outputs, I inputs, T tiles of 128 tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from abyssal.kernels import fp8
from abyssal.kernels.fp8 import BLOCK, E4M3_MAX

# Gradients are far below what fp8.quantize takes for zero (1e-4), and must not be lost to that.
SMALLEST_AMAX = 1e-30


class Segments(Protocol):
    """Whose the rows of a buffer are (:class:`abyssal.kernels.grouped.Plan`). Rows behind the last end are nobody's:
    what a product puts there is undefined, and no gradient comes from them."""

    @property
    def ends(self) -> Tensor:
        """[E] int32, on the rows' device: end of each expert's rows."""

    def host_bounds(self) -> list[int]:
        """E + 1 numbers: where each expert's rows start, and the last end. Only the reference asks for them."""


class _OneSegment:
    """All rows belong to one weight."""

    def __init__(self, x: Tensor) -> None:
        self.rows, self.device = x.shape[0], x.device

    @property
    def ends(self) -> Tensor:
        return torch.full((1,), self.rows, dtype=torch.int32, device=self.device)

    def host_bounds(self) -> list[int]:
        return [0, self.rows]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [N, I] times ``weight`` [O, I], [N, O] in the dtype of ``x``, with gradients for both."""
    return _Product.apply(x, weight.unsqueeze(0), _OneSegment(x))


def grouped_linear(rows: Tensor, weight: Tensor, where: Segments) -> Tensor:
    """Each expert's rows times its matrix: ``rows`` [P, I], ``weight`` [E, O, I] -> [P, O] in the dtype of ``rows``,
    with gradients for both."""
    return _Product.apply(rows, weight, where)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, where: Segments) -> Tensor:
        numbers, scale = quantize_rows(x, power_of_two=True)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(weight if needs_x else None, *((numbers, scale) if needs_weight else (None, None)))
        ctx.where, ctx.dtypes = where, (x.dtype, weight.dtype)
        return product(numbers, scale, *quantize_weight(weight), where, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, numbers, scale = ctx.saved_tensors
        (grad,) = grads
        grad_x = grad_weight = None
        if weight is not None:
            transposed = quantize_weight(weight, transposed=True)
            grad_x = product(*quantize_rows(grad), *transposed, ctx.where, ctx.dtypes[0])
        if numbers is not None:
            columns = quantize_columns(numbers, ctx.where, scale, power_of_two=True)
            grad_weight = weight_gradient(*quantize_columns(grad, ctx.where), *columns, ctx.where, ctx.dtypes[1])
        return grad_x, grad_weight, None


def quantize_rows(x: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """``x`` [P, C] as E4M3 and FP32 scales [P, ⌈C/128⌉], one a tile of 1 × 128."""
    if _has_kernels(x.device):
        from abyssal.kernels import fp8_gpu

        return fp8_gpu.quantize_rows(x.contiguous(), power_of_two)
    return quantize_rows_reference(x, power_of_two=power_of_two)


def quantize_rows_reference(x: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """What :func:`quantize_rows` computes, in plain torch."""
    tiles = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = _scale(tiles.abs().amax(2), power_of_two)
    stored = (tiles / scale.unsqueeze(2)).to(torch.float8_e4m3fn)
    return stored.flatten(1)[:, : x.shape[1]].contiguous(), scale


def quantize_weight(weight: Tensor, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """``weight`` [E, O, I] as E4M3 and FP32 scales [E, ⌈O/128⌉, ⌈I/128⌉]; ``transposed``: [E, I, O] and its scales,
    the same numbers."""
    if _has_kernels(weight.device):
        from abyssal.kernels import fp8_gpu

        return fp8_gpu.quantize_weight(weight.contiguous(), transposed)
    stored, scale = fp8.quantize(weight)
    return (stored.mT.contiguous(), scale.mT.contiguous()) if transposed else (stored, scale)


def quantize_columns(
    x: Tensor, where: Segments, scale: Tensor | None = None, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """``x`` [P, C] as E4M3 [C, T·128] and FP32 scales [T, C], one a tile of 128 tokens of the same expert.

    ``scale`` [P, ⌈C/128⌉]: ``x`` is E4M3 itself, with these. Every expert's rows begin a tile of their own and the last
    of them is filled up with zeros; the tokens run fastest because FP8 products want both sides so. T is as many tiles
    as there are (the reference) or can be at most (the kernel, which leaves those behind the last one undefined).
    """
    if _has_kernels(x.device):
        from abyssal.kernels import fp8_gpu

        return fp8_gpu.quantize_columns(x.contiguous(), where.ends, scale, power_of_two)
    return quantize_columns_reference(x, where, scale, power_of_two=power_of_two)


def quantize_columns_reference(
    x: Tensor, where: Segments, scale: Tensor | None = None, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """What :func:`quantize_columns` computes, in plain torch."""
    numbers = x.float() if scale is None else _dequantize_rows(x, scale)
    parts = [
        F.pad(numbers[start:end], (0, 0, 0, -(end - start) % BLOCK)) for start, end in pairwise(where.host_bounds())
    ]
    tiles = torch.cat(parts).unflatten(0, (-1, BLOCK))  # [T, 128, C]
    scales = _scale(tiles.abs().amax(1), power_of_two)
    stored = (tiles / scales.unsqueeze(1)).to(torch.float8_e4m3fn)
    return stored.flatten(0, 1).t().contiguous(), scales


def product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, where: Segments, dtype: torch.dtype
) -> Tensor:
    """Each expert's rows of ``x`` [P, I] (tiles of 1 × 128) times its ``weight`` [E, O, I] (blocks), [P, O]."""
    if not _has_kernels(x.device):
        return product_reference(x, x_scale, weight, weight_scale, where, dtype)
    rows, (experts, outputs, inputs) = x.shape[0], weight.shape
    fits = rows > 0 and not (rows % 16 or outputs % BLOCK or inputs % BLOCK)  # 16 rows: so that scales are aligned
    if experts == 1 and fits and dtype == torch.bfloat16 and fp8.has_blockwise_matmul(x.device):
        return _cublas(x, x_scale, weight[0], weight_scale[0])
    from abyssal.kernels import fp8_gpu

    return fp8_gpu.product(x, x_scale, weight, weight_scale, where.ends, dtype)


def product_reference(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, where: Segments, dtype: torch.dtype
) -> Tensor:
    """What :func:`product` computes: dequantised, multiplied in FP32."""
    rows = _dequantize_rows(x, x_scale)
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for expert, start, end in _slices(where):
            matrix = fp8.dequantize(weight[expert], weight_scale[expert], torch.float32)
            out[start:end] = rows[start:end] @ matrix.t()
    return out


def weight_gradient(
    grad: Tensor, grad_scale: Tensor, x: Tensor, x_scale: Tensor, where: Segments, dtype: torch.dtype
) -> Tensor:
    """Each expert's dyᵀ x, [E, O, I], from ``grad`` [O, T·128] and ``x`` [I, T·128] of :func:`quantize_columns`; zeros
    where an expert has no rows."""
    if _has_kernels(x.device):
        from abyssal.kernels import fp8_gpu

        return fp8_gpu.weight_gradient(grad, grad_scale, x, x_scale, where.ends, dtype)
    return weight_gradient_reference(grad, grad_scale, x, x_scale, where, dtype)


def weight_gradient_reference(
    grad: Tensor, grad_scale: Tensor, x: Tensor, x_scale: Tensor, where: Segments, dtype: torch.dtype
) -> Tensor:
    """What :func:`weight_gradient` computes: dequantised, multiplied in FP32."""
    bounds = where.host_bounds()
    out = torch.zeros(len(bounds) - 1, grad.shape[0], x.shape[0], dtype=dtype, device=x.device)
    first = 0
    with torch.autocast(x.device.type, enabled=False):
        for expert, (start, end) in enumerate(pairwise(bounds)):
            tiles = -(-(end - start) // BLOCK)
            left, right = (
                numbers[:, first * BLOCK : (first + tiles) * BLOCK].float()
                * scale[first : first + tiles].t().repeat_interleave(BLOCK, dim=1)
                for numbers, scale in ((grad, grad_scale), (x, x_scale))
            )
            out[expert] = left @ right.t()
            first += tiles
    return out


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    """NVIDIA's GPUs from Ada on have E4M3 in their matrix units, and Triton has to work."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    from abyssal.kernels import gpu

    return gpu.supports(torch.empty(1, device=device))


def _cublas(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    from torch.nn.functional import ScalingType, scaled_mm

    # Scales of rows column by column, those of weights with inputs running fastest in rows of a multiple of four.
    out: Tensor = scaled_mm(
        x,
        weight.t(),
        x_scale.t().contiguous().t(),
        ScalingType.BlockWise1x128,
        F.pad(weight_scale, (0, -weight_scale.shape[1] % 4)).contiguous().t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return out


def _dequantize_rows(x: Tensor, scale: Tensor) -> Tensor:
    return x.float() * scale.repeat_interleave(BLOCK, dim=1)[:, : x.shape[1]]


def _slices(where: Segments) -> Iterator[tuple[int, int, int]]:
    return ((expert, start, end) for expert, (start, end) in enumerate(pairwise(where.host_bounds())) if end > start)


def _scale(amax: Tensor, power_of_two: bool) -> Tensor:
    amax = amax.clamp_min(SMALLEST_AMAX)
    if not power_of_two:
        return amax / torch.full_like(amax, E4M3_MAX)  # by a tensor: a GPU would multiply by the rounded reciprocal
    # amax is 1.m · 2^e and 448 is 1.75 · 2^8: the smallest power of two that is not less than their quotient
    bits = amax.view(torch.int32)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()
    return torch.where(amax.isfinite(), (exponent << 23).view(torch.float32), amax)
