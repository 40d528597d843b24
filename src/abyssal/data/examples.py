"""A data set to tune on, as tokens: which of them are learned, and where each sequence begins.

An example is what one record teaches: one sequence, or two for a preference (2i the chosen answer, 2i + 1 the rejected
one). What is learned: of a conversation what the assistant says (`abyssal.data.turns`), of prompt and completion the
completion with the EOS behind it, of a text all of it, of a preference the two answers. The first token of a sequence
has nothing before it and never is.

Texts that meet where the learned part begins or ends are encoded apart, as in use: there the prompt is encoded alone.
Prompt and completion, and a text, begin with BOS where the tokenizer puts it before plain text, and end with EOS.

A record may become several examples: a conversation whose template rewrites earlier answers, and a text longer than a
row, which is cut into stretches that overlap by one token, so that every token but the text's first is learned once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveInt

from abyssal.config import Config
from abyssal.data.records import Chat, Completion, Document, Pair, Parsed, Parser, records
from abyssal.data.tokenizer import Tokenizer
from abyssal.data.turns import Piece, Turns
from abyssal.errors import UserError

BATCH_CHARACTERS = 2**20  # text in flight while encoding


class ExampleConfig(Config):
    """Records, and what is learned of them.

    ``source``: a .jsonl, .json, .parquet or .txt file, a folder of them, or a data set on the hub (``owner/name``,
    ``owner/name:split``, ``owner/name/subset:split``). ``validation``: another source, held out; without one, the
    examples of the last ``validation_fraction`` of the records are (0: none). ``format``: what the records are
    (`abyssal.data.records`); auto: by the first one's fields. ``fields``: where a file calls a field by another name,
    ``{prompt: question, response: answer}``. ``system``: goes first where a record has no system message.
    ``template``: a file with the chat template, in place of the tokenizer's own. ``learn``: the assistant's words (the
    completion), or all. ``too_long``: what becomes of an example of more than sequence_length + 1 tokens: drop it, or
    truncate it at its end (of a preference the longer answer first). ``limit``: no more than so many records are read.
    """

    source: str
    validation: str | None = None
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    format: Literal["auto", "chat", "instruction", "completion", "text", "preference"] = "auto"
    fields: dict[str, str] = Field(default_factory=dict)
    system: str | None = None
    template: str | None = None
    learn: Literal["assistant", "all"] = "assistant"
    too_long: Literal["drop", "truncate"] = "drop"
    limit: PositiveInt | None = None


@dataclass(frozen=True)
class Examples:
    """A tokenised data set in memory. `tokens` int32 [N]; `learned` bool [N]; `starts` int64 [S + 1]: sequence s is
    tokens[starts[s] : starts[s + 1]]. `per_example` sequences belong together: 1, or 2 for preferences. `bytes` of the
    learned text, in UTF-8, without special tokens."""

    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    per_example: int = 1
    bytes: int = 0

    def __len__(self) -> int:
        """Examples."""
        return self.sequences // self.per_example

    @property
    def sequences(self) -> int:
        return len(self.starts) - 1

    @property
    def learned_tokens(self) -> int:
        return int(self.learned.sum())

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens in each example, int64 [len(self)]."""
        return np.diff(self.starts[:: self.per_example])

    def sequence(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Tokens of a sequence, and which are learned."""
        span = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.tokens[span], self.learned[span]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 in hex of all that decides what is trained on."""
        total = hashlib.sha256(f"{self.per_example} {self.sequences} {len(self.tokens)}\n".encode())
        for array, dtype in ((self.tokens, "<i4"), (self.learned, "u1"), (self.starts, "<i8")):
            total.update(array.astype(dtype).tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class Counts:
    """What became of the records. `examples` with `held_out` among them; `dropped` and `truncated` were longer than
    `limit` tokens; `empty` had nothing to learn; `otherwise`: answers that the chat template does not begin as it
    prompts for them. `tokens` and `learned` of all examples."""

    limit: int
    records: int = 0
    examples: int = 0
    held_out: int = 0
    dropped: int = 0
    truncated: int = 0
    empty: int = 0
    otherwise: int = 0
    tokens: int = 0
    learned: int = 0

    def describe(self) -> str:
        """All that in one line."""
        held_out = f" ({self.held_out:,} held out)" if self.held_out else ""
        line = f"{_count(self.records, 'record')}: {_count(self.examples, 'example')}{held_out}"
        line += f", {_count(self.tokens, 'token')}, {self.learned:,} learned"
        longer = f"longer than {self.limit:,} tokens"
        notes = (
            (self.dropped, f"dropped, {longer}"),
            (self.truncated, f"cut at the end, {longer}"),
            (self.empty, "left out, with nothing to learn"),
            (
                self.otherwise,
                "answers begin otherwise than the chat template prompts for (reasoning left out, perhaps)",
            ),
        )
        return "; ".join([line, *(f"{number:,} {what}" for number, what in notes if number)])


def with_template(tokenizer: Tokenizer, path: str | Path | None) -> Tokenizer:
    """The tokenizer with the chat template in this file; as it is for None. Raises UserError for a file that cannot be
    read or holds no valid Jinja."""
    if path is None:
        return tokenizer
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"data.template: {path}: {error.strerror or error}; expected a .jinja file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.template: {path}: not UTF-8 at byte {error.start}") from error
    changed = tokenizer.with_template(text)
    assert changed.chat is not None
    try:
        changed.chat.check()
    except UserError as error:
        raise UserError(f"data.template: {path}: {error}") from error
    return changed


def read_examples(
    config: ExampleConfig, tokenizer: Tokenizer, sequence_length: int
) -> tuple[Examples, Examples, Counts]:
    """The examples for training and those held out (perhaps none). Each has at most sequence_length + 1 tokens, as many
    as a row has inputs and targets, and at least one that is learned. The same config and files give the same.

    Raises UserError, of one line with file, line and field, for records that are not of the format or whose roles stand
    in an order that the template refuses; for a tokenizer without the template that is needed; and where nothing is
    left to train on.
    """
    if sequence_length < 1:
        raise UserError(f"sequence_length is {sequence_length}; expected at least 1")
    tokenizer = with_template(tokenizer, config.template)
    limit = sequence_length + 1
    train = _read(config.source, config, tokenizer, limit)
    if config.validation is None:
        train, held_out = train.split(config.validation_fraction)
    else:
        held_out = _read(config.validation, config, tokenizer, limit)
        if held_out.per_example != train.per_example:
            raise UserError(f"{config.validation}: its format is {held_out.format}, that of the source {train.format}")
    parts = [train] if config.validation is None else [train, held_out]
    counts = Counts(
        limit=limit,
        examples=len(train) + len(held_out),
        held_out=len(held_out),
        tokens=sum(map(len, train.tokens + held_out.tokens)),
        learned=sum(int(learned.sum()) for learned in train.learned + held_out.learned),
        **{name: sum(part.counted[name] for part in parts) for name in train.counted},
    )
    return train.examples(tokenizer), held_out.examples(tokenizer), counts


class _Sequence(NamedTuple):
    pieces: list[Piece]
    rendered: bool  # by a chat template, so that special tokens spelt in it are those tokens


class _Encoded(NamedTuple):
    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]


