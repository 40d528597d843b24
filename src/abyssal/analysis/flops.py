"""How many floating-point operations a token costs, by part of the model: worked out from the config alone.

A multiplication and an addition are 2 operations. Counted are matrix products, attention's two included; norms, rotary
embedding, softmax, SwiGLU and the optimizer, which take time by their bytes rather than by their operations, are not.
A token at position t attends to t tokens, itself included, so over a sequence of T tokens the mean is (T + 1) / 2: the
causal half. Routed experts count as often as a token chooses them.

A training step costs three times a forward pass, since every product has two in its backward pass, one for each factor.
Counted this way V3 costs 250 GFLOP and V2 155 GFLOP a token of training at a context of 4096, the figures of DeepSeek's
own account (arXiv 2505.09343, table 2). What is computed a second time on purpose (attention kernels that keep no
probabilities, activation checkpointing) is not counted: it is a price of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from abyssal.config import ModelConfig


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass a token, the mean over a sequence of ``context`` tokens; MTP modules apart."""

    context: int
    by_part: dict[str, int]
    mtp_by_part: dict[str, int]
    by_layer: tuple[int, ...]
    """Of each layer, then of each MTP module with the head that it applies once more; the main model's head is none."""

    @property
    def forward(self) -> int:
        """The main model, head included."""
        return sum(self.by_part.values())

    @property
    def mtp(self) -> int:
        """All MTP modules with the head that each applies once more."""
        return sum(self.mtp_by_part.values())

    @property
    def training(self) -> int:
        """A training step: forward and backward of the main model and the MTP modules."""
        return 3 * (self.forward + self.mtp)


def count_flops(config: ModelConfig, context: int) -> Flops:
    """Counts ``config``'s operations a token at ``context`` tokens a sequence; keys and values are expanded, as in
    training and prefill. Raises ValueError for a context below 1."""
    if context < 1:
        raise ValueError(f"context: {context} is not at least 1")
    layers, depths = config.num_hidden_layers, config.mtp.num_nextn_predict_layers
    head = 2 * config.hidden_size * config.vocab_size
    main: dict[str, int] = {}
    mtp: dict[str, int] = {}
    by_layer = []
    for layer in range(layers):
        block = _block(config, layer, context)
        by_layer.append(sum(block.values()))
        _add(main, block)
    _add(main, {"head": head})
    for layer in range(layers, layers + depths):
        projection = 2 * 2 * config.hidden_size * config.hidden_size  # eh_proj
        module = {"projection": projection, **_block(config, layer, context), "head": head}
        by_layer.append(sum(module.values()))
        _add(mtp, module)
    return Flops(context, main, mtp, tuple(by_layer))


def _block(config: ModelConfig, layer: int, context: int) -> dict[str, int]:
    a = config.attention
    qk, v = (a.head_dim, a.head_dim) if a.kind == "mha" else (a.qk_head_dim, a.v_head_dim)
    return {
        "attention projections": 2 * _projections(config),
        # 2 · (qk + v) for every token attended to, of which there are (context + 1) / 2.
        "attention scores and values": a.num_attention_heads * (qk + v) * (context + 1),
        **_feed_forward(config, layer),
    }


def _projections(config: ModelConfig) -> int:
    """Multiplications of one layer's attention projections."""
    hidden, a = config.hidden_size, config.attention
    heads = a.num_attention_heads
    if a.kind == "mha":
        return hidden * a.head_dim * 2 * (heads + a.num_key_value_heads)
    if a.q_lora_rank is None:
        queries = hidden * heads * a.qk_head_dim
    else:
        queries = a.q_lora_rank * (hidden + heads * a.qk_head_dim)
    if a.kind == "mla":
        keys_values = hidden * (a.kv_lora_rank + a.qk_rope_head_dim)
        keys_values += a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim)
    else:
        keys_values = a.k_lora_rank * (hidden + heads * a.qk_head_dim)
        keys_values += a.v_lora_rank * (hidden + heads * a.v_head_dim)
    return queries + keys_values + heads * a.v_head_dim * hidden


def _feed_forward(config: ModelConfig, layer: int) -> dict[str, int]:
    hidden, moe = config.hidden_size, config.moe
    if moe is None or not config.is_moe_layer(layer):
        return {"dense MLP": 6 * hidden * config.intermediate_size}  # gate, up and down
    # With segment routing m parts of width D/m each choose their own experts, whose matrices are D/m wide: m cancels.
    parts = {
        "router": 2 * hidden * moe.n_routed_experts,
        "routed experts": 6 * hidden * moe.moe_intermediate_size * moe.num_experts_per_tok,
    }
    if moe.n_shared_experts:
        parts["shared experts"] = 6 * hidden * moe.shared_intermediate_size
    return parts


def _add(total: dict[str, int], parts: dict[str, int]) -> None:
    for part, count in parts.items():
        total[part] = total.get(part, 0) + count
