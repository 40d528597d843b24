"""Decoding's operations on a GPU, in Triton: what :mod:`abyssal.kernels.decode` describes, with the same signatures.

They are for tensors that :func:`abyssal.kernels.gpu.supports` takes, whose shapes fit together (kernels/decode.py sees
to that), where no gradient is wanted; a pool or weights may have the other of the two dtypes. Pools and weights should
be contiguous: what is not is copied.

Nothing here waits for the device, and what is launched depends on shapes alone, so all of it can be captured in a CUDA
graph. That is why wrong numbers cannot raise: an expert that is not there makes its token NaN, a page that is not in
the pool or a length beyond the block table makes its sequence NaN, a negative length counts as 0. None is read.

All of it is limited by reading weights, and the cache's latents, once:

- Attention reads a block of keys once for 16 heads (tensor cores take no fewer rows). Latent attention's values are the
  keys' first columns and are not read again. Where sequences and heads are too few to fill the card, each sequence is
  cut into splits, and a second kernel joins what they give (flash-decoding). How many follows from shapes, where they
  lie from the sequence's length, on the device: a block table that is wider than needed costs next to nothing.
- Experts are not sorted. A first kernel computes silu(gate) · up · weight of each assignment, a second one the sum over
  a token's experts; each program reads its rows of a matrix from end to end. Sums are in FP32, in a fixed order.

Shapes as in kernels/decode.py.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from abyssal.kernels.gpu import _blocks, _multiprocessors, _power_of_two

_SPLIT = 64  # tokens that a split has at least: less, and writing its sums would cost more than reading its keys
_ROWS = 4  # of a matrix that a program reads
MOST_ROWS = 8  # of x that :func:`linear` takes


@functools.cache
def _kernels() -> ModuleType:
    from abyssal.kernels import decode_gpu_kernels  # not before it is needed: triton is not everywhere

    return decode_gpu_kernels


def latent_attention(
    q: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor, scale: float, latent: int
) -> Tensor:
    """:func:`abyssal.kernels.decode.latent_attention`."""
    return _attention(q, pages.unsqueeze(2), None, block_table, lengths, scale, latent)


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """:func:`abyssal.kernels.decode.paged_attention`."""
    return _attention(q, keys, values, block_table, lengths, scale, values.shape[-1])


def _attention(
    q: Tensor, keys: Tensor, values: Tensor | None, table: Tensor, lengths: Tensor, scale: float, value: int
) -> Tensor:
    """``keys`` [P, page, H', d]; without ``values`` they are its first ``value`` columns."""
    q, keys, table, lengths = q.contiguous(), keys.contiguous(), table.contiguous(), lengths.contiguous()
    values = None if values is None else values.contiguous()
    (n, heads, size), (pages, page, shared, _) = q.shape, keys.shape
    out = q.new_empty(n, heads, value)
    if out.numel() == 0:
        return out
    group = heads // shared
    cut = value if values is None else size
    first, rest = (max(_power_of_two(columns), 16) if columns else 0 for columns in (cut, size - cut))
    columns = max(_power_of_two(value), 16)
    # Blocks of keys and values are at most 37 KB (there is another under way), since some cards have 99 KB for it all.
    block = 32 * 1024 // ((first + rest + (0 if values is None else columns)) * q.element_size())
    shape = {"TILE": 16, "KEYS": min(max(_power_of_two(block + 1) // 2, 16), 64), "num_warps": 4, "num_stages": 3}
    programs = shared * _blocks(group, shape["TILE"]) * n
    splits = _splits(programs, table.shape[1] * page, q.device)
    parts = sums = None
    if splits > 1:
        parts = torch.empty(n, heads, splits, value, dtype=torch.float32, device=q.device)
        sums = torch.empty(n, heads, splits, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _kernels().attend[(programs // n, n, splits)](
            *(q, keys, values, table, lengths, out if parts is None else parts, sums, scale, pages, table.shape[1]),
            *(page, shared, group, size, cut, value, first, rest, columns),
            **shape,
        )
        if parts is not None:
            wide = min(columns, 128)
            _kernels().join[(n * heads, _blocks(value, wide))](
                parts, sums, out, value, splits, min(splits, 16), wide, num_warps=4
            )
    return out


def _splits(programs: int, room: int, device: torch.device) -> int:
    """How many pieces each sequence is cut into: as many as keep two programs a multiprocessor busy, as long as the
    longest sequence there is ``room`` for has enough tokens; a power of two, so that few kernels are compiled."""
    most = max(min(2 * _multiprocessors(device) // programs, room // _SPLIT), 1)
    return _power_of_two(most + 1) // 2


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Routed experts of few rows: ``x`` [N, D], ``indices`` [N, K] integers, ``weights`` [N, K], ``gate_up``
    [E, 2F, D], ``down`` [E, D, F] -> [N, D], in the dtype of ``x``."""
    x, indices, weights, gate_up, down = (t.contiguous() for t in (x, indices, weights, gate_up, down))
    (n, k), (count, inputs, width) = indices.shape, down.shape
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    hidden = torch.empty(n * k, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if hidden.numel():
            _kernels().experts_up[(n * k, _blocks(width, _ROWS))](
                x, indices, weights, gate_up, hidden, count, k, inputs, width, **_tile(inputs)
            )
        _kernels().experts_down[(n, _blocks(inputs, _ROWS))](
            hidden, indices, down, out, count, k, inputs, width, **_tile(width)
        )
    return out


def _tile(width: int, most: int = 1024) -> dict[str, int]:
    """A tile that walks along rows of ``width``, so wide that the least of its last step is empty."""
    sizes = [size for size in (1024, 512, 256) if size <= min(most, width)] or [max(_power_of_two(width), 16)]
    return {"ROWS": _ROWS, "COLUMNS": min(sizes, key=lambda size: _blocks(width, size) * size), "num_warps": 4}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [N, I] times ``weight`` [O, I] for N up to ``MOST_ROWS``: [N, O], in the dtype of ``x``. Each program reads
    its rows of the matrix once and multiplies them by all rows of ``x``."""
    x, weight = x.contiguous(), weight.contiguous()
    rows, (outputs, inputs) = x.shape[0], weight.shape
    if rows > MOST_ROWS:
        raise ValueError(f"linear: {rows} rows; expected at most {MOST_ROWS}")
    out = x.new_empty(rows, outputs)
    if out.numel():
        most = _power_of_two(rows)
        with torch.cuda.device_of(x):
            _kernels().linear[(_blocks(outputs, _ROWS),)](
                x, weight, out, rows, outputs, inputs, most, **_tile(inputs, 2048 // most)
            )
    return out
