"""Chat templates: a conversation written out as the text that a model was trained on.

A published tokenizer carries its template as a Jinja program; transformers' `apply_chat_template` set the rules, and
`ChatTemplate.render` gives the same text. What a template can count on: blocks that swallow the newline and the
indentation around them, `{% break %}` and `{% continue %}`, `raise_exception(message)`, `strftime_now(format)`, a
`tojson` that leaves Chinese and `<` as they are, `{% generation %}` (marks the assistant's own words for training:
`ChatTemplate.render_marked` says where they are), and the special tokens by name (`bos_token`, `eos_token`, ...).

A template comes from whoever made the checkpoint, so it runs in Jinja's sandbox and sees only copies of plain data.
jinja2 is imported when the first template is rendered.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abyssal.errors import UserError, kind_of

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.parser import Parser
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE_FILE = "chat_template.jinja"
LEGACY_FILE = "chat_template.json"

# A message's reasoning goes by these names; templates read one of the first two. The first that is present counts.
REASONING = ("reasoning_content", "thinking", "reasoning")

# The variable with what is written before and after {% generation %}; no template can spell a name with blanks.
MARKS = "marks of generation"


class ChatTemplate:
    """A Jinja template with the special tokens it may name. `source` is the template's text."""

    def __init__(self, source: str, special_tokens: dict[str, Any]) -> None:
        self.source = source
        self.special_tokens = special_tokens

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text. `tools` are JSON schemas; `variables` reach the template by name and win over
        special tokens. As in transformers, keys of a message that are None are left out.

        Raises UserError for messages that are no list of objects, for values that are no JSON, and for whatever the
        template itself raises (its syntax, a missing variable, `raise_exception`, what the sandbox forbids).
        """
        return self._render(messages, tools, documents, add_generation_prompt, variables, ("", ""))

    def render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as :meth:`render` gives it, and the spans [start, end) of its characters that stand between
        ``{% generation %}`` and ``{% endgeneration %}``, in order. Raises as :meth:`render` does, and where the
        template cuts through such a span."""
        nonce = secrets.randbits(128)  # nothing in the conversation can spell it
        marks = (f"<{nonce}>", f"</{nonce}>")
        written = self._render(messages, tools, documents, False, variables, marks)
        spans: list[tuple[int, int]] = []
        text, depth, start = "", 0, 0
        for part in re.split(f"({'|'.join(marks)})", written):
            if part == marks[0]:
                start = len(text) if depth == 0 else start
                depth += 1
            elif part == marks[1]:
                depth -= 1
                if depth == 0:
                    spans.append((start, len(text)))
            else:
                text += part
        if depth != 0 or text != self._render(messages, tools, documents, False, variables, ("", "")):
            raise UserError("chat template: it takes what is between {% generation %} and {% endgeneration %} apart")
        return text, spans

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template says with ``{% generation %}`` what the assistant's own words are."""
        return re.search(r"{%[-+]?\s*generation\s*[-+]?%}", self.source) is not None

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        marks: tuple[str, str],
    ) -> str:
        conversation = [
            _with_reasoning({key: value for key, value in message.items() if value is not None})
            for message in _objects("messages", messages)
        ]
        if not conversation:
            raise UserError("messages is empty; expected at least one object with role and content")
        given: dict[str, Any] = self.special_tokens | _plain("variables", variables)
        given["messages"] = conversation
        given["tools"] = None if tools is None else _objects("tools", tools)
        given["documents"] = None if documents is None else _objects("documents", documents)
        given["add_generation_prompt"] = add_generation_prompt
        given[MARKS] = marks
        _environment()  # outside the try: if it cannot be built, no template is to blame
        try:
            return self._template.render(given)
        except Exception as error:  # a template is a program: it may raise anything
            from jinja2 import TemplateError, TemplateSyntaxError

            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise UserError(f"chat template{line}: {name}{' '.join(str(error).split())}") from error

    def check(self) -> None:
        """Raises UserError where the template is no valid Jinja."""
        from jinja2 import TemplateSyntaxError

        try:
            assert self._template
        except TemplateSyntaxError as error:
            said = " ".join(str(error).split())
            raise UserError(f"chat template, line {error.lineno}: {said}") from None

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template takes from outside, such as ``tools`` or ``thinking``. Raises UserError where it
        is no valid Jinja."""
        from jinja2.meta import find_undeclared_variables

        self.check()
        return frozenset(find_undeclared_variables(_environment().parse(self.source))) - self.special_tokens.keys()

    @cached_property
    def _template(self) -> Template:
        return _environment().from_string(self.source)


def read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of the tokenizer in `folder` with this tokenizer_config.json: chat_template.jinja, else the
    config's `chat_template`, else the older chat_template.json; None where there is none. Of several by name, the one
    named default. Raises UserError where one cannot be read."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a text file in UTF-8: {error}") from error
    if config.get("chat_template") is not None:
        return default_template(config, folder / "tokenizer_config.json")
    file = folder / LEGACY_FILE
    return default_template(read_object(file), file) if file.is_file() else None


def default_template(config: Mapping[str, Any], file: Path) -> str | None:
    """`config["chat_template"]`, or the one named default where it lists several. Raises UserError for other types."""
    given = config.get("chat_template")
    try:
        named = {one["name"]: one["template"] for one in given} if isinstance(given, list) else given
        template = named.get("default") if isinstance(named, dict) else named
    except (TypeError, KeyError):
        template = given
    if template is not None and not isinstance(template, str):
        held = kind_of(template)
        raise UserError(f"{file}: chat_template holds {held}; expected a string or a list of objects name, template")
    return template


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that a tokenizer_config.json names (`bos_token`, `pad_token`, ...), by those names."""
    named = {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            named[key] = content
    return named


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError where it holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a JSON {type(content).__name__}; expected an object")
    return content


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    import jinja2.ext
    from jinja2 import TemplateError, nodes, pass_context
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([self.call_method("mark", [nodes.Const(n)])], lineno=line) for n in range(2))
            return [begin, nodes.Scope(body, lineno=line), end]

        @pass_context
        def mark(self, context: Context, which: int) -> str:
            return context[MARKS][which]

    # The two globals of Jinja that are Python types. A type handed to a template is one more door to close: `dict`
    # becomes an object, and a namespace may hold no `__class__` with which to pass for something else.
    class NewDict:
        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
            return dict.fromkeys(keys, value)

    class PublicNamespace(Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def new_namespace(*args: Any, **kwargs: Any) -> Namespace:
        values = dict(*args, **kwargs)
        for name in values:
            check_name(name)
        return PublicNamespace(values)

    def check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}; expected a name that does not start with _")

    def raise_exception(message: Any) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # Jinja's own escapes <, > and & for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "dict": NewDict(),
        "namespace": new_namespace,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    return environment


def _objects(name: str, given: Any) -> list[dict[str, Any]]:
    """A copy, so that no template reaches the caller's objects."""
    if not isinstance(given, list | tuple):
        raise UserError(f"{name} is {kind_of(given)}; expected a list of objects")
    for index, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise UserError(f"{name}[{index}] is {kind_of(item)}; expected an object")
    return [_plain(f"{name}[{index}]", item) for index, item in enumerate(given)]


def _plain(name: str, value: Any) -> Any:
    """A copy made of JSON's types and tuples. Subclasses of them may have methods that the sandbox does not know."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(f"{name}, a key", key): _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(f"{name}[{index}]", item) for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise UserError(f"{name} is {kind_of(value)}; expected what JSON can hold")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning} | message | {"reasoning_content": reasoning}
