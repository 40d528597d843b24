"""Muon against the singular value decomposition in float64, and against torch.optim.Muon, one matrix at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import MODEL
from torch import Tensor, nn

from abyssal.config import resolve_model
from abyssal.model import Transformer
from abyssal.training import muon
from abyssal.training.muon import COEFFICIENTS, Muon, newton_schulz
from abyssal.training.optimizer import build_optimizer
from abyssal.training.recipe import OptimizerConfig
from abyssal.training.weights import to_bfloat16, to_float32


def polynomial(s: Tensor) -> Tensor:
    """What five steps make of singular values, one number at a time."""
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return s


def by_svd(matrix: Tensor) -> Tensor:
    """Newton-Schulz of one matrix [M, N] by its definition, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ torch.diag(polynomial(s / s.norm())) @ vh


class TestNewtonSchulz:
    @settings(max_examples=30)
    @given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
    def test_each_matrix_by_its_singular_values(self, batch, rows, columns, seed):
        x = torch.randn(*batch, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x *= 10.0 ** (seed % 7 - 3)
        got = newton_schulz(x)
        assert got.shape == x.shape
        for one, result in zip(x.view(-1, rows, columns), got.reshape(-1, rows, columns), strict=True):
            torch.testing.assert_close(result, by_svd(one), rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(64, 64), (96, 32), (3, 24, 80)])
    def test_singular_values_lie_near_one(self, dtype, shape):
        """As published: S' is spread over about (0.7, 1.2) (Keller Jordan's post); less only where s was near 0."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        s = torch.linalg.svdvals(newton_schulz(x.to(dtype)).double())
        before = torch.linalg.svdvals(x.double())
        assert s.max() < 1.25
        assert s[before > 0.02 * before.amax(-1, keepdim=True)].min() > 0.6
        assert (newton_schulz(x.to(dtype)).double() - newton_schulz(x.double())).norm() < 0.03 * s.norm()

    def test_a_matrix_of_zeros_stays_zero_and_harms_no_other(self):
        x = torch.randn(3, 8, 5)
        x[1] = 0
        got = newton_schulz(x)
        assert (got[1] == 0).all()
        torch.testing.assert_close(got[0].double(), by_svd(x[0]), rtol=1e-3, atol=1e-4)


def build(dtype: torch.dtype = torch.float32, **config: object) -> tuple[Transformer, Muon]:
    model = Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(0)).to(dtype)
    optimizer = build_optimizer(model, OptimizerConfig(**{"lr": 0.02, "name": "muon", **config}))
    assert isinstance(optimizer, Muon)
    return model, optimizer


def draw(model: Transformer, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=g, dtype=torch.float64) for name, p in model.named_parameters()}


def matrices(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices that a parameter holds."""
    if name.endswith("gate_up_proj"):
        return [half for expert in tensor for half in expert.chunk(2)]
    return list(tensor) if name.endswith("experts.down_proj") else [tensor]


def is_muon(name: str) -> bool:
    return not name.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight"))


