"""Decoding's operations against float64, in every dtype and way of storing weights, compiled and plain."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import decode, native
from abyssal.kernels.packed import GROUP, Kind, dequantize, linear_reference, quantize

DTYPES = [torch.float32, torch.bfloat16]
KINDS: list[Kind] = ["int8", "int4"]
compiled = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float32).to(dtype)


def near(ours: Tensor, exact: Tensor, size: Tensor | None = None, times: float = 1.0) -> None:
    """As near as the dtype of the result allows, over the whole tensor; ``size`` is what it would be if nothing that is
    summed cancelled out (None: little does)."""
    allowed = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[ours.dtype] * times
    assert ours.shape == exact.shape
    assert (ours.double() - exact).norm() <= allowed * (exact if size is None else size).norm() + 1e-30


def absolute(x: Tensor) -> Tensor:
    return x.double().abs()


def experts_size(x: Tensor, indices: Tensor, by: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What the experts' result would be if no sum of the second product cancelled out."""
    x, by, gate_up, down = (tensor.double() for tensor in (x, by, gate_up, down))
    out = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for k, expert in enumerate(indices[n].tolist()):
            gate, up = (gate_up[expert].abs() @ x[n].abs()).chunk(2)
            out[n] += down[expert].abs() @ (gate * up) * by[n, k]
    return out


def same_by_threads(function: Callable[[], Tensor]) -> Tensor:
    """The result, having seen that compiled code gives the same with 1 and 3 threads, and a second time."""
    if native.library() is None:  # PyTorch promises no such thing
        return function()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].nan_to_num(12345.0), other.nan_to_num(12345.0))
    return results[0]


rows = st.integers(1, 33)
sizes = st.integers(1, 200)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


@settings(max_examples=80)
@given(n=rows, inputs=sizes, outputs=sizes, x_dtype=dtypes, w_dtype=dtypes, bias=st.booleans(), seed=seeds)
def test_linear(n: int, inputs: int, outputs: int, x_dtype: torch.dtype, w_dtype: torch.dtype, bias: bool, seed: int):
    x, w = normal(n, inputs, seed=seed, dtype=x_dtype), normal(outputs, inputs, seed=seed + 1, dtype=w_dtype)
    b = normal(outputs, seed=seed, dtype=x_dtype) if bias else None
    exact = x.double() @ w.double().t()
    size = x.double().abs() @ w.double().abs().t()
    near(decode.Linear(w)(x) if n > 32 else same_by_threads(lambda: decode.Linear(w)(x)), exact, size)
    if b is not None:
        near(decode.add(decode.Linear(w)(x), b), exact + b.double(), size + b.double().abs())


@compiled
@pytest.mark.parametrize("inputs", [512, 1024, 1000, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 16, 17, 32])
def test_large_linear(n: int, dtype: torch.dtype, inputs: int):
    """Sizes that threads share, and from five rows on the tile unit where there is one."""
    x, w = normal(n, inputs, dtype=dtype), normal(130, inputs, dtype=dtype)
    near(same_by_threads(lambda: decode.Linear(w)(x)), x.double() @ w.double().t())


