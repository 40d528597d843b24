"""The engine: many requests at once on one pool of latent pages.

A step is three verbs. *Schedule*: sequences that are being continued come first, then prompts, in pieces, as many
tokens as a step may take; pages are taken from the pool, and where it has none left the youngest sequence gives its
own back and waits to be computed anew. *Run*: one pass of the model over all those tokens side by side. *Postprocess*:
new tokens are drawn, text comes out, sequences end.

What comes out for a request does not depend on what else there is: not on the batch, the pieces, the pages shared or
taken away; only in how sums are rounded.

An engine is used by one thread. Shapes: N tokens of a pass, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.generation.pool import PagePool
from abyssal.generation.prompts import absent_ids, check_ids, check_tokenizer, end_ids
from abyssal.generation.sampling import Sampling, make_generators, not_finite, sample
from abyssal.generation.sequence import Sequence
from abyssal.generation.text import Text
from abyssal.model import Recorder, Transformer
from abyssal.model.cache import cached_shapes
from abyssal.model.paged import PagedCache, Piece, Ragged, attends_by_row

PAGE = 64
_MEMORY = 2**30


@dataclass(frozen=True)
class Event:
    """What a step brought for one sequence."""

    sequence: Sequence
    tokens: list[int]
    """New tokens; EOS is none."""
    text: str
    """What they complete, perhaps nothing yet."""


@dataclass(frozen=True)
class Work:
    """The next ``count`` tokens of a sequence, to be computed in this step."""

    sequence: Sequence
    count: int

    @property
    def draws(self) -> bool:
        """Whether what follows these tokens is to be drawn: they are the last ones known."""
        return self.count == self.sequence.pending


class Engine:
    """Continues any number of prompts with ``model``, which is run in eval mode.

    ``pages`` pages of ``page`` tokens are its memory for past tokens; without it, as many as 1 GiB holds, and at least
    one whole context's. ``chunk`` is the most tokens that a step computes, ``most`` the most sequences it works on at a
    time. ``prefix_cache`` keeps computed text for prompts that begin with it.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        pages: int | None = None,
        page: int = PAGE,
        chunk: int = 512,
        most: int = 64,
        prefix_cache: bool = True,
    ) -> None:
        for name, value in (("pages", 1 if pages is None else pages), ("page", page), ("chunk", chunk), ("most", most)):
            if value < 1:
                raise UserError(f"{name}: {value} is not at least 1")
        check_tokenizer(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.chunk, self.most, self.prefix_cache = chunk, most, prefix_cache
        weight = model.model.embed_tokens.weight
        self.device = weight.device
        layers = model.config.num_hidden_layers
        if pages is None:
            values = sum(int(np.prod(shape)) for shape in cached_shapes(model.config))
            whole = -(-model.config.max_position_embeddings // page)
            pages = max(whole, _MEMORY // (values * weight.element_size() * layers * page))
        self.pool = PagePool(model.config, pages, page, layers=layers, dtype=weight.dtype, device=self.device)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.ends = end_ids(model, tokenizer)
        self._absent = absent_ids(model, tokenizer).to(self.device)
        self._by_row = attends_by_row(model.config)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.running)

    def add(
        self, tokens: Items[int], sampling: Sampling | None = None, *, generator: torch.Generator | None = None
    ) -> Sequence:
        """Takes in a prompt of token ids; :meth:`step` continues it.

        ``generator`` draws its tokens; without one, one is made from the sampling's seed. Raises UserError, and takes
        nothing in, for ids outside the vocabulary, a prompt that is empty or leaves no room in the context, and a pool
        that could not hold this sequence even alone.
        """
        sampling = sampling or Sampling()
        ids = check_ids(tokens, self.model, "prompt")
        room = min(len(ids) + sampling.max_new_tokens, self.model.config.max_position_embeddings)
        needed = -(-room // self.pool.page)
        if needed > self.pool.pages:
            raise UserError(
                f"pages: {self.pool.pages} of {self.pool.page} tokens are too few for a prompt of {len(ids)} tokens "
                f"and up to {room - len(ids)} new ones, which take {needed}"
            )
        if generator is None:
            (generator,) = make_generators(sampling.seed, 1, self.device)
        sequence = Sequence(ids, len(ids), sampling, generator, room, Text(self.tokenizer, sampling.stop))
        self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence here and now; its pages are free again. Nothing happens to one that has ended."""
        if sequence.finished is None:
            self._end(sequence, "cancelled")

    @torch.inference_mode()
    def step(self, recorder: Recorder | None = None) -> list[Event]:
        """One pass of the model, and what it brought; [] where there is nothing to do. ``recorder`` sees its routing,
        tokens in the order of the pass."""
        work = self._schedule()
        if not work:
            return []
        return self._postprocess(work, self._run(work, recorder))

    # schedule

    def _schedule(self) -> list[Work]:
        work: list[Work] = []
        left = self.chunk
        short = False
        for sequence in list(self.running):
            if left == 0:
                break
            if sequence not in self.running:
                continue  # gave its pages back to an older one
            count = min(sequence.pending, left)
            while not self._grow(sequence, sequence.computed + count):
                short = True
                youngest = self.running[-1]
                self._preempt(youngest)
                work = [w for w in work if w.sequence is not youngest]
                if youngest is sequence:
                    break
            else:
                work.append(Work(sequence, count))
                left -= count
        while self.waiting and left > 0 and not short and len(self.running) < self.most:
            sequence = self.waiting[0]
            self._reuse(sequence)
            # Not before its whole prompt has a place: it would be the first to be sent away again.
            wanted = -(-(len(sequence.tokens) + 1) // self.pool.page) - len(sequence.pages)
            if wanted > self.pool.available and self.running:
                self._give_back(sequence)
                break
            self.waiting.popleft()
            self.running.append(sequence)
            count = min(sequence.pending, left)
            grown = self._grow(sequence, sequence.computed + count)
            assert grown  # add() made sure that the pool holds it
            work.append(Work(sequence, count))
            left -= count
        return work

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Whether ``sequence`` has pages for ``tokens`` tokens, now that more were taken."""
        while len(sequence.pages) * self.pool.page < tokens:
            page = self.pool.take()
            if page is None:
                return False
            sequence.pages.append(page)
        return True

    def _reuse(self, sequence: Sequence) -> None:
        """Gives a sequence that begins the known pages of its text; its last token is computed in any case."""
        if not self.prefix_cache or sequence.pages:
            return
        sequence.path = self.pool.find(sequence.tokens[:-1])
        sequence.pages = [node.page for node in sequence.path]
        sequence.computed = len(sequence.path) * self.pool.page
        if not sequence.preempted:
            sequence.reused = sequence.computed

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.preempted += 1
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.path, sequence.computed = [], [], 0

    # run

    def _run(self, work: list[Work], recorder: Recorder | None) -> Tensor:
        """Logits [draws, V] of what follows the sequences whose last known token was computed."""
        # Rows that attend by themselves stand first.
        work.sort(key=lambda w: w.count > 1 or not self._by_row)
        tokens: list[int] = []
        positions: list[int] = []
        pieces: list[Piece] = []
        singles: list[Work] = []
        last: list[int] = []
        for w in work:
            s = w.sequence
            start, length = len(tokens), s.computed + w.count
            tokens += s.tokens[s.computed : length]
            positions += range(s.computed, length)
            if w.count == 1 and self._by_row:
                singles.append(w)
            else:
                table = torch.tensor(s.pages[: -(-length // self.pool.page)], device=self.device)
                pieces.append(Piece(start, len(tokens), length, table))
            if w.draws:
                last.append(len(tokens) - 1)
        place = torch.tensor(positions)
        pages = torch.tensor([p for w in work for p in self._pages_of(w)])
        slots = pages * self.pool.page + place % self.pool.page
        tables = np.zeros((len(singles), max((len(w.sequence.pages) for w in singles), default=0)), dtype=np.int32)
        for row, w in enumerate(singles):
            tables[row, : len(w.sequence.pages)] = w.sequence.pages
        lengths = torch.tensor([w.sequence.computed + 1 for w in singles], dtype=torch.int32)
        ragged = Ragged(
            place.unsqueeze(0).to(self.device),
            slots.to(self.device),
            torch.from_numpy(tables).to(self.device),
            lengths.to(self.device),
            tuple(pieces),
        )
        cache = PagedCache(self.pool.pools, ragged)
        with _evaluating(self.model):
            hidden = self.model.hidden(torch.tensor([tokens], device=self.device), cache=cache, recorder=recorder)
            # The head on the rows that count: a long prompt's logits at every position would be the largest tensor
            # here.
            logits: Tensor = self.model.lm_head(hidden[0, last])
        return logits

    def _pages_of(self, work: Work) -> list[int]:
        s, page = work.sequence, self.pool.page
        return [s.pages[t // page] for t in range(s.computed, s.computed + work.count)]

    # postprocess

    def _postprocess(self, work: list[Work], logits: Tensor) -> list[Event]:
        for w in work:
            w.sequence.computed += w.count
            self._publish(w.sequence)
        drawing = [w.sequence for w in work if w.sequence.pending == 0]
        logits = logits.masked_fill(self._absent, float("-inf"))
        return [self._take(s, token) for s, token in zip(drawing, self._draw(drawing, logits), strict=True)]

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> list[int | None]:
        """A token for each row of ``logits``; None, and an error for the sequence, where they are not finite."""
        out: list[int | None] = [None] * len(sequences)
        groups: dict[Sampling, list[int]] = {}
        for row, (sequence, best) in enumerate(zip(sequences, logits.amax(-1).tolist(), strict=True)):
            if math.isfinite(best):
                groups.setdefault(sequence.sampling, []).append(row)
            else:
                sequence.error = not_finite("the largest", best)
        for sampling, rows in groups.items():
            members = [sequences[row] for row in rows]
            chosen = sample(logits[rows], [s.tokens for s in members], sampling, [s.generator for s in members])
            for row, token in zip(rows, chosen.tolist(), strict=True):
                out[row] = token
        return out

    def _take(self, sequence: Sequence, token: int | None) -> Event:
        if token is None:
            self._end(sequence, "error")
            return Event(sequence, [], "")
        if token in self.ends:
            self._end(sequence, "stop")
            return Event(sequence, [], sequence.text.finish())
        sequence.tokens.append(token)
        text = sequence.text.push(token)
        if sequence.text.stopped:
            self._end(sequence, "stop")
        elif len(sequence.tokens) == sequence.room:
            self._end(sequence, "length")
            text += sequence.text.finish()
        return Event(sequence, [token], text)

    def _publish(self, sequence: Sequence) -> None:
        """Makes the pages that have become full known to others."""
        page, path = self.pool.page, sequence.path
        while self.prefix_cache and (len(path) + 1) * page <= sequence.computed:
            start = len(path) * page
            text = tuple(sequence.tokens[start : start + page])
            node = self.pool.publish(path[-1] if path else self.pool.root, text, sequence.pages[len(path)])
            sequence.pages[len(path)] = node.page
            path.append(node)

    def _end(self, sequence: Sequence, reason: str) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._give_back(sequence)
        sequence.finished = reason


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for one step, so that whoever holds a stream finds the model as it was between two pieces."""
    if not model.training:
        yield
        return
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
