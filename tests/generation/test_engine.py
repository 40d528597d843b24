"""The engine against the plainest account of generation: the whole sequence anew for every token."""

import json
import sys
from typing import Any, ClassVar

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import BPE, BYTES, MHA, MLA, MOE, SEPARATE, greedy_without_cache, make_model
from tokenizers import decoders, models, pre_tokenizers

from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.generation import Sampling, generate, stream
from abyssal.generation.engine import Engine
from abyssal.generation.sampling import filter_logits, make_generators
from abyssal.generation.sequence import Draft, Sequence
from abyssal.generation.speculative import verify
from abyssal.generation.text import Text
from abyssal.model import RoutingRecorder, Transformer

KINDS: dict[str, dict[str, Any]] = {
    "mla": {"attention": MLA, "moe": MOE},
    "mha": {"attention": MHA, "rope": {"layout": "halves"}},
    "one module": {"attention": MLA, "moe": MOE, "mtp": {"num_nextn_predict_layers": 1}},
    "two modules": {"attention": MLA, "mtp": {"num_nextn_predict_layers": 2}},
    "separate": {"attention": SEPARATE},
}
MODELS: dict[str, Transformer] = {}
PLAIN: dict[tuple[str, tuple[int, ...]], list[int]] = {}


def model_of(kind: str) -> Transformer:
    if kind not in MODELS:
        model = make_model(torch.float32, **KINDS[kind]).requires_grad_(False)
        if model.mtp_modules:
            make_predictable(model)
        MODELS[kind] = model
    return MODELS[kind]


def make_predictable(model: Transformer) -> None:
    """What follows a token hangs mostly on the token itself, in the model as in its modules: guesses are often
    right."""
    for name, parameter in model.named_parameters():
        if "o_proj." in name or "down_proj" in name:
            parameter.mul_(0.03)
    for module in model.mtp_modules:
        half = model.config.hidden_size
        module.eh_proj.weight[:, :half] = 0.3 * torch.eye(half)
        module.eh_proj.weight[:, half:].mul_(0.05)
        module.enorm.weight.fill_(1.0)
        module.shared_head["norm"].weight.copy_(model.model.norm.weight)


def plain(kind: str, prompt: list[int], count: int) -> list[int]:
    key = (kind, tuple(prompt))
    if key not in PLAIN:
        PLAIN[key] = greedy_without_cache(model_of(kind), prompt, 12)
    return PLAIN[key][:count]


