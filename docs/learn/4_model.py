# %% [markdown]
# # 4. The whole model
#
# Chapters 1 to 3 built the parts: experts with a router and its bias, and latent attention. This chapter makes a
# small DeepSeek-V3 of them, adds the one part that is left, multi-token prediction (MTP), trains the model for most
# of the time that the chapter takes, and lets it write. On the way it answers:
#
# 1. What is a block, and what is the stack? (shapes)
# 2. What does an MTP module see, and what does it predict? Why two tokens ahead?
# 3. What is minimised, and where do the gradients go?
# 4. What does decoding need in memory, beside a standard transformer of the same size?
# 5. What has the model learned after half a minute?
#
# Paper: DeepSeek-V3 (arXiv 2412.19437) §2.1 and §2.2. Code beside it: `src/abyssal/model/block.py`, `transformer.py`,
# `src/abyssal/training/loss.py`, `step.py`. Some 40 seconds on one core.
#
# Symbols: $B$ batch, $T$ time, $D$ hidden, $V$ vocabulary, $t_i$ the token at position $i$, $h_i$ the hidden state
# there.

# %%
import re
import tempfile

import torch
import torch.nn.functional as F
from checks import Checks

import abyssal
from abyssal.analysis.balance import balance
from abyssal.analysis.parameters import count_parameters
from abyssal.config import MHAConfig, MLAConfig, ModelConfig, MoEConfig, MTPConfig
from abyssal.data.corpus import documents
from abyssal.data.loader import Loader, validation_batches
from abyssal.generation.sampling import Sampling, make_generators, sample
from abyssal.model import Cache, Transformer
from abyssal.model.attention import Context
from abyssal.model.block import Block
from abyssal.model.rotary import rotary_tables
from abyssal.training.evaluate import HeldOut, evaluate
from abyssal.training.loss import compute_losses, targets, total_loss
from abyssal.training.optimizer import learning_rate
from abyssal.training.prepare import load_tokenizer, open_data
from abyssal.training.recipe import BalanceConfig, BiasSignConfig, DataConfig, OptimizerConfig, ScheduleConfig
from abyssal.training.step import TrainingStep

check = Checks()
B, T = 4, 128

# %% [markdown]
# ## 1. The block and the stack
#
# The model has V3's architecture and is smaller than the preset `demo`. Every number below is a field of V3's
# published `config.json` too.

