"""The small operations of a decoding step, compiled, against plain accounts of them; and the tape that plays them."""

import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_router import moes
from torch import Tensor

from abyssal.config import MoEConfig
from abyssal.kernels import decode, native
from abyssal.kernels.heads import turn_rows
from abyssal.kernels.tape import NotOnTape, record, recording
from abyssal.model.layers import RMSNorm
from abyssal.model.router import Router

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g).to(dtype)


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact, rtol=ROUNDING[ours.dtype], atol=ROUNDING[ours.dtype])


def is_compiled(call: object) -> bool:
    """Whether all of ``call`` is compiled code's."""
    try:
        with record() as tape:
            call()  # type: ignore[operator]
    except NotOnTape:
        return False
    return len(tape) > 0


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 5, 33), (2, 3, 100), (7, 16)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype):
    x, norm = normal(*shape, dtype=dtype), RMSNorm(shape[-1], 1e-5)
    norm.weight.copy_(normal(shape[-1]))
    norm.to(weight_dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    close(norm(x), exact)
    assert is_compiled(lambda: norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_and_join(dtype: torch.dtype):
    a, b, row = normal(3, 5, 7, dtype=dtype), normal(3, 5, 7, seed=1, dtype=dtype), normal(7, dtype=dtype)
    for other in (b, row):
        assert torch.equal(decode.add(a, other), a + other)
        assert is_compiled(lambda other=other: decode.add(a, other))
    assert torch.equal(decode.join(a, b), torch.cat((a, b), dim=-1))
    assert is_compiled(lambda: decode.join(a, b))


def test_add_of_other_shapes_is_pytorchs():
    a = normal(4, 6)
    for b in (normal(4, 1), normal(1, 6), normal(4, 6).double(), normal(6, 4).t()):
        assert torch.equal(decode.add(a, b), a + b)


@settings(max_examples=150)
@given(
    moe=moes(),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    weight=st.sampled_from(DTYPES),
    shift=st.sampled_from([0.0, -0.5, -3.0]),
)
def test_route(moe: MoEConfig, rows: int, seed: int, dtype: torch.dtype, weight: torch.dtype, shift: float):
    """Against the router's own account in FP64 PyTorch, which other tests hold against plain loops."""
    g = torch.Generator().manual_seed(seed)
    router = Router(24, moe)
    router.weight.copy_(torch.randn(router.weight.shape, generator=g))
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.copy_(torch.randn(moe.n_routed_experts, generator=g) * 0.4 + shift)
    router.to(weight)
    x = torch.randn(1, rows, 24, generator=g).to(dtype)
    exact = Router(24, moe).double()
    exact.weight.copy_(router.weight)
    if router.e_score_correction_bias is not None:
        exact.e_score_correction_bias = router.e_score_correction_bias.double()
    expected = exact(x.double())
    # Two that stand closer than FP32 tells apart may come in either order; so may two groups.
    for nudge in (1e-5, -1e-5):
        wiggle = nudge * torch.linspace(-1, 1, moe.n_routed_experts, dtype=torch.float64)
        assume(torch.equal(exact.select(expected.scores + wiggle), expected.indices))
    found = router(x)
    assert is_compiled(lambda: router(x))
    assert found.indices.dtype == torch.int64
    assert found.weights.dtype == found.scores.dtype == torch.float32
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.weights.double(), expected.weights, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(found.scores.double(), expected.scores, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_route_of_broken_numbers_names_experts_that_exist(number: float):
    moe = MoEConfig(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=2, n_group=4, topk_group=2)
    router = Router(4, moe)
    router.weight.copy_(normal(8, 4))
    x = torch.full((1, 2, 4), number)
    for row in router(x).indices[0].tolist():
        assert len(set(row)) == 3
        assert all(0 <= expert < 8 for expert in row)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_latents(dtype: torch.dtype, weight_dtype: torch.dtype, interleaved: bool):
    latent, rope, rows, page = 20, 6, 3, 4
    kv, weight = normal(rows, latent + rope, dtype=dtype), normal(latent, dtype=weight_dtype)
    angles = normal(1, rows, 1, rope // 2)
    pool, before = normal(5, page, latent + rope, dtype=dtype), normal(5, page, latent + rope, dtype=dtype)
    slots = torch.tensor([7, 0, 18])
    arguments = (kv, weight, 1e-6, (angles.cos(), angles.sin()), interleaved, slots)
    decode.write_latents(*arguments, pool)
    assert is_compiled(lambda: decode.write_latents(*arguments, pool))
    exact = before.double().flatten(0, 1)
    c, angles = kv.double()[:, :latent], angles[0, :, 0].double()
    exact[slots, :latent] = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    keys = kv.double()[:, latent:].unflatten(1, (-1, 2) if interleaved else (2, -1))
    turned = torch.view_as_complex((keys if interleaved else keys.mT).contiguous()) * torch.polar(
        angles * 0 + 1, angles
    )
    turned = torch.view_as_real(turned)
    exact[slots, latent:] = (turned if interleaved else turned.mT).flatten(1)
    close(pool.flatten(0, 1), exact)
    touched = torch.zeros(20, dtype=torch.bool).index_fill(0, slots, True)
    assert torch.equal(pool.flatten(0, 1)[~touched], before.flatten(0, 1)[~touched])


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_rows(dtype: torch.dtype):
    x, pool, slots = normal(3, 2, 5, dtype=dtype), torch.zeros(4, 2, 2, 5, dtype=dtype), torch.tensor([6, 1, 3])
    decode.write_rows(x, slots, pool)
    assert torch.equal(pool.flatten(0, 1)[slots], x)
    assert pool.flatten(0, 1)[[0, 2, 4, 5, 7]].abs().sum() == 0
    assert is_compiled(lambda: decode.write_rows(x, slots, pool))


@pytest.mark.parametrize("slot", [-1, 8, 2**40])
def test_a_slot_that_is_not_there(slot: int):
    pool, slots = torch.zeros(4, 2, 6), torch.tensor([1, slot])
    with pytest.raises(IndexError, match="outside 0 to 7"):
        decode.write_rows(torch.ones(2, 6), slots, pool)
    tables = (torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1))
    with pytest.raises(IndexError, match="outside 0 to 7"):
        decode.write_latents(torch.ones(2, 6), torch.ones(4), 1e-6, tables, True, slots, pool)
    assert pool.abs().sum() == 0


ROW, SQUARE = normal(16), normal(16, 16)


class TestTape:
    def chain(self, x: Tensor, weight: Tensor) -> Tensor:
        y = decode.norm(x, weight, 1e-6)
        return decode.add(decode.Linear(SQUARE)(y), x)

    def test_it_computes_anew_from_what_lies_in_the_inputs(self):
        x, weight = normal(2, 16), normal(16)
        with record() as tape:
            out = self.chain(x, weight)
        assert len(tape) == 3
        for seed in (3, 4):
            fresh = normal(2, 16, seed=seed)
            x.copy_(fresh)
            native.play(tape)
            assert torch.equal(out, self.chain(fresh, weight))

    def test_what_it_needs_lives_on(self):
        """Everything between, and a linear layer's own structures, were made inside and are nobody else's."""
        x = normal(2, 16)
        with record() as tape:
            out = self.chain(x, ROW.view(2, 8).view(16))
        expected = out.clone()
        _ = [torch.full((2, 16), torch.nan) for _ in range(100)]
        out.zero_()
        native.play(tape)
        assert torch.equal(out, expected)

    def test_pytorchs_own_work_is_refused(self):
        x = normal(2, 16)
        refused = [
            lambda: x + 1,
            lambda: x.clone(),
            lambda: x.t().contiguous(),
            lambda: x.double(),
            lambda: torch.zeros(2),
            lambda: x.unsqueeze(1).expand(2, 2, 16).reshape(4, 16),
        ]
        for number, work in enumerate(refused):
            with pytest.raises(NotOnTape), record():
                work()
            assert recording() is None, number
        with record() as tape:
            decode.norm(x.view(1, 2, 16)[:, :1].contiguous(), ROW, 1e-6)
        assert len(tape) == 1

    def test_compiled_functions_that_are_not_made_for_it_are_refused(self):
        x = normal(2, 16)
        with pytest.raises(NotOnTape, match="swiglu_f"), record():
            native.swiglu(x, None)

    def test_an_index_that_went_out_of_bounds_since(self):
        slots, pool, x = torch.tensor([1]), torch.zeros(2, 2, 4), normal(1, 4)
        with record() as tape:
            decode.write_rows(x, slots, pool)
        slots.fill_(9)
        with pytest.raises(IndexError, match="call 1 of 1"):
            native.play(tape)

    def test_other_threads_work_is_not_on_it(self):
        import threading

        x, weight = normal(2, 16), normal(16)
        with record() as tape:
            other = threading.Thread(target=lambda: decode.norm(x, weight, 1e-6))
            other.start()
            other.join()
        assert len(tape) == 0


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_turn_rows(dtype: torch.dtype, interleaved: bool):
    x, angles = normal(3, 2, 10, dtype=dtype), normal(1, 3, 1, 3)
    tables = (
        angles.cos().to(torch.promote_types(dtype, torch.float32)),
        angles.sin().to(torch.promote_types(dtype, torch.float32)),
    )
    out = turn_rows(x, tables, interleaved).double()
    assert torch.equal(out[..., :4], x[..., :4].double())
    a, b = (x[..., 4::2], x[..., 5::2]) if interleaved else (x[..., 4:7], x[..., 7:])
    turned = torch.complex(a.double(), b.double()) * torch.polar(torch.ones(3, 1, 3).double(), angles[0].double())
    ours = (out[..., 4::2], out[..., 5::2]) if interleaved else (out[..., 4:7], out[..., 7:])
    torch.testing.assert_close(torch.complex(*ours), turned, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_without_compiled_code_nothing_is_recorded():
    program = (
        "import torch\nfrom abyssal.kernels import decode, native\nfrom abyssal.kernels.tape import NotOnTape, record\n"
        "assert native.library() is None\n"
        "try:\n    with torch.no_grad(), record():\n        decode.norm(torch.ones(1, 4), torch.ones(4), 1e-6)\n"
        "except NotOnTape:\n    print('refused')\n"
    )
    import os

    environment = os.environ | {"ABYSSAL_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
