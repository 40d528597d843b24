"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a finished model: modules that stand in the place of projections and
routed experts and add s · B A to their weights, which stay as they are. Only A and B are trained.

    y = W x + s · B (A x),   s = α / r, or α / √r (rank-stabilised, arXiv 2312.03732)

W may be dense, packed (:mod:`abyssal.model.quantized`: QLoRA) or, where nothing is trained, FP8. The routed experts of
a layer have one A and B each, multiplied as they themselves are: all in one grouped product. Traps: the loss reads the
head's weight and not its module, and routers decide in FP32 by code of their own, so neither can be adapted.

Parameters are FP32 and are named ``lora_A`` [r, I] and ``lora_B`` [O, r]; of experts ``gate_up_lora_A`` [E, r, D],
``gate_up_lora_B`` [E, 2F, r], ``down_lora_A`` [E, r, F], ``down_lora_B`` [E, D, r]. What was replaced is ``base``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from abyssal.errors import UserError, nearest
from abyssal.kernels import grouped, native
from abyssal.kernels.backend import product_dtype
from abyssal.kernels.fused import swiglu
from abyssal.kernels.grouped import Plan
from abyssal.model.fp8 import FP8Linear, dense_weight
from abyssal.model.layers import Linear, RMSNorm
from abyssal.model.moe import Experts
from abyssal.model.quantized import QuantizedExperts, QuantizedLinear
from abyssal.model.router import Router
from abyssal.model.transformer import Transformer

STACKED = ("gate_up", "down")
_LINEAR = (Linear, FP8Linear, QuantizedLinear)
_EXPERTS = (Experts, QuantizedExperts)
_KINDS = (
    "q_proj, q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
)


