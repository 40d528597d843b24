"""A model in training, looked at again and again: what its routers' choices depend on."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt

from abyssal.analysis.lens import LayerRouting, look
from abyssal.analysis.specialisation import drift, information, position_bins
from abyssal.checkpoint import read_tensors, write_tensors
from abyssal.config import Config
from abyssal.errors import UserError
from abyssal.lab.charts import curves
from abyssal.lab.experiment import Figures, Finding, Job, Lab, Results, Table
from abyssal.lab.measure import held_out, texts_of, token_losses, windows
from abyssal.lab.recipe import LabRecipe
from abyssal.lab.statistics import against, difference, mean, signed, spread, verdict
from abyssal.training.trainer import Trainer


class Settings(Config):
    """``at``: when the routers are looked at, as shares of all steps; ``tokens``: on how many held-out tokens."""

    at: list[Annotated[float, Field(ge=0, le=1)]] = Field(min_length=1)
    tokens: PositiveInt


class Specialisation(Lab):
    settings = Settings

    def check(self, recipe: LabRecipe) -> None:
        super().check(recipe)
        if recipe.recipe(None, 1).model_config_resolved().moe is None:
            raise UserError(f"lab {recipe.name}: model.moe: null; expected a model with experts")

    def run(self, job: Job) -> Figures:
        recipe = job.recipe()
        steps = recipe.training.steps
        at = sorted({round(share * steps) for share in job.lab.settings["at"]} | {steps})

        def keep(trainer: Trainer) -> None:
            """Losses and choices now; what they mean is worked out when all are there."""
            rows = windows(
                held_out(recipe, trainer.tokenizer), recipe.training.sequence_length, job.lab.settings["tokens"]
            )
            seen = look(trainer.model, texts_of(rows))
            tensors = {f"{layer}.indices": torch.from_numpy(found.indices) for layer, found in seen.items()}
            tensors |= {f"{layer}.weights": torch.from_numpy(found.weights) for layer, found in seen.items()}
            tensors["loss"] = token_losses(trainer.model, rows).mean().reshape(1)
            tensors["ids"] = torch.from_numpy(texts_of(rows).ids)
            place = trainer.run.path / "looks"
            place.mkdir(exist_ok=True)
            write_tensors(tensors, place / f"{trainer.done:06d}.safetensors")

        salt = f"watched {at} {job.lab.settings['tokens']}"
        place = job.train(recipe, pauses=at, at=keep, salt=salt) / "looks"
        return _figures(recipe.model_config_resolved().moe.n_routed_experts, at, place, recipe.training.sequence_length)  # type: ignore[union-attr]

    def conclude(self, results: Results) -> Finding:
        (arm,) = results.figures
        steps = results.of(arm, "steps")[0]
        layers = list(results.of(arm, "token")[0])
        by_layer = {
            layer: [found[layer] for found in results.of(arm, "token")] for layer in layers
        }  # layer -> seed -> step
        token = [[mean(column) for column in zip(*found.values(), strict=True)] for found in results.of(arm, "token")]
        final = [[mean(column) for column in zip(*found.values(), strict=True)] for found in results.of(arm, "overlap")]
        loss = results.of(arm, "loss")
        chance = results.of(arm, "chance")[0]
        answer = [
            f"Before training a token alone tells {spread([one[0] for one in token], 2)} of what could be told of its "
            f"experts (a random router is a function of the token already), at the end "
            f"{spread([one[-1] for one in token], 2)}."
        ]
        change = difference([one[0] for one in token], [one[-1] for one in token])
        answer.append(
            f"Over training this share {'rises' if change.mean > 0 else 'falls'} ({signed(change.mean, 2)}, 95% "
            f"interval {change.interval(2)})."
            if change.clear
            else f"Over training these seeds show no change of it ({signed(change.mean, 2)}, 95% interval "
            f"{change.interval(2)})."
        )
        settled = [_half(steps, one, chance) for one in final]
        fallen = [_half(steps, [-value for value in one], -one[0]) for one in loss]
        if None in settled or None in fallen:
            answer.append("In a seed at least the loss did not fall, or routing ended no further from chance.")
        else:
            halves = [float(step) for step in settled if step is not None]
            fell = [float(step) for step in fallen if step is not None]
            answer.append(
                f"Half of the way from chance ({chance:.2f}) to the final choices is gone by step {spread(halves, 0)} "
                f"of {steps[-1]}, half of the fall in loss by step {spread(fell, 0)}. "
                + against(
                    "The step at which half is done",
                    ("the loss", fell),
                    ("routing", halves),
                    digits=0,
                    words=("later", "earlier"),
                )
            )
        first, last = layers[0], layers[-1]
        ends = {layer: [one[-1] for one in by_layer[layer]] for layer in layers}
        if first != last:
            apart = difference(ends[first], ends[last])
            answer.append(
                f"At the end the token tells {'more' if apart.mean < 0 else 'less'} of the choice in layer {first} "
                f"({mean(ends[first]):.2f}) than in layer {last} ({mean(ends[last]):.2f})."
                if apart.clear
                else f"Between layer {first} ({mean(ends[first]):.2f}) and layer {last} ({mean(ends[last]):.2f}) these "
                "seeds show no difference in how much the token tells."
            )
        grows = verdict(
            [one[0] for one in token],
            [one[-1] for one in token],
            "come to follow the token itself",
            "come to depend less on the token itself",
            "depend on the token itself as they did at first",
        )
        before, after = mean([one[0] for one in token]), mean([one[-1] for one in token])
        short = f"Over training experts {grows}: it tells {before:.2f} of the choice at first, {after:.2f} at the end."
        rows = []
        for number, step in enumerate(steps):
            cells = [spread([one[number] for one in by_layer[layer]], 2) for layer in layers]
            rows.append(
                [
                    f"{step}",
                    spread([one[number] for one in loss], 3),
                    *cells,
                    spread([one[number] for one in final], 2),
                ]
            )
        table = Table(
            "While training",
            [
                "step",
                "held-out loss",
                *(f"token tells, layer {layer}" for layer in layers),
                "same experts as at the end",
            ],
            rows,
        )
        charts = [
            curves(
                "How much of the choice the token alone tells",
                steps,
                {f"layer {layer}": by_layer[layer] for layer in layers},
                across="step",
                up="share of what could be told",
                log_x=True,
            ),
            curves(
                "How many of a token's experts are those of the end",
                steps,
                {f"layer {layer}": [found[layer] for found in results.of(arm, "overlap")] for layer in layers},
                across="step",
                up="share",
                log_x=True,
            ),
            curves(
                "What position tells of the choice",
                steps,
                {f"layer {layer}": [found[layer] for found in results.of(arm, "position")] for layer in layers},
                across="step",
                up="bits",
                log_x=True,
            ),
        ]
        limits = [
            "One kind of text. What the token tells is mutual information less what chance gives with as many tokens "
            "(docs/looking.md); what is not told by the token comes of its context."
        ]
        return Finding(short, answer, [table], charts, limits)


def _figures(experts: int, at: list[int], place, length: int) -> Figures:  # type: ignore[no-untyped-def]
    snapshots = [read_tensors(place / f"{step:06d}.safetensors") for step in at]
    layers = sorted({int(name.split(".")[0]) for name in snapshots[0] if name.endswith(".indices")})
    ids = snapshots[0]["ids"].numpy()
    position = position_bins(np.tile(np.arange(length), len(ids) // length))
    found: Figures = {
        "steps": at,
        "loss": [round(float(one["loss"][0]), 4) for one in snapshots],
        "chance": snapshots[0][f"{layers[0]}.indices"].shape[1] / experts,
        "token": {},
        "position": {},
        "overlap": {},
    }
    nothing = np.zeros(len(ids), np.float32)
    for layer in layers:
        seen = [
            LayerRouting(
                layer,
                0,
                experts,
                1,
                one[f"{layer}.indices"].numpy(),
                one[f"{layer}.weights"].numpy(),
                None,
                nothing,
                nothing,
            )
            for one in snapshots
        ]
        rng = np.random.default_rng(0)
        of_token = [information(ids, one.indices.astype(np.int64), experts, rng) for one in seen]
        of_place = [information(position, one.indices.astype(np.int64), experts, rng) for one in seen]
        found["token"][str(layer)] = [round(one.share or 0.0, 4) for one in of_token]
        found["position"][str(layer)] = [round(one.bits, 4) for one in of_place]
        found["overlap"][str(layer)] = [round(drift(one, seen[-1]).overlap, 4) for one in seen]
    return found


def _half(steps: list[int], values: list[float], begin: float) -> float | None:
    """The step at which ``values`` have gone half of the way from ``begin`` to their last, between two looks along a
    straight line; None where they end no higher."""
    goal = (begin + values[-1]) / 2
    if values[-1] <= begin:
        return None
    for i, value in enumerate(values):
        if value >= goal:
            if i == 0:
                return float(steps[0])
            low = values[i - 1]
            return steps[i - 1] + (steps[i] - steps[i - 1]) * (goal - low) / (value - low)
    return float(steps[-1])


LAB = Specialisation()
