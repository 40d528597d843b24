"""``abyssal eval``: perplexity of a text, and tasks of lm-evaluation-harness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.cli.loaded import (
    AllowMissingOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    WeightsOption,
    load_model,
)

if TYPE_CHECKING:
    from abyssal.evaluation import Perplexity


def eval_command(
    model: ModelArgument,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between.")] = None,
    perplexity: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to predict: .txt, .jsonl, .parquet, or a folder.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Perplexity: tokens that the model sees at once; default 2048 or its longest.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Perplexity: tokens predicted a window; default half the context.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows or requests at a time.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Tasks: only so many documents of each.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Tasks: examples in a prompt; default the task's.")] = None,
    include_path: Annotated[
        str | None, typer.Option(help="Tasks: a folder with task files of your own; their Python code is run.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Tasks: prompts through the chat template.")] = False,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    device: DeviceOption = "auto",
    allow_missing: AllowMissingOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model: how well it predicts a text, how well it does at tasks."""
    import json
    import os
    import sys

    from abyssal.errors import UserError

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names and perplexity is None:
        raise UserError("nothing to measure: give --perplexity FILE, --tasks NAMES or both")
    if not sys.stderr.isatty():
        os.environ.setdefault(
            "TQDM_DISABLE", "1"
        )  # read when tqdm is imported; some of lm_eval's bars ask nothing else

    from abyssal.data.corpus import documents
    from abyssal.evaluation import perplexity as measure

    texts = documents(perplexity) if perplexity is not None else None  # a missing file is said before a model is loaded
    run_tasks = _harness() if names else None
    network, tokenizer = load_model(model, dtype=dtype, weights=weights, device=device, allow_missing=allow_missing)
    data: dict[str, Any] = {}
    if texts is not None:
        with _Progress() as progress:
            figures = measure(
                network,
                tokenizer,
                texts,
                context=context,
                stride=stride,
                batch_size=batch_size,
                progress=progress.show,
            )
        data["perplexity"] = {"file": perplexity, **vars(figures)}
        if not as_json:
            _show_perplexity(str(perplexity), figures)
    if run_tasks is not None:
        data["tasks"] = run_tasks(
            network,
            tokenizer,
            names,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            include_path=include_path,
            chat=chat,
        )
        if not as_json:
            _show_tasks(data["tasks"])
    if as_json:
        print(json.dumps(data, indent=2))


def _harness() -> Any:
    """``run_tasks``, with lm_eval's and the hub's loggers down to errors: what matters comes as an exception."""
    import logging

    from abyssal.evaluation.harness import run_tasks

    for name in ("lm_eval", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return run_tasks


class _Progress:
    """A live line on stderr where that is a terminal: tokens so far, perplexity so far."""

    def __enter__(self) -> _Progress:
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        self.status = console.status("reading") if console.is_terminal else None
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def show(self, tokens: int, nats: float) -> None:
        if self.status is not None:
            self.status.update(f"{tokens:,} tokens, {nats:.4f} nats a token")


def _show_perplexity(file: str, figures: Perplexity) -> None:
    from abyssal.cli.show import show_table, table

    out = table("text", "perplexity", "nats a token", "bits a byte", "tokens", "bytes", "documents")
    counts = (f"{count:,}" for count in (figures.tokens, figures.bytes, figures.documents))
    out.add_row(file, f"{figures.perplexity:.4f}", f"{figures.nats:.4f}", f"{figures.bits_per_byte:.4f}", *counts)
    show_table(out)


def _show_tasks(data: dict[str, Any]) -> None:
    """A row for each metric; groups behind the tasks, as the harness gives them."""
    from abyssal.cli.show import show_table, table

    out = table("task", "metric", "value", "± error", "examples", "documents")
    for name, figures in data["results"].items():
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or "," not in key or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{filtered}")
            out.add_row(
                figures.get("alias", name),
                metric if filtered == "none" else f"{metric} ({filtered})",
                f"{value:.4f}",
                f"{error:.4f}" if isinstance(error, int | float) else "",
                str(data.get("n-shot", {}).get(name, "")),
                str(data.get("n-samples", {}).get(name, {}).get("effective", "")),
            )
    show_table(out)
