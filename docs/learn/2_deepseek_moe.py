# %% [markdown]
# # 2. DeepSeekMoE
#
# Chapter 1 built a plain mixture of experts: $E$ experts, a softmax router, the best $K$, and loads that nobody looks
# after. DeepSeek's layer is that with five changes. Each answers a question:
#
# | question | answer | where |
# | --- | --- | --- |
# | How large should an expert be? | small, and many of them: *fine-grained* | DeepSeekMoE (arXiv 2401.06066) §3.1 |
# | Who knows what every token needs? | *shared* experts, which all tokens pass | DeepSeekMoE §3.2 |
# | What is a score? | a *sigmoid* of each logit for itself | V3 (2412.19437) §2.1.2 |
# | Who keeps the loads even? | a *bias* in the selection, moved by a rule | 2408.15664; V3 §2.1.2 |
# | How far does a token travel? | to few *groups* of experts | V2 (2405.04434) §2.2.2; V3 §2.1.2 |
#
# At the end stands a reading of "fine-grained segmentation" that circulates and that DeepSeek does not do, built so
# that it can be compared.
#
# Symbols as in chapter 1: $D$ hidden, $E$ experts, $K$ experts a token, $F$ expert width, $N$ tokens; $s_i$ is the
# score of expert $i$ for a token, $b_i$ its bias, $g_i$ its gate weight. Code: `src/abyssal/model/router.py`,
# `moe.py`, `variants.py`, `src/abyssal/training/balance.py`.

# %%
import math
from types import SimpleNamespace

import torch
from checks import Checks
from torch.nn.functional import cross_entropy, linear, silu

from abyssal.analysis.balance import balance
from abyssal.analysis.flops import count_flops
from abyssal.analysis.parameters import count_parameters
from abyssal.config import preset, resolve_model
from abyssal.data.corpus import documents
from abyssal.data.loader import Batch
from abyssal.model import RoutingRecorder, Transformer
from abyssal.model.moe import MoE
from abyssal.model.router import Router
from abyssal.model.variants import SegmentMoE
from abyssal.training.balance import AuxiliaryLoss, BiasSign
from abyssal.training.loss import compute_losses
from abyssal.training.optimizer import learning_rate
from abyssal.training.recipe import BalanceConfig, OptimizerConfig, ScheduleConfig
from abyssal.training.step import TrainingStep

check = Checks()


def seeded(number):
    return torch.Generator().manual_seed(number)


# %% [markdown]
# ## Fine-grained experts: the same parameters, cut finer
#
# Cut every expert in $m$ experts of width $F/m$ and let a token choose $mK$ of $mE$. The parameters held stay the
# same, those used stay the same, the operations stay the same. What grows is the number of *teams* that a token can
# choose from: $\binom{E}{K}$ becomes $\binom{mE}{mK}$.
#
# The paper's example is 16 experts with 2 active, each cut in four.
#
# **Before you run it:** how many teams are there before the cut, and roughly how many after?

