"""Weights of 8 or 4 bits in memory: modules that take the place of ``Linear``, ``MLP`` and ``Experts`` in a finished
model, for decoding at the speed that memory has (:mod:`abyssal.kernels.packed`, :mod:`abyssal.kernels.decode`).

Packed are the projections of attention, dense MLPs, shared and routed experts, and the head where it is its own. As
they were stay embedding, norms, routers, biases and the MTP modules' eh_proj, which is BF16 in published FP8 models
too; and kv_b_proj, whose numbers the absorbed path needs as a tensor (3% of V3's active weights). The head is int8
under ``int4``, too: its errors go straight into the logits.

**nf4** (:mod:`abyssal.kernels.nf4`) is for training adapters on (QLoRA). No compiled code multiplies with it, so it
decodes slowly; kv_b_proj is packed, too, and the head is not.

Weights of every kind are frozen and pass gradients on to what comes in: they are unpacked for the product and once more
for its gradient, a part at a time, and nothing is kept in between. They are made while a checkpoint is read
(:func:`abyssal.checkpoint.load_model`); int8 and int4 are also stored (:mod:`abyssal.checkpoint.packing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from abyssal.kernels import decode, grouped, nf4
from abyssal.kernels.backend import product_dtype
from abyssal.kernels.fused import swiglu
from abyssal.kernels.nf4 import NF4, nf4_shapes
from abyssal.kernels.packed import Kind, Packed, dequantize, packed_shapes
from abyssal.model.layers import MLP, Decodes, KeepsDtype, Linear
from abyssal.model.moe import Experts
from abyssal.model.transformer import Transformer

Held = Kind | Literal["nf4"]
"""What packed weights are in memory."""
Matrix = Packed | NF4

_DENSE = {"int8": ("kv_b_proj", "eh_proj"), "int4": ("kv_b_proj", "eh_proj"), "nf4": ("eh_proj", "lm_head")}
_SLICE = 2**22  # numbers that are unpacked at a time where there are many rows to multiply; or one expert's matrix


class QuantizedLinear(KeepsDtype, Decodes):
    """``Linear`` with packed weights [O, I]: [..., I] -> [..., O], in the dtype of what comes in, or autocast's.

    A few rows are multiplied by compiled code, which rounds them to int8 as well; more, or where there is none or a
    gradient is wanted, by the weights unpacked, a slice at a time.
    """

    data: Tensor
    scales: Tensor  # not of nf4

    def __init__(
        self, shape: torch.Size, kind: Held, bias: nn.Parameter | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.shape, self.kind, self.dtype = shape, kind, dtype
        self.kept = _register(self, "", shape, kind)
        self.bias = bias

    @property
    def packed(self) -> Matrix:
        return _held(self, "", self.shape)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weights that these stand for, and no numbers: on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The numbers, [O, I]."""
        return _dense(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = None
        if self.kind != "nf4" and decode.few(x):
            decoder = self.ready(self._decoder, self.data, self.scales)
            out = decoder(x.contiguous()) if x.dtype in decoder.compiled.functions else None
        if out is None:
            out = _Product.apply(x.to(product_dtype(x)), self.packed)
        return out if self.bias is None else decode.add(out, self.bias.to(out.dtype))

    def _decoder(self, *_: Tensor) -> decode.Linear:
        return decode.Linear(_packed(self.packed))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast changes what the weights stand for, if not what is stored.
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
        if decode.few(x) and all(type(module) is QuantizedLinear for module in self.children()):
            mlp = self.ready(self._decoder, self.gate_proj.data, self.up_proj.data, self.down_proj.data)
            if x.dtype in mlp.compiled.functions:
                out: Tensor = mlp(x.reshape(-1, x.shape[-1]).contiguous()).view(x.shape)
                return out
        return super().forward(x)

    def _decoder(self, *_: Tensor) -> decode.MLP:
        return decode.MLP(*(_packed(linear.packed) for linear in (self.gate_proj, self.up_proj, self.down_proj)))


class QuantizedExperts(KeepsDtype, Decodes):
    """:class:`~abyssal.model.moe.Experts` with packed weights, of which a few experts' are unpacked at a time.

    Of ``nf4``, each expert's gate, up and down are quantised by themselves, as they are published: the buffers of
    ``gate_up`` are [E, 2, ...], those of ``down`` [E, ...].
    """

    gate_up_data: Tensor
    gate_up_scales: Tensor  # not of nf4
    down_data: Tensor
    down_scales: Tensor

    def __init__(self, gate_up: torch.Size, down: torch.Size, kind: Held) -> None:
        super().__init__()
        self.shapes, self.kind = (gate_up, down), kind
        self.kept = (*_register(self, "gate_up_", gate_up, kind, 2), *_register(self, "down_", down, kind))

    @property
    def packed(self) -> tuple[Matrix, Matrix]:
        """Gate above up, and down."""
        return _held(self, "gate_up_", self.shapes[0], 2), _held(self, "down_", self.shapes[1])

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """``x`` [N, D], ``indices`` [N, K], ``weights`` [N, K] -> weighted sum of expert outputs [N, D]."""
        if self.kind != "nf4" and not (torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)):
            kept = (self.gate_up_data, self.gate_up_scales, self.down_data, self.down_scales)
            out: Tensor = self.ready(self._decoder, *kept)(x.contiguous(), indices, weights)
            return out
        dtype = product_dtype(x)
        where = grouped.plan(indices, self.shapes[0][0], dtype)
        rows = grouped.gather(x.to(dtype), where)
        hidden = swiglu(self.gate_up(rows, where), grouped.row_weights(weights, where))
        return grouped.combine(self.down(hidden, where), where)

    def gate_up(self, rows: Tensor, where: grouped.Plan) -> Tensor:
        """Both first products of ``rows`` [P, D], side by side: [P, 2F]. On a GPU this waits for the device."""
        out: Tensor = _GroupedProduct.apply(rows, self.packed[0], where.host_bounds())
        return out

    def down(self, rows: Tensor, where: grouped.Plan) -> Tensor:
        """The second product of ``rows`` [P, F], [P, D]. On a GPU this waits for the device."""
        out: Tensor = _GroupedProduct.apply(rows, self.packed[1], where.host_bounds())
        return out

    def _decoder(self, *_: Tensor) -> decode.Experts:
        gate_up, down = self.packed
        return decode.Experts(_packed(gate_up), _packed(down))

    def extra_repr(self) -> str:
        return f"{list(self.shapes[0])}, {list(self.shapes[1])}, {self.kind}"


