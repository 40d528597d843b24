"""The lens page's data, its measures as JSON, and the text of tokens as a page or a terminal can show it.

Arrays travel as base64 of little-endian integers, small enough for models of hundreds of experts: indices as uint16
(65535: no decision), weights as uint16 steps of the layer's largest weight / 65535, lifts as bytes of their logarithm.
"""

from __future__ import annotations

import base64
import codecs
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abyssal.analysis.lens import LayerRouting, Texts
from abyssal.analysis.specialisation import Drift, Measures, Uses, drift, measure, most_changed, uses
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError

_LIFT_OCTAVES = 4  # lifts from 1/16 to 16 in 254 steps of their logarithm
_CONTEXT = 8  # tokens on either side


@dataclass(frozen=True)
class Lens:
    """All that was found: of one model, and of another beside it where two are compared."""

    name: str
    texts: Texts
    routing: dict[int, LayerRouting]
    measures: dict[int, Measures]
    uses: dict[int, Uses]
    other: Other | None = None


@dataclass(frozen=True)
class Other:
    """The model that is compared, and how far it lies from the first."""

    name: str
    routing: dict[int, LayerRouting]
    measures: dict[int, Measures]
    drifts: dict[int, Drift]


def build_lens(
    name: str,
    texts: Texts,
    routing: dict[int, LayerRouting],
    compared: tuple[str, dict[int, LayerRouting]] | None = None,
    seed: int = 0,
) -> Lens:
    """Measures what :func:`abyssal.analysis.lens.look` gave, where one of the texts' tokens has a decision. Raises
    UserError where the two models' layers or experts differ."""
    routing = {layer: found for layer, found in routing.items() if found.seen.any()}
    other = None
    if compared is not None:
        their_name, theirs = compared
        theirs = {layer: found for layer, found in theirs.items() if found.seen.any()}
        _check_alike(name, routing, their_name, theirs)
        measured = {layer: measure(found, texts, seed) for layer, found in theirs.items()}
        drifts = {layer: drift(routing[layer], theirs[layer]) for layer in routing}
        other = Other(their_name, theirs, measured, drifts)
    measures = {layer: measure(found, texts, seed) for layer, found in routing.items()}
    return Lens(name, texts, routing, measures, {layer: uses(found, texts) for layer, found in routing.items()}, other)


def _check_alike(name: str, ours: dict[int, LayerRouting], other: str, theirs: dict[int, LayerRouting]) -> None:
    for what, mine, yours in (
        ("MoE layers", _joined(ours), _joined(theirs)),
        ("experts a layer", {r.experts for r in ours.values()}, {r.experts for r in theirs.values()}),
        ("experts a token", {r.indices.shape[1] for r in ours.values()}, {r.indices.shape[1] for r in theirs.values()}),
    ):
        if mine != yours:
            left, right = (x if isinstance(x, str) else ", ".join(map(str, sorted(x))) for x in (mine, yours))
            raise UserError(
                f"{other} has other {what} than {name}: {right}, not {left}; routing of the two cannot be compared"
            )


def _joined(routing: dict[int, LayerRouting]) -> str:
    return " ".join(map(str, sorted(routing)))


def measures_json(lens: Lens, tokenizer: Tokenizer) -> dict[str, Any]:
    """All measures for programs: lists and numbers, NaN as None; contexts as text."""
    texts = lens.texts
    out: dict[str, Any] = {
        "kind": "abyssal lens",
        "model": lens.name,
        "window": texts.window,
        "texts": [asdict(text) for text in texts.texts],
        "layers": [],
    }
    for layer, found in lens.routing.items():
        row = {"layer": layer, "mtp_module": found.mtp or None, **_plain(lens.measures[layer])}
        row["experts"] = [_expert(lens, tokenizer, layer, expert) for expert in range(found.experts)]
        if lens.other is not None:
            row["other"] = _plain(lens.other.measures[layer])
            row["drift"] = _drift(lens.other.drifts[layer])
        out["layers"].append(row)
    if lens.other is not None:
        out["compared_with"] = lens.other.name
        changed = most_changed(list(lens.other.drifts.values()))
        out["most_changed"] = [{"token": n, "context": _context(texts, tokenizer, n)} for n in changed]
    return out


