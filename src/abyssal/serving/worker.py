"""The engine's thread: requests come in from the event loop, what each step brings goes back to it.

An engine is used by one thread, and a server has many clients. So everything that touches the engine is a call that
waits in an inbox and is made by the engine's thread between two steps; what a step brings is handed to the event loop
in one go. Everything else here belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from abyssal.errors import UserError
from abyssal.generation.engine import Engine
from abyssal.generation.grammar import Grammar
from abyssal.generation.sampling import Sampling
from abyssal.generation.sequence import Logprobs, Routed, Sequence
from abyssal.serving.monitoring import Monitoring

T = TypeVar("T")
_log = logging.getLogger(__name__)
_WINDOW = 60.0  # seconds over which it is counted how many requests end


class Full(Exception):
    """No room for a request now; ``retry_after`` seconds later there may be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Job:
    """One sequence that a request asks for."""

    ids: list[int]
    sampling: Sampling
    generator: torch.Generator | None = None
    schema: Grammar | None = None
    routing: bool = False
    shown: frozenset[int] = frozenset()
    """Special tokens that are part of the text."""


@dataclass(frozen=True)
class Piece:
    """What is new of one of a request's sequences."""

    index: int
    """Of the request's jobs."""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    """Of ``tokens``, where they are wanted."""
    routing: list[Routed] = field(default_factory=list)
    """Of tokens that came before, in their order, where it is wanted."""
    reused: int = 0
    """Tokens of the prompt that were found computed."""
    finished: str | None = None
    """As :class:`~abyssal.generation.sequence.Sequence` has it; "failed" where the engine itself broke."""
    error: str | None = None


