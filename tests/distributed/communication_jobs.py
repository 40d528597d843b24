"""What a process hands to collectives in one real step, and what :mod:`abyssal.analysis.communication` says it does."""

from __future__ import annotations

from typing import Any

import jobs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from abyssal.analysis.communication import communication
from abyssal.analysis.inventory import Inventory
from abyssal.analysis.memory import TrainingSetup
from abyssal.config.parallel import ParallelConfig

Told = tuple[str, tuple[int, ...], int]
"""Operation, the processes it is among, and its payload in bytes."""

# By the name of torch's operator: what it is, and which of its arguments is the payload.
OPERATIONS = {
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
}


class Counting(TorchDispatchMode):
    """Sees every operator that reaches a process group, whoever calls it: ours, FSDP's, DTensor's, the pipeline's."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Told] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is DTensor for t in types):
            return NotImplemented  # it comes again as what DTensor makes of it
        if "c10d" in func.namespace and (name := func._schema.name.split("::")[1]) != "recv_":
            operation, which = OPERATIONS[name]  # an unknown one must not go uncounted
            given = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
            ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(given[0])))
            if len(ranks) > 1:
                self.told.append((operation, ranks, _bytes(args[which])))
        return func(*args, **(kwargs or {}))


def _bytes(x: Any) -> int:
    return x.numel() * x.element_size() if isinstance(x, Tensor) else sum(map(_bytes, x))


def step(
    parallel: dict[str, Any], dtype: str, recompute: bool, more: int, **changes: Any
) -> tuple[list[Told], list[Told]]:
    """What this process tells the others in a step by count, and by formula. ``more``: micro-batches beyond the least
    that there have to be."""
    config = ParallelConfig(**parallel)
    count = jobs.micro_batches(parallel) + more
    together = jobs.together_for(parallel)
    model = jobs.model_of(**jobs.deep_enough(parallel) | changes)
    whole = model.config
    together.divide(model, getattr(torch, dtype))
    training = jobs.step_of(model, together, getattr(torch, dtype), recompute)
    counting = Counting()
    for number, seen in enumerate((Counting(), counting)):  # a pipeline's first step also makes it known who is where
        with seen:
            batches = [jobs.part_of(batch, together) for batch in jobs.batches_of(number, count)]
            training(batches, jobs.LENGTH, 1e-3, 0.0)
    setup = TrainingSetup(
        micro_batch=jobs.ROWS // config.data,
        sequence=jobs.LENGTH,
        accumulate=count,
        dtype=dtype,  # type: ignore[arg-type]
        recompute=recompute,
    )
    messages = communication(
        Inventory(whole),
        config,
        setup,
        place=together.mesh.place.pipeline,
        token_loss=True,
        sequence_loss=True,
    )
    said = [(m.operation, tuple(m.group.ranks(dist.get_rank())), m.nbytes) for m in messages for _ in range(m.times)]
    return counting.told, said
