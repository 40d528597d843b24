"""Published ``config.json`` <-> :class:`ModelConfig`, for model_type deepseek, deepseek_v2, deepseek_v3, kimi_k2, and
llama, which is how dense models with multi-head attention are published (DeepSeek LLM 7B, LLaMA2-7B).

Reading keeps every key that says nothing about the computation (and writes it back); a key that is not known at all is
kept too and named in a warning, since it may change what the model computes. Writing refuses what the target's own
code could not express, so that an exported model never computes something else than it was trained to.
"""

from __future__ import annotations

import warnings
from typing import Any

from abyssal.config.model_config import MHAConfig, MLAConfig, ModelConfig
from abyssal.config.parsing import parse
from abyssal.errors import UserError, nearest

MODEL_TYPES = ("deepseek", "deepseek_v2", "deepseek_v3", "kimi_k2", "llama")

# Keys that we carry through: they steer other people's code, training or files, not what the model computes.
# fmt: off
_CARRIED = frozenset((
    "_name_or_path", "architectures", "auto_map", "attention_dropout", "aux_loss_alpha", "bad_words_ids",
    "chunk_size_feed_forward", "dtype", "ep_size", "head_dim", "id2label", "is_encoder_decoder",
    "keys_to_ignore_at_inference", "label2id", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token_id", "pretraining_tp", "problem_type", "qk_head_dim", "quantization_config", "return_dict", "seq_aux",
    "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
))
# fmt: on
_CODE = ("architectures", "auto_map")  # whose code loads the file: another's where it is written as another type
_ARCHITECTURE = {
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_V1_CODE = {
    auto: f"deepseek-ai/deepseek-moe-16b-base--{name}"
    for auto, name in (
        ("AutoConfig", "configuration_deepseek.DeepseekConfig"),
        ("AutoModel", "modeling_deepseek.DeepseekModel"),
        ("AutoModelForCausalLM", "modeling_deepseek.DeepseekForCausalLM"),
    )
}


class _Source(dict[str, Any]):
    """The published mapping, each key taken out as it is understood; what is left at the end was not."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        super().__init__(data)
        self.where = where
        self.max_position_embeddings = data.get("max_position_embeddings")

    def need(self, key: str) -> Any:
        if self.get(key) is None:
            raise UserError(f"{self.where}: {key}: missing")
        return self.pop(key)

    def take(self, key: str, default: Any = None) -> Any:
        value = self.pop(key, None)
        return default if value is None else value

    def only(self, key: str, *allowed: Any) -> None:
        """Takes a key that must have one of the ``allowed`` values (the first is the default)."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            right = " or ".join(repr(a) for a in allowed)
            raise UserError(f"{self.where}: {key}: {value!r} is not supported, only {right}")


def from_published(data: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """A published ``config.json`` as a ModelConfig.

    Warns where it holds keys that abyssal does not know. Raises UserError (one line: ``where``, key, value, what would
    be right) where something is missing, impossible, or would be computed differently here.
    """
    src = _Source(data, where)
    model_type = src.need("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{where}: model_type: {model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    src.only("hidden_act", "silu")
    src.only("mlp_bias", False)
    heads = src.need("num_attention_heads")
    hidden_size = src.need("hidden_size")
    native: dict[str, Any] = {
        "vocab_size": src.need("vocab_size"),
        "hidden_size": hidden_size,
        "num_hidden_layers": src.need("num_hidden_layers"),
        "intermediate_size": src.need("intermediate_size"),
        "max_position_embeddings": src.need("max_position_embeddings"),
        "rms_norm_eps": src.take("rms_norm_eps", 1e-6),
        "initializer_range": src.take("initializer_range", 0.02),
        "tie_word_embeddings": src.take("tie_word_embeddings", False),
    }
    extra: dict[str, Any] = {"model_type": model_type}
    for key in ("bos_token_id", "eos_token_id"):
        token = src.take(key)
        if isinstance(token, list):  # several ends of text: the first is ours, the list is written back
            for one in token:
                if type(one) is not int:
                    raise UserError(f"{where}: {key}: {one!r} in {token!r} is not valid: expected integers")
            extra[key] = token
            token = token[0] if token else None
        native[key] = token
    bias = src.take("attention_bias", False)
    if model_type in ("deepseek", "llama"):
        head_dim = src.take("head_dim") if model_type == "llama" else None
        if head_dim is None and _is_size(hidden_size) and _is_size(heads) and hidden_size % heads:
            raise UserError(f"{where}: hidden_size: {hidden_size} is not a multiple of num_attention_heads {heads}")
        if head_dim is None:
            # where one of the two is no size, parse() below says so; what stands here is then of no account
            head_dim = hidden_size // heads if _is_size(hidden_size) and _is_size(heads) else 2
        native["attention"] = {
            "kind": "mha",
            "num_attention_heads": heads,
            "num_key_value_heads": src.take("num_key_value_heads", heads),
            "head_dim": head_dim,
            "bias": bias,
        }
        native["rope"] = {**_read_rope(src, yarn=model_type != "llama"), "layout": "halves"}
    else:
        src.take("num_key_value_heads")  # MLA has as many as query heads, whatever the file says
        native["attention"] = {
            "kind": "mla",
            "num_attention_heads": heads,
            "q_lora_rank": src.take("q_lora_rank"),
            "kv_lora_rank": src.need("kv_lora_rank"),
            "qk_nope_head_dim": src.need("qk_nope_head_dim"),
            "qk_rope_head_dim": src.need("qk_rope_head_dim"),
            "v_head_dim": src.need("v_head_dim"),
            "bias": bias,
        }
        interleaved = src.take("rope_interleave", True)
        native["rope"] = {**_read_rope(src), "layout": "interleaved" if interleaved else "halves"}
    if model_type != "llama":  # there, what would say that it has experts or MTP modules is an unknown key
        native["mtp"] = {"num_nextn_predict_layers": src.take("num_nextn_predict_layers", 0)}
        native["moe"] = _read_moe(src, model_type, native["num_hidden_layers"])
    carried = {key: value for key, value in src.items() if key in _CARRIED}
    unknown = {key: value for key, value in src.items() if key not in _CARRIED}
    if told := {key: value for key, value in unknown.items() if value is not None}:
        names = ", ".join(f"{key}={value!r}" for key, value in sorted(told.items()))
        warnings.warn(
            f"{where}: abyssal does not know {names}; kept, but if it changes what the model computes, "
            "the results will differ",
            stacklevel=2,
        )
    native["published"] = {**extra, **carried, **unknown}
    return parse(ModelConfig, native, where)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _read_rope(src: _Source, *, yarn: bool = True) -> dict[str, Any]:
    """Both spellings: ``rope_theta`` + ``rope_scaling`` (``type``), or ``rope_parameters`` (``rope_type``, …).

    Without ``yarn`` no scaling is taken: transformers' Llama reads YaRN's settings otherwise than DeepSeek's code.
    """
    old, new = src.take("rope_scaling"), src.take("rope_parameters")
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{src.where}: {key}: expected a mapping, found {value!r}")
    settings = dict(new if new is not None else old or {})
    name = "rope_parameters" if new is not None else "rope_scaling"
    top_theta = src.take("rope_theta", 10000.0)
    theta = settings.pop("rope_theta", top_theta)
    legacy_kind = settings.pop("type", None)
    kind = settings.pop("rope_type", None) or legacy_kind or "default"
    right = "'yarn' or none" if yarn else "none"
    if kind == "default":
        if "factor" in settings:
            raise UserError(f"{src.where}: {name}: {settings!r} has a factor but no type; supported is {right}")
        return {"theta": theta}
    if kind != "yarn" or not yarn:
        raise UserError(f"{src.where}: {name}.type: {kind!r} is not supported, only {right}")
    for key, usual in (("attention_factor", None), ("truncate", True)):  # transformers' own additions
        if settings.pop(key, usual) != usual:
            raise UserError(f"{src.where}: {name}.{key}: only {usual!r} is supported")
    settings.setdefault("original_max_position_embeddings", src.max_position_embeddings)
    return {"theta": theta, "yarn": settings}


def _read_moe(src: _Source, model_type: str, layers: Any) -> dict[str, Any] | None:
    experts = src.take("n_routed_experts")
    v1, v2 = model_type == "deepseek", model_type == "deepseek_v2"
    scoring = src.take("scoring_func", "softmax" if v1 or v2 else "sigmoid")
    topk_method = src.take("topk_method", "greedy" if v1 or v2 else "noaux_tc")
    normalised = src.take("norm_topk_prob", not (v1 or v2))
    if experts is not None and not (v1 or v2):  # no default would be safe: the codes that read V3's files differ
        for key in ("num_experts_per_tok", "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor"):
            if src.get(key) is None:
                raise UserError(f"{src.where}: {key}: missing")
    scaling = src.take("routed_scaling_factor", 1.0)
    moe = {
        "n_routed_experts": experts,
        "num_experts_per_tok": src.take("num_experts_per_tok", 1 if experts is None else None),
        "moe_intermediate_size": src.take("moe_intermediate_size", 1 if experts is None else None),
        "n_shared_experts": src.take("n_shared_experts", 0),
        "first_k_dense_replace": src.take("first_k_dense_replace", 0),
        "moe_layer_freq": src.take("moe_layer_freq", 1),
        "scoring_func": scoring,
        "topk_method": topk_method,
        "n_group": src.take("n_group", 1),
        "topk_group": src.take("topk_group", 1),
        "norm_topk_prob": normalised,
        # The V2 code either normalises or scales, the V1 code never scales: what is not computed is not carried over.
        "routed_scaling_factor": 1.0 if v1 or (v2 and normalised) else scaling,
    }
    if experts is None:
        return None
    for key in ("num_experts_per_tok", "moe_intermediate_size"):
        if moe[key] is None:
            raise UserError(f"{src.where}: {key}: missing; n_routed_experts is {experts}")
    right = "softmax" if v1 or v2 else "sigmoid"
    if scoring != right:
        raise UserError(f"{src.where}: scoring_func: {scoring!r} is not supported by {model_type}, only {right!r}")
    allowed = {"deepseek": ("greedy",), "deepseek_v2": ("greedy", "group_limited_greedy")}.get(
        model_type, ("noaux_tc",)
    )
    if topk_method not in allowed:
        right = " or ".join(repr(a) for a in allowed)
        raise UserError(f"{src.where}: topk_method: {topk_method!r} is not supported by {model_type}, only {right}")
    return moe


def published_model_type(config: ModelConfig) -> str:
    """The model_type whose published code computes what ``config`` says. Raises UserError where none does."""
    # llama first: many more programs read it than deepseek, which could say the same of a dense model
    natively = ("llama", "deepseek", "deepseek_v2", "deepseek_v3")
    candidates = [config.published["model_type"]] if "model_type" in config.published else natively
    reasons = {name: _cannot_express(config, name) for name in candidates}
    for name, reason in reasons.items():
        if reason is None:
            return str(name)
    if config.attention.kind == "mha":
        name = "deepseek" if config.moe else "llama"
    else:
        name = "deepseek_v2" if config.moe and config.moe.scoring_func == "softmax" else "deepseek_v3"
    name = name if name in reasons else next(iter(reasons))
    raise UserError(f"cannot be written as {name}: {reasons[name]}")


def to_published(config: ModelConfig, model_type: str | None = None) -> dict[str, Any]:
    """``config`` as a published ``config.json`` of ``model_type`` (by default the one it came from or that fits it).

    Raises UserError naming the setting that the target's code cannot express.
    """
    if model_type is None:
        model_type = published_model_type(config)
    elif model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise UserError(f"model_type: {model_type!r} is not one of {known}{nearest(model_type, MODEL_TYPES)}")
    reason = _cannot_express(config, model_type)
    if reason is not None:
        raise UserError(f"cannot be written as {model_type}: {reason}")
    attention, rope, moe = config.attention, config.rope, config.moe
    same = config.published.get("model_type", model_type) == model_type
    out: dict[str, Any] = {
        "architectures": [_ARCHITECTURE[model_type]],
        **{key: value for key, value in config.published.items() if key != "model_type" and (same or key not in _CODE)},
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": attention.bias,
        "num_attention_heads": attention.num_attention_heads,
        "rope_theta": rope.theta,
        "rope_scaling": {"type": "yarn", **rope.yarn.model_dump()} if rope.yarn else None,
    }
    for key in ("bos_token_id", "eos_token_id"):
        out.setdefault(key, getattr(config, key))
    if model_type == "llama":
        assert isinstance(attention, MHAConfig)
        heads = {"num_key_value_heads": attention.num_key_value_heads, "head_dim": attention.head_dim}
        return out | heads | {"mlp_bias": False}
    if isinstance(attention, MHAConfig):
        out["num_key_value_heads"] = attention.num_key_value_heads
    else:
        out |= {"num_key_value_heads": attention.num_attention_heads}
        out |= attention.model_dump(exclude={"kind", "bias", "num_attention_heads"})
        if rope.layout == "halves":
            out["rope_interleave"] = False
    if model_type in ("deepseek_v3", "kimi_k2"):
        out["num_nextn_predict_layers"] = config.mtp.num_nextn_predict_layers
    if moe is None:
        # Every layer dense. No n_routed_experts: None there is what DeepSeek's code asks for and transformers refuses.
        return out | {"first_k_dense_replace": config.num_hidden_layers}
    out |= moe.model_dump(exclude={"segments"})
    if model_type == "deepseek":
        for key in ("topk_method", "n_group", "topk_group", "routed_scaling_factor"):
            del out[key]
    return out


def for_export(config: ModelConfig, *, force: bool = False) -> dict[str, Any]:
    """``config`` as the ``config.json`` that other people's programs read with no code of ours.

    kimi_k2 is written as deepseek_v3, which is the same computation and has native code in transformers. Raises
    UserError where the layout cannot say what ``config`` does, and, without ``force``, where transformers' own code
    for it would compute something else.
    """
    model_type = published_model_type(config)
    model_type = "deepseek_v3" if model_type == "kimi_k2" else model_type
    out = to_published(config, model_type)
    reason = _computed_differently(config, model_type)
    if reason is not None and not force:
        raise UserError(f"not exported as {model_type}: {reason} (--force writes it all the same)")
    out["architectures"] = [_ARCHITECTURE[model_type]]
    if model_type == "deepseek":  # its code is not in transformers: where DeepSeek published it
        out["auto_map"] = _V1_CODE
    else:
        out.pop("auto_map", None)
    # They describe the file that this config came from, or what transformers works out itself.
    for key in ("quantization_config", "dtype", "torch_dtype", "qk_head_dim"):
        out.pop(key, None)
    if model_type != "llama":
        out.pop("head_dim", None)
    return out


def _computed_differently(config: ModelConfig, model_type: str) -> str | None:
    """What transformers (5.23) computes differently from the published code of ``model_type``, or None."""
    attention, moe, yarn = config.attention, config.moe, config.rope.yarn
    if model_type == "deepseek":  # not in transformers
        return None
    if model_type == "llama":
        if config.hidden_size % attention.num_attention_heads:
            return (
                f"hidden_size {config.hidden_size}: transformers' Llama takes multiples of num_attention_heads "
                f"{attention.num_attention_heads} only"
            )
        return None
    assert isinstance(attention, MLAConfig)
    scales = (yarn.mscale, yarn.mscale_all_dim) if yarn and yarn.factor > 1 else (1, 1)
    if 0 in scales and scales != (1, 0):
        return f"rope.yarn mscale, mscale_all_dim {scales}: where one is 0 transformers computes with 1 and 0"
    if model_type == "deepseek_v2":
        if config.hidden_size % attention.num_attention_heads:
            return (
                f"hidden_size {config.hidden_size}: transformers' V2 takes multiples of num_attention_heads "
                f"{attention.num_attention_heads} only"
            )
        for name in ("kv_lora_rank", "qk_nope_head_dim"):
            if getattr(attention, name) % 2:
                return f"{name} {getattr(attention, name)}: transformers' V2 takes even numbers only"
    if moe is None:
        return None
    if model_type == "deepseek_v2" and moe.norm_topk_prob:
        return "norm_topk_prob true: transformers' V2 router ignores it, its logits would be wrong"
    if model_type == "deepseek_v3" and moe.n_routed_experts < 2:
        return "n_routed_experts 1: transformers' V3 router wants two at least"
    if moe.moe_layer_freq != 1:
        return f"moe_layer_freq {moe.moe_layer_freq}: transformers ignores it and gives every layer experts"
    return None


def _cannot_express(config: ModelConfig, model_type: str) -> str | None:
    """The first setting of ``config`` that ``model_type``'s published code would compute differently, or None."""
    attention, moe = config.attention, config.moe
    if attention.kind == "separate_latents":
        return "attention.kind 'separate_latents' is a study variant of abyssal's own"
    if moe and moe.segments > 1:
        return f"moe.segments {moe.segments} (segment routing) is a study variant of abyssal's own"
    if config.mtp.num_nextn_predict_layers and model_type not in ("deepseek_v3", "kimi_k2"):
        return f"mtp.num_nextn_predict_layers {config.mtp.num_nextn_predict_layers}: {model_type} has no MTP modules"
    if model_type == "llama" and moe:
        return f"moe.n_routed_experts {moe.n_routed_experts}: {model_type} has no experts"
    if model_type in ("deepseek", "llama"):
        if not isinstance(attention, MHAConfig):
            return f"attention.kind {attention.kind!r}: {model_type} has multi-head attention ('mha')"
        if model_type == "deepseek" and attention.head_dim * attention.num_attention_heads != config.hidden_size:
            return f"attention.head_dim {attention.head_dim}: {model_type} takes hidden_size / num_attention_heads"
        if config.rope.layout != "halves":
            return f"rope.layout {config.rope.layout!r}: {model_type} turns 'halves'"
        if config.rope.yarn:
            return f"rope.yarn: {model_type} has no YaRN"
    else:
        if not isinstance(attention, MLAConfig):
            return f"attention.kind {attention.kind!r}: {model_type} has latent attention ('mla')"
        if config.rope.layout != "interleaved" and model_type == "deepseek_v2":
            return f"rope.layout {config.rope.layout!r}: {model_type} turns 'interleaved' pairs"
    if moe is None:
        return None
    if model_type in ("deepseek", "deepseek_v2"):
        if moe.scoring_func != "softmax":
            return f"moe.scoring_func {moe.scoring_func!r}: {model_type} scores by 'softmax'"
        if moe.topk_method == "noaux_tc" or (moe.topk_method != "greedy" and model_type == "deepseek"):
            return f"moe.topk_method {moe.topk_method!r}: {model_type} does not have it"
        if moe.routed_scaling_factor != 1 and (model_type == "deepseek" or moe.norm_topk_prob):
            return f"moe.routed_scaling_factor {moe.routed_scaling_factor}: {model_type} " + (
                "does not scale" if model_type == "deepseek" else "does not scale where norm_topk_prob is true"
            )
    elif moe.scoring_func != "sigmoid" or moe.topk_method != "noaux_tc":
        return (
            f"moe.scoring_func {moe.scoring_func!r} with topk_method {moe.topk_method!r}: "
            f"{model_type} has 'sigmoid' with 'noaux_tc'"
        )
    return None
