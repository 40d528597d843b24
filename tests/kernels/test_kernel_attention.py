"""Every way that kernels/attention.py may take, against its plain reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abyssal.kernels.attention import attention, attention_reference


def tensors(seed: int, batch: int, heads: int, kv_heads: int, queries: int, keys: int, size: int, width: int):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(batch, heads, queries, size), draw(batch, kv_heads, keys, size), draw(batch, kv_heads, keys, width)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).abs().max() / b.abs().max()).item()


@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 19),
    past=st.integers(0, 7),
    size=st.integers(1, 12),
    width=st.integers(1, 15),
    masked=st.booleans(),
)
def test_equals_the_reference(seed, batch, kv_heads, group, length, past, size, width, masked):
    q, k, v = tensors(seed, batch, kv_heads * group, kv_heads, length, length + past, size, width)
    causal = past == 0 and not masked
    mask = None
    if masked:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(batch, 1, length, length + past, generator=generator) < 0.5
        mask[..., 0] = True  # a query that sees nothing is not asked for
    want = attention_reference(q, k, v, 0.3, mask, causal)
    assert error(attention(q, k, v, 0.3, mask, causal), want) < 1e-12
    assert error(attention(q.float(), k.float(), v.float(), 0.3, mask, causal), want) < 1e-5


@pytest.mark.parametrize(("size", "width"), [(24, 16), (16, 16), (8, 24)])
@pytest.mark.parametrize("length", [2, 33, 530])
def test_bf16_training_stays_within_the_references_own_error(size, width, length):
    q, k, v = tensors(7, 2, 3, 3, length, length, size, width)
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    want = attention_reference(*exact, size**-0.5, None, True)
    towards = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want_grads = torch.autograd.grad(want, exact, towards)

    def run(function):
        inputs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
        out = function(*inputs, size**-0.5, None, True)
        return [out, *torch.autograd.grad(out, inputs, towards.bfloat16())]

    ours, reference = run(attention), run(attention_reference)
    for a, b, exact_value in zip(ours, reference, [want, *want_grads], strict=True):
        assert spread(a, exact_value) <= 1.5 * spread(b, exact_value) + 1e-3


def spread(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def test_short_bf16_training_takes_plain_products_and_long_does_not():
    def operations(length: int) -> set[str]:
        q, k, v = (x.bfloat16().requires_grad_() for x in tensors(0, 1, 1, 1, length, length, 8, 8))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            attention(q, k, v, 1.0, None, True)
        return {event.key for event in profile.key_averages()}

    assert "aten::baddbmm" in operations(512)
    assert "aten::baddbmm" not in operations(513)
