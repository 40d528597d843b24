# %% [markdown]
# # 3. Multi-head latent attention
#
# To write one token, a decoder looks at every token before it. What it keeps of them is the *cache*, and at long
# context the cache is what memory and time go to. Multi-head latent attention (MLA) keeps one short vector a token,
# from which every head's key and value can be made, and then never makes them.
#
# That sentence holds the whole idea, and raises four questions. This chapter answers them in order, in numbers:
#
# 1. What does the cache cost?
# 2. How can one short vector stand for all heads' keys and values?
# 3. How can attention use it without making keys and values again? (*absorption*)
# 4. What about position? (*the decoupled rotary key*)
#
# Then the whole layer, by hand and from the library; what each of its two paths costs; a decoding step, timed; and a
# trained multi-head layer converted to MLA. Some 20 seconds on one core.
#
# Papers: DeepSeek-V2 (arXiv 2405.04434) §2.1, DeepSeek-V3 (arXiv 2412.19437) §2.1.1. Code beside it:
# `src/abyssal/model/attention.py`.
#
# | symbol | is | in V3 |
# | --- | --- | ---: |
# | $B$, $T$, $S$ | batch; new tokens (queries); tokens attended to (keys) | |
# | $D$ | hidden size | 7168 |
# | $H$, $d$ | heads; an MHA head's key and value | 128, 128 |
# | $N$ | a head's query and key without position (`qk_nope_head_dim`, the papers' $d_h$) | 128 |
# | $R$ | rotary dims (`qk_rope_head_dim`, $d_h^R$) | 64 |
# | $V$ | a head's value (`v_head_dim`) | 128 |
# | $C$ | latent (`kv_lora_rank`, $d_c$) | 512 |
#
# ($N$ was the number of tokens in chapters 1 and 2, and $V$ will be the vocabulary in chapter 4.)

# %%
import math
import statistics
import tempfile
import time

import torch
from checks import Checks

from abyssal.analysis.cache import cache_size
from abyssal.config import MHAConfig, MLAConfig, ModelConfig, RopeConfig, preset
from abyssal.data.loader import Loader
from abyssal.kernels.heads import rotate
from abyssal.model import Transformer
from abyssal.model.attention import Context, LatentAttention, MultiHeadAttention
from abyssal.model.cache import LayerCache, cached_shapes
from abyssal.model.rotary import rotary_tables
from abyssal.training.evaluate import HeldOut, evaluate
from abyssal.training.optimizer import learning_rate
from abyssal.training.prepare import load_tokenizer, open_data
from abyssal.training.recipe import BalanceConfig, DataConfig, OptimizerConfig, ScheduleConfig
from abyssal.training.step import TrainingStep
from abyssal.upcycling.attention import latent_attention, separated
from abyssal.upcycling.calibration import causal_context
from abyssal.upcycling.calibration import statistics as attention_statistics
from abyssal.upcycling.fit import cosine, fit, outputs
from abyssal.upcycling.latent import even_out, relative_error, root
from abyssal.upcycling.rotary import rotary_theta
from abyssal.upcycling.settings import Settings, converted_config

