"""What an experiment found, as a page, as Markdown, and as numbers."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from abyssal.analysis.page import style
from abyssal.checkpoint import write_text
from abyssal.errors import UserError
from abyssal.lab.experiment import Finding, Results, Table
from abyssal.lab.recipe import LabRecipe

PAGE, MARKDOWN, NUMBERS = "report.html", "README.md", "figures.json"
MARK = 'id="abyssal-lab"'


def write_report(
    results: Results,
    finding: Finding,
    folder: Path,
    *,
    command: str,
    machine: dict[str, Any],
    spent: tuple[float, float],
) -> list[Path]:
    """Writes report.html, README.md with its charts, and figures.json into ``folder``, over an earlier report of the
    same experiment; returns the files. Raises UserError where something else is in their places."""
    check_place(folder, results.lab.name)
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "lab": results.lab.name,
        "command": command,
        "machine": machine,
        "seconds": {"processor": round(spent[0], 1), "clock": round(spent[1], 1)},
        "recipe": results.lab.model_dump(),
        "figures": results.figures,
    }
    if (folder / PAGE).exists():  # ours, and so its charts
        for old in folder.glob("chart-[0-9]*.svg"):
            old.unlink()
    files = {
        folder / PAGE: _page(results, finding, command, machine, spent),
        folder / MARKDOWN: _markdown(results, finding, command, machine, spent),
        folder / NUMBERS: json.dumps(told, indent=1, default=str) + "\n",
    }
    for number, chart in enumerate(finding.charts, start=1):
        files[folder / f"chart-{number}.svg"] = chart.on_white() + "\n"
    for file, text in files.items():
        write_text(file, text)
    return list(files)


def check_place(folder: Path, name: str, option: str = "--report") -> None:
    """Raises UserError, naming ``option``, where a report on the experiment ``name`` cannot go into ``folder`` without
    loss."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option}: {folder} is a file; expected a folder")
    page, numbers = folder / PAGE, folder / NUMBERS
    if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace")[:100_000]:
        raise UserError(f"{option}: {page} exists and is no lab's report; choose another folder")
    readme = folder / MARKDOWN
    if readme.exists() and not page.exists():
        raise UserError(f"{option}: {readme} exists and is no lab's report; choose another folder")
    if numbers.exists():
        try:
            there = json.loads(numbers.read_text(encoding="utf-8"))["lab"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{option}: {numbers} exists and is no lab's; choose another folder") from None
        if there != name:
            raise UserError(f"{option}: {folder} holds the report on lab {there}; choose another folder")


def _page(results: Results, finding: Finding, command: str, machine: dict[str, Any], spent: tuple[float, float]) -> str:
    say = html.escape
    parts = [f"<p><strong>{say(finding.short)}</strong></p>"]
    parts += [f"<p>{say(sentence)}</p>" for sentence in finding.answer]
    for number, chart in enumerate(finding.charts, start=1):
        parts.append(f"<figure><figcaption>{say(chart.title)}</figcaption>{chart.inside(f'c{number}-')}</figure>")
    for table in finding.tables:
        head = "".join(f"<th>{say(cell)}</th>" for cell in table.columns)
        rows = "".join("<tr>" + "".join(f"<td>{say(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
        parts.append(f"<h3>{say(table.title)}</h3><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
    limits = "".join(f"<li>{say(limit)}</li>" for limit in [*finding.limits, *_always(results)])
    made = "".join(f"<tr><td>{say(name)}</td><td>{say(value)}</td></tr>" for name, value in _made(machine, spent))
    recipe = yaml.safe_dump(results.lab.model_dump(), sort_keys=False, allow_unicode=True, width=100)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>abyssal lab: {say(results.lab.name)}</title>
<style>
{style()}
main {{ max-width: 60rem; margin: 0 auto; }}
figure {{ margin: 1.5rem 0; }}
figure svg {{ width: 100%; height: auto; }}
figcaption {{ font-weight: 600; }}
table td:first-child {{ white-space: normal; }}
</style>
</head>
<body>
<main {MARK}>
<h1>{say(results.lab.question)}</h1>
<p class="dim">abyssal lab {say(results.lab.name)}: {arms_of(results.lab)}, {results.lab.seeds} seeds each</p>
<h2>Finding</h2>
{chr(10).join(parts)}
<h2>What this does not show</h2>
<ul>{limits}</ul>
<h2>How it was made</h2>
<pre>{say(command)}</pre>
<table><tbody>{made}</tbody></table>
<h3>Recipe</h3>
<pre>{say(recipe)}</pre>
</main>
</body>
</html>
"""


def _markdown(
    results: Results, finding: Finding, command: str, machine: dict[str, Any], spent: tuple[float, float]
) -> str:
    lines = [f"# {results.lab.question}", "", f"**{finding.short}**", "", *_paragraphs(finding.answer)]
    for number, chart in enumerate(finding.charts, start=1):
        lines += [f"![{chart.title}](chart-{number}.svg)", ""]
    for table in finding.tables:
        lines += [f"**{table.title}**", "", *_rows(table), ""]
    lines += ["## What this does not show", "", *(f"- {line}" for line in [*finding.limits, *_always(results)]), ""]
    lines += ["## How it was made", "", "```bash", command, "```", ""]
    lines += [f"- {name}: {value}" for name, value in _made(machine, spent)]
    lines += [
        "",
        f"The page of it is [{PAGE}]({PAGE}); every seed's figures and the recipe are in [{NUMBERS}]({NUMBERS}).",
    ]
    return "\n".join(lines) + "\n"


def _paragraphs(sentences: list[str]) -> Iterator[str]:
    for sentence in sentences:
        yield sentence
        yield ""


def _rows(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(table.columns)} |"
    yield f"| --- |{' ---: |' * (len(table.columns) - 1)}"
    for row in table.rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def arms_of(recipe: LabRecipe) -> str:
    """How many arms there are, in words."""
    return f"{len(recipe.arms)} arms" if len(recipe.arms) > 1 else "1 arm"


def _always(results: Results) -> list[str]:
    seeds = results.lab.seeds
    return [
        f"Small models, little text, {seeds} seeds: what holds at this size need not hold at another. ±, bars and "
        "bands are one standard deviation over seeds; arms are compared seed by seed, and are said to differ where the "
        "95% interval "
        f"of their difference (Student's t, degrees of freedom: {seeds - 1}) leaves out 0. Intervals are not corrected "
        "for their number, and where the largest is compared with the smallest, the same figures have chosen them, "
        "which makes a difference look clearer than it is."
    ]


def _made(machine: dict[str, Any], spent: tuple[float, float]) -> list[tuple[str, str]]:
    busy, clock = spent
    minutes = (
        f"{busy / 60:.0f} minutes of one core in all (by the clock {clock / 60:.0f}, jobs side by side each counted)"
    )
    shown = ("device_name", "cores", "abyssal", "torch", "python")
    named = [(name.replace("_", " "), str(machine[name])) for name in shown if machine.get(name) is not None]
    return [("time", minutes), *named]
