from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_models import kept_experts, margin, randomised, route, scores_of, small, tokens_for
from torch import Tensor, nn

from abyssal.config import MoEConfig
from abyssal.model import Routing, RoutingRecorder, Transformer
from abyssal.model.router import Router


def moe_config(**changes: Any) -> MoEConfig:
    base = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 3}
    return MoEConfig.model_validate(base | changes)


def router_with_logits(moe: MoEConfig, bias: list[float] | None = None) -> Router:
    """A router whose logits are its input."""
    router = Router(moe.n_routed_experts, moe).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(moe.n_routed_experts))
        if bias is not None:
            assert router.e_score_correction_bias is not None
            router.e_score_correction_bias.copy_(torch.tensor(bias))
    return router


def logits_with(scores: list[float]) -> Tensor:
    """Logits [1, 1, E] whose sigmoid is ``scores``."""
    return torch.tensor(scores, dtype=torch.float64).logit().view(1, 1, -1)


@st.composite
def moes(draw: st.DrawFn) -> MoEConfig:
    groups, size = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    kept = draw(st.integers(1, groups))
    return MoEConfig(
        n_routed_experts=groups * size,
        num_experts_per_tok=draw(st.integers(1, kept * size)),
        moe_intermediate_size=2,
        scoring_func=draw(st.sampled_from(["sigmoid", "softmax"])),
        topk_method=draw(st.sampled_from(["greedy", "group_limited_greedy", "noaux_tc"])),
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5, 16.0])),
    )


@settings(max_examples=200)
@given(moe=moes(), seed=st.integers(0, 2**31), shift=st.sampled_from([0.0, -0.5, -3.0]))
def test_choice_and_weights_equal_plain_loops(moe: MoEConfig, seed: int, shift: float):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, moe.n_routed_experts, dtype=torch.float64, generator=generator)
    bias = (torch.randn(moe.n_routed_experts, generator=generator) * 0.4 + shift).tolist() if moe.has_bias else None
    routing = router_with_logits(moe, bias)(x)
    for t in range(6):
        logits = x.flatten(0, 1)[t].tolist()
        scores = scores_of(moe, logits)
        assume(margin(moe, scores, bias) > 1e-9)
        expected = route(moe, logits, bias)
        assert routing.indices.flatten(0, 1)[t].tolist() == list(expected)  # best first
        torch.testing.assert_close(
            routing.weights.flatten(0, 1)[t],
            torch.tensor(list(expected.values()), dtype=torch.float64),
            rtol=1e-12,
            atol=0,
        )
        torch.testing.assert_close(
            routing.scores.flatten(0, 1)[t], torch.tensor(scores, dtype=torch.float64), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_normalised_weights_sum_to_the_scaling_factor(scoring: str, factor: float):
    moe = moe_config(scoring_func=scoring, routed_scaling_factor=factor, num_experts_per_tok=3)
    weights = router_with_logits(moe, [0.3, -2, 1, 0, 0, 0.1])(torch.randn(4, 5, 6)).weights
    torch.testing.assert_close(weights.sum(-1), torch.full((4, 5), factor, dtype=weights.dtype), atol=1e-6, rtol=0)


def test_bias_changes_the_choice_and_never_the_weights():
    moe = moe_config(norm_topk_prob=False, routed_scaling_factor=2.0)
    x = logits_with([0.9, 0.8, 0.3, 0.2, 0.1, 0.05])
    plain = router_with_logits(moe)(x)
    assert plain.indices.tolist() == [[[0, 1]]]
    moved = router_with_logits(moe, [-0.7, 0, 0, 0, 0, 0.5])(x)
    assert moved.indices.tolist() == [[[1, 5]]]  # 0.2, 0.8, 0.3, 0.2, 0.1, 0.55
    torch.testing.assert_close(moved.weights.flatten(), torch.tensor([1.6, 0.1], dtype=torch.float64))
    torch.testing.assert_close(moved.scores, plain.scores)
    shared = router_with_logits(moe_config(), [-0.7, 0, 0, 0, 0, 0.5])(x).weights.flatten()
    torch.testing.assert_close(shared, torch.tensor([0.8 / 0.85, 0.05 / 0.85], dtype=torch.float64))


def test_excluded_groups_lose_to_negative_biased_scores():
    # Groups (0, 1) and (2, 3); biased scores -0.1, -0.4 | -0.6, -0.8. The first group is kept, both its experts must be
    # taken; were the other masked with 0, it would beat them both.
    moe = moe_config(n_routed_experts=4, n_group=2, topk_group=1)
    routing = router_with_logits(moe, [-1.0, -1.0, -1.0, -1.0])(logits_with([0.9, 0.6, 0.4, 0.2]))
    assert routing.indices.tolist() == [[[0, 1]]]
    torch.testing.assert_close(routing.weights.flatten(), torch.tensor([0.6, 0.4], dtype=torch.float64))


def test_a_group_counts_by_its_maximum_in_v2_and_by_its_two_best_in_v3():
    scores = [0.9, 0.05, 0.6, 0.55]  # maxima 0.9 and 0.6, sums 0.95 and 1.15
    groups = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1}
    v2 = router_with_logits(moe_config(**groups, topk_method="group_limited_greedy"))(logits_with(scores))
    v3 = router_with_logits(moe_config(**groups))(logits_with(scores))
    assert v2.indices.tolist() == [[[0, 1]]]
    assert v3.indices.tolist() == [[[2, 3]]]


