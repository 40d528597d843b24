"""Learning per second: the demo beside dense models and a plain GPT, at equal training time on the same machine.

    python benchmarks/learning.py [--seconds 240] [--sides demo …] [--lrs demo=3e-3,4e-3 …] [--json FILE] [--quick]

Tiny Shakespeare, the demo recipe's tokenizer and split, batches of 8 × 256; bits a byte of the whole validation split.
Sides:

- demo: the demo recipe's model (MLA, experts, one MTP module, bias balancing); demo-no-mtp: without that module.
- dense-active, dense-total: the demo with a dense MLP in place of the experts and no MTP module, so wide (a multiple of
  32) that it has as many parameters as a token meets in the demo, or as all of the demo.
- gpt-active, gpt-total: a GPT in the manner of nanoGPT (below), of as many layers and the width that comes closest.

"Active" are the parameters that a token is multiplied with: no input embedding, no positions, the head included, the
MTP module's not. "Total" are all but the MTP module's.

Every run gets as many seconds for training as any other; validation is not charged. Runs take turns, ten steps each,
so that the machine's moods fall on all of them. The learning rate follows the share of the seconds that is used up:
linear warmup, then a cosine to a tenth, so every run is annealed when its time is over. All see the same batches in the
same order. Two steps of a copy go before, uncounted: what is compiled or set up once is no learning.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe_machine, markdown, timed
from torch import Tensor, nn

from abyssal.analysis.flops import count_flops
from abyssal.analysis.parameters import count_parameters
from abyssal.config import ModelConfig
from abyssal.data.loader import Batch, Loader, validation_batches
from abyssal.data.shards import TokenShards
from abyssal.model import Transformer
from abyssal.training.hardware import autocast, has_bfloat16, resolve_device
from abyssal.training.loss import targets
from abyssal.training.prepare import load_tokenizer, open_data
from abyssal.training.recipe import BalanceConfig, Recipe, read_recipe
from abyssal.training.step import TrainingStep

LRS = {  # --lrs gives each side others, or several to choose from
    "demo": [3e-3],
    "demo-no-mtp": [3e-3],
    "dense-active": [2e-3],
    "dense-total": [2e-3],
    "gpt-active": [2e-3],
    "gpt-total": [2e-3],
}
DEFAULT_SIDES = ["demo", "dense-active", "dense-total", "gpt-active"]
WARMUP = 40 / 560  # the demo recipe's share
FINAL = 0.1
SLICE = 10


class GPT(nn.Module):
    """A GPT as nanoGPT builds it: learned positions, LayerNorm, GELU, one matrix for embedding and head, no biases."""

    def __init__(self, vocab: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(GPTBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:  # what writes into the residual stream begins smaller, as in GPT-2
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if "out" in name else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] for tokens [B, T]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.attention_out = (nn.Linear(width, n * width, bias=False) for n in (3, 1))
        self.up, self.mlp_out = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.up(self.norm_2(x))))


class GPTStep:
    """A training step as nanoGPT's: autocast, fused AdamW with decay on matrices, clipping."""

    def __init__(self, model: GPT, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
        o = recipe.optimizer
        self.model, self.clip, self.device, self.dtype = model, recipe.training.clip, device, dtype
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)

    def __call__(self, batch: Batch, length: int, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = batch.to(self.device)
        with autocast(self.device, self.dtype):
            logits = self.model(batch.tokens[:, :length])
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets(batch, length, 0).flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def dense(demo: ModelConfig, which: str) -> ModelConfig:
    """The demo with a dense MLP, as wide as makes its parameters the demo's active or total ones."""

    def size(config: ModelConfig) -> int:
        counts = count_parameters(config)
        return counts.active_without_embedding if which == "active" else counts.total

    def of_width(width: int) -> ModelConfig:
        return ModelConfig.model_validate(demo.model_dump() | {"moe": None, "mtp": {}, "intermediate_size": width})

    step = 32  # other widths are slower to multiply by
    added = 3 * demo.hidden_size * demo.num_hidden_layers * step
    return of_width(step * (1 + round((size(demo) - size(of_width(step))) / added)))


def gpt(demo: ModelConfig, which: str, length: int) -> GPT:
    """A GPT of the demo's depth and heads, of the width (a multiple of 16) that comes closest to the demo's size."""
    counts = count_parameters(demo)
    goal = counts.active_without_embedding if which == "active" else counts.total

    def size(width: int) -> int:
        with torch.device("meta"):
            model = build(width)
        return gpt_sizes(model)[which]

    def build(width: int) -> GPT:
        return GPT(demo.vocab_size, length, width, demo.num_hidden_layers, demo.attention.num_attention_heads)

    return build(min(range(16, 4096, 16), key=lambda width: abs(size(width) - goal)))


def gpt_sizes(model: GPT) -> dict[str, int]:
    """Parameters in all, and without the positions, which nothing is multiplied with (the head is)."""
    total = sum(p.numel() for p in model.parameters())
    return {"total": total, "active": total - model.positions.weight.numel()}


class Run:
    """One model of one side at one learning rate, under training against its own clock."""

    def __init__(
        self, side: str, lr: float, recipe: Recipe, train: TokenShards, seed: int, device: torch.device
    ) -> None:
        self.side, self.lr, self.device = side, lr, device
        self.dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
        t, demo = recipe.training, recipe.model_config_resolved()
        self.batch_size, self.length = t.batch_size, t.sequence_length
        # One lookahead for all, so that all see the same windows.
        lookahead = 1 + demo.mtp.num_nextn_predict_layers
        self.loader = Loader(
            train, batch_size=t.batch_size, sequence_length=self.length, lookahead=lookahead, seed=seed
        )
        kind, _, which = side.partition("-")
        self.model: nn.Module
        self.step: Callable[[Batch, float, float], object]
        if kind == "gpt":
            torch.manual_seed(seed)
            model = gpt(demo, which, self.length)
            self.model, self.sizes = model.to(device).train(), gpt_sizes(model)
            step = GPTStep(model, recipe, device, self.dtype)
            self.step = lambda batch, lr, _: step(batch, self.length, lr)
            # As in count_flops: products, and 2 · (width + width) for the causal half of the tokens.
            width, layers = model.tokens.embedding_dim, len(model.blocks)
            self.flops = 3 * (2 * self.sizes["active"] + layers * 2 * width * (self.length + 1))
            self.shape = f"{layers} × {width}"
        else:
            config = dense(demo, which) if kind == "dense" else demo
            if which == "no-mtp":
                config = ModelConfig.model_validate(demo.model_dump() | {"mtp": {}})
            self.model = Transformer(config, generator=torch.Generator().manual_seed(seed)).to(device).train()
            counts = count_parameters(config)
            self.sizes = {"total": counts.total, "active": counts.active_without_embedding}
            self.flops = count_flops(config, self.length).training
            self.shape = f"{config.num_hidden_layers} × {config.hidden_size}" + (
                f", MLP {config.intermediate_size}" if kind == "dense" else ""
            )
            ours = TrainingStep(
                self.model,
                optimizer=recipe.optimizer,
                balance=recipe.balance if config.moe else BalanceConfig.model_validate("none"),
                clip=t.clip,
                mtp_weight=t.mtp_weight,
                device=device,
                dtype=self.dtype,
            )
            self.step = lambda batch, lr, share: ours([batch], self.length, lr, share)
        self.used = self.last = 0.0
        self.steps = 0
        self.curve: list[dict[str, float]] = []

    def advance(self, budget: float) -> None:
        """One step, charged to this run. The learning rate is the one for when the step will have ended."""
        share = min((self.used + self.last) / budget, 1.0)
        lr = learning_rate(share, self.lr)
        self.last = timed(lambda: self.step(self.loader.next(), lr, share), self.device)
        self.used += self.last
        self.steps += 1

    def validate(self, shards: TokenShards, limit: int | None) -> None:
        """A point of the curve; its time is not charged."""
        bits = bits_a_byte(self.model, shards, self.batch_size, self.length, self.dtype, self.device, limit)
        self.curve.append({"seconds": self.used, "step": self.steps, "bits_per_byte": bits})

    def result(self) -> dict[str, Any]:
        tokens = self.steps * self.batch_size * self.length
        return {
            "side": self.side,
            "lr": self.lr,
            "shape": self.shape,
            "parameters": self.sizes["total"],
            "active": self.sizes["active"],
            "training_flops_per_token": self.flops,
            "seconds": self.used,
            "steps": self.steps,
            "tokens": tokens,
            "epochs": self.steps * self.batch_size / self.loader.epoch_windows,
            "tokens_per_s": tokens / self.used,
            "bits_per_byte": self.curve[-1]["bits_per_byte"],
            "curve": self.curve,
        }


def learning_rate(share: float, peak: float) -> float:
    """Linear warmup, then a cosine to FINAL · ``peak``, by the share of the time that is used up."""
    if share < WARMUP:
        return peak * max(share / WARMUP, 0.02)  # the first step has no length to go by yet
    return peak * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP))))


