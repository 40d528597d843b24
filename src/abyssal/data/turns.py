"""Conversations as text, and which part of it the assistant says.

The text is what the tokenizer's chat template writes. What of it is the assistant's own is known in one of two ways:

- The template marks it with ``{% generation %}``: then it is what stands there, exactly.
- Else by comparison. An answer begins where the text of the messages before it, with the prompt for an answer, ends,
  and goes on to the token that ends the turn, that included; the blank which many templates write after it is not.

Some templates write an answer in another way once more follows: those of DeepSeek-R1, DeepSeek-V3.1 and Qwen3 leave the
reasoning of earlier turns out. An answer that the whole conversation does not hold as the model would have written it
gives a text of its own, which ends with it: what the model sees at that turn, and what it should say there.

Where a template prompts for an answer with more than it writes before one (R1: ``<think>``), the answer begins at the
first token that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from abyssal.data.records import Chat, Message, silent
from abyssal.data.tokenizer import Tokenizer, check_unicode
from abyssal.errors import UserError


class Piece(NamedTuple):
    """A stretch of text; `learned`: its tokens are targets."""

    text: str
    learned: bool


class _Answer(NamedTuple):
    text: str  # of the conversation up to the answer, that included
    start: int
    end: int


@dataclass
class Turns:
    """Cuts conversations into pieces. `otherwise` counts the answers that the template does not begin as it prompts
    for them. Raises UserError for a tokenizer without a chat template."""

    tokenizer: Tokenizer
    otherwise: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.tokenizer.chat is None:
            raise UserError(
                "data.template: the tokenizer has no chat template, and these records need one; expected a .jinja "
                "file, or records of prompt and completion, or of text"
            )
        self._template = self.tokenizer.chat
        ids = {*self.tokenizer.end_of_turn_ids, *self.tokenizer.end_ids, self.tokenizer.eos_id} - {None}
        self._ends = [self.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids if i is not None]

    def whole(self, chat: Chat) -> list[Piece]:
        """The conversation, all of it learned."""
        return [Piece(self._render(chat, len(chat.messages)), True)]

    def texts(self, chat: Chat) -> list[list[Piece]]:
        """The texts, each in pieces, that teach every answer once; none where there is no answer. What comes after the
        last answer is left out. Raises UserError, naming the record, where the template refuses the conversation or
        the answers cannot be told apart in it."""
        if not (turns := self._turns(chat)):
            return []
        if self._template.marks_answers:
            return [self._marked(chat, turns[-1] + 1)]
        answers = [self._answer(chat, turn) for turn in turns]
        full = answers[-1].text
        inside = [answer for answer in answers if full.startswith(answer.text)]
        apart = [answer for answer in answers if not full.startswith(answer.text)]
        return [_cut(answer.text, [answer]) for answer in apart] + [_cut(full, inside)]

    def text(self, chat: Chat) -> list[Piece]:
        """The same as one text. Raises UserError where one does not hold all answers, as well."""
        texts = self.texts(chat)
        if len(texts) > 1:
            turn = chat.name(self._turns(chat)[0])
            raise UserError(
                f"{chat.place}: {turn}: the chat template writes this answer in another way once more follows; "
                "expected one answer at the end, and the others in the prompt"
            )
        return texts[0] if texts else []

    def _turns(self, chat: Chat) -> list[int]:
        """The answers that are learned. As in OpenAI's format, one with ``weight`` 0 is not."""
        messages = enumerate(chat.messages)
        answers = [n for n, message in messages if n >= chat.first and message["role"] == "assistant"]
        for n in answers:
            if (weight := chat.messages[n].get("weight", 1)) not in (0, 1):
                raise UserError(f"{chat.place}: {chat.name(n)}.weight: {weight!r}; expected 0 (not learned) or 1")
        return [n for n in answers if not silent(chat.messages[n]) and chat.messages[n].get("weight", 1)]

    def _marked(self, chat: Chat, count: int) -> list[Piece]:
        before = 0
        if any(message["role"] == "assistant" for message in chat.messages[: chat.first]):
            before = len(self._template.render_marked(chat.messages[: chat.first], tools=chat.tools)[1])
        try:
            text, spans = self._template.render_marked(chat.messages[:count], tools=chat.tools)
        except UserError as error:
            raise self._refused(chat, count, error) from error
        answers = [n for n, message in enumerate(chat.messages[:count]) if message["role"] == "assistant"]
        if len(answers) == len(spans):
            learned = set(self._turns(chat))
            chosen = [span for n, span in zip(answers, spans, strict=True) if n in learned]
        else:
            chosen = spans[before:]
        return _cut(_checked(chat, text), [_Answer(text, *span) for span in chosen])

    def _answer(self, chat: Chat, turn: int) -> _Answer:
        text = self._render(chat, turn + 1)
        prompt = self._render(chat, turn, prompt=True)
        start = len(prompt)
        if not text.startswith(prompt):
            self.otherwise += 1
            start = self._common(text, prompt)
            before = self._render(chat, turn)
            if not text.startswith(before) or start < len(before):
                raise UserError(
                    f"{chat.place}: {chat.name(turn)}: the chat template writes what comes before this answer in "
                    "another way once the answer is there, so where it begins cannot be told; expected a template "
                    "that marks it with {% generation %}"
                )
        return _Answer(text, start, self._end(text, start))

    def _common(self, text: str, prompt: str) -> int:
        """How many characters of `text` the tokens take that `prompt` begins with too."""
        ours, theirs = self.tokenizer.encode_rendered_batch([text, prompt])
        shared = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(theirs))
        while not text.startswith(begin := self.tokenizer.decode(ours[:shared], skip_special=False)):
            shared -= 1  # it ended within a character
        return len(begin)

    def _end(self, text: str, start: int) -> int:
        """Behind the token that ends the turn, where nothing but blanks comes after it."""
        length = len(text.rstrip())
        return length if any(text.endswith(end, start, length) for end in self._ends) else len(text)

    def _render(self, chat: Chat, count: int, prompt: bool = False) -> str:
        messages = chat.messages[:count]
        try:
            text = self._template.render(messages, tools=chat.tools, add_generation_prompt=prompt)
        except UserError as error:
            raise self._refused(chat, count, error) from error
        return _checked(chat, text)

    def _refused(self, chat: Chat, count: int, error: UserError) -> UserError:
        """What the template said, with the message that it took offence at: the first with which it refuses all."""
        while count > 1 and not self._renders(chat.messages[: count - 1], chat):
            count -= 1
        return UserError(f"{chat.place}: {chat.name(count - 1)}: {error}")

    def _renders(self, messages: Sequence[Message], chat: Chat) -> bool:
        try:
            self._template.render(messages, tools=chat.tools)
        except UserError:
            return False
        return True


def _checked(chat: Chat, text: str) -> str:
    try:
        check_unicode(text)
    except UserError as error:  # JSON may escape half a surrogate pair
        raise UserError(f"{chat.place}: {chat.path}: {error}") from error
    return text


def _cut(text: str, answers: Sequence[_Answer]) -> list[Piece]:
    pieces, done = [], 0
    for _, start, end in answers:
        start = max(start, done)
        pieces += [Piece(text[done:start], False), Piece(text[start:end], True)]
        done = end
    pieces.append(Piece(text[done:], False))
    return [piece for piece in pieces if piece.text]