def tiny_tokenizer(size: int) -> Tokenizer:
    """One with ``size`` tokens and no end of text: every id may be said."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:size])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Tokenizer(backend)


# Few different beginnings, so that prompts share pages and computed text is found again.
PROMPTS = st.builds(
    lambda head, tail: [2 + (7 * i + head) % 200 for i in range(head * 5)] + tail,
    st.integers(0, 3),
    st.lists(st.integers(2, 200), min_size=1, max_size=9),
)


@settings(max_examples=70)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_schedule_gives_what_each_prompt_gives_alone(data: st.DataObject, kind: str):
    requests = data.draw(st.lists(st.tuples(PROMPTS, st.integers(1, 12), st.integers(0, 8)), min_size=1, max_size=6))
    page = data.draw(st.integers(1, 9), "page")
    least = max(-(-(len(prompt) + count) // page) for prompt, count, _ in requests)
    engine = Engine(
        model_of(kind),
        BYTES,
        page=page,
        pages=least + data.draw(st.integers(0, 12), "spare pages"),
        chunk=data.draw(st.integers(1, 40), "chunk"),
        most=data.draw(st.integers(1, 6), "most"),
        prefix_cache=data.draw(st.booleans(), "prefix_cache"),
        drafts=data.draw(st.none() | st.integers(0, 5), "drafts") if "module" in kind else None,
    )
    cancelled = data.draw(st.sets(st.integers(0, len(requests) - 1), max_size=2), "cancelled")
    sequences = {}
    steps = 0
    while len(sequences) < len(requests) or engine.busy:
        for number, (prompt, count, when) in enumerate(requests):
            if number not in sequences and (when <= steps or not engine.busy):
                sequences[number] = engine.add(prompt, Sampling(temperature=0, max_new_tokens=count))
        engine.step()
        steps += 1
        for number in cancelled & sequences.keys():
            if steps > 3:
                engine.cancel(sequences[number])
        assert steps < 2000
    for number, (prompt, count, _) in enumerate(requests):
        sequence, expected = sequences[number], plain(kind, prompt, count)
        if sequence.finished == "cancelled":
            assert sequence.new == expected[: len(sequence.new)]
        else:
            assert sequence.new == expected
            assert sequence.finished == ("length" if len(expected) == count else "stop")
    assert engine.pool.in_use == 0
    assert engine.pool.available == engine.pool.pages


@settings(max_examples=30)
@given(data=st.data(), kind=st.sampled_from(["mla", "one module"]))
def test_routing_is_that_of_the_whole_text_at_once(data: st.DataObject, kind: str):
    """Every new token's experts, the last one's too, whatever the schedule; for those who asked, and no others."""
    model = model_of(kind)
    wish = st.tuples(PROMPTS, st.integers(1, 12), st.booleans())
    requests = data.draw(st.lists(wish, min_size=1, max_size=5))
    page = data.draw(st.integers(1, 9), "page")
    engine = Engine(
        model,
        BYTES,
        page=page,
        pages=max(-(-(len(prompt) + count) // page) for prompt, count, _ in requests) + data.draw(st.integers(0, 9)),
        chunk=data.draw(st.integers(1, 40), "chunk"),
        drafts=data.draw(st.integers(0, 3), "drafts") if model.mtp_modules else None,
    )
    stop = data.draw(st.sampled_from([(), ("a",), ("\x10", "\x20", "\x30")]), "stop")
    sequences = [
        engine.add(prompt, Sampling(temperature=0, max_new_tokens=count, stop=stop), routing=wanted)
        for prompt, count, wanted in requests
    ]
    counter = RoutingRecorder() if data.draw(st.booleans(), "another recorder") else None
    while engine.busy:
        engine.step(counter)
    assert engine.pool.in_use == 0
    for sequence, (prompt, count, wanted) in zip(sequences, requests, strict=True):
        expected = plain(kind, prompt, count)
        assert sequence.new == expected[: len(sequence.new)]
        assert sequence.finished == ("length" if len(sequence.new) == count and not sequence.text.stopped else "stop")
        if not wanted:
            assert sequence.routing is None
            continue
        assert sequence.routing is not None
        assert len(sequence.routing) == len(sequence.new)
        recorder = RoutingRecorder()
        model(torch.tensor([sequence.tokens]), recorder=recorder)
        for number, (router, (whole,)) in enumerate(
            (model.routers[layer], seen) for layer, seen in sorted(recorder.routings.items())
        ):
            chosen = torch.tensor([one.experts[number] for one in sequence.routing], dtype=torch.long)
            weights = torch.tensor([one.weights[number] for one in sequence.routing])
            choice = whole.scores[0, len(prompt) :] + router.e_score_correction_bias
            if len(chosen):
                best = choice.gather(1, whole.indices[0, len(prompt) :])
                # By what they were chosen for, not by number: two experts may be as good as each other.
                torch.testing.assert_close(choice.gather(1, chosen), best, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(weights, whole.weights[0, len(prompt) :], rtol=1e-3, atol=1e-4)


DRAWN: dict[tuple[Any, ...], list[int]] = {}


@settings(max_examples=40)
@given(data=st.data(), drafts=st.integers(0, 3))
def test_drawn_tokens_do_not_depend_on_the_schedule(data: st.DataObject, drafts: int):
    """With guesses too: however pages are shared or taken away, a seed gives the text that it gives alone."""
    model = model_of("one module")
    requests = data.draw(st.lists(st.tuples(PROMPTS, st.integers(1, 12), st.integers(0, 3)), min_size=2, max_size=5))
    page = data.draw(st.integers(2, 9), "page")
    least = max(-(-(len(prompt) + count) // page) for prompt, count, _ in requests)
    engine = Engine(
        model,
        BYTES,
        page=page,
        pages=least + data.draw(st.integers(0, 10), "spare pages"),
        chunk=data.draw(st.integers(1, 30), "chunk"),
        drafts=drafts,
    )
    sequences = []
    for prompt, count, seed in requests:
        sequences.append(engine.add(prompt, Sampling(seed=seed, temperature=0.7, top_k=20, max_new_tokens=count)))
        engine.step()
    while engine.busy:
        engine.step()
    for sequence, (prompt, count, seed) in zip(sequences, requests, strict=True):
        key = (drafts, seed, count, *prompt)
        if key not in DRAWN:
            alone = Engine(model, BYTES, drafts=drafts, prefix_cache=False)
            one = alone.add(prompt, Sampling(seed=seed, temperature=0.7, top_k=20, max_new_tokens=count))
            while alone.busy:
                alone.step()
            DRAWN[key] = one.new
        assert sequence.new == DRAWN[key]
    assert engine.pool.in_use == 0


class TestPrefixes:
    def test_a_prompt_that_was_read_is_not_read_again(self):
        engine = Engine(model_of("mla"), BYTES, page=4)
        prompt = list(range(10, 31))
        greedy = Sampling(temperature=0, max_new_tokens=4)
        for expected in (0, 20):
            sequence = engine.add(prompt, greedy)
            while engine.busy:
                engine.step()
            assert sequence.reused == expected
            assert sequence.new == plain("mla", prompt, 4)

    def test_running_sequences_share_pages(self):
        engine = Engine(model_of("mla"), BYTES, page=4, pages=40)
        prompt = list(range(10, 31))
        first = engine.add(prompt, Sampling(temperature=0, max_new_tokens=8))
        engine.step()
        second = engine.add([*prompt, 77], Sampling(temperature=0, max_new_tokens=8))
        engine.step()
        assert second.pages[:5] == first.pages[:5]
        assert engine.pool.in_use == 5 + 2 * 1

    def test_a_conversation_costs_what_is_new(self):
        model = model_of("mla")
        seen = []

        class Counting(Engine):
            def _run(self, work: Any, recorder: Any) -> Any:
                seen.append(sum(w.count for w in work))
                return super()._run(work, recorder)

        engine = Counting(model, BYTES, page=4)
        first = engine.add(list(range(10, 50)), Sampling(temperature=0, max_new_tokens=3))
        while engine.busy:
            engine.step()
        seen.clear()
        engine.add([*first.tokens, 60, 61], Sampling(temperature=0, max_new_tokens=1))
        while engine.busy:
            engine.step()
        assert seen == [len(first.tokens) + 2 - 40]


class TestPressure:
    def test_the_youngest_gives_way_and_nothing_changes(self):
        engine = Engine(model_of("mla"), BYTES, page=2, pages=14, prefix_cache=False)
        prompts = [[5, 6, 7], [9, 8], [20, 21, 22, 23]]
        sequences = [engine.add(prompt, Sampling(temperature=0, max_new_tokens=12)) for prompt in prompts]
        while engine.busy:
            engine.step()
        assert [s.new for s in sequences] == [plain("mla", prompt, 12) for prompt in prompts]
        assert sum(s.preempted for s in sequences) > 0
        assert sequences[0].preempted == 0

    def test_a_pool_too_small_for_one_sequence(self):
        engine = Engine(model_of("mla"), BYTES, page=4, pages=3)
        with pytest.raises(UserError, match=r"pages: 3 of 4 tokens are too few .* which take 5"):
            engine.add([5] * 10, Sampling(max_new_tokens=10))
        assert not engine.busy

    def test_cancelling_frees_pages_at_once(self):
        engine = Engine(model_of("mla"), BYTES, page=4, prefix_cache=False)
        sequence = engine.add([5] * 10, Sampling(temperature=0, max_new_tokens=10))
        engine.step()
        assert engine.pool.in_use == 3
        engine.cancel(sequence)
        assert (engine.pool.in_use, engine.busy, sequence.finished) == (0, False, "cancelled")
        engine.cancel(sequence)


def test_drawn_tokens_do_not_depend_on_the_company():
    model = model_of("mla")
    sampling = Sampling(seed=3, temperature=0.8, top_p=0.9, max_new_tokens=12)

    def run(others: int) -> list[int]:
        engine = Engine(model, BYTES, page=4, chunk=7)
        for number in range(others):
            engine.add([30 + number, 40], Sampling(seed=number, max_new_tokens=20))
        sequence = engine.add([5, 6, 7], sampling)
        while engine.busy:
            engine.step()
        return sequence.new

    assert run(0) == run(3)


def test_one_request_with_broken_logits_ends_alone(monkeypatch: pytest.MonkeyPatch):
    model = model_of("mha")
    engine = Engine(model, BYTES)
    good, bad = (engine.add([token], Sampling(temperature=0, max_new_tokens=3)) for token in (5, 6))
    run = engine._run

    def broken(work: Any, recorder: Any) -> Any:
        states, logits = run(work, recorder)
        logits[[w.sequence for w in work if w.draws].index(bad)] = torch.nan
        return states, logits

    engine._run = broken  # type: ignore[method-assign]
    engine.step()
    engine._run = run  # type: ignore[method-assign]
    while engine.busy:
        engine.step()
    assert bad.finished == "error"
    assert "logits: the largest is nan" in (bad.error or "")
    assert good.new == plain("mha", [5], 3)


class Refusing:
    """A grammar that takes two tokens, whatever they are, and then fails at ``where``."""

    complete = False

    def __init__(self, where: str, error: Exception) -> None:
        self.where, self.error, self.taken = where, error, 0

    def allowed(self) -> torch.Tensor:
        if self.where == "allowed" and self.taken == 2:
            raise self.error
        return torch.full((264,), self.where != "nothing" or self.taken < 2)

    def take(self, token: int) -> None:
        self.taken += 1
        if self.where == "take" and self.taken == 2:
            raise self.error


class TestOneRequestFails:
    """Its error is its own: the others say what they say alone, and no page is lost."""

    def run(self, kind: str, fail: Any, **sampling: Any) -> Sequence:
        engine = Engine(model_of(kind), BYTES, page=4)
        prompts = [[10 + i, 20, 30, 40, 50] for i in range(3)]
        greedy = Sampling(temperature=0, max_new_tokens=8)
        sequences = [
            engine.add(prompt, Sampling(**{"temperature": 0, "max_new_tokens": 8} | sampling) if i == 1 else greedy)
            for i, prompt in enumerate(prompts)
        ]
        fail(sequences[1])
        events = []
        while engine.busy:
            events += engine.step()
        for number in (0, 2):
            assert sequences[number].new == plain(kind, prompts[number], 8)
            assert sequences[number].finished == "length"
            assert sequences[number].error is None
        bad = sequences[1]
        assert bad.finished == "error"
        assert [token for e in events if e.sequence is bad for token in e.tokens] == bad.new
        assert engine.pool.in_use == 0
        assert engine.metrics.finished == {"length": 2, "error": 1}
        after = engine.add(prompts[1], greedy)  # what is kept of its text is sound
        while engine.busy:
            engine.step()
        assert after.new == plain(kind, prompts[1], 8)
        return bad

    @pytest.mark.parametrize("where", ["allowed", "take", "nothing"])
    def test_grammar(self, where: str):
        def fail(sequence: Sequence) -> None:
            sequence.grammar = Refusing(where, UserError("schema: lost"))  # type: ignore[assignment]

        bad = self.run("mla", fail)
        none = "schema: none of the tokens that may come next is one of the model's"
        assert bad.error == (none if where == "nothing" else "schema: lost")
        assert bad.new == plain("mla", [11, 20, 30, 40, 50], 2)

    def test_a_matcher_that_fails(self, caplog: pytest.LogCaptureFixture):
        """A real one, fed with a token that its schema does not allow: what stands in a step must not rely on it."""
        pytest.importorskip("llguidance")
        grammar = Engine(model_of("mla"), BYTES).grammars.compile({"type": "integer"})
        grammar.allowed = lambda: torch.ones(264, dtype=torch.bool)  # type: ignore[method-assign]

        def fail(sequence: Sequence) -> None:
            sequence.grammar = grammar

        bad = self.run("mla", fail)
        assert (bad.error or "").startswith("schema: ")
        assert not caplog.records

    @pytest.mark.parametrize("kind", ["mla", "one module"])
    def test_text(self, kind: str, caplog: pytest.LogCaptureFixture):
        """What is a bug of ours and no user's error is seen in the log as well."""

        def fail(sequence: Sequence) -> None:
            push, sizes = sequence.text.push, []

            def broken(token: int) -> str:
                sizes.append(token)
                if len(sizes) == 3:
                    raise KeyError("a\nb")
                return push(token)

            sequence.text.push = broken  # type: ignore[method-assign]

        bad = self.run(kind, fail)
        assert (bad.error or "").startswith("KeyError: ")
        assert "\n" not in (bad.error or "")
        assert len(bad.new) == 3
        assert [record.exc_info is not None for record in caplog.records] == [True]

    def test_logprobs(self, monkeypatch: pytest.MonkeyPatch):
        def broken(*_: Any) -> None:
            raise UserError("no")

        monkeypatch.setattr("abyssal.generation.engine.Logprobs", broken)
        assert self.run("mla", lambda sequence: None, logprobs=2).error == "no"

    def test_one_of_a_batch_that_is_drawn_together(self, monkeypatch: pytest.MonkeyPatch):
        """Same settings, so one call draws for all; it refuses one of them."""
        from abyssal.generation import engine as module

        real, refused = module.sample, []

        def picky(logits: torch.Tensor, seen: Any, *rest: Any) -> torch.Tensor:
            if any(tokens[0] == 11 and len(tokens) == 7 for tokens in seen):
                refused.append(len(seen))
                raise UserError("not this one")
            return real(logits, seen, *rest)

        monkeypatch.setattr(module, "sample", picky)
        engine = Engine(model_of("mla"), BYTES)
        drawn = [engine.add([10 + i, 20, 30, 40, 50], Sampling(seed=i, max_new_tokens=6)) for i in range(3)]
        same = [engine.add([10 + i, 20, 30, 40, 50], Sampling(temperature=0, max_new_tokens=6)) for i in (0, 1, 2)]
        while engine.busy:
            engine.step()
        assert sorted(refused) == [1, 1, 3]
        assert [s.error for s in (drawn[1], same[1])] == ["not this one"] * 2
        assert [same[i].new for i in (0, 2)] == [plain("mla", [10 + i, 20, 30, 40, 50], 6) for i in (0, 2)]
        assert [s.finished for s in (drawn[0], drawn[2])] == ["length"] * 2