def close_to_a_tie(x: Tensor) -> bool:
    """Whether one of the activations lies so near the middle between two int8 numbers that the last bit of its scale
    decides which one it becomes."""
    groups = F.pad(x.double(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    numbers = groups * 127 / groups.abs().amax(-1, keepdim=True)
    return bool(((numbers - numbers.floor() - 0.5).abs() < 2e-5).any())


@given(
    n=st.integers(1, 9), inputs=st.integers(1, 700), outputs=st.integers(1, 40), kind=st.sampled_from(KINDS), seed=seeds
)
def test_packed_linear(n: int, inputs: int, outputs: int, kind: Kind, seed: int):
    x, w = normal(n, inputs, seed=seed), normal(outputs, inputs, seed=seed)
    assume(not close_to_a_tie(x))
    p = quantize(w, kind)
    ours = same_by_threads(lambda: decode.Linear(p)(x))
    product = x.double() @ dequantize(p, torch.float32).double().t()
    if native.library() is not None:
        total = x.double().abs() @ dequantize(p, torch.float32).double().abs().t()
        for given, out in ((x, ours), (x.bfloat16(), decode.Linear(p)(x.bfloat16()))):
            if n > 4 and native.has_tiles():  # both are rounded to BF16
                exact = given.bfloat16().double() @ dequantize(p, torch.bfloat16).double().t()
            else:
                exact = linear_reference(given, p)
            near(out, exact, total)
    # Rounding activations costs less than a hundredth of the size of what is summed.
    size = (x.double().norm(dim=-1, keepdim=True) * dequantize(p, torch.float32).double().norm(dim=-1)).norm()
    assert (ours.double() - product).norm() < 0.01 * size


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_of_a_packed_matrix(kind: Kind):
    x, p = normal(70, 96), quantize(normal(40, 96), kind)
    near(decode.Linear(p)(x), x.double() @ dequantize(p, torch.float32).double().t(), times=2)


def chosen(n: int, k: int, experts: int, way: str, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if way == "same":  # one expert by all, most by none
        return torch.arange(k).expand(n, k).contiguous()
    return torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(n)])


@settings(max_examples=60)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 4),
    more=st.integers(0, 4),
    hidden=st.integers(1, 100),
    width=st.integers(1, 100),
    way=st.sampled_from(["same", "random"]),
    dtype=dtypes,
    stored=st.sampled_from(["dense", "int8", "int4", "mixed"]),
    shared=st.integers(0, 70),
    seed=seeds,
)
def test_experts(
    n: int,
    k: int,
    more: int,
    hidden: int,
    width: int,
    way: str,
    dtype: torch.dtype,
    stored: str,
    shared: int,
    seed: int,
):
    experts = k + more
    x, indices = normal(n, hidden, seed=seed, dtype=dtype), chosen(n, k, experts, way, seed)
    by = torch.rand(n, k, generator=torch.Generator().manual_seed(seed))
    gate_up = normal(experts, 2 * width, hidden, seed=seed, dtype=dtype) / hidden**0.5
    down = normal(experts, hidden, width, seed=seed + 1, dtype=dtype) / width**0.5
    alone = [
        normal(*shape, seed=seed, dtype=dtype) / 8 for shape in ((shared, hidden), (shared, hidden), (hidden, shared))
    ]
    if stored in KINDS or stored == "mixed":
        first, second = (quantize(w, "int4" if stored == "int4" else "int8") for w in (gate_up, down))
        gate_up, down = dequantize(first, torch.float32), dequantize(second, torch.float32)
    else:
        first, second = gate_up, down
    third = [quantize(w, "int8") for w in alone] if stored == "int8" and shared else alone
    exact = decode.experts_reference(x.double(), indices, by.double(), gate_up.double(), down.double())
    size = experts_size(x, indices, by, gate_up, down)
    if shared:
        exact = exact + decode.mlp_reference(x.double(), *(w.double() for w in alone))
        every = torch.zeros(n, 1, dtype=torch.int64)
        size = size + experts_size(x, every, every + 1.0, torch.cat(alone[:2])[None], alone[2][None])
    layer = decode.Experts(first, second, (third[0], third[1], third[2]) if shared else None)
    ours = same_by_threads(lambda: layer(x, indices, by))
    # With packed weights activations are rounded to int8, twice, and here the shared expert's weights too.
    near(ours, exact, size, times=1 if stored == "dense" else 2e4 if dtype == torch.float32 else 4)


