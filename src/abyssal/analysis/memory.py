"""Memory of one GPU, from the config alone: for a training step under a parallel layout, and for inference.

**Training** keeps what the package's own trainer keeps. In BF16 the matrices that only products read are BF16, with the
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
these; at most 2^28 of them stand dequantised at a time.

**Inference** holds the main model (no MTP modules) and a cache for batch × context tokens. Weights as FP8 are V3's:
blocks of 128 × 128 with an FP32 scale; int8 has a BF16 scale for every row, int4 for every 128 weights of a row; norms,
router, embedding and head are BF16 in all of these. Tensor parallelism divides MHA's cache by heads; MLA's latents are
on every rank. Expert-parallel ranks divide batch and experts. The workspace is what one sequence's prefill of ``chunk``
tokens needs in the largest part of a block, with the keys and values of its whole context expanded from the latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from abyssal.analysis import activations
from abyssal.analysis.activations import Activations, Adapters, BlockActivations, StepShape, total
from abyssal.checkpoint.names import layer_of
from abyssal.config import ModelConfig
from abyssal.kernels import fp8
from abyssal.model import Transformer
from abyssal.model.moe import Experts
from abyssal.model.router import Router

_MOMENT_BLOCK, _TINY = 128, 4096  # training/optimizer.py
_MUON_BATCH = 2**26  # training/muon.py
_DEQUANTISED, _INT4_GROUP = 2**28, 128
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4 with double quantisation."""

