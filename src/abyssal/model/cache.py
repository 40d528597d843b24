"""What generation keeps of past tokens: latents for MLA, keys and values for MHA.

MLA's cache holds kv_lora_rank + qk_rope_head_dim values a token and layer and nothing else (V2 paper §2.1.3). The
expanded form, every head's key and value, exists so that tests and benchmarks can compare.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.config import MHAConfig, MLAConfig, ModelConfig
from abyssal.errors import UserError


class LayerCache:
    """One layer's past: tensors [B, S, …] filled up to a length that the whole :class:`Cache` shares."""

    def __init__(self, tensors: list[Tensor], expanded: bool) -> None:
        self.tensors = tensors
        self.expanded = expanded

    def append(self, start: int, *new: Tensor) -> list[Tensor]:
        """Writes ``new`` [B, T, …] behind position ``start`` and returns all so far, [B, start + T, …] each."""
        end = start + new[0].shape[1]
        for tensor, values in zip(self.tensors, new, strict=True):
            tensor[:, start:end] = values
        return [tensor[:, :end] for tensor in self.tensors]


class Cache:
    """A batch's past for all layers, with room for ``max_length`` tokens a sequence.

    ``valid`` [B, S] says which slots hold a real token (prompts of different lengths are padded); ``None`` as long as
    all do. ``expanded`` keeps every head's keys and values instead of latents (for comparison only).
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        expanded: bool = False,
    ) -> None:
        self.max_length = max_length
        self.length = 0
        self.valid: Tensor | None = None
        shapes = cached_shapes(config, expanded)
        self.layers = [
            LayerCache([torch.zeros(batch, max_length, *s, dtype=dtype, device=device) for s in shapes], expanded)
            for _ in range(config.num_hidden_layers)
        ]

    def extend(self, count: int, valid: Tensor | None) -> None:
        """Makes room for ``count`` more tokens, of which ``valid`` [B, count] are real. Raises UserError when full."""
        if self.length + count > self.max_length:
            raise UserError(f"cache: {self.length} + {count} tokens are more than it has room for ({self.max_length})")
        if valid is None and self.valid is None:
            return
        batch = self.layers[0].tensors[0].shape[0]
        device = self.layers[0].tensors[0].device
        past = self.valid if self.valid is not None else torch.ones(batch, self.length, dtype=torch.bool, device=device)
        new = valid if valid is not None else torch.ones(batch, count, dtype=torch.bool, device=device)
        self.valid = torch.cat((past, new.to(device)), dim=1)

    @property
    def nbytes(self) -> int:
        """Bytes of storage held, measured on the tensors."""
        return sum(t.untyped_storage().nbytes() for layer in self.layers for t in layer.tensors)


def cached_shapes(config: ModelConfig, expanded: bool = False) -> list[tuple[int, ...]]:
    """Shapes a token of what a layer caches."""
    a = config.attention
    if isinstance(a, MHAConfig):
        return [(a.num_key_value_heads, a.head_dim)] * 2
    if expanded:
        return [(a.num_attention_heads, a.qk_head_dim), (a.num_attention_heads, a.v_head_dim)]
    if isinstance(a, MLAConfig):
        return [(a.kv_lora_rank + a.qk_rope_head_dim,)]
    return [(a.k_lora_rank,), (a.v_lora_rank,)]
