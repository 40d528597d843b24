"""What training asks of the other processes: :class:`Alone` asks nobody, :class:`Together` is a mesh of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abyssal.errors import UserError
from abyssal.kernels.adamw import total_norm

if TYPE_CHECKING:
    from abyssal.data.loader import Batch
    from abyssal.distributed.launch import Meeting
    from abyssal.distributed.mesh import Mesh
    from abyssal.distributed.pipeline import Pipeline
    from abyssal.model import Transformer


def local(x: Tensor) -> Tensor:
    """This process's part of ``x``: of a DTensor what lies here (changed in place, it changes), else all of it."""
    part: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part


class Alone:
    """One process."""

    first = True
    """Whether this is the process that writes and speaks."""
    sharded = False
    """Whether weights are FP32 and BF16 only where they are gathered (:mod:`abyssal.distributed.sharding`)."""
    parts = 1
    """Of the batch's sequences each process has one part of so many."""
    part = 0
    device: torch.device | None = None
    """What is computed on, where weights may be kept elsewhere."""
    pipeline: Pipeline | None = None
    """What runs the model's stages, where a process has some of them."""

    @contextmanager
    def agreed(self, name: str) -> Iterator[None]:
        """What fails inside on one process fails on all, with the same line; all have done it when it ends."""
        yield

    @contextmanager
    def first_then_others(self, name: str) -> Iterator[None]:
        """What is inside is done by the first process, then by the others, who find what it has left."""
        yield

    def tell(self, name: str, word: str = "") -> str:
        """What the first process says at ``name``."""
        return word

    def like(self, part: Tensor, parameter: Tensor) -> Tensor:
        """``part``, which belongs to this process's part of ``parameter``, as something divided in the same way."""
        return part

    def own(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """What of ``whole`` belongs to this process's part of ``parameter``."""
        return whole

    def divide(self, model: Transformer, dtype: torch.dtype, generator: torch.Generator | None = None) -> None:
        """Divides ``model``, whole and alike everywhere, in place; ``dtype`` is what products run in. One that is on
        the meta device has its first weights drawn by ``generator``, or any where there is none."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes that share the batch; ``x`` may be changed."""
        return x

    def sum_of_sequences(self, x: Tensor) -> Tensor:
        """The sum over the processes that have the parts of the same sequences; ``x`` may be changed."""
        return x

    def sum_of_stages(self, x: Tensor) -> Tensor:
        """The sum over the processes of a pipeline; ``x`` may be changed."""
        return x

    def own_part(self, batch: Batch, length: int) -> Batch:
        """``batch``, of whose sequences of ``length`` this process works out what is its own."""
        return batch

    def counts(self, numbers: Sequence[int]) -> list[int]:
        """The sums of ``numbers``."""
        return list(numbers)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag

    def complete_gradients(self, model: Transformer) -> None:
        """Adds up gradients of which processes have summands, behind the last backward pass of a step."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """√(Σ x²) over the whole model's gradients, FP32 (FP64)."""
        return total_norm(gradients)

    def part_ways(self) -> None:
        """Nothing more is asked of the others."""


class Together(Alone):
    """The processes of a mesh. Everything here has to be called by all of them, in the same order."""

    sharded = True

    def __init__(self, mesh: Mesh, meeting: Meeting | None = None) -> None:
        self.mesh, self.meeting, self.device = mesh, meeting, mesh.device
        self.first = mesh.rank == 0
        self.part, self.parts = mesh.data_part
        if mesh.parallel.context > 1:
            _ = mesh.context  # made by all at the same time

    @contextmanager
    def agreed(self, name: str) -> Iterator[None]:
        assert self.meeting is not None
        try:
            yield
        except (UserError, OSError) as error:
            self.meeting.fail(str(error))
            raise
        self.meeting.arrive(name)

    @contextmanager
    def first_then_others(self, name: str) -> Iterator[None]:
        assert self.meeting is not None
        if not self.first:
            self.meeting.arrive(name, patient=True)  # the first may have a corpus to tokenise
        yield
        if self.first:
            self.meeting.arrive(name)

    def divide(self, model: Transformer, dtype: torch.dtype, generator: torch.Generator | None = None) -> None:
        from abyssal.distributed.apply import parallelize

        self.pipeline = parallelize(model, self.mesh, dtype, generator)

    def tell(self, name: str, word: str = "") -> str:
        assert self.meeting is not None
        return self.meeting.arrive(name, word)[0]

    def like(self, part: Tensor, parameter: Tensor) -> Tensor:
        from abyssal.distributed.parts import as_divided

        return as_divided(part, parameter)

    def own(self, whole: Tensor, parameter: Tensor) -> Tensor:
        from abyssal.distributed.parts import own_part

        return own_part(whole, parameter)

    def sum(self, x: Tensor) -> Tensor:
        import torch.distributed as dist

        dist.all_reduce(x, group=self.mesh.batch)
        return x

    def sum_of_sequences(self, x: Tensor) -> Tensor:
        import torch.distributed as dist

        if self.mesh.parallel.context > 1:
            dist.all_reduce(x, group=self.mesh.context)
        return x

    def sum_of_stages(self, x: Tensor) -> Tensor:
        import torch.distributed as dist

        if self.mesh.parallel.pipeline > 1:
            dist.all_reduce(x, group=self.mesh.dense.get_group("pipeline"))
        return x

    def own_part(self, batch: Batch, length: int) -> Batch:
        if self.mesh.parallel.context == 1:
            return batch
        from abyssal.distributed.context import Part

        return replace(batch, part=Part.of(length, self.mesh.context))

    def counts(self, numbers: Sequence[int]) -> list[int]:
        summed: list[int] = self.sum(torch.tensor(list(numbers), dtype=torch.int64)).tolist()
        return summed

    def any(self, flag: bool) -> bool:
        import torch.distributed as dist

        votes = torch.tensor(int(flag))
        dist.all_reduce(votes)
        return int(votes) > 0

    def complete_gradients(self, model: Transformer) -> None:
        from abyssal.distributed.sequence import sum_gradients

        if self.mesh.parallel.sequence:
            sum_gradients(model.named_parameters(), self.mesh.dense.get_group("tensor"))

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Every number counts once, on however many processes it lies."""
        import torch.distributed as dist
        from torch.distributed.tensor import DTensor, Replicate

        by_axes: dict[tuple[bool, tuple[str, ...]], list[Tensor]] = {}
        for gradient in gradients:
            assert isinstance(gradient, DTensor)
            names = gradient.device_mesh.mesh_dim_names
            assert names is not None
            divided = [n for n, p in zip(names, gradient.placements, strict=True) if not isinstance(p, Replicate)]
            by_axes.setdefault(("expert" in names, tuple(divided)), []).append(gradient.to_local())
        total = torch.zeros((), device=self.mesh.device)
        for (of_experts, divided_by), parts in by_axes.items():
            square, mesh = total_norm(parts).square(), self.mesh.experts if of_experts else self.mesh.dense
            for axis in divided_by:
                dist.all_reduce(square, group=mesh.get_group(axis))
            total = total + square
        return self.sum_of_stages(total).sqrt()

    def part_ways(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()