@dataclass
class _Collection:
    """Sequences as they come in; `of` is the record of each example."""

    format: str
    per_example: int
    tokens: list[npt.NDArray[np.int32]] = field(default_factory=list)
    learned: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    counted: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("records", "dropped", "truncated", "empty", "otherwise"), 0)
    )

    def __len__(self) -> int:
        return len(self.of)

    def split(self, fraction: float) -> tuple[_Collection, _Collection]:
        """The examples of the last `fraction` of the records apart: of one at least, and not of all."""
        kept = sorted(set(self.of))
        if len(kept) == 1 and self.format == "text":  # one long text: its stretches are what there is to hold out
            return (
                replace(self, of=list(range(len(self.of)))).split(fraction)
                if len(self.of) > 1
                else (self, self._none())
            )
        count = min(max(round(len(kept) * fraction), 1), len(kept) - 1) if fraction else 0
        cut = self.of.index(kept[-count]) if count else len(self.of)
        first, last = slice(0, cut * self.per_example), slice(cut * self.per_example, None)
        return (
            replace(self, tokens=self.tokens[first], learned=self.learned[first], of=self.of[:cut]),
            replace(self, tokens=self.tokens[last], learned=self.learned[last], of=self.of[cut:]),
        )

    def _none(self) -> _Collection:
        return replace(self, tokens=[], learned=[], of=[])

    def examples(self, tokenizer: Tokenizer) -> Examples:
        tokens = np.concatenate([np.empty(0, np.int32), *self.tokens])
        learned = np.concatenate([np.empty(0, np.bool_), *self.learned])
        starts = np.cumsum([0, *map(len, self.tokens)], dtype=np.int64)
        found, often = np.unique(tokens[learned], return_counts=True)
        size = sum(
            len(tokenizer.token_bytes(token)) * number
            for token, number in zip(found.tolist(), often.tolist(), strict=True)
            if not tokenizer.is_special(token)
        )
        return Examples(tokens, learned, starts, self.per_example, size)


