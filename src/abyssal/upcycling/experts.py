"""A dense SwiGLU split into shared and routed experts, neuron by neuron.

    down(silu(gate x) · up x) = Σ_i a_i(x) d_i,       a_i the activation of neuron i, d_i its column of down

The sum over neurons can be cut anywhere: experts that hold each neuron once give, all with weight 1, the same output.
The shared experts take the neurons with the largest E|a_i| |d_i|, which matter to nearly all tokens. The others are
clustered by which tokens they matter to (|a_i| |d_i| over tokens, as unit vectors) in balanced k-means: neurons that
work together come into one expert, so that a token needs few experts.

The router is to find the experts whose output Σ_{i of e} a_i d_i is large: its rows come from ridge regression of the
outputs' norms on the layer's input. With norm_topk_prob and routed_scaling_factor K (experts a token) the weights of
the chosen are about 1 where their scores are alike, so the logits are scaled: of a few scales the one with the least
output error is taken. Then the whole layer is fitted (:mod:`~abyssal.upcycling.fit`).

Shapes: N tokens, D hidden, I intermediate, E routed experts, F width of one, S shared ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.config import MoEConfig
from abyssal.errors import UserError
from abyssal.model.layers import MLP
from abyssal.model.moe import MoE

_ITERATIONS = 15
_CLUSTER_TOKENS = 4096
_SCALES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # standard deviations of the logits


@dataclass(frozen=True)
class ExpertSplit:
    """How many routed ``experts``, how many of them ``active`` for a token, and how many ``shared`` ones."""

    experts: int
    active: int
    shared: int = 0

    def width(self, intermediate: int) -> int:
        """The width F of an expert: (experts + shared) · F = ``intermediate``. Raises UserError where that has no
        whole solution, or the numbers make no sense."""
        if self.experts < 2 or not 1 <= self.active <= self.experts or self.shared < 0:
            raise UserError(
                f"experts: {self.experts}, active {self.active}, shared {self.shared}: expected at least 2 experts, "
                "1 to all of them active, and no negative number"
            )
        count = self.experts + self.shared
        if intermediate % count:
            near = [n for n in range(2, min(intermediate, 257)) if intermediate % n == 0]
            near = sorted(sorted(near, key=lambda n: abs(n - count))[:3])
            raise UserError(
                f"experts: {self.experts} routed and {self.shared} shared do not divide intermediate_size "
                f"{intermediate}; expected together a divisor of it, such as {', '.join(map(str, near))}"
            )
        return intermediate // count


@torch.no_grad()
def neurons(mlp: MLP, x: Tensor) -> Tensor:
    """a_i(x) for ``x`` [N, D]: [N, I]."""
    return F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)


def cluster(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Balanced k-means of the rows of ``features`` [n, tokens] by cosine: for each row its cluster, [n] int64, of
    which each of ``count`` gets n / count. A row goes to the nearest cluster that has room, the surest rows first."""
    rows = F.normalize(features, dim=-1)
    room = len(rows) // count
    chosen = torch.randperm(len(rows), generator=generator)[:count].to(rows.device)
    centres, best, best_total = rows[chosen], torch.zeros(0, dtype=torch.int64), -float("inf")
    for _ in range(_ITERATIONS):
        likeness = rows @ F.normalize(centres, dim=-1).T
        assigned = _assign(likeness.cpu(), room)
        total = float(likeness.cpu().gather(1, assigned.unsqueeze(1)).sum())
        if total <= best_total:
            break
        best, best_total = assigned, total
        members = F.one_hot(assigned, count).to(rows)
        centres = members.T @ rows
    return best.to(features.device)


def _assign(likeness: Tensor, room: int) -> Tensor:
    count = likeness.shape[1]
    out, left = [-1] * len(likeness), [room] * count
    for pair in likeness.flatten().argsort(descending=True).tolist():
        row, to = divmod(pair, count)
        if out[row] < 0 and left[to]:
            out[row] = to
            left[to] -= 1
    return torch.tensor(out)


