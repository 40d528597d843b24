import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_models import (
    MHA,
    SEPARATE,
    V1_MOE,
    YARN,
    Plain,
    difference,
    margin,
    randomised,
    small,
    tokens_for,
)
from torch import Tensor

from abyssal.config import ModelConfig, merge, preset, to_published
from abyssal.errors import UserError
from abyssal.model import RoutingRecorder, Transformer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

# --- transformers as the reference: V2 and V3 ---------------------------------------------------------------------


def twin(model: Transformer) -> Any:
    """transformers' model from the config.json that abyssal writes, with the same weights under the same names."""
    published = to_published(model.config)
    cls = {
        "deepseek_v2": transformers.DeepseekV2ForCausalLM,
        "deepseek_v3": transformers.DeepseekV3ForCausalLM,
    }[published["model_type"]]
    config = cls.config_class.from_dict(published)
    config._attn_implementation = config._experts_implementation = "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no shared experts: theirs then has matrices of no rows
        other = cls(config).eval()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    without_shared = model.config.moe is None or model.config.moe.n_shared_experts == 0
    assert not [name for name in missing if not (without_shared and ".shared_experts." in name)]
    return other


def decided(model: Transformer, tokens: Tensor, least: float = 1e-5) -> bool:
    """Whether no choice was so close that FP32 rounding could turn it."""
    recorder = RoutingRecorder()
    with torch.no_grad():
        model(tokens, recorder=recorder)
    for layer, (routing,) in recorder.routings.items():
        bias = model.routers[layer].e_score_correction_bias
        for row in routing.scores.double().flatten(0, 1).tolist():
            if margin(model.config.moe, row, None if bias is None else bias.tolist()) < least:
                return False
    return True


