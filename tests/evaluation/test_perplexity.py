"""Perplexity against a loop that asks the model for one token at a time."""

import itertools
import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import MODEL

from abyssal.config import ModelConfig
from abyssal.data.tokenizer import EOS, Tokenizer, byte_tokenizer, train_bpe
from abyssal.errors import UserError
from abyssal.evaluation import perplexity
from abyssal.evaluation.perplexity import score, windows
from abyssal.model import Transformer

BYTES = byte_tokenizer()
NO_BOS = Tokenizer(byte_tokenizer().backend, None, EOS)
TEXTS = ["the quick brown fox jumps over a lazy dog, and then", "é", "tea at dawn — again", "x"]


def make_model(dtype=torch.float64, **changes):
    model = Transformer(ModelConfig.model_validate(MODEL | changes)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # wide, so that every token before has a say
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3, generator=generator)
    return model.to(dtype).eval()


MODEL_64 = make_model()


@torch.no_grad()
def loop(model, documents, context, stride):
    """-log p of every predicted token of ``documents`` (lists of ids), each from a forward pass of its own."""
    out = []
    for ids in documents:
        for t in range(1, len(ids)):
            if t <= context:
                start = 0
            else:
                window = (t - 1 - context) // stride  # which of those after the first
                end = min(1 + context + (window + 1) * stride, len(ids))
                start = end - 1 - context
            logits = model(torch.tensor([ids[start:t]]))[0, -1].double()
            out.append(-float(logits.log_softmax(-1)[ids[t]]))
    return out


class TestAgainstALoop:
    @settings(max_examples=20)
    @given(
        st.lists(st.text(alphabet="aé🙂 \n", max_size=12), min_size=1, max_size=4),
        st.integers(1, 12).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, context))),
        st.integers(1, 5),
        st.booleans(),
    )
    def test_all_settings(self, texts, sizes, batch_size, bos):
        context, stride = sizes
        documents = [[0] * bos + [2 + byte for byte in text.encode()] for text in texts]
        expected = loop(MODEL_64, documents, context, stride)
        tokenizer = BYTES if bos else NO_BOS
        settings = {"context": context, "stride": stride, "batch_size": batch_size}
        if not expected:
            with pytest.raises(UserError, match="no token to predict"):
                perplexity(MODEL_64, tokenizer, texts, **settings)
            return
        found = perplexity(MODEL_64, tokenizer, texts, **settings)
        nats = math.fsum(expected)
        assert found.tokens == len(expected)
        assert found.nats == pytest.approx(nats / len(expected), rel=1e-10)
        assert found.perplexity == pytest.approx(math.exp(nats / len(expected)), rel=1e-9)
        # of bytes, a token each, exactly those that are predicted
        assert found.bytes == len(expected)
        assert found.bits_per_byte == pytest.approx(nats / len(expected) / math.log(2), rel=1e-10)
        assert found.documents == sum(bool(ids) for ids in documents)

    @pytest.mark.parametrize("bos", [True, False])
    def test_tokens_of_several_bytes(self, bos):
        tokenizer = train_bpe(["the quick brown fox, tea at dawn: été, été " * 9], 300)
        if not bos:
            tokenizer = Tokenizer(tokenizer.backend, None, EOS)
        model = make_model(vocab_size=320)  # a padded vocabulary
        texts = ["the quick brown fox, the", "été at dawn"]
        documents = [[0] * bos + tokenizer.encode(text) for text in texts]
        expected = loop(model, documents, 6, 4)
        size = sum(len(text.encode()) for text in texts)
        if not bos:
            first = [len(tokenizer.token_bytes(ids[0])) for ids in documents]
            assert max(first) > 1
            size -= sum(first)
        found = perplexity(model, tokenizer, texts, context=6, stride=4)
        assert (found.tokens, found.bytes) == (len(expected), size)
        assert found.bits_per_byte == pytest.approx(math.fsum(expected) / math.log(2) / size, rel=1e-10)

    def test_defaults(self):
        text = "seven wizards brew strong black tea " * 9
        documents = [[0] + [2 + byte for byte in text.encode()]]
        assert len(documents[0]) > 2 * 128
        found = perplexity(MODEL_64, BYTES, [text])
        assert found.nats == pytest.approx(math.fsum(loop(MODEL_64, documents, 128, 64)) / len(text), rel=1e-10)
        longer = make_model(max_position_embeddings=4096)
        assert perplexity(longer, BYTES, [text * 7]) == perplexity(longer, BYTES, [text * 7], context=2048, stride=1024)

    def test_float32(self):
        expected = perplexity(MODEL_64, BYTES, TEXTS, context=16)
        found = perplexity(make_model(torch.float32), BYTES, TEXTS, context=16)
        assert found.nats == pytest.approx(expected.nats, rel=1e-5)

    def test_sixteen_bit_logits_are_summed_up_in_float32(self):
        model = make_model(torch.bfloat16)
        ids = [0] + [2 + byte for byte in b"tea at dawn"]
        with torch.no_grad():
            log_p = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
        expected = -sum(float(log_p[t, token]) for t, token in enumerate(ids[1:])) / (len(ids) - 1)
        assert perplexity(model, BYTES, ["tea at dawn"]).nats == pytest.approx(expected, rel=1e-5)

    def test_a_model_that_knows_nothing(self):
        model = make_model()
        torch.nn.init.zeros_(model.lm_head.weight)
        found = perplexity(model, BYTES, TEXTS, context=8)
        assert found.perplexity == pytest.approx(258)
        assert found.bits_per_byte == pytest.approx(math.log2(258))  # a token a byte


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows(length, context, data):
    stride = data.draw(st.integers(1, context))
    ids = list(range(length))
    predicted = []
    for index, (window, count) in enumerate(windows(ids, context, stride)):
        assert window == ids[window[0] : window[-1] + 1]
        assert 1 <= count <= (context if index == 0 else stride)
        assert len(window) <= context + 1
        if index:
            assert len(window) == context + 1
            assert len(window) - count >= context - stride + 1
        predicted += window[-count:]
    assert predicted == ids[1:]


