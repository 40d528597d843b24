from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abyssal.data.loader import Batch, Loader, validation_batches
from abyssal.data.shards import TokenShards
from abyssal.errors import UserError


def shards_of(count: int, document: int = 7) -> TokenShards:
    """Token i is i + 1 (0 being what padding looks like), in shards of 10; a new document every `document` tokens."""
    ids = np.arange(1, count + 1, dtype="<u4")
    return TokenShards([ids[n : n + 10] for n in range(0, count, 10)], np.arange(0, count, document), count)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.documents, b.documents)


sizes = st.fixed_dictionaries(
    {"sequence_length": st.integers(1, 12), "lookahead": st.integers(1, 3), "batch_size": st.integers(1, 5)}
)


@settings(deadline=None, max_examples=60)
@given(sizes=sizes, extra=st.integers(0, 90), seed=st.integers(0, 2**40))
def test_an_epoch_takes_every_token_as_target_once(sizes: dict[str, int], extra: int, seed: int):
    sizes = sizes | {"batch_size": 1}  # so that an epoch ends with a batch
    T, lookahead = sizes["sequence_length"], sizes["lookahead"]
    count = T + lookahead + extra
    loader = Loader(shards_of(count), **sizes, seed=seed)
    for _ in range(2):
        windows = loader.epoch_windows
        targets: list[int] = []
        for _ in range(windows):
            batch = loader.next()
            assert batch.tokens.shape == batch.documents.shape == (1, T + lookahead)
            assert batch.tokens.dtype == batch.documents.dtype == torch.int64
            row = batch.tokens[0]
            assert torch.equal(row, torch.arange(row[0], row[0] + T + lookahead))
            assert torch.equal(batch.documents[0], (row - 1) // 7)
            targets += row[1 : T + 1].tolist()
        # No gap and no repetition; what an epoch leaves out is less than T before and less than T after.
        assert sorted(targets) == list(range(min(targets), min(targets) + windows * T))
        assert 2 <= min(targets) <= T + 1
        assert count - (lookahead - 1) - max(targets) < T
        assert loader.index == windows
        loader._begin(loader.epoch + 1, 0)


@settings(deadline=None, max_examples=60)
@given(
    sizes=sizes, extra=st.integers(0, 60), seed=st.integers(0, 9), before=st.integers(0, 12), after=st.integers(1, 12)
)
def test_resuming_is_exact_at_any_point(sizes: dict[str, int], extra: int, seed: int, before: int, after: int):
    shards = shards_of(sizes["sequence_length"] + sizes["lookahead"] + extra)
    loader = Loader(shards, **sizes, seed=seed)
    for _ in range(before):
        loader.next()
    state = loader.state_dict()
    expected = [loader.next() for _ in range(after)]
    resumed = Loader(shards, **sizes, seed=seed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert all(same(resumed.next(), batch) for batch in expected)
    assert resumed.state_dict() == loader.state_dict()


@settings(deadline=None, max_examples=30)
@given(
    lives=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 5)), min_size=1, max_size=5),
    batch_size=st.sampled_from([4, 8]),
    extra=st.integers(0, 60),
)
@example(lives=[(1, 3), (2, 3), (4, 3), (1, 3)], batch_size=4, extra=30)
def test_batches_are_the_same_however_many_processes_share_them(
    lives: list[tuple[int, int]], batch_size: int, extra: int
):
    """Stopped again and again and continued by another number of processes: nothing is repeated or left out."""
    shards, sizes = shards_of(10 + extra), {"batch_size": batch_size, "sequence_length": 5, "lookahead": 2}
    whole = Loader(shards, **sizes, seed=3)
    state = whole.state_dict()
    for processes, batches in lives:
        parts = [Loader(shards, **sizes, seed=3, part=(n, processes)) for n in range(processes)]
        for part in parts:
            part.load_state_dict(state)
        for _ in range(batches):
            own, right = [part.next() for part in parts], whole.next()
            assert torch.equal(torch.cat([batch.tokens for batch in own]), right.tokens)
            assert torch.equal(torch.cat([batch.documents for batch in own]), right.documents)
        (state,) = {tuple(part.state_dict().items()) for part in parts}
        state = dict(state)


def test_a_batch_may_span_the_end_of_an_epoch():
    loader = Loader(shards_of(41), batch_size=3, sequence_length=8, lookahead=1, seed=0)
    windows = loader.epoch_windows
    one = Loader(shards_of(41), batch_size=1, sequence_length=8, lookahead=1, seed=0)
    for _ in range(2 * windows):
        assert torch.equal(loader.next().tokens, torch.cat([one.next().tokens for _ in range(3)]))
    assert loader.epoch >= 4