@st.composite
def configs(draw: st.DrawFn, generation: int) -> ModelConfig:
    heads = draw(st.integers(1, 4))
    hidden = heads * draw(st.integers(2, 9)) if generation == 2 else draw(st.integers(5, 33))  # theirs insists for V2
    even = 2 if generation == 2 else 1  # transformers' V2 views rotary parts as complex numbers, where they lie
    layers = draw(st.integers(1, 3))
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    moe = {
        "n_routed_experts": groups * size,
        "num_experts_per_tok": draw(st.integers(1, min(5, kept * size))),
        "moe_intermediate_size": draw(st.integers(1, 9)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "n_group": groups,
        "topk_group": kept,
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, 16.0])),
    }
    if generation == 2:
        # transformers' V2 router ignores norm_topk_prob, so it stays false here.
        moe |= {"scoring_func": "softmax", "norm_topk_prob": False}
        moe["topk_method"] = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    else:
        moe["norm_topk_prob"] = draw(st.booleans())
    rope: dict[str, Any] = {"theta": draw(st.sampled_from([100.0, 10000.0, 50000.0]))}
    if generation == 3:
        rope["layout"] = draw(st.sampled_from(["interleaved", "halves"]))
    if draw(st.booleans()):
        # Where one of the two mscales is 0, transformers takes mscale 1 for the other, DeepSeek's code what the config
        # says; test_yarn_with_one_mscale_left_out below compares those with the float64 account.
        scales = st.sampled_from([0.5, 0.707, 1.0, 1.6])
        one, all_dim = draw(st.one_of(st.tuples(scales, scales), st.just((1.0, 0.0))))
        rope["yarn"] = {
            "factor": draw(st.sampled_from([1.0, 4.0, 40.0])),
            "original_max_position_embeddings": draw(st.integers(4, 16)),
            "beta_fast": draw(st.sampled_from([1.0, 32.0])),
            "beta_slow": draw(st.sampled_from([0.1, 1.0])),
            "mscale": one,
            "mscale_all_dim": all_dim,
        }
    return ModelConfig.model_validate(
        {
            "vocab_size": draw(st.integers(2, 41)),
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "intermediate_size": draw(st.integers(1, 29)),
            "max_position_embeddings": 64,
            "attention": {
                "kind": "mla",
                "num_attention_heads": heads,
                "q_lora_rank": draw(st.one_of(st.none(), st.integers(2, 12))),
                "kv_lora_rank": even * draw(st.integers(1, 12 // even)),
                "qk_nope_head_dim": even * draw(st.integers(1, 9 // even)),
                "qk_rope_head_dim": 2 * draw(st.integers(1, 5)),
                "v_head_dim": draw(st.integers(1, 13)),
                "bias": draw(st.booleans()),
            },
            "rope": rope,
            "moe": moe,
            "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
            "tie_word_embeddings": draw(st.booleans()),
        }
    )


def sensitivity(model: Transformer, tokens: Tensor) -> float:
    """How far the logits move when every weight moves by about FP32's rounding. A tiny model with large weights can be
    chaotic; where this is near 1e-5, two orders of summation can't agree to 1e-5, and the case is drawn again, as a
    near tie is. All in our own float64, so that it can't hide a difference from transformers."""
    exact = copy.deepcopy(model).double()
    before = exact(tokens)
    generator = torch.Generator().manual_seed(0)
    for parameter in exact.parameters():
        parameter.mul_(1 + 2e-7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return difference(exact(tokens), before)


def check_against_transformers(config: ModelConfig, seed: int, std: float, shift: float) -> None:
    model = randomised(config, seed=seed, std=std, dtype=torch.float32, shift=shift)
    tokens = tokens_for(config, 2, 20, seed)
    assume(decided(model, tokens))
    with torch.no_grad():
        ours, theirs = model(tokens), twin(model)(input_ids=tokens).logits
        assume(sensitivity(model, tokens) <= 3e-6)
    assert theirs.abs().max() > 0.01
    assert difference(ours, theirs) <= 1e-5


SEEDS, STDS = st.integers(0, 2**31), st.sampled_from([0.05, 0.1, 0.2, 0.4])


@settings(max_examples=60)
@given(config=configs(3), seed=SEEDS, std=STDS, shift=st.sampled_from([0.0, -0.6, -2.0]))
def test_v3_logits_equal_transformers(config: ModelConfig, seed: int, std: float, shift: float):
    # transformers 5.23's V3 router masks with -inf as we do, so negative biased scores are compared with it directly.
    check_against_transformers(config, seed, std, shift)


@settings(max_examples=60)
@given(config=configs(2), seed=SEEDS, std=STDS)
def test_v2_logits_equal_transformers(config: ModelConfig, seed: int, std: float):
    # Theirs masks with 0.0 here, which softmax scores always beat.
    check_against_transformers(config, seed, std, 0.0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("generation", [2, 3])
def test_padded_batch_equals_transformers(generation: int, side: str):
    moe = {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False}
    config = small(rope={"yarn": YARN}, moe=moe if generation == 2 else {}, attention={"qk_nope_head_dim": 4})
    model = randomised(config, dtype=torch.float32)
    tokens = tokens_for(config, 4, 11)
    lengths = torch.tensor([[11], [8], [3], [1]])
    slots = torch.arange(11)
    valid = slots >= 11 - lengths if side == "left" else slots < lengths
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        ours = model(tokens, valid=valid)
        theirs = twin(model)(input_ids=tokens, attention_mask=valid.long(), position_ids=positions).logits
    assert ours.isfinite().all()
    assert difference(ours[valid], theirs[valid]) <= 1e-5
    changed = torch.where(valid, tokens, (tokens + 1) % config.vocab_size)
    with torch.no_grad():
        seen = difference(model(changed, valid=valid)[valid], ours[valid])
    assert seen <= 1e-6  # padding goes to other experts, whose products then have other shapes, but no more than that


@pytest.mark.parametrize("generation", [2, 3])
def test_dense_model_equals_transformers(generation: int):
    config = small(moe=None, attention={"qk_nope_head_dim": 4}, published={"model_type": f"deepseek_v{generation}"})
    model, tokens = randomised(config, dtype=torch.float32), tokens_for(config, 2, 12)
    with torch.no_grad():
        assert difference(model(tokens), twin(model)(input_ids=tokens).logits) <= 1e-5


def test_latent_norms_keep_their_own_eps():
    # Moonlight's case: 1e-5 everywhere but in the norms inside the projections (checked above at 1e-2 as well).
    config = preset("moonlight-16b-a3b")
    with torch.device("meta"):
        model = Transformer(config.model_copy(update={"num_hidden_layers": 2}))
    eps = {name: m.eps for name, m in model.named_modules() if type(m).__name__ == "RMSNorm"}
    assert {e for name, e in eps.items() if "_a_layernorm" in name} == {1e-6}
    assert {e for name, e in eps.items() if "_a_layernorm" not in name} == {1e-5}


# --- plain float64 loops as the reference: what transformers does not have ------------------------------------------


@pytest.mark.parametrize(("one", "all_dim"), [(0.0, 1.0), (0.6, 0.0), (0.0, 0.0), (1.5, 0.3)])
def test_yarn_with_one_mscale_left_out(one: float, all_dim: float):
    config = small(rope={"yarn": {**YARN, "mscale": one, "mscale_all_dim": all_dim}})
    model, tokens = randomised(config), tokens_for(config, 1, 12)
    assert difference(model(tokens)[0], Plain(model)(tokens[0].tolist())) < 1e-10


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": {"num_key_value_heads": 2}},
        {"attention": {"num_key_value_heads": 1, "bias": True}},
        {"attention": {"head_dim": 10}},  # not hidden_size / heads
        {"rope": {"layout": "interleaved"}},
        {"moe": {"n_shared_experts": 0, "num_experts_per_tok": 1}},
        {"moe": {"first_k_dense_replace": 0, "moe_layer_freq": 2}},
        {"moe": {"norm_topk_prob": True, "num_experts_per_tok": 6}},
        {"tie_word_embeddings": True, "rms_norm_eps": 0.01},
    ],
)
def test_v1_equals_plain_loops(changes: dict[str, Any]):
    base = small(attention=MHA, rope={"layout": "halves"}, moe=V1_MOE | {"n_group": 1, "topk_group": 1})
    config = ModelConfig.model_validate(merge(base.model_dump(), changes))
    model, tokens = randomised(config), tokens_for(config, 2, 9)
    for row, logits in zip(tokens.tolist(), model(tokens), strict=True):
        assert difference(logits, Plain(model)(row)) < 1e-10
    in_fp32 = model.float()(tokens)[0]
    assert difference(in_fp32, Plain(model)(tokens[0].tolist())) < 1e-5


@settings(max_examples=40)
@given(config=configs(3), seed=SEEDS, shift=st.sampled_from([0.0, -2.0]))
def test_v3_equals_plain_loops_to_float64(config: ModelConfig, seed: int, shift: float):
    model, tokens = randomised(config, seed=seed, shift=shift), tokens_for(config, 1, 7, seed)
    assume(decided(model, tokens, 1e-9))
    assert difference(model(tokens)[0], Plain(model)(tokens[0].tolist())) < 1e-10


def test_dense_model_equals_plain_loops():
    config = small(moe=None)
    model, tokens = randomised(config), tokens_for(config, 1, 8)
    assert not model.routers
    assert difference(model(tokens)[0], Plain(model)(tokens[0].tolist())) < 1e-10


# --- gradients ----------------------------------------------------------------------------------------------------

TRAINED = {
    "mha": {"attention": MHA | {"num_key_value_heads": 2, "bias": True}, "rope": {"layout": "halves"}},
    "mla": {"attention": {"bias": True}, "rope": {"yarn": YARN}},
    "mla, queries uncompressed": {"attention": {"q_lora_rank": None}},
    "v1 moe": {"attention": MHA, "moe": V1_MOE | {"n_group": 1, "topk_group": 1}},
    "mtp": {"mtp": {"num_nextn_predict_layers": 2}},
    "segments": {"moe": {"segments": 2}},
    "separate latents": {"attention": SEPARATE},
    "tied": {"tie_word_embeddings": True},
}


def loss_of(model: Transformer, tokens: Tensor, recorder: RoutingRecorder | None = None, **how: Any) -> Tensor:
    depth = len(model.mtp_modules)
    count = tokens.shape[1] - depth - 1
    hidden = model.hidden(tokens[:, :count], recorder=recorder, **how)
    states = [hidden, *model.mtp_hidden(hidden, tokens[:, :-1], recorder=recorder, **how)]
    targets = [tokens[:, k + 1 : k + 1 + count] for k in range(depth + 1)]
    pairs = zip(states, targets, strict=True)
    return sum(F.cross_entropy(model.lm_head(h).flatten(0, 1), t.flatten()) for h, t in pairs)


@pytest.mark.parametrize("name", TRAINED)
def test_every_parameter_gets_a_gradient(name: str):
    config = small(**TRAINED[name])
    model = randomised(config, dtype=torch.float32, std=0.2)
    with torch.no_grad():  # so that every expert gets some tokens
        for router in model.routers.values():
            router.weight.mul_(0.3)
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.zero_()
    tokens, recorder = tokens_for(config, 8, 40), RoutingRecorder()
    loss_of(model, tokens, recorder).backward()
    assert all(int(routing.load().min()) > 0 for seen in recorder.routings.values() for routing in seen)
    expected = 3 - 1 + config.mtp.num_nextn_predict_layers
    assert len(recorder.routings) == expected
    for parameter_name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, parameter_name
        assert gradient.isfinite().all(), parameter_name
        assert gradient.abs().max() > 0, parameter_name
        if ".experts." in parameter_name:
            assert (gradient.flatten(1).abs().amax(1) > 0).all(), parameter_name  # each expert's


@pytest.mark.parametrize("name", TRAINED)
def test_recomputation_changes_no_bit_and_routes_once(name: str):
    config = small(**TRAINED[name])
    model, tokens = randomised(config, dtype=torch.float32, std=0.2), tokens_for(config, 2, 12)
    kept: dict[bool, dict[str, Tensor]] = {}
    for recompute in (False, True):
        model.zero_grad()
        recorder = RoutingRecorder()
        loss_of(model, tokens, recorder, recompute=recompute).backward()
        assert {layer: len(seen) for layer, seen in recorder.routings.items()} == dict.fromkeys(model.routers, 1)
        kept[recompute] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert kept[False].keys() == kept[True].keys() == dict(model.named_parameters()).keys()
    for parameter_name, gradient in kept[False].items():
        assert torch.equal(gradient, kept[True][parameter_name]), parameter_name


def test_gradients_equal_finite_differences():
    config = small(num_hidden_layers=2, mtp={"num_nextn_predict_layers": 1})
    model, tokens = randomised(config), tokens_for(config, 1, 9)
    loss_of(model, tokens).backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        direction *= 1e-6 / direction.norm()
        with torch.no_grad():
            parameter += direction
            above = loss_of(model, tokens)
            parameter -= 2 * direction
            below = loss_of(model, tokens)
            parameter += direction
        slope = float((parameter.grad * direction).sum())
        assert abs(float(above - below) / 2 - slope) <= 1e-4 * abs(slope) + 1e-13, name


# --- what else the docstrings promise -----------------------------------------------------------------------------


def test_recorder_changes_no_bit():
    config = small(mtp={"num_nextn_predict_layers": 1})
    model, tokens = randomised(config, dtype=torch.float32), tokens_for(config, 2, 9)
    recorder = RoutingRecorder()
    assert torch.equal(model(tokens), model(tokens, recorder=recorder))
    assert sorted(recorder.routings) == [1, 2]  # layer 0 is dense
    hidden = model.hidden(tokens[:, :-1])
    seen = model.mtp_hidden(hidden, tokens, recorder=recorder)
    assert torch.equal(seen[0], model.mtp_hidden(hidden, tokens)[0])
    assert sorted(recorder.routings) == [1, 2, 3]  # the MTP module counts on


def test_the_same_generator_draws_the_same_weights_and_others_differ():
    config = small()
    one, two, other = (Transformer(config, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_initial_weights_have_the_std_of_the_config_and_norms_are_one():
    model = Transformer(small(hidden_size=96, initializer_range=0.006, attention={"bias": True}))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.006, rel=0.2), name
            assert abs(float(parameter.detach().mean())) < 0.002, name


def test_tied_head_is_one_tensor_and_stays_so():
    model = Transformer(small(tie_word_embeddings=True)).to(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("bad", [31, -1, 4000])
def test_token_outside_the_vocabulary(bad: int):
    model = Transformer(small())
    with pytest.raises(UserError, match=rf"^tokens: id {bad} is outside the vocabulary of 31$"):
        model(torch.tensor([[3, bad, 2]]))


def test_bfloat16_is_close_to_float64():
    config = small(moe=None)  # without routing: nothing can jump
    model, tokens = randomised(config, std=0.1), tokens_for(config, 2, 16)
    exact = model(tokens)
    rounded = model.bfloat16()(tokens)
    assert rounded.dtype == torch.bfloat16
    assert difference(rounded, exact) < 0.05


def test_mla_shape_is_as_published():
    # V3: 7168 -> 1536 -> 24576 and 7168 -> 512 + 64, 512 -> 32768 (FACTS)
    config = preset("deepseek-v3").model_copy(update={"num_hidden_layers": 1})
    with torch.device("meta"):
        attention = Transformer(config).blocks[0].self_attn
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes == {
        "q_a_proj.weight": (1536, 7168),
        "q_a_layernorm.weight": (1536,),
        "q_b_proj.weight": (24576, 1536),
        "kv_a_proj_with_mqa.weight": (576, 7168),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (32768, 512),
        "o_proj.weight": (7168, 16384),
    }
