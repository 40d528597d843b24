"""A training step beside transformers': same weights, same batch, in turn in one process.

    python benchmarks/training.py [--shapes demo S] [--rounds 9] [--compiled] [--memory] [--dtype …] [--json FILE]
    python benchmarks/training.py --shapes M --rounds 2 --apart

Both sides do a whole step: forward, loss, backward, clipping, AdamW; ours balances the experts and keeps the metrics
too, which transformers does not do. transformers runs at its best setting on a CPU: BF16 autocast where the hardware
has it, grouped_mm experts, SDPA, fused AdamW; ``--compiled`` adds it under torch.compile as a third side (one to two
minutes to compile, which are told and not counted). Each round times one step of every side, one after the other, and
measures the rate of 2048 × 2048 products; ratios are of steps in one round. ``--apart`` is for shapes whose sides do
not fit in memory together (M: 24 GB hold one of them, and transformers' FP32 weights with AdamW not at all): in each
round every side runs some steps in a process of its own, one after the other, and transformers comes in the two ways
that fit: weights and AdamW in BF16, and FP32 weights under autocast with SGD, which has no state to update. FLOPs are
those of abyssal.analysis.flops, three times the forward pass; what is computed again on purpose is not counted. The
floor is the time of those FLOPs at the rate of the products, and of the optimizer's bytes at the rate of copying, one
after the other. ``--memory`` takes the peak of some steps of each side, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from machine import (
    as_json,
    bandwidth,
    describe_machine,
    gemm_rate,
    markdown,
    paired_ratio,
    peak_memory,
    spread,
)

from abyssal.analysis.flops import count_flops
from abyssal.analysis.parameters import count_parameters
from abyssal.config import ModelConfig, preset, to_published
from abyssal.data.loader import Batch
from abyssal.model import Transformer
from abyssal.training.hardware import limit_threads, resolve_dtype
from abyssal.training.recipe import BalanceConfig, OptimizerConfig
from abyssal.training.step import TrainingStep

CPU = torch.device("cpu")
BYTES = 26  # a weight that our AdamW moves: BF16 weight, its lower half and two FP32 moments both ways, BF16 gradient

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
            device=CPU,
        )

    def __call__(self, batch: Batch) -> float:
        return self.step([batch], batch.tokens.shape[1] - 1, 1e-4, 0.0).loss


class Theirs:
    """transformers' V3 with the same weights, at its best setting."""

    def __init__(self, model: Transformer, dtype: torch.dtype, compiled: bool = False, fits: str = "") -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        config = transformers.DeepseekV3Config.from_dict(to_published(model.config))
        config._experts_implementation = "grouped_mm"
        self.model = transformers.DeepseekV3ForCausalLM(config).train()
        self.model.load_state_dict(model.state_dict(), strict=False)
        if fits == "pure":
            self.model.to(dtype)
        optimizer = torch.optim.SGD if fits == "sgd" else torch.optim.AdamW
        self.optimizer = optimizer(self.model.parameters(), lr=1e-4, fused=True)
        self.dtype = dtype
        self.forward = torch.compile(self.model) if compiled else self.model

    def __call__(self, batch: Batch) -> float:
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.forward(batch.tokens[:, :-1], labels=batch.tokens[:, :-1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def step_flops(config: ModelConfig, batch: int, length: int) -> float:
    """Floating-point operations of a training step."""
    return count_flops(config, length).training * batch * length


def random_batch(config: ModelConfig, batch: int, length: int, seed: int) -> Batch:
    tokens = torch.randint(config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.zeros_like(tokens))


SIDES: dict[str, Callable[[Transformer, torch.dtype], Callable[[Batch], float]]] = {
    "abyssal": Ours,
    "transformers": Theirs,
    "transformers, compiled": lambda model, dtype: Theirs(model, dtype, compiled=True),
    "transformers, BF16 weights": lambda model, dtype: Theirs(model, dtype, fits="pure"),
    "transformers, SGD": lambda model, dtype: Theirs(model, dtype, fits="sgd"),
}


def build(side: str, name: str, dtype: torch.dtype) -> Callable[[Batch], float]:
    """A side's step on the shape ``name``; every side begins with the same weights."""
    config, _, _ = shape(name)
    return SIDES[side](Transformer(config, generator=torch.Generator().manual_seed(0)), dtype)


def some_steps(side: str, name: str, dtype: torch.dtype, steps: int = 3) -> Callable[[Batch], float]:
    """For ``--memory``: builds a side and takes steps; what it returns is what must stay alive."""
    step = build(side, name, dtype)
    for i in range(steps):
        step(random_batch(*shape(name), seed=i))
    return step


def timed_steps(side: str, name: str, dtype: torch.dtype, steps: int = 3) -> tuple[list[float], float, float]:
    """Seconds of ``steps`` steps after two that warm up, the first loss, and the rate of products meanwhile."""
    step = build(side, name, dtype)
    times, losses = [], []
    for i in range(steps + 2):
        data = random_batch(*shape(name), seed=i)
        start = time.perf_counter()
        losses.append(step(data))
        times.append(time.perf_counter() - start)
    return times[2:], losses[0], gemm_rate(dtype) / 1e9


def compare_apart(name: str, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Sides in processes of their own, in turn."""
    sides = ["abyssal", "transformers, BF16 weights", "transformers, SGD"]
    times: dict[str, list[float]] = {side: [] for side in sides}
    losses, rates, threads = {}, [], torch.get_num_threads()
    for _ in range(rounds):
        for side in sides:
            with ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
            ) as pool:
                seconds, losses[side], rate = pool.submit(timed_steps, side, name, dtype).result()
            times[side] += seconds
            rates += [rate] * len(seconds)
    return summary(name, dtype, times, rates[: len(times["abyssal"])], losses, {}, {})


def compare(name: str, rounds: int, sides: list[str], dtype: torch.dtype, memory: bool) -> dict[str, Any]:
    """Steps of all sides in turn."""
    config, batch, length = shape(name)
    steps = {side: build(side, name, dtype) for side in sides}
    times: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    rates, warmup = [], {}
    for i in range(-2, rounds):  # the first two warm up
        data = random_batch(config, batch, length, seed=i + 2)
        for side, step in steps.items():
            start = time.perf_counter()
            losses[side].append(step(data))
            seconds = time.perf_counter() - start
            if i >= 0:
                times[side].append(seconds)
            else:
                warmup[side] = warmup.get(side, 0.0) + seconds
        rates.append(gemm_rate(dtype, seconds=0.3) / 1e9)
    first = {side: values[0] for side, values in losses.items()}
    peaks = {side: peak_memory(some_steps, side, name, dtype)["host"] for side in sides} if memory else {}
    return summary(name, dtype, times, rates[2:], first, warmup, peaks)


def summary(
    name: str,
    dtype: torch.dtype,
    times: dict[str, list[float]],
    rates: list[float],
    first_loss: dict[str, float],
    warmup: dict[str, float],
    peaks: dict[str, float],
) -> dict[str, Any]:
    """What is told and kept of a shape: ``times`` and ``rates`` (GFLOP/s of products) by round."""
    config, batch, length = shape(name)
    flops, tokens = step_flops(config, batch, length), batch * length
    counts, memory = count_parameters(config), {kind: rate / 1e9 for kind, rate in bandwidth().items()}
    products, gemm = flops / 1e9, spread(rates)
    return {
        "shape": name,
        "floor": {
            "products": products / gemm.median,
            "optimizer": BYTES * (counts.total + counts.mtp) / 1e9 / memory["copy"],
        },
        "parameters": counts.total,
        "active": counts.active,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "tflop": flops / 1e12,
        "gemm_gflops": gemm,
        "memory_gb_per_s": memory,
        "seconds": {side: spread(values) for side, values in times.items()},
        "tokens_per_s": {side: spread([tokens / t for t in values]) for side, values in times.items()},
        "warmup_seconds": warmup,
        "ratio": {side: paired_ratio(times["abyssal"], times[side]) for side in times if side != "abyssal"},
        "of_gemm": {
            side: spread([flops / t / rate / 1e9 for t, rate in zip(values, rates, strict=True)])
            for side, values in times.items()
        },
        "first_loss": first_loss,
        "peak_bytes": peaks,
        "times": times,
    }


def row(result: dict[str, Any]) -> list[list[str]]:
    """Lines of the table: one a side."""
    out = []
    for side, rate in result["tokens_per_s"].items():
        ratio, share = result["ratio"].get(side), result["of_gemm"][side]
        peak = result["peak_bytes"].get(side)
        out.append(
            [
                f"{result['shape']}, {side}",
                f"{rate.median:,.0f} ({rate.low:,.0f}–{rate.high:,.0f})",
                "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})",
                f"{share.median:.0%}",
                "" if peak is None else f"{peak / 1e9:.2f}",
            ]
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["demo", "S"], choices=["demo", *SHAPES])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="transformers under torch.compile too")
    parser.add_argument("--apart", action="store_true", help="each side in processes of its own")
    parser.add_argument("--memory", action="store_true", help="peak memory of each side")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    limit_threads()
    import transformers

    sides = ["abyssal", "transformers", *(["transformers, compiled"] if options.compiled else [])]
    dtype = resolve_dtype(options.dtype, CPU)
    machine = describe_machine(CPU, dtype) | {"transformers": transformers.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n", flush=True)
    results = []
    for name in options.shapes:
        if options.apart:
            result = compare_apart(name, options.rounds, dtype)
        else:
            result = compare(name, options.rounds, sides, dtype, options.memory)
        results.append(result)
        print(
            f"{name}: {result['parameters'] / 1e6:.1f}M parameters, {result['active'] / 1e6:.1f}M active; "
            f"{result['tflop']:.3f} TFLOP a step of {result['tokens']} tokens; products "
            f"{result['gemm_gflops']} GFLOP/s, memory read at {result['memory_gb_per_s']['read']:.1f} GB/s, copied at "
            f"{result['memory_gb_per_s']['copy']:.1f}; first losses "
            + ", ".join(f"{loss:.4f}" for loss in result["first_loss"].values())
            + f"; no step can be below {sum(result['floor'].values()):.2f} s at these rates "
            f"(products {result['floor']['products']:.2f}, the optimizer's bytes {result['floor']['optimizer']:.2f})"
            + ("; first two steps " + ", ".join(f"{t:.0f} s" for t in result["warmup_seconds"].values())),
            flush=True,
        )
    table = [line for result in results for line in row(result)]
    print(
        "\n" + markdown(table, "shape, side", "tokens/s (quartiles)", "abyssal is … times", "of GEMM rate", "peak, GB")
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2, default=as_json))


if __name__ == "__main__":
    main()
