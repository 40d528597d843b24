"""What a model's routers do with texts: every decision for every token, in arrays small enough to keep.

:func:`read_texts` cuts texts into windows, :func:`look` runs a model over them. What the decisions say is measured in
:mod:`abyssal.analysis.specialisation` and shown by :mod:`abyssal.analysis.lens_page`.

Each document is cut into windows that do not overlap, so every token is seen once, by a model that has what stands
before it in its window::

    document   BOS a b c d e f g      window 4
    windows    BOS a b c | d e f g

BOS stands only where a document begins (and only for tokenizers whose models expect it); it is a token like others in
all that follows. An MTP module decides for a token once it is given the next ones, so it has no decision for the last
tokens of a document.

Shapes: N tokens of all texts, E experts, C choices a token (K experts a token, times the segments where the study
variant cuts tokens), B windows of a batch, T tokens of a window, D hidden.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.data.corpus import SUFFIXES, documents
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.model import Transformer
from abyssal.model.modes import evaluating
from abyssal.model.router import Routing

DEFAULT_WINDOW = 2048
DEFAULT_TOKENS = 4096
NONE = -1  # in indices: no decision here
_BATCH_TOKENS = 4096
_CHARACTERS_A_TOKEN = 64  # more than text has

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]


@dataclass(frozen=True)
class Text:
    """One text, which counts as one domain: what it is called, its documents and tokens, and whether some of it was
    left out because it is longer than asked for."""

    name: str
    documents: int
    tokens: int
    cut: bool


@dataclass(frozen=True)
class Texts:
    """The tokens of all texts, one after the other. All arrays are [N]: token ids, the document a token is in (counted
    through all texts), the text, and its position in its window, as the model sees it."""

    texts: list[Text]
    window: int
    ids: Integers
    document: Integers
    text: Integers
    position: Integers

    def windows(self) -> list[tuple[int, int]]:
        """Each window's first token and the one behind its last."""
        starts = np.flatnonzero(self.position == 0).tolist()
        return list(zip(starts, [*starts[1:], len(self.ids)], strict=True))


@dataclass(frozen=True)
class LayerRouting:
    """One MoE layer's decisions. Rows without a decision (MTP modules at the end of a document) hold NONE and zeros.

    ``indices`` [N, C] int16 and ``weights`` [N, C] float32, best first (segment by segment, where tokens are cut);
    ``moved`` [N] uint8: how many of the choices are experts that the token would not go to without the bias (None: the
    router has no bias); ``shared`` [N] float32: |shared| / (|shared| + |routed|), the part that the shared experts have
    in the norms of what is added up (NaN where both are zero); ``cosine`` [N] float32 between the two (NaN without one
    of them).
    """

    layer: int
    mtp: int
    """Which MTP module, from 1; 0 for a layer of the main model."""
    experts: int
    segments: int
    indices: NDArray[np.int16]
    weights: Floats
    moved: NDArray[np.uint8] | None
    shared: Floats
    cosine: Floats

    @property
    def seen(self) -> NDArray[np.bool_]:
        """[N]: which tokens have a decision."""
        out: NDArray[np.bool_] = self.indices[:, 0] != NONE
        return out


Progress = Callable[[int, int], None]
"""Called with the tokens done and all of them."""


def moe_layers(config: ModelConfig) -> list[int]:
    """The layers with experts, MTP modules counted on."""
    return [i for i in range(config.num_hidden_layers + config.mtp.num_nextn_predict_layers) if config.is_moe_layer(i)]


def choose_window(configs: Sequence[ModelConfig], asked: int | None, field: str = "window") -> int:
    """The window for models with ``configs``: ``asked``, or DEFAULT_WINDOW as far as their contexts reach. Raises
    UserError."""
    longest = min(config.max_position_embeddings for config in configs)
    if asked is None:
        return min(DEFAULT_WINDOW, longest)
    if not 1 <= asked <= longest:
        raise UserError(f"{field}: {asked} is not between 1 and the model's max_position_embeddings {longest}")
    return asked


