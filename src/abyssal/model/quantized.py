"""Weights of 8 or 4 bits in memory: modules that take the place of ``Linear``, ``MLP`` and ``Experts`` in a finished
model, for decoding at the speed that memory has (:mod:`abyssal.kernels.packed`, :mod:`abyssal.kernels.decode`).

Packed are the projections of attention, dense MLPs, shared and routed experts, and the head where it is its own. As
they were stay embedding, norms, routers, biases and the MTP modules' eh_proj, which is BF16 in published FP8 models
too; and kv_b_proj, whose numbers the absorbed path needs as a tensor (3% of V3's active weights). The head is int8
under ``int4``, too: its errors go straight into the logits.

For inference: no gradient passes through. They are made while a checkpoint is read
(:func:`abyssal.checkpoint.load_model`), or read from one that holds them (:mod:`abyssal.checkpoint.packing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abyssal.errors import UserError
from abyssal.kernels import decode
from abyssal.kernels.packed import Kind, Packed, dequantize, packed_shapes
from abyssal.model.layers import MLP, Decodes, KeepsDtype, Linear
from abyssal.model.moe import Experts
from abyssal.model.transformer import Transformer

_DENSE = ("kv_b_proj", "eh_proj")
_SLICE = 2**24  # numbers of a matrix that are unpacked at a time where there are many rows to multiply


class QuantizedLinear(KeepsDtype, Decodes):
    """``Linear`` with packed weights [O, I]: [..., I] -> [..., O], in the dtype of what comes in.

    A few rows are multiplied by compiled code, which rounds them to int8 as well; more, or where there is none, by
    the weights unpacked, a slice at a time. Raises UserError where a gradient is wanted.
    """

    kept = ("data", "scales")
    data: Tensor
    scales: Tensor

    def __init__(
        self, shape: torch.Size, kind: Kind, bias: nn.Parameter | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.shape, self.kind, self.dtype = shape, kind, dtype
        _register(self, "", shape, kind)
        self.bias = bias

    @property
    def packed(self) -> Packed:
        return Packed(self.data, self.scales, self.kind, self.shape)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weights that these stand for, and no numbers: on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        _refuse_gradients(x, self.kind)
        out = None
        if decode.few(x):
            decoder = self.ready(self._decoder, self.data, self.scales)
            out = decoder(x.contiguous()) if x.dtype in decoder.compiled.functions else None
        if out is None:
            out = self._by_slices(x)
        return out if self.bias is None else decode.add(out, self.bias)

    def _by_slices(self, x: Tensor) -> Tensor:
        outputs, inputs = self.shape
        rows = max(_SLICE // inputs, 1)
        if rows >= outputs:
            return F.linear(x, dequantize(self.packed, x.dtype))
        slices = (slice(start, min(start + rows, outputs)) for start in range(0, outputs, rows))
        return torch.cat([F.linear(x, dequantize(_rows(self.packed, part), x.dtype)) for part in slices], dim=-1)

    def _decoder(self, *_: Tensor) -> decode.Linear:
        return decode.Linear(self.packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast changes what is computed in, if not what is stored.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.data.device)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, {self.kind}, bias={self.bias is not None}"


class QuantizedMLP(MLP):
    """:class:`~abyssal.model.layers.MLP` over three :class:`QuantizedLinear`, a few rows in one call."""

    gate_proj: QuantizedLinear  # type: ignore[assignment]
    up_proj: QuantizedLinear  # type: ignore[assignment]
    down_proj: QuantizedLinear  # type: ignore[assignment]

    def __init__(self, mlp: MLP) -> None:
        nn.Module.__init__(self)
        for name, module in mlp.named_children():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        if decode.few(x):
            mlp = self.ready(self._decoder, self.gate_proj.data, self.up_proj.data, self.down_proj.data)
            if x.dtype in mlp.compiled.functions:
                out: Tensor = mlp(x.reshape(-1, x.shape[-1]).contiguous()).view(x.shape)
                return out
        return super().forward(x)

    def _decoder(self, *_: Tensor) -> decode.MLP:
        return decode.MLP(self.gate_proj.packed, self.up_proj.packed, self.down_proj.packed)


class QuantizedExperts(KeepsDtype, Decodes):
    """:class:`~abyssal.model.moe.Experts` with packed weights; for many rows one expert at a time is unpacked."""

    kept = ("gate_up_data", "gate_up_scales", "down_data", "down_scales")
    gate_up_data: Tensor
    gate_up_scales: Tensor
    down_data: Tensor
    down_scales: Tensor

    def __init__(self, gate_up: torch.Size, down: torch.Size, kind: Kind) -> None:
        super().__init__()
        self.shapes, self.kind = (gate_up, down), kind
        _register(self, "gate_up_", gate_up, kind)
        _register(self, "down_", down, kind)

    @property
    def gate_up(self) -> Packed:
        return Packed(self.gate_up_data, self.gate_up_scales, self.kind, self.shapes[0])

    @property
    def down(self) -> Packed:
        return Packed(self.down_data, self.down_scales, self.kind, self.shapes[1])

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """``x`` [N, D], ``indices`` [N, K], ``weights`` [N, K] -> weighted sum of expert outputs [N, D]."""
        _refuse_gradients(x, self.kind)
        kept = (self.gate_up_data, self.gate_up_scales, self.down_data, self.down_scales)
        out: Tensor = self.ready(self._decoder, *kept)(x.contiguous(), indices, weights)
        return out

    def _decoder(self, *_: Tensor) -> decode.Experts:
        return decode.Experts(self.gate_up, self.down)

    def extra_repr(self) -> str:
        return f"{list(self.shapes[0])}, {list(self.shapes[1])}, {self.kind}"


def use_packed(model: Transformer, kind: Kind) -> None:
    """Replaces the modules named above by those here, their weights not filled in. Meant for a model on the meta
    device, before loading."""
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        new: nn.Module
        if type(module) is MLP:
            new = QuantizedMLP(module)
        elif isinstance(module, Experts):
            with module.down_proj.device:
                new = QuantizedExperts(module.gate_up_proj.shape, module.down_proj.shape, kind)
        elif isinstance(module, Linear) and own not in _DENSE:
            if module is model.lm_head and model.config.tie_word_embeddings:
                continue
            with module.weight.device:
                own_kind: Kind = "int8" if module is model.lm_head else kind
                new = QuantizedLinear(module.weight.shape, own_kind, module.bias, module.weight.dtype)
        else:
            continue
        new.train(module.training)
        setattr(model.get_submodule(parent), own, new)


def packed_matrices(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """Every packed matrix under the published name of its weight, an expert's as views of the stacked ones: what is
    copied into them is in the model."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield f"{name}.weight", module.packed
        elif isinstance(module, QuantizedExperts):
            width = module.shapes[1][-1]
            for expert in range(module.shapes[1][0]):
                both, down = (_expert(packed, expert) for packed in (module.gate_up, module.down))
                yield f"{name}.{expert}.gate_proj.weight", _rows(both, slice(0, width))
                yield f"{name}.{expert}.up_proj.weight", _rows(both, slice(width, 2 * width))
                yield f"{name}.{expert}.down_proj.weight", down


def packed_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that hold the packed matrices."""
    modules = model.named_modules()
    packed = ((name, module) for name, module in modules if isinstance(module, QuantizedLinear | QuantizedExperts))
    return {f"{name}.{buffer}" for name, module in packed for buffer in module.kept}


def _register(module: nn.Module, prefix: str, shape: torch.Size, kind: Kind) -> None:
    data, scales = packed_shapes(shape, kind)
    module.register_buffer(f"{prefix}data", torch.empty(data, dtype=torch.uint8))
    module.register_buffer(f"{prefix}scales", torch.empty(scales, dtype=torch.bfloat16))


def _expert(packed: Packed, expert: int) -> Packed:
    return Packed(packed.data[expert], packed.scales[expert], packed.kind, packed.shape[1:])


def _rows(packed: Packed, rows: slice) -> Packed:
    data = packed.data[rows]
    return Packed(data, packed.scales[rows], packed.kind, torch.Size((data.shape[0], packed.shape[1])))


def _refuse_gradients(x: Tensor, kind: Kind) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise UserError(f"weights in {kind} pass no gradient on; load with weights='dense' to train")
