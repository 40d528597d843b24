"""What a step sends, by formula: message for message what processes tell each other in real steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from communication_jobs import Told
from jobs import CONFIG
from workers import Workers

from abyssal.config.parallel import ParallelConfig

LAYOUTS: list[dict[str, Any]] = [
    {"shard": 2},
    {"shard": 2, "gather": "once"},
    {"replicate": 2},
    {"replicate": 2, "shard": 2},
    {"shard": 2, "expert": 2},
    {"replicate": 2, "shard": 2, "expert": 4},
    {"shard": 4, "expert": 2},
    {"tensor": 2},
    {"tensor": 2, "shard": 2},
    {"context": 2},
    {"context": 2, "tensor": 2},
    {"tensor": 2, "expert": 2, "shard": 2},
    {"tensor": 2, "shard": 2, "sequence": True},
    {"tensor": 2, "context": 2, "sequence": True},
    {"pipeline": 2},
    {"pipeline": 2, "shard": 2},
    {"pipeline": 2, "tensor": 2},
    {"pipeline": 2, "tensor": 2, "sequence": True},
    {"pipeline": 2, "shard": 2, "expert": 2, "schedule": "zero_bubble"},
    {"pipeline": 2, "shard": 2, "schedule": "interleaved"},
]


def size(layout: dict[str, Any]) -> int:
    return ParallelConfig(**layout).world


def named(layout: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in layout.items())


def check(found: list[tuple[list[Told], list[Told]]]) -> None:
    """Message for message; but how many rows come in to be sent back, routing decides: of these the sum counts."""
    exchanged = [Counter[str](), Counter[str]()]
    for both in found:
        told, said = (Counter(t for t in messages if t[0] != "all_to_all") for messages in both)
        assert told == said
        for total, messages in zip(exchanged, both, strict=True):
            for operation, ranks, nbytes in messages:
                if operation == "all_to_all":
                    total[f"messages among {ranks}"] += 1
                    total[f"bytes among {ranks}"] += nbytes
    assert exchanged[0] == exchanged[1]
    assert any(told for told, _ in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_messages_are_those_that_are_sent(workers: Workers, layout: dict[str, Any], dtype: str) -> None:
    """With an MTP module and all balancers."""
    check(workers.run("communication_jobs.step", layout, dtype, False, 0, size=size(layout)))


MLA = CONFIG["attention"]
MHA = {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bias": True}
OTHERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"shard": 2}, {"vocab_size": 65, "attention": MLA | {"kv_lora_rank": 17}}),  # FSDP pads
    ({"tensor": 2, "shard": 2}, {"vocab_size": 66, "attention": MLA | {"q_lora_rank": None, "bias": True}}),
    ({"tensor": 2}, {"attention": MHA}),
    ({"tensor": 2, "sequence": True}, {"attention": MHA}),
    ({"tensor": 2, "sequence": True}, {"attention": MLA | {"q_lora_rank": None, "bias": True}}),
    ({"context": 2, "tensor": 2}, {"attention": MHA}),
    ({"shard": 2, "expert": 2}, {"tie_word_embeddings": True}),
    ({"pipeline": 2, "tensor": 2}, {"tie_word_embeddings": True}),
    ({"shard": 2, "expert": 2}, {"moe": CONFIG["moe"] | {"segments": 2}}),
    ({"tensor": 2, "shard": 2}, {"moe": None}),
]


@pytest.mark.parametrize(("layout", "changes"), OTHERS, ids=str)
def test_messages_of_other_models(workers: Workers, layout: dict[str, Any], changes: dict[str, Any]) -> None:
    check(workers.run("communication_jobs.step", layout, "bfloat16", False, 0, size=size(layout), **changes))


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 2, "shard": 2, "expert": 2},
        {"tensor": 2, "expert": 2, "shard": 2, "sequence": True},
        {"context": 2, "expert": 2},
        {"pipeline": 2, "shard": 2},
    ],
    ids=named,
)
def test_messages_with_recomputation_and_more_micro_batches(workers: Workers, layout: dict[str, Any]) -> None:
    check(workers.run("communication_jobs.step", layout, "bfloat16", True, 1, size=size(layout)))