# %%
config = ModelConfig(
    vocab_size=1024,
    hidden_size=192,
    num_hidden_layers=2,  # V3: 61
    intermediate_size=384,
    max_position_embeddings=512,
    attention=MLAConfig(
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    moe=MoEConfig(
        n_routed_experts=16,  # V3: 256, of which a token takes 8
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=64,
        first_k_dense_replace=1,  # the first layer has a dense MLP; V3: the first three
    ),
    mtp=MTPConfig(num_nextn_predict_layers=1),
    bos_token_id=0,
    eos_token_id=1,
)


def new_model() -> Transformer:
    return Transformer(config, generator=torch.Generator().manual_seed(0))


model = new_model()
parameters = count_parameters(config)
print(f"{'part':<18}{'all':>12}{'a token uses':>16}")
for part, count in parameters.by_part.items():
    print(f"{part:<18}{count:>12,}{parameters.active_by_part[part]:>16,}")
print(f"{'main model':<18}{parameters.total:>12,}{parameters.active:>16,}")
print(f"{'MTP module':<18}{parameters.mtp:>12,}   (embedding and head are the main model's)")

# %% [markdown]
# (Embedding and head are a large part of a model this small; in V3 they are 0.3%.)
#
# A block is two steps, each of which adds to the *residual stream* $x \in \mathbb{R}^{B \times T \times D}$ what it
# makes of a normalised copy:
#
# $$
# x \leftarrow x + \text{MLA}(\text{norm}(x)), \qquad x \leftarrow x + \text{FFN}(\text{norm}(x)),
# \qquad \text{FFN}(y) = \text{shared}(y) + \sum_{i \in \text{top-}k(y)} g_i \,\text{expert}_i(y)
# $$
#
# Attention is the only place where tokens meet; experts are the only place where the model decides *which* weights a
# token meets. There is nothing else in a block. The stack is an embedding, the blocks, a norm and the head. Here it
# is by hand, from the library's modules, and beside it the library's own forward pass.
#
# **Before you run it:** what is the loss of a model that has learned nothing, with 1024 tokens to choose from?

# %%
folder = tempfile.TemporaryDirectory()
data = DataConfig(source="tinyshakespeare", cache=folder.name)
tokenizer = load_tokenizer(data, config.vocab_size)
train, validation = open_data(data, tokenizer)
print(f"{len(train):,} tokens to train on, {len(validation):,} held out\n")

batch = Loader(train, batch_size=B, sequence_length=T, lookahead=2, seed=1).next()  # [B, T + 2]: see section 2
tokens = batch.tokens[:, :T]


def context_of(count: int) -> Context:
    """What each block's attention has to know: angles of the positions, and that nobody sees what comes later."""
    rope = rotary_tables(config.rope, config.attention.rotary_dim, torch.arange(count)[None], torch.float32)
    return Context(rope, 0, None, causal=True)


def through(block: Block, x: torch.Tensor) -> torch.Tensor:
    """A block, by hand: [B, T, D] -> [B, T, D]."""
    x = x + block.self_attn(block.input_layernorm(x), context_of(x.shape[1]))
    h = block.post_attention_layernorm(x)
    if block.layer < config.moe.first_k_dense_replace:
        return x + block.mlp(h)
    return x + block.mlp(h, block.mlp.route(h))


with torch.no_grad():
    x = model.model.embed_tokens(tokens)
    print(f"{'tokens':<28}{list(tokens.shape)}\n{'embed_tokens':<28}{list(x.shape)}")
    for block in model.blocks:
        x = through(block, x)
        print(f"{f'layers.{block.layer}: MLA + {type(block.mlp).__name__}':<28}{list(x.shape)}")
    hidden = model.model.norm(x)
    logits = model.lm_head(hidden)
    print(f"{'norm':<28}{list(hidden.shape)}\n{'lm_head':<28}{list(logits.shape)}\n")
    untrained = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1 : T + 1].flatten())
    log_v = torch.tensor(config.vocab_size).log()
    check("logits are [B, T, V]", list(logits.shape) == [B, T, config.vocab_size], f"{list(logits.shape)}")
    check("blocks by hand are the library's forward pass", torch.allclose(logits, model(tokens), atol=1e-5))
    check("an untrained model knows nothing: ln V", abs(untrained - log_v) < 0.2, f"{untrained:.3f} and {log_v:.3f}")

# %% [markdown]
# ## 2. Multi-token prediction: what it sees, what it predicts
#
# At position $i$ the main model has seen $t_0 … t_i$ and predicts $t_{i+1}$. The MTP module takes the hidden state
# $h_i$ of that very position, *and* the token $t_{i+1}$ that the main model was asked for, and predicts $t_{i+2}$:
#
# $$
# h'_i = W \,[\,\text{norm}(\text{Emb}(t_{i+1}))\,;\; \text{norm}(h_i)\,],
# \qquad t_{i+2} \sim \text{Head}(\text{norm}(\text{Block}(h')_i))
# $$
#
# It is one block with a projection in front, $W \in \mathbb{R}^{D \times 2D}$ (`eh_proj`). Embedding and head are the
# main model's own. The prediction is *sequential*: whoever predicts $t_{i+2}$ knows $t_{i+1}$. (Independent heads
# that guess several tokens from $h_i$ alone, arXiv 2404.19737, do not know what was guessed before.)
#
# Why? For three reasons, all named in V3 §2.2:
#
# - **More to learn from a token.** Each position gives two errors rather than one.
# - **Planning.** $h_i$ is made before $t_{i+1}$ is known, and is now also judged by what comes after $t_{i+1}$.
# - **Drafts.** At decoding the module guesses the token after the next, and the main model checks it while it works
#   on the next: two tokens for one pass where the guess is right. (85–90% of V3's are, §5.4.3.) Or it is dropped: the
#   main model does not need it.
#
# So targets are shifted by one for the main model and by two for MTP, and a batch has $T + 2$ tokens a row.

