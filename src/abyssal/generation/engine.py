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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.generation.grammar import Grammars
from abyssal.generation.layout import Span, lay_out
from abyssal.generation.pool import PagePool
from abyssal.generation.prompts import absent_ids, check_ids, check_tokenizer, end_ids
from abyssal.generation.sampling import Sampling, make_generators, not_finite, sample
from abyssal.generation.sequence import Logprobs, Sequence
from abyssal.generation.speculative import TRIAL, Confirmed, cost_of_a_draft, draft, verify
from abyssal.generation.text import Text
from abyssal.model import Recorder, Transformer
from abyssal.model.cache import cached_shapes
from abyssal.model.paged import PagedCache, attends_by_row

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
    """The next ``count`` tokens of a sequence, to be computed in this step, its drafts behind the last one included."""

    sequence: Sequence
    count: int

    @property
    def draws(self) -> bool:
        """Whether what follows these tokens is to be drawn: they are the last ones known."""
        return self.count >= self.sequence.pending

    @property
    def tells(self) -> bool:
        """Whether log-probabilities are wanted."""
        return self.sequence.sampling.logprobs is not None

    @property
    def span(self) -> Span:
        """Where they lie."""
        return Span(self.sequence.pages, self.sequence.computed, self.sequence.computed + self.count)

    @property
    def tokens(self) -> list[int]:
        """What is computed."""
        s = self.sequence
        known = s.tokens[s.computed : s.computed + self.count]
        return known + [d.token for d in s.drafts[: self.count - len(known)]]


