"""Calibration: pieces of text, and what a dense attention layer does with them.

Everything that the conversion weighs by comes from here: the second moment of the layer's input, how far its heads
look, and how much an error in a head's attention scores would change its output.

Shapes: n windows, T time, D hidden, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.config import RopeConfig
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.kernels.heads import rotate
from abyssal.model.attention import Context, MultiHeadAttention
from abyssal.model.rotary import rotary_tables

_PER_DOCUMENT = 4  # windows of one document at first, so that a few long books are not all there is


@dataclass(frozen=True)
class Pieces:
    """Token ids: ``calibration`` [n, T] to convert by, ``held_out`` [m, T] to judge by, from later in the text."""

    calibration: Tensor
    held_out: Tensor


def pieces(texts: Iterable[str], tokenizer: Tokenizer, *, windows: int, held_out: int, length: int) -> Pieces:
    """The first ``windows`` + ``held_out`` windows of ``length`` tokens of ``texts``, four of a document at most;
    documents shorter than a window are joined.

    BOS stands before a document where the tokenizer puts it there. Where that does not give enough, the documents'
    later windows follow. Raises UserError for text that is too short.
    """
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    wanted = windows + held_out
    first: list[list[int]] = []
    later: list[list[int]] = []
    short: list[int] = []
    for text in texts:
        ids = short + bos
        for piece in tokenizer.pieces(text):
            ids += tokenizer.encode(piece)
            if len(ids) >= wanted * length:
                break
        short = ids if len(ids) < length else []
        cut = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        first += cut[:_PER_DOCUMENT]
        if len(later) < wanted:
            later += cut[_PER_DOCUMENT:]
        if len(first) >= wanted:
            break
    rows = (first + later)[:wanted]
    if len(rows) < wanted:
        raise UserError(
            f"calibration: the text has {len(rows)} windows of {length} tokens; expected at least {wanted} "
            f"({windows} to convert by and {held_out} held out)"
        )
    return Pieces(torch.tensor(rows[:windows]), torch.tensor(rows[windows:]))


@dataclass(frozen=True)
class Statistics:
    """What a layer's attention does on calibration text, in FP64."""

    moment: Tensor
    """E[x xᵀ] of the layer's input, [D, D]."""
    distances: Tensor
    """[H, T]: the share of a head's attention that goes so many tokens back. The text's first token is left out:
    attention rests on it where a head has nothing to look at, wherever it lies."""
    spread: Tensor
    """[H]: E Σ_n p_n |W^O (v_n − o)|², by which an error in a head's scores becomes an error in its output."""
    received: Tensor
    """[n, T]: the attention that each token receives, summed over heads and queries."""


def causal_context(theta: float, rotary_dim: int, length: int, device: torch.device) -> Context:
    """What attention needs for windows of ``length`` tokens that begin at position 0."""
    positions = torch.arange(length, device=device).unsqueeze(0)
    tables = rotary_tables(RopeConfig(theta=theta), rotary_dim, positions, torch.float32)
    return Context(tables, 0, None, True)


@torch.no_grad()
def statistics(attention: MultiHeadAttention, x: Tensor, context: Context) -> Statistics:
    """Looks at a dense layer at its inputs ``x`` [n, T, D]."""
    a = attention.attention
    heads, size, length = a.num_attention_heads, a.head_dim, x.shape[1]
    group = heads // a.num_key_value_heads
    flat = x.flatten(0, 1)
    moment = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64, device=x.device)
    for rows in flat.split(4096):
        moment += rows.double().T @ rows.double()
    w_o = attention.o_proj.weight.float().unflatten(1, (heads, size))
    moments_o = torch.einsum("Dhd,Dhe->hde", w_o, w_o)
    distances = torch.zeros(heads, length, dtype=torch.float64, device=x.device)
    spread = torch.zeros(heads, dtype=torch.float64, device=x.device)
    received = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
    hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    back = torch.arange(length, device=x.device)
    back = (back.unsqueeze(1) - back).clamp_min(0).flatten()
    for index, window in enumerate(x):
        q, k, v = (
            projection(window.unsqueeze(0)).unflatten(-1, (-1, size))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (rotate(y, context.rope, attention.interleaved) for y in (q, k))
        q, k, v = (y[0].transpose(0, 1).float() for y in (q, k, v))
        k, v = (y.repeat_interleave(group, dim=0) for y in (k, v))
        p = (q @ k.transpose(1, 2) * size**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        o = p @ v
        energy = (torch.einsum("htd,hde->hte", v, moments_o) * v).sum(-1)
        mean = (torch.einsum("htd,hde->hte", o, moments_o) * o).sum(-1)
        spread += ((p @ energy.unsqueeze(-1)).squeeze(-1) - mean).clamp_min(0).mean(-1).double()
        received[index] = p.sum((0, 1))
        p[:, :, 0] = 0
        for head in range(heads):
            distances[head].index_add_(0, back, p[head].flatten().double())
    total = distances.sum(-1, keepdim=True)
    nearest = torch.zeros_like(distances)
    nearest[:, 0] = 1
    distances = torch.where(total > 0, distances / total.clamp_min(1e-12), nearest)
    return Statistics(moment / len(flat), distances, spread / len(x), received)
