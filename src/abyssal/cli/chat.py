"""``abyssal chat``: a conversation with a model, in a terminal or through a pipe.

In a terminal prompt_toolkit reads what is typed. Elsewhere each line of input is a message or a command, answers go to
stdout, and all that is said beside them to stderr.
"""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.cli.decoding import DraftsOption
from abyssal.cli.loaded import (
    AllowMissingOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    WeightsOption,
    load_model,
)

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from abyssal.generation import Sampling
    from abyssal.generation.conversation import Conversation
    from abyssal.model import Transformer

LEAST_ROOM = 16  # tokens of context; an answer in less would be cut off at once
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "repetition_penalty", "seed")
COMMANDS = {
    "/reset": ("", "forget what was said; the system prompt stays"),
    "/system": ("[TEXT]", "show the system prompt, or set another one and start anew"),
    "/retry": ("", "drop the last answer and draw another one"),
    "/set": ("[KEY=VALUE]", f"show or change how answers are drawn: {', '.join(SETTINGS)}"),
    "/save": ("FILE", "write the conversation as JSON into a new file"),
    "/stats": ("", "what was computed so far, what the cache spared, and how often guesses were right"),
    "/help": ("", "this list"),
    "/exit": ("", "leave"),
}
KEYS = """\
Enter sends; Alt+Enter, or a backslash at the end, begins a new line. A message that begins with / is written with //.
Ctrl-C stops an answer and keeps what was said of it; at the prompt it clears the line. Ctrl-D leaves."""

