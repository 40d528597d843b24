"""One transformer block, and the MTP module, which is a block with a head start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from abyssal.config import MHAConfig, MLAConfig, ModelConfig
from abyssal.kernels import decode
from abyssal.model.attention import Context, LatentAttention, MultiHeadAttention
from abyssal.model.cache import LayerCache
from abyssal.model.layers import MLP, Linear, RMSNorm
from abyssal.model.moe import MoE
from abyssal.model.paged import PagedLayer
from abyssal.model.router import OutputRecorder, Recorder, Routing
from abyssal.model.variants import SegmentMoE, SeparateLatentAttention


def _attention(config: ModelConfig) -> nn.Module:
    a = config.attention
    if isinstance(a, MHAConfig):
        return MultiHeadAttention(config, a)
    if isinstance(a, MLAConfig):
        return LatentAttention(config, a)
    return SeparateLatentAttention(config, a)


def _feed_forward(config: ModelConfig, layer: int) -> MLP | MoE:
    moe = config.moe
    if moe is None or not config.is_moe_layer(layer):
        return MLP(config.hidden_size, config.intermediate_size)
    return (SegmentMoE if moe.segments > 1 else MoE)(config.hidden_size, moe)


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)). The feed-forward is a dense MLP or a MoE, by layer.

    With ``recompute`` activations are dropped and computed again in the backward pass (activation checkpointing),
    except the router's: it stands outside what is recomputed, so a token is routed once, counted once, and can't be
    sent elsewhere the second time.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _feed_forward(config, layer)

    def forward(
        self,
        x: Tensor,
        context: Context,
        *,
        cache: LayerCache | PagedLayer | None = None,
        valid: Tensor | None = None,
        recorder: Recorder | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """``x`` [B, T, D] -> [B, T, D]; ``valid`` [B, T] marks real tokens for the recorder."""
        run = _recomputed if recompute else _plainly
        x = decode.add(x, run(self._attend, x, context, cache))
        h = self.post_attention_layernorm(x)
        if not isinstance(self.mlp, MoE):
            return decode.add(x, run(self.mlp, h))
        routing = self.mlp.route(h)
        if recorder is not None:
            recorder.record(self.layer, _with_valid(routing, valid))
        if recorder is None or not isinstance(recorder, OutputRecorder):
            return decode.add(x, run(self.mlp, h, routing))
        routed, shared = run(self.mlp.parts, h, routing)
        recorder.record_outputs(self.layer, routed, shared)
        return x + (routed if shared is None else routed + shared)

    def compile_parts(self) -> None:
        """Has torch.compile compile attention, router and feed-forward at their next call, each for itself: routing is
        recorded and activations are recomputed between them, outside of what is compiled."""
        self.self_attn.compile(dynamic=False)
        if isinstance(self.mlp, MoE):
            self.mlp.gate.compile(dynamic=False)
        self.mlp.compile(dynamic=False)

    def _attend(self, x: Tensor, context: Context, cache: LayerCache | PagedLayer | None) -> Tensor:
        out: Tensor = self.self_attn(self.input_layernorm(x), context, cache)
        return out


def _plainly(function: Callable[..., Any], *arguments: object) -> Any:
    return function(*arguments)


def _recomputed(function: Callable[..., Any], *arguments: object) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _with_valid(routing: Routing, valid: Tensor | None) -> Routing:
    if valid is None:
        return routing
    segments = routing.indices.shape[1] // valid.shape[1]
    return Routing(routing.indices, routing.weights, routing.scores, valid.repeat_interleave(segments, dim=1))


class MTPModule(Block):
    """Multi-token prediction module (V3 paper §2.2, eq. 21-23), [B, T, D] and [B, T, D] -> [B, T, D].

        h'_i = eh_proj([enorm(embed(t_{i+1})) ; hnorm(h_i)]);   out_i = shared_head.norm(block(h')_i)

    Traps: the published weights take [embedding ; hidden] in this order, the paper's equation 21 writes the other one;
    and h_i is the main model's hidden state *after* ``model.norm``, for deeper modules the output of the one before,
    after its ``shared_head.norm``. Embedding and head are the main model's own.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(  # type: ignore[override]  # a block, but of two inputs
        self,
        hidden: Tensor,
        embedding: Tensor,
        context: Context,
        *,
        cache: PagedLayer | None = None,
        valid: Tensor | None = None,
        recorder: Recorder | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """``hidden`` h_i and ``embedding`` of the token one further, both [B, T, D] -> hidden states for the head."""
        x = self.eh_proj(decode.join(self.enorm(embedding), self.hnorm(hidden)))
        x = super().forward(x, context, cache=cache, valid=valid, recorder=recorder, recompute=recompute)
        out: Tensor = self.shared_head["norm"](x)
        return out
