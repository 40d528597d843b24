"""Records to tune on: read from files or the hub, and recognised by their fields.

A source is a file, a folder of files, a built-in corpus (all as `abyssal.data.files` has them), or a data set on the
hub, ``owner/name``, ``owner/name:split`` or ``owner/name/subset:split`` (the split is ``train`` unless said), which the
library `datasets` fetches. Files are .jsonl, .json (a list of objects), .parquet, or .txt (a record a document, with
the one field ``text``); the first two and the last also as .gz or .xz.

What a record is, by its fields (others are passed over):

====================================== ============ ========================================
fields                                 format       becomes
====================================== ============ ========================================
messages, or conversations (ShareGPT)  chat         `Chat`
instruction (input) and output or      instruction  `Chat` of one question and one answer
response; question, answer;
prompt, response
prompt, completion                     completion   `Completion`
text                                   text         `Document`
(prompt) chosen, rejected              preference   `Pair`
====================================== ============ ========================================

``tools`` (JSON schemas, or a string that holds them) and ``system`` (a text) may stand beside the fields of a chat, an
instruction or a preference. Texts are taken as they stand. Whatever is wrong with a record is a UserError of one line
that names the place (``file, line 3``) and the field.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from abyssal.data.chat import REASONING
from abyssal.data.files import find_files, json_file, json_lines, parquet_rows, text_documents
from abyssal.data.tokenizer import check_unicode
from abyssal.errors import UserError, kind_of, nearest
from abyssal.hub import is_hub_id

SUFFIXES = (".parquet", *(kind + packed for kind in (".jsonl", ".json", ".txt") for packed in ("", ".gz", ".xz")))

Format = Literal["chat", "instruction", "completion", "text", "preference"]

# The sets of fields that make a format; of those that a record has, the first counts. So a data set with both `text`
# and `instruction` (Alpaca: the text is the rest, put together) is one of instructions.
FIELDS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("preference", ("chosen", "rejected")),
    ("chat", ("messages",)),
    ("chat", ("conversations",)),
    ("instruction", ("instruction", "output")),
    ("instruction", ("instruction", "response")),
    ("instruction", ("question", "answer")),
    ("instruction", ("prompt", "response")),
    ("completion", ("prompt", "completion")),
    ("text", ("text",)),
)
OPTIONAL = ("prompt", "input", "tools", "system")
NAMES = tuple(dict.fromkeys([*(name for _, names in FIELDS for name in names), *OPTIONAL]))

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_BEFORE = ("system", "developer")  # may stand before the first user
_ON_THE_HUB = re.compile(r"(?P<name>[^/:]+/[^/:]+)(/(?P<subset>[^/:]+))?(:(?P<split>.+))?")

Message: TypeAlias = dict[str, Any]


class Record(NamedTuple):
    """The fields of a record, and where it was found."""

    place: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation, in the form that chat templates take. What the assistant says from message `first` on may be
    learned. Errors name the messages by `path`; `added` of them, at the start, are not in the record."""

    place: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    first: int = 0
    path: str = "messages"
    added: int = 0

    def name(self, index: int) -> str:
        """How the record calls the message, such as ``messages[2]``."""
        return f"{self.path}[{index - self.added}]" if index >= self.added else "system"


@dataclass(frozen=True)
class Completion:
    """A text and what follows it."""

    place: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Document:
    """A text."""

    place: str
    text: str


@dataclass(frozen=True)
class Pair:
    """The same conversation with a better and a worse answer."""

    place: str
    chosen: Chat
    rejected: Chat


Parsed: TypeAlias = Chat | Completion | Document | Pair


def records(source: str | Path) -> Iterator[Record]:
    """The records of `source`, in order. Raises UserError at once for a source that does not exist, and while reading
    for what is damaged or no object."""
    if not os.path.lexists(source) and not str(source).lower().endswith(SUFFIXES):
        named = _ON_THE_HUB.fullmatch(str(source))
        if named and is_hub_id(named["name"]):
            return _from_hub(str(source), named["name"], named["subset"], named["split"] or "train")
    files = find_files(source, SUFFIXES)

    def read() -> Iterator[Record]:
        for file in files:
            if file.ends((".txt", ".txt.gz", ".txt.xz")):
                documents = enumerate(text_documents(file), start=1)
                yield from (Record(f"{file}, document {n}", {"text": text}) for n, text in documents if text)
                continue
            if file.ends(".parquet"):
                rows: Iterable[tuple[str, Any]] = parquet_rows(file)
            elif file.ends((".json", ".json.gz", ".json.xz")):
                rows = _items(str(file), json_file(file))
            else:
                rows = json_lines(file)
            for place, fields in rows:
                if not isinstance(fields, dict):
                    raise UserError(f"{place}: a JSON {type(fields).__name__}; expected an object")
                yield Record(place, fields)

    return read()


