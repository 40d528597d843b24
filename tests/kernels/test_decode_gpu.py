"""Decoding's Triton kernels against float64 and the references beside the CPU's code.

On a machine with a GPU the tests run on it. Elsewhere one test runs this file once more in a process of its own under
Triton's interpreter, and another compiles the kernels for a Hopper GPU, which need not be there, with the arguments
that the functions themselves pass (tests/kernels/test_gpu_kernels.py says more). The interpreter takes 10 ms a program,
so there programs are few and examples small.

Tokens that no sequence has are NaN, so that whoever reads them is found out.
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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import decode, decode_gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
THERE = importlib.util.find_spec("triton") is not None
HERE = THERE and (INTERPRETED or torch.cuda.is_available())
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ROOT = Path(__file__).parents[2]
BF16, FP32 = torch.bfloat16, torch.float32
NAN = float("nan")
MANY = 6 if INTERPRETED else 132  # multiprocessors


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
    assert {name for name, *_ in lines} == {"attend", "join", "experts_up", "experts_down", "linear"}
    for name, dtype, stack, shared, wide, products in lines:
        assert int(stack) == 0, (name, dtype)  # registers suffice
        assert int(shared) <= 99 * 1024, (name, dtype)  # what cards smaller than Hopper's have
        assert int(wide) >= 2, (name, dtype)  # 16 bytes at a time
        if name == "attend" and dtype == "bfloat16":
            assert int(products) > 0  # tensor cores


def normal(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).to(DEVICE)


def near(got: Tensor, exact: Tensor, size: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
    """As near as ``dtype`` allows (None: the result's); ``size``: what would come out if nothing cancelled out. The
    interpreter cuts BF16 off where a GPU rounds it."""
    allowed = {FP32: 2e-6, BF16: 6e-3 if INTERPRETED else 4e-3}[dtype or got.dtype]
    assert got.shape == exact.shape
    error = (got.double() - exact).norm()
    assert error <= allowed * (exact if size is None else size).norm() + 1e-30


def paged(n: int, page: int, longest: int, more: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Block table, lengths (one of them ``longest``) and number of pages; pages are scattered over the pool. Entries
    that no token needs, ``more`` of them behind the longest sequence's, are no pages."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (n,), generator=g)
    lengths[seed % n] = longest
    most = -(-longest // page)
    order = torch.randperm(n * most + 1, generator=g)
    table = torch.full((n, most + more), -7)
    table[:, ::2] = 2**31 - 1
    for i, length in enumerate(lengths.tolist()):
        used = -(-length // page)
        table[i, :used] = order[i * most : i * most + used]
    return table.int().to(DEVICE), lengths.int().to(DEVICE), n * most + 1


def only_tokens(pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """``pool`` [P, page, …] with NaN wherever no sequence has a token."""
    out, page = torch.full_like(pool, NAN), pool.shape[1]
    for entries, length in zip(table.tolist(), lengths.tolist(), strict=True):
        for t in range(length):
            out[entries[t // page], t % page] = pool[entries[t // page], t % page]
    return out


def attended(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result in float64, token by token, and its size if values did not cancel out."""
    q, k, v = q.double(), k.double(), v.double()
    both = [decode.paged_attention_reference(q, k, x, table, lengths, scale) for x in (v, v.abs())]
    return both[0], both[1]


@pytest.fixture(autouse=INTERPRETED, scope="module")
def _few_programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_gpu, "_ROWS", 32)
        yield


