"""What a tuning run is: :class:`TuneRecipe`, of the same parts as a training run's, with a model to begin from, a data
set of examples, and a method."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from abyssal.config import Config, ModelConfig, merge, parse, read_mapping
from abyssal.data.examples import ExampleConfig
from abyssal.errors import UserError
from abyssal.training.recipe import OptimizerConfig, RunRecipe, TrainConfig, check

Method = Literal["full", "lora", "esft"]
# Where a learning rate is not given. LoRA's B begins at zero and takes larger steps (arXiv 2106.09685, table 11);
# preferences are a much sharper signal than text (arXiv 2305.18290, appendix B, has 1e-6 for full tuning).
_RATES = {"full": 2e-5, "lora": 2e-4, "esft": 1e-5}
LENGTH = 1024
_PREFERENCE_RATES = {"full": 1e-6, "lora": 2e-5, "esft": 1e-6}


class LoRAConfig(Config):
    """Low-rank adaptation (arXiv 2106.09685): W + α/r · B A.

    ``targets``: ``all`` (every projection and all routed experts), or names, as a list or joined by commas: q_proj,
    kv_b_proj, o_proj, down_proj, ``experts``, …; globs and full names too. ``alpha`` None: twice the rank. ``rslora``:
    α/√r in place of α/r (arXiv 2312.03732).
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = None
    targets: list[str] = Field(default=["all"], min_length=1)
    rslora: bool = False

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_several(cls, targets: Any) -> Any:
        return targets.split(",") if isinstance(targets, str) else targets


class ESFTConfig(Config):
    """Expert-specialised fine-tuning (arXiv 2407.01906, §3): of each layer's experts those that the data uses most,
    until their scores add up to ``p`` of all.

    ``score``: ``gate``, the mean weight that an expert's output gets, or ``token``, the share of choices that it gets.
    ``tokens``: how many tokens of the data are looked at. ``shared``: train the shared experts too.
    """

    p: float = Field(default=0.2, gt=0, le=1)
    score: Literal["gate", "token"] = "gate"
    tokens: PositiveInt = 65_536
    shared: bool = False


class DPOConfig(Config):
    """Direct preference optimisation (arXiv 2305.18290), for data with chosen and rejected answers.

    ``beta``: how strongly the model is held to what it was. ``label_smoothing``: how often a preference is taken to be
    the wrong way round (conservative DPO).
    """

    beta: PositiveFloat = 0.1
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)


class TuneTrainConfig(TrainConfig):
    """As in training, but for ``steps``: 0 is as many as ``epochs`` times through the data take; and for
    ``sequence_length``: 0 is 1,024, or the model's context where that is shorter. ``mtp_weight`` 0 leaves MTP modules
    as they are."""

    steps: int = Field(default=0, ge=0)
    epochs: PositiveFloat = 1.0
    batch_size: int = Field(default=8, ge=1, le=1_000_000)
    sequence_length: int = Field(default=0, ge=0)
    mtp_weight: float = Field(default=0.0, ge=0)


class TuneOptimizerConfig(OptimizerConfig):
    """As in training, but for ``lr``: 0 is what suits the method (LoRA 2e-4, full 2e-5, ESFT 1e-5; preferences 2e-5,
    1e-6, 1e-6)."""

    lr: float = Field(default=0.0, ge=0)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)


class DriftConfig(Config):
    """At the end, how far routing has moved: the held-out examples' first ``tokens`` are routed by the model as it was
    and as it is. 0: not looked at."""

    tokens: int = Field(default=8192, ge=0)


class TuneRecipe(RunRecipe):
    """A whole tuning run. ``base`` is a run, a model folder or a name on the hub; ``model`` is filled in with its
    config. ``weights``: what frozen weights are kept in; other than ``dense`` for method lora alone (QLoRA)."""

    model: dict[str, Any] | None = None
    base: str
    method: Method = "lora"
    weights: Literal["dense", "nf4", "int8", "int4"] = "dense"
    lora: LoRAConfig = LoRAConfig()
    esft: ESFTConfig = ESFTConfig()
    dpo: DPOConfig = DPOConfig()
    data: ExampleConfig
    training: TuneTrainConfig = TuneTrainConfig()
    optimizer: TuneOptimizerConfig = TuneOptimizerConfig()
    drift: DriftConfig = DriftConfig()

    def model_config_resolved(self) -> ModelConfig:
        if self.model is None:
            from abyssal.loading import find, find_config

            find(self.base, weights=False)  # a preset has a config, but is no model to begin from
            return find_config(self.base)
        return super().model_config_resolved()

    def decisive(self) -> dict[str, Any]:
        data = super().decisive()
        # Where they lie may change: what they are is compared by fingerprints.
        for key in ("source", "validation", "template"):
            del data["data"][key]
        del data["base"], data["drift"]
        return data

    def with_places(self, base: str) -> TuneRecipe:
        """With ``base``, and absolute paths for the data, so that the run can be continued from any folder."""
        data = self.data.model_dump()
        for key in ("source", "validation", "template"):
            if data[key] is not None and Path(data[key]).exists():
                data[key] = str(Path(data[key]).absolute())
        return self.model_copy(update={"base": base, "data": ExampleConfig(**data)})


