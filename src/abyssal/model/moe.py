"""The DeepSeekMoE layer: shared experts see every token, routed experts those the router sends (V3 paper eq. 12)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.config import MoEConfig
from abyssal.kernels import decode, grouped
from abyssal.kernels.backend import product_dtype
from abyssal.kernels.fused import swiglu
from abyssal.model.layers import MLP, Decodes
from abyssal.model.router import Router, Routing


class Experts(Decodes):
    """All routed experts of a layer as two stacked tensors; each expert is a SwiGLU MLP.

    ``gate_up_proj`` [E, 2F, D] (gate above up), ``down_proj`` [E, D, F]. On disk they are one tensor an expert and
    matrix, as published (:mod:`abyssal.checkpoint.names`).
    """

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        experts, width = moe.n_routed_experts, moe.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """``x`` [N, D], ``indices`` [N, K], ``weights`` [N, K] -> weighted sum of expert outputs [N, D]."""
        if decode.few(x, indices.numel()):
            out: Tensor = self.ready(decode.Experts, self.gate_up_proj, self.down_proj)(x, indices, weights)
            return out
        return self.through(x, indices, weights, self.gate_up_proj.shape[0])

    def through(self, x: Tensor, indices: Tensor, weights: Tensor, experts: int) -> Tensor:
        """The same by grouped products, for however many rows; ``experts`` is how many the indices tell apart."""
        dtype = product_dtype(x)
        where = grouped.plan(indices, experts, dtype)
        rows = grouped.gather(x.to(dtype), where)
        # An expert's weight goes in before its last product, which is linear: what is left then is a plain sum.
        hidden = swiglu(self.gate_up(rows, where), grouped.row_weights(weights, where))
        return grouped.combine(self.down(hidden, where), where)

    def gate_up(self, rows: Tensor, where: grouped.Plan) -> Tensor:
        """Both first products of ``rows`` [P, D], side by side: [P, 2F]."""
        return grouped.grouped_linear(rows, self.gate_up_proj.to(rows.dtype), where)

    def down(self, rows: Tensor, where: grouped.Plan) -> Tensor:
        """The second product of ``rows`` [P, F], [P, D]."""
        return grouped.grouped_linear(rows, self.down_proj.to(rows.dtype), where)


class MoE(nn.Module):
    """Router, routed experts, shared experts, [B, T, D] -> [B, T, D]. Routing is a step of its own: see ``Block``."""

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.gate = Router(hidden_size, moe)
        self.experts = Experts(hidden_size, moe)
        self.shared_experts = MLP(hidden_size, moe.shared_intermediate_size) if moe.n_shared_experts else None

    def route(self, x: Tensor) -> Routing:
        """Decides for ``x`` [B, T, D]."""
        return self.gate(x)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Applies what was decided. ``routing`` may cut a token in segments: its [B, T·m] then says so."""
        routed, shared = self.parts(x, routing)
        return routed if shared is None else decode.add(routed, shared)

    def parts(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """What :meth:`forward` adds up, [B, T, D] each: routed experts, shared experts (None where there are none)."""
        flat = x.reshape(-1, x.shape[-1])
        routed = self.experts(flat, routing.indices.flatten(0, 1), routing.weights.flatten(0, 1)).view(x.shape)
        return routed, None if self.shared_experts is None else self.shared_experts(x)
