"""``abyssal train``: runs a recipe, shows how it goes, and says at the end what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.cli.running import Running

if TYPE_CHECKING:
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
    if recipe is None and (resume is None or resume == "auto"):
        from abyssal.training.recipe import recipe_names

        raise UserError(f"which recipe? A YAML file or one of: {', '.join(recipe_names())}")
    chosen = read_recipe(recipe, settings) if recipe is not None else None
    if print_config:
        from abyssal.training.start import run_recipe

        shown = chosen if chosen is not None else run_recipe(Path(resume or ""), settings)
        print(to_yaml(shown, resolved=True), end="")
        return
    with Running(live, port) as running:
        running.run(lambda: _trainer(chosen, settings, out, resume, overwrite, running.options), "train")


def _trainer(
    recipe: Recipe | None,
    settings: dict[str, Any],
    out: Path | None,
    resume: str | None,
    overwrite: bool,
    options: dict[str, Any],
) -> Trainer:
    from abyssal.checkpoint.run import MANIFEST
    from abyssal.distributed.launch import restarted
    from abyssal.training.start import newest_run, start
    from abyssal.training.start import resume as resume_run

    if resume is None:
        assert recipe is not None
        path = out or Path("runs") / recipe.name
        if restarted() and (path / MANIFEST).is_file():
            return resume_run(path, recipe, **options)  # torchrun began anew: a process had died
        return start(recipe, path, overwrite=overwrite, **options)
    if resume == "auto":
        assert recipe is not None
        path = newest_run(out.parent if out else Path("runs"), recipe)
    else:
        path = Path(resume)
    return resume_run(path, recipe, settings if recipe is None else None, **options)
