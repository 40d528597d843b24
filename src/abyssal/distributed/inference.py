"""Inference with a model divided among processes: tensor × expert of them, each with its part of the weights.

All of them compute every token. What is divided is heads, widths, vocabulary and routed experts
(:mod:`abyssal.checkpoint.parts`), so a process's modules are those of a smaller model and give summands of what the
whole one gives. What this file puts in are the sums, two a layer:

    attention   over the tensor-parallel processes, behind o_proj
    MoE         over all: every process computes the rows of its own experts, and its columns of the shared one

Nothing travels but sums of [N, D]: with every token at hand everywhere there is nothing to be sent to where its experts
are. Of MLA each process caches the latent, which all heads share; of ordinary attention its own heads' keys and values.

One process has the engine and tells the others what to compute (:mod:`abyssal.generation.passes`); :class:`Telling` is
how. A sum has to come out equal to the last bit on all: each routes by it. Gloo's and NCCL's do, which add up every
number in one place.

Shapes: N tokens, K experts a token, D hidden, V vocabulary, P processes.
"""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abyssal.checkpoint.load import read_model_config
from abyssal.checkpoint.parts import Part
from abyssal.config import ModelConfig
from abyssal.config.parallel import ParallelConfig
from abyssal.distributed.collectives import joined
from abyssal.distributed.launch import join, meet
from abyssal.distributed.together import Together
from abyssal.errors import UserError
from abyssal.loading import base_of, load_weights
from abyssal.model import Transformer
from abyssal.model.moe import MoE
from abyssal.model.router import Routing

_FOR_EVER = timedelta(days=365)  # what a server may be idle
_LOADING = 3600.0  # seconds in which one process may have loaded its part and another not
_FIRST = 1024  # numbers of an order that are sent at once; of a longer one the rest follows


def parallel_of(tensor: int, expert: int) -> ParallelConfig:
    """The mesh of tensor × expert processes: sets of experts stand where training has shards. Raises UserError where
    one is less than 1."""
    for name, value in (("tensor", tensor), ("expert", expert)):
        if value < 1:
            raise UserError(f"{name}: {value} is not valid; expected a whole number from 1")
    return ParallelConfig(tensor=tensor, shard=expert, expert=expert)


def check(parallel: ParallelConfig, config: ModelConfig) -> None:
    """Raises UserError, with the field and its value, where ``config``'s model cannot be divided so."""
    try:
        parallel.check(config, batch_size=parallel.data, sequence_length=1, world=parallel.world)
    except UserError as error:
        raise UserError(str(error).removeprefix("parallel.")) from None
    moe, world = config.moe, parallel.world
    if moe is None or world == 1:
        return
    if moe.segments > 1:
        raise UserError(f"expert: {parallel.expert}: not with moe.segments {moe.segments}; expected 1")
    if moe.n_shared_experts and moe.shared_intermediate_size % world:
        raise UserError(
            f"tensor × expert: {world} does not divide the {moe.shared_intermediate_size} columns of the model's "
            "shared experts"
        )


def begin(tensor: int, expert: int, device: torch.device) -> Together:
    """The processes that torchrun started, as tensor × expert. ``device`` is this process's own. Raises UserError
    where one of them does not come."""
    parallel = parallel_of(tensor, expert)
    meeting = meet()
    together = join(meeting, parallel, device)
    meeting.limit = _LOADING
    return together


def load_part(folder: Path, together: Together, **options: Any) -> Transformer:
    """This process's part of the model in ``folder``, ready to be run by all together; the other parts are not read.
    ``options`` are those of :func:`abyssal.loading.load_weights`. Raises UserError."""
    parallel, config = together.mesh.parallel, read_model_config(base_of(folder))
    check(parallel, config)
    experts = config.moe.n_routed_experts if config.moe is not None else 0
    part = Part(parallel.tensor, parallel.expert, together.mesh.rank, experts)
    model = load_weights(folder, part=part, **options)
    put_sums(model, part, together)
    return model


def put_sums(model: Transformer, part: Part, together: Together) -> None:
    """Has ``model``, which is a ``part``, add up with the other processes, in place."""
    group, everyone = together.mesh.dense["tensor"].get_group(), dist.group.WORLD
    assert everyone is not None
    for block in (*model.blocks, *model.mtp_modules):
        last = [] if part.tensor == 1 else [(block.self_attn, "o_proj")]
        if isinstance(block.mlp, MoE):
            block.mlp = SummedMoE(block.mlp, part, everyone)
        elif part.tensor > 1:
            last.append((block.mlp, "down_proj"))
        for module, name in last:
            setattr(module, name, Summed(getattr(module, name), group))
    if part.tensor > 1:
        embedding = PartOfEmbedding(model.model.embed_tokens, part.rank % part.tensor, group)
        setattr(model.model, "embed_tokens", embedding)  # noqa: B010 (another type of module)
        setattr(model, "lm_head", PartOfHead(model.lm_head, group))  # noqa: B010