check = Checks()
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    """FP64, so that whatever is equal on paper is equal to many digits."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# %% [markdown]
# ## 1. What does the cache cost?
#
# Multi-head attention (MHA) keeps a key and a value of every head for every token in every layer: $2 H d$ numbers a
# token and layer. Grouped-query attention (GQA) lets several query heads share a key and value head, multi-query
# attention (MQA) lets all share one. MLA keeps $C + R$ numbers, whatever $H$ is.
#
# Take V3's shape, 61 layers with 128 heads of 128, and exchange only its attention.
#
# **Before you run it:** one conversation of 128K tokens, cached in BF16. How many GB with MHA? And which GQA would be
# as small as MLA: how many key/value heads would it have left?

# %%
v3 = preset("deepseek-v3")
heads, size = v3.attention.num_attention_heads, v3.attention.v_head_dim


def with_heads(config: ModelConfig, key_heads: int, query_heads: int = heads) -> ModelConfig:
    """``config`` with multi-head attention of so many key/value heads."""
    attention = MHAConfig(num_attention_heads=query_heads, num_key_value_heads=key_heads, head_dim=size)
    return config.model_copy(update={"attention": attention})


shapes = {
    "MHA, 128 heads": with_heads(v3, heads),
    "GQA, 8 groups": with_heads(v3, 8),
    "MQA": with_heads(v3, 1),
    "MLA": v3,
}
print(f"{'V3 with …':<16}{'values a token':>16}{'KB a token':>12}{'GB at 4K':>10}{'at 32K':>10}{'at 128K':>10}")
print(f"{'':<16}{'and layer':>16}{'all layers':>12}")
for name, config in shapes.items():
    kept = cache_size(config)
    gigabytes = [kept.nbytes(torch.bfloat16, context=n * 1024) / 1e9 for n in (4, 32, 128)]
    print(f"{name:<16}{kept.values:>16,}{kept.nbytes(torch.bfloat16) / 1e3:>12,.0f}", end="")
    print("".join(f"{n:>10.1f}" for n in gigabytes))

mha, mla = cache_size(shapes["MHA, 128 heads"]), cache_size(v3)
print(f"\nMLA keeps {mha.values / mla.values:.0f} times less than MHA with heads of {size},")
print(f"and as much as GQA with {mla.values / (2 * size)} groups.")
print(f"V3's own heads, expanded (keys of 192, values of 128): {mla.expanded_values:,}, {mla.ratio:.0f} times more.")

# %% [markdown]
# With MHA, half a terabyte for one conversation, and all of it is read again for each new token. GQA with 8 groups is
# common in large models: 16 times less, but 16 heads at a time look at the same keys and values, and quality goes
# down with them (V2 paper, appendix D, compares all four). MLA is as small as GQA with 2.25 groups would be, and
# every head still has keys and values of its own.
#
# Three figures for "how much smaller" are in circulation, and they compare with three things: 57 times with MHA of
# 128 heads of 128; 71 times (98.6%) with V3's own heads expanded, whose keys are wider by the rotary part; 93.3% in
# V2's abstract is V2 beside DeepSeek 67B, another model, which has GQA. (The last one comes out only where V2's cache
# is counted at 6 bits, as its paper's deployment keeps it, §3.2.3; the misreadings, number 14, work it out.)
#
# ## 2. One latent for keys and values
#
# Where do $2Hd$ numbers a token come from? Leave position aside until section 4. Then all of them are linear
# functions of one vector, the token's hidden state $h_s \in \mathbb{R}^D$. V3-shaped MHA would keep 32,768 numbers
# that are worked out from 7,168. So keeping $h_s$ itself would already be 4.6 times smaller, and exact. MLA goes on
# from there: train a projection to something much shorter, and keep that.
#
# $$
# c_s = W^{DKV} h_s \in \mathbb{R}^{C}, \qquad k_{s,i} = W^{UK}_i c_s, \qquad v_{s,i} = W^{UV}_i c_s
# \qquad \text{(head } i)
# $$
#
# It is **one** latent, and keys and values are both made from it. ("MLA compresses K and V to two latents" is a
# common misreading. Two latents of $C/2$ are one latent of $C$ whose up-projections are half zeros: a special case,
# never better at the same size, and section 8 measures by how much it is worse.) It is learned from the first step
# on: nothing is compressed *after* training, and "LoRA" in `kv_lora_rank` adapts nothing.

# %%
D, H, N, R, V, C = 64, 4, 16, 8, 16, 24
S = 40
h = normal(S, D)  # hidden states of the tokens so far
w_dkv = normal(C, D) / D**0.5
w_uk, w_uv = normal(H, N, C) / C**0.5, normal(H, V, C) / C**0.5

c = h @ w_dkv.T
k = torch.einsum("hnc,sc->hsn", w_uk, c)
v = torch.einsum("hvc,sc->hsv", w_uv, c)
print(f"hidden states h  {list(h.shape)}")
print(f"latents c        {list(c.shape)}    {c.numel():>5} numbers: all that is kept")
print(f"keys k, values v {list(k.shape)} {k.numel() + v.numel():>5} numbers: can be made again at any time")
both = torch.cat((k, v)).transpose(0, 1).flatten(1)  # a row a token, all heads' keys and values side by side
print(f"of the {both.shape[1]} columns of keys and values, independent: {int(torch.linalg.matrix_rank(both))}")

# %% [markdown]
# So the cache is small. But there is a catch: a new token's query needs keys, and now they have to be made again, for
# *all* tokens, at *every* step. That is $S \cdot C \cdot H (N + V)$ multiplications a layer: in V3, at $S = 4096$, 69
# billion, where using the keys and values takes 0.17 billion. A cache that has to be unpacked at each step saves
# memory and loses time.
#
# ## 3. Absorption: never make the keys
#
# A score is a product of three things, and the order in which they are multiplied is free:
#
# $$q \cdot k_s \;=\; q^\top (W^{UK} c_s) \;=\; (W^{UK\top} q)^\top c_s$$
#
# On the left every key is made. On the right the *query* is carried into the latent space, once, and meets the
# latents as they lie in the cache. The values go the same way: the weighted sum over tokens is linear, so $W^{UV}$
# can wait until after it.
#
# $$o = \sum_s p_s \, (W^{UV} c_s) \;=\; W^{UV} \Big(\sum_s p_s c_s\Big)$$
#
# **Before you run it:** which tensors with a token axis $S$ does each way make? Which of them has a head axis as
# well?

# %%
q = normal(H, N)  # one new token's queries

scores_expanded = torch.einsum("hn,hsn->hs", q, k)
o_expanded = torch.einsum("hs,hsv->hv", scores_expanded.softmax(-1), v)

q_latent = torch.einsum("hn,hnc->hc", q, w_uk)  # W_UK is absorbed by the query
scores_absorbed = torch.einsum("hc,sc->hs", q_latent, c)
o_latent = torch.einsum("hs,sc->hc", scores_absorbed.softmax(-1), c)
o_absorbed = torch.einsum("hc,hvc->hv", o_latent, w_uv)  # W_UV comes after the sum over tokens

print(f"expanded: keys {list(k.shape)} and values {list(v.shape)} for queries {list(q.shape)}")
print(f"absorbed: latents {list(c.shape)} for queries {list(q_latent.shape)}")
print(f"largest difference: scores {(scores_expanded - scores_absorbed).abs().max():.1e}", end="")
print(f", outputs {(o_expanded - o_absorbed).abs().max():.1e}")

# %% [markdown]
# Both ways are exact; the difference is rounding. Look at the shapes of the absorbed one: $H$ queries of width $C$
# against a *single* key of width $C$ a token, which is its own value. That is multi-query attention over the latents.
# In this sense MLA has MQA's cache, while each head looks at the latents through a $W^{UK}_i$ of its own.
#
# V2's paper (§2.1.2) says that $W^{UK}$ can be absorbed "into $W^{UQ}$" and $W^{UV}$ into $W^O$, as if they were
# multiplied once and for all. They could be, but the products are larger than their factors: with V3's sizes
# $128 \cdot 512 \cdot 1536$ = 101M numbers per layer to read in place of 34M, and $128 \cdot 512 \cdot 7168$ = 470M in
# place of 126M. So implementations, ours too, keep the factors and multiply by one after the other.
#
# ## 4. Position does not fit in: the decoupled rotary key
#
# The keys above have no position. Rotary embedding turns each pair of dimensions of a query at place $t$ by an angle
# proportional to $t$, and of a key at place $s$ by one proportional to $s$. With $\mathcal{R}_t$ for this rotation,
# only the distance is left in the score:
#
# $$
# (\mathcal{R}_t q)^\top (\mathcal{R}_s k_s) = q^\top \mathcal{R}_{s-t}\, k_s
# = q^\top \mathcal{R}_{s-t} W^{UK} c_s = (W^{UK\top} \mathcal{R}_{t-s}\, q)^\top c_s
# $$
#
# Now the query that should meet $c_s$ depends on $s$. The rotation stands between $W^{UK}$ and $q$, matrix products
# do not commute, and there is no *one* query to be carried over: there is one for each distance.
#
# **Before you run it:** suppose that somebody absorbs anyway, with the query turned as for distance 0. For which
# token are the scores right?

# %%
places = torch.arange(S).unsqueeze(0)
tables = rotary_tables(RopeConfig(), N, places, torch.float64)


def turned(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Rows x [H, S, N] at the places [S]."""
    cos, sin = (table[:, place] for table in tables)
    return rotate(x.transpose(0, 1).unsqueeze(0), (cos, sin), True)[0].transpose(0, 1)


