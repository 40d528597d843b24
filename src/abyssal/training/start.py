"""Starting a run, new or resumed: everything is checked before anything is written."""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from abyssal.checkpoint import write_text
from abyssal.checkpoint.atomic import PARTIAL
from abyssal.checkpoint.run import MANIFEST, Run, check_free
from abyssal.config import ModelConfig, merge, parse, read_config, read_mapping
from abyssal.data.shards import TokenShards
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.generation import Sampling, stream
from abyssal.model import Transformer
from abyssal.training.hardware import check_compiler, describe, resolve_device, resolve_dtype
from abyssal.training.prepare import corpus_id, load_tokenizer, open_data
from abyssal.training.recipe import Recipe, check, to_yaml
from abyssal.training.trainer import Trainer, build_loader

RECIPE = "recipe.yaml"
# What may change when a run goes on; anything else would make it another run.
_MAY_CHANGE = ("name", "validation", "samples", "checkpoint", "log")


def start(recipe: Recipe, path: Path, *, overwrite: bool = False, **options: Any) -> Trainer:
    """A trainer for a new run in ``path``. Raises UserError, with nothing written, where the recipe can't be run.

    ``options`` (``watcher``, ``should_stop``) go to :class:`Trainer`.
    """
    check_free(path, overwrite)
    device = resolve_device(recipe.training.device)
    if recipe.training.compile:
        check_compiler(device)
    config = recipe.model_config_resolved()
    dtype = resolve_dtype(recipe.training.dtype, device, config.hidden_size)
    tokenizer = load_tokenizer(recipe.data, config.vocab_size)
    shards = _open(recipe, config, tokenizer)
    model = Transformer(config, generator=torch.Generator().manual_seed(recipe.training.seed))
    _check_prompts(recipe, model, tokenizer)
    manifest = {
        "abyssal": version("abyssal"),
        "tokenizer": tokenizer.fingerprint,
        "corpus": corpus_id(recipe.data),
        "hardware": describe(device, dtype),
    }
    files = {RECIPE: to_yaml(recipe, resolved=True), MANIFEST: json.dumps(manifest, indent=2) + "\n"}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files |= {file.name: file.read_text(encoding="utf-8") for file in Path(folder).iterdir()}
    run = Run.create(path, files, overwrite=overwrite)
    return Trainer(recipe, model, tokenizer, shards, run, device=device, dtype=dtype, **options)


def resume(path: Path, recipe: Recipe | None, changes: dict[str, Any] | None = None, **options: Any) -> Trainer:
    """A trainer that continues the run in ``path`` from its last whole checkpoint (from the start if it has none).

    ``recipe``, where given, must be the run's own but for what may change (more steps, how often to save and look);
    ``changes`` are laid over the run's. Raises UserError where it, the tokenizer or the corpus is another.
    """
    run = Run(path)
    stored = run_recipe(path)
    if changes:
        recipe = run_recipe(path, changes)
    if recipe is not None:
        if difference := _difference(stored, recipe):
            raise UserError(f"{path}: this run belongs to another recipe: {difference}")
        stored = recipe
    run.lock()
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != run.manifest.get("tokenizer"):
        raise UserError(f"{path / 'tokenizer.json'}: not the tokenizer that this run began with")
    if corpus_id(stored.data) != run.manifest.get("corpus"):
        raise UserError(f"{path}: data.source: {stored.data.source} has changed since this run began")
    config = stored.model_config_resolved()
    shards = _open(stored, config, tokenizer)
    device = resolve_device(stored.training.device)
    if stored.training.compile:
        check_compiler(device)
    hardware = run.manifest.get("hardware")
    recorded = hardware.get("dtype", "auto") if isinstance(hardware, dict) else "auto"  # what auto came to stays
    recorded = recorded if stored.training.dtype == "auto" else stored.training.dtype
    dtype = resolve_dtype(recorded, device, config.hidden_size)
    steps = run.steps()
    if steps and read_config(run.checkpoint(steps[-1])).model_copy(update={"published": {}}) != config.model_copy(
        update={"published": {}}
    ):
        raise UserError(f"{run.checkpoint(steps[-1]) / 'config.json'}: not the model that {path / RECIPE} describes")
    model = Transformer(config, generator=torch.Generator().manual_seed(stored.training.seed))
    _check_prompts(stored, model, tokenizer)
    trainer = Trainer(stored, model, tokenizer, shards, run, device=device, dtype=dtype, **options)
    if steps:
        try:
            trainer.resume(steps[-1])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            # Anything may stand in a file that somebody edited or a disk spoiled.
            folder = run.checkpoint(steps[-1])
            raise UserError(
                f"{folder}: damaged ({error!r}); remove it to go on from the checkpoint before it"
            ) from None
    else:
        run.forget_after(0)
    write_text(path / RECIPE, to_yaml(stored, resolved=True))
    return trainer


