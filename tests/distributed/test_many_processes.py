"""One model on several processes is the model on one: gradients, losses, checkpoints."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import CONFIG, model_of
from workers import Workers

from abyssal.checkpoint import load_model, sharded
from abyssal.distributed.launch import Meeting
from abyssal.errors import UserError

LAYOUTS: list[dict[str, Any]] = [
    {"shard": 2},
    {"shard": 2, "gather": "once"},
    {"replicate": 2},
    {"shard": 2, "expert": 2},
    {"replicate": 2, "expert": 2},
    {"replicate": 2, "shard": 2},
    {"replicate": 4, "expert": 4},
    {"replicate": 2, "shard": 2, "expert": 2},
    {"replicate": 2, "shard": 2, "expert": 4},
    {"shard": 4, "expert": 2},
    {"tensor": 2},
    {"tensor": 4},
    {"tensor": 2, "shard": 2},
    {"tensor": 2, "replicate": 2},
    {"tensor": 2, "shard": 2, "expert": 2},
    {"context": 2},
    {"context": 4},
    {"context": 2, "expert": 2},
    {"context": 2, "shard": 2, "expert": 4},
    {"context": 2, "tensor": 2},
    {"shard": 2, "offload": True},
    {"tensor": 2, "sequence": True},
    {"tensor": 4, "sequence": True},
    {"tensor": 2, "sequence": True, "shard": 2, "expert": 2},
    {"tensor": 2, "sequence": True, "context": 2},
    {"tensor": 2, "sequence": True, "pipeline": 2},
    {"pipeline": 2},
    {"pipeline": 2, "schedule": "interleaved"},
    {"pipeline": 2, "schedule": "zero_bubble"},
    {"pipeline": 2, "schedule": "dualpipev"},
    {"pipeline": 2, "shard": 2, "expert": 2},
    {"pipeline": 2, "replicate": 2, "schedule": "dualpipev"},
    {"pipeline": 2, "tensor": 2},
    {"pipeline": 2, "context": 2, "schedule": "interleaved"},
    {"pipeline": 4},
]


def size(layout: dict[str, Any]) -> int:
    return math.prod(int(layout.get(axis, 1)) for axis in ("shard", "replicate", "tensor", "context", "pipeline"))


def named(layout: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in layout.items())


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_gradients_are_those_of_one_process(workers: Workers, layout: dict[str, Any]) -> None:
    for found in workers.run("gradients", layout, size=size(layout)):
        assert found["gradient"] < 1e-9
        assert max(found.values()) < 1e-6  # figures are FP32


MLA = CONFIG["attention"]
OTHERS: list[dict[str, Any]] = [
    {"recompute": True},
    {"isolated": True},
    {"tie_word_embeddings": True},
    {"attention": MLA | {"q_lora_rank": None, "bias": True}},
    {"attention": {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bias": True}},
    {"moe": CONFIG["moe"] | {"n_shared_experts": 0}},
    {"moe": None},
]


PIPELINES: list[dict[str, Any]] = [{"pipeline": 2}, {"pipeline": 2, "schedule": "dualpipev"}]


@pytest.mark.parametrize(
    "layout",
    [{"shard": 2, "expert": 2}, {"tensor": 2}, {"tensor": 2, "sequence": True}, {"context": 2}, *PIPELINES],
    ids=named,
)
@pytest.mark.parametrize("change", OTHERS, ids=lambda change: next(iter(change)))
def test_gradients_of_other_models(workers: Workers, layout: dict[str, Any], change: dict[str, Any]) -> None:
    if "tie_word_embeddings" in change and "schedule" in layout:
        pytest.skip("refused")
    if change.get("moe", layout) is None:
        layout = {key: many for key, many in layout.items() if key != "expert"}
    for found in workers.run("gradients", layout, size=2, **change):
        assert found["gradient"] < 1e-9


@pytest.mark.parametrize(
    "layout",
    [{"shard": 2}, {"replicate": 2, "expert": 2}, {"tensor": 2}, {"context": 2}, *PIPELINES],
    ids=named,
)
def test_losses_do_not_drift(workers: Workers, layout: dict[str, Any]) -> None:
    for one, many in workers.run("losses", layout, 20, size=2):
        assert one[-1] < one[0]
        assert max(abs(b / a - 1) for a, b in zip(one, many, strict=True)) < 1e-5


@pytest.mark.parametrize("layout", [{"shard": 2, "expert": 2}, {"tensor": 2}], ids=named)
def test_bfloat16_trains_alike(workers: Workers, layout: dict[str, Any]) -> None:
    """Sums are taken in another order and rounded: the same to BF16's precision."""
    for one, many in workers.run("losses", layout, 10, "bfloat16", size=2):
        assert max(abs(b / a - 1) for a, b in zip(one, many, strict=True)) < 0.02


