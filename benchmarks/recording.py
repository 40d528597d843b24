"""What it costs to record routing while a model trains: the trainer's step with recording beside the same without.

    python benchmarks/recording.py [--shapes demo S] [--rounds 40] [--json FILE]

One side is the trainer as it is: every layer's routing goes to a recorder, loads are counted, their balance worked out,
the biases moved, and all of it written to metrics.jsonl at every step. The other side has the same model, data and
optimizer, hands the model no recorder, and writes its metrics without layers. Both take a step in turn; the order
changes from round to round, and ratios are of steps in one round. On a noisy machine their spread is wider than what is
to be seen, so the calls that recording consists of are also timed themselves, within the same steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from machine import CPU, as_json, describe_machine, markdown, paired_ratio, spread

from abyssal.model import Routing, RoutingRecorder
from abyssal.training import loss as training_loss
from abyssal.training.balance import BiasSign
from abyssal.training.hardware import limit_threads
from abyssal.training.recipe import read_recipe
from abyssal.training.start import start
from abyssal.training.step import StepResult
from abyssal.training.trainer import Trainer
from training import SHAPES


@contextmanager
def _unseen() -> Iterator[None]:
    """Within, a training step passes the model no recorder; the step's own stands by, and has seen nothing."""
    compute = training_loss.compute_losses

    def without(*arguments: Any, recorder: object, **options: Any) -> Any:
        return compute(*arguments, recorder=None, **options)

    with mock.patch.object(training_loss, "compute_losses", without):
        yield


@contextmanager
def _timed_calls(owner_and_names: list[tuple[type, str]]) -> Iterator[list[float]]:
    """Within, the seconds that the named methods take are added up in what this yields."""
    total = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                total[0] += time.perf_counter() - begin

        return run

    with ExitStack() as patches:
        for owner, name in owner_and_names:
            patches.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield total


RECORDING = [(RoutingRecorder, "record"), (Routing, "load"), (BiasSign, "after_step"), (Trainer, "_layers")]


def _step(trainer: Trainer, recording: bool) -> float:
    """Seconds of a step with its line in metrics.jsonl."""
    begin = time.perf_counter()
    result: StepResult = trainer.step()
    trainer.done += 1
    trainer._log(trainer._record([result], 1.0))
    seconds = time.perf_counter() - begin
    assert bool(result.loads) == recording
    return seconds


def compare(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Times of both sides on the shape ``name``, round by round."""
    changes: dict[str, Any] = {} if name == "demo" else {"model": SHAPES[name][0]}
    recipe = read_recipe("demo", changes)
    seen, unseen = (start(recipe, folder / f"{name}-{side}") for side in ("seen", "unseen"))
    unseen._layers = lambda results: {}  # type: ignore[method-assign]
    times: dict[str, list[float]] = {"recorded": [], "unseen": [], "calls": []}
    for round_ in range(rounds + 3):
        sides = ["recorded", "unseen"] if round_ % 2 else ["unseen", "recorded"]
        for side in sides:
            if side == "recorded":
                with _timed_calls(RECORDING) as inside:
                    seconds = _step(seen, True)
                times["calls"] += inside if round_ >= 3 else []
            else:
                with _unseen():
                    seconds = _step(unseen, False)
            if round_ >= 3:
                times[side].append(seconds)
    ratio = paired_ratio(times["unseen"], times["recorded"])
    return {
        "shape": name,
        "layers": len(seen.model.routers),
        "recorded": spread(times["recorded"]),
        "unseen": spread(times["unseen"]),
        "ratio": ratio,
        "calls_ms": spread([1000 * seconds for seconds in times["calls"]]),
        "calls_share": spread([c / s for c, s in zip(times["calls"], times["recorded"], strict=True)]),
        "dtype": str(seen.dtype),
        "times": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["demo", "S"], choices=["demo", *SHAPES])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    limit_threads()
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(name, options.rounds, Path(folder)) for name in options.shapes]
    import torch

    machine = describe_machine(CPU, torch.bfloat16)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), end="\n\n")
    print(
        markdown(
            [
                [
                    r["shape"],
                    r["layers"],
                    r["recorded"],
                    r["unseen"],
                    r["ratio"],
                    r["calls_ms"],
                    f"{r['calls_share'].median:.2%}",
                ]
                for r in rows
            ],
            *("shape", "routers", "recorded, s a step", "without, s", "ratio", "its calls, ms a step", "of the step"),
        )
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "shapes": rows}, default=as_json, indent=2) + "\n")


if __name__ == "__main__":
    main()
