"""``abyssal preview``: one example of a data set as ``abyssal tune`` would learn it."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.cli.loaded import ModelArgument

if TYPE_CHECKING:
    from abyssal.data.tokenizer import Tokenizer

_MASKED, _LEARNED = "grey50", "green"


def preview_command(
    model: ModelArgument,
    data: Annotated[str, typer.Argument(help="A file or folder of records, or a data set on the hub (owner/name).")],
    changes: Annotated[
        list[str] | None, typer.Argument(help="As for tune: data.key=value …, training.sequence_length=N.")
    ] = None,
    example: Annotated[int, typer.Option(metavar="N", help="Which example, from 1.")] = 1,
    tokens: Annotated[bool, typer.Option("--tokens", help="A table of its tokens, too.")] = False,
) -> None:
    """Show what is learned of an example: the rest is grey (where no terminal is, what is learned stands in «»)."""
    from abyssal.cli.show import console, say
    from abyssal.config import parse
    from abyssal.data.examples import ExampleConfig, read_examples, with_template
    from abyssal.errors import UserError
    from abyssal.loading import find, find_tokenizer

    given, length = _settings(changes or [])
    config = parse(ExampleConfig, {"source": data} | given, "data")
    folder = find(model, weights=False)
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{model}: no tokenizer.json or tiktoken.model in this folder; text needs one")
    train, held_out, counts = read_examples(config, tokenizer, length or _default_length(folder))
    if not 1 <= example <= len(train) + len(held_out):
        raise UserError(f"--example: {example} is not one of the {len(train) + len(held_out)} examples")
    inside = example <= len(train)
    examples, index = (train, example - 1) if inside else (held_out, example - 1 - len(train))
    tokenizer = with_template(tokenizer, config.template)

    for part in range(examples.per_example):
        ids, learned = examples.sequence(index * examples.per_example + part)
        side = ("", "") if examples.per_example == 1 else (", chosen", ", rejected")
        where = "" if inside else ", held out"
        say(f"example {example} of {counts.examples:,}{where}{side[part]}: {len(ids)} tokens, {learned.sum()} learned")
        console.print()
        _show_text(ids.tolist(), learned.tolist(), tokenizer)
        console.print()
        if tokens:
            _show_tokens(ids.tolist(), learned.tolist(), tokenizer)
            console.print()
    say(counts.describe())


def _settings(changes: list[str]) -> tuple[dict[str, Any], int | None]:
    from abyssal.config import parse_assignments
    from abyssal.errors import UserError

    settings = parse_assignments(changes)
    data, training = settings.pop("data", {}), settings.pop("training", {})
    for name, value in (("data", data), ("training", training)):
        if not isinstance(value, dict):
            raise UserError(f"{name}: {value!r}; expected {name}.key=value")
    length = training.pop("sequence_length", None)
    other = [*settings, *(f"training.{key}" for key in training)]
    if other:
        raise UserError(
            f"{other[0]}: plays no part in a preview; expected data.key=value or training.sequence_length=N"
        )
    if length is not None and (type(length) is not int or length < 1):
        raise UserError(f"training.sequence_length: {length!r}; expected a number of tokens, at least 1")
    return data, length


def _default_length(folder: Path) -> int:
    """What tune takes: 1,024 tokens, or the model's context where that is shorter."""
    from abyssal.config import read_mapping
    from abyssal.tuning.recipe import LENGTH

    file = folder / "config.json"
    context = read_mapping(file).get("max_position_embeddings") if file.is_file() else None
    return min(LENGTH, context) if type(context) is int and context > 0 else LENGTH


def _show_text(ids: list[int], learned: list[bool], tokenizer: Tokenizer) -> None:
    from rich.text import Text

    from abyssal.cli.show import console

    marks = ("", "") if console.is_terminal else ("«", "»")
    out, start = Text(), 0
    while start < len(ids):
        special = tokenizer.is_special(ids[start])
        end = start + 1
        while end < len(ids) and learned[end] == learned[start] and tokenizer.is_special(ids[end]) == special:
            end += 1  # whole runs, since a token may end within a character
        before = start > 0 and learned[start - 1]
        after = end < len(ids) and learned[end]
        text = "".join(map(_visible, tokenizer.decode(ids[start:end], skip_special=False)))
        if learned[start]:
            text = ("" if before else marks[0]) + text + ("" if after else marks[1])
        out.append(text, (_LEARNED if learned[start] else _MASKED) + (" bold" if special else ""))
        start = end
    console.print(out)


def _show_tokens(ids: list[int], learned: list[bool], tokenizer: Tokenizer) -> None:
    from rich.text import Text

    from abyssal.cli.show import show_table, table

    out = table("place", "id", "learned", "token")
    out.columns[-1].justify = "left"
    for place, (token, wanted) in enumerate(zip(ids, learned, strict=True)):
        text = repr(tokenizer.token_bytes(token).decode("utf-8", "replace"))
        style = _LEARNED if wanted else _MASKED
        out.add_row(str(place), str(token), "yes" if wanted else "", Text(text, style))
    show_table(out)


def _visible(character: str) -> str:
    """A terminal would obey control characters."""
    hidden = unicodedata.category(character) == "Cc" and character not in "\n\t"
    return repr(character)[1:-1] if hidden else character