def check_sources(sources: Sequence[str | Path]) -> None:
    """Raises UserError for a text that is missing, of another kind, a folder, or given twice, without reading any."""
    full = [os.path.normpath(source) for source in sources]
    for source in full:
        if full.count(source) > 1:
            raise UserError(f"{source}: given twice; each text is one domain")
        if Path(source).is_dir():
            raise UserError(f"{source}: a folder; expected a file (several are several texts)")
        documents(source)


def read_texts(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    window: int,
    limit: int | None = DEFAULT_TOKENS,
    *,
    field: str = "text",
) -> Texts:
    """The first ``limit`` tokens (None: all) of each of ``sources``: files as :mod:`abyssal.data.corpus` reads them, or
    names of its built-in corpora; ``field`` holds the text of .jsonl and .parquet. Raises UserError as
    :func:`check_sources` does, and for a text that is empty or damaged."""
    check_sources(sources)
    if limit is not None and limit < 1:
        raise UserError(f"tokens: {limit} is not valid; expected a whole number from 1")
    texts: list[Text] = []
    parts: list[list[int]] = []  # a document's ids each
    of: list[int] = []
    for number, (source, name) in enumerate(zip(sources, _names(sources), strict=True)):
        found, cut = _read(documents(source, field=field), tokenizer, limit)
        texts.append(Text(name, len(found), sum(map(len, found)), cut))
        parts += found
        of += [number] * len(found)
    lengths = np.array([len(part) for part in parts])
    return Texts(
        texts,
        window,
        ids=np.array([token for part in parts for token in part], np.int32),
        document=np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
        text=np.repeat(np.array(of, np.int32), lengths),
        position=np.concatenate([np.arange(length, dtype=np.int32) % window for length in lengths]),
    )


def _names(sources: Sequence[str | Path]) -> list[str]:
    """A name each: the file's, without folder and ending where that tells them apart."""
    full = [os.path.normpath(source) for source in sources]
    short = []
    for source in full:
        name = Path(source).name
        ending = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), "")
        short.append(name[: len(name) - len(ending)] or name)
    return short if len(set(short)) == len(short) else full


def _read(source: Iterable[str], tokenizer: Tokenizer, limit: int | None) -> tuple[list[list[int]], bool]:
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    found: list[list[int]] = []
    room = limit
    for text in source:
        if room is not None and room <= 0:
            return found, True
        ids = bos + _encode(tokenizer, text, room)
        found.append(ids[:room])
        if room is not None:
            if len(ids) > room:
                return found, True
            room -= len(ids)
    return found, False


def _encode(tokenizer: Tokenizer, text: str, enough: int | None) -> list[int]:
    """The ids of ``text``; where it is much longer than ``enough`` tokens, more than that of its first ids."""
    if enough is not None and len(text) > (enough + 1) * _CHARACTERS_A_TOKEN:
        ids = tokenizer.encode(text[: (enough + 1) * _CHARACTERS_A_TOKEN])
        if len(ids) > enough + _CHARACTERS_A_TOKEN:  # else a cut word could be among them
            return ids
    return [token for ids in tokenizer.encode_batch(list(tokenizer.pieces(text))) for token in ids]


