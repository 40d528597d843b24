"""LoRA, QLoRA, ESFT and full tuning of one model on the same rows of the same data, one after the other.

    python benchmarks/methods.py MODEL DATA [--steps 40] [--batch 4] [--length 512] [--methods lora nf4 …] [--json FILE]

Each is an ``abyssal tune`` in a process of its own, with the learning rate that the method has by default unless
``--lr`` gives one for all. Told are the mean training loss of the last tenth of the steps, the loss on held-out
examples before and after, the parameters trained, the most memory that the process held, and tokens (padding not
counted) a second in the median of the steps' records.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe_machine, markdown

METHODS: dict[str, list[str]] = {
    "full": ["method=full"],
    "esft": ["method=esft"],
    "lora": ["method=lora"],
    "nf4": ["method=lora", "weights=nf4"],
    "int8": ["method=lora", "weights=int8"],
    "int4": ["method=lora", "weights=int4"],
}
NAMES = {"nf4": "QLoRA, NF4", "int8": "QLoRA, int8", "int4": "QLoRA, int4", "lora": "LoRA", "esft": "ESFT"}


def run(command: list[str]) -> tuple[str, int]:
    """Standard output of ``command``, and the most memory that it held, in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)}: ended with {status}\n{out}")
    return out, usage.ru_maxrss * 1024


def trained(out: str, parameters: str) -> str:
    """The line of ``out`` that says how much is trained."""
    lines = [line for line in out.splitlines() if line.startswith("trained:")]
    return lines[0].split("parameters")[0].split()[-1] if lines else parameters


def tune(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = folder / name
    t = f"training.steps={options.steps} training.batch_size={options.batch} training.sequence_length={options.length}"
    every = f"validation.every={options.steps} validation.batches={options.held_out} checkpoint.every={options.steps}"
    settings = [*METHODS[name], *t.split(), *every.split(), "log.every=1", "drift.tokens=2048"]
    if options.lr:
        settings.append(f"optimizer.lr={options.lr}")
    program = [sys.executable, "-m", "abyssal", "tune", options.model, options.data, *settings]
    out, peak = run([*program, "--out", str(path)])
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    last = train[-max(len(train) // 10, 1) :]
    summary = json.loads((path / "summary.json").read_text())
    drifts = [layer["overlap"] for layer in summary.get("drift", {}).values()]
    return {
        "method": name,
        "first": statistics.mean(record["loss"] for record in train[: max(len(train) // 10, 1)]),
        "train": statistics.mean(record["loss"] for record in last),
        "held_out": summary["validation"]["loss"],
        "trained": trained(out, "all"),
        "peak_bytes": peak,
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in train[2:]),
        "tokens": train[-1]["tokens"],
        "same_experts": statistics.mean(drifts) if drifts else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--methods", nargs="+", default=["full", "esft", "lora", "nf4"], choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=16, help="batches to validate on")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    machine = describe_machine(torch.device("cpu"), torch.bfloat16)
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.methods:
            result = tune(name, options, Path(folder))
            results.append(result)
            print(json.dumps(result), flush=True)
    rows = [
        [
            NAMES.get(r["method"], r["method"]),
            r["trained"],
            f"{r['first']:.3f}",
            f"{r['train']:.3f}",
            f"{r['held_out']:.4f}",
            f"{r['peak_bytes'] / 1e9:.2f}",
            f"{r['tokens_per_s']:,.0f}",
            "–" if r["same_experts"] is None else f"{r['same_experts']:.1%}",
        ]
        for r in results
    ]
    head = ("method", "trained", "loss, first steps", "last steps", "held out", "peak, GB", "tokens/s", "same experts")
    print("\n" + markdown(rows, *head))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2))


if __name__ == "__main__":
    main()
