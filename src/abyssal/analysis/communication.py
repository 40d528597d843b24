"""What one process hands to the others in a training step under a parallel layout, from the config alone.

Every message that :mod:`abyssal.distributed` sends is listed here with its size; tests count the messages of real steps
and compare them one by one. What is called a message's **payload** is the one tensor that a process has whole:

    all_gather      what comes out          reduce_scatter  what goes in
    all_reduce      the tensor              all_to_all      what goes in, the rows that stay here with it
    send            the tensor

and **sent** is what of that leaves a process among P, by rings: (P − 1) / P of what is gathered, scattered or
exchanged, twice that of what is reduced everywhere, all of what is sent to a neighbour.

Of the rows that experts get, N·K leave each process, however they are routed; how many come in to be sent back depends
on the routing, and is N·K in the mean over the processes. The figures are these means: exact for the sum over all
processes, and for each of them where loads are even.

What is sent, of a micro-batch unless said otherwise (w bytes a number: 2 in BF16, 4 in FP32):

- **shard** (with context): a block's weights, w, gathered for the forward pass and once more for the backward pass
  (``gather: again``) or once (``once``; embedding and head always), and its gradients, 4, scattered. FSDP pads each
  tensor to a multiple of the processes. Pipelines scatter once a step, and gather A + 1 times in place of 2·A for A
  micro-batches, or once a step, since a backward pass leaves the weights where they are.
- **replicate**: what of the gradients a process has after that, 4, reduced everywhere.
- **expert**, a MoE layer: rows [N·K, D] to the experts and back, w, forward and backward; routing weights, 4, there and
  their gradients back; how many rows there are for each expert, 8·E. With recomputation what is forward goes twice.
- **tensor**: attention's and feed-forward's output [N, D], w; backward a feed-forward's input [N, D], of MLA the
  latents of queries and of keys and values and the rotary key, of ordinary attention its input, and of a MoE layer the
  routing weights, 4·N·K; the embedding's output [N, D], 4; the head's input backward [N, D], w, and 12 bytes a token of
  the loss, for the main model and each MTP module. With ``sequence`` what is reduced is scattered in place of that and
  gathered backward, what is reduced backward is gathered before (of MLA all latents in two) and scattered backward;
  hidden states are gathered [N, D] behind the last norm, and for each MTP module, there and backward; and once a step
  gradients, 4, of the weights that all have are reduced.
- **context**, a layer: everyone's latents and rotary keys [B, T, C + R] (keys and values, where they are not made from
  latents), w, gathered forward, their gradients scattered backward. With recomputation what is forward goes twice.
- **pipeline**: the residual stream [B, T, D], 4, to the next stage, its gradient back. Once a step the last stage gets
  the embedding, where it has use for it, and returns its gradient.
- **batch**: once a step counts, losses, the loads [L, E], the gradient's norm; for a balancing loss over tokens each
  layer's loads, 4·E + 4 (over sequences, only where ``context`` divides these).

Not in it: validation, checkpoints, and 16 bytes a step by which processes agree to go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from abyssal.analysis.inventory import Inventory, Weight
from abyssal.analysis.memory import Layout, TrainingSetup
from abyssal.analysis.messages import Axis, Message, Operation, groups
from abyssal.config import ModelConfig
from abyssal.config.parallel import ParallelConfig, stage_layers

_COUNT = 8
"""Bytes of an int64."""


def as_parallel(layout: Layout) -> ParallelConfig:
    """A plan's layout as a recipe has it."""
    return ParallelConfig(
        replicate=layout.replicate,
        shard=layout.shard,
        tensor=layout.tensor,
        expert=layout.expert,
        pipeline=layout.pipeline,
    )


def busiest(inventory: Inventory, parallel: ParallelConfig, setup: TrainingSetup) -> list[Message]:
    """:func:`communication` of the process that sends the most, of all places in the pipeline."""
    places = [communication(inventory, parallel, setup, place=place) for place in range(parallel.pipeline)]
    return max(places, key=lambda messages: sum(message.sent for message in messages))


