"""What a training step sends by formula, beside hand calculations; tests/distributed counts real messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.analysis.communication import busiest, communication
from abyssal.analysis.inventory import Inventory
from abyssal.analysis.memory import TrainingSetup
from abyssal.analysis.messages import Group, Message, Sum, by_axis, groups
from abyssal.analysis.parameters import count_parameters
from abyssal.config import preset
from abyssal.config.parallel import ParallelConfig

V3 = Inventory(preset("deepseek-v3"))
LITE = Inventory(preset("deepseek-v2-lite"))


def payload(messages: list[Message], axis: str, operation: str, what: str = "") -> int:
    return sum(m.payload for m in messages if (m.axis, m.operation) == (axis, operation) and what in m.what)


def test_what_is_sharded_is_the_model() -> None:
    """Every number is gathered once (twice) and its gradient scattered, once a micro-batch."""
    setup, everything = TrainingSetup(1, 4096, accumulate=3, dtype="float32"), count_parameters(LITE.config).total
    once = communication(LITE, ParallelConfig(shard=8, gather="once"), setup)
    again = communication(LITE, ParallelConfig(shard=8), setup)
    ends = 2 * 102400 * 2048 + 2048  # embedding, head, and the last norm are gathered once in any case
    assert payload(once, "shard", "all_gather") == 3 * 4 * everything
    assert payload(once, "shard", "reduce_scatter") == 3 * 4 * everything
    assert payload(again, "shard", "all_gather") == 3 * 4 * (2 * everything - ends)


def test_rows_that_travel() -> None:
    """V3: 58 MoE layers and the MTP module's; a token's hidden vector to 8 experts and back, both ways, once more
    forward with recomputation."""
    tokens, row = 2 * 4096, 2 * 7168
    for recompute, passes in ((False, 4), (True, 6)):
        messages = communication(V3, ParallelConfig(shard=64, expert=64), TrainingSetup(2, 4096, recompute=recompute))
        assert payload(messages, "expert", "all_to_all", "rows") == 59 * passes * 8 * tokens * row


def test_latents_and_not_keys_and_values() -> None:
    """V3: 576 numbers a token and layer for all of its 128 heads."""
    messages = communication(V3, ParallelConfig(context=4), TrainingSetup(1, 32768))
    assert payload(messages, "context", "all_gather") == 62 * 32768 * 576 * 2
    assert payload(messages, "context", "reduce_scatter") == 62 * 32768 * 576 * 2


def test_of_a_pipeline_the_busiest_counts() -> None:
    parallel, setup = ParallelConfig(pipeline=4), TrainingSetup(1, 4096, accumulate=16)
    stream = 4 * 4096 * 2048
    assert payload(communication(LITE, parallel, setup), "pipeline", "send") == 16 * stream
    assert payload(busiest(LITE, parallel, setup), "pipeline", "send") == 2 * 16 * stream


def test_one_process_says_nothing() -> None:
    assert communication(V3, ParallelConfig(), TrainingSetup(1, 4096)) == []


def test_on_the_wire() -> None:
    """Rings: each of P passes on P − 1 parts, and to reduce everywhere is to scatter and gather."""
    group = Group(4, 1)
    sent = {op: Message("shard", "", op, 1000, 2, group).sent for op in ("all_gather", "all_reduce", "send")}  # type: ignore[arg-type]
    assert sent == {"all_gather": 1500, "all_reduce": 3000, "send": 2000}


@pytest.mark.parametrize(
    ("operation", "group", "seconds"),
    [
        ("all_gather", Group(8, 1), 7 / 8 / 400),  # in a node of 8
        ("all_gather", Group(16, 1), 15 / 16 / 400),  # two nodes, 8 cards of 50 GB/s each
        ("all_gather", Group(4, 4), 3 / 4 / 100),  # two of them in each node
        ("all_reduce", Group(2, 8), 2 / 2 / 50),
        ("all_to_all", Group(16, 1), (7 / 400 + 8 / 50) / 16),
        ("send", Group(4, 8), 1 / 50),
    ],
)
def test_how_long_a_message_takes(operation: str, group: Group, seconds: float) -> None:
    message = Message("shard", "", operation, 10**9, 1, group)  # type: ignore[arg-type]
    assert message.seconds(400e9) == pytest.approx(seconds)
    assert by_axis([message, message], 400e9) == {
        "shard": Sum(2, 2 * 10**9, 2 * message.sent, 2 * message.seconds(400e9))
    }


SIZES = st.sampled_from([1, 2, 3, 4])


@given(SIZES, SIZES, SIZES, SIZES, SIZES, st.data())
def test_groups_divide_the_processes(r: int, s: int, c: int, t: int, p: int, data: st.DataObject) -> None:
    divisors = [d for d in range(1, r * s * c + 1) if r * s * c % d == 0 and (s * c % d == 0 or d % (s * c) == 0)]
    expert = data.draw(st.sampled_from(divisors))
    parallel = ParallelConfig(replicate=r, shard=s, context=c, tensor=t, pipeline=p, expert=expert)
    for group in groups(parallel).values():
        of = {rank: group.ranks(rank) for rank in range(parallel.world)}
        assert all(rank in ranks and len(ranks) == group.processes for rank, ranks in of.items())
        assert all(of[other] == ranks for ranks in of.values() for other in ranks)
