"""Context parallelism: each process works out some positions of every sequence.

A sequence is cut into 2 P chunks, of which process i has the i-th from the front and the i-th from the back: a query
looks at all keys before it, so all have about the same to do. Attention needs the keys and values of the others'
tokens. MLA makes them from the latents, so these are what travels, C + R numbers a token for all heads (V3: 576, where
keys and values are 40,960); everyone then makes the keys and values of the whole sequence itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Gathered(torch.autograd.Function):
    """[B, T', W] -> [P, B, T', W]; backward: the sum of everyone's gradient for what was sent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(out.unbind()), x.contiguous(), group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        own = grads[0].new_empty(grads[0].shape[1:])
        dist.reduce_scatter(own, list(grads[0].contiguous().unbind()), group=ctx.group)
        return own, None


@dataclass(frozen=True)
class Part:
    """What process ``index`` of ``count`` has of a sequence of ``length`` tokens; see the module's docstring."""

    length: int
    index: int
    count: int
    group: dist.ProcessGroup
    places: Tensor
    """int64 [T / P], ascending."""

    @classmethod
    def of(cls, length: int, group: dist.ProcessGroup) -> Part:
        """The part of this process in ``group``; ``length`` is a multiple of 2 P."""
        index, count = dist.get_rank(group), dist.get_world_size(group)
        places = torch.cat([torch.arange(first, end) for first, end in _runs(length, index, count)])
        return cls(length, index, count, group, places)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Its two chunks, (first, end) each."""
        return _runs(self.length, self.index, self.count)

    def whole(self, x: Tensor) -> Tensor:
        """``x`` [B, T / P, W] of everyone, in the order of the sequence: [B, T, W]."""
        everyone_s: Tensor = _Gathered.apply(x, self.group)
        front, back = everyone_s.chunk(2, dim=2)  # [P, B, T / 2P, W] each
        chunks = [*front.unbind(), *reversed(back.unbind())]
        return torch.cat(chunks, dim=1)

    def to(self, device: torch.device | str) -> Part:
        """The same with ``places`` on ``device``."""
        return replace(self, places=self.places.to(device))


def _runs(length: int, index: int, count: int) -> list[tuple[int, int]]:
    chunk = length // (2 * count)
    return [(which * chunk, (which + 1) * chunk) for which in (index, 2 * count - 1 - index)]
