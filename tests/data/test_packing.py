from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data.examples import Examples
from abyssal.data.loader import Batch
from abyssal.data.packing import WINDOW, PackedLoader, best_fit, packed_batches, padding_share
from abyssal.errors import UserError


def examples_of(lengths: list[int], per_example: int = 1, seed: int = 0) -> Examples:
    """Sequences of these lengths; token i of all is i + 1 (0 being what padding looks like)."""
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    learned = np.random.default_rng(seed).random(int(starts[-1])) < 0.6
    learned[starts[:-1]] = False
    return Examples(np.arange(1, starts[-1] + 1, dtype=np.int32), learned, starts, per_example)


def same(a: Batch, b: Batch) -> bool:
    assert a.learned is not None
    assert b.learned is not None
    return (
        torch.equal(a.tokens, b.tokens) and torch.equal(a.documents, b.documents) and torch.equal(a.learned, b.learned)
    )


def check_rows(batch: Batch, examples: Examples, length: int, lookahead: int) -> Counter[int]:
    """Every sequence in the batch is whole, in one row, with its partner beside it; the rest is padding. Gives the
    targets that count."""
    assert batch.learned is not None
    assert batch.isolated
    assert batch.tokens.shape == batch.documents.shape == batch.learned.shape == (len(batch.tokens), length + lookahead)
    assert batch.tokens.dtype == batch.documents.dtype == torch.int64
    assert batch.learned.dtype == torch.bool
    targets: Counter[int] = Counter()
    for tokens, documents, learned in zip(batch.tokens, batch.documents, batch.learned, strict=True):
        real = documents != -1
        assert not real[length + 1 :].any()
        assert not tokens[~real].any()
        assert not learned[~real].any()
        count = int(real.sum())
        assert real[:count].all()  # padding only at the end
        place = 0
        numbers = torch.unique_consecutive(documents[:count]).tolist()
        assert len(set(numbers)) == len(numbers)
        for number in numbers:
            ids, wanted = examples.sequence(number)
            span = slice(place, place + len(ids))
            assert tokens[span].tolist() == ids.tolist()
            assert (documents[span] == number).all()
            assert learned[span].tolist() == wanted.tolist()
            place += len(ids)
        assert place == count
        assert all(number ^ 1 in numbers for number in numbers if examples.per_example == 2)
        targets.update(tokens[1 : length + 1][learned[1 : length + 1]].tolist())
    return targets


sizes = st.fixed_dictionaries(
    {"sequence_length": st.integers(7, 20), "lookahead": st.integers(1, 3), "batch_size": st.integers(1, 4)}
)
data = st.one_of(
    st.lists(st.integers(2, 8), min_size=1, max_size=25).map(examples_of),
    st.lists(st.tuples(st.integers(2, 4), st.integers(2, 4)), min_size=1, max_size=12).map(
        lambda pairs: examples_of([length for pair in pairs for length in pair], 2)
    ),
)


def learned_of(examples: Examples) -> Counter[int]:
    return Counter(examples.tokens[examples.learned].tolist())


@settings(max_examples=60)
@given(examples=data, sizes=sizes, seed=st.integers(0, 2**40))
def test_an_epoch_takes_every_learned_token_as_target_once(examples: Examples, sizes: dict[str, int], seed: int):
    sizes = sizes | {"batch_size": 1}  # so that an epoch ends with a batch
    loader = PackedLoader(examples, **sizes, seed=seed)
    for epoch in range(2):
        assert loader.epoch == epoch
        targets: Counter[int] = Counter()
        documents: Counter[int] = Counter()
        rows = loader.epoch_rows
        places = rows * (sizes["sequence_length"] + 1)
        assert loader.padding == pytest.approx(1 - len(examples.tokens) / places)
        for _ in range(rows):
            batch = loader.next()
            targets += check_rows(batch, examples, sizes["sequence_length"], sizes["lookahead"])
            documents.update(batch.documents.unique().tolist())
        assert targets == learned_of(examples)
        assert all(documents[number] == 1 for number in range(examples.sequences))
        assert loader.index == rows
        loader._begin(loader.epoch + 1, 0)


