"""A checkpoint with an adapter or an overlay worked in, tensor by tensor as it is read: what is written anew then is a
whole model, and no more of it than a tensor is in memory.

Sums are in FP32, from the file's own numbers (FP8 blocks dequantised); what they are rounded to is the writer's
business (:mod:`abyssal.checkpoint.recast`). What rounding does to the change, which may be smaller than a step of the
format, is added up for :class:`Rounding`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from abyssal.checkpoint.names import SCALE
from abyssal.checkpoint.overlay import Overlay
from abyssal.checkpoint.precision import FP8
from abyssal.checkpoint.recast import Source, check_scales
from abyssal.checkpoint.shards import Stored
from abyssal.errors import UserError
from abyssal.kernels import fp8
from abyssal.model.lora import LowRank

Patch = Callable[[Tensor], Tensor]
"""A tensor as it is in the base, FP32 -> as it shall be."""
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


@dataclass
class Rounding:
    """What became of the changed tensors when they were rounded to what is stored."""

    tensors: int = 0
    exact: float = 0.0
    """Σ w² of the tensors before they were rounded."""
    change: float = 0.0
    """Σ d² of what was added to them."""
    error: float = 0.0
    """Σ e² of what rounding added."""
    along: float = 0.0
    """Σ d · (d + e)."""

    @property
    def of_weights(self) -> float:
        """The error's size relative to the weights'."""
        return (self.error / self.exact) ** 0.5 if self.exact else 0.0

    @property
    def of_change(self) -> float:
        """The same relative to the change's."""
        return (self.error / self.change) ** 0.5 if self.change else 0.0

    @property
    def survived(self) -> float:
        """How much of the change is there along its own direction; 1: all of it."""
        return self.along / self.change if self.change else 1.0

    def describe(self) -> str:
        """One line."""
        coarse = "" if self.survived > 0.9 else ": the base's format is too coarse for it, --dtype bf16 keeps it"
        return (
            f"{self.tensors:,} tensors changed; rounding moved them by {self.of_weights:.2e} of their size, "
            f"{self.of_change:.2e} of the change's; {self.survived:.1%} of the change is in what was written{coarse}"
        )


class Patched:
    """``source`` with ``patches`` by published name, as a :class:`~abyssal.checkpoint.recast.Source`.

    A patched tensor comes in FP32 whatever dtype it is said to be stored in. Raises UserError where a patch is for a
    tensor that is not there.
    """

    def __init__(self, source: Source, patches: Mapping[str, Patch]) -> None:
        for name in patches:
            if name not in source:
                raise UserError(f"{name}: the base has no such tensor")
        self.source, self.patches = source, patches
        self.rounding = Rounding()
        self._last: tuple[str, Tensor] | None = None

    @property
    def files(self) -> list[str]:
        return self.source.files

    def names(self, file: str) -> list[str]:
        return self.source.names(file)

    def __contains__(self, name: str) -> bool:
        return name in self.source

    def __getitem__(self, name: str) -> Stored:
        return self.source[name]

    def batches(self, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
        return self.source.batches(names)

    def read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        return self._patch(name, tensor, None) if name in self.patches else tensor

    @contextmanager
    def open(self, file: str) -> Iterator[_Opened]:
        with self.source.open(file) as opened:
            yield _Opened(self, opened)

    def written(self, name: str, stored: Tensor) -> None:
        """Takes note of what the patched tensor ``name`` was rounded to, right after it was read."""
        if self._last is None or self._last[0] != name:
            return
        exact, change = self._last[1], self._change
        error = stored.to(exact.device, torch.float32) - exact
        r = self.rounding
        r.tensors += 1
        r.exact += exact.double().square().sum().item()
        r.change += change.double().square().sum().item()
        r.error += error.double().square().sum().item()
        r.along += (change.double() * (change + error)).sum().item()
        self._last = None

    def _patch(self, name: str, tensor: Tensor, opened: Any) -> Tensor:
        if tensor.dtype == FP8:
            together = opened is not None and self.source[name + SCALE].file == self.source[name].file
            scale = opened.get_tensor(name + SCALE) if together else self.source.read(name + SCALE)
            check_scales(scale, name)
            base = fp8.dequantize(tensor, scale, torch.float32)
        else:
            base = tensor.to(torch.float32)
        patched = self.patches[name](base)
        if patched.shape != base.shape:
            raise UserError(f"{name}: changed by one of {list(patched.shape)}, the base has {list(base.shape)}")
        self._last, self._change = (name, patched), patched - base
        return patched


class _Opened:
    """A file of a patched source."""

    def __init__(self, patched: Patched, opened: Any) -> None:
        self.patched, self.opened = patched, opened

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.opened.get_tensor(name)
        return self.patched._patch(name, tensor, self.opened) if name in self.patched.patches else tensor


@dataclass(frozen=True)
class _Sum:
    """Adds the part of a change that is of one published tensor."""

    change: LowRank
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    def __call__(self, base: Tensor) -> Tensor:
        c = self.change
        if self.expert is not None:
            c = LowRank(c.a[self.expert], c.b[self.expert][self.rows], c.alpha, c.rslora)
        return c.delta().to(base.device) + base


def adapter_patches(changes: Mapping[str, LowRank], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Patch]:
    """What :meth:`abyssal.checkpoint.adapter.Adapter.changes` gave, for the tensors that it changes; ``shapes`` are
    those of all tensors by published name. Raises UserError for a change of something else, or of another shape."""
    out: dict[str, Patch] = {}
    used = set[str]()
    for name, shape in shapes.items():
        target = name.removesuffix(".weight")
        if match := _EXPERT.match(name):
            prefix, expert, which = match.groups()
            target = f"{prefix}.{'down' if which == 'down' else 'gate_up'}_proj"
            if (change := changes.get(target)) is not None:
                height = change.shape[1] // (1 if which == "down" else 2)
                start = height if which == "up" else 0
                out[name] = _Sum(change, int(expert), slice(start, start + height))
        elif (change := changes.get(target)) is not None and name != target:
            if change.shape != shape:
                raise UserError(f"{name}: changed by one of {list(change.shape)}, the base has {list(shape)}")
            out[name] = _Sum(change)
        used.add(target)
    if left := sorted(changes.keys() - used):
        raise UserError(f"adapter: {left[0]}: the base has no such weight")
    return out


def overlay_patches(overlay: Overlay) -> dict[str, Patch]:
    """The overlay's tensors in place of the base's."""

    def put(tensor: Tensor) -> Patch:
        return lambda base: tensor.to(base.device, torch.float32)

    return {name: put(tensor) for name, tensor in overlay.tensors.items()}