# %%
print(" m    E   K    F   routed, held   routed, active   router   teams")
cuts = {}
for m in (1, 2, 4, 8):
    moe = {"n_routed_experts": 16 * m, "num_experts_per_tok": 2 * m, "moe_intermediate_size": 512 // m}
    counts = count_parameters(resolve_model({"preset": "first-moe", "moe": moe})).layers[0]
    held, active = counts.by_part["routed experts"], counts.active_by_part["routed experts"]
    cuts[m] = held, active, math.comb(16 * m, 2 * m)
    row = f"{m:2} {16 * m:4} {2 * m:3} {512 // m:4} {held:14,} {active:16,} {counts.by_part['router']:8,}"
    print(row, f"  {cuts[m][2]:,}")
v3 = preset("deepseek-v3").moe
print(f"\nV3 chooses {v3.num_experts_per_tok} of {v3.n_routed_experts}:", end=" ")
print(f"{math.comb(v3.n_routed_experts, v3.num_experts_per_tok):.2e} teams per layer")

# %% [markdown]
# 120 teams become 4.4 billion. The paper's argument: a large expert has to hold everything that its tokens need; a
# small one can hold one piece of it and be combined with others. The paper shows the gain at 2B parameters and 100B
# tokens (§4); models small enough for a laptop do not: `docs/lab/granularity` found no difference.
#
# The price is in the columns beside it. The router grows by $m$. The matrices get thin (V3: 7168 × 2048), and every
# expert gets $1/m$ of the rows for the same batch, which matrix units like less. And a token's copies go to more
# places: where experts lie on different machines that is traffic, which the groups below will limit.
#
# ## Shared experts: what every token needs
#
# If some knowledge is needed for every token, each routed expert has to learn it for itself. Or a token always passes
# through an expert that is not chosen but given:
#
# $$ y = \sum_{j=1}^{n_{shared}} \mathrm{FFN}^{shared}_j(x) + \sum_{i \in \mathcal{T}} g_i \, \mathrm{FFN}_i(x) $$
#
# It has no gate weight. In the code there is one MLP of width $n_{shared} \cdot F$, for that is the same thing: a
# SwiGLU network's hidden units do not talk to each other, so a wide network is the sum of narrow ones.

# %%
moe_config = preset("deepseek-v2-lite").moe.model_copy(update={"moe_intermediate_size": 32})
layer = MoE(64, moe_config)
for parameter in layer.parameters():
    parameter.data.normal_(0, 0.1, generator=seeded(0))
x = torch.randn(2, 5, 64, generator=seeded(1))

shared = layer.shared_experts
narrow = 0
for j in range(moe_config.n_shared_experts):
    units = slice(32 * j, 32 * (j + 1))
    gate, up = linear(x, shared.gate_proj.weight[units]), linear(x, shared.up_proj.weight[units])
    narrow = narrow + linear(silu(gate) * up, shared.down_proj.weight[:, units])
from_routed, from_shared = layer.parts(x, layer.route(x))
apart = (narrow - from_shared).abs().max().item()
print(f"{moe_config.n_shared_experts} experts of 32 side by side or one of {shared.up_proj.out_features}: ", end="")
print(f"largest difference {apart:.1e}")
print("layer = routed + shared:", torch.allclose(layer(x, layer.route(x)), from_routed + from_shared))

# %% [markdown]
# Chapter 1's layer 1 had made such an expert by itself: nearly every token chose it. Given from the start, it takes no
# place among the $K$ and cannot upset the balance. Switching it off for one more routed expert cost the paper's model
# dearly (§4.5), so it does hold something that the others do not.
#
# How much is shared differs: DeepSeekMoE-16B and V2 have 2 beside 6 chosen, V3 has 1 beside 8.
#
# ## Sigmoid scores
#
# A softmax makes experts compete: the scores sum to 1, so with 256 experts the average score is $1/256$ whatever the
# token, and one large logit takes from all the others. A sigmoid judges every expert for itself.
#
# **Before you run it:** a token is very sure of expert 0. By softmax, by how much do the scores of experts 1 and 2
# differ? And what does a bias of 0.01 do to their order?

# %%
logits = torch.tensor([8.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0])
softmax, sigmoid = logits.softmax(-1), logits.sigmoid()
print("expert      ", *(f"{i:7}" for i in range(8)))
print("logit       ", *(f"{value:7.2f}" for value in logits.tolist()))
print("softmax     ", *(f"{value:7.4f}" for value in softmax.tolist()))
print("sigmoid     ", *(f"{value:7.4f}" for value in sigmoid.tolist()))
bias = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0.01])  # expert 7, the last by its logit
print("best 2 by softmax + bias:", (softmax + bias).topk(2).indices.tolist())
print("best 2 by sigmoid + bias:", (sigmoid + bias).topk(2).indices.tolist())
moved = ((logits + 3).softmax(-1) - softmax).abs().max().item(), ((logits + 3).sigmoid() - sigmoid).abs().max().item()
print(f"3 added to all logits: softmax moves by {moved[0]:.0e}, sigmoid by up to {moved[1]:.2f}")

# %% [markdown]
# Below a confident choice softmax scores are so close together that a bias of 0.01 decides for the token. Sigmoid
# scores of logits between about -3 and 3 keep apart whatever the other experts score (beyond, they saturate too), and
# they lie in $(0, 1)$ for any number of experts: a step of the bias means much the same in every model. The last line
# says what else differs: a softmax cannot see that all logits are high, a sigmoid can. (This is our reading: V3's
# paper names no reason. Loss-free balancing, 2408.15664, has sigmoid scores too.)
#
# The chosen scores are then divided by their sum, and multiplied by `routed_scaling_factor` (2.5 in V3), so that the
# routed part has a fixed weight beside the shared expert, which has none.
#
# ## Balancing by a bias
#
# Every expert gets a number $b_i$ that is added to its score *for the selection only*:
#
# $$ \mathcal{T} = \mathrm{topk}(s + b, K), \qquad g_i = \frac{s_i}{\sum_{j \in \mathcal{T}} s_j}, \qquad
#    b_i \leftarrow b_i + \gamma \cdot \mathrm{sign}(\overline{load} - load_i) $$
#
# (times `routed_scaling_factor`, which is 1 in this chapter's models). The last is a rule, applied after each
# optimizer step, with the load of the whole batch: an expert that got more than the mean is made a little less
# likely, one that got less a little more. Three things to see:
#
# 1. The weights do not know the bias. A token that chooses the same experts as before gets the same output.
# 2. The bias has no gradient, and could not have one: it enters through a choice, and the choice is integers.
# 3. It is kept in FP32: at 0.5 a step of 0.001 vanishes in BF16.

