"""Records: every kind of file gives the same ones, every format is recognised, what is wrong is said with its place."""

import gzip
import json
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.data.records import Chat, Completion, Document, Pair, Parser, Record, records
from abyssal.errors import UserError

USER, BOT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
ROWS: list[dict[str, Any]] = [
    {"question": "2+2? 世", "answer": "4", "tags": ["a"]},
    {"question": "3+3?\n", "answer": "6", "tags": None},
]


def write(file: Path, rows: Any) -> Path:
    name = file.name.removesuffix(".gz").removesuffix(".xz")
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
        return file
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    file.write_bytes(
        {".gz": gzip.compress, ".xz": lzma.compress}.get(file.suffix, bytes)(b"\xef\xbb\xbf" + text.encode())
    )
    return file


def parsed(*rows: dict[str, Any], **options: Any) -> list[Any]:
    parser = Parser(**options)
    return [parser.parse(Record(f"f, line {n}", row)) for n, row in enumerate(rows, start=1)]


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        *((f"a.jsonl{packed}", "line") for packed in ("", ".gz", ".xz")),
        *((f"a.json{packed}", "item") for packed in ("", ".gz", ".xz")),
        ("a.parquet", "row"),
    ],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str, unit: str):
    file = write(tmp_path / name, ROWS)
    found = list(records(file))
    assert [dict(record.fields) for record in found] == ROWS
    assert [record.place for record in found] == [f"{file}, {unit} 1", f"{file}, {unit} 2"]
    assert list(records(tmp_path)) == found


def test_text_gives_its_documents(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("one\n<|endoftext|>\n<|endoftext|>\ntwo", encoding="utf-8")
    assert list(records(file)) == [
        Record(f"{file}, document 1", {"text": "one\n"}),
        Record(f"{file}, document 3", {"text": "two"}),
    ]
    assert len(next(iter(records("tinyshakespeare"))).fields["text"]) == 1_115_394


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test[:10%]", ("owner/name", None, "test[:10%]")),
        ("owner/name/main:test", ("owner/name", "main", "test")),
        ("owner/name/main", ("owner/name", "main", "train")),
    ],
)
def test_a_data_set_on_the_hub(monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[Any, ...]):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> Any:
        calls.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = list(records(source))
    assert calls == [asked]
    assert [record.fields for record in found] == ROWS
    assert found[1].place == f"{source}, row 2"


def test_what_goes_wrong_on_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("no such\ndata set")

    fake = SimpleNamespace(load_dataset=load_dataset, config=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(UserError, match=r"^owner/name: no such file or folder here; on the hub: no such data set$"):
        records("owner/name")
    assert fake.config.HF_DATASETS_TRUST_REMOTE_CODE is False
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs datasets: pip install"):
        records("owner/name")
    with pytest.raises(UserError, match="no such file or folder;"):  # the name of a file, not of a repository
        records("folder/name.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '{"data": []}', ["a.json: a JSON dict", "expected a list of objects"]),
        ("a.json", '[{"text": "x"}, 3]', ["a.json, item 2: a JSON int; expected an object"]),
        ("a.json", '{"text": "x"}\n{"text": "y"}', ["a.json: not JSON"]),
        ("a.jsonl", '{"text": "x"}\n["y"]', ["a.jsonl, line 2: a JSON list"]),
        ("a.jsonl", '{"text": "x"}\n\n{"text"', ["a.jsonl, line 3: not JSON"]),
        ("a.csv", "x", ["files of this kind are not read", ".parquet", ".json"]),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, name: str, text: str, words: list[str]):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        list(records(file))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


CHAT = Chat("f, line 1", [USER, BOT])
SHAREGPT = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", "weight": 1}]


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"messages": [USER, BOT]}, "chat", CHAT),
        ({"conversations": [USER, BOT]}, "chat", Chat("f, line 1", [USER, BOT], path="conversations")),
        (
            {"conversations": SHAREGPT},
            "chat",
            Chat("f, line 1", [USER, BOT | {"weight": 1}], path="conversations"),
        ),
        ({"instruction": "2+2?", "output": "4"}, "instruction", CHAT),
        ({"instruction": "2+2?", "input": "", "output": "4", "text": "all of it"}, "instruction", CHAT),
        ({"instruction": "2+2?", "response": "4"}, "instruction", CHAT),
        ({"question": "2+2?", "answer": "4"}, "instruction", CHAT),
        ({"prompt": "2+2?", "response": "4"}, "instruction", CHAT),
        (
            {"instruction": "Add.", "input": "2 2", "output": "4"},
            "instruction",
            Chat("f, line 1", [{"role": "user", "content": "Add.\n\n2 2"}, BOT]),
        ),
        ({"prompt": "2+2=", "completion": "4"}, "completion", Completion("f, line 1", "2+2=", "4")),
        ({"text": "2+2=4"}, "text", Document("f, line 1", "2+2=4")),
    ],
)
def test_formats_are_recognised(row: dict[str, Any], format: str, expected: Any):
    assert parsed(row) == [expected]
    assert parsed(row, format=format) == [expected]
    other = "completion" if format == "chat" else "chat"
    with pytest.raises(UserError, match=rf"^f, line 1: .*format '{other}'"):
        parsed(row, format=other)


