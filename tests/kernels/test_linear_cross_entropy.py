import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from abyssal.kernels.loss import IGNORED, linear_cross_entropy, linear_cross_entropy_reference, linear_token_nats


def inputs(
    tokens: int = 23, hidden: int = 6, vocab: int = 11, ignored: float = 0.3, seed: int = 0, std: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=g, dtype=torch.float64) * std
    w = torch.randn(vocab, hidden, generator=g, dtype=torch.float64) * std
    t = torch.randint(0, vocab, (tokens,), generator=g)
    t[torch.rand(tokens, generator=g) < ignored] = IGNORED
    return h, w, t


def run(function: Any, h: Tensor, w: Tensor, t: Tensor, scale: float = 1.0, **how: int) -> tuple[Tensor, ...]:
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    loss = function(h, w, t, **how)
    (loss * scale).backward()
    return loss.detach(), h.grad, w.grad


def exact(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(h.double() @ w.double().T, t, ignore_index=-100, reduction="sum")


@settings(max_examples=50)
@given(
    tokens=st.integers(1, 30),
    hidden=st.integers(1, 9),
    vocab=st.integers(1, 20),
    chunk=st.integers(1, 40),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    std=st.sampled_from([0.1, 3.0]),
    scale=st.sampled_from([1.0, -0.3]),
    seed=st.integers(0, 2**31),
)
def test_value_and_gradients_equal_cross_entropy(
    tokens: int, hidden: int, vocab: int, chunk: int, ignored: float, std: float, scale: float, seed: int
):
    args = inputs(tokens, hidden, vocab, ignored, seed, std)
    expected = run(exact, *args, scale=scale)
    for ours, right in zip(run(linear_cross_entropy, *args, scale=scale, chunk=chunk), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-11)
    h, w, t = args
    for ours, right in zip(
        run(linear_cross_entropy, h.float(), w.float(), t, scale, chunk=chunk), expected, strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear_cross_entropy_reference(*args).double(), expected[0], rtol=1e-5, atol=1e-5)


def test_gradcheck():
    h, w, t = inputs(7, 3, 5)
    h.requires_grad_()
    w.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, t, chunk=3), (h, w))


def test_by_hand():
    # logits (0, ln 3): p = (1/4, 3/4)
    h, w = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[0.0], [math.log(3)]])
    loss = linear_cross_entropy(h, w, torch.tensor([0, 1, -100]))
    assert float(loss) == pytest.approx(math.log(4) + math.log(4 / 3), rel=1e-6)


def test_all_ignored_is_zero_with_zero_gradients():
    h, w, _ = inputs()
    loss, gh, gw = run(linear_cross_entropy, h, w, torch.full((23,), IGNORED))
    assert float(loss) == 0
    assert gh.abs().max() == gw.abs().max() == 0


def test_very_large_logits_do_not_overflow():
    h, w, t = inputs(std=40.0)
    loss, gh, gw = run(linear_cross_entropy, h.float(), w.float(), t)
    torch.testing.assert_close(loss.double(), exact(h, w, t), rtol=1e-5, atol=0)
    assert gh.isfinite().all()
    assert gw.isfinite().all()


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_close(head_dtype: torch.dtype):
    h, w, t = inputs(200, 32, 100, std=0.5)
    expected = run(exact, h, w, t)
    if head_dtype == torch.bfloat16:
        ours = run(linear_cross_entropy, h.bfloat16(), w.bfloat16(), t, chunk=64)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            ours = run(linear_cross_entropy, h.float(), w.float(), t, chunk=64)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == ours[2].dtype == head_dtype
    assert abs(float(ours[0] - expected[0])) < 2e-3 * float(expected[0])
    for a, b in zip(ours[1:], expected[1:], strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()
    if head_dtype == torch.float32:  # products did run in BF16
        plain = run(linear_cross_entropy, h.float(), w.float(), t)
        assert not torch.equal(plain[1], ours[1])


@pytest.mark.parametrize(("hidden_needs", "weight_needs"), [(True, False), (False, True)])
def test_gradient_of_only_one(hidden_needs: bool, weight_needs: bool):
    h, w, t = inputs()
    _, gh, gw = run(exact, h, w, t)
    h.requires_grad_(hidden_needs)
    w.requires_grad_(weight_needs)
    linear_cross_entropy(h, w, t).backward()
    for leaf, right in ((h, gh), (w, gw)):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, right, rtol=1e-11, atol=1e-11)
        else:
            assert leaf.grad is None


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made, and how many matrix products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def test_logits_never_stand_whole():
    h, w, t = inputs(1024, 4, 256)
    with Largest() as seen:
        run(exact, h, w, t)
    assert seen.numel >= 1024 * 256  # the hook sees it where it happens
    with Largest() as seen:
        run(linear_cross_entropy, h, w, t, chunk=64)
    assert seen.numel == 64 * 256


def test_without_gradients_none_are_computed():
    h, w, t = inputs()
    w.requires_grad_()
    with torch.no_grad(), Largest() as seen:
        loss = linear_cross_entropy(h, w, t, chunk=23)
    assert seen.products == 1
    torch.testing.assert_close(loss, exact(h, w, t).detach())


@pytest.mark.parametrize("target", [-1, 11])
def test_targets_outside_the_vocabulary_are_no_class(target: int):
    h, w, t = inputs(vocab=11)
    t[3] = target
    with pytest.raises((RuntimeError, IndexError)):  # as F.cross_entropy
        linear_cross_entropy(h, w, t)


@pytest.mark.parametrize("chunk", [None, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nats_of_each_token_against_whole_logits(chunk, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 12, dtype=dtype, generator=generator, requires_grad=True) for n in (10, 31))
    targets = torch.randint(0, 31, (10,), generator=generator)
    factors = torch.randn(10, dtype=dtype, generator=generator)  # each token weighs something else
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    grads = torch.autograd.grad((expected * factors).sum(), (hidden, weight))
    got = linear_token_nats(hidden, weight, targets, chunk=chunk)
    torch.testing.assert_close(got, expected)
    (got * factors).sum().backward()
    torch.testing.assert_close(hidden.grad, grads[0])
    torch.testing.assert_close(weight.grad, grads[1])


def test_nats_of_no_token():
    got = linear_token_nats(torch.zeros(0, 4, requires_grad=True), torch.zeros(5, 4), torch.zeros(0, dtype=torch.long))
    assert got.shape == (0,)
    got.sum().backward()