# %%
moe16 = resolve_model(
    {
        "preset": "first-moe",
        "moe": {"n_routed_experts": 16, "num_experts_per_tok": 4, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    }
).moe
router = Router(64, moe16)
router.weight.data.normal_(0, 0.15, generator=seeded(0))
tokens = torch.randn(1, 512, 64, generator=seeded(1))

before = router(tokens)
router.e_score_correction_bias.copy_(0.1 * torch.randn(16, generator=seeded(2)))
after = router(tokens)


def by_expert(routing):
    """Weights [N, E], 0 where an expert is not chosen."""
    return torch.zeros_like(routing.scores).scatter(-1, routing.indices, routing.weights).squeeze(0)


same = ((by_expert(before) > 0) == (by_expert(after) > 0)).all(-1)
difference = (by_expert(before) - by_expert(after))[same].abs().max().item()
print(f"1. {same.float().mean():.0%} of the tokens choose as before; their weights differ by {difference:.0e}")
unbiased = after.scores.gather(-1, after.indices)
by_formula = unbiased / unbiased.sum(-1, keepdim=True)
print("   all weights are those of the formula, without b:", torch.allclose(after.weights, by_formula))

router.e_score_correction_bias.requires_grad_(True)
some_loss = router(tokens).weights.square().sum()
(of_bias,) = torch.autograd.grad(some_loss, router.e_score_correction_bias, allow_unused=True)
router.e_score_correction_bias.requires_grad_(False)
print("2. gradient of the bias:", of_bias, "| among the parameters:", [name for name, _ in router.named_parameters()])
print("3. in BF16, 0.5 + 0.001 =", (torch.tensor(0.5, dtype=torch.bfloat16) + 0.001).item())

router.e_score_correction_bias.zero_()
load = before.load()
BiasSign(rate=0.03).after_step(0, router, load)
by_rule = 0.03 * (load.float().mean() - load).sign()
print("the rule by hand is the library's:", torch.equal(by_rule, router.e_score_correction_bias))

# %% [markdown]
# ### How large is γ?
#
# First the rule alone, on a router that does not learn: 100 steps of 512 fresh tokens each. All tokens have a part in
# common, so that some experts are favourites of all. (V3 was trained with γ = 0.001.)
#
# Even a perfect rule does not bring the CV of a step to 0. If each of $N$ tokens chose an expert with probability
# $K/E$, by chance, the loads would still vary:
#
# $$ \mathrm{CV}_{chance} = \sqrt{\frac{1 - K/E}{N \cdot K/E}} $$
#
# **Before you run it:** evenness takes biases between about -0.3 and 0.3 here. What does γ = 0.001 reach in 100 steps?
# What does a constant γ = 0.03 do once it is there? And if the biases begin somewhere else, do they end elsewhere?

# %%
common = 0.7 * torch.randn(64, generator=seeded(3))
favour = 0.15 * torch.randn(16, 64, generator=seeded(4))
chance = math.sqrt((1 - 4 / 16) / (512 * 4 / 16))
rates = {
    "0.001, constant": BiasSign(0.001),
    "0.03, constant": BiasSign(0.03),
    "0.03, cosine to 0": BiasSign(0.03, final=0.0),
    "the same, elsewhere": BiasSign(0.03, final=0.0),
}
fixed, ends = {}, {}
print("γ                    CV at step 1     10     20     50   mean 81-100   movement of b, 1-20   81-100")
for number, (name, rule) in enumerate(rates.items()):
    router = Router(64, moe16)
    router.weight.data.copy_(favour)
    if name == "the same, elsewhere":
        router.e_score_correction_bias.copy_(0.3 * torch.randn(16, generator=seeded(13)))
    # Each has tokens of its own, so that what two of them agree in is not the tokens' doing.
    generator, cvs, biases = seeded(50 + number), [], [router.e_score_correction_bias.clone()]
    for step in range(100):
        with torch.no_grad():
            load = router(common + torch.randn(1, 512, 64, generator=generator)).load()
        cvs.append(balance(load).cv)
        rule.after_step(0, router, load, progress=step / 100)
        biases.append(router.e_score_correction_bias.clone())
    first, last = ((biases[b] - biases[a]).abs().mean().item() for a, b in ((0, 20), (80, 100)))
    fixed[name] = sum(cvs[80:]) / 20, first, last
    ends[name] = biases[-1] - biases[-1].mean()  # adding the same to all biases changes no choice
    shown = "  ".join(f"{cvs[step]:.3f}" for step in (0, 9, 19, 49))
    print(f"{name:20} {shown:>33} {fixed[name][0]:13.3f} {first:21.3f} {last:8.3f}")
print(f"\nCV by chance alone: {chance:.3f}")
here, elsewhere = ends["0.03, cosine to 0"], ends["the same, elsewhere"]
apart_at_end = (here - elsewhere).abs().max().item()
print(f"biases, less their mean: {here.min():.2f} to {here.max():.2f}; ", end="")
print(f"begun elsewhere they end within {apart_at_end:.3f} of that")

# %% [markdown]
# - γ = 0.001 moves a bias by at most 0.1 in 100 steps. The rule is right and the run too short for it.
# - A constant 0.03 is there within 20 steps. Then it goes on swinging: the sign is hardly ever 0, so every bias takes
#   a full step each time, and the loads stay above chance.
# - Let it fall to 0 along a cosine, and it comes to rest, at chance.
# - That it comes to rest is no wonder, for γ does. But it comes to rest *at the same place*, from zeros or from random
#   biases, and with other tokens: the biases converge to what evenness takes.
#
# `docs/notebook.md` found the same in a real run of 560 steps. γ = 0.001 could move a bias by 0.56 at most, and at
# step 40 CV was still 0.5 to 1.1. Constant 0.01 kept swinging. Falling geometrically to 1% the bias came to rest
# *before the router did*, and CV ended at 0.38: the rule must follow a router that is still learning, so γ should
# fall in step with the learning rate. The demo's recipe has 0.01 along a cosine to 0. V3 could keep 0.001 nearly to
# the end, since it has hundreds of thousands of steps to settle in, and sets it to 0 for the last 500B of 14.8T
# tokens (§4.2).
#
# A rule of thumb: γ · steps must be several times the bias that evenness takes, and γ should come to rest when the
# router does.
#
# ## The same in training
#
# Chapter 1's model in small ($D$ = 64, so that we can afford several runs): a dense block first, as DeepSeek has it,
# then one with 16 routed experts of 32, 4 active, and a shared one. Each run has the same seed, data and order, and
# differs only in who looks after the balance:
#
# - nobody;
# - the bias rule, γ = 0.03 along a cosine to 0;
# - the auxiliary loss that came before it (DeepSeekMoE §3.3): $\alpha \sum_i f_i P_i$, where $f_i$ is the share of
#   the assignments that went to $i$, times $E$, and $P_i$ is the mean score of $i$ (sigmoid scores are first divided
#   by their sum over the experts, V3 eq. 19). $f$ has no gradient, $P$ has. It is added to the training loss. We take
#   α = 0.1, far above the papers' 0.001 to 0.01, for the run is short;
# - and, for later, the bias rule with segments.

# %%
text = torch.tensor(list("".join(documents("tinyshakespeare")).encode()))
data, held_out = text[:-100_000], text[-100_000:]
STEPS, BATCH, LENGTH = 100, 24, 64
LAYER = 1  # the one with experts
HELD_OUT = held_out[: 200 * LENGTH + 1]


def small(**moe):
    """The small model's config, with changes of its experts."""
    experts = {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "n_shared_experts": 1}
    router = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 1}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    shape = {"preset": "first-moe", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 192}
    return resolve_model(shape | {"attention": attention, "moe": experts | router | moe})