def check_tuning(recipe: TuneRecipe, model: ModelConfig, where: str) -> None:
    """Raises UserError where recipe and model do not go together."""
    steps = recipe.training.steps or recipe.schedule.warmup + 1  # not settled before the data is read
    check(recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": steps})}), model, where)
    if recipe.weights != "dense" and recipe.method != "lora":
        raise UserError(
            f"{where}: weights: {recipe.weights} holds what is not trained, and method {recipe.method!r} trains the "
            "weights themselves; expected method=lora, or weights=dense"
        )
    if recipe.method == "esft" and model.moe is None:
        raise UserError(
            f"{where}: method: esft chooses among routed experts, and this model has none; use lora or full"
        )
    if recipe.training.fp8 and recipe.method != "full":
        raise UserError(f"{where}: training.fp8: only for method=full; {recipe.method} keeps the weights as they are")
    if recipe.method == "lora" and (recipe.balance.bias_sign or recipe.balance.bias_proportional):
        raise UserError(
            f"{where}: balance: an adapter has no place for the routers' biases; leave them frozen, or use full or esft"
        )
    if recipe.method != "full" and recipe.optimizer.name == "muon":
        raise UserError(
            f"{where}: optimizer.name: muon is for whole matrices (method=full); {recipe.method} takes adamw"
        )


def build_recipe(base: str | None, source: str | None, file: Path | None, changes: dict[str, Any]) -> TuneRecipe:
    """A recipe from a model and a data set, or a YAML ``file``, with ``changes`` laid over it. Raises UserError."""
    data: dict[str, Any] = read_mapping(file) if file is not None else {}
    where = str(file) if file is not None else "tune"
    given: dict[str, Any] = {}
    if base is not None:
        given["base"] = base
    if source is not None:
        given["data"] = {"source": source}
    data = merge(merge(data, given), changes)
    if not isinstance(data.get("base"), str):
        raise UserError(f"{where}: base: missing; expected a run, a model folder or a name on the hub")
    recipe = parse(TuneRecipe, {"name": "tuned"} | data, where)
    check_tuning(recipe, recipe.model_config_resolved(), where)
    return recipe


def with_length(recipe: TuneRecipe, model: ModelConfig) -> TuneRecipe:
    """``recipe`` with a sequence length."""
    length = recipe.training.sequence_length or min(LENGTH, model.max_position_embeddings)
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"sequence_length": length})})


def settled(recipe: TuneRecipe, model: ModelConfig, *, rows: int, preference: bool) -> TuneRecipe:
    """``recipe`` with everything that depends on the data: an epoch has ``rows`` rows. Raises UserError."""
    t = recipe.training
    steps = t.steps or max(1, math.ceil(rows * t.epochs / (t.batch_size * t.accumulate)))
    rate = recipe.optimizer.lr or (_PREFERENCE_RATES if preference else _RATES)[recipe.method]
    often = max(1, math.ceil(steps / 5))
    update: dict[str, Any] = {
        "model": model.model_dump(),
        "training": t.model_copy(update={"steps": steps}),
        "optimizer": recipe.optimizer.model_copy(update={"lr": rate}),
    }
    for field, own in (("schedule", {"warmup": min(20, steps // 10)}), ("validation", {"every": often})):
        if field not in recipe.model_fields_set:
            update[field] = getattr(recipe, field).model_copy(update=own)
    if "checkpoint" not in recipe.model_fields_set:
        update["checkpoint"] = recipe.checkpoint.model_copy(update={"every": often})
    recipe = recipe.model_copy(update=update)
    check_tuning(recipe, model, "tune")
    return recipe
