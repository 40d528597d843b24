"""A plan from a config alone: the parallel layout that a training run would take, its time and cost.

Of all layouts that are possible and fit, the one is taken that costs the fewest GPU seconds a token by this estimate:

- products at the card's peak and the stated MFU; with recomputation, the forward pass's once more;
- tensor parallelism sends what two reductions forward and two backward take, expert parallelism a token's hidden vector
  to its experts and back, forward and backward, once to each node that has some of them (group-limited routing bounds
  how many); products wait for both;
- gathering weights and scattering gradients (ZeRO-3), and adding gradients up over replicas, run beside products and
  cost what they take longer than these;
- a pipeline of p stages and m micro-batches stands still for (p − 1)/m of the time.

A node has 8 GPUs; to another one, each sends 50 GB/s (a 400 Gb/s card). Tensor parallelism stays inside a node and is
taken where nothing fits without it: it cuts products that are narrow already. Between layouts that are equal within 1%
the simpler one is taken: less pipeline and expert parallelism, less sharding, and larger micro-batches, up to 16,384
tokens.

The estimate ranks layouts and does nothing else. Time is tokens · FLOPs a token / (GPUs · peak · MFU); the FLOPs are
the model's own (:mod:`abyssal.analysis.flops`), so whatever recomputation, communication and idle stages cost has to be
in the MFU that is stated. With LoRA the backward pass of a frozen matrix has one product, for its input's gradient: two
forward passes in all. Attention's two products have no weights and keep theirs, and the adapters train in full: three
forward passes of each. So do, with ESFT, the experts that are trained, at even loads. MTP modules do not run in either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from abyssal.analysis.activations import Adapters
from abyssal.analysis.advice import what_would_fit
from abyssal.analysis.flops import count_flops
from abyssal.analysis.inventory import Inventory
from abyssal.analysis.layouts import NETWORK, NODE, Wishes, check, layouts
from abyssal.analysis.memory import Layout, Memory, TrainingMemory, TrainingSetup, adapter_parameters
from abyssal.analysis.units import size
from abyssal.config import ModelConfig
from abyssal.errors import UserError

ASSUMED_FLOPS = 312e12
"""Of a GPU that nothing is known of: an A100's."""
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_ENOUGH_TOKENS = 16384


@dataclass(frozen=True)
class TrainingPlan:
    """A layout that fits, and the reasons for it."""

    layout: Layout
    setup: TrainingSetup
    memory: Memory
    why: list[str]
    overhead: float
    """By estimate: GPU seconds over those of the products alone, less 1."""

    @property
    def global_batch(self) -> int:
        """Sequences an optimizer step."""
        return self.setup.micro_batch * self.setup.accumulate * self.layout.data


def training_flops(inventory: Inventory, sequence: int, adapters: Adapters | None = None) -> int:
    """FLOPs a token of training, at ``sequence`` tokens a sequence; with ``adapters`` everything else is frozen."""
    config = inventory.config
    counts = count_flops(config, sequence)
    if adapters is None:
        return counts.training
    scores = counts.by_part.get("attention scores and values", 0)
    active = 0
    for weight in inventory.weights:
        count = adapter_parameters(weight, adapters)
        if adapters.share and weight.adaptable == "experts" and not weight.mtp:
            count = weight.numel
        if count and weight.adaptable == "experts":
            assert config.moe is not None
            count = count // config.moe.n_routed_experts * config.moe.num_experts_per_tok * config.moe.segments
        active += count
    # A trained expert's other two products are those of the model.
    return 2 * counts.forward + scores + (round(2 * adapters.share * active) if adapters.share else 6 * active)


def gpu_seconds(tokens: float, flops: float, card_flops: float, mfu: float) -> float:
    """Seconds of one GPU for ``tokens`` of ``flops`` each."""
    return tokens * flops / (card_flops * mfu)


