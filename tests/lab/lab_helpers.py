"""Experiments made as small as they go."""

from __future__ import annotations

from abyssal.config import merge
from abyssal.lab.recipe import LabRecipe, read_lab

TINY = {
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 300},
    "training": {"steps": 4, "batch_size": 2, "sequence_length": 32},
    "schedule": {"warmup": 1},
    "validation": {"batches": 2},
}
SETTINGS = {
    "specialisation": {"at": [0, 0.5, 1.0], "tokens": 256},
    "ablation": {"tokens": 256},
    "finetuning": {"sums": 2_000, "steps": 3, "tokens": 256},
    "conversion": {"windows": 12, "fit": 2, "tokens": 256},
    "context": {"steps": 2, "tokens": 512},
    "dense": {"rounds": 2, "steps_a_round": 1},
}


def tiny(name: str, seeds: int = 2, changes: dict | None = None) -> LabRecipe:
    """The experiment ``name`` with a model of two layers and four steps."""
    settings = {"lab": SETTINGS[name]} if name in SETTINGS else {}
    return read_lab(name, seeds=seeds, changes=merge(merge(TINY, settings), changes or {}))