def _plain(measures: Measures) -> dict[str, Any]:
    out = asdict(measures)
    for key in ("load", "used", "together"):
        out[key] = out[key].tolist()
    if measures.lift is not None:
        out["lift"] = [[None if math.isnan(x) else x for x in row] for row in measures.lift.tolist()]
    return out


def _drift(found: Drift) -> dict[str, float]:
    return {key: value for key, value in vars(found).items() if key != "by_token"}


def _expert(lens: Lens, tokenizer: Tokenizer, layer: int, expert: int) -> dict[str, Any]:
    found, where = lens.routing[layer], lens.uses[layer]
    contexts = [
        {
            "token": n,
            "weight": float(found.weights[n][found.indices[n] == expert].max()),
            "context": _context(lens.texts, tokenizer, n),
        }
        for n in where.positions[expert].tolist()
        if n >= 0
    ]
    pairs = zip(where.ids[expert].tolist(), where.times[expert].tolist(), strict=True)
    frequent = [{"id": i, "text": label(tokenizer, i), "times": times} for i, times in pairs if i >= 0]
    return {"load": int(lens.measures[layer].load[expert]), "contexts": contexts, "frequent": frequent}


def _context(texts: Texts, tokenizer: Tokenizer, n: int) -> list[str]:
    """The text before the token, the token, the text behind it, all within its document."""
    start, end = (
        np.searchsorted(texts.document, texts.document[n], "left"),
        np.searchsorted(texts.document, texts.document[n], "right"),
    )
    before, behind = max(int(start), n - _CONTEXT), min(int(end), n + 1 + _CONTEXT)
    spans = ((before, n), (n, n + 1), (n + 1, behind))
    return [tokenizer.decode(texts.ids[a:b].tolist(), skip_special=False) for a, b in spans]


def page_data(lens: Lens, tokenizer: Tokenizer) -> dict[str, Any]:
    """What pages/lens.js shows."""
    texts = lens.texts
    distinct = np.unique(texts.ids)
    starts = np.flatnonzero(np.diff(texts.document, prepend=-1))
    return {
        "model": visible(lens.name),
        "other": None if lens.other is None else visible(lens.other.name),
        "window": texts.window,
        "texts": [{**asdict(text), "name": visible(text.name)} for text in texts.texts],
        "documents": [[int(texts.text[start]), int(start)] for start in starts],
        "count": len(texts.ids),
        "ids": _packed(texts.ids, "<i4"),
        "positions": _packed(texts.position, "<i4"),
        "pieces": pieces(texts, tokenizer),
        "labels": {str(i): label(tokenizer, i) for i in distinct.tolist()},
        "layers": [_layer_data(lens, layer) for layer in lens.routing],
        "changed": most_changed(list(lens.other.drifts.values())) if lens.other is not None else [],
    }


def _layer_data(lens: Lens, layer: int) -> dict[str, Any]:
    found, measures = lens.routing[layer], lens.measures[layer]
    out = {
        "name": layer_name(found),
        "experts": found.experts,
        "choices": found.indices.shape[1],
        "segments": found.segments,
        **_choices(found),
        "moved": None if found.moved is None else _packed(found.moved, "u1"),
        "shared": None if measures.cosine is None else _packed(np.nan_to_num(found.shared * 255), "u1"),
        "used": measures.used.tolist(),
        "lift": None if measures.lift is None else _packed(_lift_steps(measures.lift), "u1"),
        "top": _packed(lens.uses[layer].positions, "<i4"),
        "frequent": _packed(lens.uses[layer].ids, "<i4"),
        "times": _packed(lens.uses[layer].times, "<i4"),
        "measures": _figures(measures),
    }
    if lens.other is not None:
        out["other"] = _choices(lens.other.routing[layer]) | {
            "load": lens.other.measures[layer].load.tolist(),
            "measures": _figures(lens.other.measures[layer]),
            "drift": _drift(lens.other.drifts[layer]),
        }
    return out


