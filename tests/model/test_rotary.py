import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_models import frequencies, turned

from abyssal.config import RopeConfig, YarnConfig, preset
from abyssal.kernels.heads import rotate
from abyssal.model.rotary import attention_mscale, inverse_frequencies, rotary_tables, yarn_mscale

CPU = torch.device("cpu")


def published_yarn(**changes: float) -> RopeConfig:
    yarn = {"factor": 40.0, "original_max_position_embeddings": 4096} | changes
    return RopeConfig(yarn=YarnConfig.model_validate(yarn))


yarns = st.builds(
    YarnConfig,
    factor=st.floats(1, 64),
    original_max_position_embeddings=st.integers(4, 8192),
    beta_fast=st.sampled_from([1.0, 8.0, 32.0]),
    beta_slow=st.sampled_from([0.25, 1.0]),
    mscale=st.floats(0, 2),
    mscale_all_dim=st.floats(0, 2),
)
ropes = st.builds(
    RopeConfig,
    theta=st.sampled_from([100.0, 10000.0, 50000.0, 1e6]),
    layout=st.sampled_from(["interleaved", "halves"]),
    yarn=st.one_of(st.none(), yarns),
)


@given(rope=ropes, pairs=st.integers(1, 40))
def test_frequencies_equal_the_formula(rope: RopeConfig, pairs: int):
    ours = inverse_frequencies(rope, 2 * pairs, torch.float64, CPU)
    expected = torch.tensor(frequencies(rope, 2 * pairs), dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "kimi-k2"])
def test_yarn_leaves_fast_dimensions_and_divides_slow_ones(name: str):
    rope = preset(name).rope
    yarn = rope.yarn
    assert yarn is not None
    plain = [rope.theta ** (-2 * i / 64) for i in range(32)]
    ours = inverse_frequencies(rope, 64, torch.float64, CPU).tolist()
    turns = [yarn.original_max_position_embeddings * f / (2 * math.pi) for f in plain]  # over the original length
    fast = [i for i in range(32) if turns[i] > yarn.beta_fast]
    slow = [i for i in range(32) if turns[i] < yarn.beta_slow]
    assert len(fast) > 5
    assert len(slow) > 5
    for i in fast[:-1]:  # the ramp begins at a whole pair, so the one at its edge may be in it
        assert ours[i] == pytest.approx(plain[i], rel=1e-12)
    for i in slow[1:]:
        assert ours[i] == pytest.approx(plain[i] / yarn.factor, rel=1e-12)
    between = range(fast[-1] + 1, slow[0])
    assert all(plain[i] / yarn.factor <= ours[i] <= plain[i] for i in between)
    assert all(a > b for a, b in pairwise(ours))


def test_v3_ramp_runs_from_pair_10_to_pair_23():
    # 64·ln(4096 / (2π·32)) / (2·ln 10000) = 10.47 and 64·ln(4096 / 2π) / (2·ln 10000) = 22.52, rounded outwards
    ours = inverse_frequencies(published_yarn(), 64, torch.float64, CPU)
    plain = torch.tensor([10000 ** (-i / 32) for i in range(32)], dtype=torch.float64)
    share = (plain - ours) / (plain - plain / 40)  # 0 untouched, 1 divided by the factor
    expected = torch.tensor([min(max((i - 10) / 13, 0.0), 1.0) for i in range(32)], dtype=torch.float64)
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-12)


def test_mscales_of_the_published_models():
    # 0.1 · 1 · ln 40 + 1 = 1.3688879…; 0.0707 · ln 40 + 1 = 1.2608037…
    assert yarn_mscale(40, 1) == pytest.approx(1.3688879454113936)
    assert attention_mscale(preset("deepseek-v3").rope) == pytest.approx(1.3688879454113936**2)
    assert attention_mscale(preset("deepseek-v2").rope) == pytest.approx(1.2608037774058553**2)
    assert attention_mscale(preset("moonlight-16b-a3b").rope) == 1
    assert yarn_mscale(1.0, 5.0) == 1
    for name in ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "kimi-k2"):
        cos, sin = rotary_tables(preset(name).rope, 64, torch.tensor([[0, 3]]), torch.float32)
        torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))  # equal mscales: amplitude 1


@given(rope=ropes, pairs=st.integers(1, 8), position=st.integers(0, 100_000), seed=st.integers(0, 2**31))
def test_rotation_equals_the_formula(rope: RopeConfig, pairs: int, position: int, seed: int):
    x = torch.randn(2 * pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tables = rotary_tables(rope, 2 * pairs, torch.tensor([[position]]), torch.float64)
    ours = rotate(x.view(1, 1, 1, -1), tables, rope.layout == "interleaved").flatten()
    torch.testing.assert_close(ours, turned(rope, x, position), rtol=0, atol=1e-9)


@given(
    rope=ropes,
    pairs=st.integers(1, 16),
    q=st.integers(0, 5000),
    k=st.integers(0, 5000),
    shift=st.integers(1, 5000),
    seed=st.integers(0, 2**31),
)
def test_scores_depend_on_the_distance_only(rope: RopeConfig, pairs: int, q: int, k: int, shift: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 1, 1, 1, 2 * pairs, dtype=torch.float64, generator=generator)

    def at(v: torch.Tensor, position: int) -> torch.Tensor:
        tables = rotary_tables(rope, 2 * pairs, torch.tensor([[position]]), torch.float64)
        return rotate(v, tables, rope.layout == "interleaved")

    here, there = (at(x, q + s) * at(y, k + s) for s in (0, shift))
    torch.testing.assert_close(here.sum(), there.sum(), rtol=0, atol=1e-8)
    amplitude = rope.yarn and yarn_mscale(rope.yarn.factor, rope.yarn.mscale) / yarn_mscale(
        rope.yarn.factor, rope.yarn.mscale_all_dim
    )
    torch.testing.assert_close(at(x, q).norm(), x.norm() * (amplitude or 1.0))
    if q != k and rope.yarn is None and pairs > 1:  # and it does depend on it: the first pair turns 1 radian a position
        assert not torch.allclose(at(x, q), at(x, k))


def test_layouts_turn_different_pairs():
    x = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).view(1, 1, 1, 4)
    tables = rotary_tables(RopeConfig(), 4, torch.tensor([[1]]), torch.float64)
    c, s = math.cos(1), math.sin(1)
    expected = torch.tensor([[c, s, 0, 0], [c, 0, s, 0]], dtype=torch.float64)
    torch.testing.assert_close(rotate(x, tables, True).flatten(), expected[0])
    torch.testing.assert_close(rotate(x, tables, False).flatten(), expected[1])


def test_tables_stay_fp32_for_a_bfloat16_model_and_far_positions():
    rope = RopeConfig()
    cos, _ = rotary_tables(rope, 8, torch.tensor([[4097]]), torch.bfloat16)  # BF16 would make 4096 of it
    assert cos.dtype == torch.float32
    assert float(cos[0, 0, 0, 0]) == pytest.approx(math.cos(4097), abs=1e-4)
    x = torch.randn(1, 1, 2, 8).bfloat16()
    assert rotate(x, rotary_tables(rope, 8, torch.tensor([[4097]]), torch.bfloat16), True).dtype == torch.bfloat16
