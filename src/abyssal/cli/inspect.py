"""``abyssal inspect``: what a model is made of, from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from abyssal.cli.loaded import find_config

if TYPE_CHECKING:
    import torch

    from abyssal.analysis.inspection import Inspection
    from abyssal.config import ModelConfig

MOST_SEQUENCES = 10**9


def inspect_command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="A preset, a config.json or its folder, a run, or a name on the hub."),
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="Models side by side, a column each; several are so without it, too.")
    ] = False,
    precision: Annotated[
        bool, typer.Option("--precision", help="How much is stored in FP8, BF16 and FP32, by tensor.")
    ] = False,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=DTYPE",
            help="Another plan for --precision: a dtype for tensors whose names fit, or a dtype alone for the rest; "
            "may be given again, the first that fits counts.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="FLOPs and cache at N tokens a sequence. Default: 4096, or the most that all models take."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="B", help="Cache of B sequences.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show parameters (all and active, by part and by layer), FLOPs a token, bytes of the cache and of the weights in
    each precision. Takes no memory for weights."""
    import json

    from abyssal.analysis.inspection import inspect_model
    from abyssal.cli.compare import show_comparison
    from abyssal.errors import UserError

    if not 1 <= batch <= MOST_SEQUENCES:
        raise UserError(f"--batch: {batch} is not between 1 and {MOST_SEQUENCES:,}")
    twice = next((model for i, model in enumerate(models) if model in models[:i]), None)
    if twice is not None:
        raise UserError(f"{twice}: named twice")
    several = compare or len(models) > 1
    if several and (precision or plan):
        raise UserError(f"--{'precision' if precision else 'plan'}: for one model alone, not for a comparison")
    configs = {model: find_config(model) for model in models}
    if precision or plan:
        _show_precision(models[0], configs[models[0]], plan or [], as_json)
        return
    tokens = _context(configs, context)
    inspections = {model: inspect_model(config, context=tokens, batch=batch) for model, config in configs.items()}
    if as_json:
        data = {model: inspection.as_json() for model, inspection in inspections.items()}
        print(json.dumps(data if several else data[models[0]], indent=2))
    elif several:
        show_comparison(inspections)
    else:
        _show(models[0], inspections[models[0]])


def _context(configs: dict[str, ModelConfig], context: int | None) -> int:
    from abyssal.errors import UserError

    if context is None:
        return min(4096, *(config.max_position_embeddings for config in configs.values()))
    for model, config in configs.items():
        if not 1 <= context <= config.max_position_embeddings:
            raise UserError(
                f"--context: {context} is not between 1 and {model}'s max_position_embeddings "
                f"{config.max_position_embeddings}"
            )
    return context


def _show(model: str, inspection: Inspection) -> None:
    from abyssal.cli.show import console

    console.print(f"[bold]{escape(model)}[/bold]: {_describe(inspection.config)}")
    _show_parts(inspection)
    _show_layers(inspection)
    _show_flops(inspection)
    _show_cache(inspection)
    _show_weights(inspection)


def _show_parts(inspection: Inspection) -> None:
    from abyssal.cli.show import show_table, table

    counts = inspection.counts
    out = table("\npart", "\nparameters", "\nshare", "\nactive a token")
    for part, count in counts.by_part.items():
        active = counts.active_by_part[part]
        out.add_row(part, f"{count:,}", f"{count / counts.total:.1%}", f"{active:,}")
    out.add_row("[bold]total[/bold]", f"[bold]{counts.total:,}[/bold]", "", f"[bold]{counts.active:,}[/bold]")
    out.add_row("  without the input embedding", "", "", f"{counts.active_without_embedding:,}")
    if counts.mtp:
        out.add_row("MTP modules (not in the total)", f"{counts.mtp:,}", "", "")
    show_table(out)


def _show_layers(inspection: Inspection) -> None:
    from abyssal.cli.show import show_table, table

    unit, scale = _unit(inspection)
    out = table("\nlayers", "\neach: parameters", "\nactive", f"\n{unit} a token", "\nall: parameters")
    for group in inspection.layers:
        each = group.parameters
        out.add_row(
            f"{group.label} {group.kind}",
            *(f"{each.total:,}", f"{each.active:,}"),
            *(f"{group.flops / scale:,.3f}", f"{each.total * len(group.layers):,}"),
        )
    counts = inspection.counts
    rest = counts.total - sum(layer.total for layer in counts.layers)
    head = f"{inspection.flops.by_part['head'] / scale:,.3f}"
    out.add_row("outside layers", f"{rest:,}", f"{rest:,}", head, f"{rest:,}")
    show_table(out)


