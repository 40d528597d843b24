"""Continue prompts: tokens step by step over the latent cache (:func:`steps`), and text out of them.

Three layers, each used by the next: :func:`steps` runs the model and yields a batch's new tokens; the pieces of text
they complete are cut at stop strings; :func:`generate` joins the pieces, :func:`stream` hands them on as they come.

Prompts of different lengths are padded on the left, so that every sequence's last token is in the last column and one
call gives all next tokens. Positions count real tokens only: a prompt is computed as if it were alone.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, overload

import torch
from torch import Tensor, nn

from abyssal.data.tokenizer import StreamDecoder, Tokenizer
from abyssal.errors import UserError, nearest
from abyssal.generation.sampling import Sampling, make_generators, sample
from abyssal.model import Cache, Transformer

PADDING = 0  # any id of the vocabulary: no real token ever looks at it


@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | list[int],
    sampling: Sampling | None = None,
    *,
    add_bos: bool = True,
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
    **overrides: Any,
) -> list[str]: ...


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | list[int] | list[str] | list[list[int]],
    sampling: Sampling | None = None,
    *,
    add_bos: bool = True,
    **overrides: Any,
) -> str | list[str]:
    """The text that follows each prompt, without the prompt.

    One prompt gives a string, a list of them a list (an empty list an empty one). A prompt is a string, which gets
    the tokenizer's BOS in front where its generation has one there (``add_bos``, ``Tokenizer.adds_bos``), or a list of
    token ids, which is taken as it is; the answer is text for both. ``overrides`` are fields of :class:`Sampling` that
    go before those of ``sampling``: ``generate(model, tokenizer, "Once", temperature=0)``.

    A sequence ends at EOS (the tokenizer's, and those of the model's config), before a stop string, after
    max_new_tokens, or where prompt and new tokens fill the context (config.max_position_embeddings), whichever comes
    first. Special tokens are left out of the text; a UTF-8 character that the last token leaves unfinished is U+FFFD,
    as in ``Tokenizer.decode``. With a seed, a prompt's text depends on the seed, the prompt and its index in the list
    (rounding aside: a batch's matrix products may add up in another order than a single prompt's).

    The model is run in eval mode, and is as before afterwards; torch's global random state is not touched. Raises
    UserError for a Sampling field that is unknown or has no valid value, an empty prompt without BOS, a token id
    outside the model's vocabulary, a prompt that leaves no room in the context, a tokenizer larger than the model's
    vocabulary, and logits that are not finite.
    """
    sampling = _settings(sampling, overrides)
    several = isinstance(prompts, list | tuple) and not (prompts and _are_ids(prompts))
    ids = prompt_ids(model, tokenizer, prompts if several else [prompts], several, add_bos)
    texts = [""] * len(ids)
    for index, piece in _pieces(model, tokenizer, ids, sampling):
        texts[index] += piece
    return texts if several else texts[0]


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | list[int],
    sampling: Sampling | None = None,
    *,
    add_bos: bool = True,
    **overrides: Any,
) -> Iterator[str]:
    """:func:`generate` for one prompt, its text in pieces as they come; joined, they are what ``generate`` returns.

    A piece is never empty, ends at no half character, and holds no part of a stop string: text that may be the
    beginning of one waits until it is clear. Raises as ``generate`` does, what is wrong with the arguments at once.
    """
    sampling = _settings(sampling, overrides)
    ids = prompt_ids(model, tokenizer, [prompt], False, add_bos)
    return (piece for _, piece in _pieces(model, tokenizer, ids, sampling) if piece)


@torch.inference_mode()  # torch leaves the mode at every yield, so the caller's code between two steps is not in it
def steps(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampling: Sampling, done: set[int]
) -> Iterator[list[int | None]]:
    """Yields each step's new tokens, one a sequence of the batch; None for a sequence that has ended. EOS is not
    yielded.

    ``prompts`` are token ids of the model's vocabulary, none empty, each shorter than the context. ``done`` holds the
    indices of the sequences that have ended; a caller who sees a stop string adds to it. Ids that the tokenizer does
    not have are never chosen. Raises UserError where logits are not finite.
    """
    lengths = [len(prompt) for prompt in prompts]
    rooms = [min(sampling.max_new_tokens, model.config.max_position_embeddings - length) for length in lengths]
    ends, width = _end_ids(model, tokenizer), max(lengths)
    weight = model.model.embed_tokens.weight
    cache = Cache(model.config, len(prompts), width + max(rooms), dtype=weight.dtype, device=weight.device)
    generators = make_generators(sampling.seed, len(prompts), weight.device)
    absent = _absent_ids(model, tokenizer).to(weight.device)
    seen = [list(prompt) for prompt in prompts]

    tokens = torch.tensor([[PADDING] * (width - len(p)) + p for p in seen], device=weight.device)
    valid = None
    if min(lengths) < width:
        columns = torch.arange(width, device=weight.device)
        valid = columns >= width - torch.tensor(lengths, device=weight.device).unsqueeze(1)
    for count in range(1, max(rooms) + 1):
        logits = _next_logits(model, tokens, valid, cache).masked_fill(absent, float("-inf"))
        active = [index for index in range(len(prompts)) if index not in done]
        chosen = sample(logits[active], [seen[i] for i in active], sampling, [generators[i] for i in active])
        new: list[int | None] = [None] * len(prompts)
        for index, token in zip(active, chosen.tolist(), strict=True):
            if token in ends:
                done.add(index)
                continue
            new[index] = token
            seen[index].append(token)
            if count == rooms[index]:
                done.add(index)
        yield new
        if len(done) == len(prompts):
            return
        tokens = torch.tensor([[PADDING if t is None else t] for t in new], device=weight.device)
        valid = None


class _Text:
    """One sequence's text as its tokens come, cut before the stop string that is complete first."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.decoder = StreamDecoder(tokenizer)
        self.stop = stop
        self.waiting = ""  # perhaps the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        text = self._before_stop(self.decoder.push(token))
        if self.stopped:
            return text
        kept = len(text) - self._possible_beginning(text)
        self.waiting = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        return "" if self.stopped else self._before_stop(self.decoder.flush())

    def _before_stop(self, new: str) -> str:
        text = self.waiting + new
        # The one that ends first, of those the longest: so the cut does not depend on where tokens begin and end.
        found = min(((at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0), default=None)
        if found is None:
            return text
        self.stopped = True
        return text[: found[1]]

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        longest = max((len(s) for s in self.stop), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(s.startswith(text[-n:]) for s in self.stop)), 0)


