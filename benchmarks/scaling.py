"""How the time of a training step grows with experts, experts a token, context and width, beside its arithmetic.

    python benchmarks/scaling.py [--sweeps experts per_token context width] [--rounds 7] [--quick] [--json FILE]

Each sweep changes one number of a small model and keeps the rest: the number of experts at 4 active ones of equal width
(the model grows, what a token meets does not); how many a token chooses; the context at equal tokens a step; the width
of everything. Beside each setting's time stand its FLOPs (abyssal.analysis.flops), the bytes of weights, gradients and
optimizer state that AdamW in FP32 touches (28 a parameter: weight and two moments read and written, gradient read), and
the time that both would take one after the other at the rates measured in the same rounds: BF16 (or FP32) products of
2048 × 2048 matrices and copying memory. Small products do not reach that rate; what is of interest is whether the
measured time grows faster than the predicted one. Slopes are those of a line through the logarithms: 1 means
proportional, and none is given where the number on the other axis changes by less than a fifth. Settings take turns, a
step each a round, so that the machine's moods fall on all of them; medians, quartiles in brackets. Tokens are random.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import as_json, bandwidth, describe_machine, gemm_rate, markdown, spread, timed

from abyssal.analysis.flops import count_flops
from abyssal.analysis.parameters import count_parameters
from abyssal.config import ModelConfig
from abyssal.data.loader import Batch
from abyssal.model import Transformer
from abyssal.training.hardware import has_bfloat16, resolve_device
from abyssal.training.recipe import BalanceConfig, OptimizerConfig
from abyssal.training.step import TrainingStep

BYTES_A_PARAMETER = 28
# name, values, values of --quick, tokens a step, tokens a step of --quick
SWEEPS: dict[str, tuple[str, list[int], list[int], int, int]] = {
    "experts": ("experts", [8, 16, 32, 64, 128, 256], [8, 16, 32], 4096, 512),
    "per_token": ("experts a token", [1, 2, 4, 8, 16], [1, 2, 4], 4096, 512),
    "context": ("context", [256, 512, 1024, 2048, 4096, 8192], [256, 512, 1024], 8192, 1024),
    "width": ("width", [256, 384, 512, 768, 1024], [128, 256], 4096, 512),
}


def model(experts: int = 16, per_token: int = 4, context: int = 512, width: int = 256) -> ModelConfig:
    """Four layers of MLA and experts, all widths in proportion to ``width``."""
    return ModelConfig.model_validate(
        {
            "vocab_size": 2048,
            "hidden_size": width,
            "num_hidden_layers": 4,
            "intermediate_size": 3 * width,
            "max_position_embeddings": context,
            "attention": {
                "kind": "mla",
                "num_attention_heads": max(width // 64, 1),
                "kv_lora_rank": width // 4,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 32,
                "v_head_dim": 64,
            },
            "moe": {
                "n_routed_experts": experts,
                "num_experts_per_tok": per_token,
                "moe_intermediate_size": width // 2,
                "n_shared_experts": 1,
            },
        }
    )


class Setting:
    """One model under training, and what its step should cost."""

    def __init__(self, sweep: str, value: int, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        # 32 experts to choose from, so that 16 a token are still a choice
        changes = {"experts": 32, sweep: value} if sweep == "per_token" else {sweep: value}
        self.config = model(**changes)
        self.value, self.length = value, self.config.max_position_embeddings
        self.batch = tokens // self.length
        self.parameters = count_parameters(self.config).total
        self.flops = count_flops(self.config, self.length).training * self.batch * self.length
        self.bytes = BYTES_A_PARAMETER * self.parameters
        self.seconds: list[float] = []
        self.device = device
        self.step = TrainingStep(
            Transformer(self.config, generator=torch.Generator().manual_seed(0)).to(device).train(),
            optimizer=OptimizerConfig(lr=1e-4),
            balance=BalanceConfig.model_validate("bias_sign"),
            clip=1.0,
            mtp_weight=0.3,
            dtype=dtype,
            device=device,
        )

    def run(self, seed: int, count: bool) -> None:
        """A step; its time is kept where ``count``."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.config.vocab_size, (self.batch, self.length + 1), generator=generator)
        data = Batch(tokens, torch.zeros_like(tokens)).to(self.device)
        seconds = timed(lambda: self.step([data], self.length, 1e-4, 0.0), self.device)
        if count:
            self.seconds.append(seconds)


def slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """d log y / d log x of the straight line through the logarithms; None where x hardly changes."""
    if max(x) < 1.2 * min(x):
        return None
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def sweep(name: str, rounds: int, quick: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All settings of one sweep in turn, and the machine's rates in each round."""
    _, values, quick_values, tokens, quick_tokens = SWEEPS[name]
    settings = [
        Setting(name, value, quick_tokens if quick else tokens, device, dtype)
        for value in (quick_values if quick else values)
    ]
    gemm_rates, copy_rates = [], []
    for i in range(rounds + 1):
        for setting in settings:
            setting.run(seed=i, count=i > 0)  # the first warms up
        if i > 0:
            gemm_rates.append(gemm_rate(dtype, device=device, seconds=0.2) / 1e9)
            copy_rates.append(bandwidth(device, seconds=0.2)["copy"] / 1e9)
    gemm, memory = 1e9 * statistics.median(gemm_rates), 1e9 * statistics.median(copy_rates)
    rows: list[dict[str, Any]] = []
    for s in settings:
        arithmetic, traffic = s.flops / gemm, s.bytes / memory
        rows.append(
            {
                "value": s.value,
                "parameters": s.parameters,
                "tokens": s.batch * s.length,
                "flops": s.flops,
                "bytes": s.bytes,
                "predicted_arithmetic_s": arithmetic,
                "predicted_memory_s": traffic,
                "predicted_s": arithmetic + traffic,
                "seconds": spread(s.seconds),
                "times": s.seconds,
            }
        )
    swept, flops, predicted = ([row[key] for row in rows] for key in ("value", "flops", "predicted_s"))
    measured = [row["seconds"].median for row in rows]
    return {
        "sweep": name,
        "gemm_gflops": spread(gemm_rates),
        "memory_copy_gb": spread(copy_rates),
        "rows": rows,
        "slopes": {
            "value": slope(swept, measured),
            "flops": slope(flops, measured),
            "predicted": slope(predicted, measured),
            "predicted against value": slope(swept, predicted),
        },
    }


def show(result: dict[str, Any]) -> str:
    """The table of a sweep, and its slopes in a sentence."""
    label = SWEEPS[result["sweep"]][0]
    rows = []
    for row in result["rows"]:
        seconds = row["seconds"]
        rows.append(
            (
                f"{row['value']:,}",
                f"{row['parameters'] / 1e6:.1f}M",
                f"{row['flops'] / 1e9:,.1f}",
                f"{row['bytes'] / 1e6:,.0f}",
                f"{row['predicted_s']:.3f}",
                f"{seconds.median:.3f} ({seconds.low:.3f}–{seconds.high:.3f})",
                f"{seconds.median / row['predicted_s']:.2f}",
            )
        )
    columns = (label, "parameters", "GFLOP a step", "MB touched", "predicted, s", "measured, s", "ratio")
    told = {key: "–" if value is None else f"{value:.2f}" for key, value in result["slopes"].items()}
    tokens = result["rows"][0]["tokens"]
    return (
        f"{markdown(rows, *columns)}\n\nSlope of the time against {label}: {told['value']} (predicted: "
        f"{told['predicted against value']}), against FLOPs: {told['flops']}, against the predicted time: "
        f"{told['predicted']}. {tokens:,} tokens a step; products {result['gemm_gflops']} GFLOP/s, "
        f"copying {result['memory_copy_gb']} GB/s.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=None, help="steps of each setting that count; 7, quick: 2")
    parser.add_argument("--quick", action="store_true", help="few and small settings, to see that it works")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    device = resolve_device(options.device, "--device")
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    machine = describe_machine(device, dtype)
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n")
    results = []
    for name in options.sweeps:
        results.append(sweep(name, options.rounds or (2 if options.quick else 7), options.quick, device, dtype))
        gc.collect()  # one sweep's models at a time
        print(show(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2, default=as_json))
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
