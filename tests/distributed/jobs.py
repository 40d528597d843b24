"""What the workers do. One process's answer, worked out in each of them, is what it is compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abyssal.checkpoint import sharded
from abyssal.checkpoint.folder import config_to_json
from abyssal.config import ModelConfig
from abyssal.config.parallel import ParallelConfig
from abyssal.data.loader import Batch
from abyssal.distributed import initial
from abyssal.distributed.experts import SpreadExperts
from abyssal.distributed.mesh import Mesh
from abyssal.distributed.parts import as_divided, matrices, own_part
from abyssal.distributed.together import Alone, Together, local
from abyssal.kernels.grouped import experts_reference
from abyssal.model import Transformer
from abyssal.model.moe import Experts
from abyssal.training.recipe import BalanceConfig, OptimizerConfig
from abyssal.training.step import TrainingStep

CPU = torch.device("cpu")
LENGTH, ROWS = 16, 8

CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "attention": {
        "kind": "mla",
        "num_attention_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
    },
    "mtp": {"num_nextn_predict_layers": 1},
}


def model_of(**changes: Any) -> Transformer:
    config = ModelConfig.model_validate(CONFIG | changes)
    model = Transformer(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # so that routing is no tie, and biases matter
        for parameter in model.parameters():
            parameter.mul_(3)
        for router in model.routers.values():
            assert router.e_score_correction_bias is not None
            router.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    return model


def batches_of(step: int, count: int = 2) -> list[Batch]:
    """Micro-batches of packed documents, with padding at the end of the last row."""
    generator = torch.Generator().manual_seed(step)
    out = []
    for _ in range(count):
        tokens = torch.randint(0, 64, (ROWS, LENGTH + 2), generator=generator)
        documents = (torch.arange(LENGTH + 2) > 10).long().expand(ROWS, -1).clone()
        documents[-1, 12:] = -1
        tokens[documents < 0] = 0
        out.append(Batch(tokens, documents))
    return out


def part_of(batch: Batch, together: Alone) -> Batch:
    rows = slice(together.part * ROWS // together.parts, (together.part + 1) * ROWS // together.parts)
    return together.own_part(replace(batch, tokens=batch.tokens[rows], documents=batch.documents[rows]), LENGTH)


BALANCE = BalanceConfig.model_validate(
    {
        "bias_sign": {"rate": 0.01},
        "bias_proportional": {"rate": 0.1, "every": 2},
        "token_loss": {"alpha": 0.1},
        "sequence_loss": {"alpha": 0.1},
    }
)


def step_of(model: Transformer, together: Alone, dtype: torch.dtype = torch.float32, recompute: bool = False) -> Any:
    return TrainingStep(
        model.train(),
        optimizer=OptimizerConfig(lr=3e-3),
        balance=BALANCE,
        clip=1.0,
        mtp_weight=0.3,
        device=CPU,
        dtype=dtype,
        recompute=recompute,
        together=together,
    )


def together_for(parallel: dict[str, Any]) -> Together:
    return Together(Mesh(ParallelConfig(**parallel), CPU))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in matrices(tensors).items()}


def deep_enough(parallel: dict[str, Any]) -> dict[str, Any]:
    """What a model needs for as many stages."""
    stages = ParallelConfig(**parallel).stages
    return {"num_hidden_layers": stages} if stages > 2 else {}


def micro_batches(parallel: dict[str, Any]) -> int:
    return max(ParallelConfig(**parallel).stages, 2)


def all_names(tensors: dict[str, Tensor]) -> set[str]:
    """The names that any process has; and that none is on two stages of a pipeline."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sorted(tensors))
    different = {tuple(names) for names in everyone}
    assert sum(len(names) for names in different) == len(set().union(*different))
    return set().union(*different)


def gradients(
    parallel: dict[str, Any], recompute: bool = False, isolated: bool = False, **changes: Any
) -> dict[str, float]:
    """The largest relative difference of a gradient in FP64, and what else the step says, of a model with
    ``changes``."""
    together = together_for(parallel)
    found = []
    changes, count = deep_enough(parallel) | changes, micro_batches(parallel)
    for who in (Alone(), together):
        model = model_of(**changes).double()
        who.divide(model, torch.float32)
        step = step_of(model, who, recompute=recompute)
        step.optimizer.step = lambda scale: None  # so that gradients stay
        batches = [replace(batch, isolated=isolated) for batch in batches_of(0, count)]
        result = step([part_of(batch, who) for batch in batches], LENGTH, 1e-3, 0.0)
        found.append((result, gathered({name: p.grad for name, p in model.named_parameters()}), model))
    (alone, right, one), (shared, mine, other) = found
    worst = max(float((grad - right[name]).norm() / right[name].norm()) for name, grad in mine.items())
    assert all_names(mine) == right.keys()
    assert alone.counts == shared.counts
    for layer, load in alone.loads.items():
        assert torch.equal(load, shared.loads[layer])
        if layer in other.routers or not together.pipeline:
            assert torch.equal(*(m.routers[layer].e_score_correction_bias for m in (one, other)))
    return {
        "gradient": worst,
        "loss": abs(shared.loss / alone.loss - 1),
        "mtp": abs(shared.mtp_loss[0] / alone.mtp_loss[0] - 1),
        "balance": abs(shared.balance_loss - alone.balance_loss) / max(alone.balance_loss, 1e-9),
        "norm": abs(shared.grad_norm / alone.grad_norm - 1),
    }