def test_who_goes_by_what():
    model, optimizer = build(weight_decay=0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [({names[id(p)] for p in g["params"]}, g["weight_decay"], g.get("parts")) for g in optimizer.param_groups]
    (single, d1, p1), (stacked, d2, p2), (tables, d3, p3), (norms, d4, p4) = groups
    assert (p1, p2, p3, p4) == (1, 2, None, None)
    assert (d1, d2, d3, d4) == (0.3, 0.3, 0.3, 0.0)
    assert stacked == {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (1, 2)}
    assert tables == {"model.embed_tokens.weight", "lm_head.weight"}
    assert norms == {name for name in names.values() if name.endswith("norm.weight")}
    assert single | stacked == {name for name in names.values() if is_muon(name)}
    assert "model.layers.1.mlp.gate.weight" in single
    for name, p in model.named_parameters():
        moments = {"exp_avg"} if is_muon(name) else {"exp_avg", "exp_avg_sq"}
        assert optimizer.state[p].keys() == {"step", *moments}


def test_three_steps_by_definition_in_float64():
    """Moonlight's rule for every matrix by itself; Newton-Schulz through the singular values."""
    model, optimizer = build(torch.float64, momentum=0.9, weight_decay=0.2)
    weights = {n: [w.clone() for w in matrices(n, p.detach())] for n, p in model.named_parameters() if is_muon(n)}
    momenta = {n: [torch.zeros_like(w) for w in ws] for n, ws in weights.items()}
    for step in range(3):
        grads = draw(model, step)
        for name, p in model.named_parameters():
            p.grad = grads[name]
        optimizer.step(0.5)
        for name, ws in weights.items():
            for i, g in enumerate(matrices(name, 0.5 * grads[name])):
                momenta[name][i] = m = 0.9 * momenta[name][i] + 0.1 * g
                update = by_svd(0.1 * g + 0.9 * m)
                ws[i] = ws[i] * (1 - 0.02 * 0.2) - 0.02 * 0.2 * math.sqrt(max(g.shape)) * update
    for name, p in model.named_parameters():
        if is_muon(name):
            for got, expected in zip(matrices(name, p.detach()), weights[name], strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: n + m)


def test_against_torch():
    """torch.optim.Muon on each matrix, its AdamW on the rest. Both multiply in BF16, which is good for 2 or 3%."""
    model, optimizer = build()
    optimizer.dtype = torch.bfloat16
    pieces = {n: [nn.Parameter(w.clone()) for w in matrices(n, p.detach())] for n, p in model.named_parameters()}
    theirs = [
        torch.optim.Muon(
            [p for n, ps in pieces.items() if is_muon(n) for p in ps],
            lr=0.02,
            weight_decay=0.1,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [
                {"params": [p for n, ps in pieces.items() if not is_muon(n) and n.endswith(end) for p in ps], **decay}
                for end, decay in ((("tokens.weight", "head.weight"), {}), ("norm.weight", {"weight_decay": 0.0}))
            ],
            lr=0.02,
            betas=(0.9, 0.95),
            weight_decay=0.1,
        ),
    ]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(3):
        grads = draw(model, step)
        for name, p in model.named_parameters():
            p.grad = grads[name].float()
            for piece, grad in zip(pieces[name], matrices(name, grads[name].float()), strict=True):
                piece.grad = grad.clone()
        optimizer.step()
        for other in theirs:
            other.step()
    for name, p in model.named_parameters():
        for got, expected, first in zip(
            matrices(name, p.detach()), pieces[name], matrices(name, start[name]), strict=True
        ):
            moved = (expected - first).norm()
            assert (got - expected).norm() < (0.04 if is_muon(name) else 1e-4) * moved, name


def test_an_update_has_the_size_of_adamws():
    """RMS of 0.2 · lr where rows = columns or few of the larger kind's; the paper's reason for its factor."""
    model, optimizer = build(weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = draw(model, 0)[name].float()
    optimizer.step()
    for name, p in model.named_parameters():
        if is_muon(name):
            rms = (p - before[name]).square().mean().sqrt().item()
            assert 0.5 * 0.2 * 0.02 < rms < 1.3 * 0.2 * 0.02, name


@pytest.mark.parametrize("batch", [1, 600, 2**26])
def test_batches_of_any_size_give_the_same(batch, monkeypatch):
    results = []
    for size in (2**26, batch):
        monkeypatch.setattr(muon, "_BATCH", size)
        model, optimizer = build(torch.float64)
        for name, p in model.named_parameters():
            p.grad = draw(model, 0)[name]
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())
        results.append({n: p.detach() for n, p in model.named_parameters()})
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=1e-12)


def test_bfloat16_weights_have_float32_masters():
    plain, reference = build(lr=1e-4)
    model, optimizer = build(lr=1e-4)
    to_bfloat16(model, optimizer)
    for step in range(3):
        for name, grad in draw(plain, step).items():
            for m in (plain, model):
                p = m.get_parameter(name)
                p.grad = grad.bfloat16().to(p.dtype)
        reference.step(), optimizer.step()
    to_float32(model, optimizer)
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: n + m)
