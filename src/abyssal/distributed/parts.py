"""Which part of a whole tensor lies on this process."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from abyssal.distributed.together import local

_GATE_UP = ".experts.gate_up_proj"


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """What of ``whole`` lies here where it is divided as ``parameter`` is: a view."""
    if not isinstance(parameter, DTensor):
        return whole
    # No public function says this yet; torch's own checkpoints ask this one.
    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        whole = whole.narrow(dim, min(offset, whole.shape[dim]), size)
    return whole


def take_rows(parameter: Tensor, begin: int, piece: Tensor) -> None:
    """Copies into ``parameter`` what of it lies here and is in ``piece``: rows from ``begin`` on of the whole one."""
    here, offsets = local(parameter), [0] * parameter.dim()
    if isinstance(parameter, DTensor):
        placed = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        offsets = list(placed[1])
    first, last = max(begin, offsets[0]), min(begin + len(piece), offsets[0] + here.shape[0])
    if first >= last or here.numel() == 0:
        return
    piece = piece[first - begin : last - begin]
    for dim in range(1, piece.dim()):
        piece = piece.narrow(dim, offsets[dim], here.shape[dim])
    here[first - offsets[0] : last - offsets[0]] = piece.to(here)


def as_divided(part: Tensor, parameter: Tensor) -> Tensor:
    """``part``, this process's part of something divided as ``parameter`` is, as a DTensor where that is one."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements, shape, stride = (
        parameter.device_mesh,
        parameter.placements,
        parameter.shape,
        parameter.stride(),
    )
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def matrices(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with an experts' gate_up_proj [E, 2F, D] as two, gate_proj and up_proj [E, F, D], which share its
    memory. Divided by width, it has this process's columns of both: the two can be put together in one order only."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(_GATE_UP) or tensor.dim() < 3:
            out[name] = tensor
            continue
        for which, part in zip(("gate_proj", "up_proj"), local(tensor).chunk(2, dim=1), strict=True):
            out[name.removesuffix("gate_up_proj") + which] = _half(part, tensor)
    return out


def _half(part: Tensor, of: Tensor) -> Tensor:
    if not isinstance(of, DTensor):
        return part
    shape = torch.Size((of.shape[0], of.shape[1] // 2, of.shape[2]))
    stride = (shape[1] * shape[2], shape[2], 1)
    return DTensor.from_local(part, of.device_mesh, of.placements, run_check=False, shape=shape, stride=stride)