class Summed(nn.Module):
    """A linear layer ``part`` of which this process has some inputs: [..., I / P] -> [..., O], the same everywhere."""

    def __init__(self, part: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.part, self.group = part, group
        # Added once, behind the sum.
        self.bias: nn.Parameter | None = getattr(part, "bias", None)
        setattr(part, "bias", None)  # noqa: B010 (not of every module)

    def forward(self, x: Tensor) -> Tensor:
        out = _sum(self.part(x), self.group)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class SummedMoE(MoE):
    """The MoE layer ``own``, of whose routed experts some are here and of whose width a part; [B, T, D] -> [B, T, D],
    the same everywhere. The router is whole."""

    def __init__(self, own: MoE, part: Part, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.gate, self.shared_experts, self.group = own.gate, own.shared_experts, group
        self.add_module("experts", own.experts if part.expert == 1 else OwnExperts(own.experts, part.here))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return _sum(super().forward(x, routing), self.group)


class OwnExperts(nn.Module):
    """Experts ``here`` of a layer's, held by ``part``; every process has all tokens and computes the rows that are
    routed to its own."""

    def __init__(self, part: nn.Module, here: range) -> None:
        super().__init__()
        self.part, self.here = part, here

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """``x`` [N, D], ``indices`` [N, K], ``weights`` [N, K] -> the summand of these experts [N, D]. On a GPU it
        waits for the device: how many rows there are must be known."""
        tokens, choices = ((indices >= self.here.start) & (indices < self.here.stop)).nonzero(as_tuple=True)
        out = x.new_zeros(*indices.shape, x.shape[1])
        if len(tokens) > 0:
            own = indices[tokens, choices] - self.here.start
            out[tokens, choices] = self.part(x[tokens], own.unsqueeze(1), weights[tokens, choices].unsqueeze(1))
        return out.sum(1)


class PartOfEmbedding(nn.Module):
    """An embedding ``part`` of V / P tokens, the ``way``-th so many."""

    def __init__(self, part: nn.Embedding, way: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.part, self.group = part, group
        self.here = part.weight.shape[0]
        self.first = way * self.here

    @property
    def weight(self) -> Tensor:
        """The rows that are here."""
        return self.part.weight

    def forward(self, tokens: Tensor) -> Tensor:
        own = tokens - self.first
        elsewhere = (own < 0) | (own >= self.here)
        rows: Tensor = self.part(own.masked_fill(elsewhere, 0))
        return _sum(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group)


class PartOfHead(nn.Module):
    """A head ``part`` of V / P tokens; gives all logits."""

    def __init__(self, part: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.part, self.group = part, group

    @property
    def weight(self) -> Tensor:
        """The rows that are here; of packed ones their shape and dtype."""
        weight: Tensor = getattr(self.part, "weight")  # noqa: B009 (not of every module)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return joined(self.part(x), self.group)


def _sum(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    own = own.contiguous()
    dist.all_reduce(own, group=group)
    return own


class Telling:
    """How process 0 tells the others what to compute (:class:`abyssal.generation.passes.Others`), in numbers: nothing
    of what comes is taken for code. All processes make it at the same time.

    Orders have a process group of their own, since the one wait for the next may be long; a process that has gone is
    noticed there by its closed connection. All other waits are limited by the processes' common limit.
    """

    def __init__(self, together: Together) -> None:
        self.closed: list[int] = []
        self.device = together.mesh.device
        self._orders = dist.new_group(backend="gloo", timeout=_FOR_EVER)
        self._numbers = itertools.count()
        self.lost = False
        self.ended: int | None = None
        """The exit code with which process 0 has ended."""

    def number(self) -> int:
        """A number that was not given before."""
        return next(self._numbers)

    def tell(self, order: list[int], given: Tensor | None = None) -> None:
        """Raises RuntimeError where a pass was broken off before: the others may still wait for the rest of it."""
        if self.lost:
            raise RuntimeError("a pass was broken off, and the other processes no longer follow; start them anew")
        self._send([len(order), *order])
        if given is not None:
            dist.broadcast(given.contiguous(), 0)

    def end(self, code: int = 0) -> None:
        """There is nothing more; ``code`` is the exit code of all."""
        if not self.lost and self.ended is None:
            self.ended = code
            self._send([0, code])

    def hear(self) -> list[int]:
        """The next order; [] when there are no more. Raises RuntimeError where process 0 has gone without a word."""
        message = torch.empty(_FIRST, dtype=torch.int64)
        dist.broadcast(message, 0, group=self._orders)
        length = int(message[0])
        if length == 0:
            self.ended = int(message[1])
            return []
        if (more := length + 1 - _FIRST) > 0:
            rest = torch.empty(more, dtype=torch.int64)
            dist.broadcast(rest, 0, group=self._orders)
            message = torch.cat((message, rest))
        return message[1 : length + 1].tolist()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What was given with the order that was heard last, on this process's device."""
        out = torch.empty(shape, dtype=dtype, device=self.device)
        dist.broadcast(out, 0)
        return out

    def _send(self, numbers: list[int]) -> None:
        message = torch.tensor([*numbers, *[0] * (_FIRST - len(numbers))], dtype=torch.int64)
        dist.broadcast(message[:_FIRST], 0, group=self._orders)
        if len(message) > _FIRST:
            dist.broadcast(message[_FIRST:].contiguous(), 0, group=self._orders)