class _Product(torch.autograd.Function):
    """``x`` [..., I] times a packed matrix [O, I], some of its rows at a time; ``x`` is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        outs = [F.linear(x, _dense(part, x.dtype)) for _, part in _by_rows(matrix)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        total: Tensor | None = None
        parts = list(_by_rows(ctx.matrix))
        for rows, part in parts:
            some = grad[..., rows] @ _dense(part, grad.dtype)
            if len(parts) == 1:
                return some, None
            some = some.to(torch.promote_types(grad.dtype, torch.float32))  # else each sum would be rounded
            total = some if total is None else total.add_(some)
        assert total is not None
        return total.to(grad.dtype), None


class _GroupedProduct(torch.autograd.Function):
    """Each expert's ``rows`` [P, I] times its packed matrix [O, I]; ``rows`` are not kept. Those that are no expert's
    are 0."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Matrix, bounds: list[int]) -> Tensor:
        ctx.matrix, ctx.bounds = matrix, bounds
        out = rows.new_zeros(rows.shape[0], matrix.shape[1:-1].numel())
        for part, some, own in _by_experts(matrix, bounds):
            out[some] = grouped.product(rows[some], _stacked(part, rows.dtype), own)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous()
        out = grad.new_zeros(grad.shape[0], ctx.matrix.shape[-1])
        for part, some, own in _by_experts(ctx.matrix, ctx.bounds):
            out[some] = grouped.product_backward(grad[some], _stacked(part, grad.dtype), own)
        return out, None, None


