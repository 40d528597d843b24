"""What a conversion did, stage by stage and layer by layer, as data, a table and Markdown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerFigures:
    """One layer. Cosines are means over held-out tokens between the dense layer's output and the new one's for the
    dense model's own inputs, by stage."""

    layer: int
    attention: dict[str, float] = field(default_factory=dict)
    rotary_kept: float | None = None
    latent_error: float | None = None
    feed_forward: dict[str, float] = field(default_factory=dict)
    caught: float | None = None
    caught_at_best: float | None = None
    load_cv: float | None = None
    split_error: float | None = None
    """The largest difference between the sum of all experts and the dense layer, relative to its largest output."""


@dataclass
class Report:
    """The whole conversion: what was asked for, each layer's figures, and the model's perplexity by stage."""

    source: str
    settings: dict[str, Any]
    cached_before: int
    cached_after: int
    parameters_before: int
    parameters_after: int
    active_after: int
    layers: list[LayerFigures] = field(default_factory=list)
    perplexity: dict[str, float] = field(default_factory=dict)
    perplexity_tokens: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def columns(self) -> list[str]:
        """Heads of :meth:`rows`, by what was converted."""
        first = self.layers[0]
        return [
            "layer",
            *(f"attention, {stage}" for stage in first.attention),
            *(f"FFN, {stage}" for stage in first.feed_forward),
            *(["caught", "at best", "load CV"] if first.load_cv is not None else []),
        ]

    def rows(self) -> list[list[str]]:
        """A row a layer, then the least and the mean."""
        numbers = []
        for one in self.layers:
            more = [one.caught, one.caught_at_best, one.load_cv] if one.load_cv is not None else []
            numbers.append([*one.attention.values(), *one.feed_forward.values(), *more])
        columns = [[float(x) for x in column if x is not None] for column in zip(*numbers, strict=True)]
        out = [[str(one.layer), *_cells(row)] for one, row in zip(self.layers, numbers, strict=True)]
        out.append(["least", *_cells([min(column) for column in columns])])
        out.append(["mean", *_cells([sum(column) / len(column) for column in columns])])
        return out

    def summary(self) -> list[str]:
        """The figures of the whole model, a line each."""
        lines = []
        if self.settings.get("kv_lora_rank") is not None:
            lines.append(f"cached values a token and layer: {self.cached_before} before, {self.cached_after} now")
        lines.append(
            f"parameters: {self.parameters_before:,} before, {self.parameters_after:,} now, "
            f"{self.active_after:,} of them active for a token"
        )
        if self.layers and self.layers[0].split_error is not None:
            worst = max(one.split_error or 0.0 for one in self.layers)
            lines.append(f"sum of all experts against the dense FFN, before routing: {worst:.1e} of its largest output")
        stages = ", ".join(f"{stage} {value:.2f}" for stage, value in self.perplexity.items())
        lines.append(f"perplexity ({self.perplexity_tokens:,} tokens): {stages}")
        return lines

    def markdown(self) -> str:
        """The report as a page."""
        columns = self.columns()
        lines = [f"# {self.source}, converted", "", *(f"- {line}" for line in self.summary())]
        asked = (f"{name} {value}" for name, value in self.settings.items() if value is not None)
        lines += [f"- settings: {', '.join(asked)}", ""]
        lines += ["Cosine between the dense layer's output and the new one's, layer by layer:", ""]
        lines += [f"| {' | '.join(columns)} |", f"|{' ---: |' * len(columns)}"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows()]
        return "\n".join(lines) + "\n"


def _cells(values: list[float | None] | list[float]) -> list[str]:
    return ["–" if value is None else f"{value:.4f}" for value in values]
