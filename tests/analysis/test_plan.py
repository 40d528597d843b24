"""Plans: layouts that are possible, fit and say why; times beside published ones; units."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from abyssal.analysis.activations import Adapters
from abyssal.analysis.cards import CARDS, Card
from abyssal.analysis.flops import count_flops
from abyssal.analysis.inventory import Inventory
from abyssal.analysis.layouts import Wishes, layouts
from abyssal.analysis.plan import Planner, gpu_seconds, training_flops
from abyssal.analysis.published_figures import FIGURES, figures_of, implied_mfu
from abyssal.analysis.units import parse_bytes, parse_count, plural, size
from abyssal.config import ModelConfig, preset
from abyssal.errors import UserError
from abyssal.model import Transformer
from abyssal.model.moe import Experts

FORTY = Card("GPU", 40e9, None, 300e9)


@pytest.mark.parametrize(
    ("text", "number"),
    [("80GB", 80e9), ("80 GiB", 80 * 2**30), ("40960MB", 40.96e9), ("1.5tb", 1.5e12), ("2e3 MiB", 2e3 * 2**20)],
)
def test_sizes(text: str, number: float) -> None:
    assert parse_bytes(text, "--gpu-memory") == number


@pytest.mark.parametrize(
    ("text", "number"), [("1T", 1e12), ("14.8T", 14.8e12), ("2e12", 2e12), ("300M", 3e8), ("1b", 1e9), ("12 k", 12000)]
)
def test_counts(text: str, number: float) -> None:
    assert parse_count(text, "--tokens") == pytest.approx(number)


@pytest.mark.parametrize("text", ["80 apples", "", "GB", "-3GB", "0GB", "80", "nan GB", "1e999GB", "8 0GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=r"^--gpu-memory: .*"):
        parse_bytes(text, "--gpu-memory")


@pytest.mark.parametrize("text", ["many", "1X", "-5", "0", "1.2.3T"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(UserError, match=r"^--tokens: "):
        parse_count(text, "--tokens")


@settings(max_examples=40)
@given(
    st.sampled_from(["deepseek-moe-16b", "deepseek-v2", "demo", "llama2-7b"]),
    st.sampled_from([1, 2, 6, 8, 12, 48, 64, 96]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([None, 1, 2]),
)
def test_layouts_are_possible(name: str, gpus: int, tensor: int | None, pipeline: int | None) -> None:
    config = preset(name)
    for layout in layouts(config, Wishes(gpus, FORTY, tensor=tensor, pipeline=pipeline)):
        assert layout.gpus == gpus == layout.replicate * layout.shard * layout.tensor * layout.pipeline
        assert tensor in (None, layout.tensor)
        assert pipeline in (None, layout.pipeline)
        assert config.attention.num_attention_heads % layout.tensor == 0
        assert layout.data % layout.expert == 0
        if config.moe is None:
            assert layout.expert == 1
        else:
            assert config.moe.n_routed_experts % layout.expert == 0


@settings(max_examples=30)
@given(
    st.sampled_from(["deepseek-moe-16b", "deepseek-v2-lite", "demo", "first-moe", "llama2-7b"]),
    st.sampled_from([1, 4, 8, 32]),
    st.sampled_from([16, 40, 80]),
    st.sampled_from([None, Adapters(8)]),
    st.sampled_from([None, True, False]),
)
def test_a_plan_fits_or_says_what_does_not(
    name: str, gpus: int, gigabytes: int, adapters: Adapters | None, recompute: bool | None
) -> None:
    card = Card("GPU", gigabytes * 1e9, 312e12, 300e9)
    wishes = Wishes(gpus, card, adapters=adapters, recompute=recompute, sequence=512)
    planner = Planner(preset(name), wishes)
    least = min(
        planner.memory(layout, setup).total
        for layout in layouts(planner.config, wishes)
        for setup in planner.setups(layout)
    )
    if least > wishes.usable:
        with pytest.raises(UserError, match=r"^does not fit: .*; the largest term is .*; .*"):
            planner.training()
        return
    plan = planner.training()
    assert plan.memory.total <= wishes.usable
    assert plan.layout.gpus == gpus
    assert plan.setup.recompute == recompute or recompute is None
    assert plan.memory.total == planner.memory(plan.layout, plan.setup).total
    assert plan.why


def test_more_memory_needs_no_more_sharding() -> None:
    config = preset("deepseek-moe-16b")
    plans = {}
    for memory in (40, 80, 192, 400):
        plans[memory] = Planner(config, Wishes(8, Card("GPU", memory * 1e9, 312e12, 300e9))).training()
    assert plans[40].setup.recompute
    assert plans[40].layout.shard == 8
    assert not plans[400].setup.recompute
    assert plans[400].layout.shard == plans[400].layout.tensor == 1
    assert "do not fit on one GPU" in plans[40].why[0]
    assert "would fit on one GPU" in plans[400].why[0]


def test_what_would_fit_does() -> None:
    config = preset("deepseek-moe-16b")
    wishes = Wishes(2, FORTY)
    with pytest.raises(UserError, match=r"would fit: .*8 GPUs") as raised:
        Planner(config, wishes).training()
    assert "the largest term is optimizer" in str(raised.value)
    assert Planner(config, replace(wishes, gpus=8)).training()
    assert Planner(config, replace(wishes, adapters=Adapters(16), frozen="nf4")).training()
    with pytest.raises(UserError, match=r"would fit: .*--micro-batch 1"):
        Planner(config, Wishes(8, FORTY, micro_batch=64)).training()
    with pytest.raises(UserError, match=r"would fit: .*--recompute"):
        Planner(config, Wishes(8, FORTY, recompute=False, tensor=1, pipeline=1)).training()


@pytest.mark.parametrize(
    ("name", "wishes", "message"),
    [
        ("demo", {"gpus": 0}, r"--gpus: 0 is not at least 1"),
        ("demo", {"gpus": 10**9}, r"--gpus: 1000000000 is more than"),
        ("demo", {"tensor": 3, "gpus": 3}, r"--tensor: 3 does not divide the model's num_attention_heads 4"),
        ("deepseek-v3", {"tensor": 16, "gpus": 16}, r"--tensor: 16 is more than the 8 GPUs of a node"),
        ("demo", {"expert": 3, "gpus": 3}, r"--expert: 3 does not divide the model's n_routed_experts 8"),
        ("llama2-7b", {"expert": 2, "gpus": 2}, r"--expert: 2, but this model has no experts"),
        ("demo", {"tensor": 2, "gpus": 3}, r"^--tensor 2 does not divide --gpus 3$"),
        ("demo", {"shard": 3, "tensor": 2, "gpus": 8}, r"--shard 3 × --tensor 2 = 6 does not divide --gpus 8"),
        (
            "demo",
            {"replicate": 1, "shard": 2, "tensor": 1, "pipeline": 2, "gpus": 8},
            r"--replicate 1 × --shard 2 × --tensor 1 × --pipeline 2 = 4 is not --gpus 8",
        ),
        ("demo", {"pipeline": 5, "gpus": 5}, r"--pipeline: 5 stages are more than the model's 4 layers"),
        ("demo", {"expert": 4, "gpus": 2}, r"--expert 4: no layout of 2 GPUs"),
        ("demo", {"sequence": 2000}, r"--sequence: 2000 is more than the model's max_position_embeddings 1024"),
        (
            "demo",
            {"global_batch": 7, "gpus": 8, "tensor": 1, "pipeline": 1},
            r"--global-batch: 7 sequences are no multiple of",
        ),
        ("demo", {"mfu": 1.2}, r"--mfu: 1.2 is not above 0 and at most 1"),
        ("demo", {"mfu": math.nan}, r"--mfu: nan"),
        ("demo", {"reserve": 1.0}, r"--reserve: 1 is not"),
        ("demo", {"adapters": Adapters(0)}, r"--lora: rank 0 is not between"),
        ("demo", {"adapters": Adapters(1000), "frozen": "nf4"}, r"--qlora: rank 1000 is not between 1 and 256"),
    ],
)
def test_bad_wishes(name: str, wishes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        Planner(preset(name), Wishes(**{"gpus": 1, "card": FORTY} | wishes)).training()  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_global_batch_becomes_micro_batches() -> None:
    plan = Planner(preset("demo"), Wishes(2, FORTY, global_batch=96, micro_batch=8)).training()
    assert plan.global_batch == 96
    assert plan.setup.accumulate * plan.layout.data == 12


def test_time_of_deepseek_v3() -> None:
    """180K H800 hours a trillion tokens, 2.664M for 14.8T (arXiv 2412.19437 §1), at one and the same MFU."""
    mfu = implied_mfu("deepseek-v3", 180e3, 1e12, "h800")
    assert mfu == pytest.approx(implied_mfu("deepseek-v3", 2664e3, 14.8e12, "h800"), rel=1e-9)
    assert 0.35 < mfu < 0.43
    config = preset("deepseek-v3").model_copy(update={"mtp": preset("deepseek-v2").mtp})
    seconds = gpu_seconds(14.8e12, training_flops(Inventory(config), 4096), 989e12, mfu)
    assert seconds / 3600 == pytest.approx(2664e3)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.model}: {figure.what}")
def test_published_figures(figure) -> None:  # type: ignore[no-untyped-def]
    ours = figure.ours()
    if figure.published is None:
        assert 35 < ours < 43  # MFU of V3's training, in percent
    elif figure.at_most:
        assert 0.7 * figure.published < ours < figure.published
    else:
        assert ours == pytest.approx(figure.published, rel=0.025)


def test_figures_by_model() -> None:
    assert len(figures_of("deepseek-moe-16b")) == 7
    assert figures_of("demo") == []


class LoRALinear(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.a), self.b)


def plain_experts(self: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Every expert on just the tokens that chose it, with no product in the combination."""
    out = torch.zeros_like(x)
    for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
        token, choice = torch.where(indices == expert)
        gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down)
        out = out.index_add(0, token, y * weights[token, choice].unsqueeze(-1))
    return out