def _by_rows(matrix: Matrix) -> Iterator[tuple[slice, Matrix]]:
    """Slices of a single matrix, of a size to be unpacked."""
    outputs, inputs = matrix.shape
    rows = max(_SLICE // inputs, 1)
    if isinstance(matrix, NF4):
        step = nf4.aligned_rows(inputs)
        rows = max(rows // step, 1) * step
    for start in range(0, outputs, rows):
        part = slice(start, min(start + rows, outputs))
        if part == slice(0, outputs):
            yield part, matrix
        else:
            yield part, matrix.rows(part.start, part.stop) if isinstance(matrix, NF4) else _rows(matrix, part)


def _by_experts(matrix: Matrix, bounds: list[int]) -> Iterator[tuple[Matrix, slice, list[int]]]:
    """Experts that follow each other, of a size to be unpacked together: their matrices, where their rows lie, and each
    one's bounds within these. Those without rows before and behind are left out."""
    together = max(_SLICE // matrix.shape[1:].numel(), 1)
    busy = [expert for expert, (start, end) in enumerate(pairwise(bounds)) if end > start]
    while busy:
        first = busy[0]
        last = max(expert for expert in busy if expert < first + together) + 1
        busy = [expert for expert in busy if expert >= last]
        own = [bound - bounds[first] for bound in bounds[first : last + 1]]
        part: Matrix
        if isinstance(matrix, NF4):
            part = matrix[first:last]
        else:
            shape = torch.Size((last - first, *matrix.shape[1:]))
            part = Packed(matrix.data[first:last], matrix.scales[first:last], matrix.kind, shape)
        yield part, slice(bounds[first], bounds[last]), own


def _dense(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    return nf4.dequantize(matrix, dtype) if isinstance(matrix, NF4) else dequantize(matrix, dtype)


def _stacked(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Experts' matrices [E, O, I]."""
    dense = _dense(matrix, dtype)
    return dense.flatten(1, 2) if dense.dim() == 4 else dense


def use_packed(model: Transformer, kind: Held) -> None:
    """Replaces the modules named above by those here, their weights not filled in. Meant for a model on the meta
    device, before loading. Raises UserError where ``nf4`` has no bitsandbytes."""
    if kind == "nf4":
        nf4.functional()
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        new: nn.Module
        if type(module) is MLP and kind != "nf4":
            new = QuantizedMLP(module)
        elif isinstance(module, Experts):
            with module.down_proj.device:
                new = QuantizedExperts(module.gate_up_proj.shape, module.down_proj.shape, kind)
        elif isinstance(module, Linear) and own not in _DENSE[kind]:
            if module is model.lm_head and model.config.tie_word_embeddings:
                continue
            with module.weight.device:
                own_kind: Held = "int8" if module is model.lm_head else kind
                new = QuantizedLinear(module.weight.shape, own_kind, module.bias, module.weight.dtype)
        else:
            continue
        new.train(module.training)
        setattr(model.get_submodule(parent), own, new)


def packed_matrices(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """Every matrix in int8 or int4 under the published name of its weight, an expert's as views of the stacked ones:
    what is copied into them is in the model."""
    yield from ((name, matrix) for name, matrix in _matrices(model) if isinstance(matrix, Packed))


def nf4_matrices(model: nn.Module) -> Iterator[tuple[str, NF4]]:
    """The same of every matrix in nf4."""
    yield from ((name, matrix) for name, matrix in _matrices(model) if isinstance(matrix, NF4))


def _matrices(model: nn.Module) -> Iterator[tuple[str, Matrix]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield f"{name}.weight", module.packed
        elif isinstance(module, QuantizedExperts):
            experts, _, width = module.shapes[1]
            both, down = module.packed
            halves = slice(0, width), slice(width, 2 * width)
            for expert in range(experts):
                for which, part in enumerate(halves):
                    own = both[expert, which] if isinstance(both, NF4) else _rows(_expert(both, expert), part)
                    yield f"{name}.{expert}.{('gate', 'up')[which]}_proj.weight", own
                own = down[expert] if isinstance(down, NF4) else _expert(down, expert)
                yield f"{name}.{expert}.down_proj.weight", own


def packed_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that hold the packed matrices."""
    modules = model.named_modules()
    packed = ((name, module) for name, module in modules if isinstance(module, QuantizedLinear | QuantizedExperts))
    return {f"{name}.{buffer}" for name, module in packed for buffer in module.kept}


def _register(module: nn.Module, prefix: str, shape: torch.Size, kind: Held, parts: int = 1) -> tuple[str, ...]:
    """Buffers for a matrix, or for experts' of ``parts`` matrices each; gives their names."""
    if kind != "nf4":
        tensors = zip(("data", "scales"), packed_shapes(shape, kind), (torch.uint8, torch.bfloat16), strict=True)
    else:
        dtypes = (torch.uint8, torch.uint8, torch.float32, torch.float32)
        tensors = zip(nf4.NAMES, nf4_shapes(*_stack(shape, parts)), dtypes, strict=True)
    names = []
    for name, size, dtype in tensors:
        names.append(prefix + name)
        module.register_buffer(prefix + name, torch.empty(size, dtype=dtype))
    return tuple(names)


def _held(module: QuantizedLinear | QuantizedExperts, prefix: str, shape: torch.Size, parts: int = 1) -> Matrix:
    if module.kind != "nf4":
        return Packed(getattr(module, f"{prefix}data"), getattr(module, f"{prefix}scales"), module.kind, shape)
    data, absmax, nested, offset = (getattr(module, prefix + name) for name in nf4.NAMES)
    return NF4(data, absmax, nested, offset, _stack(shape, parts)[1])


def _stack(shape: torch.Size, parts: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    """How many matrices of which shape are quantised by themselves."""
    *experts, outputs, inputs = shape
    return (*experts, *([parts] if parts > 1 else [])), (outputs // parts, inputs)


def _packed(matrix: Matrix) -> Packed:
    assert isinstance(matrix, Packed)
    return matrix


def _expert(packed: Packed, expert: int) -> Packed:
    return Packed(packed.data[expert], packed.scales[expert], packed.kind, packed.shape[1:])


def _rows(packed: Packed, rows: slice) -> Packed:
    data = packed.data[rows]
    return Packed(data, packed.scales[rows], packed.kind, torch.Size((data.shape[0], packed.shape[1])))
