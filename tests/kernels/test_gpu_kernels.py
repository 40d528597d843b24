"""The Triton kernels against plain PyTorch in float64, sorting against a loop, AdamW against torch's.

On a machine with a GPU the tests run on it. Elsewhere one test runs this file once more in a process of its own under
Triton's interpreter, which has to be switched on before triton is first imported, and other tests may have imported it
in this process already. Without triton there is nothing to test.

What the interpreter can't show, that the kernels compile, is tested by compiling them for a Hopper GPU (which need not
be there) with the arguments that the functions themselves pass.

Tolerances: FP32 1e-5 of the largest number. BF16 twice the error that plain BF16 computation makes on the same numbers
and half a step of it (2^-8); the interpreter cuts FP32 off where a GPU rounds it, so there a whole step.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import gpu
from abyssal.kernels.grouped import plan_on_device

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
THERE = importlib.util.find_spec("triton") is not None
HERE = THERE and (INTERPRETED or torch.cuda.is_available())
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ROOT = Path(__file__).parents[2]
BF16, FP32 = torch.bfloat16, torch.float32
IGNORED = -100
STEP = 2.0**-7 if INTERPRETED else 2.0**-8


@pytest.mark.skipif(not THERE, reason="triton is not installed")
@pytest.mark.skipif(HERE, reason="the tests run in this process")
def test_under_the_interpreter():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", __file__],
        env=environment | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-1000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(not THERE, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled here")
def test_everything_compiles_for_hopper():
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    if result.returncode == 77:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    names = {"swiglu", "swiglu_backward", "gather_rows", "sum_rows", "rms_norm", "rms_norm_backward"}
    assert {name for name, *_ in lines} == names | {"cross_entropy", "adamw"}
    for name, local, wide in lines:
        assert local == "0", name  # registers suffice
        assert int(wide) >= 2, name  # whole tiles are loaded and stored 16 bytes at a time


@pytest.mark.skipif(INTERPRETED, reason="here triton takes CPU tensors")
def test_cpu_tensors_are_not_for_us():
    assert not gpu.supports(torch.zeros(1))


def test_without_triton():
    """The module can be imported, and says no."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from abyssal.kernels import gpu\n"
        "device = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
        "assert not gpu.supports(torch.zeros(1, device=device))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def normal(*shape: int, seed: int, std: float = 1.0) -> Tensor:
    """Float64 on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std


def close(got: Tensor, exact: Tensor, plain: Tensor | None = None, scale: Tensor | None = None) -> None:
    """``got`` is ``exact`` (float64) up to the tolerances above; ``plain`` is what plain PyTorch makes of it in the
    dtype of ``got``; ``scale`` has the size of what was added up, where the sum may be small."""
    assert got.shape == exact.shape
    if got.numel() == 0:
        return
    largest = (exact if scale is None else scale).abs().max()
    error = (got.cpu().double() - exact).abs().max()
    if got.dtype == FP32:
        assert error <= 1e-5 * largest
    else:
        assert plain is not None
        assert error <= 2 * (plain.double() - exact).abs().max() + STEP * largest


def gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Value and gradients of ``inputs`` by autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, grad)


def apart(x: Tensor) -> Tensor:
    """The same rows with other numbers between them."""
    return F.pad(x, (3, 13), value=float("nan"))[:, 3 : 3 + x.shape[1]]


def counted(*most: int) -> Any:
    return st.tuples(*(st.one_of(st.integers(1, 3), st.integers(1, m)) for m in most))


seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([FP32, BF16])
widths = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 64, 127, 128, 129]), st.integers(1, 300))
few = settings(max_examples=25)


class Kernels:
    __test__ = HERE


class TestSwiglu(Kernels):
    @staticmethod
    def plain(gate_up: Tensor, weight: Tensor | None) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        y = F.silu(gate) * up
        return y if weight is None else y * weight.to(y.dtype).unsqueeze(1)

    @few
    @given(
        rows=st.integers(0, 300), width=widths, dtype=dtypes, weighted=st.booleans(), strided=st.booleans(), seed=seeds
    )
    @example(rows=1, width=1, dtype=FP32, weighted=True, strided=False, seed=0)
    @example(rows=3, width=2500, dtype=BF16, weighted=True, strided=True, seed=0)  # several tiles along a row
    def test_value_and_gradients(
        self, rows: int, width: int, dtype: torch.dtype, weighted: bool, strided: bool, seed: int
    ):
        gate_up = normal(rows, 2 * width, seed=seed, std=3).to(dtype)
        grad = normal(rows, width, seed=seed + 1).to(dtype)
        weights = [normal(rows, seed=seed + 2).float()] if weighted else []

        def function(gate_up: Tensor, *weight: Tensor) -> Tensor:
            return self.plain(gate_up, *(weight or (None,)))

        exact = gradients(function, grad.double(), gate_up.double(), *(w.double() for w in weights))
        plain = gradients(function, grad, gate_up, *weights)
        given_x, given_grad = gate_up.to(DEVICE), grad.to(DEVICE)
        if strided:
            given_x, given_grad = apart(given_x), apart(given_grad)
        weight = weights[0].to(DEVICE) if weights else None
        y = gpu.swiglu(given_x, weight)
        grad_x, grad_weight = gpu.swiglu_backward(given_grad, given_x, weight)
        assert y.dtype == grad_x.dtype == dtype
        close(y, exact[0], plain[0])
        close(grad_x, exact[1], plain[1])
        if weighted:
            assert grad_weight is not None
            gate, up = gate_up.double().chunk(2, dim=-1)
            assert grad_weight.dtype == FP32  # added up in FP32 from what is given
            close(grad_weight, exact[2], scale=(grad.double() * F.silu(gate) * up).abs().sum(1))
        else:
            assert grad_weight is None


def sorted_by_hand(indices: Tensor, experts: int, multiple: int) -> tuple[list[int], list[int], list[int]]:
    chosen = indices.flatten().tolist()
    assignment: list[int] = []
    ends = []
    for expert in range(experts):
        assignment += [i for i, e in enumerate(chosen) if e == expert]
        while len(assignment) % multiple:
            assignment.append(-1)
        ends.append(len(assignment))
    slot = [assignment.index(i) for i in range(len(chosen))]
    most = len(chosen) + experts * (multiple - 1)
    while most % multiple:
        most += 1
    return assignment + [-1] * (most - len(assignment)), slot, ends


def plan_tensors(indices: Tensor, experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """assignment, slot, ends."""
    where = plan_on_device(indices, experts, multiple)
    return where.assignment, where.slot, where.ends


def random_choices(tokens: int, k: int, experts: int, seed: int, kind: str) -> Tensor:
    """[N, K] experts: any; all the same; or only the last two."""
    generator = torch.Generator().manual_seed(seed)
    low, high = {"any": (0, experts), "one": (experts // 2, experts // 2 + 1), "last": (max(experts - 2, 0), experts)}[
        kind
    ]
    return torch.randint(low, high, (tokens, k), generator=generator)


choices = st.builds(
    lambda sizes, seed, kind: (random_choices(*sizes, seed, kind), sizes[2]),
    st.tuples(st.integers(0, 40), st.integers(1, 8), st.integers(1, 20)),
    seeds,
    st.sampled_from(["any", "one", "last"]),
)


class TestPlan:
    """Plain torch: also where triton is not."""

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @given(chosen=choices, multiple=st.sampled_from([1, 2, 16, 128]))
    @example(chosen=(torch.zeros(1, 1, dtype=torch.int64), 1), multiple=1)
    @example(chosen=(torch.zeros(1, 2, dtype=torch.int64), 300), multiple=128)
    def test_against_a_loop(self, chosen: tuple[Tensor, int], multiple: int):
        indices, experts = chosen
        got = plan_tensors(indices.to(self.device), experts, multiple)
        for ours, right in zip(got, sorted_by_hand(indices, experts, multiple), strict=True):
            assert ours.dtype == torch.int32
            assert ours.tolist() == right


class TestRows(Kernels):
    @few
    @given(
        chosen=choices, width=widths, dtype=dtypes, strided=st.booleans(), multiple=st.sampled_from([1, 8]), seed=seeds
    )
    @example(chosen=(torch.zeros(1, 1, dtype=torch.int64), 3), width=1, dtype=BF16, strided=False, multiple=8, seed=0)
    @example(chosen=(random_choices(3, 2, 4, 0, "any"), 4), width=2500, dtype=BF16, strided=True, multiple=8, seed=0)
    def test_gather_and_sum(
        self, chosen: tuple[Tensor, int], width: int, dtype: torch.dtype, strided: bool, multiple: int, seed: int
    ):
        indices, experts = chosen
        tokens, k = indices.shape
        assignment, slot, _ = plan_tensors(indices.to(DEVICE), experts, multiple)
        x = normal(tokens, width, seed=seed).to(dtype).to(DEVICE)
        rows = gpu.gather_rows(apart(x) if strided else x, assignment, k)
        assert rows.dtype == dtype
        assert rows.shape == (assignment.shape[0], width)
        for row, source in zip(rows, assignment.tolist(), strict=True):
            assert torch.equal(row, x[source // k] if source >= 0 else torch.zeros_like(row))

        given_rows = normal(assignment.shape[0], width, seed=seed + 1).to(dtype)
        given_rows[assignment.cpu() < 0] = float("nan")  # nothing of padding is read
        picked = given_rows[slot.long().cpu()].view(tokens, k, width)
        on_device = given_rows.to(DEVICE)
        out = gpu.sum_rows(apart(on_device) if strided else on_device, slot, k)
        assert out.dtype == dtype
        plain = picked[:, 0].clone()
        for choice in range(1, k):
            plain += picked[:, choice]
        close(out, picked.double().sum(1), plain, scale=picked.double().abs().sum(1))


class TestRmsNorm(Kernels):
    @few
    @given(
        rows=st.integers(0, 200),
        width=widths,
        dtype=dtypes,
        out=dtypes,
        eps=st.sampled_from([1e-6, 1e-2]),
        strided=st.booleans(),
        seed=seeds,
    )
    @example(rows=1, width=1, dtype=FP32, out=FP32, eps=1e-6, strided=False, seed=0)
    @example(
        rows=37, width=5000, dtype=FP32, out=BF16, eps=1e-6, strided=True, seed=0
    )  # a row a tile, several a program
    def test_value_and_gradients(
        self, rows: int, width: int, dtype: torch.dtype, out: torch.dtype, eps: float, strided: bool, seed: int
    ):
        x, grad = normal(rows, width, seed=seed).to(dtype), normal(rows, width, seed=seed + 1).to(out)
        weight = normal(width, seed=seed + 2).float()

        def function(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, (width,), weight.to(x.dtype), eps)

        exact = gradients(function, grad.double(), x.double(), weight.double())
        plain = gradients(function, grad.to(dtype), x, weight)
        given_x, given_grad = x.to(DEVICE), grad.to(DEVICE)
        if strided:
            given_x, given_grad = apart(given_x), apart(given_grad)
        y, rstd = gpu.rms_norm(given_x, weight.to(DEVICE), eps, out)
        grad_x, grad_weight = gpu.rms_norm_backward(given_grad, given_x, weight.to(DEVICE), rstd)
        assert (y.dtype, rstd.dtype, grad_x.dtype, grad_weight.dtype) == (out, FP32, dtype, FP32)
        right = (x.double().square().mean(1) + eps).rsqrt()
        close(rstd, right)
        close(y, exact[0], plain[0])
        # The gradient is a difference, of nearly equal numbers for short rows.
        close(grad_x, exact[1], plain[1], scale=right.unsqueeze(1) * grad.double() * weight.double())
        close(grad_weight, exact[2], scale=(grad.double() * x.double() * right.unsqueeze(1)).abs().sum(0))

    def test_the_same_twice(self):
        x, grad = (normal(300, 200, seed=seed).float().to(DEVICE) for seed in (0, 1))
        weight = torch.ones(200, device=DEVICE)
        _, rstd = gpu.rms_norm(x, weight, 1e-6, FP32)
        first, second = (gpu.rms_norm_backward(grad, x, weight, rstd)[1] for _ in range(2))
        assert torch.equal(first, second)


class TestCrossEntropy(Kernels):
    @few
    @given(
        rows=st.integers(0, 8),
        vocabulary=st.one_of(widths, st.sampled_from([4096, 4097, 9000])),
        dtype=dtypes,
        std=st.sampled_from([0.1, 3.0, 100.0]),
        ignored=st.sampled_from([0.0, 0.4, 1.0]),
        seed=seeds,
    )
    @example(rows=1, vocabulary=1, dtype=FP32, std=3.0, ignored=0.0, seed=0)
    @example(rows=3, vocabulary=9000, dtype=FP32, std=3.0, ignored=0.0, seed=0)  # several blocks a row
    @example(rows=3, vocabulary=9000, dtype=BF16, std=3.0, ignored=0.4, seed=0)
    def test_value_and_gradient(
        self, rows: int, vocabulary: int, dtype: torch.dtype, std: float, ignored: float, seed: int
    ):
        logits = normal(rows, vocabulary, seed=seed, std=std).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(0, vocabulary, (rows,), generator=generator)
        targets[torch.rand(rows, generator=generator) < ignored] = IGNORED

        def function(logits: Tensor) -> Tensor:
            precise = torch.promote_types(logits.dtype, FP32)
            return F.cross_entropy(logits.to(precise), targets, ignore_index=IGNORED, reduction="sum")

        one = torch.ones((), dtype=torch.float64)
        nats, grad = gradients(function, one, logits.double())
        _, plain = gradients(function, one.float(), logits)
        got = logits.to(DEVICE)
        total = gpu.cross_entropy_(got, targets.to(DEVICE), IGNORED)
        assert (total.dtype, total.shape) == (FP32, ())
        if rows:  # log Σ exp − logit, each as large as a logit
            close(total, nats, scale=logits.double().abs().amax(1).sum() + nats)
        close(got, grad, plain, scale=torch.ones(1, dtype=torch.float64))
        assert not got[targets.to(DEVICE) == IGNORED].any()

    def test_tokens_that_are_masked_out(self):
        """−∞ everywhere but at two tokens, a whole block of them first."""
        logits = torch.full((1, 9000), float("-inf"), device=DEVICE)
        logits[0, 5000], logits[0, 8999] = 1.0, 1.0
        nats = gpu.cross_entropy_(logits, torch.tensor([8999], device=DEVICE), IGNORED)
        assert nats.item() == pytest.approx(0.6931472, rel=1e-5)
        expected = torch.zeros(9000)
        expected[5000], expected[8999] = 0.5, -0.5
        torch.testing.assert_close(logits[0].cpu(), expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("target", [-1, 5, 2**40])
    def test_a_target_that_is_no_token(self, target: int):
        logits = torch.zeros(2, 5, device=DEVICE)
        assert gpu.cross_entropy_(logits, torch.tensor([0, target], device=DEVICE), IGNORED).isnan()

    def test_nan_is_not_hidden(self):
        logits = torch.zeros(2, 5000, device=DEVICE)
        logits[1, 4500] = float("nan")
        assert gpu.cross_entropy_(logits, torch.tensor([0, 0], device=DEVICE), IGNORED).isnan()


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """BF16 weight nearest to FP32 ``master`` and int16 rest. Halfway the weight further from zero: to even, as usual,
    would need a rest of +32768."""
    bits = master.view(torch.int32).long()
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(BF16), (bits - (high << 16)).to(torch.int16)


def join(weight: Tensor, low: Tensor) -> Tensor:
    return ((weight.view(torch.int16).int() << 16) + low.int()).view(FP32)


HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


class TestAdamW(Kernels):
    @staticmethod
    def run(master: Tensor, grads: list[Tensor], moments: torch.dtype, split_it: bool, scale: Any = 1.0) -> Tensor:
        """FP32 weights after a step with each gradient."""
        weight, low = split(master) if split_it else (master.clone(), None)
        weight, low = weight.to(DEVICE), low.to(DEVICE) if low is not None else None
        m, v = (torch.zeros_like(weight, dtype=moments) for _ in range(2))
        for step, grad in enumerate(grads, start=1):
            bias = {f"bias{i}": 1 - HYPER[f"beta{i}"] ** step for i in (1, 2)}
            gpu.adamw_(weight, low, grad.to(DEVICE), m, v, **HYPER, **bias, scale=scale)
        return (weight if low is None else join(weight, low)).cpu()

    @staticmethod
    def torchs(master: Tensor, grads: list[Tensor], moments: torch.dtype = torch.float64) -> Tensor:
        """torch.optim.AdamW in float64, its moments rounded after each step."""
        weight = torch.nn.Parameter(master.double())
        names = {"betas": (HYPER["beta1"], HYPER["beta2"])} | {k: v for k, v in HYPER.items() if "beta" not in k}
        optimizer = torch.optim.AdamW([weight], **names, foreach=False)
        for grad in grads:
            weight.grad = grad.double()
            optimizer.step()
            for name in ("exp_avg", "exp_avg_sq"):
                state = optimizer.state[weight][name]
                state.copy_(state.to(moments))
        return weight.detach()

    @few
    @given(
        shape=st.one_of(st.tuples(st.integers(0, 40), st.integers(1, 40)), st.tuples(st.sampled_from([1, 4096, 9001]))),
        steps=st.integers(1, 3),
        dtype=dtypes,
        split_it=st.booleans(),
        scale=st.sampled_from([1.0, 0.37, 0.0]),
        on_device=st.booleans(),
        seed=seeds,
    )
    def test_against_torch(
        self,
        shape: tuple[int, ...],
        steps: int,
        dtype: torch.dtype,
        split_it: bool,
        scale: float,
        on_device: bool,
        seed: int,
    ):
        master = normal(*shape, seed=seed).float()
        grads = [normal(*shape, seed=seed + 1 + i).to(dtype) for i in range(steps)]
        given_scale = torch.tensor(scale, device=DEVICE) if on_device else scale
        got = self.run(master, grads, FP32, split_it, given_scale)
        close(got, self.torchs(master, [g.double() * scale for g in grads]))
        # Each step's own error, against the size of a step: a weight that never moved would pass the line above.
        moved = self.torchs(master, [g.double() * scale for g in grads]) - master.double()
        if master.numel():
            assert ((got.double() - master.double()) - moved).abs().max() <= 1e-6
            assert torch.equal(got, self.run(master, grads, FP32, not split_it, given_scale))  # bit by bit the same

    @pytest.mark.parametrize("split_it", [False, True])
    def test_moments_in_bf16(self, split_it: bool):
        master = normal(3000, seed=0).float()
        grads = [normal(3000, seed=1 + i).float() for i in range(3)]
        got, exact = self.run(master, grads, BF16, split_it).double(), self.torchs(master, grads, BF16)
        # m and v may each be one step of BF16 off: 2^-8 of a quotient of about 1, three times.
        assert (got - exact).abs().max() <= 3 * HYPER["lr"] * 3 * 2.0**-7

    @given(seed=seeds)
    def test_every_split_is_kept(self, seed: int):
        """With lr 0 nothing changes: any 32 bits come back, and the weight is BF16's nearest, or as near."""
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(-(2**31), 2**31, (2000,), generator=generator)
        bits[:500] = (bits[:500] & ~0xFFFF) + 0x8000  # halfway, even and odd
        bits = bits.to(torch.int32)
        bits = bits[bits.view(FP32).isfinite() & (bits.view(FP32).abs() < 3e38)]
        weight, low = split(bits.view(FP32))
        assert torch.equal(join(weight, low).view(torch.int32), bits)
        on_device = [x.to(DEVICE).clone() for x in (weight, low)]
        zeros = [torch.zeros(len(bits), device=DEVICE) for _ in range(3)]
        gpu.adamw_(*on_device, *zeros, **(HYPER | {"lr": 0.0}), bias1=0.1, bias2=0.05, scale=1.0)
        got, got_low = (x.cpu() for x in on_device)
        same = join(got, got_low).view(torch.int32) == bits
        assert (same | (bits.view(FP32) == 0)).all()  # −0 − 0 may be +0
        error = (got.double() - bits.view(FP32).double()).abs()
        assert (error <= (bits.view(FP32).to(BF16).double() - bits.view(FP32).double()).abs()).all()

    @pytest.mark.parametrize("scale", [-1.0, float("nan")])
    @pytest.mark.parametrize("on_device", [False, True])
    def test_nothing_changes(self, scale: float, on_device: bool):
        weight, low = (x.to(DEVICE) for x in split(normal(5000, seed=0).float()))
        m, v = (normal(5000, seed=i).float().square().to(DEVICE) for i in (1, 2))
        grad = torch.full((5000,), float("inf"), device=DEVICE)
        before = [x.clone() for x in (weight, low, m, v)]
        given_scale = torch.tensor(scale, device=DEVICE) if on_device else scale
        gpu.adamw_(weight, low, grad, m, v, **HYPER, bias1=0.1, bias2=0.05, scale=given_scale)
        for now, then in zip((weight, low, m, v), before, strict=True):
            assert torch.equal(now, then)