class TestScore:
    def test_sums_and_greedy(self):
        greedy = [5, 9]
        for _ in range(4):
            with torch.no_grad():
                greedy.append(int(MODEL_64(torch.tensor([greedy]))[0, -1].argmax()))
        other = [*greedy[:-1], (greedy[-1] + 1) % 258]
        items = [(greedy, 4, True), (other, 4, False), (other, 1, False), (greedy, 1, True), (greedy[:4], 2, True)]
        found = {index: answer for index, *answer in score(MODEL_64, [item[:2] for item in items], 2)}
        assert sorted(found) == list(range(5))
        for index, (ids, count, best) in enumerate(items):
            assert found[index] == [pytest.approx(-sum(loop(MODEL_64, [ids], 9, 9)[-count:]), rel=1e-10), best]

    def test_windows_with_the_same_beginning_run_once(self):
        rows = []
        hook = MODEL_64.model.embed_tokens.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
        try:
            assert len(list(score(MODEL_64, [([7, 8, token], 1) for token in range(10)], 4))) == 10
        finally:
            hook.remove()
        assert rows == [1]

    def test_logits_come_in_chunks(self, monkeypatch):
        expected = perplexity(MODEL_64, BYTES, TEXTS, context=16)
        seen = []
        hook = MODEL_64.lm_head.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
        monkeypatch.setattr(import_module("abyssal.evaluation.perplexity"), "_CHUNK_VALUES", 7 * 258)
        try:
            found = perplexity(MODEL_64, BYTES, TEXTS, context=16)
        finally:
            hook.remove()
        assert set(seen) <= {(rows, 258) for rows in range(1, 8)}
        assert sum(rows for rows, _ in seen) == found.tokens  # no logits of tokens that are not predicted
        assert found.nats == pytest.approx(expected.nats, rel=1e-12)


class TestManners:
    def test_the_model_is_left_as_it_was(self):
        model = make_model().train()
        model.lm_head.eval()
        before = {name: module.training for name, module in model.named_modules()}
        modes = []
        hook = model.model.norm.register_forward_hook(
            lambda module, _, out: modes.append((module.training, out.requires_grad))
        )
        perplexity(model, BYTES, TEXTS)
        hook.remove()
        assert set(modes) == {(False, False)}
        assert {name: module.training for name, module in model.named_modules()} == before

    def test_progress(self):
        calls = []
        found = perplexity(MODEL_64, BYTES, TEXTS, context=8, progress=lambda *figures: calls.append(figures))
        assert calls[-1] == (found.tokens, found.nats)
        assert all(left[0] < right[0] for left, right in itertools.pairwise(calls))

    def test_documents_are_read_as_they_are_needed(self):
        read = []

        def endless():
            for index in itertools.count():
                read.append(index)
                yield "tea at dawn"

        def stop(tokens, _):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            perplexity(MODEL_64, BYTES, endless(), batch_size=2, progress=stop)
        assert len(read) < 100


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"context": 0}, r"context: 0 .* 1 to 128 \(max_position_embeddings\)"),
            ({"context": 129}, "context: 129 .* 1 to 128"),
            ({"context": 8, "stride": 9}, "stride: 9 .* 1 to 8"),
            ({"stride": 0}, "stride: 0 .* 1 to 128"),
            ({"batch_size": 0}, "batch_size: 0 .* from 1"),
        ],
    )
    def test_sizes(self, changes, message):
        with pytest.raises(UserError, match=message):
            perplexity(MODEL_64, BYTES, TEXTS, **changes)

    @pytest.mark.parametrize("texts", [[], [""], ["", "a"]])
    def test_nothing_to_predict(self, texts):
        with pytest.raises(UserError, match="no token to predict"):
            perplexity(MODEL_64, NO_BOS, texts)

    def test_tokenizer_of_another_model(self):
        with pytest.raises(UserError, match="vocabulary of 258 is larger than the model's of 100"):
            perplexity(make_model(vocab_size=100), BYTES, TEXTS)

    def test_damaged_weights(self):
        model = make_model()
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
        with pytest.raises(UserError, match=r"logits: .* nan"):
            perplexity(model, BYTES, TEXTS)
