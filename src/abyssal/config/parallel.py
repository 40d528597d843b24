"""How many processes share a run, and what each axis of the mesh divides: the ``parallel:`` block of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from abyssal.config.model_config import ModelConfig
from abyssal.config.parsing import Config
from abyssal.errors import UserError


class ParallelConfig(Config):
    """replicate × shard × context × tensor × pipeline processes work on one model.

    ``shard`` divides weights, gradients and optimizer (FSDP2), ``replicate`` are whole copies of what is so divided
    (HSDP); both divide the batch. ``context`` divides each sequence; its processes shard weights as ``shard`` does.
    ``tensor`` divides heads, widths and the vocabulary, ``pipeline`` the layers. ``expert`` divides the routed experts
    over the processes of replicate × shard × context: it is a part of those, not a factor of its own.

    ``gather``: ``again`` gives a block's weights back after its forward pass and gathers them once more for its
    backward pass (ZeRO-3), ``once`` keeps them in between (ZeRO-2). ``offload`` keeps weights, gradients and optimizer
    in the host's memory. ``schedule`` is the order of a pipeline's work.
    """

    replicate: PositiveInt = 1
    shard: PositiveInt = 1
    context: PositiveInt = 1
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    expert: PositiveInt = 1
    gather: Literal["again", "once"] = "again"
    offload: bool = False
    schedule: Literal["1f1b", "interleaved", "zero_bubble", "dualpipev"] = "1f1b"

    @property
    def data(self) -> int:
        """Processes that work on different sequences."""
        return self.replicate * self.shard

    @property
    def sharers(self) -> int:
        """Processes that weights are sharded over."""
        return self.shard * self.context

    @property
    def world(self) -> int:
        """All processes."""
        return self.data * self.context * self.tensor * self.pipeline

    @property
    def alone(self) -> bool:
        """Whether one process does it all."""
        return self.world == 1

    @property
    def product(self) -> str:
        """``world`` as it comes about."""
        factors = ("replicate", "shard", "context", "tensor", "pipeline")
        return " × ".join(f"{name} {getattr(self, name)}" for name in factors) + f" = {self.world}"

    def check(self, model: ModelConfig, *, batch_size: int, sequence_length: int, world: int) -> None:
        """Raises UserError, with the arithmetic, where this does not fit ``model``, the batch, or the number of
        processes there are."""
        if self.world != world:
            raise UserError(
                f"parallel: {self.product} processes; there are {world} "
                f"(torchrun --nproc-per-node {self.world}, or change the axes)"
            )
        self._check_experts(model)
        if batch_size % self.data:
            raise UserError(
                f"training.batch_size: {batch_size} is no multiple of parallel.replicate × parallel.shard = {self.data}"
            )
        if self.context > 1 and sequence_length % (2 * self.context):
            raise UserError(
                f"training.sequence_length: {sequence_length} is no multiple of 2 × parallel.context = "
                f"{2 * self.context}"
            )
        if self.pipeline > model.num_hidden_layers:
            raise UserError(f"parallel.pipeline: {self.pipeline} stages are more than {model.num_hidden_layers} layers")
        self._check_variants(model)
        self._check_tensor(model)

    def _check_variants(self, model: ModelConfig) -> None:
        for axis in ("context", "tensor"):
            if getattr(self, axis) > 1 and model.attention.kind not in ("mla", "mha"):
                raise UserError(
                    f"parallel.{axis}: {getattr(self, axis)}: not with attention.kind {model.attention.kind}; "
                    "expected 1"
                )
        if self.tensor > 1 and model.moe is not None and model.moe.segments > 1:
            raise UserError(f"parallel.tensor: {self.tensor}: not with moe.segments {model.moe.segments}; expected 1")

    def _check_experts(self, model: ModelConfig) -> None:
        if self.expert == 1:
            return
        if model.moe is None:
            raise UserError(f"parallel.expert: {self.expert}, and this model has no experts; expected 1")
        ranks = self.data * self.context
        if ranks % self.expert:
            raise UserError(
                f"parallel.expert: {self.expert} does not divide replicate × shard × context = {ranks}; "
                "experts are spread over these processes"
            )
        if self.sharers % self.expert and self.expert % self.sharers:
            raise UserError(
                f"parallel.expert: {self.expert} neither divides shard × context = {self.sharers} "
                "nor is a multiple of it"
            )
        if model.moe.n_routed_experts % self.expert:
            raise UserError(
                f"parallel.expert: {self.expert} does not divide the {model.moe.n_routed_experts} routed experts"
            )

    def _check_tensor(self, model: ModelConfig) -> None:
        if self.tensor == 1:
            return
        widths = {"num_attention_heads": model.attention.num_attention_heads, "vocab_size": model.vocab_size}
        if model.attention.kind == "mha":
            widths["num_key_value_heads"] = model.attention.num_key_value_heads
        if model.moe is None or model.moe.first_k_dense_replace > 0:
            widths["intermediate_size"] = model.intermediate_size
        if model.moe is not None:
            widths["moe_intermediate_size"] = model.moe.moe_intermediate_size
        for name, width in widths.items():
            if width % self.tensor:
                raise UserError(f"parallel.tensor: {self.tensor} does not divide the model's {name} {width}")
