import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.config import ModelConfig, RopeConfig
from abyssal.model import Transformer
from abyssal.model.rotary import inverse_frequencies
from abyssal.upcycling.attention import latent_attention, separated, without_norm
from abyssal.upcycling.calibration import Statistics, causal_context, statistics
from abyssal.upcycling.latent import even_out, query_spectrum, rank_for, root, spectrum
from abyssal.upcycling.rotary import rotary_theta, separate
from abyssal.upcycling.settings import Settings, converted_config

SIZE, HIDDEN, LENGTH, THETA = 8, 24, 12, 300.0


def dense_layer(heads=4, groups=2, seed=0):
    """A dense model's first attention and the config around it."""
    config = ModelConfig.model_validate(
        {
            "vocab_size": 32,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 1,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
            "attention": {
                "kind": "mha",
                "num_attention_heads": heads,
                "num_key_value_heads": groups,
                "head_dim": SIZE,
            },
            "rope": {"theta": THETA, "layout": "halves"},
            "initializer_range": 0.4,
        }
    )
    model = Transformer(config, generator=torch.Generator().manual_seed(seed))
    return config, model.blocks[0].self_attn.requires_grad_(False)


def inputs(n=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(HIDDEN, HIDDEN, generator=g)
    return torch.randn(n, LENGTH, HIDDEN, generator=g) @ mix / HIDDEN**0.5


def made_up(heads, at_home=False, seed=0):
    """Statistics that come from no model; ``at_home``: all attention at distance 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, HIDDEN, generator=g, dtype=torch.float64)
    distances = torch.zeros(heads, LENGTH, dtype=torch.float64)
    if at_home:
        distances[:, 0] = 1
    else:
        distances = torch.rand(heads, LENGTH, generator=g, dtype=torch.float64).softmax(-1)
    return x, Statistics(
        x.T @ x / len(x), distances, torch.rand(heads, generator=g, dtype=torch.float64) + 0.1, torch.ones(4, 50)
    )


def test_statistics_are_those_of_a_plain_loop():
    _, layer = dense_layer()
    x = inputs(3)
    found = statistics(layer, x, causal_context(THETA, SIZE, LENGTH, x.device))
    assert torch.allclose(found.moment, torch.einsum("nta,ntb->ab", x.double(), x.double()) / x[..., 0].numel())
    frequencies = [THETA ** (-2 * i / SIZE) for i in range(SIZE // 2)]

    def turned(vector, position):
        pairs = torch.complex(vector[: SIZE // 2], vector[SIZE // 2 :])
        return pairs * torch.exp(1j * torch.tensor(frequencies) * position)

    far, spread, received = torch.zeros(4, LENGTH), torch.zeros(4), torch.zeros(3, LENGTH)
    for index, window in enumerate(x):
        q = (window @ layer.q_proj.weight.T).unflatten(-1, (4, SIZE))
        k = (window @ layer.k_proj.weight.T).unflatten(-1, (2, SIZE))
        v = (window @ layer.v_proj.weight.T).unflatten(-1, (2, SIZE))
        for head in range(4):
            w_o = layer.o_proj.weight[:, head * SIZE : (head + 1) * SIZE]
            for m in range(LENGTH):
                scores = [
                    (turned(q[m, head], m).conj() * turned(k[n, head // 2], n)).sum().real / math.sqrt(SIZE)
                    for n in range(m + 1)
                ]
                p = torch.stack(scores).softmax(0)
                received[index, : m + 1] += p
                outs = v[: m + 1, head // 2] @ w_o.T
                middle = p @ outs
                spread[head] += (p * (outs - middle).square().sum(-1)).sum() / LENGTH / len(x)
                for n in range(1, m + 1):
                    far[head, m - n] += p[n]
    assert torch.allclose(found.spread.float(), spread, rtol=1e-4)
    assert torch.allclose(found.received.float(), received, rtol=1e-4)
    assert torch.allclose(found.distances.float(), far / far.sum(-1, keepdim=True), atol=1e-5)


@given(groups=st.sampled_from((1, 2, 4)), rotary=st.sampled_from((2, 4, 8)), seed=st.integers(0, 100))
@settings(max_examples=20)
def test_nothing_of_a_key_is_lost_where_positions_agree(groups, rotary, seed):
    """At distance 0 rotary and unturned part together are the dense score, whatever the split."""
    g = torch.Generator().manual_seed(seed)
    w_q = torch.randn(4, SIZE, HIDDEN, generator=g)
    w_k = torch.randn(groups, SIZE, HIDDEN, generator=g)
    x, stats = made_up(4, at_home=True, seed=seed)
    parts = separate(w_q, w_k, stats, THETA, rotary)
    a, b = x[:20], x[20:40]
    for head in range(4):
        group = head // (4 // groups)
        wanted = ((a @ w_q[head].double().T) * (b @ w_k[group].double().T)).sum(-1)
        turned = ((a @ parts.q_rope[head].T) * (b @ parts.k_rope.T)).sum(-1)
        unturned = ((a @ parts.q_nope[head].T) * (b @ parts.k_nope[group].T)).sum(-1)
        assert torch.allclose(turned + unturned, wanted)


def test_shared_key_holds_the_most_that_one_number_can():
    g = torch.Generator().manual_seed(3)
    w_q, w_k = torch.randn(4, SIZE, HIDDEN, generator=g), torch.randn(2, SIZE, HIDDEN, generator=g)
    x, stats = made_up(4)
    parts = separate(w_q, w_k, stats, THETA, 2)
    q, k = (torch.complex(x @ w[:, 0].double().T, x @ w[:, SIZE // 2].double().T) for w in (w_q, w_k))  # pair 0
    energy = (q.abs().square().mean(0) * stats.spread).view(2, 2).sum(1)
    singular = torch.linalg.svdvals(k * energy.sqrt())
    assert parts.kept == pytest.approx(float(singular[0] ** 2 / singular.square().sum()), rel=1e-6)


@pytest.mark.parametrize("heads", [1, 4])
def test_one_key_head_is_converted_exactly(heads):
    """With one key head the shared rotary key is that head's, and values need a rank of its size."""
    config, layer = dense_layer(heads=heads, groups=1)
    x = inputs()
    old = causal_context(THETA, SIZE, LENGTH, x.device)
    stats = statistics(layer, x, old)
    parts, found = separated(layer, stats, THETA, SIZE, 1.0)
    theta = rotary_theta(THETA, SIZE, SIZE)
    new = latent_attention(
        layer, converted_config(config, Settings(cache=2 * SIZE), SIZE, SIZE, theta), stats, parts, found, x
    )
    context = causal_context(theta, SIZE, LENGTH, x.device)
    fresh = inputs(seed=9)
    wanted = layer(fresh, old)
    assert torch.allclose(without_norm(new)(fresh, context), wanted, atol=1e-3)
    assert (new(fresh, context) - wanted).abs().max() > 0.01  # the norm does change it


def test_full_rank_differs_by_the_rotation_alone():
    """Every frequency rotary and nothing cut: only the second component of the keys is turned no more."""
    config, layer = dense_layer()
    x = inputs()
    old = causal_context(THETA, SIZE, LENGTH, x.device)
    stats = statistics(layer, x, old)
    cosines = {}
    for rotary, rank in ((2, 24), (8, 24), (8, 4)):
        parts, found = separated(layer, stats, THETA, rotary, 1.0)
        theta = rotary_theta(THETA, SIZE, rotary)
        made = converted_config(config, Settings(cache=rotary + rank), rank, rotary, theta)
        new = without_norm(latent_attention(layer, made, stats, parts, found, x))
        out = new(x, causal_context(theta, rotary, LENGTH, x.device))
        cosines[rotary, rank] = float(F.cosine_similarity(out, layer(x, old), dim=-1).mean())
    assert cosines[8, 24] > cosines[2, 24]
    assert cosines[8, 24] > cosines[8, 4]
    assert cosines[8, 24] > 0.9


def test_error_of_a_rank_is_that_of_its_factors():
    _, layer = dense_layer()
    x, stats = made_up(4)
    parts = separate(
        layer.q_proj.weight.unflatten(0, (4, SIZE)), layer.k_proj.weight.unflatten(0, (2, SIZE)), stats, THETA, 4
    )
    w_v, w_o = layer.v_proj.weight.unflatten(0, (2, SIZE)), layer.o_proj.weight.unflatten(1, (4, SIZE))
    found = spectrum(parts, w_v, w_o, stats, 0.7)
    both = torch.cat((parts.k_nope.flatten(0, 1), w_v.double().flatten(0, 1)))
    for rank in (1, 5, 20):
        kv_a, kv_b = found.cut(rank)
        wrong = x @ (both - kv_b @ kv_a).T
        # the cost of an error, head by head, as the docstring has it
        cost, whole = 0.0, 0.0
        for index, (error, full) in enumerate(zip(wrong.split(SIZE, 1), (x @ both.T).split(SIZE, 1), strict=True)):
            for head in (0, 1) if index % 2 == 0 else (2, 3):
                if index < 2:
                    q = x @ parts.q_nope[head].T
                    metric = q.T @ q / len(x) * stats.spread[head] / SIZE * 0.7
                else:
                    metric = w_o[:, head].double().T @ w_o[:, head].double()
                cost += float(((error @ metric) * error).sum())
                whole += float(((full @ metric) * full).sum())
        assert found.error(rank) == pytest.approx(math.sqrt(cost / whole), rel=1e-5)


@pytest.mark.parametrize(("rotary", "size"), [(8, 16), (40, 64), (16, 16)])
def test_the_new_rotary_table_holds_the_dense_ones_fastest_frequencies(rotary, size):
    new = inverse_frequencies(
        RopeConfig(theta=rotary_theta(THETA, size, rotary)), rotary, torch.float64, torch.device("cpu")
    )
    dense = THETA ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
    assert torch.allclose(new, dense[: rotary // 2])


def test_smallest_rank_for_an_error():
    one, two = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    # rank 1 leaves 1/√5 = .447 of the first and nothing of the second, .224 in the mean
    assert rank_for([one, two], 0.23) == 1
    assert rank_for([one, two], 0.22) == 2
    assert rank_for([one], 0.4) == 2


@pytest.mark.parametrize("length", [0.6, 40.0])
def test_latents_have_one_length_even_those_that_are_rare_and_unlike_the_others(length):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, HIDDEN, generator=g)
    x[::100] = F.normalize(torch.randn(HIDDEN, generator=g), dim=0) * HIDDEN**0.5 * length
    x[::100] += 0.02 * torch.randn(40, HIDDEN, generator=g)
    received = torch.ones(4000)
    received[::100] = 50.0  # as the first token of a text, on which attention rests
    kv_a = torch.randn(16, HIDDEN, generator=g).double()
    kv_b = torch.randn(10, 16, generator=g).double()
    a, b = even_out(kv_a, kv_b, x, received)
    assert torch.allclose(b @ a, kv_b @ kv_a)
    lengths = (x.double() @ a.T).square().mean(-1)
    latent = x.double() @ kv_a.T
    plain = (latent @ root(latent.T @ latent / len(latent))[1]).square().mean(-1)
    assert abs(lengths[::100].mean() - 1) < 0.3 * abs(plain[::100].mean() - 1)
    assert abs(plain[::100].mean() - 1) > 0.4
    assert lengths.std() < plain.std()


def test_root_and_inverse():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=g, dtype=torch.float64)
    up, down = root(x.T @ x)
    assert torch.allclose(up @ up, x.T @ x)
    assert torch.allclose(up @ down, torch.eye(5, dtype=torch.float64))


@given(rank=st.integers(1, 16), seed=st.integers(0, 50))
@settings(max_examples=15)
def test_queries_lose_what_their_scores_are_worth_and_no_more(rank, seed):
    """The SVD's error is the mean over pairs of tokens of what a score is off by, squared; random cuts lose more."""
    g = torch.Generator().manual_seed(seed)
    w_q, w_k = torch.randn(4, SIZE, HIDDEN, generator=g), torch.randn(2, SIZE, HIDDEN, generator=g)
    x, stats = made_up(4, seed=seed)
    parts = separate(w_q, w_k, stats, THETA, 2)
    found = query_spectrum(parts, stats)
    down, up = found.cut(rank)
    whole = torch.cat((parts.q_nope, parts.q_rope), dim=1)

    def lost(queries):
        off = (whole - queries.unflatten(0, (4, SIZE + 2))) @ x.T
        total = 0.0
        for head in range(4):
            keys = parts.k_nope[head // 2] @ x.T
            score = (off[head, :SIZE].T @ keys).square().mean()
            rotary = off[head, SIZE:].square().sum(0).mean() * (parts.k_rope @ x.T).square().sum(0).mean() / 2
            total += float(stats.spread[head] / SIZE * (score + rotary))
        return total

    least = lost(up @ down)
    assert math.sqrt(least / lost(torch.zeros_like(up @ down))) == pytest.approx(found.error(rank), rel=1e-4, abs=1e-4)
    for _ in range(3):
        other = torch.randn(rank, HIDDEN, generator=g, dtype=torch.float64)
        moment = stats.moment
        best = whole.flatten(0, 1) @ moment @ other.T @ torch.linalg.inv(other @ moment @ other.T)
        assert lost(best @ other) >= least - 1e-6 * abs(least)
