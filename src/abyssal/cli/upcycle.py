"""``abyssal upcycle``: a published dense model turned into one with latent attention, experts, or both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from abyssal.upcycling.conversion import Watcher
    from abyssal.upcycling.report import Report


def upcycle_command(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A dense model of Llama's layout: a folder, a .gguf file, or a name.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    cache: Annotated[
        int | None, typer.Option(help="Latent attention with so many cached values a token and layer.")
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="Latent attention of the smallest rank with at most this relative error.")
    ] = None,
    rotary: Annotated[
        int | None, typer.Option(help="How many of them carry position. Default: 5/8 of the head size.")
    ] = None,
    queries: Annotated[
        int | None, typer.Option(help="Queries through a latent of so many values (not cached). Default: whole.")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Split the FFN: so many routed experts.")] = None,
    active: Annotated[int | None, typer.Option(help="Routed experts a token. Default: half the FFN is active.")] = None,
    shared: Annotated[int, typer.Option(help="Shared experts, each as wide as a routed one.")] = 0,
    calibration: Annotated[
        str, typer.Option(metavar="FILE", help="Text to convert by: .txt, .jsonl, .parquet, a folder, a built-in one.")
    ] = "tinyshakespeare",
    windows: Annotated[int, typer.Option(help="Windows of that text to convert by.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    fit: Annotated[int, typer.Option(help="Steps that each layer is fitted for; 0: not at all.")] = 100,
    evaluate: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text for perplexity. Default: held-out windows.")
    ] = None,
    evaluate_limit: Annotated[int, typer.Option(help="Characters of it that are looked at.")] = 100_000,
    dtype: Annotated[str, typer.Option(help="What is written: bf16, fp32 or fp16.")] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the fit's order and the clusters' beginnings.")] = 0,
) -> None:
    """Turn a dense model into a DeepSeek-style one, near its quality; train on from there with tune or train."""
    from abyssal.cli.loaded import parse_dtype
    from abyssal.cli.show import say
    from abyssal.errors import UserError
    from abyssal.training.hardware import resolve_device
    from abyssal.upcycling import ExpertSplit, Settings, upcycle

    split = None
    if experts is not None:
        chosen = active if active is not None else (experts + shared) // 2 - shared
        if active is None and chosen < 1:
            raise UserError(
                f"--shared: {shared} of {experts + shared} experts are half of the FFN already; give --active"
            )
        split = ExpertSplit(experts, chosen, shared)
    elif active is not None or shared:
        raise UserError("--active and --shared: they belong to --experts; give it too")
    written = parse_dtype(dtype, "--dtype") if dtype in ("bf16", "fp32", "fp16") else None
    if written is None:
        raise UserError(f"--dtype: {dtype!r} is not one of bf16, fp32, fp16")
    settings = Settings(
        cache=cache,
        error=error,
        rotary=rotary,
        queries=queries,
        experts=split,
        windows=windows,
        length=length,
        fit=fit,
        seed=seed,
    )
    with _progress() as watch:
        report = upcycle(
            source,
            folder,
            settings,
            calibration=calibration,
            evaluate=evaluate,
            evaluate_characters=evaluate_limit,
            dtype=written,
            device=resolve_device(device, "--device"),
            watch=watch,
        )
    _show(report)
    say(f"written to {folder}, with upcycle.json and upcycle.md")
    if not settings.latent:
        say(
            "transformers has no code for experts beside grouped-query attention (DeepSeekMoE-16B's layout): there it "
            "needs DeepSeek's remote code; vLLM and abyssal read it as it is"
        )


@contextmanager
def _progress() -> Iterator[Watcher]:
    """On stderr: a live line in a terminal, in a log a line for every fifth of what there is to do."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        said: set[tuple[str, int]] = set()

        def line(what: str, done: int, of: int) -> None:
            if (fifth := (what, 5 * done // of)) not in said:
                said.add(fifth)
                console.print(f"{what}: {done} of {of}", markup=False)

        yield line
        return
    with console.status("reading the model") as status:
        yield lambda what, done, of: status.update(f"{what}: {done} of {of}")


def _show(report: Report) -> None:
    from abyssal.cli.show import say, show_table, table

    out = table(*report.columns(), title="cosine with the dense layer's output, layer by layer, held-out text")
    for row in report.rows():
        out.add_row(*row)
    show_table(out)
    for line in report.summary():
        say(line)
