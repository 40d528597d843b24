"""How evenly a layer's experts are used, from their load (assignments each got)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Balance:
    """CV = std / mean and MaxVio = (max − mean) / mean of a load (arXiv 2408.15664 §4.1), and idle experts."""

    cv: float
    max_vio: float
    dead: int


def balance(load: Tensor) -> Balance:
    """Balance of a ``load`` [E]; all zero where nothing was routed at all."""
    load = load.double()
    mean = load.mean()
    if mean == 0:
        return Balance(0.0, 0.0, load.numel())
    cv = load.std(unbiased=False) / mean
    return Balance(cv.item(), ((load.max() - mean) / mean).item(), int((load == 0).sum()))