@compiled
@pytest.mark.parametrize("n", [1, 6, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_experts_and_mlp(n: int, dtype: torch.dtype):
    """Sizes that threads share; with six tokens of one expert, the tile unit."""
    gate_up, down = (normal(*shape, dtype=dtype) / 16 for shape in ((5, 2 * 96, 256), (5, 256, 96)))
    x, by = normal(n, 256, dtype=dtype), torch.rand(n, 2)
    for way in ("same", "random"):
        indices = chosen(n, 2, 5, way, n)
        exact = decode.experts_reference(x.double(), indices, by.double(), gate_up.double(), down.double())
        layer = decode.Experts(gate_up, down)
        near(same_by_threads(lambda layer=layer, indices=indices: layer(x, indices, by)), exact)
        near(layer(x, indices.int(), by.double()), exact)
    gate, up, back = gate_up[0, :96], gate_up[0, 96:], down[0]
    exact = decode.mlp_reference(x.double(), gate.double(), up.double(), back.double())
    near(same_by_threads(lambda: decode.MLP(gate, up, back)(x)), exact)


@pytest.mark.parametrize("packed", [False, True])
def test_an_expert_that_is_not_there(packed: bool):
    gate_up, down = normal(4, 16, 32), normal(4, 32, 8)
    layer = decode.Experts(*((quantize(gate_up, "int8"), quantize(down, "int8")) if packed else (gate_up, down)))
    for n in (1, 300):
        for wrong in (-1, 4, 2**40):
            with pytest.raises((IndexError, RuntimeError)):
                layer(normal(n, 32), torch.full((n, 2), wrong), torch.ones(n, 2))


@settings(max_examples=40)
@given(
    n=st.integers(1, 9),
    heads=st.integers(1, 5),
    nope=st.integers(1, 40),
    rope=st.integers(0, 20),
    value=st.integers(1, 40),
    latent=st.integers(1, 300),
    dtype=dtypes,
    w_dtype=dtypes,
    seed=seeds,
)
def test_absorb_and_expand(
    n: int,
    heads: int,
    nope: int,
    rope: int,
    value: int,
    latent: int,
    dtype: torch.dtype,
    w_dtype: torch.dtype,
    seed: int,
):
    q, o = normal(n, heads, nope + rope, seed=seed, dtype=dtype), normal(n, heads, latent, seed=seed, dtype=dtype)
    kv_b = normal(heads * (nope + value), latent, seed=seed, dtype=w_dtype)
    into = same_by_threads(lambda: decode.absorb(q, kv_b, nope, value))
    near(into, *(decode.absorb_reference(f(q), f(kv_b), nope, value) for f in (Tensor.double, absolute)))
    assert torch.equal(into[..., latent:], q[..., nope:])
    back = same_by_threads(lambda: decode.expand(o, kv_b, nope, value))
    near(back, *(decode.expand_reference(f(o), f(kv_b), nope, value) for f in (Tensor.double, absolute)))


def paged(n: int, page: int, longest: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Block table, lengths and number of pages; pages are scattered over the pool, unused entries are none."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (n,), generator=g)
    most = -(-longest // page)
    order = torch.randperm(n * most + 1, generator=g)
    table = torch.full((n, most), -1)
    for i, length in enumerate(lengths.tolist()):
        used = -(-length // page)
        table[i, :used] = order[i * most : i * most + used]
    return table.int(), lengths.int(), n * most + 1


def attended(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result in float64, and its size if values did not cancel out."""
    q, k, v = q.double(), k.double(), v.double()
    both = (decode.paged_attention_reference(q, k, x, table, lengths, scale) for x in (v, v.abs()))
    return next(both), next(both)


@settings(max_examples=60)
@given(
    n=st.integers(1, 4),
    heads=st.integers(1, 33),
    latent=st.sampled_from([1, 7, 32, 64, 96, 100]),
    rope=st.sampled_from([0, 2, 16, 32, 5]),
    page=st.sampled_from([1, 3, 16, 64]),
    longest=st.integers(1, 200),
    dtype=dtypes,
    scale=st.sampled_from([0.05, 0.3, 2.0]),
    seed=seeds,
)
def test_latent_attention(
    n: int, heads: int, latent: int, rope: int, page: int, longest: int, dtype: torch.dtype, scale: float, seed: int
):
    table, lengths, pages = paged(n, page, longest, seed)
    q = normal(n, heads, latent + rope, seed=seed, dtype=dtype)
    pool = normal(pages, page, latent + rope, seed=seed, dtype=dtype)
    exact = attended(q, pool.unsqueeze(2), pool.unsqueeze(2)[..., :latent], table, lengths, scale)
    # FP32 scores are as exact as they are large, and their error is a factor of what exp gives.
    times = 3 * max(1.0, 5 * scale) if dtype == torch.float32 else 3
    near(same_by_threads(lambda: decode.latent_attention(q, pool, table, lengths, scale, latent)), *exact, times=times)


@settings(max_examples=60)
@given(
    n=st.integers(1, 4),
    shared=st.integers(1, 3),
    group=st.integers(1, 4),
    size=st.integers(1, 80),
    width=st.integers(1, 140),
    page=st.sampled_from([1, 3, 16]),
    longest=st.integers(1, 150),
    dtype=dtypes,
    seed=seeds,
)
def test_paged_attention(
    n: int, shared: int, group: int, size: int, width: int, page: int, longest: int, dtype: torch.dtype, seed: int
):
    table, lengths, pages = paged(n, page, longest, seed)
    q = normal(n, shared * group, size, seed=seed, dtype=dtype)
    keys, values = (normal(pages, page, shared, s, seed=seed, dtype=dtype) for s in (size, width))
    exact = attended(q, keys, values, table, lengths, 0.3)
    near(same_by_threads(lambda: decode.paged_attention(q, keys, values, table, lengths, 0.3)), *exact, times=3)
    near(decode.paged_attention_plain(q, keys, values, table.long(), lengths.long(), 0.3), *exact, times=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_sequence(dtype: torch.dtype):
    """Several tasks for one sequence, each with several blocks of keys and a maximum that moves."""
    table, lengths = torch.randperm(70).int().view(1, 70), torch.tensor([1111])
    q, pool = (
        normal(1, 20, 96, dtype=dtype),
        normal(70, 16, 96, dtype=dtype) * torch.linspace(0.1, 2, 16)[:, None].to(dtype),
    )
    exact = attended(q, pool.unsqueeze(2), pool.unsqueeze(2)[..., :64], table, lengths, 0.2)
    near(same_by_threads(lambda: decode.latent_attention(q, pool, table, lengths, 0.2, 64)), *exact, times=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_that_are_not_there(dtype: torch.dtype):
    q, pool = normal(2, 4, 40, dtype=dtype), normal(5, 8, 40, dtype=dtype)
    for table, lengths in (([[0, 5], [1, 2]], [9, 9]), ([[0, 1], [-1, 2]], [9, 9]), ([[0, 1], [1, 2]], [9, 17])):
        for function in (
            lambda t, n: decode.latent_attention(q, pool, t, n, 0.1, 32),
            lambda t, n: decode.paged_attention_plain(q, pool[:, :, None], pool[:, :, None], t, n, 0.1),
        ):
            with pytest.raises(IndexError, match="page"):
                function(torch.tensor(table).int(), torch.tensor(lengths).int())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_not_lost(dtype: torch.dtype, bad: float):
    """And stays in its own row."""
    for n in (3, 6):
        x, w = normal(n, 64, dtype=dtype), normal(40, 64, dtype=dtype)
        x[1, 5] = bad
        spoiled = torch.arange(n) == 1
        gate_up, down = normal(2, 32, 64, dtype=dtype), normal(2, 64, 16, dtype=dtype)
        results = [decode.Linear(w)(x), decode.Linear(quantize(w, "int8"))(x), decode.Linear(quantize(w, "int4"))(x)]
        results.append(decode.MLP(gate_up[0, :16], gate_up[0, 16:], down[0])(x))
        results.append(decode.Experts(gate_up, down)(x, torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1)))
        for out in results:
            assert not out[spoiled].isfinite().any()
            assert out[~spoiled].isfinite().all()
    q, pool = normal(2, 4, 64, dtype=dtype), normal(4, 8, 64, dtype=dtype)
    pool[1, 3, 2] = bad
    table, lengths = torch.tensor([[0, 1], [2, 3]]).int(), torch.tensor([16, 16])
    for out in (
        decode.latent_attention(q, pool, table, lengths, 0.1, 32),
        decode.paged_attention(q[..., :16], *(pool.view(4, 8, 4, 16),) * 2, table, lengths, 0.1),
    ):
        assert not out[0, 0].isfinite().all()
        assert out[1].isfinite().all()


def test_negative_zero_and_zero():
    x = torch.tensor([[-0.0, 0.0]])
    assert decode.Linear(torch.ones(3, 2))(x).eq(0).all()
    assert decode.Linear(quantize(torch.ones(3, 2), "int8"))(x).eq(0).all()
    assert (
        decode.Experts(torch.ones(1, 2, 2), torch.ones(1, 2, 1))(x, torch.zeros(1, 1).long(), torch.ones(1, 1))
        .eq(0)
        .all()
    )


def test_gradients_take_the_plain_path():
    with torch.enable_grad():
        x, w = normal(3, 16), normal(8, 16).requires_grad_()
        decode.Linear(w)(x).sum().backward()
        assert torch.equal(w.grad, x.sum(0).expand(8, 16))
        x.requires_grad_()
        decode.MLP(w.detach(), w.detach(), w.detach().t().contiguous())(x).sum().backward()
        assert x.grad is not None
        q = normal(2, 4, 24).requires_grad_()
        kv_b = normal(4 * 20, 32)
        decode.expand(decode.absorb(q, kv_b, 16, 4)[..., :32], kv_b, 16, 4).sum().backward()
        pool, table = normal(3, 8, 24), torch.tensor([[0, 1], [2, 1]]).int()
        decode.latent_attention(q, pool, table, torch.tensor([9, 4]), 0.1, 16).sum().backward()
        assert q.grad is not None


def test_odd_tensors_are_handled():
    """Not contiguous, other dtypes, leading dimensions, no rows."""
    w = normal(24, 20)
    for x in (normal(20, 3).t(), normal(2, 3, 20), normal(20), normal(4, 20).double(), normal(0, 20)):
        layer = decode.Linear(w.to(x.dtype))
        torch.testing.assert_close(layer(x), x @ w.to(x.dtype).t())
    torch.testing.assert_close(decode.Linear(normal(20, 24).t())(x := normal(2, 20)), x @ normal(20, 24))
    for wrong in (normal(3, 21), normal(2, 10), normal(1, 40)):
        with pytest.raises(RuntimeError):
            decode.Linear(w)(wrong)
    with torch.autocast("cpu", torch.bfloat16):
        assert decode.Linear(w)(normal(2, 20)).dtype == torch.bfloat16


def test_shapes_that_do_not_fit_are_refused():
    """Compiled code would read what is not there."""
    gate_up, down, by, chosen = normal(4, 16, 32), normal(4, 32, 8), torch.ones(2, 3), torch.zeros(2, 3).long()
    layer, q, kv_b, pool = decode.Experts(gate_up, down), normal(2, 4, 40), normal(4 * 20, 24), normal(5, 8, 40)
    table, lengths, keys = torch.zeros(2, 2).int(), torch.tensor([3, 4]), normal(5, 8, 2, 40)
    refused: list[Callable[[], object]] = [
        lambda: layer(normal(2, 31), chosen, by),
        lambda: layer(normal(3, 32), chosen, by),
        lambda: layer(normal(2, 32), chosen, by[:, :2]),
        lambda: decode.Experts(gate_up, down[:3]),
        lambda: decode.Experts(gate_up, down, (normal(8, 32), normal(8, 32), normal(31, 8))),
        lambda: decode.MLP(normal(8, 32), normal(7, 32), normal(32, 8)),
        lambda: decode.MLP(normal(8, 32), normal(8, 32), normal(32, 8))(normal(2, 33)),
        lambda: decode.absorb(q, kv_b, 16, 5),
        lambda: decode.absorb(q[..., :10], kv_b, 16, 4),
        lambda: decode.expand(normal(2, 4, 25), kv_b, 16, 4),
        lambda: decode.latent_attention(q[..., 1:], pool, table, lengths, 0.1, 8),
        lambda: decode.latent_attention(q, pool, table[:1], lengths, 0.1, 8),
        lambda: decode.latent_attention(q, pool, table, lengths[:1], 0.1, 8),
        lambda: decode.paged_attention(q[..., 1:], keys, keys, table, lengths, 0.1),
        lambda: decode.paged_attention(q[:, :3], keys, keys, table, lengths, 0.1),
        lambda: decode.paged_attention(q, keys, keys[:4], table, lengths, 0.1),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=":"):
            call()
