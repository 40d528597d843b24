"""Which implementation of the hot operations fits the tensors at hand.

:mod:`abyssal.kernels.native` (C++, CPU) and :mod:`abyssal.kernels.gpu` (Triton) have functions of the same names; where
neither fits (FP64, no compiler, other devices, inside torch.compile), the plain PyTorch beside each operation runs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from abyssal.kernels import native


def backend(*tensors: Tensor) -> ModuleType | None:
    """The module whose functions take ``tensors``; None: plain PyTorch."""
    if torch.compiler.is_compiling():
        return None
    if tensors[0].device.type == "cpu":
        return native if native.supports(*tensors) else None
    if tensors[0].device.type == "cuda":
        from abyssal.kernels import gpu  # Triton takes a second to import, and is not everywhere

        return gpu if all(gpu.supports(x) for x in tensors) else None
    return None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of ``x`` run in: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype
