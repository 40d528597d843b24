"""FLOPs beside torch's own counter, which sees the products as they run, and beside DeepSeek's published figures."""

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from abyssal.analysis.flops import count_flops
from abyssal.analysis.parameters import count_parameters
from abyssal.cli import app
from abyssal.config import ModelConfig, preset
from abyssal.errors import UserError
from abyssal.model import Transformer
from abyssal.model.moe import Experts

BATCH = 2
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
# Values wider than keys: narrower ones are padded for torch's kernels, and torch counts the padding.
HEADS = {"num_attention_heads": 3, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 12}
ATTENTION = {
    "mha": {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "mla": {"kind": "mla", "kv_lora_rank": 7, **HEADS},
    "mla, q_lora": {"kind": "mla", "kv_lora_rank": 7, "q_lora_rank": 11, **HEADS},
    "separate latents": {"kind": "separate_latents", "k_lora_rank": 7, "v_lora_rank": 9, **HEADS},
    "separate latents, q_lora": {
        "kind": "separate_latents",
        "k_lora_rank": 7,
        "v_lora_rank": 9,
        "q_lora_rank": 11,
        **HEADS,
    },
}
MOE = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "first_k_dense_replace": 1}
FEED_FORWARD = {
    "dense": None,
    "no shared experts": MOE,
    "shared experts": MOE | {"n_shared_experts": 2},
    "every second layer": MOE | {"first_k_dense_replace": 0, "moe_layer_freq": 2},
    "segments": MOE | {"segments": 2, "n_shared_experts": 1},
}


