# %% [markdown]
# # Misreadings
#
# Fourteen statements about DeepSeek's models that circulate in posts, videos and documentation, and are wrong. Each
# section gives the claim, works out what is right, and says where the claim comes from, where that can be guessed.
# That is the useful part: most are slips that anyone makes once, a matrix forgotten or two widths that happen to be
# equal.
#
# Shapes come from the published `config.json` files: models are built from them on the meta device, which has shapes
# but no memory, and counted there; claims about behaviour are tested on a small model. The only numbers written down
# are the claimed ones, and published ones that a result is compared with.
#
# **How to use it:** read each claim, and before you run its cell, say what you think and why.

# %%
from fractions import Fraction

import torch
from checks import Checks

from abyssal.analysis.blueprint import blueprint
from abyssal.analysis.cache import cache_size
from abyssal.analysis.parameters import count_parameters
from abyssal.analysis.precision import count_precisions, published_plan
from abyssal.config import preset, resolve_model
from abyssal.data.loader import Batch
from abyssal.model import Cache, RoutingRecorder, Transformer
from abyssal.model.adapting import add_lora
from abyssal.model.cache import cached_shapes
from abyssal.model.rotary import inverse_frequencies
from abyssal.training.recipe import BalanceConfig, OptimizerConfig
from abyssal.training.step import TrainingStep

check = Checks()
config = preset("deepseek-v3")
v3 = blueprint(config)  # all tensors of V3, without numbers
counts = count_parameters(config)
block = v3.blocks[-1]  # a layer with experts
attention, experts = block.self_attn, block.mlp.experts


def near(value, claimed, within=0.02):
    """Whether a figure is the claimed one, up to rounding."""
    return abs(value / claimed - 1) < within


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


print(f"V3: {counts.total:,} parameters in {len(v3.blocks)} layers, MTP module not counted")

# %% [markdown]
# ## 1. "An expert of V3 has about 18M (or 29M) parameters"
#
# **Right: 44.04M.** An expert is a SwiGLU network, and that has *three* matrices of 7168 × 2048: gate, up and down.
# Two of them are 29M: whoever says so has the classic FFN in mind, which has no gate.

# %%
matrix = config.hidden_size * config.moe.moe_intermediate_size
expert = count(experts) // config.moe.n_routed_experts
print("gate_up_proj", list(experts.gate_up_proj.shape), " down_proj", list(experts.down_proj.shape))
print(f"one expert: {expert:,} = {expert / matrix:.0f} × {matrix:,}; two matrices would be {2 * matrix:,}")
check("1. an expert has three matrices, 44.04M", expert == 3 * matrix and near(expert, 44.04e6, 1e-3), f"{expert:,}")
check("   not 18M, not 29M", not near(expert, 18e6) and not near(expert, 29e6))

# %% [markdown]
# ## 2. "7.4B expert parameters a layer"
#
# **Right: 11.27B.** The same slip, multiplied: 256 × 29.36M is 7.5B, and cut to 29M first, 7.4B.

# %%
routed = counts.layers[-1].by_part["routed experts"]
print(f"routed experts of a layer: {routed:,} = {config.moe.n_routed_experts} × {expert:,}")
print(f"with two matrices each: {config.moe.n_routed_experts * 2 * matrix:,}")
check("2. a layer's routed experts have 11.27B", near(routed, 11.27e9, 1e-3), f"{routed / 1e9:.2f}B")
check("   not 7.4B", not near(routed, 7.4e9))

# %% [markdown]
# ## 3. "Queries go 7168 → 1536 → 16384, keys and values 7168 → 512 → 16384"
#
# **Right: → 24576, and → 32768, with 64 rotary numbers beside the 512.** 16384 is 128 heads × 128. But a query has
# 128 numbers without position *and* 64 with it, 128 × 192 = 24576. From the latent come keys *and* values, 128 × (128
# + 128) = 32768. The 64 numbers of the rotary key come straight from the hidden vector, once for all heads.

# %%
a = config.attention
for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"):
    module = getattr(attention, name)
    print(f"{name:19} {module.in_features:6} → {module.out_features}")
