"""``abyssal lens``: which expert handles what in a text, as a table and as one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.cli.loaded import AllowMissingOption, DeviceOption, DtypeOption, ModelArgument, WeightsOption, load_model

if TYPE_CHECKING:
    from abyssal.analysis.lens import LayerRouting, Texts
    from abyssal.analysis.lens_page import Lens
    from abyssal.analysis.specialisation import Information
    from abyssal.config import ModelConfig
    from abyssal.data.tokenizer import Tokenizer
    from abyssal.model import Transformer


def lens_command(
    model: ModelArgument,
    text: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="Text to look at: .txt, .jsonl or .parquet; several: a domain each."),
    ],
    compare: Annotated[
        str | None, typer.Option(metavar="MODEL2", help="A second model: how far its routing lies from the first's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page. Default: lens.html in the run folder, else in this one.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the measures as JSON too.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each text that are looked at, from its start.")] = 4096,
    window: Annotated[
        int | None, typer.Option(help="Tokens that the model sees at once; default 2048 or its longest.")
    ] = None,
    field: Annotated[
        str, typer.Option(help="The field or column that holds the text of .jsonl and .parquet.")
    ] = "text",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    device: DeviceOption = "auto",
    allow_missing: AllowMissingOption = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """See which experts handle what in a text: a page with every token's choices, and measures by layer."""
    import json

    from abyssal.analysis.lens import check_sources, choose_window, read_texts
    from abyssal.analysis.lens_page import build_lens, measures_json, page_data
    from abyssal.analysis.page import render_page, to_json
    from abyssal.checkpoint import write_text
    from abyssal.cli.files import check_free, write_page
    from abyssal.cli.show import printable, say
    from abyssal.errors import UserError

    names = [model] if compare is None else [model, compare]
    check_sources(text)
    configs = [_config(name) for name in names]
    page = out or (Path(model) / "lens.html" if _is_run(model) else Path("lens.html"))
    check_free(page, "--out", b'<main id="abyssal-lens">')
    if json_file is not None:
        check_free(json_file, "--json", b'"kind": "abyssal lens"')
        if json_file.resolve() == page.resolve():
            raise UserError(f"--json: {json_file} is the page itself; choose another file")
    if tokens < 1:
        raise UserError(f"--tokens: {tokens} is not valid; expected a whole number from 1")
    length = choose_window(configs, window, "--window")

    options: dict[str, Any] = {"dtype": dtype, "weights": weights, "device": device}
    network, tokenizer = load_model(model, allow_missing=allow_missing, **options)
    texts = read_texts(text, tokenizer, length, tokens, field=field)
    routing = _look(network, texts, model)
    compared = None
    if compare is not None:
        del network  # before the next one is loaded
        network, other = load_model(compare, allow_missing=allow_missing, **options)
        _check_same(model, compare, texts, read_texts(text, other, length, tokens, field=field), tokenizer, other)
        compared = compare, _look(network, texts, compare)
    lens = build_lens(model, texts, routing, compared)
    _show(lens)
    data = page_data(lens, tokenizer)
    title = f"Routing of {data['model']}" + (f" and {data['other']}" if compare is not None else "")
    if json_file is not None:
        write_text(json_file, json.dumps(json.loads(to_json(measures_json(lens, tokenizer))), indent=1) + "\n")
        say(f"measures  {printable(str(json_file))}")
    write_page(page, "--out", render_page("lens", title, data), "page", open_)


def _is_run(model: str) -> bool:
    from abyssal.checkpoint.run import MANIFEST

    return (Path(model) / MANIFEST).is_file()


def _config(model: str) -> ModelConfig:
    """Its config, before gigabytes are loaded. Raises UserError where there is nothing to look at."""
    import os

    from abyssal.analysis.lens import moe_layers
    from abyssal.config import preset_names
    from abyssal.errors import UserError
    from abyssal.loading import find, find_config

    if not os.path.lexists(model) and "/" not in model:  # no name on the hub either
        if model in preset_names():
            raise UserError(
                f"{model}: a preset has neither weights nor a tokenizer; expected a run (abyssal train makes one), "
                "a model folder or a name on the hub"
            )
        find(model)  # says that there is nothing of this name
    config = find_config(model)
    if not moe_layers(config):
        raise UserError(f"{model}: a model without MoE layers; there is no routing to look at")
    return config


def _check_same(name: str, other: str, ours: Texts, theirs: Texts, a: Tokenizer, b: Tokenizer) -> None:
    """Both models must be given the same tokens, and mean the same by them. (Special tokens that the texts do not
    hold may differ: fine-tuning adds some.)"""
    import numpy as np

    from abyssal.errors import UserError

    if not np.array_equal(ours.ids, theirs.ids) or any(
        a.token_bytes(token) != b.token_bytes(token) for token in np.unique(ours.ids).tolist()
    ):
        raise UserError(f"{other} has another tokenizer than {name}; routing of the two cannot be compared")


def _look(network: Transformer, texts: Texts, name: str) -> dict[int, LayerRouting]:
    from abyssal.analysis.lens import look

    with _bar(name) as progress:
        return look(network, texts, progress)


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None] | None]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from abyssal.cli.show import printable

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("tokens")
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        task = bars.add_task(escape(printable(name)), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _show(lens: Lens) -> None:
    from abyssal.analysis.lens_page import layer_name
    from abyssal.cli.show import printable, say, show_table, table

    for text in lens.texts.texts:
        several = f" in {text.documents:,} documents" if text.documents > 1 else ""
        left = "; the rest of the text is left out (--tokens)" if text.cut else ""
        say(f"{printable(text.name)}: {text.tokens:,} tokens{several}{left}")
    for name, measures in (
        (lens.name, lens.measures),
        *([(lens.other.name, lens.other.measures)] if lens.other is not None else []),
    ):
        head = ("load CV", "MaxVio", "idle", "entropy", "of most", "token", "position", "text", "shared", "moved")
        out = table("layer", *head)
        for layer, m in measures.items():
            out.add_row(
                layer_name(lens.routing[layer]),
                *(f"{m.balance.cv:.3f}", f"{m.balance.max_vio:.3f}", str(m.balance.dead)),
                *(f"{m.entropy:.3f}", f"{m.evenness:.1%}"),
                *(_bits(m.token), _bits(m.position), _bits(m.domain)),
                "–" if m.cosine is None else f"{m.shared:.1%}",
                "–" if m.moved_tokens is None else f"{m.moved_tokens:.1%}",
            )
        say(f"\n{printable(name)}")
        show_table(out)
    say(
        "\nentropy of the experts' use in bits, and of the most there can be; token, position, text: bits that\n"
        "each tells about the expert, above chance (–: nothing to tell); shared: the shared experts' part in\n"
        "the norms of what the layer adds; moved: tokens whose experts the bias changed"
    )
    if lens.other is not None:
        out = table("drift, layer", "same experts", "same first", "total variation", "divergence", "weight change")
        for layer, d in lens.other.drifts.items():
            shares = f"{d.overlap:.1%}", f"{d.same_first:.1%}", f"{d.variation:.3f}", f"{d.divergence:.4f}"
            out.add_row(layer_name(lens.routing[layer]), *shares, f"{d.weight_change:.3f}")
        say("")
        show_table(out)
    say("")


def _bits(information: Information | None) -> str:
    # No share: the texts could not have told anything, as where no token comes twice.
    return "–" if information is None or information.share is None else f"{information.bits:.3f}"
