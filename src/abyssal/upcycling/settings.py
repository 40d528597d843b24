"""What to convert a dense model to, whether that fits it, and the config that comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abyssal.config import MHAConfig, MLAConfig, ModelConfig, MoEConfig
from abyssal.errors import UserError
from abyssal.upcycling.experts import ExpertSplit


@dataclass(frozen=True)
class Settings:
    """What to convert to, and how.

    Attention becomes latent where ``cache`` (values a token and layer: kv_lora_rank + rotary dims) or ``error`` (the
    smallest rank at which the mean over layers of the factorisation's relative error is at most that) is given;
    ``rotary`` dims of it carry position, by default five eighths of the head size. ``queries`` gives queries a latent
    of so many values too (q_lora_rank), which is not cached; None leaves them whole. ``experts`` splits the FFN.
    Calibration takes ``windows`` of ``length`` tokens, and ``held_out`` ones to judge by. Each layer is fitted for
    ``fit`` steps of ``batch`` windows (0: not at all). ``key_weight``: what an error in the keys counts, relative to
    what the statistics say (:mod:`abyssal.upcycling.latent`).
    """

    cache: int | None = None
    error: float | None = None
    rotary: int | None = None
    queries: int | None = None
    experts: ExpertSplit | None = None
    windows: int = 128
    held_out: int = 8
    length: int = 512
    fit: int = 100
    batch: int = 4
    key_weight: float = 0.5
    seed: int = 0

    @property
    def latent(self) -> bool:
        return self.cache is not None or self.error is not None

    def check(self) -> None:
        """Raises UserError for settings that no model could have."""
        if not self.latent and self.experts is None:
            raise UserError(
                "nothing to convert: give cache or error for latent attention, experts for experts, or both"
            )
        if self.cache is not None and self.error is not None:
            raise UserError("cache and error: each of them decides the rank; give one of them")
        if self.error is not None and not 0 < self.error < 1:
            raise UserError(f"error: {self.error!r} is not valid; expected a number between 0 and 1")
        if self.rotary is not None and not self.latent:
            raise UserError("rotary: latent attention's; give cache or error too")
        if self.queries is not None and not self.latent:
            raise UserError("queries: latent attention's; give cache or error too")
        lowest = {"windows": 1, "held_out": 1, "length": 2, "fit": 0, "batch": 1}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)} is not valid; expected a whole number from {least}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: {self.seed} is not valid; expected a whole number from 0 to 2^63 - 1")


def rotary_dims(attention: MHAConfig, settings: Settings) -> int:
    """How many of the cached values carry position."""
    return settings.rotary if settings.rotary is not None else max(attention.head_dim * 5 // 16, 1) * 2


def check_sizes(config: ModelConfig, settings: Settings) -> None:
    """Raises UserError where a size does not fit the dense model."""
    attention = config.attention
    assert isinstance(attention, MHAConfig)
    if settings.length > config.max_position_embeddings:
        raise UserError(
            f"length: {settings.length} is more than the model's max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    if settings.experts is not None:
        settings.experts.width(config.intermediate_size)
        if not settings.latent and attention.head_dim * attention.num_attention_heads != config.hidden_size:
            raise UserError(
                f"experts: their only layout beside grouped-query attention takes head_dim = hidden_size / heads, here "
                f"{attention.head_dim}; give cache too, for latent attention"
            )
    if not settings.latent:
        return
    rotary = rotary_dims(attention, settings)
    if rotary % 2 or not 2 <= rotary <= attention.head_dim:
        raise UserError(
            f"rotary: {rotary} is not valid; expected an even number from 2 to head_dim {attention.head_dim}"
        )
    most = min(attention.num_attention_heads * (attention.head_dim + rotary), config.hidden_size)
    if settings.queries is not None and not 1 <= settings.queries <= most:
        raise UserError(
            f"queries: {settings.queries} is not valid; queries of all heads have a rank of {most} at most, so "
            f"expected 1 to {most}"
        )
    if settings.queries is not None:
        check_text(settings, settings.queries)
    if settings.cache is None:
        return
    largest = min(2 * attention.num_key_value_heads * attention.head_dim, config.hidden_size)
    rank = settings.cache - rotary
    if not 1 <= rank <= largest:
        raise UserError(
            f"cache: {settings.cache} values with {rotary} for rotary positions make a rank of {rank}; keys and values "
            f"together have a rank of {largest} at most, so expected {rotary + 1} to {rotary + largest}"
        )
    check_text(settings, rank)


def check_text(settings: Settings, rank: int) -> None:
    """Raises UserError where the calibration text cannot show what the latents of so high a ``rank`` are."""
    tokens = settings.windows * settings.length
    if tokens < 2 * rank:
        raise UserError(
            f"windows: {settings.windows} of {settings.length} tokens are {tokens}; a rank of {rank} needs {2 * rank} "
            "at least"
        )


def converted_config(config: ModelConfig, settings: Settings, rank: int, rotary: int, theta: float) -> ModelConfig:
    """The new model's config: ``rank`` and ``rotary`` dims of latent attention, where it is wanted, and the experts."""
    a = config.attention
    assert isinstance(a, MHAConfig)
    carried = {key: config.published[key] for key in ("pad_token_id", "eos_token_id") if key in config.published}
    update: dict[str, Any] = {"published": {"model_type": "deepseek_v3" if settings.latent else "deepseek", **carried}}
    if settings.latent:
        update["attention"] = MLAConfig(
            num_attention_heads=a.num_attention_heads,
            q_lora_rank=settings.queries,
            kv_lora_rank=rank,
            qk_nope_head_dim=a.head_dim,
            qk_rope_head_dim=rotary,
            v_head_dim=a.head_dim,
        )
        update["rope"] = config.rope.model_copy(update={"theta": theta, "layout": "interleaved"})
    if (chosen := settings.experts) is not None:
        form: dict[str, Any] = {"routed_scaling_factor": float(chosen.active)}
        if not settings.latent:
            form = {"scoring_func": "softmax", "topk_method": "greedy"}
        update["moe"] = MoEConfig(
            n_routed_experts=chosen.experts,
            num_experts_per_tok=chosen.active,
            n_shared_experts=chosen.shared,
            moe_intermediate_size=chosen.width(config.intermediate_size),
            norm_topk_prob=True,
            **form,
        )
    return config.model_copy(update=update)