claimed = a.num_attention_heads * a.qk_nope_head_dim
queries, keys_values = attention.q_b_proj.out_features, attention.kv_b_proj.out_features
H, both = a.num_attention_heads, a.qk_nope_head_dim + a.v_head_dim
print(f"\n{H} heads × (nope {a.qk_nope_head_dim} + rotary {a.qk_rope_head_dim}) = {H * a.qk_head_dim}")
print(f"{H} heads × (nope {a.qk_nope_head_dim} + value {a.v_head_dim}) = {H * both}")
print(f"{H} heads × {a.qk_nope_head_dim} = {claimed}, as claimed")
check("3. queries have 24576 outputs, keys and values 32768", (queries, keys_values) == (24576, 32768))
extra = attention.kv_a_proj_with_mqa.out_features - a.kv_lora_rank
check("   beside the latent's 512 there are 64 rotary numbers", (a.kv_lora_rank, extra) == (512, 64))
check("   not 16384", 16384 not in (queries, keys_values))

# %% [markdown]
# ## 4. "62.78% of V3 is in FP8, 37.22% in BF16, the shared expert among the latter"
#
# **Right: 99.71% in FP8, shared experts included.** All matrices of attention, dense MLPs, routed and shared experts
# are FP8. BF16 is for embedding, head, norms and routers: a list that sounds long (V3's paper, §3.3.1, has it for
# training) and holds few of the numbers.

# %%
precisions = count_precisions(config, published_plan(config))
print(f"{'part':16} {'FP8':>16} {'BF16':>14} {'FP32':>7}")
for part, by_dtype in precisions.by_part.items():
    columns = (by_dtype.get(dtype, 0) for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32))
    print("{:16} {:16,} {:14,} {:7,}".format(part, *columns))
fp8 = precisions.by_dtype[torch.float8_e4m3fn].parameters / precisions.parameters
names = {dtype: share.tensors for dtype, share in precisions.by_dtype.items()}
print(f"\nFP8: {fp8:.2%} of the parameters, {names[torch.float8_e4m3fn]:,} of {sum(names.values()):,} tensors")
shared = precisions.by_part["shared experts"]
check("4. 99.71% of V3's parameters are FP8", near(fp8, 0.9971, 1e-4), f"{fp8:.2%}")
check("   the shared experts among them", list(shared) == [torch.float8_e4m3fn])
check("   not 62.78%", not near(fp8, 0.6278))

# %% [markdown]
# ## 5. "Attention has about 500M parameters a layer"
#
# **Right: 187.1M.** Ordinary attention with 128 heads of 128 would have 470M. That the projections go through narrow
# latents saves parameters as well as cache.