def _pieces(
    model: Transformer, tokenizer: Tokenizer, ids: list[list[int]], sampling: Sampling
) -> Iterator[tuple[int, str]]:
    """Index of a sequence and the next piece of its text, perhaps empty."""
    if not ids:
        return
    done: set[int] = set()
    texts = [_Text(tokenizer, sampling.stop) for _ in ids]
    for new in steps(model, tokenizer, ids, sampling, done):
        for index, token in enumerate(new):
            if token is not None:
                piece = texts[index].push(token)
                if texts[index].stopped:
                    done.add(index)
                yield index, piece
    for index, text in enumerate(texts):
        yield index, text.finish()


def _next_logits(model: Transformer, tokens: Tensor, valid: Tensor | None, cache: Cache) -> Tensor:
    """Logits [B, V] for what follows ``tokens`` [B, T]."""
    with _eval(model):
        hidden = model.hidden(tokens, valid=valid, cache=cache)
        # The head on the last column only: a long prompt's logits at every position would be the largest tensor here.
        logits: Tensor = model.lm_head(hidden[:, -1])
    return logits


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Eval mode for one step, so that whoever holds a stream finds the model as it was between two pieces."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _settings(sampling: Sampling | None, overrides: dict[str, Any]) -> Sampling:
    known = [field.name for field in dataclasses.fields(Sampling)]
    for name in overrides:
        if name not in known:
            hint = nearest(name, known) or f"; known: {', '.join(known)}"
            raise UserError(f"{name}: no such sampling setting{hint}")
    return dataclasses.replace(sampling or Sampling(), **overrides)


def prompt_ids(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Any], several: bool, add_bos: bool
) -> list[list[int]]:
    """Each prompt's token ids, checked against the model."""
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"tokenizer: its vocabulary of {tokenizer.vocab_size} is larger than the model's of {vocabulary}; "
            "expected the tokenizer that the model was trained with"
        )
    out = []
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]" if several else "prompt"
        if isinstance(prompt, str):
            bos = [tokenizer.bos_id] if add_bos and tokenizer.adds_bos and tokenizer.bos_id is not None else []
            ids = bos + tokenizer.encode(prompt)
        elif _are_ids(prompt):
            ids = [int(token) for token in prompt]
        else:
            raise UserError(f"{name}: a {type(prompt).__name__}; expected a string or a list of token ids")
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
        out.append(ids)
    return out


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and all(isinstance(token, Integral) for token in prompt)


def _end_ids(model: Transformer, tokenizer: Tokenizer) -> set[int | None]:
    several = model.config.published.get("eos_token_id")  # a published config may list more than one
    own = {tokenizer.eos_id, model.config.eos_token_id, *(several if isinstance(several, list) else ())}
    return own | tokenizer.end_ids | tokenizer.end_of_turn_ids


def _absent_ids(model: Transformer, tokenizer: Tokenizer) -> Tensor:
    """[V] bool: ids that no token of the tokenizer has. Models pad their vocabulary, and a tokenizer's may have gaps;
    nobody trained those logits."""
    absent = torch.ones(model.config.vocab_size, dtype=torch.bool)
    absent[[token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token)]] = False
    return absent
