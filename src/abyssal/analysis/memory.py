"""Memory of one GPU for a training step under a parallel layout, from the config alone.

A plan keeps what the package's own trainer keeps. In BF16 the matrices that only products read are BF16, with the
lower half of their FP32 number as ``low`` (int16) in the optimizer; norms, router and embedding are FP32. Gradients
have their weight's dtype, but FP32 where a step gathers several micro-batches. AdamW keeps two moments a weight, Muon
one for matrices: 4 bytes each, 2 (``bfloat16``), or 1 and an FP32 scale for every 128 (``8bit``; tensors below 4096
numbers stay FP32). Tests compare with the trainer's tensors, byte by byte.

Peak memory is taken as the sum of all terms: gradients come while activations go, so a step with one micro-batch stays
below it. Not in it, and what a reserve is for: CUDA's context, NCCL's buffers, fragmentation of the allocator.

A **layout** is replicate × shard × tensor × pipeline GPUs; expert parallelism runs over the data-parallel ranks.
What each is taken to do:

- shard (FSDP, ZeRO-3): weights, gradients and optimizer are divided; a block's weights are gathered while it computes,
  and the next block's ahead of it, in the dtype of products, and the gradient of one block waits to be scattered.
- replicate: every replica holds the same.
- expert: a rank holds its share of the routed experts, for which ``shard`` divides only what is left of it.
- tensor: attention by heads, feed-forwards and experts by width, embedding and head by vocabulary; norms, router,
  latent projections and eh_proj are on every rank.
- pipeline: layers in stages as equal as they go, the first ones larger; MTP modules and head on the last, which holds
  the embedding once more for MTP or where it is tied. Under 1F1B stage i of p keeps p − i micro-batches. The largest
  stage counts.

**LoRA** freezes the model in BF16 (FP32 in an FP32 run) and trains, on every projection of the chosen parts (each
expert for itself, its gate and up as one), two matrices that are kept like any FP32 master: 4 bytes, 4 of gradient, and
moments. **QLoRA** has the projections in NF4 with double quantisation: 4 bits, 8 for each block of 64, 32 for 256 of
these; in int8 or int4 they are what :mod:`abyssal.model.quantized` has. 2^22 of them, or one expert's matrix, stand
dequantised at a time. **ESFT** trains a share of the routed experts, which are kept as in training; the rest is frozen.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from abyssal.analysis.activations import (
    Activations,
    Adapters,
    StepShape,
    block_kind,
    count_activations,
)
from abyssal.analysis.inventory import Inventory, Split, Weight
from abyssal.config.parallel import stage_layers
from abyssal.kernels.nf4 import nf4_shapes
from abyssal.kernels.packed import Kind as Packing
from abyssal.kernels.packed import packed_shapes

_MOMENT_BLOCK, _TINY = 128, 4096  # training/optimizer.py
_MUON_BATCH = 2**26  # training/muon.py
_DEQUANTISED = 2**22  # model/quantized.py

Frozen = Literal["dense", "nf4", "int8", "int4"]
"""What the frozen weights are kept in."""
State = Literal["float32", "bfloat16", "8bit"]
Kind = tuple[bool, bool] | Literal["embedding", "end"]
"""What a part is: a block of some kind (:func:`block_kind`), the embedding, or the last norm and the head."""


@dataclass(frozen=True)
class Layout:
    """How GPUs share the work; ``expert`` is a part of the replicate · shard data-parallel ranks."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    expert: int = 1
    pipeline: int = 1

    @property
    def gpus(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.replicate * self.shard

    def divided_by(self, split: Split) -> int:
        """Over how many GPUs of a pipeline stage one copy of such a weight is spread."""
        if split == "expert":
            return self.tensor * max(self.shard, self.expert)
        return self.shard * (self.tensor if split == "tensor" else 1)

    def gathered(self, split: Split) -> int:
        """What divides such a weight while it is in use."""
        return self.tensor * self.expert if split == "expert" else self.tensor if split == "tensor" else 1


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained; ``micro_batch`` and ``accumulate`` are those of a data-parallel rank."""

    micro_batch: int
    sequence: int
    accumulate: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    state: State = "float32"
    adapters: Adapters | None = None
    frozen: Frozen = "dense"

    def step(self, layout: Layout) -> StepShape:
        """A micro-batch on one GPU."""
        return StepShape(
            batch=self.micro_batch,
            sequence=self.sequence,
            dtype=self.dtype,
            recompute=self.recompute,
            tensor=layout.tensor,
            expert=layout.expert,
            adapters=self.adapters,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by term; ``activations`` has the activations by theirs."""

    by_term: dict[str, int]
    activations: dict[str, int] = field(default_factory=dict)
    stage: int = 0

    @property
    def total(self) -> int:
        return sum(self.by_term.values())


def weight_state(weight: Weight, setup: TrainingSetup) -> dict[str, float]:
    """Bytes of one tensor while training, by term, wherever its parts lie."""
    n, half = weight.numel, setup.dtype == "bfloat16"
    if setup.adapters is not None:
        nbytes = packed_bytes(weight, setup.frozen)
        if nbytes is None:
            nbytes = (2 if half and weight.trained else 4) * n
        return {"weights": nbytes, **_adapter_state(weight, setup)}
    if not weight.trained:
        return {"weights": 4 * n}
    return {"weights": (2 if half and weight.product else 4) * n, **_trained_state(weight, n, setup)}


def _trained_state(weight: Weight, numel: int, setup: TrainingSetup) -> dict[str, float]:
    """What comes on top of ``numel`` numbers of a weight for training them."""
    low = setup.dtype == "bfloat16" and weight.product
    return {
        "gradients": (2 if low and setup.accumulate == 1 else 4) * numel,
        "optimizer": (2 if low else 0) * numel + _moments(weight.muon, numel, setup),
    }


def packed_bytes(weight: Weight, frozen: Frozen) -> int | None:
    """Bytes of a weight that is packed as ``frozen`` says (:func:`abyssal.model.quantized.use_packed`); None: it is
    not."""
    head, shape = weight.name == "lm_head.weight" and weight.product, tuple(weight.shape)
    if frozen == "dense" or not (weight.adaptable or head):
        return None
    if frozen != "nf4":
        kind: Packing = "int8" if head else frozen
        data, scales = packed_shapes(shape, kind)
        return None if "kv_b_proj" in weight.name else math.prod(data) + 2 * math.prod(scales)
    if head:
        return None
    *stack, outputs, inputs = shape
    parts = 2 if "gate_up_proj" in weight.name else 1
    sizes = nf4_shapes((*stack, parts), (outputs // parts, inputs))
    return sum(math.prod(size) * width for size, width in zip(sizes, (1, 1, 4, 4), strict=True))


def _moments(muon: bool, numel: int, setup: TrainingSetup) -> int:
    count = 1 if muon and setup.optimizer == "muon" else 2
    if setup.state == "8bit" and numel >= _TINY:
        return count * (numel + 4 * -(-numel // _MOMENT_BLOCK))
    return count * numel * (2 if setup.state == "bfloat16" else 4)


def adapter_parameters(weight: Weight, adapters: Adapters) -> int:
    """Numbers that LoRA adds to a tensor."""
    if weight.adaptable not in adapters.parts or weight.mtp:
        return 0
    *stack, outputs, inputs = weight.shape
    return math.prod(stack) * adapters.rank * (outputs + inputs)


def _adapter_state(weight: Weight, setup: TrainingSetup) -> dict[str, float]:
    assert setup.adapters is not None
    if setup.adapters.share:
        part = weight.adaptable == "experts" and not weight.mtp
        return _trained_state(weight, round(setup.adapters.share * weight.numel), setup) if part else {}
    n = adapter_parameters(weight, setup.adapters)
    return {"adapters": 8 * n + _moments(True, n, setup)} if n else {}


@dataclass
class _Part:
    """A block, or what stands before or behind them: its tensors' bytes by term and by how they are split."""

    state: dict[Split, dict[str, float]] = field(default_factory=dict)
    gathered: dict[Split, float] = field(default_factory=dict)
    """Bytes in use: what FSDP gathers."""
    largest: dict[Split, int] = field(default_factory=dict)
    """Numbers of the largest matrix; of experts, that is of all of a layer's."""
    unpacked: int = 0
    """Numbers that stand dequantised at a time, at most."""

    def add(self, weight: Weight, setup: TrainingSetup) -> None:
        state = self.state.setdefault(weight.split, {})
        for term, nbytes in weight_state(weight, setup).items():
            state[term] = state.get(term, 0) + nbytes
        nbytes = weight.numel * (2.0 if setup.dtype == "bfloat16" else 4.0)
        if setup.adapters is not None:  # frozen weights travel as they are stored
            nbytes = weight_state(weight, setup)["weights"]
        self.gathered[weight.split] = self.gathered.get(weight.split, 0) + nbytes
        if weight.product:
            self.largest[weight.split] = max(self.largest.get(weight.split, 0), weight.numel)
        if packed_bytes(weight, setup.frozen) is not None and weight.name != "lm_head.weight":
            one = max(weight.shape[-2:].numel(), _DEQUANTISED) if len(weight.shape) > 2 else _DEQUANTISED
            self.unpacked = max(self.unpacked, min(weight.numel, one))

    @classmethod
    def sum(cls, parts: list[tuple[_Part, int]]) -> _Part:
        """All of ``parts``, each so many times."""
        out = cls()
        for part, count in parts:
            out.unpacked = max(out.unpacked, part.unpacked)
            for split, terms in part.state.items():
                state = out.state.setdefault(split, {})
                for term, nbytes in terms.items():
                    state[term] = state.get(term, 0) + count * nbytes
                out.gathered[split] = out.gathered.get(split, 0) + count * part.gathered[split]
                out.largest[split] = max(out.largest.get(split, 0), part.largest.get(split, 0))
        return out


def _gathered(part: _Part, layout: Layout) -> dict[Split, float]:
    return {
        split: nbytes / layout.gathered(split)
        for split, nbytes in part.gathered.items()
        if layout.divided_by(split) > layout.gathered(split)
    }


class TrainingMemory:
    """Memory of training one model one way, under any layout; what layouts share is worked out once."""

    def __init__(self, inventory: Inventory, setup: TrainingSetup) -> None:
        config = self.config = inventory.config
        self.setup = setup
        self._parts: dict[Kind, _Part] = {"embedding": _Part(), "end": _Part()}
        first = {block_kind(config, layer): layer for layer in reversed(stage_layers(config, 1, 0))}
        self._parts |= {kind: _Part() for kind in first}
        self._kinds: dict[tuple[int, int], Counter[Kind]] = {}
        self._distinct: dict[int, list[int]] = {}
        self._sums: dict[tuple[int, int], _Part] = {}
        self._held: dict[tuple[int, int, int, int], Activations] = {}
        for weight in inventory.weights:
            if weight.layer is None:
                self._parts["embedding" if "embed_tokens" in weight.name else "end"].add(weight, setup)
            elif first[kind := block_kind(config, weight.layer)] == weight.layer:
                self._parts[kind].add(weight, setup)

    def of(self, layout: Layout) -> Memory:
        """The largest stage's memory."""
        stages = [self._stage(layout, stage) for stage in self._distinct_stages(layout.pipeline)]
        return max(stages, key=lambda memory: memory.total)

    def state(self, layout: Layout, stage: int = 0) -> dict[str, int]:
        """Weights, gradients, optimizer (and adapters) of ``stage``, by term."""
        out: dict[str, float] = {}
        for split, terms in self._sum(layout.pipeline, stage).state.items():
            for term, nbytes in terms.items():
                out[term] = out.get(term, 0) + nbytes / layout.divided_by(split)
        return {term: math.ceil(nbytes) for term, nbytes in out.items()}

    def gathered_bytes(self, layout: Layout, stage: int = 0) -> dict[Split, float]:
        """Bytes that FSDP brings together on a GPU for one pass through ``stage``, by how weights are split."""
        return _gathered(self._sum(layout.pipeline, stage), layout)

    def _stage_kinds(self, pipeline: int, stage: int) -> Counter[Kind]:
        """How many parts of each kind a stage has."""
        if (pipeline, stage) not in self._kinds:
            config = self.config
            kinds = Counter[Kind](block_kind(config, layer) for layer in stage_layers(config, pipeline, stage))
            last = stage == pipeline - 1
            again = config.tie_word_embeddings or config.mtp.num_nextn_predict_layers > 0
            if stage == 0 or (last and again):
                kinds["embedding"] = 1
            if last:
                kinds["end"] = 1
            self._kinds[pipeline, stage] = kinds
        return self._kinds[pipeline, stage]

    def _distinct_stages(self, pipeline: int) -> list[int]:
        """The first of all stages that have the same parts: it keeps the most micro-batches."""
        if pipeline not in self._distinct:
            first: dict[frozenset[tuple[Kind, int]], int] = {}
            for stage in range(pipeline):
                first.setdefault(frozenset(self._stage_kinds(pipeline, stage).items()), stage)
            self._distinct[pipeline] = list(first.values())
        return self._distinct[pipeline]

    def _sum(self, pipeline: int, stage: int) -> _Part:
        if (pipeline, stage) not in self._sums:
            kinds = self._stage_kinds(pipeline, stage)
            self._sums[pipeline, stage] = _Part.sum([(self._parts[kind], count) for kind, count in kinds.items()])
        return self._sums[pipeline, stage]

    def _activations(self, layout: Layout, stage: int) -> Activations:
        key = (layout.tensor, layout.expert, layout.pipeline, stage)
        if key not in self._held:
            self._held[key] = count_activations(self.config, self.setup.step(layout), layout.pipeline, stage)
        return self._held[key]

    def _stage(self, layout: Layout, stage: int) -> Memory:
        terms, setup = self.state(layout, stage), self.setup
        kinds, whole = self._stage_kinds(layout.pipeline, stage), self._sum(layout.pipeline, stage)
        units = [
            nbytes
            for kind, count in kinds.items()
            for nbytes in [sum(_gathered(self._parts[kind], layout).values())] * min(count, 2)
        ]
        units.sort(reverse=True)
        # Two units' weights; and the gradient of one, where there is one.
        terms["gathered blocks"] = math.ceil(sum(units[:2]) + (units[0] if setup.adapters is None else 0))
        held = self._activations(layout, stage)
        flying = min(layout.pipeline - stage, setup.accumulate)
        terms["activations"] = held.kept * flying
        terms["recomputed block"] = held.recomputed
        terms["backward buffers"] = held.working
        terms["dequantised weights"] = whole.unpacked * (2 if setup.dtype == "bfloat16" else 4)
        if setup.optimizer == "muon" and setup.adapters is None:
            # The updates of a stack of matrices, and three buffers of Newton-Schulz, when activations are gone.
            local = [numel / layout.divided_by(split) for split, numel in whole.largest.items()]
            width = 2 if setup.dtype == "bfloat16" else 4
            buffers = math.ceil(width * (max(*local, _MUON_BATCH) + 3 * _MUON_BATCH))
            spare = sum(terms[term] for term in ("activations", "recomputed block", "backward buffers"))
            terms["Muon's buffers"] = max(buffers - spare, 0)
        by_term = {term: count * flying for term, count in held.by_term.items()}
        return Memory({term: nbytes for term, nbytes in terms.items() if nbytes}, by_term, stage)
