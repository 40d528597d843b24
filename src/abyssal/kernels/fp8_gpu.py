"""The kernels of :mod:`abyssal.kernels.fp8_training` for NVIDIA GPUs, in Triton; what they compute stands there.

Which rows are whose is read from ``ends`` on the device, so the host never waits: a grid is as large as the number of
tiles can get, each program finds its expert, and programs without work return. A product's operands lie with the summed
dimension running fastest, the one layout that Hopper's FP8 matrix instructions take. These add up 128 products (with
some 14 bits); what is summed over more is FP32, since each tile's result is multiplied by its scales and added outside
(paper §3.3.2, N_C = 128).

In Triton's interpreter (``TRITON_INTERPRET=1`` before the first import of triton) they take tensors on the CPU. The
interpreter's cast to E4M3 does not round to even, so there the quantising kernels write FP32, and torch casts.

A kernel is compiled anew for each width (a model has few), not for each number of rows. Shapes as in
:mod:`abyssal.kernels.fp8_training`; all tensors contiguous but the scales of rows.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels import fp8, fp8_training

_BLOCK = tl.constexpr(fp8.BLOCK)
_E4M3_MAX = tl.constexpr(fp8.E4M3_MAX)
_SMALLEST_ROWS = tl.constexpr(fp8_training.SMALLEST_AMAX)
_SMALLEST_WEIGHT = tl.constexpr(fp8.SMALLEST_AMAX)
_ROWS = tl.constexpr(32)  # that a program of quantize_rows takes
_COLUMNS = tl.constexpr(64)  # that a program of quantize_columns takes; divides 128
# Two warpgroups share the two FP32 tiles of a product (the sum, and what comes out of the matrix unit); three stages of
# operands are 96 KB, which is what Ada has.
_PRODUCT = {"num_warps": 8, "num_stages": 3}


def _where_its_tensors_are(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launches go to the GPU that holds the first tensor, not to the current one."""

    @functools.wraps(function)
    def on_device(x: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(x):
            return function(x, *arguments, **options)

    return on_device


@triton.jit
def _scale(amax, smallest: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    amax = tl.maximum(amax, smallest)
    if POWER_OF_TWO:
        bits = amax.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        scale = tl.where(amax < float("inf"), (exponent << 23).to(tl.float32, bitcast=True), amax)
    else:
        scale = tl.div_rn(amax, tl.full(amax.shape, _E4M3_MAX, tl.float32))
    return scale


@triton.jit
def _find(ends, tile, n_experts, EXPERTS: tl.constexpr):
    """Expert of a tile of 128 rows, its first row, and the end of the expert's rows; 0, 0, 0 behind the last tile."""
    expert = tl.arange(0, EXPERTS)
    inside = expert < n_experts
    end = tl.load(ends + expert, mask=inside, other=0)
    start = tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0)
    tiles = (end - start + _BLOCK - 1) // _BLOCK
    last = tl.cumsum(tiles, 0)
    here = inside & (tile < last) & (tile >= last - tiles)
    row = start + (tile - last + tiles) * _BLOCK
    return tl.sum(tl.where(here, expert, 0)), tl.sum(tl.where(here, row, 0)), tl.sum(tl.where(here, end, 0))


@triton.jit
def _quantize_rows(x, stored, scale, n_rows, n_columns: tl.constexpr, scale_stride, POWER_OF_TWO: tl.constexpr):
    row = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    column = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    mask = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    at = row.to(tl.int64)[:, None] * n_columns + column[None, :]
    numbers = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    scales = _scale(tl.max(tl.abs(numbers), 1), _SMALLEST_ROWS, POWER_OF_TWO)
    numbers = tl.div_rn(numbers, tl.broadcast_to(scales[:, None], (_ROWS, _BLOCK)))
    tl.store(stored + at, numbers.to(stored.dtype.element_ty), mask=mask)
    tl.store(scale + tl.program_id(1).to(tl.int64) * scale_stride + row, scales, mask=row < n_rows)


@_where_its_tensors_are
def quantize_rows(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """``x`` [P, C] -> E4M3 [P, C], scales [P, ⌈C/128⌉], which lie column by column."""
    rows, columns = x.shape
    stored, scale = _empty(x, rows, columns), x.new_empty(_tiles(columns), rows, dtype=torch.float32)
    grid = (triton.cdiv(rows, _ROWS.value), len(scale))
    if rows > 0:
        _quantize_rows[grid](x, stored, scale, rows, columns, rows, power_of_two)
    return stored.to(torch.float8_e4m3fn), scale.t()


@triton.jit
def _quantize_weight(
    weight, stored, scale, n_out: tl.constexpr, n_in: tl.constexpr,
    out_stride, in_stride, scale_out_stride, scale_in_stride,
):  # fmt: skip
    tiles_in = tl.cdiv(n_in, _BLOCK)
    block_out, block_in = tl.program_id(0) // tiles_in, tl.program_id(0) % tiles_in
    expert = tl.program_id(1).to(tl.int64)
    out = block_out * _BLOCK + tl.arange(0, _BLOCK)
    in_ = block_in * _BLOCK + tl.arange(0, _BLOCK)
    mask = (out < n_out)[:, None] & (in_ < n_in)[None, :]
    first = expert * n_out * n_in
    at = first + out.to(tl.int64)[:, None] * n_in + in_[None, :]
    numbers = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    scales = _scale(tl.max(tl.max(tl.abs(numbers), 1), 0) + tl.zeros((1,), tl.float32), _SMALLEST_WEIGHT, False)
    numbers = tl.div_rn(numbers, tl.broadcast_to(scales[:, None], (_BLOCK, _BLOCK)))
    to = first + out.to(tl.int64)[:, None] * out_stride + in_.to(tl.int64)[None, :] * in_stride
    tl.store(stored + to, numbers.to(stored.dtype.element_ty), mask=mask)
    scale_at = expert * tl.cdiv(n_out, _BLOCK) * tiles_in + block_out * scale_out_stride + block_in * scale_in_stride
    tl.store(scale + scale_at + tl.arange(0, 1), scales)


@_where_its_tensors_are
def quantize_weight(weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """``weight`` [E, O, I] -> E4M3 and scales a block, of [E, I, O] where ``transposed``."""
    experts, n_out, n_in = weight.shape
    if transposed:
        stored, strides = _empty(weight, experts, n_in, n_out), (1, n_out, 1, _tiles(n_out))
    else:
        stored, strides = _empty(weight, experts, n_out, n_in), (n_in, 1, _tiles(n_in), 1)
    scale = torch.empty(fp8.scale_shape(stored.shape), dtype=torch.float32, device=weight.device)
    grid = (_tiles(n_out) * _tiles(n_in), experts)
    _quantize_weight[grid](weight, stored, scale, n_out, n_in, *strides, num_warps=8)
    return stored.to(torch.float8_e4m3fn), scale


@triton.jit
def _quantize_columns(
    x, x_scale, ends, stored, scale, n_experts, n_columns: tl.constexpr, width,
    x_scale_row, x_scale_tile, EXPERTS: tl.constexpr, SCALED: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    _, first, end = _find(ends, tile, n_experts, EXPERTS)
    if first >= end:
        return
    row = first + tl.arange(0, _BLOCK)
    column = tl.program_id(1) * _COLUMNS + tl.arange(0, _COLUMNS)
    mask = (row < end)[:, None] & (column < n_columns)[None, :]
    numbers = tl.load(x + row.to(tl.int64)[:, None] * n_columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        block = (tl.program_id(1) * _COLUMNS // _BLOCK).to(tl.int64)
        numbers = (
            numbers * tl.load(x_scale + block * x_scale_tile + row * x_scale_row, mask=row < end, other=0.0)[:, None]
        )
    scales = _scale(tl.max(tl.abs(numbers), 0), _SMALLEST_ROWS, POWER_OF_TWO)
    numbers = tl.div_rn(numbers, tl.broadcast_to(scales[None, :], (_BLOCK, _COLUMNS)))
    to = column.to(tl.int64)[None, :] * width + tile * _BLOCK + tl.arange(0, _BLOCK)[:, None]
    tl.store(stored + to, numbers.to(stored.dtype.element_ty), mask=(column < n_columns)[None, :])
    tl.store(scale + tile.to(tl.int64) * n_columns + column, scales, mask=column < n_columns)


@_where_its_tensors_are
def quantize_columns(x: Tensor, ends: Tensor, scale: Tensor | None, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """``x`` [P, C] (E4M3 with ``scale`` [P, ⌈C/128⌉], or plain) -> E4M3 [C, T·128], scales [T, C]."""
    rows, columns = x.shape
    tiles = _most_tiles(rows, len(ends))
    stored = _empty(x, columns, tiles * fp8.BLOCK)
    scales = torch.empty(tiles, columns, dtype=torch.float32, device=x.device)
    grid = (tiles, triton.cdiv(columns, _COLUMNS.value))
    _quantize_columns[grid](
        x, scales if scale is None else scale, ends, stored, scales, len(ends), columns, tiles * fp8.BLOCK,
        *(scales if scale is None else scale).stride(), _experts(ends), scale is not None, power_of_two,
    )  # fmt: skip
    return stored.to(torch.float8_e4m3fn), scales


@triton.jit
def _product(
    x, x_scale, weight, weight_scale, ends, out, n_experts, n_out: tl.constexpr, n_in: tl.constexpr,
    x_scale_row, x_scale_tile, EXPERTS: tl.constexpr,
):  # fmt: skip
    tiles_out, tiles_in = tl.cdiv(n_out, _BLOCK), tl.cdiv(n_in, _BLOCK)
    block = tl.program_id(0) % tiles_out  # programs side by side share rows and, mostly, the expert
    expert, first, end = _find(ends, tl.program_id(0) // tiles_out, n_experts, EXPERTS)
    if first >= end:
        return
    row = (first + tl.arange(0, _BLOCK)).to(tl.int64)
    column = block * _BLOCK + tl.arange(0, _BLOCK)
    k = tl.arange(0, _BLOCK)
    expert = expert.to(tl.int64)
    x_at = x + row[:, None] * n_in + k[None, :]
    weight_at = weight + expert * n_out * n_in + column.to(tl.int64)[None, :] * n_in + k[:, None]
    x_scale_at = x_scale + row * x_scale_row
    weight_scale_at = weight_scale + (expert * tiles_out + block) * tiles_in
    total = tl.zeros((_BLOCK, _BLOCK), tl.float32)
    for i in range(tiles_in):
        left = n_in - i * _BLOCK
        a = tl.load(x_at, mask=(row < end)[:, None] & (k < left)[None, :], other=0.0)
        b = tl.load(weight_at, mask=(column < n_out)[None, :] & (k < left)[:, None], other=0.0)
        scales = tl.load(x_scale_at, mask=row < end, other=0.0) * tl.load(weight_scale_at + i)
        total += tl.dot(a, b) * scales[:, None]
        x_at += _BLOCK
        weight_at += _BLOCK
        x_scale_at += x_scale_tile
    mask = (row < end)[:, None] & (column < n_out)[None, :]
    tl.store(out + row[:, None] * n_out + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@_where_its_tensors_are
def product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """``x`` [P, I] in tiles of 1 × 128 times ``weight`` [E, O, I] in blocks -> [P, O]."""
    (rows, n_in), (experts, n_out, _) = x.shape, weight.shape
    out = torch.empty(rows, n_out, dtype=dtype, device=x.device)
    grid = (_most_tiles(rows, experts) * _tiles(n_out),)
    _product[grid](
        x, x_scale, weight, weight_scale, ends, out, experts, n_out, n_in, *x_scale.stride(), _experts(ends),
        **_PRODUCT,
    )  # fmt: skip
    return out


@triton.jit
def _weight_gradient(
    grad, grad_scale, x, x_scale, ends, out, n_out: tl.constexpr, n_in: tl.constexpr, width,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    tiles_in = tl.cdiv(n_in, _BLOCK)
    expert = tl.program_id(1)
    other = tl.arange(0, EXPERTS)
    before = other < expert
    end = tl.load(ends + other, mask=before, other=0)
    start = tl.load(ends + other - 1, mask=before & (other > 0), other=0)
    tile = tl.sum((end - start + _BLOCK - 1) // _BLOCK)  # the first of this expert's
    rows = tl.load(ends + expert) - tl.max(end)
    row = (tl.program_id(0) // tiles_in * _BLOCK + tl.arange(0, _BLOCK)).to(tl.int64)
    column = (tl.program_id(0) % tiles_in * _BLOCK + tl.arange(0, _BLOCK)).to(tl.int64)
    k = tl.arange(0, _BLOCK)
    grad_at = grad + row[:, None] * width + (tile * _BLOCK + k)[None, :]
    x_at = x + column[None, :] * width + (tile * _BLOCK + k)[:, None]
    grad_scale_at = grad_scale + tile.to(tl.int64) * n_out + row
    x_scale_at = x_scale + tile.to(tl.int64) * n_in + column
    total = tl.zeros((_BLOCK, _BLOCK), tl.float32)
    for _ in range(tl.cdiv(rows, _BLOCK)):
        a = tl.load(grad_at, mask=(row < n_out)[:, None], other=0.0)
        b = tl.load(x_at, mask=(column < n_in)[None, :], other=0.0)
        left = tl.load(grad_scale_at, mask=row < n_out, other=0.0)
        right = tl.load(x_scale_at, mask=column < n_in, other=0.0)
        total += tl.dot(a, b) * left[:, None] * right[None, :]
        grad_at += _BLOCK
        x_at += _BLOCK
        grad_scale_at += n_out
        x_scale_at += n_in
    to = expert.to(tl.int64) * n_out * n_in + row[:, None] * n_in + column[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=(row < n_out)[:, None] & (column < n_in)[None, :])


@_where_its_tensors_are
def weight_gradient(
    grad: Tensor, grad_scale: Tensor, x: Tensor, x_scale: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """``grad`` [O, T·128] times the transpose of ``x`` [I, T·128], an expert's tiles at a time -> [E, O, I]."""
    (n_out, width), n_in = grad.shape, x.shape[0]
    out = torch.empty(len(ends), n_out, n_in, dtype=dtype, device=x.device)
    grid = (_tiles(n_out) * _tiles(n_in), len(ends))
    _weight_gradient[grid](grad, grad_scale, x, x_scale, ends, out, n_out, n_in, width, _experts(ends), **_PRODUCT)
    return out


def _empty(like: Tensor, *shape: int) -> Tensor:
    dtype = torch.float32 if like.device.type == "cpu" else torch.float8_e4m3fn  # on a CPU: the interpreter
    return torch.empty(shape, dtype=dtype, device=like.device)


def _tiles(size: int) -> int:
    return -(-size // fp8.BLOCK)


def _most_tiles(rows: int, experts: int) -> int:
    """How many tiles ``rows`` take at most, however they are spread."""
    return (rows + (fp8.BLOCK - 1) * experts) // fp8.BLOCK


def _experts(ends: Tensor) -> int:
    return int(triton.next_power_of_2(len(ends)))