def test_metrics_are_those_of_all_sequences():
    engine = Engine(model_of("one module"), BYTES, page=4, pages=18, drafts=2)
    prompts = [list(range(10, 31)), [*range(10, 31), 99], [7, 8], [9]]
    sequences = []
    for number, prompt in enumerate(prompts):
        sequences.append(engine.add(prompt, Sampling(temperature=0, max_new_tokens=12)))
        before = engine.metrics
        engine.step()
        if number == 2:
            engine.cancel(sequences[2])
        metrics = engine.metrics
        assert metrics.running + metrics.waiting == len([s for s in sequences if s.finished is None])
        assert metrics.pages_in_use == len({page for s in sequences for page in s.pages})
        for name in ("prompt_tokens", "new_tokens", "reused", "preempted"):
            assert getattr(metrics, name) >= getattr(before, name)
    while engine.busy:
        engine.step()
    metrics = engine.metrics
    assert metrics.prompt_tokens == sum(map(len, prompts))
    assert metrics.new_tokens == sum(len(s.new) for s in sequences)
    assert metrics.reused == sum(s.reused for s in sequences) > 0
    assert metrics.preempted == sum(s.preempted for s in sequences)
    assert metrics.drafted == [sum(s.drafted[k] for s in sequences if len(s.drafted) > k) for k in range(2)]
    assert metrics.acceptance == [right / made for right, made in zip(metrics.accepted, metrics.drafted, strict=True)]
    assert metrics.finished == {"length": 3, "cancelled": 1}
    assert (metrics.running, metrics.waiting, metrics.pages_in_use, metrics.pages) == (0, 0, 0, 18)
    latent = MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"]
    assert metrics.bytes_a_token == 4 * latent * (model_of("one module").config.num_hidden_layers + 1)
    metrics.drafted.append(1)
    assert engine.metrics.drafted != metrics.drafted


