import pytest
import torch
from plain_models import V3_MOE, difference, randomised, small

from abyssal.kernels.grouped import experts_reference
from abyssal.model.layers import MLP, RMSNorm
from abyssal.model.moe import MoE


def layer_and_input(count: int = 11, **moe: object) -> tuple[MoE, torch.Tensor]:
    layer = randomised(small(moe=V3_MOE | moe)).blocks[1].mlp
    assert isinstance(layer, MoE)
    x = torch.randn(2, count, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return layer, x


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_layer_is_routed_plus_shared_experts(shared: int):
    layer, x = layer_and_input(n_shared_experts=shared)
    routing = layer.route(x)
    expected = torch.zeros(22, 24, dtype=torch.float64)
    for n in range(22):
        token = x.view(22, 24)[n]
        for expert, weight in zip(routing.indices.view(22, 3)[n], routing.weights.view(22, 3)[n], strict=True):
            gate, up = (layer.experts.gate_up_proj[expert] @ token).split(5)
            expected[n] += weight * (layer.experts.down_proj[expert] @ (gate * gate.sigmoid() * up))
        if shared:
            s = layer.shared_experts
            gate, up = s.gate_proj.weight @ token, s.up_proj.weight @ token
            assert gate.shape == (5 * shared,)
            expected[n] += s.down_proj.weight @ (gate * gate.sigmoid() * up)
    assert difference(layer(x, routing).view(22, 24), expected) < 1e-12


def test_autocast_computes_experts_in_bfloat16():
    layer, x = layer_and_input(count=64)
    layer, x = layer.float(), x.float()
    routing = layer.route(x)
    arguments = routing.indices.flatten(0, 1), routing.weights.flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer.experts(x.flatten(0, 1), *arguments)
    assert out.dtype == torch.bfloat16
    exact = experts_reference(
        x.flatten(0, 1).double(),
        *arguments,
        layer.experts.gate_up_proj.double(),
        layer.experts.down_proj.double(),
    )
    assert difference(out, exact) < 0.02


def test_swiglu_and_rmsnorm_by_hand():
    mlp = MLP(2, 1).double()
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(torch.tensor([[1.0, 2.0]]))
        mlp.up_proj.weight.copy_(torch.tensor([[3.0, -1.0]]))
        mlp.down_proj.weight.copy_(torch.tensor([[1.0], [-2.0]]))
    # gate 3, up 2: silu(3) = 3 / (1 + e^-3) = 2.857722…
    out = mlp(torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(out, torch.tensor([5.7154447609346, -11.4308895218692], dtype=torch.float64))
    norm = RMSNorm(2, 0.5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 3.0]))
    # mean square (9 + 16) / 2 = 12.5; √13 = 3.605551…
    torch.testing.assert_close(
        norm(torch.tensor([3.0, 4.0], dtype=torch.float64)),
        torch.tensor([3 / 13**0.5, 12 / 13**0.5], dtype=torch.float64),
    )
