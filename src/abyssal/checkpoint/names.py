"""State dict in memory <-> tensors on disk: the one difference is that experts are stacked in memory.

    mlp.experts.gate_up_proj [E, 2F, D]  <->  mlp.experts.{e}.gate_proj.weight, mlp.experts.{e}.up_proj.weight [F, D]
    mlp.experts.down_proj    [E, D, F]   <->  mlp.experts.{e}.down_proj.weight [D, F]

Everything else has the same name in both, FP8 weights with their scales (``….weight_scale_inv``) included. A tied head
is written once, as the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from abyssal.config import ModelConfig

SCALE = "_scale_inv"
BIAS = ".e_score_correction_bias"
_STACKED = re.compile(r"(.*\.mlp\.experts\.)(gate_up|down)_(proj|scale_inv)$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight$")


def disk_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its published name; experts as views of the stacked tensors, so that nothing is copied."""
    for name, tensor in _state(model):
        match = _STACKED.match(name)
        if not match:
            yield name, tensor
            continue
        prefix, kind, what = match.groups()
        end = "weight" if what == "proj" else f"weight{SCALE}"
        for expert in range(tensor.shape[0]):
            if kind == "down":
                yield f"{prefix}{expert}.down_proj.{end}", tensor[expert]
            else:
                gate, up = tensor[expert].chunk(2) if what == "proj" else tensor[expert]
                yield f"{prefix}{expert}.gate_proj.{end}", gate
                yield f"{prefix}{expert}.up_proj.{end}", up


def stacked_name(name: str) -> str:
    """Name in memory of the tensor that holds the published ``name``."""
    match = _EXPERT.match(name)
    if not match:
        return name
    return match[1] + ("down_proj" if match[3] == "down" else "gate_up_proj")


def stacked_matrix(name: str) -> tuple[str, int | None]:
    """Name of all experts' matrices stacked, [E, …], of which the published ``name`` is one, and which; any other name,
    and None."""
    match = _EXPERT.match(name)
    return (f"{match[1]}{match[3]}_proj", int(match[2])) if match else (name, None)


def layer_of(name: str) -> int | None:
    """Number of the layer (MTP modules count on) that a published name belongs to; None: embedding, norm, head."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def repeated_names(config: ModelConfig) -> dict[str, str]:
    """Names that a checkpoint may repeat another tensor under, and which: each MTP module's embedding and head, as
    published, and a tied head."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    out = {"lm_head.weight": head} if config.tie_word_embeddings else {}
    for k in range(config.mtp.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + k}"
        out[f"{prefix}.embed_tokens.weight"] = "model.embed_tokens.weight"
        out[f"{prefix}.shared_head.head.weight"] = head
    return out


def is_derived(name: str) -> bool:
    """Whether ``name`` is a table that old checkpoints store and every code computes from the config."""
    return name.endswith(".rotary_emb.inv_freq")


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters without gradient history and buffers (all of ours belong into checkpoints), each once."""
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())
    yield from model.named_buffers()
