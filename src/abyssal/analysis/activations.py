"""Activation memory: the bytes that autograd keeps from the forward pass of a training step until its backward pass.

Derived term by term from the config and from what the package's own operations save (:mod:`abyssal.kernels`): a test
counts the storages that real steps save and compares. An operation keeps what its gradient needs, and what several of
them keep is one storage. Per token, with D hidden, H heads of qk query/key and V value dimensions, F width of a
feed-forward part, b bytes a number in products (2 in BF16) and r in the residual stream:

- A norm keeps its input (r·D) and one FP32 number; its output (b·D) is what the projections behind it keep.
- The residual stream starts at the FP32 embedding, so it stays FP32 while products run in BF16 (r = 4); in an MTP
  module it starts at a BF16 projection (r = 2).
- MLA keeps its compressed query and latent, each before and after its norm. Rotation keeps only its tables.
- Attention keeps q, k, v, its output and the logarithm of each row's sum of exponentials (FP32). Values narrower than
  keys are padded to qk for it; then its output is padded too, and the cut copy that o_proj keeps comes on top.
- SwiGLU keeps [gate ; up] (b·2F) and its output (b·F), the last projection's input; the two projections' own outputs
  are gone once they stand side by side.
- The router works in FP32: in BF16 training it keeps an FP32 copy of its input (4·D), the scores of all experts, the
  chosen indices (8 bytes each) and their weights before and after normalisation.
- Routed experts work on a buffer of P rows, one for each of the N·K assignments and the padding: b·(D + 3F) + 8 a row.
  How evenly experts are used does not matter, but for the padding.
- The loss holds its gradients instead of logits: of the hidden states (b·D) and of the head (V·D, FP32 unless all
  tokens are one chunk), once for the main model and once for each MTP module.

With ``recompute`` each block keeps both residual states, the router's part and the feed-forward's input; the rest is
worked out again in the backward pass, for one block's attention or feed-forward part at a time.

Tensor parallelism divides what is by heads, by width or by vocabulary; residual stream, norms, latents, router and
rows are on every rank (no sequence parallelism). Under expert parallelism a rank's buffer holds the rows that the group
sends to its experts: with even loads as many as its own tokens send out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from abyssal.config import ModelConfig, MoEConfig
from abyssal.config.parallel import stage_layers

# What the kernels do, which the tests hold in step with them: rows that an expert's part of the buffer is padded to
# (kernels/grouped.py), and how many logits stand in memory at once (kernels/loss.py).
_GPU_ROWS, _CPU_BF16_ROWS = 8, 32
_CHUNK_LOGITS, _CHUNK_ROWS = 2**24, 256
_BLOCK_QUERIES = 1024  # up to so many the CPU's own BF16 attention runs (kernels/attention.py)

ADAPTABLE = ("attention", "mlp", "shared", "experts")


@dataclass(frozen=True)
class Adapters:
    """What is trained of a model that is frozen otherwise, MTP modules included, which do not run then.

    LoRA: adapters of ``rank`` on all projections of these parts. ESFT (:meth:`esft`): a ``share`` of the routed experts
    themselves.
    """

    rank: int
    parts: tuple[str, ...] = ADAPTABLE
    share: float = 0.0

    @classmethod
    def esft(cls, share: float) -> Adapters:
        return cls(0, ("experts",), share)


@dataclass(frozen=True)
class StepShape:
    """A micro-batch on one GPU: what activation memory depends on beside the model."""

    batch: int
    sequence: int
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    tensor: int = 1
    expert: int = 1
    adapters: Adapters | None = None

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def width(self) -> int:
        """Bytes of a number in products."""
        return 2 if self.dtype == "bfloat16" else 4

    def trains(self, part: str) -> bool:
        """Whether the inputs of ``part``'s projections are kept for the gradient of a weight or adapter."""
        return self.adapters is None or part in self.adapters.parts


