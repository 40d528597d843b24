"""What commands that decode share: how far MTP modules guess, and what an engine has done as lines to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from abyssal.generation.metrics import Metrics

DraftsOption = Annotated[
    int | None,
    typer.Option(help="Tokens that MTP modules guess ahead, 0: none; default: one a module, as long as that pays."),
]


def count_lines(metrics: Metrics) -> list[tuple[str, str]]:
    """Label and value of each line, times apart."""
    made = zip(metrics.accepted, metrics.drafted, metrics.acceptance, strict=True)
    depths = [f"depth {k}: {right:,} of {all:,} right ({share:.0%})" for k, (right, all, share) in enumerate(made, 1)]
    out = [
        ("prompt tokens", f"{metrics.prompt_tokens:,}"),
        ("new tokens", f"{metrics.new_tokens:,}"),
        ("prefix hits", f"{metrics.reused:,} tokens of prompts were computed before"),
        ("preemptions", f"{metrics.preempted:,}"),
        ("cache", f"{metrics.bytes_a_token:,} bytes a token; room for {metrics.pages * metrics.page:,} tokens"),
        ("drafts", "; ".join(depths) or "none"),
    ]
    if metrics.gave_up:
        texts = "1 text" if metrics.gave_up == 1 else f"{metrics.gave_up:,} texts"
        out.append(("given up", f"drafts of {texts}: they did not pay"))
    return out


def align(lines: list[tuple[str, str]]) -> str:
    """Values one below the other."""
    wide = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:{wide}}  {value}" for label, value in lines)
