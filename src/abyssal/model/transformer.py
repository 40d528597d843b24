"""The whole model, for every generation: embedding, blocks, norm, head, and the MTP modules behind them.

Parameters are named as in the published checkpoints. ``model.layers`` holds the blocks and, as the checkpoints have it,
the MTP modules behind them (``model.layers.61`` of V3).

Shapes: B batch, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.errors import UserError
from abyssal.kernels.attention import Documents
from abyssal.model.attention import Context, SequencePart, build_mask
from abyssal.model.block import Block, MTPModule
from abyssal.model.cache import Cache
from abyssal.model.layers import Linear, RMSNorm
from abyssal.model.moe import MoE
from abyssal.model.paged import PagedCache, Ragged
from abyssal.model.rotary import rotary_tables
from abyssal.model.router import Recorder, Router


class Backbone(nn.Module):
    """What stands under ``model.`` in a checkpoint; driven by :class:`Transformer`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, depth = config.num_hidden_layers, config.mtp.num_nextn_predict_layers
        # Its weight is given: nn.Embedding would draw one, and on the meta device that imports torch's compiler.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(
            [*(Block(config, i) for i in range(n)), *(MTPModule(config, n + k) for k in range(depth))]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A DeepSeek model: ``Transformer(config)(tokens)`` gives logits.

    Built under ``torch.device("meta")`` it takes no memory. ``generator`` makes the initial weights reproducible; by
    default they are drawn from torch's own. All weights are normal with std ``initializer_range``, norms are 1.
    """

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.initialize(generator)

    @property
    def blocks(self) -> list[Block]:
        """The main model's blocks."""
        return [b for b in self.model.layers if isinstance(b, Block) and not isinstance(b, MTPModule)]

    @property
    def mtp_modules(self) -> list[MTPModule]:
        """The MTP modules, by depth."""
        return [b for b in self.model.layers if isinstance(b, MTPModule)]

    @property
    def routers(self) -> dict[int, Router]:
        """The routers by layer, MTP modules included."""
        return {b.layer: b.mlp.gate for b in (*self.blocks, *self.mtp_modules) if isinstance(b.mlp, MoE)}

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights anew, in the order of ``named_parameters``; norms become 1, biases 0."""
        if self.lm_head.weight.is_meta:
            return
        for name, parameter in self.named_parameters():
            draw_(name, parameter, self.config.initializer_range, generator)
        for router in self.routers.values():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.zero_()

    def forward(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        cache: Cache | PagedCache | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Logits [B, T, V] for ``tokens`` [B, T] int64, in the model's dtype (the autocast dtype under autocast).

        ``valid`` [B, T] bool marks real tokens in a batch padded on the left or right; positions count real tokens
        only. ``cache`` holds the tokens before these and takes these in; a paged one says which sequence each of the
        tokens [1, N] is of. ``recorder`` sees every router's decision.
        Raises UserError for a token id outside the vocabulary (checked on CPU tensors) or a full cache.
        """
        logits: Tensor = self.lm_head(self.hidden(tokens, valid=valid, cache=cache, recorder=recorder))
        return logits

    def hidden(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        cache: Cache | PagedCache | None = None,
        recorder: Recorder | None = None,
        recompute: bool = False,
        documents: Tensor | None = None,
        part: SequencePart | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after ``model.norm``, [B, T, D]: what the head and the first MTP module take.

        ``recompute`` drops activations and computes them again in the backward pass. ``documents`` int64 [B, T]: which
        document each token of packed sequences is in, a run of equal numbers being one, and of -1 padding; every
        document comes out as it would alone. ``part``: tokens are these of longer sequences, whose other tokens' keys
        and values it knows where to get; ``documents`` are those of the whole sequences. ``states`` [B, T, D]: what
        earlier blocks have made of the tokens, in place of embeddings, where this model has only later ones. Raises
        ValueError for documents or part together with a cache or ``valid``.
        """
        self._check_tokens(tokens)
        count = tokens.shape[1]
        if documents is not None or part is not None:
            if cache is not None or valid is not None:
                raise ValueError("documents, part: neither a cache nor valid goes with them")
            valid = _real(documents, part)
        if isinstance(cache, PagedCache):
            context = self.ragged_context(cache.ragged)
        elif cache is not None:
            cache.extend(count, valid)
            unturned = not cache.layers[0].expanded
            context = self._context(cache.length, count, cache.valid, tokens.device, cached=unturned)
        else:
            context = self._training_context(count, tokens.device, valid, documents, part)
        x = self.model.embed_tokens(tokens) if states is None else states
        out = self.through_blocks(x, context, cache=cache, valid=valid, recorder=recorder, recompute=recompute)
        if isinstance(cache, Cache):
            cache.length += count
        return out

    def through_blocks(
        self,
        x: Tensor,
        context: Context,
        *,
        cache: Cache | PagedCache | None = None,
        valid: Tensor | None = None,
        recorder: Recorder | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """What :meth:`hidden` computes from embeddings ``x`` [B, T, D] and what is known of their places."""
        for i, block in enumerate(self.blocks):
            layer_cache = cache.layers[i] if cache is not None else None
            x = block(x, context, cache=layer_cache, valid=valid, recorder=recorder, recompute=recompute)
        out: Tensor = self.model.norm(x)
        return out

    def mtp_hidden(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        recorder: Recorder | None = None,
        recompute: bool = False,
        documents: Tensor | None = None,
        part: SequencePart | None = None,
    ) -> list[Tensor]:
        """Hidden states of each MTP module, [B, T, D] each: depth k (from 1) at position i is for token i + k + 1.

        ``hidden`` [B, T, D] comes from :meth:`hidden` for ``tokens[:, :T]``; ``tokens`` [B, T + depth] go on for as
        many tokens as there are modules. Apply ``lm_head`` for logits. ``documents`` [B, T] as in :meth:`hidden`;
        whoever trains leaves out positions whose token i + k + 1 lies in another one. With a ``part`` of the T
        positions, ``hidden`` and what comes out are of these.
        """
        self._check_tokens(tokens)
        count = hidden.shape[1]
        if part is None and tokens.shape[1] < count + len(self.mtp_modules):
            raise ValueError(f"tokens: {tokens.shape[1]} a row are too few for {count} + {len(self.mtp_modules)}")
        valid = _real(documents, part)
        context = self._training_context(count, tokens.device, None, documents, part)
        out = []
        for k, module in enumerate(self.mtp_modules, start=1):
            embedding = self.model.embed_tokens(
                tokens[:, k : k + count] if part is None else tokens[:, part.places + k]
            )
            hidden = module(hidden, embedding, context, valid=valid, recorder=recorder, recompute=recompute)
            out.append(hidden)
        return out

    def draft_hidden(
        self, depth: int, hidden: Tensor, embedding: Tensor, context: Context, cache: PagedCache
    ) -> Tensor:
        """Hidden states [1, N, D] of the MTP module ``depth`` (from 0) in a ragged pass; ``lm_head`` makes them logits.

        Row i has the state ``hidden`` [1, N, D] of a position (:meth:`hidden` of the same pass, or what the module
        before gave) and the ``embedding`` [1, N, D] of the token behind it, and is for the token after that. The pass's
        positions are those of ``hidden``; the module keeps latents of its own, in the layer behind the main model's.
        """
        layer = cache.layers[self.config.num_hidden_layers + depth]
        out: Tensor = self.mtp_modules[depth](hidden, embedding, context, cache=layer)
        return out

    def mtp_logits(self, tokens: Tensor) -> list[Tensor]:
        """Logits of each MTP module for ``tokens`` [B, T + depth]: [B, T, V] each, position i for token i + k + 1."""
        count = tokens.shape[1] - len(self.mtp_modules)
        return [self.lm_head(h) for h in self.mtp_hidden(self.hidden(tokens[:, :count]), tokens)]

    def _context(
        self, start: int, count: int, valid: Tensor | None, device: torch.device, cached: bool = False
    ) -> Context:
        if valid is not None:
            positions = (valid.long().cumsum(1) - 1).clamp_min(0)
        else:
            positions = torch.arange(start + count, device=device).unsqueeze(0)
        separate = self.config.attention.kind == "separate_latents"
        mask, causal = build_mask(valid, start, count, device)
        key_rope = self._rope(positions) if cached and separate else None
        return Context(self._rope(positions[:, start:]), start, mask, causal, key_rope)

    def _training_context(
        self,
        count: int,
        device: torch.device,
        valid: Tensor | None,
        documents: Tensor | None,
        part: SequencePart | None,
    ) -> Context:
        """Without a cache."""
        if part is not None:
            return self._part_context(part, documents)
        return self._context(0, count, valid, device) if documents is None else self._packed_context(documents)

    def _part_context(self, part: SequencePart, documents: Tensor | None) -> Context:
        packed = None if documents is None else Documents.of(documents)
        positions = part.places.unsqueeze(0) if packed is None else part.places - packed.starts[:, part.places]
        rope = self._rope(positions)
        pieces = []
        for first, end in part.runs:
            keys, rows = (torch.arange(a, end, device=positions.device) for a in (0, first))
            mask = (keys <= rows.unsqueeze(1)).unsqueeze(0)
            if packed is not None:
                mask = mask & (keys >= packed.starts[:, first:end, None])
            pieces.append(Context(rope, 0, mask.unsqueeze(1), causal=False))
        return Context(rope, 0, None, causal=True, documents=packed, part=part, pieces=tuple(pieces))

    def _packed_context(self, documents: Tensor) -> Context:
        packed = Documents.of(documents)
        positions = torch.arange(documents.shape[1], device=documents.device) - packed.starts
        return Context(self._rope(positions), 0, None, causal=True, documents=packed)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        a = self.config.attention
        weight = getattr(self.lm_head, "weight", None)
        if weight is None:  # a stage of a pipeline without the head
            weight = next(self.parameters())
        return rotary_tables(self.config.rope, a.rotary_dim, positions, weight.dtype)

    def ragged_context(self, ragged: Ragged) -> Context:
        """What attention needs to know of the tokens of a ragged pass."""
        rope = self._rope(ragged.positions)
        pieces = []
        for piece in ragged.pieces:
            count, key_rope = piece.end - piece.start, None
            mask, causal = build_mask(None, piece.length - count, count, ragged.positions.device)
            own = (rope[0][:, piece.start : piece.end], rope[1][:, piece.start : piece.end])
            if self.config.attention.kind == "separate_latents":
                key_rope = self._rope(torch.arange(piece.length, device=ragged.positions.device).unsqueeze(0))
            pieces.append(Context(own, piece.length - count, mask, causal, key_rope))
        return Context(rope, 0, None, False, pieces=tuple(pieces))

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.device.type != "cpu" or tokens.numel() == 0 or torch.compiler.is_compiling():
            return  # on a GPU the check would stop the device; there an id outside fails in the embedding
        low, high = tokens.aminmax()
        if low < 0 or high >= self.config.vocab_size:
            bad = int(low) if low < 0 else int(high)
            raise UserError(f"tokens: id {bad} is outside the vocabulary of {self.config.vocab_size}")


def draw_(name: str, weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """First values of the parameter ``name``, in place."""
    if name.endswith("norm.weight"):
        weight.fill_(1.0)
    elif name.endswith(".bias"):
        weight.zero_()
    else:
        weight.normal_(0.0, std, generator=generator)


def _real(documents: Tensor | None, part: SequencePart | None) -> Tensor | None:
    """[B, T] (of a part, its positions): which tokens are no padding."""
    if documents is None:
        return None
    return (documents if part is None else documents[:, part.places]) >= 0
