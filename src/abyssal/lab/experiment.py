"""An experiment's parts: jobs (one arm with one seed), their figures together, and what is concluded from them.

A :class:`Lab` says how a job is run and what follows from all jobs' figures; :mod:`abyssal.lab.conduct` runs the jobs,
:mod:`abyssal.lab.report` writes down what came of it. Conclusions are made from figures alone, by rules written before
the runs (:mod:`abyssal.lab.statistics`): "no difference" is one of them.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from abyssal.checkpoint.run import MANIFEST, Run
from abyssal.config import Config, merge, parse
from abyssal.data.corpus import corpus_fingerprint
from abyssal.lab.charts import Chart
from abyssal.lab.recipe import LabRecipe
from abyssal.lab.statistics import mean, spread
from abyssal.training.prepare import corpus_id
from abyssal.training.recipe import Recipe, RunRecipe
from abyssal.training.start import TRAIN, Kind, resume, start
from abyssal.training.trainer import Trainer
from abyssal.tuning.recipe import TuneRecipe, build_recipe

Figures = dict[str, Any]
"""What a job found: anything that JSON can say."""


class Stopped(Exception):
    """The user asked to stop; what was trained is saved."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


@dataclass(frozen=True)
class Job:
    """One arm with one seed. ``folder`` is the experiment's, for what its jobs keep; ``models`` that of the runs, which
    experiments share. ``arm`` None: what the arms of a seed have in common."""

    lab: LabRecipe
    arm: str | None
    seed: int
    folder: Path
    models: Path
    stop: Callable[[], bool] = never

    @property
    def name(self) -> str:
        """A file's name that no other job has."""
        arm = "common" if self.arm is None else f"{list(self.lab.arms).index(self.arm):02d}"
        return f"{arm}-seed{self.seed}"

    def check_stop(self) -> None:
        """Raises Stopped where the user has asked for it: for places where nothing would be lost."""
        if self.stop():
            raise Stopped

    def recipe(self, changes: dict[str, Any] | None = None) -> Recipe:
        """The arm's training recipe."""
        return self.lab.recipe(self.arm, self.seed, changes)

    def base(self, changes: dict[str, Any] | None = None) -> Recipe:
        """The training recipe without the arm's changes."""
        return self.lab.recipe(None, self.seed, changes)

    def train(
        self,
        recipe: RunRecipe,
        *,
        kind: Kind = TRAIN,
        pauses: Sequence[int] = (),
        at: Callable[[Trainer], None] | None = None,
        salt: str = "",
    ) -> Path:
        """The run of ``recipe``: taken as it is where one like it is finished, continued where it was stopped.

        ``at`` is called when so many steps as one of ``pauses`` are done (0: before the first); a run that is finished
        already has no pauses, so ``salt`` keeps such runs apart. Raises Stopped, with the run saved.
        """
        path = self.models / _key(recipe, kind, salt)
        if _finished(path, recipe.training.steps):
            return path
        halts = set(pauses)
        trainer: Trainer | None = None

        def should_stop() -> bool:
            return self.stop() or (trainer is not None and trainer.done in halts)

        if (path / MANIFEST).is_file():
            trainer = resume(path, None, kind=kind, should_stop=should_stop)
        else:
            trainer = start(recipe, path, kind=kind, should_stop=should_stop)
        if at is not None and trainer.done in halts:
            at(trainer)
        finished = False
        while not finished:
            finished = trainer.train()
            if not finished and self.stop():
                raise Stopped
            if at is not None and trainer.done in halts:
                at(trainer)
        return path


def tuning(base: Path, text: Path, like: Recipe, changes: dict[str, Any]) -> TuneRecipe:
    """A recipe that tunes ``base`` on ``text`` in the precision, windows and order of ``like``, with ``changes`` laid
    over it. It looks at nothing on its way: the experiment does so afterwards."""
    t = like.training
    data: dict[str, Any] = {
        "training": {
            "batch_size": t.batch_size,
            "sequence_length": t.sequence_length,
            "seed": t.seed,
            "dtype": t.dtype,
            "device": t.device,
        },
        "drift": {"tokens": 0},
        "validation": {"every": 10**6, "batches": 1},
        "checkpoint": {"every": 10**6, "keep": 1},
    }
    return build_recipe(str(base), str(text), None, merge(data, changes))


@dataclass(frozen=True)
class Results:
    """All jobs' figures, by arm and seed."""

    lab: LabRecipe
    figures: dict[str, dict[int, Figures]]

    def of(self, arm: str, *keys: str) -> list[Any]:
        """A figure of ``arm`` in every seed, in the seeds' order; ``keys`` lead to it."""
        out = []
        for _, found in sorted(self.figures[arm].items()):
            value: Any = found
            for key in keys:
                value = value[key]
            out.append(value)
        return out

    def mean(self, arm: str, *keys: str) -> float:
        """Its mean."""
        return mean(self.of(arm, *keys))

    def spread(self, arm: str, *keys: str, digits: int = 3) -> str:
        """``mean ± standard deviation`` over seeds."""
        return spread(self.of(arm, *keys), digits)


@dataclass(frozen=True)
class Table:
    """``rows`` of text under ``columns``."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Finding:
    """What an experiment found: ``short`` in a sentence, ``answer`` in a few with their figures, both made from the
    figures alone; tables and charts; and ``limits``: what it does not show."""

    short: str
    answer: list[str]
    tables: list[Table]
    charts: list[Chart]
    limits: list[str] = field(default_factory=list)


class NoSettings(Config):
    """For experiments that have nothing to settle."""


class Lab(ABC):
    """How an experiment is run, and what is concluded. ``settings`` says what its recipe may settle."""

    settings: type[Config] = NoSettings

    def check(self, recipe: LabRecipe) -> None:
        """Raises UserError for settings, and changes of the training recipe, that the experiment cannot be run with."""
        parse(self.settings, recipe.settings, f"lab {recipe.name}: lab")

    def common(self, job: Job) -> None:
        """What a seed's arms have in common, done before them: nothing, where an experiment does not say what."""
        return

    @property
    def has_common(self) -> bool:
        """Whether the experiment says what its arms have in common."""
        return type(self).common is not Lab.common

    @abstractmethod
    def run(self, job: Job) -> Figures:
        """One arm with one seed. Raises Stopped."""

    @abstractmethod
    def conclude(self, results: Results) -> Finding:
        """What follows from all figures."""


def _key(recipe: RunRecipe, kind: Kind, salt: str) -> str:
    said = {
        "abyssal": version("abyssal"),
        "decisive": recipe.decisive(),
        "steps": recipe.training.steps,
        "kind": kind.command,
        "salt": salt,
    }
    if isinstance(recipe, Recipe):
        said["corpus"] = corpus_id(recipe.data)
    else:  # a tuning run: what it begins from lies in a folder named by its own key, and its text may change
        said |= {"base": getattr(recipe, "base", None), "text": corpus_fingerprint(recipe.data.source)}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _finished(path: Path, steps: int) -> bool:
    """A tuning run's steps may be settled only when its data is read (0 in the recipe): then its own file says."""
    if not (path / MANIFEST).is_file():
        return False
    done = Run(path).steps()
    return bool(done) and steps > 0 and done[-1] >= steps
