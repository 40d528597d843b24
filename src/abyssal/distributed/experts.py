"""Expert parallelism: every process holds some of a layer's routed experts, and rows travel to where theirs are.

    sort assignments by expert → rows to the experts' processes (all-to-all) → grouped products there
    → rows back (all-to-all) → sum of each token's rows

While the first rows travel the shared experts are worked out, and while their gradients travel, the shared experts'.

An assignment's routing weight travels with its row: it goes in before an expert's last product, as it does on one
process (:mod:`abyssal.kernels.grouped`). Counts are uneven, and a process may get no row at all.

Shapes: N tokens, K experts a token, E experts, e of them here, P processes, R rows received.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from abyssal.distributed.collectives import exchange, exchange_meanwhile
from abyssal.distributed.together import local
from abyssal.kernels import grouped
from abyssal.kernels.backend import product_dtype
from abyssal.model.moe import Experts, MoE
from abyssal.model.router import Routing


class SpreadExperts(Experts):
    """:class:`Experts` of which each process of ``mesh`` holds E / P along the axis ``expert``, in order, and of these
    F / P' columns of their width along the axis ``tensor``: then what comes out is this process's summand.

    ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F] are DTensors, sharded by their first dimension and by the
    one that has F in it. Of gate and up each process has the same columns, so the rows of the former are not in the
    order of the whole one (:func:`abyssal.distributed.parts.matrices`).
    """

    def __init__(self, whole: Experts, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.group, self.spread = mesh.get_group("expert"), mesh["expert"].size()
        self.total = whole.gate_up_proj.shape[0]
        ways, way = mesh["tensor"].size(), mesh.get_local_rank("tensor")
        gate, up = whole.gate_up_proj.detach().chunk(2, dim=1)
        own = torch.cat((gate.chunk(ways, 1)[way], up.chunk(ways, 1)[way]), dim=1)
        parts = {"gate_up_proj": (own, 1), "down_proj": (whole.down_proj.detach().chunk(ways, 2)[way], 2)}
        for name, (part, dim) in parts.items():
            here = part.chunk(self.spread)[mesh.get_local_rank("expert")].clone(memory_format=torch.contiguous_format)
            divided = DTensor.from_local(here, mesh, [Shard(0), Shard(dim)], run_check=False)
            setattr(self, name, nn.Parameter(divided, requires_grad=whole.get_parameter(name).requires_grad))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """As :meth:`Experts.forward`; every process of the group has to call it, each with its own tokens."""
        return self.meanwhile(x, indices, weights, lambda: None)[0]

    def meanwhile(
        self, x: Tensor, indices: Tensor, weights: Tensor, work: Callable[[], Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """The same, and what ``work`` returns, which is done while rows travel."""
        if self.spread == 1:
            return self.through(x, indices, weights, self.total), work()
        here = self.total // self.spread
        where = grouped.plan_without_padding(indices, self.total)
        counts = _counts(where, self.total)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        # [P, e] each, read once: how many rows go to and come from whom.
        both = torch.stack((counts, theirs)).view(2, self.spread, here).cpu()
        sent, received = both.sum(-1).tolist()
        # From each process come its rows for the first expert here, then those for the second, and so on.
        experts = torch.arange(here).repeat(self.spread).repeat_interleave(both[1].flatten())
        if x.is_cuda:
            experts = experts.pin_memory().to(x.device, non_blocking=True)
        row_weights = exchange(grouped.row_weights(weights, where), sent, received, self.group)
        gathered = grouped.gather(x.to(product_dtype(x)), where)
        rows, done = exchange_meanwhile(gathered, sent, received, self.group, work)
        out = self.through(rows, experts.unsqueeze(1), row_weights.unsqueeze(1), here)
        return grouped.combine(exchange(out, received, sent, self.group), where), done

    def gate_up(self, rows: Tensor, where: grouped.Plan) -> Tensor:
        return grouped.grouped_linear(rows, local(self.gate_up_proj).to(rows.dtype), where)

    def down(self, rows: Tensor, where: grouped.Plan) -> Tensor:
        return grouped.grouped_linear(rows, local(self.down_proj).to(rows.dtype), where)


class SpreadMoE(MoE):
    """A MoE layer whose routed experts are spread over the processes of ``mesh``."""

    def __init__(self, whole: MoE, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.gate, self.shared_experts = whole.gate, whole.shared_experts
        self.experts = SpreadExperts(whole.experts, mesh)

    def parts(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        shared = self.shared_experts
        assert isinstance(self.experts, SpreadExperts)
        routed, beside = self.experts.meanwhile(
            x.reshape(-1, x.shape[-1]),
            routing.indices.flatten(0, 1),
            routing.weights.flatten(0, 1),
            lambda: None if shared is None else shared(x),
        )
        return routed.view(x.shape), beside


def _counts(where: grouped.Plan, experts: int) -> Tensor:
    """[E] int64: rows of each expert."""
    ends = where.ends.long()
    return ends.diff(prepend=ends.new_zeros(1))