def _tokens(draw: st.DrawFn) -> list[list[int]]:
    count = draw(st.integers(0, 6))
    kind = draw(st.sampled_from(["any", "one expert", "the first ones"]))
    pairs = {
        "any": st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True),
        "one expert": st.sampled_from([[5, 6]]),
        "the first ones": st.sampled_from([[0, 1], [1, 0]]),
    }
    return [draw(pairs[kind]) for _ in range(count)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=st.lists(st.composite(_tokens)(), min_size=4, max_size=4), many=st.sampled_from([2, 4]))
def test_dispatch_is_the_plain_account(workers: Workers, choices: list[list[list[int]]], many: int) -> None:
    """Uneven counts, processes without tokens or without rows, one expert that gets all."""
    assert max(workers.run("dispatch", choices[:many], size=many)) < 1e-12


@pytest.mark.parametrize("layout", [LAYOUTS[3], LAYOUTS[7], LAYOUTS[9], LAYOUTS[-1]], ids=named)
def test_every_process_has_its_part(workers: Workers, layout: dict[str, Any]) -> None:
    assert all(workers.run("parts", layout, size=size(layout)))


@pytest.mark.parametrize(
    "layout",
    [{"shard": 2}, {"tensor": 2, "shard": 2, "expert": 2}, {"pipeline": 2, "shard": 2, "schedule": "dualpipev"}],
    ids=named,
)
def test_every_process_draws_its_part(workers: Workers, layout: dict[str, Any]) -> None:
    assert all(workers.run("first_weights", layout, size=size(layout)))


def test_checkpoints_are_read_under_any_layout(workers: Workers, tmp_path: Path) -> None:
    written: list[dict[str, Any]] = [
        {"shard": 2, "expert": 2},
        {"replicate": 2, "shard": 2},
        {"tensor": 2, "shard": 2},
        {"pipeline": 2, "tensor": 2},
    ]
    others: list[dict[str, Any]] = [
        {"shard": 4, "expert": 4},
        {"replicate": 2},
        {"tensor": 2, "shard": 2, "expert": 2},
        {"tensor": 4},
        {"pipeline": 2, "shard": 2},
    ]
    for number, layout in enumerate(written):
        folder = tmp_path / str(number)
        assert all(workers.run("save", layout, str(folder), size=size(layout)))
        for other in others:
            assert all(workers.run("restore", other, str(folder), size=size(other)))


@pytest.mark.parametrize(
    "layout",
    [{"shard": 4, "expert": 2}, {"tensor": 2, "expert": 2, "shard": 2}, {"pipeline": 2, "shard": 2}],
    ids=named,
)
def test_a_checkpoint_is_gathered_whole(workers: Workers, tmp_path: Path, layout: dict[str, Any]) -> None:
    folder, right = tmp_path / "parts", model_of().state_dict()
    workers.run("save", layout, str(folder), size=4)
    assert sharded.is_sharded(folder)
    sharded.gather(folder)
    model = load_model(folder)
    assert {name for name, _ in model.named_parameters()} <= right.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.equal(right[name]), name
    assert not list(folder.glob("*.partial"))


def test_lost_parts_are_said(workers: Workers, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    workers.run("save", {"shard": 2}, str(folder), size=2)
    _, second = sorted((folder / "sharded").iterdir())
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match="some are missing"):
        sharded.gather(folder)
    second.write_bytes(kept[:100])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        sharded.gather(folder)
    assert not (folder / "model.safetensors").exists()


def meetings(tmp_path: Path, count: int, limit: float = 60.0) -> list[Meeting]:
    path = str(tmp_path / "store")
    return [Meeting(dist.FileStore(path, count), rank, count, limit) for rank in range(count)]


def everyone(these: list[Meeting], *calls: Any) -> list[Any]:
    """What each meeting's own call returned or raised, all at the same time."""
    out: list[Any] = [None] * len(these)

    def one(rank: int) -> None:
        try:
            out[rank] = calls[rank](these[rank])
        except UserError as error:
            out[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(these))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_all_hear_what_each_said(tmp_path: Path) -> None:
    words = everyone(meetings(tmp_path, 3), *(lambda m, r=r: m.arrive("here", f"I am {r}") for r in range(3)))
    assert words == [["I am 0", "I am 1", "I am 2"]] * 3


def test_what_stops_one_stops_all_with_its_reason(tmp_path: Path) -> None:
    found = everyone(
        meetings(tmp_path, 3),
        lambda m: m.arrive("ready"),
        lambda m: m.fail("books.txt: no such file"),
        lambda m: m.arrive("ready"),
    )
    assert [str(found[0]), str(found[2])] == ["process 1: books.txt: no such file"] * 2


def test_different_recipes_are_told_apart(tmp_path: Path) -> None:
    found = everyone(meetings(tmp_path, 2), lambda m: m.same("recipe", "lr 1"), lambda m: m.same("recipe", "lr 2"))
    assert all("recipe: lr 2 on process 1, lr 1 on process 0; all have to be" in str(error) for error in found)


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    (first, _) = meetings(tmp_path, 2, limit=0.2)
    with pytest.raises(UserError, match="process 1 of 2 did not get to 'ready'"):
        first.arrive("ready")