@pytest.mark.parametrize(
    ("tokens", "sampling", "message"),
    [
        ([], {}, "prompt: empty"),
        ("abc", {}, "prompt: a str; expected token ids"),
        ([1.5], {}, "prompt: a list; expected token ids"),
        (7, {}, "prompt: an int; expected token ids"),
        ([264], {}, "prompt: token id 264 is outside the model's vocabulary of 264"),
        ([5] * 128, {}, "prompt: 128 tokens leave no room in the model's context of 128"),
        ([5], {"temperature": -1}, "temperature: -1 is not valid"),
        ([5], {"temperature": float("nan")}, "temperature: nan is not valid"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens: 0 is not valid"),
        ([5], {"logprobs": 101}, "logprobs: 101 is not valid; expected None or a whole number up to 100"),
        ([5], {"logprobs": -1}, "logprobs: -1 is not valid"),
    ],
)
def test_what_is_refused_disturbs_nothing(tokens: Any, sampling: dict[str, Any], message: str):
    engine = Engine(model_of("mla"), BYTES, page=4)
    good = engine.add([10, 20, 30], Sampling(temperature=0, max_new_tokens=6))
    engine.step()
    with pytest.raises(UserError, match=f"^{message}") as caught:
        engine.add(tokens, Sampling(**sampling))
    assert "\n" not in str(caught.value)
    while engine.busy:
        engine.step()
    assert good.new == plain("mla", [10, 20, 30], 6)
    assert engine.pool.in_use == 0


def test_more_new_tokens_than_the_context_holds():
    engine = Engine(model_of("mla"), BYTES)
    sequence = engine.add([5] * 120, Sampling(temperature=0, max_new_tokens=10**9))
    while engine.busy:
        engine.step()
    assert len(sequence.tokens) == 128
    assert sequence.finished == "length"


@pytest.mark.parametrize("name", ["pages", "page", "chunk", "most"])
def test_sizes_below_one(name: str):
    with pytest.raises(UserError, match=f"{name}: 0 is not at least 1"):
        Engine(model_of("mha"), BYTES, **{name: 0})


class TestGuessing:
    def run(self, kind: str, drafts: int | None, **sampling: Any) -> tuple[Engine, Any]:
        engine = Engine(model_of(kind), BYTES, drafts=drafts, page=4)
        sequence = engine.add([10, 20, 30], Sampling(**{"temperature": 0, "max_new_tokens": 90} | sampling))
        while engine.busy:
            engine.step()
        return engine, sequence

    @pytest.mark.parametrize("kind", ["one module", "two modules"])
    def test_some_guesses_are_right_and_some_wrong(self, kind: str):
        """Else the tests above would say little of what happens after either."""
        for drafts in (1, 2, 3):
            engine, sequence = self.run(kind, drafts)
            assert len(sequence.drafted) == drafts
            assert 0 < sum(engine.metrics.accepted) < sum(engine.metrics.drafted)
            assert (engine.metrics.drafted, engine.metrics.accepted) == (sequence.drafted, sequence.accepted)

    @pytest.mark.parametrize("kind", ["one module", "two modules"])
    def test_guesses_are_those_of_the_modules(self, kind: str):
        """All of one module's; of two the first step's, since later the second may still have a wrong guess cached."""
        engine = Engine(model_of(kind), BYTES, drafts=4, page=4, chunk=5)
        sequence = engine.add(list(range(10, 23)), Sampling(temperature=0, max_new_tokens=40))
        checked = 0
        while engine.busy and not (checked and kind == "two modules"):
            engine.step()
            if sequence.drafts:
                expected = plain_guesses(model_of(kind), sequence.tokens, 4)
                assert [d.token for d in sequence.drafts] == expected[: len(sequence.drafts)]
                checked += 1
        assert checked > 10 or kind == "two modules"

    def test_right_guesses_save_steps(self):
        steps = []
        engine = Engine(model_of("one module"), BYTES, drafts=1)
        sequence = engine.add([10, 20, 30], Sampling(temperature=0, max_new_tokens=90))
        while engine.busy:
            steps.append(len(engine.step()))
        assert len(steps) == len(sequence.new) - sum(engine.metrics.accepted)

    def test_it_is_given_up_where_it_does_not_pay(self, monkeypatch: pytest.MonkeyPatch):
        for worth, tried in ((0.0, None), (1.1, 32)):
            monkeypatch.setattr("abyssal.generation.engine.cost_of_a_draft", lambda model, worth=worth: worth)
            engine, sequence = self.run("one module", None)
            assert sequence.drafted == [tried] if tried else sum(engine.metrics.drafted) > 32
            assert len(sequence.new) == 90
            monkeypatch.undo()

    def test_not_asked_of_a_model_without_modules(self):
        with pytest.raises(UserError, match="drafts: 2 is not valid; expected 0: this model has no MTP module"):
            Engine(model_of("mla"), BYTES, drafts=2)
        with pytest.raises(UserError, match="drafts: -1 is not valid; expected a number from 0"):
            Engine(model_of("one module"), BYTES, drafts=-1)


@pytest.mark.parametrize(
    ("draws", "filters"),
    [(20_000, {}), (4_000, {"top_k": 5}), (4_000, {"temperature": 0.6, "top_p": 0.8, "repetition_penalty": 1.3})],
)
def test_guessed_tokens_are_distributed_as_drawn_ones(draws: int, filters: dict[str, Any]):
    """Chi-squared of verify() against the distribution that it must leave alone, for one guess and its successor."""
    size = 12
    g = torch.Generator().manual_seed(1)
    target, after = torch.randn(size, generator=g) * 1.5, torch.randn(size, size, generator=g) * 1.5
    guess = target + torch.randn(size, generator=g)
    sampling = Sampling(**filters)
    own = torch.Generator().manual_seed(2)
    q = filter_logits(guess.unsqueeze(0), [[3]], sampling).softmax(-1)[0]
    pairs = torch.zeros(size, size, dtype=torch.float64)
    singles = torch.zeros(size, dtype=torch.float64)
    for token in torch.multinomial(q, draws, replacement=True, generator=own).tolist():
        sequence = Sequence([3], 1, sampling, own, 9, Text(BYTES, ()))
        sequence.drafts = [Draft(token, q)]
        said = verify(torch.stack((target, after[token])), sequence)
        singles[said[0]] += 1
        if len(said) == 2:
            pairs[said[0], said[1]] += 1
    p = filter_logits(target.unsqueeze(0), [[3]], sampling).softmax(-1)[0].double()
    assert chi_squared(singles, p) > 1e-4
    assert float(pairs.sum()) / draws == pytest.approx(float(torch.minimum(p, q.double()).sum()), abs=0.03)
    for first in pairs.sum(1).topk(2).indices.tolist():  # behind an accepted guess stands a draw like any other
        follows = filter_logits(after[first].unsqueeze(0), [[3, first]], sampling).softmax(-1)[0].double()
        assert chi_squared(pairs[first], follows) > 1e-4


@torch.no_grad()
def plain_guesses(model: Transformer, tokens: list[int], count: int) -> list[int]:
    """What follows ``tokens``, guessed without any cache: all positions anew for every guess."""
    text = list(tokens)
    states = out = model.hidden(torch.tensor([tokens[:-1]]))
    for depth in range(count):
        number = min(depth, len(model.mtp_modules) - 1)
        if depth > number:  # once more the last module, a position further, with its own output as the state there
            states = torch.cat((states, out[:, -1:]), dim=1)
        else:
            states = out
        following = text[1 + number :][: states.shape[1]]
        embedding = model.model.embed_tokens(torch.tensor([following]))
        context = model._context(0, states.shape[1], None, states.device)
        out = model.mtp_modules[number](states, embedding, context)
        text.append(int(model.lm_head(out[0, -1])[: BYTES.vocab_size].argmax()))
    return text[len(tokens) :]


def chi_squared(seen: torch.Tensor, p: torch.Tensor) -> float:
    """The probability of counts at least as far from ``p`` as ``seen``; bins that expect less than 5 are joined."""
    expected = p * seen.sum()
    assert float(seen[p == 0].sum()) == 0
    small = expected < 5
    groups = [(seen[i], expected[i]) for i in torch.nonzero(~small).flatten().tolist()]
    if float(expected[small].sum()) >= 5:
        groups.append((seen[small].sum(), expected[small].sum()))
    statistic = sum(float((o - e) ** 2 / e) for o, e in groups)
    return float(torch.special.gammaincc(torch.tensor((len(groups) - 1) / 2.0), torch.tensor(statistic / 2)))


def test_a_whole_engine_draws_as_the_model_does():
    """4,000 first and second tokens of a tiny vocabulary, the second of them guessed, against the model's own
    account."""
    config = {"vocab_size": 12, "attention": MLA, "mtp": {"num_nextn_predict_layers": 1}, "hidden_size": 32}
    model = make_model(torch.float32, **config).requires_grad_(False)
    tokenizer = tiny_tokenizer(12)
    p = model(torch.tensor([[5]]))[0, -1].double().softmax(-1)
    follow = model(torch.tensor([[5, t] for t in range(12)]))[:, -1].double().softmax(-1)
    both = (p.unsqueeze(1) * follow).flatten()
    seen = torch.zeros(12, 12, dtype=torch.float64)
    engine = Engine(model, tokenizer, drafts=1, most=1000, chunk=4000)
    generators = make_generators(7, 4_000)
    sequences = [engine.add([5], Sampling(max_new_tokens=3), generator=g) for g in generators]
    while engine.busy:
        engine.step()
    for sequence in sequences:
        seen[sequence.new[0], sequence.new[1]] += 1
    assert sum(engine.metrics.accepted) > 200
    assert chi_squared(seen.flatten(), both) > 1e-4


def test_whole_texts_are_drawn_as_the_model_does():
    """20,000 tokens of long texts, most of them guessed. Without attention a token hangs on the one before alone, so
    each is a draw from one of twelve known distributions."""
    config = {"vocab_size": 12, "attention": MLA, "mtp": {"num_nextn_predict_layers": 1}, "hidden_size": 32}
    model = make_model(torch.float32, **config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "o_proj." in name:
            parameter.zero_()
    follow = model(torch.arange(12).unsqueeze(1))[:, -1].double().softmax(-1)
    engine = Engine(model, tiny_tokenizer(12), drafts=2, most=200)
    sampling = Sampling(max_new_tokens=100)
    sequences = [engine.add([i % 12], sampling, generator=g) for i, g in enumerate(make_generators(3, 200))]
    while engine.busy:
        engine.step()
    seen = torch.zeros(12, 12, dtype=torch.float64)
    for sequence in sequences:
        for before, token in zip(sequence.tokens, sequence.new, strict=False):
            seen[before, token] += 1
    assert seen.sum() == 20_000
    metrics = engine.metrics
    assert len(metrics.drafted) == 2
    assert 0.1 < metrics.acceptance[0] < 0.9
    for row, p in zip(seen, follow, strict=True):
        assert chi_squared(row, p) > 1e-5
    wrong = follow.roll(1, 0)
    assert chi_squared(seen[0], wrong[0]) < 1e-9


BAD_SCHEMAS: list[Any] = [
    "{",
    "[]",
    True,
    '{"type": 3}',
    {"type": "nonsense"},
    {"type": "string", "pattern": "(("},
    {"type": "array", "uniqueItems": True},
    {"$ref": "#/nowhere"},
    {"minimum": float("nan")},
    {"const": b"bytes"},
    '{"not":' * 2000,
]


def test_a_schema_needs_a_token_that_ends_a_text():
    pytest.importorskip("llguidance")
    model = make_model(torch.float32, vocab_size=12, attention=MLA, hidden_size=32).requires_grad_(False)
    engine = Engine(model, tiny_tokenizer(12))
    with pytest.raises(UserError, match="no token that ends a text"):
        engine.add([5], schema={"type": "object"})
    assert not engine.busy


class TestSchema:
    SCHEMA: ClassVar = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "n": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }

    @pytest.mark.parametrize("temperature", [0, 1.0])
    @pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
    def test_an_untrained_model_writes_what_the_schema_says(self, tokenizer: Tokenizer, temperature: float):
        pytest.importorskip("llguidance")
        model = make_model(torch.float32, vocab_size=330, mtp={"num_nextn_predict_layers": 1}).requires_grad_(False)
        engine = Engine(model, tokenizer)
        sampling = Sampling(temperature=temperature, max_new_tokens=120, seed=3)
        held = [engine.add([5 + i], sampling, schema=self.SCHEMA) for i in range(3)]
        free = engine.add([9, 10], Sampling(temperature=0, max_new_tokens=5))
        while engine.busy:
            engine.step()
        for sequence in held:
            assert sequence.finished == "stop"
            said = json.loads(tokenizer.decode(sequence.new))
            assert set(said) == {"name", "n"}
            assert isinstance(said["name"], str)
            assert len(said["name"]) <= 5
            assert isinstance(said["n"], int)
            assert said["n"] <= 99
        assert len(free.new) == 5

    def test_text_that_waited_for_a_stop_string_comes_with_the_end(self):
        pytest.importorskip("llguidance")
        said = generate(model_of("mla"), BYTES, "a", schema={"const": {"a": 1}}, stop=["}}"], seed=1)
        assert json.loads(said) == {"a": 1}

    def test_generate_holds_every_text_to_it(self):
        pytest.importorskip("llguidance")
        schema = {"enum": ["red", "green"]}
        texts = generate(model_of("one module"), BYTES, ["a", "b", "c"], schema=schema, seed=2)
        assert {json.loads(text) for text in texts} <= {"red", "green"}
        assert json.loads("".join(stream(model_of("mla"), BYTES, "a", schema=schema, seed=2))) in ("red", "green")

    @pytest.mark.parametrize("bad", BAD_SCHEMAS)
    def test_a_schema_that_cannot_be_compiled(self, bad: Any):
        pytest.importorskip("llguidance")
        engine = Engine(model_of("mla"), BYTES)
        with pytest.raises(UserError, match=r"^schema: ") as caught:
            engine.add([5], schema=bad)
        with pytest.raises(UserError, match=r"^schema: "):
            generate(model_of("mla"), BYTES, "a", schema=bad)
        assert "\n" not in str(caught.value)
        assert not engine.busy

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "llguidance", None)
        with pytest.raises(UserError, match="needs llguidance: pip install"):
            Engine(model_of("mla"), BYTES).add([5], schema={})


