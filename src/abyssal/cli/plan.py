"""``abyssal plan``: memory, layout, time and cost of training a model, and what inference takes, from its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from abyssal.cli.loaded import find_config

if TYPE_CHECKING:
    from abyssal.analysis.activations import Adapters
    from abyssal.analysis.cards import Card
    from abyssal.analysis.plan import InferencePlan, Planner, TrainingPlan
    from abyssal.config import ModelConfig


def plan_command(
    model: Annotated[str, typer.Argument(help="A preset, a config.json or its folder, a run, or a name on the hub.")],
    gpus: Annotated[int, typer.Option(metavar="N", help="How many GPUs there are.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="A card by name: its memory and speed (h100, a100-80gb, …).")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a GPU: 80GB (10^9 bytes), 80GiB (2^30).")
    ] = None,
    gpu_tflops: Annotated[float | None, typer.Option(metavar="X", help="Dense BF16 TFLOP/s of a GPU.")] = None,
    reserve: Annotated[
        float, typer.Option(metavar="SHARE", help="Memory kept free for CUDA, NCCL and fragmentation.")
    ] = 0.05,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens to train on: 1T, 300M, 2e12.")] = None,
    mfu: Annotated[
        float, typer.Option(metavar="SHARE", help="Model FLOPs utilisation that time is worked out with.")
    ] = 0.4,
    gpu_hour: Annotated[float | None, typer.Option(metavar="PRICE", help="What an hour of one GPU costs.")] = None,
    sequence: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens a training sequence. Default: 4096.")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences a GPU takes at once.")] = None,
    global_batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences an optimizer step.")] = None,
    replicate: Annotated[int | None, typer.Option(metavar="N", help="Replicas of the sharded model.")] = None,
    shard: Annotated[
        int | None, typer.Option(metavar="N", help="GPUs that share weights and optimizer (ZeRO-3).")
    ] = None,
    tensor: Annotated[int | None, typer.Option(metavar="N", help="Tensor parallelism.")] = None,
    expert: Annotated[
        int | None, typer.Option(metavar="N", help="Expert parallelism, over data-parallel ranks.")
    ] = None,
    pipeline: Annotated[int | None, typer.Option(metavar="N", help="Pipeline stages.")] = None,
    recompute: Annotated[
        bool | None, typer.Option("--recompute/--no-recompute", help="Activation checkpointing. Default: where needed.")
    ] = None,
    optimizer: Annotated[Literal["adamw", "muon"], typer.Option(help="The optimizer.")] = "adamw",
    state: Annotated[
        Literal["float32", "bfloat16", "8bit"], typer.Option(help="What the optimizer's moments are kept in.")
    ] = "float32",
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="What training's products run in.")
    ] = "bfloat16",
    lora: Annotated[int | None, typer.Option(metavar="RANK", help="Train adapters of this rank only.")] = None,
    qlora: Annotated[int | None, typer.Option(metavar="RANK", help="The same over weights in 4 bits (NF4).")] = None,
    adapt: Annotated[
        str, typer.Option(metavar="PARTS", help="What gets adapters, separated by commas.")
    ] = "attention,mlp,shared,experts",
    inference: Annotated[bool, typer.Option("--inference", help="Plan inference alone.")] = False,
    batch: Annotated[int, typer.Option(metavar="N", help="Inference: sequences at a time.")] = 1,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Inference: tokens a sequence. Default: 4096.")
    ] = None,
    weights: Annotated[
        Literal["bf16", "fp8", "int8", "int4"] | None,
        typer.Option(help="Inference: what weights are kept in. Default: as published."),
    ] = None,
    cache: Annotated[
        Literal["bf16", "fp8", "fp32"], typer.Option(help="Inference: what the cache is kept in.")
    ] = "bf16",
    chunk: Annotated[int, typer.Option(metavar="N", help="Inference: tokens of a prompt taken at once.")] = 2048,
    published: Annotated[bool, typer.Option("--published", help="Set published figures beside ours.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan memory, parallel layout, time and cost before building a model. Takes no memory for weights."""
    from abyssal.analysis.plan import Planner, Wishes, parse_count
    from abyssal.errors import UserError

    if published and not (gpu or gpu_memory):
        _show_published(model, as_json)
        return
    card = _card(gpu, gpu_memory, gpu_tflops)
    amount = None if tokens is None else parse_count(tokens, "--tokens")
    if gpu_hour is not None and not gpu_hour >= 0:
        raise UserError(f"--gpu-hour: {gpu_hour:g} is not 0 or more")
    config = find_config(model)
    wishes = Wishes(
        gpus=gpus,
        card=card,
        reserve=reserve,
        mfu=mfu,
        sequence=sequence,
        replicate=replicate,
        shard=shard,
        tensor=tensor,
        expert=expert,
        pipeline=pipeline,
        micro_batch=micro_batch,
        global_batch=global_batch,
        recompute=recompute,
        optimizer=optimizer,
        state=state,
        dtype=dtype,
        adapters=_adapters(lora, qlora, adapt),
        nf4=qlora is not None,
    )
    planner = Planner(config, wishes)
    training = None if inference else planner.training()
    precision = weights or ("fp8" if config.published.get("quantization_config") else "bf16")
    served: InferencePlan | None = None
    fault = None
    try:
        width = {"fp8": 1, "bf16": 2, "fp32": 4}[cache]
        if not inference:  # the layout that was asked for is training's
            planner = Planner(config, Wishes(gpus, card, reserve, mfu), planner.inventory)
        served = planner.inference(precision=precision, batch=batch, context=context, chunk=chunk, cache_width=width)
    except UserError as error:
        if inference:
            raise
        fault = str(error)
    context = context or min(4096, config.max_position_embeddings)
    if as_json:
        _print_json(model, config, wishes, training, served, fault, amount, gpu_hour)
        return
    _show_header(model, config, wishes, planner)
    if training is not None:
        _show_training(training, wishes, config, amount, gpu_hour)
    if served is not None:
        _show_inference(served, precision, cache, batch, context)
    else:
        from abyssal.cli.show import say

        say(f"\n{fault}")
    if published:
        _show_published(model, False)