@pytest.fixture
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretends the card had so many, on which the number of splits depends."""
    return lambda count: monkeypatch.setattr(decode_gpu, "_multiprocessors", lambda device: count)


seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([FP32, BF16])
counts = st.sampled_from([1, MANY])
scales = st.sampled_from([0.05, 0.3, 2.0])
some = settings(max_examples=12 if INTERPRETED else 60)


@pytest.mark.skipif(not HERE, reason="in the interpreter's process")
class TestAttention:
    @some
    @given(
        n=st.integers(1, 3), heads=st.integers(1, 33), latent=st.sampled_from([1, 7, 32, 64, 100]),
        rope=st.sampled_from([0, 2, 5, 8, 32]), page=st.sampled_from([1, 3, 16, 64]), longest=st.integers(1, 130),
        more=st.integers(0, 3), count=counts, dtype=dtypes, scale=scales, seed=seeds,
    )  # fmt: skip
    @example(n=1, heads=16, latent=512, rope=64, page=64, longest=300, more=2, count=132, dtype=BF16, scale=0.1, seed=0)
    @example(n=2, heads=20, latent=512, rope=64, page=64, longest=70, more=0, count=1, dtype=FP32, scale=0.1, seed=1)
    @example(n=1, heads=3, latent=32, rope=8, page=16, longest=300, more=40, count=132, dtype=FP32, scale=0.3, seed=2)
    def test_latents(
        self, n: int, heads: int, latent: int, rope: int, page: int, longest: int, more: int, count: int,
        dtype: torch.dtype, scale: float, seed: int,
    ):  # fmt: skip
        table, lengths, pages = paged(n, page, longest, more, seed)
        q = normal(n, heads, latent + rope, seed=seed, dtype=dtype)
        pool = only_tokens(normal(pages, page, latent + rope, seed=seed, dtype=dtype), table, lengths)
        exact = attended(q, pool.unsqueeze(2), pool.unsqueeze(2)[..., :latent], table, lengths, scale)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_gpu, "_multiprocessors", lambda device: count)
            got = decode_gpu.latent_attention(q, pool, table, lengths, scale, latent)
        assert got.dtype == dtype
        near(got, *exact)
        assert not got[lengths == 0].any()

    @some
    @given(
        n=st.integers(1, 3), shared=st.integers(1, 3), group=st.sampled_from([1, 2, 3, 17]), size=st.integers(1, 80),
        width=st.integers(1, 140), page=st.sampled_from([1, 3, 16]), longest=st.integers(1, 130),
        more=st.integers(0, 3), count=counts, dtype=dtypes, seed=seeds,
    )  # fmt: skip
    @example(
        n=2, shared=4, group=4, size=128, width=128, page=64, longest=300, more=0, count=132, dtype=BF16, seed=0
    )  # fmt: skip
    def test_keys_and_values(
        self, n: int, shared: int, group: int, size: int, width: int, page: int, longest: int, more: int, count: int,
        dtype: torch.dtype, seed: int,
    ):  # fmt: skip
        table, lengths, pages = paged(n, page, longest, more, seed)
        q = normal(n, shared * group, size, seed=seed, dtype=dtype)
        keys, values = (
            only_tokens(normal(pages, page, shared, s, seed=seed, dtype=dtype), table, lengths) for s in (size, width)
        )
        exact = attended(q, keys, values, table, lengths, 0.3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_gpu, "_multiprocessors", lambda device: count)
            got = decode_gpu.paged_attention(q, keys, values, table, lengths, 0.3)
        near(got, *exact)
        assert not got[lengths == 0].any()

    @pytest.mark.parametrize("dtype", [FP32, BF16])
    def test_a_maximum_that_moves(self, dtype: torch.dtype, multiprocessors: Callable[[int], None]):
        """Scores grow along the sequence, by hundreds: each block outweighs all before it; or fall."""
        table, lengths = torch.randperm(21, device=DEVICE).int().view(1, 21), torch.tensor([333], device=DEVICE)
        q = normal(1, 20, 96, seed=0, dtype=dtype)
        for size in (torch.linspace(0.1, 30, 21 * 16), torch.linspace(30, 0.1, 21 * 16)):
            pool = normal(21, 16, 96, seed=1)
            pool[table[0].long()] *= size.view(21, 16, 1).to(DEVICE)
            pool = pool.to(dtype)
            exact = attended(q, pool.unsqueeze(2), pool.unsqueeze(2)[..., :64], table, lengths, 0.5)
            for count in (1, MANY):
                multiprocessors(count)
                got = decode_gpu.latent_attention(q, pool, table, lengths, 0.5, 64)
                # Scores of hundreds have errors of 1e-5 in FP32, and so have their exponentials.
                near(got / 10 if dtype == FP32 else got, exact[0] / 10 if dtype == FP32 else exact[0], exact[1])

    @pytest.mark.parametrize("count", [1, MANY])
    def test_odd_tensors(self, count: int, multiprocessors: Callable[[int], None]):
        """Not contiguous, int64, a pool in another dtype, no rows, heads or pages."""
        multiprocessors(count)
        table, lengths, pages = paged(3, 16, 100, 1, 5)
        q, pool = normal(4, 3, 40, seed=0).transpose(0, 1), normal(pages, 16, 40, seed=1, dtype=BF16)
        exact = attended(q, pool.unsqueeze(2), pool.unsqueeze(2)[..., :32], table, lengths, 0.3)
        apart = torch.stack((table.long(), table.long()), dim=-1)[..., 0]
        near(decode_gpu.latent_attention(q, pool, apart, lengths.long(), 0.3, 32), *exact)
        got = decode_gpu.latent_attention(q.to(BF16), pool.float(), table, lengths, 0.3, 32)
        assert got.dtype == BF16
        near(got, *exact)
        assert decode_gpu.latent_attention(q[:0], pool, table[:0], lengths[:0], 0.3, 32).shape == (0, 4, 32)
        assert decode_gpu.latent_attention(q[:, :0], pool, table, lengths, 0.3, 32).shape == (3, 0, 32)
        nothing = decode_gpu.latent_attention(q, pool[:0], table[:, :0], lengths * 0, 0.3, 32)
        assert nothing.shape == (3, 4, 32)
        assert not nothing.any()

    @pytest.mark.parametrize("count", [1, MANY])
    @pytest.mark.parametrize("dtype", [FP32, BF16])
    def test_what_is_not_there(self, dtype: torch.dtype, count: int, multiprocessors: Callable[[int], None]):
        """NaN for the sequence, and for no other; nothing is read."""
        multiprocessors(count)
        table = torch.arange(24, device=DEVICE).view(3, 8).int()
        q, pool = normal(3, 4, 40, seed=0, dtype=dtype), normal(24, 16, 40, seed=1, dtype=dtype)
        usual = torch.tensor([128, 100, 3], device=DEVICE)
        right = decode_gpu.latent_attention(q, pool, table, usual, 0.1, 32)
        for entry, page in ((0, -1), (6, 24), (3, 2**31 - 1), (6, -(2**31))):
            wrong = table.clone()
            wrong[1, entry] = page
            got = decode_gpu.latent_attention(q, pool, wrong, usual, 0.1, 32)
            assert got[1].isnan().all()
            assert torch.equal(got[::2], right[::2])
        for length in (129, 2**31 - 1, 2**40):
            lengths = usual.clone()
            lengths[1] = length
            got = decode_gpu.latent_attention(q, pool, table, lengths, 0.1, 32)
            assert got[1].isnan().all()
            assert torch.equal(got[::2], right[::2])
        usual[1] = -5
        assert not decode_gpu.latent_attention(q, pool, table, usual, 0.1, 32)[1].any()

    @pytest.mark.parametrize("bad", [NAN, float("inf")])
    def test_what_is_not_finite_is_not_lost(self, bad: float, multiprocessors: Callable[[int], None]):
        for count in (1, MANY):
            multiprocessors(count)
            q, pool = normal(2, 4, 64, seed=0), normal(4, 64, 64, seed=1)
            pool[1, 3, 2] = bad
            table, lengths = torch.tensor([[0, 1], [2, 3]], device=DEVICE), torch.tensor([128, 128], device=DEVICE)
            got = decode_gpu.latent_attention(q, pool, table, lengths, 0.1, 32)
            assert not got[0, 0].isfinite().all()
            assert got[1].isfinite().all()

    def test_repetition_changes_no_bit(self, multiprocessors: Callable[[int], None]):
        multiprocessors(MANY)
        table, lengths, pages = paged(2, 16, 200, 0, 3)
        q, pool = normal(2, 16, 72, seed=0, dtype=BF16), normal(pages, 16, 72, seed=1, dtype=BF16)
        first, second = (decode_gpu.latent_attention(q, pool, table, lengths, 0.1, 64) for _ in range(2))
        assert torch.equal(first, second)


def experts_by_hand(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token in float64, and the result's size if no sum of the second product cancelled out."""
    x, weights, gate_up, down = x.double(), weights.double(), gate_up.double(), down.double()
    out, size = torch.zeros_like(x), torch.zeros_like(x)
    width = down.shape[2]
    for n in range(x.shape[0]):
        for k, e in enumerate(indices[n].tolist()):
            gate, up = gate_up[e, :width] @ x[n], gate_up[e, width:] @ x[n]
            out[n] += weights[n, k] * (down[e] @ (gate / (1 + torch.exp(-gate)) * up))
            size[n] += (
                weights[n, k].abs() * down[e].abs() @ (gate_up[e].abs() @ x[n].abs()).view(2, width).prod(0).view(-1)
            )
    return out, size


