"""A run's checkpoints: everything that training needs to go on as if it had not stopped.

One process writes a model folder in the published layout and training.safetensors beside it. Several write
``sharded/``, everyone its own part (:mod:`abyssal.checkpoint.sharded`). Either is read by any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from abyssal.checkpoint import read_tensors, sharded, write_tensors
from abyssal.checkpoint.folder import config_to_json
from abyssal.checkpoint.load import match
from abyssal.checkpoint.names import stacked_matrix
from abyssal.checkpoint.shards import Shards
from abyssal.config import read_config
from abyssal.distributed.together import local
from abyssal.errors import UserError
from abyssal.model import Transformer
from abyssal.training.weights import lows

if TYPE_CHECKING:
    import torch.distributed as dist

    from abyssal.distributed.together import Alone
    from abyssal.training.trainer import Trainer

TRAINING_STATE = "training.safetensors"


_LONG = timedelta(hours=1)  # that one part may take to write longer than another; of a death the others hear at once


class Saver:
    """Writes a run's checkpoints, one at a time. A checkpoint counts once it is whole: the first process gives it its
    name when every part is on the disk."""

    def __init__(self, together: Alone) -> None:
        self._under_way: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None
        if together.sharded:
            import torch.distributed as dist

            # Of its own: what the thread says must not get between what training says.
            self._group = dist.new_group(backend="gloo", timeout=_LONG)

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed; :meth:`wait` raises why."""
        job = self._under_way
        return job is not None and job.done() and job.exception() is not None

    def wait(self) -> None:
        """Waits for the save under way. Raises UserError or OSError where the disk did not take it; what was there
        before is still there then."""
        job, self._under_way = self._under_way, None
        if job is not None:
            job.result()

    def save(self, trainer: Trainer) -> None:
        """Saves the state after ``trainer.done`` steps; several processes do so in the background, where the recipe
        wants that. Raises what :meth:`wait` does."""
        self.wait()
        run, step, settings = trainer.run, trainer.done, trainer.recipe.checkpoint
        state = {"step": step, "tokens": trainer.tokens, "loader": trainer.loader.state_dict(), "best": trainer.best}
        if not trainer.together.sharded:
            run.save(step, state, lambda folder: _write(trainer, folder), settings.keep)
        elif not run.checkpoint(step).exists():  # a run stopped at a step that it had just saved
            # A copy: the next step changes what is being written.
            tensors = sharded.staged(_everything(trainer))
            self._under_way = _in_background(lambda: self._save_together(trainer, state, tensors))
            if not settings.background:
                self.wait()

    def _save_together(self, trainer: Trainer, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        together, step = trainer.together, state["step"]

        def write(folder: Path) -> None:
            config = trainer.model.config
            (folder / "config.json").write_text(config_to_json(config, torch.float32), encoding="utf-8")
            trainer.tokenizer.save(folder)
            together.tell(f"save {step}", str(folder))
            sharded.write(tensors, folder, self._group)

        with together.agreed(f"saved {step}"):
            if together.first:
                trainer.run.save(step, state, write, trainer.recipe.checkpoint.keep)
            else:
                sharded.write(tensors, Path(together.tell(f"save {step}")), self._group)


def _in_background(work: Callable[[], None]) -> Future[None]:
    """The outcome of ``work``, which a thread does. It keeps no process alive that has to end."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return outcome


def _write(trainer: Trainer, folder: Path) -> None:
    trainer.parts.keeper.write(trainer.model, folder, lows(trainer.model, trainer.optimizer))
    trainer.tokenizer.save(folder)
    write_tensors(_optimizer(trainer) | _balancers(trainer), folder / TRAINING_STATE)


def resume(trainer: Trainer, step: int) -> None:
    """Takes the state of the checkpoint after ``step`` steps; all weights are FP32. Raises UserError where it does not
    fit."""
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
            _take_parts(trainer.model, folder)
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
    if trainer.model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # the embedding's, which is there
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
        # Of a pipeline's layers a process keeps its own ones' state.
        balancer.load_state_dict({k: v for k, v in found.items() if int(k.rpartition(".")[2]) in trainer.model.routers})


@torch.no_grad()
def _take_parts(model: nn.Module, folder: Path) -> None:
    """Fills ``model``, which processes share, from the published ``folder``, a tensor at a time. Raises UserError where
    it is another model's."""
    from abyssal.distributed.parts import matrices, take_rows

    with torch.device("meta"):
        whole = Transformer(read_config(folder))
    shards = Shards(folder)
    match(whole, shards)
    own = matrices(model.state_dict())
    for file in shards.files:
        with shards.open(file) as opened:
            for published in shards.names(file):
                name, expert = stacked_matrix(published)
                if name in own:
                    tensor = opened.get_tensor(published)
                    take_rows(own[name], expert or 0, tensor if expert is None else tensor.unsqueeze(0))
