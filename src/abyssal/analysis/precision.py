"""How much of a model is stored in which precision, counted tensor by tensor on the model built without memory."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from abyssal.analysis.blueprint import blueprint
from abyssal.analysis.parameters import part_of
from abyssal.checkpoint.names import disk_tensors, layer_of
from abyssal.checkpoint.precision import FP8, Plan
from abyssal.config import ModelConfig
from abyssal.errors import UserError
from abyssal.kernels import fp8


@dataclass
class Share:
    """Tensors, parameters and bytes in one precision."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0

    def add(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> None:
        """Counts one tensor."""
        self.tensors += 1
        self.parameters += torch.Size(shape).numel()
        self.nbytes += torch.Size(shape).numel() * dtype.itemsize


@dataclass
class Precisions:
    """The main model by precision, and each of its parts; the FP32 scales of FP8 blocks and the MTP modules apart."""

    by_dtype: dict[torch.dtype, Share] = field(default_factory=dict)
    by_part: dict[str, dict[torch.dtype, int]] = field(default_factory=dict)
    """Parameters of each part in each precision."""
    scales: Share = field(default_factory=Share)
    mtp: dict[torch.dtype, Share] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Of the main model; scales are none."""
        return sum(share.parameters for share in self.by_dtype.values())

    @property
    def nbytes(self) -> int:
        """Of the main model with its scales."""
        return sum(share.nbytes for share in self.by_dtype.values()) + self.scales.nbytes


def published_plan(config: ModelConfig) -> Plan:
    """FP8 blocks where the published config says so, else BF16."""
    settings = config.published.get("quantization_config")
    is_fp8 = isinstance(settings, dict) and settings.get("quant_method") == "fp8"
    return Plan(FP8 if is_fp8 else torch.bfloat16)


def count_precisions(config: ModelConfig, plan: Plan, stored: Mapping[str, torch.dtype] | None = None) -> Precisions:
    """Counts ``config``'s tensors under ``plan``, as they lie on disk: a tensor an expert, a tied head once. ``stored``
    are the dtypes that a checkpoint has them in (BF16 where it is silent).

    Raises UserError where the plan puts what is no matrix in FP8 blocks, and for a pattern that fits no tensor.
    """
    model = blueprint(config)
    out = Precisions()
    unused = dict(plan.patterns)
    for name, tensor in disk_tensors(model):
        dtype = plan.dtype(name, (stored or {}).get(name, torch.bfloat16))
        for pattern in [pattern for pattern in unused if fnmatch.fnmatchcase(name, pattern)]:
            del unused[pattern]
        if dtype == FP8 and tensor.dim() != 2:
            raise UserError(f"plan: {name} would be FP8, which needs a matrix; its shape is {list(tensor.shape)}")
        layer = layer_of(name)
        if layer is not None and layer >= config.num_hidden_layers:
            out.mtp.setdefault(dtype, Share()).add(tensor.shape, dtype)
            continue
        out.by_dtype.setdefault(dtype, Share()).add(tensor.shape, dtype)
        part = out.by_part.setdefault(part_of(name), {})
        part[dtype] = part.get(dtype, 0) + tensor.numel()
        if dtype == FP8:
            out.scales.add(fp8.scale_shape(tensor.shape), torch.float32)
    if unused:
        raise UserError(
            f"plan: {next(iter(unused))!r} fits no tensor of this model; expected for instance '*.self_attn.*'"
        )
    return out
