"""The engine against the plainest account of generation: the whole sequence anew for every token."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import BYTES, MHA, MLA, MOE, SEPARATE, greedy_without_cache, make_model

from abyssal.errors import UserError
from abyssal.generation import Sampling
from abyssal.generation.engine import Engine
from abyssal.model import Transformer

KINDS: dict[str, dict[str, Any]] = {
    "mla": {"attention": MLA, "moe": MOE},
    "mha": {"attention": MHA, "rope": {"layout": "halves"}},
    "separate": {"attention": SEPARATE},
}
MODELS: dict[str, Transformer] = {}
PLAIN: dict[tuple[str, tuple[int, ...]], list[int]] = {}


def model_of(kind: str) -> Transformer:
    if kind not in MODELS:
        MODELS[kind] = make_model(torch.float32, **KINDS[kind]).requires_grad_(False)
    return MODELS[kind]


def plain(kind: str, prompt: list[int], count: int) -> list[int]:
    key = (kind, tuple(prompt))
    if key not in PLAIN:
        PLAIN[key] = greedy_without_cache(model_of(kind), prompt, 12)
    return PLAIN[key][:count]


# Few different beginnings, so that prompts share pages and computed text is found again.
PROMPTS = st.builds(
    lambda head, tail: [2 + (7 * i + head) % 200 for i in range(head * 5)] + tail,
    st.integers(0, 3),
    st.lists(st.integers(2, 200), min_size=1, max_size=9),
)


@settings(max_examples=60)
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
        sequence = engine.add([5] * 10, Sampling(max_new_tokens=10))
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

    def broken(work: Any, recorder: Any) -> torch.Tensor:
        logits = run(work, recorder)
        logits[[w.sequence for w in work if w.draws].index(bad)] = torch.nan if not good.new else 0.0
        return logits

    engine._run = broken  # type: ignore[method-assign]
    engine.step()
    engine._run = run  # type: ignore[method-assign]
    while engine.busy:
        engine.step()
    assert bad.finished == "error"
    assert "logits: the largest is nan" in (bad.error or "")
    assert good.new == plain("mha", [5], 3)


@pytest.mark.parametrize("name", ["pages", "page", "chunk", "most"])
def test_sizes_below_one(name: str):
    with pytest.raises(UserError, match=f"{name}: 0 is not at least 1"):
        Engine(model_of("mha"), BYTES, **{name: 0})
