"""Keys and values of all heads factorised together: the latent of MLA.

What :mod:`~abyssal.upcycling.rotary` left unturned of the keys, and the values, are one matrix W [2·G·d, D] of the
layer's input x. An error in them costs

    keys    δkᵀ A_j δk,     A_j = α/d · Σ_{h of j} spread_h E[q_h q_hᵀ]      (a score's error times what it moves)
    values  δvᵀ B_j δv,     B_j = Σ_{h of j} (W^O_h)ᵀ W^O_h

so with L = diag(A, B)^½ and M = E[x xᵀ] the best approximation of rank C in the mean square is the truncated SVD of
L W M^½ = U Σ Vᵀ: the latent c = U_Cᵀ L W x (kv_a), keys and values L⁻¹ U_C c (kv_b). Its relative error is
(Σ_{i>C} σ_i² / Σ σ_i²)^½.

The latent's norm. V2's and V3's layouts have an RMSNorm on c, dense models have none. Any basis of the latent is as
good as another without the norm: c → G c in kv_a and G⁻¹ in kv_b. With it, one in which |G c|² = cᵀ S c, S = GᵀG, is
the same for all tokens makes the norm the identity. Whitening, S = E[c cᵀ]⁻¹, makes cᵀ S c = C on average but not for
the rare tokens unlike all others, above all the first of a text, on which attention rests and whose latent a norm
must not scale. Giving such tokens more weight w and whitening again,

    w ← w · (cᵀ S c / C)^½,     S = (Σ w c cᵀ / Σ w)⁻¹,

goes towards the ellipsoid of least volume around all latents, on whose surface most of them then lie.

Shapes: D hidden, H query heads, G key/value heads, d head size, C latent, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.upcycling.calibration import Statistics
from abyssal.upcycling.rotary import Separated

_TOKENS = 8192  # that whitening looks at
_ROUNDS = (
    20  # of the reweighting; 5 left layers with a strong first token at .90 of cosine, 20 at .94 (docs/upcycling.md)
)


@dataclass(frozen=True)
class Spectrum:
    """The SVD before it is cut: ``left`` = U [2·G·d, r], ``values`` = Σ [r], and what undoes the weights."""

    left: Tensor
    values: Tensor
    weighted: Tensor
    """L W, [2·G·d, D]."""
    unweigh: Tensor
    """L⁻¹, [2·G·d, 2·G·d]."""

    def error(self, rank: int) -> float:
        """The relative error of the factorisation at ``rank``."""
        energy = self.values.square()
        return float((energy[rank:].sum() / energy.sum()).sqrt())

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """kv_a [C, D] and kv_b [2·G·d, C] at ``rank``."""
        left = self.left[:, :rank]
        return left.T @ self.weighted, self.unweigh @ left


def spectrum(parts: Separated, w_v: Tensor, w_o: Tensor, stats: Statistics, key_weight: float) -> Spectrum:
    """The weighted SVD of keys and values. ``w_v`` [G, d, D]; ``w_o`` [D, H, d]; ``key_weight`` is α."""
    groups, size, _ = w_v.shape
    heads = w_o.shape[1]
    q = parts.q_nope
    queries = torch.einsum("hdD,DE,heE->hde", q, stats.moment, q) * (stats.spread / size * key_weight).view(-1, 1, 1)
    outputs = torch.einsum("Dhd,Dhe->hde", w_o.double(), w_o.double())
    costs = [cost for part in (queries, outputs) for cost in part.view(groups, heads // groups, size, size).sum(1)]
    roots = [root(cost) for cost in costs]
    weigh, unweigh = (torch.block_diag(*(pair[i] for pair in roots)) for i in (0, 1))
    weighted = weigh @ torch.cat((parts.k_nope.flatten(0, 1), w_v.double().flatten(0, 1)))
    left, values, _ = torch.linalg.svd(weighted @ root(stats.moment)[0], full_matrices=False)
    return Spectrum(left, values, weighted, unweigh)


def rank_for(spectra: list[Spectrum], error: float) -> int:
    """The smallest rank at which the mean of the layers' relative errors is at most ``error``."""
    longest = max(len(one.values) for one in spectra)
    low, high = 1, longest
    while low < high:
        middle = (low + high) // 2
        if sum(one.error(middle) for one in spectra) / len(spectra) <= error:
            high = middle
        else:
            low = middle + 1
    return low


def whiten(kv_a: Tensor, kv_b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``kv_a`` [C, D] and ``kv_b`` [., C] in the basis in which the latents of ``x`` [N, D] are of one length √C."""
    # Whole windows of text, from the front: the first token of each is among those that matter most.
    latent = x[:_TOKENS].double() @ kv_a.T
    size = latent.shape[1]
    weights = torch.ones(len(latent), dtype=torch.float64, device=x.device)
    floor = torch.eye(size, dtype=torch.float64, device=x.device)
    for _ in range(_ROUNDS):
        moment = (latent * weights.unsqueeze(1)).T @ latent / weights.sum()
        inverse = torch.linalg.inv(moment + 1e-9 * moment.trace() / size * floor)
        lengths = ((latent @ inverse) * latent).sum(-1) / size
        weights = weights * lengths.clamp_min(1e-12).sqrt()
    shape, back = root(inverse / lengths.mean(), floor=1e-13)
    return shape @ kv_a, kv_b @ back


def root(matrix: Tensor, floor: float = 1e-8) -> tuple[Tensor, Tensor]:
    """The square root of a symmetric positive semidefinite matrix and its inverse; eigenvalues below ``floor`` times
    the largest are taken to be that."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(max(floor * float(values[-1]), 1e-300))
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
