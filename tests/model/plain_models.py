"""The whole model line in plain float64 loops, token by token and head by head, written from the papers' formulas.

Slow on purpose, and shares nothing with abyssal.model but the names of the weights. Also small configs and random
weights for the tests beside it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from abyssal.config import ModelConfig, RopeConfig, merge
from abyssal.model import Transformer

Vectors = list[Tensor]

MHA = {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6}
MLA = {
    "kind": "mla",
    "num_attention_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
}
SEPARATE = {
    "kind": "separate_latents",
    "num_attention_heads": 3,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "k_lora_rank": 8,
    "v_lora_rank": 9,
}
V1_MOE = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 5,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
}
V3_MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 5,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
YARN = {
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 2.0,
    "beta_slow": 0.2,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
_BASE = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "intermediate_size": 21,
    "max_position_embeddings": 64,
    "attention": MLA,
    "moe": V3_MOE,
}


def small(**changes: Any) -> ModelConfig:
    """A small V3-like config with ``changes`` laid over it; another kind of attention replaces the whole mapping."""
    base = dict(_BASE)
    if changes.get("attention", {}).get("kind", "mla") != "mla":
        del base["attention"]
    return ModelConfig.model_validate(merge(base, changes))


def randomised(
    config: ModelConfig, *, seed: int = 0, std: float = 0.3, dtype: torch.dtype = torch.float64, shift: float = 0.0
) -> Transformer:
    """A model whose norms, linear biases and router biases (around ``shift``) are random as well as its weights."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, generator=generator).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, std, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
        for router in model.routers.values():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.normal_(shift, 0.3, generator=generator)
    return model


def tokens_for(config: ModelConfig, batch: int, count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, count), generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


