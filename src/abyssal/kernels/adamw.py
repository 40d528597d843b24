"""AdamW's update of one tensor (arXiv 1711.05101), for weights and moments that are kept in fewer bits than FP32.

**Split master.** A BF16 weight and ``low``, an int16 tensor beside it, are together one FP32 number, the master: the
weight is the upper half of its bits, rounded, and ``low`` the lower half, read as a signed number,

    bits(master) = (bits(weight) << 16) + low.

So the weight is the BF16 number nearest to the master; of two that are equally near, the one away from zero (not the
even one: that would need a ``low`` of +32768, which int16 does not have). Products read the weight as it lies, the
update works on the master, and the two take 4 bytes a weight instead of 6.

**8-bit moments.** :class:`EightBit` holds E4M3 numbers in blocks of 128 with an FP32 scale each. What is kept of v is
its root, which spans half as many powers of two. Plain rounding would do harm in two ways. A v that falls by less than
half a step (with beta2 = 0.95 it always does) would never fall at all; so rounding is up or down, by chance, such that
the mean is right. And a v rounded to 0 would make the update m / eps; so what is not 0 stays at least the smallest
number.

Everything goes over the tensor in chunks, so no FP32 copy of a large tensor ever stands in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw

from abyssal.kernels import native
from abyssal.kernels.backend import backend

BLOCK = 128
CHUNK = 2**16  # numbers at a time on a CPU, so that each of the operations on a chunk finds it in the cache
GPU_CHUNK = 2**22  # elsewhere, so that there are few of them

_LARGEST = 448.0  # of E4M3
_SMALLEST = 2.0**-9
_SHIFTS = 2**16


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """FP32 -> BF16 and ``low`` int16 of the same shape. :func:`merge` gives every number back bit for bit, infinities,
    subnormals and NaNs included; but the BF16 half of a NaN may be any number, and that of a number above BF16's
    largest (3.39e38) is infinite."""
    weight = torch.empty_like(master, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    low = torch.empty_like(weight, dtype=torch.int16)
    source = master.reshape(-1)
    for part in chunks(source):
        _split_into(source[part], weight.view(-1)[part], low.view(-1)[part])
    return weight, low


def merge(weight: Tensor, low: Tensor) -> Tensor:
    """BF16 and its ``low`` (any strides) -> the FP32 master."""
    master = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    weight, low = weight.reshape(-1), low.reshape(-1)
    for part in chunks(weight):
        _merge_into(weight[part], low[part], master.view(-1)[part])
    return master


def chunks(flat: Tensor) -> Iterator[slice]:
    """Slices that cover ``flat`` [n]; each begins where a block does."""
    size = _chunk(flat)
    return (slice(start, min(start + size, len(flat))) for start in range(0, len(flat), size))


def _chunk(tensor: Tensor) -> int:
    return CHUNK if tensor.device.type == "cpu" else GPU_CHUNK


def _split_into(master: Tensor, weight: Tensor, low: Tensor) -> None:
    bits = master.view(torch.int32)
    low.copy_(bits)  # int32 to int16 keeps the lower half
    weight.view(torch.int16).copy_((bits - low) >> 16)


def _merge_into(weight: Tensor, low: Tensor, master: Tensor) -> None:
    bits = master.view(torch.int32)
    bits.copy_(weight.view(torch.int16))
    bits.bitwise_left_shift_(16).add_(low)


@dataclass(frozen=True)
class EightBit:
    """Numbers in 8 bits: ``values`` E4M3 of any shape, ``scales`` FP32 [⌈n / 128⌉], one for each block of the flat
    ``values``."""

    values: Tensor
    scales: Tensor

    @classmethod
    def zeros(cls, like: Tensor) -> EightBit:
        """Zeros of the shape and on the device of ``like``."""
        values = torch.zeros(like.shape, dtype=torch.float8_e4m3fn, device=like.device)
        return cls(values, torch.zeros(-(-like.numel() // BLOCK), device=like.device))

    def read(self, part: slice, out: Tensor) -> Tensor:
        """The numbers in ``part`` (which begins where a block does) as FP32, in the beginning of ``out``; that has room
        for the last block whole."""
        count, whole = _counts(part)
        # The bits of an E4M3 number, put where FP16 has sign, exponent and fraction, are that number · 2^-8. (torch's
        # own conversion takes several times as long.)
        bits = self.values.view(-1)[part].view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
        out[:count].copy_(bits.view(torch.float16))
        out[count:whole] = 0
        out[:whole].view(-1, BLOCK).mul_(self._scales(part) * 2.0**8)
        return out[:count]

    def write(self, numbers: Tensor, part: slice, shift: int, never_zero: bool = False) -> None:
        """Keeps what stands in the beginning of ``numbers``, which is used up; the rest of its last block must be 0.

        ``shift`` chooses the noise of the rounding. ``never_zero``: what is above 0 stays above 0.
        """
        count, whole = _counts(part)
        blocks, scales = numbers[:whole].view(-1, BLOCK), self._scales(part)
        # Not below 2^-100: the inverse must stay finite.
        scales.copy_(blocks.abs().amax(1, keepdim=True)).div_(_LARGEST).clamp_min_(2.0**-100)
        blocks.div_(scales)
        least = blocks.sign().mul_(_SMALLEST) if never_zero else None
        # How far apart E4M3 numbers lie there: 2^(e − 3) for the number's exponent e, which counts from −6.
        gap = (blocks.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min_(2.0**-6).mul_(2.0**-3)
        begin = shift * 40503 % _SHIFTS
        blocks.div_(gap).add_(_noise(blocks.device)[begin : begin + whole].view(-1, BLOCK)).floor_().mul_(gap)
        blocks.clamp_(-_LARGEST, _LARGEST)
        if least is not None:
            torch.maximum(blocks, least, out=blocks)
        self.values.view(-1)[part].copy_(numbers[:count])

    def _scales(self, part: slice) -> Tensor:
        """[blocks, 1] of ``part``."""
        return self.scales[part.start // BLOCK : -(-part.stop // BLOCK)].unsqueeze(1)


def _counts(part: slice) -> tuple[int, int]:
    """Numbers in ``part``, and in its blocks."""
    count = part.stop - part.start
    return count, -(-count // BLOCK) * BLOCK


@lru_cache(maxsize=8)
def _noise(device: torch.device) -> Tensor:
    """Numbers evenly spread within (0, 1): a table, since drawing them anew would cost more than the update. Each write
    begins at another place of it. The same everywhere, so a run that goes on rounds as if it had not stopped."""
    generator = torch.Generator().manual_seed(0)
    size = (CHUNK if device.type == "cpu" else GPU_CHUNK) + _SHIFTS
    return torch.rand(size, generator=generator).mul_(1 - 2**-10).add_(2**-11).to(device)


Moment = Tensor | EightBit


def adamw_(
    weight: Tensor,
    low: Tensor | None,
    grad: Tensor,
    m: Moment,
    v: Moment,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    scale: float | Tensor = 1.0,
) -> None:
    """One AdamW update in place. With g = scale · grad:

        m ← β1 m + (1 − β1) g;   v ← β2 v + (1 − β2) g²
        w ← (1 − lr · weight_decay) w − lr · m / (1 − β1^step) / (√(v / (1 − β2^step)) + eps)

    ``weight`` is FP32 or FP64 with ``low`` None, or BF16 with ``low`` int16 (:func:`split`), contiguous. ``grad`` has
    its shape and any float dtype; it may be used up. ``m`` and ``v`` are tensors of that shape in FP32 (FP64) or BF16,
    or 8-bit. ``step`` counts from 1. Arithmetic is in FP32 (FP64 for FP64). ``scale`` is for clipping, so that no
    gradient has to be written anew: a number, or an FP32 tensor without dimensions on the device, so that the host need
    not know it. Where that is NaN or negative, nothing changes.
    """
    if not isinstance(scale, Tensor) and not scale >= 0:
        return
    if isinstance(m, Tensor) and isinstance(v, Tensor) and m.dtype == v.dtype:
        grad = grad.contiguous()
        whole = (low is None) == (weight.dtype == torch.float32) and (grad.dtype == weight.dtype or low is not None)
        ops = backend(weight, grad, m, v) if whole else None
        if ops is not None:
            bias1, bias2 = 1 - beta1**step, 1 - beta2**step
            ops.adamw_(weight, low, grad, m, v, lr, beta1, beta2, eps, weight_decay, bias1, bias2, scale)
            return
        all_float32 = {x.dtype for x in (weight, grad, m, v)} == {torch.float32}
        if all_float32 and weight.device.type == "cpu" and not isinstance(scale, Tensor) and scale > 0:
            # Several times as fast as the reference's operations one by one. It counts from the step before, and
            # divides by a scale.
            fused_adamw(
                *([weight], [grad], [m], [v], [], [torch.tensor(step - 1.0, dtype=torch.float32, device="cpu")]),
                fused=True,
                grad_scale=None if scale == 1 else torch.tensor(1 / scale, dtype=torch.float32, device="cpu"),
                amsgrad=False,
                maximize=False,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
            )
            return
    adamw_reference_(
        *(weight, low, grad, m, v),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        scale=scale,
    )


def adamw_reference_(
    weight: Tensor,
    low: Tensor | None,
    grad: Tensor,
    m: Moment,
    v: Moment,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    scale: float | Tensor = 1.0,
) -> None:
    """:func:`adamw_` in plain torch."""
    keep1, new1 = if_on(scale, beta1, 1.0), if_on(scale, 1 - beta1, 0.0)
    keep2, new2 = if_on(scale, beta2, 1.0), if_on(scale, 1 - beta2, 0.0)
    keep, rate = if_on(scale, 1 - lr * weight_decay, 1.0), if_on(scale, lr / (1 - beta1**step), 0.0)
    root = math.sqrt(1 - beta2**step)
    flat, flat_low, flat_grad = weight.view(-1), None if low is None else low.view(-1), grad.reshape(-1)
    spaces = workspaces(weight, 4)
    for part in chunks(flat):
        g = read_gradient(flat_grad[part], spaces[0], scale)
        first, second = read_moment(m, part, spaces[1]), read_moment(v, part, spaces[2], root=True)
        first.mul_(keep1).add_(torch.mul(g, new1, out=spaces[3][: len(g)]))
        second.mul_(keep2).add_(g.square_().mul_(new2))
        w = read_weight(flat, flat_low, part, spaces[3])
        update = torch.sqrt(second, out=g).div_(root).add_(eps)
        torch.div(first, update, out=update)
        w.mul_(keep).sub_(update.mul_(rate))
        write_weight(w, flat, flat_low, part)
        write_moment(first, m, part, spaces[1], 2 * step)
        write_moment(second, v, part, spaces[2], 2 * step + 1, root=True)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """√(Σ x²) over all numbers of all ``tensors``: a tensor without dimensions on their device, FP32 (FP64 if they
    are)."""
    if tensors and native.supports(*tensors):
        squares = sum(native.sum_of_squares(tensor) for tensor in tensors)
        return torch.tensor(math.sqrt(squares), dtype=torch.float32, device="cpu")
    norms = []
    for tensor in tensors:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        flat = tensor.reshape(-1)
        # On a CPU, torch would make a whole FP32 copy first.
        whole = tensor.dtype == dtype or tensor.device.type != "cpu"
        parts = [flat] if whole else [flat[part] for part in chunks(flat)]
        norms += [torch.linalg.vector_norm(part, dtype=dtype) for part in parts]
    return torch.linalg.vector_norm(torch.stack(norms))


def workspaces(weight: Tensor, count: int) -> tuple[Tensor, ...]:
    """Room for a chunk each, in the dtype that ``weight`` is worked on in."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    size = min(-(-weight.numel() // BLOCK) * BLOCK, _chunk(weight))
    return torch.empty(count, size, dtype=dtype, device=weight.device).unbind()


