"""``abyssal tune``: fine-tunes a model on a data set, shows how it goes, and says at the end what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.cli.running import Running

if TYPE_CHECKING:
    from abyssal.training.trainer import Trainer
    from abyssal.tuning.recipe import TuneRecipe


def tune_command(
    model: Annotated[
        str | None,
        typer.Argument(help="A run, a model folder or a name on the hub; or a recipe, a YAML file. Not with --resume."),
    ] = None,
    data: Annotated[
        str | None, typer.Argument(help="Examples: .jsonl, .json, .parquet, .txt, or a data set on the hub.")
    ] = None,
    changes: Annotated[list[str] | None, typer.Argument(help="Settings: key=value or key.subkey=value …")] = None,
    method: Annotated[str | None, typer.Option(help="lora, full, or esft (the experts that the data uses).")] = None,
    weights: Annotated[
        str | None, typer.Option(help="What LoRA's frozen weights are kept in: dense, nf4 (QLoRA), int8 or int4.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA's rank.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/NAME.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the recipe, and stop.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Serve the run's report on this machine while it runs.")] = False,
    port: Annotated[
        int | None, typer.Option(help="Where --live serves it. Default: 8765, or any that is free; 0: any.")
    ] = None,
) -> None:
    """Fine-tune a model: LoRA, QLoRA, all of it, or only some experts; on answers, text, or preferences."""
    from abyssal.config import merge, parse_assignments
    from abyssal.errors import UserError
    from abyssal.training.recipe import to_yaml
    from abyssal.training.start import resume as resume_run
    from abyssal.training.start import run_recipe, start
    from abyssal.tuning.start import TUNE

    words = [word for word in (model, data) if word is not None]
    assignments = [word for word in words if "=" in word] + list(changes or [])
    words = [word for word in words if "=" not in word]
    settings = parse_assignments(assignments)
    options = {"method": method, "weights": weights}
    settings = merge(settings, {key: value for key, value in options.items() if value is not None})
    if rank is not None:
        settings = merge(settings, {"lora": {"rank": rank}})
    if resume is not None:
        if words:
            raise UserError(f"--resume {resume}: the run knows its model and data; leave {' '.join(words)} out")
        if overwrite or out is not None:
            raise UserError("--resume: continues in the run's own folder; leave --out and --overwrite out")
        recipe = run_recipe(resume, settings, kind=TUNE)
    else:
        recipe = _recipe(words, settings)
    if print_config:
        print(to_yaml(recipe), end="")
        return
    with Running(live, port) as running:

        def trainer() -> Trainer:
            if resume is not None:
                return resume_run(resume, None, settings, kind=TUNE, **running.options)
            return start(recipe, out or Path("runs") / recipe.name, kind=TUNE, overwrite=overwrite, **running.options)

        running.run(trainer, "tune", show=_show_start, finish=_show_end)


def _recipe(words: list[str], settings: dict[str, Any]) -> TuneRecipe:
    from abyssal.errors import UserError
    from abyssal.tuning.recipe import build_recipe

    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        if not Path(words[0]).is_file():
            raise UserError(f"recipe {words[0]}: no such file")
        return build_recipe(None, None, Path(words[0]), settings)
    if not words:
        raise UserError("which model, and which data? abyssal tune MODEL DATA, or a recipe: abyssal tune RECIPE.yaml")
    source = words[1] if len(words) > 1 else None
    named = isinstance(settings.get("data"), dict) and "source" in settings["data"]
    if source is None and not named:
        raise UserError(f"which data? abyssal tune {words[0]} DATA (.jsonl, .json, .parquet, .txt)")
    return build_recipe(words[0], source, None, settings)


def _show_start(trainer: Trainer) -> None:
    """What is trained, tensor by tensor."""
    from abyssal.cli.show import say
    from abyssal.tuning.start import TuneParts

    parts = trainer.parts
    assert isinstance(parts, TuneParts)
    lines = parts.adapted.lines() if parts.adapted is not None else []
    if parts.choice is not None:
        lines = parts.choice.lines(trainer.model)
    for line in lines:
        say(line)


def _show_end(trainer: Trainer) -> dict[str, Any]:
    """Routing drift; what is to be added to summary.json."""
    from abyssal.cli.show import say, show_table, table
    from abyssal.tuning.drift import figures, measure_drift
    from abyssal.tuning.start import TuneParts

    parts = trainer.parts
    assert isinstance(parts, TuneParts)
    if parts.before is None:
        return {}
    drifts = measure_drift(trainer.model, parts.before, trainer.dtype)
    out = table("routing drift, layer", "same experts", "same first", "total variation", "weight change")
    for layer, d in drifts.items():
        out.add_row(
            str(layer), f"{d.overlap:.1%}", f"{d.same_first:.1%}", f"{d.variation:.3f}", f"{d.weight_change:.3f}"
        )
    say("")
    show_table(out)
    say(f"{len(parts.before.texts.ids):,} held-out tokens, routed by the model as it was and as it is now")
    return {"drift": figures(drifts)}