def _items(file: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, list):
        raise UserError(
            f"{file}: a JSON {type(value).__name__}; expected a list of objects (one object a line: .jsonl)"
        )
    return ((f"{file}, item {number}", item) for number, item in enumerate(value, start=1))


def _from_hub(source: str, name: str, subset: str | None, split: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source}: a data set on the hub needs datasets: pip install 'abyssal[train]'") from error
    from huggingface_hub.utils import logging

    # Before version 4 the library ran the Python of those repositories that have some, after asking. Not here.
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of a hub that does not answer it would tell at every attempt
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # its own, the hub's, pyarrow's, and Python's
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source}: no such file or folder here; on the hub: {said}") from error
    finally:
        logging.set_verbosity(verbosity)
    return (Record(f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))


class Parser:
    """Records of one format. `format` None: that of the first record. `fields` says how a file names what is known
    here by another name, such as ``{"prompt": "question"}``. `system` goes first where a record has no system message.

    Raises UserError for a name in `fields` that is not known.
    """

    def __init__(
        self, format: Format | None = None, fields: Mapping[str, str] | None = None, system: str | None = None
    ) -> None:
        self.format, self.fields, self.system = format, dict(fields or {}), system
        self._needed: tuple[str, ...] | None = None
        for name in self.fields:
            if name not in NAMES:
                hint = nearest(name, NAMES) or f"; known: {', '.join(NAMES)}"
                raise UserError(f"data.fields: {name!r} is no field that is known here{hint}")

    def parse(self, record: Record) -> Parsed:
        """Raises UserError where the record is not of the format, or not well formed."""
        place, fields = record.place, self._renamed(record)
        if self._needed is None:
            for ours, theirs in self.fields.items():
                if theirs not in record.fields:
                    hint = nearest(theirs, record.fields)
                    raise UserError(
                        f"{place}: no field {theirs!r}{hint}, the {ours!r} of 'fields'; it has {_listed(record.fields)}"
                    )
            self.format, self._needed = self._recognise(place, fields)
        for name in self._needed:
            if fields.get(name) is None:
                theirs = self.fields.get(name, name)
                hint = nearest(theirs, [key for key in record.fields if key != theirs])
                state = f"field {theirs!r} is null" if name in fields else f"no field {theirs!r}{hint}"
                raise UserError(
                    f"{place}: {state}, which format {self.format!r} needs; it has {_listed(record.fields)}"
                )
        if self.format == "chat":
            name = self._needed[0]
            return self._chat(place, fields, self._messages(place, name, fields[name]), self._name(name))
        if self.format == "preference":
            return self._pair(place, fields)
        texts = [self._text(place, fields, name) for name in self._needed]
        if self.format == "text":
            return Document(place, texts[0])
        if self.format == "completion":
            return Completion(place, *texts)
        question, answer = texts
        if fields.get("input") is not None and (more := self._text(place, fields, "input")):
            question = f"{question}\n\n{more}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self._chat(place, fields, messages, "messages")

    def _renamed(self, record: Record) -> dict[str, Any]:
        taken = set(self.fields.values())
        fields = {name: value for name, value in record.fields.items() if name not in taken}
        return fields | {ours: record.fields[name] for ours, name in self.fields.items() if name in record.fields}

    def _recognise(self, place: str, fields: Mapping[str, Any]) -> tuple[Format, tuple[str, ...]]:
        kinds = [(kind, names) for kind, names in FIELDS if self.format in (None, kind)]
        # What the user took care to name decides before what else the record has.
        for present in (self.fields, fields):
            for kind, names in kinds:
                if all(name in present for name in names):
                    return kind, names
        wanted = "; ".join(" and ".join(self._name(name) for name in names) for _, names in kinds)
        what = f"the fields of format {self.format!r}" if self.format else "known fields"
        raise UserError(
            f"{place}: it has {_listed(fields)} and not {what}; expected {wanted} ('fields' maps them to other names)"
        )

    def _name(self, name: str) -> str:
        return self.fields.get(name, name)

    def _text(self, place: str, fields: Mapping[str, Any], name: str) -> str:
        value = fields[name]
        if not isinstance(value, str):
            raise UserError(f"{place}: field {self._name(name)!r} is {kind_of(value)}; expected a string")
        try:
            check_unicode(value)
        except UserError as error:  # JSON may escape half a surrogate pair
            raise UserError(f"{place}: field {self._name(name)!r}: {error}") from error
        return value

    def _messages(self, place: str, name: str, value: Any) -> list[Message]:
        path = self._name(name)
        if not isinstance(value, list):
            raise UserError(f"{place}: field {path!r} is {kind_of(value)}; expected a list of messages")
        return [_message(place, f"{path}[{index}]", item) for index, item in enumerate(value)]

    def _chat(self, place: str, fields: Mapping[str, Any], messages: list[Message], path: str, first: int = 0) -> Chat:
        _check_order(place, path, messages)
        own = self._text(place, fields, "system") if fields.get("system") is not None else ""
        system = own or self.system
        tools = self._tools(place, fields)
        if system and not any(message["role"] in _BEFORE for message in messages):
            return Chat(place, [{"role": "system", "content": system}, *messages], tools, first + 1, path, added=1)
        return Chat(place, messages, tools, first, path)

    def _tools(self, place: str, fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        tools, name = fields.get("tools"), self._name("tools")
        if isinstance(tools, str):  # how Parquet keeps what has no one schema
            try:
                tools = json.loads(tools) if tools.strip() else None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: field {name!r}: not JSON ({error})") from error
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise UserError(f"{place}: field {name!r} is {kind_of(tools)}; expected a list of objects")
        return tools or None

    def _pair(self, place: str, fields: Mapping[str, Any]) -> Pair:
        prompt = fields.get("prompt")
        if isinstance(prompt, str):
            before: list[Message] = [{"role": "user", "content": self._text(place, fields, "prompt")}]
        else:
            before = [] if prompt is None else self._messages(place, "prompt", prompt)
        chosen, path, chosen_whole = self._side(place, fields, "chosen", before)
        rejected, other, rejected_whole = self._side(place, fields, "rejected", before)
        if chosen_whole and rejected_whole:  # the prompt is what both begin with; the last message is no part of it
            shared = min(len(chosen), len(rejected))
            first = next((n for n in range(shared) if chosen[n] != rejected[n]), shared - 1)
        else:
            first = len(before)
        return Pair(
            place,
            self._chat(place, fields, chosen, path, first),
            self._chat(place, fields, rejected, other, first),
        )

    def _side(
        self, place: str, fields: Mapping[str, Any], name: str, before: list[Message]
    ) -> tuple[list[Message], str, bool]:
        """One answer with what is before it, how errors name these messages, and whether the field held them all."""
        path, prompt = self._name(name), self._name("prompt")
        if isinstance(fields[name], str):
            if not before:
                raise UserError(
                    f"{place}: no field {prompt!r}, which a text in {path!r} needs; it has {_listed(fields)}"
                )
            answer: list[Message] = [{"role": "assistant", "content": self._text(place, fields, name)}]
        else:
            answer = self._messages(place, name, fields[name])
            # Many data sets have the prompt as a field and once more at the start of both conversations.
            whole = not before or answer[: len(before)] == before
            if whole or (isinstance(fields.get("prompt"), str) and answer and answer[0]["role"] != "assistant"):
                return answer, path, True
        return before + answer, f"{prompt} + {path}", False


def silent(message: Message) -> bool:
    """Whether a message holds nothing: neither text nor reasoning nor calls of tools."""
    content = message.get("content")
    text = not content.strip() if isinstance(content, str) else not content
    return text and not any(message.get(name) for name in ("tool_calls", *REASONING))


def _message(place: str, path: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{place}: {path} is {kind_of(value)}; expected an object with role and content")
    role_key = "from" if value.get("role") is None and "from" in value else "role"
    content_key = "value" if value.get("content") is None and "value" in value else "content"
    role = value.get(role_key)
    if role is None:
        raise UserError(f"{place}: {path}.{role_key}: missing; it has {_listed(value)}")
    known = _SHAREGPT.get(role, role) if isinstance(role, str) else role
    if known not in ROLES:
        names = [*ROLES, *_SHAREGPT] if role_key == "from" else ROLES
        raise UserError(f"{place}: {path}.{role_key}: {role!r} is not one of {', '.join(names)}")
    message = {key: item for key, item in value.items() if key not in (role_key, content_key)}
    message = {"role": known, "content": value.get(content_key)} | message
    content = message["content"]
    if content is None and not (known == "assistant" and not silent(message)):
        state = "is null" if content_key in value else "missing"
        raise UserError(f"{place}: {path}.{content_key}: {state}; it has {_listed(value)}")
    if content is not None and not isinstance(content, str | list):
        raise UserError(f"{place}: {path}.{content_key}: {kind_of(content)}; expected a string")
    return message


def _check_order(place: str, path: str, messages: list[Message]) -> None:
    if not messages:
        raise UserError(f"{place}: {path}: empty; expected at least a user's message and the assistant's answer")
    begun = False
    for index, message in enumerate(messages):
        role = message["role"]
        if not begun and role not in ("user", *_BEFORE):
            raise UserError(f"{place}: {path}[{index}].role: {role!r} before any 'user'")
        if role == "tool" and messages[index - 1]["role"] not in ("assistant", "tool"):
            last = messages[index - 1]["role"]
            raise UserError(f"{place}: {path}[{index}].role: 'tool' after {last!r}; expected it after 'assistant'")
        begun = begun or role == "user"


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "none"