# %%
words = [repr(tokenizer.decode([token])) for token in batch.tokens[0, :8].tolist()]
wanted = [targets(batch, T, depth)[0, :6].tolist() for depth in (0, 1)]
print(f"{'i':>2}  {'main sees up to':<18}{'predicts':<12}{'MTP sees up to':<18}{'predicts':<12}")
for i in range(6):
    main_target, mtp_target = (repr(tokenizer.decode([wanted[depth][i]])) for depth in (0, 1))
    print(f"{i:>2}  {words[i]:<18}{main_target:<12}{words[i + 1]:<18}{mtp_target:<12}")

# %% [markdown]
# By hand, again with the library's modules, and beside it the library. There are two traps. The published weights
# expect the embedding *first* in the pair (equation 21 prints the other order). And $h_i$ is taken *after* the main
# model's last norm, which the paper leaves open; the engines that serve V3 do it so.
#
# Then a test that every such shift deserves, since a model that sees its target learns to copy it and nothing else:
# change one token, and see which predictions change.
#
# **Before you run it:** token 40 is changed. From which position on do the main model's logits change? And MTP's?

# %%
module = model.mtp_modules[0]
with torch.no_grad():
    embedded = model.model.embed_tokens(batch.tokens[:, 1 : T + 1])
    pair = torch.cat((module.enorm(embedded), module.hnorm(hidden)), dim=-1)
    ahead = module.shared_head["norm"](through(module, module.eh_proj(pair)))
    mtp_logits = model.lm_head(ahead)
    print(f"pair {list(pair.shape)} -> eh_proj {list(ahead.shape)} -> block -> norm -> head {list(mtp_logits.shape)}")
    check(
        "the MTP module by hand is the library's",
        torch.allclose(mtp_logits, model.mtp_logits(batch.tokens[:, : T + 1])[0], atol=1e-5),
    )
    other = batch.tokens.clone()
    other[:, 40] = (other[:, 40] + 1) % config.vocab_size
    main_changed = (model(other[:, :T]) - model(tokens)).abs().amax((0, 2)) > 1e-6
    mtp_changed = (model.mtp_logits(other[:, : T + 1])[0] - mtp_logits).abs().amax((0, 2)) > 1e-6
    first_main, first_mtp = int(main_changed.nonzero()[0]), int(mtp_changed.nonzero()[0])
    print(f"token 40 changed: main logits change from position {first_main} on, MTP's from {first_mtp} on")
    check("main sees up to t_i, and not its target", first_main == 40)
    check("MTP sees one token more, and not its target", first_mtp == 39)

# %% [markdown]
# MTP at position 39 sees token 40 and is asked for token 41. The main model at position 40 sees token 40 and is asked
# for token 41. So in training the two have seen the same text when they predict the same token! What makes MTP "two
# ahead" is not what it knows but when: the state $h_{39}$ that it builds on was made without token 40, which enters
# only in the module. Keep that in mind for the losses below.
#
# ## 3. The loss, and where gradients go
#
# $$L = L_\text{main} + \frac{\lambda}{\text{depth}} \sum_k L^k_\text{MTP}$$
#
# Both are cross-entropies in nats a token; $\lambda = 0.3$, as in most of V3's training (equations 24 and 25). No
# term for balance is needed here: the router's bias takes care of it. (V3 adds a very small one, by sequence:
# equation 17.)
#
# **Before you run it:** which tensors of the model get no gradient at all? And does the MTP loss have a gradient for
# the *first* block of the main model?

# %%
LAMBDA = 0.3
losses = compute_losses(model, batch, T)
loss = total_loss(losses, losses.counts, LAMBDA)
by_hand = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1 : T + 1].flatten()) + LAMBDA * F.cross_entropy(
    mtp_logits.flatten(0, 1), batch.tokens[:, 2 : T + 2].flatten()
)
print(f"loss {loss.item():.4f}, by hand {by_hand.item():.4f}")
check("the loss is L_main + λ L_MTP", torch.allclose(loss, by_hand, atol=1e-4))

