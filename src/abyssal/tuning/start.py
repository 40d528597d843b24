"""Starting a tuning run, new or resumed: what :mod:`abyssal.training.start` has to know of this kind of run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abyssal.checkpoint import read_tensors, write_tensors, write_text
from abyssal.checkpoint.adapter import base_identity, is_adapter
from abyssal.checkpoint.overlay import is_overlay
from abyssal.checkpoint.shards import weights_fingerprint
from abyssal.config import ModelConfig
from abyssal.data.examples import Examples, read_examples, with_template
from abyssal.data.loader import Batch
from abyssal.data.packing import PackedLoader, packed_batches
from abyssal.data.tokenizer import Tokenizer
from abyssal.distributed.together import Alone
from abyssal.errors import UserError
from abyssal.loading import find, find_config, find_tokenizer, load
from abyssal.model import Transformer
from abyssal.model.adapting import Adapted, add_lora, check_lora
from abyssal.model.partial import train_experts
from abyssal.training.evaluate import HeldOut
from abyssal.training.hardware import check_compiler, resolve_device
from abyssal.training.loss import Objective
from abyssal.training.start import Kind, run_dtype, run_tokenizer
from abyssal.training.trainer import Keeper, Parts
from abyssal.training.weights import product_matrices
from abyssal.tuning import drift
from abyssal.tuning.dpo import Preference, reference_log_probabilities
from abyssal.tuning.esft import Choice, choose_experts
from abyssal.tuning.keepers import AdapterKeeper, ExpertsKeeper
from abyssal.tuning.recipe import TuneRecipe, check_tuning, settled, with_length

REFERENCE = "reference.safetensors"
CHOICE = "esft.json"


@dataclass(frozen=True)
class TuneParts(Parts):
    """What a tuning run is made of besides."""

    adapted: Adapted | None = None
    """The tensors that LoRA adapts."""
    choice: Choice | None = None
    """The experts that ESFT trains."""
    before: drift.Before | None = None
    """Routing of held-out examples by the model as it was; None where it has no experts, or nobody asked."""


def _prepare(
    recipe: TuneRecipe, path: Path, manifest: dict[str, Any] | None, together: Alone
) -> tuple[TuneRecipe, TuneParts, dict[str, Any]]:
    device = resolve_device(recipe.training.device)
    if recipe.training.compile:
        check_compiler(device)
    folder, config = find(recipe.base), find_config(recipe.base)
    if is_adapter(folder) or is_overlay(folder):
        raise UserError(f"{recipe.base}: tuned, and not whole; merge it first: abyssal export {recipe.base} NEW-FOLDER")
    if os.path.lexists(recipe.base):
        # A run's best checkpoint may be another one later; and paths are to be found from any folder.
        recipe = recipe.with_places(str(folder.absolute()))
    recipe = with_length(recipe, config)
    check_tuning(recipe, config, "tune")
    if recipe.method == "lora":
        _check_lora(recipe, config)
    tokenizer = _tokenizer(recipe, folder) if manifest is None else run_tokenizer(path, manifest)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{recipe.base}: its tokenizer has {tokenizer.vocab_size} tokens, more than the model's {config.vocab_size}"
        )
    t = recipe.training
    train, held_out, counts = read_examples(recipe.data, tokenizer, t.sequence_length)
    if len(held_out) == 0:
        raise UserError(
            f"data.validation_fraction: {recipe.data.validation_fraction} of {len(train)} examples leaves none to "
            "validate on; expected a larger one, more examples, or data.validation=FILE"
        )
    preference = train.per_example == 2
    depth = config.mtp.num_nextn_predict_layers if t.mtp_weight > 0 and not preference else 0
    loader = PackedLoader(
        train, batch_size=t.batch_size, sequence_length=t.sequence_length, lookahead=1 + depth, seed=t.seed
    )
    recipe = settled(recipe, config, rows=loader.epoch_rows, preference=preference)
    dtype = run_dtype(recipe, manifest, device, config.hidden_size)
    model = _load(recipe, dtype, device)
    resumed = path if manifest is not None else None
    before = _before(recipe, model, held_out, dtype, resumed)
    objective: Objective = Objective(mtp=depth > 0)
    if preference:
        objective = Preference(recipe.dpo, _reference(recipe, model, (train, held_out), dtype, resumed))
    identity = {
        "base": base_identity(folder),
        "weights": weights_fingerprint(folder),
        "data": train.fingerprint,
        "held_out": held_out.fingerprint,
    }
    adapted, choice, keeper = _method(recipe, model, train, dtype, identity["base"], resumed)
    if depth == 0 and recipe.method == "full":
        for module in model.mtp_modules:
            module.requires_grad_(False)
    parts = TuneParts(
        model=model,
        tokenizer=tokenizer,
        loader=loader,
        held_out=_held_out(held_out, recipe, train.sequences),
        data=counts.describe(),
        device=device,
        dtype=dtype,
        objective=objective,
        keeper=keeper,
        adapted=adapted,
        choice=choice,
        before=before,
    )
    return recipe, parts, identity


def _tokenizer(recipe: TuneRecipe, folder: Path) -> Tokenizer:
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{recipe.base}: no tokenizer.json or tiktoken.model in this folder; text needs one")
    return with_template(tokenizer, recipe.data.template)


def _check_lora(recipe: TuneRecipe, config: ModelConfig) -> None:
    """Finds out before gigabytes are loaded what :func:`add_lora` would refuse."""
    with torch.device("meta"):
        model = Transformer(config)
    try:
        check_lora(model, recipe.lora.targets, recipe.lora.rank, recipe.lora.alpha or 1.0)
    except UserError as error:
        raise UserError(f"lora.{error}") from None


def _load(recipe: TuneRecipe, dtype: torch.dtype, device: torch.device) -> Transformer:
    """The base. What stays as it is need not be more precise than the products that read it; what is trained begins
    with the file's own numbers (of ESFT not all that is read is trained: see :func:`_method`)."""
    wanted = {"full": torch.float32, "esft": None, "lora": dtype}[recipe.method]
    return load(recipe.base, dtype=wanted, device=device, weights=recipe.weights)[0]


