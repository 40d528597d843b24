"""One layer's grouped-query attention turned into latent attention: the steps of rotary.py and latent.py put together.

Shapes: D hidden, H query heads, G key/value heads, d head size, C latent, R rotary dims.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from abyssal.config import MHAConfig, MLAConfig, ModelConfig
from abyssal.model.attention import LatentAttention, MultiHeadAttention
from abyssal.upcycling.calibration import Statistics
from abyssal.upcycling.latent import Spectrum, even_out, query_spectrum, spectrum
from abyssal.upcycling.rotary import Separated, separate


def separated(
    attention: MultiHeadAttention, stats: Statistics, theta: float, rotary: int, key_weight: float
) -> tuple[Separated, Spectrum]:
    """The dense layer's weights, the rotary part taken out, and the weighted SVD of the rest."""
    a = attention.attention
    heads, groups, size = a.num_attention_heads, a.num_key_value_heads, a.head_dim
    w_q = attention.q_proj.weight.unflatten(0, (heads, size))
    w_k = attention.k_proj.weight.unflatten(0, (groups, size))
    w_v = attention.v_proj.weight.unflatten(0, (groups, size))
    w_o = attention.o_proj.weight.unflatten(1, (heads, size))
    parts = separate(w_q, w_k, stats, theta, rotary)
    return parts, spectrum(parts, w_v, w_o, stats, key_weight)


@torch.no_grad()
def latent_attention(
    dense: MultiHeadAttention, config: ModelConfig, stats: Statistics, parts: Separated, found: Spectrum, x: Tensor
) -> LatentAttention:
    """The layer in MLA's form, its latents of about one length for its inputs ``x`` [n, T, D], in FP32; ``config`` is
    the new model's.

    MLA divides scores by √(d + R), the dense layer by √d: the ratio goes into the queries.
    """
    mha, mla = dense.attention, config.attention
    assert isinstance(mha, MHAConfig)
    assert isinstance(mla, MLAConfig)
    group, size = mha.num_attention_heads // mha.num_key_value_heads, mha.head_dim
    kv_a, kv_b = even_out(*found.cut(mla.kv_lora_rank), x.flatten(0, 1), stats.received.flatten())
    keys, values = kv_b.unflatten(0, (2, mha.num_key_value_heads, size)).repeat_interleave(group, dim=1)
    scale = math.sqrt(mla.qk_head_dim / size)
    with torch.device("meta"):
        out = LatentAttention(config, mla)
    out = out.to_empty(device=x.device).float().requires_grad_(False)
    if mla.q_lora_rank is None:
        out.q_proj.weight.copy_(torch.cat((parts.q_nope, parts.q_rope), dim=1).flatten(0, 1) * scale)
    else:  # a query counts as much as any other
        q_a, q_b = query_spectrum(parts, stats).cut(mla.q_lora_rank)
        q_a, q_b = even_out(q_a, q_b, x.flatten(0, 1), torch.ones_like(stats.received).flatten())
        out.q_a_proj.weight.copy_(q_a)
        out.q_a_layernorm.weight.fill_(1.0)
        out.q_b_proj.weight.copy_(q_b * scale)
    out.kv_a_proj_with_mqa.weight.copy_(torch.cat((kv_a, parts.k_rope)))
    out.kv_a_layernorm.weight.fill_(1.0)
    out.kv_b_proj.weight.copy_(torch.cat((keys, values), dim=1).flatten(0, 1))
    out.o_proj.weight.copy_(dense.o_proj.weight)
    return out


def without_norm(attention: LatentAttention) -> LatentAttention:
    """The same layer, sharing its weights, with nothing where the latents' norms stand."""
    out = copy.copy(attention)
    norms = {name for name in ("kv_a_layernorm", "q_a_layernorm") if name in attention._modules}
    out._modules = {**attention._modules, **{name: nn.Identity() for name in norms}}
    return out