# C0 without tab and newline, DEL, and C1: a terminal would obey them.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def chat_command(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    tokens: Annotated[int, typer.Option(help="At most so many tokens an answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.6,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that hold this share.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this likely against the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes what was said less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    template_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For the chat template, such as thinking=true; may be given again."),
    ] = None,
    drafts: DraftsOption = None,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    device: DeviceOption = "auto",
    allow_missing: AllowMissingOption = None,
) -> None:
    """Talk with a model; /help lists what else can be said. Lines from a pipe are messages."""
    from abyssal.config.parsing import parse_assignments
    from abyssal.generation import Sampling
    from abyssal.generation.conversation import Conversation

    sampling = Sampling(
        max_new_tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    variables = parse_assignments(template_arg or [])
    network, tokenizer = load_model(model, dtype=dtype, weights=weights, device=device, allow_missing=allow_missing)
    conversation = Conversation(tokenizer, system, variables)
    if tokenizer.chat is not None:
        tokenizer.chat.check()
    terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    session = _Session(network, conversation, sampling, terminal, drafts)
    if terminal:
        session.note(f"{model}: {session.context:,} tokens of context; /help lists the commands, Ctrl-D leaves")
    if tokenizer.chat is None:
        session.note("this model has no chat template: what is said is one text, which it continues")
    with session.interrupts() if terminal else nullcontext():
        for text in _typed(session) if terminal else _piped():
            if text.split()[:1] == ["/exit"]:
                break
            session.take(text)
    if session.failed and not terminal:
        raise typer.Exit(2)


class _Session:
    """A conversation, the model that answers, and where its words go."""

    def __init__(
        self,
        network: Transformer,
        conversation: Conversation,
        sampling: Sampling,
        terminal: bool,
        drafts: int | None = None,
    ) -> None:
        from abyssal.generation.engine import Engine

        # It keeps what was computed of the conversation: of the next turn only what is new is read.
        self.engine = Engine(network, conversation.tokenizer, drafts=drafts)
        self.conversation = conversation
        self.sampling = sampling
        self.terminal = terminal
        self.context = network.config.max_position_embeddings
        self.retries = 0  # of the last answer
        self.writing = False
        self.failed = False

    def note(self, text: str) -> None:
        """What is no answer: dim in a terminal, on stderr elsewhere."""
        if not self.terminal:
            print(_visible(text), file=sys.stderr)
            return
        from rich.text import Text

        from abyssal.cli.show import console

        console.print(Text(_visible(text), style="dim"))

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Within, Ctrl-C stops an answer and nothing else: one that comes late must not cost the conversation."""

        def stop(signum: int, frame: FrameType | None) -> None:
            if self.writing:
                self.writing = False
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def take(self, text: str) -> None:
        """A message or a command."""
        from abyssal.errors import UserError

        if not text.strip():
            return
        if text.startswith("/") and not text.startswith("//"):
            name, *rest = text.split(maxsplit=1)
            try:
                self._command(name, rest[0].strip() if rest else "")
            except UserError as error:
                self.failed = True
                self.note(f"error: {error}")
            return
        self.retries = 0
        self.conversation.add("user", text.removeprefix("/") if text.startswith("//") else text)
        if not self._answer():
            self.conversation.turns.pop()

    def _command(self, name: str, rest: str) -> None:
        from abyssal.errors import nearest

        match name:
            case "/reset":
                self.conversation.reset()
                stays = "" if self.conversation.system is None else "; the system prompt stays"
                self.note(f"all is forgotten{stays}")
            case "/system" if rest:
                self.conversation.system = rest
                self.conversation.reset()
                self.note("a new system prompt; the conversation starts anew")
            case "/system":
                self.note(self.conversation.system or "there is no system prompt; /system TEXT sets one")
            case "/retry" if self.conversation.turns:
                self.retries += 1
                last = self.conversation.turns.pop()
                if not self._answer():
                    self.conversation.turns.append(last)
            case "/retry":
                self.note("there is no answer yet")
            case "/set":
                if rest:
                    self._set(rest)
                self.note(" ".join(f"{key}={getattr(self.sampling, key)}" for key in SETTINGS))
            case "/save" if rest:
                self._save(rest)
            case "/save":
                self.note("/save FILE: which file?")
            case "/stats":
                from abyssal.cli.decoding import align, count_lines

                self.note(align(count_lines(self.engine.metrics)))
            case "/help":
                wide = max(len(f"{command} {argument}") for command, (argument, _) in COMMANDS.items())
                lines = [f"{f'{name} {argument}':{wide}}  {help}" for name, (argument, help) in COMMANDS.items()]
                self.note("\n".join([*lines, KEYS]))
            case _:
                hint = nearest(name, COMMANDS) or "; /help lists them"
                self.note(f"{name}: no such command{hint}; a message that begins with / is written with //")

    def _save(self, name: str) -> None:
        from abyssal.errors import UserError

        try:
            path = Path(name).expanduser()
            self.conversation.save(path)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{name}: {error.strerror or error}") from None
        except (RuntimeError, ValueError) as error:  # a user's home that is not known; a name that no file can have
            raise UserError(f"{name}: {error}") from None
        self.note(f"{path}: {len(self.conversation.messages)} messages")

    def _set(self, assignment: str) -> None:
        from abyssal.config.parsing import parse_assignments
        from abyssal.errors import UserError, nearest

        key, _, value = (part.strip() for part in assignment.partition("="))
        if key not in SETTINGS:
            raise UserError(f"{key}: no such setting{nearest(key, SETTINGS) or '; known: ' + ', '.join(SETTINGS)}")
        if not value:
            raise UserError(f"{key}: no value; expected {key}=VALUE")
        given = {"seed": None} if (key, value.lower()) == ("seed", "none") else parse_assignments([f"{key}={value}"])
        self.sampling = dataclasses.replace(self.sampling, **given)

    def _answer(self) -> bool:
        """Writes an answer and adds it to the conversation; False where there is none, and says why."""
        from abyssal.errors import UserError

        answer = _Answer()
        problem = ""
        try:
            self._write(answer)
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            answer.end = "stopped"
            problem = "" if answer.text else "stopped before the first word"
        except UserError as error:
            problem = f"error: {error}"
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):  # torch's allocators
                raise
            problem = f"error: not enough memory: {str(error).partition(chr(10))[0]}"
        if (answer.text or not problem) and not answer.text.endswith("\n"):
            print(flush=True)
        if problem:
            self.failed = True
            self.note(f"{problem} (the conversation is as before)")
            return False
        self.conversation.add("assistant", answer.text)
        apart = "\n" if self.terminal else ""
        self.note(f"{answer.figures()}, context {answer.prompt + answer.tokens:,} of {self.context:,}{apart}")
        return True

    def _write(self, answer: _Answer) -> None:
        """Draws the answer and prints it as it comes."""
        from abyssal.errors import UserError
        from abyssal.generation.conversation import reply

        sampling = self.sampling
        if sampling.seed is not None:  # the same seed would draw the same answer again
            sampling = dataclasses.replace(sampling, seed=(sampling.seed + self.retries) % 2**64)
        with _silent_keys() if self.terminal else nullcontext():
            self.writing = True
            try:
                ids = self.conversation.ids()
                answer.prompt, room = len(ids), self.context - len(ids)
                if room < LEAST_ROOM:
                    raise UserError(
                        f"the prompt would take {len(ids):,} of {self.context:,} tokens of context and leave no room "
                        "for an answer; /reset starts anew"
                    )
                for count, piece in reply(self.engine, ids, sampling):
                    answer.take(count, piece)
                    print(_visible(piece), end="", flush=True)
            finally:
                self.writing = False  # first of all: Ctrl-C must not come between the terminal and its settings
        if answer.tokens == room:
            answer.end = "the context is full"
        elif answer.tokens == sampling.max_new_tokens:
            answer.end = "cut at max_new_tokens"


class _Answer:
    """An answer as it grows, and how fast."""

    def __init__(self) -> None:
        self.text, self.end = "", ""
        self.prompt, self.tokens = 0, 0
        self.began = self.first = self.last = time.perf_counter()

    def take(self, tokens: int, piece: str) -> None:
        self.last = time.perf_counter()
        if self.tokens == 0:
            self.first = self.last
        self.tokens = tokens
        self.text += piece

    def figures(self) -> str:
        parts = [self.end] if self.end else []
        parts.append(f"{self.tokens:,} token{'' if self.tokens == 1 else 's'}")
        if self.tokens > 1:  # the first one's time is that of the prompt
            parts.append(f"{(self.tokens - 1) / max(self.last - self.first, 1e-9):.1f} tokens/s")
        if self.tokens:
            parts.append(f"the first after {self.first - self.began:.2f} s")
        return ", ".join(parts)


def _visible(text: str) -> str:
    return text.translate(_VISIBLE)


def _piped() -> Iterator[str]:
    """Lines of stdin. Bytes that are no UTF-8 become surrogates, which the tokenizer refuses: an error of that line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    for line in sys.stdin or ():
        yield line.removesuffix("\n")


def _typed(session: _Session) -> Iterator[str]:
    prompt = prompt_session()
    while True:
        try:
            text = prompt.prompt()
        except KeyboardInterrupt:
            session.note("Ctrl-D or /exit leaves")
            continue
        except EOFError:
            return
        yield text


def prompt_session() -> PromptSession[str]:
    """What reads a message in the terminal: Enter sends; Alt+Enter, or Enter after a backslash, begins a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    class Quiet(FileHistory):
        """History that does without its file where that cannot be read or written."""

        def load_history_strings(self) -> list[str]:
            with suppress(OSError):
                return list(super().load_history_strings())
            return []

        def store_string(self, string: str) -> None:
            with suppress(OSError):
                super().store_string(string)

    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # not in a search through the history

    @keys.add("enter", filter=typing)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    @keys.add("<sigint>")
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    file = _history_file()
    history = None if file is None else Quiet(file)  # None: of this session only
    return PromptSession([("bold", "> ")], multiline=True, key_bindings=keys, history=history)


def _history_file() -> Path | None:
    """Made where it is not there yet, for its owner's eyes; None where that cannot be."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        file = Path(state) / "abyssal" / "chat_history"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return file


@contextmanager
def _silent_keys() -> Iterator[None]:
    """Within, what is typed is not shown, as it would stand in the middle of the answer; it waits for the prompt."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = before.copy()
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
