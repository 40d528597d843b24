"""ESFT's scores and choice, on routing known beforehand, and against a plain account of the paper's equations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import MODEL

from abyssal.config import resolve_model
from abyssal.data.loader import Batch
from abyssal.errors import UserError
from abyssal.model import RoutingRecorder, Transformer
from abyssal.tuning.esft import Choice, choose, score_experts

E, K = 4, 2


def batch_of(*lengths: int, width: int = 12, seed: int = 0) -> Batch:
    """One row of documents of so many tokens, then padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(1, width, dtype=torch.long)
    documents = torch.full((1, width), -1)
    start = 0
    for number, length in enumerate(lengths):
        tokens[0, start : start + length] = torch.randint(2, 258, (length,), generator=generator)
        documents[0, start : start + length] = number
        start += length
    return Batch(tokens, documents, isolated=True)


def model(seed: int = 0) -> Transformer:
    return Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("kind", ["gate", "token"])
def test_scores_against_the_papers_equations(kind):
    m = model()
    batches = [batch_of(3, 5), batch_of(2, seed=1), batch_of(4, 1, 2, seed=2)]
    length = 11
    scores, tokens = score_experts(m, batches, length, kind, 10_000)
    assert tokens == 3 + 5 + 2 + 4 + 1 + 2
    expected = torch.zeros(E, dtype=torch.float64)
    examples = 0
    for batch in batches:
        for number in batch.documents.unique():
            if number < 0:
                continue
            recorder = RoutingRecorder()
            ids = batch.tokens[batch.documents == number].unsqueeze(0)
            with torch.no_grad():
                m.hidden(ids, recorder=recorder)  # each example by itself
            (routing,) = recorder.routings[1]
            one = torch.zeros(E, dtype=torch.float64)
            for indices, weights in zip(routing.indices[0], routing.weights[0], strict=True):
                for expert, weight in zip(indices.tolist(), weights.tolist(), strict=True):
                    one[expert] += (weight if kind == "gate" else 1 / K) / ids.shape[1]
            expected += one
            examples += 1
    expected /= examples
    torch.testing.assert_close(scores[1], expected / expected.sum())
    assert set(scores) == {1}  # neither the dense layer nor the MTP module


def test_the_experts_that_the_data_uses_are_found():
    """A router that sends even tokens to experts 3 and 1, and odd ones to 0 and 2; data of even tokens only."""
    m = model()
    router = m.routers[1]
    hidden = m.config.hidden_size
    with torch.no_grad():
        # The residual stream is the embedding: what blocks add is made nothing.
        for name, parameter in m.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter.zero_()
        embedding = m.model.embed_tokens.weight
        embedding.zero_()
        embedding[0::2, 0] = 1.0
        embedding[1::2, 1] = 1.0
        router.weight.zero_()
        router.weight[3, 0], router.weight[1, 0] = 2.0, 1.0
        router.weight[0, 1], router.weight[2, 1] = 2.0, 1.0
    assert hidden > 2
    batch = batch_of(6, 4)
    batch.tokens *= 2
    batch.tokens %= 258
    for kind in ("gate", "token"):
        scores, _ = score_experts(m, [batch], 11, kind, 100)
        assert set(choose(scores, 0.9)[1]) == {1, 3}
        assert scores[1][0] == scores[1][2] == 0
    gate, _ = score_experts(m, [batch], 11, "gate", 100)
    assert choose(gate, 0.5)[1] == [3]  # its weight is the larger
    token, _ = score_experts(m, [batch], 11, "token", 100)
    torch.testing.assert_close(token[1], torch.tensor([0, 0.5, 0, 0.5], dtype=torch.float64))


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=20), st.floats(0.01, 1))
def test_the_fewest_experts_that_reach_p(numbers, p):
    score = torch.tensor(numbers, dtype=torch.float64)
    score = score / score.sum()
    (chosen,) = choose({0: score}, p).values()
    total = sum(score[expert] for expert in chosen)
    assert total >= p - 1e-9
    assert sum(score[expert] for expert in chosen[:-1]) < p  # without the last it is not enough
    left = [e for e in range(len(numbers)) if e not in chosen]
    assert all(score[a] >= score[b] for a in chosen for b in left)


def test_looks_at_as_much_as_it_is_told():
    batches = [batch_of(5, seed=seed) for seed in range(10)]
    assert score_experts(model(), batches, 11, "gate", 12)[1] == 15  # whole batches
    with pytest.raises(UserError, match="no example"):
        score_experts(model(), [], 11, "gate", 12)


def test_the_choice_survives_a_file(tmp_path):
    import json

    choice = Choice({1: [2, 0]}, {1: [0.3, 0.1, 0.5, 0.1]}, 99)
    file = tmp_path / "esft.json"
    file.write_text(json.dumps(choice.to_json()))
    assert Choice.from_json(file) == choice
    file.write_text("{}")
    with pytest.raises(UserError, match=r"esft\.json: damaged"):
        Choice.from_json(file)
