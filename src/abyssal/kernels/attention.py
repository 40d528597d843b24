"""Softmax attention, one call for all: which of torch's ways is the fastest depends on the device and the sizes.

Shapes: B batch, H heads, T queries, S keys, d query/key size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORT = 512


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q kᵀ · scale) v: q [B, H, T, d], k [B, H', S, d], v [B, H', S, V], H' divides H -> [B, H, T, V].

    ``mask`` [B, 1, T, S] bool is True where a query may look; without one, ``causal`` limits query t to keys 0…t.
    """
    if _wants_matrices(q, k, mask, causal):
        return _with_matrices(q, k, v, scale)
    width = v.shape[-1]
    if width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))  # torch's fast CPU kernel wants one size for all three
    grouped = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out[..., :width]


def _wants_matrices(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> bool:
    # The backward pass of torch's flash kernel on CPU takes twice as long as plain products in BF16 for short sequences
    # (docs/notebook.md). Only there: its T × T probabilities are kept, which long sequences can't afford.
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and causal
        and mask is None
        and k.shape[1] == q.shape[1]
        and q.shape[2] <= _SHORT
    )


def _with_matrices(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, heads, length = q.shape[:3]
    limit = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    # One product gives scaled and masked scores; softmax is FP32 inside.
    scores = torch.baddbmm(limit, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(batch, heads, length, -1)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    """The same in plain steps, in the dtype of ``q``."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is None and causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v
