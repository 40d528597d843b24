"""Which part of a whole tensor lies on this process."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """What of ``whole`` lies here where it is divided as ``parameter`` is: a view."""
    if not isinstance(parameter, DTensor):
        return whole
    # No public function says this yet; torch's own checkpoints ask this one.
    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        whole = whole.narrow(dim, min(offset, whole.shape[dim]), size)
    return whole


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
