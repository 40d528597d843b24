"""How well a model predicts text: perplexity and bits a byte, and the windowed log-likelihoods that they are made of.

A document longer than the context is cut into windows, and every token is predicted in exactly one of them::

    ids       BOS a b c d e f g h        context 4, stride 2
    window 1  BOS a b c                  predicts a b c d
    window 2        b c d e              predicts       e f
    window 3            d e f g          predicts         g h

The windows of a document after its first hold ``context`` tokens each, so behind the first window a token is predicted
with at least ``context - stride + 1`` tokens before it. A small stride costs more forward passes and gives the model
more to look at: figures of different strides do not compare.

Shapes: B batch, T time, V vocabulary, N predicted tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.model import Transformer
from abyssal.model.modes import evaluating

Window = tuple[list[int], int]
"""Token ids, and how many of the last are predicted, at least one (each from all ids before it)."""

DEFAULT_CONTEXT = 2048
PADDING = 0  # any id of the vocabulary: no real token ever looks at it
_CHUNK_VALUES = 2**24  # logits at a time: 64 MB in FP32
_BATCHES_SORTED = 16  # so many batches' windows are sorted by length, so that short documents are padded little


@dataclass(frozen=True)
class Perplexity:
    """``nats``: the mean over predicted tokens of −ln p; ``perplexity``: e to that; ``bits_per_byte`` of UTF-8 text,
    which does not depend on the tokenizer; how many ``tokens`` were predicted, the ``bytes`` of text they stand for,
    and in how many ``documents``."""

    nats: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int


def perplexity(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, float], None] | None = None,
) -> Perplexity:
    """How well ``model`` predicts ``documents``, each on its own.

    ``context``: tokens that the model sees at once, by default 2048 or max_position_embeddings where that is less;
    ``stride``: tokens that a document's windows after the first predict, by default half the context. Where the
    tokenizer puts BOS in front (``adds_bos``), every token of the text is predicted. Where it does not, a document's
    first token has nothing before it: it is not predicted, and its bytes are not counted. EOS is not predicted.

    Log-probabilities are FP32 (FP64 for an FP64 model), sums float64. ``progress`` is called with the tokens predicted
    so far and their mean nats. The model runs on its own device, in eval mode, and is as before afterwards.
    Raises UserError for a context, stride or batch size out of range, text with nothing to predict, a tokenizer larger
    than the model's vocabulary, and logits that are not finite.
    """
    longest = model.config.max_position_embeddings
    context = min(longest, DEFAULT_CONTEXT) if context is None else context
    _require("context", context, 1, longest, "max_position_embeddings")
    stride = max(context // 2, 1) if stride is None else stride
    _require("stride", stride, 1, context, "the context")
    _require("batch_size", batch_size, 1)
    check_vocabulary(model, tokenizer)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    size = count = tokens = 0
    nats = 0.0

    def all_windows() -> Iterator[Window]:
        nonlocal size, count
        for text in documents:
            ids = bos + [token for ids in tokenizer.encode_batch(list(tokenizer.pieces(text))) for token in ids]
            if ids:
                count += 1
                size += len(text.encode()) - (0 if bos else len(tokenizer.token_bytes(ids[0])))
                yield from windows(ids, context, stride)

    source = all_windows()
    while group := list(islice(source, _BATCHES_SORTED * batch_size)):
        for index, log_p, _ in score(model, group, batch_size):
            tokens += group[index][1]
            nats -= log_p
            if progress is not None:
                progress(tokens, nats / tokens)
    if tokens == 0:
        raise UserError("documents: no token to predict; expected at least one document with text in it")
    mean = nats / tokens
    return Perplexity(mean, math.exp(mean), nats / math.log(2) / size, tokens, size, count)


def windows(ids: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """``ids`` in windows of ``context`` tokens that the model takes in, plus the one that the last predicts.

    Every id but the first is predicted exactly once, in order. The first window predicts all it holds, the others the
    last ``stride`` (the last window perhaps fewer), with as many tokens before them as fit.
    """
    done = 1
    while done < len(ids):
        end = min(len(ids), done + (context if done == 1 else stride))
        yield list(ids[max(end - 1 - context, 0) : end]), end - done
        done = end


@torch.inference_mode()  # torch leaves the mode at every yield, so the caller's code between two windows is not in it
def score(model: Transformer, windows: Sequence[Window], batch_size: int) -> Iterator[tuple[int, float, bool]]:
    """Yields for each window its index, the sum of its predicted tokens' log-probabilities (natural logarithm), and
    whether each of them is the likeliest of the vocabulary.

    ``batch_size`` windows are run at a time, the longest first, so memory runs out at the start or not at all. Windows
    that differ in their last token only are run once. Between two yields the model is in eval mode. Raises UserError
    for a batch size below 1, and logits that are not finite.
    """
    _require("batch_size", batch_size, 1)
    asked: dict[tuple[int, ...], list[int]] = {}  # what the model takes in -> the windows it answers
    for index, (ids, _) in enumerate(windows):
        asked.setdefault(tuple(ids[:-1]), []).append(index)
    rows = sorted(asked, key=len, reverse=True)
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            found = [(row, index) for row, ids in enumerate(batch) for index in asked[ids]]
            log_p, likeliest = _predictions(model, batch, [(row, *windows[index]) for row, index in found])
            counts = [windows[index][1] for _, index in found]
            sums = zip(found, log_p.split(counts), likeliest.split(counts), strict=True)
            for (_, index), values, best in sums:
                yield index, float(values.sum()), bool(best.all())


def check_vocabulary(model: Transformer, tokenizer: Tokenizer) -> None:
    """Raises UserError for a tokenizer with ids that the model does not have."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"tokenizer: its vocabulary of {tokenizer.vocab_size} is larger than the model's of "
            f"{model.config.vocab_size}; expected the tokenizer that the model was trained with"
        )


