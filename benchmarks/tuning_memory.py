"""Memory of a tuning step on a CPU beside what `abyssal plan` works out for it.

    python benchmarks/tuning_memory.py [--shape M] [--batch 8] [--length 256] [--rank 8] [--kinds dense nf4 int8 int4]

Each kind of frozen weights in a process of its own: the model is read from a checkpoint, adapted, and takes two
steps. Measured is what its tensors hold at most, from reading the model on: torch's profiler tells of every allocation
(it is what torch.cuda.max_memory_allocated is on a GPU, and what the plan means). Beside it stands what the process
holds more after the steps than before (unique set size): libraries, their buffers and freed memory are in that. The
plan's terms are those of a GPU; activations are counted for a CPU here, whose kernels keep other things.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from machine import describe_machine, markdown
from torch.profiler import ProfilerActivity, profile

from abyssal import export, load
from abyssal.analysis.activations import Adapters, StepShape
from abyssal.analysis.inventory import Inventory
from abyssal.analysis.memory import Layout, TrainingMemory, TrainingSetup
from abyssal.config import ModelConfig
from abyssal.model import Transformer
from abyssal.model.adapting import add_lora
from abyssal.training.hardware import limit_threads
from abyssal.training.recipe import BalanceConfig, OptimizerConfig
from abyssal.training.step import TrainingStep
from training import SHAPES, random_batch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class OnCPU(TrainingSetup):
    """The same setup, with the activations that the CPU's kernels keep."""

    def step(self, layout: Layout) -> StepShape:
        return StepShape(self.micro_batch, self.sequence, self.dtype, device="cpu", adapters=self.adapters)


def measured(folder: str, kind: str, batch: int, length: int, rank: int) -> dict[str, int]:
    """Bytes that tensors hold at most, and what the process holds at the end more than at the beginning."""
    import psutil

    process = psutil.Process()
    before = process.memory_full_info().uss
    with tempfile.TemporaryDirectory() as place:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step = some_steps(folder, kind, batch, length, rank)
            after = process.memory_full_info().uss
        trace = Path(place) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    del step
    held = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    return {"tensors": max(held), "process": after - before}


def some_steps(folder: str, kind: str, batch: int, length: int, rank: int) -> TrainingStep:
    """What it returns is what must stay alive."""
    model, _ = load(folder, dtype=torch.bfloat16, weights=kind)
    add_lora(model, ["all"], rank, 2.0 * rank)
    step = TrainingStep(
        model.train(),
        optimizer=OptimizerConfig(lr=1e-4),
        balance=BalanceConfig(),
        clip=1.0,
        mtp_weight=0.0,
        device=CPU,
        dtype=torch.bfloat16,
    )
    for seed in range(2):
        step([random_batch(model.config, batch, length, seed)], length, 1e-4, 0.0)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="M", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", default=["dense", "nf4", "int8", "int4"])
    options = parser.parse_args()
    limit_threads()
    machine = describe_machine(CPU, torch.bfloat16)
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n", flush=True)
    config = ModelConfig.model_validate(SHAPES[options.shape][0])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(config, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        export(model, Path(folder) / "model")
        del model
        for kind in options.kinds:
            setup = OnCPU(options.batch, options.length, adapters=Adapters(options.rank), frozen=kind)
            planned = TrainingMemory(Inventory(config), setup).of(Layout())
            arguments = (str(Path(folder) / "model"), kind, options.batch, options.length, options.rank)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(measured, *arguments).result()
            terms = ", ".join(f"{term} {nbytes / 1e9:.2f}" for term, nbytes in planned.by_term.items())
            gigabytes = (f"{nbytes / 1e9:.2f}" for nbytes in (planned.total, found["tensors"]))
            ratio = f"{found['tensors'] / planned.total:.2f}"
            rows.append([kind, *gigabytes, ratio, f"{found['process'] / 1e9:.2f}", terms])
            print(rows[-1], flush=True)
    heads = ("frozen weights", "planned, GB", "tensors, GB", "tensors / planned", "process, GB", "planned, by term")
    print("\n" + markdown(rows, *heads))


if __name__ == "__main__":
    main()