@pytest.mark.parametrize("drafts", [0, 2])
def test_logprobs_are_the_models_own(drafts: int):
    model = model_of("one module")
    engine = Engine(model, BYTES, drafts=drafts, page=4)
    sampling = Sampling(temperature=0.7, top_k=3, seed=1, max_new_tokens=20, logprobs=4)
    sequence = engine.add([10, 20, 30], sampling)
    while engine.busy:
        engine.step()
    logits = model(torch.tensor([sequence.tokens]))[0, 2:-1, : BYTES.vocab_size].double().log_softmax(-1)
    assert len(sequence.logprobs) == len(sequence.new) == 20
    for row, token, told in zip(logits, sequence.new, sequence.logprobs, strict=True):
        assert told.own == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(4)
        assert [t for t, _ in told.likeliest] == best.indices.tolist()
        assert [p for _, p in told.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_damaged_modules_do_not_disturb_the_model():
    model = make_model(torch.float32, **KINDS["one module"]).requires_grad_(False)
    model.mtp_modules[0].eh_proj.weight.fill_(torch.nan)
    for sampling in (Sampling(temperature=0, max_new_tokens=9), Sampling(seed=1, max_new_tokens=9)):
        said = []
        for drafts in (0, 2):
            engine = Engine(model, BYTES, drafts=drafts)
            sequence = engine.add([10, 20, 30], sampling)
            while engine.busy:
                engine.step()
            said.append(sequence.new)
        assert said[0] == said[1]
        assert engine.metrics.drafted == []


def test_a_guess_refused_by_a_rounding_is_drawn_all_the_same():
    """Where p and q differ by rounding alone nothing is left of p − q to draw from."""
    scores = torch.tensor([0.0, 1.0])
    p = scores.softmax(-1)
    q = p.clone()
    q[0] = torch.nextafter(p[0], torch.tensor(1.0))
    for seed in range(50):
        sequence = Sequence([3], 1, Sampling(), torch.Generator().manual_seed(seed), 9, Text(BYTES, ()))
        sequence.drafts = [Draft(0, q * 3)]  # often refused, p nowhere above it
        assert verify(torch.stack((scores, scores)), sequence)[0] in (0, 1)
