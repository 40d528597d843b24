"""What an experiment is: :class:`LabRecipe`, a question, a training recipe, and arms that differ from it by name."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml
from pydantic import Field, field_validator

from abyssal.config import Config, merge, parse
from abyssal.errors import UserError, nearest
from abyssal.training.recipe import Recipe, check

BASE = "base"
DEFAULT = "cpu"
MOST_SEEDS = 100


class LabRecipe(Config):
    """``base``: a training recipe; ``arms``: by name, what an arm changes in it; ``settings``: what the experiment
    itself has to settle (:mod:`abyssal.lab.experiments`); ``size``: the name of the sizes that went into all this."""

    name: str
    question: str
    size: str
    seeds: int = Field(default=3, ge=2, le=MOST_SEEDS)
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arms", mode="before")
    @classmethod
    def _no_changes(cls, arms: Any) -> Any:
        return {str(name): changes or {} for name, changes in arms.items()} if isinstance(arms, dict) else arms

    def recipe(self, arm: str | None, seed: int, changes: dict[str, Any] | None = None) -> Recipe:
        """The training recipe of an arm (None: the base itself) with ``changes`` laid over it. Raises UserError."""
        data = merge(self.base, self.arms[arm] if arm is not None else {})
        data = merge(data, changes or {})
        where = f"lab {self.name}{f', {arm}' if arm is not None else ''}"
        recipe = parse(Recipe, merge(data, {"training": {"seed": seed}}), where)
        check(recipe, recipe.model_config_resolved(), where)
        return recipe

    def decisive(self) -> dict[str, Any]:
        """What makes two experiments the same one: all but how many seeds it is run with."""
        return self.model_dump(exclude={"seeds", "question"})


def lab_names() -> list[str]:
    """Names of the experiments."""
    folder = resources.files("abyssal.lab") / "recipes"
    names = (entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(name for name in names if name != BASE)


def read_lab(
    name: str, *, size: str = DEFAULT, seeds: int | None = None, changes: dict[str, Any] | None = None
) -> LabRecipe:
    """The experiment called ``name`` at ``size``; ``changes`` are laid over its training recipe, those under ``lab``
    over its settings. Raises UserError: one line with the field, the value and what would be right."""
    names = lab_names()
    if name not in names:
        raise UserError(f"lab {name!r}: no such lab{nearest(name, names) or ''}; known: {', '.join(names)}")
    own, base = _read(name), _read(BASE)
    sizes = [DEFAULT, *base.get("sizes", {})]
    if size not in sizes:
        raise UserError(f"--size: {size!r} is not one of {', '.join(sizes)}")
    if seeds is not None and not 2 <= seeds <= MOST_SEEDS:
        raise UserError(f"--seeds: {seeds} is not valid; expected a whole number from 2 to {MOST_SEEDS}")
    changes = dict(changes or {})
    settings = changes.pop("lab", {})
    if not isinstance(settings, dict):
        raise UserError(f"lab: {settings!r} is not valid; expected lab.SETTING=value")
    larger = own.get("sizes", {}).get(size, {})
    data = {
        "name": name,
        "question": own["question"],
        "size": size,
        "base": merge(merge(merge(base["recipe"], base.get("sizes", {}).get(size, {})), own.get("base", {})), changes),
        "arms": larger.get("arms", own["arms"]),
        "settings": merge(merge(own.get("settings", {}), larger.get("settings", {})), settings),
    }
    if seeds is not None:
        data["seeds"] = seeds
    recipe = parse(LabRecipe, data, f"lab {name}")
    for arm in (None, *recipe.arms):
        recipe.recipe(arm, 1)  # raises what is wrong with it
    return recipe


def question_of(name: str) -> str:
    """What the experiment called ``name`` asks."""
    question: str = _read(name)["question"]
    return question


def _read(name: str) -> Any:
    return yaml.safe_load((resources.files("abyssal.lab") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
