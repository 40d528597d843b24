"""The rotary part taken out of grouped-query attention, as MLA wants it: one rotary key for all heads.

RoPE turns pair l of a key by θ_l n at position n. With the pair written as one complex number, the score of a query at
m and a key at n is

    Σ_l Re( conj(q_hl) k_jl e^{i θ_l (n − m)} ),        j the key head of query head h.

At one frequency the keys of the G key heads are a vector k_l ∈ ℂ^G, and a unitary matrix over the heads commutes with
the rotation. So a complex principal component analysis of k_l, its heads weighted by the energy s_jl of the queries
that look at them,

    S_l^½ E[k_l k_lᴴ] S_l^½ = U Λ Uᴴ,        κ_l = u₁ᴴ S_l^½ k_l,        k_jl ≈ s_jl^-½ u₁j κ_l,

gives the one number κ_l a token whose rotation is worth most. κ_l is a linear function of the layer's input; it becomes
pair l of MLA's shared rotary key, and each head's rotary query is conj(u₁j) s_jl^-½ q_hl.

Which frequencies. MLA's table is θ'^(−2i/R). With θ' = θ^(R/d) these are exactly the R/2 fastest of the dense model's
θ^(−2l/d). What is not in the rotary part (the other components, and the slow frequencies) is left unturned, with
the rotation replaced by its mean over the distances that a head attends to,

    ρ_hl = E_attention[ e^{i θ_l (n − m)} ],

the constant nearest to it in the mean square; it goes to the head's query. A slow frequency hardly turns over the
distances that matter, so it loses little.

Shapes: D hidden, H query heads, G key/value heads, d head size, P = d/2 pairs, R rotary dims of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.upcycling.calibration import Statistics


@dataclass(frozen=True)
class Separated:
    """Query and key weights, FP64, with pairs of the rotary part interleaved as in V3."""

    q_rope: Tensor
    """[H, R, D]"""
    k_rope: Tensor
    """[R, D]"""
    q_nope: Tensor
    """[H, d, D]"""
    k_nope: Tensor
    """[G, d, D]"""
    kept: float
    """Share of the keys' energy at the R/2 rotary frequencies that the shared key holds."""


def rotary_theta(theta: float, head_dim: int, rotary: int) -> float:
    """θ' with which a table of ``rotary`` dims holds the fastest frequencies of one of ``head_dim``."""
    return float(theta ** (rotary / head_dim))


def separate(w_q: Tensor, w_k: Tensor, stats: Statistics, theta: float, rotary: int) -> Separated:
    """Splits ``w_q`` [H, d, D] and ``w_k`` [G, d, D], whose pairs lie in halves, at ``rotary`` ≤ d rotary dims."""
    heads, size, _ = w_q.shape
    groups, pairs = len(w_k), size // 2
    of = torch.arange(heads, device=w_q.device) // (heads // groups)
    q, k = _complex(w_q.detach().double()), _complex(w_k.detach().double())
    moment = stats.moment.to(torch.complex128)
    energy = torch.einsum("hpD,DE,hpE->hp", q, moment, q.conj()).real * stats.spread.unsqueeze(1)
    s = energy.view(groups, -1, pairs).sum(1)
    s = s.clamp_min(max(1e-12 * float(s.max()), 1e-30)).sqrt()  # S^½, [G, P]; heads that nothing looks at are not 0
    k_rope, q_rope, rest = [], [], k.clone()
    held = total = 0.0
    for pair in range(rotary // 2):
        weighted = s[:, pair, None] * k[:, pair]
        values, vectors = torch.linalg.eigh(weighted @ moment @ weighted.conj().T)
        u = vectors[:, -1]
        held, total = held + float(values[-1]), total + float(values.sum())
        kappa = u.conj() @ weighted
        load = u / s[:, pair]
        rest[:, pair] -= load.unsqueeze(1) * kappa
        k_rope.append(kappa)
        q_rope.append(load.conj()[of].unsqueeze(1) * q[:, pair])
    frequencies = theta ** (-2 * torch.arange(pairs, dtype=torch.float64, device=w_q.device) / size)
    back = torch.arange(stats.distances.shape[1], dtype=torch.float64, device=w_q.device)
    rho = stats.distances.to(torch.complex128) @ torch.exp(-1j * back.unsqueeze(1) * frequencies)
    # Re(conj(q) k ρ) is the plain product of k with conj(ρ) q.
    return Separated(
        q_rope=_interleaved(torch.stack(q_rope, dim=1)),
        k_rope=_interleaved(torch.stack(k_rope)),
        q_nope=_halves(rho.conj().unsqueeze(-1) * q),
        k_nope=_halves(rest),
        kept=held / total if total > 0 else 1.0,
    )


def _complex(weight: Tensor) -> Tensor:
    """[., d, D] with pairs in halves -> [., P, D] complex."""
    real, imaginary = weight.chunk(2, dim=-2)
    return torch.complex(real, imaginary)


def _halves(weight: Tensor) -> Tensor:
    return torch.cat((weight.real, weight.imag), dim=-2)


def _interleaved(weight: Tensor) -> Tensor:
    return torch.stack((weight.real, weight.imag), dim=-2).flatten(-3, -2)
