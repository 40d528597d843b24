"""What goes into a model and what may come out of it: prompts as token ids, ids that end a text, ids that nobody
trained."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError, kind_of
from abyssal.model import Transformer


def prompt_ids(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Any], several: bool, add_bos: bool
) -> list[list[int]]:
    """Each prompt's token ids, checked against the model."""
    check_tokenizer(model, tokenizer)
    out = []
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]" if several else "prompt"
        if isinstance(prompt, str):
            bos = [tokenizer.bos_id] if add_bos and tokenizer.adds_bos and tokenizer.bos_id is not None else []
            ids = bos + tokenizer.encode(prompt)
        elif are_ids(prompt):
            ids = [int(token) for token in prompt]
        else:
            raise UserError(f"{name}: {kind_of(prompt)}; expected a string or a list of token ids")
        out.append(check_ids(ids, model, name))
    return out


def check_ids(tokens: Sequence[int], model: Transformer, name: str) -> list[int]:
    """``tokens`` as a list. Raises UserError, naming ``name``, where the model could not continue them."""
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
    try:
        ids = [operator.index(token) for token in tokens]
    except TypeError:
        raise UserError(f"{name}: {kind_of(tokens)}; expected token ids, whole numbers") from None
    if not ids:
        raise UserError(f"{name}: empty, with no BOS in front; expected at least one token")
    for token in ids:
        if not 0 <= token < vocabulary:
            raise UserError(f"{name}: token id {token} is outside the model's vocabulary of {vocabulary} tokens")
    if len(ids) >= context:
        raise UserError(
            f"{name}: {len(ids)} tokens leave no room in the model's context of {context} "
            f"(max_position_embeddings); expected at most {context - 1}"
        )
    return ids


def check_tokenizer(model: Transformer, tokenizer: Tokenizer) -> None:
    """Raises UserError for a tokenizer with ids that the model does not have."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"tokenizer: its vocabulary of {tokenizer.vocab_size} is larger than the model's of "
            f"{model.config.vocab_size}; expected the tokenizer that the model was trained with"
        )


def are_ids(prompt: Any) -> bool:
    """Whether ``prompt`` is one of token ids."""
    return isinstance(prompt, list | tuple) and all(isinstance(token, Integral) for token in prompt)


def end_ids(model: Transformer, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's config."""
    several = model.config.published.get("eos_token_id")  # a published config may list more than one
    own = {tokenizer.eos_id, model.config.eos_token_id, *(several if isinstance(several, list) else ())}
    return frozenset(token for token in own | tokenizer.end_ids | tokenizer.end_of_turn_ids if token is not None)


def absent_ids(model: Transformer, tokenizer: Tokenizer) -> Tensor:
    """[V] bool: ids that no token of the tokenizer has. Models pad their vocabulary, and a tokenizer's may have gaps;
    nobody trained those logits."""
    absent = torch.ones(model.config.vocab_size, dtype=torch.bool)
    absent[[token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token)]] = False
    return absent