def run_recipe(path: Path, changes: dict[str, Any] | None = None) -> Recipe:
    """The recipe of the run in ``path``, with ``changes`` laid over it. Raises UserError."""
    where = str(path / RECIPE)
    recipe = parse(Recipe, merge(read_mapping(path / RECIPE), changes or {}), where)
    check(recipe, recipe.model_config_resolved(), where)
    return recipe


def newest_run(folder: Path, recipe: Recipe) -> Path:
    """The run in ``folder`` that was written to last among those that ``recipe`` fits. Raises UserError: none does."""
    found = []
    for manifest in folder.glob(f"*/{MANIFEST}"):
        if manifest.parent.name.endswith(PARTIAL):
            continue  # left by a kill while it was made
        try:
            if _difference(run_recipe(manifest.parent), recipe) is None:
                newest = max((p.stat().st_mtime for p in manifest.parent.glob("checkpoints/*/state.json")), default=0.0)
                found.append((newest, manifest.stat().st_mtime, manifest.parent))
        except UserError:
            continue  # a damaged run is no candidate
    if not found:
        raise UserError(f"--resume auto: no run in {folder} fits this recipe")
    return max(found)[2]


def _open(recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer) -> tuple[TokenShards, TokenShards]:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"data.tokenizer: it has {tokenizer.vocab_size} tokens, model.vocab_size is {config.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )
    train, validation = open_data(recipe.data, tokenizer)
    build_loader(recipe, config, train)  # raises where the text is too short, while nothing is written yet
    if len(validation) < 2:
        raise UserError(
            f"data.source: {len(validation)} held-out tokens of {recipe.data.validation or recipe.data.source} are too "
            "few to validate on; use more text or a larger data.validation_fraction"
        )
    return train, validation


def _check_prompts(recipe: Recipe, model: Transformer, tokenizer: Tokenizer) -> None:
    s = recipe.samples
    try:
        Sampling(max_new_tokens=s.tokens, temperature=s.temperature, top_p=s.top_p)
    except UserError as error:
        raise UserError(f"samples.{error}") from None
    for prompt in recipe.samples.prompts:
        try:
            stream(model, tokenizer, prompt)  # checks the prompt at once; nothing is generated before the first next()
        except UserError as error:
            raise UserError(f"samples.prompts: {prompt[:40]!r}: {error}") from None


def _difference(stored: Recipe, recipe: Recipe) -> str | None:
    """The first setting in which two recipes are different runs, as ``key: theirs, not ours``; None if they are one."""
    old, new = _flat(_comparable(stored)), _flat(_comparable(recipe))
    for key in [*old, *(k for k in new if k not in old)]:
        if old.get(key) != new.get(key):
            return f"{key} is {old.get(key)!r} there, {new.get(key)!r} here"
    return None


def _comparable(recipe: Recipe) -> dict[str, Any]:
    data = recipe.model_dump(exclude=set(_MAY_CHANGE))
    data["model"] = recipe.model_config_resolved().model_dump(exclude={"published"})
    del data["data"]["cache"]
    for key in ("steps", "device", "compile"):
        del data["training"][key]
    return data


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