def _card(name: str | None, memory: str | None, teraflops: float | None) -> Card:
    from dataclasses import replace

    from abyssal.analysis.cards import CARDS, Card
    from abyssal.analysis.plan import parse_bytes
    from abyssal.errors import UserError, nearest

    if name is None and memory is None:
        raise UserError(f"--gpu-memory: say how much a GPU has (80GB), or its name with --gpu ({', '.join(CARDS)})")
    if name is not None and name.lower() not in CARDS:
        raise UserError(f"--gpu: {name!r} is not known{nearest(name.lower(), CARDS)}; known: {', '.join(CARDS)}")
    if teraflops is not None and not 0 < teraflops < 1e9:
        raise UserError(f"--gpu-tflops: {teraflops:g} is not above 0")
    card = CARDS[name.lower()] if name is not None else Card("GPU", 0, None, 300e9)
    if memory is not None:
        card = replace(card, memory=parse_bytes(memory, "--gpu-memory"))
    return card if teraflops is None else replace(card, flops=teraflops * 1e12)


def _adapters(lora: int | None, qlora: int | None, parts: str) -> Adapters | None:
    from abyssal.analysis.activations import ADAPTABLE, Adapters
    from abyssal.errors import UserError, nearest

    if lora is not None and qlora is not None:
        raise UserError(f"--lora {lora} and --qlora {qlora}: take one of them")
    names = tuple(part.strip() for part in parts.split(","))
    for name in names:
        if name not in ADAPTABLE:
            raise UserError(f"--adapt: {name!r} is not one of {', '.join(ADAPTABLE)}{nearest(name, ADAPTABLE)}")
    rank = qlora if qlora is not None else lora
    return None if rank is None else Adapters(rank, names)


