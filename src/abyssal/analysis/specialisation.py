"""What routing decisions say about a layer's experts: how evenly they are used, what their choice depends on, which
are chosen together; and how far two models' decisions lie apart.

**Mutual information.** One draw: a token n of N, then one of its C choices e, each equally likely; X is what is known
of the token. So with c_n(e) the number of n's choices that are e,

    p(x, e) = 1/N · Σ_n [x_n = x] · c_n(e) / C,      I(X; E) = H(X) + H(E) − H(X, E)     (bits)

Of few tokens this finds a dependence where there is none. ``chance`` is what it finds when the x are dealt out to the
tokens anew (the mean over some seeded shuffles, which keep H(X) and H(E)); ``bits`` = plug-in − chance is the figure to
read. A token goes to C experts at once, so not even the token itself tells which one was drawn: the most that X can
tell is ``most`` = min(H(X), H(E) − mean_n H(c_n / C)), and ``share`` = (plug-in − chance) / (most − chance), 1 where X
decides everything and 0 where it decides nothing.

**Together.** ``together[i, j]`` counts the tokens that chose both i and j, on the diagonal those that chose i. The lift
is that count against what it would be if every expert kept its number of pairs but did not care with whom it has them:
lift[i, j] = together[i, j] / (a_i a_j), with a such that Σ_{j≠i} a_i a_j = Σ_{j≠i} together[i, j] for every i. (The
plain n_i n_j / N would put all pairs below 1, since no token draws the same expert twice.)

Shapes: N tokens, E experts, C choices a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from abyssal.analysis.balance import Balance, balance
from abyssal.analysis.lens import LayerRouting, Texts

SHUFFLES = 5
_CHUNK = 2**22  # values of a [tokens, E] table at a time

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Information:
    """Mutual information of the expert chosen with something known of the token, as in the module's docstring."""

    plug_in: float
    chance: float
    bits: float
    most: float
    share: float | None
    """None where nothing could be told: one value or one expert only, or ``most`` is chance itself."""


@dataclass(frozen=True)
class Measures:
    """One layer. ``load`` [E] counts assignments; ``entropy`` of its use in bits, ``evenness`` that over log2 E.

    ``shared``: mean of |shared| / (|shared| + |routed|) over tokens, the norms of what the shared and the routed
    experts add to the token; chosen before the projection on the sum because it stays between 0 and 1 where the two
    work against each other. ``cosine``: mean cosine between them, which says whether they do (None without shared
    experts). ``moved_tokens``: share of tokens for which the bias changed the set of experts, ``moved_choices``: share
    of the choices (None: the router has no bias). ``domain`` is None with a single text. ``used`` [texts, E]: each
    text's assignments.
    """

    tokens: int
    load: Counts
    balance: Balance
    entropy: float
    evenness: float
    token: Information
    position: Information
    domain: Information | None
    used: Counts
    together: Counts
    lift: Array | None
    shared: float | None
    cosine: float | None
    moved_tokens: float | None
    moved_choices: float | None


def measure(routing: LayerRouting, texts: Texts, seed: int = 0) -> Measures:
    """The measures of one layer over ``texts``. ``seed`` deals the shuffles behind each ``chance``. Raises ValueError
    where no token has a decision."""
    seen = routing.seen
    indices = routing.indices[seen].astype(np.int64)
    experts, count = routing.experts, len(indices)
    if not count:
        raise ValueError(f"layer {routing.layer}: no token has a decision")
    load = np.bincount(indices.ravel(), minlength=experts)
    entropy = _entropy(load)
    several = len(texts.texts) > 1
    rng = np.random.default_rng(seed)
    together = pairs(indices, experts)
    return Measures(
        tokens=count,
        load=load,
        balance=balance(torch.from_numpy(load)),
        entropy=entropy,
        evenness=entropy / np.log2(experts) if experts > 1 else 1.0,
        token=information(texts.ids[seen], indices, experts, rng),
        position=information(position_bins(texts.position[seen]), indices, experts, rng),
        domain=information(texts.text[seen], indices, experts, rng) if several else None,
        used=_joint(texts.text[seen], len(texts.texts), indices, experts),
        together=together,
        lift=lift(together),
        shared=_mean(routing.shared[seen]),
        cosine=_mean(routing.cosine[seen]),
        moved_tokens=None if routing.moved is None else float((routing.moved[seen] > 0).mean()),
        moved_choices=None if routing.moved is None else float(routing.moved[seen].mean() / indices.shape[1]),
    )


