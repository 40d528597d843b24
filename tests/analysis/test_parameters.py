"""Published sizes, to the last digit (FACTS.md; recomputed from the published config files by hand)."""

import os
from pathlib import Path

import pytest
import torch

from abyssal.analysis.parameters import count_parameters
from abyssal.config import ModelConfig, preset, preset_names, to_published
from abyssal.model import Transformer

V3 = (671_026_419_200, 37_552_297_472, 36_625_618_432, 11_610_068_224, 44_040_192, 576)
PUBLISHED = {
    # all; active; active without the input embedding; MTP modules; one routed expert; cached values a token and layer
    "deepseek-moe-16b": (16_375_728_128, 2_828_650_496, 2_618_935_296, 0, 8_650_752, 4096),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008, 0, 8_650_752, 576),
    "deepseek-v2": (235_741_434_880, 21_375_800_320, 20_851_512_320, 0, 23_592_960, 576),
    "deepseek-v3": V3,
    "deepseek-r1": V3,
    "deepseek-v3.1": V3,
    "moonlight-16b-a3b": (15_960_110_208, None, None, 0, 8_650_752, 576),
    "kimi-k2": (1_026_408_232_448, None, None, 0, 44_040_192, 576),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str):
    total, active, lean, mtp, expert, cached = PUBLISHED[name]
    config = preset(name)
    counted = count_parameters(config)
    assert counted.total == total
    assert counted.mtp == mtp
    assert config.attention.cached_values == cached
    moe = config.moe
    assert moe is not None
    layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    assert counted.by_part["routed experts"] == expert * moe.n_routed_experts * layers
    assert counted.active_by_part["routed experts"] == expert * moe.num_experts_per_tok * layers
    # what the experts that are not chosen leave out
    assert counted.active == total - expert * (moe.n_routed_experts - moe.num_experts_per_tok) * layers
    assert counted.active_without_embedding == counted.active - config.vocab_size * config.hidden_size
    if active is not None:
        assert counted.active == active
        assert counted.active_without_embedding == lean


@pytest.mark.parametrize(("name", "total"), [("deepseek-llm-7b", 6_910_365_696), ("llama2-7b", 6_738_415_616)])
def test_dense_models_have_as_many_parameters_as_transformers_builds(name: str, total: int):
    transformers = pytest.importorskip("transformers")
    config = preset(name)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(to_published(config)))
    counted = count_parameters(config)
    assert counted.total == counted.active == sum(p.numel() for p in theirs.parameters()) == total
    assert counted.by_part == by_formula(config)
    assert counted.active_without_embedding == total - config.vocab_size * 4096
    assert counted.mtp_layers == ()


def test_layers_of_v3():
    counted = count_parameters(preset("deepseek-v3"))
    attention, norms, expert = 187_107_328, 2 * 7168, 44_040_192
    dense, moe = counted.layers[2], counted.layers[3]
    assert (len(counted.layers), len(counted.mtp_layers)) == (61, 1)
    assert dense.total == dense.active == attention + norms + 3 * 7168 * 18432
    assert moe.total == attention + norms + 257 * expert + 256 * 7168 + 256
    assert moe.active == moe.total - 248 * expert
    # what the checkpoint has under layer 61, less the embedding and head that it repeats there
    module = counted.mtp_layers[0]
    assert module.total == moe.total + 2 * 7168 * 7168 + 3 * 7168 == 11_610_068_224
    assert module.active == module.total - 248 * expert
    assert module.by_part["projection"] == 2 * 7168 * 7168


@pytest.mark.parametrize("name", preset_names())
def test_layers_and_what_stands_outside_are_the_whole(name: str):
    config = preset(name)
    counted = count_parameters(config)
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    for i, layer in enumerate((*counted.layers, *counted.mtp_layers)):
        assert layer.total == sum(t.numel() for key, t in state.items() if key.startswith(f"model.layers.{i}."))
    outside = sum(n for part, n in by_formula_outside(config).items())
    assert counted.total == sum(layer.total for layer in counted.layers) + outside
    assert counted.active == sum(layer.active for layer in counted.layers) + outside


def by_formula_outside(config: ModelConfig) -> dict[str, int]:
    matrix = config.vocab_size * config.hidden_size
    return {"embedding": matrix, "norm": config.hidden_size, "head": 0 if config.tie_word_embeddings else matrix}


def test_v3_attention_is_187_million_a_layer():
    counted = count_parameters(preset("deepseek-v3"))
    # 7168·1536 + 1536 + 1536·24576 + 7168·576 + 512 + 512·32768 + 16384·7168
    assert counted.by_part["attention"] == 61 * 187_107_328


def by_formula(config: ModelConfig) -> dict[str, int]:
    """The parts of a model, by multiplying what the config says."""
    d, a, moe = config.hidden_size, config.attention, config.moe
    if a.kind == "mha":
        attention = d * a.head_dim * 2 * (a.num_attention_heads + a.num_key_value_heads)
    elif a.kind == "mla":
        q = d * a.num_attention_heads * a.qk_head_dim
        if a.q_lora_rank:
            q = a.q_lora_rank * (d + 1 + a.num_attention_heads * a.qk_head_dim)
        kv = d * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank
        kv += a.kv_lora_rank * a.num_attention_heads * (a.qk_nope_head_dim + a.v_head_dim)
        attention = q + kv + a.num_attention_heads * a.v_head_dim * d
    layers = config.num_hidden_layers
    sparse = sum(1 for i in range(layers) if moe and i >= moe.first_k_dense_replace and i % moe.moe_layer_freq == 0)
    parts = {"embedding": config.vocab_size * d, "attention": attention * layers, "norms": d * (2 * layers + 1)}
    if not config.tie_word_embeddings:
        parts["head"] = config.vocab_size * d
    if layers > sparse:
        parts["dense MLP"] = 3 * d * config.intermediate_size * (layers - sparse)
    if moe and sparse:
        e, f = moe.n_routed_experts, moe.moe_intermediate_size
        parts["routed experts"] = sparse * e * 3 * d * f
        parts["router"] = sparse * e * (d + (moe.topk_method == "noaux_tc"))
        if moe.n_shared_experts:
            parts["shared experts"] = sparse * 3 * d * f * moe.n_shared_experts
    return parts


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_equal_the_formulas(name: str):
    assert count_parameters(preset(name)).by_part == by_formula(preset(name))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_head_and_dense_models(tied: bool):
    config = preset("deepseek-v2-lite").model_copy(update={"tie_word_embeddings": tied, "moe": None})
    counted = count_parameters(config)
    assert counted.by_part == counted.active_by_part == by_formula(config)
    embedding = 102400 * 2048
    # A tied matrix is still multiplied with as the head.
    assert counted.active_without_embedding == counted.total - (0 if tied else embedding)


def test_segment_routing_uses_more_experts():
    base = preset("deepseek-v2-lite")
    assert base.moe is not None
    config = base.model_copy(update={"moe": base.moe.model_copy(update={"segments": 2})})
    plain, cut = count_parameters(base), count_parameters(config)
    assert cut.by_part["routed experts"] * 2 == plain.by_part["routed experts"]
    assert cut.active_by_part["routed experts"] == plain.active_by_part["routed experts"]  # twice as many, half as wide


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_v3_on_the_meta_device_takes_no_memory():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with torch.device("meta"):
        model = Transformer(preset("deepseek-v3"))
    assert all(p.is_meta for p in model.parameters())
    assert all(b.is_meta for b in model.buffers())
    assert resident() - before < 200e6