every, last = torch.arange(S), torch.full((S,), S - 1)
k_turned, q_turned = turned(k, every), turned(q.unsqueeze(1).expand(-1, S, -1), last)
right = torch.einsum("hsn,hsn->hs", q_turned, k_turned)

naive = torch.einsum("hc,sc->hs", torch.einsum("hn,hnc->hc", q, w_uk), c)
q_by_distance = turned(q.unsqueeze(1).expand(-1, S, -1), S - 1 - every)  # [H, S, N]: another query for each distance
each = torch.einsum("hsc,sc->hs", torch.einsum("hsn,hnc->hsc", q_by_distance, w_uk), c)

print(f"scores are of the size {right.abs().mean():.2f}\n")
shown = [S - 1 - d for d in (0, 1, 2, 3, 5, 10, 20, 39)]
print("distance t − s            " + "".join(f"{S - 1 - s:>8}" for s in shown))
print("error, one query for all  " + "".join(f"{float(e):>8.2f}" for e in (naive - right).abs().mean(0)[shown]))
print("error, one for each       " + "".join(f"{float(e):>8.0e}" for e in (each - right).abs().mean(0)[shown]))
check("turned keys need a query for each distance", (each - right).abs().max() < 1e-10 < (naive - right).abs().max())

# %% [markdown]
# Only the token at distance 0 is right. A query for each distance is exact, but it is a tensor $[H, S, C]$, made anew
# at each step: more than the keys it was to save. (Turning the latents themselves could be absorbed. But they are the
# values too, which would be turned with them, and a head could not choose what of its key has position.) The study
# variant `separate_latents` (`src/abyssal/model/variants.py`) turns the expanded keys all the same: its latents can
# be cached, but each step makes and turns all keys anew.
#
# MLA's answer is to keep position out of the way (V2 §2.1.3). A head's query and key get two parts: one of width $N$
# from the latent, *without* position, which can be absorbed; and one of width $R$ *with* position, which is not made
# from the latent at all:
#
# $$
# q_{t,i} = [\,q^C_{t,i}\,;\; q^R_{t,i}\,], \qquad k_{s,i} = [\,W^{UK}_i c_s\,;\; k^R_s\,],
# \qquad k^R_s = \mathcal{R}_s W^{KR} h_s
# $$
#
# $$
# \text{score} = \frac{(W_i^{UK\top} q^C_{t,i})^\top c_s + q^{R\top}_{t,i} k^R_s}{\sqrt{N + R}}
# $$
#
# (The published V2 and V3 multiply scores by a constant more, 1.87 in V3: it belongs to YaRN, which stretches the
# context, and not to MLA.)
#
# $k^R_s$ has no head index: all heads share it, as in MQA. It is cached after it was turned, beside the latent. With
# one for each head V3 would cache $512 + 128 \cdot 64 = 8704$ numbers a token in place of $512 + 64 = 576$. So what
# is shared among heads is *where* a token is; *what* it is stays a matter of each head.
#
# ## 5. The whole layer
#
# All of it, by hand, with the weights of the library's `LatentAttention`, in FP64. Names are those of the published
# checkpoints: `kv_a_proj_with_mqa` holds $W^{DKV}$ above $W^{KR}$, `kv_b_proj` holds $W^{UK}_i$ above $W^{UV}_i$ for
# each head. Two things are new: a low-rank query (`q_a_proj`, `q_b_proj`; it saves activations in training, and has
# nothing to do with the cache), and an RMSNorm on each latent. The norm is no obstacle to absorption: it comes before
# $c$ is cached, and what stands between $c$ and $W^{UK}$ stays linear.

# %%
config = ModelConfig(
    vocab_size=64,
    hidden_size=D,
    num_hidden_layers=1,
    intermediate_size=128,
    max_position_embeddings=256,
    attention=MLAConfig(
        num_attention_heads=H, q_lora_rank=32, kv_lora_rank=C, qk_nope_head_dim=N, qk_rope_head_dim=R, v_head_dim=V
    ),
)
layer = LatentAttention(config, config.attention).double().requires_grad_(False)
for weight in layer.parameters():
    weight.copy_(
        1 + 0.1 * normal(*weight.shape) if weight.ndim == 1 else normal(*weight.shape) / weight.shape[1] ** 0.5
    )
for name, weight in layer.named_parameters():
    print(f"{name:<28}{list(weight.shape)}")


def context_of(config: ModelConfig, start: int, count: int, dtype: torch.dtype) -> Context:
    """What attention has to know of ``count`` new tokens after ``start`` cached ones: angles, and who sees whom."""
    rope = rotary_tables(config.rope, config.attention.rotary_dim, torch.arange(start, start + count)[None], dtype)
    return Context(rope, start, None, causal=start == 0 and count > 1)


