"""What a model is: :class:`ModelConfig`, nested by subject (attention, rope, moe, mtp).

One config describes every generation. What differs between DeepSeekMoE-16B, V2 and V3 is said by values (which
attention, which scoring function, which top-k method), never by a version number. Field names are those of the
published ``config.json`` files; :mod:`abyssal.config.published` maps the two forms to each other.

Sources: DeepSeekMoE (arXiv 2401.06066), DeepSeek-V2 (2405.04434), DeepSeek-V3 (2412.19437).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from abyssal.config.parsing import Config

# Far above any model, and low enough that no tensor's size overflows: a slip of a digit is said, not computed.
Width = Annotated[int, Field(gt=0, le=2**20)]
Count = Annotated[int, Field(gt=0, le=2**14)]


class MHAConfig(Config):
    """Multi-head attention with grouped key/value heads (DeepSeekMoE-16B: as many as query heads)."""

    kind: Literal["mha"] = "mha"
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Width
    bias: bool = False

    @model_validator(mode="after")
    def _check(self) -> MHAConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd; rotary position embedding turns pairs of dimensions")
        return self

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    @property
    def cached_values(self) -> int:
        """Values cached a token and layer: keys and values of every kv head."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def expanded_values(self) -> int:
        """Values a token and layer if every head's key and value were kept; here the same as cached_values."""
        return self.cached_values


class _LatentAttentionConfig(Config):
    """What MLA and its study variant share."""

    num_attention_heads: Count
    q_lora_rank: Width | None = None
    qk_nope_head_dim: Width
    qk_rope_head_dim: Width
    v_head_dim: Width
    bias: bool = False

    @model_validator(mode="after")
    def _check(self) -> _LatentAttentionConfig:
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim: {self.qk_rope_head_dim} is odd; rotary position embedding turns pairs of dimensions"
            )
        return self

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def expanded_values(self) -> int:
        """Values a token and layer if every head's key and value were kept."""
        return self.num_attention_heads * (self.qk_head_dim + self.v_head_dim)


class MLAConfig(_LatentAttentionConfig):
    """Multi-head latent attention (V2 paper §2.1, V3 §2.1.1); ``q_lora_rank`` None leaves queries uncompressed."""

    kind: Literal["mla"] = "mla"
    kv_lora_rank: Width

    @property
    def cached_values(self) -> int:
        """Values cached a token and layer: the latent and one rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


class SeparateLatentsConfig(_LatentAttentionConfig):
    """Study variant: one latent for keys, one for values, rotary on the expanded keys (see model/variants.py)."""

    kind: Literal["separate_latents"] = "separate_latents"
    k_lora_rank: Width
    v_lora_rank: Width

    @property
    def cached_values(self) -> int:
        """Values cached a token and layer: the two latents."""
        return self.k_lora_rank + self.v_lora_rank


AttentionConfig = Annotated[MHAConfig | MLAConfig | SeparateLatentsConfig, Field(discriminator="kind")]


class YarnConfig(Config):
    """YaRN context extension (arXiv 2309.00071) as in the DeepSeek configs. Defaults are those of DeepSeek's code."""

    factor: float = Field(ge=1.0)
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float = Field(default=1.0, ge=0)
    mscale_all_dim: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> YarnConfig:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast: {self.beta_fast} is below beta_slow {self.beta_slow}")
        return self


class RopeConfig(Config):
    """Rotary position embedding. ``interleaved`` turns (x0,x1), (x2,x3), …; ``halves`` turns (x0,x_{d/2}), …"""

    theta: float = Field(default=10000.0, gt=1)
    layout: Literal["interleaved", "halves"] = "interleaved"
    yarn: YarnConfig | None = None


