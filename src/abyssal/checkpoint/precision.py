"""Which tensor is stored in which dtype: the published rule, and others given as patterns.

In V3's FP8 checkpoint all attention projections, dense MLPs, routed and shared experts are E4M3 in blocks of 128 × 128;
embedding, head, norms, routers and the MTP modules' eh_proj are BF16; e_score_correction_bias and the scales FP32.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from abyssal.checkpoint.names import BIAS
from abyssal.errors import UserError, nearest

FP8 = torch.float8_e4m3fn
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp8": FP8}
"""The names on the command line."""

_BLOCKS = re.compile(r"\.(q|q_a|q_b|k|v|kv_a|kv_b|o|gate|up|down)_proj(_with_mqa)?\.weight$")


@dataclass(frozen=True)
class Plan:
    """``base`` for all tensors, but for what the first fitting one of ``patterns`` says (globs over published
    names)."""

    base: torch.dtype | None
    """None: as it is stored. FP8: what V3 has in FP8, the rest BF16."""
    patterns: tuple[tuple[str, torch.dtype], ...] = ()

    def dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """The dtype for the tensor ``name``, which now is ``stored``; FP8 means blocks with scales."""
        for pattern, dtype in self.patterns:
            if fnmatch.fnmatchcase(name, pattern):
                return dtype
        if self.base is None:
            return stored
        if name.endswith(BIAS):
            return torch.float32  # steps of 0.001 vanish in BF16
        if self.base == FP8:
            return FP8 if _BLOCKS.search(name) else torch.bfloat16
        return self.base


def precision(name: str, field: str, others: Sequence[str] = ()) -> torch.dtype:
    """The dtype called ``name``. Raises UserError naming ``field`` and what there is, ``others`` too."""
    if name not in PRECISIONS:
        known = (*PRECISIONS, *others)
        raise UserError(f"{field}: {name!r} is not one of {', '.join(known)}{nearest(name, known)}")
    return PRECISIONS[name]


def parse_plan(texts: Sequence[str], base: torch.dtype | None, field: str = "--plan") -> Plan:
    """A plan from ``fp8`` (another base) and ``PATTERN=DTYPE`` entries, the first that fits counts. Raises
    UserError."""
    patterns = []
    for text in texts:
        pattern, equals, name = text.rpartition("=")
        if equals and not pattern:
            raise UserError(
                f"{field}: {text!r}; expected PATTERN=DTYPE, such as '*.self_attn.*=bf16', or a dtype alone"
            )
        if equals:
            patterns.append((pattern, precision(name, f"{field} {text!r}")))
        else:
            base = precision(name, field)
    return Plan(base, tuple(patterns))
