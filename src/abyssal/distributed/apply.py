"""A model put on a mesh: the one place that knows in which order."""

from __future__ import annotations

import torch

from abyssal.distributed.experts import SpreadExperts
from abyssal.distributed.mesh import Mesh
from abyssal.distributed.sharding import shard
from abyssal.distributed.tensor import divide_by_tensor
from abyssal.model import Transformer
from abyssal.model.moe import MoE


def parallelize(model: Transformer, mesh: Mesh, dtype: torch.dtype) -> None:
    """Divides ``model``, which every process has whole and alike, in place. ``dtype`` is what products run in."""
    experts = mesh.experts["expert", "tensor"]
    if mesh.parallel.tensor > 1:
        divide_by_tensor(model, mesh.dense["tensor"], experts)
    elif mesh.parallel.expert > 1:
        for block in (*model.blocks, *model.mtp_modules):
            if isinstance(block.mlp, MoE):
                block.mlp.experts = SpreadExperts(block.mlp.experts, experts)
    shard(model, mesh, dtype)