class MoEConfig(Config):
    """Shared and routed experts, and the router that chooses among the routed ones.

    ``topk_method``: ``greedy`` takes the best scores; ``group_limited_greedy`` keeps ``topk_group`` of ``n_group``
    groups by their maximum (V2); ``noaux_tc`` adds e_score_correction_bias for the selection and keeps groups by the
    sum of their two best (V3). ``shared_intermediate_size`` is the width of the shared expert; by default
    n_shared_experts · moe_intermediate_size. ``segments`` > 1 is a study variant (model/variants.py).
    """

    n_routed_experts: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Width
    n_shared_experts: int = Field(default=0, ge=0, le=2**10)
    first_k_dense_replace: int = Field(default=0, ge=0)
    moe_layer_freq: PositiveInt = 1
    scoring_func: Literal["softmax", "sigmoid"] = "sigmoid"
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: PositiveFloat = 1.0
    segments: PositiveInt = 1

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        experts, groups, kept = self.n_routed_experts, self.n_group, self.topk_group
        if self.num_experts_per_tok > experts:
            raise ValueError(f"num_experts_per_tok: {self.num_experts_per_tok} is more than n_routed_experts {experts}")
        if self.topk_method == "greedy":
            return self  # groups are not looked at (V2-Lite's config carries them all the same)
        if experts % groups:
            raise ValueError(f"n_group: {groups} does not divide n_routed_experts {experts}")
        if kept > groups:
            raise ValueError(f"topk_group: {kept} is more than n_group {groups}")
        if self.num_experts_per_tok > kept * (experts // groups):
            raise ValueError(
                f"num_experts_per_tok: {self.num_experts_per_tok} is more than the {kept} kept groups of "
                f"{experts // groups} experts hold"
            )
        if self.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
            raise ValueError(
                f"n_group: {groups} leaves {experts // groups} expert a group; noaux_tc scores a group by its two best"
            )
        return self

    @property
    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def has_bias(self) -> bool:
        """Whether the router has an e_score_correction_bias."""
        return self.topk_method == "noaux_tc"


class MTPConfig(Config):
    """Multi-token prediction (V3 paper §2.2): how many modules stand behind the main model."""

    num_nextn_predict_layers: int = Field(default=0, ge=0, le=2**8)


class ModelConfig(Config):
    """A whole model. Build it with ``Transformer(config)``; read one with :func:`abyssal.config.read_config`.

    ``attention.compression_ratio: r`` may be given in place of the MLA ranks: both latents are then hidden_size / r.
    ``published`` holds what a published config.json says beyond this (its ``model_type`` and keys we only carry), so
    that it can be written back.
    """

    vocab_size: int = Field(ge=1, le=2**24)
    hidden_size: Width
    num_hidden_layers: Count
    intermediate_size: Width
    max_position_embeddings: PositiveInt
    attention: AttentionConfig
    rope: RopeConfig = RopeConfig()
    moe: MoEConfig | None = None
    mtp: MTPConfig = MTPConfig()
    rms_norm_eps: PositiveFloat = 1e-6
    initializer_range: PositiveFloat = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    published: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _resolve_compression_ratio(cls, data: Any) -> Any:
        attention = data.get("attention") if isinstance(data, dict) else None
        if not isinstance(attention, dict) or "compression_ratio" not in attention:
            return data
        attention = dict(attention)
        ratio, hidden = attention.pop("compression_ratio"), data.get("hidden_size")
        if attention.get("kind", "mla") != "mla":
            raise ValueError("attention.compression_ratio: only for kind 'mla'")
        if not isinstance(ratio, int) or ratio < 1 or not isinstance(hidden, int) or hidden % ratio:
            raise ValueError(f"attention.compression_ratio: {ratio!r} does not divide hidden_size {hidden!r}")
        for rank in ("q_lora_rank", "kv_lora_rank"):
            if attention.setdefault(rank, hidden // ratio) != hidden // ratio:
                raise ValueError(f"attention.{rank}: {attention[rank]!r} contradicts compression_ratio {ratio}")
        return {**data, "attention": attention}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.moe and self.hidden_size % self.moe.segments:
            raise ValueError(f"moe.segments: {self.moe.segments} does not divide hidden_size {self.hidden_size}")
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name}: {token} is outside the vocabulary of {self.vocab_size}")
        return self

    @property
    def scales_are_powers_of_two(self) -> bool:
        """Whether this came from a file whose FP8 scales are powers of two (V3.1's ``scale_fmt: ue8m0``)."""
        settings = self.published.get("quantization_config")
        return isinstance(settings, dict) and settings.get("scale_fmt") == "ue8m0"

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer ``layer`` (MTP modules continue the count) has experts; the others have a dense MLP."""
        moe = self.moe
        return moe is not None and layer >= moe.first_k_dense_replace and layer % moe.moe_layer_freq == 0
