"""What is wished for, and the parallel layouts that are possible under it, memory aside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from abyssal.analysis.activations import Adapters
from abyssal.analysis.cards import Card
from abyssal.analysis.memory import Frozen, Layout, State
from abyssal.config import ModelConfig
from abyssal.errors import UserError

NODE = 8
"""GPUs of a node."""
NETWORK = 50e9
"""Bytes a second that a GPU sends to other nodes: a 400 Gb/s card each."""
MOST_GPUS = 2**20
_AXES = ("replicate", "shard", "tensor", "expert", "pipeline")


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
    frozen: Frozen = "dense"

    @property
    def layout(self) -> dict[str, int]:
        """What is wished for of the layout."""
        return {axis: number for axis in _AXES if (number := getattr(self, axis)) is not None}

    @property
    def usable(self) -> float:
        """Bytes of a GPU that may be planned with."""
        return self.card.memory * (1 - self.reserve)


def check(config: ModelConfig, wishes: Wishes) -> None:
    """Raises UserError for wishes that no layout can meet, whatever the memory."""
    numbers = ("gpus", "replicate", "shard", "tensor", "expert", "pipeline", "micro_batch", "global_batch", "sequence")
    for name in numbers:
        number = getattr(wishes, name)
        if number is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')}: {number} is not at least 1")
    if wishes.gpus > MOST_GPUS:
        raise UserError(f"--gpus: {wishes.gpus} is more than {MOST_GPUS:,}")
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
        reason = tensor_fault(config, wishes.tensor)
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
    arithmetic += f" = {product}" if len(given) > 1 else ""
    if wishes.gpus % product:
        raise UserError(f"{arithmetic} does not divide --gpus {wishes.gpus}")
    if len(given) == len(named) and product != wishes.gpus:
        raise UserError(f"{arithmetic} is not --gpus {wishes.gpus}")
    if wishes.adapters is None:
        return
    rank, share = wishes.adapters.rank, wishes.adapters.share
    if share:
        if config.moe is None:
            raise UserError(f"--esft: {share:g}, but this model has no experts")
    elif not 1 <= rank <= config.hidden_size:
        option = "--qlora" if wishes.frozen == "nf4" else "--lora"
        raise UserError(f"{option}: rank {rank} is not between 1 and {config.hidden_size}")


def check_expert(config: ModelConfig, expert: int) -> None:
    """Raises UserError where experts can't be spread over ``expert`` ranks."""
    if config.moe is None:
        raise UserError(f"--expert: {expert}, but this model has no experts")
    if config.moe.n_routed_experts % expert:
        raise UserError(
            f"--expert: {expert} does not divide the model's n_routed_experts {config.moe.n_routed_experts}"
        )


def tensor_fault(config: ModelConfig, tensor: int) -> str | None:
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
    for tensor in choices(wishes.tensor, wishes.gpus, NODE):
        if tensor_fault(config, tensor):
            continue
        for pipeline in choices(wishes.pipeline, wishes.gpus // tensor, config.num_hidden_layers, powers=True):
            data = wishes.gpus // (tensor * pipeline)
            if data * tensor * pipeline != wishes.gpus:
                continue
            if wishes.replicate is not None:
                shards = [data // wishes.replicate] if data % wishes.replicate == 0 else []
            else:
                shards = choices(wishes.shard, data, data)
            experts = choices(wishes.expert, data, moe.n_routed_experts if moe else 1)
            for shard in shards:
                if data % shard or (wishes.shard is not None and shard != wishes.shard):
                    continue
                for expert in experts:
                    # What both divide: experts over the ranks of one, each share over what is left of the other.
                    whole = max(shard, expert) % min(shard, expert) == 0
                    if (moe is None or moe.n_routed_experts % expert == 0) and data % expert == 0 and whole:
                        yield Layout(data // shard, shard, tensor, expert, pipeline)


def choices(wanted: int | None, number: int, most: int, powers: bool = False) -> list[int]:
    if wanted is not None:
        return [wanted] if number % wanted == 0 else []
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({d for low in small for d in (low, number // low) if d <= most})
    many = powers or len(divisors) > 16
    return [d for d in divisors if not many or d & (d - 1) == 0 or d == number]
