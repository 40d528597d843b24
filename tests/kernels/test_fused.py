"""SwiGLU, RMSNorm and the layout of heads: every way that runs here against the formula in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import native
from abyssal.kernels.fused import rms_norm, swiglu
from abyssal.kernels.heads import keys_values, turn_heads

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(params=["compiled", "plain", "3 threads"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The compiled kernels, the plain PyTorch beside them, and the former with rows shared out over threads."""
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C++ compiler")
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if request.param == "3 threads" else threads)
    yield request.param
    torch.set_num_threads(threads)


def drawn(*shape: int, seed: int, dtype: torch.dtype = F64, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * std).to(dtype)


def run(function: Callable[..., Any], leaves: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of ``function``, for a fixed upstream gradient."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
    outs = function(*leaves)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    upstream = [torch.cos(torch.arange(out.numel(), dtype=F64)).view(out.shape).to(out.dtype) for out in outs]
    torch.autograd.backward(outs, upstream)
    assert all(out.dtype == dtype for out in outs)
    return [*(out.detach() for out in outs), *(x.grad for x in leaves if x is not None)]


def compare(
    ours: Callable[..., Any], formula: Callable[..., Any], leaves: list[Tensor | None], dtype: torch.dtype
) -> None:
    """Outputs and gradients against the formula's in float64, on the same (rounded) inputs."""
    exact = run(formula, [None if x is None else x.double() for x in leaves], F64)
    bound = {F64: 1e-12, F32: 1e-5, BF16: 0.01}[dtype]
    for a, b in zip(run(ours, leaves, dtype), exact, strict=True):
        assert a.shape == b.shape
        scale = float(b.abs().max()) if b.numel() else 1.0
        # A gradient that is near 0 by cancellation is as exact as what was added up, which is of order 1.
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound * max(scale, 1.0))


dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F64])
sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 257]))


@dtypes
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 9), width=sizes, weighted=st.booleans(), std=st.sampled_from([0.1, 30.0]), seed=st.integers(0)
)
def test_swiglu(way: str, dtype: torch.dtype, rows: int, width: int, weighted: bool, std: float, seed: int):
    def formula(gate_up: Tensor, weight: Tensor | None) -> Tensor:
        gate, up = gate_up[:, :width], gate_up[:, width:]
        out = gate / (1 + torch.exp(-gate)) * up
        return out if weight is None else out * weight[:, None]

    seed %= 2**31
    gate_up = drawn(rows, 2 * width, seed=seed, dtype=dtype, std=std)
    weight = drawn(rows, seed=seed + 1, dtype=F64 if dtype == F64 else F32).abs() if weighted else None
    compare(swiglu, formula, [gate_up, weight], dtype)


def test_swiglu_keeps_leading_dimensions(way: str):
    gate_up = drawn(2, 3, 8, seed=0, dtype=F32)
    torch.testing.assert_close(swiglu(gate_up).view(6, 4), swiglu(gate_up.view(6, 8)))


def test_a_row_without_weight_gives_and_gets_nothing(way: str):
    gate_up, weight = drawn(3, 8, seed=0, dtype=F32).requires_grad_(), torch.tensor([1.0, 0.0, 2.0], requires_grad=True)
    out = swiglu(gate_up, weight)
    out.sum().backward()
    assert (out[1] == 0).all()
    assert (gate_up.grad[1] == 0).all()
    assert weight.grad[1] != 0  # it still hears what it would have been worth


@pytest.mark.parametrize(("x_dtype", "dtype"), [(F32, F32), (F32, BF16), (BF16, BF16), (F64, F64)])
@pytest.mark.parametrize("weight_dtype", [F32, BF16])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), width=sizes, std=st.sampled_from([1e-3, 1.0, 100.0]), seed=st.integers(0))
def test_rms_norm(
    way: str,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    rows: int,
    width: int,
    std: float,
    seed: int,
):
    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    seed %= 2**31
    x, weight = drawn(rows, width, seed=seed, dtype=x_dtype, std=std), drawn(width, seed=seed + 1, dtype=weight_dtype)
    if x_dtype == F64:
        weight = weight.double()
    exact = run(formula, [x.double(), weight.double()], F64)
    ours = run(lambda x, weight: rms_norm(x, weight, 1e-6, dtype), [x, weight], dtype)
    for a, b, kind in zip(ours, exact, (dtype, x_dtype, weight.dtype), strict=True):
        assert a.dtype == kind
        bound = 0.02 if BF16 in (dtype, x_dtype, weight.dtype) else {F32: 1e-5, F64: 1e-12}[kind]
        # The gradient of x is a difference of numbers of the size weight / rms.
        scale = max(float(b.abs().max()), float(weight.abs().max()) / std if b.shape == x.shape else 1.0)
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound * scale)


def turned(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """[B, T, H, R], the last dimension as complex numbers times e^{i·angle}; ``angles`` [B or 1, T, R/2]."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    if interleaved:
        return torch.stack((z.real, z.imag), -1).flatten(-2)
    return torch.cat((z.real, z.imag), -1)


@dtypes
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 7),
    heads=st.integers(1, 4),
    nope=st.sampled_from([0, 1, 5, 32]),
    half=st.sampled_from([1, 3, 16]),
    interleaved=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_turn_heads(
    way: str,
    dtype: torch.dtype,
    batch: int,
    length: int,
    heads: int,
    nope: int,
    half: int,
    interleaved: bool,
    shared: bool,
    seed: int,
):
    angles = drawn(1 if shared else batch, length, half, seed=seed, std=3.0)
    tables = tuple(t.to(F64 if dtype == F64 else F32).unsqueeze(2) for t in (angles.cos(), angles.sin()))

    def formula(x: Tensor) -> Tensor:
        return torch.cat((x[..., :nope], turned(x[..., nope:], angles, interleaved)), -1).transpose(1, 2)

    x = drawn(batch, length, heads, nope + 2 * half, seed=seed + 1, dtype=dtype)
    compare(lambda x: turn_heads(x, tables, interleaved), formula, [x], dtype)


@dtypes
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 7),
    heads=st.integers(1, 4),
    nope=st.sampled_from([1, 5, 32]),
    rope=st.sampled_from([2, 16]),
    value=st.sampled_from([1, 7, 32]),
    seed=st.integers(0, 2**31),
)
def test_keys_values(
    way: str, dtype: torch.dtype, batch: int, length: int, heads: int, nope: int, rope: int, value: int, seed: int
):
    def formula(kv: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        shared = torch.stack([rotary] * heads, dim=1)
        kv = kv.movedim(2, 1)
        return torch.cat((kv[..., :nope], shared), -1), kv[..., nope:]

    kv = drawn(batch, length, heads, nope + value, seed=seed, dtype=dtype)
    rotary = drawn(batch, length, rope, seed=seed + 1, dtype=dtype)
    compare(lambda kv, rotary: keys_values(kv, rotary, nope), formula, [kv, rotary], dtype)