# %%
B, T = 2, 12
x = normal(B, T, D)
context = context_of(config, 0, T, torch.float64)

# (6)-(8): queries, split in a part for the latent and a part for position
q = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x))).unflatten(-1, (H, N + R))
q_nope, q_rope = q.split((N, R), dim=-1)
q_rope = rotate(q_rope, context.rope, True)
# (1), (3): what is cached
c, k_rope = layer.kv_a_proj_with_mqa(x).split((C, R), dim=-1)
c = layer.kv_a_layernorm(c)
k_rope = rotate(k_rope.unsqueeze(2), context.rope, True).squeeze(2)
w_uk, w_uv = layer.kv_b_proj.weight.unflatten(0, (H, N + V)).split((N, V), dim=1)

hidden = torch.ones(T, T, dtype=torch.bool).triu(1)  # a query does not see what comes after it
by_position = torch.einsum("bthr,bsr->bhts", q_rope, k_rope)  # the same in both paths


def weights(by_content: torch.Tensor) -> torch.Tensor:
    scores = (by_content + by_position) / (N + R) ** 0.5
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


# (2), (5), (10), expanded: every head's keys and values, then ordinary attention
k, v = torch.einsum("hnc,bsc->bshn", w_uk, c), torch.einsum("hvc,bsc->bshv", w_uv, c)
o_expanded = torch.einsum("bhts,bshv->bthv", weights(torch.einsum("bthn,bshn->bhts", q_nope, k)), v)

# absorbed: no k, no v
q_latent = torch.einsum("bthn,hnc->bthc", q_nope, w_uk)
o_latent = torch.einsum("bhts,bsc->bthc", weights(torch.einsum("bthc,bsc->bhts", q_latent, c)), c)
o_absorbed = torch.einsum("bthc,hvc->bthv", o_latent, w_uv)

# (11)
by_hand = {"expanded": layer.o_proj(o_expanded.flatten(2)), "absorbed": layer.o_proj(o_absorbed.flatten(2))}
library = {"expanded": layer(x, context, absorb=False), "absorbed": layer(x, context, absorb=True)}

# ... and one token at a time, over a cache of latents
cache = LayerCache([torch.zeros(B, T, *shape, dtype=torch.float64) for shape in cached_shapes(config)], expanded=False)
steps = [layer(x[:, t : t + 1], context_of(config, t, 1, torch.float64), cache) for t in range(T)]
library["decoded, absorbed"] = torch.cat(steps, dim=1)
print(f"the cache: {[list(tensor.shape) for tensor in cache.tensors]} = [B, T, C + R], and nothing else\n")

reference = by_hand["expanded"]
print("largest difference from the expanded path by hand (outputs are of the size " + f"{reference.abs().mean():.2f}):")
for who, results in (("by hand", by_hand), ("library", library)):
    for name, out in results.items():
        print(f"  {who:<9}{name:<19}{(out - reference).abs().max():.1e}")

# %%
difference = (by_hand["absorbed"] - by_hand["expanded"]).abs().max()
check("absorbed equals expanded (FP64, by hand)", difference < 1e-10, f"differ by {difference:.1e} at most")
for name, out in library.items():
    check(
        f"the library's layer, {name}, equals both",
        torch.allclose(out, reference, rtol=0, atol=1e-10),
        f"by {(out - reference).abs().max():.1e}",
    )
check("what is cached is latents and rotary keys", torch.allclose(cache.tensors[0], torch.cat((c, k_rope), dim=-1)))

# %% [markdown]
# One layer, one set of weights, two ways to compute it. Which is better when?
#
# ## 6. What each path costs
#
# Multiplications of one layer's attention, for $T$ new tokens over $S$ tokens in all:
#
# | | make | use |
# | --- | --- | --- |
# | expanded | $S \cdot H \cdot C (N + V)$ for keys and values | $T S \cdot H (N + R + V)$ |
# | absorbed | $T \cdot H \cdot C (N + V)$ to carry queries over and results back | $T S \cdot H (2C + R)$ |
#
# In the absorbed path a score costs $C + R$ rather than $N + R$, and a sum over values $C$ rather than $V$: a latent
# is dearer to use than a key and a value, but need not be made.
#
# **Before you run it:** V3, 4096 tokens. Which path for a prompt of 4096? Which for the one token after it? At how
# many new tokens do they cross, here and over a very long cache?

# %%
with torch.device("meta"):  # shapes, no memory
    v3_layer = LatentAttention(v3, v3.attention)
a = v3.attention


def multiplications(new: int, keys: int) -> tuple[float, float]:
    """Expanded and absorbed, in billions; the causal half is not taken off."""
    made = a.num_attention_heads * a.kv_lora_rank * (a.qk_nope_head_dim + a.v_head_dim)
    pairs = new * keys * a.num_attention_heads
    expanded = keys * made + pairs * (a.qk_head_dim + a.v_head_dim)
    absorbed = new * made + pairs * (2 * a.kv_lora_rank + a.qk_rope_head_dim)
    return expanded / 1e9, absorbed / 1e9


print(f"{'new tokens':>10}{'of':>8}{'expanded':>12}{'absorbed':>12}   billions a layer; the library takes")
for new, keys in ((1, 4096), (1, 131072), (64, 4096), (150, 4096), (180, 4096), (512, 4096), (4096, 4096)):
    expanded, absorbed = multiplications(new, keys)
    path = "absorbed" if v3_layer.absorb_pays(new) else "expanded"
    print(f"{new:>10,}{keys:>8,}{expanded:>12,.2f}{absorbed:>12,.2f}   {path}")

