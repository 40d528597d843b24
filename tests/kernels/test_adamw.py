"""The split master bit for bit, AdamW against torch's in float64, and what narrow moments may and may not lose."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abyssal.kernels import adamw, native
from abyssal.kernels.adamw import BLOCK, CHUNK, EightBit, adamw_, adamw_reference_, merge, split, total_norm

SETTINGS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def bits(x: Tensor) -> list[int]:
    return x.view(torch.int32).tolist()


def floats(*patterns: int) -> Tensor:
    return torch.tensor([struct.unpack("<i", struct.pack("<I", p))[0] for p in patterns], dtype=torch.int32).view(
        torch.float32
    )


class TestSplit:
    @given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
    def test_every_number_comes_back_bit_for_bit(self, patterns):
        x = floats(*patterns)
        weight, low = split(x)
        assert (weight.dtype, low.dtype) == (torch.bfloat16, torch.int16)
        assert bits(merge(weight, low)) == bits(x)

    @pytest.mark.parametrize("sign", [0, 0x80000000])
    @pytest.mark.parametrize(
        "pattern",
        [
            0x00000000,
            0x00000001,  # the smallest subnormal
            0x00007FFF,
            0x00008000,  # half way from 0 to BF16's smallest
            0x007FFFFF,  # the largest subnormal: rounds up to a normal number
            0x3F7FFFFF,  # just below 1: rounds up to the next exponent
            0x3F808000,  # half way, even below
            0x3F818000,  # half way, even above
            0x3FFFFFFF,
            0x7F7FFFFF,  # the largest: its BF16 is infinite, the master is not lost
            0x7F800000,
            0x7FC00000,
            0x7F800001,  # a NaN whose BF16 is none
            0x7FFFFFFF,
        ],
    )
    def test_the_edges(self, sign, pattern):
        x = floats(sign | pattern)
        assert bits(merge(*split(x))) == bits(x)

    @given(st.lists(st.floats(width=32, max_value=2.0**127, min_value=-(2.0**127)), min_size=1, max_size=64))
    def test_the_weight_is_the_nearest(self, numbers):
        x = torch.tensor(numbers, dtype=torch.float32)
        nearest = x.bfloat16().double()  # torch rounds to nearest, ties to even
        got = split(x)[0].double()
        assert torch.equal((got - x.double()).abs(), (nearest - x.double()).abs())
        assert (got.abs() >= nearest.abs()).all()  # differs in ties only, and then upwards

    def test_shapes_strides_and_more_than_one_chunk(self):
        x = torch.randn(3, 2, CHUNK // 4 + 3)
        weight, low = split(x.transpose(0, 2))
        assert weight.is_contiguous()
        assert low.is_contiguous()
        assert torch.equal(merge(weight, low), x.transpose(0, 2))
        part = (slice(None), 1, slice(1, 3))
        assert torch.equal(merge(weight[part], low[part]), x.transpose(0, 2)[part])


def state(kind: str, like: Tensor):
    if kind == "8bit":
        return EightBit.zeros(like), EightBit.zeros(like)
    dtype = {"float32": torch.promote_types(like.dtype, torch.float32), "bfloat16": torch.bfloat16}[kind]
    return torch.zeros(like.shape, dtype=dtype), torch.zeros(like.shape, dtype=dtype)


@pytest.fixture(params=["what fits", "no compiler", "reference"])
def update(request, monkeypatch):
    """adamw_ with the backend that fits; as it is without one (torch's own where all is FP32); and the reference."""
    if request.param == "no compiler":
        monkeypatch.setattr(adamw, "backend", lambda *_: None)
    return adamw_reference_ if request.param == "reference" else adamw_


def numbers(moment) -> Tensor:
    """A moment as FP32 or more."""
    if isinstance(moment, EightBit):
        spread = moment.scales.repeat_interleave(BLOCK)[: moment.values.numel()].view(moment.values.shape)
        return moment.values.float() * spread
    return moment if moment.dtype == torch.float64 else moment.float()


def run(master: Tensor, grads: list[Tensor], kind: str, low: bool, update=adamw_, **changes) -> Tensor:
    """The master weights after an update for each gradient."""
    weight, rest = split(master) if low else (master.clone(), None)
    m, v = state(kind, weight)
    for step, grad in enumerate(grads, start=1):
        update(weight, rest, grad, m, v, step=step, **{**SETTINGS, **changes})
    return merge(weight, rest) if low else weight


def torchs(master: Tensor, grads: list[Tensor], **changes) -> Tensor:
    """The same by torch.optim.AdamW in float64."""
    settings = {**SETTINGS, **changes}
    p = torch.nn.Parameter(master.double())
    optimizer = torch.optim.AdamW(
        [p],
        lr=settings["lr"],
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    for grad in grads:
        p.grad = grad.double()
        optimizer.step()
    return p.detach()


def inputs(count: int, steps: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list]:
    g = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(count, generator=g) * 10.0 ** torch.randint(-6, 2, (count,), generator=g) for _ in range(steps)
    ]
    return torch.randn(count, generator=g), [grad.to(dtype) for grad in grads]


class TestUpdate:
    @pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK + 1, CHUNK + 5])
    @pytest.mark.parametrize("low", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_against_torch_in_float64(self, update, count, low, dtype):
        master, grads = inputs(count, dtype=dtype)
        expected = torchs(master, grads)
        got = run(master, grads, "float32", low, update)
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-7)
        assert (got - master).abs().max() > 0.03

    @given(
        lr=st.floats(1e-5, 0.5),
        beta1=st.floats(0, 0.99),
        beta2=st.floats(0, 0.999),
        eps=st.sampled_from([1e-8, 1e-3, 1.0]),
        weight_decay=st.floats(0, 1),
        seed=st.integers(0, 100),
    )
    def test_every_setting(self, seed, **settings):
        master, grads = inputs(40, seed=seed)
        expected = torchs(master, grads, **settings)
        got = run(master.double(), [g.double() for g in grads], "float32", False, adamw_reference_, **settings)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        for function in (adamw_, adamw_reference_):
            for low in (False, True):
                got = run(master, grads, "float32", low, function, **settings)
                torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)

    def test_small_updates_are_not_lost(self, update):
        """Each is far less than a BF16 weight can show: 1000 of 2^-20 on a weight of 1, whose next one is 1 + 2^-7."""
        grads = [torch.full((4,), -1.0)] * 1000
        got = run(torch.ones(4), grads, "float32", True, update, lr=2**-20, weight_decay=0.0)
        torch.testing.assert_close(got, torch.full((4,), 1 + 1000 * 2**-20), rtol=1e-6, atol=0)

    def test_scale_is_a_factor_of_the_gradient(self, update):
        master, grads = inputs(300)
        expected = torchs(master, [g * 0.125 for g in grads], eps=1e-4)
        for scale in (0.125, torch.tensor(0.125)):
            for low in (False, True):
                given = [g.clone() for g in grads]
                got = run(master, given, "float32", low, update, eps=1e-4, scale=scale)
                torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-7)

    def test_matrices_and_gradients_of_other_strides(self, update):
        master, (grad, *_) = inputs(600)
        m, v = state("float32", master.view(20, 30))
        weight = master.clone().view(20, 30)
        other = grad.view(20, 30).t().contiguous().t()
        assert not other.is_contiguous()
        update(weight, None, other, m, v, step=1, **SETTINGS)
        torch.testing.assert_close(weight.view(-1).double(), torchs(master, [grad]), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("scale", [math.nan, -1.0])
def test_turned_off_by_the_scale(kind, low, scale):
    """What a step on a GPU does once a number was not finite."""
    master, grads = inputs(300)
    weight, rest = split(master) if low else (master.clone(), None)
    m, v = state(kind, weight)
    adamw_reference_(weight, rest, grads[0], m, v, step=1, scale=torch.tensor(1.0), **SETTINGS)
    now = merge(weight, rest) if low else weight.clone()
    moments = numbers(m).clone(), numbers(v).clone()
    for bad in (grads[1], torch.full((300,), math.nan), torch.full((300,), math.inf)):
        adamw_reference_(weight, rest, bad, m, v, step=2, scale=torch.tensor(scale), **SETTINGS)
        assert torch.equal(merge(weight, rest) if low else weight, now)
        # The scales of 8 bits are worked out anew.
        tolerance = 1e-6 if kind == "8bit" else 0
        torch.testing.assert_close((numbers(m), numbers(v)), moments, rtol=tolerance, atol=0)


def test_bfloat16_moments_round_each_step():
    """Against a float64 loop that rounds both moments to BF16 after every step, as the V3 paper keeps them (§3.3.3)."""
    master, grads = inputs(500)
    w = master.double()
    m = v = torch.zeros(500, dtype=torch.float64)
    for step, grad in enumerate((g.double() for g in grads), start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        w = w * (1 - 0.001) - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        m, v = m.bfloat16().double(), v.bfloat16().double()
    got = run(master, grads, "bfloat16", True)
    # FP32 may round to the other neighbour than float64 here and there, which is 2^-8 of one update.
    assert (got.double() - w).abs().max() < 0.01 * 5 * 2**-8
    assert ((got.double() - w).abs() < 1e-6).float().mean() > 0.95


class TestEightBit:
    def room(self, x: Tensor) -> Tensor:
        space = torch.zeros(-(-len(x) // BLOCK) * BLOCK)
        space[: len(x)] = x
        return space

    def through(self, x: Tensor, shift: int = 0, never_zero: bool = False) -> Tensor:
        kept = EightBit.zeros(x)
        kept.write(self.room(x), slice(0, len(x)), shift, never_zero)
        assert torch.equal(kept.read(slice(0, len(x)), torch.full_like(self.room(x), math.nan)), numbers(kept))
        return numbers(kept)

    def test_all_256_patterns_are_read_as_torch_reads_them(self):
        patterns = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        kept = EightBit(patterns, torch.tensor([1.0, 3.0]))
        expected = patterns.float() * torch.tensor([1.0, 3.0]).repeat_interleave(128)
        got = kept.read(slice(0, 256), torch.empty(256))
        finite = expected.isfinite()
        assert finite.sum() == 254
        assert torch.equal(got[finite], expected[finite])

    @given(st.integers(1, 3 * BLOCK), st.integers(0, 50), st.booleans(), st.integers(-20, 30))
    def test_error(self, count, seed, never_zero, exponent):
        """Never more than to the next number on either side: an eighth, or the block's largest / 448 / 2^9."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, generator=g) * 10.0 ** torch.randint(-8, 1, (count,), generator=g) * 10.0**exponent
        x = x.abs() if never_zero else x
        x[::7] = 0
        got = self.through(x, seed, never_zero)
        largest = torch.stack([b.abs().max() for b in x.split(BLOCK)]).repeat_interleave(BLOCK)[:count]
        assert ((got - x).abs() <= torch.maximum(x.abs() / 8, largest / 448 / 2**9) * 1.0001).all()
        assert (got[x == 0] == 0).all()
        if never_zero:
            assert (got[x > 0] > 0).all()

    def test_rounding_is_right_in_the_mean(self):
        x = torch.cat((torch.rand(BLOCK * 50) + 0.01, torch.rand(BLOCK * 50) * 1e-3))
        x[::BLOCK] = 1.0
        mean = torch.stack([self.through(x, shift) for shift in range(400)]).mean(0)
        # An eighth up or down is a standard deviation of at most a sixteenth; the mean of 400 takes it down by 20.
        error = (mean - x) / torch.maximum(x, torch.tensor(2**-6 / 448))
        assert error.abs().max() < 1 / 16 / 20 * 5.5
        assert abs(error.mean()) < 5e-4

    def test_v_falls_when_gradients_stop(self):
        """With rounding to the nearest it would stand still: a step takes 2.5% off the root, numbers lie 6 to 12%
        apart."""
        w = torch.zeros(BLOCK * 8)
        m, v = state("8bit", w)
        g = torch.rand(BLOCK * 8, generator=torch.Generator().manual_seed(0)) + 0.1
        adamw_reference_(w, None, g, m, v, step=1, **{**SETTINGS, "beta2": 0.0})
        first = numbers(v).clone()
        for step in range(2, 62):
            adamw_reference_(w, None, torch.zeros_like(g), m, v, step=step, **SETTINGS)
        ratio = numbers(v) / first
        assert ratio.mean().item() == pytest.approx(0.95**30, rel=0.03)  # of the root
        assert (ratio < 0.6).all()

    def test_no_update_is_larger_than_with_exact_moments_allow(self):
        """Blocks in which gradients differ by a factor of 1e10: what is too small for 8 bits moves less, never more."""
        g = torch.Generator().manual_seed(1)
        size = 10.0 ** torch.linspace(-10, 0, BLOCK * 4)[torch.randperm(BLOCK * 4, generator=g)]
        grads = [torch.randn(BLOCK * 4, generator=g) * size for _ in range(20)]
        w, rest = torch.zeros(BLOCK * 4), None
        m, v = state("8bit", w)
        for step, grad in enumerate(grads, start=1):
            before = w.clone()
            adamw_reference_(w, rest, grad, m, v, step=step, **{**SETTINGS, "weight_decay": 0.0})
            # |m̂| / √v̂ ≤ 1 for the first step and less than (1 − β1) / √(1 − β2) · … ≈ 2.3 later, by Cauchy-Schwarz
            assert (w - before).abs().max() <= 0.01 * 2.6


@pytest.mark.parametrize("compiled", [True, False])
def test_total_norm(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "supports", lambda *_: False)

    @given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(0, 20))
    def check(sizes, seed):
        g = torch.Generator().manual_seed(seed)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            tensors = [torch.randn(n, generator=g).to(dtype) for n in sizes]
            expected = math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
            assert total_norm(tensors).item() == pytest.approx(expected, rel=1e-6)

    check()
    mixed = [torch.full((3,), 2.0), torch.full((CHUNK + 1,), 0.5, dtype=torch.bfloat16)]
    assert total_norm(mixed).item() == pytest.approx(math.sqrt(12 + (CHUNK + 1) / 4), rel=1e-6)
    assert total_norm([torch.ones(2), torch.tensor([math.inf])]).item() == math.inf
    assert math.isnan(total_norm([torch.ones(2), torch.tensor([math.nan])]).item())


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that an operation made."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "8bit"])
def test_no_copy_of_a_large_tensor(kind, monkeypatch):
    count = 20 * CHUNK + 11
    master = torch.randn(count)
    weight, low = split(master)
    m, v = state(kind, weight)
    parts = [t for x in (m, v) for t in ((x.values, x.scales) if isinstance(x, EightBit) else (x,))]
    grad = torch.randn(count).bfloat16()
    adamw._noise(weight.device)
    monkeypatch.setattr(native, "supports", lambda *_: False)
    with Largest([weight, low, grad, *parts]) as seen:
        adamw_reference_(weight, low, grad, m, v, step=1, **SETTINGS)
        total_norm([grad])
    assert seen.bytes <= 4 * 4 * CHUNK
    with Largest([master, weight, low]) as seen:
        split(master)
    assert seen.bytes <= 2 * count


@pytest.mark.parametrize("native_kernel", [True, False])
def test_a_scale_that_is_no_number_changes_nothing(native_kernel: bool, monkeypatch: pytest.MonkeyPatch):
    if not native_kernel:
        monkeypatch.setattr("abyssal.kernels.native.library", lambda: None)
    for scale in (math.nan, -1.0):
        weight, m, v = torch.ones(5), torch.ones(5), torch.ones(5)
        adamw_(weight, None, torch.ones(5), m, v, **HYPER_FOR_SCALE, scale=scale)
        assert all(torch.equal(x, torch.ones(5)) for x in (weight, m, v))
    weight, m, v = torch.ones(5), torch.ones(5), torch.ones(5)
    adamw_(weight, None, torch.ones(5), m, v, **HYPER_FOR_SCALE, scale=0.0)
    torch.testing.assert_close(m, torch.full((5,), 0.9))


HYPER_FOR_SCALE = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 2}


def test_a_bfloat16_weight_without_the_rest_of_its_number():
    """No kernel may take it for a split one."""
    weight = torch.ones(5, dtype=torch.bfloat16)
    adamw_(weight, None, torch.ones_like(weight), torch.zeros(5), torch.zeros(5), **HYPER_FOR_SCALE)
    assert weight.isfinite().all()
