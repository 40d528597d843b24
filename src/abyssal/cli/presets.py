"""``abyssal presets``: the models at hand, with their parameter counts."""

from __future__ import annotations

from typing import Annotated

import typer


def presets_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the presets with their parameter counts, computed from their configs."""
    import json

    from abyssal.analysis.parameters import count_parameters
    from abyssal.cli.show import console, show_table, table
    from abyssal.config import preset, preset_names

    rows = {}
    for name in preset_names():
        config = preset(name)
        counts = count_parameters(config)
        rows[name] = {
            "parameters": counts.total,
            "active": counts.active,
            "active_without_embedding": counts.active_without_embedding,
            "mtp": counts.mtp,
            "attention": config.attention.kind,
            "layers": config.num_hidden_layers,
            "cached_values": config.attention.cached_values,
        }
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    out = table("preset", "parameters", "active", "without embedding", "MTP")
    for name, row in rows.items():
        out.add_row(
            name,
            *(f"{row[key]:,}" for key in ("parameters", "active", "active_without_embedding")),
            f"{row['mtp']:,}" if row["mtp"] else "–",
        )
    show_table(out)
    console.print(
        "\nparameters: the main model, router bias included; active: what one token uses, embedding and head included; "
        "without embedding: active less the input embedding, a lookup; MTP: what its modules add."
    )
