"""A model divided among processes writes what it writes on one, and no process has more of it than its part."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_jobs import DENSE, LITE, TOKENIZER, V1, V3, WIDE, Answer, alone, write
from torch import Tensor
from workers import Workers

from abyssal.checkpoint import load_model
from abyssal.checkpoint.convert import convert
from abyssal.checkpoint.names import disk_tensors
from abyssal.checkpoint.parts import Part
from abyssal.config import ModelConfig
from abyssal.distributed.inference import check, parallel_of
from abyssal.errors import UserError
from abyssal.generation import Sampling
from abyssal.generation.engine import Engine
from abyssal.loading import load_weights
from abyssal.model import RoutingRecorder, Transformer

LAYOUTS: list[dict[str, int]] = [{"tensor": 2}, {"expert": 2}, {"tensor": 2, "expert": 2}]
MODELS = {"v3": V3, "v1": V1, "lite": LITE, "dense": DENSE, "wide": WIDE}
# Of different lengths, two that begin alike, and one of several pieces.
PROMPTS = [[65, 66, 67], [72, 101, 108, 108, 111, 32, 119], [65, 66, 67, 68, 69, 70], list(range(40, 90))]


def named(layout: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in layout.items())


def size(layout: dict[str, int]) -> int:
    return math.prod(layout.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    out = {name: write(config, root / name) for name, config in MODELS.items()}
    for name, dtype in (("fp8", torch.float8_e4m3fn), ("int4", "int4")):
        out[name] = root / name
        convert(out["wide"], out[name], dtype)  # type: ignore[arg-type]
    return out


def divided(workers: Workers, layout: dict[str, int], folder: Path, *rest: Any, **options: Any) -> Answer:
    found = workers.run("inference_jobs.together", layout, str(folder), *rest, size=size(layout), **options)
    assert [answer for answer, _ in found[1:]] == [None] * (len(found) - 1)
    answer: Answer = found[0][0]
    return answer


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
@pytest.mark.parametrize("model", ["v3", "v1", "lite"])
def test_greedy_tokens_are_those_of_one_process(
    workers: Workers, folders: dict[str, Path], layout: dict[str, int], model: str
) -> None:
    options = {"drafts": 0} if model == "v3" else {}
    right = alone(folders[model], PROMPTS, **options)
    assert divided(workers, layout, folders[model], PROMPTS, **options) == right
    assert all(len(tokens) > 4 for tokens in right.tokens)


def test_a_model_without_experts_is_divided_too(workers: Workers, folders: dict[str, Path]) -> None:
    right = alone(folders["dense"], PROMPTS)
    for many in (2, 4):
        assert divided(workers, {"tensor": many}, folders["dense"], PROMPTS) == right


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "drawn"])
def test_guesses_are_checked_by_all(
    workers: Workers, folders: dict[str, Path], layout: dict[str, int], sampling: dict[str, Any]
) -> None:
    """One process draws: what it draws hangs on its seeds alone. Two guesses with one module: it is asked twice."""
    options = {"drafts": 2, "sampling": sampling}
    right = alone(folders["v3"], PROMPTS, **options)
    assert len(right.accepted) == 2
    assert divided(workers, layout, folders["v3"], PROMPTS, **options) == right


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=named)
def test_pages_may_run_out(workers: Workers, folders: dict[str, Path], layout: dict[str, int]) -> None:
    options = {"pages": 20, "drafts": 0}
    right = alone(folders["v3"], PROMPTS, **options)
    assert divided(workers, layout, folders["v3"], PROMPTS, **options) == right


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
@pytest.mark.parametrize(("stored", "weights"), [("wide", "int8"), ("wide", "int4"), ("fp8", "fp8"), ("fp8", "dense")])
def test_weights_of_few_bits_are_divided(
    workers: Workers, folders: dict[str, Path], layout: dict[str, int], stored: str, weights: str
) -> None:
    if (stored, weights, size(layout)) == ("fp8", "fp8", 4):
        layout = {"tensor": 2}  # the shared expert's 256 columns are two blocks
    right = alone(folders[stored], PROMPTS[:2], weights)
    found = divided(workers, layout, folders[stored], PROMPTS[:2], weights)
    # Where activations are rounded as well, what differs in the seventh digit may come to differ in the third.
    assert found.likely == pytest.approx(right.likely, abs=1e-5 if weights == "dense" else 1e-2)
    if weights == "dense":
        assert found == right


def parts_of(layout: dict[str, int]) -> list[Part]:
    return [Part(layout.get("tensor", 1), layout.get("expert", 1), rank, 8) for rank in range(size(layout))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
@pytest.mark.parametrize(("stored", "weights"), [("v3", "auto"), ("v1", "auto"), ("lite", "auto"), ("fp8", "dense")])
def test_parts_make_up_the_checkpoint(
    folders: dict[str, Path], layout: dict[str, int], stored: str, weights: Any
) -> None:
    """Number by number, each at least once."""
    right = load_model(folders[stored], weights=weights)
    missing = {name: torch.ones(tensor.shape, dtype=torch.bool) for name, tensor in disk_tensors(right)}
    whole = dict(disk_tensors(right))
    for part in parts_of(layout):
        for name, tensor in disk_tensors(load_model(folders[stored], weights=weights, part=part)):
            name = part.published(name)
            cut = part.cut(name, whole[name].shape)
            assert torch.equal(tensor, whole[name][cut]), name
            missing[name][cut] = False
    assert [name for name, places in missing.items() if places.any()] == []


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_packed_files_are_read_in_parts(folders: dict[str, Path], layout: dict[str, int]) -> None:
    whole = load_model(folders["int4"]).state_dict()
    for part in parts_of(layout):
        if size(layout) == 4:
            with pytest.raises(
                UserError, match=r"shared_experts\.down_proj\.weight: 256 columns of int4, in blocks of 128"
            ):
                load_model(folders["int4"], part=part)
            continue
        for name, tensor in load_model(folders["int4"], part=part).state_dict().items():
            if ".experts." not in name:
                assert torch.equal(tensor, whole[name][part.cut(name, whole[name].shape)]), name


WHOLE = ("kv_a_proj_with_mqa.weight", "q_a_proj.weight", "gate.weight", "eh_proj.weight", "norm.weight", "bias")


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_no_process_has_more_than_its_part(workers: Workers, folders: dict[str, Path], layout: dict[str, int]) -> None:
    with torch.device("meta"):
        whole = Transformer(ModelConfig.model_validate(V3)).state_dict()
    found = workers.run("inference_jobs.together", layout, str(folders["v3"]), [[65]], size=size(layout))
    for _, shapes in found:
        assert len(shapes) == len(whole)
        for name, shape in shapes.items():
            published = name.replace(".part.", ".")
            ways = size(layout) if "experts" in name else layout.get("tensor", 1)
            ways = 1 if published.endswith((*WHOLE, "layernorm.weight")) else ways
            assert math.prod(shape) * ways == whole[published].numel(), name


def test_orders_arrive_as_they_are(workers: Workers) -> None:
    sent = [[5], [0], list(range(1022)), list(range(1023)), list(range(1024)), list(range(5000)), [-(2**62), 2**62]]
    assert workers.run("inference_jobs.orders", sent, size=2) == [sent, sent]


@pytest.mark.parametrize("many", [2, 4])
def test_sums_are_equal_to_the_last_bit(workers: Workers, many: int) -> None:
    """Else two processes could route a token differently."""
    first, *others = workers.run("inference_jobs.sums", 5000, size=many)
    assert others == [first] * (many - 1)


class Nobody:
    """Others that note what they are told."""

    def __init__(self) -> None:
        self.closed: list[int] = []
        self.told: list[list[int]] = []
        self.lost = False

    def number(self) -> int:
        return 7

    def tell(self, order: list[int], given: Tensor | None = None) -> None:
        self.told.append(order)

    def hear(self) -> list[int]:
        return []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        raise NotImplementedError


def test_a_pass_that_is_broken_off_loses_the_others(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, others = load_model(folders["lite"]), Nobody()
    engine = Engine(model, TOKENIZER, others=others)
    engine.add([65, 66], Sampling(temperature=0, max_new_tokens=3))
    engine.step()
    assert not others.lost

    def fail(*_: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(model.model.norm, "forward", fail)
    with pytest.raises(MemoryError):
        engine.step()
    assert others.lost


def test_others_hear_of_engines_that_have_gone(folders: dict[str, Path]) -> None:
    model, others = load_model(folders["lite"]), Nobody()
    engine = Engine(model, TOKENIZER, others=others)
    del engine
    gc.collect()
    assert others.closed == [7]
    again = Engine(model, TOKENIZER, others=others)
    again.add([65, 66], Sampling(temperature=0, max_new_tokens=2))
    again.step()
    assert [7 in order[:2] for order in others.told] == [True] * 4  # opened, opened, closed, a step
    assert others.closed == []


def test_outputs_of_divided_layers_are_not_recorded(folders: dict[str, Path]) -> None:
    engine = Engine(load_model(folders["lite"]), TOKENIZER, others=Nobody())
    engine.add([65, 66])
    with pytest.raises(ValueError, match="outputs of divided layers"):
        engine.step(Outputs())


class Outputs(RoutingRecorder):
    def record_outputs(self, layer: int, routed: Tensor, shared: Tensor | None) -> None: ...


def test_adapters_have_to_be_merged_first(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folders["lite"])}))
    with pytest.raises(UserError, match=r"an adapter or overlay; .* abyssal export"):
        load_weights(tmp_path, part=Part(2, 1, 0, 8))


@pytest.mark.parametrize(
    ("changes", "tensor", "expert", "said"),
    [
        ({}, 3, 1, "tensor: 3 does not divide the model's num_attention_heads 4"),
        ({"vocab_size": 265}, 2, 1, "tensor: 2 does not divide the model's vocab_size 265"),
        ({"intermediate_size": 47}, 2, 1, "tensor: 2 does not divide the model's intermediate_size 47"),
        ({"attention": V1["attention"]}, 4, 1, "tensor: 4 does not divide the model's num_key_value_heads 2"),
        ({}, 1, 3, "expert: 3 does not divide the 8 routed experts"),
        ({"moe": None}, 1, 2, "expert: 2, and this model has no experts; expected 1"),
        (
            {"moe": V3["moe"] | {"moe_intermediate_size": 18}},
            1,
            4,
            "4 does not divide the 18 columns .* shared experts",
        ),
        ({"moe": V3["moe"] | {"segments": 2}}, 2, 1, "tensor: 2: not with moe.segments 2; expected 1"),
        ({"moe": V3["moe"] | {"segments": 2}}, 1, 2, "expert: 2: not with moe.segments 2; expected 1"),
    ],
)
def test_what_cannot_be_divided_is_refused(changes: dict[str, Any], tensor: int, expert: int, said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}|{said}$"):
        check(parallel_of(tensor, expert), ModelConfig.model_validate(V3 | changes))


@pytest.mark.parametrize("axis", ["tensor", "expert"])
def test_there_is_at_least_one_of_each(axis: str) -> None:
    with pytest.raises(UserError, match=f"{axis}: 0 is not valid; expected a whole number from 1"):
        parallel_of(**({"tensor": 1, "expert": 1} | {axis: 0}))


@pytest.mark.filterwarnings("ignore:.*drawn anew")
def test_nothing_is_drawn_anew_in_parts(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["lite"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"tensors missing: model\.layers\.3.* none may be on several processes"):
        load_model(tmp_path, allow_missing=["model.layers.3.*"], part=Part(2, 1, 0, 8))
