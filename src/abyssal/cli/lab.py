"""``abyssal lab``: an experiment, from its runs to its report."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from abyssal.lab.conduct import Watcher


def lab_command(
    name: Annotated[str | None, typer.Argument(help="Which experiment; without, all are listed.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="Changes of its training recipe: key.subkey=value …; of its own settings: lab.key=value."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Its folder; what is trained goes to models/ beside it. Default: runs/lab/NAME.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Where the report goes: a folder. Default: the experiment's own.")
    ] = None,
    size: Annotated[str, typer.Option(help="cpu: minutes on 2 cores; gpu: a larger model and more text.")] = "cpu",
    seeds: Annotated[
        int | None, typer.Option(help="How many seeds. Default: 3. More later continue where 3 ended.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Jobs at a time. Default: one a core; on a GPU one.")] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Drop the figures that are there (what was trained is used again where it fits)."
        ),
    ] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show what would run, and stop.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
) -> None:
    """Run an experiment on small models over several seeds, and write a report with its finding. Stopped, the same
    command goes on."""
    from abyssal.cli.show import say
    from abyssal.config import parse_assignments
    from abyssal.errors import UserError
    from abyssal.lab.recipe import lab_names, question_of, read_lab

    if name is None:
        for known in lab_names():
            say(f"{known:<16}{question_of(known)}")
        return
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs: {jobs} is not valid; expected a whole number from 1")
    recipe = read_lab(name, size=size, seeds=seeds, changes=parse_assignments(list(changes or [])))
    if print_config:
        import yaml

        print(yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True, width=100), end="")
        return
    from abyssal.lab.conduct import check_folder, conduct, device_of, machine_of, time_spent
    from abyssal.lab.experiments import lab_of
    from abyssal.lab.report import PAGE, arms_of, check_place, write_report

    folder = out or Path("runs/lab") / name
    place = report or folder
    check_folder(folder)
    lab_of(name).check(recipe)
    check_place(place, name, "--out" if report is None else "--report")
    say(f"{recipe.question}\n{arms_of(recipe)}, {recipe.seeds} seeds; folder {folder}")
    if size == "gpu" and device_of(recipe).type == "cpu":
        say("no GPU here: at this size one job takes many hours")
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # stops as Ctrl-C does
    try:
        results = conduct(recipe, folder, jobs=jobs, overwrite=overwrite, watch=_watcher())
    except KeyboardInterrupt:
        say(f"stopped; what is done is in {folder}; the same command goes on")
        raise typer.Exit(130) from None
    finding = lab_of(name).conclude(results)
    asked = shlex.join(["abyssal", "lab", name, *(changes or [])])
    asked += "".join(
        f" --{key} {value}" for key, value in (("size", size), ("seeds", seeds)) if value not in (None, "cpu")
    )
    write_report(
        results,
        finding,
        place,
        command=asked,
        machine=machine_of(folder),
        spent=time_spent(recipe, folder),
    )
    say("")
    for sentence in (finding.short, *finding.answer):
        say(sentence)
    say(f"\nreport  {place / PAGE}")
    if open_:
        import webbrowser

        if not webbrowser.open((place / PAGE).resolve().as_uri()):
            say("no browser was found here; open the file in one")


def _watcher() -> Watcher:
    """Says every job that is done, and how long the rest will take at this pace."""
    from abyssal.cli.show import duration, say

    began = time.monotonic()
    before, told = 0, list[int]()

    def watch(done: int, of: int, what: str, seconds: float) -> None:
        nonlocal before
        if seconds == 0:
            before += 1
            if done == of:
                say("all jobs were done before")
            return
        left = (time.monotonic() - began) / (done - before) * (of - done)
        # The first jobs side by side all count as one while the others of them still run.
        rest = f"; about {duration(left)} left" if before + 3 <= done < of else ""
        if before and not told:
            told.append(before)
            say(f"{before} of {of} jobs were done before")
        say(f"{done:>3}/{of}  {what}: {duration(seconds)}{rest}")

    return watch
