"""Run folders that nobody trained: metrics records as the trainer writes them, of drawn numbers."""

import json
import random

import yaml


def train_record(step: int, steps: int = 1, seed: int = 0, layers=(1, 2), experts: int = 4, **changes) -> dict:
    """A train record as the trainer writes them, with numbers drawn by ``step`` and ``seed``."""
    rng = random.Random(1000 * seed + step)
    rows = {
        str(layer): {
            "load": [rng.randrange(50) for _ in range(experts)],
            "cv": rng.random(),
            "max_vio": rng.random(),
            "dead": rng.randrange(3),
            "bias": [rng.uniform(-1, 1) for _ in range(experts)],
            "bias_range": [-1.0, 1.0],
        }
        for layer in layers
    }
    return {
        "kind": "train",
        "step": step,
        "steps": steps,
        "loss": rng.uniform(1, 8),
        "mtp_loss": [rng.uniform(1, 8)],
        "balance_loss": 0.0,
        "lr": 0.001,
        "grad_norm": rng.random(),
        "step_time": 0.5,
        "tokens_per_s": 100.0,
        "tokens": 50 * step,
        "memory": {"process": 10**9 + step, "device": None},
        "layers": rows,
        **changes,
    }


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def fake_run(path, records, recipe=None):
    """A run folder with nothing but what a report needs."""
    path.mkdir(parents=True)
    (path / "run.json").write_text("{}")
    if recipe is not None:
        (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_lines(path / "metrics.jsonl", records)
    return path