@pytest.mark.parametrize("depths", [0, 1])
@pytest.mark.parametrize("parts", [("attention",), ("mlp", "shared"), ("attention", "mlp", "shared")])
def test_lora_s_flops_are_those_torch_counts(
    depths: int, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights have one product in the backward pass, and MTP modules do not run. The embedding trains here,
    which costs no product, so that the first layers' inputs have gradients as all others."""
    attention = {"kind": "mla", "num_attention_heads": 3, "kv_lora_rank": 7, "q_lora_rank": 11, "qk_nope_head_dim": 6}
    attention |= {"qk_rope_head_dim": 4, "v_head_dim": 12}  # wider than keys: narrower ones are padded, and counted
    moe = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "first_k_dense_replace": 1}
    config = ModelConfig.model_validate(
        {
            "vocab_size": 48,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "intermediate_size": 40,
            "max_position_embeddings": 64,
            "attention": attention,
            "moe": moe | {"n_shared_experts": 2},
            "mtp": {"num_nextn_predict_layers": depths},
        }
    )
    monkeypatch.setattr(Experts, "forward", plain_experts)
    model = Transformer(config)
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    names = {"attention": ".self_attn.", "mlp": ".0.mlp.", "shared": ".shared_experts."}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(names[part] in name for part in parts):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, LoRALinear(module, 4))
    batch, context = 2, 9
    tokens = torch.randint(48, (batch, context + depths))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        hidden = [model.hidden(tokens[:, :context])]
        torch.stack([model.lm_head(h).sum() for h in hidden]).sum().backward()
    derived = training_flops(Inventory(config), context, Adapters(4, parts))
    # Torch counts attention in full, each token to all tokens.
    counts = count_flops(config, context)
    scores = counts.by_part["attention scores and values"]
    assert counter.get_total_flops() == batch * context * (derived + 3 * scores * (context - 1) // (context + 1))


def test_adapters_of_experts_count_for_the_chosen() -> None:
    config = preset("deepseek-moe-16b")
    inventory = Inventory(config)
    of = {parts: training_flops(inventory, 512, Adapters(8, parts)) for parts in (("experts",), ("shared",))}
    both = training_flops(inventory, 512, Adapters(8, ("experts", "shared")))
    neither = of["experts",] + of["shared",] - both
    # Six of 64 experts, gate and up as one; the shared ones are a single MLP, two experts wide, gate and up apart.
    assert of["experts",] - neither == 27 * 6 * 6 * 8 * ((2048 + 2 * 1408) + (1408 + 2048))
    assert of["shared",] - neither == 27 * 6 * 8 * 3 * (2048 + 2 * 1408)


def followed(text: str, wishes: Wishes) -> Wishes:
    """What a user makes of a recommendation, all other options as they were."""
    change: dict[str, Any] = {}
    if match := re.search(r"([\d,]+) GPUs?", text):
        change["gpus"] = int(match[1].replace(",", ""))
    if "another layout" in text:
        change |= dict.fromkeys(("replicate", "shard", "tensor", "expert", "pipeline"))
    for option in ("micro_batch", "global_batch", "sequence"):
        if match := re.search(rf"--{option.replace('_', '-')} (\d+)", text):
            change[option] = int(match[1])
    if "--recompute" in text:
        change["recompute"] = True
    if "--state 8bit" in text:
        change["state"] = "8bit"
    if match := re.search(r"--q?lora (\d+)", text):
        change |= {
            "adapters": replace(wishes.adapters or Adapters(1), rank=int(match[1])),
            "frozen": "nf4" if "--qlora" in text else "dense",
        }
    assert change, text
    return replace(wishes, **change)


INVENTORIES = {name: Inventory(preset(name)) for name in ("deepseek-v3", "deepseek-moe-16b", "demo", "llama2-7b")}


@settings(max_examples=25)
@given(st.data())
def test_what_is_recommended_fits(data: st.DataObject) -> None:
    def one_of(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    name = one_of(*INVENTORIES)
    wishes = Wishes(
        gpus=one_of(1, 2, 3, 4, 8),
        card=Card("GPU", one_of(0.05, 1, 16, 40, 96) * 1e9, None, 3e11),
        sequence=one_of(None, 256, 1024),
        micro_batch=one_of(None, None, 1, 8),
        global_batch=one_of(None, None, 8, 24, 256),
        recompute=one_of(None, False, True),
        pipeline=one_of(None, None, 1),
        tensor=one_of(None, None, 1),
        shard=one_of(None, None, 1),
        expert=one_of(None, None, 1),
        state=one_of("float32", "bfloat16", "8bit"),
        dtype=one_of("float32", "bfloat16"),
        optimizer=one_of("adamw", "muon"),
        adapters=one_of(None, None, Adapters(8)),
    )
    inventory = INVENTORIES[name]
    try:
        assert Planner(inventory.config, wishes, inventory).training().memory.total <= wishes.usable
        return
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    if not message.startswith("does not fit"):
        return
    _, known, would = message.partition("would fit: ")
    assert known or message.endswith("nothing that this plan knows would fit")
    for text in would.split(", or ") if known else []:
        other = followed(text, wishes)
        assert Planner(inventory.config, other, inventory).training().memory.total <= wishes.usable


def test_wishes_stay_where_they_can() -> None:
    """In one pipeline stage of FP32, R1 needs 256 H20: 128 are enough in two."""
    config = preset("deepseek-r1")
    wishes = Wishes(4, CARDS["h20"], pipeline=1, state="bfloat16", dtype="float32")
    with pytest.raises(UserError, match=r"would fit: 256 GPUs$"):
        Planner(config, wishes).training()
    with pytest.raises(UserError, match=r"would fit: [\d,]+ GPUs in another layout$"):
        Planner(config, replace(wishes, shard=1, tensor=1)).training()


def test_more_micro_batches_a_step_are_said_to_take_more() -> None:
    planner = Planner(preset("deepseek-moe-16b"), Wishes(8, FORTY))
    plan = planner.training()
    more = planner.memory(plan.layout, replace(plan.setup, accumulate=2)).total
    assert plan.memory.total < 38e9 < more
    assert any(f"({size(more)}, too much)" in reason for reason in plan.why)


def test_fits_is_whether_there_is_a_plan() -> None:
    """Fewer layouts are tried for it."""
    for memory in (2, 4, 8):
        for batch in (None, 8, 32):
            wishes = Wishes(16, Card("GPU", memory * 1e9, None, 3e11), global_batch=batch, sequence=256)
            planner = Planner(preset("deepseek-v2-lite"), wishes)
            least = min(
                planner.memory(layout, setup).total for layout in planner.layouts() for setup in planner.setups(layout)
            )
            assert planner.fits() == (least <= wishes.usable)


def test_amounts_as_people_read_them() -> None:
    assert [size(n) for n in (76e9, 1.2e8, 950_000, 1e3)] == ["76.00 GB", "0.12 GB", "0.95 MB", "1.00 kB"]
    assert [plural(n, "sequence") for n in (1, 2048)] == ["1 sequence", "2,048 sequences"]
