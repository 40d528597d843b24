"""The compiled library: that it is made once, that nothing depends on it, and that odd numbers go through it whole."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from abyssal.kernels import native
from abyssal.kernels.attention import attention, attention_reference
from abyssal.kernels.fused import rms_norm, swiglu

compiled = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


def fresh(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process of its own, with a cache of its own."""
    env = {**os.environ, "XDG_CACHE_HOME": str(folder), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)


ASK = "from abyssal.kernels import native; print(native.library() is not None)"


@compiled
def test_it_is_compiled_once_and_kept(tmp_path: Path):
    assert fresh(tmp_path, ASK).stdout == "True\n"
    (library,) = tmp_path.glob("abyssal/native-*.so")
    written = library.stat().st_mtime_ns
    assert fresh(tmp_path, ASK).stdout == "True\n"
    assert library.stat().st_mtime_ns == written
    assert sorted(p.name for p in library.parent.iterdir()) == [library.name, "native.lock"]


def test_it_can_be_switched_off(tmp_path: Path):
    assert fresh(tmp_path, ASK, ABYSSAL_NATIVE="0").stdout == "False\n"
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_everything_still_runs(tmp_path: Path):
    code = ASK + "; import torch; from abyssal.kernels.fused import swiglu; print(swiglu(torch.ones(1, 2)))"
    done = fresh(tmp_path, code, PATH=str(tmp_path))
    assert done.stdout == "False\ntensor([[0.7311]])\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("no C++ compiler found")
    assert fresh(tmp_path, code, PATH=str(tmp_path), ABYSSAL_NATIVE="0").stderr == ""


def test_a_compiler_that_fails_is_said_once(tmp_path: Path):
    (tmp_path / "c++").write_text("#!/bin/sh\n[ $1 = --version ] && echo 1 && exit\necho no such header >&2\nexit 1\n")
    (tmp_path / "c++").chmod(0o755)
    done = fresh(tmp_path, f"{ASK}; native.library()", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.stdout == "False\n"
    assert done.stderr.count("no such header") == 1
    assert "going on in plain PyTorch" in done.stderr


@compiled
def test_it_is_for_plain_tensors_of_a_cpu():
    assert native.supports(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16), torch.nn.Parameter(torch.zeros(1)))
    assert not native.supports(torch.zeros(1, dtype=torch.float64))
    assert not native.supports(torch.zeros(1), torch.zeros(1, device="meta"))
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert not native.supports(torch.zeros(1))


def test_nan_and_infinity_are_not_lost():
    """A run is stopped by a loss that is not finite, so nothing on the way may turn it into a number."""
    for bad in (math.nan, math.inf):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(3, 64, dtype=dtype)
            x[1, 5] = bad
            assert not swiglu(x)[1].isfinite().all()
            assert not rms_norm(x, torch.ones(64), 1e-6, dtype)[1].isfinite().all()
            assert swiglu(x)[[0, 2]].isfinite().all()
    q = torch.ones(1, 1, 8, 16, dtype=torch.bfloat16)
    q[0, 0, 3, 2] = math.nan
    out = attention(q.requires_grad_(), q, torch.ones_like(q), 0.1, None, causal=True)
    assert out[0, 0, 3].isnan().all()
    assert out[0, 0, 2].isfinite().all()


@compiled
@pytest.mark.parametrize("length", [1, 2, 33, 300, 520])
@pytest.mark.parametrize("scale", [0.01, 0.3, 5.0])
def test_attention_in_blocks_equals_the_formula(length: int, scale: float, monkeypatch: pytest.MonkeyPatch):
    """Several blocks of queries where there are many; keys of the same sequence get gradients from all of them."""
    monkeypatch.setattr("abyssal.kernels.attention._BLOCK", 64)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, size, generator=g).bfloat16() for size in (24, 24, 17))
    results = []
    for function, dtype in (
        (attention, torch.bfloat16),
        (attention_reference, torch.bfloat16),
        (attention_reference, torch.float64),
    ):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, scale, None, True)
        out.backward(torch.cos(torch.arange(out.numel())).view(out.shape).to(dtype))
        results.append([x.double() for x in (out, *(leaf.grad for leaf in leaves))])
    for ours, plain, exact in zip(*results, strict=True):
        # As near to float64 as plain BF16 products and softmax are.
        assert (ours - exact).norm() <= 1.3 * (plain - exact).norm() + 1e-3 * exact.norm() + 1e-6


DEFAULTS = """
import torch
from abyssal.kernels.attention import attention
from abyssal.kernels.fused import rms_norm
from abyssal.kernels.loss import linear_cross_entropy
from abyssal.kernels.backend import product_dtype
def numbers():
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(600, 8, generator=g, dtype=torch.float32).requires_grad_() for _ in range(2))
    loss = linear_cross_entropy(h, w, torch.arange(600)) + rms_norm(h, w[0], 1e-6, torch.float32).square().sum()
    q = torch.randn(1, 2, 40, 8, generator=g, dtype=torch.float32).bfloat16().requires_grad_()
    (loss + attention(q, q, q, 0.3, None, True).float().sum()).backward()
    return [loss.detach(), h.grad, w.grad, q.grad.float()]
first = numbers()
for dtype in (torch.float64, torch.bfloat16):
    torch.set_default_dtype(dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, numbers()))
torch.set_default_dtype(torch.float32)
assert rms_norm(torch.ones(2, 4, device="meta"), torch.ones(4, device="meta"), 1e-6, torch.float32).shape == (2, 4)
assert product_dtype(torch.ones(1, device="meta")) == torch.float32
print("done")
"""


def test_torchs_defaults_change_nothing(tmp_path: Path):
    """torch.set_default_dtype(bfloat16) is how DeepSeek's own script begins."""
    assert subprocess.run([sys.executable, "-c", DEFAULTS], capture_output=True, text=True).stdout == "done\n"


def test_targets_and_experts_of_any_kind_of_integer():
    from abyssal.kernels.grouped import plan
    from abyssal.kernels.loss import linear_cross_entropy, linear_cross_entropy_reference

    g = torch.Generator().manual_seed(0)
    h, w, t = torch.randn(6, 4, generator=g), torch.randn(10, 4, generator=g), torch.randint(0, 10, (6, 2), generator=g)
    expected = linear_cross_entropy_reference(h, w, t[:, 0])
    for targets in (t[:, 0], t[:, 0].clone(), t[:, 0].int()):
        torch.testing.assert_close(linear_cross_entropy(h, w, targets), expected)
    indices = t % 5
    for kind in (indices, indices.int(), torch.stack((indices, indices), -1)[..., 0]):
        assert torch.equal(plan(kind, 5, torch.float32).slot, plan(indices.clone(), 5, torch.float32).slot)
    for outside in (-1, 5, 10_000_000):
        with pytest.raises((IndexError, RuntimeError)):
            plan(torch.tensor([[0, outside]]), 5, torch.float32)


def test_one_vector_alone():
    torch.testing.assert_close(swiglu(torch.ones(4))[None], swiglu(torch.ones(1, 4)))
    x = torch.arange(4.0)
    torch.testing.assert_close(
        rms_norm(x, torch.ones(4), 1e-6, x.dtype)[None], rms_norm(x[None], torch.ones(4), 1e-6, x.dtype)
    )


@compiled
def test_a_target_outside_the_vocabulary_is_refused():
    for target in (-1, 7):
        with pytest.raises(IndexError):
            native.cross_entropy_(torch.zeros(2, 7), torch.tensor([0, target]), -100)


def test_no_warning_in_ordinary_use(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.library.cache_clear()
        native.library()
