import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import attention as module
from abyssal.kernels import native
from abyssal.kernels.attention import Documents, attention, attention_reference

compiled = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


def inputs(batch: int, heads: int, shared: int, length: int, d: int, width: int, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads * shared, d), (heads, d), (heads, width))
    return [torch.randn(batch, h, length, size, generator=g, dtype=torch.float64) for h, size in shapes]


def numbered(lengths: list[list[int]]) -> Tensor:
    """Rows of documents with these lengths; the last of a row is padding where there are several."""
    rows = []
    for row in lengths:
        numbers = [*range(len(row) - 1), -1] if len(row) > 1 else [5]
        rows.append([number for number, length in zip(numbers, row, strict=True) for _ in range(length)])
    return torch.tensor(rows)


def each_alone(q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: list[list[int]]) -> Tensor:
    rows = []
    for row, of_row in enumerate(lengths):
        parts = zip(*(x[row : row + 1].split(of_row, dim=2) for x in (q, k, v)), strict=True)
        rows.append(torch.cat([attention_reference(*part, scale, None, True) for part in parts], dim=2))
    return torch.cat(rows)


@st.composite
def packed(draw: st.DrawFn) -> list[list[int]]:
    length = draw(st.integers(1, 200))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(0, length), max_size=8)) | {0, length})
        rows.append([end - start for start, end in itertools.pairwise(cuts)])
    return rows


@settings(max_examples=60)
@given(
    lengths=packed(),
    heads=st.integers(1, 2),
    shared=st.integers(1, 3),
    d=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    cost=st.sampled_from([0, 1, 16]),
)
def test_each_document_comes_out_as_it_would_alone(
    lengths: list[list[int]], heads: int, shared: int, d: int, width: int, seed: int, cost: int
):
    """Cut in many tiles or in few."""
    exact = inputs(len(lengths), heads, shared, sum(lengths[0]), d, width, seed)
    documents = Documents.of(numbered(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE_COST", cost)
        assert sum(map(len, documents.tiles)) >= len(lengths)
    results = []
    for way, dtype in (
        ("alone", torch.float64),
        (attention, torch.float64),
        (attention_reference, torch.float64),
        (attention, torch.float32),
    ):
        q, k, v = leaves = [x.to(dtype, copy=True).requires_grad_() for x in exact]
        out = each_alone(q, k, v, 0.4, lengths) if way == "alone" else way(q, k, v, 0.4, None, True, documents)
        assert out.dtype == dtype
        out.backward(torch.sin(torch.arange(out.numel())).view(out.shape).to(dtype))
        results.append([out, *(x.grad for x in leaves)])
    for alone, wide, plain, narrow in zip(*results, strict=True):
        torch.testing.assert_close(wide, alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(plain, alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(narrow.double(), alone, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("lengths", [[[1, 31, 1, 64, 203], [300]], [[7] * 40 + [20], [299, 1]], [[520], [260, 260]]])
def test_bfloat16_is_as_near_to_float64_as_plain_bfloat16(lengths: list[list[int]], shared: int):
    rounded = [x.bfloat16() for x in inputs(2, 2, shared, sum(lengths[0]), 24, 17, 0)]
    documents = Documents.of(numbered(lengths))
    results = []
    for function, dtype in (
        (attention, torch.bfloat16),
        (attention_reference, torch.bfloat16),
        (attention_reference, torch.float64),
    ):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in rounded]
        out = function(*leaves, 0.3, None, True, documents)
        out.backward(torch.cos(torch.arange(out.numel())).view(out.shape).to(dtype))
        results.append([x.double() for x in (out, *(leaf.grad for leaf in leaves))])
    for ours, plain, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 1.3 * (plain - exact).norm() + 1e-3 * exact.norm() + 1e-6
    with torch.no_grad():
        assert torch.equal(attention(*rounded, 0.3, None, True, documents).double(), results[0][0])


@given(lengths=packed())
def test_tiles_hold_every_query_once_and_all_its_keys(lengths: list[list[int]]):
    documents = Documents.of(numbered(lengths))
    for row, of_row, tiles in zip(documents.starts.tolist(), lengths, documents.tiles, strict=True):
        begins = [0, *itertools.accumulate(of_row)]
        assert row == [start for start, count in zip(begins, of_row, strict=False) for _ in range(count)]
        assert [t for tile in tiles for t in range(tile.first, tile.end)] == list(range(len(row)))
        for tile in tiles:
            firsts = [tile.low + low for low in tile.lows.tolist()]
            assert firsts == row[tile.first : tile.end]


@given(lows=st.lists(st.integers(0, 6), min_size=1, max_size=7), cost=st.integers(0, 12))
def test_cuts_are_the_cheapest_there_are(lows: list[int], cost: int):
    lows = [min(low, i) for i, low in enumerate(sorted(lows))]
    every = []
    for chosen in itertools.product((False, True), repeat=len(lows) - 1):
        edges = [0, *(i for i, cut in enumerate(chosen, start=1) if cut), len(lows)]
        every.append(list(itertools.pairwise(edges)))

    def total(cuts: list[tuple[int, int]]) -> int:
        return sum((end - first) * (end - lows[first]) + cost for first, end in cuts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE_COST", cost)
        ours = module._cuts(lows)
    assert ours in every
    assert total(ours) == min(map(total, every))


def test_short_documents_cost_less_than_the_whole_row():
    """What isolation is for: the scores computed are near to Σ length², not T²."""
    lengths = [200] * 5 + [24]
    tiles = Documents.of(numbered([lengths])).tiles[0]
    scores = sum((tile.end - tile.first) * (tile.end - tile.low) for tile in tiles)
    assert scores < 1.4 * sum(n * n for n in lengths)
    assert math.isclose(sum(lengths), 1024)


def test_other_documents_do_not_matter():
    """To the last bit: whatever stands in the other documents of a row."""
    g = torch.Generator().manual_seed(0)
    documents = Documents.of(numbered([[40, 90, 30]]))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        q, k, v = (torch.randn(1, 2, 160, 16, generator=g).to(dtype) for _ in range(3))
        others = torch.cat([torch.ones(40), torch.zeros(90), torch.ones(30)]).bool()
        changed = [
            torch.where(others[:, None], 1000 * torch.randn(x.shape, generator=g).to(dtype), x) for x in (q, k, v)
        ]
        before, after = (attention(*x, 0.25, None, True, documents)[:, :, 40:130] for x in ((q, k, v), changed))
        assert torch.equal(before, after)
