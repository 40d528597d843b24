"""Every rendering is compared with transformers'."""

import enum
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data.chat import ChatTemplate
from abyssal.data.tokenizer import BOS, EOS, Tokenizer, byte_tokenizer, train_bpe
from abyssal.errors import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("jinja2")

SPECIAL = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
THEIRS = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend, **SPECIAL)

CHAT = [
    {"role": "system", "content": "Be  brief.\n"},
    {"role": "user", "content": "  你好 <b>\"quoted\" & 'single'</b> {{ bos_token }} {% if %}\n\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello 🙂"},
    {"role": "user", "content": "And?"},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": 2, "dry": None}}}
TOOL_CHAT = [
    {"role": "user", "content": "天气？"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": '{"°C": 21.5}', "name": None},
    {"role": "assistant", "content": "21.5 °C", "reasoning": "read it off"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "<天气> & more", "parameters": {"b": [1, 2.5, True], "a": None}},
    }
]
TEMPLATES = {
    "chatml": """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "instructions": """{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'] | trim + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set system_message = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system_message if loop.index0 == 0 else '') + message['content'].strip() }}
        {{- ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content.split('</think>')[-1].lstrip('\\n') + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "namespace": """{% set ns = namespace(first=true, system='', n=0) %}
    {%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system ~ m.content %}{% endfor -%}
{{ bos_token }}{{ ns.system }}
{% for m in messages %}
    {% if m['role'] == 'user' %}
        {%- set ns.first = false %}{% set ns.n = ns.n + 1 %}
Human {{ ns.n }}: {{ m['content'] -}}
    {% elif m['role'] == 'assistant' %}
AI{{ ' (last)' if loop.last }}: {{ m['content'] | default('', true) }}{{ eos_token }}
    {% endif %}
{% endfor %}
{{ ns.first }} {{ pad_token }}[{{ unk_token }}]""",
    "json": """{% if tools %}{{ tools | tojson }}
{{ tools | tojson(indent=2) }}
{{ tools | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}{% endif %}
{% for m in messages %}{{ m | tojson(indent=4) }}{{ m.items() | list | length }}
{% for call in m.tool_calls %}{{ call['function']['arguments'] | tojson }}{% endfor %}
{% endfor %}{{ messages | tojson }}{{ documents | tojson }}{{ tools is none }} {{ documents is defined }}""",
    "generation": """{% set x = 1 %}
{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}
{{ loop.index }}{{ message.content }}{% set x = 2 %}{{ x }}
        {% endgeneration %}
{{ x }}
    {%- else %}
        {{ message.content }}{{ x }}
        {%- generation -%} - {%- endgeneration -%}
    {% endif %}
{% endfor %}{{ x }}""",
    "loops": """{% for message in messages %}
  {%- if message.role == 'system' %}{% continue %}{% endif %}
  {%- if loop.index > 3 %}{% break %}{% endif %}
{{ loop.index0 }}/{{ loop.length }} {{ message.content | length }} {{ loop.previtem.role }}|{{ loop.nextitem.role }}
{% else %}nothing{% endfor %}
{% for i in range(3, 0, -1) %}{{ i }}{{ ', ' if not loop.last }}{% endfor %}""",
    "macros": """{% macro turn(m, upper=false) -%}
<{{ m.role | upper if upper else m.role }}>{{ caller() if caller else m.content }}</{{ m.role }}>
{%- endmacro %}
{% for m in messages %}{{ turn(m, loop.first) }}{% call turn(m) %}called{{ loop is defined }}{% endcall %}
{% endfor %}""",
    "types": """{% for m in messages %}
{% if m.content is string %}{{ m.content }}{% elif m.content is iterable %}
{% for part in m.content %}{{ part.text if part.type == 'text' else part }}{% endfor %}{% endif %}
{{ m.content is none }} {{ m.content is defined }} {{ m.tool_calls is mapping }} {{ 'content' in m }}
{{ dict(a=1, **m) | length }} {{ dict.fromkeys(['a'], 2) }} {{ m | dictsort | map(attribute=0) | join(' ') }}
{{ m.get('name', 'nobody') }} {{ m.keys() | sort | first }} {{ m.role[::-1] }}
{% endfor %}""",
    "options": """{% if thinking is defined and thinking %}think{% else %}answer{% endif %}
{{ enable_thinking }}{{ missing }}{{ bos_token }}{{ depth + 1 if depth is number }}{{ names | join('-') }}""",
    "reasoning": """{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}|{{ m }}
{% endfor %}""",
    "year": "{{ strftime_now('%Y') }}{{ messages[0].content }}",
    "newlines": "a\r\n\n{# a comment #}\n  {%+ if true %}b{% endif %}\n\tc{{ messages[-1]['content'] }}\n\n",
    "empty": "",
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": True},
    {"tools": TOOLS},
    {"tools": [], "documents": [{"title": "标题", "text": "<x>"}]},
    {"thinking": True, "enable_thinking": False, "bos_token": "[mine]", "depth": 2, "names": ("a", "b")},
]


def theirs(source: str, messages: Any, **options: Any) -> str:
    return THEIRS.apply_chat_template(messages, chat_template=source, tokenize=False, **options)


def same(source: str, messages: Any, **options: Any) -> None:
    """Both render the same, or both refuse."""
    try:
        expected = theirs(source, messages, **options)
    except Exception:
        with pytest.raises(UserError):
            ChatTemplate(source, SPECIAL).render(messages, **options)
    else:
        assert ChatTemplate(source, SPECIAL).render(messages, **options) == expected


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_templates_render_as_in_transformers(source: str, options: dict[str, Any]):
    for chat in (CHAT, CHAT[1:], TOOL_CHAT, [{"role": "user", "content": [{"type": "text", "text": "part"}, 3]}]):
        same(source, chat, **options)


def test_most_of_these_templates_render():
    """So that the test above does not only compare refusals."""
    rendered = [ChatTemplate(source, SPECIAL).render(CHAT) for source in TEMPLATES.values()]
    assert len(rendered) == len(TEMPLATES)
    assert rendered[0].startswith("<|im_start|>system\nBe  brief.\n<|im_end|>")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
roles = st.sampled_from(["system", "user", "assistant", "tool"])
chats = st.lists(
    st.fixed_dictionaries(
        {"role": roles, "content": st.text(max_size=20)},
        optional={
            "name": json_values,
            "tool_calls": json_values,
            "reasoning": st.none() | st.text(max_size=5),
            "thinking": st.none() | st.text(max_size=5),
            "reasoning_content": st.none() | st.text(max_size=5),
        },
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40)
@given(chat=chats, prompt=st.booleans(), tools=st.none() | st.lists(st.dictionaries(st.text(max_size=3), json_values)))
def test_any_messages_render_as_in_transformers(name: str, chat: Any, prompt: bool, tools: Any):
    before = json.dumps([chat, tools])
    same(TEMPLATES[name], chat, add_generation_prompt=prompt, tools=tools)
    assert json.dumps([chat, tools]) == before


def test_subclasses_of_plain_types_are_rendered_as_those():
    class Role(enum.StrEnum):
        USER = "user"

    class Loud(str):
        def upper(self) -> str:
            return "overridden"

    chat = [MappingProxyType({"role": Role.USER, "content": Loud("x"), "n": enum.IntEnum("N", "A B").B})]
    same("{{ messages[0].role }}{{ messages[0].content | upper }}{{ messages[0].n }}{{ messages }}", chat)


def test_what_a_template_takes_from_outside():
    source = (
        "{{ bos_token }}{% set own = 1 %}{% if thinking is defined and thinking %}{{ own }}{% endif %}"
        "{% for message in messages %}{{ message.content }}{% endfor %}{{ tools | tojson if tools }}"
        "{{ raise_exception('x') if never }}{% generation %}{{ inside }}{% endgeneration %}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.variables == {"thinking", "messages", "tools", "never", "inside"}
    with pytest.raises(UserError, match="chat template, line 1"):
        _ = ChatTemplate("{% if %}", {}).variables


def test_the_date_is_todays(monkeypatch: pytest.MonkeyPatch):
    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2024, 12, 26, 7, 5)

    monkeypatch.setattr("abyssal.data.chat.datetime", Then)
    assert ChatTemplate("{{ strftime_now('%d %b %Y %H:%M') }}", {}).render(CHAT) == "26 Dec 2024 07:05"


FORBIDDEN = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].pop('role') }}",
    "{{ [1].clear() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ namespace.__init__.__globals__['x'] }}",
    "{{ dict.__class__.__bases__ }}",
    "{{ self.__init__.__globals__.x }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ('{0.__cl' ~ 'ass__.__mro__}').format(messages) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% set ns = namespace(_a=1) %}",
    "{% set ns = namespace({'__class__': 1}) %}",
    "{% for _ in range(10 ** 9) %}{% endfor %}",
    "{% include 'file' %}",
    "{% import 'os' as os %}{{ os }}",
]


@pytest.mark.parametrize("source", FORBIDDEN)
def test_the_sandbox_forbids(source: str):
    with pytest.raises(UserError, match=r"^chat template: ") as error:
        ChatTemplate(source, SPECIAL).render(CHAT)
    assert "\n" not in str(error.value)


def test_what_is_forbidden_reads_as_nothing_where_it_is_only_printed():
    assert ChatTemplate("[{{ raise_exception.__globals__ }}]", SPECIAL).render(CHAT) == "[]"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", ["Expected an expression"]),
        ("{% for x in messages %}", ["endfor"]),
        ("a\n\n{{ x | nofilter }}", ["nofilter", "line 3"]),
        ("{{ missing.attribute }}", ["'missing' is undefined"]),
        ("{{ messages[0].content + 1 }}", ["TypeError", "str"]),
        ("{{ 1 // 0 }}", ["ZeroDivisionError"]),
        ("{{ raise_exception('roles must\nalternate') }}", ["roles must alternate"]),
        ("{{ missing | tojson }}", ["TypeError", "JSON"]),
        ("{% generation %}x", ["endgeneration"]),
    ],
)
def test_errors_of_a_template_are_said_in_one_line(source: str, words: list[str]):
    with pytest.raises(UserError) as error:
        ChatTemplate(source, SPECIAL).render(CHAT)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("chat template")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([], {}, "messages is empty"),
        ("hello", {}, "messages is a str; expected a list"),
        ({"role": "user"}, {}, "messages is a dict; expected a list"),
        ([CHAT[0], "hello"], {}, r"messages\[1\] is a str; expected an object"),
        ([{"role": "user", "content": [{"image": object()}]}], {}, r"messages\[0\]\.content\[0\]\.image is an object"),
        ([{"role": "user", "content": {1j: 1}}], {}, r"messages\[0\]\.content, a key is a complex"),
        (CHAT, {"tools": [print]}, r"tools\[0\] is a builtin_function_or_method; expected an object"),
        (CHAT, {"documents": "text"}, "documents is a str; expected a list"),
        (CHAT, {"now": datetime.now}, r"variables\.now is a builtin_function_or_method"),
    ],
)
def test_what_is_no_conversation_is_said(messages: Any, options: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        ChatTemplate("{{ messages }}", {}).render(messages, **options)


def test_jinja_is_imported_only_when_a_template_is_rendered():
    code = (
        "import sys; from abyssal.data.chat import ChatTemplate; t = ChatTemplate('x', {}); assert 'jinja2' not in "
        "sys.modules; t.render([{}]); assert 'jinja2' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# In a tokenizer's folder.

CHATML = TEMPLATES["chatml"]
SHORT = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"


def folder_with(folder: Path, config: dict[str, Any] | None = None, jinja: str | None = None, old: Any = None) -> Path:
    byte_tokenizer().save(folder)
    file = folder / "tokenizer_config.json"
    written = json.loads(file.read_text(encoding="utf-8")) | (config or {})
    file.write_text(json.dumps(written), encoding="utf-8")
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    if old is not None:
        (folder / "chat_template.json").write_text(json.dumps(old), encoding="utf-8")
    return folder


LIST = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": SHORT}]
ADDED = {"__type": "AddedToken", "content": EOS, "lstrip": False, "normalized": True, "rstrip": False}


@pytest.mark.parametrize(
    ("config", "jinja"),
    [
        ({"chat_template": CHATML}, None),
        ({"chat_template": LIST}, None),
        (None, CHATML + "\n\n"),
        ({"chat_template": SHORT}, CHATML),
        ({"chat_template": LIST}, SHORT),
        ({"chat_template": SHORT, "pad_token": EOS, "unk_token": None, "bos_token": ADDED}, None),
    ],
)
def test_the_template_of_a_folder_is_the_one_transformers_takes(tmp_path: Path, config: Any, jinja: str | None):
    loaded = Tokenizer.load(folder_with(tmp_path / "a", config, jinja))
    loaded.save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    for folder in ("a", "b"):
        other = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        for prompt in (True, False):
            options = {"add_generation_prompt": prompt}
            expected = other.apply_chat_template(CHAT, tokenize=False, **options)
            assert loaded.render_chat(CHAT, **options) == expected
            assert again.render_chat(CHAT, **options) == expected
            ids = other.apply_chat_template(CHAT, return_dict=False, **options)
            assert loaded.encode_chat(CHAT, **options) == again.encode_chat(CHAT, **options) == ids


def test_tokens_given_as_objects_are_saved_as_strings(tmp_path: Path):
    """transformers 5 cannot read an object without a __type."""
    loaded = Tokenizer.load(folder_with(tmp_path / "a", {"chat_template": SHORT, "pad_token": {"content": EOS}}))
    loaded.save(tmp_path / "b")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert other.pad_token == EOS
    assert other.apply_chat_template(CHAT, tokenize=False) == loaded.render_chat(CHAT)


def test_several_templates_are_all_saved_again(tmp_path: Path):
    Tokenizer.load(folder_with(tmp_path / "a", {"chat_template": LIST})).save(tmp_path / "b")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert other.chat_template == {"default": CHATML, "tool_use": SHORT}


def test_the_older_file_counts_where_there_is_no_other(tmp_path: Path):
    loaded = Tokenizer.load(folder_with(tmp_path / "a", old={"chat_template": SHORT}))
    assert loaded.chat is not None
    assert loaded.chat.source == SHORT
    loaded.save(tmp_path / "b")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert other.apply_chat_template(CHAT, tokenize=False) == loaded.render_chat(CHAT)
    both = Tokenizer.load(folder_with(tmp_path / "c", {"chat_template": CHATML}, old={"chat_template": SHORT}))
    assert both.chat is not None
    assert both.chat.source == CHATML


def test_a_template_given_to_a_tokenizer_of_ours_is_saved(tmp_path: Path):
    tokenizer = train_bpe(["hello world " * 20], 280)
    tokenizer.chat = ChatTemplate(SHORT, {"eos_token": EOS})
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode_chat(CHAT) == tokenizer.encode_chat(CHAT)
    assert tokenizer.encode_chat(CHAT).count(1) == len(CHAT)
    train_bpe(["hello world " * 20], 280).save(tmp_path)  # has no template, and does not take on the one that lay there
    assert Tokenizer.load(tmp_path).chat is None


def test_special_tokens_in_a_chat_are_ids(tmp_path: Path):
    tokenizer = Tokenizer.load(folder_with(tmp_path, jinja=SHORT))
    ids = tokenizer.encode_chat([{"role": "user", "content": f"a{BOS}b"}])
    assert ids == [*tokenizer.encode("user: a"), 0, *tokenizer.encode("b"), 1, *tokenizer.encode("\n")]
    assert tokenizer.encode(BOS) != [0]  # plain text is as before
    with pytest.raises(UserError, match=r"U\+D800"):
        tokenizer.encode_chat([{"role": "user", "content": "\ud800"}])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (SHORT, {1}),
        ("{% for m in messages %}{{ m.content }} \n {{ bos_token }}{{ eos_token }}{% endfor %}", {0}),
        (CHATML, set()),  # <|im_end|> is no token of this vocabulary
        ("{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}", set()),
        ("{% for m in messages %}{{ eos_token }}{% endfor %}", set()),
        ("{{ raise_exception('no') }}", set()),
        (None, set()),
    ],
)
def test_the_token_that_ends_a_turn(tmp_path: Path, template: str | None, expected: set[int]):
    assert Tokenizer.load(folder_with(tmp_path, jinja=template)).end_of_turn_ids == expected


def test_without_a_template_a_chat_is_refused():
    for call in (byte_tokenizer().render_chat, byte_tokenizer().encode_chat):
        with pytest.raises(UserError, match=r"this tokenizer has no chat template; expected chat_template\.jinja"):
            call(CHAT)


@pytest.mark.parametrize(
    ("config", "old", "words"),
    [
        ({"chat_template": 3}, None, ["tokenizer_config.json", "chat_template holds an int"]),
        ({"chat_template": [{"name": "default"}]}, None, ["chat_template holds a list", "objects name, template"]),
        ({"chat_template": {"default": []}}, None, ["chat_template holds a list"]),
        (None, ["x"], ["chat_template.json", "expected an object"]),
        (None, {"chat_template": 1.5}, ["chat_template.json", "holds a float"]),
    ],
)
def test_a_template_of_another_type_is_said(tmp_path: Path, config: Any, old: Any, words: list[str]):
    with pytest.raises(UserError) as error:
        Tokenizer.load(folder_with(tmp_path, config, old=old))
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


def test_a_template_that_is_no_text_is_said(tmp_path: Path):
    folder = folder_with(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"chat_template\.jinja: not a text file"):
        Tokenizer.load(folder)
