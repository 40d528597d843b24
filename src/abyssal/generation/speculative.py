"""Speculative decoding with the model's own MTP modules: they guess the next tokens, one pass of the model checks them.

A guess is accepted with probability min(1, p/q), p being the model's probability of it and q the module's; where it is
not, the token is drawn from what p has more than q, normalised. So every token is distributed as if the model had
drawn it alone (Leviathan et al., arXiv 2211.17192, appendix A.1), and greedy decoding gives the same tokens.

Module k (from 0) takes the state of position i and token i + k + 1, and guesses token i + k + 2 (V3 paper §2.2).
Guesses beyond the modules' number are made by the last one again, with its own output in the place of the state that
is not known yet. What modules cache for guessed tokens is written over once the true ones are known, but for modules
behind the first: there it may stay, and costs some acceptance, never exactness.

Shapes: N rows of a pass, S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.generation.layout import Span
from abyssal.generation.passes import Passes
from abyssal.generation.sampling import filter_logits, sample
from abyssal.generation.sequence import Draft, Sequence
from abyssal.model import Transformer
from abyssal.model.block import Block

TRIAL = 32  # guesses after which a sequence's acceptance is judged
# Bytes a second from memory, by device; and seconds that a step and a guess take beside reading: scheduling, drawing,
# checking (docs/notebook.md, on a CPU; on a GPU the same Python runs).
_SPEED = {"cpu": 20e9, "cuda": 3e12}
_STEP, _GUESS = 2.0e-3, 2.6e-3


@dataclass(frozen=True)
class Confirmed:
    """Rows of a pass that stay: tokens ``start`` to ``end`` of ``sequence``, and their states at ``rows``; ``drew``: a
    token was drawn behind them."""

    sequence: Sequence
    start: int
    end: int
    rows: slice
    drew: bool


def verify(logits: Tensor, sequence: Sequence) -> list[int]:
    """What follows ``sequence``: as many of its drafts as are accepted, and one token more. ``logits`` [drafts + 1, V]
    are those behind its last token and behind each draft; all finite."""
    sampling, own, prompt = sequence.sampling, [sequence.generator], [sequence.prompt]
    out: list[int] = []
    for row, draft in enumerate(sequence.drafts):
        seen = [sequence.tokens + out]
        one = logits[row : row + 1]
        if sampling.temperature == 0:
            out.append(int(sample(one, seen, sampling, own, prompt)))
            if out[-1] != draft.token:
                return out
            continue
        p = filter_logits(one, seen, sampling, prompt).softmax(-1)[0]
        q = draft.probabilities
        assert q is not None
        drawn = torch.rand((), generator=sequence.generator, device=p.device)
        if drawn * q[draft.token] < p[draft.token]:
            out.append(draft.token)
            continue
        rest = (p - q).clamp_min(0)
        rest = rest if rest.sum() > 0 else p  # equal but for rounding
        out.append(int(torch.multinomial(rest, 1, generator=sequence.generator)))
        return out
    out.append(int(sample(logits[-1:], [sequence.tokens + out], sampling, own, prompt)))
    return out


def draft(passes: Passes, confirmed: Items[Confirmed], states: Tensor, absent: Tensor | None) -> None:
    """Gives every sequence of ``confirmed`` that has all of its tokens computed but the last as many drafts as it
    wants; its pages must have room for them. Of the others the modules read what is confirmed. ``states`` [1, N, D]
    are the pass's; ``absent`` [V] ids are never guessed.
    """
    modules = len(passes.model.mtp_modules)
    order = sorted(confirmed, key=lambda c: not Span((), c.start, c.end).attends_by_row(passes.by_row))
    spans = [Span(c.sequence.pages, c.start, c.end) for c in order]
    ends = [sum(span.end - span.start for span in spans[: i + 1]) - 1 for i in range(len(spans))]
    last = [end for end, c in zip(ends, order, strict=True) if c.drew]
    sequences = [c.sequence for c in order if c.drew]
    for sequence in sequences:
        sequence.drafts = []
    hidden = torch.cat([states[:, c.rows] for c in order], dim=1)
    reading = min(modules, max(c.sequence.guesses for c in order))
    for depth in range(max(reading, *(s.wanted for s in sequences), 0)):
        if depth < modules:
            known = [[*c.sequence.tokens, *(d.token for d in c.sequence.drafts)] for c in order]
            # Where a prompt goes on in the next pass the deeper modules' last tokens are not at hand; any do.
            tokens = [
                text[min(position + 1 + depth, len(text) - 1)]
                for text, c in zip(known, order, strict=True)
                for position in range(c.start, c.end)
            ]
            hidden = passes.draft(depth, spans, tokens, hidden)
            ahead = hidden[:, last]
        else:
            going_on = [row for row, s in enumerate(sequences) if s.wanted > depth]
            if not going_on:
                return
            ahead, sequences = ahead[:, going_on], [sequences[row] for row in going_on]
            position = [len(s.tokens) - 2 + depth - modules + 1 for s in sequences]
            single = [Span(s.pages, p, p + 1) for s, p in zip(sequences, position, strict=True)]
            guessed = [s.drafts[-1].token for s in sequences]
            ahead = passes.draft(modules - 1, single, guessed, ahead)
        logits = passes.head(ahead[0])
        if absent is not None:
            logits = logits.masked_fill(absent, float("-inf"))
        for row, sequence in enumerate(sequences):
            if sequence.wanted <= depth:
                continue
            guess = _guess(logits[row : row + 1], sequence)
            if guess is None:  # damaged modules; the model itself may be sound
                sequence.guesses = 0
            else:
                sequence.drafts.append(guess)


def _guess(logits: Tensor, sequence: Sequence) -> Draft | None:
    """None where the logits are not finite."""
    seen = [sequence.tokens + [d.token for d in sequence.drafts]]
    scores = filter_logits(logits, seen, sequence.sampling, [sequence.prompt])[0]
    if not scores.max().isfinite():
        return None
    if sequence.sampling.temperature == 0:
        return Draft(int(scores.argmax()), None)
    q = scores.softmax(-1)
    return Draft(int(torch.multinomial(q, 1, generator=sequence.generator)), q)


def cost_of_a_draft(model: Transformer) -> float:
    """What a guess adds to a step at batch 1, as a share of the step's time. A guess pays where it is accepted more
    often than that.

    Time is that of weights that must be read, and of what every pass takes beside them. A guess reads the module, the
    head once more, and for the row that checks it as many more routed experts as a token has, which in the worst case
    are all others than those of the row before. Estimated, not timed: what is drawn must not hang on the clock.
    """
    speed = _SPEED.get(model.model.embed_tokens.weight.device.type, _SPEED["cpu"])
    head = sum(x.nbytes for x in (*model.lm_head.parameters(), *model.lm_head.buffers()))
    blocks = [_read(model, block) for block in model.blocks]
    guess = sum(_read(model, model.mtp_modules[-1])) + head + sum(routed for _, routed in blocks)
    return (_GUESS + guess / speed) / (_STEP + (sum(map(sum, blocks)) + head) / speed)


def _read(model: Transformer, block: Block) -> tuple[float, float]:
    """Bytes of a block that a token reads: those that every token reads, and those of routed experts."""
    always, routed = 0.0, 0.0
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if name.startswith("mlp.experts."):
            assert model.config.moe is not None
            routed += tensor.nbytes * model.config.moe.num_experts_per_tok / model.config.moe.n_routed_experts
        else:
            always += tensor.nbytes
    return always, routed
