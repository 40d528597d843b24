"""Keys and values of all heads factorised together: the latent of MLA; and queries, where they get one of their own.

What :mod:`~abyssal.upcycling.rotary` left unturned of the keys, and the values, are one matrix W [2·G·d, D] of the
layer's input x. An error in them costs

    keys    δkᵀ A_j δk,     A_j = α/d · Σ_{h of j} spread_h E[q_h q_hᵀ]      (a score's error times what it moves)
    values  δvᵀ B_j δv,     B_j = Σ_{h of j} (W^O_h)ᵀ W^O_h

so with L = diag(A, B)^½ and M = E[x xᵀ] the best approximation of rank C in the mean square is the truncated SVD of
L W M^½ = U Σ Vᵀ: the latent c = U_Cᵀ L W x (kv_a), keys and values L⁻¹ U_C c (kv_b). Its relative error is
(Σ_{i>C} σ_i² / Σ σ_i²)^½.

Queries. An error in head h's query costs δqᵀ A_h δq with A_h = spread_h/d E[k kᵀ] of the key that it meets (of a rotary
pair, which meets keys turned by any angle, the mean over the angles: half the pair's energy on the diagonal). With
these weights their SVD is cut in the same way.

The latent's norm. V2's and V3's layouts have an RMSNorm on c, dense models have none. Any basis of the latent is as
good as another without the norm: c → G c in kv_a and G⁻¹ in kv_b. With it, one in which |G c|² is the same for all
tokens makes the norm the identity. Whitening, G = E[c cᵀ]^-½, makes |G c|² = C on average, but not for the tokens
unlike all others, above all the first of a text: attention rests on it, and a norm that scales its latent by two ruins
the layer. So from there G is taken to the least

    Σ_n w_n (|G c_n|² / C − 1)² + μ |G G₀⁻¹ − 1|² / C,

with w half the same for all tokens and half the attention that a token receives, by L-BFGS. A few dozen steps bring
the first term so near to 0 that the norm costs next to nothing (docs/upcycling.md). The second keeps G near the
whitening G₀ (whose least variances are lifted): otherwise lengths are even on these tokens alone, other text goes
astray, and the basis is conditioned by 10³ to 10⁴, of no use in BF16.

Shapes: D hidden, H query heads, G key/value heads, d head size, C latent, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.upcycling.calibration import Statistics
from abyssal.upcycling.rotary import Separated

_NEAR = 0.03  # μ
_FLOOR = 0.01  # of the largest variance: directions that the text hardly shows are not blown up, others may show them
_ROWS = 8192  # tokens whose lengths are evened out
_STEPS = 40  # of L-BFGS; 15 leave lengths with a deviation of .06 to .2, 40 of .02 to .08


@dataclass(frozen=True)
class Spectrum:
    """The SVD before it is cut: ``left`` = U [2·G·d, r], ``values`` = Σ [r], and what undoes the weights."""

    left: Tensor
    values: Tensor
    weighted: Tensor
    """L W, [2·G·d, D]; of queries [H·(d + R), D]."""
    unweigh: Tensor
    """L⁻¹, square."""

    def error(self, rank: int) -> float:
        """The relative error of the factorisation at ``rank``."""
        return relative_error(self.values, rank)

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """kv_a [C, D] and kv_b [2·G·d, C] at ``rank``; or q_a and q_b."""
        left = self.left[:, :rank]
        return left.T @ self.weighted, self.unweigh @ left


@torch.no_grad()
def spectrum(parts: Separated, w_v: Tensor, w_o: Tensor, stats: Statistics, key_weight: float) -> Spectrum:
    """The weighted SVD of keys and values. ``w_v`` [G, d, D]; ``w_o`` [D, H, d]; ``key_weight`` is α."""
    groups, size, _ = w_v.shape
    heads = w_o.shape[1]
    q = parts.q_nope
    queries = torch.einsum("hdD,DE,heE->hde", q, stats.moment, q) * (stats.spread / size * key_weight).view(-1, 1, 1)
    outputs = torch.einsum("Dhd,Dhe->hde", w_o.double(), w_o.double())
    costs = [cost for part in (queries, outputs) for cost in part.view(groups, heads // groups, size, size).sum(1)]
    return _spectrum(costs, torch.cat((parts.k_nope.flatten(0, 1), w_v.double().flatten(0, 1))), stats)


@torch.no_grad()
def query_spectrum(parts: Separated, stats: Statistics) -> Spectrum:
    """The weighted SVD of the queries, each head's d dimensions without position before its R with."""
    k, heads = parts.k_nope, len(parts.q_nope)
    groups, size, _ = k.shape
    met = torch.einsum("gdD,DE,geE->gde", k, stats.moment, k)
    turned = torch.einsum("rD,DE,rE->r", parts.k_rope, stats.moment, parts.k_rope)
    pairs = torch.diag(turned.view(-1, 2).mean(-1).repeat_interleave(2))
    weights = stats.spread / size
    costs = [weights[h] * torch.block_diag(met[h // (heads // groups)], pairs) for h in range(heads)]
    return _spectrum(costs, torch.cat((parts.q_nope, parts.q_rope), dim=1).flatten(0, 1), stats)


def _spectrum(costs: list[Tensor], matrix: Tensor, stats: Statistics) -> Spectrum:
    # One floor for all: a head that nothing looks at has costs of 0, and a floor of its own would be 0 too.
    largest = max(float(torch.linalg.eigvalsh(cost)[-1]) for cost in costs)
    roots = [root(cost, of=largest) for cost in costs]
    weigh, unweigh = (torch.block_diag(*(pair[i] for pair in roots)) for i in (0, 1))
    weighted = weigh @ matrix
    left, values, _ = torch.linalg.svd(weighted @ root(stats.moment)[0], full_matrices=False)
    return Spectrum(left, values, weighted, unweigh)


def relative_error(values: Tensor, rank: int) -> float:
    """The error that is left of singular ``values`` [r] where the first ``rank`` are kept, relative to all."""
    energy = values.square()
    return float((energy[rank:].sum() / energy.sum()).sqrt())


def rank_for(spectra: list[Tensor], error: float) -> int:
    """The smallest rank at which the mean of the relative errors of the layers' singular values, [r] each, is at most
    ``error``."""
    longest = max(map(len, spectra))
    low, high = 1, longest
    while low < high:
        middle = (low + high) // 2
        if sum(relative_error(values, middle) for values in spectra) / len(spectra) <= error:
            high = middle
        else:
            low = middle + 1
    return low


def even_out(down: Tensor, up: Tensor, x: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
    """``down`` [C, D] and ``up`` [., C] (kv_a and kv_b, or q_a and q_b) in the basis in which the latents of ``x``
    [N, D] are all about √C long; ``received`` [N] is the attention that rests on each of the tokens."""
    size = len(down)
    # All tokens that attention rests on, which are few and unlike the others, and some of the others.
    most = received.topk(min(_ROWS // 8, len(x))).indices
    some = torch.arange(0, len(x), max(len(x) // (_ROWS - len(most)), 1), device=x.device)
    chosen = torch.cat((most, some))
    latent, received = x[chosen].double() @ down.T, received[chosen]
    white = root(latent.T @ latent / len(latent), floor=_FLOOR)[1]
    rows = (latent @ white).float()
    weights = (0.5 / len(rows) + 0.5 * received / received.sum()).to(rows)
    unchanged = torch.eye(size, device=x.device)
    basis = unchanged.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([basis], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        out = (weights * ((rows @ basis.T).square().sum(-1) / size - 1).square()).sum()
        out = out + _NEAR * (basis - unchanged).square().sum() / size
        out.backward()
        return out

    with torch.enable_grad():
        optimizer.step(loss)
    found = basis.detach().double() @ white
    return found @ down, up @ torch.linalg.inv(found)


def root(matrix: Tensor, floor: float = 1e-8, of: float | None = None) -> tuple[Tensor, Tensor]:
    """The square root of a symmetric positive semidefinite matrix and its inverse; eigenvalues below ``floor`` times
    ``of``, by default the largest, are taken to be that."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(max(floor * (float(values[-1]) if of is None else of), 1e-30))
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
