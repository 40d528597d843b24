"""Sharding (FSDP2): each process keeps a part of every weight, its gradient and its moments; a block's weights are
gathered while it computes, and its gradients are summed and scattered.

Gradients are *summed*: what a process differentiates is its share of the whole batch's loss, divided by the whole
batch's tokens already (:mod:`abyssal.training.step`). In BF16 training weights are FP32 where they are kept and BF16
where they are gathered; sums are FP32.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils._pytree import SUPPORTED_NODES, register_dataclass

from abyssal.distributed.experts import SpreadExperts
from abyssal.distributed.mesh import Mesh
from abyssal.model import Transformer
from abyssal.model.layers import RMSNorm
from abyssal.model.moe import MoE
from abyssal.model.router import Router, Routing

# Nothing here changes in place what a module has returned.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


def shard(model: Transformer, mesh: Mesh, dtype: torch.dtype, root: nn.Module | None = None) -> None:
    """Shards ``model`` over ``mesh``; ``dtype`` is what products run in. Norms, routers and the embedding stay FP32.
    ``root``: the module that is called, where that is not the model itself but has it within."""
    dense, experts = mesh.dense["replicate", "shard"], mesh.experts["replicate", "shard"]
    half = dtype == torch.bfloat16
    if Routing not in SUPPORTED_NODES:
        # FSDP looks through what a module returns for tensors whose gradient says that its weights will be needed.
        register_dataclass(Routing)
    for block in (*model.blocks, *model.mtp_modules):
        if isinstance(block.mlp, MoE) and isinstance(block.mlp.experts, SpreadExperts):
            _shard(block.mlp.experts, experts, mesh, half)
            register_fsdp_forward_method(block.mlp.experts, "meanwhile")
        if half:
            _shard([m for m in block.modules() if isinstance(m, RMSNorm | Router)], dense, mesh, False)
        _shard(block, dense, mesh, half)
    if half and isinstance(model.lm_head, nn.Linear) and not model.config.tie_word_embeddings:
        _shard(model.lm_head, dense, mesh, half, again=False)
    # What is left (embedding, last norm, head) stays gathered until the backward pass: the loss reads the head.
    _shard(root or model, dense, mesh, False, again=False)
    if root is None:
        register_fsdp_forward_method(model, "hidden")
    if isinstance(model.lm_head, FSDPModule):
        model.hidden = _gathering_first(model.lm_head, model.hidden)  # type: ignore[method-assign]


def _gathering_first(head: FSDPModule, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function``, before which ``head``'s weight is gathered: the loss reads it without calling the module."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Tensor:
        head.unshard()
        return function(*arguments, **options)

    return call


def _shard(
    module: nn.Module | list[nn.Module], over: DeviceMesh, mesh: Mesh, half: bool, again: bool | None = None
) -> None:
    parallel = mesh.parallel
    # Inputs stay as they are: the residual stream is FP32.
    policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32, cast_forward_inputs=False)
    fully_shard(
        module,
        mesh=over,
        reshard_after_forward=parallel.gathers_again if again is None else again,
        mp_policy=policy if half else MixedPrecisionPolicy(),
        offload_policy=CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if parallel.offload else OffloadPolicy(),
    )
    for one in module if isinstance(module, list) else [module]:
        if isinstance(one, FSDPModule):
            one.set_gradient_divide_factor(1.0)
            one.set_force_sum_reduction_for_comms(True)  # gloo has no sum that also scales
