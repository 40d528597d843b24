"""A conversation with a model: what was said, the token ids it makes, and the answer token by token."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abyssal.checkpoint.atomic import write_text
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.generation.engine import Engine
from abyssal.generation.sampling import Sampling

# What the conversation itself hands to the template.
RESERVED = ("self", "messages", "add_generation_prompt")


@dataclass
class Conversation:
    """What was said so far, and how the tokenizer's chat template writes it.

    Where the tokenizer has no template, all that was said is one text (a model trained on plain text continues it):
    an answer goes on where the message before it ends, a message begins a line of its own.

    Raises UserError for template variables that have no template, or whose names are the conversation's own.
    """

    tokenizer: Tokenizer
    system: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    """Handed to the template by name, such as ``thinking`` for DeepSeek-V3.1."""
    turns: list[dict[str, str]] = field(default_factory=list)
    """Messages without the system prompt."""

    def __post_init__(self) -> None:
        for name in self.variables:
            if name in RESERVED:
                raise UserError(f"template variable {name!r}: the chat sets it itself; expected another name")
            if self.tokenizer.chat is None:
                raise UserError(f"template variable {name!r}: this tokenizer has no chat template to hand it to")

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, the system prompt first where there is one."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.turns

    def ids(self) -> list[int]:
        """The prompt for the assistant's next turn. Raises UserError for text that has no UTF-8 form, and where the
        template refuses the conversation."""
        if self.tokenizer.chat is not None:
            return self.tokenizer.encode_chat(self.messages, add_generation_prompt=True, **self.variables)
        text = self.system or ""
        for turn in self.turns:
            begins_line = turn["role"] == "assistant" or not text or text.endswith("\n")
            text += turn["content"] if begins_line else "\n" + turn["content"]
        bos = [self.tokenizer.bos_id] if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None else []
        return bos + self.tokenizer.encode(text)

    def add(self, role: str, content: str) -> None:
        """A message more, at the end."""
        self.turns.append({"role": role, "content": content})

    def reset(self) -> None:
        """Forgets all but the system prompt."""
        self.turns.clear()

    def save(self, path: Path) -> None:
        """Writes ``{"messages": [...]}`` as JSON. Raises UserError where ``path`` exists, OSError where it cannot be
        written."""
        if os.path.lexists(path):
            raise UserError(f"{path}: exists; choose another name, nothing is overwritten")
        write_text(path, json.dumps({"messages": self.messages}, indent=2, ensure_ascii=False) + "\n")


def reply(engine: Engine, ids: Sequence[int], sampling: Sampling) -> Iterator[tuple[int, str]]:
    """The text that follows the prompt ``ids``, token by token: how many tokens there are so far, and the piece of
    text that the last one completes, perhaps empty.

    The pieces joined are what ``abyssal.generate`` returns for ``ids``, and it raises as that does. An engine that
    keeps prefixes computes of a conversation only what is new. Whoever closes the iterator early ends the answer there.
    """
    sequence = engine.add(ids, sampling)
    try:
        while sequence.finished is None:
            for event in engine.step():
                if event.sequence is sequence:
                    yield len(sequence.new), event.text
        if sequence.error is not None:
            raise UserError(sequence.error)
    finally:
        engine.cancel(sequence)
