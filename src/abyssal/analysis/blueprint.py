"""A model built without memory, to count on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from abyssal.config import ModelConfig
from abyssal.model import Transformer


def blueprint(config: ModelConfig) -> Transformer:
    """``config``'s model on the meta device: all tensors, no numbers."""
    with torch.device("meta"), _Unfilled():
        return Transformer(config)


class _Unfilled(TorchFunctionMode):
    """Leaves out the random numbers of new tensors: on the meta device there are none, but asking for them has torch
    import its compiler, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
