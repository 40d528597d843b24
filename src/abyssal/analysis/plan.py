"""A plan from a config alone: the parallel layout that a training run would take, its time and cost; what inference
takes.

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

Time is tokens · FLOPs a token / (GPUs · peak · MFU); the FLOPs are the model's own (:mod:`abyssal.analysis.flops`), so
whatever recomputation, communication and idle stages cost has to be in the MFU that is stated. With LoRA the gradients
of frozen weights are not worked out: two thirds of the FLOPs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from abyssal.analysis.activations import Adapters
from abyssal.analysis.cards import Card
from abyssal.analysis.flops import count_flops
from abyssal.analysis.memory import (
    Inventory,
    Layout,
    Memory,
    Precision,
    State,
    TrainingMemory,
    TrainingSetup,
    inference_memory,
)
from abyssal.config import ModelConfig
from abyssal.errors import UserError

NODE = 8
NETWORK = 50e9
_ASSUMED_FLOPS = 312e12
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_ENOUGH_TOKENS = 16384
_MOST_GPUS = 2**20

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_BYTES = {"b": 1, **{u: 1000**i for i, u in enumerate(("kb", "mb", "gb", "tb"), 1)}}
_BYTES |= {u: 1024**i for i, u in enumerate(("kib", "mib", "gib", "tib"), 1)}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_bytes(text: str, field: str) -> float:
    """``80GB`` (10^9), ``80GiB`` (2^30), ``40960MB``. Raises UserError naming ``field``."""
    return _parse(text, field, _BYTES, "a size such as 80GB, 80GiB or 40960MB")


def parse_count(text: str, field: str) -> float:
    """``1T``, ``14.8T``, ``300M``, ``2e12``. Raises UserError naming ``field``."""
    return _parse(text, field, _COUNTS, "a number such as 300M, 14.8T or 2e12")


def _parse(text: str, field: str, units: dict[str, int], wanted: str) -> float:
    match = _SIZE.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in units:
        raise UserError(f"{field}: {text!r} is not {wanted}")
    number = float(match[1]) * units[unit]
    if not 0 < number < 1e24:
        raise UserError(f"{field}: {text!r} is {'not above 0' if number <= 0 else 'more than anything here'}")
    return number


@dataclass(frozen=True)
class Wishes:
    """What the user has said; None: the plan chooses. Fields are called as the options are."""

    gpus: int
    card: Card
    reserve: float = 0.05
    mfu: float = 0.4
    sequence: int | None = None
    replicate: int | None = None
    shard: int | None = None
    tensor: int | None = None
    expert: int | None = None
    pipeline: int | None = None
    micro_batch: int | None = None
    global_batch: int | None = None
    recompute: bool | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    state: State = "float32"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    adapters: Adapters | None = None
    nf4: bool = False

    @property
    def usable(self) -> float:
        """Bytes of a GPU that may be planned with."""
        return self.card.memory * (1 - self.reserve)


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


@dataclass(frozen=True)
class InferencePlan:
    """The smallest group of GPUs that serves a batch, and how many sequences fit on it by context."""

    tensor: int
    expert: int
    memory: Memory
    fits: dict[int, int]

    @property
    def gpus(self) -> int:
        return self.tensor * self.expert


def training_flops(config: ModelConfig, sequence: int, adapters: Adapters | None = None) -> float:
    """FLOPs a token of training, at ``sequence`` tokens a sequence."""
    return count_flops(config, sequence).training * (2 / 3 if adapters else 1)


def gpu_seconds(tokens: float, flops: float, card_flops: float, mfu: float) -> float:
    """Seconds of one GPU for ``tokens`` of ``flops`` each."""
    return tokens * flops / (card_flops * mfu)


def check(config: ModelConfig, wishes: Wishes) -> None:
    """Raises UserError for wishes that no layout can meet, whatever the memory."""
    numbers = ("gpus", "replicate", "shard", "tensor", "expert", "pipeline", "micro_batch", "global_batch", "sequence")
    for name in numbers:
        number = getattr(wishes, name)
        if number is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')}: {number} is not at least 1")
    if wishes.gpus > _MOST_GPUS:
        raise UserError(f"--gpus: {wishes.gpus} is more than {_MOST_GPUS:,}")
    if not 0 < wishes.mfu <= 1:
        raise UserError(f"--mfu: {wishes.mfu:g} is not above 0 and at most 1; 0.4 means 40% of the peak")
    if not 0 <= wishes.reserve < 1:
        raise UserError(f"--reserve: {wishes.reserve:g} is not at least 0 and below 1; 0.05 keeps 5% free")
    if wishes.sequence is not None and wishes.sequence > config.max_position_embeddings:
        raise UserError(
            f"--sequence: {wishes.sequence} is more than the model's max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    if wishes.expert is not None:
        check_expert(config, wishes.expert)
    if wishes.tensor is not None:
        reason = _tensor_fault(config, wishes.tensor)
        if reason:
            raise UserError(f"--tensor: {wishes.tensor} {reason}")
    if wishes.pipeline is not None and wishes.pipeline > config.num_hidden_layers:
        raise UserError(
            f"--pipeline: {wishes.pipeline} stages are more than the model's {config.num_hidden_layers} layers"
        )
    named = [(name, getattr(wishes, name)) for name in ("replicate", "shard", "tensor", "pipeline")]
    given = [(name, number) for name, number in named if number is not None]
    product = math.prod(number for _, number in given)
    arithmetic = " × ".join(f"--{name} {number}" for name, number in given)
    if wishes.gpus % product:
        raise UserError(f"{arithmetic} = {product} does not divide --gpus {wishes.gpus}")
    if len(given) == len(named) and product != wishes.gpus:
        raise UserError(f"{arithmetic} = {product} is not --gpus {wishes.gpus}")
    rank = wishes.adapters.rank if wishes.adapters else 1
    if not 1 <= rank <= config.hidden_size:
        raise UserError(
            f"{'--qlora' if wishes.nf4 else '--lora'}: rank {rank} is not between 1 and {config.hidden_size}"
        )


def check_expert(config: ModelConfig, expert: int) -> None:
    """Raises UserError where experts can't be spread over ``expert`` ranks."""
    if config.moe is None:
        raise UserError(f"--expert: {expert}, but this model has no experts")
    if config.moe.n_routed_experts % expert:
        raise UserError(
            f"--expert: {expert} does not divide the model's n_routed_experts {config.moe.n_routed_experts}"
        )


