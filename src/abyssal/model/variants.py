"""Study variants: readings of the papers that circulate and that DeepSeek does not do, built to be compared.

- **Segment routing** (``moe.segments: m``) takes "fine-grained expert segmentation" to cut the token's hidden vector in
  m parts. One router over D/m looks at each part; the routed experts (D/m → F → D/m) are shared by the parts; their
  outputs are put side by side; shared experts see the whole vector. DeepSeekMoE (§3.1) cuts *experts*, not tokens.
- **Separate latents** (``attention.kind: separate_latents``) compresses keys and values to a latent each and turns the
  expanded keys by position. The latents can be cached, but not absorbed: rotation stands between W^UK and the query.
  MLA has one joint latent and a rotary key of its own for just this reason (V2 paper §2.1.3).
- **Compression ratio** (``attention.compression_ratio: r``) is no module: it sets q_lora_rank and kv_lora_rank to
  hidden_size / r, and the config resolves it when read (:class:`abyssal.config.ModelConfig`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.config import ModelConfig, MoEConfig, SeparateLatentsConfig
from abyssal.kernels.heads import rotate, turn_heads
from abyssal.model.attention import LATENT_NORM_EPS, Context, Queries, attend
from abyssal.model.cache import LayerCache
from abyssal.model.layers import MLP, Linear, RMSNorm
from abyssal.model.moe import Experts, MoE
from abyssal.model.paged import PagedLayer
from abyssal.model.router import Router, Routing


class SegmentMoE(MoE):
    """MoE over segments of the hidden vector, [B, T, D] -> [B, T, D]; a segment counts as a token, so K·m choices."""

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        nn.Module.__init__(self)
        self.segments = moe.segments
        self.gate = Router(hidden_size // moe.segments, moe)
        self.experts = Experts(hidden_size // moe.segments, moe)
        self.shared_experts = MLP(hidden_size, moe.shared_intermediate_size) if moe.n_shared_experts else None

    def route(self, x: Tensor) -> Routing:
        """Decides for each segment: [B, T·m, …], the segments of a token one after the other."""
        return self.gate(x.unflatten(-1, (self.segments, -1)).flatten(1, 2))

    def parts(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        rows = x.reshape(-1, x.shape[-1] // self.segments)
        routed = self.experts(rows, routing.indices.flatten(0, 1), routing.weights.flatten(0, 1)).view(x.shape)
        return routed, None if self.shared_experts is None else self.shared_experts(x)


class SeparateLatentAttention(Queries):
    """A latent for keys and one for values; rotary position on the last R dimensions of every head's expanded key."""

    def __init__(self, config: ModelConfig, attention: SeparateLatentsConfig) -> None:
        super().__init__(config)
        heads, hidden = self.heads, config.hidden_size
        self.k_a_proj = Linear(hidden, attention.k_lora_rank, bias=attention.bias)
        self.k_a_layernorm = RMSNorm(attention.k_lora_rank, LATENT_NORM_EPS)
        self.k_b_proj = Linear(attention.k_lora_rank, heads * attention.qk_head_dim, bias=False)
        self.v_a_proj = Linear(hidden, attention.v_lora_rank, bias=attention.bias)
        self.v_a_layernorm = RMSNorm(attention.v_lora_rank, LATENT_NORM_EPS)
        self.v_b_proj = Linear(attention.v_lora_rank, heads * self.v_dim, bias=False)
        self.o_proj = Linear(heads * self.v_dim, hidden, bias=attention.bias)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | PagedLayer | None = None) -> Tensor:
        q = turn_heads(self.queries(x), context.rope, self.interleaved)
        latents = (self.k_a_layernorm(self.k_a_proj(x)), self.v_a_layernorm(self.v_a_proj(x)))
        if isinstance(cache, PagedLayer):
            cache.write(*(latent[0] for latent in latents))
            outs = []
            for piece, within in zip(cache.ragged.pieces, context.pieces, strict=True):
                assert within.key_rope is not None
                past = cache.past(piece)
                k, v = self._keys_values(past[0].to(x.dtype), past[1].to(x.dtype), within.key_rope)
                rows = q[:, :, piece.start : piece.end]
                outs.append(attend(rows, k.transpose(1, 2), v.transpose(1, 2), self.scale, within))
            return self.o_proj(torch.cat(outs, dim=1))
        if cache is None:
            k, v = self._keys_values(*latents, context.rope)
        elif cache.expanded:
            k, v = cache.append(context.start, *self._keys_values(*latents, context.rope))
        else:  # what is cached has no position yet: every step turns all keys anew, which is what MLA avoids
            assert context.key_rope is not None
            past = cache.append(context.start, *latents)
            k, v = self._keys_values(past[0], past[1], context.key_rope)
        out = attend(q, k.transpose(1, 2), v.transpose(1, 2), self.scale, context)
        return self.o_proj(out)

    def _keys_values(self, k_latent: Tensor, v_latent: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        k_nope, k_rope = self.k_b_proj(k_latent).unflatten(-1, (self.heads, -1)).split((self.nope, self.rope_dim), -1)
        k = torch.cat((k_nope, rotate(k_rope, rope, self.interleaved)), dim=-1)
        return k, self.v_b_proj(v_latent).unflatten(-1, (self.heads, -1))
