import pytest
import torch
from plain_models import MHA, SEPARATE, V1_MOE, YARN, Plain, difference, randomised, small, tokens_for

from abyssal.config import ModelConfig
from abyssal.model import RoutingRecorder
from abyssal.model.variants import SegmentMoE, SeparateLatentAttention


@pytest.mark.parametrize("segments", [2, 3, 8])
@pytest.mark.parametrize("shared", [0, 2])
def test_segment_routing_equals_plain_loops(segments: int, shared: int):
    config = small(moe={"segments": segments, "n_shared_experts": shared})
    model, tokens = randomised(config), tokens_for(config, 2, 8)
    assert isinstance(model.blocks[1].mlp, SegmentMoE)
    for row, logits in zip(tokens.tolist(), model(tokens), strict=True):
        assert difference(logits, Plain(model)(row)) < 1e-10


def test_segment_routing_with_softmax_and_heads():
    config = small(moe=V1_MOE | {"segments": 4, "n_group": 1, "topk_group": 1}, attention=MHA)
    model, tokens = randomised(config), tokens_for(config, 1, 8)
    assert difference(model(tokens)[0], Plain(model)(tokens[0].tolist())) < 1e-10


def test_segments_of_a_token_go_to_different_experts():
    config = small(moe={"segments": 3, "num_experts_per_tok": 1})
    model, tokens, recorder = randomised(config), tokens_for(config, 4, 16), RoutingRecorder()
    model(tokens, recorder=recorder)
    for (routing,) in recorder.routings.values():
        assert routing.indices.shape == (4, 16 * 3, 1)
        by_token = routing.indices.view(4, 16, 3)
        assert (by_token.amax(-1) != by_token.amin(-1)).any()
        assert int(routing.load().sum()) == 4 * 16 * 3


def test_equal_segments_go_to_the_same_experts_and_come_back_in_place():
    config = small(moe={"segments": 3, "n_shared_experts": 0})
    layer = randomised(config).blocks[1].mlp
    part, other = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = torch.cat((part, other, part)).view(1, 1, 24)
    routing = layer.route(x)
    assert routing.indices[0, 0].tolist() == routing.indices[0, 2].tolist()
    out = layer(x, routing).view(3, 8)
    torch.testing.assert_close(out[0], out[2])
    assert not torch.allclose(out[0], out[1])


def test_segment_experts_are_as_narrow_as_a_segment():
    layer = randomised(small(moe={"segments": 3})).blocks[1].mlp
    assert layer.gate.weight.shape == (8, 8)
    assert layer.experts.gate_up_proj.shape == (8, 2 * 5, 8)
    assert layer.experts.down_proj.shape == (8, 8, 5)
    assert layer.shared_experts.gate_proj.weight.shape == (5, 24)


@pytest.mark.parametrize("q_lora_rank", [None, 10])
@pytest.mark.parametrize("rope", [{}, {"layout": "halves"}, {"yarn": YARN}], ids=str)
def test_separate_latents_equal_plain_loops(q_lora_rank: int | None, rope: dict[str, object]):
    config = small(attention=SEPARATE | {"q_lora_rank": q_lora_rank, "bias": True}, rope=rope)
    model, tokens = randomised(config), tokens_for(config, 2, 9)
    assert isinstance(model.blocks[0].self_attn, SeparateLatentAttention)
    for row, logits in zip(tokens.tolist(), model(tokens), strict=True):
        assert difference(logits, Plain(model)(row)) < 1e-10


def test_compression_ratio_resolves_to_the_ranks():
    plain = small().model_dump()
    attention = plain["attention"]
    del attention["q_lora_rank"], attention["kv_lora_rank"]
    config = ModelConfig.model_validate(plain | {"attention": attention | {"compression_ratio": 4}})
    assert (config.attention.q_lora_rank, config.attention.kv_lora_rank) == (6, 6)  # 24 / 4
    assert config.attention.cached_values == 6 + 6
    assert ModelConfig.model_validate(config.model_dump()) == config
    assert randomised(config)(tokens_for(config, 1, 3)).isfinite().all()