@pytest.mark.parametrize("method", ["group_limited_greedy", "noaux_tc"])
def test_no_expert_outside_the_kept_groups(method: str):
    moe = moe_config(n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=6, topk_method=method)
    x = torch.randn(50, 7, 12, dtype=torch.float64)
    for row, chosen in zip(x.flatten(0, 1), router_with_logits(moe)(x).indices.flatten(0, 1), strict=True):
        assert sorted(chosen.tolist()) == kept_experts(moe, row.sigmoid().tolist())


BIAS = [0.1, 0.001, -1 / 3, 7.0, 1e-9, -0.4]  # most of these are not numbers of BF16


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_bias_stays_fp32_with_its_values_when_the_model_is_cast(cast: torch.dtype):
    config = small(moe={"n_routed_experts": 6, "n_group": 1, "topk_group": 1})
    expected = torch.tensor(BIAS)
    for move in (
        lambda m: m.to(cast),
        lambda m: {torch.bfloat16: m.bfloat16, torch.float16: m.half, torch.float64: m.double}[cast](),
        lambda m: m.to("cpu", cast),
        lambda m: m.bfloat16().float().to(cast),
        lambda m: nn.Sequential(m).to(cast)[0],
    ):
        model = Transformer(config)
        for router in model.routers.values():
            router.e_score_correction_bias.copy_(expected)
        model = move(model)
        assert model.routers
        for router in model.routers.values():
            bias = router.e_score_correction_bias
            assert bias.dtype == torch.float32
            assert torch.equal(bias, expected)
            assert router.weight.dtype == cast
            assert bias is router.state_dict()["e_score_correction_bias"] or torch.equal(
                bias, router.state_dict()["e_score_correction_bias"]
            )


def test_bias_from_meta_is_fp32():
    with torch.device("meta"):
        model = Transformer(small()).bfloat16()
    assert all(r.e_score_correction_bias.is_meta for r in model.routers.values())
    assert all(r.e_score_correction_bias.dtype == torch.float32 for r in model.routers.values())
    model = model.to_empty(device="cpu")
    for router in model.routers.values():
        assert router.e_score_correction_bias.dtype == torch.float32
        assert router.e_score_correction_bias.device.type == "cpu"
    reference = randomised(small(), dtype=torch.bfloat16)
    model.load_state_dict(reference.state_dict())
    for layer, router in model.routers.items():
        assert torch.equal(router.e_score_correction_bias, reference.routers[layer].e_score_correction_bias)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_bias_follows_the_device():
    model = randomised(small())
    expected = {n: r.e_score_correction_bias.clone() for n, r in model.routers.items()}
    model = model.to("cuda", torch.bfloat16)
    for layer, router in model.routers.items():
        assert router.e_score_correction_bias.device.type == "cuda"
        assert router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(router.e_score_correction_bias.cpu(), expected[layer])


def test_scores_are_fp32_in_a_bfloat16_model_and_under_autocast():
    moe = moe_config()
    router = Router(64, moe)
    nn.init.normal_(router.weight)
    x = torch.randn(2, 3, 64)
    exact = (x.double() @ router.weight.detach().double().T).sigmoid()
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    assert (routing.scores - exact).abs().max() < 1e-5  # BF16 logits of this size would be off by ~0.01
    router.bfloat16()
    x = x.bfloat16()
    exact = (x.double() @ router.weight.detach().double().T).sigmoid()
    assert router(x).scores.dtype == torch.float32
    assert (router(x).scores - exact).abs().max() < 1e-5


def test_scores_carry_a_gradient_and_the_bias_has_none():
    router = router_with_logits(moe_config(), [0.0] * 6)
    router(torch.randn(1, 3, 6, dtype=torch.float64)).scores.square().sum().backward()
    assert router.weight.grad is not None
    assert not router.e_score_correction_bias.requires_grad
    assert "e_score_correction_bias" not in dict(router.named_parameters())


def test_only_noaux_tc_has_a_bias():
    assert Router(8, moe_config(topk_method="greedy")).e_score_correction_bias is None
    assert "e_score_correction_bias" not in Router(8, moe_config(topk_method="greedy")).state_dict()


def test_load_counts_real_tokens_only():
    indices = torch.tensor([[[0, 1], [0, 2], [3, 0]], [[1, 2], [1, 0], [2, 3]]])
    scores = torch.rand(2, 3, 5)
    routing = Routing(indices, torch.ones(2, 3, 2), scores)
    assert routing.load().tolist() == [4, 3, 3, 2, 0]
    valid = torch.tensor([[False, True, True], [True, False, False]])
    assert Routing(indices, torch.ones(2, 3, 2), scores, valid).load().tolist() == [2, 1, 2, 1, 0]
    assert Routing(indices, torch.ones(2, 3, 2), scores, torch.zeros_like(valid)).load().tolist() == [0] * 5


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_load_of_a_padded_batch_is_that_of_its_sequences(side: str, segments: int):
    config = small(moe={"segments": segments})
    model, tokens = randomised(config), tokens_for(config, 3, 8)
    lengths, slots = [8, 5, 1], torch.arange(8)
    valid = torch.stack([slots >= 8 - n if side == "left" else slots < n for n in lengths])
    padded, single = RoutingRecorder(), RoutingRecorder()
    model(tokens, valid=valid, recorder=padded)
    for row, mask in zip(tokens, valid, strict=True):
        model(row[mask].unsqueeze(0), recorder=single)
    for layer, (routing,) in padded.routings.items():
        expected = sum(r.load() for r in single.routings[layer])
        assert torch.equal(routing.load(), expected)
        assert int(expected.sum()) == sum(lengths) * segments * config.moe.num_experts_per_tok
