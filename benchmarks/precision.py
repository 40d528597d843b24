"""Whether ``training.dtype: auto`` chooses rightly: our step in FP32 and in BF16, in turn, from tiny models on.

    python benchmarks/precision.py [--widths 64 128 256 512] [--rounds 9] [--json FILE]

Models of four layers whose parts are in proportion to their width, 2048 tokens a step. Medians, quartiles in brackets;
the ratio is of the two steps in a round.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from machine import as_json, describe_machine, markdown, paired_ratio, spread
from scaling import model

from abyssal.model import Transformer
from abyssal.training.hardware import limit_threads, resolve_dtype
from training import Ours, random_batch

CPU = torch.device("cpu")
BATCH, LENGTH = 8, 256


def compare(width: int, rounds: int) -> dict[str, Any]:
    """Steps of a model of that width in both precisions, in turn."""
    config = model(experts=8, per_token=2, context=LENGTH, width=width)
    dtypes = (torch.float32, torch.bfloat16)
    sides = {d: Ours(Transformer(config, generator=torch.Generator().manual_seed(0)), d) for d in dtypes}
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    for i in range(-2, rounds):
        batch = random_batch(config, BATCH, LENGTH, seed=i + 2)
        for dtype, step in sides.items():
            start = time.perf_counter()
            step(batch)
            if i >= 0:
                times[dtype].append(time.perf_counter() - start)
    return {
        "width": width,
        "float32": spread(times[torch.float32]),
        "bfloat16": spread(times[torch.bfloat16]),
        "ratio": paired_ratio(times[torch.bfloat16], times[torch.float32]),
        "auto": str(resolve_dtype("auto", CPU, config.hidden_size)).removeprefix("torch."),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    limit_threads()
    machine = describe_machine(CPU, torch.bfloat16)
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n")
    results = [compare(width, options.rounds) for width in options.widths]
    rows = [
        [r["width"], *(f"{1e3 * r[k].median:.0f}" for k in ("float32", "bfloat16")), str(r["ratio"]), r["auto"]]
        for r in results
    ]
    print(markdown(rows, "hidden_size", "FP32, ms a step", "BF16, ms", "FP32 / BF16", "auto"))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2, default=as_json))


if __name__ == "__main__":
    main()
