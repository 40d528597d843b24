"""What would fit where a training plan does not: every answer is tried with all the other options as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from abyssal.analysis.activations import Adapters
from abyssal.analysis.layouts import MOST_GPUS, Wishes
from abyssal.errors import UserError

if TYPE_CHECKING:
    from abyssal.analysis.plan import Planner

_DOUBLINGS = 12


def what_would_fit(planner: Planner) -> str:
    """``would fit: --state 8bit, or 16 GPUs in another layout``; or that nothing would."""
    wishes, found = planner.wishes, []
    for words, change in _single_changes(wishes):
        if _plan(planner, change) is not None:
            found.append(words)
    counts = [wishes.gpus << k for k in range(1, _DOUBLINGS + 1) if wishes.gpus << k <= MOST_GPUS]
    found += _first(planner, [(f"{count:,} GPUs", {"gpus": count}) for count in counts])
    found += [] if found else _first(planner, [(f"{wishes.gpus:,} GPUs", {})])
    if not found:
        lengths = [planner.sequence >> k for k in range(1, 9) if planner.sequence >> k >= 16]
        found = _first(planner, [(f"--sequence {length}", {"sequence": length}) for length in lengths])
    return "would fit: " + ", or ".join(found) if found else "nothing that this plan knows would fit"


def _single_changes(wishes: Wishes) -> Iterator[tuple[str, dict[str, Any]]]:
    if wishes.layout:
        yield "another layout", dict.fromkeys(wishes.layout)
    if wishes.recompute is False:
        yield "--recompute", {"recompute": True}
    if (wishes.micro_batch or 1) > 1:
        yield "--micro-batch 1", {"micro_batch": 1}
    if wishes.state != "8bit":
        yield "--state 8bit", {"state": "8bit"}
    adapters = wishes.adapters if wishes.adapters and wishes.adapters.rank else Adapters(16)
    if wishes.adapters is not adapters:
        yield f"--lora {adapters.rank}", {"adapters": adapters}
    if wishes.frozen != "nf4":
        yield f"--qlora {adapters.rank}", {"adapters": adapters, "frozen": "nf4"}


def _first(planner: Planner, changes: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The first of ``changes`` that fits with everything else as it is; failing that, in another layout; failing that,
    with another batch."""
    wishes = planner.wishes
    free: dict[str, Any] = dict.fromkeys(wishes.layout)
    for other in [{}, free] if free else [{}]:
        for words, change in changes:
            if _plan(planner, change | other) is not None:
                return [words + (" in another layout" if other else "")]
    if wishes.global_batch is None:
        return []
    for other in [{}, free] if free else [{}]:
        for words, change in changes:
            plan = _plan(planner, change | other | {"global_batch": None})
            batch = None if plan is None else plan.training().global_batch
            if batch is not None and _plan(planner, change | other | {"global_batch": batch}) is not None:
                return [f"{words} with --global-batch {batch}" + (" in another layout" if other else "")]
    return []


def _plan(planner: Planner, change: dict[str, Any]) -> Planner | None:
    """The planner of the wishes with ``change``, if something fits."""
    try:
        other = planner.under(change)
        return other if other.fits() else None
    except UserError:
        return None