@dataclass(frozen=True)
class BlockActivations:
    """What one block keeps, in bytes by term: its attention part, its feed-forward part, and what lies outside both
    and is never recomputed. ``working`` are the gradients that stand at once in the backward pass of a part."""

    outside: dict[str, int]
    attention: dict[str, int]
    feed_forward: dict[str, int]
    recompute: bool
    working: int

    @property
    def kept(self) -> dict[str, int]:
        """What stays until the block's backward pass, by term."""
        return self.outside if self.recompute else total(self.outside, self.attention, self.feed_forward)

    @property
    def recomputed(self) -> int:
        """The larger part's bytes, worked out again for its backward pass; 0 without ``recompute``."""
        return max(sum(self.attention.values()), sum(self.feed_forward.values())) if self.recompute else 0


@dataclass(frozen=True)
class Activations:
    """Bytes of a whole model's step by term; ``recomputed`` and ``working``: of the largest part, for its backward
    pass."""

    by_term: dict[str, int] = field(default_factory=dict)
    recomputed: int = 0
    working: int = 0

    @property
    def kept(self) -> int:
        """Bytes that autograd holds when the forward pass is done."""
        return sum(self.by_term.values())

    @property
    def peak(self) -> int:
        """``kept``, and what the backward pass needs beside it at most."""
        return self.kept + self.recomputed + self.working


def total(*parts: Mapping[str, int]) -> dict[str, int]:
    """The sum of mappings, term by term, without terms of nothing."""
    out: dict[str, int] = {}
    for part in parts:
        for term, count in part.items():
            out[term] = out.get(term, 0) + count
    return {term: count for term, count in out.items() if count}


def count_activations(config: ModelConfig, step: StepShape, pipeline: int = 1, stage: int = 0) -> Activations:
    """Derives what ``stage`` of ``pipeline`` keeps of one micro-batch; by default that is all of the model, MTP modules
    and loss included."""
    depths, last = config.mtp.num_nextn_predict_layers, stage == pipeline - 1
    layers = stage_layers(config, pipeline, stage)
    if step.adapters is not None:
        depths, layers = 0, range(layers.start, min(layers.stop, config.num_hidden_layers))
    kinds = Counter(block_kind(config, layer) for layer in layers)
    example = {block_kind(config, layer): layer for layer in range(config.num_hidden_layers + depths)}
    blocks = {kind: block_activations(config, example[kind], step) for kind in kinds}
    tables = rotary_tables(config, step)
    kept = [{term: count * kinds[kind] for term, count in block.kept.items()} for kind, block in blocks.items()]
    kept.append(tables)
    working = [block.working for block in blocks.values()]
    if last:
        kept.append(final_norm(config, step))
        kept += [loss_activations(config, step)] * (depths + 1) + [mtp_input(config, step)] * depths
        kept += [tables] if depths else []
        working.append(loss_working(config, step))
    return Activations(total(*kept), max(block.recomputed for block in blocks.values()), max(working))


def block_kind(config: ModelConfig, layer: int) -> tuple[bool, bool]:
    """What makes blocks differ: whether it is a MoE layer, and whether it is an MTP module's."""
    return config.is_moe_layer(layer), layer >= config.num_hidden_layers


