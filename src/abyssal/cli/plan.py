"""``abyssal plan``: memory, layout, time and cost of training a model, and what inference takes, from its config."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from abyssal.cli.loaded import find_config

if TYPE_CHECKING:
    from abyssal.analysis.activations import Adapters
    from abyssal.analysis.cards import Card
    from abyssal.analysis.layouts import Wishes
    from abyssal.analysis.plan import Planner, TrainingPlan
    from abyssal.analysis.published_figures import Figure
    from abyssal.analysis.serving import Group, InferencePlan
    from abyssal.config import ModelConfig


def plan_command(
    ctx: typer.Context,
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
    frozen: Annotated[
        Literal["dense", "nf4", "int8", "int4"] | None,
        typer.Option(help="With --lora: what the frozen weights are kept in. Default: dense."),
    ] = None,
    esft: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Train this share of the routed experts only.")
    ] = None,
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
    from abyssal.analysis.inventory import Inventory
    from abyssal.analysis.layouts import Wishes
    from abyssal.analysis.plan import Planner
    from abyssal.analysis.serving import InferencePlanner, Serving
    from abyssal.analysis.units import parse_count
    from abyssal.checkpoint.packing import stored_kind
    from abyssal.errors import UserError

    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    figures = _published(model) if published else []
    if published and given <= {"model", "published", "as_json"}:
        _show_published(model, figures, as_json)
        return
    _check_options(given)
    card = _card(gpu, gpu_memory, gpu_tflops)
    amount = None if tokens is None else parse_count(tokens, "--tokens")
    if gpu_hour is not None and not 0 <= gpu_hour < math.inf:
        raise UserError(f"--gpu-hour: {gpu_hour:g} is not a price of 0 or more")
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
        adapters=_adapters(lora, qlora, esft, adapt),
        frozen="nf4" if qlora is not None else frozen or "dense",
    )
    stored = stored_kind(config, Path(model)) or ("fp8" if config.published.get("quantization_config") else "bf16")
    precision = weights or stored
    serving = Serving(precision, batch, context, chunk, cache)
    inventory = Inventory(config)
    out = Findings(model, wishes, amount, gpu_hour, figures)
    if inference:
        out.served = InferencePlanner(inventory, wishes, serving).plan()
    else:
        out.planner = Planner(config, wishes, inventory)
        out.training = out.planner.training()
        try:  # the layout that was asked for is training's
            out.served = InferencePlanner(inventory, Wishes(gpus, card, reserve), serving).plan()
        except UserError as error:
            out.fault = str(error)
    if as_json:
        _print_json(out)
    else:
        _show(out, config)


_TRAINING_ONLY = (
    *("tokens", "mfu", "gpu_hour", "gpu_tflops", "sequence", "micro_batch", "global_batch", "replicate", "shard"),
    *("pipeline", "recompute", "optimizer", "state", "dtype", "lora", "qlora", "adapt"),
    *("frozen", "esft"),
)


def _check_options(given: set[str]) -> None:
    """Raises UserError for options that would have no effect."""
    from abyssal.errors import UserError

    def option(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    if "inference" in given and (idle := [option(name) for name in _TRAINING_ONLY if name in given]):
        raise UserError(f"{', '.join(idle)}: no effect with --inference, which plans no training")
    if "gpu_hour" in given and "tokens" not in given:
        raise UserError("--gpu-hour: no effect without --tokens, which say how long it takes")
    if "adapt" in given and not given & {"lora", "qlora"}:
        raise UserError("--adapt: no effect without --lora or --qlora")
    if "frozen" in given and "lora" not in given:
        raise UserError("--frozen: no effect without --lora; --qlora RANK is --lora RANK --frozen nf4")


@dataclass
class Findings:
    """All that was planned, to be shown."""

    model: str
    wishes: Wishes
    tokens: float | None
    price: float | None
    figures: list[Figure]
    planner: Planner | None = None
    training: TrainingPlan | None = None
    served: InferencePlan | None = None
    fault: str | None = None

    def seconds(self) -> float:
        """Of one GPU, for all tokens."""
        from abyssal.analysis.plan import gpu_seconds

        assert self.planner is not None
        assert self.tokens is not None
        return gpu_seconds(self.tokens, self.planner.flops, self.planner.peak, self.wishes.mfu)


def _card(name: str | None, memory: str | None, teraflops: float | None) -> Card:
    from dataclasses import replace

    from abyssal.analysis.cards import CARDS, Card
    from abyssal.analysis.units import parse_bytes
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


def _adapters(lora: int | None, qlora: int | None, esft: float | None, parts: str) -> Adapters | None:
    from abyssal.analysis.activations import ADAPTABLE, Adapters
    from abyssal.errors import UserError, nearest

    named = (("--lora", lora), ("--qlora", qlora), ("--esft", esft))
    methods = [f"{name} {value:g}" for name, value in named if value is not None]
    if len(methods) > 1:
        raise UserError(f"{' and '.join(methods)}: take one of them")
    if esft is not None:
        if not 0 < esft <= 1:
            raise UserError(f"--esft: {esft:g} is not above 0 and at most 1; 0.1 trains a tenth of the experts")
        return Adapters.esft(esft)
    names = tuple(part.strip() for part in parts.split(","))
    for name in names:
        if name not in ADAPTABLE:
            raise UserError(f"--adapt: {name!r} is not one of {', '.join(ADAPTABLE)}{nearest(name, ADAPTABLE)}")
    rank = qlora if qlora is not None else lora
    return None if rank is None else Adapters(rank, names)


def _show(found: Findings, config: ModelConfig) -> None:
    from abyssal.cli.show import say

    _show_header(found, config)
    if found.training is not None:
        _show_training(found, found.training)
    if found.served is not None:
        _show_inference(found.served, found.wishes)
    else:
        say(f"\n{found.fault}")
    if found.figures:
        _show_published(found.model, found.figures, False)


def _show_header(found: Findings, config: ModelConfig) -> None:
    from abyssal.analysis.parameters import count_parameters
    from abyssal.analysis.units import size
    from abyssal.cli.show import console

    counts = count_parameters(config)
    mtp = f" + {_count(counts.mtp)} MTP" if counts.mtp else ""
    card, wishes = found.wishes.card, found.wishes
    console.print(
        f"[bold]{escape(found.model)}[/bold]: {_count(counts.total)} parameters{mtp}, "
        f"{_count(counts.active)} active a token"
    )
    console.print(
        f"{wishes.gpus:,} × {card.name} of {size(card.memory)}, {size(wishes.usable)} for use (reserve "
        f"{wishes.reserve:.0%}); GB are 10^9 bytes"
    )


def _show_training(found: Findings, plan: TrainingPlan) -> None:
    from abyssal.analysis.units import plural
    from abyssal.cli import communication
    from abyssal.cli.show import console, say, show_table, table

    setup, layout, memory = plan.setup, plan.layout, plan.memory
    floats = "BF16" if setup.dtype == "bfloat16" else "FP32"
    kept = {"nf4": "NF4"}.get(setup.frozen, setup.frozen)
    kind = "training"
    if setup.adapters is not None:
        lora = f"{'LoRA' if setup.frozen == 'dense' else 'QLoRA'} of rank {setup.adapters.rank}"
        kind = f"ESFT of {setup.adapters.share:.1%} of the experts" if setup.adapters.share else lora
    out = table(f"\n{kind}, a GPU", "\nGB", "\nshare")
    notes = {
        "weights": floats if setup.frozen == "dense" else f"{kept} and {floats}",
        "optimizer": f"{setup.optimizer}, {setup.state}",
        "activations": "recomputed" if setup.recompute else "all kept",
    }
    for term, nbytes in memory.by_term.items():
        note = f" ({notes[term]})" if term in notes else ""
        out.add_row(f"{term}{note}", _gb(nbytes), f"{nbytes / memory.total:.1%}")
    out.add_row("[bold]total[/bold]", f"[bold]{_gb(memory.total)}[/bold]", f"of {_gb(found.wishes.usable)}")
    show_table(out)
    out = table("\nactivations, by what is kept", "\nGB")
    for term, nbytes in sorted(memory.activations.items(), key=lambda item: -item[1]):
        out.add_row(term, _gb(nbytes))
    show_table(out)
    axes = ("replicate", "shard", "tensor", "pipeline")
    product = " × ".join(f"{axis} {getattr(layout, axis):,}" for axis in axes if getattr(layout, axis) > 1)
    experts = f"; expert {layout.expert}" if layout.expert > 1 else ""
    console.print("\n[bold]layout[/bold]: " + (f"{product} = {layout.gpus:,} GPUs{experts}" if product else "one GPU"))
    passes = f" × {setup.accumulate:,} micro-batches" if setup.accumulate > 1 else ""
    say(
        f"batch:  {setup.micro_batch:,} × {setup.sequence:,} tokens a GPU{passes}; a step is "
        f"{plural(plan.global_batch, 'sequence')}, {_count(plan.global_batch * setup.sequence)} tokens"
    )
    reasons = [*plan.why]
    if layout.gpus > 1:
        reasons.append(
            "of all that fits it has the least tensor parallelism, then the least waiting by an estimate, "
            "which ranks layouts and is no part of the time"
        )
    for reason in reasons:
        say(textwrap.fill(reason, 84, initial_indent="why:    ", subsequent_indent=" " * 8))
    _show_time(found)
    assert found.planner is not None
    communication.show(found.planner, plan)


def _show_time(found: Findings) -> None:
    from abyssal.cli.show import say

    assert found.planner is not None
    wishes, tokens, peak = found.wishes, found.tokens, f"{found.planner.peak / 1e12:,.4g} TFLOP/s"
    assumed = "an assumed " if wishes.card.flops is None else ""
    if tokens is not None:
        seconds, flops = found.seconds(), found.planner.flops
        say(
            f"FLOPs:  {flops * tokens:.3g} = {flops / 1e9:.4g} GFLOP a token for {_count(tokens)} tokens\n"
            f"time:   {_duration(seconds / wishes.gpus)}, {_number(seconds / 3600)} GPU hours, "
            f"at {wishes.mfu:.1%} MFU of {assumed}{peak}"
        )
        if found.price is not None:
            say(f"cost:   {_number(seconds / 3600 * found.price)} at {found.price:g} a GPU hour")
    assumptions = [peak] if wishes.card.flops is None else []
    if wishes.card.name == "GPU" and wishes.gpus > 1:
        assumptions.append(f"links of {wishes.card.link / 1e9:g} GB/s in a node")
    if assumptions:
        better = "--gpu NAME or --gpu-tflops" if wishes.card.flops is None else "--gpu NAME"
        say(f"speed:  {' and '.join(assumptions)} assumed,\n        for the choice of layout too; {better} says better")


def _show_inference(plan: InferencePlan, wishes: Wishes) -> None:
    from abyssal.analysis.units import plural
    from abyssal.cli.show import say, show_table, table

    serving, group = plan.serving, plan.group
    assert serving.context is not None
    out = table("\ninference, a GPU" + (f" of {group.gpus}" if group.gpus > 1 else ""), "\nGB")
    amount = f"{serving.batch:,} × {plural(serving.context, 'token')}"
    notes = {"weights": serving.precision.upper(), "cache": f"{serving.cache.upper()}, {amount}"}
    for term, nbytes in plan.memory.by_term.items():
        out.add_row(f"{term} ({notes[term]})" if term in notes else term, _gb(nbytes))
    out.add_row("[bold]total[/bold]", f"[bold]{_gb(plan.memory.total)}[/bold]")
    show_table(out)
    say("layout: " + _group(group) + (f" = {group.gpus:,} GPUs" if group.gpus > 1 else ""))
    say(f"fits:   at most, on {'all ' if wishes.gpus > 1 else ''}{plural(wishes.gpus, 'GPU')}:")
    for room in plan.rooms:
        how = f" ({_group(room.group)})" if wishes.gpus > 1 and room.sequences else ""
        say(f"        {plural(room.sequences, 'sequence')} of {plural(room.context, 'token')}{how}")


def _group(group: Group) -> str:
    together = f"tensor {group.tensor} × expert {group.expert}" if group.tensor * group.expert > 1 else "one GPU"
    return f"{group.replicas:,} times {together}" if group.replicas > 1 else together


def _published(model: str) -> list[Figure]:
    from abyssal.analysis.published_figures import FIGURES, figures_of
    from abyssal.errors import UserError

    figures = figures_of(model)
    if not figures:
        known = ", ".join(dict.fromkeys(figure.model for figure in FIGURES))
        raise UserError(f"--published: none are kept for {model!r}; there are for {known}")
    return figures


def _as_data(figures: list[Figure]) -> list[dict[str, Any]]:
    keys = ("what", "published", "unit", "source", "at_most")
    return [{key: getattr(figure, key) for key in keys} | {"ours": figure.ours()} for figure in figures]


def _show_published(model: str, figures: list[Figure], as_json: bool) -> None:
    import json

    from abyssal.cli.show import show_table, table

    if as_json:
        print(json.dumps(_as_data(figures), indent=2))
        return
    out = table(f"\n{escape(model)}", "\npublished", "\nours", "")
    out.columns[3].justify = "left"
    for figure in figures:
        unit = f" {figure.unit}" if figure.unit else ""
        theirs = "–" if figure.published is None else f"{'≤ ' * figure.at_most}{figure.published:g}{unit}"
        out.add_row(figure.what, theirs, f"{figure.ours():.4g}{unit}", figure.source)
    show_table(out)


def _print_json(found: Findings) -> None:
    import json
    from dataclasses import asdict

    wishes = found.wishes
    data: dict[str, Any] = {
        "model": found.model,
        "gpus": wishes.gpus,
        "gpu": {"name": wishes.card.name, "bytes": wishes.card.memory, "flops": wishes.card.flops},
        "usable_bytes": wishes.usable,
    }
    if found.training is not None:
        data["training"] = _training_data(found, found.training)
    if found.served is not None:
        plan = found.served
        data["inference"] = {
            "bytes": {"total": plan.memory.total, **plan.memory.by_term},
            **asdict(plan.serving),
            "layout": {**asdict(plan.group), "gpus": plan.group.gpus},
            "fits": [asdict(room) for room in plan.rooms],
        }
    elif found.fault is not None:
        data["inference"] = {"error": found.fault}
    if found.figures:
        data["published"] = _as_data(found.figures)
    print(json.dumps(data, indent=2))


def _training_data(found: Findings, plan: TrainingPlan) -> dict[str, Any]:
    from dataclasses import asdict

    from abyssal.cli import communication

    assert found.planner is not None
    wishes = found.wishes
    data: dict[str, Any] = {
        "bytes": {"total": plan.memory.total, **plan.memory.by_term},
        "activations": plan.memory.activations,
        "layout": {**asdict(plan.layout), "gpus": plan.layout.gpus},
        "setup": asdict(plan.setup),
        "global_batch": plan.global_batch,
        "why": plan.why,
        "estimated_overhead": plan.overhead,
        "communication": communication.data(found.planner, plan),
        "flops_per_token": found.planner.flops,
        "peak_flops": found.planner.peak,
        "peak_is_assumed": wishes.card.flops is None,
        "link": wishes.card.link,
        "link_is_assumed": wishes.card.name == "GPU",
        "mfu": wishes.mfu,
    }
    if found.tokens is not None:
        seconds = found.seconds()
        data |= {
            "tokens": found.tokens,
            "flops": found.tokens * found.planner.flops,
            "gpu_hours": seconds / 3600,
            "seconds": seconds / wishes.gpus,
            "cost": None if found.price is None else seconds / 3600 * found.price,
        }
    return data


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f}" if nbytes >= 1e8 else f"{nbytes / 1e9:.4f}"


def _count(number: float) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.4g}{unit}"
    return f"{number:g}"


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _duration(seconds: float) -> str:
    for unit, scale in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.1f} seconds"