def test_fields_under_other_names():
    fields = {"prompt": "question", "response": "reply"}
    assert parsed({"question": "2+2?", "reply": "4", "text": "x"}, fields=fields) == [CHAT]
    # What was named decides before what else is there.
    assert parsed({"messages": [USER], "body": "t"}, fields={"text": "body"}) == [Document("f, line 1", "t")]
    with pytest.raises(UserError, match=r"^data.fields: 'promt' is no field .*did you mean 'prompt'"):
        Parser(fields={"promt": "x"})
    with pytest.raises(UserError, match=r"^f, line 1: no field 'qestion' \(did you mean 'question'\?\), the 'prompt'"):
        parsed({"question": "2+2?", "answer": "4"}, fields={"prompt": "qestion"})
    with pytest.raises(UserError, match=r"line 1: bodies\[0\]\.role: 'bot' is not one of"):
        parsed({"bodies": [{"role": "bot", "content": ""}]}, fields={"messages": "bodies"})


def test_a_system_message_comes_first():
    system = {"role": "system", "content": "Brief."}
    (chat,) = parsed({"messages": [USER, BOT]}, system="Brief.")
    assert chat == Chat("f, line 1", [system, USER, BOT], first=1, added=1)
    assert [chat.name(n) for n in range(3)] == ["system", "messages[0]", "messages[1]"]
    (own,) = parsed({"messages": [system | {"content": "Long."}, USER, BOT]}, system="Brief.")
    assert own.messages[0]["content"] == "Long."
    (field,) = parsed({"question": "2+2?", "answer": "4", "system": "Long."}, system="Brief.")
    assert [message["content"] for message in field.messages] == ["Long.", "2+2?", "4"]
    (empty,) = parsed({"question": "2+2?", "answer": "4", "system": ""}, system="Brief.")
    assert empty.messages[0] == system


def test_tools_and_calls_are_passed_on():
    tool = {"type": "function", "function": {"name": "f"}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "reasoning_content": "hm"},
        {"role": "tool", "content": "1", "name": "f"},
        {"role": "tool", "content": "2"},
        BOT,
    ]
    for tools in ([tool], json.dumps([tool])):
        assert parsed({"messages": messages, "tools": tools}) == [Chat("f, line 1", messages, [tool])]
    assert parsed({"messages": messages, "tools": None}, {"messages": messages, "tools": ""})[1].tools is None


WORSE = {"role": "assistant", "content": "5"}
MORE = [USER, BOT, {"role": "user", "content": "Sure?"}]


@pytest.mark.parametrize(
    ("row", "chosen", "rejected", "first"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, [USER, BOT], [USER, WORSE], 1),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [WORSE]}, [USER, BOT], [USER, WORSE], 1),
        ({"prompt": MORE, "chosen": [BOT], "rejected": [WORSE]}, [*MORE, BOT], [*MORE, WORSE], 3),
        ({"chosen": [USER, BOT], "rejected": [USER, WORSE]}, [USER, BOT], [USER, WORSE], 1),
        ({"chosen": [*MORE, BOT], "rejected": [*MORE, WORSE]}, [*MORE, BOT], [*MORE, WORSE], 3),
        # UltraFeedback: the prompt is the first message of both, too.
        ({"prompt": "2+2?", "chosen": [USER, BOT], "rejected": [USER, WORSE]}, [USER, BOT], [USER, WORSE], 1),
        ({"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, WORSE]}, [USER, BOT], [USER, WORSE], 1),
        ({"chosen": [USER, BOT], "rejected": [USER, BOT]}, [USER, BOT], [USER, BOT], 1),
    ],
)
def test_preferences(row: dict[str, Any], chosen: Any, rejected: Any, first: int):
    (pair,) = parsed(row)
    assert isinstance(pair, Pair)
    assert (pair.chosen.messages, pair.rejected.messages) == (chosen, rejected)
    assert pair.chosen.first == pair.rejected.first == first
    (pair,) = parsed(row, system="Brief.")
    assert pair.chosen.first == first + 1
    assert pair.chosen.messages[0]["role"] == "system"


GOOD = {"messages": [USER, BOT]}
BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"message": [USER, BOT]},
        r"no field 'messages' \(did you mean 'message'\?\), .*format 'chat' needs; it has message",
    ),
    ({"question": "x", "answer": "y"}, "no field 'messages'.*it has question, answer"),
    ({"messages": None}, "field 'messages' is null"),
    ({"messages": "hi"}, "field 'messages' is a str; expected a list of messages"),
    ({"messages": []}, "messages: empty; expected at least"),
    ({"messages": [USER, "hi"]}, r"messages\[1\] is a str; expected an object"),
    ({"messages": [USER, {"content": "x"}]}, r"messages\[1\]\.role: missing; it has content"),
    ({"messages": [USER, {"role": "bot", "content": "x"}]}, r"messages\[1\]\.role: 'bot' is not one of system,"),
    ({"messages": [USER, {"role": ["user"], "content": "x"}]}, r"messages\[1\]\.role: \['user'\] is not one of"),
    ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\]\.content: missing; it has role"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content: is null"),
    ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]\.content: an int; expected a string"),
    ({"messages": [{"from": "bot", "value": "x"}]}, r"messages\[0\]\.from: 'bot' is not one of .*human, gpt"),
    ({"messages": [BOT, USER]}, r"messages\[0\]\.role: 'assistant' before any 'user'"),
    ({"messages": [{"role": "system", "content": ""}, BOT]}, r"messages\[1\]\.role: 'assistant' before any 'user'"),
    ({"messages": [{"role": "tool", "content": "1"}]}, r"messages\[0\]\.role: 'tool' before any 'user'"),
    ({"messages": [USER, {"role": "tool", "content": "1"}]}, r"messages\[1\]\.role: 'tool' after 'user'"),
    (GOOD | {"tools": "["}, "field 'tools': not JSON"),
    (GOOD | {"tools": {"name": "f"}}, "field 'tools' is a dict; expected a list of objects"),
    (GOOD | {"system": 3}, "field 'system' is an int; expected a string"),
]


@pytest.mark.parametrize(("row", "words"), BAD)
def test_a_bad_conversation_is_named_by_place_and_field(row: dict[str, Any], words: str):
    with pytest.raises(UserError, match=f"^f, line 2: {words}") as error:
        parsed(GOOD, row)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"a": 1, "b": 2}, "it has a, b and not known fields; expected chosen and rejected; messages; conversations;"),
        ({}, "it has none and not known fields"),
        ({"prompt": "x"}, "it has prompt and not known fields"),
        ({"prompt": "x", "completion": ["y"]}, "field 'completion' is a list; expected a string"),
        ({"text": "a\ud800"}, r"field 'text': the text holds a lone surrogate U\+D800"),
        ({"chosen": "x", "rejected": "y"}, "no field 'prompt', which a text in 'chosen' needs"),
        ({"prompt": 3, "chosen": "x", "rejected": "y"}, "field 'prompt' is an int; expected a list of messages"),
        ({"prompt": [USER], "chosen": [{"role": "x"}], "rejected": "y"}, r"chosen\[0\]\.role: 'x' is not one of"),
        ({"prompt": [USER], "chosen": [BOT], "rejected": []}, None),
        ({"chosen": [BOT], "rejected": [USER, BOT]}, r"chosen\[0\]\.role: 'assistant' before any"),
        ({"chosen": [], "rejected": [USER, BOT]}, "chosen: empty"),
    ],
)
def test_a_bad_first_record_is_named_too(row: dict[str, Any], words: str | None):
    if words is None:  # an answer that is not there: nothing to learn, and counted as that
        (pair,) = parsed(row)
        assert pair.rejected.messages == [USER]
        return
    with pytest.raises(UserError, match=f"^f, line 1: {words}"):
        parsed(row)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("role content from value messages user".split()), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = st.sampled_from(
    "messages conversations prompt chosen rejected text question answer tools system input instruction output".split()
)


@given(rows=st.lists(st.dictionaries(fields, json_values, max_size=4), min_size=1, max_size=3))
def test_any_record_is_parsed_or_refused(rows: list[dict[str, Any]]):
    before = json.dumps(rows)
    said = "f, line "
    try:
        parsed(*rows)
    except UserError as error:
        said = str(error)
    assert said.startswith("f, line ")
    assert "\n" not in said
    assert json.dumps(rows) == before