def _show_flops(inspection: Inspection) -> None:
    from abyssal.cli.show import show_table, table

    flops, (unit, scale) = inspection.flops, _unit(inspection)
    out = table(f"\nforward pass, context of {flops.context:,}", f"\n{unit} a token", "\nshare")
    for part, count in flops.by_part.items():
        out.add_row(part, f"{count / scale:,.3f}", f"{count / flops.forward:.1%}")
    out.add_row("[bold]total[/bold]", f"[bold]{flops.forward / scale:,.3f}[/bold]", "")
    if flops.mtp:
        out.add_row("MTP modules and their head (not in the total)", f"{flops.mtp / scale:,.3f}", "")
    name = "training, 3 times forward with MTP" if flops.mtp else "training, 3 times forward"
    out.add_row(name, f"{flops.training / scale:,.3f}", "")
    show_table(out)


def _show_cache(inspection: Inspection) -> None:
    from abyssal.cli.show import show_table, size, table

    cache, attention = inspection.cache, inspection.config.attention
    out = table("\ncache", "\nvalues", "\nFP8", "\nBF16", "\nFP32")
    kinds = {"keys and values" if attention.kind == "mha" else "latent": False, "expanded": True}
    for name, expanded in kinds.items():
        values = cache.expanded_values if expanded else cache.values
        if expanded and values == cache.values:
            continue
        out.add_row(f"{name}, a token and layer", f"{values:,}", "", "", "")
        token = inspection.cache_bytes(expanded=expanded)
        out.add_row("  a token", f"{cache.layers * values:,}", *map(size, token.values()))
        whole = inspection.cache_bytes(expanded=expanded, whole=True)
        amount = inspection.context * inspection.batch
        label = f"  {inspection.context:,} tokens × {inspection.batch:,}"
        out.add_row(label, f"{cache.layers * values * amount:,}", *map(size, whole.values()))
    if cache.expanded_values != cache.values:
        out.add_row("expanded / latent", f"{cache.ratio:.1f}×", "", "", "")
    show_table(out)


def _show_weights(inspection: Inspection) -> None:
    from abyssal.analysis.weights import GROUP
    from abyssal.cli.show import console, show_table, size, table

    counts = inspection.counts
    columns = ("\nMTP modules",) if counts.mtp else ()
    out = table("\nweights", "\nbytes", "\na parameter", *columns)
    names = {"fp32": "FP32", "bf16": "BF16", "fp8": "FP8 blocks of 128 × 128", "int8": "int8", "int4": "int4"}
    for precision, nbytes in inspection.weights.items():
        mtp = (size(nbytes.mtp),) if counts.mtp else ()
        out.add_row(names[precision], size(nbytes.main), f"{nbytes.main / counts.total:.3f}", *mtp)
    show_table(out)
    console.print(
        "\nFP8, int8, int4: matrices of attention, dense MLPs and experts; the rest BF16.\n"
        f"With scales: FP32 a block, BF16 a row (int8), BF16 for {GROUP} weights of it (int4)."
    )


def _unit(inspection: Inspection) -> tuple[str, float]:
    return ("GFLOP", 1e9) if inspection.flops.forward >= 1e9 else ("MFLOP", 1e6)


