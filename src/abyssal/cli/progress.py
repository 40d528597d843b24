"""How training looks in a terminal (a live line) and in a log (plain lines), and the figures at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from abyssal.checkpoint.atomic import write_text
from abyssal.cli.show import console, duration, show_table, table
from abyssal.training.summary import summarize
from abyssal.training.trainer import Watcher

if TYPE_CHECKING:
    from abyssal.training.evaluate import Evaluation
    from abyssal.training.trainer import Trainer


class ConsoleWatcher(Watcher):
    """Shows progress on the console: loss, tokens a second, time left."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.pace: float | None = None

    def begin(self, trainer: Trainer, show: Callable[[Trainer], None] | None = None) -> None:
        """Says what is about to run, and what ``show`` says. Called once, before the first step."""
        from abyssal.analysis.parameters import count_parameters

        counts = count_parameters(trainer.model.config)
        t = trainer.recipe.training
        tokens = t.steps * t.accumulate * t.batch_size * t.sequence_length
        console.print(
            f"{trainer.recipe.name}: {counts.total / 1e6:.1f}M parameters, {counts.active / 1e6:.1f}M active"
            + (f", MTP {counts.mtp / 1e6:.1f}M" if counts.mtp else "")
            + f"; {trainer.parts.data}"
        )
        console.print(
            f"{t.steps} steps of {t.accumulate * t.batch_size} × {t.sequence_length} tokens ({tokens:,}), "
            f"{str(trainer.dtype).removeprefix('torch.')} on {trainer.device}; run folder {trainer.run.path}"
        )
        if trainer.recipe.samples.prompts and not trainer.samples:
            console.print("samples: not drawn by several processes; abyssal generate reads any checkpoint of the run")
        if show is not None:
            show(trainer)
        if trainer.done:
            console.print(f"continuing after step {trainer.done}")
        if console.is_terminal:
            self.progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self.task = self.progress.add_task("", total=t.steps, completed=trainer.done, figures="")
            self.progress.start()

    def end(self) -> None:
        """Takes the live line away."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def step(self, step: int, steps: int, record: dict[str, Any]) -> None:
        pace = record["step_time"]
        self.pace = pace if self.pace is None else 0.9 * self.pace + 0.1 * pace
        left = duration((steps - step) * self.pace)
        figures = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tok/s  ETA {left}"
        if self.progress is not None:
            self.progress.update(self.task, completed=step, figures=figures)
        elif step % max(1, steps // 20) < record["steps"] or step == steps:
            worst = max((layer["cv"] for layer in record["layers"].values()), default=None)
            balance = f"  load CV ≤ {worst:.2f}" if worst is not None else ""
            console.print(f"step {step:>{len(str(steps))}}/{steps}  {figures}  lr {record['lr']:.2e}{balance}")

    def validated(self, step: int, evaluation: Evaluation) -> None:
        console.print(f"step {step}: validation {_figures(evaluation.figures())}")


def show_summary(
    trainer: Trainer, records: list[dict[str, Any]], finish: Callable[[Trainer], dict[str, Any]] | None = None
) -> None:
    """Prints the final figures of a finished run and writes them to its summary.json, with what ``finish`` (which may
    print more) adds to them."""
    summary = summarize(records, trainer.recipe.log.window)
    if finish is not None:
        summary |= finish(trainer)
    write_text(trainer.run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    samples = [r["samples"] for r in records if r["kind"] == "samples"]
    for sample in samples[-1] if samples else []:
        text = f"[bold]{escape(sample['prompt'])}[/bold]{escape(sample['text'])}"
        console.print(Panel(Group(text), title="sample", title_align="left", border_style="dim"))
    if summary["layers"]:
        window = summary["window"]
        out = table("MoE layer", "load CV", "CV a step", "MaxVio", "dead", "bias from", "to", "moved first", "last")
        main = trainer.model.config.num_hidden_layers
        for layer, row in summary["layers"].items():
            name = layer if int(layer) < main else f"{layer} (MTP)"
            low, high = row["bias_range"] or (None, None)
            moved = [row["bias_first"], row["bias_last"]]
            out.add_row(
                name,
                *(f"{row[key]:.3f}" for key in ("cv", "cv_per_step", "max_vio")),
                str(row["dead"]),
                *("–" if x is None else f"{x:.3f}" for x in (low, high, *moved)),
            )
        show_table(out)
        console.print(
            f"load CV, MaxVio, dead: of the load summed over the last {window} steps; CV a step: the mean of each "
            f"step's; moved: net movement of the bias over the first and the last {window} steps",
            style="dim",
        )
    validation, best = summary.get("validation"), summary.get("best_validation")
    if validation and best:
        also = f" (best {_figures(best)} after step {best['step']})"
        console.print(f"\nvalidation  {_figures(validation)}" + (also if best["step"] != validation["step"] else ""))
    if summary.get("seconds"):
        rate = summary["tokens"] / summary["seconds"]
        console.print(f"training    {duration(summary['seconds'])}, {rate:,.0f} tokens/s")
    console.print(f"run folder  {trainer.run.path}")
    hint = "chat {}" if trainer.tokenizer.chat is not None else 'generate {} "ROMEO:"'
    console.print(f"try         abyssal {hint.format(trainer.run.path)}", markup=False)


def _figures(validation: dict[str, Any]) -> str:
    """A validation's loss, in what it is counted in."""
    loss, bits = validation["loss"], validation["bits_per_byte"]
    if bits is None:
        return f"{loss:.4f} nats a pair" + "".join(
            f", {key} {validation[key]:.3f}" for key in ("accuracy", "margin") if key in validation
        )
    return f"{loss:.4f} nats a token, {bits:.4f} bits a byte"