def _show_header(model: str, config: ModelConfig, wishes: Any, planner: Planner) -> None:
    from abyssal.analysis.parameters import count_parameters
    from abyssal.cli.show import console

    counts = count_parameters(config)
    mtp = f" + {_count(counts.mtp)} MTP" if counts.mtp else ""
    card = wishes.card
    name = "GPU" if card.name == "GPU" else card.name
    console.print(
        f"[bold]{escape(model)}[/bold]: {_count(counts.total)} parameters{mtp}, {_count(counts.active)} active a token"
    )
    console.print(
        f"{wishes.gpus:,} × {name} of {_gb(card.memory)} GB, {_gb(wishes.usable)} for use (reserve "
        f"{wishes.reserve:.0%}); GB are 10^9 bytes"
    )


def _show_training(
    plan: TrainingPlan, wishes: Any, config: ModelConfig, tokens: float | None, price: float | None
) -> None:
    from abyssal.cli.show import console, say, show_table, table

    setup, layout, memory = plan.setup, plan.layout, plan.memory
    kind = f"{'QLoRA' if setup.nf4 else 'LoRA'} of rank {setup.adapters.rank}" if setup.adapters else "training"
    out = table(f"\n{kind}, a GPU", "\nGB", "\nshare")
    notes = {
        "weights": "NF4 and BF16" if setup.nf4 else "BF16" if setup.dtype == "bfloat16" else "FP32",
        "optimizer": f"{setup.optimizer}, {setup.state}",
        "activations": "recomputed" if setup.recompute else "all kept",
    }
    for term, nbytes in memory.by_term.items():
        note = f" ({notes[term]})" if term in notes else ""
        out.add_row(f"{term}{note}", _gb(nbytes), f"{nbytes / memory.total:.1%}")
    out.add_row("[bold]total[/bold]", f"[bold]{_gb(memory.total)}[/bold]", f"of {_gb(wishes.usable)}")
    show_table(out)
    out = table("\nactivations, by what is kept", "\nGB")
    for term, nbytes in sorted(memory.activations.items(), key=lambda item: -item[1]):
        out.add_row(term, _gb(nbytes))
    show_table(out)
    axes = ("replicate", "shard", "tensor", "pipeline")
    product = " × ".join(f"{axis} {getattr(layout, axis)}" for axis in axes if getattr(layout, axis) > 1)
    experts = f"; expert {layout.expert}" if layout.expert > 1 else ""
    console.print("\n[bold]layout[/bold]: " + (f"{product} = {layout.gpus:,} GPUs{experts}" if product else "one GPU"))
    passes = f" × {setup.accumulate:,} micro-batches" if setup.accumulate > 1 else ""
    say(
        f"batch:  {setup.micro_batch:,} × {setup.sequence:,} tokens a GPU{passes}; a step is {plan.global_batch:,} "
        f"sequences, {_count(plan.global_batch * setup.sequence)} tokens"
    )
    for reason in plan.why:
        say(f"why:    {reason}")
    if plan.overhead >= 0.005:
        say(f"why:    the cheapest that fits, by estimate: {plan.overhead:.0%} over what products alone take")
    _show_time(wishes, config, plan, tokens, price)


def _show_time(wishes: Any, config: ModelConfig, plan: TrainingPlan, tokens: float | None, price: float | None) -> None:
    from abyssal.cli.show import say

    if tokens is None:
        return
    seconds, flops = _seconds(wishes, config, plan, tokens)
    if seconds is None:
        say("time:   not without the GPU's speed (--gpu NAME or --gpu-tflops)")
        return
    hours = seconds / 3600
    say(
        f"time:   {_duration(seconds / wishes.gpus)}, {_number(hours)} GPU hours for {_count(tokens)} tokens\n"
        f"        ({_flop(flops)} a token, {wishes.card.flops / 1e12:,.0f} TFLOP/s at {wishes.mfu:.1%} MFU)"
    )
    if price is not None:
        say(f"cost:   {_number(hours * price)} at {price:g} a GPU hour")


def _seconds(wishes: Any, config: ModelConfig, plan: TrainingPlan, tokens: float) -> tuple[float | None, float]:
    from abyssal.analysis.plan import gpu_seconds, training_flops

    flops = training_flops(config, plan.setup.sequence, plan.setup.adapters)
    speed = wishes.card.flops
    return None if speed is None else gpu_seconds(tokens, flops, speed, wishes.mfu), flops


