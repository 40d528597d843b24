"""Captured passes against the same model run as ever."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from test_engine import KINDS, PLAIN, model_of, plain
from test_generate import BYTES, MLA, MOE, make_model

from abyssal.generation import Sampling
from abyssal.generation.captured import CapturedPasses
from abyssal.generation.engine import Engine
from abyssal.kernels import native
from abyssal.model import RoutingRecorder

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
GREEDY = Sampling(temperature=0, max_new_tokens=12)


def run(engine: Engine, *prompts: list[int], sampling: Sampling = GREEDY) -> list[list[int]]:
    sequences = [engine.add(prompt, sampling) for prompt in prompts]
    while engine.busy:
        engine.step()
    return [sequence.new for sequence in sequences]


def captured(engine: Engine) -> Iterator[bool]:
    yield from (known is not None for known in engine.passes.captured._known.values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "separate"])
def test_every_step_of_decoding_is_captured(kind: str):
    engine = Engine(model_of(kind), BYTES, page=4)
    assert run(engine, [5, 6, 7], [9, 10]) == [plain(kind, [5, 6, 7], 12), plain(kind, [9, 10], 12)]
    known = list(captured(engine))
    assert known
    assert all(known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mla", "mha", "one module"])
def test_the_same_numbers_as_without(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Bit by bit: it is the same code on the same numbers."""
    model = make_model(dtype, **KINDS[kind]).requires_grad_(False)
    told = Sampling(temperature=0, max_new_tokens=20, logprobs=3)

    def numbers(*prompts: list[int]) -> list[list[float]]:
        engine = Engine(model, BYTES, page=4)
        sequences = [engine.add(prompt, told) for prompt in prompts]
        while engine.busy:
            engine.step()
        assert bool(engine.passes.captured._known) == capturing
        return [[one.own for one in s.logprobs] for s in sequences]

    capturing = True
    with_capture = numbers([5, 6, 7], [9, 10])
    capturing = False
    monkeypatch.setattr(CapturedPasses, "run", lambda self, kind, *rest: self._plainly(*rest))
    assert numbers([5, 6, 7], [9, 10]) == with_capture


def test_what_cannot_be_captured_is_run_as_ever():
    model = make_model(torch.float64, attention=MLA, moe=MOE).requires_grad_(False)
    engine = Engine(model, BYTES, page=4)
    tokens = run(engine, [5, 6, 7])
    assert list(captured(engine)) == [False]
    assert tokens == run(Engine(model.float(), BYTES, page=4), [5, 6, 7])


def test_changed_weights_are_the_next_requests():
    model = make_model(torch.float32, attention=MLA, moe=MOE).requires_grad_(False)
    other = make_model(torch.float32, attention=MLA, moe=MOE).requires_grad_(False)
    for parameter in other.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
    engine = Engine(model, BYTES, page=4)
    prompt = list(range(5, 17))
    first = run(engine, prompt)
    assert run(engine, prompt) == first
    expected = run(Engine(other, BYTES, page=4), prompt)
    assert first != expected
    with torch.no_grad():
        for mine, new in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(new)  # where they lie
    assert run(engine, prompt) == expected  # though what the old ones made of its beginning was known
    for mine in model.parameters():
        mine.data = mine.data.clone()  # elsewhere
    assert run(engine, prompt) == expected


def test_hooks_see_every_pass():
    model = make_model(torch.float32, attention=MLA, moe=MOE).requires_grad_(False)
    engine, seen = Engine(model, BYTES, page=4), []
    before = run(engine, [5, 6, 7])
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    assert run(engine, [5, 6, 7]) == before
    assert len(seen) == len(before[0])
    hook.remove()


@pytest.mark.parametrize("kind", ["mla", "mha", "two modules"])
@pytest.mark.parametrize("sizes", [(4, 32), (7,)])
def test_rows_that_fill_a_pass_up_change_nothing(kind: str, sizes: tuple[int, ...]):
    """As on a GPU."""
    prompts = [[5, 6, 7], [9, 8], [20, 21, 22, 23]]
    engine = Engine(model_of(kind), BYTES, page=2, pages=14, prefix_cache=False)
    for layer in engine.pool.pools:
        for tensor in layer:
            tensor.fill_(torch.nan)  # what is read and was never written would be seen
    engine.passes.captured.sizes = sizes
    assert run(engine, *prompts) == [plain(kind, prompt, 12) for prompt in prompts]
    assert all(captured(engine))
    assert {key[1] for key in engine.passes.captured._known} <= set(sizes)


def test_only_some_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("abyssal.generation.captured._KEPT", 2)
    engine = Engine(model_of("mla"), BYTES, page=4)
    prompts = [[5, 6, 7], [9, 8], [20, 21, 22, 23], [4]]
    sequences = [engine.add(p, Sampling(temperature=0, max_new_tokens=3 * n + 3)) for n, p in enumerate(prompts)]
    while engine.busy:
        engine.step()
        assert len(engine.passes.captured._known) <= 2
    assert [s.new for s in sequences] == [plain("mla", p, 3 * n + 3) for n, p in enumerate(prompts)]


def test_a_recorder_sees_every_step_of_captured_passes(monkeypatch: pytest.MonkeyPatch):
    """And what it was given stays as it was: the next step writes elsewhere."""
    seen: list[dict[int, list[torch.Tensor]]] = []
    for capturing in (True, False):
        if not capturing:
            monkeypatch.setattr(CapturedPasses, "run", lambda self, kind, *rest: self._plainly(*rest))
        engine, recorder = Engine(model_of("mla"), BYTES, page=4), RoutingRecorder()
        engine.add([5, 6, 7], GREEDY)
        engine.add([9, 10], GREEDY)
        steps = 0
        while engine.busy:
            engine.step(recorder)
            steps += 1
        assert bool(engine.passes.captured._known) == capturing
        assert all(len(routings) == steps for routings in recorder.routings.values())
        parts = ("indices", "weights", "scores")
        seen.append({k: [getattr(r, p) for r in rs for p in parts] for k, rs in recorder.routings.items()})
    assert seen[0].keys() == seen[1].keys()
    for layer in seen[0]:
        for captured_one, plain_one in zip(seen[0][layer], seen[1][layer], strict=True):
            assert torch.equal(captured_one, plain_one)


@pytest.mark.parametrize("switch", ["", "TRITON_INTERPRET"])
def test_without_compiled_code(switch: str):
    """The plain path gives the same tokens; so do the GPU's kernels, in Triton's interpreter."""
    if switch:
        pytest.importorskip("triton")
    program = (
        "import sys\nsys.path[:0] = sys.argv[1:]\nimport test_engine as t\nfrom abyssal.kernels import native\n"
        "assert native.library() is None\n"
        "engine = t.Engine(t.model_of('one module'), t.BYTES, page=4)\n"
        "s = engine.add([5, 6, 7], t.Sampling(temperature=0, max_new_tokens=12))\n"
        "while engine.busy:\n    engine.step()\n"
        "assert not engine.passes.captured._known\nprint(s.new)\n"
    )
    here = os.path.dirname(__file__)
    environment = os.environ | {"ABYSSAL_NATIVE": "0"} | ({switch: "1"} if switch else {})
    command = [sys.executable, "-c", program, here]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{plain('one module', [5, 6, 7], 12)}\n", done.stderr
    assert PLAIN
