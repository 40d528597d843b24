"""The FP8 kernels against their references: on a GPU where there is one with FP8, else in Triton's interpreter.

The interpreter has to be chosen before triton is first imported, and other tests of this process may have done that. So
a test here starts this file anew with INTERPRETED set. What the interpreter can't show (that the programs compile) is
tested by compiling them for a GPU that need not be there.
"""

import importlib.util
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from abyssal.kernels import fp8_training

INTERPRETED = "ABYSSAL_TEST_INTERPRETED"
CHILD = os.environ.get(INTERPRETED) == "1"
GPU = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)
DEVICE = "cuda" if GPU and not CHILD else "cpu"
E4M3 = torch.float8_e4m3fn

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Bounds, outputs, inputs: uneven, empty and full experts, one token, whole and broken tiles.
SHAPES = [
    ([0, 0, 130, 133, 200], 140, 150),
    ([0, 1], 16, 8),
    ([0, 0, 0, 256], 128, 256),
    ([0, 40, 80], 130, 64),
]


class Rows:
    def __init__(self, bounds: list[int]) -> None:
        self.bounds = bounds
        self.ends = torch.tensor(bounds[1:], dtype=torch.int32, device=DEVICE)

    def host_bounds(self) -> list[int]:
        return self.bounds


def numbers(*shape: int, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = torch.randn(*shape[:-1], 1, generator=generator).exp() * size
    return (torch.randn(shape, generator=generator) * sizes).to(DEVICE)


def same(got: Tensor, wanted: Tensor) -> bool:
    """Equal dtype and numbers (0 and -0 are one)."""
    return got.dtype == wanted.dtype and torch.equal(got.float(), wanted.float())


def close(got: Tensor, wanted: Tensor) -> bool:
    # The matrix units add up 128 products with 14 bits; the interpreter and the reference with FP32's 24.
    tolerance = 1e-3 if DEVICE == "cuda" else 1e-6
    return bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())


@pytest.mark.skipif(CHILD, reason="this is the child")
def test_in_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", INTERPRETED: "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "TestKernels", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(CHILD, reason="this is the child")
def test_every_kernel_compiles_for_hopper():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    # The FP8 instructions of Hopper, four to a tile (a loop's body), in the two that multiply.
    assert counts == {
        "_quantize_rows": "0",
        "_quantize_weight": "0",
        "_quantize_columns": "0",
        "_product": "4",
        "_weight_gradient": "4",
    }


