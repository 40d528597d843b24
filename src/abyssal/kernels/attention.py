"""Softmax attention, one call for all: which way is the fastest depends on the device and on what it is for.

Shapes: B batch, H heads, T queries, S keys, d query/key size, V value size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from abyssal.kernels import native

_BLOCK = 256  # queries at a time
_SHORT = 1024  # queries; from some more on torch's kernel is as fast
_SCORES = 2**25  # scores at a time, at most: 64 MB
_STEP = 32  # tiles begin and end at multiples of it: oneDNN prepares a product anew for each shape that it meets
_TILE_COST = 16  # what a tile costs besides its scores, in _STEP² scores (docs/notebook.md)


class Tile(NamedTuple):
    """Some queries of a sequence, and the keys that any of them sees."""

    first: int
    end: int
    """Queries ``first`` to ``end`` - 1."""
    low: int
    """Keys ``low`` to ``end`` - 1."""
    lows: Tensor
    """Each query's first key, counted from ``low``: int32 [end - first]."""


@dataclass(frozen=True)
class Documents:
    """Where documents begin that are packed in sequences; attention stays within each."""

    starts: Tensor
    """[B, T] int64: the place where the document of each token begins."""

    @classmethod
    def of(cls, documents: Tensor) -> Documents:
        """``documents`` int64 [B, T]: a token is in the document of the one before where their numbers are equal."""
        places = torch.arange(documents.shape[1], device=documents.device)
        begins = documents.diff(dim=1, prepend=documents[:, :1]) != 0
        return cls((places * begins).cummax(dim=1).values)

    @property
    def mask(self) -> Tensor:
        """[B, 1, T, T] bool, True where a query may look."""
        places = torch.arange(self.starts.shape[1], device=self.starts.device)
        return ((places >= self.starts.unsqueeze(-1)) & (places <= places.unsqueeze(-1))).unsqueeze(1)

    @cached_property
    def tiles(self) -> list[list[Tile]]:
        """Each sequence's queries in tiles, cut so that few scores are computed that no query needs."""
        return [_tiles(row) for row in self.starts.to(torch.int32)]