def run(balancing, **moe):
    """Trains the small model; what it came to."""
    model = Transformer(small(**moe), generator=seeded(0))
    step = TrainingStep(
        model,
        optimizer=OptimizerConfig(lr=3e-3),
        balance=BalanceConfig.model_validate(balancing),
        clip=1.0,
        mtp_weight=0.0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    generator, schedule, loads, biases = seeded(100), ScheduleConfig(warmup=10, final=0.02), [], [torch.zeros(16)]
    for number in range(STEPS):
        starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator).tolist()
        window = torch.stack([data[start : start + LENGTH + 1] for start in starts])
        batch = Batch(window, documents=torch.zeros_like(window))
        result = step([batch], LENGTH, lr=learning_rate(number, STEPS, 3e-3, schedule), progress=number / STEPS)
        loads.append(result.loads[LAYER])
        biases.append(model.routers[LAYER].e_score_correction_bias.clone())
    recorder = RoutingRecorder()
    with torch.no_grad():
        logits = model(HELD_OUT[:-1].view(-1, LENGTH), recorder=recorder)
    loss = cross_entropy(logits.flatten(0, 1), HELD_OUT[1:]).item()
    routing = recorder.routings[LAYER][0]
    return SimpleNamespace(model=model, loads=torch.stack(loads), biases=biases, loss=loss, routing=routing)