@pytest.mark.skipif(not HERE, reason="in the interpreter's process")
class TestExperts:
    @some
    @given(
        n=st.integers(1, 9), k=st.integers(1, 4), more=st.integers(0, 4), hidden=st.integers(1, 130),
        width=st.integers(1, 100), same=st.booleans(), dtype=dtypes, stored=dtypes, wide=st.booleans(), seed=seeds,
    )  # fmt: skip
    @example(
        n=1, k=6, more=2, hidden=2048, width=16, same=False, dtype=BF16, stored=BF16, wide=True, seed=0
    )  # several steps along a row
    @example(n=1, k=2, more=0, hidden=30, width=1408, same=False, dtype=FP32, stored=FP32, wide=True, seed=0)
    def test_experts(
        self, n: int, k: int, more: int, hidden: int, width: int, same: bool, dtype: torch.dtype,
        stored: torch.dtype, wide: bool, seed: int,
    ):  # fmt: skip
        g, experts = torch.Generator().manual_seed(seed), k + more
        chosen = [torch.arange(k) if same else torch.randperm(experts, generator=g)[:k] for _ in range(n)]
        indices = torch.stack(chosen).to(DEVICE, torch.int64 if wide else torch.int32)
        weights = torch.rand(n, k, generator=g).to(DEVICE)
        x = normal(n, hidden, seed=seed, dtype=dtype)
        gate_up = (normal(experts, 2 * width, hidden, seed=seed) / hidden**0.5).to(stored)
        down = (normal(experts, hidden, width, seed=seed + 1) / width**0.5).to(stored)
        got = decode_gpu.experts(x, indices, weights, gate_up, down)
        exact, size = experts_by_hand(x, indices, weights, gate_up, down)
        assert got.dtype == dtype
        near(got, exact, size)
        reference = decode.experts_reference(
            x.double(), indices.long(), weights.double(), gate_up.double(), down.double()
        )
        near(got, reference, size)

    @pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1, 2**40, -(2**40)])
    def test_an_expert_that_is_not_there(self, wrong: int):
        """Its token is NaN, the others are as they were."""
        x, gate_up, down = normal(3, 32, seed=0), normal(4, 16, 32, seed=1), normal(4, 32, 8, seed=2)
        indices, weights = torch.tensor([[0, 1], [2, 3], [3, 0]], device=DEVICE), torch.ones(3, 2, device=DEVICE)
        right = decode_gpu.experts(x, indices, weights, gate_up, down)
        indices[1, 1] = wrong
        got = decode_gpu.experts(x, indices, weights, gate_up, down)
        assert got[1].isnan().all()
        assert torch.equal(got[::2], right[::2])

    def test_odd_tensors(self):
        x, gate_up, down = normal(20, 6, seed=0).t(), normal(20, 16, 4, seed=1), normal(8, 20, 4, seed=2)
        gate_up, down = gate_up.transpose(0, 2), down.permute(2, 1, 0)
        indices = torch.stack((torch.arange(6) % 4, torch.arange(6) % 3)).t().to(DEVICE)
        weights = torch.rand(6, 4, device=DEVICE, dtype=torch.float64)[:, ::2]
        near(
            decode_gpu.experts(x, indices, weights, gate_up, down),
            *experts_by_hand(x, indices, weights, gate_up, down),
        )
        assert decode_gpu.experts(x[:0], indices[:0], weights[:0], gate_up, down).shape == (0, 20)
        none = torch.zeros(6, 0, dtype=torch.int64, device=DEVICE)
        assert not decode_gpu.experts(x, none, none.float(), gate_up, down).any()

    def test_what_is_not_finite_is_not_lost(self):
        x, gate_up, down = normal(3, 64, seed=0), normal(2, 32, 64, seed=1), normal(2, 64, 16, seed=2)
        x[1, 5] = NAN
        got = decode_gpu.experts(
            x, torch.zeros(3, 1, dtype=torch.int64, device=DEVICE), torch.ones(3, 1, device=DEVICE), gate_up, down
        )
        assert got[1].isnan().all()
        assert got[::2].isfinite().all()