Split = Literal["expert", "tensor", "none"]
State = Literal["float32", "bfloat16", "8bit"]
Precision = Literal["bf16", "fp8", "int8", "int4"]
_BY_TENSOR = (
    *("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "q_b_proj", "k_b_proj", "v_b_proj", "kv_b_proj"),
    *("o_proj", "gate_proj", "up_proj", "down_proj"),
)


@dataclass(frozen=True)
class Weight:
    """A tensor of the model, and what decides how many bytes it takes."""

    name: str
    shape: torch.Size
    layer: int | None
    product: bool
    """Read by matrix products only (BF16 while training in BF16)."""
    muon: bool
    """Updated by Muon where that is the optimizer."""
    trained: bool
    split: Split

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def adaptable(self) -> str | None:
        """The part that LoRA may be put on (:data:`abyssal.analysis.activations.ADAPTABLE`)."""
        if not self.product or "_proj" not in self.name or "eh_proj" in self.name:
            return None
        if ".self_attn." in self.name:
            return "attention"
        if ".shared_experts." in self.name:
            return "shared"
        return "experts" if ".experts." in self.name else "mlp"


class Inventory:
    """All tensors of a model, counted on one built without memory."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            model = Transformer(config)
        products: set[int] = set()
        muon: set[int] = set()
        for module in model.modules():
            if isinstance(module, Experts):
                products |= {id(p) for p in module.parameters()}
            elif isinstance(module, nn.Linear):
                products.add(id(module.weight))
            if isinstance(module, Router) or (isinstance(module, nn.Linear) and module is not model.lm_head):
                muon.add(id(module.weight))
        muon |= {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
        products.discard(id(model.model.embed_tokens.weight))  # also where the head is tied to it
        muon.discard(id(model.lm_head.weight))
        self.config = config
        self.weights = [
            Weight(name, p.shape, layer_of(name), id(p) in products, id(p) in muon, True, _split(name))
            for name, p in model.named_parameters()
        ]
        self.weights += [
            Weight(name, b.shape, layer_of(name), False, False, False, "none") for name, b in model.named_buffers()
        ]

    @cached_property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights)


def _split(name: str) -> Split:
    if ".mlp.experts." in name:
        return "expert"
    return "tensor" if any(f"{part}.weight" in name for part in _BY_TENSOR) else "none"


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
    nf4: bool = False

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
        nbytes = NF4 * n if setup.nf4 and weight.adaptable else (2 if half and weight.trained else 4) * n
        return {"weights": nbytes, **_adapter_state(weight, setup)}
    if not weight.trained:
        return {"weights": 4 * n}
    low = half and weight.product
    return {
        "weights": (2 if low else 4) * n,
        "gradients": (2 if low and setup.accumulate == 1 else 4) * n,
        "optimizer": (2 if low else 0) * n + _moments(weight.muon, n, setup),
    }


def _moments(muon: bool, numel: int, setup: TrainingSetup) -> int:
    count = 1 if muon and setup.optimizer == "muon" else 2
    if setup.state == "8bit" and numel >= _TINY:
        return count * (numel + 4 * -(-numel // _MOMENT_BLOCK))
    return count * numel * (2 if setup.state == "bfloat16" else 4)


def adapter_parameters(weight: Weight, adapters: Adapters) -> int:
    """Numbers that LoRA adds to a tensor."""
    if weight.adaptable not in adapters.parts:
        return 0
    *stack, outputs, inputs = weight.shape
    return math.prod(stack) * adapters.rank * (outputs + inputs)


def _adapter_state(weight: Weight, setup: TrainingSetup) -> dict[str, float]:
    assert setup.adapters is not None
    n = adapter_parameters(weight, setup.adapters)
    return {"adapters": 8 * n + _moments(True, n, setup)} if n else {}


@dataclass
class _Part:
    """A block, or what stands before or behind them: its tensors' bytes by term and by how they are split."""

    state: dict[Split, dict[str, float]] = field(default_factory=dict)
    gathered: dict[Split, float] = field(default_factory=dict)
    """Bytes in use: what FSDP gathers."""
    largest: dict[Split, int] = field(default_factory=dict)
    """Numbers of the largest matrix."""

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

    @classmethod
    def sum(cls, parts: Sequence[_Part]) -> _Part:
        """All of ``parts`` together."""
        out = cls()
        for part in parts:
            for split, terms in part.state.items():
                state = out.state.setdefault(split, {})
                for term, nbytes in terms.items():
                    state[term] = state.get(term, 0) + nbytes
                out.gathered[split] = out.gathered.get(split, 0) + part.gathered[split]
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
        self.blocks = [_Part() for _ in range(config.num_hidden_layers + config.mtp.num_nextn_predict_layers)]
        self.embedding, self.end = _Part(), _Part()
        self._sums: dict[tuple[int, int], _Part] = {}
        self._held: dict[tuple[int, int, int, int], Activations] = {}
        for weight in inventory.weights:
            if weight.layer is not None:
                self.blocks[weight.layer].add(weight, setup)
            else:
                (self.embedding if "embed_tokens" in weight.name else self.end).add(weight, setup)

    def of(self, layout: Layout) -> Memory:
        """The largest stage's memory."""
        stages = [self._stage(layout, stage) for stage in range(layout.pipeline)]
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

    def _parts(self, pipeline: int, stage: int) -> list[_Part]:
        parts = [self.blocks[layer] for layer in stage_layers(self.config, pipeline, stage)]
        last = stage == pipeline - 1
        again = self.config.tie_word_embeddings or self.config.mtp.num_nextn_predict_layers > 0
        if stage == 0 or (last and again):
            parts.append(self.embedding)
        return [*parts, self.end] if last else parts

    def _sum(self, pipeline: int, stage: int) -> _Part:
        if (pipeline, stage) not in self._sums:
            self._sums[pipeline, stage] = _Part.sum(self._parts(pipeline, stage))
        return self._sums[pipeline, stage]

    def _activations(self, layout: Layout, stage: int) -> Activations:
        key = (layout.tensor, layout.expert, layout.pipeline, stage)
        if key not in self._held:
            self._held[key] = stage_activations(self.config, self.setup.step(layout), layout.pipeline, stage)
        return self._held[key]

    def _stage(self, layout: Layout, stage: int) -> Memory:
        terms, setup = self.state(layout, stage), self.setup
        parts, whole = self._parts(layout.pipeline, stage), self._sum(layout.pipeline, stage)
        units = sorted((sum(_gathered(part, layout).values()) for part in parts), reverse=True)
        # Two units' weights; and the gradient of one, where there is one.
        terms["gathered blocks"] = math.ceil(sum(units[:2]) + (units[0] if setup.adapters is None else 0))
        held = self._activations(layout, stage)
        flying = min(layout.pipeline - stage, setup.accumulate)
        terms["activations"] = held.kept * flying
        terms["recomputed block"] = held.recomputed
        terms["backward buffers"] = held.working
        largest = [numel / layout.gathered(split) for split, numel in whole.largest.items()]
        if setup.nf4:
            terms["dequantised weights"] = math.ceil(2 * min(max(largest), _DEQUANTISED))
        if setup.optimizer == "muon" and setup.adapters is None:
            # The updates of a stack of matrices, and three buffers of Newton-Schulz, when activations are gone.
            local = [numel / layout.divided_by(split) for split, numel in whole.largest.items()]
            width = 2 if setup.dtype == "bfloat16" else 4
            buffers = math.ceil(width * (max(*local, _MUON_BATCH) + 3 * _MUON_BATCH))
            spare = sum(terms[term] for term in ("activations", "recomputed block", "backward buffers"))
            terms["Muon's buffers"] = max(buffers - spare, 0)
        by_term = {term: count * flying for term, count in held.by_term.items()}
        return Memory({term: nbytes for term, nbytes in terms.items() if nbytes}, by_term, stage)


def stage_layers(config: ModelConfig, pipeline: int, stage: int) -> range:
    """Layers of pipeline stage ``stage``, MTP modules counted on behind the last one's."""
    layers, depths = config.num_hidden_layers, config.mtp.num_nextn_predict_layers
    each, more = divmod(layers, pipeline)
    start = stage * each + min(stage, more)
    end = start + each + (stage < more)
    return range(start, end + (depths if stage == pipeline - 1 else 0))


def stage_activations(config: ModelConfig, step: StepShape, pipeline: int = 1, stage: int = 0) -> Activations:
    """What a pipeline stage keeps of one micro-batch."""
    depths, last = config.mtp.num_nextn_predict_layers, stage == pipeline - 1
    kinds: dict[tuple[bool, bool], BlockActivations] = {}
    kept: list[dict[str, int]] = []
    for layer in stage_layers(config, pipeline, stage):
        kind = (config.is_moe_layer(layer), layer >= config.num_hidden_layers)
        if kind not in kinds:
            kinds[kind] = activations.block_activations(config, layer, step)
        kept.append(kinds[kind].kept)
    tables = activations.rotary_tables(config, step)
    kept.append(tables)
    working = [block.working for block in kinds.values()]
    if last:
        kept.append(activations.final_norm(config, step))
        kept += [activations.loss_activations(config, step) for _ in range(depths + 1)]
        kept += [activations.mtp_input(config, step) for _ in range(depths)]
        kept += [tables] if depths else []
        working.append(activations.loss_working(config, step))
    return Activations(
        total(*kept), max((block.recomputed for block in kinds.values()), default=0), max(working, default=0)
    )


def cache_bytes(config: ModelConfig, batch: int, context: int, tensor: int = 1, width: int = 2) -> int:
    """Bytes of the cache for ``batch`` sequences of ``context`` tokens on one of ``tensor`` ranks."""
    a = config.attention
    values = a.cached_values
    if a.kind == "mha":
        values = 2 * -(-a.num_key_value_heads // tensor) * a.head_dim
    return batch * context * config.num_hidden_layers * values * width


def weight_bytes(weight: Weight, precision: Precision) -> float:
    """Bytes of a tensor for inference."""
    if not weight.trained:
        return 4 * weight.numel  # e_score_correction_bias
    if precision == "bf16" or weight.adaptable is None:
        return 2 * weight.numel
    if precision == "fp8":
        shape = weight.shape
        if weight.name.endswith(".gate_up_proj"):  # gate and up have blocks of their own
            shape = torch.Size((shape[0], 2, shape[1] // 2, shape[2]))
        return weight.numel + 4 * math.prod(fp8.scale_shape(shape))
    columns = weight.shape[-1]
    rows = weight.numel // columns
    return rows * (columns + 2 if precision == "int8" else -(-columns // 2) + 2 * -(-columns // _INT4_GROUP))


def inference_memory(
    inventory: Inventory,
    *,
    precision: Precision = "bf16",
    batch: int,
    context: int,
    chunk: int = 2048,
    tensor: int = 1,
    expert: int = 1,
    cache_width: int = 2,
) -> Memory:
    """Memory of one of ``tensor`` · ``expert`` GPUs that serve ``batch`` sequences of ``context`` tokens together."""
    config = inventory.config
    divided: dict[Split, int] = {"expert": tensor * expert, "tensor": tensor, "none": 1}
    weights = sum(
        weight_bytes(weight, precision) / divided[weight.split]
        for weight in inventory.weights
        if weight.layer is None or weight.layer < config.num_hidden_layers
    )
    local = -(-batch // expert)
    return Memory(
        {
            "weights": math.ceil(weights),
            "cache": cache_bytes(config, local, context, tensor, cache_width),
            "workspace": _workspace(config, local, context, min(chunk, context), tensor, expert),
        }
    )


def _workspace(config: ModelConfig, batch: int, context: int, chunk: int, tensor: int, expert: int) -> int:
    step = StepShape(1, chunk, tensor=tensor, expert=expert)
    layers = {config.is_moe_layer(layer): layer for layer in range(config.num_hidden_layers)}
    blocks = [activations.block_activations(config, layer, step) for layer in layers.values()]
    part = max(max(sum(block.attention.values()), sum(block.feed_forward.values())) for block in blocks)
    a, expanded = config.attention, 0
    if a.kind != "mha":
        heads = a.num_attention_heads // tensor
        expanded = 2 * context * heads * (a.qk_head_dim + max(a.qk_head_dim, a.v_head_dim))
    residual = 2 * 2 * chunk * config.hidden_size
    logits = (2 + 4) * batch * config.vocab_size // tensor
    return part + expanded + residual + logits
