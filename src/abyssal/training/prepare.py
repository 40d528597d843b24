"""From a recipe's ``data:`` to a tokenizer and token shards, kept in a cache so that the next run starts at once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from abyssal.checkpoint import replace_folder
from abyssal.data.corpus import corpus_fingerprint
from abyssal.data.shards import TokenShards, open_shards, prepare, train_split
from abyssal.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from abyssal.errors import UserError
from abyssal.training.recipe import DataConfig


def _key(**parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _cache(data: DataConfig) -> Path:
    return Path(data.cache).expanduser()


def corpus_id(data: DataConfig) -> str:
    """A hash of all text that ``data`` names and of how it is split. Raises UserError where it cannot be read."""
    validation = corpus_fingerprint(data.validation) if data.validation else data.validation_fraction
    return _key(corpus=corpus_fingerprint(data.source), field=data.field, validation=validation)


def load_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer that ``data`` names; ``bpe`` is trained on the training split with ``vocab_size`` entries."""
    if data.tokenizer == "bytes":
        return byte_tokenizer()
    if data.tokenizer != "bpe":
        return Tokenizer.load(Path(data.tokenizer))
    folder = _cache(data) / "tokenizers" / _key(corpus=corpus_id(data), vocab_size=vocab_size)
    if not folder.exists():
        fraction = 0.0 if data.validation else data.validation_fraction
        tokenizer = train_bpe(train_split(data.source, fraction, field=data.field), vocab_size)
        _publish(folder, tokenizer.save)
    return Tokenizer.load(folder)


def open_data(data: DataConfig, tokenizer: Tokenizer) -> tuple[TokenShards, TokenShards]:
    """Training and validation shards of ``data``, tokenised now if they are not in the cache yet."""
    folder = _cache(data) / "tokens" / _key(corpus=corpus_id(data), tokenizer=tokenizer.fingerprint)
    if not folder.exists():
        try:
            prepare(
                data.source,
                tokenizer,
                folder,
                validation_fraction=data.validation_fraction,
                validation_source=data.validation,
                field=data.field,
            )
        except (OSError, UserError):
            if not folder.exists():  # else another run has just prepared the same text
                raise
    train = open_shards(folder, "train", tokenizer_fingerprint=tokenizer.fingerprint)
    return train, open_shards(folder, "validation", tokenizer_fingerprint=tokenizer.fingerprint)


def _publish(folder: Path, save: object) -> None:
    assert callable(save)
    try:
        with replace_folder(folder) as partial:
            save(partial)
    except OSError:
        if not folder.exists():
            raise
