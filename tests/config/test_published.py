import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.config import (
    ModelConfig,
    from_published,
    merge,
    preset,
    published_model_type,
    read_config,
    resolve_model,
    to_published,
)
from abyssal.errors import UserError

V1, V2, V3, KIMI, LLAMA = (
    to_published(preset(name))
    for name in ("deepseek-moe-16b", "deepseek-v2", "deepseek-v3", "kimi-k2", "deepseek-llm-7b")
)
SCALING = {
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 16,
    "beta_slow": 2,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}


def bare(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"published": {}})


def without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


def quietly(data: dict[str, Any]) -> ModelConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return from_published(data)


# --- the two spellings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [V2, V3, KIMI], ids=["v2", "v3", "kimi"])
def test_both_spellings_of_yarn_mean_the_same(base: dict[str, Any]):
    plain = without(base, "rope_theta", "rope_scaling")
    old = quietly(plain | {"rope_theta": 30000, "rope_scaling": {"type": "yarn", **SCALING}})
    middle = quietly(plain | {"rope_theta": 30000, "rope_scaling": {"rope_type": "yarn", "type": "yarn", **SCALING}})
    new = quietly(plain | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 30000, **SCALING}})
    both = quietly(plain | {"rope_theta": 30000, "rope_parameters": {"rope_type": "yarn", **SCALING}})
    assert bare(old) == bare(middle) == bare(new) == bare(both)
    assert old.rope.theta == 30000
    assert old.rope.yarn is not None
    assert old.rope.yarn.model_dump() == SCALING