@settings(max_examples=60)
@given(examples=data, sizes=sizes, seed=st.integers(0, 9), before=st.integers(0, 12), after=st.integers(1, 12))
def test_resuming_is_exact_at_any_point(examples: Examples, sizes: dict[str, int], seed: int, before: int, after: int):
    loader = PackedLoader(examples, **sizes, seed=seed)
    for _ in range(before):
        loader.next()
    state = loader.state_dict()
    expected = [loader.next() for _ in range(after)]
    resumed = PackedLoader(examples, **sizes, seed=seed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert all(same(resumed.next(), batch) for batch in expected)
    assert resumed.state_dict() == loader.state_dict()


@settings(max_examples=60)
@given(examples=data, sizes=sizes)
def test_validation_takes_every_example_once_and_in_order(examples: Examples, sizes: dict[str, int]):
    batches = list(packed_batches(examples, **sizes))
    targets: Counter[int] = Counter()
    numbers: list[int] = []
    for batch in batches:
        targets += check_rows(batch, examples, sizes["sequence_length"], sizes["lookahead"])
        for row in batch.documents:
            numbers += [number for number in torch.unique_consecutive(row).tolist() if number != -1]
    assert targets == learned_of(examples)
    assert numbers == list(range(examples.sequences))
    assert all(len(batch.tokens) == sizes["batch_size"] for batch in batches[:-1])
    limited = list(packed_batches(examples, **sizes, limit=2))
    assert len(limited) == min(2, len(batches))
    assert all(same(a, b) for a, b in zip(limited, batches, strict=False))


@given(lengths=st.lists(st.integers(1, 20), max_size=60), capacity=st.integers(20, 40))
def test_best_fit_leaves_no_two_rows_that_would_fit_into_one(lengths: list[int], capacity: int):
    rows = best_fit(range(len(lengths)), np.array(lengths, dtype=np.int64), capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(count <= capacity for count in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


def test_best_fit_takes_the_tightest_row():
    lengths = np.array([6, 5, 4, 3, 1], dtype=np.int64)
    # 4 goes to 6 (room 4), 3 to 5 (room 5), 1 to what 5 and 3 leave.
    assert best_fit([3, 4, 2, 1, 0], lengths, 10) == [[0, 2], [1, 3, 4]]


def test_rows_are_full_and_order_is_random_beyond_a_window():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 260, WINDOW * 3 + 7).tolist()
    examples = examples_of(lengths)
    loader = PackedLoader(examples, batch_size=4, sequence_length=511, lookahead=1, seed=0)
    assert loader.padding < 0.02
    assert padding_share(examples, 511, loader.epoch_rows) == loader.padding
    first = [loader.next() for _ in range(10)]
    other = PackedLoader(examples, batch_size=4, sequence_length=511, lookahead=1, seed=1)
    assert not any(same(batch, other.next()) for batch in first)
    # No run of long examples at the start, none of short ones at the end.
    means = [float((batch.documents != -1).sum()) / len(batch.documents.unique()) for batch in first]
    assert max(means) < 200


def test_epochs_and_seeds_differ():
    examples = examples_of([3] * 200)

    def order(seed: int, epoch: int) -> str:
        loader = PackedLoader(examples, batch_size=1, sequence_length=10, lookahead=1, seed=seed)
        loader.load_state_dict({**loader.state_dict(), "epoch": epoch})
        return str([loader.next().documents.tolist() for _ in range(5)])

    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_a_batch_may_span_the_end_of_an_epoch():
    examples = examples_of([5] * 7)
    sizes: dict[str, Any] = {"sequence_length": 5, "lookahead": 2, "seed": 3}
    loader = PackedLoader(examples, batch_size=3, **sizes)
    one = PackedLoader(examples, batch_size=1, **sizes)
    for _ in range(10):
        assert torch.equal(loader.next().tokens, torch.cat([one.next().tokens for _ in range(3)]))
    assert (loader.epoch, loader.index) == (one.epoch, one.index) == (4, 2)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    PackedLoader(examples_of([4, 5]), batch_size=2, sequence_length=8, lookahead=1, seed=5).next()
    assert torch.equal(torch.rand(1), expected)


SIZES: dict[str, int] = {"batch_size": 2, "sequence_length": 8, "lookahead": 1}


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 2), ("batch_size", 3), ("sequence_length", 9), ("lookahead", 2), ("examples", "abc")]
)
def test_the_state_of_another_run_is_refused(name: str, value: Any):
    loader = PackedLoader(examples_of([4, 5]), **SIZES, seed=1)
    with pytest.raises(UserError, match=f"{name} {value}, this run has {loader.state_dict()[name]}"):
        loader.load_state_dict({**loader.state_dict(), name: value})


def test_the_state_of_other_examples_is_refused():
    examples = examples_of([4, 5])
    state = PackedLoader(examples, **SIZES, seed=1).state_dict()
    masked = Examples(examples.tokens, ~examples.learned, examples.starts)
    with pytest.raises(UserError, match="saved state has examples"):
        PackedLoader(masked, **SIZES, seed=1).load_state_dict(state)


@pytest.mark.parametrize("change", [{"epoch": -1}, {"index": 3}, {"index": -1}])
def test_an_impossible_state_is_refused(change: dict[str, int]):
    loader = PackedLoader(examples_of([4, 5]), **SIZES, seed=1)
    with pytest.raises(UserError, match="does not exist"):
        loader.load_state_dict({**loader.state_dict(), **change})


def test_what_does_not_fit_is_refused():
    assert PackedLoader(examples_of([9]), **SIZES, seed=0).next().tokens.tolist() == [list(range(1, 10))] * 2
    for function in (lambda e: PackedLoader(e, **SIZES, seed=0), lambda e: next(packed_batches(e, **SIZES))):
        with pytest.raises(UserError, match="an example has 10 tokens; a row of sequence_length 8 holds 9"):
            function(examples_of([4, 10]))
        with pytest.raises(UserError, match="an example has 10 tokens"):
            function(examples_of([5, 5], 2))
    with pytest.raises(UserError, match="no examples to train on"):
        PackedLoader(examples_of([]), **SIZES, seed=0)
    assert list(packed_batches(examples_of([]), **SIZES)) == []


@pytest.mark.parametrize("name", list(SIZES))
def test_sizes_below_one_are_refused(name: str):
    with pytest.raises(UserError, match=f"{name} is 0"):
        PackedLoader(examples_of([2]), **(SIZES | {name: 0}), seed=0)
    with pytest.raises(UserError, match=f"{name} is 0"):
        next(packed_batches(examples_of([2]), **(SIZES | {name: 0})))


def test_a_packed_batch_moves_to_a_device():
    batch = next(packed_batches(examples_of([3]), **SIZES)).to("meta")
    assert batch.learned is not None
    assert batch.tokens.device.type == batch.documents.device.type == batch.learned.device.type == "meta"
    assert batch.isolated