def _before(
    recipe: TuneRecipe, model: Transformer, held_out: Examples, dtype: torch.dtype, resumed: Path | None
) -> drift.Before | None:
    if resumed is not None and (resumed / drift.FILE).is_file():
        return drift.Before.read(resumed, model)
    return drift.look_before(model, held_out, recipe.drift.tokens, recipe.training.sequence_length, dtype)


def _reference(
    recipe: TuneRecipe,
    model: Transformer,
    examples: tuple[Examples, Examples],
    dtype: torch.dtype,
    resumed: Path | None,
) -> Tensor:
    """log π_ref of every sequence, those held out after those to train on."""
    count = sum(each.sequences for each in examples)
    if resumed is not None and (resumed / REFERENCE).is_file():
        kept = read_tensors(resumed / REFERENCE).get("log_p")
        if kept is None or kept.shape != (count,):
            raise UserError(f"{resumed / REFERENCE}: not of this run's data; remove it, and it is worked out anew")
        return kept
    length, size = recipe.training.sequence_length, recipe.training.batch_size
    out = []
    for each in examples:
        batches = packed_batches(each, batch_size=size, sequence_length=length, lookahead=1)
        out.append(reference_log_probabilities(model, batches, length, each.sequences, dtype))
    return torch.cat(out)


def _method(
    recipe: TuneRecipe, model: Transformer, train: Examples, dtype: torch.dtype, base: str, resumed: Path | None
) -> tuple[Adapted | None, Choice | None, Keeper]:
    """Makes ``model`` ready to be trained as the recipe says."""
    t = recipe.training
    if recipe.method == "lora":
        alpha = recipe.lora.alpha or 2.0 * recipe.lora.rank
        generator = torch.Generator(model.model.embed_tokens.weight.device).manual_seed(t.seed)
        lora = recipe.lora
        adapted = add_lora(model, lora.targets, lora.rank, alpha, rslora=lora.rslora, generator=generator)
        return adapted, None, AdapterKeeper(recipe.base, base)
    if recipe.method == "esft":
        choice = _choice(recipe, model, train, resumed)
        train_experts(model, {f"model.layers.{layer}.mlp.experts": each for layer, each in choice.experts.items()})
        if recipe.esft.shared:
            for name, parameter in model.named_parameters():
                parameter.requires_grad |= ".mlp.shared_experts." in name
        for parameter in product_matrices(model).values():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        return None, choice, ExpertsKeeper(recipe.base, base)
    return None, None, Keeper()


def _choice(recipe: TuneRecipe, model: Transformer, train: Examples, resumed: Path | None) -> Choice:
    if resumed is not None and (resumed / CHOICE).is_file():
        return Choice.from_json(resumed / CHOICE)
    t = recipe.training
    # In the order of a first epoch, which is a random one: a file may be sorted.
    loader = PackedLoader(train, batch_size=t.batch_size, sequence_length=t.sequence_length, lookahead=1, seed=t.seed)
    batches = (loader.next() for _ in range(math.ceil(loader.epoch_rows / t.batch_size)))
    return choose_experts(model, batches, t.sequence_length, recipe.esft)


def _held_out(examples: Examples, recipe: TuneRecipe, first: int) -> HeldOut:
    """The split's batches; their sequences are numbered on from ``first``."""
    t = recipe.training

    def batches(limit: int | None) -> Iterator[Batch]:
        for batch in packed_batches(
            examples, batch_size=t.batch_size, sequence_length=t.sequence_length, lookahead=1, limit=limit
        ):
            documents = batch.documents
            yield replace(batch, documents=torch.where(documents >= 0, documents + first, documents))

    return HeldOut(batches, max(examples.learned_tokens, 1), examples.bytes)


def _begin(recipe: TuneRecipe, parts: Parts, path: Path) -> None:
    """Keeps in the run's folder what was found out about the model as it was."""
    assert isinstance(parts, TuneParts)
    if parts.before is not None:
        parts.before.write(path)
    if isinstance(parts.objective, Preference) and parts.objective.reference is not None:
        write_tensors({"log_p": parts.objective.reference}, path / REFERENCE)
    if parts.choice is not None:
        write_text(path / CHOICE, json.dumps(parts.choice.to_json(), indent=2) + "\n")


TUNE = Kind("tune", TuneRecipe, _prepare, check_tuning, _begin)
