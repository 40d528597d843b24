"""A trained MHA model turned into MLA at several sizes of the cache (docs/upcycling.md says how)."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from abyssal.config import Config, merge
from abyssal.data.shards import train_split
from abyssal.lab.charts import curves
from abyssal.lab.experiment import Figures, Finding, Job, Lab, Results, Table
from abyssal.lab.measure import held_out, token_losses, windows
from abyssal.lab.statistics import against, change, mean, spread
from abyssal.loading import load
from abyssal.training.recipe import Recipe
from abyssal.upcycling import Settings, read_dense
from abyssal.upcycling.calibration import pieces
from abyssal.upcycling.conversion import Conversion

_HELD_OUT = 8


class ConversionSettings(Config):
    """``model``: what is changed in the model to make it dense with MHA; ``windows`` of the training text to convert
    by, ``fit`` steps for each layer (docs/upcycling.md), ``tokens`` of held-out text to judge by."""

    model: dict[str, Any]
    windows: PositiveInt
    fit: PositiveInt
    tokens: PositiveInt


class ConversionLab(Lab):
    settings = ConversionSettings

    def common(self, job: Job) -> None:
        job.train(self._dense(job))

    def run(self, job: Job) -> Figures:
        assert job.arm is not None
        chosen, recipe = job.lab.settings, self._dense(job)
        path: Path = job.train(recipe)
        length = recipe.training.sequence_length
        dense = read_dense(path)
        settings = Settings(
            cache=int(job.arm),
            windows=chosen["windows"],
            held_out=_HELD_OUT,
            length=length,
            fit=chosen["fit"],
            seed=job.seed,
        )
        training_text = train_split(recipe.data.source, recipe.data.validation_fraction, field=recipe.data.field)
        text = pieces(training_text, dense.tokenizer, windows=settings.windows, held_out=_HELD_OUT, length=length)
        conversion = Conversion(dense, settings, text, lambda what, done, of: job.check_stop())
        report = conversion.run([dense.tokenizer.decode(row) for row in text.held_out.tolist()])
        rows = windows(held_out(recipe, dense.tokenizer), length, chosen["tokens"])
        loaded, _ = load(path)
        stages = list(report.layers[0].attention)
        return {
            "cached_before": report.cached_before,
            "cached": report.cached_after,
            "loss_before": round(float(token_losses(loaded, rows).mean()), 5),
            "loss": round(float(token_losses(conversion.new, rows).mean()), 5),
            "cosine": {stage: round(mean([layer.attention[stage] for layer in report.layers]), 5) for stage in stages},
            "least": {stage: round(min(layer.attention[stage] for layer in report.layers), 5) for stage in stages},
        }

    def conclude(self, results: Results) -> Finding:
        arms = list(results.figures)
        before = results.of(arms[0], "cached_before")[0]
        cached = [results.of(arm, "cached")[0] for arm in arms]
        added = {
            arm: [b - a for a, b in zip(results.of(arm, "loss_before"), results.of(arm, "loss"), strict=True)]
            for arm in arms
        }
        stages = list(results.of(arms[0], "cosine")[0])
        last = stages[-1]
        cosine = {arm: results.of(arm, "cosine", last) for arm in arms}
        good = [arm for arm in arms if mean(cosine[arm]) > 0.95]
        answer = [
            f"The dense model caches {before} values a token and layer. With {cached[0]} the converted one's loss "
            f"differs from the dense one's by {change(added[arms[0]], 3)} nats, with {cached[-1]} by "
            f"{change(added[arms[-1]], 3)}.",
        ]
        if good:
            smallest = min(good, key=int)
            answer.append(
                f"The smallest cache with a mean cosine above 0.95 between the attention outputs is {smallest} values, "
                f"{before / int(smallest):.1f} times smaller ({spread(cosine[smallest], 3)}; loss "
                f"{change(added[smallest], 3)} nats, perplexity × {_ratio(added[smallest])})."
            )
        else:
            answer.append("No size has a mean cosine above 0.95 between the attention outputs.")
        if last == "fitted":
            unfitted = [mean(one) for one in zip(*(results.of(arm, "cosine", "norm in") for arm in arms), strict=True)]
            fitted = [mean(one) for one in zip(*(cosine[arm] for arm in arms), strict=True)]
            pair = ("the conversion alone", unfitted), ("each layer fitted", fitted)
            answer.append(against("Cosine, mean over sizes", *pair, digits=4))
        short = (
            f"A cache {before / int(min(good, key=int)):.1f} times smaller keeps the attention outputs at a cosine "
            f"above 0.95 and changes the loss by {change(added[min(good, key=int)], 3)} nats, with no training."
            if good
            else "At no size do the attention outputs keep a cosine above 0.95."
        )
        table = Table(
            "By the values that a token and layer cache",
            [
                "cache",
                "times smaller",
                *(f"cosine, {stage}" for stage in stages),
                "least of the layers",
                "nats added",
                "perplexity ×",
            ],
            [
                [
                    f"{size}",
                    f"{before / size:.1f}",
                    *(results.spread(arm, "cosine", stage) for stage in stages),
                    results.spread(arm, "least", last),
                    change(added[arm], 3),
                    _ratio(added[arm]),
                ]
                for arm, size in zip(arms, cached, strict=True)
            ],
        )
        seeds = range(len(results.of(arms[0], "loss")))
        charts = [
            curves(
                "Cosine of the attention outputs, dense and converted, for the dense model's inputs",
                cached,
                {stage: [[results.of(arm, "cosine", stage)[s] for arm in arms] for s in seeds] for stage in stages},
                across="cached values a token and layer",
                up="mean over layers",
            ),
            curves(
                "Loss added by the conversion",
                cached,
                {"fitted, not trained on": [[added[arm][s] for arm in arms] for s in seeds]},
                across="cached values a token and layer",
                up="nats a token",
            ),
        ]
        limits = [
            "Without any training of the whole model afterwards, which takes most of the loss back "
            "(docs/upcycling.md has it for SmolLM2). A model of four layers that has seen little text is easier and "
            "harder to convert than a real one in ways that this does not separate."
        ]
        return Finding(short, answer, [table], charts, limits)

    @staticmethod
    def _dense(job: Job) -> Recipe:
        # The attention of the settings takes the place of MLA's, instead of being laid over it.
        plain = job.lab.model_copy(update={"base": merge(job.lab.base, {"model": {"attention": None}})})
        return plain.recipe(None, job.seed, {"model": job.lab.settings["model"], "balance": "none"})


def _ratio(added: list[float]) -> str:
    return spread([exp(value) for value in added], 2)


LAB = ConversionLab()
