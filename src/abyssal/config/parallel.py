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
    ``tensor`` divides heads, widths and the vocabulary; with ``sequence`` norms and the residual stream too, which its
    processes otherwise have alike, by position. ``pipeline`` divides the layers. ``expert`` divides the routed experts
    over the processes of replicate × shard × context: it is a part of those, not a factor of its own.

    ``gather``: ``again`` gives a block's weights back after its forward pass and gathers them once more for its
    backward pass (ZeRO-3), ``once`` keeps them in between (ZeRO-2; so do schedules that split the backward pass,
    ``zero_bubble`` and ``dualpipev``). ``offload`` keeps weights, gradients and optimizer
    in the host's memory. ``schedule`` is the order of a pipeline's work; but for ``1f1b`` a process has two stages.
    """

    replicate: PositiveInt = 1
    shard: PositiveInt = 1
    context: PositiveInt = 1
    tensor: PositiveInt = 1
    sequence: bool = False
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
    def splits_backward(self) -> bool:
        """Whether a pipeline works out the gradients of a stage's weights later than those of its inputs."""
        return self.pipeline > 1 and self.schedule in ("zero_bubble", "dualpipev")

    @property
    def gathers_again(self) -> bool:
        """Whether weights are given back between forward and backward passes."""
        return self.gather == "again" and not self.splits_backward

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all its processes."""
        return self.pipeline * (1 if self.schedule == "1f1b" or self.pipeline == 1 else 2)

    def stages_of(self, place: int) -> list[int]:
        """The stages of the process that is ``place``-th in the pipeline. Of two the second is as far from the end as
        the first from the beginning (a V); with ``interleaved`` the second half goes round like the first."""
        if self.stages == self.pipeline:
            return [place]
        return [place, place + self.pipeline if self.schedule == "interleaved" else self.stages - 1 - place]

    @property
    def product(self) -> str:
        """``world`` as it comes about."""
        factors = ("replicate", "shard", "context", "tensor", "pipeline")
        return " × ".join(f"{name} {getattr(self, name)}" for name in factors) + f" = {self.world}"

    def check(
        self, model: ModelConfig, *, batch_size: int, sequence_length: int, world: int, accumulate: int = 1
    ) -> None:
        """Raises UserError, with the arithmetic, where this does not fit ``model``, the batch (``accumulate``
        micro-batches of ``batch_size`` sequences), or the number of processes there are."""
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
        self._check_pipeline(model, accumulate)
        self._check_variants(model)
        self._check_tensor(model)
        if self.sequence and self.tensor == 1:
            raise UserError("parallel.sequence: true goes with parallel.tensor, which is 1; expected false")
        if self.sequence and sequence_length % (self.context * self.tensor):
            raise UserError(
                f"training.sequence_length: {sequence_length} is no multiple of parallel.context × parallel.tensor = "
                f"{self.context * self.tensor}, which parallel.sequence needs"
            )

    def _check_variants(self, model: ModelConfig) -> None:
        for axis in ("context", "tensor"):
            if getattr(self, axis) > 1 and model.attention.kind not in ("mla", "mha"):
                raise UserError(
                    f"parallel.{axis}: {getattr(self, axis)}: not with attention.kind {model.attention.kind}; "
                    "expected 1"
                )
        if self.tensor > 1 and model.moe is not None and model.moe.segments > 1:
            raise UserError(f"parallel.tensor: {self.tensor}: not with moe.segments {model.moe.segments}; expected 1")

    def _check_pipeline(self, model: ModelConfig, accumulate: int) -> None:
        if self.pipeline == 1:
            if self.schedule != "1f1b":
                raise UserError(
                    f"parallel.schedule: {self.schedule} goes with parallel.pipeline, which is 1; expected 1f1b"
                )
            return
        if self.stages > model.num_hidden_layers:
            two = "" if self.stages == self.pipeline else f" × 2 (parallel.schedule {self.schedule})"
            raise UserError(
                f"parallel.pipeline: {self.pipeline}{two} stages are more than the model's "
                f"{model.num_hidden_layers} layers"
            )
        if self.splits_backward and model.tie_word_embeddings:
            raise UserError(
                f"parallel.schedule: {self.schedule}: not with tie_word_embeddings, since torch cannot split the "
                "backward pass of a weight that is embedding and head; expected 1f1b or interleaved"
            )
        if self.splits_backward and model.mtp.num_nextn_predict_layers > 1:
            raise UserError(
                f"parallel.schedule: {self.schedule}: not with {model.mtp.num_nextn_predict_layers} MTP modules, since "
                "torch cannot split the backward pass of one behind another; expected 1f1b or interleaved"
            )
        least = self.pipeline if self.schedule == "interleaved" else self.stages
        if accumulate < least or (self.schedule == "interleaved" and accumulate % self.pipeline):
            raise UserError(
                f"training.accumulate: {accumulate} micro-batches do not fill a pipeline of {self.stages} stages; "
                f"expected at least {least}"
                + (f", and a multiple of {self.pipeline}" if self.schedule == "interleaved" else "")
            )

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


def stage_layers(config: ModelConfig, stages: int, stage: int) -> range:
    """Layers of stage ``stage`` of a pipeline: as equal as they go, the first ones larger; MTP modules are counted on
    behind the last one's."""
    layers, depths = config.num_hidden_layers, config.mtp.num_nextn_predict_layers
    each, more = divmod(layers, stages)
    start = stage * each + min(stage, more)
    end = start + each + (stage < more)
    return range(start, end + (depths if stage == stages - 1 else 0))
