"""Layouts that cannot be are refused with the arithmetic; and how a batch is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import CONFIG

from abyssal.config import ModelConfig
from abyssal.config.parallel import ParallelConfig, stage_layers
from abyssal.data.loader import Batch
from abyssal.distributed.mesh import Place
from abyssal.errors import UserError


def check(
    model: ModelConfig | None = None, batch_size: int = 8, world: int | None = None, accumulate: int = 8, **axes: Any
) -> None:
    parallel = ParallelConfig(**axes)
    model = model or ModelConfig.model_validate(CONFIG)
    world = world or parallel.world
    parallel.check(model, batch_size=batch_size, sequence_length=16, world=world, accumulate=accumulate)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"shard": 2, "world": 3}, r"shard 2 × .* = 2 processes; there are 3 \(torchrun --nproc-per-node 2"),
        ({"shard": 3}, r"training.batch_size: 8 is no multiple of parallel.replicate × parallel.shard = 3"),
        ({"shard": 4, "expert": 3}, r"parallel.expert: 3 does not divide replicate × shard × context = 4"),
        ({"replicate": 2, "shard": 6, "expert": 4, "batch_size": 12}, r"expert: 4 neither divides .* = 6 nor"),
        ({"shard": 16, "expert": 16, "batch_size": 16}, r"expert: 16 does not divide the 8 routed experts"),
        ({"tensor": 3}, r"parallel.tensor: 3 does not divide the model's num_attention_heads 4"),
        ({"pipeline": 3}, r"parallel.pipeline: 3 stages are more than the model's 2 layers"),
        ({"pipeline": 2, "schedule": "dualpipev"}, r"pipeline: 2 × 2 .*dualpipev\) stages are more than the model's 2"),
        ({"schedule": "dualpipev"}, r"parallel.schedule: dualpipev goes with parallel.pipeline, which is 1"),
        ({"pipeline": 2, "schedule": "interleaved", "layers": 4, "accumulate": 5}, r"and a multiple of 2"),
        ({"pipeline": 2, "accumulate": 1}, r"training.accumulate: 1 micro-batches do not fill a pipeline of 2 stages"),
        ({"context": 3}, r"sequence_length: 16 is no multiple of 2 × parallel.context = 6"),
    ],
)
def test_what_cannot_be_is_refused(axes: dict[str, Any], said: str) -> None:
    changes = {"num_hidden_layers": axes.pop("layers")} if "layers" in axes else {}
    with pytest.raises(UserError, match=said):
        check(ModelConfig.model_validate(CONFIG | changes), **axes)


def test_what_can_be_is_not() -> None:
    for axes in ({"shard": 2, "expert": 2}, {"replicate": 4, "expert": 4}, {"shard": 8, "expert": 4}, {"tensor": 2}):
        check(**axes)


def test_experts_need_a_model_that_has_them() -> None:
    with pytest.raises(UserError, match="this model has no experts"):
        check(ModelConfig.model_validate(CONFIG | {"moe": None}), shard=2, expert=2)


STUDIES: list[dict[str, Any]] = [
    {
        "attention": {
            "kind": "separate_latents",
            "num_attention_heads": 4,
            "k_lora_rank": 16,
            "v_lora_rank": 16,
            "q_lora_rank": 12,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        }
    },
    {"moe": CONFIG["moe"] | {"segments": 2}},
]


@pytest.mark.parametrize(("changes", "axes"), [(STUDIES[0], ["tensor", "context"]), (STUDIES[1], ["tensor"])])
def test_studies_are_not_divided_within_a_layer(changes: dict[str, Any], axes: list[str]) -> None:
    model = ModelConfig.model_validate(CONFIG | changes)
    for axis in axes:
        with pytest.raises(UserError, match=f"parallel.{axis}: 2: not with"):
            check(model, **{axis: 2})


def test_a_tied_head_goes_with_schedules_that_do_not_split() -> None:
    model = ModelConfig.model_validate(CONFIG | {"num_hidden_layers": 4, "tie_word_embeddings": True})
    check(model, pipeline=2, schedule="interleaved")
    with pytest.raises(UserError, match=r"parallel.schedule: zero_bubble: not with tie_word_embeddings"):
        check(model, pipeline=2, schedule="zero_bubble")


def test_several_mtp_modules_go_with_schedules_that_do_not_split() -> None:
    model = ModelConfig.model_validate(CONFIG | {"num_hidden_layers": 4, "mtp": {"num_nextn_predict_layers": 2}})
    check(model, pipeline=2, schedule="interleaved")
    with pytest.raises(UserError, match=r"parallel.schedule: dualpipev: not with 2 MTP modules"):
        check(model, pipeline=2, schedule="dualpipev")


@given(pipeline=st.integers(1, 8), schedule=st.sampled_from(["1f1b", "interleaved", "zero_bubble", "dualpipev"]))
def test_every_layer_is_in_one_stage_of_one_process(pipeline: int, schedule: Any) -> None:
    model = ModelConfig.model_validate(CONFIG | {"num_hidden_layers": 17})
    parallel = ParallelConfig(pipeline=pipeline, schedule=schedule)
    stages = [stage for place in range(pipeline) for stage in parallel.stages_of(place)]
    assert sorted(stages) == list(range(parallel.stages))
    layers = [layer for stage in sorted(stages) for layer in stage_layers(model, parallel.stages, stage)]
    assert layers == list(range(18))  # the MTP module is the last


def test_places_are_all_different_and_tensor_changes_fastest() -> None:
    parallel = ParallelConfig(replicate=2, shard=3, context=2, tensor=2, pipeline=2)
    places = [Place.of(rank, parallel) for rank in range(parallel.world)]
    assert len(set(places)) == parallel.world == 48
    assert places[0] == Place(0, 0, 0, 0, 0)
    assert places[1] == Place(0, 0, 0, 0, 1)
    assert places[2] == Place(0, 0, 0, 1, 0)
    assert places[24] == Place(1, 0, 0, 0, 0)


@given(rows=st.integers(1, 9), parts=st.integers(1, 12), learned=st.booleans())
def test_rows_are_each_in_one_part(rows: int, parts: int, learned: bool) -> None:
    tokens = torch.arange(rows * 3).view(rows, 3) + 1
    batch = Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens).bool() if learned else None)
    divided = [batch.rows(part, parts) for part in range(parts)]
    real = torch.cat([part.tokens[part.documents[:, 0] >= 0] for part in divided])
    assert sorted(real.flatten().tolist()) == tokens.flatten().tolist()
    assert all(len(part.tokens) > 0 for part in divided)
    for part in divided:
        padding = part.documents < 0
        assert not part.tokens[padding].any()
        if part.learned is not None:
            assert not part.learned[padding].any()