def _tensor_fault(config: ModelConfig, tensor: int) -> str | None:
    a, moe = config.attention, config.moe
    sizes = {"num_attention_heads": a.num_attention_heads}
    if a.kind == "mha":
        sizes["num_key_value_heads"] = a.num_key_value_heads
    sizes["vocab_size"] = config.vocab_size
    dense = [i for i in range(config.num_hidden_layers) if not config.is_moe_layer(i)]
    if dense:
        sizes["intermediate_size"] = config.intermediate_size
    if moe is not None:
        sizes["moe_intermediate_size"] = moe.moe_intermediate_size
    if tensor > NODE:
        return f"is more than the {NODE} GPUs of a node"
    return next((f"does not divide the model's {n} {size}" for n, size in sizes.items() if size % tensor), None)


def layouts(config: ModelConfig, wishes: Wishes) -> Iterator[Layout]:
    """Every layout that is possible, memory aside."""
    moe = config.moe
    for tensor in _choices(wishes.tensor, wishes.gpus, NODE):
        if _tensor_fault(config, tensor):
            continue
        for pipeline in _choices(wishes.pipeline, wishes.gpus // tensor, config.num_hidden_layers, powers=True):
            data = wishes.gpus // (tensor * pipeline)
            if data * tensor * pipeline != wishes.gpus:
                continue
            if wishes.replicate is not None:
                shards = [data // wishes.replicate] if data % wishes.replicate == 0 else []
            else:
                shards = _choices(wishes.shard, data, data)
            experts = _choices(wishes.expert, data, moe.n_routed_experts if moe else 1)
            for shard in shards:
                if data % shard or (wishes.shard is not None and shard != wishes.shard):
                    continue
                for expert in experts:
                    # What both divide: experts over the ranks of one, each share over what is left of the other.
                    whole = max(shard, expert) % min(shard, expert) == 0
                    if (moe is None or moe.n_routed_experts % expert == 0) and data % expert == 0 and whole:
                        yield Layout(data // shard, shard, tensor, expert, pipeline)


def _choices(wanted: int | None, number: int, most: int, powers: bool = False) -> list[int]:
    if wanted is not None:
        return [wanted] if number % wanted == 0 else []
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({d for low in small for d in (low, number // low) if d <= most})
    many = powers or len(divisors) > 16
    return [d for d in divisors if not many or d & (d - 1) == 0 or d == number]


class Planner:
    """Plans for one model under one set of wishes. Raises UserError for wishes that contradict each other."""

    def __init__(self, config: ModelConfig, wishes: Wishes, inventory: Inventory | None = None) -> None:
        check(config, wishes)
        self.config, self.wishes = config, wishes
        self.inventory = inventory or Inventory(config)
        self.sequence = wishes.sequence or min(4096, config.max_position_embeddings)
        self.flops = training_flops(config, self.sequence, wishes.adapters)
        self._memories: dict[TrainingSetup, TrainingMemory] = {}

    def training(self) -> TrainingPlan:
        """The layout to train with. Raises UserError where nothing fits: what is too large, and what would fit."""
        candidates = []
        for layout in self._layouts():
            if self._least(layout).total > self.wishes.usable:
                continue
            candidates += [(self.cost(layout, setup), layout, setup) for setup in self.setups(layout)]
        if not candidates:
            raise UserError(self._why_nothing_fits())
        cheapest = min(cost for cost, _, _ in candidates)
        # Equal within 1%: by the number of doublings of that over the cheapest.
        ordered = sorted(
            candidates,
            key=lambda c: (c[1].tensor, round(math.log(c[0] / cheapest) * 100), *_plainness(c[1], c[2])),
        )
        for cost, layout, setup in ordered:
            memory = self.memory(layout, setup)
            if memory.total <= self.wishes.usable:
                overhead = cost / (self.flops / self.speed) - 1
                return TrainingPlan(layout, setup, memory, self._why(layout, setup, memory), overhead)
        raise UserError(self._why_nothing_fits())

    @property
    def speed(self) -> float:
        """FLOP/s that a GPU's products come to."""
        return (self.wishes.card.flops or _ASSUMED_FLOPS) * self.wishes.mfu

    def setups(self, layout: Layout) -> Iterator[TrainingSetup]:
        """Micro-batches and recomputation to try under ``layout``."""
        wishes = self.wishes
        if wishes.micro_batch is not None:
            sizes: tuple[int, ...] = (wishes.micro_batch,)
        else:
            sizes = tuple(n for n in _MICRO_BATCHES if n == 1 or n * self.sequence <= _ENOUGH_TOKENS)
        for size in sizes:
            accumulate = 1 if layout.pipeline == 1 else 4 * layout.pipeline
            if wishes.global_batch is not None:
                accumulate, rest = divmod(wishes.global_batch, size * layout.data)
                if rest or not accumulate:
                    continue
            for recompute in (False, True) if wishes.recompute is None else (wishes.recompute,):
                yield TrainingSetup(
                    micro_batch=size,
                    sequence=self.sequence,
                    accumulate=accumulate,
                    dtype=wishes.dtype,
                    recompute=recompute,
                    optimizer=wishes.optimizer,
                    state=wishes.state,
                    adapters=wishes.adapters,
                    nf4=wishes.nf4,
                )

    def memory(self, layout: Layout, setup: TrainingSetup) -> Memory:
        """A GPU's memory."""
        return self._memory(setup).of(layout)

    def cost(self, layout: Layout, setup: TrainingSetup) -> float:
        """GPU seconds a token, by the estimate that the module's docstring describes."""
        config, card = self.config, self.wishes.card
        tokens, micro = setup.micro_batch * setup.sequence, setup.accumulate
        width = 2 if setup.dtype == "bfloat16" else 4
        share, vector = 1 / (layout.tensor * layout.pipeline), config.hidden_size * width
        again = 0.5 if setup.adapters else 1 / 3
        products = tokens * self.flops * share / self.speed * (1 + again * setup.recompute)
        state = self._memory(setup)
        local = max(min(layout.expert, NODE // layout.tensor), 1)
        beside = 0.0
        for split, nbytes in state.gathered_bytes(layout).items():
            # Between nodes, the GPUs of a node that gather the same weights fetch a part each.
            different = {"expert": layout.tensor * local, "tensor": layout.tensor, "none": 1}[split]
            in_node = layout.shard * layout.tensor <= NODE
            rate = card.link if in_node else min(card.link, NODE / different * NETWORK)
            beside += nbytes * (2 if setup.adapters else 3) / rate
        if layout.replicate > 1:
            gradients = state.state(layout).get("gradients", 0)
            beside += 2 * gradients / (card.link if layout.gpus <= NODE else NETWORK) / micro
        layers = config.num_hidden_layers + config.mtp.num_nextn_predict_layers
        moe_layers = sum(config.is_moe_layer(layer) for layer in range(layers))
        waits = 4 * layers * 2 * (layout.tensor - 1) / layout.tensor * vector / card.link
        if config.moe is not None and layout.expert > 1:
            nodes = layout.expert // local
            chosen = config.moe.num_experts_per_tok
            reached = min(chosen, nodes)
            if config.moe.topk_method != "greedy" and config.moe.n_group > 1:
                reached = min(reached, config.moe.topk_group)
            inside = chosen * (local - 1) / local / card.link
            waits += 4 * moe_layers * vector * (inside + reached * (nodes - 1) / nodes / NETWORK)
        waits = tokens * waits / layout.pipeline
        if layout.pipeline > 1:
            waits += 2 * tokens * vector / NETWORK
        seconds = (max(products, beside) + waits) * (micro + layout.pipeline - 1) / micro
        return seconds / (tokens * share)

    def _layouts(self) -> list[Layout]:
        found = list(layouts(self.config, self.wishes))
        usable = [layout for layout in found if any(True for _ in self.setups(layout))]
        wishes = self.wishes
        if not found:
            wanted = {name: getattr(wishes, name) for name in ("replicate", "shard", "tensor", "expert", "pipeline")}
            said = " ".join(f"--{name} {number}" for name, number in wanted.items() if number is not None)
            raise UserError(f"{said}: no layout of {wishes.gpus} GPUs has them; expert must divide replicate × shard")
        if not usable:
            ranks = sorted({layout.data for layout in found})
            raise UserError(
                f"--global-batch: {wishes.global_batch} sequences are no multiple of micro-batch "
                f"{wishes.micro_batch or 1} × {ranks[0]} data-parallel ranks"
            )
        return usable

    def _memory(self, setup: TrainingSetup) -> TrainingMemory:
        if setup not in self._memories:
            self._memories[setup] = TrainingMemory(self.inventory, setup)
        return self._memories[setup]

    def _least(self, layout: Layout) -> Memory:
        """The least that ``layout`` can take."""
        options = list(self.setups(layout))
        smallest = min(options, key=lambda setup: (setup.micro_batch, not setup.recompute))
        return self.memory(layout, smallest)

    def _why(self, layout: Layout, setup: TrainingSetup, memory: Memory) -> list[str]:
        usable, out = self.wishes.usable, []
        alone = sum(self._memory(setup).state(Layout()).values())
        what = "weights and adapters" if setup.adapters else "weights, gradients and optimizer"
        if layout.gpus > 1:
            verb = "would fit on one GPU" if alone <= usable else "do not fit on one GPU"
            spread = _spread(layout)
            out.append(f"{what} {verb} ({_gb(alone)} of {_gb(usable)} GB)")
            out.append(f"so they are {spread}" if alone > usable else spread)
        else:
            out.append(f"{what} fit on one GPU ({_gb(alone)} of {_gb(usable)} GB)")
        if setup.recompute:
            plain = self.memory(layout, replace(setup, recompute=False))
            held, kept = plain.by_term["activations"], memory.by_term["activations"]
            asked = ", as asked for" if plain.total <= usable else ""
            out.append(
                f"recompute{asked}: else activations take {_gb(held)} GB, not {_gb(kept)} ({_gb(plain.total)} in all)"
            )
        return out

    def _why_nothing_fits(self) -> str:
        memory = min((self._least(layout) for layout in self._layouts()), key=lambda m: m.total)
        term, nbytes = max(memory.by_term.items(), key=lambda item: item[1])
        return (
            f"does not fit: {_gb(memory.total)} GB a GPU at least, {_gb(self.wishes.usable)} GB for use; the largest "
            f"term is {term}, {_gb(nbytes)} GB; {self._what_would_fit()}"
        )

    def _what_would_fit(self) -> str:
        wishes, would = self.wishes, []
        free = replace(wishes, replicate=None, shard=None, tensor=None, expert=None, pipeline=None)
        if free != wishes and self._fits(free):
            would.append("another layout")
        if wishes.recompute is False and self._fits(replace(wishes, recompute=None)):
            would.append("--recompute")
        if (wishes.micro_batch or 1) > 1 and self._fits(replace(wishes, micro_batch=1)):
            would.append("--micro-batch 1")
        if wishes.state != "8bit" and self._fits(replace(wishes, state="8bit")):
            would.append("--state 8bit")
        if not wishes.nf4 and wishes.dtype == "bfloat16":
            rank = Adapters(16)
            if wishes.adapters is None and self._fits(replace(wishes, adapters=rank)):
                would.append("--lora 16")
            if self._fits(replace(wishes, adapters=wishes.adapters or rank, nf4=True)):
                would.append(f"--qlora {(wishes.adapters or rank).rank}")
        gpus = next((g for k in range(1, 9) if self._fits(replace(free, gpus=(g := wishes.gpus * 2**k)))), None)
        if gpus is not None:
            would.append(f"{gpus} GPUs")
        if not would:
            shorter = next(
                (s for k in range(1, 7) if self._fits(replace(free, sequence=(s := self.sequence >> k)))), None
            )
            would += [f"--sequence {shorter}"] if shorter else []
        return "would fit: " + ", or ".join(would) if would else "nothing that this plan knows would fit"

    def _fits(self, wishes: Wishes) -> bool:
        try:
            other = Planner(self.config, replace(wishes, global_batch=None), self.inventory)
            return any(other._least(layout).total <= wishes.usable for layout in other._layouts())
        except UserError:
            return False

    def inference(
        self,
        *,
        precision: Precision = "bf16",
        batch: int = 1,
        context: int | None = None,
        chunk: int = 2048,
        cache_width: int = 2,
    ) -> InferencePlan:
        """The smallest group of GPUs that serves ``batch`` sequences of ``context`` tokens. Raises UserError."""
        wishes, longest = self.wishes, self.config.max_position_embeddings
        for name, number in (("batch", batch), ("context", context), ("chunk", chunk)):
            if number is not None and number < 1:
                raise UserError(f"--{name}: {number} is not at least 1")
        if context is not None and context > longest:
            raise UserError(f"--context: {context} is more than the model's max_position_embeddings {longest}")
        context = context or min(4096, longest)

        def memory(tensor: int, expert: int, batch: int, context: int) -> Memory:
            return inference_memory(
                self.inventory,
                precision=precision,
                batch=batch,
                context=context,
                chunk=chunk,
                tensor=tensor,
                expert=expert,
                cache_width=cache_width,
            )

        def most(tensor: int, expert: int, context: int) -> int:
            """Sequences of ``context`` tokens that fit."""
            low, high = 0, 1
            while memory(tensor, expert, high, context).total <= wishes.usable and high < 2**24:
                low, high = high, 2 * high
            while high - low > 1:
                middle = (low + high) // 2
                fits = memory(tensor, expert, middle, context).total <= wishes.usable
                low, high = (middle, high) if fits else (low, middle)
            return low

        groups = [(t, e) for t, e in self._groups() if wishes.gpus % (t * e) == 0]
        if not groups:
            raise UserError(f"--tensor and --expert: no group of at most {wishes.gpus} GPUs has them")
        sized = sorted(
            groups, key=lambda group: (group[0] * group[1], memory(group[0], group[1], batch, context).total)
        )
        for tensor, expert in sized:
            held = memory(tensor, expert, batch, context)
            if held.total <= wishes.usable:
                contexts = sorted({c for c in (4096, 32768, longest, context) if c <= longest})
                return InferencePlan(tensor, expert, held, {c: most(tensor, expert, c) for c in contexts})
        best = min((memory(t, e, batch, context) for t, e in groups), key=lambda m: m.total)
        term, nbytes = max(best.by_term.items(), key=lambda item: item[1])
        raise UserError(
            f"inference does not fit: {_gb(best.total)} GB a GPU at least for {batch} × {context:,} tokens, "
            f"{_gb(wishes.usable)} GB for use; the largest term is {term}, {_gb(nbytes)} GB; more GPUs, "
            f"{'fewer bits (--weights)' if term == 'weights' else 'a smaller --batch or --context'} would help"
        )

    def _groups(self) -> Iterator[tuple[int, int]]:
        """(tensor, expert) of groups of GPUs that can serve together."""
        wishes, moe = self.wishes, self.config.moe
        for tensor in _choices(wishes.tensor, wishes.gpus, NODE):
            if _tensor_fault(self.config, tensor) is None:
                for expert in _choices(wishes.expert, wishes.gpus // tensor, moe.n_routed_experts if moe else 1):
                    if moe is None or moe.n_routed_experts % expert == 0:
                        yield tensor, expert


def _plainness(layout: Layout, setup: TrainingSetup) -> tuple[int, ...]:
    return (layout.pipeline, layout.expert, layout.shard, setup.recompute, -setup.micro_batch)


def _spread(layout: Layout) -> str:
    parts = []
    if layout.shard > 1:
        parts.append(f"sharded over {layout.shard}")
    if layout.expert > 1:
        parts.append(f"experts over {layout.expert}")
    if layout.tensor > 1:
        parts.append(f"heads and widths over {layout.tensor}")
    if layout.pipeline > 1:
        parts.append(f"layers in {layout.pipeline} stages")
    if layout.replicate > 1:
        parts.append(f"{layout.replicate} replicas")
    return ", ".join(parts)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f}" if nbytes >= 1e9 else f"{nbytes / 1e9:.3f}"
