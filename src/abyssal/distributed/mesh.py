"""The processes of a run and what each has in common with which others.

A process's number is read as digits, the last one changing fastest:

    pipeline | replicate | shard | context | tensor

Tensor-parallel processes are neighbours, since they talk most. Experts are spread over the processes that have the
same pipeline stage and the same part of every matrix; these are counted by replicate, shard and context, and each
``expert`` of them in a row hold one whole set of routed experts:

    pipeline | what is left of replicate | what is left of shard × context | expert | tensor
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from abyssal.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Place:
    """Where a process stands on each axis."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int

    @classmethod
    def of(cls, rank: int, parallel: ParallelConfig) -> Place:
        digits = []
        for size in (parallel.tensor, parallel.context, parallel.shard, parallel.replicate, parallel.pipeline):
            rank, digit = divmod(rank, size)
            digits.append(digit)
        return cls(*reversed(digits))


class Mesh:
    """The meshes of a run, made of torch.distributed's process group, which is there already.

    ``dense`` has the axes pipeline, replicate, shard (with context in it) and tensor; ``experts`` has pipeline,
    replicate, shard, expert and tensor: what routed experts are divided by.
    """

    def __init__(self, parallel: ParallelConfig, device: torch.device) -> None:
        p = self.parallel = parallel
        self.device = device
        self.rank = dist.get_rank()
        self.place = Place.of(self.rank, p)
        ranks = torch.arange(p.world)
        axes = ("pipeline", "replicate", "shard", "tensor")
        self.dense = DeviceMesh(
            device.type, ranks.view(p.pipeline, p.replicate, p.sharers, p.tensor), mesh_dim_names=axes
        )
        shard = max(p.sharers // p.expert, 1)
        self.experts = DeviceMesh(
            device.type,
            ranks.view(p.pipeline, -1, shard, p.expert, p.tensor),
            mesh_dim_names=("pipeline", "replicate", "shard", "expert", "tensor"),
        )

    @cached_property
    def batch(self) -> dist.ProcessGroup:
        """Those among which the batch (its sequences, and parts of sequences) is divided: the same layers, and the same
        part of every matrix."""
        return self._group(lambda place: (place.pipeline, place.tensor))

    @cached_property
    def context(self) -> dist.ProcessGroup:
        """Those that hold the parts of the same sequences."""
        return self._group(lambda place: (place.pipeline, place.replicate, place.shard, place.tensor))

    @property
    def data_part(self) -> tuple[int, int]:
        """Which part of a batch's sequences this process has, and of how many."""
        return self.place.replicate * self.parallel.shard + self.place.shard, self.parallel.data

    def _group(self, key: object) -> dist.ProcessGroup:
        """The process group of those whose place gives the same ``key``. Every process has to ask at the same time."""
        members: dict[object, list[int]] = {}
        for rank in range(self.parallel.world):
            members.setdefault(key(Place.of(rank, self.parallel)), []).append(rank)  # type: ignore[operator]
        group, _ = dist.new_subgroups_by_enumeration(list(members.values()))
        assert group is not None
        return group


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of everyone's ``x``, in place."""
    dist.all_reduce(x, group=group)
    return x