def block_activations(config: ModelConfig, layer: int, step: StepShape) -> BlockActivations:
    """What block ``layer`` keeps (MTP modules continue the count)."""
    n, b, hidden = step.tokens, step.width, config.hidden_size
    residual = b if layer >= config.num_hidden_layers else 4
    attention = _attention(config, step)
    h_kept = step.trains("attention")
    attention["norms"] += n * (b * hidden * h_kept + 4)
    outside = {"residual stream": 2 * n * residual * hidden, "norms": 4 * n}
    moe = config.moe if config.is_moe_layer(layer) else None
    if moe is None:
        kept_h = step.recompute or step.trains("mlp")
        feed_forward = _mlp(config.intermediate_size, step, "mlp")
        widest = max(3 * config.intermediate_size // step.tensor, 2 * config.intermediate_size // step.tensor + hidden)
        working = n * b * widest
    else:
        # The routed experts read gathered copies; it is the shared experts, and in FP32 the router, that keep h itself.
        shared = moe.n_shared_experts > 0 and step.trains("shared")
        router_reads_h = step.dtype == "float32" and step.adapters is None
        kept_h = step.recompute or shared or router_reads_h
        outside = total(outside, _router(config, moe, step))
        rows = expert_rows(moe, step)
        feed_forward = _experts(config, moe, step, rows)
        if moe.n_shared_experts:
            feed_forward = total(feed_forward, _mlp(moe.shared_intermediate_size, step, "shared"))
        width, part = moe.moe_intermediate_size // step.tensor, hidden // moe.segments
        working = rows * b * max(3 * width, 2 * width + part)
    outside = total(outside, {"norms": n * b * hidden * kept_h})
    # Gradients of the residual stream and of a norm's output stand beside whatever else the backward pass works on.
    working = max(working, _attention_working(config, step)) + n * (residual + b) * hidden
    return BlockActivations(outside, total(attention), total(feed_forward), step.recompute, working)


def expert_rows(moe: MoEConfig, step: StepShape) -> int:
    """Rows of a MoE layer's sorted buffer. On a GPU it is as long as padding can make it; on a CPU in BF16 an expert's
    last tile is half empty on average; FP32 has no padding there."""
    assignments = step.tokens * moe.segments * moe.num_experts_per_tok
    local = -(-moe.n_routed_experts // step.expert)
    if step.device == "cuda":
        return -(-(assignments + local * (_GPU_ROWS - 1)) // _GPU_ROWS) * _GPU_ROWS
    return assignments + (local * _CPU_BF16_ROWS // 2 if step.dtype == "bfloat16" else 0)


def _attention(config: ModelConfig, step: StepShape) -> dict[str, int]:
    """What attention keeps behind the norm before it."""
    a, n, b, t = config.attention, step.tokens, step.width, step.tensor
    heads, trains = a.num_attention_heads // t, step.trains("attention")
    rank = step.adapters.rank if step.adapters and trains else 0
    norms = latents = 0
    if a.kind == "mha":
        qk = v = a.head_dim
        kv_heads, adapted = a.num_key_value_heads // t, 4
    else:
        qk, v, kv_heads, adapted = a.qk_head_dim, a.v_head_dim, heads, 4
        norms += 4 * n if a.kind == "mla" else 8 * n
        ranks = [a.kv_lora_rank] if a.kind == "mla" else [a.k_lora_rank, a.v_lora_rank]
        if a.q_lora_rank is not None:
            norms += 4 * n
            ranks.append(a.q_lora_rank)
            adapted += 1
        adapted += a.kind == "separate_latents"
        rotary = a.qk_rope_head_dim if a.kind == "mla" else 0  # it lies beside the latent that its norm keeps
        latents = n * b * (sum(ranks) * (2 if trains else 1) + rotary)
    blocks = step.device == "cpu" and step.dtype == "bfloat16" and step.sequence <= _BLOCK_QUERIES and kv_heads == heads
    if blocks:  # kernels/attention.py: values are not padded, and the output itself is not kept
        values, output = v, v
    elif v < qk:
        values, output = qk, qk + v
    else:
        # On a GPU the values are a view of kv_b_proj's output, where every head's key lies beside them.
        values = v + (a.qk_nope_head_dim if a.kind == "mla" and step.device == "cuda" else 0)
        # The output lies as the queries do: token by token, which o_proj reads as it is; but head by head behind the
        # CPU kernel that turns MLA's queries, so o_proj keeps a copy.
        output = 2 * v if a.kind != "mha" and step.device == "cpu" else v
    return {
        "norms": norms,
        "latents": latents,
        "queries, keys, values": n * b * (heads * qk + kv_heads * (qk + values)),
        "attention output": n * (b * heads * output + 4 * heads),
        "adapters": n * b * rank * adapted,
    }


def _attention_working(config: ModelConfig, step: StepShape) -> int:
    """Gradients of q, k, v and the output, and FlashAttention's FP32 sum for the queries."""
    a = config.attention
    qk, v = (a.head_dim, a.head_dim) if a.kind == "mha" else (a.qk_head_dim, a.v_head_dim)
    return step.tokens * (a.num_attention_heads // step.tensor) * (step.width * (2 * qk + 2 * max(qk, v)) + 4 * qk)


def _mlp(width: int, step: StepShape, part: str) -> dict[str, int]:
    n, b, f = step.tokens, step.width, width // step.tensor
    rank = step.adapters.rank if step.adapters and step.trains(part) else 0
    return {
        "gate and up": n * b * 2 * f,
        "SwiGLU output": n * b * f * step.trains(part),
        "adapters": 3 * n * b * rank,
    }


def _router(config: ModelConfig, moe: MoEConfig, step: StepShape) -> dict[str, int]:
    choices, chosen = step.tokens * moe.segments, moe.num_experts_per_tok
    copy = 4 * step.tokens * config.hidden_size if step.dtype != "float32" and step.adapters is None else 0
    normalised = 4 * choices * (chosen + 1) if moe.norm_topk_prob else 0
    # Indices, and the weights that experts are multiplied by; the scores.
    return {"router": copy + choices * (12 * chosen + 4 * moe.n_routed_experts) + normalised}


def _experts(config: ModelConfig, moe: MoEConfig, step: StepShape, rows: int) -> dict[str, int]:
    b, part, f = step.width, config.hidden_size // moe.segments, moe.moe_intermediate_size // step.tensor
    rank = step.adapters.rank if step.adapters and step.trains("experts") else 0
    assignments = step.tokens * moe.segments * moe.num_experts_per_tok
    return {
        "expert rows": rows * (b * part + 8) + 4 * assignments,  # 8: a row's weight and its assignment
        "gate and up": rows * b * 2 * f,
        "SwiGLU output": rows * b * f,
        "adapters": 2 * rows * b * rank,
    }


def final_norm(config: ModelConfig, step: StepShape) -> dict[str, int]:
    """The norm behind the last block."""
    return {"residual stream": 4 * step.tokens * config.hidden_size, "norms": 4 * step.tokens}


def mtp_input(config: ModelConfig, step: StepShape) -> dict[str, int]:
    """What an MTP module keeps beside its block: the embedding (FP32) and the hidden state before their norms, both
    side by side behind them, and the input of its last norm."""
    n, b, hidden = step.tokens, step.width, config.hidden_size
    return {"MTP inputs": n * (4 + b + 2 * b * step.trains("mtp") + b) * hidden, "norms": 12 * n}


def loss_activations(config: ModelConfig, step: StepShape) -> dict[str, int]:
    """The gradients that the loss holds, of the main model or one MTP module."""
    whole = _chunk(config, step) >= step.tokens
    vocabulary = config.vocab_size // step.tensor if step.adapters is None else 0
    head = (step.width if whole else 4) * vocabulary * config.hidden_size
    return {"loss: hidden gradient": step.tokens * step.width * config.hidden_size, "loss: head gradient": head}


def loss_working(config: ModelConfig, step: StepShape) -> int:
    """A chunk of logits, and one chunk's part of the head's gradient."""
    vocabulary = config.vocab_size // step.tensor
    logits = min(_chunk(config, step), step.tokens) * vocabulary
    return step.width * (logits + vocabulary * config.hidden_size)


def rotary_tables(config: ModelConfig, step: StepShape) -> dict[str, int]:
    """Cosine and sine of all positions, FP32: once for the main model and once for all MTP modules."""
    return {"rotary tables": 4 * step.sequence * config.attention.rotary_dim}


def _chunk(config: ModelConfig, step: StepShape) -> int:
    return max(_CHUNK_LOGITS // (config.vocab_size // step.tensor), _CHUNK_ROWS)