def if_on(scale: float | Tensor, on: float, off: float) -> float | Tensor:
    """``on``; but ``off`` where a ``scale`` on the device says that nothing is to change."""
    return torch.where(scale >= 0, on, off) if isinstance(scale, Tensor) else on


def read_gradient(part: Tensor, space: Tensor, scale: float | Tensor) -> Tensor:
    """scale · ``part`` in ``space``."""
    g = space[: len(part)].copy_(part).mul_(scale)
    if isinstance(scale, Tensor):
        g.masked_fill_(~(scale >= 0), 0.0)
    return g


def read_moment(moment: Moment, part: slice, space: Tensor, root: bool = False) -> Tensor:
    """``part`` of a moment, to be worked on: where it lies, or in ``space``. ``root``: 8 bits hold its root."""
    if isinstance(moment, EightBit):
        numbers = moment.read(part, space)
        return numbers.square_() if root else numbers
    numbers = moment.view(-1)[part]
    return numbers if numbers.dtype == space.dtype else space[: len(numbers)].copy_(numbers)


def write_moment(numbers: Tensor, moment: Moment, part: slice, space: Tensor, shift: int, root: bool = False) -> None:
    """Puts back what :func:`read_moment` gave. ``shift``: see :meth:`EightBit.write`."""
    if isinstance(moment, EightBit):
        if root:
            numbers.sqrt_()
        moment.write(space, part, shift, never_zero=root)
    elif moment.dtype != numbers.dtype:
        moment.view(-1)[part].copy_(numbers)


def read_weight(weight: Tensor, low: Tensor | None, part: slice, space: Tensor) -> Tensor:
    """``part`` of a flat weight, to be worked on: in place, or its master in ``space``."""
    if low is None:
        return weight[part]
    master = space[: part.stop - part.start]
    _merge_into(weight[part], low[part], master)
    return master


def write_weight(numbers: Tensor, weight: Tensor, low: Tensor | None, part: slice) -> None:
    """Puts back what :func:`read_weight` gave."""
    if low is not None:
        _split_into(numbers, weight[part], low[part])