border = max(new for new in range(1, 4096) if v3_layer.absorb_pays(new))
cheaper = [new for new in range(1, 4096) if multiplications(new, 4096)[1] < multiplications(new, 4096)[0]]
print(f"absorbed is cheaper up to {max(cheaper)} new tokens of 4,096; absorb_pays: up to {border}, for any length")

read = {"MHA": 2 * heads * size, "GQA, 8 groups": 2 * 8 * size, "MLA, absorbed": a.kv_lora_rank + a.qk_rope_head_dim}
used = dict.fromkeys(read, heads * 2 * size) | {"MLA, absorbed": heads * (2 * a.kv_lora_rank + a.qk_rope_head_dim)}
print("\none new token, for each cached token and layer:")
for name, values in read.items():
    print(
        f"  {name:<16}{values:>7,} values read, {used[name]:>8,} multiplied: {used[name] / values:>5.0f} for each value"
    )

# %% [markdown]
# **Training and prefill expand**: $T = S$, a key that was made is used by many queries, and using it is 3.4 times
# cheaper than using a latent. **Decoding absorbs**: one query does not pay for making 4096 tokens' keys. Over a long
# cache, where carrying queries over hardly counts, $S$ cancels, and the border lies at a fixed number of new tokens:
# 170 for V3. `absorb_pays` is this comparison; on a short cache it takes the dearer path just below the border, where
# both cost nearly the same.
#
# The second table is the deeper reason why MLA decodes fast, and it is also the price. An absorbed step multiplies
# *more* than MHA's, 4.25 times as much for each cached token, but reads 57 times less. MHA does one multiplication
# for each value that it fetches. An H100 does 989 TFLOP/s in BF16, which is 495T multiplications with their
# additions, and fetches 3.35 TB/s, which is 1.7T BF16 values: 295 multiplications in the time of one value. So MHA
# leaves it idle; MLA's 242 come close to what it can do. MLA pays for memory traffic with arithmetic, and arithmetic
# is what such hardware has to spare.
#
# Part of that advantage is lost where one sequence's heads are divided among GPUs (*tensor parallelism*: each computes
# some of the heads). MHA's cache is divided with them. MLA's latent is needed by every head, so each GPU keeps all of
# it, and reads all of it with fewer heads to multiply it by.
#
# ## 7. A decoding step, measured
#
# The attention layer of DeepSeek-V2-Lite ($D = 2048$, 16 heads of 128; $C = 512$, $R = 64$) beside MHA of the same
# heads. Both are the library's modules with a `LayerCache` full of random numbers; both take one new token, in turn,
# and the median of 7 is shown. *Expanded* is MLA's other path over the same cache of latents: what decoding would
# cost without absorption.

# %%
lite = preset("deepseek-v2-lite")
lite_heads = lite.attention.num_attention_heads
sides = {"MHA": with_heads(lite, lite_heads, lite_heads), "MLA, absorbed": lite}
layers: dict[str, torch.nn.Module] = {
    "MHA": MultiHeadAttention(sides["MHA"], sides["MHA"].attention),
    "MLA, absorbed": LatentAttention(lite, lite.attention),
}
for module in layers.values():
    module.requires_grad_(False)
    for weight in module.parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.02, generator=generator)
x = torch.randn(1, 1, lite.hidden_size, generator=generator)


def step_times(length: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a step after ``length`` cached tokens, and the bytes of each side's cache."""
    caches = {
        name: LayerCache([torch.randn(1, length + 1, *s, generator=generator) for s in cached_shapes(side)], False)
        for name, side in sides.items()
    }
    contexts = {name: context_of(side, length, 1, torch.float32) for name, side in sides.items()}
    calls = {name: (lambda name=name: layers[name](x, contexts[name], caches[name])) for name in sides}
    if length == 4096:
        own = "MLA, absorbed"
        calls["MLA, expanded"] = lambda: layers[own](x, contexts[own], caches[own], absorb=False)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(8):
            for name, call in calls.items():
                if name == "MLA, expanded" and turn > 2:
                    continue  # it takes long
                began = time.perf_counter()
                call()
                if turn > 0:  # the first one warms up
                    times[name].append(time.perf_counter() - began)
    sizes = {name: sum(t.nbytes for t in kept.tensors) / 1e6 for name, kept in caches.items()}
    return {name: statistics.median(own) for name, own in times.items()}, sizes


measured = {length: step_times(length) for length in (4096, 16384)}
print(f"{'context':>8}  {'':<15}{'cache':>9}{'a step':>10}")
for length, (times, sizes) in measured.items():
    for name, seconds in times.items():
        cached = f"{sizes[name]:.0f} MB" if name in sizes else ""
        print(f"{length:>8,}  {name:<15}{cached:>9}{seconds * 1e3:>7.1f} ms")

# %%
for length, (times, _) in measured.items():
    ratio = times["MHA"] / times["MLA, absorbed"]
    check.measured(f"a step after {length:,} tokens is faster with MLA", ratio > 1, f"{ratio:.1f} times")
ratio = measured[4096][0]["MLA, expanded"] / measured[4096][0]["MLA, absorbed"]
check.measured("absorption is what makes it so", ratio > 1, f"expanding at each step takes {ratio:.0f} times as long")

# %% [markdown]
# The cache is 7.1 times smaller. The step is faster by less than that, and by more the longer the context: the
# projections cost the same at any length, and a CPU core has little arithmetic to spare for the additional
# multiplications (16 heads share a latent here, which makes 30 for each value read). And without absorption, MLA
# would be slower than what it replaces.
#
# ## 8. A trained MHA layer, converted
#
# Does a layer *need* $2Hd$ numbers a token? Take one that was trained without any thought of MLA, and see how many it
# can do with. First the layer: a small dense model with MHA, trained on Shakespeare for some seconds (the loop is
# chapter 4's subject).

# %%
folder = tempfile.TemporaryDirectory()
data = DataConfig(source="tinyshakespeare", cache=folder.name)
dense_config = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=2,
    intermediate_size=256,
    max_position_embeddings=256,
    attention=MHAConfig(num_attention_heads=4, num_key_value_heads=4, head_dim=32),
    rope=RopeConfig(layout="halves"),
)
STEPS, LENGTH = 120, 128
tokenizer = load_tokenizer(data, dense_config.vocab_size)
train, validation = open_data(data, tokenizer)
held_out = HeldOut.of_shards(validation, batch_size=16, sequence_length=LENGTH)