def _show_inference(plan: InferencePlan, precision: str, cache: str, batch: int, context: int) -> None:
    from abyssal.cli.show import say, show_table, table

    out = table("\ninference, a GPU" + (f" of {plan.gpus}" if plan.gpus > 1 else ""), "\nGB")
    notes = {"weights": precision.upper(), "cache": f"{cache.upper()}, {batch:,} × {context:,} tokens"}
    for term, nbytes in plan.memory.by_term.items():
        out.add_row(f"{term} ({notes[term]})" if term in notes else term, _gb(nbytes))
    out.add_row("[bold]total[/bold]", f"[bold]{_gb(plan.memory.total)}[/bold]")
    show_table(out)
    room = ", ".join(f"{count:,} of {length:,}" for length, count in plan.fits.items())
    say(
        "layout: " + (f"tensor {plan.tensor} × expert {plan.expert} = {plan.gpus} GPUs" if plan.gpus > 1 else "one GPU")
    )
    say(f"fits:   sequences of so many tokens: {room}")


def _show_published(model: str, as_json: bool) -> None:
    import json

    from abyssal.analysis.published_figures import FIGURES, figures_of
    from abyssal.cli.show import show_table, table
    from abyssal.errors import UserError

    figures = figures_of(model)
    if not figures:
        known = ", ".join(dict.fromkeys(figure.model for figure in FIGURES))
        raise UserError(f"--published: none are kept for {model!r}; there are for {known}")
    if as_json:
        keys = ("what", "published", "unit", "source", "at_most")
        print(json.dumps([{key: getattr(f, key) for key in keys} | {"ours": f.ours()} for f in figures], indent=2))
        return
    out = table(f"\n{escape(model)}", "\npublished", "\nours", "")
    out.columns[3].justify = "left"
    for figure in figures:
        unit = f" {figure.unit}" if figure.unit else ""
        theirs = "–" if figure.published is None else f"{'≤ ' * figure.at_most}{figure.published:g}{unit}"
        out.add_row(figure.what, theirs, f"{figure.ours():.4g}{unit}", figure.source)
    show_table(out)


def _print_json(
    model: str,
    config: ModelConfig,
    wishes: Any,
    training: TrainingPlan | None,
    served: InferencePlan | None,
    fault: str | None,
    tokens: float | None,
    price: float | None,
) -> None:
    import json
    from dataclasses import asdict

    data: dict[str, Any] = {
        "model": model,
        "gpus": wishes.gpus,
        "gpu": {"name": wishes.card.name, "bytes": wishes.card.memory, "flops": wishes.card.flops},
        "usable_bytes": wishes.usable,
    }
    if training is not None:
        data["training"] = {
            "bytes": {"total": training.memory.total, **training.memory.by_term},
            "activations": training.memory.activations,
            "layout": {**asdict(training.layout), "gpus": training.layout.gpus},
            "setup": asdict(training.setup),
            "global_batch": training.global_batch,
            "why": training.why,
            "estimated_overhead": training.overhead,
        }
        if tokens is not None:
            seconds, flops = _seconds(wishes, config, training, tokens)
            hours = None if seconds is None else seconds / 3600
            cost = None if hours is None or price is None else hours * price
            data["training"] |= {"tokens": tokens, "flops_per_token": flops, "mfu": wishes.mfu}
            data["training"] |= {"gpu_hours": hours, "cost": cost}
    if served is not None:
        data["inference"] = {
            "bytes": {"total": served.memory.total, **served.memory.by_term},
            "tensor": served.tensor,
            "expert": served.expert,
            "gpus": served.gpus,
            "sequences_by_context": served.fits,
        }
    elif fault is not None:
        data["inference"] = {"error": fault}
    print(json.dumps(data, indent=2))


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f}" if nbytes >= 1e8 else f"{nbytes / 1e9:.4f}"


def _count(number: float) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.4g}{unit}"
    return f"{number:g}"


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _flop(flops: float) -> str:
    return f"{flops / 1e9:.4g} GFLOP"


def _duration(seconds: float) -> str:
    for unit, scale in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.1f} seconds"
