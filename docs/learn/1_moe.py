# %% [markdown]
# # 1. A mixture of experts
#
# A transformer block does two things to a token's vector: attention mixes in other tokens, then a feed-forward network
# (FFN) works on each token by itself. A *mixture of experts* (MoE) puts several feed-forward networks in the place of
# the one, and sends each token through a few of them. Which ones is decided by a *router*, a single small matrix.
#
# In this chapter we take that layer apart, put it together again by hand, compare every step with the library's own
# module, and train a model that has it. At the end you should be able to say why it is cheaper than a dense FFN and
# what it costs instead, how a gradient gets through a decision that has none, and what goes wrong if nobody looks
# after the balance. Chapter 2 turns this plain layer into DeepSeek's.
#
# Run it as it stands (`python docs/learn/1_moe.py`) or cell by cell in the notebook beside it. Have open:
# `src/abyssal/model/router.py`, `src/abyssal/model/moe.py`, `src/abyssal/analysis/balance.py`.
#
# | symbol | what it is | here |
# | --- | --- | --- |
# | $B$, $T$, $N = B \cdot T$ | sequences, tokens of each, tokens in all | |
# | $D$ | hidden size: a token is a vector of $D$ numbers | 256 |
# | $E$ | experts | 4 |
# | $K$ | experts that a token goes to | 2 |
# | $F$ | width of an expert | 512 |

# %%
from collections import Counter

import numpy as np
import torch
from checks import Checks
from torch.nn.functional import linear, silu

from abyssal.analysis.balance import balance
from abyssal.analysis.flops import count_flops
from abyssal.analysis.parameters import count_parameters
from abyssal.analysis.specialisation import information
from abyssal.config import preset, resolve_model
from abyssal.data.corpus import documents
from abyssal.data.loader import Batch
from abyssal.model import RoutingRecorder, Transformer
from abyssal.model.router import Router
from abyssal.training.recipe import BalanceConfig, OptimizerConfig
from abyssal.training.step import TrainingStep

# The preset first-moe, with the 256 bytes as its vocabulary.
config = resolve_model({"preset": "first-moe", "vocab_size": 256})
D, E, K = config.hidden_size, config.moe.n_routed_experts, config.moe.num_experts_per_tok
print(f"D = {D}, E = {E}, K = {K}, F = {config.moe.moe_intermediate_size}, {config.num_hidden_layers} layers")

# %% [markdown]
# ## Why not one large FFN?
#
# In a dense FFN every parameter takes part in every token: twice the parameters cost twice the operations. A MoE layer
# breaks this tie. It *holds* $E$ experts and *uses* $K$.
#
# An expert here is a SwiGLU network: two projections up, one of which gates the other, and one down (the formula
# stands below, at "Dispatch and combine"). At width $F$ it has three matrices of $D \times F$, so $3DF$ parameters
# and $2 \cdot 3DF$ operations per token (a multiplication and an addition for each parameter).
#
# **Before you run it:** which dense width has the same cost per token as our four experts of 512 with two active?
# Which has as many parameters?


# %%
def dense(width):
    return resolve_model({"preset": "first-moe", "moe": None, "intermediate_size": width})


sides = {"dense FFN, width 1024": dense(1024), "MoE, 2 of 4 × 512": config, "dense FFN, width 2048": dense(2048)}
FEED_FORWARD = ("router", "routed experts", "dense MLP")


def feed_forward(model_config):
    """Parameters of one layer's FFN, and its operations per token."""
    parts, flops = count_parameters(model_config).layers[0].by_part, count_flops(model_config, context=512).by_part
    per_layer = sum(flops.get(part, 0) for part in FEED_FORWARD) // model_config.num_hidden_layers
    return sum(parts.get(part, 0) for part in FEED_FORWARD), per_layer


cost = {name: feed_forward(model_config) for name, model_config in sides.items()}
print("one layer's FFN           parameters   operations per token")
for name, (parameters, flops) in cost.items():
    print(f"{name:24} {parameters:11,} {flops:22,}")

# %% [markdown]
# The MoE layer has the parameters of the large network at the price of the small one. What it adds is the router:
# $E \cdot D = 1024$ parameters.
#
# Does this hold for real models? Of DeepSeekMoE-16B the paper says that it is comparable with LLaMA2-7B at about 40%
# of the computation (arXiv 2401.06066, abstract). The quality we cannot measure here; the 40% follows from the
# configs.

