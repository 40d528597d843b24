import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels.attention import attention, attention_reference


def inputs(
    batch: int, heads: int, shared: int, queries: int, keys: int, d: int, width: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads * shared, queries, d, generator=g, dtype=torch.float64)
    k = torch.randn(batch, heads, keys, d, generator=g, dtype=torch.float64)
    return q, k, torch.randn(batch, heads, keys, width, generator=g, dtype=torch.float64)


def loops(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor) -> Tensor:
    """Query by query, in plain Python; ``allowed`` [B, T, S]."""
    shared = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = [s for s in range(k.shape[2]) if allowed[b, t, s]]
                e = [math.exp(scale * float(q[b, h, t] @ k[b, h // shared, s])) for s in seen]
                for weight, s in zip(e, seen, strict=True):
                    out[b, h, t] += weight / sum(e) * v[b, h // shared, s]
    return out


@settings(max_examples=60)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    shared=st.integers(1, 3),
    queries=st.integers(1, 6),
    d=st.integers(1, 7),
    width=st.integers(1, 9),
    kind=st.sampled_from(["causal", "all", "mask"]),
    seed=st.integers(0, 2**31),
)
def test_equals_loops(batch: int, heads: int, shared: int, queries: int, d: int, width: int, kind: str, seed: int):
    keys = queries if kind == "causal" else queries + 2
    q, k, v = inputs(batch, heads, shared, queries, keys, d, width, seed)
    allowed, mask = torch.ones(batch, queries, keys, dtype=torch.bool), None
    if kind == "causal":
        allowed = allowed.tril()
    elif kind == "mask":
        allowed = torch.rand(batch, queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.6
        allowed[..., 0] = True
        mask = allowed.unsqueeze(1)
    expected = loops(q, k, v, 0.3, allowed)
    for function in (attention, attention_reference):
        torch.testing.assert_close(function(q, k, v, 0.3, mask, kind == "causal"), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("width", [5, 16, 20])
@pytest.mark.parametrize("queries", [1, 33, 513])
def test_bfloat16_in_training_is_close_to_float64(shared: int, width: int, queries: int):
    exact = inputs(2, 2, shared, queries, queries, 16, width, 0)
    rounded = [x.bfloat16().requires_grad_() for x in exact]
    exact = tuple(x.detach().double().requires_grad_() for x in rounded)
    outs = [attention(*rounded, 0.25, None, True), attention_reference(*exact, 0.25, None, True)]
    assert outs[0].dtype == torch.bfloat16
    for out in outs:
        out.backward(torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype))
    for a, b in zip([outs[0], *(x.grad for x in rounded)], [outs[1], *(x.grad for x in exact)], strict=True):
        if queries > 1 or b.norm() > 1e-9:  # one key: its probability is 1, queries and keys get nothing
            assert (a.double() - b).norm() < 0.02 * b.norm()
        else:
            assert a.norm() < 1e-2
    with torch.no_grad():  # another way, the same numbers
        assert (attention(*rounded, 0.25, None, True).double() - outs[1]).norm() < 0.02 * outs[1].norm()
