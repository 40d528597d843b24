"""FP8 blocks against numpy: numbers by the definition of E4M3, blocks by slicing, powers of two by fractions.

What is stored and the scales are compared bit by bit. E4M3 has 4 bits of significand and FP32 24, so float64 holds
their product exactly, and FP32 is that product rounded once. BF16 and FP16 are *that* rounded again (as published: the
product is FP32), which is not always the number nearest to the exact product.
"""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import fp8

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
Array = np.ndarray[Any, Any]


def e4m3(byte: int) -> float:
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, all ones are NaN."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    sign = -1.0 if byte >> 7 else 1.0
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


TABLE = np.array([e4m3(byte) for byte in range(256)])
FINITE = TABLE[:127]  # from 0 to 448, rising


def nearest_e4m3(numbers: Array) -> Array:
    """Bytes of the E4M3 numbers nearest to ``numbers`` (FP32, at most 448), of two equally near the even one."""
    magnitude = np.abs(numbers.astype(np.float64))
    above = np.searchsorted(FINITE, magnitude).clip(max=126)
    below = (above - 1).clip(min=0)
    to_above, to_below = FINITE[above] - magnitude, magnitude - FINITE[below]
    even = np.where(above % 2 == 0, above, below)
    byte = np.where(to_above < to_below, above, np.where(to_below < to_above, below, even))
    return (byte | np.signbit(numbers) << 7).astype(np.uint8)


def as_bytes(tensor: Tensor) -> Array:
    return tensor.contiguous().view(torch.uint8).numpy()


def from_bytes(array: Array, dtype: torch.dtype = E4M3) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8)).view(dtype)


def blocks(shape: tuple[int, ...], rows: int = 128) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Index of each block's scale and of its numbers."""
    out = []
    for lead in np.ndindex(*shape[:-2]):
        for i, top in enumerate(range(0, shape[-2], rows)):
            for j, left in enumerate(range(0, shape[-1], 128)):
                out.append(((*lead, i, j), (*lead, slice(top, top + rows), slice(left, left + 128))))
    return out


def exact_product(stored: Array, scale: Array, rows: int = 128) -> Array:
    """What the bytes and scales say, in float64, without any rounding."""
    out = TABLE[stored]
    for at, block in blocks(stored.shape, rows):
        out[block] *= np.float64(scale[at])
    return out


