"""FP8 as DeepSeek-V3 publishes it (paper §3.3): E4M3 numbers with one scale a block, and products of them.

Weights carry one scale for each block of 128 × 128, activations one for each tile of 1 × 128, made on the fly. A number
is ``stored · scale`` (the checkpoints call the weight's scale ``weight_scale_inv``). Sizes that are no multiple of 128
end in partial blocks. With ``power_of_two`` scales are rounded up to a power of two (ue8m0, V3.1).

On a GPU with blockwise FP8 products (:func:`has_blockwise_matmul`) :func:`linear` uses them; elsewhere it multiplies
dequantised numbers, some rows of the weight at a time, which computes the same up to rounding.

Shapes: O outputs, I inputs, N rows; leading dimensions of weights (experts) are allowed everywhere but in ``linear``.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4  # so that a block of zeros has a scale to divide by
_ROWS = 1024  # of a weight that are quantised, or dequantised for a product, at a time


def scale_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a weight [..., O, I]: [..., ⌈O/128⌉, ⌈I/128⌉]."""
    return (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """``weight`` [..., O, I] E4M3 times ``scale`` [..., ⌈O/128⌉, ⌈I/128⌉] (FP32 or E8M0), as an FP32 product, which is
    then rounded to ``dtype``.

    Written to ``out`` where one is given (its dtype counts then). On a CPU it needs working memory for some rows only.
    """
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device) if out is None else out
    if weight.dim() > 2:
        for w, s, o in zip(weight, scale, out, strict=True):
            dequantize(w, s, out=o)
        return out
    columns = scale.float().repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]
    if weight.device.type != "cpu":
        return out.copy_(weight.float().mul_(columns.repeat_interleave(BLOCK, dim=0)[: weight.shape[0]]))
    for block, start in enumerate(range(0, weight.shape[0], BLOCK)):  # what is in flight stays in the cache
        rows = slice(start, start + BLOCK)
        out[rows] = _to_float(weight[rows]).mul_(columns[block])
    return out


