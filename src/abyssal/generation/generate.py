"""Continue prompts: an engine for the prompts at hand; :func:`generate` joins what it says, :func:`stream` hands it
on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, overload

from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError, nearest
from abyssal.generation.engine import PAGE, Engine
from abyssal.generation.passes import Others
from abyssal.generation.prompts import are_ids, prompt_ids
from abyssal.generation.sampling import Sampling, make_generators
from abyssal.generation.sequence import Sequence
from abyssal.model import Transformer

MOST = 64  # prompts that are worked on at a time


@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | list[int],
    sampling: Sampling | None = None,
    *,
    add_bos: bool = True,
    schema: str | dict[str, Any] | None = None,
    drafts: int | None = None,
    **overrides: Any,
) -> str: ...


@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[str] | list[list[int]],
    sampling: Sampling | None = None,
    *,
    add_bos: bool = True,
    schema: str | dict[str, Any] | None = None,
    drafts: int | None = None,
    **overrides: Any,
) -> list[str]: ...


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | list[int] | list[str] | list[list[int]],
    sampling: Sampling | None = None,
    *,
    add_bos: bool = True,
    schema: str | dict[str, Any] | None = None,
    drafts: int | None = None,
    **overrides: Any,
) -> str | list[str]:
    """The text that follows each prompt, without the prompt.

    One prompt gives a string, a list of them a list (an empty list an empty one). A prompt is a string, which gets
    the tokenizer's BOS in front where its generation has one there (``add_bos``, ``Tokenizer.adds_bos``), or a list of
    token ids, which is taken as it is; the answer is text for both. ``overrides`` are fields of :class:`Sampling` that
    go before those of ``sampling``: ``generate(model, tokenizer, "Once", temperature=0)``. Every text is held to
    the JSON ``schema`` where there is one, though max_new_tokens may end it before it is complete. ``drafts`` is as for
    :class:`Engine`.

    A sequence ends at EOS (the tokenizer's, and those of the model's config), before a stop string, after
    max_new_tokens, or where prompt and new tokens fill the context (config.max_position_embeddings), whichever comes
    first. Special tokens are left out of the text; a UTF-8 character that the last token leaves unfinished is U+FFFD,
    as in ``Tokenizer.decode``. With a seed, a prompt's text depends on the seed, the prompt and its index in the list
    (rounding aside: a batch's matrix products may add up in another order than a single prompt's).

    The model is run in eval mode, and is as before afterwards; torch's global random state is not touched. Raises
    UserError for a Sampling field that is unknown or has no valid value, an empty prompt without BOS, a token id
    outside the model's vocabulary, a prompt that leaves no room in the context, a tokenizer larger than the model's
    vocabulary, logits that are not finite, a schema that cannot be compiled, and drafts without MTP modules.
    """
    sampling = _settings(sampling, overrides)
    several = isinstance(prompts, list | tuple) and not (prompts and are_ids(prompts))
    ids = prompt_ids(model, tokenizer, prompts if several else [prompts], several, add_bos)
    texts = [""] * len(ids)
    if ids:
        for index, piece in _pieces(*prepare(model, tokenizer, ids, sampling, schema=schema, drafts=drafts)):
            texts[index] += piece
    return texts if several else texts[0]


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | list[int],
    sampling: Sampling | None = None,
    *,
    add_bos: bool = True,
    schema: str | dict[str, Any] | None = None,
    drafts: int | None = None,
    **overrides: Any,
) -> Iterator[str]:
    """:func:`generate` for one prompt, its text in pieces as they come; joined, they are what ``generate`` returns.

    A piece is never empty, ends at no half character, and holds no part of a stop string: text that may be the
    beginning of one waits until it is clear. Raises as ``generate`` does, what is wrong with the arguments at once.
    """
    sampling = _settings(sampling, overrides)
    ids = prompt_ids(model, tokenizer, [prompt], False, add_bos)
    prepared = prepare(model, tokenizer, ids, sampling, schema=schema, drafts=drafts)
    return (piece for _, piece in _pieces(*prepared) if piece)


def prepare(
    model: Transformer,
    tokenizer: Tokenizer,
    ids: list[list[int]],
    sampling: Sampling,
    *,
    schema: str | dict[str, Any] | None = None,
    drafts: int | None = None,
    others: Others | None = None,
) -> tuple[Engine, list[Sequence]]:
    """An engine that has taken in the prompts ``ids``, of which there is at least one, with pages for as many as it
    works on at a time; and its sequences, in their order. ``others`` as for :class:`Engine`. Raises as :func:`generate`
    does."""
    context = model.config.max_position_embeddings
    needed = sorted(-(-min(len(prompt) + sampling.max_new_tokens, context) // PAGE) for prompt in ids)[-MOST:]
    engine = Engine(
        model,
        tokenizer,
        pages=sum(needed),
        most=len(needed),
        prefix_cache=len(ids) > 1,
        drafts=drafts,
        others=others,
    )
    generators = make_generators(sampling.seed, len(ids), engine.device)
    pairs = zip(ids, generators, strict=True)
    return engine, [engine.add(prompt, sampling, generator=g, schema=schema) for prompt, g in pairs]


def _pieces(engine: Engine, sequences: list[Sequence]) -> Iterator[tuple[int, str]]:
    """Index of a sequence and the next piece of its text, perhaps empty."""
    index = {sequence: number for number, sequence in enumerate(sequences)}
    while engine.busy:
        for event in engine.step():
            if event.sequence.error is not None:
                raise UserError(event.sequence.error)
            yield index[event.sequence], event.text


def _settings(sampling: Sampling | None, overrides: dict[str, Any]) -> Sampling:
    known = [field.name for field in dataclasses.fields(Sampling)]
    for name in overrides:
        if name not in known:
            hint = nearest(name, known) or f"; known: {', '.join(known)}"
            raise UserError(f"{name}: no such sampling setting{hint}")
    return dataclasses.replace(sampling or Sampling(), **overrides)