class Engine:
    """Continues any number of prompts with ``model``, which is run in eval mode.

    ``pages`` pages of ``page`` tokens are its memory for past tokens; without it, as many as 1 GiB holds, and at least
    one whole context's. ``chunk`` is the most tokens that a step computes, ``most`` the most sequences it works on at a
    time. ``prefix_cache`` keeps computed text for prompts that begin with it. ``drafts`` is how many tokens ahead the
    model's MTP modules guess; None: as many as there are modules, as long as that pays; 0: none.
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
        drafts: int | None = None,
    ) -> None:
        for name, value in (("pages", 1 if pages is None else pages), ("page", page), ("chunk", chunk), ("most", most)):
            if value < 1:
                raise UserError(f"{name}: {value} is not at least 1")
        modules = len(model.mtp_modules)
        if drafts is not None and (drafts < 0 or (drafts > 0 and modules == 0)):
            right = "a number from 0" if modules else "0: this model has no MTP module to guess with"
            raise UserError(f"drafts: {drafts} is not valid; expected {right}")
        check_tokenizer(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.chunk, self.most, self.prefix_cache = chunk, most, prefix_cache
        weight = model.model.embed_tokens.weight
        self.device = weight.device
        self.guesses = modules if drafts is None else drafts
        # Only where nobody asked for a number is it given up when it does not pay.
        self._worth = cost_of_a_draft(model) if drafts is None and modules else 0.0
        layers = model.config.num_hidden_layers + (modules if self.guesses else 0)
        if pages is None:
            values = sum(int(np.prod(shape)) for shape in cached_shapes(model.config))
            whole = -(-model.config.max_position_embeddings // page)
            pages = max(whole, _MEMORY // (values * weight.element_size() * layers * page))
        self.pool = PagePool(model.config, pages, page, layers=layers, dtype=weight.dtype, device=self.device)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.ends = end_ids(model, tokenizer)
        self.grammars = Grammars(tokenizer, self.ends, model.config.vocab_size)
        self._absent = absent_ids(model, tokenizer).to(self.device)
        self._by_row = attends_by_row(model.config)
        self.drafted = self.accepted = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.running)

    def add(
        self,
        tokens: Items[int],
        sampling: Sampling | None = None,
        *,
        generator: torch.Generator | None = None,
        schema: str | dict[str, Any] | None = None,
    ) -> Sequence:
        """Takes in a prompt of token ids; :meth:`step` continues it, held to the JSON ``schema`` where there is one.

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
        text = Text(self.tokenizer, sampling.stop)
        grammar = None if schema is None else self.grammars.compile(schema)
        # What a schema allows hangs on every token before: guesses would have to be made under it.
        guesses = self.guesses if grammar is None else 0
        sequence = Sequence(ids, len(ids), sampling, generator, room, text, grammar=grammar, guesses=guesses)
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
        with _evaluating(self.model):
            return self._postprocess(work, *self._run(work, recorder))

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
            if count == sequence.pending and self._grow(sequence, sequence.computed + count + len(sequence.drafts)):
                count = min(count + len(sequence.drafts), left)
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
        sequence.pages, sequence.path, sequence.computed, sequence.drafts = [], [], 0, []

    # run

    def _run(self, work: list[Work], recorder: Recorder | None) -> tuple[Tensor, Tensor]:
        """States [1, N, D] of all tokens, and logits [., V] of what follows those of sequences that draw: behind the
        last token, and behind each draft."""
        work.sort(key=lambda w: not w.span.attends_by_row(self._by_row))
        ragged = lay_out([w.span for w in work], self.pool.page, self.device, self._by_row)
        tokens: list[int] = []
        rows: list[int] = []
        for w in work:
            tokens += w.tokens
            if w.draws:
                rows += range(len(tokens) - 1 - (w.count - w.sequence.pending), len(tokens))
        cache = PagedCache(self.pool.pools, ragged)
        hidden = self.model.hidden(torch.tensor([tokens], device=self.device), cache=cache, recorder=recorder)
        # The head on the rows that count: a long prompt's logits at every position would be the largest tensor here.
        logits: Tensor = self.model.lm_head(hidden[0, rows])
        return hidden, logits.masked_fill(self._absent, float("-inf"))

    # postprocess

    def _postprocess(self, work: list[Work], states: Tensor, logits: Tensor) -> list[Event]:
        drawing = [w for w in work if w.draws]
        rows = logits.split([1 + w.count - w.sequence.pending for w in drawing])
        told = {w.sequence: r.float().log_softmax(-1) for w, r in zip(drawing, rows, strict=True) if w.tells}
        chosen = dict(zip([w.sequence for w in drawing], self._draw(drawing, rows), strict=True))
        events, confirmed, row = [], [], 0
        for w in work:
            s, start = w.sequence, w.sequence.computed
            new = chosen.get(s)
            if s in chosen:
                s.computed += s.pending + len(new or [0]) - 1
                events.append(self._take(s, new, told.get(s)))
            else:
                s.computed += w.count
            self._publish(s)
            if s.finished is None and s.guesses:
                confirmed.append(Confirmed(s, start, s.computed, slice(row, row + s.computed - start)))
            row += w.count
        if confirmed:
            self._guess(confirmed, states)
        return events

    def _guess(self, confirmed: list[Confirmed], states: Tensor) -> None:
        """Has the MTP modules read what is confirmed, and guess what follows where that is the next to come."""
        # A module's second guess is made at a position that has no page yet.
        grown = all(self._grow(c.sequence, len(c.sequence.tokens) + self.guesses) for c in confirmed)
        count = self.guesses if grown else min(self.guesses, len(self.model.mtp_modules))
        draft(self.model, self.pool, confirmed, states, self._absent, count, self._by_row)
        for c in confirmed:  # guesses beyond the last token that is wanted would be checked for nothing
            del c.sequence.drafts[max(c.sequence.room - len(c.sequence.tokens) - 1, 0) :]

    def _draw(self, drawing: list[Work], logits: Items[Tensor]) -> list[list[int] | None]:
        """What follows each sequence, one token or more where it had drafts; None, and an error for the sequence, where
        ``logits`` [1 + drafts, V] are not finite."""
        out: list[list[int] | None] = [None] * len(drawing)
        groups: dict[Sampling, list[int]] = {}
        for number, (w, rows) in enumerate(zip(drawing, logits, strict=True)):
            s, best = w.sequence, rows.amax(-1).min().item()
            if s.grammar is not None and math.isfinite(best):
                rows.masked_fill_(~s.grammar.allowed().to(rows.device), float("-inf"))
            if not math.isfinite(best):
                s.error = not_finite("the largest", best)
                continue
            s.drafts = s.drafts[: len(rows) - 1]
            if s.drafts:
                out[number] = verify(rows, s)
                self._judge(s, len(out[number] or ()) - 1)
            else:
                groups.setdefault(s.sampling, []).append(number)
        for sampling, numbers in groups.items():
            members = [drawing[number].sequence for number in numbers]
            last = torch.cat([logits[number] for number in numbers])
            chosen = sample(last, [s.tokens for s in members], sampling, [s.generator for s in members])
            for number, token in zip(numbers, chosen.tolist(), strict=True):
                out[number] = [token]
        return out

    def _judge(self, sequence: Sequence, accepted: int) -> None:
        """Counts how far the drafts were right, and gives guessing up for this sequence where it does not pay. By what
        the sequence itself has seen alone: its tokens must not depend on others', nor on the clock."""
        for depth in range(len(sequence.drafts)):
            sequence.count(depth, depth < accepted)
        self.drafted += len(sequence.drafts)
        self.accepted += accepted
        if sequence.drafted[0] >= TRIAL and sequence.accepted[0] < self._worth * sequence.drafted[0]:
            sequence.guesses = 0

    def _take(self, sequence: Sequence, tokens: list[int] | None, told: Tensor | None) -> Event:
        """Adds what was drawn; ``told`` [., V] are log-probabilities, where they are wanted."""
        if tokens is None:
            self._end(sequence, "error")
            return Event(sequence, [], "")
        taken: list[int] = []
        text = ""
        sequence.drafts = []
        for row, token in enumerate(tokens):
            if token in self.ends:
                self._end(sequence, "stop")
                text += sequence.text.finish()
                break
            taken.append(token)
            sequence.tokens.append(token)
            if told is not None:
                likeliest = told[row].topk(min(sequence.sampling.logprobs or 0, told.shape[1]))
                pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
                sequence.logprobs.append(Logprobs(told[row, token].item(), list(pairs)))
            text += sequence.text.push(token)
            if sequence.grammar is not None:
                sequence.grammar.take(token)
            if sequence.text.stopped or (sequence.grammar is not None and sequence.grammar.complete):
                self._end(sequence, "stop")
                break
            if len(sequence.tokens) == sequence.room:
                self._end(sequence, "length")
                text += sequence.text.finish()
                break
        return Event(sequence, taken, text)

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
