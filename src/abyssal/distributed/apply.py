"""A model put on a mesh: the one place that knows in which order."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from abyssal.distributed.experts import SpreadExperts, SpreadMoE
from abyssal.distributed.initial import materialize
from abyssal.distributed.mesh import Mesh
from abyssal.distributed.pipeline import Pipeline, split
from abyssal.distributed.sharding import shard
from abyssal.distributed.tensor import divide_by_tensor
from abyssal.model import Transformer
from abyssal.model.moe import MoE
from abyssal.model.variants import SegmentMoE


def parallelize(
    model: Transformer, mesh: Mesh, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Pipeline | None:
    """Divides ``model`` in place, which every process has whole and alike, or on the meta device: then ``generator``
    draws its first weights (None: they will be read). ``dtype`` is what products run in. With pipeline stages ``model``
    keeps this process's layers alone, and what is returned runs them."""
    experts, drawn = mesh.experts["expert", "tensor"], next(model.parameters()).is_meta
    if mesh.parallel.pipeline == 1:
        _divide(model, mesh, experts)
        shard(model, mesh, dtype)
        if drawn:
            materialize([model], mesh.device, generator, offload=mesh.parallel.offload)
        return None
    stages = split(model, mesh)
    for stage in stages:
        _divide(stage.model, mesh, experts)
        shard(stage.model, mesh, dtype, root=stage)
    if drawn:
        models = [stage.model for stage in stages]
        materialize(models, mesh.device, generator, stages, offload=mesh.parallel.offload)
    return Pipeline(model, stages, mesh)


def _divide(model: Transformer, mesh: Mesh, experts: DeviceMesh) -> None:
    if mesh.parallel.tensor > 1:
        divide_by_tensor(model, mesh.dense["tensor"], experts, mesh.parallel.sequence)
    elif mesh.parallel.expert > 1:
        for block in (*model.blocks, *model.mtp_modules):
            if isinstance(block.mlp, SegmentMoE):
                block.mlp.experts = SpreadExperts(block.mlp.experts, experts)
            elif isinstance(block.mlp, MoE):
                block.mlp = SpreadMoE(block.mlp, experts)