RULE = {"bias_sign": {"rate": 0.03, "final": 0.0}}
runs = {
    "nobody": run("none"),
    "bias rule": run(RULE),
    "auxiliary loss": run({"token_loss": {"alpha": 0.1, "normalize": True}}),
    "segments, bias rule": run(RULE, segments=4),
}
figures = {name: balance(done.loads[-20:].sum(0)) for name, done in runs.items()}
print("                      CV, first 20 steps   last 20   MaxVio   held-out text: CV   nats a byte")
for name in ("nobody", "bias rule", "auxiliary loss"):
    done, figure = runs[name], figures[name]
    start, elsewhere = balance(done.loads[:20].sum(0)).cv, balance(done.routing.load()).cv
    print(f"{name:21} {start:19.3f} {figure.cv:9.3f} {figure.max_vio:8.2f} {elsewhere:19.3f} {done.loss:13.3f}")
print("\nlast step's loads, from the busiest:")
for name in ("nobody", "bias rule", "auxiliary loss"):
    print(f"{name:15}", *(f"{count:5}" for count in sorted(runs[name].loads[-1].tolist(), reverse=True)))

# %% [markdown]
# Left alone, some experts are chosen by nearly every token (1536 a step) and some by none. The rule brings CV below
# 0.1. (Held-out text is another part of the plays, and its loads can be less even: a bias balances the mixture that
# it was moved by, not each text.)
#
# The losses lie within a few hundredths of each other. Another seed moves any of them by as much, so they say nothing
# about quality: 100 steps on bytes learn little more than which byte follows which. What a short run *can* show is the
# balance, and how each strategy gets there.
#
# Does the bias settle here too, where the router itself learns? Its net movement in 20 steps, mean over the experts
# and less the movement of their common mean, which changes no choice. Beside it, how far a bias could have gone, had
# the sign always been the same: the sum of γ over these steps.

