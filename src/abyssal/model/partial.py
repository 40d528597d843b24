"""Training only some of a layer's routed experts: a module that takes the place of ``Experts`` in a finished model.

The experts that are trained are parameters of their own, so that gradients and an optimizer's state are as large as
they are and no larger. Both groups are multiplied as one layer: experts are numbered anew, those that stay first, so
that in the buffer sorted by expert each group's rows lie together (:mod:`abyssal.kernels.grouped`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from abyssal.errors import UserError
from abyssal.kernels import grouped
from abyssal.model.moe import Experts


class PartialExperts(Experts):
    """:class:`Experts` of which ``trained`` are trained.

    ``gate_up_proj`` [S, 2F, D] and ``down_proj`` [S, D, F] are the trained ones', in the order of ``trained``;
    ``still_gate_up`` [E - S, 2F, D] and ``still_down`` [E - S, D, F] the others', without gradient. ``place`` [E]: the
    number that an expert has here. Raises UserError for an expert that is not there, or is named twice.
    """

    place: Tensor
    still_gate_up: nn.Parameter
    still_down: nn.Parameter

    def __init__(self, experts: Experts, trained: Sequence[int]) -> None:
        nn.Module.__init__(self)
        count = experts.gate_up_proj.shape[0]
        chosen = sorted(set(trained))
        if len(chosen) != len(trained) or not chosen or not 0 <= chosen[0] <= chosen[-1] < count:
            raise UserError(f"experts to train: {list(trained)}; expected different numbers from 0 to {count - 1}")
        self.trained = tuple(chosen)
        still = [expert for expert in range(count) if expert not in set(chosen)]
        with torch.no_grad():
            for name, stacked in (("gate_up", experts.gate_up_proj), ("down", experts.down_proj)):
                setattr(self, f"still_{name}", nn.Parameter(stacked[still], requires_grad=False))
                setattr(self, f"{name}_proj", nn.Parameter(stacked[chosen]))
        place = torch.empty(count, dtype=torch.long, device=experts.gate_up_proj.device)
        place[[*still, *chosen]] = torch.arange(count, device=place.device)
        self.register_buffer("place", place, persistent=False)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """``x`` [N, D], ``indices`` [N, K], ``weights`` [N, K] -> weighted sum of expert outputs [N, D]."""
        return self.through(x, self.place[indices], weights, len(self.place))

    def gate_up(self, rows: Tensor, where: grouped.Plan) -> Tensor:
        return self._product(rows, self.still_gate_up, self.gate_up_proj, where)

    def down(self, rows: Tensor, where: grouped.Plan) -> Tensor:
        return self._product(rows, self.still_down, self.down_proj, where)

    def _product(self, rows: Tensor, still: Tensor, trained: Tensor, where: grouped.Plan) -> Tensor:
        still, trained = still.to(rows.dtype), trained.to(rows.dtype)
        bounds, count = where.bounds, len(still)
        if bounds is None or count == 0:
            # On a GPU nobody here knows where the second group begins.
            return grouped.grouped_linear(rows, torch.cat((still, trained)), where)
        border = bounds[count]
        first = replace(where, ends=where.ends[:count], bounds=bounds[: count + 1])
        second = replace(where, ends=where.ends[count:] - border, bounds=[bound - border for bound in bounds[count:]])
        parts = (
            grouped.grouped_linear(rows[:border], still, first),
            grouped.grouped_linear(rows[border:], trained, second),
        )
        return torch.cat(parts)

    def stacked(self, name: str) -> Tensor:
        """All experts' ``gate_up_proj`` or ``down_proj`` in their own order, [E, ., .], FP32 where a part is."""
        still, trained = getattr(self, f"still_{name.removesuffix('_proj')}"), getattr(self, name)
        both = torch.cat((still.to(trained.dtype), trained) if still.dtype != trained.dtype else (still, trained))
        return both[self.place]


def train_experts(model: nn.Module, chosen: dict[str, Sequence[int]]) -> None:
    """Puts :class:`PartialExperts` in the place of each module of experts named in ``chosen``, to train those; nothing
    else in ``model`` wants a gradient afterwards. Raises UserError where a name is no module of experts."""
    model.requires_grad_(False)
    for name, trained in chosen.items():
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(name)
        if type(module) is not Experts:
            raise UserError(f"{name}: a {type(module).__name__}; only some of its experts cannot be trained")
        setattr(model.get_submodule(parent), own, PartialExperts(module, trained))
