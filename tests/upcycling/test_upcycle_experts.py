import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.config import MoEConfig
from abyssal.errors import UserError
from abyssal.model.layers import MLP
from abyssal.upcycling.experts import (
    ExpertSplit,
    aim_router,
    all_experts,
    cluster,
    contributions,
    energies,
    router_figures,
    split,
)
from abyssal.upcycling.fit import cosine, fit, outputs

HIDDEN, WIDTH = 16, 48


def moe(experts=4, active=2, shared=2):
    return MoEConfig(
        n_routed_experts=experts,
        num_experts_per_tok=active,
        n_shared_experts=shared,
        moe_intermediate_size=ExpertSplit(experts, active, shared).width(WIDTH),
        routed_scaling_factor=float(active),
    )


def dense_mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return MLP(HIDDEN, WIDTH).to(dtype).requires_grad_(False)


def rows(n=300, seed=1):
    return torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(seed))


@given(shape=st.sampled_from(((4, 2, 2), (6, 3, 0), (2, 1, 1), (46, 5, 2))), seed=st.integers(0, 50))
@settings(max_examples=15)
def test_all_experts_together_are_the_dense_layer(shape, seed):
    mlp = dense_mlp(seed)
    layer = split(mlp, moe(*shape), rows(), torch.Generator().manual_seed(seed))
    x = rows(40, seed=7).double()
    exact = mlp.double()(x)
    assert torch.allclose(all_experts(layer.double(), x), exact, atol=1e-12)


def test_each_neuron_is_in_one_expert_and_the_busiest_are_shared():
    mlp, x = dense_mlp(), rows()
    mlp.up_proj.weight[5] *= 50
    mlp.up_proj.weight[17] *= 40
    layer = split(mlp, moe(4, 2, 2), x, torch.Generator().manual_seed(0))
    shared = layer.shared_experts.up_proj.weight
    parts = [shared, *layer.experts.gate_up_proj[:, 8:]]
    neurons = torch.cat(parts)
    where = [int((neurons == row).all(1).nonzero().squeeze()) for row in mlp.up_proj.weight]
    assert sorted(where) == list(range(WIDTH))
    assert where[5] < len(shared)
    assert where[17] < len(shared)


@given(count=st.integers(2, 6), room=st.integers(1, 8), seed=st.integers(0, 100))
def test_clusters_are_balanced(count, room, seed):
    features = torch.rand(count * room, 30, generator=torch.Generator().manual_seed(seed))
    found = cluster(features, count, torch.Generator().manual_seed(seed))
    assert found.bincount(minlength=count).tolist() == [room] * count


def test_neurons_that_work_together_come_together():
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(24) % 3
    tokens = torch.randint(0, 3, (500,), generator=g)
    features = (tokens == truth.unsqueeze(1)).float() + 0.1 * torch.rand(24, 500, generator=g)
    # k-means may settle elsewhere from one beginning; from most it does not
    right = 0
    for seed in range(10):
        found = cluster(features, 3, torch.Generator().manual_seed(seed))
        right += len({(int(a), int(b)) for a, b in zip(truth, found, strict=True)}) == 3
    assert right >= 5


def test_contributions_are_each_experts_own():
    layer = split(dense_mlp(), moe(), rows(), torch.Generator().manual_seed(0))
    x = rows(10)
    found = contributions(layer, x)
    for expert in range(4):
        gate, up = layer.experts.gate_up_proj[expert].chunk(2)
        alone = (F.silu(x @ gate.T) * (x @ up.T)) @ layer.experts.down_proj[expert].T
        assert torch.allclose(found[:, expert], alone, atol=1e-6)
    assert torch.allclose(energies(layer, x), found.norm(dim=-1))


def test_router_finds_the_experts_that_matter():
    """Neurons that each look at one direction: the router can tell from the input which experts will be loud."""
    mlp = dense_mlp()
    owner = torch.arange(WIDTH) % 4
    directions = torch.eye(HIDDEN)[:4] * 6
    mlp.gate_proj.weight.copy_(directions[owner])
    x = rows(2000)
    layer = split(mlp, moe(4, 1, 0), x, torch.Generator().manual_seed(3))
    y = mlp(x)
    nothing = router_figures(layer, energies(layer, x), x)
    aim_router(layer, x, y)
    found = router_figures(layer, energies(layer, x), x)
    assert found.caught > nothing.caught
    assert found.caught > 0.5 * (1 + found.best) - 0.15
    assert found.load_cv < 0.5


def test_router_figures_are_those_of_a_plain_loop():
    mlp, x = dense_mlp(), rows(50)
    layer = split(mlp, moe(6, 2, 2), x, torch.Generator().manual_seed(0))
    layer.gate.weight.copy_(rows(6, seed=4))
    norms = energies(layer, x)
    found = router_figures(layer, norms, x)
    caught, best, load = 0.0, 0.0, [0] * 6
    for token, norm in zip(x, norms.square().tolist(), strict=True):
        scores = (layer.gate.weight @ token).tolist()
        chosen = sorted(range(6), key=lambda e: -scores[e])[:2]
        for expert in chosen:
            load[expert] += 1
        caught += sum(norm[e] for e in chosen) / sum(norm) / len(x)
        best += sum(sorted(norm)[-2:]) / sum(norm) / len(x)
    mean = sum(load) / 6
    assert found.caught == pytest.approx(caught, rel=1e-5)
    assert found.best == pytest.approx(best, rel=1e-5)
    assert found.load_cv == pytest.approx(math.sqrt(sum((n - mean) ** 2 for n in load) / 6) / mean, rel=1e-6)


def test_fit_brings_the_routed_layer_nearer():
    mlp, x = dense_mlp(), rows(512).view(8, 64, HIDDEN)
    y = mlp(x)
    layer = split(mlp, moe(4, 2, 2), x.flatten(0, 1), torch.Generator().manual_seed(0))
    aim_router(layer, x.flatten(0, 1), y.flatten(0, 1))

    def forward(part):
        return layer(part, layer.route(part))

    fresh = rows(256, seed=5).view(4, 64, HIDDEN)
    before = cosine(outputs(forward, fresh, batch=4, dtype=torch.float32), mlp(fresh))
    order = torch.Generator().manual_seed(0)
    fit(layer, forward, x, y, steps=200, batch=4, rate=0.005, dtype=torch.float32, generator=order)
    after = cosine(outputs(forward, fresh, batch=4, dtype=torch.float32), mlp(fresh))
    assert after > before + 0.01
    assert not any(p.requires_grad for p in layer.parameters())


def test_a_rate_that_does_harm_is_halved():
    mlp, x = dense_mlp(), rows(512).view(8, 64, HIDDEN)
    y = mlp(x)
    new = dense_mlp()
    new.down_proj.weight.mul_(0.9)  # an error of .01, which steps as long as the weights themselves make much larger
    order = torch.Generator().manual_seed(0)
    fit(new, new, x, y, steps=60, batch=4, rate=1.0, dtype=torch.float32, generator=order)
    error = (new(x) - y).square().sum(-1) / y.square().sum(-1)
    assert error.mean() < 0.01


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (ExpertSplit(5, 2, 2), "5 routed and 2 shared do not divide intermediate_size 48"),
        (ExpertSplit(1, 1), "at least 2 experts"),
        (ExpertSplit(4, 5), "1 to all of them active"),
        (ExpertSplit(4, 0), "1 to all of them active"),
        (ExpertSplit(4, 2, -1), "no negative number"),
    ],
)
def test_impossible_splits_are_refused(chosen, said):
    with pytest.raises(UserError, match=said):
        chosen.width(48)
