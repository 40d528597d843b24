"""Weights of 8 or 4 bits for decoding, where a step's time is that of reading every active weight once.

One format for all: a row's numbers in groups of 32 along the input, each group with a scale in BF16, so a number is
``(stored - middle) · scale`` and takes 8.5 or 4.5 bits. Stored numbers are unsigned (middle 128 or 8), which is what
processors multiply with signed activations. Rows are filled up with zeros to whole blocks:

- int8: a byte a number, blocks of 64; the scale is max |w| / 127.
- int4: blocks of 128 in 64 bytes, the first half in the lower bits, so that one shift unpacks 64 numbers that follow
  each other. The scale comes from the number farthest from zero, which gets -8, and from a few scales near it: the one
  with the least squared error is taken.

On a CPU, packing and unpacking are compiled code (kernels/native_pack.cpp) that gives the same numbers as what stands
here, to the last bit. :mod:`abyssal.kernels.decode` multiplies with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.kernels import native

Kind = Literal["int8", "int4"]

GROUP = 32
BLOCK = {"int8": 64, "int4": 128}
"""Numbers to which rows are filled up."""

_MIDDLE = {"int8": 128, "int4": 8}
_ROWS = 1024  # of a matrix that are quantised or dequantised at a time
_NATIVE = (torch.float32, torch.bfloat16)
# What the number farthest from zero is stored as, in int4: a larger scale cuts nothing off, a smaller one is finer.
_FARTHEST = (-8.0, -7.5, -7.0, -8.5, -9.0, 7.0, 7.5)


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix [O, I], or experts' [E, O, I], in few bits."""

    data: Tensor
    """[..., O, bytes of a row] uint8."""
    scales: Tensor
    """[..., O, groups of a row] BF16."""
    kind: Kind
    shape: torch.Size
    """Of the matrix."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes


def packed_shapes(shape: tuple[int, ...], kind: Kind) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``data`` and ``scales`` for a matrix of ``shape`` [..., O, I]."""
    columns = -(-shape[-1] // BLOCK[kind]) * BLOCK[kind]
    return (*shape[:-1], columns if kind == "int8" else columns // 2), (*shape[:-1], columns // GROUP)


@torch.no_grad()
def quantize(weight: Tensor, kind: Kind) -> Packed:
    """``weight`` [..., O, I] of any float dtype, some rows at a time. A group with a number that is not finite is not
    finite when it comes back."""
    sizes = packed_shapes(tuple(weight.shape), kind)
    data = torch.empty(sizes[0], dtype=torch.uint8, device=weight.device)
    scales = torch.empty(sizes[1], dtype=torch.bfloat16, device=weight.device)
    rows, row_data, row_scales = (x.flatten(0, -2) for x in (weight, data, scales))  # the last two are views
    compiled = _compiled(weight)
    for start in range(0, rows.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        if compiled:
            some = rows[part] if rows.dtype in _NATIVE else rows[part].float()
            native.pack(some, 8 if kind == "int8" else 4, row_data[part], row_scales[part])
        else:
            row_data[part], row_scales[part] = _quantize_rows(rows[part], kind)
    return Packed(data, scales, kind, weight.shape)


def _compiled(tensor: Tensor) -> bool:
    return tensor.is_cpu and not torch.compiler.is_compiling() and native.library() is not None


def _quantize_rows(rows: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    padded = F.pad(rows.float(), (0, -rows.shape[-1] % BLOCK[kind]))
    groups = padded.unflatten(-1, (-1, GROUP))
    scale = _scale8(groups) if kind == "int8" else _scale4(groups)
    stored = (_rounded(groups, scale, kind) + _MIDDLE[kind]).to(torch.uint8).flatten(-2)
    if kind == "int4":
        halves = stored.unflatten(-1, (-1, 2, 64))
        stored = (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)
    return stored, scale.squeeze(-1)


def _scale8(groups: Tensor) -> Tensor:
    return (groups.abs().amax(-1, keepdim=True) / 127).bfloat16()


def _scale4(groups: Tensor) -> Tensor:
    farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best, least = farthest.new_empty(0).bfloat16(), farthest.new_empty(0)
    for number in _FARTHEST:
        scale = (farthest / number).bfloat16()
        error = (_rounded(groups, scale, "int4") * scale.float() - groups).square()
        while error.shape[-1] > 1:  # in an order that compiled code can follow
            first, second = error.chunk(2, dim=-1)
            error = first + second
        better = error < least if least.numel() else torch.ones_like(error, dtype=torch.bool)
        best = torch.where(better, scale, best) if best.numel() else scale
        least = torch.where(better, error, least) if least.numel() else error
    return best


def _rounded(groups: Tensor, scale: Tensor, kind: Kind) -> Tensor:
    """The nearest multiples of ``scale`` that can be stored; 0 where the scale is 0 or not finite."""
    scale = scale.float()
    numbers = (groups / scale).round().clamp(1 - _MIDDLE[kind] if kind == "int8" else -8, _MIDDLE[kind] - 1)
    return torch.where((scale != 0) & scale.isfinite(), numbers, 0.0).nan_to_num(0.0)


def unpack(packed: Packed) -> Tensor:
    """The stored integers without their middle, [..., O, groups, 32] int8."""
    data = packed.data
    if packed.kind == "int4":
        data = torch.stack((data.unflatten(-1, (-1, 64)) & 15, data.unflatten(-1, (-1, 64)) >> 4), dim=-2).flatten(-3)
    return (data.to(torch.int16) - _MIDDLE[packed.kind]).to(torch.int8).unflatten(-1, (-1, GROUP))


def dequantize(packed: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[..., O, I]: the products in FP32, rounded to ``dtype``; some rows at a time."""
    out = torch.empty(packed.shape, dtype=dtype, device=packed.data.device)
    rows, data, scales = (x.flatten(0, -2) for x in (out, packed.data, packed.scales))
    if dtype in _NATIVE and _compiled(data):
        native.unpack(data.contiguous(), scales.contiguous(), 8 if packed.kind == "int8" else 4, rows)
        return out
    columns = packed.shape[-1]
    for start in range(0, rows.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        some = Packed(data[part], scales[part], packed.kind, rows[part].shape)
        rows[part] = (unpack(some) * scales[part].unsqueeze(-1).float()).flatten(-2)[:, :columns]
    return out


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [..., I] as the native kernels round it: int8 [..., groups, 32] and FP32 scales [..., groups], where a
    scale is max |x| / 127 of a group. What is not finite makes its group's scale so, with zeros for numbers."""
    groups = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    inverse = torch.where((largest > 1e-30) & largest.isfinite(), 127 / largest, 0.0)
    numbers = torch.where(inverse.unsqueeze(-1) > 0, groups * inverse.unsqueeze(-1), 0.0).round()
    return numbers.to(torch.int8), largest / 127


def linear_reference(x: Tensor, weight: Packed) -> Tensor:
    """``x`` [N, I] times ``weight`` [O, I] with both rounded, said plainly in float64: [N, O]."""
    numbers, scale = quantize_activations(x)
    stored, scales = unpack(weight)[:, : numbers.shape[-2]].double(), weight.scales[:, : numbers.shape[-2]].double()
    products = torch.einsum("ngi,ogi->nog", numbers.double(), stored)
    return (products * scale.double().unsqueeze(1) * scales).sum(-1)
