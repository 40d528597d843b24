"""Tensor parallelism: of every layer each process has some heads, some of the feed-forward's width, and of the
vocabulary some tokens.

    x, the same everywhere → (copied) → own rows of the first matrix → own heads, or own columns of the width
                           → own columns of the last matrix → (summed) → the same everywhere

Of MLA the latent projections stay whole on everyone: they are small, and what has to be told about an attention's input
is then the gradient of the latents (V3: 1536 + 512 + 64 numbers a token) and not of the residual stream (7168).
Shared and routed experts of a layer are added up before anything is told.

Everything here is made of a module that is whole; parameters keep their names. They are DTensors, since FSDP divides
them further (:mod:`abyssal.distributed.sharding`); what is computed with is the part that lies here.

Shapes: D hidden, F width, V vocabulary, P processes of the group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from abyssal.distributed.collectives import copied, joined, summed
from abyssal.distributed.experts import SpreadMoE
from abyssal.distributed.loss import linear_cross_entropy
from abyssal.distributed.together import local
from abyssal.kernels import decode
from abyssal.model import Transformer
from abyssal.model.attention import LatentAttention, MultiHeadAttention
from abyssal.model.layers import MLP, Linear
from abyssal.model.moe import MoE
from abyssal.model.router import Routing


def divide_by_tensor(model: Transformer, mesh: DeviceMesh, experts: DeviceMesh) -> None:
    """Divides ``model`` in place over ``mesh`` (one axis), its routed experts over ``experts`` (expert and tensor)."""
    for block in (*model.blocks, *model.mtp_modules):
        _divide_attention(block.self_attn, mesh)
        if isinstance(block.mlp, MoE):
            block.mlp = ParallelMoE(block.mlp, mesh, experts)
        else:
            block.mlp = ParallelMLP(block.mlp, mesh)
    # A pipeline's stage may have neither embedding nor head.
    if isinstance(model.model.embed_tokens, nn.Embedding):
        model.model.embed_tokens = ParallelEmbedding(model.model.embed_tokens, mesh)
    if isinstance(model.lm_head, Linear):
        model.lm_head = ParallelHead(model.lm_head, mesh)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight


def _divide_attention(attention: nn.Module, mesh: DeviceMesh) -> None:
    if isinstance(attention, LatentAttention):
        attention.heads //= mesh.size()
        name = "q_b_proj" if attention.compressed else "q_proj"
        setattr(attention, name, ColumnParallel(getattr(attention, name), mesh))
        attention.kv_b_proj = ColumnParallel(attention.kv_b_proj, mesh)
        attention.kv_a_proj_with_mqa = SharedTail(attention.kv_a_proj_with_mqa, attention.rope_dim, mesh)
    else:
        assert isinstance(attention, MultiHeadAttention)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, ColumnParallel(getattr(attention, name), mesh, copy=False))
        group = mesh.get_group()
        attention.register_forward_pre_hook(lambda _, given: (copied(given[0], group), *given[1:]))
    attention.o_proj = RowParallel(attention.o_proj, mesh)


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
    """A linear layer that gives this process's outputs of it: [..., D] -> [..., O / P]. ``copy``: what goes in has the
    gradients of all processes summed here."""

    def __init__(self, whole: Linear, mesh: DeviceMesh, copy: bool = True) -> None:
        super().__init__(whole, mesh, 0)
        self.copy = copy

    def forward(self, x: Tensor) -> Tensor:
        return self.product(copied(x, self.group) if self.copy else x, self.bias)


class RowParallel(_Divided):
    """A linear layer that takes this process's inputs of it, and sums: [..., I / P] -> [..., O], the same
    everywhere. ``add``: the sum is left to whoever calls."""

    def __init__(self, whole: Linear, mesh: DeviceMesh, add: bool = True) -> None:
        super().__init__(whole, mesh, 1)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x, None)
        if self.add:
            out = summed(out, self.group)
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

    def __init__(self, whole: MLP, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.group = mesh.get_group()
        _take_width(self, whole, mesh)

    def forward(self, x: Tensor) -> Tensor:
        return summed(super().forward(copied(x, self.group)), self.group)


def _take_width(mlp: MLP, whole: MLP, mesh: DeviceMesh) -> None:
    mlp.gate_proj = ColumnParallel(whole.gate_proj, mesh, copy=False)
    mlp.up_proj = ColumnParallel(whole.up_proj, mesh, copy=False)
    mlp.down_proj = RowParallel(whole.down_proj, mesh, add=False)


class ParallelMoE(SpreadMoE):
    """A MoE layer whose experts, shared and routed, are divided by their width; the router is whole on everyone."""

    def __init__(self, whole: MoE, mesh: DeviceMesh, experts: DeviceMesh) -> None:
        super().__init__(whole, experts)
        self.group = mesh.get_group()
        if self.shared_experts is not None:
            _take_width(self.shared_experts, self.shared_experts, mesh)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        routed, shared = self._own(x, routing)
        return summed(routed if shared is None else routed + shared, self.group)

    def parts(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        routed, shared = self._own(x, routing)
        return summed(routed, self.group), None if shared is None else summed(shared, self.group)

    def _own(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        # Every process has a part of each expert, so a routing weight's gradient is a sum too.
        weights = copied(routing.weights, self.group)
        return super().parts(copied(x, self.group), replace(routing, weights=weights))


class ParallelEmbedding(nn.Embedding):
    """An embedding of which this process has V / P tokens, in order."""

    def __init__(self, whole: nn.Embedding, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = whole.num_embeddings, whole.embedding_dim
        self.group, self.here = mesh.get_group(), whole.num_embeddings // mesh.size()
        self.first = self.here * mesh.get_local_rank()
        self.weight = _part(whole.weight, mesh, 0)

    def forward(self, tokens: Tensor) -> Tensor:
        own = tokens - self.first
        elsewhere = (own < 0) | (own >= self.here)
        rows = F.embedding(own.masked_fill(elsewhere, 0), local(self.weight))
        return summed(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group)


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
