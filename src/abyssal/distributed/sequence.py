"""Sequence parallelism, which goes with tensor parallelism: what every tensor-parallel process would do alike (norms,
the residual stream, MLA's latent projections) is divided by position instead.

    x [B, T/P, D] → norm → (gathered) → own heads, or own columns of the width → (scattered sum) → x [B, T/P, D]

A sum over processes becomes a sum of which each keeps its own positions, and the whole is gathered where it is needed;
a process keeps 1/P of the stream. Of MLA what is gathered are the latents. Weights that are whole on everyone have seen
1/P of the positions then: :func:`sum_gradients` adds theirs up.

Shapes: B sequences, T positions, P processes of the group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from abyssal.distributed.together import local
from abyssal.model import Transformer
from abyssal.model.layers import RMSNorm


class _AsGathered(torch.autograd.Function):
    """``everyone`` in place of ``x``, which is its own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, everyone: Tensor, group: dist.ProcessGroup, partial: bool) -> Tensor:
        ctx.group, ctx.partial = group, partial
        return everyone.view_as(everyone)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        return (_scatter(grad, ctx.group) if ctx.partial else _own(grad, ctx.group)), None, None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather(grads[0], ctx.group), None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _own(x, group).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather(grads[0], ctx.group), None


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Everyone's [B, T/P, …] one behind the other, [B, T, …], without a gradient."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(group), dim=1)]
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts, group=group)
    return out


def _own(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)]


def as_gathered(x: Tensor, everyone: Tensor, group: dist.ProcessGroup, partial: bool) -> Tensor:
    """``everyone`` = :func:`gather` of ``x``, as a function of ``x``. ``partial``: what follows is a part of the work,
    so gradients are summed; else it is the same work on everyone."""
    out: Tensor = _AsGathered.apply(x, everyone, group, partial)
    return out


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Everyone's ``x`` [B, T/P, …] -> [B, T, …], of which a part of the work follows."""
    return as_gathered(x, gather(x, group), group, True)


def gathered_alike(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same, of which the same work follows on everyone."""
    return as_gathered(x, gather(x, group), group, False)


def scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of everyone's ``x`` [B, T, …], of which this process keeps its positions: [B, T/P, …]."""
    out: Tensor = _Scattered.apply(x, group)
    return out


def own_positions(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This process's positions of ``x`` [B, T, …], which is the same on everyone: [B, T/P, …]."""
    out: Tensor = _Own.apply(x, group)
    return out


def whole_outside(model: Transformer, group: dist.ProcessGroup) -> None:
    """Has what leaves ``model``'s blocks for the head, and for MTP modules, be all positions."""
    if isinstance(model.model.norm, RMSNorm):  # a pipeline's stage may not have it
        model.model.norm.register_forward_hook(lambda module, given, out: gathered_alike(out, group))
    for module in model.mtp_modules:
        module.hnorm.register_forward_pre_hook(lambda module, given: own_positions(given[0], group))
        module.shared_head["norm"].register_forward_hook(lambda module, given, out: gathered_alike(out, group))


@torch.no_grad()
def sum_gradients(parameters: Iterable[tuple[str, nn.Parameter]], group: dist.ProcessGroup) -> None:
    """Adds up over ``group`` the gradients of weights that each process has whole (apart from sharding) and has used
    for its own positions. Routers see all positions everywhere."""
    parts = []
    for name, parameter in parameters:
        gradient = parameter.grad
        if gradient is None or name.endswith(".gate.weight"):
            continue
        assert isinstance(gradient, DTensor)
        if "tensor" not in (gradient.device_mesh.mesh_dim_names or ()):
            parts.append(local(gradient))
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=group)
    for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(summed.view_as(part))
