"""Starting a run, new or resumed: everything is checked before anything is written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from abyssal.checkpoint import write_text
from abyssal.checkpoint.atomic import PARTIAL
from abyssal.checkpoint.run import MANIFEST, Run, check_free
from abyssal.config import ModelConfig, merge, parse, read_config, read_mapping
from abyssal.config.parallel import ParallelConfig
from abyssal.data.shards import TokenShards
from abyssal.data.tokenizer import Tokenizer
from abyssal.distributed.together import Alone
from abyssal.errors import UserError
from abyssal.generation import Sampling, stream
from abyssal.model import Transformer
from abyssal.training.evaluate import HeldOut
from abyssal.training.hardware import check_compiler, describe, resolve_device, resolve_dtype
from abyssal.training.prepare import corpus_id, load_tokenizer, open_data
from abyssal.training.recipe import Recipe, RunRecipe, check, to_yaml
from abyssal.training.trainer import Parts, Trainer, build_loader

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Kind:
    """A kind of run: training from nothing here, tuning in :mod:`abyssal.tuning.start`."""

    command: str
    recipe: type[RunRecipe]
    prepare: Callable[[Any, Path, dict[str, Any] | None, Alone], tuple[Any, Parts, dict[str, Any]]]
    """From a recipe, the run's folder, the run.json of a run that goes on, and the processes that take part, to the
    recipe with everything settled, the run's parts, and what identifies it (fingerprints for run.json). Given a
    run.json, raises UserError where something is another than it was; else nothing is in the folder yet. Writes nothing
    there."""
    check: Callable[[Any, ModelConfig, str], None] = check
    begin: Callable[[Any, Parts, Path], None] = lambda recipe, parts, path: None
    """Called once for a new run, when its folder is there."""


def run_dtype(
    recipe: RunRecipe, manifest: dict[str, Any] | None, device: torch.device, hidden_size: int
) -> torch.dtype:
    """What matrix products run in: what ``auto`` came to when a run began stays."""
    hardware = (manifest or {}).get("hardware")
    recorded = hardware.get("dtype", "auto") if isinstance(hardware, dict) else "auto"
    wanted = recorded if recipe.training.dtype == "auto" else recipe.training.dtype
    return resolve_dtype(wanted, device, hidden_size)


def run_tokenizer(path: Path, manifest: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a run that goes on. Raises UserError where it is not the one that it began with."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != manifest.get("tokenizer"):
        raise UserError(f"{path / 'tokenizer.json'}: not the tokenizer that this run began with")
    return tokenizer


def _prepare(
    recipe: Recipe, path: Path, manifest: dict[str, Any] | None, together: Alone
) -> tuple[Recipe, Parts, dict[str, Any]]:
    device = _device(recipe, together)
    if recipe.training.compile:
        check_compiler(device)
    config = recipe.model_config_resolved()
    dtype = run_dtype(recipe, manifest, device, config.hidden_size)
    corpus = corpus_id(recipe.data)
    with together.first_then_others("data"):
        if manifest is None:
            tokenizer = load_tokenizer(recipe.data, config.vocab_size)
        else:
            tokenizer = run_tokenizer(path, manifest)
            if corpus != manifest.get("corpus"):
                raise UserError(f"{path}: data.source: {recipe.data.source} has changed since this run began")
        train, validation = _open(recipe, config, tokenizer)
    # It raises where the text is too short, while nothing is written yet.
    loader = build_loader(recipe, config, train, together)
    t = recipe.training
    parts = Parts(
        model=_new_model(config, t.seed, together),
        tokenizer=tokenizer,
        loader=loader,
        held_out=HeldOut.of_shards(validation, batch_size=t.batch_size, sequence_length=t.sequence_length),
        data=f"{len(train):,} tokens of text, {len(validation):,} held out",
        device=device,
        dtype=dtype,
        together=together,
    )
    return recipe, parts, {"corpus": corpus}


TRAIN = Kind("train", Recipe, _prepare)


def start(recipe: RunRecipe, path: Path, *, kind: Kind = TRAIN, overwrite: bool = False, **options: Any) -> Trainer:
    """A trainer for a new run in ``path``. Raises UserError, with nothing written, where the recipe can't be run.

    ``options`` (``watcher``, ``should_stop``) go to :class:`Trainer`.
    """
    together = _join(recipe)
    with together.agreed("prepared"):
        return _start(recipe, path, kind, overwrite, together, options)


def _start(
    recipe: RunRecipe, path: Path, kind: Kind, overwrite: bool, together: Alone, options: dict[str, Any]
) -> Trainer:
    if together.first:
        check_free(path, overwrite)
    recipe, parts, identity = kind.prepare(recipe, path, None, together)
    _check_prompts(recipe, parts)
    manifest = {
        "abyssal": version("abyssal"),
        "command": kind.command,
        "tokenizer": parts.tokenizer.fingerprint,
        **identity,
        "hardware": describe(parts.device, parts.dtype),
    }
    files = {RECIPE: to_yaml(recipe, resolved=True), MANIFEST: json.dumps(manifest, indent=2) + "\n"}
    with tempfile.TemporaryDirectory() as folder:
        parts.tokenizer.save(folder)
        files |= {file.name: file.read_text(encoding="utf-8") for file in Path(folder).iterdir()}
    _check_shared(path, path.resolve().parent, together)
    with together.first_then_others("run"):
        run = Run.create(path, files, overwrite=overwrite) if together.first else Run(path)
    kind.begin(recipe, parts, path)
    return Trainer(recipe, parts, run, **options)


def _check_shared(path: Path, folder: Path, together: Alone) -> None:
    """Raises UserError, on all processes, where they do not mean the same run ``path``, or do not see the same
    ``folder``, which it is or lies in. Leaves nothing there."""
    if not together.sharded:
        return
    probe = folder / f"{path.resolve().name}.{together.tell('probe', uuid4().hex)}{PARTIAL}"
    try:
        with together.agreed("all looked"), together.first_then_others("looked"):
            if together.first:
                folder.mkdir(parents=True, exist_ok=True)
                probe.touch()
            elif not probe.exists():
                raise UserError(f"{path}: not what process 0 has there; all processes need to see one run folder")
    finally:
        if together.first:
            probe.unlink(missing_ok=True)


def _join(recipe: RunRecipe) -> Alone:
    """The processes that ``recipe`` is for, which torchrun has started. Raises UserError where they are not what it
    says."""
    from abyssal.distributed.launch import join, meet, own_device, started_by_torchrun

    parallel = getattr(recipe, "parallel", None) or ParallelConfig()
    started = started_by_torchrun() or 1
    t = recipe.training
    parallel.check(
        recipe.model_config_resolved(),
        batch_size=t.batch_size,
        sequence_length=t.sequence_length,
        accumulate=t.accumulate,
        world=started,
    )
    if parallel.alone:
        if parallel.offload:
            raise UserError("parallel.offload: true goes with several processes, and this is one; expected false")
        return Alone()
    for axis in ("tensor", "pipeline"):
        if t.compile and getattr(parallel, axis) > 1:
            raise UserError(f"training.compile: true: not together with parallel.{axis}; expected false")
    if t.fp8:
        raise UserError("training.fp8: true: not together with several processes yet; expected false")
    if recipe.optimizer.name != "adamw" or recipe.optimizer.state == "8bit":
        o = recipe.optimizer
        raise UserError(
            f"optimizer: {o.name} with state {o.state}: Muon's matrices and 8-bit blocks do not survive being divided "
            "among processes; expected adamw with float32 or bfloat16"
        )
    meeting = meet()
    meeting.same("recipe", to_yaml(recipe, resolved=True))
    return join(meeting, parallel, own_device(resolve_device(t.device)))


def _device(recipe: RunRecipe, together: Alone) -> torch.device:
    from abyssal.distributed.launch import own_device

    device = resolve_device(recipe.training.device)
    return own_device(device) if together.sharded else device


def resume(
    path: Path,
    recipe: RunRecipe | None,
    changes: dict[str, Any] | None = None,
    *,
    kind: Kind = TRAIN,
    **options: Any,
) -> Trainer:
    """A trainer that continues the run in ``path`` from its last whole checkpoint (from the start if it has none).

    ``recipe``, where given, must be the run's own but for what may change (more steps, how often to save and look);
    ``changes`` are laid over the run's. Raises UserError where it, the tokenizer or the data is another.
    """
    run = Run(path)
    stored = run_recipe(path, kind=kind)
    if changes:
        recipe = run_recipe(path, changes, kind=kind)
    if recipe is not None:
        if difference := _difference(stored, recipe):
            raise UserError(f"{path}: this run belongs to another recipe: {difference}")
        stored = recipe
    together = _join(stored)
    with together.agreed("prepared"):
        _check_shared(path, path.resolve(), together)
        return _resume(stored, path, run, kind, together, options)


def _resume(stored: Any, path: Path, run: Run, kind: Kind, together: Alone, options: dict[str, Any]) -> Trainer:
    if together.first:
        run.lock()
    stored, parts, identity = kind.prepare(stored, path, run.manifest, together)
    for what, value in identity.items():
        if value != run.manifest.get(what):
            raise UserError(
                f"{path}: {what}: not what this run began with; it was changed, or another one is there now"
            )
    steps = run.steps()
    config = parts.model.config
    if steps and (run.checkpoint(steps[-1]) / "config.json").is_file():
        saved = read_config(run.checkpoint(steps[-1])).model_copy(update={"published": {}})
        if saved != config.model_copy(update={"published": {}}):
            raise UserError(
                f"{run.checkpoint(steps[-1]) / 'config.json'}: not the model that {path / RECIPE} describes"
            )
    _check_prompts(stored, parts)
    trainer = Trainer(stored, parts, run, new=not steps, **options)
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
    elif together.first:
        run.forget_after(0)
    if together.first:
        write_text(path / RECIPE, to_yaml(stored, resolved=True))
    return trainer


def run_recipe(path: Path, changes: dict[str, Any] | None = None, *, kind: Kind = TRAIN) -> Any:
    """The recipe of the run in ``path``, with ``changes`` laid over it. Raises UserError."""
    where = str(path / RECIPE)
    began = Run(path).manifest.get("command", "train")
    if began != kind.command:
        raise UserError(f"{path}: a run of abyssal {began}; continue it with: abyssal {began} --resume {path}")
    recipe = parse(kind.recipe, merge(read_mapping(path / RECIPE), changes or {}), where)
    kind.check(recipe, recipe.model_config_resolved(), where)
    return recipe


def newest_run(folder: Path, recipe: RunRecipe, *, kind: Kind = TRAIN) -> Path:
    """The run in ``folder`` that was written to last among those that ``recipe`` fits. Raises UserError: none does."""
    found = []
    for manifest in folder.glob(f"*/{MANIFEST}"):
        if manifest.parent.name.endswith(PARTIAL):
            continue  # left by a kill while it was made
        try:
            if _difference(run_recipe(manifest.parent, kind=kind), recipe) is None:
                newest = max((p.stat().st_mtime for p in manifest.parent.glob("checkpoints/*/state.json")), default=0.0)
                found.append((newest, manifest.stat().st_mtime, manifest.parent))
        except UserError:
            continue  # a damaged run is no candidate
    if not found:
        raise UserError(f"--resume auto: no run in {folder} fits this recipe")
    return max(found)[2]


def _new_model(config: ModelConfig, seed: int, together: Alone) -> Transformer:
    """A model with its first weights; where processes share it, without: nobody has it whole."""
    if together.sharded and not config.tie_word_embeddings:  # being given memory, tied weights would come apart
        with torch.device("meta"):
            return Transformer(config)
    return Transformer(config, generator=torch.Generator().manual_seed(seed))


def _open(recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer) -> tuple[TokenShards, TokenShards]:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"data.tokenizer: it has {tokenizer.vocab_size} tokens, model.vocab_size is {config.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )
    train, validation = open_data(recipe.data, tokenizer)
    if len(validation) < 2:
        raise UserError(
            f"data.source: {len(validation)} held-out tokens of {recipe.data.validation or recipe.data.source} are too "
            "few to validate on; use more text or a larger data.validation_fraction"
        )
    return train, validation


def _check_prompts(recipe: RunRecipe, parts: Parts) -> None:
    s = recipe.samples
    if parts.together.sharded:
        return  # nothing is sampled
    try:
        Sampling(max_new_tokens=s.tokens, temperature=s.temperature, top_p=s.top_p)
    except UserError as error:
        raise UserError(f"samples.{error}") from None
    for prompt in recipe.samples.prompts:
        try:
            # Checks the prompt at once; nothing is generated before the first next().
            stream(parts.model, parts.tokenizer, prompt)
        except UserError as error:
            raise UserError(f"samples.prompts: {prompt[:40]!r}: {error}") from None


def _difference(stored: RunRecipe, recipe: RunRecipe) -> str | None:
    """The first setting in which two recipes are different runs, as ``key: theirs, not ours``; None if they are one."""
    old, new = _flat(stored.decisive()), _flat(recipe.decisive())
    for key in [*old, *(k for k in new if k not in old)]:
        if old.get(key) != new.get(key):
            return f"{key} is {old.get(key)!r} there, {new.get(key)!r} here"
    return None


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
