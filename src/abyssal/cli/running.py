"""What ``train`` and ``tune`` share: signals, the live page, progress, and what is said when a run ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from abyssal.analysis.live import Live
    from abyssal.training.trainer import Trainer


class Running:
    """A run on the command line. Entering takes the live page's port, before anything is written.

    ``options`` are for :func:`abyssal.training.start.start` and ``resume``. Raises UserError for a port that is taken,
    or one given without ``live``.
    """

    def __init__(self, live: bool, port: int | None) -> None:
        from abyssal.cli.progress import ConsoleWatcher
        from abyssal.errors import UserError

        if port is not None and not live:
            raise UserError(f"--port {port}: what --live serves on; give --live too")
        # Until training begins, Ctrl-C and SIGTERM end the program at once: there is nothing to save yet.
        self._stop = _StopOnSignal()
        self._page = _Page(port) if live else None
        self.watcher = ConsoleWatcher()
        self.options: dict[str, Any] = {"watcher": self.watcher, "should_stop": self._stop.asked}

    def __enter__(self) -> Running:
        if self._page is not None:
            self._page.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._page is not None:
            self._page.__exit__()

    def run(
        self,
        build: Callable[[], Trainer],
        command: str,
        *,
        show: Callable[[Trainer], None] | None = None,
        finish: Callable[[Trainer], dict[str, Any]] | None = None,
    ) -> None:
        """Trains what ``build`` gives. ``show`` is called before the first step, ``finish`` after the last: what it
        returns goes into summary.json. Exits with the signal's code where the run was stopped."""
        trainer = build()
        with self._stop:
            finished = self._train(trainer, show, finish)
        trainer.together.part_ways()
        if not finished:
            from abyssal.cli.show import say

            path = trainer.run.path
            if trainer.together.first:
                say(f"stopped after step {trainer.done} and saved; continue with: abyssal {command} --resume {path}")
            # Of several processes the signal may have reached another.
            raise typer.Exit(128 + (self._stop.received or [signal.SIGTERM])[0])

    def _train(
        self,
        trainer: Trainer,
        show: Callable[[Trainer], None] | None,
        finish: Callable[[Trainer], dict[str, Any]] | None,
    ) -> bool:
        from abyssal.checkpoint.run import read_metrics
        from abyssal.cli.progress import show_summary

        if not trainer.together.first:
            return trainer.train()
        if self._page is not None:
            self._page.begin(trainer.run.path)
        self.watcher.begin(trainer, show)
        try:
            finished = trainer.train()
        finally:
            self.watcher.end()
        if self._page is not None:
            self._page.state = "finished" if finished else "stopped"
        if finished:
            show_summary(trainer, read_metrics(trainer.run.path / "metrics.jsonl"), finish)
        return finished


class _Page:
    """The live page: its port is taken on entering; leaving tells it how training ended."""

    def __init__(self, port: int | None) -> None:
        self.port, self.state = port, "failed"

    def __enter__(self) -> _Page:
        from abyssal.analysis.live import Live

        self.live: Live = Live(self.port)
        return self

    def begin(self, path: Path) -> None:
        """Serves the run in ``path``, and says where."""
        from abyssal.cli.show import say

        self.live.start(path)
        say(f"live page {self.live.url}")

    def __exit__(self, *_: object) -> None:
        self.live.stop(self.state)


class _StopOnSignal:
    """Ctrl-C and SIGTERM ask the trainer to stop after the step at hand; a second Ctrl-C ends the program at once. Of a
    signal to a whole job torchrun's processes get two, their own and the one that torchrun hands on: there they count
    as one."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def asked(self) -> bool:
        return bool(self.received)

    def __enter__(self) -> None:
        self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number: int, _: Any) -> None:
        if self.received and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self.received.append(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
