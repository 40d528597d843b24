"""Packed weights: what is stored, how far it is from the original, and that odd numbers are not lost."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from abyssal.kernels import native, packed
from abyssal.kernels.packed import Kind, Packed, dequantize, packed_shapes, quantize, quantize_activations, unpack

KINDS: list[Kind] = ["int8", "int4"]


def weights(*shape: int, seed: int = 0, outliers: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g)
    return w * torch.where(torch.rand(shape, generator=g) < 0.01, 20.0, 1.0) if outliers else w


def stored_by_hand(row: Tensor, data: Tensor, scales: Tensor, kind: Kind) -> list[float]:
    """A row, number by number, as the module's docstring describes the format."""
    out = []
    for i in range(len(row)):
        if kind == "int8":
            number = int(data[i]) - 128
        else:
            byte = int(data[i // 128 * 64 + i % 64])
            number = (byte >> 4 if i % 128 >= 64 else byte & 15) - 8
        out.append(number * float(scales[i // 32]))
    return out


@given(
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 300),
    experts=st.integers(0, 2),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_format_and_error(outputs: int, inputs: int, experts: int, kind: Kind, dtype: torch.dtype, seed: int):
    w = weights(*([experts] if experts else []), outputs, inputs, seed=seed).to(dtype)
    p = quantize(w, kind)
    assert (p.data.shape, p.scales.shape) == packed_shapes(tuple(w.shape), kind)
    assert p.shape == w.shape
    back = dequantize(p, torch.float32)
    by_hand = [
        stored_by_hand(*rows, kind) for rows in zip(*(x.flatten(0, -2) for x in (w, p.data, p.scales)), strict=True)
    ]
    assert torch.equal(back.flatten(0, -2), torch.tensor(by_hand))
    # A number is half a step away at most. In int8 the scale's rounding to BF16 may cut off 127 · 2^-9 of a step; in
    # int4 the best scale may cut off the group's largest number, but never makes the group worse than -8's scale does.
    steps = p.scales.float().abs().repeat_interleave(32, dim=-1)[..., :inputs]
    error = (back - w.float()).abs()
    if kind == "int8":
        assert (error <= steps * 0.76).all()
    else:
        largest = w.float().abs().amax(-1, keepdim=True)
        assert (error <= largest / 7).all()
        assert (error.square().sum(-1) <= (inputs * (largest[..., 0] / 8 * 1.01) ** 2)).all()


@pytest.mark.parametrize(("kind", "plain", "outliers"), [("int8", 0.006, 0.02), ("int4", 0.09, 0.16)])
def test_error_of_random_and_of_outlier_heavy_matrices(kind: Kind, plain: float, outliers: float):
    for bound, heavy in ((plain, False), (outliers, True)):
        w = weights(512, 1024, outliers=heavy)
        error = (dequantize(quantize(w, kind), torch.float32) - w).norm() / w.norm()
        assert bound / 3 < error < bound


def test_searching_scales_beats_the_plain_one():
    w = weights(256, 1024)
    groups = w.unflatten(-1, (-1, 32))
    farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    plain = (groups / (farthest / -8)).round().clamp(-8, 7) * (farthest / -8)
    assert (dequantize(quantize(w, "int4"), torch.float32) - w).norm() < 0.97 * (plain - groups).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_change_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch):
    w = weights(3, 50, 200)
    whole, back = quantize(w, kind), dequantize(quantize(w, kind))
    monkeypatch.setattr(packed, "_ROWS", 7)
    pieces = quantize(w, kind)
    assert torch.equal(pieces.data, whole.data)
    assert torch.equal(pieces.scales, whole.scales)
    assert torch.equal(dequantize(pieces), back)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_what_is_not_finite(kind: Kind):
    w = weights(4, 64)
    w[0] = 0
    w[1, 40], w[2, 3], w[3, 0] = math.nan, math.inf, -0.0
    back = dequantize(quantize(w, kind), torch.float32)
    assert (back[0] == 0).all()
    assert back[1, :32].isfinite().all()
    assert back[1, 32:].isnan().all()
    assert not back[2, :32].isfinite().any()
    assert back[2, 32:].isfinite().all()
    assert back[3, 0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_hold_it(kind: Kind):
    p = quantize(weights(2, 5, 130), kind)
    tensors = load(save({"data": p.data, "scales": p.scales}))
    again = Packed(tensors["data"], tensors["scales"], kind, p.shape)
    assert torch.equal(dequantize(again), dequantize(p))
    assert again.nbytes == sum(x.nbytes for x in tensors.values())


@settings(max_examples=30)
@given(inputs=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_activations(inputs: int, seed: int):
    x = weights(3, inputs, seed=seed)
    numbers, scale = quantize_activations(x)
    back = (numbers.float() * scale.unsqueeze(-1)).flatten(-2)[:, :inputs]
    step = scale.repeat_interleave(32, dim=-1)[:, :inputs]
    assert ((back - x).abs() <= step * 0.501).all()
    assert numbers.abs().amax() == 127


def test_activations_that_are_not_finite_are_not_lost():
    x = weights(3, 64)
    x[0, 1], x[1, 1], x[2] = math.nan, -math.inf, 0
    numbers, scale = quantize_activations(x)
    assert not scale[:2, 0].isfinite().any()
    assert scale[:2, 1].isfinite().all()
    assert (numbers[:2, 0] == 0).all()
    assert (scale[2] == 0).all()


def test_unpacked_integers():
    p = quantize(weights(4, 256), "int4")
    assert unpack(p).shape == (4, 8, 32)
    assert -8 <= unpack(p).min() < unpack(p).max() <= 7


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Of every magnitude, with zeros, ties, numbers that are not finite, and rows that end within a block."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 300))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(rows, columns, generator=g)
    if draw(st.booleans()):  # few values: ties for the farthest number, and quotients half-way between two
        w = (w * 4).round() / 8
    w *= 2.0 ** draw(st.integers(-140, 120))
    for odd in draw(st.lists(st.sampled_from([0.0, -0.0, 3.4e38, -3.4e38, 1e-45, math.nan, math.inf, -math.inf]))):
        w[torch.randint(rows, (1,), generator=g), torch.randint(columns, (1,), generator=g)] = odd
    return w.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])))


def same(a: Tensor, b: Tensor) -> bool:
    """Every bit, but for which NaN."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


@pytest.mark.skipif(native.library() is None, reason="no compiled code here")
@settings(max_examples=300)
@given(w=matrices(), kind=st.sampled_from(KINDS), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_compiled_code_gives_the_same_bits(w: Tensor, kind: Kind, dtype: torch.dtype):
    compiled = quantize(w, kind)
    back = dequantize(compiled, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_compiled", lambda _: False)
        plain = quantize(w, kind)
        assert same(compiled.data, plain.data)
        assert same(compiled.scales, plain.scales)
        assert same(back, dequantize(plain, dtype))


@pytest.mark.skipif(native.library() is None, reason="no compiled code here")
@pytest.mark.parametrize("kind", KINDS)
def test_large_matrices_by_compiled_code(kind: Kind):
    w = weights(2, 700, 1000, outliers=True).bfloat16()
    compiled = quantize(w, kind)
    data, scales = packed._quantize_rows(w.flatten(0, 1), kind)
    assert same(compiled.data.flatten(0, 1), data)
    assert same(compiled.scales.flatten(0, 1), scales)
    turned = w.transpose(1, 2).contiguous().transpose(1, 2)
    assert same(quantize(turned, kind).data, compiled.data)
