"""Memory of a tuning step on a CPU beside what `abyssal plan` works out for it.

    python benchmarks/tuning_memory.py [--shape M] [--batch 8] [--length 256] [--rank 8] [--kinds dense nf4 int8 int4]

Each kind of frozen weights in a process of its own: the model is read from a checkpoint, adapted, and takes three
steps. Measured is what the process holds at most (unique set size) from the moment that the model is in memory on,
less what it held before it read it. The plan's terms are those of a GPU; activations are counted for a CPU here,
whose kernels keep other things.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import describe_machine, markdown, peak_memory

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


def some_steps(folder: str, kind: str, batch: int, length: int, rank: int) -> Callable[..., object]:
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
    for seed in range(3):
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
            measured = peak_memory(some_steps, *arguments)["host"]
            terms = ", ".join(f"{term} {nbytes / 1e9:.2f}" for term, nbytes in planned.by_term.items())
            figures = f"{planned.total / 1e9:.2f}", f"{measured / 1e9:.2f}", f"{measured / planned.total:.2f}"
            rows.append([kind, *figures, terms])
            print(rows[-1], flush=True)
    print(
        "\n" + markdown(rows, "frozen weights", "planned, GB", "measured, GB", "measured / planned", "planned, by term")
    )


if __name__ == "__main__":
    main()