class Planner:
    """Plans for one model under one set of wishes. Raises UserError for wishes that contradict each other."""

    def __init__(self, config: ModelConfig, wishes: Wishes, inventory: Inventory | None = None) -> None:
        check(config, wishes)
        self.config, self.wishes = config, wishes
        self.inventory = inventory or Inventory(config)
        self.sequence = wishes.sequence or min(4096, config.max_position_embeddings)
        self.flops = training_flops(self.inventory, self.sequence, wishes.adapters)
        counts = count_flops(config, self.sequence)
        self._forward = counts.forward + (counts.mtp if wishes.adapters is None else 0)
        self._depth = config.num_hidden_layers + config.mtp.num_nextn_predict_layers
        self._moe_layers = sum(config.is_moe_layer(layer) for layer in range(self._depth))
        self._states: dict[TrainingSetup, TrainingMemory] = {}
        self._memories: dict[tuple[Layout, TrainingSetup], Memory] = {}
        self._besides: dict[tuple[Layout, int], float] = {}

    def training(self) -> TrainingPlan:
        """The layout to train with. Raises UserError where nothing fits: what is too large, and what would fit."""
        possible = self.layouts()
        candidates = [
            (self.cost(layout, setup), layout, setup)
            for layout in possible
            if self._fits(layout)
            for setup in self.setups(layout)
        ]
        if not candidates:
            least = min((self.memory(*pair) for layout in possible for pair in self._smallest(layout)), key=_total)
            raise UserError(f"does not fit: {describe(least, self.wishes.usable)}; {what_would_fit(self)}")
        cheapest = min(cost for cost, _, _ in candidates)
        # Equal within 1%: by the number of doublings of that over the cheapest.
        candidates.sort(key=lambda c: (c[1].tensor, round(math.log(c[0] / cheapest) * 100), *_plainness(c[1], c[2])))
        fitting = (c for c in candidates if self.memory(c[1], c[2]).total <= self.wishes.usable)
        cost, layout, setup = next(fitting)
        overhead = cost / (self.flops / self.speed) - 1
        return TrainingPlan(layout, setup, self.memory(layout, setup), self._why(layout, setup), overhead)

    def under(self, change: dict[str, Any]) -> Planner:
        """The planner of the same wishes but for ``change``. Raises UserError as a new one does."""
        return Planner(self.config, replace(self.wishes, **change), self.inventory)

    def fits(self) -> bool:
        """Whether there is a plan."""
        found, few = self.layouts(), []
        one = replace(next(self.setups(found[0])), accumulate=1)
        if sum(self._state(one).state(Layout()).values()) > self.wishes.usable * self.wishes.gpus:
            return False  # however it is divided
        # With all else equal what is sharded further takes less, but for what gathering adds to what is not sharded.
        by_rest: dict[tuple[int, int, int], list[int]] = {}
        for layout in found:
            by_rest.setdefault((layout.tensor, layout.expert, layout.pipeline), []).append(layout.shard)
        for layout in found:
            shards = by_rest[layout.tensor, layout.expert, layout.pipeline]
            if layout.shard in (min(shards), max(shards), layout.expert):
                few.append(layout)
        return any(self._fits(layout) for layout in reversed(few))

    @property
    def peak(self) -> float:
        """FLOP/s of a GPU, assumed where they are not known."""
        return self.wishes.card.flops or ASSUMED_FLOPS

    @property
    def speed(self) -> float:
        """FLOP/s that a GPU's products come to."""
        return self.peak * self.wishes.mfu

    def setups(self, layout: Layout) -> Iterator[TrainingSetup]:
        """Micro-batches and recomputation to try under ``layout``."""
        wishes = self.wishes
        if wishes.micro_batch is not None:
            batches: tuple[int, ...] = (wishes.micro_batch,)
        else:
            batches = tuple(n for n in _MICRO_BATCHES if n == 1 or n * self.sequence <= _ENOUGH_TOKENS)
        for batch in batches:
            accumulate = 1 if layout.pipeline == 1 else 4 * layout.pipeline
            if wishes.global_batch is not None:
                accumulate, rest = divmod(wishes.global_batch, batch * layout.data)
                if rest or not accumulate:
                    continue
            for recompute in (False, True) if wishes.recompute is None else (wishes.recompute,):
                yield TrainingSetup(
                    micro_batch=batch,
                    sequence=self.sequence,
                    accumulate=accumulate,
                    dtype=wishes.dtype,
                    recompute=recompute,
                    optimizer=wishes.optimizer,
                    state=wishes.state,
                    adapters=wishes.adapters,
                    frozen=wishes.frozen,
                )

    def memory(self, layout: Layout, setup: TrainingSetup) -> Memory:
        """A GPU's memory."""
        if (layout, setup) not in self._memories:
            self._memories[layout, setup] = self._state(setup).of(layout)
        return self._memories[layout, setup]

    def cost(self, layout: Layout, setup: TrainingSetup) -> float:
        """GPU seconds a token, by the estimate that the module's docstring describes."""
        config, card = self.config, self.wishes.card
        tokens, micro = setup.micro_batch * setup.sequence, setup.accumulate
        width = 2 if setup.dtype == "bfloat16" else 4
        share, vector = 1 / (layout.tensor * layout.pipeline), config.hidden_size * width
        products = tokens * (self.flops + self._forward * setup.recompute) * share / self.speed
        local = max(min(layout.expert, NODE // layout.tensor), 1)
        beside = self._beside(layout, setup, local)
        waits = 4 * self._depth * 2 * (layout.tensor - 1) / layout.tensor * vector / card.link
        if config.moe is not None and layout.expert > 1:
            nodes = layout.expert // local
            chosen = config.moe.num_experts_per_tok
            reached = min(chosen, nodes)
            if config.moe.topk_method != "greedy" and config.moe.n_group > 1:
                reached = min(reached, config.moe.topk_group)
            inside = chosen * (local - 1) / local / card.link
            waits += 4 * self._moe_layers * vector * (inside + reached * (nodes - 1) / nodes / NETWORK)
        waits = tokens * waits / layout.pipeline
        if layout.pipeline > 1:
            waits += 2 * tokens * vector / NETWORK
        seconds = (max(products, beside) + waits) * (micro + layout.pipeline - 1) / micro
        return seconds / (tokens * share)

    def _beside(self, layout: Layout, setup: TrainingSetup, local: int) -> float:
        """Seconds a micro-batch of what is sent beside products; ``local`` expert ranks are in a node."""
        if (layout, setup.accumulate) in self._besides:
            return self._besides[layout, setup.accumulate]
        card, state, beside = self.wishes.card, self._state(setup), 0.0
        for split, nbytes in state.gathered_bytes(layout).items():
            # Between nodes, the GPUs of a node that gather the same weights fetch a part each.
            different = {"expert": layout.tensor * local, "tensor": layout.tensor, "none": 1}[split]
            in_node = layout.shard * layout.tensor <= NODE
            rate = card.link if in_node else min(card.link, NODE / different * NETWORK)
            beside += nbytes * (2 if setup.adapters else 3) / rate
        if layout.replicate > 1:
            gradients = state.state(layout).get("gradients", 0)
            beside += 2 * gradients / (card.link if layout.gpus <= NODE else NETWORK) / setup.accumulate
        self._besides[layout, setup.accumulate] = beside
        return beside

    def layouts(self) -> list[Layout]:
        """All that are possible, memory aside. Raises UserError where there are none."""
        found = list(layouts(self.config, self.wishes))
        usable = [layout for layout in found if any(True for _ in self.setups(layout))]
        wishes = self.wishes
        if not found:
            said = " ".join(f"--{axis} {number}" for axis, number in wishes.layout.items())
            raise UserError(f"{said}: no layout of {wishes.gpus} GPUs has them; expert must divide replicate × shard")
        if not usable:
            ranks = sorted({layout.data for layout in found})
            raise UserError(
                f"--global-batch: {wishes.global_batch} sequences are no multiple of micro-batch "
                f"{wishes.micro_batch or 1} × {ranks[0]} data-parallel ranks"
            )
        return usable

    def _state(self, setup: TrainingSetup) -> TrainingMemory:
        if setup not in self._states:
            self._states[setup] = TrainingMemory(self.inventory, setup)
        return self._states[setup]

    def _smallest(self, layout: Layout) -> Iterator[tuple[Layout, TrainingSetup]]:
        """What takes the least under ``layout``: the smallest micro-batch, for each number of them; whether it is
        better recomputed has to be tried."""
        smallest: dict[tuple[int, bool], TrainingSetup] = {}
        for setup in self.setups(layout):
            smallest.setdefault((setup.accumulate, setup.recompute), setup)
        for setup in sorted(smallest.values(), key=lambda setup: not setup.recompute):
            yield layout, setup

    def _fits(self, layout: Layout) -> bool:
        return any(self.memory(*pair).total <= self.wishes.usable for pair in self._smallest(layout))

    def _why(self, layout: Layout, setup: TrainingSetup) -> list[str]:
        usable, out, memory = self.wishes.usable, [], self.memory(layout, setup)
        alone = sum(self._state(setup).state(Layout()).values())
        what = "weights and adapters" if setup.adapters and setup.adapters.rank else "weights, gradients and optimizer"
        room = f"on one GPU ({size(alone)} of {size(usable)})"
        if layout.gpus == 1:
            out.append(f"{what} fit {room}")
        elif alone > usable:
            out += [f"{what} do not fit {room}", f"so the work is split: {_spread(layout)}"]
        else:
            out += [f"{what} would fit {room}", _spread(layout)]
        if setup.recompute:
            plain = self.memory(layout, replace(setup, recompute=False))
            held, kept = plain.by_term["activations"], memory.by_term["activations"]
            asked = ", as asked for" if plain.total <= usable else ""
            out.append(
                f"recompute{asked}: else activations take {size(held)}, not {size(kept)} ({size(plain.total)} in all)"
            )
        more = self.memory(layout, replace(setup, accumulate=2)).total if setup.accumulate == 1 else memory.total
        if more > memory.total:
            verdict = "" if more <= usable else ", too much"
            out.append(
                f"one micro-batch a step; with more of them +{size(more - memory.total)} "
                f"({size(more)}{verdict}): their gradients are summed in FP32"
            )
        return out


def _total(memory: Memory) -> int:
    return memory.total


def describe(memory: Memory, usable: float) -> str:
    """What of ``memory`` is too much."""
    term, nbytes = max(memory.by_term.items(), key=lambda item: item[1])
    return f"{size(memory.total)} a GPU at least, {size(usable)} for use; the largest term is {term}, {size(nbytes)}"


def _plainness(layout: Layout, setup: TrainingSetup) -> tuple[int, ...]:
    return (layout.pipeline, layout.expert, layout.shard, setup.recompute, -setup.micro_batch)


def _spread(layout: Layout) -> str:
    parts = []
    if layout.shard > 1:
        parts.append(f"sharded over {layout.shard:,}")
    if layout.expert > 1:
        parts.append(f"experts over {layout.expert:,}")
    if layout.tensor > 1:
        parts.append(f"heads and widths over {layout.tensor}")
    if layout.pipeline > 1:
        parts.append(f"layers over {layout.pipeline} stages")
    if layout.replicate > 1:
        parts.append(f"{layout.replicate:,} replicas, each with its own part of the batch")
    return ", ".join(parts)
