"""``abyssal train``: runs a recipe, shows how it goes, and says at the end what came of it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from abyssal.analysis.live import Live
    from abyssal.training.recipe import Recipe
    from abyssal.training.trainer import Trainer


def train_command(
    recipe: Annotated[
        str | None, typer.Argument(help="A built-in recipe (demo, …) or a YAML file. Not needed with --resume RUN.")
    ] = None,
    changes: Annotated[list[str] | None, typer.Argument(help="Changes: key=value or key.subkey=value …")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/NAME.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="Continue this run, or 'auto': the newest beside --out that fits the recipe.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show what would run, and stop.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Serve the run's report on this machine while it trains.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(help="Where --live serves it. Default: 8765, or any that is free; 0: any.")
    ] = None,
) -> None:
    """Train a model by a recipe, or continue a run."""
    from abyssal.config import parse_assignments
    from abyssal.errors import UserError
    from abyssal.training.recipe import read_recipe, to_yaml

    assignments = list(changes or [])
    if recipe is not None and "=" in recipe:
        assignments.insert(0, recipe)
        recipe = None
    settings = parse_assignments(assignments)
    if resume and overwrite:
        raise UserError("--resume and --overwrite: one continues the run, the other replaces it; give one of them")
    if port is not None and not live:
        raise UserError(f"--port {port}: what --live serves on; give --live too")
    if recipe is None and (resume is None or resume == "auto"):
        from abyssal.training.recipe import recipe_names

        raise UserError(f"which recipe? A YAML file or one of: {', '.join(recipe_names())}")
    chosen = read_recipe(recipe, settings) if recipe is not None else None
    if print_config:
        from abyssal.training.start import run_recipe

        shown = chosen if chosen is not None else run_recipe(Path(resume or ""), settings)
        print(to_yaml(shown, resolved=True), end="")
        return
    # Until training begins, Ctrl-C and SIGTERM end the program at once: there is nothing to save yet.
    stop = _stop_on_signal()
    with _Page(port) if live else nullcontext() as page:
        trainer = _trainer(chosen, settings, out, resume, overwrite, stop.asked)
        with stop:
            finished = _run(trainer, page)
    if not finished:
        from abyssal.cli.show import console

        step = trainer.done
        console.print(f"stopped after step {step} and saved; continue with: abyssal train --resume {trainer.run.path}")
        raise typer.Exit(128 + stop.received[0])


def _trainer(
    recipe: Recipe | None,
    settings: dict[str, Any],
    out: Path | None,
    resume: str | None,
    overwrite: bool,
    should_stop: Callable[[], bool],
) -> Trainer:
    from abyssal.cli.progress import ConsoleWatcher
    from abyssal.training.start import newest_run, start
    from abyssal.training.start import resume as resume_run

    options = {"watcher": ConsoleWatcher(), "should_stop": should_stop}
    if resume is None:
        assert recipe is not None
        return start(recipe, out or Path("runs") / recipe.name, overwrite=overwrite, **options)
    if resume == "auto":
        assert recipe is not None
        path = newest_run(out.parent if out else Path("runs"), recipe)
    else:
        path = Path(resume)
    return resume_run(path, recipe, settings if recipe is None else None, **options)


def _run(trainer: Trainer, page: _Page | None) -> bool:
    from abyssal.checkpoint.run import read_metrics
    from abyssal.cli.progress import ConsoleWatcher, show_summary

    watcher = trainer.watcher
    assert isinstance(watcher, ConsoleWatcher)
    if page is not None:
        page.begin(trainer.run.path)
    watcher.begin(trainer)
    try:
        finished = trainer.train()
    finally:
        watcher.end()
    if page is not None:
        page.state = "finished" if finished else "stopped"
    if finished:
        show_summary(trainer, read_metrics(trainer.run.path / "metrics.jsonl"))
    return finished


class _Page:
    """The live page: its port is taken on entering, before anything is written; leaving tells it how training ended."""

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


class _stop_on_signal:
    """Ctrl-C and SIGTERM ask the trainer to stop after the step at hand; a second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def asked(self) -> bool:
        return bool(self.received)

    def __enter__(self) -> None:
        self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number: int, _: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received.append(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
