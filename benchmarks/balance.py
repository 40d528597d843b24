"""The demo's recipe under each balancer: validation loss, balance, and how the biases settle.

    python benchmarks/balance.py [--out runs/balance] [--steps N]

Trains one run a strategy (minutes each; a run that is there already is only read) and prints the tables of
docs/notebook.md: all from the same seed, data and order.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import torch

from abyssal.checkpoint.run import read_metrics
from abyssal.training.recipe import read_recipe
from abyssal.training.summary import summarize

STRATEGIES = {
    "bias_sign (the demo's)": [],
    "bias_sign, constant rate": ["balance.bias_sign.final=1.0"],
    "bias_proportional": ["balance=bias_proportional"],
    "token_loss 0.001": ["balance=token_loss"],
    "sequence_loss 0.001, V1 form": [
        "balance.bias_sign=null",
        "balance.sequence_loss={alpha: 0.001, normalize: false}",
    ],
    "sequence_loss 0.0001, V3 form": ["balance=sequence_loss"],
    "bias_sign + sequence_loss": ["balance.sequence_loss.alpha=0.0001"],
    "none": ["balance=none"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/balance"))
    parser.add_argument("--steps", type=int, help="Fewer steps than the recipe's, for a quick look.")
    parser.add_argument("--only", nargs="+", type=int, help="Numbers of the strategies to train, from 0.")
    args = parser.parse_args()
    window = read_recipe("demo").log.window
    rows = []
    for number, (name, changes) in enumerate(STRATEGIES.items()):
        run = args.out / f"{number}"
        if args.only is None or number in args.only:
            train(run, changes + ([f"training.steps={args.steps}"] if args.steps else []))
        if (run / "summary.json").exists():
            rows.append((name, read_metrics(run / "metrics.jsonl")))
    print("\n| balance | validation, nats a token | bits a byte | CV (worst layer) | CV a step | MaxVio | dead |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, records in rows:
        summary = summarize(records, window)
        worst = {k: max(row[k] for row in summary["layers"].values()) for k in ("cv", "cv_per_step", "max_vio", "dead")}
        loss, bits = summary["validation"]["loss"], summary["validation"]["bits_per_byte"]
        print(
            f"| {name} | {loss:.4f} | {bits:.4f} | {worst['cv']:.3f} | {worst['cv_per_step']:.3f} "
            f"| {worst['max_vio']:.3f} | {worst['dead']} |"
        )
    for name, records in rows:
        show_bias_curve(name, records, window)


def train(run: Path, changes: list[str]) -> None:
    if not (run / "summary.json").exists():
        resume = ["--resume", str(run)] if (run / "run.json").exists() else ["demo", *changes, "--out", str(run)]
        subprocess.run([sys.executable, "-m", "abyssal", "train", *resume], check=True)


def show_bias_curve(name: str, records: list[dict], window: int) -> None:
    """Net movement of each layer's bias over successive windows: mean over experts of the absolute change."""
    train = [r for r in records if r["kind"] == "train"]
    biases = {r["step"]: {k: torch.tensor(v["bias"]) for k, v in r["layers"].items() if "bias" in v} for r in train}
    if not biases or not any(float(b.abs().max()) for b in biases[train[-1]["step"]].values()):
        return
    ends = range(window, train[-1]["step"] + 1, window)
    print(f"\nbias of {name}: net movement, steps " + ", ".join(f"{end - window}–{end}" for end in ends))
    for layer, last in biases[train[-1]["step"]].items():
        points = [torch.zeros_like(last), *(biases[end][layer] for end in ends)]
        moves = [float((b - a).abs().mean()) for a, b in pairwise(points)]
        print(f"  layer {layer}: " + "  ".join(f"{move:.3f}" for move in moves))


if __name__ == "__main__":
    main()
