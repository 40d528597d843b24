"""NF4 against bitsandbytes called on each matrix alone, and against the format written out number by number."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.errors import UserError
from abyssal.kernels import nf4, packed
from abyssal.kernels.nf4 import NF4, dequantize, nf4_shapes, quantize

bnb = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# QLoRA, appendix E.
LEVELS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
LEVELS += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
LEVELS += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def of_bitsandbytes(weight: Tensor):
    return bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)


def by_hand(p: NF4) -> Tensor:
    """A matrix in FP32, as the module's docstring describes the format."""
    outputs, inputs = p.matrix
    scale = bnb.create_dynamic_map()[p.absmax.long()]
    for block in range(len(scale)):
        scale[block] = scale[block] * p.nested[block // 256] + p.offset
    numbers = torch.empty(outputs * inputs)
    for i in range(len(numbers)):
        byte = int(p.data[i // 2])
        numbers[i] = torch.tensor(LEVELS[byte >> 4 if i % 2 == 0 else byte & 15]) * scale[i // 64]
    return numbers.view(outputs, inputs)


@settings(max_examples=60)
@given(
    outputs=st.integers(1, 300),
    inputs=st.integers(1, 150) | st.sampled_from([32, 96, 288]),
    given_as=st.sampled_from(DTYPES),
    asked=st.sampled_from(DTYPES),
    step=st.sampled_from([64, 1024, 2**20]),
    seed=st.integers(0, 2**31),
)
def test_bitsandbytes_has_the_same_bits(
    outputs: int, inputs: int, given_as: torch.dtype, asked: torch.dtype, step: int, seed: int
):
    inputs *= 2  # it compiles code of its own for odd ones
    w = weights(outputs, inputs, seed=seed, dtype=given_as)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "_STEP", step)
        p = quantize(w)
    data, state = of_bitsandbytes(w)
    assert torch.equal(p.data[: len(data)], data.view(-1))
    assert (p.data[len(data) :] == 0).all()
    assert torch.equal(p.absmax, state.absmax)
    assert torch.equal(p.nested, state.state2.absmax)
    assert torch.equal(p.offset, state.offset)
    if inputs % 64:
        # On a CPU, 0.50.2 takes the wrong block's scale in rows of 16, 32, 48, 96, … numbers; so it is given one row.
        state.shape = torch.Size((1, w.numel()))
    # It turns a matrix that is one byte.
    assert torch.equal(dequantize(p, given_as), bnb.dequantize_4bit(data, state).view(w.shape))
    state.dtype = asked
    assert torch.equal(dequantize(p, asked), bnb.dequantize_4bit(data, state).view(w.shape))


@settings(max_examples=25)
@given(outputs=st.integers(1, 9), inputs=st.integers(1, 150), seed=st.integers(0, 2**31))
def test_format(outputs: int, inputs: int, seed: int):
    w = weights(outputs, inputs, seed=seed)
    p = quantize(w)
    assert tuple(tuple(t.shape) for t in p.tensors) == nf4_shapes((), (outputs, inputs))
    assert p.shape == w.shape
    right = by_hand(p)
    assert torch.equal(dequantize(p, torch.float32), right)
    assert torch.equal(dequantize(p, torch.bfloat16), right.bfloat16())
    assert torch.equal(dequantize(p, torch.float64), right.double())


@settings(max_examples=25)
@given(stack=st.sampled_from([(1,), (3,), (2, 2), (0,)]), outputs=st.integers(1, 30), inputs=st.integers(1, 90))
def test_a_stack_is_its_matrices(stack: tuple[int, ...], outputs: int, inputs: int):
    single = [quantize(weights(outputs, inputs, seed=i)) for i in range(math.prod(stack))]
    sizes = nf4_shapes(stack, (outputs, inputs))
    tensors = [
        torch.stack([p.tensors[i] for p in single]).view(size) if single else torch.empty(size, dtype=dtype)
        for i, (size, dtype) in enumerate(zip(sizes, (torch.uint8,) * 2 + (torch.float32,) * 2, strict=True))
    ]
    p = NF4(*tensors, (outputs, inputs))
    assert p.shape == (*stack, outputs, inputs)
    back = dequantize(p, torch.float32)
    assert back.shape == p.shape
    for own, matrix in zip(back.flatten(0, -3), single, strict=True):
        assert torch.equal(own, dequantize(matrix, torch.float32))
    if stack == (2, 2):
        assert torch.equal(dequantize(p[1, 0], torch.float32), back[1, 0])
        assert torch.equal(dequantize(p[1:], torch.float32), back[1:])


@given(inputs=st.sampled_from([1, 7, 48, 96, 576, 1000, 4096, 5120]), steps=st.integers(1, 3), more=st.integers(1, 9))
def test_rows(inputs: int, steps: int, more: int):
    step = nf4.aligned_rows(inputs)
    if step * inputs > 2**18:
        return
    p = quantize(weights(step * steps + more, inputs))
    whole = dequantize(p)
    ends = [*range(0, step * steps + 1, step), step * steps + more]
    parts = [dequantize(p.rows(start, end)) for start, end in pairwise(ends)]
    assert torch.equal(torch.cat(parts), whole)


def test_bytes():
    p = quantize(weights(256, 1024))
    assert p.nbytes == 256 * 1024 * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 4


def test_error_on_normal_numbers():
    """Between int4 with a BF16 scale every 32 numbers and twice that; that is, scales in 8 bits cost little."""
    w = weights(512, 1024)
    error = float((dequantize(quantize(w), torch.float32) - w).norm() / w.norm())
    other = float((packed.dequantize(packed.quantize(w, "int4"), torch.float32) - w).norm() / w.norm())
    single = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    plain = float((bnb.dequantize_4bit(*single) - w).norm() / w.norm())
    assert other < error < 2 * other
    assert plain <= error < 1.02 * plain


def test_zeros_and_what_is_not_finite():
    w = weights(3, 64)
    assert (dequantize(quantize(torch.zeros(3, 64))) == 0).all()
    for odd in (math.nan, math.inf):
        w[1, 5] = odd
        assert not dequantize(quantize(w), torch.float32).isfinite().any()


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch):
    nf4.functional.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match=r"pip install 'abyssal\[tune\]'") as caught:
        quantize(weights(2, 64))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert quantize(weights(2, 64)).nbytes
