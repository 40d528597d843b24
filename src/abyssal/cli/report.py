"""``abyssal report``: a run, or several beside each other, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    runs: Annotated[list[Path], typer.Argument(help="A run folder; several are laid over each other.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file. Default: report.html in the run folder; of several runs, in this one."),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write what a run did, or how runs differ, into one HTML file: curves, experts, samples, config."""
    from abyssal.analysis.report import report
    from abyssal.checkpoint.run import Run
    from abyssal.cli.files import check_free, write_page

    for run in runs:
        Run(run)  # before --out: a folder that is no run is the likelier mistake
    file = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    check_free(file, "--out", b'id="abyssal-report"')
    write_page(file, "--out", report(runs), "report", open_)