def expected_scales(w: Array, power_of_two: bool, rows: int = 128) -> Array:
    """FP32 max(max |w|, 1e-4) / 448; or the smallest power of two that is not less, by fractions of integers."""
    out = np.empty((*w.shape[:-2], -(-w.shape[-2] // rows), -(-w.shape[-1] // 128)), np.float32)
    for at, block in blocks(w.shape, rows):
        amax = np.maximum(np.abs(w[block]).max(), np.float32(1e-4))
        out[at] = amax / np.float32(448)
        if power_of_two:
            wanted, k = Fraction(float(amax)) / 448, -40
            while Fraction(2) ** k < wanted:
                k += 1
            out[at] = 2.0**k
    return out


def expected_stored(w: Array, scale: Array, rows: int = 128) -> Array:
    """Nearest E4M3 of the FP32 quotient w / scale."""
    out = np.empty(w.shape, np.uint8)
    for at, block in blocks(w.shape, rows):
        out[block] = nearest_e4m3(np.clip(w[block] / scale[at], np.float32(-448), np.float32(448)))
    return out


def to_bfloat16(x: Array) -> Array:
    """Bits of FP32 ``x`` rounded to BF16: half of what falls away is added, and one more where the last bit is odd."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal dtypes, shapes and bits; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nan = a.isnan()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    both = torch.where(a.contiguous().view(bits) == b.contiguous().view(bits), True, nan)
    return bool(both.all()) and torch.equal(nan, b.isnan())


sides = st.one_of(st.sampled_from([1, 2, 127, 128, 129, 255, 256, 257]), st.integers(1, 300))
shapes = st.tuples(st.sampled_from([(), (), (1,), (3,), (2, 2)]), sides, sides).map(lambda s: (*s[0], s[1], s[2]))
seeds = st.integers(0, 2**32 - 1)


def random_stored(shape: tuple[int, ...], seed: int, scales: str = "fp32") -> tuple[Tensor, Tensor, Array]:
    """Random bytes (NaN among them), scales of many sizes, and the exact product."""
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 256, shape, dtype=np.uint8)
    size = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    if scales == "e8m0":
        exponents = rng.integers(60, 200, size, dtype=np.uint8)
        return from_bytes(stored), from_bytes(exponents, E8M0), exact_product(stored, 2.0 ** (exponents - 127.0))
    scale = (rng.standard_normal(size) * 2.0 ** rng.integers(-20, 5, size)).astype(np.float32)
    return from_bytes(stored), torch.from_numpy(scale), exact_product(stored, scale)


class TestDequantize:
    @pytest.mark.filterwarnings("ignore:overflow encountered")
    @settings(max_examples=50)
    @given(shape=shapes, seed=seeds, scales=st.sampled_from(["fp32", "e8m0"]))
    @example(shape=(1, 1), seed=0, scales="fp32")
    @example(shape=(1, 300), seed=0, scales="e8m0")
    @example(shape=(300, 1), seed=0, scales="fp32")
    def test_every_dtype(self, shape: tuple[int, ...], seed: int, scales: str):
        weight, scale, exact = random_stored(shape, seed, scales)
        assert tuple(scale.shape) == fp8.scale_shape(shape)
        product = exact.astype(np.float32)  # rounded once
        assert same(fp8.dequantize(weight, scale, torch.float32), torch.from_numpy(product))
        bf16 = torch.from_numpy(to_bfloat16(product).view(np.int16)).view(torch.bfloat16)
        assert same(fp8.dequantize(weight, scale, torch.bfloat16), bf16)
        assert same(fp8.dequantize(weight, scale), bf16)
        assert same(fp8.dequantize(weight, scale, torch.float16), torch.from_numpy(product.astype(np.float16)))
        assert same(fp8.dequantize(weight, scale, torch.float64), torch.from_numpy(product.astype(np.float64)))

    @settings(max_examples=20)
    @given(shape=st.tuples(sides, sides), seed=seeds)
    def test_reference(self, shape: tuple[int, int], seed: int):
        weight, scale, exact = random_stored(shape, seed)
        assert same(fp8.dequantize_reference(weight, scale), torch.from_numpy(exact.astype(np.float32)))
        assert weight.dtype == E4M3  # and what was given is as it was
        assert same(fp8.dequantize_reference(weight, scale), torch.from_numpy(exact.astype(np.float32)))

    @pytest.mark.parametrize("with_nan", [True, False])
    def test_every_bit_pattern(self, with_nan: bool):
        """Signed zeros, subnormals, NaN; and without NaN in the block, where another way is taken."""
        stored = np.arange(256, dtype=np.uint8)
        stored = stored if with_nan else stored[stored & 127 != 127]
        one = torch.ones(1, -(-len(stored) // 128))
        got = fp8.dequantize(from_bytes(stored).view(1, -1), one, torch.float32)
        assert same(got, torch.from_numpy(TABLE[stored].astype(np.float32)).view(1, -1))
        assert int(got.isnan().sum()) == (2 if with_nan else 0)
        assert got[0, 128 if with_nan else 127].item() == 0
        assert got[0, 128 if with_nan else 127].signbit()

    def test_every_e8m0_scale(self):
        """2^-127 … 2^127, the last pattern is NaN; where the product leaves FP32 it is 0, subnormal or infinite."""
        exponents = np.arange(256, dtype=np.uint8).reshape(1, 256)
        stored = np.tile(np.array([0x01, 0x38, 0x7E, 0xFE], np.uint8), (1, 32 * 256))
        got = fp8.dequantize(from_bytes(stored), from_bytes(exponents, E8M0), torch.float32)
        scale = np.append(2.0 ** np.arange(-127, 128), np.nan).reshape(1, 256)
        with np.errstate(over="ignore"):
            assert same(got, torch.from_numpy(exact_product(stored, scale).astype(np.float32)))

    @settings(max_examples=40)
    @given(
        shape=st.tuples(st.integers(1, 3), sides, sides),
        seed=seeds,
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        scales=st.sampled_from(["fp32", "e8m0"]),
    )
    def test_into_a_view(self, shape: tuple[int, int, int], seed: int, dtype: torch.dtype, scales: str):
        weight, scale, _ = random_stored(shape, seed, scales)
        experts, outputs, inputs = shape
        right = fp8.dequantize(weight, scale, dtype)
        stacked = torch.full((experts + 1, 2 * outputs, inputs), 3.0, dtype=dtype)
        out = stacked[1:, outputs:]  # the up half of gate_up_proj
        assert fp8.dequantize(weight, scale, out=out) is out
        assert same(stacked[1:, outputs:], right)
        assert (stacked[0] == 3).all()
        assert (stacked[:, :outputs] == 3).all()
        wide = torch.full((experts, inputs, 2 * outputs), 3.0, dtype=dtype)
        fp8.dequantize(weight, scale, torch.float16, out=wide[:, :, ::2].transpose(1, 2))  # out's dtype counts
        assert same(wide[:, :, ::2].transpose(1, 2), right)
        assert (wide[:, :, 1::2] == 3).all()
        single = torch.full((outputs, inputs + 5), 3.0, dtype=dtype)
        fp8.dequantize(weight[0], scale[0], out=single[:, 5:])
        assert same(single[:, 5:], right[0])
        assert (single[:, :5] == 3).all()

    def test_weights_and_scales_that_are_views(self):
        weight, scale, exact = random_stored((2, 300, 260), 5)
        right = torch.from_numpy(exact.astype(np.float32))
        turned, turned_scale = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (weight, scale))
        assert not turned.is_contiguous()
        assert same(fp8.dequantize(turned, turned_scale, torch.float32), right)
        doubled = weight.view(torch.uint8).repeat_interleave(2, dim=-1).view(E4M3)[..., ::2]
        assert not doubled.is_contiguous()
        assert same(fp8.dequantize(doubled, scale, torch.float32), right)
        assert same(fp8.dequantize(weight[:, 128:], scale[:, 1:], torch.float32), right[:, 128:])
        expanded = weight[:1].expand(3, -1, -1)
        assert same(
            fp8.dequantize(expanded, scale[:1].expand(3, -1, -1), torch.float32), right[:1].repeat_interleave(3, dim=0)
        )


magnitudes = st.sampled_from(["normal", "wide", "huge", "tiny", "zero", "powers of two", "one is large", "clamped"])


def random_weights(shape: tuple[int, ...], seed: int, magnitude: str) -> Array:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    match magnitude:
        case "wide":
            w *= 2.0 ** rng.integers(-40, 40, shape)
        case "huge":
            w = np.clip(w / 4, -1, 1) * np.finfo(np.float32).max
        case "tiny":
            w *= 1e-42  # subnormal in FP32
        case "zero":
            w = np.copysign(0.0, w)
        case "powers of two":
            w = np.copysign(2.0 ** rng.integers(-20, 20, shape), w)
        case "one is large":
            w.flat[rng.integers(w.size)] = 448 * 2.0 ** rng.integers(-8, 8)
        case "clamped":
            w = np.clip(w, -3, 3) * 3e-5  # max |w| about the 1e-4 that counts at least
    return w.astype(np.float32)


def check_quantized(w: Array, stored: Tensor, scale: Tensor, power_of_two: bool, rows: int = 128) -> None:
    assert (stored.dtype, scale.dtype) == (E4M3, torch.float32)
    assert stored.shape == w.shape
    assert stored.is_contiguous()
    right = expected_scales(w, power_of_two, rows)
    np.testing.assert_array_equal(scale.numpy(), right)
    np.testing.assert_array_equal(as_bytes(stored), expected_stored(w, right, rows))
    assert not stored.float().isnan().any()
    # Half a step: 2^-4 of a normal number, 2^-10 of the scale below. The quotient was rounded to FP32 before.
    spread = np.empty(w.shape)
    for at, block in blocks(w.shape, rows):
        spread[block] = right[at]
    error = np.abs(exact_product(as_bytes(stored), right, rows) - w)
    assert (error <= np.maximum(np.abs(w) * np.float64(2.0**-4), spread * 2.0**-10) * (1 + 2.0**-20)).all()


class TestQuantize:
    @settings(max_examples=60)
    @given(shape=shapes, seed=seeds, magnitude=magnitudes, power_of_two=st.booleans())
    @example(shape=(1, 1), seed=0, magnitude="zero", power_of_two=True)
    @example(shape=(2, 2, 129, 257), seed=0, magnitude="huge", power_of_two=True)
    @example(shape=(2, 2100, 7), seed=0, magnitude="one is large", power_of_two=False)  # more rows than at a time
    def test_fp32(self, shape: tuple[int, ...], seed: int, magnitude: str, power_of_two: bool):
        w = random_weights(shape, seed, magnitude)
        given_w = torch.from_numpy(w.copy())
        stored, scale = fp8.quantize(given_w, power_of_two=power_of_two)
        assert tuple(scale.shape) == fp8.scale_shape(shape)
        check_quantized(w, stored, scale, power_of_two)
        np.testing.assert_array_equal(given_w.numpy(), w)  # what was given is as it was

    @pytest.mark.parametrize("power_of_two", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype, power_of_two: bool):
        w = torch.from_numpy(random_weights((3, 200, 150), 1, "normal") / 50).to(dtype)
        stored, scale = fp8.quantize(w, power_of_two=power_of_two)
        check_quantized(w.float().numpy(), stored, scale, power_of_two)

    @given(
        st.integers(-12, 120),
        st.sampled_from([-2, -1, 0, 1, 2]),
        st.sampled_from([1.0, 448.0, 256.0]),
    )
    def test_scales_about_powers_of_two(self, exponent: int, steps: int, factor: float):
        """448 · 2^k has the scale 2^k, the next larger FP32 number 2^(k+1)."""
        amax = np.float32(factor * 2.0 ** (exponent - 8))
        amax = (amax.view(np.int32) + np.int32(steps)).view(np.float32)
        w = np.full((1, 1), amax, np.float32)
        for power_of_two in (False, True):
            check_quantized(w, *fp8.quantize(torch.from_numpy(w), power_of_two=power_of_two), power_of_two)
        if factor == 448 and exponent - 8 >= -22:
            (_, scale) = fp8.quantize(torch.from_numpy(w), power_of_two=True)
            assert float(scale) == 2.0 ** (exponent - 8 + (steps > 0))

    def test_ties_go_to_even(self):
        """Every midpoint between two numbers, and the next FP32 number on either side; scale 1, so all is exact."""
        middle = ((FINITE[:-1] + FINITE[1:]) / 2).astype(np.float32)
        w = np.stack([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9)), -middle])
        w = np.concatenate([np.full((4, 1), 448, np.float32), w], axis=1)
        stored, scale = fp8.quantize(torch.from_numpy(w))
        assert scale.tolist() == [[1.0]]
        got = as_bytes(stored)[:, 1:]
        below = np.arange(126)
        np.testing.assert_array_equal(got[0], below + below % 2)
        np.testing.assert_array_equal(got[1], below)
        np.testing.assert_array_equal(got[2], below + 1)
        np.testing.assert_array_equal(got[3], got[0] | 128)

    def test_every_number_is_kept(self):
        numbers = from_bytes(np.delete(np.arange(256), [0x7F, 0xFF]))
        for exponent in (-14, 0, 9):  # 448 · 2^-22 is less than 1e-4, which would count instead
            stored, scale = fp8.quantize(numbers.float().view(1, -1)[:, :128] * 2.0**exponent)
            assert scale.flatten().tolist() == [2.0**exponent]
            assert same(stored[0], numbers[:128])

    def test_zeros(self):
        stored, scale = fp8.quantize(torch.zeros(130, 130))
        assert (scale == float(np.float32(1e-4) / np.float32(448))).all()
        assert (as_bytes(stored) == 0).all()
        _, scale = fp8.quantize(torch.zeros(130, 130), power_of_two=True)
        assert (scale == 2.0**-22).all()  # 1e-4 / 448 = 0.936 · 2^-22

    def test_a_block_knows_nothing_of_others(self):
        w = torch.from_numpy(random_weights((256, 256), 3, "normal"))
        w[:128, 128:] *= 1e6
        stored, scale = fp8.quantize(w)
        for (i, j), block in blocks((256, 256)):
            alone = fp8.quantize(w[block])
            assert same(stored[block], alone[0])
            assert same(scale[i : i + 1, j : j + 1], alone[1])

    @pytest.mark.parametrize("power_of_two", [False, True])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_shows_in_the_scale(self, bad: float, power_of_two: bool):
        w = torch.ones(3, 300)
        w[2, 200] = bad
        stored, scale = fp8.quantize(w, power_of_two=power_of_two)
        assert scale.isfinite().tolist() == [[True, False, True]]
        got = fp8.dequantize(stored, scale, torch.float32)
        assert got[:, 128:256].isnan().all()
        good = torch.cat((got[:, :128], got[:, 256:]), dim=1)
        assert ((good - 1).abs() < 1e-6).all()

    def test_views(self):
        w = torch.from_numpy(random_weights((2, 150, 290), 4, "normal"))
        turned = w.transpose(1, 2)
        stored, scale = fp8.quantize(turned)
        check_quantized(turned.contiguous().numpy(), stored, scale, False)
        stored, scale = fp8.quantize(w[:, ::2, 3:140])
        check_quantized(w[:, ::2, 3:140].contiguous().numpy(), stored, scale, False)

    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 5)])
    def test_nothing(self, shape: tuple[int, ...]):
        stored, scale = fp8.quantize(torch.zeros(shape))
        assert tuple(stored.shape) == shape
        assert tuple(scale.shape) == fp8.scale_shape(shape)
        assert tuple(fp8.dequantize(stored, scale).shape) == shape


class TestAgain:
    """Quantising what was dequantised. Through FP32 nothing changes: with s the rounded max |w| / 448, 448 · s rounded
    and divided again is s (7 · s is at most 3.5 units of s away from a number of FP32). Through BF16 448 · s is
    rounded, and the scale moves by as much. With powers of two max |w| may round down to 224 scales, which half the
    scale holds too.
    """

    @settings(max_examples=40)
    @given(shape=st.tuples(sides, sides), seed=seeds, magnitude=magnitudes)
    def test_through_fp32_nothing_changes(self, shape: tuple[int, int], seed: int, magnitude: str):
        stored, scale = fp8.quantize(torch.from_numpy(random_weights(shape, seed, magnitude)))
        again, new_scale = fp8.quantize(fp8.dequantize(stored, scale, torch.float32))
        assert same(again, stored)
        assert same(new_scale, scale)

    def test_through_fp32_no_scale_moves(self):
        """A tile for each of 2^14 numbers that lie 2^9 FP32 steps from each other between 1 and 2."""
        x = torch.arange(2**23, 2**24, 2**9).float().view(-1, 1) / 2**23
        stored, scale = fp8.quantize_activations(x)
        again, new_scale = fp8.quantize_activations(stored.float() * scale)
        assert same(again, stored)
        assert same(new_scale, scale)

    @settings(max_examples=40)
    @given(
        shape=st.tuples(sides, sides),
        seed=seeds,
        magnitude=st.sampled_from(["normal", "wide", "powers of two", "one is large"]),
    )
    def test_through_bf16_stored_numbers_stay(self, shape: tuple[int, int], seed: int, magnitude: str):
        stored, scale = fp8.quantize(torch.from_numpy(random_weights(shape, seed, magnitude)))
        again, new_scale = fp8.quantize(fp8.dequantize(stored, scale, torch.bfloat16))
        large = scale > 1.01e-4 / 448  # else 1e-4 counts, not the largest number
        assert ((new_scale - scale).abs() <= 2.0**-8 * scale)[large].all()
        for (i, j), block in blocks(shape):
            if large[i, j]:
                assert same(again[block], stored[block])

    def test_through_bf16_scales_move(self):
        stored, scale = fp8.quantize(torch.from_numpy(random_weights((20, 128, 128), 0, "normal")))
        _, new_scale = fp8.quantize(fp8.dequantize(stored, scale, torch.bfloat16))
        assert (new_scale != scale).any()

    @settings(max_examples=40)
    @given(
        shape=st.tuples(sides, sides),
        seed=seeds,
        magnitude=st.sampled_from(["normal", "wide", "powers of two", "one is large", "clamped"]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def test_powers_of_two_lose_nothing_more(
        self, shape: tuple[int, int], seed: int, magnitude: str, dtype: torch.dtype
    ):
        """Values are equal, bit by bit, also through BF16, and from the second time on all is equal."""
        stored, scale = fp8.quantize(torch.from_numpy(random_weights(shape, seed, magnitude)), power_of_two=True)
        values = fp8.dequantize(stored, scale, dtype)
        assert same(values.float(), fp8.dequantize(stored, scale, torch.float32))  # BF16 holds them exactly
        again, new_scale = fp8.quantize(values, power_of_two=True)
        assert same(fp8.dequantize(again, new_scale, dtype), values)
        assert ((new_scale == scale) | (new_scale == scale / 2) | (scale == 2.0**-22)).all()
        third, last_scale = fp8.quantize(fp8.dequantize(again, new_scale, dtype), power_of_two=True)
        assert same(third, again)
        assert same(last_scale, new_scale)


class TestActivations:
    @settings(max_examples=60)
    @given(
        lead=st.sampled_from([(), (1,), (7,), (2, 3)]),
        inputs=sides,
        seed=seeds,
        magnitude=magnitudes,
        power_of_two=st.booleans(),
    )
    def test_tiles(self, lead: tuple[int, ...], inputs: int, seed: int, magnitude: str, power_of_two: bool):
        x = random_weights((*lead, inputs), seed, magnitude)
        stored, scale = fp8.quantize_activations(torch.from_numpy(x.copy()), power_of_two=power_of_two)
        assert tuple(stored.shape) == (*lead, inputs)
        assert tuple(scale.shape) == (*lead, -(-inputs // 128))
        rows = x.reshape(-1, inputs)
        check_quantized(rows, stored.view(rows.shape), scale.view(len(rows), -1), power_of_two, rows=1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype):
        x = torch.from_numpy(random_weights((9, 300), 2, "normal")).to(dtype)
        stored, scale = fp8.quantize_activations(x[:, ::2])
        check_quantized(x[:, ::2].float().contiguous().numpy(), stored, scale, False, rows=1)

    def test_no_rows(self):
        stored, scale = fp8.quantize_activations(torch.zeros(0, 200))
        assert (tuple(stored.shape), tuple(scale.shape)) == ((0, 200), (0, 2))


def operands(
    rows: int, outputs: int, inputs: int, seed: int, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Array, Array]:
    """x, stored weight, scales; and both operands as float64 computed here, without any rounding."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((rows, inputs)).astype(np.float32)).to(dtype)
    stored = rng.integers(0, 256, (outputs, inputs), dtype=np.uint8)
    stored[stored & 127 == 127] = 0
    scale = (2.0 ** rng.uniform(-12, -8, fp8.scale_shape((outputs, inputs)))).astype(np.float32)
    if power_of_two:
        scale = (2.0 ** rng.integers(-12, -8, scale.shape)).astype(np.float32)
    numbers = x.float().numpy()
    x_scale = expected_scales(numbers, power_of_two, rows=1)
    x_exact = exact_product(expected_stored(numbers, x_scale, rows=1), x_scale, rows=1)
    return x, from_bytes(stored), torch.from_numpy(scale), x_exact, exact_product(stored, scale)


class TestLinear:
    @settings(max_examples=40)
    @given(
        rows=st.integers(0, 20),
        outputs=sides,
        inputs=sides,
        seed=seeds,
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
        power_of_two=st.booleans(),
    )
    @example(rows=0, outputs=5, inputs=130, seed=0, dtype=torch.bfloat16, power_of_two=False)
    @example(rows=1, outputs=256, inputs=256, seed=0, dtype=torch.bfloat16, power_of_two=True)
    @example(rows=3, outputs=2050, inputs=9, seed=0, dtype=torch.float32, power_of_two=False)  # more than at a time
    def test_product(self, rows: int, outputs: int, inputs: int, seed: int, dtype: torch.dtype, power_of_two: bool):
        x, weight, scale, x_exact, w_exact = operands(rows, outputs, inputs, seed, dtype, power_of_two)
        exact, size = x_exact @ w_exact.T, np.abs(x_exact) @ np.abs(w_exact).T  # size: of what is summed up
        reference = fp8.linear_reference(x, weight, scale, power_of_two=power_of_two)
        assert (reference.dtype, tuple(reference.shape)) == (torch.float64, (rows, outputs))
        assert (np.abs(reference.numpy() - exact) <= 1e-13 * size).all()

        got = fp8.linear(x, weight, scale, power_of_two=power_of_two)
        assert (got.dtype, tuple(got.shape)) == (dtype, (rows, outputs))
        error = (got.double() - reference).abs().numpy()
        sums = (inputs + 3) * 2.0**-24 * size  # FP32 products, added up in FP32
        if dtype != torch.bfloat16:
            assert (error <= sums).all()
        elif power_of_two:  # E4M3 times a power of two is exact in BF16: only the result is rounded
            assert (error <= sums + 2.0**-8 * (np.abs(exact) + sums)).all()
        else:
            assert (error <= sums + 2.01 * 2.0**-8 * size + 2.0**-8 * 1.01 * np.abs(exact)).all()

    def test_activations_are_quantised(self):
        """The error against a product with the dequantised weight is that of E4M3, no less."""
        x, weight, scale, _, w_exact = operands(64, 100, 300, 1, torch.float32, False)
        plain = x.double().numpy() @ w_exact.T
        error = np.linalg.norm(fp8.linear(x, weight, scale).double().numpy() - plain) / np.linalg.norm(plain)
        assert 0.01 < error < 2.0**-4

    def test_no_gradient_passes(self):
        x, weight, scale, _, _ = operands(3, 130, 130, 1, torch.float32, False)
        assert not fp8.linear(x.requires_grad_(), weight, scale).requires_grad

    def test_views(self):
        x, weight, scale, _, _ = operands(6, 200, 260, 2, torch.float32, False)
        right = fp8.linear(x, weight, scale)
        turned = x.t().contiguous().t()
        torch.testing.assert_close(fp8.linear(turned, weight, scale), right, rtol=1e-5, atol=1e-5)
        both = torch.cat((weight.view(torch.uint8), weight.view(torch.uint8))).view(E4M3)
        torch.testing.assert_close(fp8.linear(x, both[200:], scale), right, rtol=1e-5, atol=1e-5)


class TestBlockwise:
    """What a GPU is asked for. torch checks shapes and strides there (aten/src/ATen/native/cuda/ScaledBlas.cpp,
    1x128 with 128x128); here a stand-in checks the same and computes what such operands mean."""

    @staticmethod
    def stand_in(
        a: Tensor, b: Tensor, a_scale: Tensor, a_kind: Any, b_scale: Tensor, b_kind: Any, **more: Any
    ) -> Tensor:
        kinds = torch.nn.functional.ScalingType
        assert (a_kind, b_kind) == (kinds.BlockWise1x128, kinds.BlockWise128x128)
        (m, k), n = a.shape, b.shape[1]
        padded = -(-k // 128 // 4) * 4
        assert m % 4 == k % 128 == n % 128 == 0
        assert m > 0
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert (a.dtype, b.dtype, a_scale.dtype, b_scale.dtype) == (E4M3, E4M3, torch.float32, torch.float32)
        assert tuple(a_scale.shape) == (m, k // 128)
        assert a_scale.stride(0) == 1
        assert a_scale.stride(1) == m or (k == 128 and a_scale.stride(1) == 1)
        assert tuple(b_scale.shape) == (padded, n // 128)
        assert b_scale.stride(0) == 1
        assert b_scale.stride(1) == padded or (n == 128 and b_scale.stride(1) == 1)
        assert more == {"output_dtype": torch.bfloat16}
        x = exact_product(as_bytes(a), a_scale.numpy(), rows=1)
        w = exact_product(as_bytes(b.t()), b_scale.t()[:, : k // 128].numpy())
        return torch.from_numpy(x @ w.T).to(torch.bfloat16)

    @settings(max_examples=20)
    @given(
        rows=st.integers(0, 40),
        outputs=st.integers(1, 3),
        inputs=st.integers(1, 6),
        seed=seeds,
        power_of_two=st.booleans(),
    )
    @example(rows=1, outputs=1, inputs=1, seed=0, power_of_two=False)
    def test_operands(self, rows: int, outputs: int, inputs: int, seed: int, power_of_two: bool):
        x, weight, scale, _, _ = operands(rows, 128 * outputs, 128 * inputs, seed, torch.bfloat16, power_of_two)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_mm", self.stand_in)
            patch.setattr(fp8, "has_blockwise_matmul", lambda device: True)
            got = fp8.linear(x, weight, scale, power_of_two=power_of_two)
        reference = fp8.linear_reference(x, weight, scale, power_of_two=power_of_two)
        assert same(got, reference.to(torch.bfloat16))

    @pytest.mark.parametrize(
        ("rows", "outputs", "inputs", "dtype"),
        [(4, 130, 128, torch.bfloat16), (4, 128, 130, torch.bfloat16), (4, 128, 128, torch.float32)],
    )
    def test_what_does_not_fit_is_computed_otherwise(
        self, monkeypatch: pytest.MonkeyPatch, rows: int, outputs: int, inputs: int, dtype: torch.dtype
    ):
        monkeypatch.setattr(torch.nn.functional, "scaled_mm", lambda *_, **__: pytest.fail("asked for"))
        monkeypatch.setattr(fp8, "has_blockwise_matmul", lambda device: True)
        x, weight, scale, _, _ = operands(rows, outputs, inputs, 0, dtype, False)
        assert fp8.linear(x, weight, scale).dtype == dtype

    def test_a_cpu_has_none(self):
        assert not fp8.has_blockwise_matmul(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGPU:
    @pytest.mark.parametrize("power_of_two", [False, True])
    def test_quantizing_gives_the_same_bits(self, power_of_two: bool):
        for magnitude in ("normal", "wide", "tiny", "powers of two", "one is large"):
            w = torch.from_numpy(random_weights((3, 300, 290), 7, magnitude))
            for function in (fp8.quantize, fp8.quantize_activations):
                here, there = function(w, power_of_two=power_of_two), function(w.cuda(), power_of_two=power_of_two)
                assert all(same(a, b.cpu()) for a, b in zip(here, there, strict=True))

    def test_dequantizing_gives_the_same_bits(self):
        weight, scale, _ = random_stored((3, 300, 290), 7)
        for dtype in (torch.float32, torch.bfloat16):
            here = fp8.dequantize(weight, scale, dtype)
            assert same(here, fp8.dequantize(weight.cuda(), scale.cuda(), dtype).cpu())

    @pytest.mark.parametrize("rows", [1, 3, 16, 130])
    @pytest.mark.parametrize(("outputs", "inputs"), [(128, 128), (256, 384), (512, 1024), (200, 300)])
    @pytest.mark.parametrize("power_of_two", [False, True])
    def test_linear(self, rows: int, outputs: int, inputs: int, power_of_two: bool):
        x, weight, scale, _, _ = operands(rows, outputs, inputs, 3, torch.bfloat16, power_of_two)
        got = fp8.linear(x.cuda(), weight.cuda(), scale.cuda(), power_of_two=power_of_two).cpu()
        reference = fp8.linear_reference(x, weight, scale, power_of_two=power_of_two)
        assert (got.double() - reference).abs().max() <= 0.01 * reference.abs().max()

    def test_blockwise(self):
        """On hardware that has it (compute capability 9.0), it is found and used."""
        if torch.cuda.get_device_capability() != (9, 0) or not hasattr(torch.nn.functional, "scaled_mm"):
            pytest.skip("torch multiplies blocks of FP8 on compute capability 9.0 only")
        assert fp8.has_blockwise_matmul(torch.device("cuda"))
        # Accumulated in FP32 with the operands as they are stored: nearer than operands rounded to BF16 could be.
        x, weight, scale, x_exact, w_exact = operands(64, 512, 1024, 3, torch.bfloat16, False)
        got = fp8.linear(x.cuda(), weight.cuda(), scale.cuda()).cpu().double().numpy()
        exact, size = x_exact @ w_exact.T, np.abs(x_exact) @ np.abs(w_exact).T
        # Tensor cores keep some 14 bits while they add up a tile; what is left is the rounding of the result.
        assert (np.abs(got - exact) <= 2.0**-8 * 1.01 * np.abs(exact) + 2.0**-12 * size).all()