# %%
b = [bias - bias.mean() for bias in runs["bias rule"].biases]
ranges = [range(end - 20, end) for end in range(20, STEPS + 1, 20)]
moves = [(b[steps.stop] - b[steps.start]).abs().mean().item() for steps in ranges]
gamma = [RULE["bias_sign"]["rate"] * 0.5 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
could = [sum(gamma[steps.start : steps.stop]) for steps in ranges]
print("steps      ", "  ".join(f"{steps.start + 1:3}-{steps.stop:3}" for steps in ranges))
print("movement   ", "  ".join(f"{move:7.4f}" for move in moves))
print("sum of γ   ", "  ".join(f"{most:7.4f}" for most in could))
print("share      ", "  ".join(f"{move / most:7.0%}" for move, most in zip(moves, could, strict=True)))
print(f"\nbiases at the end, less their mean: {b[-1].min():.2f} to {b[-1].max():.2f}; scores lie in (0, 1)")

# %% [markdown]
# The last row is the one to read. 20 steps of equal length with a coin's throw for each sign would come to 18% of
# their sum, on average: after the first few steps the biases stand where they are wanted, and step to and fro about
# it. Where that is moves on as the router learns; they follow, and come to rest when γ does.
#
# ## What the auxiliary loss does on its way
#
# The auxiliary loss balances as well. But it is a loss: its gradient is added to that of the language model, in the
# router and in everything below it. So we take the three trained models and look at both gradients where they meet.
#
# **Before you run it:** which is larger at the router, the language model's gradient or that of $\alpha \sum f P$ with
# α = 0.1? Does it fall silent where the loads are even? Does it reach the byte embeddings?

# %%
starts = torch.randint(len(data) - LENGTH, (64,), generator=seeded(6)).tolist()
window = torch.stack([data[start : start + LENGTH + 1] for start in starts])


def loudness(model):
    """Norm of the auxiliary gradient (α = 1) by that of the language model's, at the router and at the embedding."""
    recorder = RoutingRecorder()
    losses = compute_losses(model, Batch(window, torch.zeros_like(window)), LENGTH, recorder=recorder)
    places = model.routers[LAYER].weight, model.model.embed_tokens.weight
    language = torch.autograd.grad(losses.nats[0] / losses.counts[0], places, retain_graph=True)
    auxiliary = AuxiliaryLoss(alpha=1.0, by_sequence=False, normalize=True).loss(recorder.routings[LAYER][0])
    both = zip(language, torch.autograd.grad(auxiliary, places), strict=True)
    return [(of_auxiliary.norm() / of_language.norm()).item() for of_language, of_auxiliary in both]


ALPHAS = 0.0001, 0.001, 0.01, 0.1
loud = {}
print("norm of the auxiliary gradient / of the language model's")
print("model trained with   at      " + "".join(f"   α = {alpha:<7}" for alpha in ALPHAS))
for name in ("nobody", "auxiliary loss", "bias rule"):
    loud[name] = loudness(runs[name].model)
    for place, ratio in zip(("router", "embedding"), loud[name], strict=True):
        print(f"{name:20} {place:9}" + "".join(f"{alpha * ratio:14.5f}" for alpha in ALPHAS))

# %% [markdown]
# While the loads are uneven, the auxiliary gradient of α = 0.1 is many times the language model's: the router hears
# little else, and some of it reaches the embeddings, which have nothing to do with balance. Once they are even it is
# of the order of the language model's own: it never falls silent, but hardly reaches the embeddings any more. With an
# α so small that it does not disturb, it does not balance either (`docs/notebook.md`: at 0.001 CV was still 1.1 after
# 560 steps). This is the dilemma that loss-free balancing begins from (2408.15664, §1 and §2). The bias changes
# *which* experts answer, but the gradients of what they answered are the language model's own.
#
# What it costs in loss is another question, and at this size the answer is: nothing that several seeds could tell from
# chance (`docs/lab/balancing`).
#
# V3 does keep an auxiliary loss beside the bias, by sequence and with α = 0.0001 (eq. 17 to 20), against extremes
# within a single sequence, which a bias for the whole batch does not see. All of them are in `training/balance.py`
# and can be joined in a recipe: `balance=bias_sign+sequence_loss`.
#
# ## Groups: how far a token travels
#
# V3's 256 experts lie in 8 groups, one per machine. To bound the traffic, a token may use experts of 4 groups only.
# First the groups are scored (V2: by their best expert; V3: by the sum of their two best), then the top $K$ are taken
# within the best groups.
#
# By hand, for 16 experts in 4 groups of which 2 are kept:

# %%
limited = moe16.model_copy(update={"n_group": 4, "topk_group": 2})
router = Router(64, limited)
router.weight.data.copy_(favour)
router.e_score_correction_bias.copy_(0.1 * torch.randn(16, generator=seeded(7)))
with torch.no_grad():
    decided = router(tokens)
choice = decided.scores + router.e_score_correction_bias  # [B, T, E]
strength = choice.unflatten(-1, (4, 4)).topk(2, dim=-1).values.sum(-1)  # [B, T, groups]
kept = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, strength.topk(2, dim=-1).indices, True)
inside = kept.repeat_interleave(4, dim=-1)  # [B, T, E]
by_hand = choice.masked_fill(~inside, float("-inf")).topk(4, dim=-1).indices
print("by hand, the router's choice:", torch.equal(by_hand, decided.indices))

# The same number taken from all biases should change nothing.
lower = choice - 1
with_infinity, with_zero = (lower.masked_fill(~inside, mask).topk(4, dim=-1).indices for mask in (float("-inf"), 0.0))
astray = (~inside.gather(-1, with_zero)).any(-1).float().mean().item()
print("all biases lower by 1, masked with -inf: the same choice:", torch.equal(with_infinity, by_hand))
print(f"masked with 0: {astray:.0%} of the tokens use an expert of a group that is out")

wide = Router(64, v3)
wide.weight.data.normal_(0, 0.15, generator=seeded(8))
reached = {}
for name, moe in {"without groups": v3.model_copy(update={"n_group": 1, "topk_group": 1}), "V3's groups": v3}.items():
    wide.moe = moe
    with torch.no_grad():
        groups = wide(tokens).indices // 32  # [B, T, K]
    reached[name] = torch.tensor([len(set(row)) for row in groups[0].tolist()]).float()
    mean, most = reached[name].mean(), int(reached[name].max())
    print(f"{name:15} a token's 8 experts lie in {mean:.2f} groups on average, in {most} at most")

