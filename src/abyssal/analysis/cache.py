"""What generation keeps of past tokens, in bytes, from the config alone: as cached, and with every head expanded.

As cached are MLA's latent and rotary key (V2 paper §2.1.3, table 1), a study variant's two latents, or the keys and
values of each kv head; expanded are every head's key and value. MTP modules keep nothing in a cache. The bytes are
those of :class:`abyssal.model.cache.Cache` in each dtype; FP8 is one byte a value, scales not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from abyssal.config import ModelConfig

DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float32)
"""What a cache is kept in: FP8 in serving engines, BF16 with BF16 weights, FP32 with FP32 weights."""


@dataclass(frozen=True)
class CacheSize:
    """Values that a cache keeps, as cached and expanded (the same where nothing is compressed)."""

    layers: int
    values: int
    """A token and layer, as cached."""
    expanded_values: int
    """A token and layer, if every head's key and value were kept."""

    @property
    def ratio(self) -> float:
        """How many times smaller the cache is than expanded."""
        return self.expanded_values / self.values

    def nbytes(self, dtype: torch.dtype, *, context: int = 1, batch: int = 1, expanded: bool = False) -> int:
        """Bytes of all layers for ``batch`` sequences of ``context`` tokens; by default those of one token.

        Raises ValueError for a context or batch below 1.
        """
        for name, number in (("context", context), ("batch", batch)):
            if number < 1:
                raise ValueError(f"{name}: {number} is not at least 1")
        values = self.expanded_values if expanded else self.values
        return self.layers * values * context * batch * dtype.itemsize


def cache_size(config: ModelConfig) -> CacheSize:
    """The cache of ``config``'s main model."""
    attention = config.attention
    return CacheSize(config.num_hidden_layers, attention.cached_values, attention.expanded_values)
