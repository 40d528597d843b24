"""The small parts: RMSNorm, the linear layer without bias, the SwiGLU MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abyssal.kernels import decode
from abyssal.kernels.backend import product_dtype
from abyssal.kernels.fused import rms_norm, swiglu


class KeepsDtype(nn.Module):
    """A module whose buffers named in ``kept`` follow it to another device but are never cast.

    ``nn.Module`` casts every floating-point tensor: what is exact in FP32 or stored in FP8 would be lost.
    """

    kept: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.kept}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


class Decodes(nn.Module):
    """A module whose weights are made ready for decoding once, and anew when they no longer lie where they lay."""

    def ready(self, make: Callable[..., Any], *weights: Tensor) -> Any:
        """What ``make`` made of ``weights``."""
        places = [(weight.data_ptr(), weight.dtype) for weight in weights]
        made = self.__dict__.get("_made")
        if made is None or made[0] != places:
            made = self.__dict__["_made"] = places, make(*weights)
        return made[1]

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its weights elsewhere.
        return {key: value for key, value in self.__dict__.items() if key != "_made"}


class Linear(nn.Linear, Decodes):
    """``nn.Linear``; a few rows, where no gradient is wanted, are multiplied at the speed of memory."""

    def forward(self, x: Tensor) -> Tensor:
        if not decode.few(x):
            return F.linear(x, self.weight, self.bias)
        out: Tensor = self.ready(decode.Linear, self.weight)(x)
        return out if self.bias is None else decode.add(out, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, in FP32 inside (arXiv 1910.07467).

    The dtype of ``x`` is kept; under autocast it is autocast's, since what follows a norm is always a product.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if decode.few(x):
            return decode.norm(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps, product_dtype(x))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class MLP(Decodes):
    """SwiGLU: down(silu(gate(x)) · up(x)), [..., D] -> [..., D] (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if decode.few(x) and type(self.gate_proj) is type(self.up_proj) is type(self.down_proj) is Linear:
            mlp = self.ready(decode.MLP, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
            return mlp(x.reshape(-1, x.shape[-1])).view(x.shape)
        out: Tensor = self.down_proj(swiglu(torch.cat((self.gate_proj(x), self.up_proj(x)), dim=-1)))
        return out
