"""What processes tell each other within a forward pass, each with its gradient.

``group`` is a process group; one of a single process costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Exchange(torch.autograd.Function):
    """Rows to everyone in the group, and rows from everyone; backward: the other way round."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.sizes
        return _exchanged(grads[0], received, sent, ctx.group), None, None, None


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class _Begun(torch.autograd.Function):
    """The same, not waited for: what comes out may be read behind :class:`_Ended` alone."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, under_way: _UnderWay
    ) -> Tensor:
        ctx.under_way = under_way
        return under_way.begin(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.under_way.wait(), None, None, None, None


class _Ended(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, under_way: _UnderWay
    ) -> Tensor:
        ctx.sizes, ctx.group, ctx.under_way = (sent, received), group, under_way
        under_way.wait()  # for what came in
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        sent, received = ctx.sizes
        ctx.under_way.begin(grads[0], received, sent, ctx.group)
        return grads[0], None, None, None, None  # in place of what is under way, which has another shape


class _UnderWay:
    """An exchange that has begun."""

    def __init__(self) -> None:
        self._begun: tuple[Any, Tensor, Tensor] | None = None

    def begin(self, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        rows = rows.contiguous()
        out = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(out, rows, received, sent, group=group, async_op=True)
        self._begun = work, out, rows  # whose memory must not be given back before
        return out

    def wait(self) -> Tensor:
        """What :meth:`begin` returned, with the rows in it."""
        assert self._begun is not None
        work, out, _ = self._begun
        work.wait()
        self._begun = None
        return out


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, columns: int | None) -> Tensor:
        ctx.group, ctx.columns = group, columns
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), columns = grads, ctx.columns
        if columns is None:
            return _reduced(grad, ctx.group), None, None
        return torch.cat((grad[..., :-columns], _reduced(grad[..., -columns:], ctx.group)), dim=-1), None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _reduced(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.size = dist.get_rank(group), x.shape[-1]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(-1, ctx.rank * ctx.size, ctx.size), None


def _reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def copied(x: Tensor, group: dist.ProcessGroup, columns: int | None = None) -> Tensor:
    """``x``, which is the same on everyone and goes into a different part of the work on each: its gradient is the sum
    of everyone's. ``columns``: that holds for the last so many of its columns, the others' work is the same
    everywhere."""
    out: Tensor = _Copied.apply(x, group, columns)
    return out


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of everyone's ``x``. What follows is the same work on everyone, so the gradient is what comes back."""
    out: Tensor = _Summed.apply(x, group)
    return out


def joined(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Everyone's ``x`` [..., n] side by side, [..., P·n]; what follows is the same work on everyone."""
    out: Tensor = _Joined.apply(x, group)
    return out


def exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """``rows`` [Σ sent, …], of which process i of the group gets the next ``sent[i]`` -> [Σ received, …], of which
    ``received[i]`` come from process i."""
    out: Tensor = _Exchange.apply(rows, sent, received, group)
    return out


def exchange_meanwhile(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, work: Callable[[], Any]
) -> tuple[Tensor, Any]:
    """:func:`exchange`, and what ``work`` returns, which is done while the rows travel. In the backward pass the
    gradients travel while ``work``'s are worked out."""
    under_way = _UnderWay()
    begun = _Begun.apply(rows, sent, received, group, under_way)
    done = work()
    return _Ended.apply(begun, sent, received, group, under_way), done