# %%
print("                    parameters  active per token GFLOP per token at 4096")
forward = {}
for name in ("llama2-7b", "deepseek-moe-16b", "deepseek-v3"):
    counts, forward[name] = count_parameters(preset(name)), count_flops(preset(name), context=4096).forward
    print(f"{name:16} {counts.total:15,} {counts.active_without_embedding:16,} {forward[name] / 1e9:14.1f}")
ratio = forward["deepseek-moe-16b"] / forward["llama2-7b"]
print(f"\nDeepSeekMoE-16B against LLaMA2-7B: {ratio:.1%} of the operations")

# %% [markdown]
# *Memory* is not saved: all experts must lie ready, for the next token may want any of them. With many tokens,
# *reading* is not saved either. One token of V3 reads 8 of a layer's 256 experts. A batch of $N$ tokens that choose
# evenly and independently of each other reads, on average, $E \, (1 - (1 - K/E)^N)$ different ones:

# %%
v3 = preset("deepseek-v3").moe
for tokens in (1, 8, 32, 128):
    read = v3.n_routed_experts * (1 - (1 - v3.num_experts_per_tok / v3.n_routed_experts) ** tokens)
    print(f"{tokens:4} tokens at once: {read:5.1f} of {v3.n_routed_experts} experts of a layer are read")

# %% [markdown]
# So a MoE model answers one user quickly for its size, needs the memory of a large one, and wants large batches before
# each expert that was read from memory has enough tokens to work on. That is the trade.
#
# ## The router
#
# For a token $x \in \mathbb{R}^D$ the router computes one score for each expert and keeps the best $K$:
#
# $$ s = \mathrm{softmax}(W x) \in \mathbb{R}^E, \qquad \mathcal{T} = \mathrm{topk}(s, K), \qquad
#    g_i = \frac{s_i}{\sum_{j \in \mathcal{T}} s_j} \ \text{ for } i \in \mathcal{T} $$
#
# $W$ is $[E, D]$: a row for each expert, and a token goes where its vector has the largest products. The $g_i$ are the
# *gate weights*: what the outputs of the chosen experts are multiplied by. The division (`norm_topk_prob`) makes them
# sum to 1.
#
# Here it is in four lines, beside the library's `Router`. The layer is the first one of an untrained model.

# %%
model = Transformer(config, generator=torch.Generator().manual_seed(0))
layer = model.blocks[0].mlp
x = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(1))  # [B, T, D]

logits = x @ layer.gate.weight.T  # [B, T, E]
scores = logits.softmax(-1)
best = scores.topk(K, dim=-1)
gate_weights = best.values / best.values.sum(-1, keepdim=True)  # [B, T, K]

routing = layer.route(x)
print("our indices are the router's:", bool((best.indices == routing.indices).all()))
print(f"largest difference of a weight: {(gate_weights - routing.weights).abs().max():.1e}\n")
print("token   scores of the 4 experts     chosen    gate weights")
for t in range(5):
    shown = "  ".join(f"{s:.2f}" for s in routing.scores[0, t].tolist())
    weights = "  ".join(f"{w:.2f}" for w in routing.weights[0, t].tolist())
    print(f"{t:5}   {shown}   {routing.indices[0, t].tolist()!s:9}  {weights}")

# %% [markdown]
# Softmax over all and then dividing by the sum of the chosen is the same as a softmax over the chosen logits alone:
# the common denominator cancels. You will meet both spellings.

# %%
over_chosen = logits.gather(-1, routing.indices).softmax(-1)
print(f"softmax over the chosen logits differs by at most {(over_chosen - routing.weights).abs().max():.1e}")

# %% [markdown]
# ## Dispatch and combine
#
# Each expert is a SwiGLU network, $\mathrm{FFN}_i(x) = W^{down}_i (\mathrm{silu}(W^{gate}_i x) \odot W^{up}_i x)$. The
# layer's output is
#
# $$ y = \sum_{i \in \mathcal{T}} g_i \, \mathrm{FFN}_i(x) $$
#
# Written token by token this would be a loop over tokens with tiny products. So it is turned round: a loop over
# *experts*, each of which takes all its tokens at once. Collecting an expert's tokens is called *dispatch*, putting
# the results back where they belong, weighted, *combine*.

