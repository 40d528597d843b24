"""Bytes of the cache from a config, beside the storage of caches that exist and beside published figures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import MHA, MLA, SEPARATE, small

from abyssal.analysis.cache import DTYPES, cache_size
from abyssal.config import from_published, preset, to_published
from abyssal.model import Cache

KINDS = {"mha": MHA, "gqa": MHA | {"num_key_value_heads": 2}, "mla": MLA, "separate": SEPARATE}


@settings(max_examples=60)
@given(
    kind=st.sampled_from(list(KINDS)),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    context=st.integers(1, 40),
    batch=st.integers(1, 5),
    layers=st.integers(1, 4),
    mtp=st.integers(0, 2),
    expanded=st.booleans(),
)
def test_bytes_are_those_of_a_cache(kind, dtype, context, batch, layers, mtp, expanded):
    changes = {"num_hidden_layers": layers, "mtp": {"num_nextn_predict_layers": mtp}}
    config = small(attention=KINDS[kind], **changes)
    held = Cache(config, batch, context, dtype=dtype, expanded=expanded).nbytes
    size = cache_size(config)
    assert size.nbytes(dtype, context=context, batch=batch, expanded=expanded) == held
    assert size.nbytes(dtype, expanded=expanded) * context * batch == held


def test_a_token_of_published_models():
    """arXiv 2505.09343, table 1: KB a token in BF16, 70.272 for V3, 327.680 for Qwen-2.5 72B, 516.096 for LLaMA-3.1
    405B. The last two are said as what a cache sees of them: layers and kv heads."""
    assert cache_size(preset("deepseek-v3")).nbytes(torch.bfloat16) == 70_272
    llama = to_published(preset("llama2-7b"))
    qwen = {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8}
    assert cache_size(from_published(llama | qwen)).nbytes(torch.bfloat16) == 327_680
    large = {"num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128, "num_key_value_heads": 8}
    assert cache_size(from_published(llama | large)).nbytes(torch.bfloat16) == 516_096


@pytest.mark.parametrize(
    ("name", "values", "expanded", "times", "fewer"),
    [
        ("deepseek-v3", 576, 40960, 71.1, 98.6),
        ("deepseek-v2-lite", 576, 5120, 8.9, 88.75),
        ("deepseek-moe-16b", 4096, 4096, 1.0, 0),
        ("llama2-7b", 8192, 8192, 1.0, 0),
    ],
)
def test_values_and_ratio(name: str, values: int, expanded: int, times: float, fewer: float):
    size = cache_size(preset(name))
    assert (size.values, size.expanded_values) == (values, expanded)
    assert size.ratio == pytest.approx(times, abs=0.05)
    assert 100 * (1 - 1 / size.ratio) == pytest.approx(fewer, abs=0.05)


@pytest.mark.parametrize(
    ("context", "batch", "says"), [(0, 1, "context: 0"), (1, 0, "batch: 0"), (-2, 1, "context: -2")]
)
def test_nothing_is_no_amount(context: int, batch: int, says: str):
    with pytest.raises(ValueError, match=f"^{says} is not at least 1$"):
        cache_size(preset("demo")).nbytes(torch.bfloat16, context=context, batch=batch)
