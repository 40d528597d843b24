"""How many bytes a model's weights take in each precision, from the config alone.

``fp32``, ``bf16`` and ``fp8`` are what ``abyssal export --dtype`` writes: in FP8 the matrices of attention, dense MLPs
and experts, each with an FP32 scale a block of 128 × 128, as DeepSeek-V3 is published; the rest BF16, and
e_score_correction_bias FP32 everywhere. ``int8`` and ``int4`` stand for weight-only quantisation of the same matrices,
symmetric, without zero points: int8 with one BF16 scale a row (an output), int4 with one BF16 scale a group of 128
along the row, the last group being shorter, two weights a byte and each row a whole number of bytes; the rest as in
``bf16``. What a library that quantises adds beyond that is not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from abyssal.analysis.blueprint import blueprint
from abyssal.checkpoint.names import disk_tensors, layer_of
from abyssal.checkpoint.precision import FP8, Plan
from abyssal.config import ModelConfig
from abyssal.kernels import fp8

PRECISIONS = ("fp32", "bf16", "fp8", "int8", "int4")
GROUP = 128
"""Weights that share a scale in int4."""

_FP8 = Plan(FP8)


@dataclass(frozen=True)
class Weights:
    """Bytes of all tensors: the main model (a tied head once), and the MTP modules without what they share with it."""

    main: int
    mtp: int


def count_weights(config: ModelConfig) -> dict[str, Weights]:
    """Bytes by precision, in the order of :data:`PRECISIONS`; takes no memory for weights."""
    model = blueprint(config)
    main, mtp = Counter[str](), Counter[str]()
    for name, tensor in disk_tensors(model):
        layer = layer_of(name)
        counts = main if layer is None or layer < config.num_hidden_layers else mtp
        for precision, nbytes in _nbytes(name, tuple(tensor.shape)).items():
            counts[precision] += nbytes
    return {precision: Weights(main[precision], mtp[precision]) for precision in PRECISIONS}


def _nbytes(name: str, shape: tuple[int, ...]) -> dict[str, int]:
    size, dtype = math.prod(shape), _FP8.dtype(name, torch.bfloat16)
    plain = size * dtype.itemsize
    if dtype != FP8:
        return {"fp32": 4 * size, "bf16": plain, "fp8": plain, "int8": plain, "int4": plain}
    return matrix_bytes(*shape)


def matrix_bytes(rows: int, columns: int) -> dict[str, int]:
    """Bytes by precision of a matrix of attention, a dense MLP or an expert: one that is quantised."""
    size = rows * columns
    return {
        "fp32": 4 * size,
        "bf16": 2 * size,
        "fp8": size + 4 * math.prod(fp8.scale_shape((rows, columns))),
        "int8": size + 2 * rows,
        "int4": rows * (math.ceil(columns / 2) + 2 * math.ceil(columns / GROUP)),
    }
