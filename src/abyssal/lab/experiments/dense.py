"""MoE beside dense models that have as many active parameters, as many in all, or as much time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import median
from typing import Annotated

from pydantic import Field

from abyssal.analysis.flops import count_flops
from abyssal.analysis.parameters import count_parameters
from abyssal.checkpoint import write_text
from abyssal.checkpoint.run import read_metrics
from abyssal.config import Config
from abyssal.errors import UserError
from abyssal.lab.charts import points
from abyssal.lab.experiment import Figures, Finding, Job, Lab, Results, Table
from abyssal.lab.measure import run_figures
from abyssal.lab.recipe import LabRecipe
from abyssal.lab.statistics import against, mean, spread, verdict
from abyssal.training.start import start
from abyssal.training.trainer import Trainer


class Settings(Config):
    """``timed``: arms that train for as many steps as fit into the time of ``against``. A step's time is measured in
    turn: ``rounds`` times ``steps_a_round`` steps of each; the first round does not count."""

    timed: list[str]
    against: str
    rounds: Annotated[int, Field(ge=2, le=1000)]
    steps_a_round: Annotated[int, Field(ge=1, le=1000)]


class Dense(Lab):
    settings = Settings

    def check(self, recipe: LabRecipe) -> None:
        super().check(recipe)
        for arm in (recipe.settings["against"], *recipe.settings["timed"]):
            if arm not in recipe.arms:
                raise UserError(f"lab {recipe.name}: lab: {arm!r} is no arm; the arms: {'; '.join(recipe.arms)}")

    def common(self, job: Job) -> None:
        """How long a step of each arm takes, measured in turn: ``rounds`` times some steps of one, then of the next."""
        settings = job.lab.settings
        timed = {arm: job.lab.recipe(arm, job.seed) for arm in (settings["against"], *settings["timed"])}
        folder = job.folder / "pace" / f"seed{job.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        due, running = [0], [""]
        trainers: dict[str, Trainer] = {}
        for number, (arm, recipe) in enumerate(timed.items()):
            trainers[arm] = start(
                recipe, folder / str(number), should_stop=lambda: job.stop() or trainers[running[0]].done >= due[0]
            )
        for _ in range(settings["rounds"]):
            due[0] += settings["steps_a_round"]
            for arm, trainer in trainers.items():
                running[0] = arm
                trainer.train()
                job.check_stop()
        pace = {}
        for number, arm in enumerate(timed):
            records = read_metrics(folder / str(number) / "metrics.jsonl")
            times = [record["step_time"] for record in records if record["kind"] == "train"]
            pace[arm] = median(times[settings["steps_a_round"] :])  # the first round warms up
        shutil.rmtree(folder)
        write_text(_pace_file(job), json.dumps(pace) + "\n")

    def run(self, job: Job) -> Figures:
        settings = job.lab.settings
        recipe = job.recipe()
        ratio = None
        if job.arm in settings["timed"]:
            if not _pace_file(job).is_file():
                self.common(job)
            pace = json.loads(_pace_file(job).read_text(encoding="utf-8"))
            ratio = pace[settings["against"]] / pace[job.arm]
            recipe = job.recipe({"training": {"steps": max(round(recipe.training.steps * ratio), 1)}})
        config = recipe.model_config_resolved()
        counts = count_parameters(config)
        found = run_figures(job.train(recipe))
        found.pop("cv_curve", None)
        flops = count_flops(config, recipe.training.sequence_length).forward
        return found | {"parameters": counts.total, "active": counts.active, "flops": flops, "steps_ratio": ratio}

    def conclude(self, results: Results) -> Finding:
        arms = list(results.figures)
        moe, others = arms[0], arms[1:]
        loss = {arm: results.of(arm, "loss") for arm in arms}
        answer = [against("Validation loss", (arm, loss[arm]), (moe, loss[moe]), digits=4) for arm in others]
        for arm in results.lab.settings["timed"]:
            ratios = results.of(arm, "steps_ratio")
            answer.append(
                f"In the time of a step of {moe}, measured in turn on this machine, {spread(ratios, 2)} steps are done "
                f"of “{arm}”."
            )
        said = [verdict(loss[arm], loss[moe], "higher than", "lower than", "no different from") for arm in others]
        beside = "; ".join(f"{word} that of “{arm}”" for arm, word in zip(others, said, strict=True))
        short = f"{moe}'s loss, as far as these seeds show, is {beside}."
        table = Table(
            "MoE and dense",
            ["model", "parameters", "active", "forward MFLOP a token", "steps", "validation, nats a token"],
            [
                [
                    arm,
                    f"{results.of(arm, 'parameters')[0]:,}",
                    f"{results.of(arm, 'active')[0]:,}",
                    f"{results.of(arm, 'flops')[0] / 1e6:.2f}",
                    f"{mean(results.of(arm, 'steps')):.0f}",
                    results.spread(arm, "loss", digits=4),
                ]
                for arm in arms
            ],
        )
        charts = [points("Loss at the end", "validation loss, nats a token", loss)]
        limits = [
            "One learning rate for all. Time is that of this machine and of this package's steps: small experts keep a "
            "CPU less busy than one wide matrix does, and a GPU still less. It is measured while other jobs run, so "
            "that the timed arms' steps do not come out the same again. A longer schedule also sees more of the text "
            "again."
        ]
        return Finding(short, answer, [table], charts, limits)


def _pace_file(job: Job) -> Path:
    return job.folder / f"pace-seed{job.seed}.json"


LAB = Dense()
