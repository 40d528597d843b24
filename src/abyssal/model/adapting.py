"""A model adapted: which of its matrices, by what users call them, LoRA's modules put in their place
(:mod:`abyssal.model.lora`), taken out again, or merged into the weights.

What is trained afterwards is the adapters and nothing else. :class:`Adapted` says which matrices were adapted and which
could have been; a name that matches nothing is an error, since an adapter that silently skips the experts is found out
only when it has been trained.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from abyssal.errors import UserError, nearest
from abyssal.model.fp8 import FP8Linear
from abyssal.model.layers import Linear, RMSNorm
from abyssal.model.lora import STACKED, LoRAExperts, LoRALinear, LowRank, stacked_shapes
from abyssal.model.moe import Experts
from abyssal.model.quantized import QuantizedExperts, QuantizedLinear
from abyssal.model.router import Router
from abyssal.model.transformer import Transformer

_LINEAR = (Linear, FP8Linear, QuantizedLinear)
_EXPERTS = (Experts, QuantizedExperts)
_KINDS = (
    "q_proj, q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
)


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
