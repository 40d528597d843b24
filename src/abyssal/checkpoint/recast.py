"""A checkpoint's tensors in other dtypes, one at a time: cast, dequantised from FP8 blocks, or quantised to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from abyssal.checkpoint.names import SCALE
from abyssal.checkpoint.precision import FP8, Plan
from abyssal.checkpoint.shards import Stored
from abyssal.checkpoint.writer import Entry
from abyssal.errors import UserError
from abyssal.kernels import fp8


def check_scales(scale: Tensor, name: str) -> None:
    """Raises UserError where a scale of the FP8 weight ``name`` is not finite."""
    if not scale.float().isfinite().all():
        raise UserError(f"{name}{SCALE}: holds NaN or infinite numbers; the file is damaged")


class Source(Protocol):
    """Tensors by name: those of a folder (:class:`~abyssal.checkpoint.shards.Shards`) or of a model in memory."""

    @property
    def files(self) -> list[str]: ...
    def names(self, file: str) -> list[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def __getitem__(self, name: str) -> Stored: ...
    def read(self, name: str) -> Tensor: ...
    def batches(self, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]: ...
    def open(self, file: str) -> AbstractContextManager[Any]: ...


class Recast:
    """The tensors ``wanted`` of ``source`` as they will be after ``plan``; scales come and go with FP8.

    ``were_powers``: the scales of ``source`` are powers of two; new ones then are, too. ``power_of_two`` asks for such
    scales: where those of ``source`` are not, what is in FP8 already is quantised anew, else it stays as it is.
    ``copies`` are names that do not exist yet and the tensors they repeat.
    """

    def __init__(
        self,
        source: Source,
        wanted: Collection[str],
        plan: Plan,
        *,
        power_of_two: bool = False,
        were_powers: bool = False,
        copies: dict[str, str] | None = None,
    ) -> None:
        self.source = source
        self.wanted = wanted
        self.plan = plan
        self.power_of_two = power_of_two or were_powers
        self.keep_blocks = were_powers or not power_of_two
        self.copies = copies or {}

    def names(self, file: str) -> list[str]:
        """What of ``file`` is written; scales are not listed."""
        return [name for name in self.source.names(file) if name in self.wanted]

    def group(self, name: str) -> list[Entry]:
        """What the tensor ``name`` becomes: one entry, and one more for its scales where it will be FP8."""
        original = self.copies.get(name, name)
        stored = self.source[original]
        entry = Entry(name, self.plan.dtype(original, stored.dtype), stored.shape)
        if entry.dtype != FP8:
            return [entry]
        if len(stored.shape) != 2:
            raise UserError(f"{name}: shape {list(stored.shape)}; FP8 blocks need a matrix")
        kept = stored.dtype == FP8 and self.keep_blocks
        scale_dtype = self.source[original + SCALE].dtype if kept else torch.float32
        return [entry, Entry(name + SCALE, scale_dtype, fp8.scale_shape(stored.shape))]

    def tensors(self, entries: Sequence[Entry]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of ``entries`` (whole groups), one file after the other.

        Raises UserError for numbers that are not finite where they would be quantised.
        """
        own = [entry.name for entry in entries if entry.name in self.wanted]
        for file, names in self.source.batches(own):
            with self.source.open(file) as opened:
                for name in names:
                    yield from self._one(name, name, opened)
        for entry in entries:
            if (original := self.copies.get(entry.name)) is not None:
                with self.source.open(self.source[original].file) as opened:
                    yield from self._one(entry.name, original, opened)

    def _one(self, name: str, original: str, opened: Any) -> Iterator[tuple[str, Tensor]]:
        tensor = opened.get_tensor(original)
        target = self.plan.dtype(original, tensor.dtype)
        if tensor.dtype == FP8:
            together = self.source[original + SCALE].file == self.source[original].file
            scale = (opened.get_tensor if together else self.source.read)(original + SCALE)
            check_scales(scale, original)
            if target != FP8:
                yield name, fp8.dequantize(tensor, scale, target)
            elif self.keep_blocks:
                yield name, tensor
                yield name + SCALE, scale
            else:
                yield from self._quantized(name, original, fp8.dequantize(tensor, scale, torch.float32))
        elif target == FP8:
            yield from self._quantized(name, original, tensor)
        else:
            cast = tensor.to(target)
            if target == torch.float16 and not cast.isfinite().all() and tensor.isfinite().all():
                raise UserError(f"{original}: holds {tensor.abs().max().item():.3g}, too large for float16")
            yield name, cast

    def _quantized(self, name: str, original: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        stored, scale = fp8.quantize(tensor, power_of_two=self.power_of_two)
        if not scale.isfinite().all():
            raise UserError(f"{original}: holds NaN or infinite numbers, which FP8 blocks cannot")
        yield name, stored
        yield name + SCALE, scale
