import json
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from abyssal.config import (
    ModelConfig,
    config_from_dict,
    from_published,
    preset,
    preset_names,
    read_config,
    resolve_model,
    to_published,
)
from abyssal.errors import UserError

PUBLISHED = (
    *("deepseek-moe-16b", "deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "deepseek-r1", "deepseek-v3.1"),
    *("moonlight-16b-a3b", "kimi-k2"),
)
DENSE = ("deepseek-llm-7b", "llama2-7b")


def file_of(name: str) -> dict[str, Any]:
    return json.loads((resources.files("abyssal.config") / "presets" / f"{name}.json").read_text(encoding="utf-8"))


# FACTS.md: vocab, hidden, layers, heads, q rank, first dense, dense width, routed, shared, per token, expert width,
# scoring, method, groups, kept, normalised, scaling, eps, theta, context, MTP
TABLE = {
    "deepseek-moe-16b": (
        *(102400, 2048, 28, 16, None, 1, 10944, 64, 2, 6, 1408),
        *("softmax", "greedy", 1, 1, False, 1.0, 1e-6, 10000, 4096, 0),
    ),
    "deepseek-v2-lite": (
        *(102400, 2048, 27, 16, None, 1, 10944, 64, 2, 6, 1408),
        *("softmax", "greedy", 1, 1, False, 1.0, 1e-6, 10000, 163840, 0),
    ),
    "deepseek-v2": (
        *(102400, 5120, 60, 128, 1536, 1, 12288, 160, 2, 6, 1536),
        *("softmax", "group_limited_greedy", 8, 3, False, 16.0, 1e-6, 10000, 163840, 0),
    ),
    "deepseek-v3": (
        *(129280, 7168, 61, 128, 1536, 3, 18432, 256, 1, 8, 2048),
        *("sigmoid", "noaux_tc", 8, 4, True, 2.5, 1e-6, 10000, 163840, 1),
    ),
    "moonlight-16b-a3b": (
        *(163840, 2048, 27, 16, None, 1, 11264, 64, 2, 6, 1408),
        *("sigmoid", "noaux_tc", 1, 1, True, 2.446, 1e-5, 50000, 8192, 0),
    ),
    "kimi-k2": (
        *(163840, 7168, 61, 64, 1536, 1, 18432, 384, 1, 8, 2048),
        *("sigmoid", "noaux_tc", 1, 1, True, 2.827, 1e-6, 50000, 131072, 0),
    ),
}
TABLE |= {"deepseek-r1": TABLE["deepseek-v3"], "deepseek-v3.1": TABLE["deepseek-v3"]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str):
    c = preset(name)
    a, moe = c.attention, c.moe
    assert moe is not None
    assert TABLE[name] == (
        *(c.vocab_size, c.hidden_size, c.num_hidden_layers, a.num_attention_heads, getattr(a, "q_lora_rank", None)),
        *(moe.first_k_dense_replace, c.intermediate_size, moe.n_routed_experts, moe.n_shared_experts),
        *(moe.num_experts_per_tok, moe.moe_intermediate_size, moe.scoring_func, moe.topk_method, moe.n_group),
        *(moe.topk_group, moe.norm_topk_prob, moe.routed_scaling_factor, c.rms_norm_eps, c.rope.theta),
        *(c.max_position_embeddings, c.mtp.num_nextn_predict_layers),
    )
    if name == "deepseek-moe-16b":
        assert (a.kind, a.head_dim, a.num_key_value_heads, c.rope.layout) == ("mha", 128, 16, "halves")
    else:
        assert (a.kind, a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim) == (
            *("mla", 512, 128, 64, 128),
        )
        assert c.rope.layout == "interleaved"
    assert not c.tie_word_embeddings
    assert not a.bias


# factor, original length, beta_fast, beta_slow, mscale, mscale_all_dim
YARN = {
    "deepseek-v2-lite": (40, 4096, 32, 1, 0.707, 0.707),
    "deepseek-v2": (40, 4096, 32, 1, 0.707, 0.707),
    "deepseek-v3": (40, 4096, 32, 1, 1, 1),
    "deepseek-r1": (40, 4096, 32, 1, 1, 1),
    "deepseek-v3.1": (40, 4096, 32, 1, 1, 1),
    "kimi-k2": (32, 4096, 1, 1, 1, 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_yarn(name: str):
    yarn = preset(name).rope.yarn
    if name not in YARN:
        assert yarn is None
    else:
        assert yarn is not None
        assert YARN[name] == (
            *(yarn.factor, yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow),
            *(yarn.mscale, yarn.mscale_all_dim),
        )


@pytest.mark.parametrize(
    ("name", "vocabulary", "layers", "eps"), [(DENSE[0], 102400, 30, 1e-6), (DENSE[1], 32000, 32, 1e-5)]
)
def test_published_settings_of_dense_models(name: str, vocabulary: int, layers: int, eps: float):
    """DeepSeek LLM (arXiv 2401.02954, table 2) and Llama 2 (2307.09288), with their config.json files."""
    c = preset(name)
    assert (c.vocab_size, c.num_hidden_layers, c.rms_norm_eps) == (vocabulary, layers, eps)
    assert (c.hidden_size, c.intermediate_size, c.max_position_embeddings, c.moe) == (4096, 11008, 4096, None)
    a = c.attention
    assert (a.kind, a.num_attention_heads, a.num_key_value_heads, a.head_dim, a.bias) == ("mha", 32, 32, 128, False)
    assert (c.rope.theta, c.rope.layout, c.rope.yarn, c.tie_word_embeddings) == (10000, "halves", None, False)


@pytest.mark.parametrize("name", PUBLISHED + DENSE)
def test_published_files_come_back_key_by_key(name: str):
    original = file_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = preset(name)
        written = json.loads(json.dumps(to_published(config)))
        again = from_published(written)
    assert {key: written.get(key, "not written") for key in original} == original
    assert again.model_copy(update={"published": {}}) == config.model_copy(update={"published": {}})
    assert to_published(again) == written


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_round_trips_in_our_own_form(name: str):
    config = preset(name)
    assert config_from_dict(json.loads(config.model_dump_json()), "x") == config
    assert resolve_model(name) == resolve_model({"preset": name}) == config


def test_names_are_in_order_and_each_has_a_file():
    names = preset_names()
    assert len(set(names)) == len(names)
    assert tuple(names[:10]) == PUBLISHED + DENSE
    folder = resources.files("abyssal.config") / "presets"
    assert {f"{n}.json" for n in names} == {e.name for e in folder.iterdir() if e.name.endswith(".json")}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("deepseek-v33", ["'deepseek-v33'", "did you mean 'deepseek-v3'?"]),
        ("deepsek-moe-16b", ["did you mean 'deepseek-moe-16b'?"]),
        ("zzzzzz", ["'zzzzzz'", "known: deepseek-moe-16b, deepseek-v2-lite"]),
    ],
)
def test_unknown_presets(spec: str, says: list[str]):
    for function in (preset, resolve_model):
        with pytest.raises(UserError) as caught:
            function(spec)
        message = str(caught.value)
        assert "\n" not in message
        assert all(part in message for part in says), message


def test_resolving_paths_and_mappings(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(file_of("deepseek-v2-lite")))
    expected = preset("deepseek-v2-lite")
    assert resolve_model(str(tmp_path)) == resolve_model(str(tmp_path / "config.json")) == expected
    assert read_config(tmp_path) == expected
    assert resolve_model(file_of("deepseek-v2-lite")) == expected
    changed = resolve_model({"preset": str(tmp_path), "moe": {"n_routed_experts": 16}, "hidden_size": 512})
    assert (changed.moe.n_routed_experts, changed.moe.num_experts_per_tok, changed.hidden_size) == (16, 6, 512)
    assert changed.published == {}  # no longer that model
    assert changed.attention == expected.attention


def test_changing_a_preset():
    mha = {"kind": "mha", "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    assert resolve_model({"preset": "deepseek-v2-lite", "attention": mha}).attention.cached_values == 2 * 4 * 128
    ratio = resolve_model({"preset": "deepseek-v3", "attention": {"compression_ratio": 14}})
    assert (ratio.attention.q_lora_rank, ratio.attention.kv_lora_rank) == (512, 512)  # 7168 / 14
    assert ratio.attention.num_attention_heads == 128
    assert resolve_model({"preset": "deepseek-v3", "moe": None}).moe is None
    assert resolve_model({"preset": "deepseek-v3", "attention": {"q_lora_rank": None}}).attention.q_lora_rank is None


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("no/such/folder", "model: no/such/folder: no such file or folder"),
        ("no.json", "model: no.json: no such file or folder"),
        ({"preset": 3}, "model.preset: 3 is not a preset's name or a path"),
        ({"preset": "deepseek-v3", "hiden_size": 3}, "model: hiden_size: no such key (did you mean 'hidden_size'?)"),
        ({"preset": "deepseek-v3", "moe": {"topk": 1}}, "model: moe.topk: no such key"),
        ({}, "model: vocab_size: missing"),
    ],
    ids=str,
)
def test_bad_specifications(spec: Any, says: str):
    with pytest.raises(UserError) as caught:
        resolve_model(spec)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_compression_ratio_agrees_with_ranks_that_say_the_same():
    native = preset("deepseek-v2-lite").model_dump()
    native["attention"] |= {"compression_ratio": 4, "q_lora_rank": 512, "kv_lora_rank": 512}
    assert ModelConfig.model_validate(native).attention.kv_lora_rank == 512
