"""The DPO loss: by hand in numbers, its gradient by the chain rule, and log-probabilities from whole logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import MODEL, scrambled

from abyssal.config import resolve_model
from abyssal.data.loader import Batch
from abyssal.model import Transformer
from abyssal.tuning.dpo import (
    Preference,
    preference_losses,
    reference_log_probabilities,
    sequence_log_probabilities,
)
from abyssal.tuning.recipe import DPOConfig

LENGTH = 15


def pairs() -> Batch:
    """Two rows: pairs 0 and 2 in the first, pair 1 in the second; each sequence is a prompt of 2 and an answer."""
    generator = torch.Generator().manual_seed(0)
    rows = [[(0, 4), (1, 3), (4, 3), (5, 5)], [(2, 6), (3, 4)]]
    tokens = torch.zeros(2, LENGTH + 1, dtype=torch.long)
    documents, learned = torch.full_like(tokens, -1), torch.zeros_like(tokens, dtype=torch.bool)
    for row, sequences in enumerate(rows):
        start = 0
        for number, length in sequences:
            tokens[row, start : start + length] = torch.randint(2, 258, (length,), generator=generator)
            documents[row, start : start + length] = number
            learned[row, start + 2 : start + length] = True
            start += length
    return Batch(tokens, documents, learned, isolated=True)


def model(seed: int = 0) -> Transformer:
    return scrambled(Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(seed))).double()


def plain_log_p(m: Transformer, batch: Batch) -> torch.Tensor:
    """log π of each answer, each sequence by itself, from all logits."""
    out = []
    for number in range(6):
        here = batch.documents == number
        ids, learned = batch.tokens[here], batch.learned[here]
        log_p = m(ids.unsqueeze(0))[0, :-1].log_softmax(-1)
        out.append((log_p.gather(1, ids[1:, None]).squeeze(1) * learned[1:]).sum())
    return torch.stack(out)


def test_log_probabilities_are_those_of_each_sequence_alone():
    m, batch = model(), pairs()
    numbers, got = sequence_log_probabilities(m, batch, LENGTH)
    assert numbers.tolist() == [0, 1, 4, 5, 2, 3]
    torch.testing.assert_close(got, plain_log_p(m, batch)[numbers])
    kept = reference_log_probabilities(m, [batch], LENGTH, 8, torch.float32)
    torch.testing.assert_close(kept[:6], plain_log_p(m, batch).float())
    assert kept[6:].tolist() == [0, 0]


def test_a_pair_in_two_rows_counts_twice():
    m, batch = model(), pairs()
    twice = Batch(*(torch.cat((x, x[:1])) for x in (batch.tokens, batch.documents, batch.learned)), isolated=True)
    numbers, got = sequence_log_probabilities(m, twice, LENGTH)
    assert numbers.tolist() == [0, 1, 4, 5, 2, 3, 0, 1, 4, 5]
    torch.testing.assert_close(got, plain_log_p(m, batch)[numbers])
    assert Preference(DPOConfig()).counts(m, twice, LENGTH) == [5]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_by_hand(smoothing):
    config = DPOConfig(beta=0.5, label_smoothing=smoothing)
    log_p = torch.tensor([-10.0, -12.0, -20.0, -15.0])
    reference = torch.tensor([-11.0, -11.0, -18.0, -16.0])
    got = preference_losses(log_p, reference, config, [2])
    # Pair 0: (1) − (−1) = 2, β · 2 = 1. Pair 1: (−2) − (1) = −3, β · −3 = −1.5.
    sigma = [1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(1.5))]
    expected = sum(-(1 - smoothing) * math.log(s) - smoothing * math.log(1 - s) for s in sigma)
    assert float(got.nats[0]) == pytest.approx(expected)
    accuracy, margin, chosen, rejected = got.extras.tolist()
    assert accuracy == 1
    assert margin == pytest.approx(1.0 - 1.5)
    assert chosen == pytest.approx(0.5 * 1 + 0.5 * -2)
    assert rejected == pytest.approx(0.5 * -1 + 0.5 * 1)


def test_gradient_is_that_of_the_papers_equation():
    """∇L = −β σ(−β m) (∇ log π(y_w) − ∇ log π(y_l)) (arXiv 2305.18290, §4), with autograd over whole logits."""
    m, batch, config = model(), pairs(), DPOConfig(beta=0.3)
    reference = plain_log_p(m, batch).detach() + torch.tensor([0.4, -0.2, 0.1, 0.9, -1.0, 0.3], dtype=torch.float64)
    parameters = [p for name, p in m.named_parameters() if "layers.2" not in name]  # the MTP module is not in it
    log_p = plain_log_p(m, batch)
    expected = [torch.zeros_like(p) for p in parameters]
    for w, r in ((0, 1), (2, 3), (4, 5)):
        margin = (log_p[w] - reference[w]) - (log_p[r] - reference[r])
        factor = -config.beta * torch.sigmoid(-config.beta * margin).detach()
        for total, one in zip(
            expected,
            torch.autograd.grad(log_p[w] - log_p[r], parameters, retain_graph=True, allow_unused=True),
            strict=True,
        ):
            if one is not None:
                total += factor * one
    objective = Preference(config, reference)
    assert objective.counts(m, batch, LENGTH) == [3]
    losses = objective.losses(m, batch, LENGTH, [3])
    losses.nats[0].backward()
    for parameter, total in zip(parameters, expected, strict=True):
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, total, rtol=1e-6, atol=1e-10)
    hand = [
        -F.logsigmoid(config.beta * ((log_p[w] - reference[w]) - (log_p[r] - reference[r])))
        for w, r in ((0, 1), (2, 3), (4, 5))
    ]
    torch.testing.assert_close(losses.nats[0], torch.stack(hand).sum())
