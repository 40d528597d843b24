"""A model trained on short windows, run on windows some times as long: with YaRN, and with a little training."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from abyssal.checkpoint import write_text
from abyssal.config import Config, ModelConfig, YarnConfig
from abyssal.data.shards import train_split
from abyssal.errors import UserError
from abyssal.exporting import export
from abyssal.lab.charts import curves
from abyssal.lab.experiment import Figures, Finding, Job, Lab, Results, Table, tuning
from abyssal.lab.measure import held_out, token_losses, windows
from abyssal.lab.recipe import LabRecipe
from abyssal.lab.statistics import against, spread, verdict
from abyssal.loading import load
from abyssal.model import Transformer
from abyssal.tuning.start import TUNE

AS_TRAINED, YARN, YARN_ON, PLAIN_ON = "as trained", "YaRN", "YaRN, trained on", "no YaRN, trained on"


class Settings(Config):
    """``factor``: how many times as long the windows get; ``steps`` of further training at ``rate``; ``tokens`` of
    held-out text to judge by."""

    factor: Annotated[int, Field(ge=2, le=1024)]
    steps: PositiveInt
    rate: PositiveFloat
    tokens: PositiveInt


class ContextLab(Lab):
    settings = Settings

    def check(self, recipe: LabRecipe) -> None:
        super().check(recipe)
        base, factor = recipe.recipe(None, 1), recipe.settings["factor"]
        config, long = base.model_config_resolved(), base.training.sequence_length * factor
        if long > config.max_position_embeddings:
            raise UserError(
                f"lab {recipe.name}: lab.factor: {factor} times {base.training.sequence_length} tokens are more than "
                f"the model's max_position_embeddings {config.max_position_embeddings}"
            )

    def common(self, job: Job) -> None:
        job.train(job.base())

    def run(self, job: Job) -> Figures:
        settings, recipe = job.lab.settings, job.base()
        path = job.train(recipe)
        short = recipe.training.sequence_length
        long = short * settings["factor"]
        model, tokenizer = load(path)
        assert tokenizer is not None
        if job.arm in (YARN, YARN_ON):
            model = _with_yarn(model, settings["factor"], short)
        if job.arm in (YARN_ON, PLAIN_ON):
            # Beside the runs, and named by the one that it comes of: another model never takes its place.
            yarn = "yarn" if job.arm == YARN_ON else "plain"
            folder = job.models / f"{path.name}-{yarn}-x{settings['factor']}"
            if not folder.is_dir():
                export(model, folder, tokenizer=tokenizer)
            text = _training_text(job, path)
            asked = {
                "method": "full",
                "training": {
                    "steps": settings["steps"],
                    "batch_size": max(recipe.training.batch_size // settings["factor"], 1),
                    "sequence_length": long,
                },
                "optimizer": {"lr": settings["rate"]},
                "balance": "none",
            }
            tuned = job.train(tuning(folder, text, recipe, asked), kind=TUNE)
            model, _ = load(tuned)
        shards = held_out(recipe, tokenizer)
        if len(shards) <= long:
            raise UserError(f"data: {len(shards)} held-out tokens; windows of {long} need more text")
        rows = windows(shards, long, settings["tokens"])
        losses = token_losses(model, rows)
        by_position = losses.mean(0)
        # The same tokens again, each window of the long ones cut in short ones: what lies further back is not seen.
        cut = torch.stack([row[i : i + short + 1] for row in rows for i in range(0, long, short)])
        pieces = token_losses(model, cut).view(len(rows), settings["factor"], short)
        bounds = [0]
        while bounds[-1] < long:
            bounds.append(min(max(2 * bounds[-1], short // 4), long))
        places = [f"{a}–{b - 1}" for a, b in pairwise(bounds)]
        values = [round(float(by_position[a:b].mean()), 5) for a, b in pairwise(bounds)]
        return {
            "places": places,
            "by_position": values,
            "short": round(float(pieces.mean()), 5),
            "long": round(float(losses.mean()), 5),
            "beyond": round(float(losses[:, short:].mean()), 5),
            "beyond_cut": round(float(pieces[:, 1:].mean()), 5),
        }

    def conclude(self, results: Results) -> Finding:
        arms = list(results.figures)
        beyond = {arm: results.of(arm, "beyond") for arm in arms}
        short = {arm: results.of(arm, "short") for arm in arms}
        factor, trained = results.lab.settings["factor"], results.lab.base["training"]["sequence_length"]
        cut, whole = results.of(AS_TRAINED, "beyond_cut"), beyond[AS_TRAINED]
        answer = [
            against(
                f"Trained on {trained} tokens and run on {factor * trained}, the model as it is has on what lies "
                f"beyond {trained} a loss that is",
                (f"windows of {trained} for the same tokens", cut),
                (f"windows of {factor * trained}", whole),
            ),
            against("Loss beyond the trained length", (AS_TRAINED, beyond[AS_TRAINED]), (YARN, beyond[YARN])),
            against("Loss on short text", (AS_TRAINED, short[AS_TRAINED]), (YARN, short[YARN])),
            against("Loss beyond the trained length", (YARN, beyond[YARN]), (YARN_ON, beyond[YARN_ON])),
            against("Loss beyond the trained length", (PLAIN_ON, beyond[PLAIN_ON]), (YARN_ON, beyond[YARN_ON])),
            against("Loss on short text", (AS_TRAINED, short[AS_TRAINED]), (YARN_ON, short[YARN_ON])),
        ]
        alone = verdict(beyond[AS_TRAINED], beyond[YARN], "raises", "lowers", "does not change")
        on = verdict(beyond[PLAIN_ON], beyond[YARN_ON], "higher than", "lower than", "no different from")
        summary = (
            f"Beyond the trained length YaRN alone {alone} the loss, as far as these seeds show; after a little "
            f"training it is {on} what the same training without YaRN gives."
        )
        places = results.of(arms[0], "places")[0]
        table = Table(
            "Loss by position, nats a token",
            ["model", *places, "short text alone"],
            [
                [
                    arm,
                    *(spread([one[i] for one in results.of(arm, "by_position")], 2) for i in range(len(places))),
                    spread(short[arm], 3),
                ]
                for arm in arms
            ],
        )
        charts = [
            curves(
                "Loss by position",
                list(range(len(places))),
                {arm: results.of(arm, "by_position") for arm in arms},
                across="position in the window",
                up="nats a token",
                ticks=places,
            )
        ]
        limits = [
            f"The training text is that of the short training, {results.lab.settings['steps']} steps of it; “no YaRN, "
            "trained on” tells what of the gain is the further training. Most of a head's dimensions here carry no "
            "position (MLA's decoupled rotary part is small), and text of this kind asks for little beyond a hundred "
            "tokens."
        ]
        return Finding(summary, answer, [table], charts, limits)


def _with_yarn(model: Transformer, factor: float, original: int) -> Transformer:
    """The same weights with DeepSeek-V3's YaRN settings: mscale = mscale_all_dim = 1."""
    yarn = YarnConfig(factor=factor, original_max_position_embeddings=original, mscale=1.0, mscale_all_dim=1.0)
    config: ModelConfig = model.config.model_copy(update={"rope": model.config.rope.model_copy(update={"yarn": yarn})})
    with torch.device("meta"):
        out = Transformer(config)
    out.load_state_dict(model.state_dict(), assign=True)
    return out.eval()


def _training_text(job: Job, base: Path) -> Path:
    """The split that models are trained on, as a file: what is held out must stay so."""
    data = job.base().data
    file = job.models / f"{base.name}-train.txt"
    if not file.is_file():
        documents = train_split(data.source, 0.0 if data.validation else data.validation_fraction, field=data.field)
        write_text(file, "\n<|endoftext|>\n".join(documents))
    return file


LAB = ContextLab()