def _choices(found: LayerRouting) -> dict[str, Any]:
    largest = float(found.weights.max())
    steps = np.rint(found.weights * (65535 / largest)) if largest > 0 else np.zeros_like(found.weights)
    return {"indices": _packed(found.indices, "<i2"), "weights": _packed(steps, "<u2"), "largest": largest}


def _figures(measures: Measures) -> dict[str, Any]:
    kept = ("entropy", "evenness", "token", "position", "domain", "shared", "cosine", "moved_tokens", "moved_choices")
    return {**{key: value for key, value in asdict(measures).items() if key in kept}, **vars(measures.balance)}


def _lift_steps(lift: NDArray[np.float64]) -> NDArray[np.float64]:
    """Above the diagonal, row by row: 0 for none, 1 for 2^-4 or less, 255 for 2^4 or more."""
    values = lift[np.triu_indices(len(lift), 1)]
    with np.errstate(divide="ignore"):
        steps = np.clip(np.log2(values) / _LIFT_OCTAVES, -1, 1) * 127 + 128
    return np.where(np.isnan(values), 0, np.rint(steps))


def _packed(array: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array).astype(dtype).tobytes()).decode("ascii")


def layer_name(found: LayerRouting) -> str:
    """``3``, or ``4 (MTP)`` for a module's."""
    return f"{found.layer} (MTP)" if found.mtp else str(found.layer)


def pieces(texts: Texts, tokenizer: Tokenizer) -> list[str]:
    """What each token is shown as, so that all of them in a row look like the text. A character whose bytes are spread
    over tokens stands with the one that begins it; the tokens that only go on with it have an empty string."""
    out = []
    for start, end in _documents(texts):
        shown = [""] * (end - start)
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        begun = None  # the token whose last character is not complete yet
        for i, token in enumerate(texts.ids[start:end].tolist()):
            if tokenizer.is_special(token):
                shown[i] = visible(utf8.decode(b"", final=True))
                if begun is not None:
                    shown[begun], shown[i] = shown[begun] + shown[i], ""
                utf8.reset()
                begun = None
                shown[i] = visible(tokenizer.token_bytes(token).decode("utf-8", "replace"))
                continue
            text = utf8.decode(tokenizer.token_bytes(token))
            if text and begun is not None:
                shown[begun] += visible(text[0])
                text, begun = text[1:], None
            shown[i] += visible(text)
            if begun is None and utf8.getstate()[0]:
                begun = i
        if begun is not None:
            shown[begun] += visible(utf8.decode(b"", final=True))
        out += shown
    return out


def _documents(texts: Texts) -> Sequence[tuple[int, int]]:
    starts = np.flatnonzero(np.diff(texts.document, prepend=-1)).tolist()
    return list(zip(starts, [*starts[1:], len(texts.ids)], strict=True))


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself, on one line: ``␣the``, ``⏎``; one that is no whole characters as its bytes, ``<E2 80>``."""
    data = tokenizer.token_bytes(token)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return f"<{data.hex(' ').upper()}>"
    return visible(text).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def visible(text: str) -> str:
    """``text`` with what cannot be seen, or would turn what stands around it, as signs: control characters as their
    pictures (``␀``), others as ``[U+202E]``. Line feeds, tabs and joiners within words stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else _sign(c) for c in text)


def _sign(c: str) -> str:
    code = ord(c)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    # Variation selectors, marks and joiners shape letters and emoji; foreign blanks are blanks.
    if unicodedata.category(c) in ("Zs", "Mn") or c in "\u200c\u200d" or 0xE0020 <= code <= 0xE007F:
        return c
    return f"[U+{code:04X}]"