def _predictions(
    model: Transformer, rows: Sequence[Sequence[int]], asked: list[tuple[int, list[int], int]]
) -> tuple[Tensor, Tensor]:
    """For all predicted tokens, one after the other: log-probability [N] float64 and whether it is the likeliest [N]
    bool, both on the CPU. ``rows``: what the model takes in, the longest first; ``asked``: row, ids, predicted."""
    device = model.model.embed_tokens.weight.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    width = len(rows[0])
    tokens = torch.tensor([[*row, *[PADDING] * (width - len(row))] for row in rows], device=device)
    valid = None
    if len(rows[-1]) < width:
        valid = torch.arange(width, device=device) < lengths.unsqueeze(1)
    hidden = model.hidden(tokens, valid=valid)
    picked = torch.cat([hidden[row, len(ids) - 1 - n : len(ids) - 1] for row, ids, n in asked])
    targets = torch.tensor([token for _, ids, n in asked for token in ids[len(ids) - n :]], device=device)
    log_p, likeliest = [], []
    chunk = max(_CHUNK_VALUES // model.config.vocab_size, 1)
    for start in range(0, len(targets), chunk):
        logits = model.lm_head(picked[start : start + chunk])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = targets[start : start + chunk].unsqueeze(1)
        log_p.append(logits.gather(1, target).squeeze(1) - logits.logsumexp(-1))
        likeliest.append(logits.argmax(-1) == target.squeeze(1))
    out = torch.cat(log_p).double().cpu()
    if not out.isfinite().all():
        raise UserError(
            f"logits: a log-probability is {out[~out.isfinite()][0].item()}; expected finite numbers "
            "(damaged weights, or a dtype too narrow for this model?)"
        )
    return out, torch.cat(likeliest).cpu()


def _require(field: str, value: int, low: int, high: int | None = None, what: str = "") -> None:
    if value < low or (high is not None and value > high):
        right = f"a whole number from {low}" + (f" to {high} ({what})" if high is not None else "")
        raise UserError(f"{field}: {value!r} is not valid; expected {right}")
