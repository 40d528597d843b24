"""What inference takes, from the config alone: memory of one GPU, and which GPUs serve how many sequences.

A GPU holds its part of the main model (no MTP modules) and a cache for its sequences; bytes of weights by precision
are those of :mod:`abyssal.analysis.weights`, of the cache those of :mod:`abyssal.analysis.cache`. Tensor parallelism
divides matrices as in training, and MHA's cache by heads; MLA's latents are on every rank. Expert-parallel ranks divide
batch and experts. The workspace is what the largest part of a block needs for a prompt's ``chunk`` tokens, or for one
token of each sequence where these are more, with the keys and values of one sequence's whole context expanded from the
latents, and one token's logits for each sequence.

A group of tensor · expert GPUs serves sequences together; replicas of a group share the batch. Of all groups the one is
taken that serves the batch on the fewest GPUs, and among these the one that holds the most sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from abyssal.analysis.activations import StepShape, block_activations
from abyssal.analysis.cache import cache_size
from abyssal.analysis.inventory import Inventory, Split, Weight
from abyssal.analysis.layouts import MOST_GPUS, NODE, Wishes, check, choices, tensor_fault
from abyssal.analysis.memory import Memory
from abyssal.analysis.plan import describe
from abyssal.analysis.units import plural
from abyssal.analysis.weights import matrix_bytes
from abyssal.config import ModelConfig
from abyssal.errors import UserError

Precision = Literal["bf16", "fp8", "int8", "int4"]
CACHES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}
_MOST_SEQUENCES = 2**24


@dataclass(frozen=True)
class Serving:
    """How a model is served: ``batch`` sequences of ``context`` tokens; None: 4096, or all that the model takes."""

    precision: Precision = "bf16"
    batch: int = 1
    context: int | None = None
    chunk: int = 2048
    cache: Literal["bf16", "fp8", "fp32"] = "bf16"


@dataclass(frozen=True)
class Group:
    """``replicas`` times tensor · expert GPUs that serve together."""

    tensor: int = 1
    expert: int = 1
    replicas: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.expert * self.replicas


@dataclass(frozen=True)
class Room:
    """The most sequences of ``context`` tokens that all GPUs hold, and the group that does it."""

    context: int
    sequences: int
    group: Group


@dataclass(frozen=True)
class InferencePlan:
    """The fewest GPUs that serve a batch, and what all of them could hold."""

    serving: Serving
    group: Group
    memory: Memory
    rooms: list[Room]


def cache_bytes(config: ModelConfig, batch: int, context: int, tensor: int = 1, cache: str = "bf16") -> int:
    """Bytes of the cache for ``batch`` sequences of ``context`` tokens on one of ``tensor`` ranks."""
    whole = cache_size(config).nbytes(CACHES[cache], context=context, batch=batch)
    return whole // tensor if config.attention.kind == "mha" else whole


def weight_bytes(weight: Weight, precision: Precision) -> int:
    """Bytes of a tensor for inference."""
    if not weight.trained:
        return 4 * weight.numel  # e_score_correction_bias
    if weight.adaptable is None:
        return 2 * weight.numel
    *stack, rows, columns = weight.shape
    if weight.name.endswith(".gate_up_proj"):  # two matrices, each with scales of its own
        stack, rows = [*stack, 2], rows // 2
    return math.prod(stack) * matrix_bytes(rows, columns)[precision]


class InferenceMemory:
    """Memory of one of the GPUs that serve together; what batches share is worked out once."""

    def __init__(self, inventory: Inventory, serving: Serving) -> None:
        self.config, self.serving = inventory.config, serving
        self._layers = {self.config.is_moe_layer(layer): layer for layer in range(self.config.num_hidden_layers)}
        self._weights: dict[Split, int] = {"expert": 0, "tensor": 0, "none": 0}
        self._parts: dict[tuple[int, int, int], int] = {}
        for weight in inventory.weights:
            if weight.layer is None or weight.layer < self.config.num_hidden_layers:
                self._weights[weight.split] += weight_bytes(weight, serving.precision)

    def of(self, group: Group, batch: int, context: int) -> Memory:
        """For ``batch`` sequences of ``context`` tokens on one replica of ``group``."""
        tensor, expert, local = group.tensor, group.expert, -(-batch // group.expert)
        divided: dict[Split, int] = {"expert": tensor * expert, "tensor": tensor, "none": 1}
        weights = sum(nbytes / divided[split] for split, nbytes in self._weights.items())
        return Memory(
            {
                "weights": math.ceil(weights),
                "cache": cache_bytes(self.config, local, context, tensor, self.serving.cache),
                "workspace": self._workspace(group, local, context),
            }
        )

    def _workspace(self, group: Group, batch: int, context: int) -> int:
        a, tensor = self.config.attention, group.tensor
        tokens = max(min(self.serving.chunk, context), batch)
        expanded = 0
        if a.kind != "mha":
            expanded = (
                2 * context * (a.num_attention_heads // tensor) * (a.qk_head_dim + max(a.qk_head_dim, a.v_head_dim))
            )
        residual = 2 * 2 * tokens * self.config.hidden_size
        logits = (2 + 4) * batch * self.config.vocab_size // tensor
        return self._part(group, tokens) + expanded + residual + logits

    def _part(self, group: Group, tokens: int) -> int:
        key = (group.tensor, group.expert, tokens)
        if key not in self._parts:
            step = StepShape(1, tokens, tensor=group.tensor, expert=group.expert)
            blocks = [block_activations(self.config, layer, step) for layer in self._layers.values()]
            self._parts[key] = max(
                max(sum(block.attention.values()), sum(block.feed_forward.values())) for block in blocks
            )
        return self._parts[key]


class InferencePlanner:
    """Plans for serving one model one way. Raises UserError for what can't be asked."""

    def __init__(self, inventory: Inventory, wishes: Wishes, serving: Serving) -> None:
        config, longest = inventory.config, inventory.config.max_position_embeddings
        check(config, wishes)
        for name in ("batch", "context", "chunk"):
            number = getattr(serving, name)
            if number is not None and number < 1:
                raise UserError(f"--{name}: {number} is not at least 1")
        if serving.context is not None and serving.context > longest:
            raise UserError(f"--context: {serving.context} is more than the model's max_position_embeddings {longest}")
        self.inventory, self.wishes, self.config = inventory, wishes, config
        self.context = serving.context or min(4096, longest)
        self.serving = replace(serving, context=self.context)
        self.memory = InferenceMemory(inventory, self.serving)
        self.groups = list(self._groups())
        if not self.groups:
            raise UserError(f"--tensor and --expert: no group of at most {plural(wishes.gpus, 'GPU')} has them")

    def plan(self) -> InferencePlan:
        """The fewest GPUs that serve the batch. Raises UserError where it does not fit: what would."""
        batch, gpus, longest = self.serving.batch, self.wishes.gpus, self.config.max_position_embeddings
        possible = []
        for group in self.groups:
            most = self.most(group, self.context)
            replicas = -(-batch // most) if most else gpus + 1
            if replicas * group.gpus <= gpus:
                possible.append(
                    (replicas * group.gpus, -replicas * most, group.tensor, replace(group, replicas=replicas))
                )
        if not possible:
            raise UserError(self._refusal())
        group = min(possible, key=lambda found: found[:3])[3]
        contexts = sorted({c for c in (4096, 32768, longest, self.context) if c <= longest})
        memory = self.memory.of(group, -(-batch // group.replicas), self.context)
        return InferencePlan(self.serving, group, memory, [self.room(context) for context in contexts])

    def room(self, context: int) -> Room:
        """The most sequences of ``context`` tokens on all GPUs."""
        groups = [replace(group, replicas=self.wishes.gpus // group.gpus) for group in self.groups]
        best = max(groups, key=lambda g: (g.replicas * self.most(g, context), -g.tensor * g.expert, -g.tensor))
        return Room(context, best.replicas * self.most(best, context), best)

    def most(self, group: Group, context: int) -> int:
        """Sequences of ``context`` tokens that fit on one replica of ``group``; 0: not even one."""
        return _largest(
            lambda batch: self.memory.of(group, batch, context).total <= self.wishes.usable, _MOST_SEQUENCES
        )

    def _groups(self) -> Iterator[Group]:
        wishes, moe = self.wishes, self.config.moe
        for tensor in choices(wishes.tensor, wishes.gpus, NODE):
            if tensor_fault(self.config, tensor) is None:
                for expert in choices(wishes.expert, wishes.gpus // tensor, moe.n_routed_experts if moe else 1):
                    if moe is None or moe.n_routed_experts % expert == 0:
                        yield Group(tensor, expert)

    def _refusal(self) -> str:
        batch, context = self.serving.batch, self.context
        # Shared as evenly as it goes: what a GPU of each group has to hold at least.
        least = min(
            (self.memory.of(g, -(-batch // (self.wishes.gpus // g.gpus)), context) for g in self.groups),
            key=lambda memory: memory.total,
        )
        found = list(self._what_would_fit())
        would = "would fit: " + ", or ".join(found) if found else self._all_at_once()
        return (
            f"inference of {plural(batch, 'sequence')} of {plural(context, 'token')} does not fit: "
            f"{describe(least, self.wishes.usable)}; {would}"
        )

    def _what_would_fit(self) -> Iterator[str]:
        """What would, each tried with all the other options as they are."""
        serving, wishes = self.serving, self.wishes
        if batch := self.room(self.context).sequences:
            yield f"--batch {batch}"
        if context := _largest(lambda context: self._fits(replace(serving, context=context)), self.context):
            yield f"--context {context // 256 * 256 if context > 256 else context}"
        quantised: tuple[Precision, ...] = ("fp8", "int8", "int4")
        lighter = [
            precision
            for precision in quantised
            if matrix_bytes(128, 128)[precision] < matrix_bytes(128, 128)[serving.precision]
        ]
        smaller = [precision for precision in lighter if self._fits(replace(serving, precision=precision))]
        if smaller:
            yield f"--weights {' or '.join(smaller)}"
        if serving.cache != "fp8" and self._fits(replace(serving, cache="fp8")):
            yield "--cache fp8"
        free: dict[str, Any] = dict.fromkeys(wishes.layout)
        if free and self._fits(serving, replace(wishes, **free)):
            yield "another layout"
        counts = [wishes.gpus << k for k in range(1, 13) if wishes.gpus << k <= MOST_GPUS]
        for other in [{}, free] if free else [{}]:
            gpus = next((n for n in counts if self._fits(serving, replace(wishes, **other | {"gpus": n}))), None)
            if gpus is not None:
                yield f"{gpus:,} GPUs" + (" in another layout" if other else "")
                return

    def _all_at_once(self) -> str:
        """The least that can be asked, for where no single change is enough."""
        least = replace(self.serving, precision="int4", cache="fp8", batch=1)
        for gpus in (self.wishes.gpus << k for k in range(13)):
            if gpus <= MOST_GPUS and self._fits(least, replace(self.wishes, gpus=gpus)):
                return f"would fit: {plural(gpus, 'GPU')} with --weights int4 --cache fp8 --batch 1"
        return "nothing that this plan knows would fit"

    def _fits(self, serving: Serving, wishes: Wishes | None = None) -> bool:
        try:
            other = InferencePlanner(self.inventory, wishes or self.wishes, serving)
        except UserError:
            return False
        return other.room(other.context).sequences >= serving.batch


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` of which ``holds`` is true, as it is of all below; 0: of none."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