# %%
in_layer = counts.layers[-1].by_part["attention"]
heads = {"kind": "mha", "num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 128}
ordinary = resolve_model({"preset": "deepseek-v3", "attention": heads, "rope": {"yarn": None}})
as_mha = count_parameters(ordinary).layers[-1].by_part["attention"]
for name, parameter in attention.named_parameters():
    print(f"{name:27} {list(parameter.shape)!s:15} {parameter.numel():12,}")
print(f"MLA {in_layer:,} a layer; MHA with as many heads of 128 {as_mha:,}")
check("5. MLA has 187.1M a layer", near(in_layer, 187.1e6, 1e-3), f"{in_layer / 1e6:.1f}M")
check("   not 500M", not near(in_layer, 500e6))

# %% [markdown]
# ## 6. "Yxanul's mini experts have 2M each, 16M in all; low-rank queries save 87%, low-rank attention 42M in all"
#
# **Right: 1.18M each (0.79M without a gate), 264M over 28 layers; 67%; 39.9M.** 8 × 2M = 16M is one layer's, and
# there are 28. And a low rank has to come up again: what goes down from 768 to 128 must return to 768, so both
# matrices count.

# %%
mini, low_rank, dense = (preset(f"yxanul-197m{suffix}") for suffix in ("-mini-moe", "-low-rank", ""))
mini_counts = count_parameters(mini)
layers, width = mini.num_hidden_layers, mini.hidden_size * mini.moe.moe_intermediate_size
in_all = mini_counts.by_part["routed experts"]
each = in_all // layers // mini.moe.n_routed_experts
print(f"an expert: {each:,} = {each // width} matrices of {width:,}; two would be {2 * width:,}")
print(f"{layers} layers × {mini.moe.n_routed_experts} experts: {in_all:,}")
low, full = blueprint(low_rank).blocks[0].self_attn, blueprint(dense).blocks[0].self_attn
down, up = low.q_a_proj.weight.numel(), low.q_b_proj.weight.numel()
saved = 1 - (down + up) / full.q_proj.weight.numel()
print(f"queries: {full.q_proj.weight.numel():,} become {down:,} + {up:,}: {saved:.1%} saved")
in_attention = [count_parameters(c).by_part["attention"] for c in (dense, low_rank)]
less = in_attention[0] - in_attention[1]
print(f"attention over all layers: {in_attention[0]:,} become {in_attention[1]:,}: {less:,} saved")
check("6. a mini expert has 1.18M, all of them 264M", near(each, 1.18e6, 1e-2) and near(in_all, 264e6, 1e-2))
check("   not 2M and 16M", not near(each, 2e6) and not near(in_all, 16e6))
check("   low-rank queries save 67%, not 87%", near(saved, 0.67, 0.01) and not near(saved, 0.87), f"{saved:.1%}")
right = near(less, 39.9e6, 2e-3) and not near(less, 42e6)
check("   low-rank attention saves 39.9M, not 42M", right, f"{less / 1e6:.1f}M")

# %% [markdown]
# ## 7. "36.7B active parameters, embedding and head included" (V3's own README_WEIGHTS)
#
# **Right: 37.55B with both, 36.63B without the input embedding.** A token uses all of the head, but of the input
# embedding one row: a lookup. Which of the two figures is meant has to be said.

# %%
print(f"embedding and head, each: {counts.by_part['embedding']:,}")
print(f"active with both {counts.active:,}, without the input embedding {counts.active_without_embedding:,}")
missing = counts.active - 36.7e9
check("7. with both it is 37.55B", near(counts.active, 37.55e9, 1e-3), f"{counts.active / 1e9:.2f}B")
check("   36.63B without the input embedding", near(counts.active_without_embedding, 36.63e9, 1e-3))
check("   36.7B is not the count with both", not near(counts.active, 36.7e9), f"{missing / 1e9:.2f}B too few")

# %% [markdown]
# ## 8. "The router's decisions are cached between tokens"
#
# **Right: each token routes anew.** What is cached is attention's: latents and rotary keys. A decision is made from
# the token's own hidden vector in this layer, and so anew for each token and layer.
#
# The test: a small model reads 32 tokens at once and then, with a cache, writes 32 more one at a time. If decisions
# were carried over, all experts of one token would be those of the next. If they are made anew, they must be the same
# as when all 64 tokens are read at once, without any cache. (Two of eight experts agree by chance in a quarter of the
# choices; in an untrained model in more, since the vectors of all tokens have a part in common.)

# %%
demo = preset("demo")
model = Transformer(demo, generator=torch.Generator().manual_seed(0)).double()
tokens = torch.randint(demo.vocab_size, (4, 64), generator=torch.Generator().manual_seed(1))
whole, stepwise = RoutingRecorder(), RoutingRecorder()
with torch.no_grad():
    model(tokens, recorder=whole)
    cache = Cache(demo, batch=4, max_length=64, dtype=torch.float64)
    model(tokens[:, :32], cache=cache)
    for t in range(32, 64):
        model(tokens[:, t : t + 1], cache=cache, recorder=stepwise)


def by_expert(indices):
    """[B, T, E] bool: which experts a token uses."""
    return torch.zeros(*indices.shape[:2], demo.moe.n_routed_experts, dtype=torch.bool).scatter(-1, indices, True)


agreements, overlaps = [], []
for layer, steps in stepwise.routings.items():
    decoded = by_expert(torch.cat([routing.indices for routing in steps], dim=1))
    agreements.append(torch.equal(decoded, by_expert(whole.routings[layer][0].indices[:, 32:])))
    overlap = (decoded[:, 1:] & decoded[:, :-1]).sum(-1).double().mean().item() / demo.moe.num_experts_per_tok
    overlaps.append(overlap)
    print(f"layer {layer}: {len(steps)} decisions in 32 steps; {overlap:.0%} of a token's experts are the last one's")
kept = {tensor.dtype for layer in cache.layers for tensor in layer.tensors}
print("what the cache holds, a token and layer:", cached_shapes(demo), "of", *kept)
check("8. decoding decides as reading all at once does", all(agreements), f"{len(agreements)} layers × 128 tokens")
check("   the experts of consecutive tokens differ", max(overlaps) < 0.75, f"{max(overlaps):.0%} are the same")
only_latents = cached_shapes(demo) == [(demo.attention.cached_values,)] and kept == {torch.float64}
check("   the cache holds no decision", only_latents)

# %% [markdown]
# ## 9. "V3 has 2 shared experts, a latent of 1024, and routes 8 segments of the hidden vector"
#
# **Right: 1 shared expert, a latent of 512, whole vectors.** 2 shared is V2's (and V2-Lite's, and DeepSeekMoE-16B's).
# The 8 is the number of experts a token goes to, and of groups they lie in. Fine-grained segmentation cuts *experts*;
# chapter 2 compares it with cutting tokens.

# %%
for name in ("deepseek-moe-16b", "deepseek-v2-lite", "deepseek-v2", "deepseek-v3"):
    c = preset(name)
    latent = getattr(c.attention, "kv_lora_rank", None)
    print(f"{name:17} shared {c.moe.n_shared_experts}   latent {latent!s:5} segments {c.moe.segments}", end="")
    print(f"   experts a token {c.moe.num_experts_per_tok}, groups {c.moe.n_group}")
sees = experts.gate_up_proj.shape[-1], block.mlp.gate.weight.shape[-1]
print(f"an expert of V3 and its router see {sees[0]} and {sees[1]} numbers of a token's {config.hidden_size}")
check("9. one shared expert, not 2", config.moe.n_shared_experts == 1)
check("   a latent of 512, not 1024", attention.latent == 512)
check("   experts and router see the whole vector", sees == (config.hidden_size,) * 2 and config.moe.segments == 1)

# %% [markdown]
# ## 10. "YaRN interpolates the low frequencies less"
#
# **Right: more.** A dimension that turns many times within the original 4096 tokens tells neighbours apart, and is
# left as it is. One that turns less than once in 4096 tokens was never seen on the rest of its circle in training, so
# it is slowed by the whole factor (interpolation), and 40 times as many tokens fit on the same arc. In between there
# is a ramp.
#
# The claim may come from reading "low dimension" and "low frequency" as one: dimension 0 is the *fastest*.

# %%
yarn, R = config.rope.yarn, a.qk_rope_head_dim
plain = config.rope.model_copy(update={"yarn": None})
cpu = torch.device("cpu")
without, with_yarn = (inverse_frequencies(rope, R, torch.float64, cpu) for rope in (plain, config.rope))
divided = without / with_yarn
turns = without * yarn.original_max_position_embeddings / (2 * torch.pi)
print("pair   turns in 4096 tokens   frequency divided by")
for pair in (0, 8, 10, 12, 14, 16, 18, 20, 22, 23, 24, 31):
    print(f"{pair:4} {turns[pair]:22.2f} {divided[pair]:22.2f}")
fastest, slowest = divided[0].item(), divided[-1].item()
check("10. the slowest is divided by the whole factor", near(slowest, yarn.factor, 1e-9), f"{slowest:.1f}")
check("    the fastest is left as it is", near(fastest, 1, 1e-9), f"{fastest:.1f}")
check("    never less for a lower frequency", bool((divided.diff() >= -1e-12).all()))

# %% [markdown]
# ## 11. "Its attention uses LoRA"
#
# **Right: a low-rank factorisation, trained from the start.** The names `q_lora_rank` and `kv_lora_rank` suggest it.
# LoRA *adapts*: a finished matrix $W$ stays frozen, and $BA$ is added to it, with $B = 0$ at first. In MLA there is
# no $W$: the product of the two matrices (with a norm in between) *is* the projection. LoRA adds parameters to a
# model, MLA has fewer of them.

# %%
in_v3 = attention.q_a_proj.weight.numel() + attention.q_b_proj.weight.numel()
undivided = config.hidden_size * attention.q_b_proj.out_features
print(f"V3's queries: {in_v3:,} in two matrices, in place of {undivided:,} in one")


def by_gradient(at):
    """Parameters of a module that are trained, and that are frozen."""
    parameters = list(at.parameters())
    return tuple(sum(p.numel() for p in parameters if p.requires_grad == trained) for trained in (True, False))


small = Transformer(demo, generator=torch.Generator().manual_seed(0))
before = by_gradient(small.blocks[0].self_attn)
starts_at = (small.blocks[0].self_attn.q_b_proj.weight @ small.blocks[0].self_attn.q_a_proj.weight).abs().max().item()
add_lora(small, "q_b_proj", rank=8, alpha=16, generator=torch.Generator().manual_seed(1))
adapted = small.blocks[0].self_attn
after, change = by_gradient(adapted), adapted.q_b_proj.change.delta().abs().max().item()
print(
    f"the demo's MLA:             {before[0]:7,} trained, {before[1]:7,} frozen; the product is up to {starts_at:.3f}"
)
print(f"with LoRA on q_b_proj, too: {after[0]:7,} trained, {after[1]:7,} frozen; LoRA's product is {change}")
check("11. MLA has no frozen matrix that is adapted", before[1] == 0 and starts_at > 0)
check("    LoRA has, and adds nothing at first", after[1] > 0 and change == 0)
check("    MLA has fewer parameters than the full matrix, LoRA more", in_v3 < undivided and sum(after) > sum(before))

# %% [markdown]
# ## 12. "Keys and values are compressed to a latent each"
#
# **Right: to one joint latent, plus one rotary key.** One projection makes both parts of what is cached, and one
# projection makes all keys and values of the 512. The other idea is a study variant of the library
# (`attention.kind: separate_latents`): it caches two latents, turns the keys by position after expanding them, and so
# cannot be absorbed.

# %%
separate = resolve_model(
    {
        "preset": "demo",
        "attention": {
            "kind": "separate_latents",
            "num_attention_heads": 4,
            "k_lora_rank": 64,
            "v_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
        },
    }
)
print("V3 caches a token and layer:", cached_shapes(config), f"= {a.kv_lora_rank} + {a.qk_rope_head_dim}")
print("the demo:", cached_shapes(demo), "with separate latents of 64:", cached_shapes(separate))

# Change one number of the latent at a time, and see what follows it. With a latent each, half of the numbers would move
# keys only and half values only.
mla = Transformer(demo, generator=torch.Generator().manual_seed(0)).blocks[0].self_attn
with torch.no_grad():
    moved = mla.kv_b_proj(torch.eye(mla.latent)).unflatten(-1, (mla.heads, mla.nope + mla.v_dim)).abs()
of_keys, of_values = (part.flatten(1).gt(0).float().mean(1) for part in moved.split((mla.nope, mla.v_dim), dim=-1))
print(f"each of the latent's {mla.latent} numbers moves {of_keys.min():.0%} of all key numbers or more", end="")
print(f", and {of_values.min():.0%} of all value numbers")
check("12. V3 caches one vector a token and layer", cached_shapes(config) == [(a.kv_lora_rank + a.qk_rope_head_dim,)])
check("    the variant with two latents caches two", len(cached_shapes(separate)) == 2)
both = min(of_keys.min().item(), of_values.min().item())
check("    every number of the latent is in keys and values both", both > 0.99)

# %% [markdown]
# ## 13. "The bias of the router is a learnable parameter"
#
# **Right: it is moved by a rule, without gradient.** It enters the *selection* only, and a selection has no gradient.
# The idea has a good source: DeepSeek's own inference code declares it an `nn.Parameter`, and in the checkpoint it
# lies beside the weights (`mlp.gate.e_score_correction_bias`). For inference that makes no difference. Whoever trains
# that code has a bias that stays where it is: no gradient ever comes to it, and the loads are not balanced.
#
# Three training steps: with the bias as a parameter, without a balancer, and with the rule $b_i \leftarrow b_i +
# \gamma \, \mathrm{sign} (\overline{load} - load_i)$.

# %%
print("a bias among V3's parameters:", any("bias" in name for name, _ in v3.named_parameters()), end="; ")
print("among its buffers:", "model.layers.3.mlp.gate.e_score_correction_bias" in dict(v3.named_buffers()))
window = torch.randint(demo.vocab_size, (4, 34), generator=torch.Generator().manual_seed(2))
after_step = {}
rules = {"parameter": "none", "none": "none", "bias_sign": {"bias_sign": {"rate": 0.001}}}
for name, rule in rules.items():
    trained = Transformer(demo, generator=torch.Generator().manual_seed(0))
    if name == "parameter":
        for router in trained.routers.values():
            start = router.e_score_correction_bias
            del router.e_score_correction_bias
            router.e_score_correction_bias = torch.nn.Parameter(start)
    step = TrainingStep(
        trained,
        optimizer=OptimizerConfig(lr=1e-3),
        balance=BalanceConfig.model_validate(rule),
        clip=1.0,
        mtp_weight=0.3,
        device=cpu,
        dtype=torch.float32,
    )
    weight = trained.routers[1].weight.detach().clone()
    result = step([Batch(window, torch.zeros_like(window))], 32, lr=1e-3, progress=0.0)
    bias = after_step[name] = trained.routers[1].e_score_correction_bias
    changed = (trained.routers[1].weight - weight).abs().max().item()
    print(f"{name:10} the router's weight moves by up to {changed:.4f}; bias:", *(f"{b:+.3f}" for b in bias.tolist()))
print("loads     ", *result.loads[1].tolist(), f"(mean {result.loads[1].double().mean():.0f})")
by_rule = 0.001 * (result.loads[1].float().mean() - result.loads[1]).sign()
check("13. no bias among the parameters", not any("bias" in name for name, _ in v3.named_parameters()))
stays = {name: bool((after_step[name] == 0).all()) and after_step[name].grad is None for name in ("parameter", "none")}
check("    the loss does not move it, not even as a parameter", all(stays.values()) and "parameter" in stays)
check("    the rule does, by ±γ", torch.allclose(after_step["bias_sign"], by_rule))

# %% [markdown]
# ## 14. "MLA makes V3's cache about 85% smaller"
#
# **Right: 98.6% against keeping all heads' keys and values.** 576 numbers a token and layer in place of 128 × (192 +
# 128). Such a figure means nothing without what it is compared with: V2-Lite has 16 heads and saves less. And V2's
# abstract says 93.3%, for the whole model against DeepSeek 67B, which has 95 layers with grouped keys and values, 8
# heads of 128. By what is cached that makes 82%; 93.3% comes out where V2's numbers are counted with the 6 bits that
# its paper's deployment keeps them in (§3.2.3) and the other's with 16. (That this is how it was meant is our guess.)

# %%
saved = {}
for name in ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "kimi-k2"):
    size = cache_size(preset(name))
    saved[name] = 1 - Fraction(size.values, size.expanded_values)
    print(f"{name:17} {size.values} values a token and layer, {size.expanded_values:6,} expanded", end="")
    print(f": {float(saved[name]):.2%} saved")
