"""What ``abyssal plan`` says of communication."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from abyssal.analysis.communication import as_parallel, busiest
from abyssal.analysis.messages import Axis, Sum, by_axis
from abyssal.analysis.plan import Planner, TrainingPlan


def sums(planner: Planner, plan: TrainingPlan) -> dict[Axis, Sum]:
    """What a GPU of ``plan`` sends in a step, by axis; empty where it sends nothing, or where adapters are trained,
    which is for one process."""
    if plan.setup.adapters is not None:
        return {}
    messages = busiest(planner.inventory, as_parallel(plan.layout), plan.setup)
    return by_axis(messages, planner.wishes.card.link)


def show(planner: Planner, plan: TrainingPlan) -> None:
    """Prints them as a table."""
    from abyssal.cli.show import say, show_table, table

    if not (found := sums(planner, plan)):
        return
    sizes = asdict(plan.layout)
    out = table("\ncommunication, a GPU and step", "\nmessages", "\npayload, GB", "\nsent, GB", "\nseconds")
    for axis, total in found.items():
        name = f"{axis} {sizes[axis]}" if axis in sizes else axis
        out.add_row(name, f"{total.messages:,}", *_figures(total))
    everything = sum(found.values(), Sum())
    out.add_row("[bold]total[/bold]", f"{everything.messages:,}", *_figures(everything))
    show_table(out)
    tokens = plan.setup.micro_batch * plan.setup.accumulate * plan.setup.sequence
    products = planner.flops * tokens / plan.layout.tensor / plan.layout.pipeline / planner.speed
    say(f"seconds if nothing is overlapped; the step's products take {products:.3g} at the stated MFU")


def data(planner: Planner, plan: TrainingPlan) -> dict[str, Any]:
    """The same as JSON has it."""
    return {axis: asdict(total) for axis, total in sums(planner, plan).items()}


def _figures(total: Sum) -> list[str]:
    return [
        *(f"{n / 1e9:,.2f}" if n >= 1e7 else f"{n / 1e9:.2g}" for n in (total.payload, total.sent)),
        f"{total.seconds:.3g}",
    ]
