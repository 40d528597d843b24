"""The rebuild of docs/rebuild.md: SmolLM2-135M's shape with MLA and experts, from scratch and from its own weights.

    python benchmarks/rebuild.py collect FILE --dense FOLDER --upcycled FOLDER --healed RUN --scratch RUN --text FILE
    python benchmarks/rebuild.py show FILE [--svg FOLDER]

``collect`` judges all four models on the same tokens of ``--text`` (the first 40,960, in windows of 256), reads both
runs' curves, speed and memory, and lets each model continue five prompts; everything goes into a JSON file. ``show``
makes docs/rebuild.md's tables and chart of it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import median

import torch
from machine import markdown

import abyssal
from abyssal.checkpoint.run import read_metrics
from abyssal.data.corpus import documents
from abyssal.lab.charts import curves
from abyssal.lab.measure import token_losses
from abyssal.training.hardware import describe

PROMPTS = (
    "Once upon a time",
    "The future of artificial intelligence",
    "In the distant galaxy",
    "He was walking",
    "Music is a",
)
TOKENS, WINDOW, NEW = 40_960, 256, 60


def collect(options: argparse.Namespace) -> None:
    found: dict = {"machine": describe(torch.device("cpu"), torch.bfloat16), "models": {}, "runs": {}}
    for name in ("dense", "upcycled", "healed", "scratch"):
        print(name, flush=True)
        found["models"][name] = judged(getattr(options, name), options.text)
    for name in ("healed", "scratch"):
        found["runs"][name] = run(getattr(options, name))
    found["upcycle"] = json.loads((options.upcycled / "upcycle.json").read_text(encoding="utf-8"))
    options.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def judged(folder: Path, text: Path) -> dict:
    """Loss on the text's first tokens, and continuations."""
    model, tokenizer = abyssal.load(folder, dtype=torch.float32)
    ids: list[int] = []
    for document in documents(text):
        for piece in tokenizer.pieces(document):
            ids += tokenizer.encode(piece)
        if len(ids) > TOKENS:
            break
    if len(ids) <= TOKENS:
        raise SystemExit(f"--text: {text}: {len(ids):,} tokens; expected more than {TOKENS:,}")
    ids = ids[: TOKENS + 1]
    size = len(b"".join(tokenizer.token_bytes(token) for token in ids[1:]))
    rows = torch.stack([torch.tensor(ids[i : i + WINDOW + 1]) for i in range(0, TOKENS, WINDOW)])
    nats = float(token_losses(model, rows).double().mean())
    texts = abyssal.generate(model, tokenizer, list(PROMPTS), max_new_tokens=NEW, temperature=0.7, top_p=0.95, seed=1)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "nats": nats,
        "bits_per_byte": nats * TOKENS / size / math.log(2),
        "continuations": dict(zip(PROMPTS, texts, strict=True)),
    }


def run(path: Path) -> dict:
    """Curves, speed and memory of a run."""
    records = read_metrics(path / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    return {
        "steps": train[-1]["step"],
        "tokens": train[-1]["tokens"],
        "tokens_per_s": median(r["tokens_per_s"] for r in train),
        "fastest_tokens_per_s": sorted(r["tokens_per_s"] for r in train)[int(0.9 * len(train))],
        "memory": max(r["memory"]["process"] for r in train),
        "train": [[r["tokens"], round(r["loss"], 4)] for r in train],
        "validation": [[r["step"], round(r["loss"], 4)] for r in records if r["kind"] == "validation"],
        "cv": max(layer["cv"] for layer in train[-1]["layers"].values()),
    }


NAMES = {
    "dense": "SmolLM2-135M-Instruct, dense",
    "upcycled": "upcycled, not trained",
    "healed": "upcycled, trained",
    "scratch": "from scratch",
}


def show(options: argparse.Namespace) -> None:
    found = json.loads(options.file.read_text(encoding="utf-8"))
    rows = [
        [
            NAMES[name],
            f"{one['parameters'] / 1e6:.1f}M",
            trained(found, name),
            f"{one['nats']:.3f}",
            f"{one['bits_per_byte']:.3f}",
        ]
        for name, one in found["models"].items()
    ]
    print(markdown(rows, "model", "parameters", "trained here on", "nats a token", "bits a byte"))
    rows = [
        [
            NAMES[name],
            f"{one['steps']}",
            f"{one['tokens']:,}",
            f"{one['tokens_per_s']:.0f} ({one['fastest_tokens_per_s']:.0f})",
            f"{one['memory'] / 1e9:.1f} GB",
            ", ".join(f"{loss:.2f}" for _, loss in one["validation"]),
        ]
        for name, one in found["runs"].items()
    ]
    print(markdown(rows, "run", "steps", "tokens", "tokens/s (best tenth)", "memory", "validation on the way"))
    for prompt in PROMPTS:
        print(f"\n**{prompt}**\n")
        for name in ("scratch", "healed", "dense"):
            text = found["models"][name]["continuations"][prompt].replace("\n", " ").strip()
            print(f"- {NAMES[name]}: {text}")
    if options.svg:
        size = 16
        ends, lines = [], {}
        for name, one in found["runs"].items():
            points = one["train"]
            pieces = [points[i : i + size] for i in range(0, len(points) - size + 1, size)]
            ends = max(ends, [piece[-1][0] / 1e6 for piece in pieces], key=len)
            lines[NAMES[name]] = [[sum(loss for _, loss in piece) / size for piece in pieces]]
        chart = curves("Training loss", ends, lines, across="million tokens seen", up="nats a token, mean of 16 steps")
        (options.svg / "rebuild.svg").write_text(chart.on_white() + "\n", encoding="utf-8")


def trained(found: dict, name: str) -> str:
    return f"{found['runs'][name]['tokens']:,} tokens" if name in found["runs"] else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("collect")
    one.add_argument("file", type=Path)
    for name in ("dense", "upcycled", "healed", "scratch", "text"):
        one.add_argument(f"--{name}", type=Path, required=True)
    one.set_defaults(run=collect)
    one = commands.add_parser("show")
    one.add_argument("file", type=Path)
    one.add_argument("--svg", type=Path)
    one.set_defaults(run=show)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