def _read(source: str, config: ExampleConfig, tokenizer: Tokenizer, limit: int) -> _Collection:
    found = islice(records(source), config.limit)
    parser = Parser(None if config.format == "auto" else config.format, config.fields, config.system)
    first = next(found, None)
    if first is None:
        raise UserError(f"{source}: no records; expected at least one")
    parsed = parser.parse(first)
    format = parser.format
    assert format is not None
    if format == "preference" and config.learn == "all":
        raise UserError("learn: 'all' is not for preferences: of those the answers are learned; expected 'assistant'")
    turns = None if isinstance(parsed, Completion | Document) else Turns(tokenizer)
    collection = _Collection(format, 2 if format == "preference" else 1)
    counted = collection.counted

    def drafts() -> Iterator[tuple[int, list[_Sequence]]]:
        for number, record in enumerate(chain([parsed], map(parser.parse, found))):
            counted["records"] += 1
            examples = _draft(record, turns, config.learn == "all")
            counted["empty"] += not examples
            for example in examples:
                yield number, example

    for batch in _batches(drafts()):
        encoded = iter(_encode(tokenizer, [sequence for _, example in batch for sequence in example]))
        for number, example in batch:
            sequences = [next(encoded) for _ in example]
            if format == "text":
                pieces = [[piece] for piece in _stretches(sequences[0], limit)]
                counted["empty"] += not pieces
            else:
                pieces = _fitted(sequences, limit, config.too_long == "truncate", counted)
            for piece in pieces:
                collection.of.append(number)
                for tokens, learned in piece:
                    collection.tokens.append(tokens)
                    collection.learned.append(learned)
    if turns is not None:
        counted["otherwise"] = turns.otherwise
    if not collection.of:
        raise UserError(f"{source}: nothing is left to learn: {Counts(limit=limit, **counted).describe()}")
    return collection


def _draft(record: Parsed, turns: Turns | None, everything: bool) -> list[list[_Sequence]]:
    """The examples of a record, before they are encoded; none where there is nothing to learn."""
    if isinstance(record, Document):
        return [[_Sequence([Piece(record.text, True)], False)]] if record.text.strip() else []
    if isinstance(record, Completion):
        pieces = [Piece(record.prompt, everything), Piece(record.completion, True)]
        return [[_Sequence(pieces, False)]] if record.completion.strip() else []
    assert turns is not None
    if isinstance(record, Pair):
        sides = [turns.text(record.chosen), turns.text(record.rejected)]
        if sides[0] == sides[1]:
            return []  # nothing is preferred
        return [[_Sequence(side, True) for side in sides]] if all(sides) else []
    assert isinstance(record, Chat)
    texts = [turns.whole(record)] if everything else turns.texts(record)
    return [[_Sequence(pieces, True)] for pieces in texts]


def _batches(drafts: Iterator[tuple[int, list[_Sequence]]]) -> Iterator[list[tuple[int, list[_Sequence]]]]:
    batch, characters = [], 0
    for draft in drafts:
        batch.append(draft)
        characters += sum(len(piece.text) for sequence in draft[1] for piece in sequence.pieces)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, sequences: list[_Sequence]) -> list[_Encoded]:
    """Each sequence's tokens, with BOS and EOS where there is no template that wrote them."""

    def parts(piece: Piece, rendered: bool) -> list[str]:
        return [piece.text] if rendered else list(tokenizer.pieces(piece.text))

    cut = [[parts(piece, rendered) for piece in pieces] for pieces, rendered in sequences]
    texts = [
        [
            text
            for pieces, one in zip(cut, sequences, strict=True)
            if one.rendered is rendered
            for text in chain(*pieces)
        ]
        for rendered in (False, True)
    ]
    ids = (iter(tokenizer.encode_batch(texts[0])), iter(tokenizer.encode_rendered_batch(texts[1])))
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    out = []
    for (pieces, rendered), in_parts in zip(sequences, cut, strict=True):
        tokens = [] if rendered else [*bos]
        learned = [False] * len(tokens)
        for piece, strings in zip(pieces, in_parts, strict=True):
            for _ in strings:
                part = next(ids[rendered])
                tokens += part
                learned += [piece.learned] * len(part)
        if not rendered:
            tokens += eos
            learned += [True] * len(eos)
        encoded = _Encoded(np.array(tokens, dtype=np.int32), np.array(learned, dtype=np.bool_))
        encoded.learned[:1] = False
        out.append(encoded)
    return out


def _stretches(text: _Encoded, limit: int) -> list[_Encoded]:
    """A text in stretches of at most `limit` tokens, each beginning with the last token of the one before it."""
    out = []
    for start in range(0, len(text.tokens) - 1, limit - 1):
        part = _Encoded(text.tokens[start : start + limit], text.learned[start : start + limit].copy())
        part.learned[0] = False
        out.append(part)
    return out


def _fitted(sequences: list[_Encoded], limit: int, truncate: bool, counted: dict[str, int]) -> list[list[_Encoded]]:
    """The example in a list, its end cut off where it is too long; an empty list where it has no place."""
    if not all(sequence.learned.any() for sequence in sequences):
        counted["empty"] += 1
        return []
    lengths = [len(sequence.tokens) for sequence in sequences]
    if sum(lengths) > limit:
        rooms = [limit]
        if len(lengths) == 2:  # the longer one is cut first, then both to a half
            first = min(lengths[0], max(limit // 2, limit - lengths[1]))
            rooms = [first, limit - first]
        sequences = [_Encoded(one.tokens[:n], one.learned[:n]) for one, n in zip(sequences, rooms, strict=True)]
        if not truncate or not all(sequence.learned.any() for sequence in sequences):
            counted["dropped"] += 1
            return []
        counted["truncated"] += 1
    return [sequences]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