def test_epochs_and_seeds_differ():
    def order(seed: int, epoch: int) -> tuple[int, list[int]]:
        loader = Loader(shards_of(2000), batch_size=1, sequence_length=50, lookahead=1, seed=seed)
        loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "index": 0})
        return loader._offset, loader._order.tolist()

    plans = [order(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({str(windows) for _, windows in plans}) == 16
    assert len({offset for offset, _ in plans}) > 8


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Loader(shards_of(100), batch_size=2, sequence_length=8, lookahead=1, seed=5).next()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 2), ("batch_size", 3), ("sequence_length", 9), ("lookahead", 2), ("tokens", 99)],
)
def test_the_state_of_another_run_is_refused(name: str, value: int):
    loader = Loader(shards_of(100), batch_size=2, sequence_length=8, lookahead=1, seed=1)
    with pytest.raises(UserError, match=f"{name} {value}, this run has {loader.state_dict()[name]}"):
        loader.load_state_dict({**loader.state_dict(), name: value})


@pytest.mark.parametrize("change", [{"epoch": -1}, {"index": 13}, {"index": -1}])
def test_an_impossible_state_is_refused(change: dict[str, int]):
    loader = Loader(shards_of(100), batch_size=2, sequence_length=8, lookahead=1, seed=1)
    with pytest.raises(UserError, match="does not exist"):
        loader.load_state_dict({**loader.state_dict(), **change})


def test_a_corpus_shorter_than_a_sequence_is_refused():
    with pytest.raises(UserError, match=r"has 9 tokens; one sequence needs 10 \(sequence_length 8 \+ lookahead 2\)"):
        Loader(shards_of(9), batch_size=1, sequence_length=8, lookahead=2, seed=0)
    loader = Loader(shards_of(10), batch_size=2, sequence_length=8, lookahead=2, seed=0)
    assert loader.next().tokens.tolist() == [list(range(1, 11))] * 2


@pytest.mark.parametrize("name", ["batch_size", "sequence_length", "lookahead"])
def test_sizes_below_one_are_refused(name: str):
    sizes = {"batch_size": 1, "sequence_length": 8, "lookahead": 1, name: 0}
    with pytest.raises(UserError, match=f"{name} is 0"):
        Loader(shards_of(100), **sizes, seed=0)
    with pytest.raises(UserError, match=f"{name} is 0"):
        next(validation_batches(shards_of(100), **sizes))


@settings(deadline=None, max_examples=60)
@given(sizes=sizes, count=st.integers(2, 100))
def test_validation_takes_every_token_but_the_first_once(sizes: dict[str, int], count: int):
    T, lookahead = sizes["sequence_length"], sizes["lookahead"]
    targets: Counter[int] = Counter()
    next_start = 0
    batches = list(validation_batches(shards_of(count), **sizes))
    for batch in batches:
        assert batch.tokens.shape == batch.documents.shape == (len(batch.tokens), T + lookahead)
        for tokens, documents in zip(batch.tokens, batch.documents, strict=True):
            real = documents != -1
            assert real[:2].all()  # an input and a target at least
            assert torch.equal(tokens, torch.where(real, torch.arange(T + lookahead) + next_start + 1, 0))
            assert torch.equal(documents[real], (tokens[real] - 1) // 7)
            targets.update(tokens[1 : T + 1][documents[1 : T + 1] != -1].tolist())
            # Padding stands only where the split has ended: MTP sees every token there is.
            assert int(real.sum()) == min(T + lookahead, count - next_start)
            next_start += T
    assert targets == Counter(range(2, count + 1))
    assert all(len(batch.tokens) == sizes["batch_size"] for batch in batches[:-1])


def test_validation_can_be_limited():
    sizes = {"batch_size": 2, "sequence_length": 8, "lookahead": 1}
    everything = list(validation_batches(shards_of(100), **sizes))
    limited = list(validation_batches(shards_of(100), **sizes, limit=3))
    assert len(everything) == 7
    assert len(limited) == 3
    assert all(same(a, b) for a, b in zip(limited, everything, strict=False))


def test_validation_needs_two_tokens():
    with pytest.raises(UserError, match="has 1 tokens"):
        next(validation_batches(shards_of(1), batch_size=1, sequence_length=8, lookahead=1))


def test_a_batch_moves_to_a_device():
    batch = next(validation_batches(shards_of(20), batch_size=1, sequence_length=8, lookahead=1)).to("meta")
    assert batch.tokens.device.type == batch.documents.device.type == "meta"