@torch.no_grad()
def bits_a_byte(
    model: nn.Module,
    shards: TokenShards,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    limit: int | None,
) -> float:
    """Bits a byte of the held-out text, each token but the first predicted once, in windows that do not overlap."""
    model.eval()
    nats, seen = 0.0, 0
    for batch in validation_batches(shards, batch_size=batch_size, sequence_length=length, lookahead=1, limit=limit):
        batch = batch.to(device)
        with autocast(device, dtype):
            logits = model(batch.tokens[:, :length])
        wanted = targets(batch, length, 0).flatten()
        nats += F.cross_entropy(logits.float().flatten(0, 1), wanted, reduction="sum").item()
        seen += int((batch.documents[:, 1:] >= 0).sum())
    model.train()
    return nats / math.log(2) / (shards.bytes * seen / (len(shards) - 1))


def learn(runs: list[Run], budget: float, points: int, validation: TokenShards, limit: int | None) -> None:
    """Trains all runs in turn until each has used ``budget`` seconds, with ``points`` looks at each on the way."""
    while waiting := [run for run in runs if run.used < budget]:
        for run in waiting:
            for _ in range(SLICE):
                run.advance(budget)
                if run.used >= budget or run.used >= budget * (len(run.curve) + 1) / points:
                    break
            if run.used >= budget or run.used >= budget * (len(run.curve) + 1) / points:
                run.validate(validation, limit)
                now = run.curve[-1]
                print(
                    f"{run.side}, lr {run.lr:g}: {now['seconds']:.0f} s, step {run.steps}, "
                    f"{now['bits_per_byte']:.4f} bits a byte",
                    flush=True,
                )


