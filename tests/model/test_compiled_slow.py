"""torch.compile on the parts of a block: minutes, since everything is compiled (make test-slow)."""

import copy
import shutil

import pytest
import torch
from plain_models import small, tokens_for

from abyssal.model import RoutingRecorder, Transformer


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_parts_give_the_same_gradients(dtype: torch.dtype):
    """In BF16 in whole graphs: nothing falls back to Python on the way, so nothing waits for a GPU there."""
    plain = Transformer(small(moe={"moe_intermediate_size": 8}), generator=torch.Generator().manual_seed(0))
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in compiled.model.layers:
        block.compile_parts()
    tokens = tokens_for(plain.config, 2, 16)
    results = []
    for model in (plain, compiled):
        recorder = RoutingRecorder()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            hidden = model.hidden(tokens, recorder=recorder)
        # Not the sum of squares: of normed vectors that hardly changes.
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        (hidden.float() * upstream).sum().backward()
        loads = [routing[0].load().tolist() for routing in recorder.routings.values()]
        results.append((hidden.double(), [p.grad.double() for p in model.model.parameters()], loads))
    (a, grads_a, loads_a), (b, grads_b, loads_b) = results
    assert loads_a == loads_b
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert (a - b).norm() <= bound * a.norm()
    for ours, other in zip(grads_a, grads_b, strict=True):
        assert (ours - other).norm() <= bound * ours.norm() + 1e-6
    if dtype == torch.bfloat16:  # in FP32 experts are multiplied one after the other, by bounds read from the device
        assert torch._dynamo.utils.counters["graph_break"] == {}
