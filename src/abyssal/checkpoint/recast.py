"""A checkpoint's tensors in other dtypes, one at a time: cast, dequantised from FP8 blocks or packed weights, or
quantised to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from abyssal.checkpoint.names import SCALE
from abyssal.checkpoint.packing import check_packed_scales, from_disk, on_disk
from abyssal.checkpoint.precision import FP8, Plan
from abyssal.checkpoint.shards import Stored
from abyssal.checkpoint.writer import Entry
from abyssal.errors import UserError
from abyssal.kernels import fp8
from abyssal.kernels.packed import Packed, dequantize, quantize


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
    ``copies`` are names that do not exist yet and the tensors they repeat. ``packed`` says which tensors of ``source``
    are packed and how, ``packing`` which of the result will be, whatever ``plan`` says; nothing beside them is in FP8.
    ``written`` is told of each tensor that was cast or quantised what became of it, before the next one is read.
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
        packed: Mapping[str, Packed] | None = None,
        packing: Mapping[str, Packed] | None = None,
        written: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.source = source
        self.wanted = wanted
        self.plan = plan
        self.power_of_two = power_of_two or were_powers
        self.keep_blocks = were_powers or not power_of_two
        self.copies = copies or {}
        self.packed = packed or {}
        self.packing = packing or {}
        self.written = written

    def names(self, file: str) -> list[str]:
        """What of ``file`` is written; scales are not listed."""
        return [name for name in self.source.names(file) if name in self.wanted]

    def group(self, name: str) -> list[Entry]:
        """What the tensor ``name`` becomes: one entry, and one more for its scales where it will be FP8 or packed."""
        original = self.copies.get(name, name)
        stored = self.source[original]
        if original in self.packing:
            parts = on_disk(name, self.packing[original])
            return [Entry(part, tensor.dtype, tuple(tensor.shape)) for part, tensor in parts]
        shape = tuple(self.packed[original].shape) if original in self.packed else stored.shape
        entry = Entry(name, self._dtype(original, stored.dtype), shape)
        if entry.dtype != FP8:
            return [entry]
        if len(shape) != 2:
            raise UserError(f"{name}: shape {list(shape)}; FP8 blocks need a matrix")
        return [entry, Entry(name + SCALE, self._scale_dtype(original), fp8.scale_shape(shape))]

    def _scale_dtype(self, original: str) -> torch.dtype:
        kept = self.source[original].dtype == FP8 and self.keep_blocks
        return self.source[original + SCALE].dtype if kept else torch.float32

    def _dtype(self, original: str, stored: torch.dtype) -> torch.dtype:
        dtype = self.plan.dtype(original, torch.bfloat16 if original in self.packed else stored)
        return torch.bfloat16 if self.packing and dtype == FP8 else dtype

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
        # Not the tensor's own: one that was changed on the way comes in FP32.
        target = self._dtype(original, self.source[original].dtype)
        packing = self.packing.get(original)
        if original in self.packed:
            parts = on_disk(original, self.packed[original])
            scale = self._beside(original, parts[1][0], opened)
            check_packed_scales(scale, original)
            if packing is not None:
                yield from zip((part for part, _ in on_disk(name, packing)), (tensor, scale), strict=True)
                return
            exact = target if target != FP8 else torch.float32
            tensor = dequantize(from_disk(tensor, scale, self.packed[original]), exact)
        if packing is not None:
            if tensor.dtype == FP8:
                scale = self._beside(original, original + SCALE, opened)
                check_scales(scale, original)
                tensor = fp8.dequantize(tensor, scale, torch.float32)
            made = quantize(tensor, packing.kind)
            if not made.scales.isfinite().all():
                raise UserError(f"{original}: holds NaN or infinite numbers, which {packing.kind} cannot")
            yield from on_disk(name, made)
        elif tensor.dtype == FP8:
            scale = self._beside(original, original + SCALE, opened)
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
            if self.written is not None:
                self.written(original, cast)
            yield name, cast

    def _beside(self, name: str, scale: str, opened: Any) -> Tensor:
        """The scales of ``name``, which lies in ``opened``; they may lie in another file."""
        together = self.source[scale].file == self.source[name].file
        tensor: Tensor = (opened.get_tensor if together else self.source.read)(scale)
        return tensor

    def _quantized(self, name: str, original: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        stored, scale = fp8.quantize(tensor, power_of_two=self.power_of_two)
        if not scale.isfinite().all():
            raise UserError(f"{original}: holds NaN or infinite numbers, which FP8 blocks cannot")
        if self.written is not None:
            self.written(original, fp8.dequantize(stored, scale, torch.float32))
        yield name, stored
        yield name + SCALE, scale.to(self._scale_dtype(original))