def plain_experts(self: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Every expert on just the tokens that chose it, with no product in the combination."""
    out = torch.zeros_like(x)
    for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
        token, choice = torch.where(indices == expert)
        gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down)
        out = out.index_add(0, token, y * weights[token, choice].unsqueeze(-1))
    return out


class Whole(nn.Module):
    """The sum of all logits, the MTP modules' too, in one call: torch names modules by the way from the outermost."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.inner = model

    def forward(self, tokens: Tensor) -> Tensor:
        model = self.inner
        hidden = [model.hidden(tokens[:, : tokens.shape[1] - len(model.mtp_modules)])]
        hidden += model.mtp_hidden(hidden[0], tokens)
        return torch.stack([model.lm_head(h).sum() for h in hidden]).sum()


def counted(config: ModelConfig, context: int, *, backward: bool = False) -> dict[str, int]:
    """What torch counts by module, in FP64 with plain attention. Attention's two products are full, not causal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experts, "forward", plain_experts)
        model = Transformer(config, generator=torch.Generator().manual_seed(0)).double()
        tokens = torch.randint(48, (BATCH, context + len(model.mtp_modules)), generator=torch.Generator())
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter:
            loss = Whole(model)(tokens)
            if backward:
                loss.backward()
    return {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}


def full_attention(parts: dict[str, int], context: int) -> int:
    """All parts, with attention's products as torch counts them: each token to all tokens, not to those before it."""
    scores = parts["attention scores and values"]
    return sum(parts.values()) - scores + scores * 2 * context // (context + 1)


def config_of(attention: str, feed_forward: str, mtp: int = 0) -> ModelConfig:
    settings = SIZES | {"attention": ATTENTION[attention], "moe": FEED_FORWARD[feed_forward]}
    return ModelConfig.model_validate(settings | {"mtp": {"num_nextn_predict_layers": mtp}})


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("feed_forward", FEED_FORWARD)
def test_forward_is_what_torch_counts(attention: str, feed_forward: str):
    config, context = config_of(attention, feed_forward), 9
    flops = count_flops(config, context)
    assert counted(config, context)["Global"] == BATCH * context * full_attention(flops.by_part, context)
    assert flops.mtp == 0


@settings(max_examples=25)
@given(
    attention=st.sampled_from(list(ATTENTION)),
    feed_forward=st.sampled_from(list(FEED_FORWARD)),
    mtp=st.integers(0, 2),
    context=st.integers(1, 20),
)
def test_a_training_step_is_what_torch_counts(attention: str, feed_forward: str, mtp: int, context: int):
    config = config_of(attention, feed_forward, mtp)
    flops = count_flops(config, context)
    full = full_attention(flops.by_part, context)
    full += full_attention(flops.mtp_by_part, context) if mtp else 0
    assert counted(config, context, backward=True)["Global"] == 3 * BATCH * context * full
    assert flops.training == 3 * (sum(flops.by_part.values()) + sum(flops.mtp_by_part.values()))


def test_each_part_is_what_torch_counts_in_its_modules():
    context = 9
    config = config_of("mla, q_lora", "shared experts", mtp=2)
    flops = count_flops(config, context)
    modules = counted(config, context)
    found: Counter[str] = Counter()
    for name, count in modules.items():
        found["router"] += count if name.endswith(".mlp.gate") else 0
        found["routed experts"] += count if name.endswith(".mlp.experts") else 0
        found["shared experts"] += count if name.endswith(".mlp.shared_experts") else 0
        found["dense MLP"] += count if name.endswith("layers.0.mlp") else 0
        found["attention projections"] += count if "self_attn" in name and name.endswith("proj") else 0
        found["attention projections"] += count if name.endswith("kv_a_proj_with_mqa") else 0
        found["projection"] += count if name.endswith("eh_proj") else 0
        found["head"] += count if name.endswith("lm_head") else 0
    both = Counter(flops.by_part) + Counter(flops.mtp_by_part)
    del both["attention scores and values"]
    assert found == {part: BATCH * context * count for part, count in both.items()}


def test_causal_half_by_counting_pairs():
    for context in (1, 2, 7):
        flops = count_flops(config_of("mla", "dense"), context)
        pairs = sum(1 for query in range(context) for key in range(context) if key <= query)
        heads, qk, v = 3, 10, 12
        in_all = 2 * pairs * heads * (qk + v) * SIZES["num_hidden_layers"]
        assert flops.by_part["attention scores and values"] * context == in_all


@pytest.mark.parametrize(("name", "gflop"), [("deepseek-v2", 155), ("deepseek-v3", 250)])
def test_published_cost_of_training(name: str, gflop: int):
    """arXiv 2505.09343, table 2: training, a token, at a sequence length of 4096. MTP is not in it."""
    assert round(3 * count_flops(preset(name), 4096).forward / 1e9) == gflop


@pytest.mark.parametrize(("dense", "published"), [("deepseek-llm-7b", 74.4 / 183.5), ("llama2-7b", 74.4 / 187.9)])
def test_published_share_of_dense_models(dense: str, published: float):
    """DeepSeekMoE (arXiv 2401.06066, §5.2, tables 3 and 4): TFLOP a 4096 tokens, 40.5% and 39.6%."""
    sparse = count_flops(preset("deepseek-moe-16b"), 4096)
    assert sparse.training / count_flops(preset(dense), 4096).training == pytest.approx(published, abs=0.015)


@pytest.mark.parametrize("feed_forward", FEED_FORWARD)
def test_each_layer_is_what_torch_counts_in_it(feed_forward: str):
    context, mtp = 9, 2
    config = config_of("mla, q_lora", feed_forward, mtp)
    flops, modules = count_flops(config, context), counted(config, context)
    assert len(flops.by_layer) == 3 + mtp
    heads, qk, v = 3, 10, 12
    beyond_causal = heads * (qk + v) * (context - 1)  # torch counts each token to all tokens
    for layer, cost in enumerate(flops.by_layer):
        found = modules[f"Whole.inner.model.layers.{layer}"]
        if layer >= 3:
            found += BATCH * context * 2 * 32 * 48  # the head stands outside
        assert found == BATCH * context * (cost + beyond_causal)
    assert sum(flops.by_layer) == flops.forward + flops.mtp - 2 * 32 * 48


@pytest.mark.parametrize("name", ["deepseek-moe-16b", "deepseek-v2-lite", "deepseek-v3", "kimi-k2", "llama2-7b"])
def test_products_are_twice_the_active_matrices(name: str):
    config = preset(name)
    flops, counts = count_flops(config, 4096), count_parameters(config)
    products = flops.forward - flops.by_part["attention scores and values"]
    # Norms and e_score_correction_bias are parameters that no product takes.
    assert products == pytest.approx(2 * counts.active_without_embedding, rel=1e-4)
    assert products < 2 * counts.active_without_embedding


def inspect(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["inspect", *arguments], catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_inspect_shows_flops():
    data = json.loads(inspect("deepseek-v3", "--json"))["flops"]
    flops = count_flops(preset("deepseek-v3"), 4096)
    assert data["context"] == 4096
    assert data["forward"] == {"total": flops.forward, **flops.by_part}
    assert data["mtp"] == {"total": flops.mtp, **flops.mtp_by_part}
    assert data["training"] == flops.training
    shown = inspect("deepseek-v3")
    assert "context of 4,096" in shown
    assert f"{flops.forward / 1e9:,.3f}" in shown


def test_inspect_takes_a_context():
    assert json.loads(inspect("demo", "--json"))["flops"]["context"] == preset("demo").max_position_embeddings
    assert json.loads(inspect("demo", "--json", "--context", "7"))["flops"] == {
        "context": 7,
        "forward": {"total": (flops := count_flops(preset("demo"), 7)).forward, **flops.by_part},
        "mtp": {"total": flops.mtp, **flops.mtp_by_part},
        "training": flops.training,
    }


@pytest.mark.parametrize("context", ["0", "1025"])
def test_inspect_refuses_a_context_that_the_model_has_not(context: str):
    with pytest.raises(UserError, match=rf"^--context: {context} is not between 1 and .* 1024$"):
        inspect("demo", "--context", context)


def test_context_below_one():
    with pytest.raises(ValueError, match="context: 0"):
        count_flops(preset("demo"), 0)