def position_bins(position: NDArray[np.integer]) -> Counts:
    """Positions in bins that double: 0, 1, 2-3, 4-7, …: what a token can see changes with the ratio."""
    return np.frexp(position.astype(np.float64))[1].astype(np.int64)


def information(
    x: NDArray[np.integer], indices: NDArray[np.integer], experts: int, rng: np.random.Generator
) -> Information:
    """Mutual information of ``x`` [N] with the choices ``indices`` [N, C] among ``experts``."""
    values, codes = np.unique(x, return_inverse=True)
    counts = np.bincount(codes)
    h_x, h_e = _entropy(counts), _entropy(np.bincount(indices.ravel(), minlength=experts))

    def plug_in(codes: NDArray[np.integer]) -> float:
        return h_x + h_e - _entropy(_joint(codes, len(values), indices, experts))

    found = plug_in(codes)
    chance = float(np.mean([plug_in(rng.permutation(codes)) for _ in range(SHUFFLES)]))
    most = min(h_x, h_e - _choice_entropy(indices))
    room = most - chance
    return Information(found, chance, found - chance, most, (found - chance) / room if room > 1e-9 else None)


def pairs(indices: NDArray[np.integer], experts: int) -> Counts:
    """[E, E]: tokens that chose both experts, on the diagonal those that chose the one."""
    out = np.zeros((experts, experts), np.int64)
    for counts in _tables(indices, experts):
        chosen = (counts > 0).astype(np.float32)  # sums below 2^24 are exact, and a chunk has fewer rows
        out += (chosen.T @ chosen).astype(np.int64)
    return out


def lift(together: Counts) -> Array | None:
    """[E, E] as in the module's docstring; NaN on the diagonal and for experts without pairs. None without pairs."""
    off = ~np.eye(len(together), dtype=bool)
    if together[off].sum() == 0:
        return None
    expected = expected_pairs(together)
    out = np.full(together.shape, np.nan)
    np.divide(together, expected, out=out, where=off & (expected > 0))
    return out


def expected_pairs(together: Counts) -> Array:
    """[E, E] a_i a_j of the module's docstring, 0 on the diagonal; within 1e-9 of each expert's number of pairs, or as
    near as some thousand rounds come (where one expert is in every pair, only the limit is exact)."""
    pairs_of = (together - np.diag(np.diag(together))).sum(1).astype(float)
    a = np.sqrt(pairs_of)
    for _ in range(5000):
        others = a.sum() - a
        fitted = np.sqrt(a * np.divide(pairs_of, others, out=np.zeros_like(a), where=others > 0))
        done = np.abs(fitted - a).max() <= 1e-12 * a.max()
        a = fitted
        if done:
            break
    out: Array = np.outer(a, a)
    np.fill_diagonal(out, 0.0)
    return out


@dataclass(frozen=True)
class Uses:
    """For each of E experts, up to some number of entries, best first, -1 where there are fewer: ``positions`` [E, P]
    of the N tokens where it has the largest weight (each token id once, so that one word does not fill the list);
    the most frequent ``ids`` [E, P] among the tokens that chose it, with how many ``times`` [E, P]."""

    positions: NDArray[np.int64]
    ids: NDArray[np.int64]
    times: NDArray[np.int64]


def uses(routing: LayerRouting, texts: Texts, count: int = 8) -> Uses:
    """Where each expert of a layer is used most."""
    out = Uses(*(np.full((routing.experts, count), -1, np.int64) for _ in range(3)))
    of_token = np.repeat(np.arange(len(texts.ids)), routing.indices.shape[1])
    expert, weight = routing.indices.ravel(), routing.weights.ravel()
    order = np.lexsort((of_token, -weight, expert))  # by expert, then the largest weight, then the first in the text
    bounds = np.searchsorted(expert[order], np.arange(routing.experts + 1))
    for e, (start, end) in enumerate(pairwise(bounds)):
        tokens = of_token[order[start:end]]
        ids = texts.ids[tokens]
        _, first = np.unique(ids, return_index=True)
        best = tokens[np.sort(first)[:count]]
        out.positions[e, : len(best)] = best
        values, times = np.unique(ids, return_counts=True)
        most = np.lexsort((values, -times))[:count]
        out.ids[e, : len(most)], out.times[e, : len(most)] = values[most], times[most]
    return out


