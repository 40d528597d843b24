"""Training some of the experts: the same layer as before, and gradients nowhere else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import MODEL, scrambled

from abyssal.config import MoEConfig, resolve_model
from abyssal.errors import UserError
from abyssal.kernels.grouped import experts_reference
from abyssal.model import Transformer
from abyssal.model.moe import Experts
from abyssal.model.partial import PartialExperts, train_experts

MOE = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def experts(dtype: torch.dtype, seed: int = 0) -> Experts:
    module = Experts(24, MoEConfig(**MOE))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return module.to(dtype)


@given(
    trained=st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True),
    rows=st.integers(1, 40),
    seed=st.integers(0, 100),
)
def test_output_and_gradients_are_those_of_the_whole(trained, rows, seed):
    whole = experts(torch.float64, seed)
    part = PartialExperts(whole, trained)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 24, dtype=torch.float64, generator=generator, requires_grad=True)
    indices = torch.rand(rows, 6, generator=generator).topk(2).indices
    weights = torch.rand(rows, 2, dtype=torch.float64, generator=generator)
    expected = experts_reference(x, indices, weights, whole.gate_up_proj, whole.down_proj)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    grads = torch.autograd.grad(expected, (x, whole.gate_up_proj, whole.down_proj), grad)
    got = part(x, indices, weights)
    torch.testing.assert_close(got, expected)
    got.backward(grad)
    torch.testing.assert_close(x.grad, grads[0])
    torch.testing.assert_close(part.gate_up_proj.grad, grads[1][list(part.trained)])
    torch.testing.assert_close(part.down_proj.grad, grads[2][list(part.trained)])
    assert part.still_gate_up.grad is None
    assert part.still_down.grad is None


def test_in_bf16_and_without_gradient():
    whole = experts(torch.bfloat16)
    part = PartialExperts(whole, [4, 1])
    x = torch.randn(5, 24).bfloat16()
    indices = torch.tensor([[0, 1], [4, 1], [2, 3], [5, 4], [1, 0]])
    weights = torch.rand(5, 2)
    exact = experts_reference(x.double(), indices, weights.double(), *(p.double() for p in whole.parameters()))
    with torch.no_grad():
        got = part(x, indices, weights)
    torch.testing.assert_close(got.double(), exact, rtol=3e-2, atol=3e-2)


def test_stacked_gives_back_every_expert_in_its_place():
    whole = experts(torch.float32)
    part = PartialExperts(whole, [5, 0, 3])
    assert torch.equal(part.stacked("gate_up_proj"), whole.gate_up_proj)
    assert torch.equal(part.stacked("down_proj"), whole.down_proj)


def test_nothing_else_of_a_model_is_trained():
    model = scrambled(Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(0)))
    tokens = torch.randint(0, 258, (2, 12), generator=torch.Generator().manual_seed(1))
    before = model(tokens).detach()
    train_experts(model, {"model.layers.1.mlp.experts": [2]})
    torch.testing.assert_close(model(tokens), before)
    model(tokens).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}
    assert model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").shape[0] == 1


@pytest.mark.parametrize("wrong", [[], [6], [-1], [2, 2]])
def test_wrong_experts_are_refused(wrong):
    with pytest.raises(UserError, match="experts to train"):
        PartialExperts(experts(torch.float32), wrong)
