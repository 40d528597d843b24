"""Which weights are BF16 while a model trains in BF16, and putting them there and back.

A product in BF16 reads its matrix in BF16, so casting an FP32 matrix at every step only costs time and memory. Matrices
that nothing but such products read are therefore kept in BF16 themselves; the rest of their FP32 number (the master,
which the optimizer works on) is in the optimizer's state, ``low`` (:func:`abyssal.kernels.adamw.split`). No bit is lost
on the way there or back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.kernels.adamw import merge, split
from abyssal.model.moe import Experts


def product_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that only matrix products read, by name: the weights of linear layers, and the experts'.

    Not among them: norms and biases, the router's weight (it decides in FP32), the embedding, and so a head tied to it.
    """
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found.append(module.weight)
        elif isinstance(module, Experts):
            found += module.parameters()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    wanted = {id(parameter) for parameter in found} - embeddings
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}


def to_bfloat16(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Makes the product matrices that are trained BF16 in place, with ``low`` in the optimizer's state. Gradients are
    dropped."""
    for parameter in product_matrices(model).values():
        if not parameter.requires_grad:
            continue
        parameter.grad = None
        parameter.data, optimizer.state[parameter]["low"] = split(parameter.data.float())


def to_float32(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Makes every weight that has a ``low`` its FP32 master again. Gradients are dropped."""
    for parameter in model.parameters():
        if "low" in optimizer.state.get(parameter, ()):
            parameter.grad = None
            parameter.data = merge(parameter.data, optimizer.state[parameter].pop("low"))


def lows(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``low`` of every weight that has one, by name."""
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    return {name: state["low"] for name, state in states.items() if "low" in state}


def sum_gradients_in_float32(model: nn.Module, wanted: bool) -> None:
    """Whether BF16 weights gather FP32 gradients over several backward passes, each of which gives BF16 (what is added
    to a sum in BF16 would mostly be rounded away). No gradient may stand when this changes."""
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 and parameter.requires_grad:
            parameter.grad_dtype = torch.float32 if wanted else torch.bfloat16