@pytest.mark.skipif(not HERE, reason="in the interpreter's process")
class TestLinear:
    @some
    @given(
        n=st.integers(0, 8), inputs=st.integers(1, 300), outputs=st.integers(1, 40), dtype=dtypes, stored=dtypes,
        seed=seeds,
    )  # fmt: skip
    @example(n=1, inputs=2500, outputs=9, dtype=BF16, stored=BF16, seed=0)
    @example(n=8, inputs=2500, outputs=9, dtype=FP32, stored=FP32, seed=0)
    def test_linear(self, n: int, inputs: int, outputs: int, dtype: torch.dtype, stored: torch.dtype, seed: int):
        x, w = normal(n, inputs, seed=seed, dtype=dtype), normal(outputs, inputs, seed=seed + 1, dtype=stored)
        got = decode_gpu.linear(x, w)
        assert got.dtype == dtype
        near(got, x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t())

    def test_odd_tensors(self):
        x, w = normal(20, 3, seed=0).t(), normal(20, 24, seed=1).t()
        near(decode_gpu.linear(x, w), x.double() @ w.double().t())
        with pytest.raises(ValueError, match="9 rows"):
            decode_gpu.linear(normal(9, 20, seed=0), w)


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
class TestGPU:
    def test_a_graph_serves_other_lengths_pages_and_experts(self):
        """Captured once, replayed with other numbers in the same tensors; nothing waits for the device."""
        table, lengths, pages = paged(4, 64, 1000, 20, 0)
        q, pool = normal(4, 16, 576, seed=0, dtype=BF16), normal(pages, 64, 576, seed=1, dtype=BF16)
        x, gate_up = normal(4, 256, seed=2, dtype=BF16), normal(8, 2 * 96, 256, seed=3, dtype=BF16) / 16
        down, indices = normal(8, 256, 96, seed=4, dtype=BF16) / 10, torch.randint(0, 8, (4, 2), device=DEVICE)
        weights, w = torch.rand(4, 2, device=DEVICE), normal(100, 256, seed=5, dtype=BF16)

        def everything() -> tuple[Tensor, ...]:
            return (
                decode_gpu.latent_attention(q, pool, table, lengths, 0.05, 512),
                decode_gpu.paged_attention(q, *(pool.unsqueeze(2),) * 2, table, lengths, 0.05),
                decode_gpu.experts(x, indices, weights, gate_up, down),
                decode_gpu.linear(x, w),
            )

        everything()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            everything()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = everything()
        for seed in (1, 2):
            table.copy_(paged(4, 64, 1000, 20, seed)[0])
            lengths.copy_(paged(4, 64, 1000, 20, seed)[1])
            indices.copy_(torch.randint(0, 8, (4, 2)))
            x.copy_(normal(4, 256, seed=seed))
            graph.replay()
            for got, now in zip(captured, everything(), strict=True):
                assert torch.equal(got, now)
            near(captured[0], *attended(q, pool.unsqueeze(2), pool.unsqueeze(2)[..., :512], table, lengths, 0.05))


