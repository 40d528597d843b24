"""A run's checkpoints: everything that training needs to go on as if it had not stopped.

One process writes a model folder in the published layout and training.safetensors beside it. Several write
``sharded/``, everyone its own part (:mod:`abyssal.checkpoint.sharded`). Either is read by any number of processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from abyssal.checkpoint import load_model, read_tensors, write_tensors
from abyssal.checkpoint.folder import config_to_json
from abyssal.distributed.together import local
from abyssal.errors import UserError
from abyssal.training.weights import lows

if TYPE_CHECKING:
    from abyssal.training.trainer import Trainer

TRAINING_STATE = "training.safetensors"


def save(trainer: Trainer) -> None:
    """Writes a checkpoint of the state after ``trainer.done`` steps."""
    run, step, keep = trainer.run, trainer.done, trainer.recipe.checkpoint.keep
    state = {"step": step, "tokens": trainer.tokens, "loader": trainer.loader.state_dict(), "best": trainer.best}

    def write(folder: Path) -> None:
        trainer.parts.keeper.write(trainer.model, folder, lows(trainer.model, trainer.optimizer))
        trainer.tokenizer.save(folder)
        write_tensors(_optimizer(trainer) | _balancers(trainer), folder / TRAINING_STATE)

    if not trainer.together.sharded:
        run.save(step, state, write, keep)
    elif not run.checkpoint(step).exists():  # a run stopped at a step that it had just saved
        _save_together(trainer, state)


def _save_together(trainer: Trainer, state: dict[str, Any]) -> None:
    from abyssal.checkpoint import sharded

    run, step, together = trainer.run, trainer.done, trainer.together
    tensors = _everything(trainer)

    def write(folder: Path) -> None:
        config = trainer.model.config
        (folder / "config.json").write_text(config_to_json(config, torch.float32), encoding="utf-8")
        trainer.tokenizer.save(folder)
        together.tell(f"save {step}", str(folder))
        sharded.write(tensors, folder)

    with together.agreed(f"saved {step}"):
        if together.first:
            run.save(step, state, write, trainer.recipe.checkpoint.keep)
        else:
            sharded.write(tensors, Path(together.tell(f"save {step}")))


def resume(trainer: Trainer, step: int) -> None:
    """Takes the state of the checkpoint after ``step`` steps; all weights are FP32. Raises UserError where it does not
    fit."""
    from abyssal.checkpoint import sharded

    run, folder = trainer.run, trainer.run.checkpoint(step)
    state = run.state(step)
    if state["step"] != step:
        raise UserError(f"{folder / 'state.json'}: step: {state['step']!r}, the folder's name says {step}")
    if sharded.is_sharded(folder):
        sharded.read(_everything(trainer, balancers=False), folder)
        _take_balancers(trainer, sharded.read_all(folder, "balance."))
    else:
        tensors = read_tensors(folder / TRAINING_STATE)
        if trainer.together.sharded:
            _take_parts(trainer.model, load_model(folder, dtype=torch.float32))
        else:
            trainer.parts.keeper.read(trainer.model, folder)
        _take_optimizer(trainer, tensors, folder / TRAINING_STATE)
        _take_balancers(trainer, tensors)
    trainer.loader.load_state_dict(state["loader"])
    trainer.done, trainer.tokens, trainer.best = state["step"], state["tokens"], state["best"]
    if trainer.together.first:
        run.forget_after(step)


def _everything(trainer: Trainer, balancers: bool = True) -> dict[str, Tensor]:
    """Weights, the optimizer's state and the balancers' under the names of sharded checkpoints."""
    from abyssal.distributed.parts import matrices

    tensors = {name: tensor.detach() for name, tensor in trainer.model.state_dict().items()}
    return matrices(tensors | _optimizer(trainer)) | (_balancers(trainer) if balancers else {})


def _trained(trainer: Trainer) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]


def _optimizer(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in _trained(trainer):
        for key, value in trainer.optimizer.state[parameter].items():
            if key != "low":  # it is in the model's weights, which are written as FP32
                whole = value if key == "step" else trainer.together.like(value, parameter)
                tensors[f"optimizer.{key}.{name}"] = whole
    return tensors


def _balancers(trainer: Trainer) -> dict[str, Tensor]:
    return {
        f"balance.{name}.{key}": value
        for name, balancer in trainer.balancers.items()
        for key, value in balancer.state_dict().items()
    }


def _take_optimizer(trainer: Trainer, tensors: dict[str, Tensor], file: Path) -> None:
    own = _optimizer(trainer)
    if trainer.together.sharded:
        from abyssal.distributed.parts import matrices

        own, tensors = matrices(own), matrices(tensors)
    for name, mine in own.items():
        stored = tensors.get(name)
        if stored is None:
            raise UserError(f"{file}: no {name}")
        if (stored.shape, stored.dtype) != (mine.shape, mine.dtype):
            raise UserError(
                f"{file}: {name}: {stored.dtype} {list(stored.shape)}, expected {mine.dtype} {list(mine.shape)}"
            )
        local(mine).copy_(trainer.together.own(stored, mine))


def _take_balancers(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    for name, balancer in trainer.balancers.items():
        prefix = f"balance.{name}."
        found = {k.removeprefix(prefix): v.to(trainer.device) for k, v in tensors.items() if k.startswith(prefix)}
        balancer.load_state_dict(found)


@torch.no_grad()
def _take_parts(model: nn.Module, whole: nn.Module) -> None:
    """Fills ``model``, which processes share, from ``whole``."""
    from abyssal.distributed.parts import matrices, own_part

    theirs = matrices(whole.state_dict())
    for name, tensor in matrices(model.state_dict()).items():
        local(tensor).copy_(own_part(theirs[name], tensor))
