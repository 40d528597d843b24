"""``abyssal inspect``: what a model is made of, from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

if TYPE_CHECKING:
    import torch

    from abyssal.analysis.flops import Flops
    from abyssal.config import ModelConfig


def inspect_command(
    model: Annotated[str, typer.Argument(help="A preset, a config.json or its folder, a run, or a name on the hub.")],
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
        typer.Option(metavar="N", help="Count FLOPs at N tokens a sequence. Default: 4096, or the model's most."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show parameters (all and active, by part), cached bytes and FLOPs a token. Takes no memory for weights."""
    import json

    from abyssal.analysis.parameters import count_parameters
    from abyssal.cli.show import console, show_table, table

    config = _config(model)
    if precision or plan:
        _show_precision(model, config, plan or [], as_json)
        return
    counts = count_parameters(config)
    flops = _flops(config, context)
    attention = config.attention
    cached = attention.cached_values * config.num_hidden_layers
    expanded = attention.expanded_values * config.num_hidden_layers
    if as_json:
        data = {
            "parameters": {"total": counts.total, **counts.by_part},
            "active": {"total": counts.active, **counts.active_by_part},
            "active_without_embedding": counts.active_without_embedding,
            "mtp": counts.mtp,
            "cached_values_per_token_and_layer": attention.cached_values,
            "cached_bytes_per_token": {"bfloat16": 2 * cached, "float32": 4 * cached},
            "expanded_bytes_per_token": {"bfloat16": 2 * expanded, "float32": 4 * expanded},
            "flops": {
                "context": flops.context,
                "forward": {"total": flops.forward, **flops.by_part},
                "mtp": {"total": flops.mtp, **flops.mtp_by_part},
                "training": flops.training,
            },
            "config": config.model_dump(),
        }
        print(json.dumps(data, indent=2))
        return
    moe = config.moe
    console.print(f"[bold]{escape(model)}[/bold]: {_describe_attention(config)}")
    if moe:
        layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
        groups = (
            f", {moe.topk_group} of {moe.n_group} groups" if moe.n_group > 1 and moe.topk_method != "greedy" else ""
        )
        console.print(
            f"{moe.n_routed_experts} routed experts of width {moe.moe_intermediate_size}, {moe.num_experts_per_tok} a "
            f"token{groups}, {moe.n_shared_experts} shared; {moe.scoring_func} scores, {moe.topk_method}; "
            f"{len(layers)} of {config.num_hidden_layers} layers"
        )
    out = table("\npart", "\nparameters", "\nshare", "\nactive a token")
    for part, count in counts.by_part.items():
        active = counts.active_by_part[part]
        out.add_row(part, f"{count:,}", f"{count / counts.total:.1%}", f"{active:,}")
    out.add_row("[bold]total[/bold]", f"[bold]{counts.total:,}[/bold]", "", f"[bold]{counts.active:,}[/bold]")
    out.add_row("  without the input embedding", "", "", f"{counts.active_without_embedding:,}")
    if counts.mtp:
        out.add_row("MTP modules (not in the total)", f"{counts.mtp:,}", "", "")
    show_table(out)
    out = table("\ncache", "\nvalues a token and layer", "\nbytes a token, BF16", "\nFP32")
    name = "latent" if attention.kind != "mha" else "keys and values"
    out.add_row(name, f"{attention.cached_values:,}", f"{2 * cached:,}", f"{4 * cached:,}")
    if expanded != cached:
        out.add_row("expanded heads", f"{attention.expanded_values:,}", f"{2 * expanded:,}", f"{4 * expanded:,}")
        out.add_row("ratio", f"{expanded / cached:.1f}×", "", "")
    show_table(out)
    _show_flops(flops)


def _flops(config: ModelConfig, context: int | None) -> Flops:
    from abyssal.analysis.flops import count_flops
    from abyssal.errors import UserError

    longest = config.max_position_embeddings
    if context is None:
        context = min(4096, longest)
    elif not 1 <= context <= longest:
        raise UserError(f"--context: {context} is not between 1 and the model's max_position_embeddings {longest}")
    return count_flops(config, context)


def _show_flops(flops: Flops) -> None:
    from abyssal.cli.show import show_table, table

    total = flops.forward
    unit, scale = ("GFLOP", 1e9) if total >= 1e9 else ("MFLOP", 1e6)
    out = table(f"\nforward pass, context of {flops.context:,}", f"\n{unit} a token", "\nshare")
    for part, count in flops.by_part.items():
        out.add_row(part, f"{count / scale:,.3f}", f"{count / total:.1%}")
    out.add_row("[bold]total[/bold]", f"[bold]{total / scale:,.3f}[/bold]", "")
    if flops.mtp:
        out.add_row("MTP modules (not in the total)", f"{flops.mtp / scale:,.3f}", "")
    name = "training, 3 times forward with MTP" if flops.mtp else "training, 3 times forward"
    out.add_row(name, f"{flops.training / scale:,.3f}", "")
    show_table(out)


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
    from abyssal.checkpoint.shards import INDEX, WEIGHTS, Shards
    from abyssal.loading import find

    folder = find(model) if Path(model).is_dir() else None
    if folder is None or not any((folder / name).is_file() for name in (INDEX, WEIGHTS)):
        return None
    return {name: stored.dtype for name, stored in Shards(folder).tensors.items()}


def _columns(tensors: int, parameters: int, total: int | None, nbytes: int) -> tuple[str, ...]:
    from abyssal.cli.show import size

    share = "" if total is None else f"{parameters / total:.2%}"
    return f"{tensors:,}", f"{parameters:,}", share, size(nbytes)


def _config(model: str) -> ModelConfig:
    from abyssal.checkpoint.run import MANIFEST
    from abyssal.loading import find_config
    from abyssal.training.start import run_recipe

    if (Path(model) / MANIFEST).is_file():  # a run has its config before it has a checkpoint
        return run_recipe(Path(model)).model_config_resolved()
    return find_config(model)


def _describe_attention(config) -> str:  # type: ignore[no-untyped-def]
    a = config.attention
    size = f"hidden {config.hidden_size:,}, {config.num_hidden_layers} layers, vocabulary {config.vocab_size:,}"
    if a.kind == "mha":
        return f"{size}; MHA, {a.num_attention_heads} heads of {a.head_dim}, {a.num_key_value_heads} kv heads"
    latents = f"kv_lora_rank {a.kv_lora_rank}" if a.kind == "mla" else f"latents {a.k_lora_rank} and {a.v_lora_rank}"
    query = f"q_lora_rank {a.q_lora_rank}" if a.q_lora_rank else "queries not compressed"
    kind = "MLA" if a.kind == "mla" else "separate latents"
    dims = f"{a.qk_nope_head_dim}/{a.qk_rope_head_dim}/{a.v_head_dim}"
    return f"{size}; {kind}, {a.num_attention_heads} heads, nope/rope/v {dims}, {latents}, {query}"