v2, of_67b = preset("deepseek-v2"), 95 * 2 * 8 * 128  # values a token, all layers
of_v2 = cache_size(v2).values * v2.num_hidden_layers
by_values, by_bits = 1 - of_v2 / of_67b, 1 - of_v2 * 6 / (of_67b * 16)
print(f"V2 beside DeepSeek 67B: {by_values:.1%} fewer values; with 6 bits against 16, {by_bits:.1%} fewer bits")
smaller = float(saved["deepseek-v3"])
check("14. V3's cache is 98.6% smaller", near(smaller, 0.986, 1e-3), f"{smaller:.2%}, {1 / (1 - smaller):.0f} times")
check("    not 85%", not near(smaller, 0.85))
check("    V2's 93.3%: at 6 bits, against another model", near(by_bits, 0.933, 1e-3), f"{by_bits:.2%}")

# %% [markdown]
# ## What they have in common
#
# - **A matrix forgotten** (1, 2, 6): SwiGLU has three; a low rank comes with a way back up.
# - **Widths that happen to be equal** (3): 128 heads, 128 numbers a head; 512 and 64 side by side.
# - **Counting names in place of numbers** (4): 97% of the parameters are in the routed experts.
# - **Another model's number** (5, 9): ordinary attention's size, V2's shared experts.
# - **A percentage without its other side** (7, 14): with or without what, against what.
# - **A word taken at its word** (9, 10, 11): segmentation, low, LoRA.
# - **A mechanism imagined from its effect** (8, 12, 13): what is cached, what is joint, what learns.
#
# For any figure, `abyssal inspect deepseek-v3` counts it from the config, by part and by layer.

# %%
check.end()
