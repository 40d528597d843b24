"""Weights that stay FP8 in memory: modules that take the place of ``nn.Linear`` and ``Experts`` in a finished model.

Half the memory of BF16; activations are quantised on the way in, as DeepSeek-V3 was trained and is served (paper §3.3).
For inference: no gradient passes through them. Tensors keep their published names (``weight``, ``weight_scale_inv``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.errors import UserError
from abyssal.kernels import fp8, grouped
from abyssal.kernels.backend import product_dtype
from abyssal.kernels.fused import swiglu
from abyssal.kernels.grouped import Plan
from abyssal.model.layers import KeepsDtype
from abyssal.model.moe import Experts


class FP8Linear(KeepsDtype):
    """``nn.Linear`` with E4M3 weights [O, I] and FP32 scales a block of 128 × 128: [..., I] -> [..., O]."""

    kept = ("weight", "weight_scale_inv")
    weight: Tensor
    weight_scale_inv: Tensor

    def __init__(self, shape: torch.Size, bias: nn.Parameter | None = None, *, power_of_two: bool = False) -> None:
        super().__init__()
        self.power_of_two = power_of_two
        self.register_buffer("weight", torch.empty(shape, dtype=torch.float8_e4m3fn))
        self.register_buffer("weight_scale_inv", torch.empty(fp8.scale_shape(shape), dtype=torch.float32))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        _refuse_gradients(x)
        rows = x.reshape(-1, x.shape[-1])
        out = fp8.linear(rows, self.weight, self.weight_scale_inv, power_of_two=self.power_of_two)
        out = out.view(*x.shape[:-1], self.weight.shape[0])
        return out if self.bias is None else out + self.bias.to(out.dtype)


class FP8Experts(Experts, KeepsDtype):
    """:class:`Experts` with E4M3 weights. An expert's gate and up each have blocks of their own: the scales of
    ``gate_up_proj`` [E, 2F, D] are [E, 2, ⌈F/128⌉, ⌈D/128⌉]."""

    kept = ("gate_up_proj", "gate_up_scale_inv", "down_proj", "down_scale_inv")
    gate_up_scale_inv: Tensor
    down_scale_inv: Tensor

    def __init__(self, experts: Experts, *, power_of_two: bool = False) -> None:
        nn.Module.__init__(self)
        self.power_of_two = power_of_two
        n, both, hidden = experts.gate_up_proj.shape
        for name, shape in (("gate_up", (n, 2, both // 2, hidden)), ("down", tuple(experts.down_proj.shape))):
            stored = experts.gate_up_proj.shape if name == "gate_up" else shape
            self.register_buffer(f"{name}_proj", torch.empty(stored, dtype=torch.float8_e4m3fn))
            self.register_buffer(f"{name}_scale_inv", torch.empty(fp8.scale_shape(shape), dtype=torch.float32))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        # Routing weights come last here, as where published FP8 models are served: what a product is given decides how
        # it is rounded.
        dtype = product_dtype(x)
        where = grouped.plan(indices, len(self.down_proj), dtype)
        rows = self.down(swiglu(self.gate_up(grouped.gather(x.to(dtype), where), where)), where)
        return grouped.combine(rows * grouped.row_weights(weights, where).to(rows.dtype).unsqueeze(-1), where)

    def gate_up(self, rows: Tensor, where: Plan) -> Tensor:
        width = self.down_proj.shape[-1]
        gate, up = self.gate_up_proj[:, :width], self.gate_up_proj[:, width:]
        products = (
            self._product(rows, gate, self.gate_up_scale_inv[:, 0], where),
            self._product(rows, up, self.gate_up_scale_inv[:, 1], where),
        )
        return torch.cat(products, dim=-1)

    def down(self, rows: Tensor, where: Plan) -> Tensor:
        return self._product(rows, self.down_proj, self.down_scale_inv, where)

    def _product(self, rows: Tensor, weight: Tensor, scale: Tensor, where: Plan) -> Tensor:
        _refuse_gradients(rows)
        out = rows.new_zeros(rows.shape[0], weight.shape[1])
        for expert, start, end in where.slices():
            out[start:end] = fp8.linear(rows[start:end], weight[expert], scale[expert], power_of_two=self.power_of_two)
        return out


def _refuse_gradients(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise UserError("weights in FP8 pass no gradient on; load with weights='dense' to train")


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight [O, I] in ``dtype``, whatever it is kept in; an adapted layer (model/lora.py) says it
    itself."""
    if (own := getattr(linear, "dense_weight", None)) is not None:
        adapted: Tensor = own(dtype)
        return adapted
    if isinstance(linear, FP8Linear):
        return fp8.dequantize(linear.weight, linear.weight_scale_inv, dtype)
    assert isinstance(linear, nn.Linear)
    return linear.weight.to(dtype)


def use_fp8(model: nn.Module, names: set[str], *, power_of_two: bool = False) -> None:
    """Replaces every linear layer whose ``….weight`` is in ``names``, and every layer's experts whose tensors
    (``….experts.gate_up_proj``, ``….experts.down_proj``) both are. Meant for a model on the meta device, before
    loading.
    """
    for name, module in list(model.named_modules()):
        parent_name, _, own = name.rpartition(".")
        linear = isinstance(module, nn.Linear) and f"{name}.weight" in names
        experts = isinstance(module, Experts) and {f"{name}.gate_up_proj", f"{name}.down_proj"} <= names
        if not (linear or experts):
            continue
        with next(module.parameters()).device:
            if isinstance(module, nn.Linear):
                new: nn.Module = FP8Linear(module.weight.shape, module.bias, power_of_two=power_of_two)
            else:
                assert isinstance(module, Experts)
                new = FP8Experts(module, power_of_two=power_of_two)
        setattr(model.get_submodule(parent_name), own, new)
