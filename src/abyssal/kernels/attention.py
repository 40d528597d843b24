"""Softmax attention, one call for all: which way is the fastest depends on the device and on what it is for.

Shapes: B batch, H heads, T queries, S keys, d query/key size, V value size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from abyssal.kernels import native

_BLOCK = 256  # queries at a time
_SHORT = 1024  # queries; from some more on torch's kernel is as fast
_SCORES = 2**25  # scores at a time, at most: 64 MB


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q kᵀ · scale) v: q [B, H, T, d], k [B, H', S, d], v [B, H', S, V], H' divides H -> [B, H, T, V].

    ``mask`` [B, 1, T, S] bool is True where a query may look; without one, ``causal`` limits query t to keys 0…t.
    """
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


def _blocks(q: Tensor) -> list[tuple[int, int]]:
    heads, length = q.shape[:2]
    size = max(32, min(_BLOCK, _SCORES // max(heads * length, 1) // 32 * 32))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    """The same in plain steps, in the dtype of ``q``."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is None and causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v
