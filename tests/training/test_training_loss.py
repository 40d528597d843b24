"""The training loss: which targets count, and its value and gradient against float64 formulas."""

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import MODEL, scrambled

from abyssal.config import resolve_model
from abyssal.data.loader import Batch
from abyssal.model import Transformer
from abyssal.training.loss import compute_losses, count_targets, targets, total_loss

X = -100  # not counted


def build(depth: int, **changes: object) -> Transformer:
    config = resolve_model({**MODEL, "mtp": {"num_nextn_predict_layers": depth}, **changes})
    return scrambled(Transformer(config, generator=torch.Generator().manual_seed(1)).double())


def random_batch(rows: int, length: int, seed: int) -> Batch:
    """Rows cut into documents at random places; the last row ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 258, (rows, length), generator=generator)
    documents = (torch.rand(rows, length, generator=generator) < 0.15).long().cumsum(1)
    documents[-1, length - 3 - seed % 5 :] = -1
    tokens[documents < 0] = 0
    return Batch(tokens, documents)


def reference(model: Transformer, batch: Batch, length: int, depth: int) -> list[tuple[float, int, torch.Tensor]]:
    """Nats, count and a differentiable sum for each depth: one token at a time, from the model's own logits."""
    hidden = [model.hidden(batch.tokens[:, :length])]
    if depth:
        hidden += model.mtp_hidden(hidden[0], batch.tokens[:, : length + depth])
    out = []
    for k, h in enumerate(hidden):
        logits, total, count = F.linear(h, model.lm_head.weight), torch.zeros((), dtype=torch.float64), 0
        for b in range(batch.tokens.shape[0]):
            for i in range(length):
                j = i + 1 + k
                between = batch.documents[b, i : j + 1].tolist()
                if len(set(between)) == 1 and between[0] >= 0:
                    total = total - logits[b, i].log_softmax(-1)[batch.tokens[b, j]]
                    count += 1
        out.append((total.item(), count, total))
    return out


class TestTargets:
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22, 23, 24, 0, 0, 0]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [5, 5, 5, 5, 5, -1, -1, -1]])

    @pytest.mark.parametrize(
        ("depth", "expected"),
        [
            (0, [[11, 12, X, 14, 15], [21, 22, 23, 24, X]]),
            (1, [[12, X, X, 15, 16], [22, 23, 24, X, X]]),
            (2, [[X, X, X, 16, X], [23, 24, X, X, X]]),
        ],
    )
    def test_by_hand(self, depth, expected):
        assert targets(Batch(self.tokens, self.documents), 5, depth).tolist() == expected

    def test_counts(self):
        assert count_targets(Batch(self.tokens, self.documents), 5, 2) == [8, 6, 3]


class TestValue:
    @pytest.mark.parametrize("depth", [0, 1, 2])
    def test_formula(self, depth):
        model, batch, length = build(depth), random_batch(3, 20, seed=depth), 17
        losses = compute_losses(model, batch, length)
        expected = reference(model, batch, length, depth)
        assert losses.counts == [count for _, count, _ in expected]
        assert [n.item() for n in losses.nats] == pytest.approx([nats for nats, _, _ in expected], rel=1e-10)
        means = [nats / count for nats, count, _ in expected]
        weight = 0.3
        total = means[0] + (weight / depth * sum(means[1:]) if depth else 0)
        assert total_loss(losses, losses.counts, weight).item() == pytest.approx(total, rel=1e-10)

    def test_gradient(self):
        model, batch, length = build(2), random_batch(2, 12, seed=3), 9
        losses = compute_losses(model, batch, length)
        total_loss(losses, losses.counts, 0.4).backward()
        got = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        (n0, c0, t0), (_, c1, t1), (_, c2, t2) = reference(model, batch, length, 2)
        assert n0 > 0
        (t0 / c0 + 0.4 / 2 * (t1 / c1 + t2 / c2)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: n + m)

    def test_validation_leaves_the_mtp_modules_out(self):
        model, batch = build(1), random_batch(2, 12, seed=3)
        with torch.no_grad():
            losses = compute_losses(model, batch, 9, mtp=False)
        assert len(losses.nats) == len(losses.counts) == 1

    def test_a_batch_without_any_target_is_zero(self):
        model = build(1)
        batch = Batch(torch.zeros(1, 8, dtype=torch.int64), torch.full((1, 8), -1))
        losses = compute_losses(model, batch, 6)
        assert losses.counts == [0, 0]
        assert total_loss(losses, losses.counts, 0.3).item() == 0


class TestAccumulation:
    @pytest.mark.parametrize("depth", [0, 2])
    def test_two_halves_are_one_whole(self, depth):
        """Also where the halves count different numbers of tokens: sums are divided by the whole step's counts."""
        model, length = build(depth), 15
        halves = [random_batch(2, 18, seed) for seed in (1, 4)]
        whole = Batch(torch.cat([h.tokens for h in halves]), torch.cat([h.documents for h in halves]))
        counts = [count_targets(h, length, depth) for h in halves]
        assert counts[0] != counts[1]
        step_counts = [sum(c) for c in zip(*counts, strict=True)]
        for half in halves:
            total_loss(compute_losses(model, half, length), step_counts, 0.3).backward()
        accumulated = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        losses = compute_losses(model, whole, length)
        total_loss(losses, losses.counts, 0.3).backward()
        for got, parameter in zip(accumulated, model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-13)


class TestLearned:
    """Where only some tokens are learned, as in tuning."""

    @pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
    def test_loss_and_gradient_against_whole_logits(self, share):
        model = scrambled(Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(4))).double()
        generator = torch.Generator().manual_seed(5)
        length = 300
        tokens = torch.randint(2, 258, (2, length + 2), generator=generator)[:, : length + 2]
        documents = torch.arange(4).repeat_interleave(length // 2 + 1).view(2, -1)
        documents[1, -20:] = -1
        learned = torch.rand(tokens.shape, generator=generator) < share
        short = Transformer(model.config.model_copy(update={"max_position_embeddings": 512})).double()
        short.load_state_dict(model.state_dict())
        batch = Batch(tokens, documents, learned)
        losses = compute_losses(short, batch, length, mtp=False)
        wanted = targets(batch, length, 0)
        assert losses.counts == [int((wanted != -100).sum())]
        logits = short(tokens[:, :length])
        expected = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        torch.testing.assert_close(losses.nats[0], expected)
        parameters = [p for n, p in short.named_parameters() if "layers.2" not in n]
        pairs = zip(
            torch.autograd.grad(losses.nats[0], parameters, allow_unused=True),
            torch.autograd.grad(expected, parameters, allow_unused=True),
            strict=True,
        )
        for got, right in pairs:
            assert (got is None) == (right is None)
            if got is not None:
                torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-9)