first = model.blocks[0].self_attn.kv_a_proj_with_mqa.weight
main_mean, mtp_mean = (nats / count for nats, count in zip(losses.nats, losses.counts, strict=True))
by_main, by_mtp = (torch.autograd.grad(part, first, retain_graph=True)[0] for part in (main_mean, LAMBDA * mtp_mean))
print(f"gradient for layer 0's latent projection: {by_main.norm():.4f} from main, {by_mtp.norm():.4f} from MTP")

loss.backward()
without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
experts = [
    (name, expert)
    for name, weight in model.named_parameters()
    if ".experts." in name
    for expert, grad in enumerate(weight.grad)
    if not grad.any()
]
biases = [router.e_score_correction_bias for router in model.routers.values()]
learned = {name for name, _ in model.named_parameters()}
print(f"{sum(1 for _ in model.parameters())} parameters, without gradient: {without or 'none'}")
print(f"single experts without gradient: {experts or 'none'}")
print(f"not parameters at all: {[name for name, _ in model.named_buffers()]}")
model.zero_grad()
check("every parameter, and every expert in it, has a gradient", not without and not experts)
ruled = all(not bias.requires_grad and bias.grad is None for bias in biases)
check("the router's bias is no parameter", ruled and not any("e_score_correction_bias" in name for name in learned))
check("MTP teaches the main model, down to its first layer", by_mtp.norm() > 0)

# %% [markdown]
# One kind of tensor has no gradient: `e_score_correction_bias`, of the MoE layer and of the MTP module's own. It
# enters only the choice of experts, which has no derivative. After each step a rule moves it: up for an expert that
# got fewer tokens than the mean, down for one that got more (chapter 2).
#
# ## 4. Training
#
# A step is: forward, loss, backward, clip, AdamW, move the biases. `TrainingStep` does just this. What
# `abyssal train` has around it is this loop, with checkpoints, metrics and validation. The bias rate is 0.01, ten
# times V3's, and falls to a twentieth, as the learning rate does: there are hundreds of steps to settle in, not
# hundreds of thousands.
#
# **Before you run it:** which loss will be lower in the end, the main model's or MTP's?

# %%
STEPS, RATE = 380, 5e-3
step = TrainingStep(
    model,
    optimizer=OptimizerConfig(lr=RATE),
    balance=BalanceConfig(bias_sign=BiasSignConfig(rate=0.01, final=0.05)),
    clip=1.0,
    mtp_weight=LAMBDA,
    device=torch.device("cpu"),
    dtype=torch.float32,
)
loader = Loader(train, batch_size=B, sequence_length=T, lookahead=2, seed=0)
schedule = ScheduleConfig(warmup=20, final=0.05)
held_out = list(validation_batches(validation, batch_size=8, sequence_length=T, lookahead=2, limit=8))


@torch.no_grad()
def held_out_losses() -> list[float]:
    """Main and MTP loss, nats a token, on 8,192 tokens of held-out text."""
    every = [compute_losses(model, one, T) for one in held_out]
    return [float(sum(one.nats[depth] for one in every)) / sum(one.counts[depth] for one in every) for depth in (0, 1)]


before = held_out_losses()
biases_before = {layer: router.e_score_correction_bias.clone() for layer, router in model.routers.items()}
history = []
print(f"{'step':>5}{'main loss':>12}{'MTP loss':>11}   load CV of the MoE layer and of the MTP module")
for index in range(STEPS):
    result = step([loader.next()], T, learning_rate(index, STEPS, RATE, schedule), index / STEPS)
    history.append(result)
    if index % 38 == 37:
        mean_main = sum(r.loss for r in history[-38:]) / 38
        mean_mtp = sum(r.mtp_loss[0] for r in history[-38:]) / 38
        spread = [balance(sum(r.loads[layer] for r in history[-38:])).cv for layer in result.loads]
        print(f"{index + 1:>5}{mean_main:>12.3f}{mean_mtp:>11.3f}   " + "  ".join(f"{cv:.2f}" for cv in spread))
model.eval()
after = held_out_losses()
print(f"\nheld-out text   {'before':>8}{'after':>8}")
print(f"main loss       {before[0]:>8.3f}{after[0]:>8.3f}\nMTP loss        {before[1]:>8.3f}{after[1]:>8.3f}")