@torch.inference_mode()
def look(model: Transformer, texts: Texts, progress: Progress | None = None) -> dict[int, LayerRouting]:
    """What each router of ``model`` decides for ``texts``, by layer, MTP modules included.

    The model runs on its own device, in eval mode, and is as before afterwards. Raises UserError for a model without
    MoE layers, a window longer than its context, and tokens that are not in its vocabulary.
    """
    config = model.config
    if not model.routers:
        raise UserError("the model has no MoE layers: there is no routing to look at")
    choose_window([config], texts.window)
    if texts.ids.max() >= config.vocab_size:
        name = texts.texts[texts.text[texts.ids.argmax()]].name
        raise UserError(
            f"tokenizer: token id {texts.ids.max()} in {name} is outside the model's vocabulary of "
            f"{config.vocab_size}; expected the tokenizer that the model was trained with"
        )
    depth = len(model.mtp_modules)
    gathered = _Gatherer(model, len(texts.ids), depth)
    device = model.model.embed_tokens.weight.device
    with evaluating(model):
        # The longest first: memory runs out at the start or not at all, and little is padded.
        windows = sorted(texts.windows(), key=lambda window: window[0] - window[1])
        done = 0
        while windows:
            width = windows[0][1] - windows[0][0]
            count = max(_BATCH_TOKENS // width, 1)
            batch, windows = windows[:count], windows[count:]
            tokens, rows = _padded(texts, batch, width, depth)
            gathered.rows = rows
            tokens = tokens.to(device)
            hidden = model.hidden(tokens[:, :width], recorder=gathered)
            if any(layer >= config.num_hidden_layers for layer in model.routers):
                model.mtp_hidden(hidden, tokens, recorder=gathered)
            done += sum(end - start for start, end in batch)
            if progress is not None:
                progress(done, len(texts.ids))
    return gathered.layers


def _padded(texts: Texts, batch: list[tuple[int, int]], width: int, depth: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, width + depth], on the right those that follow in the document, then zeros; and which of the N tokens
    each is (-1: none). Padding needs no mask: attention is causal, so nothing real ever looks to the right. (A window
    shorter than the batch is its document's last, so nothing of the document follows on it.)"""
    tokens = torch.zeros(len(batch), width + depth, dtype=torch.long)
    rows = torch.full(tokens.shape, -1)
    for row, (start, end) in enumerate(batch):
        behind = texts.document[end : end + depth] == texts.document[start]
        count = end - start + int(behind.sum())
        tokens[row, :count] = torch.from_numpy(texts.ids[start : start + count]).long()
        rows[row, :count] = torch.arange(start, start + count)
    return tokens, rows


class _Gatherer:
    """An :class:`abyssal.model.router.OutputRecorder` that keeps what :class:`LayerRouting` says."""

    rows: Tensor
    """[B, T + depth]: which of the N tokens each of the batch's is, -1 for padding; set before each forward pass."""

    def __init__(self, model: Transformer, count: int, depth: int) -> None:
        self.depth = depth
        moe, main = model.config.moe, model.config.num_hidden_layers
        assert moe is not None
        self.routers = model.routers
        choices = moe.num_experts_per_tok * moe.segments
        self.layers = {
            layer: LayerRouting(
                layer,
                mtp=max(layer - main + 1, 0),
                experts=moe.n_routed_experts,
                segments=moe.segments,
                indices=np.full((count, choices), NONE, np.int16),
                weights=np.zeros((count, choices), np.float32),
                moved=None if router.e_score_correction_bias is None else np.zeros(count, np.uint8),
                shared=np.zeros(count, np.float32),
                cosine=np.zeros(count, np.float32),
            )
            for layer, router in self.routers.items()
        }

    def record(self, layer: int, routing: Routing) -> None:
        kept = self.layers[layer]
        here, to = self._where(kept)

        def of_token(x: Tensor) -> NDArray[Any]:
            out: NDArray[Any] = x.reshape(*here.shape, -1).cpu()[here].numpy()
            return out

        kept.indices[to] = of_token(routing.indices)
        kept.weights[to] = of_token(routing.weights)
        if kept.moved is not None:
            unbiased = self.routers[layer].select(routing.scores, biased=False)
            moved = (routing.indices.unsqueeze(-1) != unbiased.unsqueeze(-2)).all(-1)
            kept.moved[to] = of_token(moved).sum(-1)

    def record_outputs(self, layer: int, routed: Tensor, shared: Tensor | None) -> None:
        kept = self.layers[layer]
        here, to = self._where(kept)
        dtype = torch.promote_types(routed.dtype, torch.float32)
        b = routed.to(dtype)
        a = torch.zeros_like(b) if shared is None else shared.to(dtype)
        norm, other = a.norm(dim=-1), b.norm(dim=-1)
        kept.shared[to] = (norm / (norm + other)).cpu()[here].numpy()
        kept.cosine[to] = ((a * b).sum(-1) / (norm * other)).cpu()[here].numpy()

    def _where(self, kept: LayerRouting) -> tuple[Tensor, NDArray[np.int64]]:
        """Which of the batch's tokens count, [B, T] bool, and where they go."""
        width = self.rows.shape[1] - self.depth
        here = self.rows[:, :width] >= 0
        if kept.mtp:  # module k is given the k-th token from here
            here = here & (self.rows[:, kept.mtp : kept.mtp + width] >= 0)
        return here, self.rows[:, :width][here].numpy()