def losses(parallel: dict[str, Any], steps: int, dtype: str = "float32") -> tuple[list[float], list[float]]:
    """Losses of ``steps`` steps by one process and by many."""
    together, count = together_for(parallel), micro_batches(parallel)
    out = []
    for who in (Alone(), together):
        model = model_of(**deep_enough(parallel))
        who.divide(model, getattr(torch, dtype))
        step = step_of(model, who, getattr(torch, dtype))
        batches = ([part_of(batch, who) for batch in batches_of(i, count)] for i in range(steps))
        out.append([step(own, LENGTH, 3e-3, i / steps).loss for i, own in enumerate(batches)])
    return out[0], out[1]


def dispatch(choices: list[list[list[int]]]) -> float:
    """Experts spread over all processes, each with its own tokens' ``choices`` [N][K], beside the plain account of
    everybody's: the largest difference of outputs and gradients in FP64."""
    together = together_for({"replicate": dist.get_world_size(), "expert": dist.get_world_size()})
    config = ModelConfig.model_validate(CONFIG)
    assert config.moe is not None
    experts = Experts(config.hidden_size, config.moe).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, generator=generator)
    rank = dist.get_rank()
    everything = []
    for mine in choices:
        n, k = len(mine), len(mine[0]) if mine else 2
        x = torch.randn(n, config.hidden_size, generator=generator, dtype=torch.float64)
        weights = torch.rand(n, k, generator=generator, dtype=torch.float64)
        everything.append((x, torch.tensor(mine, dtype=torch.int64).view(n, k), weights))
    spread = SpreadExperts(experts, together.mesh.experts["expert", "tensor"])
    x, indices, weights = everything[rank]
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = spread(x, indices, weights)
    out.square().sum().backward()
    worst = 0.0
    total = torch.zeros((), dtype=torch.float64)
    for which, (x_, indices_, weights_) in enumerate(everything):
        x_, weights_ = x_.requires_grad_(), weights_.requires_grad_()
        right = experts_reference(x_, indices_, weights_, experts.gate_up_proj, experts.down_proj)
        total = total + right.square().sum()
        if which == rank:
            worst = max(worst, _apart(out, right))
    total.backward()
    worst = max(worst, _apart(x.grad, everything[rank][0].grad), _apart(weights.grad, everything[rank][2].grad))
    for name, parameter in spread.named_parameters():
        right = own_part(experts.get_parameter(name).grad, parameter)
        worst = max(worst, _apart(local(parameter.grad), right))
    return worst


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1)) if a.numel() else 0.0


def parts(parallel: dict[str, Any]) -> bool:
    """Whether each process has of every tensor what it should, and all of them together have it all."""
    changes = deep_enough(parallel)
    right, together = model_of(**changes), together_for(parallel)
    model = model_of(**changes)
    together.divide(model, torch.float32)
    wholes = matrices(dict(right.named_parameters()))
    for name, parameter in matrices(dict(model.named_parameters())).items():
        mine = own_part(wholes[name], parameter)
        assert torch.equal(local(parameter), mine), name
        again = as_divided(mine.detach().clone(), parameter)
        assert torch.equal(whole(again), wholes[name]), name
    return True


def first_weights(parallel: dict[str, Any]) -> bool:
    """Whether a model that was divided on the meta device begins with what one process draws."""
    changes, together = deep_enough(parallel), together_for(parallel)
    right = Transformer(ModelConfig.model_validate(CONFIG | changes), generator=torch.Generator().manual_seed(7))
    with torch.device("meta"):
        model = Transformer(right.config)
    initial._PIECE = 1000
    together.divide(model, torch.float32, torch.Generator().manual_seed(7))
    expected = matrices(right.state_dict())
    mine = matrices(model.state_dict())
    assert all_names(mine) == expected.keys()
    for name, tensor in mine.items():
        assert torch.equal(local(tensor), own_part(expected[name], tensor)), name
    return True


def save(parallel: dict[str, Any], folder: str) -> bool:
    """Writes a checkpoint of :func:`model_of` with something as an optimizer's state."""
    together, model = together_for(parallel), model_of()
    together.divide(model, torch.float32)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors[f"optimizer.twice.{name}"] = together.like(2 * local(parameter.detach()), parameter)
    if together.first:
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text(config_to_json(model.config, torch.float32))
    dist.barrier()
    sharded.write(matrices(tensors), Path(folder))
    return True


def restore(parallel: dict[str, Any], folder: str) -> bool:
    """Whether a checkpoint that :func:`save` wrote comes back under another layout, bit by bit."""
    together, model, right = together_for(parallel), model_of(), model_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    together.divide(model, torch.float32)
    twice = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    tensors = dict(model.state_dict()) | {f"optimizer.twice.{name}": tensor for name, tensor in twice.items()}
    sharded.read(matrices(tensors), Path(folder))
    mine = gathered(dict(model.state_dict()))
    expected = matrices(right.state_dict())
    assert all_names(mine) == expected.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, expected[name]), name
    mine = gathered(twice)
    assert all_names(mine) == matrices(dict(right.named_parameters())).keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, 2 * expected[name]), name
    return True