def communication(
    inventory: Inventory,
    parallel: ParallelConfig,
    setup: TrainingSetup,
    *,
    place: int = 0,
    token_loss: bool = False,
    sequence_loss: bool = False,
) -> list[Message]:
    """The messages of one training step in which a process takes part that is ``place``-th in the pipeline.

    ``setup.micro_batch`` sequences are a data-parallel rank's; the losses are the balancers that are on. Everything is
    trained: adapters are not for several processes.
    """
    return _Step(inventory, parallel, setup, place).messages(token_loss, sequence_loss)


@dataclass
class _Step:
    inventory: Inventory
    parallel: ParallelConfig
    setup: TrainingSetup
    place: int
    found: list[Message] = field(default_factory=list)

    def messages(self, token_loss: bool, sequence_loss: bool) -> list[Message]:
        p, setup, stages = self.parallel, self.setup, self.parallel.stages_of(self.place)
        self.width = 2 if setup.dtype == "bfloat16" else 4
        self.passes = 2 if setup.recompute else 1  # forward passes of what is recomputed
        self.whole = setup.micro_batch * setup.sequence  # tokens of the sequences that are worked on
        self.tokens = self.whole // p.context
        self.groups = groups(p)
        layers = [layer for stage in stages for layer in stage_layers(self.config, p.stages, stage)]
        for stage in stages:
            self._sharding(stage)
        for layer in layers:
            moe = self.config.is_moe_layer(layer)
            self._attention()
            self._feed_forward(moe)
            if moe:
                self._experts()
                self._balancing(token_loss, sequence_loss)
        self._ends(stages[0] == 0, p.stages - 1 in stages)
        if p.sequence:
            self._whole_weights(stages)
        self._pipeline(stages)
        self._figures(any(map(self.config.is_moe_layer, layers)))
        return self.found

    @property
    def config(self) -> ModelConfig:
        return self.inventory.config

    @property
    def targets(self) -> int:
        """Main model and MTP modules."""
        return 1 + self.config.mtp.num_nextn_predict_layers

    def _add(self, axis: Axis, what: str, operation: Operation, nbytes: int, times: int, group: str = "") -> None:
        members = self.groups[group or axis]
        if members.processes > 1 and nbytes and times:
            self.found.append(Message(axis, what, operation, nbytes, times, members))

    def _sharding(self, stage: int) -> None:
        p, micro = self.parallel, self.setup.accumulate
        piped = p.pipeline > 1
        kept = 1 if piped else micro
        again = (micro + 1 if piped else 2 * micro) if p.gathers_again else kept
        for unit, weights in self._units(stage).items():
            experts = unit.endswith("experts")
            group, replicas = ("expert shard", "expert replicate") if experts else ("shard", "replicate")
            many = self.groups[group].processes
            numbers = sum(_padded(local_shape(weight, p), many) for weight in weights)
            halved = self.width == 2 and not unit.endswith(("norms", "root"))
            what = "experts' weights" if experts else "weights"
            gathers = kept if unit in ("root", "head") else again
            self._add("shard", what, "all_gather", numbers * (2 if halved else 4), gathers, group)
            self._add("shard", "gradients", "reduce_scatter", 4 * numbers, kept, group)
            self._add("replicate", "gradients", "all_reduce", 4 * numbers // many, kept, replicas)

    def _units(self, stage: int) -> dict[str, list[Weight]]:
        """What FSDP gathers as one (:func:`abyssal.distributed.sharding.shard`)."""
        config, p, half = self.config, self.parallel, self.width == 2
        layers, last = stage_layers(config, p.stages, stage), stage == p.stages - 1
        copy = last and (config.tie_word_embeddings or config.mtp.num_nextn_predict_layers > 0)
        out: dict[str, list[Weight]] = {}
        for weight in self.inventory.weights:
            name, unit = weight.name, "root"
            if not weight.trained:
                continue
            if weight.layer is not None:
                if weight.layer not in layers:
                    continue
                unit = f"{weight.layer}"
                if spread(weight, p):
                    unit += " experts"
                elif half and (name.endswith("norm.weight") or ".mlp.gate." in name):
                    unit += " norms"
            elif "embed_tokens" in name:
                if stage > 0 and not copy:
                    continue
            elif not last:
                continue
            elif "lm_head" in name and half:
                unit = "head"
            out.setdefault(unit, []).append(weight)
        return out

    def _attention(self) -> None:
        a, micro = self.config.attention, self.setup.accumulate
        latents, goes_in = 0, [(self.tokens, self.config.hidden_size)]
        told = []  # by context parallelism
        if a.kind == "mla":
            latents = a.kv_lora_rank
            goes_in = [(self.tokens, a.q_lora_rank or self.config.hidden_size)]
            if self.parallel.sequence:
                goes_in += [(self.tokens, latents + a.qk_rope_head_dim)]
            else:
                goes_in += [(self.whole, latents), (self.tokens, a.qk_rope_head_dim)]
            told = [latents + a.qk_rope_head_dim]
        elif a.kind == "mha":
            told = [a.num_key_value_heads // self.parallel.tensor * a.head_dim] * 2
        for tokens, numbers in goes_in:
            self._arrive("attention", tokens * numbers)
        self._leave("attention")
        for numbers in told:
            nbytes = self.whole * numbers * self.width
            self._add("context", "latents", "all_gather", nbytes, micro * self.passes)
            self._add("context", "latents, backward", "reduce_scatter", nbytes, micro)

    def _feed_forward(self, moe: bool) -> None:
        self._arrive("feed-forward", self.tokens * self.config.hidden_size)
        self._leave("feed-forward")
        if moe and self.config.moe is not None:
            chosen = self.tokens * self.config.moe.num_experts_per_tok
            self._add("tensor", "routing weights, backward", "all_reduce", 4 * chosen, self.setup.accumulate)

    def _arrive(self, part: str, numbers: int) -> None:
        """Into matrices that are divided."""
        micro, nbytes = self.setup.accumulate, numbers * self.width
        if self.parallel.sequence:
            self._add("tensor", part, "all_gather", nbytes, micro * self.passes)
        self._add("tensor", f"{part}, backward", self._summing, nbytes, micro)

    def _leave(self, part: str, times: int = 1, width: int | None = None) -> None:
        """Out of matrices that are divided: summands, [N, D]."""
        micro = self.setup.accumulate * times
        nbytes = self.tokens * self.config.hidden_size * (width or self.width)
        self._add("tensor", part, self._summing, nbytes, micro)
        if self.parallel.sequence:
            self._add("tensor", f"{part}, backward", "all_gather", nbytes, micro)

    @property
    def _summing(self) -> Operation:
        return "reduce_scatter" if self.parallel.sequence else "all_reduce"

    def _experts(self) -> None:
        moe, micro = self.config.moe, self.setup.accumulate
        assert moe is not None
        rows = self.tokens * moe.segments * moe.num_experts_per_tok
        nbytes = rows * (self.config.hidden_size // moe.segments) * self.width
        self._add("expert", "counts", "all_to_all", _COUNT * moe.n_routed_experts, micro * self.passes)
        self._add("expert", "rows", "all_to_all", nbytes, 2 * micro * self.passes)
        self._add("expert", "rows, backward", "all_to_all", nbytes, 2 * micro)
        self._add("expert", "routing weights", "all_to_all", 4 * rows, micro * (self.passes + 1))

    def _balancing(self, token_loss: bool, sequence_loss: bool) -> None:
        moe, micro, sequences = self.config.moe, self.setup.accumulate, self.setup.micro_batch
        assert moe is not None
        if token_loss:
            self._add("batch", "balancing loss", "all_reduce", 4, micro)
            self._add("batch", "balancing loss", "all_reduce", 4 * moe.n_routed_experts, micro)
        if sequence_loss:
            self._add("context", "balancing loss", "all_reduce", 4 * sequences, micro)
            self._add("context", "balancing loss", "all_reduce", 4 * sequences * moe.n_routed_experts, micro)

    def _ends(self, first: bool, last: bool) -> None:
        micro = self.setup.accumulate * self.targets
        self._leave("embedding", first + (self.targets - 1) * last, width=4)
        if not last:
            return
        states = self.tokens * self.config.hidden_size * self.width
        if self.parallel.sequence:
            self._add("tensor", "hidden states", "all_gather", states, micro)
            self._add("tensor", "hidden states, backward", "all_gather", states, micro - self.setup.accumulate)
        self._add("tensor", "head, backward", "all_reduce", states, micro)
        self._add("tensor", "loss", "all_reduce", 4 * self.tokens, micro)
        self._add("tensor", "loss", "all_reduce", 8 * self.tokens, micro)

    def _whole_weights(self, stages: list[int]) -> None:
        """Of which each process has seen its own positions."""
        numbers = 0
        for stage in stages:
            for weights in self._units(stage).values():
                for weight in weights:
                    if weight.split != "expert" and not divided(weight) and ".mlp.gate." not in weight.name:
                        numbers += _padded(list(weight.shape), self.parallel.sharers) // self.parallel.sharers
        self._add("tensor", "gradients", "all_reduce", 4 * numbers, 1)

    def _pipeline(self, stages: list[int]) -> None:
        p, config = self.parallel, self.config
        places = {stage: place for place in range(p.pipeline) for stage in p.stages_of(place)}
        away = [n for s in stages for n in (s - 1, s + 1) if places.get(n, self.place) != self.place]
        states = 4 * self.tokens * config.hidden_size // (p.tensor if p.sequence else 1)
        self._add("pipeline", "residual stream", "send", states, self.setup.accumulate * len(away))
        shared = config.tie_word_embeddings or self.targets > 1
        if shared and places[0] != places[p.stages - 1] and self.place in (places[0], places[p.stages - 1]):
            rows = math.ceil(config.vocab_size // p.tensor / p.sharers)
            self._add("pipeline", "embedding", "send", 4 * rows * config.hidden_size, 1)

    def _figures(self, moe: bool) -> None:
        config = self.config
        layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers + self.targets - 1)))
        self._add("batch", "counts", "all_reduce", _COUNT * self.targets, 1)
        everyone_s: tuple[Axis, ...] = ("batch", "pipeline")
        for axis in everyone_s:
            self._add(axis, "losses", "all_reduce", 4 * (self.targets + 1), 1)
            if config.moe is not None:
                self._add(axis, "loads", "all_reduce", _COUNT * layers * config.moe.n_routed_experts, 1)
        # Numbers that are divided alike are added up together: those of norms, of matrices, of experts.
        tensor, experts = self.parallel.tensor > 1, moe and (self.parallel.tensor > 1 or self.parallel.expert > 1)
        self._add("batch", "norm", "all_reduce", 4, 1 + tensor, "shard")
        self._add("batch", "norm", "all_reduce", 4, experts, "expert shard")
        self._add("batch", "norm", "all_reduce", 4, experts, "expert")
        self._add("batch", "norm", "all_reduce", 4, tensor + experts, "tensor")
        self._add("pipeline", "norm", "all_reduce", 4, 1)


def spread(weight: Weight, parallel: ParallelConfig) -> bool:
    """Whether ``weight`` is one of routed experts that are divided for themselves."""
    return weight.split == "expert" and (parallel.expert > 1 or parallel.tensor > 1)


def divided(weight: Weight) -> bool:
    """Whether tensor parallelism divides ``weight``, which is of no expert."""
    return weight.split == "tensor" or weight.name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))


def local_shape(weight: Weight, parallel: ParallelConfig) -> list[int]:
    """The shape of what tensor and expert parallelism leave of ``weight`` on a process; FSDP divides that."""
    shape, t = list(weight.shape), parallel.tensor
    if weight.split == "expert":
        shape[0] //= parallel.expert
        shape[1 if "gate_up_proj" in weight.name else 2] //= t
    elif divided(weight):
        shape[weight.name.endswith(("o_proj.weight", "down_proj.weight"))] //= t
    return shape


def _padded(shape: list[int], many: int) -> int:
    """Numbers of a tensor whose first dimension is divided among ``many``."""
    return math.ceil(shape[0] / many) * many * math.prod(shape[1:])
