"""A model tuned on text of another kind, by several methods: how far its routing moves, there and on the old text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt

from abyssal.analysis.lens import look
from abyssal.analysis.specialisation import drift
from abyssal.checkpoint import write_text
from abyssal.config import Config, merge
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.lab.charts import points
from abyssal.lab.experiment import Figures, Finding, Job, Lab, Results, Table, tuning
from abyssal.lab.measure import held_out, texts_of, token_losses, windows
from abyssal.lab.recipe import LabRecipe
from abyssal.lab.statistics import against, change, difference, mean, spread
from abyssal.loading import load
from abyssal.tuning.start import TUNE

_HELD_OUT = 0.2


class Settings(Config):
    """``sums``: lines of the new text; ``steps`` of tuning; ``tokens`` of held-out text to judge by; ``methods``: by
    arm, what it changes in a tuning recipe."""

    sums: Annotated[int, Field(ge=200)]
    steps: PositiveInt
    tokens: PositiveInt
    methods: dict[str, dict[str, Any]]


class FinetuningLab(Lab):
    settings = Settings

    def check(self, recipe: LabRecipe) -> None:
        super().check(recipe)
        if recipe.recipe(None, 1).model_config_resolved().moe is None:
            raise UserError(f"lab {recipe.name}: model.moe: null; expected a model with experts")
        for arm in recipe.arms:
            if arm not in recipe.settings["methods"]:
                raise UserError(f"lab {recipe.name}: lab.methods: none for {arm!r}")

    def common(self, job: Job) -> None:
        job.train(job.base())

    def run(self, job: Job) -> Figures:
        assert job.arm is not None
        settings, recipe = job.lab.settings, job.base()
        base = job.train(recipe)
        before, tokenizer = load(base)
        assert tokenizer is not None
        file, kept = _texts(job)
        length = recipe.training.sequence_length
        asked = merge({"training": {"steps": settings["steps"]}}, settings["methods"][job.arm])
        tuned = job.train(tuning(base, file, recipe, asked), kind=TUNE)
        after, _ = load(tuned)
        out: Figures = {}
        for name, rows in (
            ("old", windows(held_out(recipe, tokenizer), length, settings["tokens"])),
            ("new", _rows(tokenizer, kept, length, settings["tokens"])),
        ):
            texts = texts_of(rows)
            was, now = look(before, texts), look(after, texts)
            moved = {str(layer): drift(was[layer], now[layer]) for layer in was}
            out[name] = {
                "loss_before": round(float(token_losses(before, rows).mean()), 5),
                "loss": round(float(token_losses(after, rows).mean()), 5),
                "moved": {layer: round(1 - found.overlap, 5) for layer, found in moved.items()},
                "load": {layer: round(found.variation, 5) for layer, found in moved.items()},
            }
        return out

    def conclude(self, results: Results) -> Finding:
        arms = list(results.figures)

        def moved(arm: str, text: str) -> list[float]:
            return [mean(list(found.values())) for found in results.of(arm, text, "moved")]

        def learned(arm: str, text: str) -> list[float]:
            return [
                b - a for a, b in zip(results.of(arm, text, "loss_before"), results.of(arm, text, "loss"), strict=True)
            ]

        most = max(arms, key=lambda arm: mean(moved(arm, "new")))
        least = min(arms, key=lambda arm: mean(moved(arm, "new")))
        answer = [
            against(
                "Choices of experts that change on the new text",
                (least, moved(least, "new")),
                (most, moved(most, "new")),
            )
        ]
        for arm in arms:
            here = difference(moved(arm, "old"), moved(arm, "new"))
            where = (
                f"{'more' if here.mean > 0 else 'less'} on the new text than on the old"
                if here.clear
                else "as much on the one text as on the other, as far as these seeds show"
            )
            answer.append(
                f"{arm}: {spread(moved(arm, 'new'), 2)} of the choices on the new text change, "
                f"{spread(moved(arm, 'old'), 2)} on the old ({where}); loss {change(learned(arm, 'new'), 2)} on the "
                f"new text, {change(learned(arm, 'old'), 2)} on the old."
            )
        layers = list(results.of(arms[0], "new", "moved")[0])
        trend = {
            arm: difference(
                *([found[layer] for found in results.of(arm, "new", "moved")] for layer in (layers[0], layers[-1]))
            )
            for arm in arms
        }
        deeper = [arm for arm in arms if trend[arm].low > 0]
        answer.append(
            "Routing moves more in the last layer than in the first with: "
            f"{', '.join(deeper) or 'none of the methods'}."
        )
        short = (
            "Routing moves with every method, also where the routers are frozen: on the new text "
            + ", ".join(f"{mean(moved(arm, 'new')):.0%} of the choices with {arm}" for arm in arms)
            + "."
            if all(min(moved(arm, "new")) > 0 for arm in arms)
            else "With a method at least routing did not move."
        )
        table = Table(
            "Before and after",
            [
                "method",
                "new text: nats before",
                "after",
                "choices moved",
                "old text: nats before",
                "after",
                "choices moved",
            ],
            [
                [
                    arm,
                    results.spread(arm, "new", "loss_before", digits=2),
                    results.spread(arm, "new", "loss", digits=2),
                    spread(moved(arm, "new"), 3),
                    results.spread(arm, "old", "loss_before", digits=2),
                    results.spread(arm, "old", "loss", digits=2),
                    spread(moved(arm, "old"), 3),
                ]
                for arm in arms
            ],
        )
        by_layer = Table(
            "Share of the choices on the new text that change, by layer",
            ["method", *(f"layer {layer}" for layer in layers)],
            [
                [arm, *(spread([found[layer] for found in results.of(arm, "new", "moved")], 3) for layer in layers)]
                for arm in arms
            ],
        )
        both = {f"{arm}, {text} text": moved(arm, text) for arm in arms for text in ("new", "old")}
        charts = [points("Choices that change", "share of a token's experts that are others after tuning", both)]
        limits = [
            "The new text is worked sums, nothing like the old one and much simpler than any real task. Rates differ "
            "by method (in the recipe below), and how much is learned differs with them: a method that learns less "
            "also moves less. Routers are trained with all weights, and frozen with LoRA and ESFT: there routing moves "
            "because what reaches the routers does."
        ]
        return Finding(short, answer, [table, by_layer], charts, limits)


def _texts(job: Job) -> tuple[Path, str]:
    """The new text: a file to tune on, and what is held out from its end."""
    text = sums(job.lab.settings["sums"])
    cut = text.index("\n", int(len(text) * (1 - _HELD_OUT))) + 1
    job.folder.mkdir(parents=True, exist_ok=True)
    file = job.folder / f"sums-{job.name}.txt"
    write_text(file, text[:cut])
    return file, text[cut:]


def sums(count: int) -> str:
    """So many lines of worked sums, always the same: text that is nothing like prose and comes with the package."""
    chosen = random.Random(0)
    lines = []
    for _ in range(count):
        a, b = chosen.randint(2, 99), chosen.randint(2, 99)
        sign, result = chosen.choice([("+", a + b), ("-", a - b), ("*", a * b)])
        lines.append(f"{a} {sign} {b} = {result}\n")
    return "".join(lines)


def _rows(tokenizer: Tokenizer, text: str, length: int, tokens: int) -> torch.Tensor:
    ids = tokenizer.encode(text)
    count = max(min(tokens, len(ids) - 1) // length, 1)
    return torch.tensor([ids[i * length : i * length + length + 1] for i in range(count)])


LAB = FinetuningLab()
