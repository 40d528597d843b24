"""``abyssal generate``: text from a run or a model folder."""

from __future__ import annotations

from typing import Annotated

import typer

from abyssal.cli.loaded import (
    AllowMissingOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    WeightsOption,
    load_model,
)


def generate_command(
    model: ModelArgument,
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.")] = None,
    tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that hold this share.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this likely against the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes what was said less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given again.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "dense",
    device: DeviceOption = "auto",
    allow_missing: AllowMissingOption = None,
) -> None:
    """Continue prompts; one prompt streams as it is written."""
    from abyssal.generation import Sampling, generate, stream

    sampling = Sampling(
        max_new_tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    network, tokenizer = load_model(model, dtype=dtype, weights=weights, device=device, allow_missing=allow_missing)
    texts = prompts or [""]
    if len(texts) == 1:
        print(texts[0], end="", flush=True)
        for piece in stream(network, tokenizer, texts[0], sampling):
            print(piece, end="", flush=True)
        print()
        return
    for i, (prompt, text) in enumerate(zip(texts, generate(network, tokenizer, texts, sampling), strict=True)):
        print(("\n" if i else "") + f"--- {i + 1}\n{prompt}{text}")