# %%
check("the held-out loss falls", after[0] < before[0] - 2, f"{before[0]:.2f} -> {after[0]:.2f} nats a token")
check("so does MTP's", after[1] < before[1] - 2, f"{before[1]:.2f} -> {after[1]:.2f}")
for layer, router in model.routers.items():
    moved = (router.e_score_correction_bias - biases_before[layer]).abs().max()
    name = "the MTP module's" if layer >= config.num_hidden_layers else f"layer {layer}'s"
    check(f"{name} router bias has moved without a gradient", moved > 0, f"by up to {moved:.2f}")
early, late = (
    [balance(sum(r.loads[layer] for r in part)).cv for layer in history[0].loads]
    for part in (history[:38], history[-38:])
)
figure = ", ".join(f"{a:.2f} -> {b:.2f}" for a, b in zip(early, late, strict=True))
check("the load evens out", max(late) < 0.2 * min(early), f"CV {figure}")

# %% [markdown]
# MTP's loss is the *lower* one. Whoever reads "predicts further ahead" expects the opposite. Section 2 says why it
# need not be higher: the module has seen the same text as the main model one position later. But why lower? The
# additional block is not it: main models of 3 and 4 layers, trained like this one, come out where this one does, at
# 3.91 and 3.87. What is it then? The same training with something else in the place of $h_i$ in the module's input,
# one line of `MTPModule` changed (held-out nats a token, one run each with γ falling to 0, not checked here; the main
# model's loss is 3.88 to 3.90 in all of them):
#
# | beside $\text{Emb}(t_{i+1})$ | loss of MTP | |
# | --- | ---: | --- |
# | $h_i$ | 3.77 | as it is |
# | zeros | 3.95 | one block over single tokens |
# | $h_{i+1}$ | 3.91 | one block more, nothing else |
# | $\text{Emb}(t_i)$ | 3.73 | two neighbours, joined |
#
# So it is the *pair*. The module's input joins two neighbouring positions, and a look at the previous token, which
# the main model's attention first has to learn, is built in. In a few hundred steps that is worth more than depth. A
# model that has been trained for long has learned that look. Then depth should decide: in V3 the last token passes 61
# layers in the main model, and one in the module (not tested here).
#
# How good are its drafts? A draft is right where it is what the main model itself would say one position later.

# %%
with torch.no_grad():
    sequences = torch.cat([one.tokens for one in held_out])
    sequences = sequences[(torch.cat([one.documents for one in held_out]) >= 0).all(1)]
    drafts = model.mtp_logits(sequences[:, : T + 1])[0].argmax(-1)  # at i, for token i + 2
    own = model(sequences[:, : T + 1])[:, 1:].argmax(-1)  # at i + 1, for token i + 2
    print(f"drafts that are the main model's own first choice: {(drafts == own).float().mean():.0%}")

# %% [markdown]
# ## 5. What decoding needs in memory
#
# Beside our model stands a *standard* transformer: as many layers, the same width, MHA with heads of 32, and a dense
# FFN in each layer, just so wide that both models have the same number of weights. Both read 8 conversations of 512
# tokens, and what their caches hold is counted on the tensors. (The standard one is not trained: memory does not
# depend on that.)
#
# **Before you run it:** three quantities: all weights, weights that one token reads, cache. Which are equal, which
# are not, and by which part of the architecture?

# %%
heads = config.hidden_size // 32
dense = config.model_copy(
    update={
        "attention": MHAConfig(num_attention_heads=heads, num_key_value_heads=heads, head_dim=32),
        "moe": None,
        "mtp": MTPConfig(),
    }
)
per_width = 3 * config.hidden_size * config.num_hidden_layers  # gate, up and down, in each layer
spare = parameters.total - count_parameters(dense).total
dense = dense.model_copy(update={"intermediate_size": dense.intermediate_size + round(spare / per_width)})