class Ticket:
    """A request on its way, with a place for each of its ``count`` sequences: iterate over it for what it brings,
    :meth:`release` it when all is over."""

    def __init__(self, worker: Worker, count: int) -> None:
        self.count = count
        self.jobs: list[Job] = []
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the engine has taken the request in; UserError where it refuses."""
        self.cancelled = False
        self.sequences: list[Sequence] = []  # the engine's thread's
        self._worker = worker
        self._new: list[Piece] = []
        self._news = asyncio.Event()
        self._open = count
        self._released = False
        self._began = time.perf_counter()
        self._last: dict[int, float] = {}

    async def pieces(self, pause: float | None = None) -> AsyncIterator[list[Piece]]:
        """All that has come since the last time, until every sequence has ended; [] now and then, every ``pause``
        seconds, where there is no news."""
        left, loop = self.count, asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None

        def remind(pause: float) -> None:  # a timer for many tokens: one for each would cost more than the token
            nonlocal timer
            timer = loop.call_later(pause, remind, pause)
            self._news.set()

        if pause is not None:
            timer = loop.call_later(pause, remind, pause)
        try:
            while left:
                await self._news.wait()
                self._news.clear()
                new, self._new = self._new, []
                left -= sum(piece.finished is not None for piece in new)
                yield new
        finally:
            if timer is not None:
                timer.cancel()

    def cancel(self) -> None:
        """Ends what has not ended yet; its pages are free as soon as the step that runs is over."""
        if not self.cancelled and self._open:
            self.cancelled = True
            self._worker.call(lambda: self._worker.end(self))

    def release(self) -> None:
        """Cancels what has not ended, and gives the places back."""
        self.cancel()
        if not self._released:
            self._released = True
            self._worker.inside -= self.count

    def put(self, piece: Piece, monitoring: Monitoring) -> None:
        """Takes what is new, and notes how long it took."""
        now = time.perf_counter()
        if piece.tokens:
            before = self._last.get(piece.index)
            if before is None:
                monitoring.first_token.observe(now - self._began)
            else:
                monitoring.between_tokens.observe((now - before) / len(piece.tokens))
            self._last[piece.index] = now
        if piece.finished is not None:
            self._open -= 1
            monitoring.sequence_seconds.observe(now - self._began)
        self._new.append(piece)
        self._news.set()


class Worker:
    """Runs ``engine``. At most ``waiting`` sequences wait beside those that it works on at a time; one counts from when
    its request is known until its answer is with the client, so clients that do not read cannot pile answers up."""

    def __init__(self, engine: Engine, monitoring: Monitoring, waiting: int) -> None:
        self.engine, self.monitoring = engine, monitoring
        self.most = engine.scheduler.most + waiting
        """Sequences that may be in here."""
        self.inside = 0
        self.healthy = True
        self._ended: deque[float] = deque(maxlen=1000)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._owners: dict[Sequence, tuple[Ticket, int, int]] = {}  # ticket, index, tokens whose routing was told
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begins; to be called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what it was working on is cancelled."""

        def stop() -> None:
            self._stopping = True

        self.call(stop)
        self._thread.join()

    def call(self, function: Callable[[], None]) -> None:
        """Has the engine's thread call ``function`` between two steps."""
        self._inbox.put(function)

    async def ask(self, function: Callable[[Engine], T]) -> T:
        """What ``function`` says of the engine between two steps."""
        future: asyncio.Future[T] = self._loop.create_future()

        def call() -> None:
            try:
                answer = function(self.engine)
            except Exception as error:
                problem = error  # the name is unbound when this block ends
                self._post(lambda: None if future.done() else future.set_exception(problem))
            else:
                self._post(lambda: None if future.done() else future.set_result(answer))

        self.call(call)
        return await future

    def reserve(self, count: int) -> Ticket:
        """Places for ``count`` sequences. Raises :class:`Full` where too many wait already."""
        if self.inside + count > self.most:
            raise Full(self._retry_after(count))
        self.inside += count
        return Ticket(self, count)

    def submit(self, ticket: Ticket, jobs: list[Job]) -> None:
        """Has the engine take in what ``ticket`` has places for."""
        assert len(jobs) == ticket.count
        ticket.jobs = jobs
        self.call(lambda: self._add(ticket))

    def _retry_after(self, count: int) -> int:
        """Seconds until there should be room, as fast as sequences ended lately."""
        now = time.monotonic()
        lately = [moment for moment in self._ended if now - moment < _WINDOW]
        if not lately:
            return 1  # nothing is known of how long an answer takes
        missing = self.inside + count - self.most
        return min(max(math.ceil(missing * (now - lately[0]) / len(lately)), 1), 60)

    # the engine's thread

    def end(self, ticket: Ticket) -> None:
        """Cancels what ``ticket`` has in the engine."""
        gone = [s for s in ticket.sequences if s in self._owners]
        if not ticket.sequences:
            return  # not taken in yet: _add sees that it is cancelled
        for sequence in gone:
            self.engine.cancel(sequence)
        self._tell([self._piece(sequence) for sequence in gone])

    def _add(self, ticket: Ticket) -> None:
        try:
            if ticket.cancelled:
                raise UserError("cancelled")
            if not self.healthy:
                raise RuntimeError("the engine has failed; start the server anew")
            for number, job in enumerate(ticket.jobs):
                sequence = self.engine.add(
                    job.ids,
                    job.sampling,
                    generator=job.generator,
                    schema=job.schema,
                    routing=job.routing,
                    shown=job.shown,
                )
                ticket.sequences.append(sequence)
                self._owners[sequence] = (ticket, number, 0)
        except Exception as error:
            problem = error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
            for sequence in ticket.sequences:
                del self._owners[sequence]
                self._cancel(sequence)
            ticket.sequences.clear()
            self._post(lambda: self._refuse(ticket, problem))
        else:
            self._post(lambda: None if ticket.accepted.done() else ticket.accepted.set_result(None))

    def _work(self) -> None:
        while not self._stopping:
            try:
                while not self._inbox.empty() or not self.engine.busy or not self.healthy:
                    self._inbox.get()()
                    if self._stopping:
                        return
                self._step()
            except Exception as error:
                _log.exception("the engine failed; what it was working on is lost")
                self._fail(error)

    def _step(self) -> None:
        events = self.engine.step(self.monitoring.load)
        self.monitoring.load.flush()
        self.monitoring.note_tokens(sum(len(event.tokens) for event in events))
        mine = [(event.sequence, event.tokens, event.text) for event in events if event.sequence in self._owners]
        self._tell([self._piece(*one) for one in mine])

    def _piece(self, sequence: Sequence, tokens: list[int] | None = None, text: str = "") -> tuple[Ticket, Piece]:
        ticket, index, told = self._owners[sequence]
        tokens = tokens or []
        wanted = sequence.sampling.logprobs is not None and tokens
        routing = (sequence.routing or [])[told:]
        if sequence.finished is not None:
            del self._owners[sequence]
        else:
            self._owners[sequence] = (ticket, index, told + len(routing))
        return ticket, Piece(
            index,
            text,
            tokens,
            sequence.logprobs[-len(tokens) :] if wanted else [],
            routing,
            sequence.reused,
            sequence.finished,
            sequence.error,
        )

    def _fail(self, error: Exception) -> None:
        self.healthy = self.healthy and not self.engine.lost
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        out: list[tuple[Ticket, Piece]] = []
        for sequence, (ticket, index, _) in self._owners.items():
            self._cancel(sequence)
            out.append((ticket, Piece(index, finished="failed", error=said)))
        self._owners.clear()
        self.monitoring.load.forget()
        self._tell(out)

    def _cancel(self, sequence: Sequence) -> None:
        try:
            self.engine.cancel(sequence)
        except Exception:
            self.healthy = False

    def _tell(self, news: list[tuple[Ticket, Piece]]) -> None:
        if news:
            self._post(lambda: self._deliver(news))

    def _post(self, function: Callable[[], Any]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: nobody is there to hear it
            self._stopping = True

    # the event loop's thread

    def _deliver(self, news: list[tuple[Ticket, Piece]]) -> None:
        for ticket, piece in news:
            if piece.finished is not None:
                self._ended.append(time.monotonic())
            ticket.put(piece, self.monitoring)

    def _refuse(self, ticket: Ticket, problem: Exception) -> None:
        if not ticket.accepted.done():
            ticket.accepted.set_exception(problem)
