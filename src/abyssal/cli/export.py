"""``abyssal export`` and ``abyssal convert``: checkpoints for others, and in another dtype."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.cli.loaded import AllowMissingOption

if TYPE_CHECKING:
    from abyssal.checkpoint.merge import Rounding

ScalesOption = Annotated[str, typer.Option(help="FP8 scales: fp32, or ue8m0 (powers of two, as V3.1).")]


def export_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A run, a model folder, or a name on the hub.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    dtype: Annotated[
        str, typer.Option(help="bf16, fp32, fp16 or fp8 (blocks of 128 × 128); auto: as stored.")
    ] = "auto",
    scales: ScalesOption = "fp32",
    shard_size: Annotated[str, typer.Option(help="Size of a file at most.")] = "5GB",
    allow_missing: AllowMissingOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write what transformers' code would compute differently, too.")
    ] = False,
) -> None:
    """Write a model as published checkpoints are: transformers, vLLM and SGLang read it."""
    from abyssal.checkpoint.load import read_model_config
    from abyssal.checkpoint.packing import stored_kind
    from abyssal.checkpoint.shards import Shards
    from abyssal.checkpoint.writer import parse_size
    from abyssal.cli.loaded import byte_bars, parse_dtype
    from abyssal.cli.show import say, size
    from abyssal.exporting import export

    most = parse_size(shard_size, "--shard-size")
    chosen = parse_dtype(dtype, "--dtype", fp8=True)
    merged: list[Rounding] = []
    with byte_bars("writing") as (progress,):
        export(
            source,
            folder,
            dtype=chosen,
            shard_size=most,
            power_of_two=_power_of_two(scales),
            allow_missing=allow_missing or (),
            force=force,
            progress=progress,
            rounding=merged.append,
        )
    written = Shards(folder)
    config = read_model_config(folder)
    model_type = config.published["model_type"]
    count = f"{len(written.files)} file{'s' if len(written.files) > 1 else ''}"
    say(f"{folder}: {model_type}, {len(written.tensors):,} tensors, {size(written.nbytes)} in {count}")
    for rounding in merged:
        say(f"merged: {rounding.describe()}")
    if (kind := stored_kind(config, folder)) is not None:
        say(f"its weights stay {kind}, which abyssal alone reads; --dtype bf16 writes it for others")
    elif model_type == "deepseek":
        say(
            "transformers has no code of its own for model_type deepseek (DeepSeekMoE-16B): there it needs DeepSeek's "
            "remote code; vLLM and abyssal read it as it is"
        )
    else:
        say(f"read it with: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def convert_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model folder, a run, or a name on the hub.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new folder.")],
    to: Annotated[
        str, typer.Option(help="bf16, fp8, fp16 or fp32; int8 or int4: packed, for abyssal's own fast decoding.")
    ],
    scales: ScalesOption = "fp32",
    allow_missing: AllowMissingOption = None,
) -> None:
    """Write a checkpoint in another dtype, one shard in memory at a time; interrupted, the same command goes on."""
    from abyssal.checkpoint.packing import KINDS
    from abyssal.checkpoint.precision import precision
    from abyssal.checkpoint.shards import Shards
    from abyssal.cli.loaded import byte_bars
    from abyssal.cli.show import say, size
    from abyssal.exporting import convert

    chosen = next((kind for kind in KINDS if kind == to), None) or precision(to, "--to", KINDS)
    power_of_two = _power_of_two(scales)
    try:
        with byte_bars("writing", "reading back") as (progress, verifying):
            convert(
                source,
                target,
                chosen,
                power_of_two=power_of_two,
                allow_missing=allow_missing or (),
                progress=progress,
                verifying=verifying,
            )
    except KeyboardInterrupt:
        say("stopped; the same command goes on behind the last whole shard")
        raise
    written = Shards(target)
    count = f"{len(written.files)} file{'s' if len(written.files) > 1 else ''}"
    say(f"{target}: {len(written.tensors):,} tensors, {size(written.nbytes)} in {count}, read back and equal")


def _power_of_two(scales: str) -> bool:
    from abyssal.errors import UserError

    if scales not in ("fp32", "ue8m0"):
        raise UserError(f"--scales: {scales!r} is not one of fp32, ue8m0")
    return scales == "ue8m0"