def dequantize_reference(weight: Tensor, scale: Tensor) -> Tensor:
    """What :func:`dequantize` computes, block by block, FP32: ``weight`` [O, I], ``scale`` [⌈O/128⌉, ⌈I/128⌉]."""
    out = weight.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            out[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= scale[i, j].float()
    return out


def quantize(weight: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """``weight`` [..., O, I] of any float dtype as E4M3 and FP32 scales [..., ⌈O/128⌉, ⌈I/128⌉].

    A block's scale is max |w| / 448, with max |w| taken as at least 1e-4. What is not finite spoils its block: the
    scale is NaN or infinite too.
    """
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(scale_shape(weight.shape), dtype=torch.float32, device=weight.device)
    inputs = weight.shape[-1]
    for start in range(0, weight.shape[-2], _ROWS):  # so that FP32 copies stay small
        rows = slice(start, start + _ROWS)
        part = weight[..., rows, :]
        outputs = part.shape[-2]
        padded = F.pad(part.float(), (0, -inputs % BLOCK, 0, -outputs % BLOCK))
        blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., O/128, 128, I/128, 128]
        scales = _scale(blocks.abs().amax(dim=(-3, -1)), power_of_two)
        scale[..., start // BLOCK : (start + _ROWS) // BLOCK, :] = scales
        numbers = _to_e4m3(blocks / scales[..., :, None, :, None])
        stored[..., rows, :] = numbers.flatten(-4, -3).flatten(-2)[..., :outputs, :inputs]
    return stored, scale


def quantize_activations(x: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """``x`` [..., I] as E4M3 and FP32 scales [..., ⌈I/128⌉], one a tile of 1 × 128."""
    inputs = x.shape[-1]
    tiles = F.pad(x.float(), (0, -inputs % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = _scale(tiles.abs().amax(-1), power_of_two)
    return _to_e4m3(tiles / scale.unsqueeze(-1)).flatten(-2)[..., :inputs].contiguous(), scale


@torch.no_grad()
def linear(x: Tensor, weight: Tensor, scale: Tensor, *, power_of_two: bool = False) -> Tensor:
    """``x`` [N, I] times ``weight`` [O, I] E4M3 with ``scale`` [⌈O/128⌉, ⌈I/128⌉], in ``x``'s dtype: [N, O].

    Activations are quantised as published, so the result differs from a product with the dequantised weight by their
    rounding. No gradient passes.
    """
    fits = _multiples(weight.shape) and x.dtype == torch.bfloat16 and x.shape[0] > 0
    if fits and has_blockwise_matmul(x.device):
        return _blockwise_matmul(x, weight, scale, power_of_two)
    stored, x_scale = quantize_activations(x, power_of_two=power_of_two)
    tiles = x_scale.repeat_interleave(BLOCK, dim=-1)[:, : x.shape[1]]
    numbers = (stored.float() * tiles).to(x.dtype)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        part = dequantize(weight[rows], scale[start // BLOCK : (start + _ROWS) // BLOCK], x.dtype)
        out[:, rows] = numbers @ part.t()
    return out


def linear_reference(x: Tensor, weight: Tensor, scale: Tensor, *, power_of_two: bool = False) -> Tensor:
    """What :func:`linear` computes, said plainly in float64: block products of what is stored, each scaled, summed."""
    stored, x_scale = quantize_activations(x, power_of_two=power_of_two)
    out = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64, device=x.device)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows, columns = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            product = stored[:, columns].double() @ weight[rows, columns].double().t()
            out[:, rows] += product * x_scale[:, j : j + 1].double() * scale[i, j].double()
    return out


@functools.cache
def has_blockwise_matmul(device: torch.device) -> bool:
    """Whether ``device`` multiplies FP8 blocks itself: found out by doing it once, since hardware, CUDA and torch must
    all have it."""
    if device.type != "cuda" or not hasattr(F, "scaled_mm"):
        return False
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(16, 2 * BLOCK, device=device, generator=generator, dtype=torch.bfloat16)
    weight, scale = quantize(torch.randn(2 * BLOCK, 2 * BLOCK, device=device, generator=generator))
    try:
        got = _blockwise_matmul(x, weight, scale, power_of_two=False)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return False
    expected = linear_reference(x, weight, scale)
    return bool((got.double() - expected).abs().max() <= 0.01 * expected.abs().max())


def _blockwise_matmul(x: Tensor, weight: Tensor, scale: Tensor, power_of_two: bool) -> Tensor:
    from torch.nn.functional import ScalingType, scaled_mm

    # cuBLAS wants the scales of activations column by column, those of weights with inputs running fastest, and both
    # aligned: rows and the weight's blocks of inputs are filled up with zeros.
    stored, x_scale = quantize_activations(F.pad(x, (0, 0, 0, -x.shape[0] % 16)), power_of_two=power_of_two)
    out = scaled_mm(
        stored,
        weight.t(),
        x_scale.t().contiguous().t(),
        ScalingType.BlockWise1x128,
        F.pad(scale.float(), (0, -scale.shape[1] % 4)).contiguous().t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return out[: x.shape[0]]


def _multiples(shape: torch.Size) -> bool:
    return shape[0] % BLOCK == 0 and shape[1] % BLOCK == 0


def _scale(amax: Tensor, power_of_two: bool) -> Tensor:
    # By a tensor: a GPU multiplies by the reciprocal of a plain number, and scales would differ from the CPU's.
    scale = amax.clamp_min(SMALLEST_AMAX) / torch.full_like(amax, E4M3_MAX)
    if not power_of_two:
        return scale
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa · 2^exponent, mantissa in [0.5, 1)
    rounded = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return torch.where(scale.isfinite(), rounded, scale)  # NaN has some exponent too


def _to_e4m3(numbers: Tensor) -> Tensor:
    # At most a hair above 448, which rounds to 448: from 464 on the cast would make NaN of it.
    return numbers.to(torch.float8_e4m3fn)


def _to_float(stored: Tensor) -> Tensor:
    """E4M3 as FP32, exactly.

    torch's own cast on CPU takes four times as long as this: the bits of E4M3, moved to where FP16 has its exponent and
    mantissa, are the number / 256, subnormals included. Only NaN (all ones) would come out as a number.
    """
    bits = stored.contiguous().view(torch.int8)
    if (bits.bitwise_and(0x7F) == 0x7F).any():
        return stored.float()
    half = bits.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)  # sign in bits 15 and 14: 14 is cleared
    return half.view(torch.float16).float().mul_(256.0)
