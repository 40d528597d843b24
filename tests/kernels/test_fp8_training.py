"""FP8 products for training against numpy loops, tile by tile in float64, with a rounding to E4M3 of their own.

Everything runs on the reference; that the kernels compute the same is test_fp8_gpu.py's.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import fp8, fp8_training

Array = np.ndarray[Any, Any]


class Rows:
    """Rows of E experts: ``bounds`` has E + 1 numbers."""

    def __init__(self, *bounds: int) -> None:
        self.bounds = list(bounds)
        self.ends = torch.tensor(bounds[1:], dtype=torch.int32)

    def host_bounds(self) -> list[int]:
        return self.bounds


def e4m3(numbers: Array) -> Array:
    """The nearest E4M3 number to each of at most 448: 3 bits behind the first, which is 2^-6 at least; ties to even."""
    _, exponent = np.frexp(numbers.astype(np.float64))
    step = 2.0 ** (np.maximum(exponent - 1, -6) - 3)
    return np.rint(numbers.astype(np.float64) / step) * step


def rounded(x: Array, height: int, width: int, power_of_two: bool = False, smallest: float = 1e-30) -> Array:
    """``x`` as FP8 sees it: each tile of height × width scaled by max |x| / 448, rounded, scaled back (FP32)."""
    out = np.zeros(x.shape)
    for top in range(0, x.shape[0], height):
        for left in range(0, x.shape[1], width):
            tile = x[top : top + height, left : left + width].astype(np.float32)
            amax = max(np.abs(tile).max(), np.float32(smallest))
            scale = amax / np.float32(448)
            if power_of_two:
                scale = np.float32(2.0 ** math.ceil(math.log2(float(amax) / 448)))
            out[top : top + height, left : left + width] = e4m3(tile / scale) * np.float64(scale)
    return out


def expected(x: Array, weight: Array, grad: Array, bounds: list[int]) -> tuple[Array, Array, Array]:
    """Output [P, O] and gradients [P, I], [E, O, I] of the recipe, exact products of the rounded numbers."""
    kept = rounded(x, 1, 128, power_of_two=True)
    y, dx, dw = np.zeros(grad.shape), np.zeros(x.shape), np.zeros(weight.shape)
    for e in range(len(weight)):
        own = slice(bounds[e], bounds[e + 1])
        w = rounded(weight[e], 128, 128, smallest=1e-4)
        y[own] = kept[own] @ w.T
        dx[own] = rounded(grad[own], 1, 128) @ w
        dw[e] = rounded(grad[own], 128, 1).T @ rounded(kept[own], 128, 1, power_of_two=True)
    return y, dx, dw


def run(x: Tensor, weight: Tensor, grad: Tensor, where: Rows) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fp8_training.grouped_linear(x, weight, where)
    out.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    return out.detach(), x.grad, weight.grad


def numbers(seed: int, rows: int, outputs: int, inputs: int, experts: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and gradients of many sizes, as training has them, and weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(rows, inputs) * normal(rows, 1).exp()
    return x, normal(experts, outputs, inputs) * 0.02, normal(rows, outputs) * normal(rows, 1).mul(3).exp() * 1e-6


def close(got: Tensor, wanted: Array, tolerance: float = 1e-5) -> bool:
    """Within ``tolerance`` of the largest number; equal shapes, nothing but numbers."""
    assert tuple(got.shape) == wanted.shape
    assert got.isfinite().all()
    return bool(np.abs(got.double().numpy() - wanted).max(initial=0.0) <= tolerance * np.abs(wanted).max(initial=0.0))


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


sides = st.one_of(st.sampled_from([1, 127, 128, 129, 256]), st.integers(1, 300))
counts = st.lists(st.one_of(st.sampled_from([0, 0, 1, 127, 128, 129]), st.integers(0, 300)), min_size=1, max_size=4)


class TestTheRecipe:
    @settings(max_examples=20)
    @given(counts=counts, outputs=sides, inputs=sides, seed=st.integers(0, 2**32 - 1))
    @example(counts=[0, 300, 0], outputs=128, inputs=256, seed=0)  # one expert gets all
    @example(counts=[0, 0], outputs=3, inputs=5, seed=0)  # no rows at all
    @example(counts=[1], outputs=1, inputs=1, seed=0)
    def test_all_three_products(self, counts: list[int], outputs: int, inputs: int, seed: int):
        bounds = [0, *np.cumsum(counts).tolist()]
        x, weight, grad = numbers(seed, bounds[-1], outputs, inputs, len(counts))
        got = run(x, weight, grad, Rows(*bounds))
        wanted = expected(x.numpy(), weight.numpy(), grad.numpy(), bounds)
        for g, w in zip(got, wanted, strict=True):
            assert close(g, w)
        for count, gradient in zip(counts, got[2], strict=True):
            assert count > 0 or not gradient.any()

    def test_linear_is_one_expert(self):
        x, weight, grad = numbers(1, 200, 150, 130)
        got = run(x, weight, grad, Rows(0, 200))
        x.requires_grad_()
        matrix = weight[0].clone().requires_grad_()
        out = fp8_training.linear(x, matrix)
        out.backward(grad)
        assert torch.equal(out, got[0])
        assert torch.equal(x.grad, got[1])
        assert torch.equal(matrix.grad, got[2][0])

    def test_bf16_is_the_same_rounded_once(self):
        x, weight, grad = (t.bfloat16() for t in numbers(2, 100, 140, 200, 2))
        got = run(x, weight, grad, Rows(0, 30, 100))
        wanted = expected(x.float().numpy(), weight.float().numpy(), grad.float().numpy(), [0, 30, 100])
        for g, w in zip(got, wanted, strict=True):
            assert g.dtype == torch.bfloat16
            difference = np.abs(g.double().numpy() - w)
            assert (difference <= np.abs(w) * 2.0**-8 + 1e-5 * np.abs(w).max()).all()

    def test_fp32_weights_under_bf16_rows_get_fp32_gradients(self):
        x, weight, grad = numbers(3, 100, 140, 200, 2)
        x, grad = x.bfloat16(), grad.bfloat16()
        got = run(x, weight, grad, Rows(0, 30, 100))
        assert [g.dtype for g in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
        assert close(got[2], expected(x.float().numpy(), weight.numpy(), grad.float().numpy(), [0, 30, 100])[2])

    def test_autocast_does_not_reach_inside(self):
        x, weight, grad = numbers(4, 50, 60, 70)
        plain = run(x, weight, grad, Rows(0, 50))
        with torch.autocast("cpu", torch.bfloat16):
            inside = run(x, weight, grad, Rows(0, 50))
        for a, b in zip(plain, inside, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)

    def test_strides_do_not_matter(self):
        x, weight, grad = numbers(5, 140, 150, 160, 2)
        plain = run(x, weight, grad, Rows(0, 70, 140))
        strided = run(x.t().contiguous().t(), weight.mT.contiguous().mT, grad.t().contiguous().t(), Rows(0, 70, 140))
        for a, b in zip(plain, strided, strict=True):
            assert torch.equal(a, b)


class TestWhatTrainingNeeds:
    def test_the_error_of_each_product_is_that_of_e4m3_and_has_no_direction(self):
        """Rounding to 4 bits moves a number by 2.6% (root of the mean square), so products of two by 3.7%."""
        generator = torch.Generator().manual_seed(0)
        x, weight, grad = (torch.randn(512, 512, generator=generator) for _ in range(3))
        exact = (x @ weight.t(), grad @ weight, grad.t() @ x)
        for got, wanted in zip(run(x, weight.unsqueeze(0), grad, Rows(0, 512)), exact, strict=True):
            got = got.reshape(wanted.shape)
            assert 0.030 < error(got, wanted) < 0.042
            # Rounding to the nearest shortens by the square of its error, 0.07% each.
            assert abs(float((got * wanted).sum() / (wanted * wanted).sum()) - 1) < 0.002
            assert abs(float((got - wanted).mean() / wanted.std())) < 0.002

    def test_small_gradients_are_as_exact_as_large_ones(self):
        x, weight, grad = numbers(6, 150, 140, 130)
        large, small = (run(x, weight, grad * size, Rows(0, 150)) for size in (1.0, 2.0**-50))
        for a, b in zip(large[1:], small[1:], strict=True):
            assert torch.equal(a * 2.0**-50, b)
            assert b.any()

    def test_zeros_stay_zeros(self):
        x, weight, grad = numbers(7, 150, 140, 130)
        for zero in range(3):
            given = [torch.zeros_like(t) if i == zero else t for i, t in enumerate((x, weight, grad))]
            got = run(given[0], given[1], given[2], Rows(0, 150))
            assert [bool(g.any()) for g in got] == [zero == 2, zero == 0, zero == 1]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_not_hidden(self, bad: float):
        x, weight, grad = numbers(8, 150, 140, 130)
        broken = x.clone()
        broken[3, 5] = bad
        out, _, grad_weight = run(broken, weight, grad, Rows(0, 150))
        assert not out[3].isfinite().any()
        assert out[4].isfinite().all()
        assert not grad_weight[0, :, 5].isfinite().any()
        broken = grad.clone()
        broken[3, 5] = bad
        _, grad_x, grad_weight = run(x, weight, broken, Rows(0, 150))
        assert not grad_x[3].isfinite().any()
        assert not grad_weight[0, 5].isfinite().any()

    @settings(max_examples=30)
    @given(rows=sides, columns=sides, seed=st.integers(0, 2**32 - 1))
    def test_the_other_tiling_rounds_only_what_gets_subnormal(self, rows: int, columns: int, seed: int):
        x, _, _ = numbers(seed, rows, 1, columns)
        stored, scale = fp8_training.quantize_rows(x, power_of_two=True)
        kept = stored.double() * scale.double().repeat_interleave(128, 1)[:, :columns]
        again, scales = fp8_training.quantize_columns(stored, Rows(0, rows), scale, power_of_two=True)
        scales = scales.double().repeat_interleave(128, 0)[:rows]
        back = again.double().t()[:rows] * scales
        normal = kept.abs() >= 2.0**-6 * scales
        assert torch.equal(back[normal], kept[normal])
        assert ((back - kept).abs() <= 2.0**-10 * scales)[~normal].all()

    def test_weights_round_as_an_export_to_fp8_does(self):
        _, weight, _ = numbers(9, 1, 300, 200, 2)
        stored, scale = fp8_training.quantize_weight(weight)
        for e in range(2):
            wanted = fp8.quantize(weight[e])
            assert torch.equal(stored[e].float(), wanted[0].float())
            assert torch.equal(scale[e], wanted[1])
        for one, other in zip(fp8_training.quantize_weight(weight, transposed=True), (stored, scale), strict=True):
            assert torch.equal(one.float(), other.float().mT)

    def test_rows_are_kept_in_fp8(self):
        x, weight, _ = numbers(10, 300, 200, 256)
        x.requires_grad_()
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            fp8_training.grouped_linear(x, weight, Rows(0, 300))
            frozen = len(kept)
            fp8_training.grouped_linear(x, weight.requires_grad_(), Rows(0, 300))
        assert [t.data_ptr() for t in kept[:frozen]] == [weight.data_ptr()]  # its gradient is not wanted
        own = [t for t in kept[frozen:] if t.data_ptr() != weight.data_ptr()]
        assert sum(t.nbytes for t in own) == 300 * 256 + 300 * 2 * 4

    def test_only_wanted_gradients(self):
        x, weight, grad = numbers(11, 100, 60, 70)
        wanted = run(x, weight, grad, Rows(0, 100))
        for index in range(2):
            given = [x.clone().requires_grad_(index == 0), weight.clone().requires_grad_(index == 1)]
            fp8_training.grouped_linear(given[0], given[1], Rows(0, 100)).backward(grad)
            assert torch.equal(given[index].grad, wanted[1 + index])
            assert given[1 - index].grad is None

    def test_a_changed_weight_is_seen_and_never_between_forward_and_backward(self):
        x, weight, grad = numbers(12, 100, 60, 70)
        x.requires_grad_()
        first = fp8_training.grouped_linear(x, weight, Rows(0, 100))
        weight.mul_(2.0)
        assert torch.equal(fp8_training.grouped_linear(x, weight, Rows(0, 100)), first * 2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            first.backward(grad)
