"""A training step beside transformers': same weights, same batch, in turn in one process.

    python benchmarks/training.py [--shape S demo M] [--rounds 7] [--json FILE]

Both sides do a whole step: forward, loss, backward, clipping, AdamW; ours balances the experts and keeps the metrics
too, which transformers does not do. transformers runs at its best setting here: BF16 autocast, grouped_mm experts,
SDPA, fused AdamW. Each round times one step of each side, one after the other; ratios are of the two in a round. FLOPs
are counted from the matrices a token meets (2 a multiplication and addition, three times that for a step) and the
causal half of attention. The GEMM rate is measured in the same run: BF16 and FP32, 2048 × 2048 × 2048.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from abyssal.analysis.parameters import count_parameters
from abyssal.config import ModelConfig, preset, to_published
from abyssal.data.loader import Batch
from abyssal.model import Transformer
from abyssal.training.hardware import describe, has_bfloat16
from abyssal.training.recipe import BalanceConfig, OptimizerConfig
from abyssal.training.step import TrainingStep

SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "S": (
        {
            "vocab_size": 8192,
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "intermediate_size": 1408,
            "max_position_embeddings": 1024,
            "attention": {
                "kind": "mla",
                "num_attention_heads": 8,
                "kv_lora_rank": 128,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 32,
                "v_head_dim": 32,
            },
            "moe": {
                "n_routed_experts": 32,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 256,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
            },
        },
        8,
        256,
    ),
    "M": (
        {
            "vocab_size": 32000,
            "hidden_size": 1024,
            "num_hidden_layers": 12,
            "intermediate_size": 2816,
            "max_position_embeddings": 4096,
            "attention": {
                "kind": "mla",
                "num_attention_heads": 16,
                "q_lora_rank": 512,
                "kv_lora_rank": 256,
                "qk_nope_head_dim": 64,
                "qk_rope_head_dim": 32,
                "v_head_dim": 64,
            },
            "moe": {
                "n_routed_experts": 64,
                "num_experts_per_tok": 6,
                "moe_intermediate_size": 512,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
            },
        },
        8,
        256,
    ),
}


def shape(name: str) -> tuple[ModelConfig, int, int]:
    """Config, batch size, sequence length."""
    if name == "demo":  # without its MTP module, which transformers does not train
        return ModelConfig.model_validate({**preset("demo").model_dump(), "mtp": {}}), 8, 256
    settings, batch, length = SHAPES[name]
    return ModelConfig.model_validate(settings), batch, length


class Ours:
    """The trainer's own step."""

    def __init__(self, model: Transformer, dtype: torch.dtype) -> None:
        self.step = TrainingStep(
            model,
            optimizer=OptimizerConfig(lr=1e-4),
            balance=BalanceConfig.model_validate("bias_sign"),
            clip=1.0,
            mtp_weight=0.3,
            dtype=dtype,
            device=torch.device("cpu"),
        )

    def __call__(self, batch: Batch) -> float:
        return self.step([batch], batch.tokens.shape[1] - 1, 1e-4, 0.0).loss


class Theirs:
    """transformers' V3 with the same weights."""

    def __init__(self, model: Transformer, dtype: torch.dtype) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        config = transformers.DeepseekV3Config.from_dict(to_published(model.config))
        config._experts_implementation = "grouped_mm"
        self.model = transformers.DeepseekV3ForCausalLM(config).train()
        self.model.load_state_dict(model.state_dict(), strict=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.dtype = dtype

    def __call__(self, batch: Batch) -> float:
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(batch.tokens[:, :-1], labels=batch.tokens[:, :-1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def step_flops(config: ModelConfig, batch: int, length: int) -> float:
    """Floating-point operations of a training step: forward and twice that backward."""
    attention = config.attention
    assert attention.kind == "mla"
    tokens = batch * length
    products = 2 * count_parameters(config).active_without_embedding * tokens
    scores = attention.num_attention_heads * (attention.qk_head_dim + attention.v_head_dim) * length
    return 3 * (products + config.num_hidden_layers * tokens * scores)  # 2 a product, half of them causal


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of 2048 × 2048 matrices, the best of a second's."""
    a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + 1
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def random_batch(config: ModelConfig, batch: int, length: int, seed: int) -> Batch:
    tokens = torch.randint(config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.zeros_like(tokens))


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Steps of both sides in turn."""
    config, batch, length = shape(name)
    dtype = torch.bfloat16 if has_bfloat16(torch.device("cpu")) else torch.float32
    ours = Ours(Transformer(config, generator=torch.Generator().manual_seed(0)), dtype)
    theirs = Theirs(Transformer(config, generator=torch.Generator().manual_seed(0)), dtype)
    times: dict[str, list[float]] = {"abyssal": [], "transformers": []}
    losses: dict[str, list[float]] = {"abyssal": [], "transformers": []}
    for i in range(rounds + 2):
        data = random_batch(config, batch, length, seed=i)
        for side, step in (("abyssal", ours), ("transformers", theirs)):
            start = time.perf_counter()
            loss = step(data)
            if i >= 2:  # the first two warm up
                times[side].append(time.perf_counter() - start)
            losses[side].append(loss)
    ratios = [t / o for o, t in zip(times["abyssal"], times["transformers"], strict=True)]
    flops = step_flops(config, batch, length)
    return {
        "shape": name,
        "parameters": count_parameters(config).total,
        "active": count_parameters(config).active,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": batch * length,
        "tflop": flops / 1e12,
        "gemm_gflops": {str(d).removeprefix("torch."): gemm_rate(d) / 1e9 for d in (torch.bfloat16, torch.float32)},
        "seconds": {side: statistics.median(values) for side, values in times.items()},
        "tokens_per_s": {side: batch * length / statistics.median(values) for side, values in times.items()},
        "gflops": {side: flops / statistics.median(values) / 1e9 for side, values in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
        "first_losses": {side: values[0] for side, values in losses.items()},
        "times": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["demo", "S"], choices=["demo", *SHAPES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = describe(torch.device("cpu"), torch.bfloat16) | {"transformers": transformers.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + f", commit {commit}\n")
    print("| shape | parameters, active | abyssal, tokens/s | transformers | ratio (quartiles) | GFLOP/s | of GEMM |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    results = []
    for name in options.shape:
        r = compare(name, options.rounds)
        results.append(r)
        low, high = r["ratio_quartiles"]
        ours, theirs = r["tokens_per_s"]["abyssal"], r["tokens_per_s"]["transformers"]
        reached, share = r["gflops"]["abyssal"], r["gflops"]["abyssal"] / r["gemm_gflops"][r["dtype"]]
        print(
            f"| {name} | {r['parameters'] / 1e6:.1f}M, {r['active'] / 1e6:.1f}M | {ours:,.0f} | {theirs:,.0f} "
            f"| {r['ratio']:.2f} ({low:.2f}–{high:.2f}) | {reached:.0f} | {share:.0%} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "commit": commit, "results": results}, indent=2))


if __name__ == "__main__":
    main()
