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

import copy
import logging
import math
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.generation.grammar import Grammar, Grammars
from abyssal.generation.metrics import Metrics
from abyssal.generation.passes import Others, Passes
from abyssal.generation.pool import PagePool
from abyssal.generation.prompts import absent_ids, check_ids, check_tokenizer, end_ids
from abyssal.generation.routing import PassRouting
from abyssal.generation.sampling import Sampling, make_generators, not_finite, sample
from abyssal.generation.scheduler import Scheduler, Work
from abyssal.generation.sequence import Logprobs, Sequence
from abyssal.generation.speculative import TRIAL, Confirmed, cost_of_a_draft, draft, verify
from abyssal.generation.text import Text
from abyssal.model import Recorder, Transformer
from abyssal.model.cache import cached_shapes
from abyssal.model.modes import evaluating

PAGE = 64
MEMORY = 2**30


@dataclass(frozen=True)
class Event:
    """What a step brought for one sequence."""

    sequence: Sequence
    tokens: list[int]
    """New tokens; EOS is none."""
    text: str
    """What they complete, perhaps nothing yet."""


class Engine:
    """Continues any number of prompts with ``model``, which is run in eval mode. Its weights may change between
    sequences, not under them.

    ``pages`` pages of ``page`` tokens are its memory for past tokens; without it, as many as ``memory`` bytes hold, and
    at least one whole context's. ``chunk`` is the most tokens that a step computes, ``most`` the most sequences it
    works on at a time. ``prefix_cache`` keeps computed text for prompts that begin with it. ``drafts`` is how many
    tokens ahead the model's MTP modules guess; None: as many as there are modules, as long as that pays; 0: none.
    ``others`` are the processes that have the other parts of a divided model.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        pages: int | None = None,
        memory: int = MEMORY,
        page: int = PAGE,
        chunk: int = 1024,
        most: int = 64,
        prefix_cache: bool = True,
        drafts: int | None = None,
        others: Others | None = None,
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
        weight = model.model.embed_tokens.weight
        self.device = weight.device
        self.guesses = modules if drafts is None else drafts
        # Only where nobody asked for a number is it given up when it does not pay.
        self._worth = cost_of_a_draft(model) if drafts is None and modules else 0.0
        layers = model.config.num_hidden_layers + (modules if self.guesses else 0)
        if pages is None:
            values = sum(int(np.prod(shape)) for shape in cached_shapes(model.config))
            whole = -(-model.config.max_position_embeddings // page)
            pages = max(whole, memory // (values * weight.element_size() * layers * page))
        self.pool = PagePool(model.config, pages, page, layers=layers, dtype=weight.dtype, device=self.device)
        width = min(-(-model.config.max_position_embeddings // page), pages)
        self.passes = Passes(model, self.pool, width, others)
        self.scheduler = Scheduler(
            self.pool, chunk=chunk, most=most, prefix_cache=prefix_cache, guesses=self.guesses, modules=modules
        )
        self.ends = end_ids(model, tokenizer)
        self.grammars = Grammars(tokenizer, self.ends, model.config.vocab_size)
        absent = absent_ids(model, tokenizer)
        self._absent = absent.to(self.device) if absent.any() else None
        self._ended = Metrics()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    @property
    def lost(self) -> bool:
        """Whether it can compute no more, since the processes of a divided model are no longer together."""
        return self.passes.others is not None and self.passes.others.lost

    @property
    def metrics(self) -> Metrics:
        """What was done so far, for all sequences; a copy."""
        out = copy.deepcopy(self._ended)
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            out.add(sequence)
        out.running, out.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        out.pages, out.pages_in_use, out.page = self.pool.pages, self.pool.in_use, self.pool.page
        out.bytes_a_token = sum(t[0].nbytes for layer in self.pool.pools for t in layer) // self.pool.page
        return out

    def add(
        self,
        tokens: Items[int],
        sampling: Sampling | None = None,
        *,
        generator: torch.Generator | None = None,
        schema: str | dict[str, Any] | Grammar | None = None,
        routing: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> Sequence:
        """Takes in a prompt of token ids; :meth:`step` continues it, held to the JSON ``schema`` where there is one
        (compiled here, or before by ``engine.grammars``: one for each sequence).

        ``generator`` draws its tokens; without one, one is made from the sampling's seed. With ``routing`` the
        sequence's ``routing`` says which experts handled its new tokens, each some steps after the token came, and the
        last token is read too, though nothing follows it. Special tokens in ``shown`` are part of the text. Raises
        UserError, and takes nothing in, for ids outside the vocabulary (in ``logit_bias`` too), a prompt that is empty
        or leaves no room in the context, a pool that could not hold this sequence even alone, and a schema that cannot
        be compiled. New tokens for which the context has no room are none: the sequence ends there, ``finished`` by
        "length".

        What fails for this sequence alone later on (broken logits, a schema that leads nowhere) ends it with
        ``finished`` "error" and its message in ``error``; nothing else notices.
        """
        sampling = sampling or Sampling()
        ids = check_ids(tokens, self.model, "prompt")
        vocabulary = self.model.config.vocab_size
        if (wrong := next((t for t, _ in sampling.logit_bias if t >= vocabulary), None)) is not None:
            raise UserError(f"logit_bias: token id {wrong} is outside the vocabulary of {vocabulary}")
        room = min(len(ids) + sampling.max_new_tokens, self.model.config.max_position_embeddings)
        needed = -(-room // self.pool.page)
        if needed > self.pool.pages:
            raise UserError(
                f"pages: {self.pool.pages} of {self.pool.page} tokens are too few for a prompt of {len(ids)} tokens "
                f"and up to {room - len(ids)} new ones, which take {needed}"
            )
        if generator is None:
            (generator,) = make_generators(sampling.seed, 1, self.device)
        text = Text(self.tokenizer, sampling.stop, shown)
        grammar = schema if schema is None or isinstance(schema, Grammar) else self.grammars.compile(schema)
        # What a schema allows hangs on every token before: guesses would have to be made under it.
        guesses = self.guesses if grammar is None else 0
        sequence = Sequence(ids, len(ids), sampling, generator, room, text, grammar=grammar, guesses=guesses)
        sequence.routing = [] if routing else None
        if not self.busy and self.passes.captured.refresh():
            self.pool.forget()
        self.scheduler.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence here and now; its pages are free again. Nothing happens to one that has ended."""
        if sequence.finished is None:
            self._end(sequence, "cancelled")

    @torch.inference_mode()
    def step(self, recorder: Recorder | None = None) -> list[Event]:
        """One pass of the model, and what it brought; [] where there is nothing to do. ``recorder`` sees its routing,
        tokens in the order of the pass."""
        work = self.scheduler.schedule()
        if not work:
            return []
        # A step at a time: whoever holds a stream finds the model as it was between two pieces.
        with evaluating(self.model) if self.model.training else nullcontext():
            wanted = any(w.sequence.routing is not None for w in work)
            routing = PassRouting(sum(w.count for w in work), recorder) if wanted else None
            states, logits = self._run(work, recorder if routing is None else routing)
            return self._postprocess(work, states, logits, routing)

    # run

    def _run(self, work: list[Work], recorder: Recorder | None) -> tuple[Tensor, Tensor]:
        """States [1, N, D] of all tokens, and logits [., V] of what follows those whose last token is among them:
        behind that, and behind each draft."""
        work.sort(key=lambda w: not w.span.attends_by_row(self.passes.by_row))
        tokens: list[int] = []
        rows: list[int] = []
        for w in work:
            tokens += w.tokens
            if w.last:
                rows += range(len(tokens) - 1 - (w.count - w.sequence.pending), len(tokens))
        hidden, logits = self.passes.step([w.span for w in work], tokens, rows, recorder)
        return hidden, logits if self._absent is None else logits.masked_fill(self._absent, float("-inf"))

    # postprocess

    def _postprocess(
        self, work: list[Work], states: Tensor, logits: Tensor, routing: PassRouting | None
    ) -> list[Event]:
        last = [w for w in work if w.last]
        split = logits.split([1 + w.count - w.sequence.pending for w in last])
        drawing = [w for w in last if w.draws]
        rows = [own for w, own in zip(last, split, strict=True) if w.draws]
        largest = iter(logits.amax(-1).tolist() if last else ())  # one wait for a GPU
        for w, own in zip(last, split, strict=True):
            wrong = [value for value in islice(largest, len(own)) if not math.isfinite(value)]
            if w.draws and wrong:
                w.sequence.error = not_finite("the largest", wrong[0])
        told = {w.sequence: r.float().log_softmax(-1) for w, r in zip(drawing, rows, strict=True) if w.tells}
        chosen = dict(zip([w.sequence for w in drawing], self._draw(drawing, rows), strict=True))
        events, confirmed, row = [], [], 0
        for w in work:
            s, start = w.sequence, w.sequence.computed
            new = chosen.get(s)
            s.computed += s.pending + len(new or [0]) - 1 if s in chosen else w.count
            if s in chosen:
                events.append(self._take(s, new, told.get(s)))
            if routing is not None:
                routing.note(s, start, row)
            if s.finished is None and s.ending is not None and s.pending <= 0:
                self._end(s, s.ending)
                if s not in chosen:
                    events.append(Event(s, [], ""))
            if s.finished is None and s.ending is None and s.guesses:
                confirmed.append(Confirmed(s, start, s.computed, slice(row, row + s.computed - start), s in chosen))
            row += w.count
        if confirmed:
            draft(self.passes, confirmed, states, self._absent)
        for w in work:
            if w.sequence.finished is None and w.sequence.ending is None:
                self.scheduler.publish(w.sequence)
        return events

    def _draw(self, drawing: list[Work], logits: Items[Tensor]) -> list[list[int] | None]:
        """What follows each sequence by its ``logits`` [1 + drafts, V], one token or more where it had drafts; None for
        those that have an error, and with one where that fails: a schema that leads nowhere."""
        out: list[list[int] | None] = [None] * len(drawing)
        groups: dict[Sampling, list[int]] = {}
        for number, (w, rows) in enumerate(zip(drawing, logits, strict=True)):
            s = w.sequence
            if s.error is not None:
                continue
            with _its_own_affair(s):
                if s.grammar is not None:
                    rows.masked_fill_(~s.grammar.allowed().to(rows.device), float("-inf"))
                    if not rows.amax().isfinite():
                        raise UserError("schema: none of the tokens that may come next is one of the model's")
                if s.drafts:
                    out[number] = verify(rows, s)
                    self._judge(s, len(out[number] or ()) - 1)
                else:
                    groups.setdefault(s.sampling, []).append(number)
        batches = list(groups.values())
        while batches:
            numbers = batches.pop()
            sequences = [drawing[number].sequence for number in numbers]
            last = torch.cat([logits[number] for number in numbers])
            try:
                seen, own = [s.tokens for s in sequences], [s.generator for s in sequences]
                chosen = sample(last, seen, sequences[0].sampling, own, [s.prompt for s in sequences])
            except UserError as error:  # one's filters led out of FP32; nothing is drawn yet
                if len(numbers) > 1:
                    batches += [[number] for number in numbers]
                else:
                    sequences[0].error = str(error)
                continue
            for number, token in zip(numbers, chosen.tolist(), strict=True):
                out[number] = [token]
        return out

    def _judge(self, sequence: Sequence, accepted: int) -> None:
        """Counts how far the drafts were right, and gives guessing up for this sequence where it does not pay. By what
        the sequence itself has seen alone: its tokens must not depend on others', nor on the clock."""
        for depth in range(len(sequence.drafts)):
            sequence.count(depth, depth < accepted)
        if sequence.drafted[0] >= TRIAL and sequence.accepted[0] < self._worth * sequence.drafted[0]:
            sequence.guesses = 0

    def _take(self, sequence: Sequence, tokens: list[int] | None, told: Tensor | None) -> Event:
        """Adds what was drawn, None where that failed; ``told`` [., V] are log-probabilities, where they are wanted."""
        taken: list[int] = []
        text = ""
        reason = None
        sequence.drafts = []
        with _its_own_affair(sequence):
            for row, token in enumerate(tokens or ()):
                if token in self.ends:
                    reason = "stop"
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
                    reason = "stop"
                    break
                if len(sequence.tokens) == sequence.room:
                    reason = "length"
                    break
            if reason is not None:
                text += sequence.text.finish()
        if sequence.error is not None:
            reason = "error"
        if reason is not None and sequence.routing is not None and reason != "error":
            sequence.ending = reason  # once the last token is read
        elif reason is not None:
            self._end(sequence, reason)
        return Event(sequence, taken, text)

    def _end(self, sequence: Sequence, reason: str) -> None:
        self.scheduler.end(sequence, reason)
        self._ended.add(sequence)


@contextmanager
def _its_own_affair(sequence: Sequence) -> Iterator[None]:
    """Within, what fails is an error of ``sequence`` and of no other."""
    try:
        yield
    except UserError as error:
        sequence.error = str(error)
    except Exception as error:
        logging.getLogger(__name__).exception("a request failed")  # a bug of ours, to be seen; the others go on
        sequence.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