# %%
experts = layer.experts


def expert(i, rows):
    """Expert i of rows [n, D]; its gate and up matrices lie one above the other in gate_up_proj [E, 2F, D]."""
    gate, up = linear(rows, experts.gate_up_proj[i]).chunk(2, dim=-1)
    return linear(silu(gate) * up, experts.down_proj[i])


def by_hand(x, indices, weights):
    """x [N, D], indices and weights [N, K] -> [N, D]."""
    out = torch.zeros_like(x)
    for i in range(E):
        token, slot = (indices == i).nonzero(as_tuple=True)  # who chose expert i, and as which of its choices
        rows = x[token]  # dispatch
        out.index_add_(0, token, weights[token, slot, None] * expert(i, rows))  # combine
    return out


flat = (x.flatten(0, 1), routing.indices.flatten(0, 1), routing.weights.flatten(0, 1))
ours, theirs = by_hand(*flat).view_as(x), layer(x, routing)
difference = (ours - theirs).abs().max().item()
print(f"output {list(theirs.shape)}; by hand it differs by at most {difference:.1e}")

# %% [markdown]
# `Experts` in `moe.py` does the same without a loop over experts in Python: it sorts the $N \cdot K$ assignments by
# expert, gathers their rows into one matrix, multiplies slice by slice with the stacked weights, and sums back. No
# token is dropped: however many choose an expert, it takes them all. (GShard and Switch Transformer gave each expert a
# fixed number of places, its *capacity*, and left out the tokens that found none. V3 drops none, neither in training
# nor in inference: arXiv 2412.19437, §2.1.2.)
#
# You could also send every token through all experts and multiply by 0 where it did not choose them. The numbers would
# be the same, the work $E/K$ times as much.

