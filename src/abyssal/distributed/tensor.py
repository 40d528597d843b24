"""Tensor parallelism: of every layer each process has some heads, some of the feed-forward's width, and of the
vocabulary some tokens.

    x, the same everywhere → (copied) → own rows of the first matrix → own heads, or own columns of the width
                           → own columns of the last matrix → (summed) → the same everywhere

Of MLA the latent projections stay whole on everyone: they are small, and what has to be told about an attention's input
is then the gradient of the latents (V3: 1536 + 512 + 64 numbers a token) and not of the residual stream (7168).
Shared and routed experts of a layer are added up before anything is told.

With ``parallel.sequence`` the stream is divided by position in between (:mod:`abyssal.distributed.sequence`).

Everything here is made of a module that is whole; parameters keep their names. They are DTensors, since FSDP divides
them further (:mod:`abyssal.distributed.sharding`); what is computed with is the part that lies here.

Shapes: D hidden, F width, V vocabulary, P processes of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from abyssal.distributed.collectives import copied, joined, summed
from abyssal.distributed.experts import SpreadMoE
from abyssal.distributed.loss import linear_cross_entropy
from abyssal.distributed.sequence import as_gathered, gather, gathered, scattered, whole_outside
from abyssal.distributed.together import local
from abyssal.kernels import decode
from abyssal.model import Transformer
from abyssal.model.attention import LatentAttention, MultiHeadAttention
from abyssal.model.layers import MLP, Linear
from abyssal.model.moe import MoE
from abyssal.model.router import Routing

Collective = Callable[[Tensor, dist.ProcessGroup], Tensor]


def divide_by_tensor(model: Transformer, mesh: DeviceMesh, experts: DeviceMesh, sequence: bool = False) -> None:
    """Divides ``model`` in place over ``mesh`` (one axis), its routed experts over ``experts`` (expert and tensor);
    with ``sequence`` what is outside of both by position."""
    for block in (*model.blocks, *model.mtp_modules):
        _divide_attention(block.self_attn, mesh, sequence)
        if isinstance(block.mlp, MoE):
            block.mlp = ParallelMoE(block.mlp, mesh, experts, sequence)
        else:
            block.mlp = ParallelMLP(block.mlp, mesh, sequence)
    if sequence:
        whole_outside(model, mesh.get_group())
    # A pipeline's stage may have neither embedding nor head.
    if isinstance(model.model.embed_tokens, nn.Embedding):
        model.model.embed_tokens = ParallelEmbedding(model.model.embed_tokens, mesh, sequence)
    if isinstance(model.lm_head, Linear):
        model.lm_head = ParallelHead(model.lm_head, mesh)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight


def _divide_attention(attention: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    group, arrive = mesh.get_group(), gathered if sequence else copied
    if isinstance(attention, LatentAttention):
        attention.heads //= mesh.size()
        name = "q_b_proj" if attention.compressed else "q_proj"
        setattr(attention, name, ColumnParallel(getattr(attention, name), mesh, arrive))
        # Of sequences in parts the latents are gathered as soon as they are made: they are turned by position.
        attention.kv_b_proj = ColumnParallel(attention.kv_b_proj, mesh, None if sequence else copied)
        if sequence:
            attention.kv_a_proj_with_mqa.register_forward_hook(lambda module, given, out: gathered(out, group))
        else:
            attention.kv_a_proj_with_mqa = SharedTail(attention.kv_a_proj_with_mqa, attention.rope_dim, mesh)
    else:
        assert isinstance(attention, MultiHeadAttention)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, ColumnParallel(getattr(attention, name), mesh, None))
        attention.register_forward_pre_hook(lambda _, given: (arrive(given[0], group), *given[1:]))
    attention.o_proj = RowParallel(attention.o_proj, mesh, scattered if sequence else summed)


def _part(parameter: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    part = distribute_tensor(parameter.detach(), mesh, [Shard(dim)], src_data_rank=None)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


class _Divided(Linear):
    """A linear layer of which this process has rows (``dim`` 0) or columns (1)."""

    def __init__(self, whole: Linear, mesh: DeviceMesh, dim: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.group = whole.in_features, whole.out_features, mesh.get_group()
        self.weight = _part(whole.weight, mesh, dim)
        self.bias = whole.bias if whole.bias is None or dim == 1 else _part(whole.bias, mesh, 0)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """This process's part of the product."""
        weight, bias = local(self.weight), None if bias is None else local(bias)
        if not decode.few(x):
            return F.linear(x, weight, bias)
        out: Tensor = self.ready(decode.Linear, weight)(x)
        return out if bias is None else decode.add(out, bias)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The part of the weight that is here, in ``dtype``."""
        return local(self.weight).to(dtype)


class ColumnParallel(_Divided):
    """A linear layer that gives this process's outputs of it: [..., D] -> [..., O / P]. ``arrive`` is done with what
    goes in first, since the gradients of all processes have to be summed somewhere."""

    def __init__(self, whole: Linear, mesh: DeviceMesh, arrive: Collective | None = copied) -> None:
        super().__init__(whole, mesh, 0)
        self.arrive = arrive

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x if self.arrive is None else self.arrive(x, self.group), self.bias)


class RowParallel(_Divided):
    """A linear layer that takes this process's inputs of it, and sums: [..., I / P] -> [..., O], the same
    everywhere. ``leave`` is how the sum is taken; None: it is left to whoever calls."""

    def __init__(self, whole: Linear, mesh: DeviceMesh, leave: Collective | None = summed) -> None:
        super().__init__(whole, mesh, 1)
        self.leave = leave

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x, None)
        if self.leave is not None:
            out = self.leave(out, self.group)
        return out if self.bias is None else decode.add(out, self.bias)


class SharedTail(Linear):
    """The latent projection, whole on everyone, whose last outputs go to the heads as they are (the rotary key): their
    gradients are the sum of all heads', wherever these are."""

    def __init__(self, whole: Linear, tail: int, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.group = whole.in_features, whole.out_features, mesh.get_group()
        self.weight, self.bias, self.tail = whole.weight, whole.bias, tail

    def forward(self, x: Tensor) -> Tensor:
        return copied(super().forward(x), self.group, self.tail)


class ParallelMLP(MLP):
    """A SwiGLU MLP, divided by its width."""

    def __init__(self, whole: MLP, mesh: DeviceMesh, sequence: bool) -> None:
        nn.Module.__init__(self)
        self.group = mesh.get_group()
        self.arrive, self.leave = (gathered, scattered) if sequence else (copied, summed)
        _take_width(self, whole, mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(super().forward(self.arrive(x, self.group)), self.group)


def _take_width(mlp: MLP, whole: MLP, mesh: DeviceMesh) -> None:
    mlp.gate_proj = ColumnParallel(whole.gate_proj, mesh, None)
    mlp.up_proj = ColumnParallel(whole.up_proj, mesh, None)
    mlp.down_proj = RowParallel(whole.down_proj, mesh, None)


class ParallelMoE(SpreadMoE):
    """A MoE layer whose experts, shared and routed, are divided by their width; the router is whole on everyone."""

    def __init__(self, whole: MoE, mesh: DeviceMesh, experts: DeviceMesh, sequence: bool) -> None:
        super().__init__(whole, experts)
        self.group, self.sequence = mesh.get_group(), sequence
        self.leave: Collective = scattered if sequence else summed
        self._everyone: Tensor | None = None
        if self.shared_experts is not None:
            _take_width(self.shared_experts, self.shared_experts, mesh)

    def route(self, x: Tensor) -> Routing:
        if not self.sequence:
            return super().route(x)
        self._everyone = gather(x, self.group)  # once for the router and the experts
        return super().route(as_gathered(x, self._everyone, self.group, False))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        routed, shared = self._own(x, routing)
        return self.leave(routed if shared is None else routed + shared, self.group)

    def parts(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        routed, shared = self._own(x, routing)
        return self.leave(routed, self.group), None if shared is None else self.leave(shared, self.group)

    def _own(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        if self.sequence:
            everyone, self._everyone = self._everyone, None
            # Recomputation comes here without the router.
            x = as_gathered(x, gather(x, self.group) if everyone is None else everyone, self.group, True)
        else:
            x = copied(x, self.group)
        # Every process has a part of each expert, so a routing weight's gradient is a sum too.
        return super().parts(x, replace(routing, weights=copied(routing.weights, self.group)))


class ParallelEmbedding(nn.Embedding):
    """An embedding of which this process has V / P tokens, in order."""

    def __init__(self, whole: nn.Embedding, mesh: DeviceMesh, sequence: bool) -> None:
        nn.Module.__init__(self)
        self.leave: Collective = scattered if sequence else summed
        self.num_embeddings, self.embedding_dim = whole.num_embeddings, whole.embedding_dim
        self.group, self.here = mesh.get_group(), whole.num_embeddings // mesh.size()
        self.first = self.here * mesh.get_local_rank()
        self.weight = _part(whole.weight, mesh, 0)

    def forward(self, tokens: Tensor) -> Tensor:
        own = tokens - self.first
        elsewhere = (own < 0) | (own >= self.here)
        rows = F.embedding(own.masked_fill(elsewhere, 0), local(self.weight))
        return self.leave(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group)


class ParallelHead(_Divided):
    """The head, divided by the vocabulary. Called, it gives all logits; :meth:`nats` is the loss without them."""

    def __init__(self, whole: Linear, mesh: DeviceMesh) -> None:
        super().__init__(whole, mesh, 0)
        self.first = whole.out_features // mesh.size() * mesh.get_local_rank()

    def forward(self, x: Tensor) -> Tensor:
        return joined(self.product(copied(x, self.group), None), self.group)

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """As :func:`abyssal.kernels.loss.linear_cross_entropy` of the whole head, the same on everyone."""
        return linear_cross_entropy(copied(hidden, self.group), local(self.weight), targets, self.first, self.group)
