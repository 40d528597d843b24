"""What an engine has a model compute, each a pass over its pages: a step, a guess of an MTP module, a head.

Where the model is divided among processes (:mod:`abyssal.distributed.inference`), one of them has the engine: which
sequences there are, what is drawn, and when something ends is known there alone. It tells the others each pass in
numbers, and they compute their parts of it over pages of their own: :func:`follow`. So nothing has to be chosen alike
by all, and nothing but a pass makes them wait for each other.

Shapes: N tokens of a pass, D hidden, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from abyssal.generation.captured import CapturedPasses
from abyssal.generation.layout import Span, lay_out
from abyssal.generation.pool import PagePool
from abyssal.model import OutputRecorder, Recorder, Transformer
from abyssal.model.attention import Context
from abyssal.model.paged import PagedCache, attends_by_row

_OPEN, _CLOSE, _STEP, _DRAFT, _HEAD = range(5)


class Others(Protocol):
    """The processes that a model is divided among. One tells, the others hear, in the same order."""

    closed: list[int]
    """Numbers of pools that nobody uses any more, which the others are told with the next pass."""
    lost: bool
    """Whether a pass was broken off: the others may wait for the rest of it, and nothing more can be told."""

    def number(self) -> int:
        """A new pool's."""

    def tell(self, order: list[int], given: Tensor | None = None) -> None:
        """``order`` is not empty. Raises RuntimeError where the others are lost."""

    def hear(self) -> list[int]:
        """The next order; [] when there are no more."""

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What was given with the order that was heard last."""


class Passes:
    """Passes of ``model`` over ``pool``'s pages, at most ``width`` of them a sequence; ``others`` compute their parts
    of each. Captured ones are ``captured``: not with others, who would have to capture the same at the same time."""

    def __init__(self, model: Transformer, pool: PagePool, width: int, others: Others | None = None) -> None:
        self.model, self.pool, self.others = model, pool, others
        self.by_row = attends_by_row(model.config)
        self.captured = CapturedPasses(model, pool.pools, width, spare=pool.pages, allowed=others is None)
        self.number = 0
        if others is not None:
            self.number = others.number()
            others.tell([_OPEN, self.number, pool.pages, pool.page, len(pool.pools), width])
            weakref.finalize(self, others.closed.append, self.number)

    def step(
        self, spans: list[Span], tokens: list[int], rows: list[int], recorder: Recorder | None = None
    ) -> tuple[Tensor, Tensor]:
        """States [1, N, D] of ``tokens`` [N], which are those of ``spans``, and logits [., V] behind those at
        ``rows``. ``recorder`` sees the routing. Raises ValueError for a recorder of outputs where there are others."""
        if self.others is not None and isinstance(recorder, OutputRecorder):
            raise ValueError("recorder: outputs of divided layers are not there to be recorded")
        with self._with_others(_STEP, spans, tokens, rows):
            ragged = lay_out(spans, self.pool.page, self.pool.device, self.by_row)
            given = torch.tensor([tokens], device=self.pool.device)
            if len(rows) == len(tokens):
                embedded = [self.model.model.embed_tokens(given)]
                hidden, logits = self.captured.run("step", self._decode, embedded, ragged, recorder)
                return hidden, logits
            hidden = self.model.hidden(given, cache=PagedCache(self.pool.pools, ragged), recorder=recorder)
            # The head on rows that count: a long prompt's logits at every position would be the largest tensor here.
            return hidden, self.model.lm_head(hidden[0, rows])

    def draft(self, depth: int, spans: list[Span], tokens: list[int], hidden: Tensor) -> Tensor:
        """States [1, N, D] of the MTP module ``depth`` (from 0), given ``hidden`` [1, N, D] of the positions in
        ``spans`` and the ``tokens`` [N] behind them."""
        with self._with_others(_DRAFT, spans, tokens, [depth], hidden):
            embedding = self.model.model.embed_tokens(torch.tensor([tokens], device=hidden.device))

            def compute(
                inputs: list[Tensor], context: Context, cache: PagedCache, recorder: Recorder | None
            ) -> list[Tensor]:
                before, embedded = inputs
                return [self.model.draft_hidden(depth, before, embedded, context, cache)]

            ragged = lay_out(spans, self.pool.page, hidden.device, self.by_row)
            (out,) = self.captured.run(("draft", depth), compute, [hidden, embedding], ragged)
            return out

    def head(self, states: Tensor) -> Tensor:
        """Logits [N, V] of ``states`` [N, D]."""
        with self._with_others(_HEAD, [], [], [len(states)], states):
            logits: Tensor = self.model.lm_head(states)
            return logits

    def _decode(
        self, inputs: list[Tensor], context: Context, cache: PagedCache, recorder: Recorder | None
    ) -> list[Tensor]:
        hidden = self.model.through_blocks(inputs[0], context, cache=cache, recorder=recorder)
        return [hidden, self.model.lm_head(hidden[0])]

    @contextmanager
    def _with_others(
        self, kind: int, spans: list[Span], tokens: list[int], numbers: list[int], given: Tensor | None = None
    ) -> Iterator[None]:
        """Within, a pass that the others compute as well."""
        if self.others is None:
            yield
            return
        while self.others.closed:
            self.others.tell([_CLOSE, self.others.closed.pop()])
        order = [kind, self.number, len(spans)]
        for span in spans:
            order += [span.start, span.end, len(span.pages), *span.pages]
        self.others.tell([*order, len(numbers), *numbers, *tokens], given)
        try:
            yield
        except BaseException:
            self.others.lost = True
            raise


@torch.inference_mode()
def follow(model: Transformer, others: Others) -> None:
    """Computes this process's part of every pass that is told, until there are no more. ``model`` is in eval mode."""
    known: dict[int, Passes] = {}
    weight = model.model.embed_tokens.weight
    while order := others.hear():
        kind, number, *rest = order
        if kind == _OPEN:
            pages, page, layers, width = rest
            pool = PagePool(model.config, pages, page, layers=layers, dtype=weight.dtype, device=weight.device)
            known[number] = Passes(model, pool, width)
        elif kind == _CLOSE:
            del known[number]
        else:
            spans, numbers, tokens = _parsed(rest)
            if kind == _STEP:
                known[number].step(spans, tokens, numbers)
            elif kind == _DRAFT:
                hidden = others.take((1, len(tokens), model.config.hidden_size), weight.dtype)
                known[number].draft(numbers[0], spans, tokens, hidden)
            else:
                known[number].head(others.take((numbers[0], model.config.hidden_size), weight.dtype))


def _parsed(rest: Items[int]) -> tuple[list[Span], list[int], list[int]]:
    """Spans, numbers and tokens of an order."""
    numbers = iter(rest)
    take = numbers.__next__
    spans = []
    for _ in range(take()):
        start, end, pages = take(), take(), take()
        spans.append(Span([take() for _ in range(pages)], start, end))
    some = [take() for _ in range(take())]
    return spans, some, list(numbers)