def _tiles(starts: Tensor) -> list[Tile]:
    tiles, lows = [], [start // _STEP for start in starts[::_STEP].tolist()]
    for first, end in _cuts(lows):
        low, own = lows[first] * _STEP, starts[first * _STEP : end * _STEP]
        tiles.append(Tile(first * _STEP, first * _STEP + len(own), low, (own - low).clamp_min(0)))
    return tiles


def _cuts(lows: list[int]) -> list[tuple[int, int]]:
    """The cheapest way to cut steps 0 … len(lows) - 1 into tiles, found from the front; step i needs steps from lows[i]
    (which never falls) to itself."""
    cost, begin = [0], [0]
    for end in range(1, len(lows) + 1):
        choices = range(max(0, end - _BLOCK // _STEP), end)
        best = min((cost[i] + (end - i) * (end - lows[i]) + _TILE_COST, i) for i in choices)
        cost.append(best[0])
        begin.append(best[1])
    cuts, end = [], len(lows)
    while end > 0:
        cuts.append((begin[end], end))
        end = begin[end]
    return cuts[::-1]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    documents: Documents | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v: q [B, H, T, d], k [B, H', S, d], v [B, H', S, V], H' divides H -> [B, H, T, V].

    ``mask`` [B, 1, T, S] bool is True where a query may look; without one, ``causal`` limits query t to keys 0…t, and
    ``documents`` to those of its document among them.
    """
    if documents is not None and mask is None and causal:
        if native.supports(q, k, v):
            tiled: Tensor = _InTiles.apply(q, _for_all(k, q), _for_all(v, q), scale, documents.tiles)
            return tiled
        mask, causal = documents.mask, False
    if causal and mask is None and _trains_in_blocks(q, k, v):
        out: Tensor = _CausalBlocks.apply(q, k, v, scale)
        return out
    width = v.shape[-1]
    if width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))  # torch's fast CPU kernel wants one size for all three
    grouped = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out[..., :width]


def _trains_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> bool:
    # For short sequences torch's flash kernel takes twice as long on a CPU in BF16, backward above all
    # (docs/notebook.md).
    return (
        q.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
        and k.shape[:3] == q.shape[:3]
        and q.shape[2] <= _SHORT
        and native.supports(q, k, v)
    )


class _CausalBlocks(torch.autograd.Function):
    """Attention as batched matrix products over blocks of queries, each with the keys it may see.

    What is kept for the backward pass is one number a query, the logarithm of its sum of exponentials; probabilities
    are worked out again from that (as FlashAttention does, arXiv 2205.14135).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.heads = q.shape[:2]
        q, k, v = (x.contiguous().flatten(0, 1) for x in (q, k, v))
        outs, log_sums = [], []
        for start, end in _blocks(q):
            scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2))
            log_sums.append(native.causal_softmax_(scores, scale, start))
            outs.append(torch.bmm(scores, v[:, :end]))
        ctx.save_for_backward(q, k, v, *log_sums)
        ctx.scale = scale
        return _joined(outs).unflatten(0, ctx.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *log_sums = ctx.saved_tensors
        grad = grads[0].contiguous().flatten(0, 1)
        grad_qs: list[Tensor] = []
        grad_k, grad_v = None, None
        for (start, end), log_sum in reversed(list(zip(_blocks(q), log_sums, strict=True))):
            queries, grads_out = q[:, start:end], grad[:, start:end]
            scores = torch.bmm(queries, k[:, :end].transpose(1, 2))
            grad_scores = torch.bmm(grads_out, v[:, :end].transpose(1, 2))
            native.causal_softmax_backward_(scores, grad_scores, ctx.scale, start, log_sum)
            grad_qs.insert(0, torch.bmm(grad_scores, k[:, :end]))
            part_k = torch.bmm(grad_scores.transpose(1, 2), queries)
            part_v = torch.bmm(scores.transpose(1, 2), grads_out)
            # The last block sees all keys and comes first; what the others add is summed in FP32.
            if grad_k is None or grad_v is None:
                several = start > 0
                grad_k, grad_v = (part_k.float(), part_v.float()) if several else (part_k, part_v)
            else:
                grad_k[:, :end] += part_k
                grad_v[:, :end] += part_v
        assert grad_k is not None
        assert grad_v is not None
        return *(g.to(q.dtype).unflatten(0, ctx.heads) for g in (_joined(grad_qs), grad_k, grad_v)), None


class _InTiles(torch.autograd.Function):
    """The same over tiles, within documents."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, tiles: list[list[Tile]]) -> Tensor:
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        log_sums = []
        for row, of_row in enumerate(tiles):
            for first, end, low, lows in of_row:
                scores = torch.bmm(q[row, :, first:end], k[row, :, low:end].transpose(1, 2))
                log_sums.append(native.causal_softmax_(scores, scale, first - low, lows))
                out[row, :, first:end] = torch.bmm(scores, v[row, :, low:end])
        ctx.save_for_backward(q, k, v, *log_sums)
        ctx.scale, ctx.tiles = scale, tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *log_sums = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        for row, of_row in enumerate(ctx.tiles):
            # A key may be in several tiles: what they add is summed in FP32.
            sum_k, sum_v = (torch.zeros_like(x[row], dtype=torch.float32) for x in (k, v))
            for first, end, low, lows in of_row:
                queries, grads_out = (x[row, :, first:end].contiguous() for x in (q, grads[0]))
                keys = k[row, :, low:end].contiguous()
                scores = torch.bmm(queries, keys.transpose(1, 2))
                grad_scores = torch.bmm(grads_out, v[row, :, low:end].transpose(1, 2))
                native.causal_softmax_backward_(scores, grad_scores, ctx.scale, first - low, log_sums.pop(0), lows)
                grad_q[row, :, first:end] = torch.bmm(grad_scores, keys)
                sum_k[:, low:end] += torch.bmm(grad_scores.transpose(1, 2), queries)
                sum_v[:, low:end] += torch.bmm(scores.transpose(1, 2), grads_out)
            grad_k[row], grad_v[row] = sum_k, sum_v
        return grad_q, grad_k, grad_v, None, None


def _for_all(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values of grouped heads, a copy for each head of ``q``."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _blocks(q: Tensor) -> list[tuple[int, int]]:
    heads, length = q.shape[:2]
    size = max(32, min(_BLOCK, _SCORES // max(heads * length, 1) // 32 * 32))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    documents: Documents | None = None,
) -> Tensor:
    """The same in plain steps, in the dtype of ``q``."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is None and causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        if documents is not None:
            mask = mask & (documents.starts.unsqueeze(-1) == documents.starts.unsqueeze(-2)).unsqueeze(1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v
