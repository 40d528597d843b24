"""What a training run is: :class:`Recipe`, read from YAML, every field also settable as ``key.subkey=value``."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from abyssal.config import Config, ModelConfig, merge, parse, read_mapping, resolve_model
from abyssal.config.parallel import ParallelConfig
from abyssal.errors import UserError, nearest


class DataConfig(Config):
    """Text and how it becomes tokens.

    ``source``: a built-in corpus (``tinyshakespeare``), a .txt, .jsonl or .parquet file, or a folder of them.
    ``tokenizer``: ``bpe`` (byte-level BPE of the model's vocab_size, trained on the training split), ``bytes``, or a
    path to a tokenizer.json or its folder. ``cache``: where tokenised corpora are kept between runs.
    """

    source: str
    field: str = "text"
    validation: str | None = None
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    tokenizer: str = "bpe"
    cache: str = "~/.cache/abyssal"


class TrainConfig(Config):
    """How much and in what pieces. A step takes batch_size · accumulate sequences of sequence_length tokens.

    ``dtype``: what matrix products run in (``auto``: bfloat16 where the hardware has it); the router, and the master
    weights that the optimizer works on, are FP32 in any case. ``fp8``: linear layers and experts multiply in FP8 as
    V3 did (its paper, §3.3); without FP8 hardware the same rounding is worked out in ``dtype``, slowly. ``mtp_weight``
    is λ of the V3 paper's eq. 25. ``recompute`` trades time for activation memory. ``compile``: torch.compile for the
    parts of each block; for GPUs (on a CPU it takes minutes, and the place of the package's own kernels).
    """

    steps: PositiveInt
    batch_size: int = Field(ge=1, le=1_000_000)
    sequence_length: PositiveInt
    accumulate: int = Field(default=1, ge=1, le=1_000_000)
    clip: PositiveFloat = 1.0
    mtp_weight: NonNegativeFloat = 0.3
    seed: int = Field(default=1234, ge=0, lt=2**63)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    fp8: bool = False
    device: str = "auto"
    recompute: bool = False
    compile: bool = False


class OptimizerConfig(Config):
    """``name``: ``adamw`` (arXiv 1711.05101), or ``muon`` as Moonlight has it (arXiv 2502.16982): Muon for the matrices
    of linear layers, router and experts, AdamW for embedding, head, norms and biases, all at the same ``lr``.

    ``weight_decay`` is for matrices only. ``momentum`` is Muon's; ``beta1``, ``beta2`` and ``eps`` are AdamW's.
    ``state``: what moments are kept in. ``float32``: 8 bytes a weight with AdamW, 4 with Muon; ``bfloat16``: half of
    that, as V3 was trained (its paper, §3.3.3); ``8bit``: a quarter (E4M3, with a scale for every 128 numbers).
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    momentum: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.1
    state: Literal["float32", "bfloat16", "8bit"] = "float32"


class ScheduleConfig(Config):
    """Learning rate: linear warmup, then cosine to ``final`` · lr, or constant with a linear decay at the end (WSD).

    ``decay``: for wsd, the share of all steps that the last decay takes.
    """

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    final: float = Field(default=0.1, ge=0, le=1)
    decay: float = Field(default=0.2, gt=0, le=1)


class BiasSignConfig(Config):
    """After each step b_i += rate · sign(mean load − load_i) (V3 paper §2.1.2, arXiv 2408.15664).

    The rate falls along a cosine to ``final`` · rate at the run's end; 1 keeps it constant. (V3 went from 0.001 to 0
    for its last 3% of tokens: as the router settles, so may the bias.)
    """

    rate: PositiveFloat = 0.001
    final: float = Field(default=1.0, ge=0, le=1)


class BiasProportionalConfig(Config):
    """Every ``every`` steps b_i −= rate · (load_i / total − 1/E), of the load since the last time."""

    rate: PositiveFloat = 0.1
    every: PositiveInt = 100


class TokenLossConfig(Config):
    """alpha · Σ P_i · f_i over all tokens of a micro-batch (DeepSeekMoE paper §3.3), averaged over micro-batches."""

    alpha: PositiveFloat = 0.001
    normalize: bool = False


class SequenceLossConfig(Config):
    """The same sequence by sequence, then averaged. ``normalize`` divides scores by their sum (V3 paper eq. 17-20);
    the first generation's ``seq_aux`` takes softmax scores as they are."""

    alpha: PositiveFloat = 0.0001
    normalize: bool = True


class BalanceConfig(Config):
    """Which balancers act; any may be combined. As a word: ``none``, or names joined by ``+``."""

    bias_sign: BiasSignConfig | None = None
    bias_proportional: BiasProportionalConfig | None = None
    token_loss: TokenLossConfig | None = None
    sequence_loss: SequenceLossConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, data: Any) -> Any:
        if not isinstance(data, str):
            return data
        if data == "none":
            return {}
        names = [name.strip() for name in data.split("+")]
        for name in names:
            if name not in cls.model_fields:
                known = ["none", *cls.model_fields]
                raise ValueError(f"{name!r} is no balancer{nearest(name, known) or '; known: ' + ', '.join(known)}")
        return {name: {} for name in names}


class ValidationConfig(Config):
    """Every ``every`` steps and at the end; ``batches`` limits how much of the held-out split (None: all)."""

    every: PositiveInt = 100
    batches: PositiveInt | None = None


class SamplesConfig(Config):
    """Text written every ``every`` steps and at the end, continuing each prompt."""

    every: PositiveInt = 100
    prompts: list[str] = Field(default_factory=list)
    tokens: PositiveInt = 120
    temperature: NonNegativeFloat = 0.8
    top_p: float = Field(default=0.95, gt=0, le=1)


class CheckpointConfig(Config):
    """Every ``every`` steps and at the end; the last ``keep`` stay, and the one with the best validation loss.

    ``background``: several processes copy their parts into the host's memory (12 bytes for each weight of a part) and
    write them while training goes on; ``false`` goes on when they are written, as one process always does.
    """

    every: PositiveInt = 100
    keep: PositiveInt = 2
    background: bool = True


class LogConfig(Config):
    """A line in metrics.jsonl every ``every`` steps, and before each validation and checkpoint. The balance at the end
    is that of the last ``window`` steps."""

    every: PositiveInt = 1
    window: PositiveInt = 100


class RunRecipe(Config):
    """What recipes of all kinds of runs have: :class:`Recipe` here, and tuning's (:mod:`abyssal.tuning.recipe`)."""

    name: str
    model: Any
    data: Any
    training: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    balance: BalanceConfig = BalanceConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not name or name.startswith(".") or "/" in name:
            raise ValueError(f"{name!r} does not do as a folder's name")
        return name

    def model_config_resolved(self) -> ModelConfig:
        """The model, with presets and changes resolved. Raises UserError."""
        return resolve_model(self.model)

    def decisive(self) -> dict[str, Any]:
        """The settings that make a run what it is: those that may change when it goes on are left out."""
        data = self.model_dump(exclude={"name", "validation", "samples", "checkpoint", "log", "parallel"})
        data["model"] = self.model_config_resolved().model_dump(exclude={"published"})
        data["data"].pop("cache", None)
        for key in ("steps", "device", "compile"):
            del data["training"][key]
        return data


class Recipe(RunRecipe):
    """A whole training run. ``model`` is a preset, a path to a config.json, or a mapping (``preset`` and changes)."""

    model: str | dict[str, Any]
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    folder = resources.files("abyssal.training") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(spec: str, changes: dict[str, Any] | None = None) -> Recipe:
    """The built-in recipe called ``spec``, or the one in the file ``spec``, with ``changes`` laid over it.

    Raises UserError: one line with the field, the value and what would be right.
    """
    names = recipe_names()
    if spec in names:
        text = (resources.files("abyssal.training") / "recipes" / f"{spec}.yaml").read_text(encoding="utf-8")
        data, where = yaml.safe_load(text), f"recipe {spec}"
    elif Path(spec).is_file():
        data, where = read_mapping(Path(spec)), spec
    elif Path(spec).suffix in (".yaml", ".yml") or "/" in spec:
        raise UserError(f"recipe {spec}: no such file")
    else:
        hint = nearest(spec, names) or "; known: " + ", ".join(names)
        raise UserError(f"recipe {spec!r}: no such recipe{hint}")
    changes = changes or {}
    if isinstance(changes.get("model"), dict) and isinstance(data.get("model"), str):
        data["model"] = {"preset": data["model"]}  # model.hidden_size=… changes the preset that the recipe names
    recipe = parse(Recipe, merge(data, changes), where)
    check(recipe, recipe.model_config_resolved(), where)
    return recipe


def check(recipe: RunRecipe, model: ModelConfig, where: str) -> None:
    """Raises UserError where recipe and model do not go together."""
    moe, balance = model.moe, recipe.balance
    length = recipe.training.sequence_length
    if length > model.max_position_embeddings:
        raise UserError(
            f"{where}: training.sequence_length: {length} is more than the model's max_position_embeddings "
            f"{model.max_position_embeddings}"
        )
    for name in ("bias_sign", "bias_proportional"):
        if getattr(balance, name) is not None and (moe is None or not moe.has_bias):
            reason = "this model has no experts" if moe is None else f"topk_method {moe.topk_method!r} has no bias"
            raise UserError(f"{where}: balance.{name}: {reason}; use another balancer, or topk_method 'noaux_tc'")
    for name in ("token_loss", "sequence_loss"):
        if getattr(balance, name) is not None and moe is None:
            raise UserError(f"{where}: balance.{name}: this model has no experts; balance: none")
    if recipe.schedule.warmup >= recipe.training.steps and recipe.schedule.warmup > 0:
        raise UserError(
            f"{where}: schedule.warmup: {recipe.schedule.warmup} is not below training.steps {recipe.training.steps}"
        )


def to_yaml(recipe: RunRecipe, resolved: bool = False) -> str:
    """``recipe`` as YAML; ``resolved`` writes the model's config out in full instead of a preset's name."""
    data = recipe.model_dump()
    if resolved:
        data["model"] = recipe.model_config_resolved().model_dump()
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