def loss_of(model: Transformer) -> float:
    """Nats a token on the first 8,192 tokens of the held-out text."""
    return evaluate(model.eval(), held_out, sequence_length=LENGTH, dtype=torch.float32, batches=4).loss


def new_dense() -> Transformer:
    return Transformer(dense_config, generator=torch.Generator().manual_seed(0))


dense = new_dense()
step = TrainingStep(
    dense,
    optimizer=OptimizerConfig(lr=3e-3),
    balance=BalanceConfig(),
    clip=1.0,
    mtp_weight=0.0,
    device=torch.device("cpu"),
    dtype=torch.float32,
)
loader = Loader(train, batch_size=8, sequence_length=LENGTH, lookahead=1, seed=0)
schedule = ScheduleConfig(warmup=10)
before = loss_of(dense)
for index in range(STEPS):
    result = step([loader.next()], LENGTH, learning_rate(index, STEPS, 3e-3, schedule), index / STEPS)
dense.requires_grad_(False)
dense_loss = loss_of(dense)
print(f"{sum(p.numel() for p in dense.parameters()):,} parameters, {STEPS * 8 * LENGTH:,} tokens")
print(f"held-out loss {before:.2f} -> {dense_loss:.2f} nats a token")

# %% [markdown]
# How compressible are its keys and values? Stack $W^K$ and $W^V$ of all heads on top of each other, weigh them by the
# inputs that the layer really sees and by what an error does to its output, and look at the singular values: the
# share that is left out after the first $C$ is what a latent of $C$ loses. `separated` does this (it first takes the
# rotary part out; more on that below). The second row below cuts keys and values apart, $C/2$ each: the two latents
# of the misreading.
#
# **Before you run it:** the same question for the layer as it was before training. More compressible, or less?

# %%
WINDOWS, HELD_OUT, THETA, ROTARY = 96, 32, dense_config.rope.theta, 16
# Windows to convert by, from the training text, and windows to judge by, from the held-out text.
windows = [part.read(0, count * LENGTH) for part, count in ((train, WINDOWS), (validation, HELD_OUT))]
tokens = torch.cat([torch.from_numpy(part).view(-1, LENGTH) for part in windows])
dense_context = causal_context(THETA, dense_config.attention.head_dim, LENGTH, tokens.device)


@torch.no_grad()
def inputs_of(model: Transformer) -> list[torch.Tensor]:
    """What each layer's attention takes in for ``tokens``, [n, T, D]."""
    x, seen = model.model.embed_tokens(tokens), []
    for block in model.blocks:
        seen.append(block.input_layernorm(x))
        x = block(x, dense_context)
    return seen


@torch.no_grad()
def looked_at(model: Transformer, index: int, inputs: list[torch.Tensor], rotary: int = ROTARY) -> tuple:
    """Statistics of a layer on the calibration text; its parts, and the spectrum of keys and values."""
    attention = model.blocks[index].self_attn
    stats = attention_statistics(attention, inputs[index][:WINDOWS], dense_context)
    return stats, *separated(attention, stats, THETA, rotary, key_weight=0.5)