def show(results: list[dict[str, Any]]) -> str:
    """The table, best learning rate of a side in bold; then the curves."""
    best = {r["side"]: r for r in sorted(results, key=lambda r: -r["bits_per_byte"])}
    rows = [
        (
            r["side"],
            r["shape"],
            f"{r['lr']:g}",
            f"{r['parameters'] / 1e6:.2f}M",
            f"{r['active'] / 1e6:.2f}M",
            f"{r['training_flops_per_token'] / 1e6:.1f}",
            f"{r['steps']:,}",
            f"{r['tokens'] / 1e6:.2f}M",
            f"{r['epochs']:.1f}",
            f"{r['tokens_per_s']:,.0f}",
            f"**{r['bits_per_byte']:.4f}**" if r is best[r["side"]] else f"{r['bits_per_byte']:.4f}",
        )
        for r in results
    ]
    head = ("side", "shape", "lr", "parameters", "active", "MFLOP a token", "steps", "tokens", "epochs", "tokens/s")
    curves = [
        (f"{r['side']}, lr {r['lr']:g}", *(f"{point['bits_per_byte']:.3f}" for point in r["curve"])) for r in results
    ]
    most = max(len(r["curve"]) for r in results)
    at = [f"{(i + 1) / most:.0%} of the time" for i in range(most)]
    return f"{markdown(rows, *head, 'bits a byte')}\n\n{markdown(curves, 'bits a byte after', *at)}"


def parse_lrs(entries: list[str]) -> dict[str, list[float]]:
    """``demo=3e-3,4e-3`` and so on, over the defaults."""
    lrs = dict(LRS)
    for entry in entries:
        side, _, values = entry.partition("=")
        if side not in LRS or not values:
            raise SystemExit(f"--lrs: {entry!r} is not SIDE=LR,… with a side of {', '.join(LRS)}")
        lrs[side] = [float(value) for value in values.split(",")]
    return lrs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=None, help="of training for each run; 240, quick: 6")
    parser.add_argument("--sides", nargs="+", default=DEFAULT_SIDES, choices=list(LRS), metavar="SIDE")
    parser.add_argument("--lrs", nargs="+", default=[], metavar="SIDE=LR,…", help="learning rates to try, by side")
    parser.add_argument("--points", type=int, default=None, help="looks at the validation split; 8, quick: 2")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="to see that it works: seconds, and little validation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    device = resolve_device(options.device, "--device")
    budget = options.seconds or (6 if options.quick else 240)
    points = options.points or (2 if options.quick else 8)
    limit = 2 if options.quick else None
    recipe = read_recipe("demo")
    tokenizer = load_tokenizer(recipe.data, recipe.model_config_resolved().vocab_size)
    train, validation = open_data(recipe.data, tokenizer)
    lrs = parse_lrs(options.lrs)
    for side in options.sides:
        copy = Run(side, lrs[side][0], recipe, train, options.seed, device)
        copy.advance(budget)
        copy.advance(budget)
    runs = [Run(side, lr, recipe, train, options.seed, device) for side in options.sides for lr in lrs[side]]
    machine = describe_machine(device, runs[0].dtype)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{budget:g} s of training a run, {len(runs)} runs in turn\n")
    learn(runs, budget, points, validation, limit)
    results = [run.result() for run in runs]
    print(f"\n{show(results)}\n\n{time.perf_counter() - started:.0f} s in all")
    if options.json:
        data = {"machine": machine, "budget_s": budget, "seed": options.seed, "results": results}
        options.json.write_text(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