# %%
order = routing.indices.flatten().sort(stable=True)
print("assignments, sorted by expert:")
print("  expert:", *order.values.tolist())
print("  token :", *(order.indices // K).tolist())

# %% [markdown]
# ## How does the router learn?
#
# Top-k gives integers, and integers have no gradient. Nothing tells the router "you should have chosen expert 3". But
# the *weights* of the chosen experts are ordinary numbers in the formula:
#
# $$ y = \sum_{i \in \mathcal{T}} g_i \, \mathrm{FFN}_i(x) \quad\Rightarrow\quad
#    \frac{\partial L}{\partial g_i} = \frac{\partial L}{\partial y} \cdot \mathrm{FFN}_i(x) $$
#
# If a larger share of expert $i$ would lower the loss, $g_i$ grows, through it the logit, and next time a token like
# this one chooses $i$ the more readily. The choice follows the weights.
#
# **Before you run it:** do the rows of $W$ of experts that a token did *not* choose get a gradient? (Row $i$ gets
# $\partial L / \partial logit_i \cdot x$, so for a single token a row's gradient shows its logit's.)

# %%
one = x[:1, :1]  # a single token
target = torch.randn(D, generator=torch.Generator().manual_seed(2))


def router_gradient(**changes):
    """The norm of the gradient of each row of W, for one token and some loss, with changed settings."""
    router = Router(D, config.moe.model_copy(update=changes))
    router.weight.data.copy_(layer.gate.weight)
    decided = router(one)
    decided.weights.retain_grad()
    y = by_hand(one[0], decided.indices[0], decided.weights[0])
    (y * target).sum().backward()  # so that dL/dy is target
    return router.weight.grad.norm(dim=1).tolist(), decided


rows = {}
for name, changes in {
    "weights divided by their sum": {},
    "weights as they are": {"norm_topk_prob": False},
    "K = 1, divided by their sum": {"num_experts_per_tok": 1},
}.items():
    rows[name], decided = router_gradient(**changes)
    chosen = sorted(decided.indices.flatten().tolist())
    print(f"{name:30} chosen {chosen!s:7} gradient of each row", *(f"{norm:9.1e}" for norm in rows[name]))

_, decided = router_gradient()
formula = [(target @ expert(i, one[0, 0])).item() for i in decided.indices.flatten().tolist()]
print("\ndL/dg of the two chosen:", *(f"{value:.5f}" for value in decided.weights.grad.flatten().tolist()))
print("dL/dy · FFN_i(x)       :", *(f"{value:.5f}" for value in formula))

# %% [markdown]
# Three things to keep:
#
# - With normalised weights only the chosen rows get a gradient. It sets them against *each other*: the weights sum to
#   1, so one can only grow at another's expense. An expert that was not chosen learns nothing from the token, and its
#   row of the router neither.
# - Without the division (DeepSeekMoE-16B and V2) the softmax's denominator couples all experts: the others get a small
#   gradient too.
# - With $K = 1$ and the division the only weight is always 1, and the router's gradient is 0: it never learns. (Switch
#   Transformer, which has $K = 1$, therefore keeps the plain probability.)
#
# Now the whole layer, one backward pass, the gradient's norm expert by expert. Then the same for a single token.

# %%
layer.zero_grad()
layer(x, layer.route(x)).square().sum().backward()
load = layer.route(x).load()
norms = experts.down_proj.grad.flatten(1).norm(dim=1)
print(f"router's gradient: norm {layer.gate.weight.grad.norm():.2e}")
for i in range(E):
    print(f"expert {i}: {load[i]:2} assignments, gradient {norms[i]:.2e}")
router_norm, expert_norms = layer.gate.weight.grad.norm().item(), norms.tolist()

layer.zero_grad()
layer(one, layer.route(one)).square().sum().backward()
of_one = experts.down_proj.grad.flatten(1).norm(dim=1)
print("\none token, choosing", sorted(layer.route(one).indices.flatten().tolist()))
print("gradients of the experts:", "  ".join(f"{norm:.1e}" for norm in of_one.tolist()))
layer.zero_grad()

# %% [markdown]
# ## Load: who gets how much
#
# The *load* of an expert is the number of assignments it got. Two figures say how even a layer's loads are:
#
# $$ \mathrm{CV} = \frac{\mathrm{std}(load)}{\mathrm{mean}(load)}, \qquad
#    \mathrm{MaxVio} = \frac{\max(load) - \mathrm{mean}(load)}{\mathrm{mean}(load)} $$
#
# CV speaks of all experts, MaxVio of the busiest. If every expert has a GPU of its own, all wait for the busiest one,
# and the layer takes $1 + \mathrm{MaxVio}$ times as long as with even loads.
#
# **Before you run it:** what are the largest values they can have with $E = 4$ and $K = 2$?

# %%
for name, counts in {
    "even": torch.tensor([100, 100, 100, 100]),
    "uneven": torch.tensor([150, 120, 80, 50]),
    "two take all": torch.tensor([200, 200, 0, 0]),
}.items():
    by_formula = counts.double().std(unbiased=False) / counts.double().mean()
    figures = balance(counts)
    print(
        f"{name:13} {counts.tolist()!s:21} CV {figures.cv:.2f} (by the formula {by_formula:.2f})  "
        f"MaxVio {figures.max_vio:.2f}  without any: {figures.dead}"
    )

# %% [markdown]
# A token cannot choose the same expert twice, so at worst the same $K$ experts take everything: CV is
# $\sqrt{E/K - 1}$ then and MaxVio $E/K - 1$, both 1 here. With 8 of 256 experts MaxVio could reach 31.
#
# ## Training a model with this layer
#
# The model: byte embeddings, two blocks with attention and our MoE layer, a head. The text is Tiny Shakespeare, the
# loss next-byte cross-entropy. Nothing looks after the balance (`BalanceConfig()` is "none"). `TrainingStep` reports
# each step's loads.
#
# **Before you run it:** the router starts with random weights. Do you expect even loads in the first step? And then?

# %%
text = "".join(documents("tinyshakespeare")).encode()
data, held_out = torch.tensor(list(text[:-100_000])), torch.tensor(list(text[-100_000:]))
STEPS, BATCH, LENGTH = 80, 8, 64


def batches(generator):
    """Random windows of the text, for ever."""
    while True:
        starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator).tolist()
        tokens = torch.stack([data[start : start + LENGTH + 1] for start in starts])
        yield Batch(tokens, documents=torch.zeros_like(tokens))


train = TrainingStep(
    model,
    optimizer=OptimizerConfig(lr=2e-3),
    balance=BalanceConfig(),
    clip=1.0,
    mtp_weight=0.0,
    device=torch.device("cpu"),
    dtype=torch.float32,
)
losses, loads = [], []
windows = batches(torch.Generator().manual_seed(3))
print("step   loss   loads of layer 0        CV    loads of layer 1        CV")
for number in range(STEPS):
    result = train([next(windows)], LENGTH, lr=2e-3, progress=number / STEPS)
    losses.append(result.loss)
    loads.append(torch.stack([result.loads[0], result.loads[1]]))  # [layers, E]
    if number in (0, 4, 9, 19, 39, 59, 79):
        columns = "   ".join(f"{row.tolist()!s:20} {balance(row).cv:.2f}" for row in loads[-1])
        print(f"{number + 1:4} {result.loss:6.2f}   {columns}")

# %% [markdown]
# The loss falls: the layer works. The loads are another matter.
#
# - *Not even at the start.* The router is random, but the text is not: "e" and the space alone make up nearly a
#   quarter of it, and where their vectors go the load goes.
# - *To an extreme at once.* Within some steps two experts have nearly everything. An expert that is chosen more often
#   gets more gradient, is the better for it sooner, so its weight grows, so it is chosen more often: a loop that
#   feeds itself. And the vectors of all tokens have a part in common: a row of $W$ that grows along it wins with all
#   of them.
# - *Partly back.* Here normalised weights help: among a token's two the gradients of the logits sum to zero, so where
#   one rises the other falls, until a third expert lies above it.
#
# With many experts those that fall behind at the beginning get no tokens, hence no gradient, and may never catch up.
# This is called *routing collapse* (DeepSeekMoE, §3.3). (That busier experts get more gradient follows from the last
# section; that this is what drives the loads here is the usual explanation, and not tested by this run.)

# %%
last = torch.stack(loads[-20:]).sum(0)  # [layers, E]
figures = [balance(row) for row in last]
for number, (row, figure) in enumerate(zip(last, figures, strict=True)):
    shares = "  ".join(f"{share:.0%}" for share in (row / row.sum()).tolist())
    print(f"layer {number}, last 20 steps: shares {shares}   CV {figure.cv:.2f}   MaxVio {figure.max_vio:.2f}")
slowdown = 1 + max(figure.max_vio for figure in figures)
print(f"\nwith one expert per GPU, the worse layer's experts take {slowdown:.2f} times as long as with even loads")

# %% [markdown]
# ## What have the experts taken up?
#
# A `RoutingRecorder` passed to the forward call keeps what the routers decided. First a line of held-out text with
# each byte's first choice below it; then, over more text, what share of its choices each kind of byte gives to each
# expert.

# %%
window = held_out[: 32 * LENGTH].view(32, LENGTH)
recorder = RoutingRecorder()
with torch.no_grad():
    model(window, recorder=recorder)
indices = [recorder.routings[layer_number][0].indices.flatten(0, 1) for layer_number in (0, 1)]  # [N, K] each

line = slice(4 * LENGTH, 5 * LENGTH)
print("text   ", bytes(window.flatten()[line].tolist()).decode().replace("\n", "/"))
for number in (0, 1):
    print(f"layer {number}", "".join(str(first) for first in indices[number][line, 0].tolist()))

kinds = {"vowel": b"aeiou", "consonant": b"bcdfghjklmnpqrstvwxyz", "capital": bytes(range(65, 91)), "space": b" "}
kinds |= {"punctuation": b",.;:!?'-", "line break": b"\n"}
print("\nlayer 0      share of choices by expert")
for name, members in kinds.items():
    of_kind = torch.isin(window.flatten(), torch.tensor(list(members)))
    share = torch.bincount(indices[0][of_kind].flatten(), minlength=E) / (of_kind.sum() * K)
    print(f"{name:12}", "  ".join(f"{value:5.0%}" for value in share.tolist()))

# %% [markdown]
# The experts have divided the bytes among themselves, by no plan of anybody's. They are not experts in subjects: what
# a token *is* tells most about where it goes, which was found in large models too (OpenMoE, arXiv 2402.01739;
# Mixtral, 2401.04088, §5). How much it tells can be measured: the mutual information between the byte and its
# experts, as a share of the most that anything could tell (`analysis/specialisation.py`; chance is subtracted).
# Beside it the same of the model before training, for a random router follows the token too, as everything it sees is
# made of it.
#
# Look at layer 1 as well. An expert with half of all choices is chosen by *every* token, for a token has two. One
# expert of this layer has nearly made itself what chapter 2 builds on purpose, a *shared* expert; and another has
# nearly died.

# %%
untrained, at_first = Transformer(config, generator=torch.Generator().manual_seed(0)), RoutingRecorder()
with torch.no_grad():
    untrained(window, recorder=at_first)
told = {}
for number in (0, 1):
    then = at_first.routings[number][0].indices.flatten(0, 1)
    told[number] = [
        information(window.flatten().numpy(), chosen.numpy(), E, np.random.default_rng(0)).share
        for chosen in (then, indices[number])
    ]
    print(f"layer {number}: the byte alone tells {told[number][1]:.0%} of what decides the choice", end="")
    print(f" ({told[number][0]:.0%} before training)")
    used = torch.bincount(indices[number].flatten(), minlength=E) / len(indices[number])
    print("         share of tokens that choose each expert:", "  ".join(f"{share:.0%}" for share in used.tolist()))

# %% [markdown]
# ## Checks

# %%
check = Checks()
sums = recorder.routings[0][0].weights.sum(-1)
off = (sums - 1).abs().max().item()
check("gate weights of a token sum to 1", off < 1e-6, f"within {off:.0e}")
pairs = Counter(tuple(sorted(row)) for row in indices[0].tolist())
first, most = pairs.most_common(1)[0]
figure = f"layer 0 uses {len(pairs)} of 6 pairs, the commonest for {most / pairs.total():.0%} of the tokens"
check("different tokens choose different experts", len(pairs) > 3 and most < 0.5 * pairs.total(), figure)
same = torch.allclose(ours, theirs, atol=1e-6)
check("the loop over experts gives what the module gives", same, f"within {difference:.0e}")
check("a gradient reaches the router", router_norm > 0, f"norm {router_norm:.1e}")
reached = all((norm > 0) == (count > 0) for norm, count in zip(expert_norms, load.tolist(), strict=True))
check("a gradient reaches every chosen expert", reached and int((load > 0).sum()) == E, f"{E} of {E}")
check(
    "experts that a token did not choose get none of its gradient",
    int((of_one == 0).sum()) == E - K,
    f"{E - K} of {E} get none",
)
chosen = decided.indices.flatten().tolist()
others = [i for i in range(E) if i not in chosen]
normalised, plain, single = rows.values()
least = min(normalised[i] for i in chosen)
check("normalised weights: rows that were not chosen get none", max(normalised[i] for i in others) < 1e-5 * least)
check("weights as they are: these get some", min(plain[i] for i in others) > 1e-3 * least)
check("K = 1, normalised: the router learns nothing", max(single) < 1e-5 * least)
agrees = torch.allclose(decided.weights.grad.flatten(), torch.tensor(formula), atol=1e-5)
check("the gradient of a gate weight is dL/dy · FFN(x)", agrees)
same_cost = cost["MoE, 2 of 4 × 512"][1] < 1.01 * cost["dense FFN, width 1024"][1]
check("the operations of a dense FFN of half the width", same_cost)
check("DeepSeekMoE-16B costs about 40% of LLaMA2-7B", 0.38 < ratio < 0.42, f"{ratio:.1%}")
worse = max(figure.cv for figure in figures)
check("without balancing the load is uneven", worse > 0.2, f"CV {worse:.2f}")
check("the loss falls", losses[-1] < losses[0] - 1, f"{losses[0]:.2f} to {losses[-1]:.2f}")
check.end()

# %% [markdown]
# ## What to be able to explain
#
# - **Held and used.** Why a MoE layer's operations go with $K$ and its parameters with $E$; what that does to memory,
#   to one user's speed, and to the batch that a server wants (DeepSeekMoE, arXiv 2401.06066, §2).
# - **Dispatch and combine.** How $[N, D]$ becomes $E$ matrices of different heights and comes back; what a fixed
#   capacity would change.
# - **The gradient.** Why the router learns though top-k has no gradient, and from what it learns nothing.
# - **Normalised or not.** What `norm_topk_prob` does to the weights and to the gradient, and why $K = 1$ needs it off.
# - **Load.** CV and MaxVio, their largest values, and what an uneven load costs where each expert has a GPU.
# - **Why uneven.** The loop that makes a busy expert busier, and what collapse means when there are many experts.
#
# To try: `num_experts_per_tok` 1 and 3; `norm_topk_prob: False` in training; `n_routed_experts` 16. Which of them
# comes to a more uneven load, and does the loss mind? Chapter 2 does something about it.
