"""Pipeline parallelism: each process has some layers in a row (a stage), or two such rows, and micro-batches go through
the stages one behind the other. In which order forward and backward passes are worked off is torch's schedule
(torch.distributed.pipelining).

    stage 0: embedding, layers → [B, T, D] → … → last stage: layers, norm, head, MTP modules, loss

A stage is a :class:`Transformer` of which the other layers are not there. Balancing losses of a layer are worked out
where it is; their gradient joins what comes back from the stage behind. MTP modules (and a head tied to the embedding)
need the embedding at the other end: the last stage has a copy. Its gradient goes to stage 0, which has the weight, and
the weight comes to it before every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abyssal.config.parallel import stage_layers
from abyssal.distributed.mesh import Mesh
from abyssal.distributed.together import local
from abyssal.model import Transformer


class Work(Protocol):
    """One micro-batch through one stage."""

    def __call__(self, model: Transformer, index: int, states: Tensor | None, last: bool) -> Tensor:
        """``model`` has the stage's layers, ``index`` is the micro-batch's number, ``states`` [B, T, D] what the stage
        before has made of it. Returns the states for the next stage or, of the last one, the loss."""


class Stage(nn.Module):
    """Stage ``index`` of ``count``: ``model`` has what the stage works with."""

    def __init__(self, model: Transformer, index: int, count: int) -> None:
        super().__init__()
        self.model, self.index = model, index
        self.first, self.last = index == 0, index == count - 1
        self.done = 0

    def begin(self, work: Work) -> None:
        """``work`` is what is done with the next micro-batches, from number 0 on."""
        self._work, self.done = work, 0

    def forward(self, x: Tensor | None) -> Tensor:
        """The next micro-batch, of which the stage before has made ``x``: schedules take them in turn everywhere."""
        self.done += 1
        return self._work(self.model, self.done - 1, None if self.first else x, self.last)


def split(model: Transformer, mesh: Mesh) -> list[Stage]:
    """This process's stages of ``model``, which is whole; modules are taken over, the rest of the model stays as it
    is."""
    count = mesh.parallel.stages
    return [Stage(_some(model, index, count), index, count) for index in mesh.parallel.stages_of(mesh.place.pipeline)]


def _some(whole: Transformer, index: int, count: int) -> Transformer:
    config, first, last = whole.config, index == 0, index == count - 1
    with torch.device("meta"):
        part = Transformer(config)
    layers = stage_layers(config, count, index)
    for layer, block in enumerate(whole.model.layers):
        part.model.layers[layer] = block if layer in layers else _elsewhere()
    part.model.embed_tokens = _elsewhere()
    if first:
        part.model.embed_tokens = whole.model.embed_tokens
    elif last and (config.tie_word_embeddings or part.mtp_modules):
        weight = whole.model.embed_tokens.weight
        copy = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        part.model.embed_tokens = nn.Embedding(weight.shape[0], weight.shape[1], _weight=copy)
    part.model.norm = whole.model.norm if last else _elsewhere()
    part.lm_head = whole.lm_head if last else _elsewhere()
    if last and config.tie_word_embeddings:
        part.lm_head.weight = part.model.embed_tokens.weight
    return part


def _elsewhere() -> Any:
    """In place of a module that another stage has; whatever goes in comes out."""
    return nn.Identity()


class Pipeline:
    """The stages of one process among those of the others, ``stages`` divided and sharded as they are to be.

    ``whole`` becomes what of the model this process has: all its stages' layers.
    """

    def __init__(self, whole: Transformer, stages: list[Stage], mesh: Mesh) -> None:
        self.stages, self.mesh, self.parallel = stages, mesh, mesh.parallel
        self.group = mesh.dense.get_group("pipeline")
        self._schedule: Any = None
        self._shape: tuple[int, ...] = ()
        # The residual stream has the norms' dtype, whatever products run in.
        self._dtype, self._width = next(stages[0].parameters()).dtype, whole.config.hidden_size
        self._places = {
            stage: place for place in range(self.parallel.pipeline) for stage in self.parallel.stages_of(place)
        }
        for layer in range(len(whole.model.layers)):
            own = [stage.model.model.layers[layer] for stage in stages]
            whole.model.layers[layer] = next((b for b in own if not isinstance(b, nn.Identity)), _elsewhere())
        first = [stage.model for stage in stages if stage.first]
        last = [stage.model for stage in stages if stage.last]
        # Of sharded modules the weight is what FSDP keeps, whatever it has gathered in its place.
        self._embedding = first[0].model.embed_tokens.weight if first else None
        self._copy = next((m.model.embed_tokens.weight for m in last if hasattr(m.model.embed_tokens, "weight")), None)
        whole.model.embed_tokens = first[0].model.embed_tokens if first else _elsewhere()
        whole.model.norm = last[0].model.norm if last else _elsewhere()
        tied = whole.config.tie_word_embeddings  # then the head is the copy: the weight is the first stage's
        whole.lm_head = last[0].lm_head if last and not tied else _elsewhere()
        self.shared = tied or whole.config.mtp.num_nextn_predict_layers > 0

    def run(self, work: Work, count: int, shape: torch.Size) -> None:
        """Forward and backward passes of ``count`` micro-batches of ``shape`` [B, T], by the schedule."""
        self.refresh()
        if self._schedule is None:
            self._shape = (count, *shape)
            self._schedule = self._scheduled(count, shape)
        assert self._shape == (count, *shape)
        for stage in self.stages:
            stage.begin(work)
        numbers = torch.arange(count)
        arguments = (numbers,) if self.stages[0].first else ()
        self._schedule.step(*arguments, target=numbers, return_outputs=False)
        assert all(stage.done == count for stage in self.stages)
        self._return_gradient()

    def forward(self, work: Work, shape: torch.Size) -> Tensor | None:
        """One micro-batch forward through all stages, without gradients; what the last stage made of it, on the process
        that has it."""
        self.refresh()
        out: Tensor | None = None
        here = self.mesh.place.pipeline
        for stage in self.stages:
            states = out
            if not stage.first and (before := self._places[stage.index - 1]) != here:
                states = self._states(shape)
                dist.recv(states, self._rank(before), group=self.group)
            stage.begin(work)
            out = stage(states)
            assert out is not None
            if not stage.last and (behind := self._places[stage.index + 1]) != here:
                dist.send(out.contiguous(), self._rank(behind), group=self.group)
                out = None
        return out

    def refresh(self) -> None:
        """Has the last stage's copy of the embedding be what the first stage's is now."""
        if self.shared:
            self._carry(0, -1, local, lambda mine, given: local(mine).copy_(given))

    def _return_gradient(self) -> None:
        """Adds the gradient of the last stage's copy to the embedding's."""
        if self.shared:
            self._carry(-1, 0, _gradient, lambda mine, given: _gradient(mine).add_(given))
        if self._copy is not None:
            self._copy.grad = None

    @torch.no_grad()
    def _carry(
        self, source: int, target: int, give: Callable[[Tensor], Tensor], take: Callable[[Tensor, Tensor], object]
    ) -> None:
        """What stage ``source`` gives of its embedding is taken by stage ``target`` into its own (0 and -1)."""
        weights = {0: self._embedding, -1: self._copy}
        mine, theirs = weights[source], weights[target]
        begin, end = (self._places[which % self.parallel.stages] for which in (source, target))
        if mine is not None and theirs is not None:
            take(theirs, give(mine))
        elif mine is not None:
            dist.send(give(mine).contiguous(), self._rank(end), group=self.group)
        elif theirs is not None:
            given = torch.empty_like(local(theirs))
            dist.recv(given, self._rank(begin), group=self.group)
            take(theirs, given)

    def _states(self, shape: torch.Size) -> Tensor:
        rows, length = shape
        if self.parallel.sequence:
            length //= self.parallel.tensor
        return torch.empty(rows, length, self._width, dtype=self._dtype, device=self.mesh.device)

    def _rank(self, place: int) -> int:
        return dist.get_global_rank(self.group, place)

    def _scheduled(self, count: int, shape: torch.Size) -> Any:
        from torch.distributed import pipelining

        # Shapes are told: what torch asks a stage for otherwise it would send by pickle.
        states = self._states(shape).requires_grad_(True)
        loss = states.new_empty((), requires_grad=True)
        places = [
            pipelining.PipelineStage(
                stage,
                stage.index,
                self.parallel.stages,
                self.mesh.device,
                input_args=(torch.zeros(1, dtype=torch.int64) if stage.first else states,),
                output_args=(loss if stage.last else states,),
                group=self.group,
            )
            for stage in self.stages
        ]
        schedule = {
            "1f1b": pipelining.Schedule1F1B,
            "interleaved": pipelining.ScheduleInterleaved1F1B,
            "zero_bubble": pipelining.ScheduleZBVZeroBubble,
            "dualpipev": pipelining.ScheduleDualPipeV,
        }[self.parallel.schedule]
        # A micro-batch's loss is its part of the step's already, so gradients are added up as they are.
        single = schedule is pipelining.Schedule1F1B
        return schedule(
            places[0] if single else places,
            n_microbatches=count,
            loss_fn=lambda out, number: out,
            scale_grads=False,
        )


def _gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return local(weight.grad)
