"""A tiny published model with a chat template, data sets for it, and tuning recipes; all in the test's own folder."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tiny_runs import MODEL, WORDS, scrambled

from abyssal import export
from abyssal.config import resolve_model
from abyssal.data.tokenizer import Tokenizer, byte_tokenizer
from abyssal.model import Transformer
from abyssal.training.start import resume, start
from abyssal.training.trainer import Trainer
from abyssal.tuning.recipe import TuneRecipe, build_recipe
from abyssal.tuning.start import TUNE

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}\n{% else %}A:{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def write_base(folder: Path, dtype: torch.dtype | None = None, seed: int = 3, **changes: Any) -> Path:
    """An exported model in ``folder``/base; ``changes`` to the tiny config."""
    plain = byte_tokenizer()
    tokenizer = Tokenizer(plain.backend, plain.bos, plain.eos, config={}, template=TEMPLATE)
    config = resolve_model(MODEL | changes)
    model = scrambled(Transformer(config, generator=torch.Generator().manual_seed(seed)))
    return export(model, folder / "base", tokenizer=tokenizer, dtype=dtype, force=True)


def write_questions(file: Path, count: int = 24, seed: int = 0) -> Path:
    """Questions of some words, answered by the first of them."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.sample(WORDS, k=rng.randint(2, 4))
        rows.append({"question": " ".join(words), "answer": words[0]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_pairs(file: Path, count: int = 16, seed: int = 0) -> Path:
    """The first word is preferred to the last."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.sample(WORDS, k=3)
        rows.append({"prompt": " ".join(words), "chosen": words[0], "rejected": words[-1]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tune_recipe(base: Path, data: Path, **changes: Any) -> TuneRecipe:
    """A recipe of 6 steps in FP32; ``changes`` are ``section__field=value`` or ``field=value``."""
    settings: dict[str, Any] = {
        "training": {"steps": 6, "batch_size": 2, "sequence_length": 48, "dtype": "float32", "device": "cpu"},
        "optimizer": {"lr": 1e-2},
        "data": {"validation_fraction": 0.2},
        "validation": {"every": 3},
        "checkpoint": {"every": 3, "keep": 2},
        "esft": {"tokens": 200},
        "lora": {"rank": 2},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            settings[section] = {**settings.get(section, {}), field: value}
        else:
            settings[section] = value
    return build_recipe(str(base), str(data), None, settings)


def tuner(recipe: TuneRecipe, path: Path, **options: Any) -> Trainer:
    """A trainer of a new run in ``path``."""
    return start(recipe, path, kind=TUNE, **options)


def continued(path: Path, changes: dict[str, Any] | None = None, **options: Any) -> Trainer:
    """A trainer that continues the run in ``path``."""
    return resume(path, None, changes, kind=TUNE, **options)