class TestSupport(Kernels):
    def test_dtypes(self):
        x = torch.zeros(1, device=DEVICE)
        assert gpu.supports(x)
        assert gpu.supports(x, x.to(BF16), torch.nn.Parameter(x))
        for dtype in (torch.float64, torch.float16, torch.int64):
            assert not gpu.supports(x, x.to(dtype))

    @pytest.mark.skipif(DEVICE.type != "cuda" or not torch.cuda.is_available(), reason="needs a GPU")
    def test_nothing_waits_for_the_device(self):
        x = torch.randn(64, 128, device=DEVICE)
        weight, scale = torch.rand(128, device=DEVICE), torch.ones((), device=DEVICE)
        indices = torch.randint(0, 8, (64, 2), device=DEVICE)
        targets = torch.randint(0, 128, (64,), device=DEVICE)

        def everything() -> None:
            assignment, slot, _ = plan_tensors(indices, 8, 16)
            rows = gpu.gather_rows(x, assignment, 2)
            row_weight = torch.ones(rows.shape[0], device=DEVICE)
            gpu.swiglu_backward(gpu.swiglu(rows, row_weight), rows, row_weight)
            y, rstd = gpu.rms_norm(gpu.sum_rows(rows, slot, 2), weight, 1e-6, BF16)
            gpu.rms_norm_backward(y, x, weight, rstd)
            gpu.cross_entropy_(x.clone(), targets, IGNORED)
            gpu.adamw_(x.clone(), None, x, x.clone(), x.abs(), **HYPER, bias1=0.1, bias2=0.05, scale=scale)

        everything()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            everything()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    """Prints each kernel's name, the bytes of local memory it takes and how many 16-byte accesses its code has."""
    import re
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        print("this build of triton has no compiler for NVIDIA", file=sys.stderr)
        sys.exit(77)

    class Hopper:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage, code = (
                subprocess.check_output([tool, how, file.name], text=True) for how in ("-res-usage", "-sass")
            )
        (local,) = re.findall(r"LOCAL:(\d+)", usage)
        print(kernel.__name__, local, len(re.findall(r"(?:LDG|STG)\.E\.128", code)))

    driver.set_active(Hopper())
    run, jit.JITFunction.run = jit.JITFunction.run, compile_only
    tokens, k, hidden, width, vocabulary = 1024, 6, 1536, 640, 32768
    slot = torch.zeros(tokens * k, dtype=torch.int32)
    for dtype in (BF16, FP32):
        x, rows = torch.empty(tokens, hidden, dtype=dtype), torch.empty(tokens * k, hidden, dtype=dtype)
        gate_up, grad = torch.empty(tokens * k, 2 * width, dtype=dtype), torch.empty(tokens * k, width, dtype=dtype)
        gpu.swiglu(gate_up, torch.empty(tokens * k))
        gpu.swiglu_backward(grad, gate_up, torch.empty(tokens * k))
        gpu.gather_rows(x, slot, k)
        gpu.sum_rows(rows, slot, k)
        _, rstd = gpu.rms_norm(x, torch.empty(hidden), 1e-6, BF16)
        gpu.rms_norm_backward(x.to(BF16), x, torch.empty(hidden), rstd)
        gpu.cross_entropy_(torch.empty(64, vocabulary, dtype=dtype), torch.zeros(64, dtype=torch.int64), IGNORED)
        low = torch.zeros_like(x, dtype=torch.int16) if dtype == BF16 else None
        gpu.adamw_(x, low, x, x.float(), x.float(), **HYPER, bias1=0.1, bias2=0.05, scale=torch.ones(()))


if __name__ == "__main__":
    main()
