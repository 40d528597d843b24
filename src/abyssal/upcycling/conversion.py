"""The whole way from a dense model to one with latent attention, experts, or both; nothing is written unless all of
it went well.

One pass over the layers: the dense model's hidden states for the calibration text go through it block by block, and
each layer is converted, fitted and judged with the dense layer's own inputs, so that no more than one layer's
activations are in memory and no layer's errors reach the next one's fit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from abyssal.analysis.parameters import count_parameters
from abyssal.checkpoint.atomic import replace_folder
from abyssal.checkpoint.export import check_space, check_target, write_json
from abyssal.config import ModelConfig
from abyssal.data.corpus import documents
from abyssal.errors import UserError
from abyssal.evaluation import perplexity
from abyssal.exporting import export
from abyssal.model import Transformer
from abyssal.model.attention import Context, LatentAttention, MultiHeadAttention
from abyssal.model.layers import MLP
from abyssal.model.moe import MoE
from abyssal.training.hardware import autocast, has_bfloat16
from abyssal.upcycling import experts as splitting
from abyssal.upcycling.attention import latent_attention, separated, without_norm
from abyssal.upcycling.calibration import Pieces, Statistics, causal_context, pieces, statistics
from abyssal.upcycling.dense import Dense, read_dense
from abyssal.upcycling.fit import cosine, fit, outputs
from abyssal.upcycling.latent import Spectrum, rank_for
from abyssal.upcycling.report import LayerFigures, Report
from abyssal.upcycling.rotary import Separated, rotary_theta
from abyssal.upcycling.settings import Settings, check_sizes, check_text, converted_config, rotary_dims

M = TypeVar("M", bound=nn.Module)

Watcher = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""

DEFAULT_TEXT = "tinyshakespeare"
EVALUATION_CONTEXT = 1024
# Steps of the fit, as a share of each weight's root mean square; the FFN bears longer ones (docs/upcycling.md).
ATTENTION_RATE, FEED_FORWARD_RATE = 0.001, 0.005


def upcycle(
    source: str | Path,
    folder: str | Path,
    settings: Settings,
    *,
    calibration: str | Path = DEFAULT_TEXT,
    evaluate: str | Path | None = None,
    evaluate_characters: int = 100_000,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    watch: Watcher | None = None,
) -> Report:
    """Converts the dense model in ``source`` and writes it to ``folder`` in the published layout, with its tokenizer,
    upcycle.json and upcycle.md; returns what these hold.

    ``calibration`` is the text to convert by, ``evaluate`` (else the held-out windows) the text whose first
    ``evaluate_characters`` perplexity is measured on after each stage, in windows of 1024 tokens side by side. Weights
    are written as ``dtype``. Products are BF16 where the device has it.

    With latent attention deepseek_v3's layout is written, which transformers reads; experts alone are written as
    deepseek's (DeepSeekMoE-16B), the only layout with experts beside grouped-query attention.

    Raises UserError before any work where ``folder`` exists or the settings make no sense, and where the source is no
    dense Llama, a size does not fit it, the text is too short, or the disk too full.
    """
    started = time.monotonic()
    folder, device = Path(folder).absolute(), torch.device(device)
    check_target(folder)
    if folder.is_relative_to(Path(source).absolute()):
        raise UserError(f"{folder}: it lies in the model's own folder; expected a place outside it")
    settings.check()
    if evaluate_characters < 1:
        raise UserError(f"evaluate_limit: {evaluate_characters} is not valid; expected a whole number from 1")
    if device.type == "mps":
        raise UserError("device: mps has no 64-bit floating point, which the factorisation needs; expected cpu or cuda")
    texts = documents(calibration)  # a missing file is said before the model is read
    judged = documents(evaluate) if evaluate is not None else None
    dense = read_dense(source)
    check_sizes(dense.model.config, settings)
    check_space(folder, sum(p.numel() for p in dense.model.parameters()) * dtype.itemsize)
    dense.model.to(device)
    text = pieces(texts, dense.tokenizer, windows=settings.windows, held_out=settings.held_out, length=settings.length)
    if judged is not None:
        held: Sequence[str] = list(_beginning(judged, evaluate_characters))
    else:
        held = [dense.tokenizer.decode(row) for row in text.held_out.tolist()]
    conversion = Conversion(dense, settings, text, watch or (lambda what, done, of: None))
    report = conversion.run(held)
    report.settings |= {
        "calibration": str(calibration),
        "evaluate": str(evaluate) if evaluate is not None else None,
        "evaluate_limit": evaluate_characters,
        "dtype": str(dtype).removeprefix("torch."),
    }
    report.seconds = time.monotonic() - started
    write(conversion.new, dense, report, folder, dtype)
    return report


def write(model: Transformer, dense: Dense, report: Report, folder: Path, dtype: torch.dtype) -> None:
    """The model, its tokenizer and the report, whole or not at all."""
    with replace_folder(folder) as partial_folder:
        export(model, partial_folder, tokenizer=dense.tokenizer, dtype=dtype)
        write_json(partial_folder / "upcycle.json", report.to_dict())
        (partial_folder / "upcycle.md").write_text(report.markdown(), encoding="utf-8")


class Conversion:
    """One conversion: the dense model, the new one (``new``), and what was measured on the way."""

    def __init__(self, dense: Dense, settings: Settings, text: Pieces, watch: Watcher) -> None:
        self.dense, self.settings, self.watch = dense, settings, watch
        self.config = dense.model.config
        self.device = dense.model.lm_head.weight.device
        self.dtype = torch.bfloat16 if has_bfloat16(self.device) else torch.float32
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.calibrating = len(text.calibration)
        self.tokens = torch.cat((text.calibration, text.held_out)).to(self.device)
        self.rotary = rotary_dims(dense.attention, settings) if settings.latent else 0
        self.theta = rotary_theta(self.config.rope.theta, dense.attention.head_dim, self.rotary)
        # By stage, what stands in each layer; a stage that leaves a part alone does not name it.
        self.attention: dict[str, list[nn.Module]] = {}
        self.feed_forward: dict[str, list[nn.Module]] = {}

    def run(self, held: Sequence[str]) -> Report:
        """Converts all layers, then measures perplexity of ``held`` after each stage."""
        rank = self._rank() if self.settings.latent else 0
        self.new_config = converted_config(self.config, self.settings, rank, self.rotary, self.theta)
        before, after = count_parameters(self.config), count_parameters(self.new_config)
        report = Report(
            source=Path(self.dense.source).absolute().name,
            settings={**asdict(self.settings), "rotary": self.rotary or None, "kv_lora_rank": rank or None},
            cached_before=self.config.attention.cached_values,
            cached_after=self.new_config.attention.cached_values,
            parameters_before=before.total,
            parameters_after=after.total,
            active_after=after.active,
        )
        report.layers = [self._convert(layer, x, y, z, f) for layer, x, y, z, f in self._layers("converting")]
        self._measure(report, held)
        return report

    @torch.no_grad()
    def _layers(self, what: str) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Layer by layer, the dense model's attention input and output, feed-forward input and output, [n, T, D]."""
        blocks, batch = self.dense.model.blocks, self.settings.batch
        h = self.dense.model.model.embed_tokens(self.tokens).float()
        context = self._context(self.config)
        for layer, block in enumerate(blocks):
            self.watch(what, layer, len(blocks))
            x = block.input_layernorm(h)
            y = outputs(partial(block.self_attn, context=context), x, batch=batch, dtype=self.dtype)
            h += y
            z = block.post_attention_layernorm(h)
            f = outputs(block.mlp, z, batch=batch, dtype=self.dtype)
            yield layer, x, y, z, f
            h += f
        self.watch(what, len(blocks), len(blocks))

    def _context(self, config: ModelConfig) -> Context:
        return causal_context(config.rope.theta, config.attention.rotary_dim, self.tokens.shape[1], self.device)

    def _rank(self) -> int:
        s = self.settings
        if s.cache is not None:
            return s.cache - self.rotary
        assert s.error is not None
        spectra = []
        for layer, x, *_ in self._layers("looking at keys and values"):
            _, _, found = self._separated(layer, x)
            spectra.append(found.values)
        rank = rank_for(spectra, s.error)
        check_text(s, rank)
        return rank

    def _separated(self, layer: int, x: Tensor) -> tuple[Statistics, Separated, Spectrum]:
        dense = self.dense.model.blocks[layer].self_attn
        assert isinstance(dense, MultiHeadAttention)
        stats = statistics(dense, x[: self.calibrating], self._context(self.config))
        parts, found = separated(dense, stats, self.config.rope.theta, self.rotary, self.settings.key_weight)
        return stats, parts, found

    def _convert(self, layer: int, x: Tensor, y: Tensor, z: Tensor, f: Tensor) -> LayerFigures:
        figures = LayerFigures(layer)
        if self.settings.latent:
            self._convert_attention(figures, x, y)
        if self.settings.experts is not None:
            self._convert_feed_forward(figures, z, f)
        return figures

    def _convert_attention(self, figures: LayerFigures, x: Tensor, y: Tensor) -> None:
        dense = self.dense.model.blocks[figures.layer].self_attn
        assert isinstance(dense, MultiHeadAttention)
        stats, parts, found = self._separated(figures.layer, x)
        new = latent_attention(dense, self.new_config, stats, parts, found, x[: self.calibrating])
        figures.rotary_kept = parts.kept
        figures.latent_error = found.error(new.latent)
        context = self._context(self.new_config)
        stages: dict[str, LatentAttention] = {"factorised": without_norm(new), "norm in": new}
        if self.settings.fit:
            stages["fitted"] = copy.deepcopy(new)
            self._fit(stages["fitted"], partial(stages["fitted"], context=context), x, y, ATTENTION_RATE)
        self._judge(stages, figures.attention, self.attention, partial(_attended, context), x, y)

    def _convert_feed_forward(self, figures: LayerFigures, z: Tensor, f: Tensor) -> None:
        dense, moe = self.dense.model.blocks[figures.layer].mlp, self.new_config.moe
        assert isinstance(dense, MLP)
        assert moe is not None
        rows, targets = z[: self.calibrating].flatten(0, 1), f[: self.calibrating].flatten(0, 1)
        new = splitting.split(dense, moe, rows, self.generator)
        few = rows[:256]
        with torch.no_grad():
            exact = dense(few)
        figures.split_error = float((splitting.all_experts(new, few) - exact).abs().max() / exact.abs().max())
        if not moe.has_bias:  # DeepSeekMoE-16B's layout, whose weights add up to 1: what scales them is in the experts
            with torch.no_grad():
                new.experts.down_proj.mul_(moe.num_experts_per_tok)
        splitting.aim_router(new, rows, targets)
        stages: dict[str, MoE] = {"routed": new}
        if self.settings.fit:
            stages["fitted"] = copy.deepcopy(new)
            self._fit(stages["fitted"], partial(_routed, stages["fitted"]), z, f, FEED_FORWARD_RATE)
        self._judge(stages, figures.feed_forward, self.feed_forward, _routed, z, f)
        last, judged = list(stages.values())[-1], z[self.calibrating :].flatten(0, 1)
        found = splitting.router_figures(last, splitting.energies(last, judged), judged)
        figures.caught, figures.caught_at_best, figures.load_cv = found.caught, found.best, found.load_cv

    def _fit(self, module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, rate: float) -> None:
        s, n = self.settings, self.calibrating
        fit(
            module,
            forward,
            x[:n],
            y[:n],
            steps=s.fit,
            batch=s.batch,
            rate=rate,
            dtype=self.dtype,
            generator=self.generator,
        )

    def _judge(
        self,
        stages: dict[str, M],
        figures: dict[str, float],
        kept: dict[str, list[nn.Module]],
        forward: Callable[[M, Tensor], Tensor],
        x: Tensor,
        y: Tensor,
    ) -> None:
        """Each stage's cosine with ``y`` on the held-out windows. A fit that did not help there is not taken."""
        n, before = self.calibrating, ""
        for stage, module in stages.items():
            out = outputs(partial(forward, module), x[n:], batch=self.settings.batch, dtype=self.dtype)
            figures[stage] = cosine(out, y[n:])
            if stage == "fitted" and figures[stage] < figures[before]:
                figures[stage], stages[stage] = figures[before], stages[before]
            kept.setdefault(stage, []).append(stages[stage])
            before = stage

    def _measure(self, report: Report, held: Sequence[str]) -> None:
        stages: list[tuple[str, str | None, str | None]] = [("dense", None, None)]
        stages += [(stage, stage, None) for stage in self.attention]
        last = list(self.attention)[-1] if self.attention else None
        stages += [(f"experts {stage}", last, stage) for stage in self.feed_forward]
        for done, (name, attention, feed_forward) in enumerate(stages):
            self.watch("measuring perplexity", done, len(stages))
            self.new = self._assembled(attention, feed_forward)
            context = min(EVALUATION_CONTEXT, self.config.max_position_embeddings)
            with autocast(self.device, self.dtype):
                found = perplexity(self.new, self.dense.tokenizer, held, context=context, stride=context, batch_size=4)
            report.perplexity[name], report.perplexity_tokens = found.perplexity, found.tokens
        self.watch("measuring perplexity", len(stages), len(stages))

    def _assembled(self, attention: str | None, feed_forward: str | None) -> Transformer:
        """The model at a stage: the dense one's tensors, but for what that stage puts in their places."""
        config = self.new_config if attention is not None or feed_forward is not None else self.config
        if attention is not None and feed_forward is None:
            config = config.model_copy(update={"moe": None})
        with torch.device("meta"):
            new = Transformer(config)
        ours, old = new.model, self.dense.model.model
        ours.embed_tokens, ours.norm, new.lm_head = old.embed_tokens, old.norm, self.dense.model.lm_head
        for i, (block, dense) in enumerate(zip(new.blocks, self.dense.model.blocks, strict=True)):
            block.input_layernorm = dense.input_layernorm
            block.post_attention_layernorm = dense.post_attention_layernorm
            block.self_attn = self.attention[attention][i] if attention is not None else dense.self_attn
            block.mlp = self.feed_forward[feed_forward][i] if feed_forward is not None else dense.mlp  # type: ignore[assignment]
        return new.eval()


def _attended(context: Context, layer: LatentAttention, x: Tensor) -> Tensor:
    out: Tensor = layer(x, context)
    return out


def _routed(layer: MoE, x: Tensor) -> Tensor:
    out: Tensor = layer(x, layer.route(x))
    return out


def _beginning(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)