class Plain:
    """``Plain(model)``: the same config and weights, computed by loops."""

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self.state = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}

    def __call__(self, tokens: list[int]) -> Tensor:
        """Logits [T, V]."""
        return self.head(self.hidden(tokens))

    def head(self, hidden: Vectors) -> Tensor:
        tied = self.config.tie_word_embeddings
        weight = self.state["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return torch.stack([weight @ h for h in hidden])

    def hidden(self, tokens: list[int]) -> Vectors:
        """After model.norm."""
        x = [self.state["model.embed_tokens.weight"][token] for token in tokens]
        for layer in range(self.config.num_hidden_layers):
            x = self.block(layer, x)
        return [self.norm("model.norm", v) for v in x]

    def mtp(self, tokens: list[int]) -> list[Tensor]:
        """Logits of each MTP module; ``tokens`` go on for as many as there are modules."""
        depth = self.config.mtp.num_nextn_predict_layers
        count = len(tokens) - depth
        hidden, out = self.hidden(tokens[:count]), []
        for k in range(1, depth + 1):
            layer = self.config.num_hidden_layers + k - 1
            name = f"model.layers.{layer}"
            x = []
            for i in range(count):
                embedding = self.norm(f"{name}.enorm", self.state["model.embed_tokens.weight"][tokens[i + k]])
                before = self.norm(f"{name}.hnorm", hidden[i])
                weight = self.state[f"{name}.eh_proj.weight"]
                width = self.config.hidden_size
                x.append(weight[:, :width] @ embedding + weight[:, width:] @ before)
            hidden = [self.norm(f"{name}.shared_head.norm", v) for v in self.block(layer, x)]
            out.append(self.head(hidden))
        return out

    def block(self, layer: int, x: Vectors) -> Vectors:
        name = f"model.layers.{layer}"
        attended = self.attention(f"{name}.self_attn", [self.norm(f"{name}.input_layernorm", v) for v in x])
        x = [a + b for a, b in zip(x, attended, strict=True)]
        h = [self.norm(f"{name}.post_attention_layernorm", v) for v in x]
        return [a + self.feed_forward(f"{name}.mlp", layer, b) for a, b in zip(x, h, strict=True)]

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        eps = self.config.rms_norm_eps if eps is None else eps
        return self.state[f"{name}.weight"] * x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + eps)

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.state[f"{name}.weight"] @ x
        return y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def swiglu(self, name: str, x: Tensor) -> Tensor:
        gate = self.linear(f"{name}.gate_proj", x)
        return self.linear(f"{name}.down_proj", gate / (1 + torch.exp(-gate)) * self.linear(f"{name}.up_proj", x))

    def feed_forward(self, name: str, layer: int, x: Tensor) -> Tensor:
        moe = self.config.moe
        if moe is None or layer < moe.first_k_dense_replace or layer % moe.moe_layer_freq:
            return self.swiglu(name, x)
        width = len(x) // moe.segments
        out = torch.cat([self.routed(name, x[i * width : (i + 1) * width]) for i in range(moe.segments)])
        return out + self.swiglu(f"{name}.shared_experts", x) if moe.n_shared_experts else out

    def routed(self, name: str, x: Tensor) -> Tensor:
        moe = self.config.moe
        assert moe is not None
        bias = self.state.get(f"{name}.gate.e_score_correction_bias")
        logits = [float(row @ x) for row in self.state[f"{name}.gate.weight"]]
        chosen = route(moe, logits, None if bias is None else bias.tolist())
        out = torch.zeros_like(x)
        for expert, weight in chosen.items():
            both = self.state[f"{name}.experts.gate_up_proj"][expert]
            gate, up = both[: moe.moe_intermediate_size] @ x, both[moe.moe_intermediate_size :] @ x
            out = out + weight * (
                self.state[f"{name}.experts.down_proj"][expert] @ (gate / (1 + torch.exp(-gate)) * up)
            )
        return out

    def attention(self, name: str, x: Vectors) -> Vectors:
        a, rope = self.config.attention, self.config.rope
        heads, mixed = a.num_attention_heads, []
        keys: list[list[Tensor]] = []
        values: list[list[Tensor]] = []
        queries: list[list[Tensor]] = []
        scale = 1 / math.sqrt(a.head_dim if a.kind == "mha" else a.qk_nope_head_dim + a.qk_rope_head_dim)
        if a.kind != "mha" and rope.yarn is not None:
            scale *= mscale(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2
        for t, h in enumerate(x):
            if a.kind == "mha":
                shared = heads // a.num_key_value_heads
                q = self.linear(f"{name}.q_proj", h).split(a.head_dim)
                k = self.linear(f"{name}.k_proj", h).split(a.head_dim)
                v = self.linear(f"{name}.v_proj", h).split(a.head_dim)
                queries.append([turned(rope, part, t) for part in q])
                keys.append([turned(rope, k[i // shared], t) for i in range(heads)])
                values.append([v[i // shared] for i in range(heads)])
                continue
            nope, turning = a.qk_nope_head_dim, a.qk_rope_head_dim
            if a.q_lora_rank is None:
                q = self.linear(f"{name}.q_proj", h)
            else:
                q = self.norm(f"{name}.q_a_layernorm", self.linear(f"{name}.q_a_proj", h), 1e-6)
                q = self.linear(f"{name}.q_b_proj", q)
            queries.append([torch.cat((p[:nope], turned(rope, p[nope:], t))) for p in q.split(nope + turning)])
            if a.kind == "mla":
                down = self.linear(f"{name}.kv_a_proj_with_mqa", h)
                latent = self.norm(f"{name}.kv_a_layernorm", down[: a.kv_lora_rank], 1e-6)
                shared_key = turned(rope, down[a.kv_lora_rank :], t)
                both = self.linear(f"{name}.kv_b_proj", latent).split(nope + a.v_head_dim)
                keys.append([torch.cat((part[:nope], shared_key)) for part in both])
                values.append([part[nope:] for part in both])
            else:
                k_latent = self.norm(f"{name}.k_a_layernorm", self.linear(f"{name}.k_a_proj", h), 1e-6)
                v_latent = self.norm(f"{name}.v_a_layernorm", self.linear(f"{name}.v_a_proj", h), 1e-6)
                k = self.linear(f"{name}.k_b_proj", k_latent).split(nope + turning)
                keys.append([torch.cat((p[:nope], turned(rope, p[nope:], t))) for p in k])
                values.append(list(self.linear(f"{name}.v_b_proj", v_latent).split(a.v_head_dim)))
        for t in range(len(x)):
            parts = []
            for i in range(heads):
                e = [math.exp(scale * float(queries[t][i] @ keys[j][i])) for j in range(t + 1)]
                parts.append(sum(e[j] / sum(e) * values[j][i] for j in range(t + 1)))
            mixed.append(self.linear(f"{name}.o_proj", torch.cat(parts)))
        return mixed


def mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def frequencies(rope: RopeConfig, dim: int) -> list[float]:
    """Radians a position of each pair of dimensions (YaRN, arXiv 2309.00071, with DeepSeek's rounding of the ramp)."""
    plain = [rope.theta ** (-2 * i / dim) for i in range(dim // 2)]
    yarn = rope.yarn
    if yarn is None:
        return plain

    def pair_that_makes(rotations: float) -> float:  # solves length · theta^(-2i/dim) = 2π · rotations for i
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_that_makes(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_that_makes(yarn.beta_slow)), dim - 1)
    out = []
    for i, f in enumerate(plain):
        slowed = min(max((i - first) / (last - first if last != first else 0.001), 0.0), 1.0)
        out.append(f * (1 - slowed) + f / yarn.factor * slowed)
    return out


def turned(rope: RopeConfig, x: Tensor, position: int) -> Tensor:
    amplitude = 1.0
    if rope.yarn is not None:
        amplitude = mscale(rope.yarn.factor, rope.yarn.mscale) / mscale(rope.yarn.factor, rope.yarn.mscale_all_dim)
    out = x.clone()
    for i, f in enumerate(frequencies(rope, len(x))):
        a, b = (2 * i, 2 * i + 1) if rope.layout == "interleaved" else (i, i + len(x) // 2)
        cos, sin = amplitude * math.cos(f * position), amplitude * math.sin(f * position)
        out[a], out[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return out


def scores_of(moe: Any, logits: list[float]) -> list[float]:
    if moe.scoring_func == "sigmoid":
        return [1 / (1 + math.exp(-v)) for v in logits]
    total = sum(math.exp(v) for v in logits)
    return [math.exp(v) / total for v in logits]


def kept_experts(moe: Any, choice: list[float]) -> list[int]:
    """The experts in the groups that stay in, by plain sorting."""
    experts = len(choice)
    if moe.topk_method == "greedy":
        return list(range(experts))
    size = experts // moe.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(moe.n_group)]

    def strength(group: list[int]) -> float:
        best = sorted((choice[e] for e in group), reverse=True)
        return sum(best[:2]) if moe.topk_method == "noaux_tc" else best[0]

    groups = sorted(groups, key=strength, reverse=True)[: moe.topk_group] if moe.n_group > 1 else groups
    return sorted(e for group in groups for e in group)


def route(moe: Any, logits: list[float], bias: list[float] | None) -> dict[int, float]:
    """Expert -> weight, best first (V3 paper eq. 12-16, V2 paper §2.2; FACTS)."""
    scores = scores_of(moe, logits)
    choice = [s + b for s, b in zip(scores, bias, strict=True)] if bias is not None else scores
    best = sorted(kept_experts(moe, choice), key=lambda e: choice[e], reverse=True)[: moe.num_experts_per_tok]
    total = sum(scores[e] for e in best) if moe.norm_topk_prob else 1.0
    return {e: scores[e] / total * moe.routed_scaling_factor for e in best}


def margin(moe: Any, scores: list[float], bias: list[float] | None) -> float:
    """How far the nearest runner-up, group or expert, was from being chosen (relative to 1 or to the score)."""
    choice = [s + b for s, b in zip(scores, bias, strict=True)] if bias is not None else scores
    gaps = [1.0]
    if moe.topk_method != "greedy" and moe.n_group > 1:
        size = len(choice) // moe.n_group
        best = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(moe.n_group)]
        strength = sorted((sum(b[:2]) if moe.topk_method == "noaux_tc" else b[0] for b in best), reverse=True)
        if moe.topk_group < moe.n_group:
            gaps.append(
                (strength[moe.topk_group - 1] - strength[moe.topk_group]) / _size(moe, strength[moe.topk_group])
            )
    ranked = sorted((choice[e] for e in kept_experts(moe, choice)), reverse=True)
    if moe.num_experts_per_tok < len(ranked):
        k = moe.num_experts_per_tok
        gaps.append((ranked[k - 1] - ranked[k]) / _size(moe, ranked[k]))
    return min(gaps)


def _size(moe: Any, score: float) -> float:
    return score if moe.scoring_func == "softmax" else 1.0  # softmax rounds relative to itself
