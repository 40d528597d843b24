"""Figures that others have published, kept as data to set ours beside: the one place where such numbers stand.

Nothing here is used to compute anything. Sources: DeepSeekMoE (arXiv 2401.06066), DeepSeek-V2 (2405.04434), DeepSeek-V3
(2412.19437), Insights into DeepSeek-V3 (2505.09343), and the README of github.com/deepseek-ai/DeepSeek-MoE. "Widely
quoted": the README gives a ZeRO-3 script with recomputation, but does not say for which GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from abyssal.analysis.cards import CARDS
from abyssal.analysis.flops import count_flops
from abyssal.analysis.inventory import Inventory
from abyssal.analysis.memory import Layout, TrainingMemory, TrainingSetup
from abyssal.analysis.parameters import count_parameters
from abyssal.analysis.plan import gpu_seconds
from abyssal.analysis.serving import Group, InferenceMemory, Serving
from abyssal.config import preset


@dataclass(frozen=True)
class Figure:
    """A published number in ``unit`` for the preset ``model``, and how ours is computed. ``at_most``: a room that ours
    has to fit in. None: what is published stands in ``what``, and ours follows from it."""

    model: str
    what: str
    published: float | None
    unit: str
    source: str
    compute: Callable[[], float]
    at_most: bool = False

    def ours(self) -> float:
        """The same, from the config."""
        return self.compute()


def _parameters(model: str) -> float:
    return count_parameters(preset(model)).total / 1e9


def _active(model: str) -> float:
    return count_parameters(preset(model)).active / 1e9


def _flops(model: str) -> float:
    """Operations of training on 4096 tokens, in 10^12, with attention in full: the DeepSeekMoE paper's figures for
    dense models are those where every token attends to all of them, not to those before it."""
    counts = count_flops(preset(model), 4096)
    attention = counts.by_part["attention scores and values"]
    return 3 * (counts.forward + attention * (2 * 4096 / 4097 - 1)) * 4096 / 1e12


def _causal_gflop(model: str) -> float:
    """Operations of training on one of 4096 tokens, in 10^9, without MTP modules: how the V3 team counts."""
    return 3 * count_flops(preset(model), 4096).forward / 1e9


def _share(model: str, other: str) -> float:
    return 100 * _flops(model) / _flops(other)


def _inference(model: str) -> float:
    return InferenceMemory(Inventory(preset(model)), Serving()).of(Group(), 1, 4096).total / 1e9


def _zero3(model: str) -> float:
    """Of one GPU; with several micro-batches a step gradients are summed in FP32, and it is 41.3 GB for MoE-16B."""
    setup = TrainingSetup(1, 4096, recompute=True)
    return TrainingMemory(Inventory(preset(model)), setup).of(Layout(shard=8)).total / 1e9


def implied_mfu(model: str, gpu_hours: float, tokens: float, card: str) -> float:
    """The MFU at which ``gpu_hours`` of ``card`` are enough to train on ``tokens``, main model, sequences of 4096."""
    flops = CARDS[card].flops
    assert flops is not None
    return gpu_seconds(tokens, 3 * count_flops(preset(model), 4096).forward, flops, 1.0) / (gpu_hours * 3600)


def _mfu(gpu_hours: float, tokens: float) -> float:
    return 100 * implied_mfu("deepseek-v3", gpu_hours, tokens, "h800")


def _cached(model: str) -> float:
    return preset(model).attention.cached_values


_V1, _LARGE, _V2, _V3 = "deepseek-moe-16b", "deepseek-llm-7b", "deepseek-v2", "deepseek-v3"
_QUOTED = "widely quoted"
_PAPER, _README = "arXiv 2401.06066", "README of DeepSeek-MoE"
FIGURES = (
    Figure(_V1, "parameters", 16.4, "B", _PAPER, lambda: _parameters(_V1)),
    Figure(_V1, "active a token", 2.8, "B", _PAPER, lambda: _active(_V1)),
    Figure(_V1, "FLOPs of training on 4K tokens", 74.4, "T", _PAPER, lambda: _flops(_V1)),
    Figure(_V1, "  of DeepSeek 7B's", 40.5, "%", _PAPER, lambda: _share(_V1, _LARGE)),
    Figure(_V1, "  of LLaMA2 7B's", 39.6, "%", _PAPER, lambda: _share(_V1, "llama2-7b")),
    Figure(_V1, "inference on one GPU, BF16, 4K tokens", 40, "GB", _README, lambda: _inference(_V1), at_most=True),
    Figure(
        _V1, "full training on 8, ZeRO-3, one micro-batch a step", 40, "GB", _QUOTED, lambda: _zero3(_V1), at_most=True
    ),
    Figure(_LARGE, "FLOPs of training on 4K tokens", 183.5, "T", _PAPER, lambda: _flops(_LARGE)),
    Figure("llama2-7b", "FLOPs of training on 4K tokens", 187.9, "T", _PAPER, lambda: _flops("llama2-7b")),
    Figure(_V2, "parameters", 236, "B", "arXiv 2405.04434", lambda: _parameters(_V2)),
    Figure(_V2, "cached values a token and layer", 576, "", "arXiv 2405.04434", lambda: _cached(_V2)),
    Figure(_V3, "parameters", 671, "B", "arXiv 2412.19437", lambda: _parameters(_V3)),
    Figure(_V3, "active a token", 37, "B", "arXiv 2412.19437", lambda: _active(_V3)),
    Figure(_V3, "cached values a token and layer", 576, "", "arXiv 2412.19437", lambda: _cached(_V3)),
    Figure(_V3, "training a token, 4K tokens", 250, "GFLOP", "arXiv 2505.09343", lambda: _causal_gflop(_V3)),
    Figure(_V3, "MFU, by 180K H800 hours for 1T tokens", None, "%", "arXiv 2412.19437", lambda: _mfu(180e3, 1e12)),
    Figure(_V3, "MFU, by 2664K H800 hours for 14.8T", None, "%", "arXiv 2412.19437", lambda: _mfu(2664e3, 14.8e12)),
)


def figures_of(model: str) -> list[Figure]:
    """What has been published of the preset ``model``."""
    return [figure for figure in FIGURES if figure.model == model]