def apart(stats, found, rank: int) -> float:
    """The relative error of a latent of ``rank`` / 2 for keys and another for values."""
    seen = found.weighted @ root(stats.moment)[0]
    spectra = [torch.linalg.svdvals(half) for half in seen.chunk(2)]
    lost = sum((relative_error(values, rank // 2) ** 2) * float(values.square().sum()) for values in spectra)
    return (lost / sum(float(values.square().sum()) for values in spectra)) ** 0.5


inputs = inputs_of(dense)
stats, parts, found = looked_at(dense, 0, inputs)
untrained = new_dense().requires_grad_(False)
*_, untrained_found = looked_at(untrained, 0, inputs_of(untrained))
ranks = (4, 8, 16, 32, 64)
print("relative error of keys and values (256 rows, rank 128 at most) at a latent of")
print(f"{'':<30}" + "".join(f"{rank:>8}" for rank in ranks))
for name, errors in {
    "trained, one joint latent": [found.error(rank) for rank in ranks],
    "trained, two of half the size": [apart(stats, found, rank) for rank in ranks],
    "untrained, one joint latent": [untrained_found.error(rank) for rank in ranks],
}.items():
    print(f"{name:<30}" + "".join(f"{error:>8.3f}" for error in errors))
check(
    "two latents lose no less than a joint one (a theorem, here in figures)",
    all(found.error(r) <= apart(stats, found, r) for r in ranks),
)

# %% [markdown]
# Training has made the layer compressible; a random one is not. (This one learned for seconds and uses few
# directions. Layers that learned from trillions of tokens use more: see the figures in
# [upcycling.md](../upcycling.md).) That real ones need *some* of their rank is why MLA is trained as MLA, so that
# what the latent cannot hold is learned around.
#
# Then the conversion, in four steps (`src/abyssal/upcycling/`):
#
# 1. **Take the rotary part out** (`separated`). MHA turns all of its keys, of every head. MLA has room for $R$ turned
#    dims, shared. At each frequency the 4 heads' keys are combined to the one that keeps most of what scores depend
#    on; the rest is left unturned. This is an approximation, and the one that costs most.
# 2. **Factorise keys and values together**: the SVD above, cut at $C$ (`Spectrum.cut`).
# 3. **Make the norm harmless** (`even_out`). MLA has an RMSNorm on the latent, MHA has nothing there. Any basis of
#    the latent is as good as another, so one is chosen in which all latents are about equally long: the norm then
#    divides them by 1.
# 4. **Fit** (`fit`): a few steps that move the new layer's output towards the old one's, on the same inputs.
#
# `latent_attention` puts 2 and 3 into a `LatentAttention`.

# %%
with torch.no_grad():
    rows = inputs[0][:WINDOWS].flatten(0, 1)
    kv_a, kv_b = found.cut(32 - ROTARY)
    evened, undone = even_out(kv_a, kv_b, rows, stats.received.flatten())
    for name, down in (("as the SVD gives them", kv_a), ("evened out", evened)):
        lengths = (rows.double() @ down.T).square().mean(-1).sqrt()
        print(f"latents {name:<22} root mean square {lengths.mean():5.2f} ± {lengths.std():.2f}")
    print(f"keys and values are the same: {torch.allclose(kv_b @ kv_a, undone @ evened, atol=1e-8)}")

# %% [markdown]
# Now the sizes. The judge is the held-out text, which neither the model nor the conversion has seen: the cosine
# between what the MHA layer gives and what the new one gives, averaged over tokens. Two lines stand beside it for
# comparison: MQA, each head's keys and values replaced by the mean over heads (which is how GQA models are made of
# MHA ones) and fitted by the same steps; and the mean output, the same for every token, which says how much a cosine
# is worth here.

# %%
targets = [
    outputs(lambda x, block=block: block.self_attn(x, dense_context), x, batch=16, dtype=torch.float32)
    for block, x in zip(dense.blocks, inputs, strict=True)
]


def agreement(module: torch.nn.Module, within: Context, index: int) -> float:
    """The mean cosine with layer ``index`` on the held-out windows."""
    own = outputs(lambda x: module(x, within), inputs[index][WINDOWS:], batch=16, dtype=torch.float32)
    return cosine(own, targets[index][WINDOWS:])


def fitted(module: torch.nn.Module, within: Context, index: int) -> float:
    """Fits ``module`` to layer ``index`` on the calibration windows."""
    seen = (inputs[index][:WINDOWS], targets[index][:WINDOWS])
    options = {"steps": 40, "batch": 16, "rate": 0.005, "dtype": torch.float32}
    fit(module, lambda x: module(x, within), *seen, **options, generator=torch.Generator().manual_seed(0))
    return agreement(module, within, index)


def converted(index: int, cached: int, rotary: int, looked: tuple) -> tuple[ModelConfig, LatentAttention, Context]:
    """Layer ``index`` as MLA that caches ``cached`` values, ``rotary`` of them the rotary key."""
    theta = rotary_theta(THETA, dense_config.attention.head_dim, rotary)
    config = converted_config(dense_config, Settings(cache=cached, rotary=rotary), cached - rotary, rotary, theta)
    new = latent_attention(dense.blocks[index].self_attn, config, *looked, inputs[index][:WINDOWS])
    return config, new, causal_context(theta, rotary, LENGTH, tokens.device)


before_values = dense_config.attention.cached_values
print(f"layer 1, {before_values} cached values a token, as …")
print(f"{'':<24}{'cached':>8}{'smaller by':>12}{'converted':>12}{'fitted':>9}")
looked = (stats, parts, found)
table: dict[int, tuple[float, float]] = {}
made: dict[int, tuple[ModelConfig, LatentAttention, Context]] = {}
for cached in (20, 32, 48):
    made[cached] = config, new, within = converted(0, cached, ROTARY, looked)
    table[cached] = agreement(new, within, 0), fitted(new, within, 0)
    name = f"MLA, C = {cached - ROTARY}, R = {ROTARY}"
    print(f"{name:<24}{cached:>8}{before_values / cached:>12.1f}{table[cached][0]:>12.3f}{table[cached][1]:>9.3f}")

one_head = dense_config.attention.model_copy(update={"num_key_value_heads": 1})
old, mqa = dense.blocks[0].self_attn, MultiHeadAttention(dense_config, one_head).requires_grad_(False)
mqa.q_proj.weight.copy_(old.q_proj.weight)
mqa.o_proj.weight.copy_(old.o_proj.weight)
for name in ("k_proj", "v_proj"):
    getattr(mqa, name).weight.copy_(getattr(old, name).weight.unflatten(0, (-1, 32)).mean(0))
mqa_before, mqa_after = agreement(mqa, dense_context, 0), fitted(mqa, dense_context, 0)
kept = one_head.cached_values
print(f"{'MQA, mean of heads':<24}{kept:>8}{before_values / kept:>12.1f}{mqa_before:>12.3f}{mqa_after:>9.3f}")
mean = targets[0][:WINDOWS].mean((0, 1)).expand_as(targets[0][WINDOWS:])
print(f"{'the mean output':<24}{0:>8}{'':>12}{cosine(mean, targets[0][WINDOWS:]):>12.3f}")

# %% [markdown]
# At an eighth of the cache the layer still gives nearly the same output. Between 32 and 48 nothing changes, so the
# latent is not what is short. What is? The cache has two parts; divide 32 values between them in other ways. *Kept by
# the rotary key* is what step 1 leaves of position: of the keys' energy at the frequencies that the rotary key has,
# the share that one key for all heads can hold.
#
# **Before you run it:** from 8 to 30 rotary dims out of 32. Where is the best place, and what goes wrong at either
# end?

# %%
print("32 cached values, converted, not fitted")
print(f"{'C':>4}{'R':>4}{'error of the latent':>22}{'kept by the rotary key':>25}{'cosine':>10}")
for rotary in (8, 16, 24, 30):
    own = looked if rotary == ROTARY else looked_at(dense, 0, inputs, rotary)
    cosine_found = table[32][0] if rotary == ROTARY else agreement(*converted(0, 32, rotary, own)[1:], 0)
    print(f"{32 - rotary:>4}{rotary:>4}{own[2].error(32 - rotary):>22.3f}{own[1].kept:>25.2f}{cosine_found:>10.3f}")

# %% [markdown]
# With few rotary dims the latent has room to spare and the heads lose their sense of distance; with many the latent
# gets short, and at 2 it fails. In between little depends on it, and what the rotary key holds of each frequency
# hardly changes. (V2 and V3 have $R = N/2$ and $C = 4N$ at other widths and after another training; this table says
# nothing about those.)
#
# Last, the only judge that counts. Convert the second layer too, put both in a `Transformer`, and compare the whole
# model's loss on held-out text. Beside it, what attention is worth in this model at all: its loss without one layer's
# attention, and without any. A layer whose absence nobody notices is easily converted.

# %%
config, first, _ = made[32]
_, second, within = converted(1, 32, ROTARY, looked_at(dense, 1, inputs))
second_before, second_after = agreement(second, within, 1), fitted(second, within, 1)
print(f"layer 2 at 32 values: {second_before:.3f}, fitted {second_after:.3f}")


def without(*silent: int) -> float:
    """The dense model's loss where the attention of these layers gives 0."""
    handles = [
        dense.blocks[index].self_attn.o_proj.register_forward_hook(lambda _, given, out: torch.zeros_like(out))
        for index in silent
    ]
    loss = loss_of(dense)
    for handle in handles:
        handle.remove()
    return loss


without_any = without(0, 1)

model = Transformer(config)
rest = {name: weight for name, weight in dense.state_dict().items() if "self_attn" not in name}
model.load_state_dict(rest, strict=False)  # all but attention
for block, attention in zip(model.blocks, (first, second), strict=True):
    block.self_attn = attention
mla_loss = loss_of(model)
print(f"\n{'held-out loss':<16}{'nats a token':>14}{'cache at 128 tokens, FP32':>28}")
for name, loss, own in (("MHA", dense_loss, dense_config), ("MLA", mla_loss, config)):
    print(f"{name:<16}{loss:>14.3f}{cache_size(own).nbytes(torch.float32, context=128) / 1e3:>25.0f} KB")
print("MHA, without the attention of")
for name, loss in {"layer 1": without(0), "layer 2": without(1), "both": without_any}.items():
    print(f"  {name:<14}{loss:>14.3f}")

# %%
# A token's share of a cache of this shape, counted in the tensors that hold it.
of_mha, of_mla = (sum(math.prod(shape) for shape in cached_shapes(own)) for own in (dense_config, config))
smaller = of_mha / of_mla
check("the converted layer's cache is 5 to 10 times smaller", 5 <= smaller <= 10, f"{smaller:.1f} times")
check("its output keeps a cosine above 0.95 on held-out text", table[32][1] > 0.95, f"{table[32][1]:.3f}")
check(
    "with less cache than MQA it is nearer to the layer",
    table[32][1] > mqa_after,
    f"{table[32][1]:.3f} and {mqa_after:.3f}",
)
check("the whole model's loss stays within 2%", mla_loss < 1.02 * dense_loss, f"{dense_loss:.3f} -> {mla_loss:.3f}")
worth = (without_any - mla_loss) / (without_any - dense_loss)
check("nine tenths of what attention is worth here are kept", worth > 0.9, f"{worth:.0%}")
folder.cleanup()
check.end()

# %% [markdown]
# ## What to be able to explain
#
# - **What is cached, and why it is enough.** One latent $c_s$ and one rotary key $k^R_s$, $C + R$ numbers a token and
#   layer for any number of heads. All keys and values are linear functions of them. (V2 §2.1.2; V3 equations 1–5.)
# - **Why one latent.** Two of half the size are a special case of one; and absorbed, one tensor is key and value at
#   once, read once.
# - **Absorption in one line**: $q^\top (W^{UK} c) = (W^{UK\top} q)^\top c$, and $W^{UV}$ after the sum. Exact, not
#   approximate.
# - **Why rotary needs a key of its own.** Rotation stands between $W^{UK}$ and the query and depends on the distance,
#   so there is no one query to absorb it. Position goes on a separate key, shared by heads, cached turned. (V2
#   §2.1.3.)
# - **Two paths, one layer.** Expanded for training and prefill, absorbed for decoding; V3 crosses at 170 new tokens.
# - **The price.** More arithmetic at each decoding step than MHA: 4.25 times for each cached token in V3. Heads can
#   be divided among GPUs, the latent cannot. And there are two paths to write kernels for.
# - **What MLA is beside GQA.** GQA makes heads alike to make the cache small. MLA makes their keys and values
#   functions of a common vector, and leaves them different. (V2 §2.1.4 and appendix D.)
# - **Converting is not training.** A trained MHA layer can be brought near by SVD and a fit; the rotary part is the
#   hard half. How far it goes on a real model, and what healing gives: [upcycling.md](../upcycling.md); over seeds
#   and cache sizes: `abyssal lab conversion` ([docs/lab](../lab/README.md)).
#
# To try: `kv_lora_rank` 256 in V3's config: where does `absorb_pays` cross now, and why? `num_key_value_heads` 2 in
# the dense model of section 8, which halves the cache to begin with: how far can it be converted now? (The check of 5
# to 10 times is meant for 4.)
#
# Next: [chapter 4](4_model.ipynb) puts this layer, the experts of chapters 1 and 2 and multi-token prediction
# together, and trains them.