@dataclass(frozen=True)
class Drift:
    """How far two models' decisions lie apart in one layer, over the tokens where both have one.

    ``overlap``: mean share of a token's choices that both made; ``same_first``: share of tokens whose first choice is
    the same; ``variation``: total variation of the loads, ½ Σ |p_i − q_i|; ``divergence``: their Jensen-Shannon
    divergence in bits, 0 to 1; ``weight_change``: mean over tokens of Σ_e |w_e − v_e| / Σ_e (w_e + v_e), 0 to 1.
    ``by_token`` [N] float32 is each token's overlap, NaN where there is none.
    """

    overlap: float
    same_first: float
    variation: float
    divergence: float
    weight_change: float
    by_token: NDArray[np.float32]


def drift(before: LayerRouting, after: LayerRouting) -> Drift:
    """The drift between two models' decisions on the same tokens. Raises ValueError for layers of different shapes."""
    if before.indices.shape != after.indices.shape or before.experts != after.experts:
        raise ValueError(
            f"layer {before.layer}: {before.indices.shape} choices among {before.experts} experts against "
            f"{after.indices.shape} among {after.experts}"
        )
    seen = before.seen & after.seen
    experts, choices = before.experts, before.indices.shape[1]
    a, b = before.indices[seen].astype(np.int64), after.indices[seen].astype(np.int64)
    same = [np.minimum(m, n).sum(1) for m, n in zip(_tables(a, experts), _tables(b, experts), strict=True)]
    overlap = np.concatenate(same) / choices
    by_token = np.full(len(seen), np.nan, np.float32)
    by_token[seen] = overlap
    p, q = (np.bincount(x.ravel(), minlength=experts) / x.size for x in (a, b))
    weights = before.weights[seen], after.weights[seen]
    change = [
        np.abs(m - n).sum(1) / np.maximum((m + n).sum(1), np.finfo(np.float32).tiny)
        for m, n in zip(_tables(a, experts, weights[0]), _tables(b, experts, weights[1]), strict=True)
    ]
    return Drift(
        overlap=float(overlap.mean()),
        same_first=float((a[:, 0] == b[:, 0]).mean()),
        variation=float(np.abs(p - q).sum() / 2),
        divergence=max(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2, 0.0),
        weight_change=float(np.concatenate(change).mean()),
        by_token=by_token,
    )


def most_changed(drifts: list[Drift], count: int = 20) -> list[int]:
    """The tokens whose choices changed most, by the mean overlap over the layers that decide for them; tokens whose
    choices are all the same are left out."""
    by_layer = np.stack([d.by_token for d in drifts]).astype(np.float64)
    decided = ~np.isnan(by_layer)
    mean = np.where(decided, by_layer, 0).sum(0) / np.maximum(decided.sum(0), 1)
    mean[~decided.any(0)] = 1
    order = np.argsort(mean, kind="stable")[:count]
    return [int(token) for token in order if mean[token] < 1]


def _tables(
    indices: NDArray[np.integer], experts: int, weights: NDArray[np.floating] | None = None
) -> Iterator[NDArray[np.float64]]:
    """c_n(e) (or the sum of n's weights for e) as [some tokens, E], for all tokens in turn."""
    rows = max(_CHUNK // experts, 1)
    for start in range(0, len(indices), rows):
        part = indices[start : start + rows]
        flat = (np.arange(len(part))[:, None] * experts + part).ravel()
        values = None if weights is None else weights[start : start + rows].ravel()
        yield np.bincount(flat, values, minlength=len(part) * experts).reshape(len(part), experts).astype(np.float64)


def _joint(codes: NDArray[np.integer], values: int, indices: NDArray[np.integer], experts: int) -> Counts:
    flat = codes[:, None].astype(np.int64) * experts + indices
    return np.bincount(flat.ravel(), minlength=values * experts).reshape(values, experts)


def _entropy(counts: NDArray[np.integer] | Array) -> float:
    """In bits, of counts or shares."""
    kept = counts[counts > 0] / counts.sum()
    return float(-(kept * np.log2(kept)).sum())


def _choice_entropy(indices: NDArray[np.integer]) -> float:
    """mean_n H(c_n / C): log2 C where all choices of a token are different experts."""
    choices = indices.shape[1]
    if choices == 1:
        return 0.0
    times = (indices[:, :, None] == indices[:, None, :]).sum(-1)  # how often each choice's expert was chosen
    return float(-np.log2(times / choices).mean())


def _mean(values: NDArray[np.floating]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if len(known) else None
