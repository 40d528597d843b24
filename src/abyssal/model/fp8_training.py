"""Training in FP8 (V3 paper §3.3): the linear layers of a finished model change how they multiply, and nothing else.

What is swapped is the class of a module, not the module: parameters, names, state_dict, hooks and the optimizer's hold
on the weights stay as they are, so checkpoints and exports know nothing of it. The products and what is rounded where:
:mod:`abyssal.kernels.fp8_training`.
"""

from __future__ import annotations

from torch import Tensor

from abyssal.kernels import fp8_training
from abyssal.kernels.backend import product_dtype
from abyssal.kernels.fp8_training import Segments
from abyssal.model.layers import Linear
from abyssal.model.moe import Experts
from abyssal.model.transformer import Transformer


class FP8TrainingLinear(Linear):
    """``nn.Linear`` with all three products in FP8: [..., I] -> [..., O], in the autocast dtype where that is on."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(product_dtype(x))
        out = fp8_training.linear(rows, self.weight).view(*x.shape[:-1], self.weight.shape[0])
        return out if self.bias is None else out + self.bias.to(out.dtype)


class FP8TrainingExperts(Experts):
    """:class:`Experts` with all products in FP8.

    ``gate_up_proj`` is cut in blocks as one matrix. Where the experts' width is no multiple of 128, one of its blocks
    holds rows of gate and of up, which an export cuts apart.
    """

    def gate_up(self, rows: Tensor, where: Segments) -> Tensor:
        return fp8_training.grouped_linear(rows, self.gate_up_proj, where)

    def down(self, rows: Tensor, where: Segments) -> Tensor:
        return fp8_training.grouped_linear(rows, self.down_proj, where)


def train_in_fp8(model: Transformer) -> None:
    """Has every linear layer of attention, dense MLPs, shared experts and MTP modules, and all routed experts, multiply
    in FP8 from here on, in evaluation too. Router, norms, embedding, head and the attention core stay as they are, and
    so does what is no plain :class:`Linear` or :class:`Experts` (any more). A second call changes nothing.
    """
    for module in model.model.modules():
        if type(module) is Linear:
            module.__class__ = FP8TrainingLinear
        elif type(module) is Experts:
            module.__class__ = FP8TrainingExperts
