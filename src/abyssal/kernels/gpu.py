"""The hot operations on a GPU, in Triton: the same raw functions as :mod:`abyssal.kernels.native` has for a CPU.

Triton comes with PyTorch's CUDA builds. Nothing depends on it: :func:`supports` says where it works, and the files
beside this one run plain PyTorch elsewhere. These functions take and return tensors and know no gradients; none of them
waits for the device. With TRITON_INTERPRET=1 set before triton is imported they run on a CPU, for tests.

None of them does enough arithmetic to be limited by it: each is as fast as memory can bring its numbers, so what counts
is the bytes that move, each number once. With 2 bytes a number (BF16), read + written:

- ``swiglu``: 4 + 2 a number of its output; unfused, silu and product move 6 + 4, and the routing weight 2 + 2 more.
  ``swiglu_backward``: 6 + 4, the routing weight's gradient included.
- ``gather_rows``: 2 + 2 a number of the buffer; since K rows of it hold the same token, a K-th of the reading comes
  from memory and the rest from the cache, where the tokens fit there.
- ``sum_rows``: 2K + 2 a number of its output: K rows are read where they lie, and no copy of them is made.
- ``rms_norm``: 2 + 2 (4 + 2 for an FP32 residual stream); ``rms_norm_backward``: 4 + 2 (6 + 4). Rows stay in registers
  between the sum and its use.
- ``cross_entropy_``: 4 + 2 a logit (it reads each row twice; a row may still be in the cache the second time: 2 + 2).
- ``adamw_``: 14 + 12 a parameter with BF16 weight, ``low`` and gradient, FP32 moments (10 + 8 with BF16 moments); FP32
  throughout: 16 + 12.

Sums over rows (the norm's weight gradient) go through one partial sum a program in a fixed order, never through atomic
additions: the same numbers come out every time on the same card.

Shapes: P rows in expert order, N tokens, K experts a token, E experts, D hidden, F expert width, V vocabulary.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

_TILE = 4096  # numbers a program holds at a time; 32 for each of its 128 threads
_DTYPES = (torch.float32, torch.bfloat16)


def supports(*tensors: Tensor) -> bool:
    """Whether the functions here take these tensors: FP32 or BF16, all on a GPU where Triton can build and launch a
    kernel (anywhere, under Triton's interpreter)."""
    return not torch.compiler.is_compiling() and all(
        type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype in _DTYPES
        and (x.device.type == "cuda" or _interpreted())
        and _works(x.device)
        for x in tensors
    )


@functools.cache
def _interpreted() -> bool:
    # Triton is asked only where its own switch is set: importing it takes a while, for nothing on a CPU.
    try:
        return os.environ.get("TRITON_INTERPRET") == "1" and bool(_kernels().INTERPRETED)
    except ImportError:
        return False


@functools.cache
def _works(device: torch.device) -> bool:
    """Found out by doing it once, since card, driver, triton and a C compiler for its launcher must all be there."""
    try:
        gather_rows(torch.zeros(1, 16, device=device), torch.zeros(1, dtype=torch.int32, device=device), 1)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # ImportError, OSError, RuntimeError, and Triton's own, which share no base class
        return False
    return True


@functools.cache
def _kernels() -> ModuleType:
    from abyssal.kernels import gpu_kernels  # not before it is needed: triton is not everywhere

    return gpu_kernels


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _lines(x: Tensor) -> Tensor:
    """``x`` [rows, width] with numbers of a row side by side; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(width: int) -> dict[str, int]:
    """A tile that walks along the rows."""
    columns = min(max(_power_of_two(width), 16), 1024)
    return {"ROWS": _TILE // columns, "COLUMNS": columns, "num_warps": 4}


def _whole_rows(width: int) -> dict[str, int]:
    """A tile of whole rows."""
    columns = max(_power_of_two(width), 16)
    rows = min(max(_TILE // columns, 1), 64)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(max(rows * columns // 1024, 4), 16)}


def swiglu(gate_up: Tensor, row_weight: Tensor | None) -> Tensor:
    """silu(gate) · up · row_weight: [P, 2F], [P] FP32 -> [P, F], in the dtype of ``gate_up``."""
    gate_up = _lines(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    tile = _tile(width)
    with torch.cuda.device_of(gate_up):
        _kernels().swiglu[(_blocks(rows, tile["ROWS"]),)](
            gate_up, row_weight, out, rows, gate_up.stride(0), width, **tile
        )
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, row_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of [P, 2F] and [P] FP32 for ``grad`` [P, F]."""
    grad, gate_up = _lines(grad), _lines(gate_up)
    rows, width = grad.shape
    out = gate_up.new_empty(gate_up.shape)
    grad_weight = torch.empty_like(row_weight) if row_weight is not None else None
    tile = _tile(width)
    with torch.cuda.device_of(grad):
        _kernels().swiglu_backward[(_blocks(rows, tile["ROWS"]),)](
            grad, gate_up, row_weight, out, grad_weight, rows, grad.stride(0), gate_up.stride(0), width, **tile
        )
    return out, grad_weight


def gather_rows(x: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Row p is ``x``[assignment[p] // k], zeros where that is negative: [N, D], [P] int32 -> [P, D]."""
    x = _lines(x)
    rows, width = assignment.shape[0], x.shape[1]
    out = x.new_empty(rows, width)
    tile = _tile(width)
    with torch.cuda.device_of(x):
        _kernels().gather_rows[(_blocks(rows, tile["ROWS"]),)](x, assignment, out, rows, x.stride(0), k, width, **tile)
    return out


def sum_rows(rows: Tensor, slot: Tensor, k: int) -> Tensor:
    """out[n] = Σ rows[slot[n·k …]], added in FP32: [P, D], [N·K] int32 -> [N, D], in the dtype of ``rows``."""
    rows = _lines(rows)
    tokens, width = slot.shape[0] // k, rows.shape[1]
    out = rows.new_empty(tokens, width)
    tile = _tile(width)
    with torch.cuda.device_of(rows):
        _kernels().sum_rows[(_blocks(tokens, tile["ROWS"]),)](rows, slot, out, tokens, rows.stride(0), k, width, **tile)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / rms(x) · weight as ``dtype`` [N, D], and 1 / rms(x) [N] FP32; ``weight`` [D] FP32."""
    x = _lines(x)
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = _whole_rows(width)
    with torch.cuda.device_of(x):
        _kernels().rms_norm[(_blocks(rows, tile["ROWS"]),)](x, weight, out, rstd, rows, x.stride(0), eps, width, **tile)
    return out, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x``, in its dtype, and of ``weight`` [D] FP32."""
    grad, x = _lines(grad), _lines(x)
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    tile = _whole_rows(width)
    # Tiles a program: so many that there are two to four programs a multiprocessor; a power of two, so that few kernels
    # are compiled.
    tiles = _blocks(rows, tile["ROWS"])
    steps = _power_of_two(_blocks(tiles, 4 * _multiprocessors(x.device)))
    programs = _blocks(tiles, steps)
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _kernels().rms_norm_backward[(programs,)](
            grad, x, weight, rstd, out, partial, rows, grad.stride(0), x.stride(0), width, steps, **tile
        )
    return out, partial.sum(0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def cross_entropy_(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Σ −log softmax[target] in nats, FP32; ``logits`` [n, V] (contiguous) become its gradient. ``targets`` [n] int64.

    A target that is neither ``ignored`` nor a token makes the sum NaN: raising would have to wait for the device.
    """
    rows, vocabulary = logits.shape
    assert logits.is_contiguous()
    nats = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(max(_power_of_two(vocabulary), 16), _TILE)
    with torch.cuda.device_of(logits):
        _kernels().cross_entropy[(rows,)](logits, targets, nats, ignored, vocabulary, BLOCK=block, num_warps=8)
    return nats.sum()


def adamw_(
    weight: Tensor,
    low: Tensor | None,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias1: float,
    bias2: float,
    scale: float | Tensor,
) -> None:
    """One AdamW update in place (arXiv 1711.05101), in FP32 whatever is stored; ``scale`` multiplies the gradient.

    ``weight`` is FP32, or BF16 with the rest of its FP32 number in ``low`` (int16): its bits are (weight << 16) + low.
    ``m`` and ``v`` are FP32 or BF16. ``scale`` may be a number or an FP32 tensor without dimensions on the device, so
    that clipping needs no word from it; where it is negative or NaN nothing changes.
    """
    assert all(x is None or x.is_contiguous() for x in (weight, low, m, v))
    grad = grad.contiguous()
    count = weight.numel()
    on_device = isinstance(scale, Tensor)
    with torch.cuda.device_of(weight):
        _kernels().adamw[(_blocks(count, _TILE),)](
            *(weight, low, grad, m, v, scale if on_device else None, 0.0 if on_device else scale, count),
            *(1 - lr * weight_decay, lr / bias1, beta1, 1 - beta1, beta2, 1 - beta2, bias2**-0.5, eps),
            BLOCK=_TILE,
            num_warps=8,
        )
