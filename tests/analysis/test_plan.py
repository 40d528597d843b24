"""Plans: layouts that are possible, fit and say why; times beside published ones; units."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.analysis.activations import Adapters
from abyssal.analysis.cards import CARDS, Card
from abyssal.analysis.plan import Planner, Wishes, gpu_seconds, layouts, parse_bytes, parse_count, training_flops
from abyssal.analysis.published_figures import FIGURES, figures_of, implied_mfu
from abyssal.config import ModelConfig, preset
from abyssal.errors import UserError

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
    assert Planner(config, replace(wishes, adapters=Adapters(16), nf4=True)).training()
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
        ("demo", {"adapters": Adapters(1000), "nf4": True}, r"--qlora: rank 1000 is not between 1 and 256"),
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


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-moe-16b", "demo"])
def test_inference_finds_the_most_that_fits(name: str) -> None:
    planner = Planner(preset(name), Wishes(8, CARDS["h200"]))
    plan = planner.inference(precision="fp8")
    for context, count in plan.fits.items():

        def total(batch: int, context: int = context) -> int:
            from abyssal.analysis.memory import inference_memory

            return inference_memory(
                planner.inventory, precision="fp8", batch=batch, context=context, tensor=plan.tensor, expert=plan.expert
            ).total

        assert count == 0 or total(count) <= planner.wishes.usable
        assert total(count + 1) > planner.wishes.usable


def test_inference_takes_the_smallest_group() -> None:
    v3 = preset("deepseek-v3")
    assert Planner(v3, Wishes(16, CARDS["h200"])).inference(precision="fp8").gpus == 8
    assert Planner(v3, Wishes(16, CARDS["h200"])).inference(precision="bf16").gpus == 16
    with pytest.raises(UserError, match="the largest term is weights"):
        Planner(v3, Wishes(1, CARDS["h200"])).inference()
    with pytest.raises(UserError, match="--context: 5000 is more than the model's max_position_embeddings 4096"):
        Planner(preset("deepseek-moe-16b"), Wishes(1, FORTY)).inference(context=5000)


def test_time_of_deepseek_v3() -> None:
    """180K H800 hours a trillion tokens, 2.664M for 14.8T (arXiv 2412.19437 §1), at one and the same MFU."""
    mfu = implied_mfu("deepseek-v3", 180e3, 1e12, "h800")
    assert mfu == pytest.approx(implied_mfu("deepseek-v3", 2664e3, 14.8e12, "h800"), rel=1e-9)
    assert 0.35 < mfu < 0.43
    config = preset("deepseek-v3").model_copy(update={"mtp": preset("deepseek-v2").mtp})
    seconds = gpu_seconds(14.8e12, training_flops(config, 4096), 989e12, mfu)
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


def test_lora_takes_two_thirds_of_the_flops() -> None:
    config: ModelConfig = preset("demo")
    assert training_flops(config, 512, Adapters(8)) * 3 == pytest.approx(2 * training_flops(config, 512))