# %% [markdown]
# The trap with 0: a score plus its bias can be negative, and then a kept expert loses to one that is out. V2's code
# masks with 0, and nothing goes wrong, since softmax scores are positive; with a bias it must be $-\infty$.
#
# ## A misreading: segments of the token
#
# "Fine-grained expert segmentation" has been read as cutting the *token*: its hidden vector in $m$ parts of $D/m$,
# each part routed for itself to experts that work on $D/m$ numbers. The paper cuts *experts*; each still sees the
# whole vector. The other reading is an idea as well, so the library has it (`moe.segments`, `model/variants.py`): one
# router over $D/m$ looks at each part, the parts share the experts ($D/m \to F \to D/m$), the outputs are put side by
# side.


# %%
def described(model_config):
    counts, flops = count_parameters(model_config).layers[LAYER], count_flops(model_config, LENGTH).by_part
    router = counts.by_part["router"] - model_config.moe.n_routed_experts  # which counts the biases in
    return counts.by_part["routed experts"], flops["routed experts"], router


sides = {
    "whole vector": small(),
    "4 segments": small(segments=4),
    "4 segments, width × 4": small(segments=4, moe_intermediate_size=128),
}
cost = {name: described(side) for name, side in sides.items()}
print("                        routed parameters   their operations per token   router   nats a byte, held out")
for name, (held, flops, rows) in cost.items():
    loss = {"whole vector": runs["bias rule"].loss, "4 segments": runs["segments, bias rule"].loss}.get(name)
    print(f"{name:23} {held:17,} {flops:28,} {rows:8,} {'not trained' if loss is None else f'{loss:.3f}':>23}")

# %% [markdown]
# With the same width, segments hold $1/m$ of the parameters for the same operations; with as many parameters they cost
# $m$ times the operations. So the trade is the wrong way round: a MoE is meant to hold much and compute little.
#
# The two losses tell nothing again; other seeds move them by more than they differ. What segments choose, and what
# they *can* compute, tells more. If the segments of a token chose without looking at each other, and no expert was
# preferred, a token would use $E (1 - (1 - K/E)^m)$ different experts.

# %%
chosen = runs["segments, bias rule"].routing.indices.view(-1, 4, 4).sort(-1).values  # [N, m, K], as sets
differ = (chosen != chosen[:, :1]).any(-1).any(-1).float().mean().item()
distinct = torch.tensor([len(set(row)) for row in chosen.flatten(1).tolist()]).float().mean().item()
independent = 16 * (1 - (1 - 4 / 16) ** 4)
print(f"tokens whose segments do not all choose the same experts: {differ:.1%}")
print(f"different experts that a token uses: {distinct:.1f}; by chance {independent:.1f}, with whole vectors 4")

# Which outputs depend on which inputs: the layer's Jacobian for one token, in blocks of D/m.
alone = small(n_shared_experts=0).moe
layers = {"whole vector": MoE(64, alone), "4 segments": SegmentMoE(64, alone.model_copy(update={"segments": 4}))}
token = torch.randn(1, 1, 64, generator=seeded(9))
blocks = {}
for name, layer in layers.items():
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.1, generator=seeded(10))
    whole = torch.autograd.functional.jacobian(lambda y, at=layer: at(y, at.route(y)).flatten(), token)
    blocks[name] = whole.view(4, 16, 4, 16).pow(2).sum((1, 3)).sqrt()
    print(f"\n{name}: how strongly each part of the output depends on each part of the input")
    for row in blocks[name].tolist():
        print("   ", "  ".join(f"{value:.3f}" for value in row))

# %% [markdown]
# A segment's output does not depend on the other segments at all. In a transformer attention's projections mix the
# segments again between two layers, which is why the loss hardly shows it. Alone, such a layer cannot compute what
# needs the whole vector. A test with a known answer: learn $y = R x$ for a random rotation $R$ and inputs whose
# numbers are independent of each other. The part of $y$ that a segment can know is what $R$'s own block of $D/m
# \times D/m$ makes of it, about $1/m$ of the variance. The rest is the least error that segments can ever reach,
# however many parameters they have and however long they learn: about $1 - 1/m$. The segments get width × 4 here, so
# that both layers have as many parameters.

# %%
rotation = torch.linalg.qr(torch.randn(64, 64, generator=seeded(11))).Q
own = torch.stack([rotation.view(4, 16, 4, 16)[i, :, i].square().sum() for i in range(4)]).sum().item() / 64
least, errors = 1 - own, {}
print(f"the least that segments can reach: {least:.3f}; an output of 0 has 1")
rivals = {
    "whole vector": MoE(64, alone),
    "segments": SegmentMoE(64, alone.model_copy(update={"segments": 4, "moe_intermediate_size": 128})),
}
for name, layer in rivals.items():
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.1, generator=seeded(10))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    generator, history = seeded(12), []
    for _ in range(150):
        points = torch.randn(1, 256, 64, generator=generator)
        error = (layer(points, layer.route(points)) - points @ rotation).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        history.append(error.item())
    errors[name] = sum(history[-25:]) / 25
    print(f"{name:13} error after 150 steps: {errors[name]:.3f}")