def main() -> None:
    """Prints of each kernel: name, dtype, bytes of stack (what registers do not hold), shared memory, how many 16-byte
    accesses and how many matrix instructions its code has."""
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
        (stack,) = re.findall(r"STACK:(\d+)", usage)
        wide, products = (len(re.findall(p, code)) for p in (r"(?:LDG|STG|LDGSTS)\S*\.128", r"\bH[G]?MMA"))
        print(kernel.__name__, str(dtype)[6:], stack, compiled.metadata.shared, wide, products)

    driver.set_active(Hopper())
    run, jit.JITFunction.run = jit.JITFunction.run, compile_only
    decode_gpu._multiprocessors = lambda device: 132
    table, lengths = torch.zeros(1, 64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for dtype in (BF16, FP32):
        pool, keys = torch.empty(64, 64, 576, dtype=dtype), torch.empty(64, 64, 16, 128, dtype=dtype)
        decode_gpu.latent_attention(torch.empty(1, 16, 576, dtype=dtype), pool, table, lengths, 0.1, 512)
        decode_gpu.paged_attention(torch.empty(1, 16, 128, dtype=dtype), keys, keys, table, lengths, 0.1)
        decode_gpu.experts(
            torch.empty(1, 2048, dtype=dtype), torch.zeros(1, 6, dtype=torch.int64), torch.empty(1, 6),
            torch.empty(1, 2 * 1408, 2048, dtype=dtype), torch.empty(1, 2048, 1408, dtype=dtype),
        )  # fmt: skip
        for rows in (1, 8):
            decode_gpu.linear(torch.empty(rows, 2048, dtype=dtype), torch.empty(3072, 2048, dtype=dtype))


if __name__ == "__main__":
    main()