@dataclass(frozen=True)
class LowRank:
    """How a matrix is changed: by ``scale`` · B A."""

    a: Tensor
    """[r, I], or [E, r, I] for stacked experts."""
    b: Tensor
    """[O, r] or [E, O, r]."""
    alpha: float
    rslora: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def scale(self) -> float:
        return scaling(self.alpha, self.rank, self.rslora)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return (*self.a.shape[:-2], self.b.shape[-2], self.a.shape[-1])

    def delta(self, expert: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The change of the matrix, or of one expert's, [O, I]."""
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        return self.scale * (b.detach().to(dtype) @ a.detach().to(dtype))


def scaling(alpha: float, rank: int, rslora: bool) -> float:
    """What B A is multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@dataclass(frozen=True)
class Adapted:
    """Which matrices :func:`add_lora` adapted."""

    shapes: dict[str, tuple[int, ...]]
    """Name -> [O, I] or [E, O, I], in the model's order."""
    ranks: dict[str, int]
    left: dict[str, tuple[int, ...]]
    """The matrices that could have been adapted, and were not; those of MTP modules in ``deep``."""
    deep: int
    """How many of MTP modules' matrices were not adapted."""
    trainable: int
    """Parameters that are trained."""
    total: int
    """Parameters of the model without them."""

    def lines(self) -> list[str]:
        """A line for each kind of matrix, one for what was left as it is, and one for the sum."""
        adapted = Counter((kind(name), shape, self.ranks[name]) for name, shape in self.shapes.items())
        out = []
        for (what, shape, rank), count in adapted.items():
            added = count * math.prod(shape[:-2]) * rank * (shape[-1] + shape[-2])
            out.append(f"{what} {count} x {list(shape)}, rank {rank}: {added:,}")
        left = Counter((kind(name), shape) for name, shape in self.left.items())
        kinds = [f"{what} {count} x {list(shape)}" for (what, shape), count in left.items()]
        kinds += [f"{self.deep} matrices of MTP modules"] * (self.deep > 0)
        if kinds:
            out.append(f"not adapted: {', '.join(kinds)}")
        share = self.trainable / self.total
        return [*out, f"trained: {self.trainable:,} parameters, {share:.2%} of the model's {self.total:,}"]

    def describe(self) -> str:
        """:meth:`lines` as one text."""
        return "\n".join(self.lines())


class LoRALinear(nn.Module):
    """A linear layer ``base`` and what is added to it: [..., I] -> [..., O], in the dtype that ``base`` computes in."""

    def __init__(self, base: nn.Module, change: LowRank) -> None:
        super().__init__()
        self.base = base
        self.alpha, self.rslora = change.alpha, change.rslora
        self.lora_A, self.lora_B = nn.Parameter(change.a), nn.Parameter(change.b)

    @property
    def change(self) -> LowRank:
        return LowRank(self.lora_A, self.lora_B, self.alpha, self.rslora)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(product_dtype(x))
        rows, scale = x.reshape(-1, x.shape[-1]), self.change.scale
        if type(self.base) is Linear and torch.is_grad_enabled():
            out = _LowRank.apply(rows, self.lora_A, self.lora_B, scale, None, self.base.weight, self.base.bias)
        else:
            onto = self.base(x).reshape(len(rows), -1)
            out = _LowRank.apply(rows, self.lora_A, self.lora_B, scale, onto, None, None)
        return out.view(*x.shape[:-1], -1)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight with what is added to it, [O, I]."""
        a, b = self.lora_A.to(dtype), _scaled(self.lora_B, self.change.scale, dtype)
        return torch.addmm(dense_weight(self.base, dtype), b, a)

    def extra_repr(self) -> str:
        return f"rank={self.change.rank}, scale={self.change.scale:.4g}"


class _LowRank(torch.autograd.Function):
    """``onto``, or ``x`` · weightᵀ + bias, plus scale · (x Aᵀ) Bᵀ. For the backward pass ``x`` [N, I] and x Aᵀ [N, r]
    are kept; a ``weight`` gets no gradient, and is cast anew where it must be."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        onto: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        inner = x @ a.to(x.dtype).t()
        ctx.save_for_backward(x, inner, a, b, weight)
        ctx.scale = scale
        raised = _scaled(b, scale, x.dtype).t()
        if weight is None:
            assert onto is not None
            return torch.addmm(onto, inner, raised)
        out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return out.addmm_(inner, raised)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b, weight = ctx.saved_tensors
        grad = grads[0]
        grad_inner = grad @ _scaled(b, ctx.scale, grad.dtype)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            lowered = a.to(grad.dtype)
            if weight is None:
                grad_x = grad_inner @ lowered
            else:
                grad_x = (grad @ weight.to(grad.dtype)).addmm_(grad_inner, lowered)
        if ctx.needs_input_grad[1]:
            grad_a = (grad_inner.t() @ x).to(a.dtype)
        if ctx.needs_input_grad[2]:
            grad_b = (grad.t() @ inner).to(b.dtype).mul_(ctx.scale)
        return grad_x, grad_a, grad_b, None, grad if ctx.needs_input_grad[4] else None, None, None


class LoRAExperts(nn.Module):
    """Routed experts ``base`` and what is added to one or both of their stacked matrices."""

    def __init__(self, base: nn.Module, gate_up: LowRank | None, down: LowRank | None) -> None:
        super().__init__()
        self.base = base
        self._scalings: dict[str, tuple[float, bool]] = {}
        for which, change in (("gate_up", gate_up), ("down", down)):
            if change is not None:
                self._scalings[which] = change.alpha, change.rslora
            tensors = (None, None) if change is None else (nn.Parameter(change.a), nn.Parameter(change.b))
            for end, tensor in zip("AB", tensors, strict=True):
                self.register_parameter(f"{which}_lora_{end}", tensor)

    def change(self, which: str) -> LowRank | None:
        """What is added to ``gate_up`` or ``down``."""
        if which not in self._scalings:
            return None
        a, b = (getattr(self, f"{which}_lora_{end}") for end in "AB")
        return LowRank(a, b, *self._scalings[which])

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """As :class:`~abyssal.model.moe.Experts`."""
        dtype = product_dtype(x)
        where = grouped.plan(indices, stacked_shapes(self.base)[0][0], dtype)
        rows = grouped.gather(x.to(dtype), where)
        hidden = swiglu(self.gate_up(rows, where), grouped.row_weights(weights, where))
        return grouped.combine(self.down(hidden, where), where)

    def gate_up(self, rows: Tensor, where: Plan) -> Tensor:
        """Both first products of ``rows`` [P, D], side by side: [P, 2F]."""
        return self._product("gate_up", rows, where)

    def down(self, rows: Tensor, where: Plan) -> Tensor:
        """The second product of ``rows`` [P, F], [P, D]."""
        return self._product("down", rows, where)

    def _product(self, which: str, rows: Tensor, where: Plan) -> Tensor:
        change = self.change(which)
        weight = getattr(self.base, f"{which}_proj") if type(self.base) is Experts else None
        if weight is None or change is None or where.bounds is None:
            out: Tensor = getattr(self.base, which)(rows, where)
            weight = None
        if change is None:
            return out
        a, b, onto = (
            _padded(change.a, rows.dtype, 1),
            _padded(_scaled(change.b, change.scale, rows.dtype), rows.dtype, 2),
            None,
        )
        if where.bounds is None:
            return out + grouped.grouped_linear(grouped.grouped_linear(rows, a, where), b, where)
        if weight is None:
            onto = out
        out = _GroupedLowRank.apply(rows, a, b, where.bounds, onto, weight)
        return out

    def extra_repr(self) -> str:
        changes = ((which, self.change(which)) for which in STACKED)
        return ", ".join(f"{which}: rank={c.rank}, scale={c.scale:.4g}" for which, c in changes if c is not None)


class _GroupedLowRank(torch.autograd.Function):
    """:class:`_LowRank` for the rows of experts: ``x`` [P, I], ``a`` [E, r, I], ``b`` [E, O, r], ``weight`` [E, O, I]
    or ``onto`` [P, O], which is changed in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, bounds: list[int], onto: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        inner = grouped.product(x, a, bounds)
        ctx.save_for_backward(x, inner, a, b, weight)
        ctx.bounds = bounds
        if weight is not None:
            onto = grouped.product(x, weight.to(x.dtype), bounds)
        else:
            assert onto is not None
            ctx.mark_dirty(onto)
        return grouped.product(inner, b, bounds, onto)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b, weight = ctx.saved_tensors
        grad, bounds = grads[0].contiguous(), ctx.bounds
        grad_inner = grouped.product_backward(grad, b, bounds)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = None if weight is None else grouped.product_backward(grad, weight.to(grad.dtype), bounds)
            grad_x = grouped.product_backward(grad_inner, a, bounds, grad_x)
        if ctx.needs_input_grad[1]:
            grad_a = grouped.weight_gradient(grad_inner, x, a, bounds)
        if ctx.needs_input_grad[2]:
            grad_b = grouped.weight_gradient(grad, inner, b, bounds)
        return grad_x, grad_a, grad_b, None, grad if ctx.needs_input_grad[4] else None, None


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · B, rounded once."""
    return (b.to(torch.promote_types(b.dtype, dtype)) * scale).to(dtype)


def _padded(x: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """``x`` with zeros up to a rank that the grouped products multiply fast."""
    x, multiple = x.to(dtype), 1
    if x.dtype == torch.bfloat16:
        multiple = 8 if x.device.type == "cuda" else 32 if native.has_tiles() else 1
    more = -x.shape[dim] % multiple
    return F.pad(x, (0, more) if dim == 2 else (0, 0, 0, more)) if more else x


def stacked_shapes(experts: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """[E, 2F, D] and [E, D, F]."""
    if isinstance(experts, QuantizedExperts):
        return tuple(experts.shapes[0]), tuple(experts.shapes[1])
    assert isinstance(experts, Experts)
    return tuple(experts.gate_up_proj.shape), tuple(experts.down_proj.shape)


def matrices(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the matrices that can be adapted, an adapted one's as well: ``….q_b_proj`` [O, I],
    ``….experts.gate_up_proj`` [E, 2F, D]."""
    out: dict[str, tuple[int, ...]] = {}
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        name = name.removesuffix(".base")
        if isinstance(module, _LINEAR):
            out[name] = tuple(module.shape if isinstance(module, QuantizedLinear) else module.weight.shape)
        elif isinstance(module, _EXPERTS):
            for which, shape in zip(STACKED, stacked_shapes(module), strict=True):
                out[f"{name}.{which}_proj"] = shape
    return out


def kind(name: str) -> str:
    """What a matrix is called without its layer: ``self_attn.q_b_proj``, ``mlp.experts.down_proj``."""
    return name.split(".", 3)[3]


def add_lora(
    model: Transformer,
    targets: str | Sequence[str],
    rank: int,
    alpha: float,
    *,
    rslora: bool = False,
    generator: torch.Generator | None = None,
) -> Adapted:
    """Puts :class:`LoRALinear` and :class:`LoRAExperts` in the place of what ``targets`` names, in ``model`` itself;
    nothing else takes gradients from then on. A is drawn as PEFT draws it, B is 0: the model computes what it did.

    A target is a module's last name (``q_b_proj``; ``down_proj`` is that of dense MLPs and shared experts),
    ``experts`` or one of ``experts.gate_up_proj`` and ``experts.down_proj``, a glob, or (part of) a dotted name
    (``layers.3.self_attn``, ``model.layers.*.mlp.shared_experts``); ``all`` is every projection. An MTP module is
    adapted where a target has its number (``model.layers.61.*``), since other code has no place for it.

    Raises UserError where a target matches nothing or what cannot be adapted, the rank does not fit, or the model has
    an adapter already.
    """
    known = matrices(model)
    chosen = check_lora(model, targets, rank, alpha)
    device = model.model.embed_tokens.weight.device
    changes = {}
    for name in chosen:
        *experts, outputs, inputs = known[name]
        # PEFT's: kaiming_uniform with a = √5 over an [r, I] (for experts [r·E, I]) matrix.
        bound = 1 / math.sqrt(inputs)
        a = torch.empty(*experts, rank, inputs, dtype=torch.float32, device=device)
        a.uniform_(-bound, bound, generator=generator)
        changes[name] = LowRank(a, torch.zeros(*experts, outputs, rank, device=device), alpha, rslora)
    return attach(model, changes)


def check_lora(model: Transformer, targets: str | Sequence[str], rank: int, alpha: float) -> list[str]:
    """What :func:`add_lora` would adapt; ``model`` may be on the meta device. Raises UserError where it would."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"rank: {rank!r} is not a number from 1")
    if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha: {alpha!r} is not a number above 0")
    known = matrices(model)
    chosen = choose(model, [targets] if isinstance(targets, str) else targets)
    for name in chosen:
        if rank > min(known[name][-2:]):
            raise UserError(f"rank: {rank} is larger than a side of {name} {list(known[name])}")
    return chosen


def choose(model: Transformer, targets: Sequence[str]) -> list[str]:
    """The names that :func:`add_lora` adapts for ``targets``, in the model's order. Raises UserError."""
    if not targets:
        raise UserError(f"targets: none given; expected all, experts, or some of {_KINDS}")
    known, chosen = matrices(model), set[str]()
    deep = {name for name in known if _is_deep(name, model)}
    for target in targets:
        if target == "all":
            found = known.keys() - deep
        else:
            found = {name for name in known if _fits(name, target) and (name not in deep or _numbered(target))}
        if not found:
            raise UserError(_why_not(model, target, known))
        chosen |= found
    return [name for name in known if name in chosen]


def _fits(name: str, target: str) -> bool:
    """A glob without dots is for one part of the name; of stacked tensors' names the last part does not count."""
    if "." in target:
        return any(fnmatchcase(name, glob) for glob in (target, f"*.{target}", f"{target}.*", f"*.{target}.*"))
    parts = name.split(".")[3:]
    return any(fnmatchcase(part, target) for part in (parts[:-1] if ".experts." in name else parts))


def _is_deep(name: str, model: Transformer) -> bool:
    return int(name.split(".")[2]) >= model.config.num_hidden_layers


def _numbered(target: str) -> bool:
    parts = target.split(".")
    return len(parts) > 2 and parts[:2] == ["model", "layers"] and parts[2].isdecimal()


def _why_not(model: Transformer, target: str, known: Mapping[str, object]) -> str:
    for name, module in model.named_modules():
        if not any(
            fnmatchcase(last, end) for last, end in ((name.rpartition(".")[2], target), (f".{name}", f"*.{target}"))
        ):
            continue
        if module is model.lm_head or isinstance(module, nn.Embedding):
            return f"targets: {target!r}: embedding and head are not adapted, their weights are read directly; try all"
        if isinstance(module, RMSNorm):
            return f"targets: {target!r}: a norm is no matrix; tune it fully, or adapt the projection behind it"
        if isinstance(module, Router):
            return (
                f"targets: {target!r}: a router's weight is not adapted, its choices are made in FP32 beside the "
                "products; its neighbours can be: experts, shared_experts, o_proj"
            )
    if target == "router":
        return _why_not(model, "gate", known) if model.routers else f"targets: {target!r}: the model has no router"
    names = {part for name in known for part in kind(name).split(".")} | {kind(name) for name in known} | {"all"}
    there = ", ".join(sorted({kind(name).rpartition(".")[2] for name in known if ".experts." not in name}))
    experts = ", experts" if any(".experts." in name for name in known) else ""
    return f"targets: {target!r} matches nothing{nearest(target, names)}; there are {there}{experts}, all"


def attach(model: Transformer, changes: Mapping[str, LowRank]) -> Adapted:
    """Puts ``changes``, by name, around the matrices of ``model``; their tensors become its only trainable parameters.
    Raises UserError where a name or shape does not fit, or the model has an adapter already."""
    if next(adapters(model), None) is not None:
        raise UserError("the model has an adapter already; merge_lora(model) makes it part of the weights")
    known = matrices(model)
    for name, change in changes.items():
        if name not in known:
            raise UserError(f"adapter: {name}: the model has no such matrix{nearest(name, known)}")
        if change.shape != known[name]:
            raise UserError(f"adapter: {name} is for {list(change.shape)}, the model has {list(known[name])}")
    total = sum(math.prod(shape) for shape in _parameter_shapes(model))
    model.requires_grad_(False)
    for name in dict.fromkeys(name.rpartition(".")[0] if ".experts." in name else name for name in changes):
        parent, _, own = name.rpartition(".")
        base = model.get_submodule(name)
        new: LoRALinear | LoRAExperts
        if isinstance(base, _EXPERTS):
            new = LoRAExperts(base, *(changes.get(f"{name}.{which}_proj") for which in STACKED))
        else:
            new = LoRALinear(base, changes[name])
        new.train(base.training)
        setattr(model.get_submodule(parent), own, new)
    left = [name for name in known if name not in changes]
    return Adapted(
        {name: known[name] for name in known if name in changes},
        {name: change.rank for name, change in changes.items()},
        {name: known[name] for name in left if not _is_deep(name, model)},
        sum(_is_deep(name, model) for name in left),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        total,
    )


def _parameter_shapes(model: Transformer) -> Iterator[tuple[int, ...]]:
    """Of every weight, packed or not."""
    held = matrices(model)
    yield from held.values()
    seen = {f"{name}.weight" for name in held} | held.keys()
    yield from (tuple(p.shape) for name, p in model.named_parameters() if name not in seen)
    if isinstance(model.lm_head, QuantizedLinear):
        yield tuple(model.lm_head.shape)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoRAExperts]]:
    """Every adapted module and its name."""
    yield from ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear | LoRAExperts))


