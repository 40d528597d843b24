"""Weights in NF4 with double quantization, the base that QLoRA trains adapters on (arXiv 2305.14314 §3).

A number is one of 16 quantiles of a normal distribution times the largest magnitude of its block of 64. These scales,
less their mean, are 8 bits each, with an FP32 scale for every 256 of them: 4.127 bits a number. Blocks run through a
matrix row by row and across the ends of rows.

bitsandbytes quantises and dequantises, on a CPU and on a GPU, so that a matrix has the numbers here that other code
trains on, to the last bit. What the blocks' scales come to is a 64th of the work and worked out here, for a stack of
matrices at once. On a CPU, ask for a few million numbers a call: memory of 32 MiB and more comes fresh from the system
each time, which takes ten times as long as the numbers do.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.errors import UserError

BLOCK = 64
_GROUP = 256  # blocks whose scales share one
_SPAN = BLOCK * _GROUP
_STEP = 2**20  # numbers that are quantised at a time
NAMES = ("data", "absmax", "nested", "offset")


@dataclass(frozen=True, eq=False)
class NF4:
    """A matrix [O, I], or a stack of them whose leading dimensions (...) are those of ``offset``."""

    data: Tensor
    """[..., 32 · blocks] uint8: two numbers a byte, the first in the upper bits; zeros behind the last number."""
    absmax: Tensor
    """[..., blocks] uint8."""
    nested: Tensor
    """[..., ⌈blocks / 256⌉] FP32."""
    offset: Tensor
    """[...] FP32: the mean of the blocks' scales."""
    matrix: tuple[int, int]
    """O and I."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.offset.shape, *self.matrix))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :data:`NAMES` calls them."""
        return self.data, self.absmax, self.nested, self.offset

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def __getitem__(self, place: int | slice | tuple[int, ...]) -> NF4:
        """Of a stack; views."""
        data, absmax, nested, offset = (tensor[place] for tensor in self.tensors)
        return NF4(data, absmax, nested, offset, self.matrix)

    def rows(self, start: int, end: int) -> NF4:
        """Rows of a single matrix, as views; ``start`` is a multiple of :func:`aligned_rows`."""
        _, inputs = self.matrix
        first, last = start * inputs, end * inputs
        return NF4(
            self.data[first // 2 : -(-last // BLOCK) * BLOCK // 2],
            self.absmax[first // BLOCK : -(-last // BLOCK)],
            self.nested[first // _SPAN : -(-last // _SPAN)],
            self.offset,
            (end - start, inputs),
        )


def nf4_shapes(stack: tuple[int, ...], matrix: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Shapes of :attr:`NF4.tensors`."""
    blocks = -(-math.prod(matrix) // BLOCK)
    return (*stack, blocks * BLOCK // 2), (*stack, blocks), (*stack, -(-blocks // _GROUP)), stack


def aligned_rows(inputs: int) -> int:
    """The fewest rows of so many numbers that end where a group of blocks ends."""
    return _SPAN // math.gcd(_SPAN, inputs)


@cache
def functional() -> ModuleType:
    """bitsandbytes' functions. Raises UserError where it is not installed."""
    # It warns that a package is missing from which it would fetch a kernel that nothing here uses.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functions
    except ImportError as error:
        raise UserError(f"weights='nf4' needs bitsandbytes: pip install 'abyssal[tune]' ({error})") from None
    finally:
        log.setLevel(level)
    module: ModuleType = functions
    return module


@cache
def _levels(device: torch.device) -> Tensor:
    """What the 256 values of ``absmax`` stand for."""
    levels: Tensor = functional().create_dynamic_map().to(device)
    return levels


@torch.no_grad()
def quantize(weight: Tensor) -> NF4:
    """``weight`` [O, I] of any float dtype, some numbers at a time, as bitsandbytes' quantize_4bit does it at once with
    nf4, blocks of 64 and compress_statistics. With a number that is not finite, none is when the matrix comes back."""
    functions = functional()
    numbers = weight.reshape(-1) if weight.dtype != torch.float64 else weight.reshape(-1).float()
    parts, scales = [], []
    for some in numbers.split(_STEP):
        data, state = functions.quantize_4bit(some, blocksize=BLOCK, quant_type="nf4")
        parts.append(data.view(-1))
        scales.append(state.absmax)
    scale = torch.cat(scales)
    offset = scale.mean()
    absmax, state = functions.quantize_blockwise(scale - offset, blocksize=_GROUP)
    data = torch.cat(parts)
    data = F.pad(data, (0, len(absmax) * BLOCK // 2 - len(data)))
    return NF4(data, absmax, state.absmax, offset, (weight.shape[0], weight.shape[1]))


@torch.no_grad()
def dequantize(packed: NF4, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[..., O, I]: what bitsandbytes' dequantize_4bit makes of each matrix, products in FP32 rounded to ``dtype``."""
    functions, made = functional(), dtype if dtype != torch.float64 else torch.float32
    blocks = packed.absmax.shape[-1]
    nested = packed.nested.repeat_interleave(_GROUP, -1)[..., :blocks]
    scale = _levels(packed.absmax.device)[packed.absmax.int()] * nested + packed.offset.unsqueeze(-1)
    # Not the matrix's own: on a CPU, bitsandbytes 0.50 takes wrong blocks' scales where rows of a multiple of 16
    # numbers do not end where a block does, and compiles code of its own for odd ones.
    shape = torch.Size((scale.numel(), BLOCK))
    state = functions.QuantState(scale.view(-1), shape=shape, dtype=made, blocksize=BLOCK, quant_type="nf4")
    numbers: Tensor = functions.dequantize_4bit(packed.data.reshape(-1, 1), state).to(dtype)
    numbers = numbers.view(*packed.offset.shape, blocks * BLOCK)[..., : math.prod(packed.matrix)]
    return numbers.reshape(packed.shape)
