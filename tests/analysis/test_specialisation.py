"""Measures of routing against loops in plain Python, and where the answer is known."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abyssal.analysis.lens import LayerRouting, Text, Texts
from abyssal.analysis.specialisation import (
    drift,
    expected_pairs,
    information,
    lift,
    measure,
    most_changed,
    pairs,
    position_bins,
    uses,
)


def texts_of(ids, text=None, window=64, document=None):
    ids = np.asarray(ids, np.int32)
    text = np.zeros(len(ids), np.int32) if text is None else np.asarray(text, np.int32)
    names = [Text(f"t{i}", 1, int((text == i).sum()), False) for i in range(int(text.max()) + 1)]
    position = np.arange(len(ids), dtype=np.int32) % window
    return Texts(names, window, ids, text if document is None else document, text, position)


def routing_of(indices, experts, weights=None, **changes):
    indices = np.asarray(indices, np.int16)
    weights = np.full(indices.shape, 0.5, np.float32) if weights is None else np.asarray(weights, np.float32)
    nothing = np.zeros(len(indices), np.float32)
    fields = {"moved": None, "shared": nothing, "cosine": nothing + np.nan} | changes
    return LayerRouting(1, 0, experts, 1, indices, weights, **fields)


def entropy_of(weights):
    total = sum(weights)
    return -sum(w / total * math.log2(w / total) for w in weights if w)


@st.composite
def routings(draw, distinct=True):
    """Choices [N, C] among E experts, an x for each token, weights."""
    experts, count = draw(st.integers(1, 7)), draw(st.integers(1, 40))
    choices = draw(st.integers(1, experts))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    if distinct:
        indices = np.stack([rng.permutation(experts)[:choices] for _ in range(count)])
    else:
        indices = rng.integers(experts, size=(count, choices))
    return indices, experts, rng.integers(4, size=count), rng.random((count, choices)), rng


@given(routings() | routings(distinct=False))
def test_information_equals_loops(case):
    indices, experts, x, _, rng = case
    count, choices = indices.shape
    joint, left, right = Counter(), Counter(), Counter()
    for n in range(count):
        for e in indices[n].tolist():
            share = 1 / (count * choices)
            joint[int(x[n]), e] += share
            left[int(x[n])] += share
            right[e] += share
    plug_in = sum(p * math.log2(p / (left[a] * right[e])) for (a, e), p in joint.items())
    inner = sum(entropy_of(Counter(row.tolist()).values()) for row in indices) / count
    found = information(x, indices, experts, rng)
    assert found.plug_in == pytest.approx(plug_in, abs=1e-9)
    assert found.most == pytest.approx(min(entropy_of(left.values()), entropy_of(right.values()) - inner), abs=1e-9)
    assert found.bits == found.plug_in - found.chance
    assert found.plug_in <= found.most + 1e-9
    if found.share is not None:
        assert found.share == pytest.approx((found.plug_in - found.chance) / (found.most - found.chance))


@given(routings() | routings(distinct=False))
def test_pairs_and_lift_equal_loops(case):
    indices, experts, *_ = case
    expected = np.zeros((experts, experts), int)
    load = np.zeros(experts, int)
    for row in indices.tolist():
        for e in row:
            load[e] += 1
        for i in set(row):
            for j in set(row):
                expected[i, j] += 1
    found = pairs(indices, experts)
    assert found.tolist() == expected.tolist()
    ratio = lift(found)
    distinct = [set(row) for row in indices.tolist()]
    partners = [sum(len(row) - 1 for row in distinct if e in row) for e in range(experts)]
    if not any(partners):
        assert ratio is None
        return
    chance = expected_pairs(found)
    for i in range(experts):
        # Each expert keeps its number of pairs, with whom is as by chance: a_i a_j.
        assert chance[i].sum() == pytest.approx(partners[i], rel=0.01, abs=1e-9)
        for j in range(experts):
            if i == j or not partners[i] * partners[j]:
                assert math.isnan(ratio[i, j])
            else:
                assert ratio[i, j] * chance[i, j] == pytest.approx(expected[i, j])
                for k in set(range(experts)) - {i, j}:
                    for m in set(range(experts)) - {i, j, k}:
                        assert chance[i, j] * chance[k, m] == pytest.approx(chance[i, m] * chance[k, j])


def test_uneven_loads_alone_are_no_company():
    """Choices without replacement, by very different loads: no pair likes or avoids each other."""
    draw = np.random.default_rng(0)
    load = np.array([0.4, 0.2, 0.15, 0.1, 0.1, 0.05])
    # Two that are not the same, each by its load: a pair's probability is a_i a_j for i ≠ j.
    both = draw.choice(6, (400_000, 2), p=load)
    ratio = lift(pairs(both[both[:, 0] != both[:, 1]].astype(np.int16), 6))
    assert np.nanmin(ratio) > 0.95
    assert np.nanmax(ratio) < 1.05


@given(routings())
def test_load_entropy_and_use_by_text_equal_loops(case):
    indices, experts, x, *_ = case
    text = np.sort(np.concatenate(([0], x[1:] % 2)))  # the first text has a token
    found = measure(routing_of(indices, experts), texts_of(range(len(indices)), text))
    load = [sum(row.count(e) for row in indices.tolist()) for e in range(experts)]
    assert found.load.tolist() == load
    assert found.entropy == pytest.approx(entropy_of(load), abs=1e-9)
    assert found.evenness == pytest.approx(entropy_of(load) / math.log2(experts) if experts > 1 else 1)
    mean = sum(load) / experts
    assert found.balance.max_vio == pytest.approx((max(load) - mean) / mean)
    assert found.balance.cv == pytest.approx(math.sqrt(sum((n - mean) ** 2 for n in load) / experts) / mean)
    for t in range(int(text.max()) + 1):
        mine = [row for row, of in zip(indices.tolist(), text, strict=True) if of == t]
        assert found.used[t].tolist() == [sum(row.count(e) for row in mine) for e in range(experts)]
    assert (found.domain is None) == (text.max() == 0)


@given(routings(), st.integers(0, 100))
def test_drift_equals_loops(case, seed):
    indices, experts, _, weights, _ = case
    rng = np.random.default_rng(seed)
    count, choices = indices.shape
    others = np.stack([rng.permutation(experts)[:choices] for _ in range(count)])
    other_weights = rng.random((count, choices))
    found = drift(routing_of(indices, experts, weights), routing_of(others, experts, other_weights))
    overlap = [len(set(a) & set(b)) / choices for a, b in zip(indices.tolist(), others.tolist(), strict=True)]
    assert found.overlap == pytest.approx(sum(overlap) / count)
    assert found.by_token.tolist() == pytest.approx(overlap)
    assert found.same_first == pytest.approx(sum(a[0] == b[0] for a, b in zip(indices, others, strict=True)) / count)
    p, q = ([sum(r.count(e) for r in x.tolist()) / x.size for e in range(experts)] for x in (indices, others))
    assert found.variation == pytest.approx(sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2)
    js = sum(
        (a * math.log2(2 * a / (a + b)) if a else 0) / 2 + (b * math.log2(2 * b / (a + b)) if b else 0) / 2
        for a, b in zip(p, q, strict=True)
    )
    assert found.divergence == pytest.approx(js, abs=1e-9)
    change = 0.0
    for n in range(count):
        mine = dict(zip(indices[n].tolist(), weights[n].tolist(), strict=True))
        theirs = dict(zip(others[n].tolist(), other_weights[n].tolist(), strict=True))
        apart = sum(abs(mine.get(e, 0) - theirs.get(e, 0)) for e in range(experts))
        change += apart / (sum(mine.values()) + sum(theirs.values())) / count
    assert found.weight_change == pytest.approx(change, abs=1e-6)
    itself = drift(routing_of(indices, experts, weights), routing_of(indices, experts, weights))
    assert (itself.overlap, itself.same_first, itself.variation, itself.divergence, itself.weight_change) == (
        1, 1, 0, pytest.approx(0, abs=1e-12), 0,
    )  # fmt: skip
    assert most_changed([itself]) == []
    order = sorted(range(count), key=lambda n: (overlap[n], n))
    assert most_changed([found], 5) == [n for n in order if overlap[n] < 1][:5]


@given(routings())
def test_uses_equal_loops(case):
    indices, experts, x, weights, _ = case
    weights = weights.astype(np.float32)
    found = uses(routing_of(indices, experts, weights), texts_of(x), 3)
    for e in range(experts):
        mine = [(n, float(weights[n][k])) for n in range(len(x)) for k in range(indices.shape[1]) if indices[n, k] == e]
        best = []
        for n, _ in sorted(mine, key=lambda item: (-item[1], item[0])):
            if x[n] not in [x[m] for m in best]:
                best.append(n)
        assert [n for n in found.positions[e].tolist() if n >= 0] == best[:3]
        times = sorted(Counter(int(x[n]) for n, _ in mine).items(), key=lambda item: (-item[1], item[0]))[:3]
        assert [(i, t) for i, t in zip(found.ids[e].tolist(), found.times[e].tolist(), strict=True) if i >= 0] == times


class TestKnownAnswers:
    def test_expert_by_token_id_alone(self):
        ids = np.random.default_rng(0).integers(8, size=4000)
        found = measure(routing_of(ids[:, None], 8), texts_of(ids))
        assert found.token.plug_in == pytest.approx(found.entropy)
        assert found.token.share == pytest.approx(1)
        assert abs(found.position.bits) < 0.01

    def test_two_experts_by_token_id_alone(self):
        """What can be told is the entropy less the bit that no one can tell: which of the two was drawn."""
        ids = np.random.default_rng(0).integers(8, size=4000)
        found = measure(routing_of(np.stack((ids, (ids + 1) % 8), 1), 8), texts_of(ids))
        assert found.token.plug_in == pytest.approx(found.entropy - 1)
        assert found.token.share == pytest.approx(1)

    def test_expert_by_position_and_by_text(self):
        position = np.arange(2048) % 64
        found = measure(routing_of(position_bins(position)[:, None], 8), texts_of(np.zeros(2048)))
        assert found.position.share == pytest.approx(1)
        assert found.token.plug_in == pytest.approx(0)  # one id tells nothing
        text = np.repeat([0, 1], 1024)
        found = measure(routing_of(text[:, None], 8), texts_of(range(2048), text))
        assert found.domain.plug_in == pytest.approx(1)  # a bit
        assert found.domain.share == pytest.approx(1)

    def test_random_routing_is_chance(self):
        rng = np.random.default_rng(1)
        indices = np.stack([rng.permutation(16)[:4] for _ in range(3000)])
        found = measure(routing_of(indices, 16), texts_of(rng.integers(1000, size=3000), rng.integers(2, size=3000)))
        assert found.token.plug_in > 0.5  # three tokens an id: the plug-in sees what is not there
        for told in (found.token, found.position, found.domain):
            assert abs(told.bits) < 0.02
            assert abs(told.share) < 0.03
        assert np.nanmean(found.lift) == pytest.approx(1, abs=0.01)
        assert np.nanmax(np.abs(found.lift - 1)) < 0.35

    def test_experts_that_always_go_together(self):
        indices = np.array([[0, 1], [2, 3]] * 50)
        found = measure(routing_of(indices, 4), texts_of(range(100)))
        assert found.together.tolist() == [[50, 50, 0, 0], [50, 50, 0, 0], [0, 0, 50, 50], [0, 0, 50, 50]]
        assert found.lift[0, 1] == pytest.approx(3)  # of three others that it could be
        assert found.lift[0, 2] == 0

    def test_positions_in_bins_that_double(self):
        assert position_bins(np.arange(9)).tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]

    def test_tokens_without_a_decision_do_not_count(self):
        indices = np.array([[0], [1], [-1], [-1]])
        routing = routing_of(
            indices, 2, shared=np.array([0.5, 0.7, 0, 0], np.float32), moved=np.array([1, 0, 0, 0], np.uint8)
        )
        found = measure(routing, texts_of(range(4)))
        assert found.tokens == 2
        assert found.load.tolist() == [1, 1]
        assert found.shared == pytest.approx(0.6)
        assert (found.moved_tokens, found.moved_choices) == (0.5, 0.5)
        assert uses(routing, texts_of(range(4)), 2).positions.tolist() == [[0, -1], [1, -1]]
        compared = drift(routing, routing_of([[0], [0], [1], [1]], 2))
        assert compared.overlap == 0.5
        assert np.isnan(compared.by_token[2:]).all()

    def test_different_shapes_are_refused(self):
        with pytest.raises(ValueError, match="among 4 experts against"):
            drift(routing_of([[0]], 4), routing_of([[0]], 5))


def test_the_seed_decides_the_shuffles():
    rng = np.random.default_rng(1)
    routing, texts = routing_of(rng.integers(4, size=(60, 1)), 4), texts_of(rng.integers(9, size=60))
    first, again, other = (measure(routing, texts, seed).token for seed in (1, 1, 2))
    assert first == again
    assert first.chance != other.chance
    torch.manual_seed(0)  # no other generator has a part in it
    assert measure(routing, texts, 1).token == first
