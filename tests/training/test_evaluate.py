"""Validation against a plain float64 loop over the whole split."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import MODEL, scrambled

from abyssal.config import resolve_model
from abyssal.data.shards import TokenShards
from abyssal.model import Transformer
from abyssal.training.evaluate import Evaluation, HeldOut, evaluate


@pytest.fixture(scope="module")
def model():
    return scrambled(Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(2))).eval()


def split(lengths: list[int], seed: int = 0) -> TokenShards:
    """Documents of so many tokens, BOS first; in two shard files, and of three bytes a token."""
    rng = np.random.default_rng(seed)
    documents = [np.concatenate([[0], rng.integers(2, 258, n - 1)]) for n in lengths]
    tokens = np.concatenate(documents).astype(np.uint16)
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    cut = len(tokens) // 3
    return TokenShards([tokens[:cut], tokens[cut:]], starts, 3 * len(tokens))


def plain_nats(model: Transformer, lengths: list[int], shards: TokenShards, length: int) -> tuple[float, list[int]]:
    """Nats of every token that is predicted, and their positions, window by window with F.cross_entropy."""
    exact = Transformer(model.config).double()
    exact.load_state_dict(model.state_dict())
    tokens = torch.from_numpy(shards.read(0, len(shards)))
    first = {0, *np.cumsum(lengths)[:-1].tolist()}
    nats, seen = 0.0, []
    for start in range(0, len(shards) - 1, length):
        window = tokens[start : start + length + 1]
        with torch.no_grad():
            logits = exact(window[:-1].unsqueeze(0))[0]
        for i in range(len(window) - 1):
            if start + i + 1 not in first:
                nats += F.cross_entropy(logits[i], window[i + 1]).item()
                seen.append(start + i + 1)
    return nats, seen


def judge(model: Transformer, shards: TokenShards, batch_size: int, length: int, **options: int) -> Evaluation:
    held_out = HeldOut.of_shards(shards, batch_size=batch_size, sequence_length=length)
    return evaluate(model, held_out, sequence_length=length, dtype=torch.float32, **options)


@pytest.mark.parametrize(
    ("lengths", "length", "batch_size"),
    [
        ([50], 8, 2),  # one document, a last window that is not full
        ([17, 1, 9, 30], 8, 3),  # borders inside windows and at their edges, a document of one token
        ([8, 8, 9], 8, 2),  # nothing left over
        ([11], 32, 2),  # a window longer than the split
        ([2], 4, 1),
    ],
)
def test_against_a_plain_loop(model, lengths, length, batch_size):
    shards = split(lengths)
    got = judge(model, shards, batch_size, length)
    nats, seen = plain_nats(model, lengths, shards, length)
    assert len(seen) == len(set(seen)) == sum(lengths) - len(lengths)  # all but each document's first
    assert got.tokens == len(seen)
    assert got.loss == pytest.approx(nats / len(seen), rel=1e-5)
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * sum(lengths)), rel=1e-5)


def test_some_batches_stand_for_all(model):
    lengths = [100]
    shards = split(lengths)
    got = judge(model, shards, 2, 10, batches=2)
    part = TokenShards([shards.read(0, 41).astype(np.uint16)], np.array([0]), 0)
    nats, seen = plain_nats(model, [41], part, 10)
    assert got.tokens == len(seen) == 40
    assert got.loss == pytest.approx(nats / 40, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / (300 * 40 / 99), rel=1e-5)


def test_leaves_no_gradient(model):
    for parameter in model.parameters():
        parameter.grad = None
    judge(model, split([20]), 2, 8)
    assert all(parameter.grad is None for parameter in model.parameters())
