"""What experiments measure on a trained model: losses token by token, routing, the figures of a run.

Shapes: n windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from abyssal.analysis.lens import Text, Texts
from abyssal.checkpoint.run import read_metrics
from abyssal.data.shards import TokenShards
from abyssal.data.tokenizer import Tokenizer
from abyssal.model import Transformer
from abyssal.model.modes import evaluating
from abyssal.training.hardware import autocast
from abyssal.training.prepare import open_data
from abyssal.training.recipe import Recipe
from abyssal.training.summary import summarize

_BATCH_TOKENS = 4096

CLASSES = ("line break", "punctuation", "capitals", "start of a word", "inside a word")


def held_out(recipe: Recipe, tokenizer: Tokenizer) -> TokenShards:
    """The split that nothing is trained on."""
    return open_data(recipe.data, tokenizer)[1]


def windows(shards: TokenShards, length: int, tokens: int) -> Tensor:
    """The first windows of ``length`` + 1 tokens, side by side (each predicts ``length``), ``tokens`` in all at most,
    one at least: [n, T + 1]."""
    count = max(min(tokens, len(shards) - 1) // length, 1)
    length = min(length, len(shards) - 1)
    return torch.stack([torch.from_numpy(shards.read(i * length, length + 1)) for i in range(count)])


@torch.inference_mode()
def token_losses(model: Transformer, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """-ln p of every token but each window's first: ``rows`` [n, T + 1] -> [n, T] FP32, on the CPU."""
    device = next(model.parameters()).device
    out = []
    with evaluating(model), autocast(device, dtype):
        for batch in rows.split(max(_BATCH_TOKENS // rows.shape[1], 1)):
            batch = batch.to(device)
            logits = model(batch[:, :-1]).float()
            losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            out.append(losses.view(len(batch), -1).cpu())
    return torch.cat(out)


def texts_of(rows: Tensor, name: str = "held-out text") -> Texts:
    """Windows [n, T + 1] as the lens takes them, their last token left out."""
    ids = rows[:, :-1].numpy().astype(np.int32)
    count, length = ids.shape
    return Texts(
        [Text(name, count, ids.size, cut=True)],
        length,
        ids=ids.ravel(),
        document=np.repeat(np.arange(count, dtype=np.int32), length),
        text=np.zeros(ids.size, np.int32),
        position=np.tile(np.arange(length, dtype=np.int32), count),
    )


def token_classes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """By token id, the index of its class in CLASSES: a line break in it; nothing but punctuation and blanks; two
    capitals in a row (names of speakers); else whether it begins with a blank or goes on with a word."""
    out = np.empty(tokenizer.vocab_size, np.int64)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token).decode("utf-8", errors="replace")
        bare = text.strip()
        if "\n" in text:
            kind = 0
        elif bare and all(c in string.punctuation for c in bare):
            kind = 1
        elif len(bare) > 1 and bare.isupper():
            kind = 2
        else:
            kind = 3 if text[:1].isspace() else 4
        out[token] = kind
    return out


def run_figures(path: Path, window: int = 50) -> dict[str, Any]:
    """The figures of a finished run: validation in nats a token and bits a byte, and the balance of its last ``window``
    steps: CV and MaxVio of the load summed over them and each step's CV, means over the layers; dead experts, summed.
    ``cv_curve``: every step's CV, mean over the layers."""
    records = read_metrics(path / "metrics.jsonl")
    found = summarize(records, window)
    train = [record for record in records if record["kind"] == "train"]
    out: dict[str, Any] = {
        "loss": found["validation"]["loss"],
        "bits_per_byte": found["validation"]["bits_per_byte"],
        "steps": found["step"],
        "tokens": found["tokens"],
        "seconds": round(found["seconds"], 2),
        "loss_curve": [round(record["loss"], 4) for record in train],
    }
    if layers := list(found["layers"].values()):
        for name in ("cv", "cv_per_step", "max_vio"):
            out[name] = sum(layer[name] for layer in layers) / len(layers)
        out["dead"] = sum(layer["dead"] for layer in layers)
        out["cv_curve"] = [
            round(sum(layer["cv"] for layer in record["layers"].values()) / len(record["layers"]), 4)
            for record in train
        ]
    return out


def smoothed(values: list[float], pieces: int = 40) -> tuple[list[float], list[float]]:
    """A curve as the means of ``pieces`` stretches: where each ends (from 1), and its mean."""
    size = max(len(values) // pieces, 1)
    ends = list(range(size, len(values) + 1, size))
    return [float(end) for end in ends], [sum(values[end - size : end]) / size for end in ends]