def test_both_spellings_of_no_scaling_mean_the_same():
    plain = without(V1, "rope_theta", "rope_scaling")
    old = quietly(plain | {"rope_theta": 500.0, "rope_scaling": None})
    new = quietly(plain | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    assert bare(old) == bare(new)
    assert (old.rope.theta, old.rope.yarn) == (500, None)
    assert quietly(plain).rope.theta == 10000


def test_yarn_without_mscales_has_those_of_deepseeks_code():
    yarn = quietly(V3 | {"rope_scaling": {"type": "yarn", "factor": 4}}).rope.yarn
    assert yarn is not None
    assert (yarn.mscale, yarn.mscale_all_dim, yarn.beta_fast, yarn.beta_slow) == (1, 0, 32, 1)
    assert yarn.original_max_position_embeddings == V3["max_position_embeddings"]


# --- configs that transformers saved -------------------------------------------------------------------------------


@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("generation", ["V2", "V3"])
def test_configs_saved_by_transformers(tmp_path: Path, generation: str, yarn: bool):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_theta": 30000.0, "rope_type": "default"}
    if yarn:
        rope |= SCALING | {"rope_type": "yarn"}
    settings = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 70,
        "moe_intermediate_size": 20,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 2,
        "n_routed_experts": 12,
        "routed_scaling_factor": 1.5,
        "kv_lora_rank": 10,
        "q_lora_rank": None,
        "qk_rope_head_dim": 6,
        "v_head_dim": 9,
        "qk_nope_head_dim": 7,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 2,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096 * 40,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 3,
        "eos_token_id": [7, 9],
        "tie_word_embeddings": True,
        "attention_bias": True,
        "initializer_range": 0.006,
        "rope_parameters": rope,
    }
    if generation == "V2":
        saved = transformers.DeepseekV2Config(**settings, topk_method="group_limited_greedy")
    else:
        saved = transformers.DeepseekV3Config(**settings, rope_interleave=False, num_mtp_layers=2)
    saved.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = read_config(tmp_path)
    expected = {
        **{k: settings[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")},
        **{k: settings[k] for k in ("max_position_embeddings", "rms_norm_eps", "initializer_range")},
        "tie_word_embeddings": True,
        "bos_token_id": 3,
        "eos_token_id": 7,
        "attention": {
            **{k: settings[k] for k in ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "v_head_dim")},
            **{k: settings[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim")},
            "kind": "mla",
            "bias": True,
        },
        "rope": {
            "theta": 30000.0,
            "layout": "interleaved" if generation == "V2" else "halves",
            "yarn": SCALING if yarn else None,
        },
        "moe": {
            **{k: settings[k] for k in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")},
            **{k: settings[k] for k in ("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group")},
            **{k: settings[k] for k in ("norm_topk_prob", "routed_scaling_factor")},
            "moe_layer_freq": 1,
            "segments": 1,
            "scoring_func": "softmax" if generation == "V2" else "sigmoid",
            "topk_method": "group_limited_greedy" if generation == "V2" else "noaux_tc",
        },
        "mtp": {"num_nextn_predict_layers": 0 if generation == "V2" else 2},
    }
    assert bare(config).model_dump(exclude={"published"}) == expected
    # … and what we write, transformers reads as the same again
    back = type(saved).from_dict(to_published(config))
    mine, theirs = back.to_dict(), saved.to_dict()
    for key in settings:
        if key != "rope_parameters":
            assert mine[key] == theirs[key], key
    for key, value in theirs["rope_parameters"].items():
        assert mine["rope_parameters"][key] == value


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "moonlight-16b-a3b"])
def test_presets_through_transformers(tmp_path: Path, name: str):
    transformers = pytest.importorskip("transformers")
    published = to_published(preset(name))
    cls = transformers.DeepseekV2Config if published["model_type"] == "deepseek_v2" else transformers.DeepseekV3Config
    cls.from_dict(published).save_pretrained(tmp_path)
    assert bare(read_config(tmp_path)) == bare(preset(name))


@pytest.mark.parametrize("head_dim", [None, 20])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_configs_saved_by_transformers(tmp_path: Path, kv_heads: int, head_dim: int | None):
    transformers = pytest.importorskip("transformers")
    settings = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 70,
        "num_hidden_layers": 5,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.01,
        "bos_token_id": 3,
    }
    others = {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "attention_bias": True, "head_dim": head_dim}
    rope = {"rope_theta": 30000.0, "rope_type": "default"}
    saved = transformers.LlamaConfig(
        **settings, **others, rope_parameters=rope, tie_word_embeddings=True, eos_token_id=[7, 9]
    )
    saved.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = read_config(tmp_path)
    attention = {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": kv_heads, "bias": True}
    assert bare(config).model_dump(exclude={"published"}) == {
        **settings,
        "eos_token_id": 7,
        "tie_word_embeddings": True,
        "attention": attention | {"head_dim": head_dim or 12},
        "rope": {"theta": 30000.0, "layout": "halves", "yarn": None},
        "moe": None,
        "mtp": {"num_nextn_predict_layers": 0},
    }
    mine, theirs = transformers.LlamaConfig.from_dict(to_published(config)).to_dict(), saved.to_dict()
    assert {key: mine.get(key) for key in theirs} == theirs | {"architectures": ["LlamaForCausalLM"]}


def test_what_only_a_moe_has_is_an_unknown_key_of_llama():
    with pytest.warns(UserWarning, match="abyssal does not know n_routed_experts=8, num_nextn_predict_layers=1"):
        config = from_published(LLAMA | {"n_routed_experts": 8, "num_nextn_predict_layers": 1})
    assert (config.moe, config.mtp.num_nextn_predict_layers) == (None, 0)


def test_dense_models_are_taken_by_transformers():
    transformers = pytest.importorskip("transformers")
    for model_type, cls in (
        ("deepseek_v2", transformers.DeepseekV2Config),
        ("deepseek_v3", transformers.DeepseekV3Config),
    ):
        config = bare(preset("deepseek-v2-lite")).model_copy(update={"moe": None})
        written = to_published(config, model_type)
        assert cls.from_dict(written).first_k_dense_replace == config.num_hidden_layers
        assert bare(quietly(written)) == config


# --- keys ---------------------------------------------------------------------------------------------------------


def test_kimi_is_read_and_written_as_what_it_is():
    config = quietly(KIMI)
    assert to_published(config) == KIMI
    assert to_published(config)["model_type"] == "kimi_k2"
    as_v3 = quietly(to_published(config, "deepseek_v3"))
    assert bare(as_v3) == bare(config)
    assert published_model_type(config) == "kimi_k2"
    assert published_model_type(as_v3) == "deepseek_v3"


def test_unknown_keys_are_kept_written_back_and_named():
    data = V3 | {"index_topk": 2048, "sliding": {"a": [1]}, "nothing": None}
    with pytest.warns(UserWarning, match=r"index_topk=2048, sliding=\{'a': \[1\]\}") as caught:
        config = from_published(data, "here.json")
    assert len(caught) == 1
    assert str(caught[0].message).startswith("here.json: ")
    assert "nothing" not in str(caught[0].message)  # says nothing, so changes nothing
    written = to_published(config)
    assert {key: written[key] for key in ("index_topk", "sliding", "nothing")} == {
        "index_topk": 2048,
        "sliding": {"a": [1]},
        "nothing": None,
    }


def test_carried_keys_are_kept_without_a_word():
    extra = {"quantization_config": {"fmt": "e4m3"}, "torch_dtype": "bfloat16", "pad_token_id": None, "ep_size": 4}
    written = to_published(quietly(V3 | extra))
    assert {key: written[key] for key in extra} == extra


def test_several_ends_of_text():
    config = quietly(V3 | {"eos_token_id": [5, 9]})
    assert config.eos_token_id == 5
    assert to_published(config)["eos_token_id"] == [5, 9]


def test_written_values_win_over_what_was_read():
    changed = quietly(V3).model_copy(update={"vocab_size": 200000, "rms_norm_eps": 1e-3})
    written = to_published(changed)
    assert (written["vocab_size"], written["rms_norm_eps"]) == (200000, 1e-3)


def test_v1_does_not_scale_and_v2_scales_only_what_it_does_not_normalise():
    assert quietly(V1 | {"routed_scaling_factor": 4.0}).moe.routed_scaling_factor == 1
    assert quietly(V2 | {"norm_topk_prob": True}).moe.routed_scaling_factor == 1
    assert quietly(V2).moe.routed_scaling_factor == 16
    both = quietly(V3).moe
    assert (both.norm_topk_prob, both.routed_scaling_factor) == (True, 2.5)


# --- what cannot be written ---------------------------------------------------------------------------------------

MHA = {"kind": "mha", "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
SEPARATE = {
    "kind": "separate_latents",
    "num_attention_heads": 16,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "k_lora_rank": 256,
    "v_lora_rank": 256,
}


@pytest.mark.parametrize(
    ("base", "changes", "target", "says"),
    [
        ("deepseek-v3", {"attention": SEPARATE}, "deepseek_v3", ["attention.kind 'separate_latents'", "study variant"]),
        ("deepseek-v3", {"moe": {"segments": 2}}, "deepseek_v3", ["moe.segments 2", "study variant"]),
        ("deepseek-v2", {"mtp": {"num_nextn_predict_layers": 1}}, "deepseek_v2", ["num_nextn_predict_layers 1", "MTP"]),
        ("deepseek-moe-16b", {"mtp": {"num_nextn_predict_layers": 2}}, "deepseek", ["num_nextn_predict_layers 2"]),
        (
            "deepseek-v2",
            {"moe": {"norm_topk_prob": True}},
            "deepseek_v2",
            ["moe.routed_scaling_factor 16.0", "norm_topk_prob"],
        ),
        ("deepseek-moe-16b", {"moe": {"routed_scaling_factor": 2.0}}, "deepseek", ["routed_scaling_factor 2.0"]),
        (
            "deepseek-moe-16b",
            {"rope": {"yarn": {"factor": 2.0, "original_max_position_embeddings": 4096}}},
            "deepseek",
            ["rope.yarn", "no YaRN"],
        ),
        (
            "deepseek-moe-16b",
            {"rope": {"layout": "interleaved"}},
            "deepseek",
            ["rope.layout 'interleaved'", "'halves'"],
        ),
        ("deepseek-moe-16b", {"attention": {"head_dim": 64}}, "deepseek", ["attention.head_dim 64", "hidden_size /"]),
        ("deepseek-v2", {"rope": {"layout": "halves"}}, "deepseek_v2", ["rope.layout 'halves'", "'interleaved'"]),
        (
            "deepseek-v2",
            {"moe": {"scoring_func": "sigmoid"}},
            "deepseek_v2",
            ["moe.scoring_func 'sigmoid'", "'softmax'"],
        ),
        ("deepseek-v2", {"moe": {"topk_method": "noaux_tc"}}, "deepseek_v2", ["moe.topk_method 'noaux_tc'"]),
        (
            "deepseek-v3",
            {"moe": {"scoring_func": "softmax"}},
            "deepseek_v3",
            ["moe.scoring_func 'softmax'", "'sigmoid'"],
        ),
        ("deepseek-v3", {"moe": {"topk_method": "greedy"}}, "deepseek_v3", ["topk_method 'greedy'", "'noaux_tc'"]),
        ("deepseek-v3", {"moe": {"topk_method": "greedy"}}, "kimi_k2", ["topk_method 'greedy'", "kimi_k2"]),
        (
            "deepseek-moe-16b",
            {"moe": {"topk_method": "group_limited_greedy"}},
            "deepseek",
            ["moe.topk_method 'group_limited_greedy'"],
        ),
        ("deepseek-v2-lite", {"attention": MHA}, "deepseek_v2", ["attention.kind 'mha'", "('mla')"]),
        ("deepseek-v2-lite", {}, "deepseek", ["attention.kind 'mla'", "('mha')"]),
        ("deepseek-v2", {}, "deepseek_v3", ["'softmax'"]),
        ("deepseek-v3", {}, "deepseek_v2", ["num_nextn_predict_layers 1"]),
        ("deepseek-moe-16b", {}, "llama", ["moe.n_routed_experts 64", "no experts"]),
        ("deepseek-v2-lite", {"moe": None}, "llama", ["attention.kind 'mla'", "('mha')"]),
        ("llama2-7b", {"rope": {"layout": "interleaved"}}, "llama", ["rope.layout 'interleaved'", "'halves'"]),
        (
            "llama2-7b",
            {"rope": {"yarn": {"factor": 2.0, "original_max_position_embeddings": 4096}}},
            "llama",
            ["rope.yarn", "no YaRN"],
        ),
        ("llama2-7b", {"mtp": {"num_nextn_predict_layers": 1}}, "llama", ["num_nextn_predict_layers 1"]),
        ("llama2-7b", {}, "deepseek_v3", ["attention.kind 'mha'", "('mla')"]),
    ],
)
def test_refusals_to_write(base: str, changes: dict[str, Any], target: str, says: list[str]):
    config = resolve_model({"preset": base, **changes})
    with pytest.raises(UserError) as caught:
        to_published(config, target)
    message = str(caught.value)
    assert message.startswith(f"cannot be written as {target}: ")
    assert "\n" not in message
    assert all(part in message for part in says), message


def test_no_published_code_computes_a_study_variant():
    config = resolve_model({"preset": "deepseek-v3", "moe": {"segments": 2}})
    for function in (published_model_type, to_published):
        with pytest.raises(UserError, match=r"^cannot be written as deepseek_v3: moe\.segments 2"):
            function(config)


def test_model_type_is_found_from_what_the_config_says():
    for name, expected in (
        ("deepseek-moe-16b", "deepseek"),
        ("deepseek-v2", "deepseek_v2"),
        ("deepseek-v3", "deepseek_v3"),
        ("kimi-k2", "deepseek_v3"),  # without its published keys it is a V3
        ("llama2-7b", "llama"),
        ("yxanul-197m", "llama"),  # dense with multi-head attention, in our own form
    ):
        assert published_model_type(bare(preset(name))) == expected


@pytest.mark.parametrize("name", ["deepseek_v33", "mixtral"])
def test_unknown_target(name: str):
    with pytest.raises(UserError, match=f"model_type: '{name}' is not one of deepseek, deepseek_v2"):
        to_published(preset("deepseek-v3"), name)


# --- what cannot be read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "changes", "says"),
    [
        (
            V3,
            {"model_type": "mixtral"},
            ["model_type: 'mixtral' is not one of deepseek, deepseek_v2, deepseek_v3, kimi_k2, llama"],
        ),
        (V3, {"model_type": None}, ["model_type: missing"]),
        (V3, {"hidden_act": "gelu"}, ["hidden_act: 'gelu'", "only 'silu'"]),
        (V2, {"mlp_bias": True}, ["mlp_bias: True", "only False"]),
        (V3, {"hidden_size": "7168"}, ["hidden_size: '7168'", "integer"]),
        (V1, {"hidden_size": "2048"}, ["hidden_size: '2048'", "integer"]),
        (V1, {"hidden_size": 0}, ["hidden_size: 0", "greater than 0"]),
        (V1, {"num_attention_heads": "16"}, ["num_attention_heads: '16'", "integer"]),
        (V1, {"num_attention_heads": 0}, ["num_attention_heads: 0", "greater than 0"]),
        (V1, {"num_attention_heads": 15}, ["hidden_size: 2048 is not a multiple of num_attention_heads 15"]),
        (V1, {"num_key_value_heads": 3}, ["num_key_value_heads: 3 does not divide num_attention_heads 16"]),
        (V1, {"hidden_size": 16 * 127}, ["head_dim: 127 is odd"]),
        (V1, {"topk_method": "noaux_tc"}, ["topk_method: 'noaux_tc'", "only 'greedy'"]),
        (V2, {"topk_method": "noaux_tc"}, ["topk_method: 'noaux_tc'", "'greedy' or 'group_limited_greedy'"]),
        (V3, {"topk_method": "greedy"}, ["topk_method: 'greedy'", "only 'noaux_tc'"]),
        (V2, {"scoring_func": "sigmoid"}, ["scoring_func: 'sigmoid'", "only 'softmax'"]),
        (V3, {"scoring_func": "softmax"}, ["scoring_func: 'softmax'", "only 'sigmoid'"]),
        (V3, {"routed_scaling_factor": "2.5"}, ["routed_scaling_factor: '2.5'", "number"]),
        (V3, {"routed_scaling_factor": "much"}, ["routed_scaling_factor: 'much'", "number"]),
        (V3, {"routed_scaling_factor": [1]}, ["routed_scaling_factor: [1]", "number"]),
        (V3, {"n_group": 7}, ["n_group: 7 does not divide n_routed_experts 256"]),
        (V3, {"topk_group": 9}, ["topk_group: 9 is more than n_group 8"]),
        (V3, {"num_experts_per_tok": 300}, ["num_experts_per_tok: 300 is more than n_routed_experts 256"]),
        (V3, {"qk_rope_head_dim": 63}, ["qk_rope_head_dim: 63 is odd"]),
        (V3, {"bos_token_id": 129280}, ["bos_token_id: 129280 is outside the vocabulary of 129280"]),
        (V3, {"eos_token_id": ["a"]}, ["eos_token_id: 'a'", "integer"]),
        (V3, {"eos_token_id": [1, [2]]}, ["eos_token_id: [2]", "integers"]),
        (V3, {"hidden_size": 10**18}, ["hidden_size: 1000000000000000000", "less than or equal"]),
        (V3, {"num_hidden_layers": 200000}, ["num_hidden_layers: 200000", "less than or equal"]),
        (V3, {"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling.type: 'linear'", "only 'yarn' or none"]),
        (V3, {"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters.type: 'llama3'", "only 'yarn' or none"]),
        (V3, {"rope_scaling": {"factor": 2}}, ["rope_scaling: {'factor': 2}", "'yarn'"]),
        (V3, {"rope_scaling": {"type": "yarn"}}, ["yarn.factor: missing"]),
        (V3, {"rope_scaling": [1]}, ["rope_scaling: expected a mapping, found [1]"]),
        (V3, {"rope_scaling": {"type": "yarn", **SCALING, "betafast": 3}}, ["betafast", "did you mean 'beta_fast'?"]),
        (V3, {"rope_scaling": {"type": "yarn", **SCALING, "truncate": False}}, ["truncate: only True"]),
        (V3, {"rope_scaling": {"type": "yarn", **SCALING, "attention_factor": 1.1}}, ["attention_factor: only None"]),
        (LLAMA, {"mlp_bias": True}, ["mlp_bias: True", "only False"]),
        (LLAMA, {"rope_scaling": {"type": "yarn", **SCALING}}, ["rope_scaling.type: 'yarn'", "only none"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling.type: 'linear'", "only none"]),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters.type: 'llama3'", "only none"]),
        (LLAMA, {"rope_scaling": {"factor": 2}}, ["rope_scaling: {'factor': 2}", "supported is none"]),
        (LLAMA, {"hidden_act": "gelu"}, ["hidden_act: 'gelu'", "only 'silu'"]),
        (LLAMA, {"head_dim": "128"}, ["head_dim: '128'", "integer"]),
        (LLAMA, {"head_dim": 127}, ["head_dim: 127 is odd"]),
        (LLAMA, {"head_dim": None, "hidden_size": 4097}, ["4097 is not a multiple of num_attention_heads 32"]),
        (LLAMA, {"num_key_value_heads": 5}, ["num_key_value_heads: 5 does not divide num_attention_heads 32"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_bad_published_configs(base: dict[str, Any], changes: dict[str, Any], says: list[str]):
    with pytest.raises(UserError) as caught:
        from_published(merge(base, dict.fromkeys(changes)) | changes, "here.json")
    message = str(caught.value)
    assert message.startswith("here.json: ")
    assert "\n" not in message
    assert all(part in message for part in says), message


NEEDED = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"),
    *("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("num_experts_per_tok", "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor"),
    "moe_intermediate_size",
)


@pytest.mark.parametrize("key", NEEDED)
def test_missing_keys_of_v3(key: str):
    for data in (without(V3, key), V3 | {key: None}):
        with pytest.raises(UserError, match=rf"^config\.json: {key}: missing"):
            from_published(data)


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(base=st.sampled_from([V1, V2, V3, KIMI, LLAMA]), data=st.data(), value=values)
def test_whatever_a_key_holds_it_is_read_or_refused_in_one_line(base: dict[str, Any], data: st.DataObject, value: Any):
    key = data.draw(st.sampled_from(sorted(base)))
    changed = json.loads(json.dumps(base)) | {key: value}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = from_published(changed)
            message = "read"
        except UserError as error:
            message = str(error)
        assert len(message.splitlines()) == 1
        if message != "read":
            return
        try:
            written = to_published(config)
        except UserError:
            return
        assert bare(from_published(written)) == bare(config)
