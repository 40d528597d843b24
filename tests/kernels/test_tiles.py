"""Experts' products on the tile unit, against each expert's product in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import grouped, native

pytestmark = pytest.mark.skipif(not native.has_tiles(), reason="no AMX on this processor, or no C++ compiler")

blocks = st.integers(1, 5).map(lambda n: 32 * n)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(ours: Tensor, exact: Tensor) -> None:
    """Sums in FP32, rounded once: half a step of BF16, and what FP32 loses."""
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(
        ours.double(), exact, rtol=2**-8, atol=1e-4 * float(exact.abs().max()) if exact.numel() else 0
    )


def check(rows: list[int], outputs: int, inputs: int, seed: int) -> None:
    bounds = [0, *torch.tensor(rows).cumsum(0).tolist()]
    x, grad = drawn(bounds[-1], inputs, seed=seed), drawn(bounds[-1], outputs, seed=seed + 1)
    weight = drawn(len(rows), outputs, inputs, seed=seed + 2)
    assert native.multiplies(x, weight, bounds)
    out = native.grouped_product(x, weight, bounds)
    grad_x = native.grouped_product_backward_x(grad, weight, bounds)
    grad_weight = native.grouped_product_backward_weight(grad, x, bounds)
    for expert in range(len(rows)):
        part = slice(bounds[expert], bounds[expert + 1])
        w = weight[expert].double()
        close(out[part], x[part].double() @ w.T)
        close(grad_x[part], grad[part].double() @ w)
        close(grad_weight[expert], grad[part].double().T @ x[part].double())


@settings(max_examples=40)
@given(
    rows=st.lists(st.integers(0, 4).map(lambda n: 32 * n), min_size=1, max_size=7),
    outputs=blocks,
    inputs=blocks,
    seed=st.integers(0, 2**31),
)
def test_products_of_experts(rows: list[int], outputs: int, inputs: int, seed: int):
    check(rows, outputs, inputs, seed)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [
        ([2048], 96, 640),  # one expert for several threads: its columns are shared out
        ([32, 0, 4096], 32, 32),  # deep sums over rows
        ([64] * 40, 64, 32),
        ([32], 64, 20480),  # so deep that few columns are packed at a time
    ],
)
def test_pieces_and_threads(rows: list[int], outputs: int, inputs: int, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(rows, outputs, inputs, 0)
    finally:
        torch.set_num_threads(before)


def test_other_sizes_and_types_go_elsewhere():
    x, weight = drawn(32, 64, seed=0), drawn(1, 32, 64, seed=1)
    assert native.multiplies(x, weight, [0, 32])
    assert not native.multiplies(x, weight, [0, 31])
    assert not native.multiplies(x[:, :40], weight[..., :40], [0, 32])
    assert not native.multiplies(x, weight[:, :16], [0, 32])
    assert not native.multiplies(x.float(), weight.float(), [0, 32])


@pytest.mark.parametrize("routing", ["any", "one"])
def test_the_other_ways_give_the_same(routing: str, monkeypatch: pytest.MonkeyPatch):
    """One product an expert, or one batched product for all, where there are no tiles."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(200, 8, generator=generator).topk(2).indices
    if routing == "one":
        indices = torch.full_like(indices, 3)
    x, weight = drawn(200, 64, seed=1), drawn(8, 32, 64, seed=2)
    results = []
    for tiles in (True, False):
        monkeypatch.setattr(native, "has_tiles", lambda tiles=tiles: tiles)
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        where = grouped.plan(indices, 8, torch.bfloat16)
        out = grouped.combine(grouped.grouped_linear(grouped.gather(leaves[0], where), leaves[1], where), where)
        out.backward(torch.ones_like(out))
        results.append([t.detach().double() for t in (out, *(leaf.grad for leaf in leaves))])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=0.02, atol=0.01 * float(other.abs().max()))
