"""Attention: MLA with both of its paths, and plain multi-head attention with grouped key/value heads.

Multi-head latent attention (V2 paper §2.1.2, V3 paper §2.1.1; the numbers are V3's equations). For token t with hidden
vector h_t:

    c^KV_t = W^DKV h_t                    (1)  joint latent of keys and values; RMSNorm follows; this is cached …
    k^R_t  = RoPE(W^KR h_t)               (3)  … with one rotary key, shared by all heads
    k^C_t  = W^UK c^KV_t                  (2)  each head's key without position
    v^C_t  = W^UV c^KV_t                  (5)
    k_t,i  = [k^C_t,i ; k^R_t]            (4)
    c^Q_t  = W^DQ h_t                     (6)  left out where q_lora_rank is None
    q^C_t  = W^UQ c^Q_t                   (7)
    q^R_t  = RoPE(W^QR c^Q_t)             (8)
    q_t,i  = [q^C_t,i ; q^R_t,i]          (9)
    o_t,i  = Σ_j softmax_j(q_t,i · k_j,i / √(d_h + d_h^R)) v^C_j,i     (10)
    u_t    = W^O [o_t,1 ; … ; o_t,n]      (11)

The checkpoint stacks W^DKV and W^KR in kv_a_proj_with_mqa, W^UQ and W^QR in q_b_proj, W^UK and W^UV in kv_b_proj,
head by head. Two ways lead to (10). *Expanded*: every head's k and v are made from the latents, then ordinary
attention; cheapest when many queries share the work (training, prefill). *Absorbed*: since q^C · (W^UK c) =
(W^UKᵀ q^C) · c, the query is carried into the latent space, attention runs over the cache as it lies, and W^UV is
applied to the result; cheapest for decoding. Both are exact; :meth:`LatentAttention.absorb_pays` chooses by counting.

Shapes: B batch, T queries, S keys, H heads, D hidden, C latent, R rotary dims, N nope dims, V value dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from abyssal.config import MHAConfig, MLAConfig, ModelConfig
from abyssal.kernels import decode
from abyssal.kernels.attention import Documents, attention
from abyssal.kernels.heads import keys_values, rotate, turn_heads, turn_rows
from abyssal.model.cache import LayerCache
from abyssal.model.fp8 import dense_weight
from abyssal.model.layers import Linear, RMSNorm
from abyssal.model.paged import PagedLayer
from abyssal.model.rotary import attention_mscale

# The norms inside the low-rank projections have this eps in the published code, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class SequencePart(Protocol):
    """Some positions of sequences whose others are worked out elsewhere."""

    @property
    def places(self) -> Tensor:
        """Which positions, int64 [T'], in ascending order."""

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The same as (first, end) of positions without a gap."""

    def whole(self, x: Tensor) -> Tensor:
        """``x`` [B, T', W] of these positions and that of all others, in order: [B, T, W]."""

    def to(self, device: torch.device | str) -> SequencePart: ...


@dataclass(frozen=True)
class Context:
    """What every layer's attention needs to know about the tokens at hand, worked out once a forward pass."""

    rope: tuple[Tensor, Tensor]
    """Cosine and sine of the queries' positions, [B, T, 1, R/2]."""
    start: int
    """Tokens already in the cache."""
    mask: Tensor | None
    """[B, 1, T, S] bool, True where a query may look; None: all it needs is ``causal``."""
    causal: bool
    """With no mask: whether query t is limited to keys 0…t (else it sees all keys, as a single new token does)."""
    key_rope: tuple[Tensor, Tensor] | None = None
    """Cosine and sine of all keys' positions, [B, S, 1, R/2]; only where a study variant caches keys unturned."""
    pieces: tuple[Context, ...] = ()
    """For a ragged pass: what there is to know about each of its pieces (:class:`abyssal.model.paged.Ragged`); for a
    part of sequences about each of its runs."""
    documents: Documents | None = None
    """Of packed sequences, without a mask: the documents within which attention stays."""
    part: SequencePart | None = None
    """Which positions of longer sequences the tokens are; None: all."""


def build_mask(valid: Tensor | None, start: int, queries: int, device: torch.device) -> tuple[Tensor | None, bool]:
    """Mask and causal flag for ``queries`` new tokens after ``start`` cached ones; ``valid`` [B, S]: real keys."""
    if valid is None and (start == 0 or queries == 1):
        return None, start == 0 and queries > 1
    keys = torch.arange(start + queries, device=device)
    rows = torch.arange(start, start + queries, device=device).unsqueeze(1)
    mask = (keys <= rows).unsqueeze(0)
    if valid is not None:
        # A padding query sees only itself: a row without any key would come out as NaN.
        mask = (mask & valid.unsqueeze(1)) | (keys == rows)
    return mask.unsqueeze(1), False


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, context: Context) -> Tensor:
    """Softmax attention, eq. (10): q [B, H, T, d], k [B, H', S, d], v [B, H', S, V] -> [B, T, H·V]; H' divides H."""
    out = attention(q, k, v, scale, context.mask, context.causal, context.documents)
    return out.transpose(1, 2).flatten(2)


def attend_part(q: Tensor, k: Tensor, v: Tensor, scale: float, context: Context) -> Tensor:
    """:func:`attend` for the queries of a part of sequences, ``q`` [B, H, T', d], over whole sequences' keys and
    values."""
    assert context.part is not None
    outs, begin = [], 0
    for (first, end), within in zip(context.part.runs, context.pieces, strict=True):
        own = q[:, :, begin : begin + end - first]
        outs.append(attend(own, k[:, :, :end], v[:, :, :end], scale, within))
        begin += end - first
    return side_by_side(outs)


def side_by_side(outs: list[Tensor]) -> Tensor:
    """[B, ., W] each, one after the other; a single one is not copied."""
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


class MultiHeadAttention(nn.Module):
    """Multi-head attention with rotary position embedding (DeepSeekMoE-16B), [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig, attention: MHAConfig) -> None:
        super().__init__()
        a = self.attention = attention
        self.interleaved = config.rope.layout == "interleaved"
        hidden, kv = config.hidden_size, a.num_key_value_heads * a.head_dim
        self.q_proj = Linear(hidden, a.num_attention_heads * a.head_dim, bias=a.bias)
        self.k_proj = Linear(hidden, kv, bias=a.bias)
        self.v_proj = Linear(hidden, kv, bias=a.bias)
        self.o_proj = Linear(a.num_attention_heads * a.head_dim, hidden, bias=a.bias)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | PagedLayer | None = None) -> Tensor:
        split = (-1, self.attention.head_dim)
        q, k, v = (proj(x).unflatten(-1, split) for proj in (self.q_proj, self.k_proj, self.v_proj))
        scale = self.attention.head_dim**-0.5
        if isinstance(cache, PagedLayer):
            q, k = (turn_rows(y[0], context.rope, self.interleaved) for y in (q, k))
            cache.write(k, v[0])
            return self.o_proj(self._ragged(q.unsqueeze(0), cache, context, scale))
        q, k = (rotate(y, context.rope, self.interleaved) for y in (q, k))
        if context.part is not None:
            k, v = (context.part.whole(y.flatten(2)).unflatten(-1, split) for y in (k, v))
            return self.o_proj(attend_part(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, context))
        if cache is not None:
            k, v = cache.append(context.start, k, v)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, context)
        return self.o_proj(out)

    def _ragged(self, q: Tensor, cache: PagedLayer, context: Context, scale: float) -> Tensor:
        """Rows of many sequences: ``q`` [1, N, H, d] -> [1, N, H·V]."""
        outs, ragged = [], cache.ragged
        if (rows := ragged.singles) > 0:
            keys, values = cache.pools
            one = decode.paged_attention(q[0, :rows], keys, values, ragged.tables, ragged.lengths, scale)
            outs.append(one.flatten(1).unsqueeze(0))
        for piece, within in zip(cache.ragged.pieces, context.pieces, strict=True):
            k, v = (y.to(q.dtype).transpose(1, 2) for y in cache.past(piece))
            outs.append(attend(q[:, piece.start : piece.end].transpose(1, 2), k, v, scale, within))
        return side_by_side(outs)


class Queries(nn.Module):
    """Queries of MLA, eq. (6)-(9); a base class so that the names stay those of the checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a = config.attention
        assert not isinstance(a, MHAConfig)
        self.heads, self.nope, self.rope_dim, self.v_dim = (
            a.num_attention_heads,
            a.qk_nope_head_dim,
            a.qk_rope_head_dim,
            a.v_head_dim,
        )
        self.interleaved = config.rope.layout == "interleaved"
        self.scale = a.qk_head_dim**-0.5 * attention_mscale(config.rope)
        if a.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, self.heads * a.qk_head_dim, bias=False)
        else:
            self.q_a_proj = Linear(config.hidden_size, a.q_lora_rank, bias=a.bias)
            self.q_a_layernorm = RMSNorm(a.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(a.q_lora_rank, self.heads * a.qk_head_dim, bias=False)
        self.compressed = a.q_lora_rank is not None

    def queries(self, x: Tensor) -> Tensor:
        """[q^C ; q^R] of every head, the latter not turned yet: [B, T, D] -> [B, T, H, N + R]."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compressed else self.q_proj(x)
        return q.unflatten(-1, (self.heads, -1))


class LatentAttention(Queries):
    """Multi-head latent attention, [B, T, D] -> [B, T, D]; see the module's docstring for the equations."""

    def __init__(self, config: ModelConfig, attention: MLAConfig) -> None:
        super().__init__(config)
        self.latent = attention.kv_lora_rank
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, self.latent + self.rope_dim, bias=attention.bias)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = Linear(self.heads * self.v_dim, config.hidden_size, bias=attention.bias)

    def absorb_pays(self, queries: int) -> bool:
        """Whether the absorbed path multiplies less for ``queries`` new tokens over a cache of latents.

        A key and head costs the expanded path C·(N + V) once to make it, and N + R + V for each query to use it; the
        absorbed path makes nothing and uses it for 2C + R. (V3: up to 170 new tokens.)
        """
        return queries * (2 * self.latent - self.nope - self.v_dim) < self.latent * (self.nope + self.v_dim)

    def forward(
        self,
        x: Tensor,
        context: Context,
        cache: LayerCache | PagedLayer | None = None,
        absorb: bool | None = None,
    ) -> Tensor:
        """``absorb`` chooses the path; None: expanded without a cache, else whichever multiplies less."""
        q, kv = self.queries(x), self.kv_a_proj_with_mqa(x)
        if isinstance(cache, PagedLayer):
            return self.o_proj(self._ragged(q, kv, cache, context))
        q = turn_heads(q, context.rope, self.interleaved)  # (8)
        latent, k_rope = kv.split((self.latent, self.rope_dim), dim=-1)
        latent = self.kv_a_layernorm(latent)  # (1)
        k_rope = turn_heads(k_rope.unsqueeze(2), context.rope, self.interleaved).squeeze(1)  # (3)
        if context.part is not None:
            # Latents and rotary keys are all that has to be told of a token: C + R numbers for all heads.
            whole = context.part.whole(torch.cat((latent, k_rope), dim=-1))
            k, v = self._keys_values(whole[..., : self.latent], whole[..., self.latent :])
            out = attend_part(q, k, v, self.scale, context)
        elif cache is None:
            if absorb:
                out = self._absorbed(q, torch.cat((latent, k_rope), dim=-1), context)
            else:
                out = attend(q, *self._keys_values(latent, k_rope), self.scale, context)
        elif cache.expanded:
            new = (y.transpose(1, 2) for y in self._keys_values(latent, k_rope))
            k, v = (y.transpose(1, 2) for y in cache.append(context.start, *new))
            out = attend(q, k, v, self.scale, context)
        else:
            (past,) = cache.append(context.start, torch.cat((latent, k_rope), dim=-1))
            out = self._over(past, q, context, absorb)
        return self.o_proj(out)  # (11)

    def _over(self, past: Tensor, q: Tensor, context: Context, absorb: bool | None = None) -> Tensor:
        """Attention of ``q`` [B, H, T, N + R] over cached latents ``past`` [B, S, C + R] -> [B, T, H·V]."""
        absorb = self.absorb_pays(q.shape[2]) if absorb is None else absorb
        if absorb:
            return self._absorbed(q, past, context)
        k, v = self._keys_values(past[..., : self.latent].to(q.dtype), past[..., self.latent :])
        return attend(q, k, v, self.scale, context)

    def _ragged(self, q: Tensor, kv: Tensor, cache: PagedLayer, context: Context) -> Tensor:
        """Rows of many sequences: ``q`` [1, N, H, N + R] and ``kv`` [1, N, C + R] as projected -> [1, N, H·V]."""
        (pool,), ragged, (cos, sin) = cache.pools, cache.ragged, context.rope
        weight, eps = self.kv_a_layernorm.weight, self.kv_a_layernorm.eps
        decode.write_latents(kv[0], weight, eps, context.rope, self.interleaved, ragged.slots, pool)
        outs = []
        if (rows := ragged.singles) > 0:
            alone = turn_rows(q[0, :rows], (cos[:, :rows], sin[:, :rows]), self.interleaved)
            outs.append(self._by_row(alone, cache))
        for piece, within in zip(ragged.pieces, context.pieces, strict=True):
            (past,) = cache.past(piece)
            turned = turn_heads(q[:, piece.start : piece.end], within.rope, self.interleaved)
            outs.append(self._over(past, turned, within))
        return side_by_side(outs)

    def _by_row(self, q: Tensor, cache: PagedLayer) -> Tensor:
        """Rows that attend each by itself, absorbed, to the pages as they lie: ``q`` [n, H, N + R] -> [1, n, H·V]."""
        w, (pool,), ragged = dense_weight(self.kv_b_proj, q.dtype), cache.pools, cache.ragged
        q = decode.absorb(q, w, self.nope, self.v_dim)
        o = decode.latent_attention(q, pool, ragged.tables, ragged.lengths, self.scale, self.latent)
        return decode.expand(o, w, self.nope, self.v_dim).flatten(1).unsqueeze(0)

    def _keys_values(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's key [B, H, S, N + R] and value [B, H, S, V] from latents, eq. (2), (4), (5)."""
        return keys_values(self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)), k_rope, self.nope)

    def _absorbed(self, q: Tensor, past: Tensor, context: Context) -> Tensor:
        """``past`` [B, S, C + R]: latents and rotary keys side by side, as they are cached."""
        w = dense_weight(self.kv_b_proj, q.dtype).unflatten(0, (self.heads, -1))
        w_uk, w_uv = w.split((self.nope, self.v_dim), dim=1)  # [H, N, C], [H, V, C]
        batch, queries = q.shape[0], q.shape[2]
        q_nope, q_rope = q.split((self.nope, self.rope_dim), dim=-1)
        q = torch.cat((torch.einsum("bhtn,hnc->bhtc", q_nope, w_uk), q_rope), dim=-1)
        # All heads share one key, which is also the value: every head's queries are rows of a single head. The rotary
        # columns ride along in the value and are dropped, which is cheaper than copying the latents out of the cache.
        rows = q.reshape(batch, 1, self.heads * queries, -1)
        past = past.to(q.dtype).unsqueeze(1)
        mask = context.mask
        if context.documents is not None:
            mask = context.documents.mask
        elif mask is None and context.causal:
            mask = torch.ones(1, 1, queries, queries, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            mask = mask.expand(-1, self.heads, -1, -1).flatten(1, 2).unsqueeze(1)
        o = attention(rows, past, past, self.scale, mask, causal=False)
        o_latent = o[..., : self.latent].view(batch, self.heads, queries, -1)
        return torch.einsum("bhtc,hvc->bthv", o_latent, w_uv).flatten(2)
