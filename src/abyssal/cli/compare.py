"""``abyssal inspect --compare``: models side by side, a column each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from abyssal.analysis.inspection import Inspection

WIDTH = 20
"""Columns that a model's name may take; a longer one goes on in the next line."""


def show_comparison(inspections: dict[str, Inspection]) -> None:
    """Prints ``inspections`` by model; as many side by side as the terminal holds, the others in tables below."""
    from abyssal.cli.show import console, show_table

    first = next(iter(inspections.values()))
    rows = _rows(first)
    if not any(inspection.counts.mtp for inspection in inspections.values()):
        rows.pop("MTP modules")
    shown = {name: [row(inspection) for row in rows.values()] for name, inspection in inspections.items()}
    label = max(map(len, rows))
    tables: list[dict[str, list[str]]] = []
    used = 0
    for name, cells in shown.items():
        width = max(min(len(name), WIDTH), *map(len, cells)) + 2
        if not tables or used + width > console.width:
            tables.append({})
            used = label
        tables[-1][name] = cells
        used += width
    for columns in tables:
        show_table(_table(list(rows), columns))
        console.print()
    console.print(
        f"{first.context:,} tokens a sequence × {first.batch:,}. Training is 3 times forward, with MTP modules."
    )


def _table(labels: list[str], columns: dict[str, list[str]]) -> Table:
    out = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    out.add_column("", no_wrap=True)
    for name in columns:
        out.add_column(escape(name), justify="right", max_width=WIDTH, overflow="fold")
    for label, *cells in zip(labels, *columns.values(), strict=True):
        out.add_row(label, *cells)
    return out


def _rows(first: Inspection) -> dict[str, Callable[[Inspection], str]]:
    """Label and cell of each line; context and batch are those of ``first``, as of all."""
    from abyssal.cli.show import size

    amount = f"{first.context:,} × {first.batch:,}"
    return {
        "attention": lambda i: ATTENTION[i.config.attention.kind] if not _grouped(i) else "GQA",
        "heads": lambda i: f"{i.config.attention.num_attention_heads}",
        "layers": lambda i: f"{i.config.num_hidden_layers}",
        "  with MoE": lambda i: f"{_moe_layers(i) or '–'}",
        "hidden": lambda i: f"{i.config.hidden_size:,}",
        "vocabulary": lambda i: f"{i.config.vocab_size:,}",
        "experts: routed": lambda i: f"{i.config.moe.n_routed_experts}" if i.config.moe else "–",
        "  shared": lambda i: f"{i.config.moe.n_shared_experts}" if i.config.moe else "–",
        "  a token (routed)": lambda i: f"{i.config.moe.num_experts_per_tok}" if i.config.moe else "–",
        "parameters": lambda i: _count(i.counts.total),
        "  active": lambda i: _count(i.counts.active),
        "  without embedding": lambda i: _count(i.counts.active_without_embedding),
        "  embedding": lambda i: _count(i.counts.by_part["embedding"]),
        "MTP modules": lambda i: _count(i.counts.mtp) if i.counts.mtp else "–",
        "BF16 cache of a token": lambda i: size(i.cache_bytes()["bfloat16"]),
        "    values a layer": lambda i: f"{i.cache.values:,}",
        f"  of {amount}": lambda i: size(i.cache_bytes(whole=True)["bfloat16"]),
        "  expanded / cached": lambda i: f"{i.cache.ratio:.1f}×",
        "forward a token": lambda i: _flops(i.flops.forward),
        "  training": lambda i: _flops(i.flops.training),
        "BF16 weights": lambda i: size(i.weights["bf16"].main),
    }


ATTENTION = {"mha": "MHA", "mla": "MLA", "separate_latents": "separate latents"}


def _grouped(inspection: Inspection) -> bool:
    attention = inspection.config.attention
    return attention.kind == "mha" and attention.num_key_value_heads < attention.num_attention_heads


def _moe_layers(inspection: Inspection) -> int:
    return sum(inspection.config.is_moe_layer(i) for i in range(inspection.config.num_hidden_layers))


def _count(number: int) -> str:
    """Parameters as ``671.03 B`` or ``4.73 M``."""
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.2f} M"


def _flops(number: int) -> str:
    return f"{number / 1e9:,.2f} GFLOP" if number >= 1e9 else f"{number / 1e6:,.2f} MFLOP"