# %% [markdown]
# ## Checks

# %%
held = {figure[:2] for figure in cuts.values()}
check("cut finer: the same parameters held and active", len(held) == 1, f"{cuts[1][0]:,} and {cuts[1][1]:,}")
teams = cuts[1][2], cuts[4][2]
check(
    "teams of 16 experts and of 64 as in the paper (§3.1)", teams == (120, 4_426_165_368), f"{teams[0]}, {teams[1]:,}"
)
check("shared experts side by side are one wide MLP", apart < 1e-5, f"within {apart:.0e}")
check("the bias chooses, but is not in the weights", difference < 1e-6 and torch.allclose(after.weights, by_formula))
check("the bias has no gradient and is no parameter", of_bias is None and len(list(router.parameters())) == 1)
check("γ = 0.001 is too slow for 100 steps", fixed["0.001, constant"][0] > 0.3, f"CV {fixed['0.001, constant'][0]:.2f}")
settled, swinging = fixed["0.03, cosine to 0"], fixed["0.03, constant"]
check("a falling γ ends nearer to chance", settled[0] < swinging[0], f"CV {settled[0]:.3f}, constant {swinging[0]:.3f}")
without, with_bias = figures["nobody"].cv, figures["bias rule"].cv
check("trained with the bias rule, CV < 0.1", with_bias < 0.1 < without, f"{with_bias:.3f}, without {without:.2f}")
spread = (here.max() - here.min()).item()
check("the bias converges: wherever it begins, to the same values", apart_at_end < 0.1 * spread, f"{apart_at_end:.3f}")
net = sum(moves[1:]) / sum(could[1:])
check("in training most of its steps are taken back after the first 20", net < 0.3, f"net {net:.0%} of all")
uneven, even = (0.1 * loud[name][0] for name in ("nobody", "auxiliary loss"))
check(
    "uneven loads: α = 0.1 outweighs the language model at the router", uneven > 3, f"{uneven:.0f} times its gradient"
)
check("even loads: far less, but it does not fall silent", 0.1 < even < uneven / 3, f"{even:.1f} times")
check("groups by hand are the router's", torch.equal(by_hand, router(tokens).indices))
keeps = torch.equal(with_infinity, by_hand)
check("-inf keeps to the groups, 0 does not", keeps and astray > 0, f"{astray:.0%} astray")
check("V3's groups: 4 at most, more without", reached["V3's groups"].max() == 4 < reached["without groups"].mean())
share = cost["4 segments"][0] / cost["whole vector"][0]
same_operations = cost["4 segments"][1] == cost["whole vector"][1]
check("4 segments: the same operations with a quarter of the parameters", share == 0.25 and same_operations)
check("segments of a token choose different experts", distinct > 0.9 * independent, f"{distinct:.1f} of 16, all in all")
off = blocks["4 segments"][~torch.eye(4, dtype=torch.bool)].max().item()
check("a segment's output does not depend on the others", off == 0)
found = errors["whole vector"], errors["segments"]
told = f"{found[0]:.2f}; segments of as many parameters {found[1]:.2f}"
check("a rotation: whole vectors get below what segments could ever reach", found[0] < least <= found[1], told)
check.end()

# %% [markdown]
# ## What to be able to explain
#
# - **Fine-grained.** What cutting experts in $m$ keeps and what it multiplies; what it costs in router, matrix shapes
#   and traffic (2401.06066 §3.1).
# - **Shared.** Why they exist, why they have no gate weight, why two are one wide MLP (§3.2).
# - **Sigmoid or softmax.** What competing scores mean for confident tokens and for the size of a bias (V3 §2.1.2).
# - **The bias.** What it changes and what it does not; why it is no parameter; why a sign, why γ falls, and which γ a
#   short run needs (2408.15664, algorithm 1; `docs/notebook.md`).
# - **The auxiliary loss.** How it reaches the router, whom else it reaches, and why V3 keeps a trace of it (eq. 17 to
#   20).
# - **Groups.** What is bounded, what it costs in choice, why $-\infty$.
# - **Segments.** What the misreading is, and three ways to see that it is another model: parameters for each
#   operation, the Jacobian, the rotation.
#
# To try: `bias_proportional` in place of `bias_sign`; γ 0.01 and 0.05; K = 1 with sigmoid scores; a bias rule for
# softmax scores.