def low_ranks(model: nn.Module) -> dict[str, LowRank]:
    """What is added to which matrix; the tensors are the parameters themselves."""
    out = {}
    for name, module in adapters(model):
        if isinstance(module, LoRALinear):
            out[name] = module.change
        else:
            found = ((which, module.change(which)) for which in STACKED)
            out |= {f"{name}.{which}_proj": change for which, change in found if change is not None}
    return out


@contextmanager
def disabled(model: Transformer) -> Iterator[None]:
    """Within, ``model`` is what it was before it was adapted."""
    found = list(adapters(model))
    for name, module in found:
        _put(model, name, module.base)
    try:
        yield
    finally:
        for name, module in found:
            _put(model, name, module)


def mergeable(model: nn.Module) -> bool:
    """Whether all that was adapted is dense."""
    return all(type(module.base) in (Linear, Experts) for _, module in adapters(model))


@torch.no_grad()
def merge_lora(model: Transformer) -> None:
    """Adds what was learned to the weights, in FP32, and puts the modules back that were there before. Raises UserError
    where the weights are packed or FP8: they would be rounded again."""
    found = list(adapters(model))
    if not mergeable(model):
        raise UserError("an adapter merges into dense weights; load the model with weights='dense'")
    for name, module in found:
        if isinstance(module, LoRALinear):
            add_change(module.base.weight, module.change)  # type: ignore[arg-type]
        else:
            for which in STACKED:
                if (change := module.change(which)) is not None:
                    add_change(getattr(module.base, f"{which}_proj"), change)
        _put(model, name, module.base)


@torch.no_grad()
def add_change(weight: Tensor, change: LowRank) -> None:
    """Adds ``change`` to ``weight``, summed in FP32 at least; stacked experts one after the other."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.dim() == 2:
        weight.copy_(change.delta(dtype=dtype).to(weight.device).add_(weight))
        return
    for expert, part in enumerate(weight):
        part.copy_(change.delta(expert, dtype).to(weight.device).add_(part))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
