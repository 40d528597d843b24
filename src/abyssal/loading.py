"""``abyssal.load``: a model and its tokenizer from a run or a model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from abyssal.checkpoint import load_model
from abyssal.checkpoint.run import MANIFEST, Run
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.model import Transformer


def load(
    source: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Transformer, Tokenizer | None]:
    """The model in ``source``, in eval mode, and its tokenizer (None where the folder has no tokenizer files).

    ``source`` is a run (its best checkpoint by validation loss is taken), a checkpoint of one, or any folder with
    config.json and model.safetensors in the published layout. ``dtype`` None keeps the file's. Raises UserError where
    something is missing, corrupt, or does not fit together.
    """
    folder = Path(source)
    if not folder.exists():
        raise UserError(f"{folder}: no such run or folder")
    if (folder / MANIFEST).is_file():
        run = Run(folder)
        step = run.best()
        if step is None:
            raise UserError(f"{folder}: this run has no checkpoint yet")
        folder = run.checkpoint(step)
    model = load_model(folder, dtype=dtype, device=device)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    return model, tokenizer
