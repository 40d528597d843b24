"""What FSDP's wrapping costs at one process: a training step of the plain model beside the same step of the model as
several processes have it, on a mesh of one, in turn in one run.

    python benchmarks/sharding.py [--shapes demo S] [--dtype float32 bfloat16] [--rounds 9] [--json FILE]

Runs on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import as_json, describe_machine, markdown, paired_ratio, spread, timed

from abyssal.config.parallel import ParallelConfig
from abyssal.distributed.mesh import Mesh
from abyssal.distributed.together import Alone, Together
from abyssal.model import Transformer
from abyssal.training.hardware import resolve_device
from abyssal.training.recipe import BalanceConfig, OptimizerConfig
from abyssal.training.step import TrainingStep
from training import random_batch, shape


def compare(name: str, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of a step of each side."""
    config, batch, length = shape(name)
    steps = []
    for together in (Alone(), Together(Mesh(ParallelConfig(), device))):
        model = Transformer(config, generator=torch.Generator().manual_seed(0)).to(device).train()
        together.divide(model, dtype)
        steps.append(
            TrainingStep(
                model,
                optimizer=OptimizerConfig(lr=1e-4),
                balance=BalanceConfig.model_validate("bias_sign"),
                clip=1.0,
                mtp_weight=0.3,
                dtype=dtype,
                device=device,
                together=together,
            )
        )
    times: list[list[float]] = [[], []]
    for number in range(rounds + 2):
        own = random_batch(config, batch, length, number)
        for step, taken in zip(steps, times, strict=True):
            taken.append(timed(partial(step, [own], length, 1e-4, 0.0), device))
    plain, wrapped = (taken[2:] for taken in times)
    return {"shape": name, "dtype": str(dtype), "plain": plain, "wrapped": wrapped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["demo", "S"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = resolve_device("auto")
    machine = describe_machine(device, torch.float32)
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        for name in options.shapes:
            for dtype in options.dtype:
                results.append(compare(name, getattr(torch, dtype), device, options.rounds))
        dist.destroy_process_group()
    rows = [
        [
            r["shape"],
            r["dtype"].removeprefix("torch."),
            *(spread(r["plain"]), spread(r["wrapped"]), paired_ratio(r["plain"], r["wrapped"])),
        ]
        for r in results
    ]
    print(markdown(rows, "shape", "dtype", "plain, s a step", "on a mesh of one, s", "times as long"))
    if options.json:
        options.json.write_text(json.dumps(as_json({"machine": machine, "results": results}), indent=2))


if __name__ == "__main__":
    main()
