"""What an engine has done so far, in figures: for ``abyssal generate --stats``, and for whoever watches a server."""

from __future__ import annotations

from dataclasses import dataclass, field

from abyssal.generation.sequence import Sequence


@dataclass
class Metrics:
    """Counts over all sequences of an engine, those that run or wait included, and the state of its pages."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    reused: int = 0
    """Tokens of prompts that were found computed: prefix hits."""
    preempted: int = 0
    """How often a sequence's pages were taken away."""
    drafted: list[int] = field(default_factory=list)
    """Guessed tokens by depth; accepted: how many were right."""
    accepted: list[int] = field(default_factory=list)
    gave_up: int = 0
    """Sequences that stopped guessing: it did not pay, or a module's numbers were broken."""
    finished: dict[str, int] = field(default_factory=dict)
    """Sequences that have ended, by reason."""
    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_in_use: int = 0
    page: int = 0
    """Tokens a page."""
    bytes_a_token: int = 0
    """What a cached token takes, MTP modules that guess included."""

    @property
    def acceptance(self) -> list[float]:
        """By depth, the share of guesses that were right. A guess behind a wrong one counts as wrong."""
        return [right / made for right, made in zip(self.accepted, self.drafted, strict=True)]

    def add(self, sequence: Sequence) -> None:
        """Counts ``sequence`` as well."""
        self.prompt_tokens += sequence.prompt
        self.new_tokens += len(sequence.tokens) - sequence.prompt
        self.reused += sequence.reused
        self.preempted += sequence.preempted
        for total, counts in ((self.drafted, sequence.drafted), (self.accepted, sequence.accepted)):
            total += [0] * (len(counts) - len(total))
            for depth, count in enumerate(counts):
                total[depth] += count
        self.gave_up += bool(sequence.drafted) and sequence.guesses == 0
        if sequence.finished is not None:
            self.finished[sequence.finished] = self.finished.get(sequence.finished, 0) + 1