if CHILD or GPU:
    from abyssal.kernels import fp8_gpu

    @pytest.fixture(autouse=True)
    def _loops_to_a_number_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
        """numpy 2.4 takes no int() of an array with one number, which range() in Triton 3.6's interpreter needs."""
        if not CHILD:
            return
        from triton.runtime import interpreter

        patch = getattr(interpreter, "_patch_lang_tensor", None)
        if patch is None:
            return

        def with_index(tensor: type, scope: object) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)

    @pytest.mark.parametrize(("bounds", "outputs", "inputs"), SHAPES)
    class TestKernels:
        @pytest.mark.parametrize("power_of_two", [False, True])
        def test_rows(self, bounds: list[int], outputs: int, inputs: int, power_of_two: bool):
            for dtype, size in ((torch.float32, 1e-9), (torch.bfloat16, 1.0)):
                x = numbers(bounds[-1], inputs, size=size).to(dtype)
                x[-1] = 0.0
                got = fp8_gpu.quantize_rows(x, power_of_two)
                wanted = fp8_training.quantize_rows_reference(x, power_of_two=power_of_two)
                assert all(map(same, got, wanted))

        @pytest.mark.parametrize("transposed", [False, True])
        def test_weight(self, bounds: list[int], outputs: int, inputs: int, transposed: bool):
            weight = numbers(len(bounds) - 1, outputs, inputs)
            weight[0, :, 0] = 0.0
            got = fp8_gpu.quantize_weight(weight, transposed)
            wanted = fp8_training.quantize_weight(weight.cpu(), transposed=transposed)
            assert all(same(g.cpu(), w) for g, w in zip(got, wanted, strict=True))

        def test_columns(self, bounds: list[int], outputs: int, inputs: int):
            where = Rows(bounds)
            x = numbers(bounds[-1], inputs, size=1e-6)
            stored, scale = fp8_training.quantize_rows_reference(x, power_of_two=True)
            for got, wanted in (
                (
                    fp8_gpu.quantize_columns(x, where.ends, None, False),
                    fp8_training.quantize_columns_reference(x, where),
                ),
                (
                    fp8_gpu.quantize_columns(stored, where.ends, scale, True),
                    fp8_training.quantize_columns_reference(stored, where, scale, power_of_two=True),
                ),
            ):
                tiles = len(wanted[1])
                assert same(got[0][:, : tiles * 128], wanted[0])
                assert same(got[1][:tiles], wanted[1])

        @pytest.mark.parametrize("behind", [0, 5])  # rows that are nobody's
        def test_product(self, bounds: list[int], outputs: int, inputs: int, behind: int):
            where, rows = Rows(bounds), bounds[-1]
            x, x_scale = fp8_gpu.quantize_rows(numbers(rows + behind, inputs), True)
            weight, weight_scale = fp8_training.quantize_weight(numbers(len(bounds) - 1, outputs, inputs).cpu())
            weight, weight_scale = weight.to(DEVICE), weight_scale.to(DEVICE)
            given = (x, x_scale, weight, weight_scale)
            wanted = fp8_training.product_reference(*given, where, torch.float32)[:rows]
            assert close(fp8_gpu.product(*given, where.ends, torch.float32)[:rows], wanted)
            rounded = fp8_gpu.product(*given, where.ends, torch.bfloat16)
            assert rounded.dtype == torch.bfloat16
            # 2^-7: the interpreter cuts the bits off
            assert ((rounded[:rows] - wanted).abs() <= wanted.abs() * 2.0**-7 + 1e-3 * wanted.abs().max()).all()

        def test_weight_gradient(self, bounds: list[int], outputs: int, inputs: int):
            where, rows = Rows(bounds), bounds[-1]
            grad = fp8_gpu.quantize_columns(numbers(rows + 3, outputs, size=1e-6), where.ends, None, False)
            x = fp8_gpu.quantize_columns(numbers(rows + 3, inputs), where.ends, None, True)
            wanted = fp8_training.weight_gradient_reference(*grad, *x, where, torch.float32)
            got = fp8_gpu.weight_gradient(*grad, *x, where.ends, torch.float32)
            assert close(got, wanted)
            for expert, (start, end) in enumerate(pairwise(bounds)):
                assert start < end or not got[expert].any()

    @pytest.mark.skipif(not GPU or CHILD, reason="needs a GPU with FP8")
    @pytest.mark.parametrize(("rows", "outputs", "inputs"), [(256, 384, 512), (100, 384, 512), (64, 100, 72)])
    def test_everything_on_a_gpu(rows: int, outputs: int, inputs: int):
        """Gradients and all, with cuBLAS where the sizes allow it, against the reference on the CPU."""
        given = [numbers(rows, inputs).bfloat16(), numbers(outputs, inputs, size=0.02), numbers(rows, outputs)]
        results = []
        for device in ("cuda", "cpu"):
            x, weight = (t.to(device).requires_grad_() for t in given[:2])
            out = fp8_training.linear(x, weight)
            out.backward(given[2].bfloat16().to(device))
            results.append([out.detach().float().cpu(), x.grad.float().cpu(), weight.grad.cpu()])
        for got, wanted in zip(*results, strict=True):
            assert float((got - wanted).norm() / wanted.norm()) < 0.004


def _count_instructions() -> None:
    """Prints each kernel's name and how many FP8 matrix instructions it has, compiled for compute capability 9.0."""
    import re
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from abyssal.kernels import fp8_gpu as kernels

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        print("this build of triton has no compiler for NVIDIA", file=sys.stderr)
        sys.exit(77)
    sizes = {"n_columns": 1024, "n_out": 1024, "n_in": 2048, "EXPERTS": 64, "SCALED": True, "POWER_OF_TWO": True}
    sizes |= {"in_stride": 1, "scale_in_stride": 1, "x_scale_row": 1}
    types = {"stored": "*fp8e4nv", "out": "*bf16", "weight": "*fp8e4nv", "grad": "*fp8e4nv", "x": "*fp8e4nv"}
    types |= dict.fromkeys(("scale", "x_scale", "weight_scale", "grad_scale"), "*fp32") | {"ends": "*i32"}
    for kernel in (
        kernels._quantize_rows,
        kernels._quantize_weight,
        kernels._quantize_columns,
        kernels._product,
        kernels._weight_gradient,
    ):
        names = kernel.arg_names
        signature = {n: "constexpr" if n in sizes else types.get(n, "i32") for n in names}
        constants = {(names.index(n),): value for n, value in sizes.items() if n in names}
        aligned = [n for n in names if signature[n].startswith("*") or n in ("width", "x_scale_tile", "scale_stride")]
        divisible = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            shown = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
        print(kernel.__name__, len(re.findall(r"\bQGMMA", shown)))


if __name__ == "__main__":
    _count_instructions()
