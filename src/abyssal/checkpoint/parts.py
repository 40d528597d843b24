"""Which part of every published tensor one of several processes holds, when a model is divided for inference.

``tensor`` processes divide heads, widths and the vocabulary, ``expert`` sets of them the routed experts; a process's
number is ``set · tensor + way``. What is the same on every set (attention, dense MLPs, embedding, head) is divided by
tensor alone; a shared expert is divided over all processes, so that one sum over all of them gives a layer's output.

    rows of       q_proj, q_b_proj, kv_b_proj, k_proj, v_proj, gate_proj, up_proj, embed_tokens, lm_head
    columns of    o_proj, down_proj
    whole         latent projections, norms, routers, eh_proj

The model itself only becomes smaller: the same modules with fewer heads and narrower matrices, which give summands of
what the whole one gives (:mod:`abyssal.distributed.inference` adds them up). So whatever takes a module's place to hold
fewer bits does so here as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from abyssal.errors import UserError
from abyssal.kernels import fp8
from abyssal.kernels.packed import BLOCK, Packed
from abyssal.model import Transformer
from abyssal.model.attention import Queries
from abyssal.model.layers import Linear
from abyssal.model.moe import Experts

_ROWS = frozenset(
    {"q_proj", "q_b_proj", "kv_b_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"}
)
_COLUMNS = frozenset({"o_proj", "down_proj"})
_EXPERT = re.compile(r"(\.mlp\.experts\.)(\d+)\.")


@dataclass(frozen=True)
class Part:
    """What process ``rank`` of ``tensor`` × ``expert`` holds of a model with ``experts`` routed experts a layer."""

    tensor: int = 1
    expert: int = 1
    rank: int = 0
    experts: int = 0

    @property
    def whole(self) -> bool:
        """Whether that is all of it."""
        return self.tensor * self.expert == 1

    @property
    def here(self) -> range:
        """The routed experts of each layer that are here."""
        count = self.experts // self.expert
        first = self.rank // self.tensor * count
        return range(first, first + count)

    def has(self, name: str) -> bool:
        """Whether anything of the published tensor ``name`` is here."""
        found = _EXPERT.search(name)
        return self.expert == 1 or found is None or int(found[2]) in self.here

    def cut(self, name: str, shape: Sequence[int]) -> tuple[slice, ...]:
        """What of the published tensor ``name`` of ``shape`` is here: an index; () is all of it. Of scales, whose
        shape is that of blocks, the blocks."""
        dim, ways, way = self._divided(name)
        if ways == 1 or dim >= len(shape):
            return ()
        size = shape[dim] // ways
        return (*(slice(None),) * dim, slice(way * size, (way + 1) * size))

    def published(self, name: str) -> str:
        """The published name of what this part's model, which counts the experts that it has, calls ``name``."""
        first = self.here.start
        return name if first == 0 else _EXPERT.sub(lambda m: f"{m[1]}{int(m[2]) + first}.", name, count=1)

    def in_blocks(self, name: str, shape: Sequence[int], block: int) -> bool:
        """Whether what is here of the matrix ``name`` begins and ends where blocks of ``block`` rows or columns do."""
        dim, ways, _ = self._divided(name)
        return ways == 1 or dim >= len(shape) or shape[dim] % (ways * block) == 0

    def check_fp8(self, shapes: Iterable[tuple[str, Sequence[int]]]) -> None:
        """Raises UserError where a matrix stored in FP8 blocks, by name and shape, cannot be divided as it is."""
        for name, shape in shapes:
            self._check_blocks(name, shape, fp8.BLOCK, "FP8")

    def check_packed(self, packed: Mapping[str, Packed]) -> None:
        """The same for matrices stored packed: rows can always be divided."""
        for name, matrix in packed.items():
            if self._divided(name)[0] == 1:
                self._check_blocks(name, matrix.shape, BLOCK[matrix.kind], matrix.kind)

    def _check_blocks(self, name: str, shape: Sequence[int], block: int, kind: str) -> None:
        dim, ways, _ = self._divided(name)
        if not self.in_blocks(name, shape, block):
            raise UserError(
                f"{name}: {shape[dim]} {('rows', 'columns')[dim]} of {kind}, in blocks of {block}, cannot be divided "
                f"by {ways}; expected fewer processes, or --weights dense"
            )

    def take(self, model: Transformer) -> None:
        """Makes ``model``, whole and on the meta device, the part that is here. Its config says then how many heads
        there are here, which is what a cache asks, and for all else what the whole model has."""
        if self.whole:
            return
        for name, module in model.named_modules():
            if isinstance(module, Queries):
                module.heads //= self.tensor
            if isinstance(module, Experts):
                self._take_experts(module)
            elif isinstance(module, Linear | nn.Embedding):
                for own, parameter in list(module.named_parameters(recurse=False)):
                    self._take(module, own, parameter[self.cut(f"{name}.{own}", parameter.shape)])
            if isinstance(module, Linear):
                module.out_features, module.in_features = module.weight.shape
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        attention = model.config.attention
        heads = {
            name: getattr(attention, name) // self.tensor
            for name in ("num_attention_heads", "num_key_value_heads")
            if hasattr(attention, name)
        }
        model.config = model.config.model_copy(update={"attention": attention.model_copy(update=heads)})

    def _take_experts(self, experts: Experts) -> None:
        both, down = experts.gate_up_proj, experts.down_proj
        width = down.shape[2] // self.tensor
        self._take(experts, "gate_up_proj", both[: len(self.here), : 2 * width])
        self._take(experts, "down_proj", down[: len(self.here), :, :width])

    @staticmethod
    def _take(module: nn.Module, name: str, part: Tensor) -> None:
        # On the meta device: only its shape counts.
        new = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        setattr(module, name, nn.Parameter(new, requires_grad=module.get_parameter(name).requires_grad))

    def _divided(self, name: str) -> tuple[int, int, int]:
        """The dimension that is divided, into how many, and which of them is here."""
        own = name.split(".")[-2]
        if own not in _ROWS and own not in _COLUMNS:
            return 0, 1, 0
        dim = int(own in _COLUMNS)
        if ".shared_experts." in name:
            return dim, self.tensor * self.expert, self.rank
        return dim, self.tensor, self.rank % self.tensor


WHOLE = Part()