@torch.no_grad()
def split(mlp: MLP, moe: MoEConfig, x: Tensor, generator: torch.Generator) -> MoE:
    """``mlp`` as a MoE layer by its neurons' activations on ``x`` [N, D]; the router's rows are zero."""
    shared = moe.n_shared_experts * moe.moe_intermediate_size
    matters = torch.cat([neurons(mlp, rows).abs() for rows in x[:: max(1, len(x) // _CLUSTER_TOKENS)].split(1024)])
    matters = matters * mlp.down_proj.weight.norm(dim=0)
    order = matters.mean(0).argsort(descending=True)
    kept, others = order[:shared], order[shared:]
    of = cluster(matters[:, others].T.contiguous(), moe.n_routed_experts, generator)
    places = [others[of == expert] for expert in range(moe.n_routed_experts)]
    with torch.device("meta"):
        out = MoE(x.shape[1], moe)
    out = out.to_empty(device=x.device).float().requires_grad_(False)
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    out.experts.gate_up_proj.copy_(torch.stack([torch.cat((gate[p], up[p])) for p in places]))
    out.experts.down_proj.copy_(torch.stack([down[:, p] for p in places]))
    if out.shared_experts is not None:
        for ours, theirs in zip((out.shared_experts.gate_proj, out.shared_experts.up_proj), (gate, up), strict=True):
            ours.weight.copy_(theirs[kept])
        out.shared_experts.down_proj.weight.copy_(down[:, kept])
    out.gate.weight.zero_()
    if out.gate.e_score_correction_bias is not None:
        out.gate.e_score_correction_bias.zero_()
    return out


@torch.no_grad()
def all_experts(layer: MoE, x: Tensor) -> Tensor:
    """The sum of all of ``layer``'s experts, each with weight 1, for ``x`` [N, D]: the dense layer's output."""
    out = contributions(layer, x).sum(1)
    return out if layer.shared_experts is None else out + layer.shared_experts(x)


@torch.no_grad()
def contributions(layer: MoE, x: Tensor) -> Tensor:
    """Every routed expert's output for ``x`` [N, D], with weight 1: [N, E, D]."""
    gate, up = layer.experts.gate_up_proj.chunk(2, dim=1)
    hidden = F.silu(torch.einsum("nd,efd->nef", x, gate)) * torch.einsum("nd,efd->nef", x, up)
    return torch.einsum("nef,edf->ned", hidden, layer.experts.down_proj)


@torch.no_grad()
def energies(layer: MoE, x: Tensor) -> Tensor:
    """The norm of every routed expert's output for ``x`` [N, D]: [N, E]."""
    return torch.cat([contributions(layer, rows).norm(dim=-1) for rows in x.split(256)])


@torch.no_grad()
def aim_router(layer: MoE, x: Tensor, y: Tensor) -> None:
    """Sets the router's rows by ridge regression on ``x`` [N, D], and their scale by the error against ``y`` [N, D]."""
    norms = energies(layer, x).double()
    rows = x.double()
    moment = rows.T @ rows
    moment.diagonal().add_(1e-3 * moment.diagonal().mean())
    weight = torch.linalg.solve(moment, rows.T @ (norms - norms.mean())).T
    deviation = float((rows @ weight.T).std())
    sample = slice(0, 4096)
    best, least = weight, float("inf")
    for scale in _SCALES:
        layer.gate.weight.copy_(weight * (scale / max(deviation, 1e-12)))
        part = x[sample].unsqueeze(0)
        error = float((layer(part, layer.route(part))[0] - y[sample]).square().sum())
        if error < least:
            best, least = layer.gate.weight.clone(), error
    layer.gate.weight.copy_(best)


@dataclass(frozen=True)
class RouterFigures:
    """``caught``: share of the routed experts' squared output norms that the chosen hold; ``best``: that of a router
    that knows the norms; ``load_cv``: std / mean of the experts' loads."""

    caught: float
    best: float
    load_cv: float


@torch.no_grad()
def router_figures(layer: MoE, norms: Tensor, x: Tensor) -> RouterFigures:
    """How well the router finds the experts with the largest outputs; ``norms`` [N, E] are :func:`energies`."""
    routing = layer.route(x.unsqueeze(0))
    energy = norms.square()
    total = energy.sum(-1).clamp_min(1e-12)
    load = routing.load().double()
    return RouterFigures(
        caught=float((energy.gather(1, routing.indices[0]).sum(-1) / total).mean()),
        best=float((energy.topk(layer.gate.moe.num_experts_per_tok, dim=-1).values.sum(-1) / total).mean()),
        load_cv=float(load.std(correction=0) / load.mean()),
    )
