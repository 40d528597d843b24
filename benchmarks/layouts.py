"""Losses of one process beside those of several, by every layout: the same recipe through the command line.

    python benchmarks/layouts.py [--steps 20] [--json FILE] [--svg FILE]

Each run is an ``abyssal train`` in FP32 on the CPU (gloo), of several processes under torchrun: a model of 4 layers
with MLA, experts and an MTP module, every balancer on. Told is how far each layout's losses are from one process's.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from charts import drawn
from machine import describe_machine, markdown

RECIPE = """
name: layouts
model:
  vocab_size: 512
  hidden_size: 64
  num_hidden_layers: 4
  intermediate_size: 128
  max_position_embeddings: 256
  attention:
    kind: mla
    num_attention_heads: 4
    kv_lora_rank: 16
    q_lora_rank: 24
    qk_nope_head_dim: 16
    qk_rope_head_dim: 8
    v_head_dim: 16
  moe:
    n_routed_experts: 8
    num_experts_per_tok: 2
    moe_intermediate_size: 32
    n_shared_experts: 1
    first_k_dense_replace: 1
    scoring_func: sigmoid
    topk_method: noaux_tc
    norm_topk_prob: true
  mtp: {num_nextn_predict_layers: 1}
data: {source: tinyshakespeare}
training: {batch_size: 4, accumulate: 4, sequence_length: 64, dtype: float32, device: cpu}
optimizer: {lr: 3.0e-3}
balance:
  bias_sign: {rate: 0.01}
  bias_proportional: {rate: 0.1, every: 5}
  token_loss: {alpha: 0.01}
  sequence_loss: {alpha: 0.001}
samples: {prompts: []}
log: {every: 1}
"""

LAYOUTS: list[dict[str, Any]] = [
    {"shard": 2},
    {"replicate": 2},
    {"shard": 2, "expert": 2},
    {"replicate": 2, "shard": 2, "expert": 4},
    {"tensor": 2},
    {"tensor": 2, "shard": 2, "expert": 2},
    {"tensor": 2, "sequence": "true"},
    {"context": 2},
    {"pipeline": 2},
    {"pipeline": 2, "schedule": "interleaved"},
    {"pipeline": 2, "schedule": "zero_bubble"},
    {"pipeline": 2, "schedule": "dualpipev"},
]


def losses(layout: dict[str, Any], steps: int, folder: Path) -> list[float]:
    """Losses of ``steps`` steps under ``layout``."""
    name = title(layout)
    out, recipe = folder / name.replace(" ", "-"), folder / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    count = math.prod(number for axis, number in layout.items() if axis not in ("expert", "schedule", "sequence"))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
    settings = [f"parallel.{axis}={value}" for axis, value in layout.items()]
    every = [f"training.steps={steps}", f"validation.every={steps}", f"checkpoint.every={steps}"]
    command = [sys.executable, *torchrun, "-m", "abyssal", "train", str(recipe), *settings, *every, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: ended with {done.returncode}\n{done.stderr[-3000:]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def title(layout: dict[str, Any]) -> str:
    return " ".join(f"{axis}={value}" for axis, value in layout.items()) or "one process"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    import torch

    machine = describe_machine(torch.device("cpu"), torch.float32)
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n", flush=True)
    found: dict[str, list[float]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layout in ({}, *LAYOUTS):
            mine = found[title(layout)] = losses(layout, options.steps, Path(folder))
            one = next(iter(found.values()))
            apart = [abs(b / a - 1) for a, b in zip(one, mine, strict=True)]
            rows.append([title(layout), f"{mine[0]:.6f}", f"{mine[-1]:.6f}", f"{max(apart):.1e}", f"{apart[-1]:.1e}"])
            print(rows[-1], flush=True)
    print("\n" + markdown(rows, "layout", "first loss", "last loss", "furthest apart, relative", "at the last step"))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "losses": found}, indent=1) + "\n", encoding="utf-8")
    if options.svg:
        steps = [float(step) for step in range(1, options.steps + 1)]
        lines = {name: (steps, mine) for name, mine in found.items()}
        options.svg.write_text(drawn(lines, "step", "loss, nats a token"), encoding="utf-8")


if __name__ == "__main__":
    main()
