"""The training loop: steps (:mod:`abyssal.training.step`) at the schedule's learning rate, their metrics, and every so
often validation, samples, a checkpoint.

Training in FP32 on a CPU is deterministic: a run that was interrupted and resumed has the same losses, bit for bit, as
one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from abyssal.analysis.balance import balance
from abyssal.checkpoint import load_into, save_model
from abyssal.checkpoint.run import Run
from abyssal.config import ModelConfig
from abyssal.data.loader import Batch, Loader
from abyssal.data.shards import TokenShards
from abyssal.data.tokenizer import Tokenizer
from abyssal.distributed.together import Alone
from abyssal.errors import UserError
from abyssal.generation import generate
from abyssal.model import Transformer
from abyssal.model.fp8_training import train_in_fp8
from abyssal.training import saving
from abyssal.training.board import Board
from abyssal.training.evaluate import Evaluation, HeldOut, evaluate
from abyssal.training.hardware import autocast, device_memory, process_memory
from abyssal.training.loss import Objective
from abyssal.training.optimizer import learning_rate
from abyssal.training.recipe import RunRecipe
from abyssal.training.step import NotFinite, StepResult, TrainingStep


class Watcher:
    """Told what happens as it happens; the command line shows it. The default says nothing."""

    def step(self, step: int, steps: int, record: dict[str, Any]) -> None:
        """After every logged step."""

    def validated(self, step: int, evaluation: Evaluation) -> None:
        """After a validation."""

    def sampled(self, step: int, samples: list[dict[str, str]]) -> None:
        """After samples were written."""


class Batches(Protocol):
    """Endless training batches that can be continued where they were left."""

    def next(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def build_loader(recipe: RunRecipe, config: ModelConfig, shards: TokenShards, together: Alone | None = None) -> Loader:
    """The loader of training batches. Raises UserError for a split shorter than one sequence."""
    together = together or Alone()
    t = recipe.training
    return Loader(
        shards,
        batch_size=t.batch_size,
        sequence_length=t.sequence_length,
        lookahead=1 + config.mtp.num_nextn_predict_layers,
        seed=t.seed,
        part=(together.part, together.parts),
    )


class Keeper:
    """What of a model a checkpoint holds: here all of it, as a published folder."""

    def write(self, model: Transformer, folder: Path, lows: Mapping[str, Tensor]) -> None:
        """Writes it into ``folder``. ``lows``: :func:`abyssal.checkpoint.save_model`."""
        save_model(model, folder, lows)

    def read(self, model: Transformer, folder: Path) -> None:
        """Reads it back. Raises UserError where it does not fit."""
        load_into(model, folder)


@dataclass(frozen=True)
class Parts:
    """What a run is made of beside its recipe."""

    model: Transformer
    tokenizer: Tokenizer
    loader: Batches
    held_out: HeldOut
    data: str
    """The data in a few words."""
    device: torch.device
    dtype: torch.dtype
    """What matrix products run in."""
    objective: Objective = field(default_factory=Objective)
    keeper: Keeper = field(default_factory=Keeper)
    together: Alone = field(default_factory=Alone)


class Trainer:
    """Trains ``parts.model`` by ``recipe`` in ``run``, from where the run stands.

    ``should_stop`` is asked after every step; when it says so, the state is saved and :meth:`train` returns. Without
    ``new`` the model needs no first weights: :meth:`resume` comes next.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        parts: Parts,
        run: Run,
        *,
        watcher: Watcher | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        new: bool = True,
    ) -> None:
        self.recipe, self.parts, self.run = recipe, parts, run
        self.tokenizer, self.loader, self.held_out = parts.tokenizer, parts.loader, parts.held_out
        self.device, self.dtype = parts.device, parts.dtype
        self.together = parts.together
        self.watcher = (watcher if self.together.first else None) or Watcher()
        self.should_stop = should_stop
        self.model = model = parts.model.train()
        if not next(model.parameters()).is_meta:
            model.to(parts.device)
        if recipe.training.fp8:
            train_in_fp8(model)
        if recipe.training.compile:
            for block in (*model.blocks, *model.mtp_modules):
                block.compile_parts()
        generator = torch.Generator().manual_seed(recipe.training.seed) if new else None
        self.together.divide(model, parts.dtype, generator)
        self._step = TrainingStep(
            model,
            optimizer=recipe.optimizer,
            balance=recipe.balance,
            clip=recipe.training.clip,
            mtp_weight=recipe.training.mtp_weight,
            device=parts.device,
            dtype=parts.dtype,
            recompute=recipe.training.recompute,
            objective=parts.objective,
            together=parts.together,
        )
        self.optimizer, self.balancers = self._step.optimizer, self._step.balancers
        self.samples = bool(recipe.samples.prompts) and not self.together.sharded
        self.done = 0
        self.tokens = 0
        self._logged = 0  # tokens when metrics were last written
        self.best: dict[str, Any] | None = None
        self.board: Board | None = None
        self.saver = saving.Saver(parts.together)

    def train(self) -> bool:
        """Runs to the recipe's last step. True when it got there, False when asked to stop. The model's weights are
        FP32 afterwards, whatever they were meanwhile.

        Raises UserError for a loss or gradient that is not finite: the step is named and not applied, and the last
        checkpoint is kept. Raises OSError for a full disk; checkpoints written before stay whole.
        """
        if self.together.first:
            self.run.lock()
            self.board = Board(self.run.path / "tensorboard", self.done + 1)
        self._step.begin()
        try:
            finished = self._train()
            self.saver.wait()
            return finished
        finally:
            self._step.finish()
            if self.board is not None:
                self.board.close()
                self.run.unlock()

    def _train(self) -> bool:
        r, steps = self.recipe, self.recipe.training.steps
        pending: list[StepResult] = []
        since = time.perf_counter()
        while self.done < steps:
            pending.append(self.step())
            self.done += 1
            # Where a save in the background has failed, all stop; the next one says why.
            last, stopping = self.done == steps, self.together.any(self.should_stop() or self.saver.failed)
            validating = last or self.done % r.validation.every == 0
            saving = last or stopping or self.done % r.checkpoint.every == 0
            # A record never reaches over a checkpoint: what was pending when a run is killed would be lost to it.
            if validating or saving or self.done % r.log.every == 0:
                self._check(pending)
                now = time.perf_counter()
                record = self._record(pending, now - since)
                self._log(record)
                self.watcher.step(self.done, steps, record)
                pending, since = [], now
            if validating:
                self._validate()
            if self.samples and (last or self.done % r.samples.every == 0):
                self._sample()
            if saving or self._is_best_now():
                self.save()
            if stopping and not last:
                return False
            if not pending:
                since = time.perf_counter()  # validation and saving are not part of a step's time
        return True

    def step(self) -> StepResult:
        """One optimizer step over ``accumulate`` micro-batches. On a CPU, raises UserError where it came to no finite
        number; on a GPU that is not known before it is logged."""
        t = self.recipe.training
        lr = learning_rate(self.done, t.steps, self.recipe.optimizer.lr, self.recipe.schedule)
        batches = [self.together.own_part(self.loader.next(), t.sequence_length) for _ in range(t.accumulate)]
        try:
            result = self._step(batches, t.sequence_length, lr, self.done / t.steps)
        except NotFinite as error:
            raise self._not_finite(self.done + 1, error.what, error.value) from None
        real = sum(int((batch.at(batch.documents, 0, t.sequence_length) >= 0).sum()) for batch in batches)
        self.tokens += self.together.counts([real])[0]
        return result

    def _check(self, pending: list[StepResult]) -> None:
        for step, result in enumerate(pending, start=self.done - len(pending) + 1):
            try:
                result.check()
            except NotFinite as error:
                raise self._not_finite(step, error.what, error.value) from None

    def _not_finite(self, step: int, what: str, value: float) -> UserError:
        with suppress(UserError, OSError):
            self.saver.wait()
        steps = self.run.steps()
        kept = f"the last good checkpoint is {self.run.checkpoint(steps[-1])}" if steps else "no checkpoint yet"
        return UserError(
            f"step {step}: the {what} is {value}; {kept}; "
            f"begin anew with a lower optimizer.lr (now {self.recipe.optimizer.lr}) or training.dtype=float32"
        )

    def _record(self, results: list[StepResult], seconds: float) -> dict[str, Any]:
        """The metrics of the steps since the last record: means, and loads added up."""
        n = len(results)
        tokens, self._logged = self.tokens - self._logged, self.tokens
        return {
            "kind": "train",
            "step": self.done,
            "steps": n,
            "loss": sum(r.loss for r in results) / n,
            "mtp_loss": [sum(column) / n for column in zip(*(r.mtp_loss for r in results), strict=True)],
            "balance_loss": sum(r.balance_loss for r in results) / n,
            "lr": results[-1].lr,
            "grad_norm": results[-1].grad_norm,
            "step_time": seconds / n,
            "tokens_per_s": tokens / seconds,
            "tokens": self.tokens,
            **{name: sum(r.extras[name] for r in results) / n for name in self.parts.objective.names},
            "memory": {"process": process_memory(), "device": device_memory(self.device)},
            "layers": self._layers(results),
        }

    def _layers(self, results: list[StepResult]) -> dict[str, Any]:
        """What the routers did, by layer: loads added up, their balance, the biases as they are now."""
        layers: dict[str, Any] = {}
        biases = self._biases(list(results[-1].loads))
        for layer in results[-1].loads:
            per_step = [r.loads[layer].cpu() for r in results]
            load = torch.stack(per_step).sum(0)
            b = balance(load)
            cv = sum(balance(one).cv for one in per_step) / len(results)
            layers[str(layer)] = {"load": load.tolist(), "cv": cv, "max_vio": b.max_vio, "dead": b.dead}
            if biases is not None:
                bias = [round(x, 7) for x in biases[layer]]
                layers[str(layer)] |= {"bias": bias, "bias_range": [min(bias), max(bias)]}
        return layers

    def _biases(self, layers: list[int]) -> dict[int, list[float]] | None:
        """The routers' biases, also of those that other processes have; None for a model without."""
        moe, routers = self.model.config.moe, self.model.routers
        if moe is None or not moe.has_bias:
            return None
        table = torch.zeros(len(layers), moe.n_routed_experts, device=self.device)
        for row, layer in zip(table, layers, strict=True):
            if layer in routers:
                row.copy_(routers[layer].e_score_correction_bias)
        return dict(zip(layers, self.together.sum_of_stages(table).tolist(), strict=True))

    def _validate(self) -> None:
        t = self.recipe.training
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):  # without gradients all would be compiled once more
            evaluation = evaluate(
                self.model,
                self.held_out,
                sequence_length=t.sequence_length,
                dtype=self.dtype,
                batches=self.recipe.validation.batches,
                objective=self.parts.objective,
                together=self.together,
            )
        self.model.train()
        if not math.isfinite(evaluation.loss):
            raise self._not_finite(self.done, "validation loss", evaluation.loss)
        record = {"kind": "validation", "step": self.done, **evaluation.figures()}
        self._log(record)
        if self.best is None or evaluation.loss < self.best["loss"]:
            self.best = {"step": self.done, "loss": evaluation.loss}
        self.watcher.validated(self.done, evaluation)

    def _log(self, record: dict[str, Any]) -> None:
        if not self.together.first:
            return
        self.run.append_metrics(record)
        if self.board is not None:
            self.board.add(record)

    def _is_best_now(self) -> bool:
        return self.best is not None and self.best["step"] == self.done

    def _sample(self) -> None:
        s = self.recipe.samples
        # Some weights may be BF16 and others FP32; and every length would be compiled for itself.
        with autocast(self.device, self.dtype), torch.compiler.set_stance("force_eager"):
            texts = generate(
                self.model,
                self.tokenizer,
                s.prompts,
                max_new_tokens=s.tokens,
                temperature=s.temperature,
                top_p=s.top_p,
                seed=self.recipe.training.seed,
            )
        samples = [{"prompt": p, "text": text} for p, text in zip(s.prompts, texts, strict=True)]
        self._log({"kind": "samples", "step": self.done, "samples": samples})
        self.watcher.sampled(self.done, samples)

    def save(self) -> None:
        """Writes a checkpoint of the state after ``done`` steps."""
        self.saver.save(self)

    def resume(self, step: int) -> None:
        """Takes the state of the checkpoint after ``step`` steps. Raises UserError where it does not fit."""
        self._step.finish()
        saving.resume(self, step)
        self._step.begin()
        self._logged = self.tokens