CONVERSATIONS, CONTEXT = 8, config.max_position_embeddings
text = torch.from_numpy(validation.read(0, CONVERSATIONS * CONTEXT)).view(CONVERSATIONS, CONTEXT)
figures = {}
for name, own_config in (("standard", dense), ("MLA + MoE", config)):
    one = model if own_config is config else Transformer(own_config, generator=torch.Generator().manual_seed(0)).eval()
    cache = Cache(own_config, CONVERSATIONS, CONTEXT)
    with torch.no_grad():
        one(text[:, :-1], cache=cache)  # the prompts
        decoded = one(text[:, -1:], cache=cache)[:, 0]  # one step
        whole = one(text)[:, -1]  # the same without a cache
    check(f"{name}: a step over the cache gives what a whole pass gives", torch.allclose(decoded, whole, atol=1e-4))
    counted = count_parameters(own_config)
    held = sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in layer.tensors)
    figures[name] = (counted.total * 4, counted.active_without_embedding * 4, held)

print(f"\nstandard: {heads} heads of 32, FFN of {dense.intermediate_size}; all in FP32")
print(f"{'KB':<12}{'weights':>10}{'read a token':>15}{'cache':>10}{'weights + cache':>18}")
for name, (weights, active, held) in figures.items():
    print(
        f"{name:<12}{weights / 1e3:>10,.0f}{active / 1e3:>15,.0f}{held / 1e3:>10,.0f}{(weights + held) / 1e3:>18,.0f}"
    )
(weights, active, held), (our_weights, our_active, our_held) = figures["standard"], figures["MLA + MoE"]
print()
check("as many weights in all", abs(our_weights / weights - 1) < 0.005, f"{our_weights / weights:.4f} of them")
check("a smaller cache, measured on its tensors", our_held < held, f"{held / our_held:.1f} times")
check("fewer weights read for a token", our_active < active, f"{our_active / active:.2f} of them")
check(
    "less memory in all",
    our_weights + our_held < weights + held,
    f"{(our_weights + our_held) / (weights + held):.2f} of it",
)

# %% [markdown]
# Total weights are equal by construction, and **MoE saves none of them**: all experts have to be in memory. What it
# saves is what is read and multiplied for a token. The cache is MLA's part. Together they make the trade of these
# models: much memory for weights, which all conversations share; little for each conversation; little arithmetic for
# each token in the FFN. (Attention over a long cache costs *more* arithmetic than MHA's, and fewer reads: chapter 3.)
#
# Two fine points. The tokens of many conversations choose different experts, so that a step for all of them reads
# most experts: MoE saves reads only at small batches, arithmetic at any. And the MTP module is left out of this
# comparison: decoding does not need it; with drafts it comes on top.
#
# ## 6. Text
#
# What did it learn in half a minute? Two others write beside it: a model that has learned nothing, and a *bigram
# table*, which knows which token follows which in *all* of the training text (the model has seen half of it) and
# nothing else. One number for each: of the words of four letters or more that it writes, the share that occurs in the
# training text. The vocabulary has pieces of words, so that a word has to be put together right. (Short words prove
# little: of random pieces of one to three letters many are in the plays.)

# %%
corpus = next(documents("tinyshakespeare"))
known = set(re.findall(r"[a-z']+", corpus[: int(len(corpus) * 0.9)].lower()))
prompts = ["ROMEO:\n", "First Citizen:\n", "KING HENRY:\n", "To be, or not"]
sampling = Sampling(max_new_tokens=160, temperature=0.6, top_p=0.9, seed=1)


def share_of_words(texts: list[str]) -> float:
    found = re.findall(r"[a-z']{4,}", " ".join(texts).lower())
    return sum(word in known for word in found) / len(found)


seen = torch.from_numpy(train.read(0, len(train)))
pairs = torch.bincount(seen[:-1] * config.vocab_size + seen[1:], minlength=config.vocab_size**2)
pairs = pairs.view(config.vocab_size, -1).float()
single = (torch.bincount(seen, minlength=config.vocab_size) + 1) / (len(seen) + config.vocab_size)
bigram = ((pairs + 40 * single) / (pairs.sum(1, keepdim=True) + 40)).log()  # 40 is best on the held-out text


def bigram_text(prompt: str, generator: torch.Generator) -> str:
    ids = tokenizer.encode(prompt)
    length = len(ids)
    while len(ids) < length + sampling.max_new_tokens:
        ids.append(int(sample(bigram[ids[-1]].unsqueeze(0), [ids], sampling, [generator])))
    return tokenizer.decode(ids[length:])