def _show_precision(model: str, config: ModelConfig, entries: list[str], as_json: bool) -> None:
    import json

    import torch

    from abyssal.analysis.precision import count_precisions, published_plan
    from abyssal.checkpoint.precision import PRECISIONS, parse_plan
    from abyssal.cli.show import console, show_table, size, table

    names = {dtype: name for name, dtype in PRECISIONS.items()} | {torch.float64: "fp64"}
    stored = None if entries else _stored(model)
    base = published_plan(config).base if stored is None else None
    counts = count_precisions(config, parse_plan(entries, base), stored)
    total = counts.parameters
    shares = sorted(counts.by_dtype.items(), key=lambda item: item[0].itemsize)
    if as_json:
        data = {
            "parameters": total,
            "bytes": counts.nbytes,
            "precisions": {names[dtype]: vars(share) for dtype, share in shares},
            "scales": vars(counts.scales),
            "parts": {part: {names[d]: n for d, n in row.items()} for part, row in counts.by_part.items()},
            "mtp": {names[dtype]: vars(share) for dtype, share in counts.mtp.items()},
        }
        print(json.dumps(data, indent=2).replace('"nbytes"', '"bytes"'))
        return
    plan = " ".join(entries) if entries else ("as published" if stored is None else "as stored")
    console.print(f"[bold]{escape(model)}[/bold], {escape(plan)}")
    out = table("\nprecision", "\ntensors", "\nparameters", "\nshare", "\nbytes")
    for dtype, share in shares:
        out.add_row(names[dtype], *_columns(share.tensors, share.parameters, total, share.nbytes))
    if counts.scales.tensors:
        out.add_row(
            "fp32 scales", *_columns(counts.scales.tensors, counts.scales.parameters, None, counts.scales.nbytes)
        )
    tensors = sum(share.tensors for _, share in shares) + counts.scales.tensors
    out.add_row("[bold]total[/bold]", f"{tensors:,}", f"[bold]{total:,}[/bold]", "", f"{size(counts.nbytes)}")
    for dtype, share in sorted(counts.mtp.items(), key=lambda item: item[0].itemsize):
        out.add_row(f"MTP modules, {names[dtype]}", *_columns(share.tensors, share.parameters, None, share.nbytes))
    show_table(out)
    dtypes = [dtype for dtype, _ in shares]
    out = table("\npart", *(f"\n{names[dtype]}" for dtype in dtypes))
    for part, row in counts.by_part.items():
        out.add_row(part, *(f"{row[dtype]:,}" if dtype in row else "–" for dtype in dtypes))
    show_table(out)


def _stored(model: str) -> dict[str, torch.dtype] | None:
    """The dtypes of the tensors in a folder or run; None for what has no weights on this disk."""
    import torch

    from abyssal.checkpoint.shards import INDEX, WEIGHTS, Shards
    from abyssal.errors import UserError
    from abyssal.loading import find

    folder = find(model) if Path(model).is_dir() else None
    if folder is None or not any((folder / name).is_file() for name in (INDEX, WEIGHTS)):
        return None
    dtypes = {name: stored.dtype for name, stored in Shards(folder).tensors.items()}
    if torch.uint8 in dtypes.values():
        raise UserError(f"--precision: {model} holds packed weights; give --plan, or what they were made from")
    return dtypes


def _columns(tensors: int, parameters: int, total: int | None, nbytes: int) -> tuple[str, ...]:
    from abyssal.cli.show import size

    share = "" if total is None else f"{parameters / total:.2%}"
    return f"{tensors:,}", f"{parameters:,}", share, size(nbytes)


def _describe(config: ModelConfig) -> str:
    """Sizes, attention and experts, a line each."""
    a, moe = config.attention, config.moe
    lines = [f"hidden {config.hidden_size:,}, {config.num_hidden_layers} layers, vocabulary {config.vocab_size:,}"]
    if a.kind == "mha":
        lines.append(f"MHA, {a.num_attention_heads} heads of {a.head_dim}, {a.num_key_value_heads} kv heads")
    else:
        both = f"kv_lora_rank {a.kv_lora_rank}" if a.kind == "mla" else f"latents {a.k_lora_rank} and {a.v_lora_rank}"
        query = f"q_lora_rank {a.q_lora_rank}" if a.q_lora_rank else "queries not compressed"
        kind = "MLA" if a.kind == "mla" else "separate latents"
        dims = f"{a.qk_nope_head_dim}/{a.qk_rope_head_dim}/{a.v_head_dim}"
        lines.append(f"{kind}, {a.num_attention_heads} heads, nope/rope/v {dims}, {both}, {query}")
    if moe:
        count = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
        grouped = moe.n_group > 1 and moe.topk_method != "greedy"
        groups = f", {moe.topk_group} of {moe.n_group} groups" if grouped else ""
        lines.append(
            f"MoE in {count} of {config.num_hidden_layers} layers: {moe.n_routed_experts} routed experts of width "
            f"{moe.moe_intermediate_size}, {moe.num_experts_per_tok} a token, {moe.n_shared_experts} shared"
        )
        lines.append(f"router: {moe.scoring_func} scores, {moe.topk_method}{groups}")
    return "\n".join(lines)
