"""What a recorder that asks for outputs sees, and that asking changes nothing."""

import pytest
import torch
from plain_models import difference, randomised, small, tokens_for

from abyssal.model import RoutingRecorder
from abyssal.model.router import OutputRecorder


class Outputs(RoutingRecorder):
    def __init__(self):
        super().__init__()
        self.outputs = {}

    def record_outputs(self, layer, routed, shared):
        self.outputs.setdefault(layer, []).append((routed, shared))


def test_which_recorders_ask_for_outputs():
    assert isinstance(Outputs(), OutputRecorder)
    assert not isinstance(RoutingRecorder(), OutputRecorder)
    assert not isinstance(None, OutputRecorder)


@pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 0}, {"segments": 3}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_parts_of_every_layer_once_and_the_same_result(changes, recompute):
    config = small(moe=changes, mtp={"num_nextn_predict_layers": 1})
    model, tokens = randomised(config), tokens_for(config, 2, 9)
    results = []
    for recorder in (None, RoutingRecorder(), Outputs()):
        hidden = model.hidden(tokens[:, :8], recorder=recorder, recompute=recompute)
        (ahead,) = model.mtp_hidden(hidden, tokens, recorder=recorder, recompute=recompute)
        model.zero_grad()
        (hidden.square().sum() + ahead.square().sum()).backward()
        results.append((hidden, ahead, [p.grad.clone() for p in model.model.parameters()]))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])
        assert all(torch.equal(a, b) for a, b in zip(results[0][2], other[2], strict=True))
    assert sorted(recorder.outputs) == sorted(recorder.routings) == sorted(model.routers)
    assert all(len(found) == 1 for found in recorder.outputs.values())


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("segments", [1, 3])
def test_parts_are_the_two_sums(shared, segments):
    config = small(moe={"n_shared_experts": shared, "segments": segments})
    layer = randomised(config).blocks[1].mlp
    x = torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    routing = layer.route(x)
    routed, apart = layer.parts(x, routing)
    parts = x.unflatten(-1, (segments, -1)).flatten(1, 2)
    expected = torch.zeros_like(parts)
    for row in range(2):
        for n in range(7 * segments):
            pairs = zip(routing.indices[row, n], routing.weights[row, n], strict=True)
            for expert, weight in pairs:
                gate, up = (layer.experts.gate_up_proj[expert] @ parts[row, n]).chunk(2)
                expected[row, n] += weight * (layer.experts.down_proj[expert] @ (gate * gate.sigmoid() * up))
    assert difference(routed, expected.view(x.shape)) < 1e-12
    if not shared:
        assert apart is None
        return
    s = layer.shared_experts
    gate, up = x @ s.gate_proj.weight.T, x @ s.up_proj.weight.T
    assert difference(apart, (gate * gate.sigmoid() * up) @ s.down_proj.weight.T) < 1e-12
    assert torch.equal(layer(x, routing), routed + apart)


def test_selection_without_the_bias():
    router = randomised(small(moe={"n_group": 1, "topk_group": 1})).blocks[1].mlp.gate
    scores = torch.rand(50, router.weight.shape[0], generator=torch.Generator().manual_seed(5))
    router.e_score_correction_bias.zero_()
    router.e_score_correction_bias[4] = 10
    assert (router.select(scores) == 4).any(-1).all()
    without = router.select(scores, biased=False)
    router.e_score_correction_bias.zero_()
    assert torch.equal(without, router.select(scores))