texts = {
    "untrained": abyssal.generate(new_model().eval(), tokenizer, prompts, sampling),
    "bigram table": [bigram_text(*pair) for pair in zip(prompts, make_generators(1, len(prompts)), strict=True)],
    "the model": abyssal.generate(model, tokenizer, prompts, sampling),
}
shares = {name: share_of_words(own) for name, own in texts.items()}
judged = HeldOut.of_shards(validation, batch_size=8, sequence_length=T)
evaluation = evaluate(model, judged, sequence_length=T, dtype=torch.float32, batches=16)
some = torch.from_numpy(validation.read(0, 16 * 8 * T + 1))
loss_of_bigram = float(-bigram[some[:-1], some[1:]].mean())
for name, own in texts.items():
    shown = own if name == "the model" else own[:1]
    print(f"──── {name}: {shares[name]:.0%} of its longer words are words")
    for prompt, written in zip(prompts, shown, strict=False):
        print(prompt + (written if name == "the model" else written[:120] + " …") + "\n")
print(f"of Shakespeare's own, in the held-out text: {share_of_words([corpus[int(len(corpus) * 0.9) :]]):.0%}")
print(
    f"loss on 16,384 held-out tokens: the model {evaluation.loss:.3f}, bigram table {loss_of_bigram:.3f} nats a token"
)
print(f"the model in bits a byte, which do not depend on the vocabulary: {evaluation.bits_per_byte:.2f}")

# %%
check("the model's longer words are words", shares["the model"] > 0.6, f"{shares['the model']:.0%}")
check(
    "more of them than the bigram table's",
    shares["the model"] > shares["bigram table"],
    f"{shares['bigram table']:.0%}",
)
check("and than the untrained model's", shares["the model"] > 2 * shares["untrained"], f"{shares['untrained']:.0%}")
folder.cleanup()
check.end()

# %% [markdown]
# Words, speakers in capitals with a colon, lines as long as verses. The check is one of spelling: the text hangs
# together in its form and not in its sense, which half a minute does not give. In loss the bigram table is a
# hard baseline for half a minute, as it has counted the whole text; in words it is not, as it forgets how a word
# began. `abyssal train demo` goes on from here: 7.7M parameters, some minutes on two cores, 2.21 bits a byte
# ([README](../../README.md)).
#
# ## What to be able to explain
#
# - **A block** is attention and experts, each adding to the residual stream what it makes of a normalised copy. MLA
#   decides what is remembered of tokens, MoE which weights a token sees. (V3 §2.1.)
# - **The stack**: a dense layer or three first, then MoE layers; embedding and head outside. The names are those of
#   the published checkpoints.
# - **MTP**: one block that gets $h_i$ and $\text{Emb}(t_{i+1})$ and predicts $t_{i+2}$; embedding and head are
#   shared. It costs one layer and one more use of the head in training, nothing at decoding if dropped, and gives
#   drafts if kept. (V3 §2.2, equations 21 to 25.)
# - **What "two ahead" means**: not less text seen, but a state $h_i$ that was made one token earlier. Why its loss
#   can be the lower one.
# - **The loss** $L_\text{main} + \frac{\lambda}{\text{depth}} \sum_k L^k_\text{MTP}$. The router's bias is in no
#   loss: it is moved by a rule.
# - **Memory at decoding**: weights (all experts, whether used or not) + cache (small, by MLA). Time at decoding:
#   weights *read* (few, by MoE, at small batches) + cache read. (V3 §3.4 is about the consequences of this for
#   serving.)
# - **What this chapter does not show**: that MLA and MoE learn as well as a standard transformer for the same
#   compute. That takes runs of equal budgets: [docs/lab](../lab/README.md).
#
# To try: `mtp_weight` 0 in the step (MTP's own checks fail then, as they should): is the main model better or worse
# after as many steps? `num_experts_per_tok` 4; `BalanceConfig()`, without the bias rule. And on paper: what would a
# second MTP module see, what would it predict, and how many tokens a row would a batch need?
