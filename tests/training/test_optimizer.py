"""The learning rate at points worked out by hand, AdamW steps against the formula, and moments in fewer bits."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import MODEL, tiny_trainer

from abyssal.config import resolve_model
from abyssal.model import Transformer
from abyssal.training.optimizer import AdamW, build_optimizer, learning_rate
from abyssal.training.recipe import OptimizerConfig, ScheduleConfig


class TestLearningRate:
    @pytest.mark.parametrize(
        ("step", "expected"),
        [
            (0, 0.25),
            (1, 0.5),
            (3, 1.0),
            (4, 1.0),
            (9, 0.55),  # half of the way from 4 to 14: (1 + 0.1) / 2
            (14, 0.1),
            (6, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.2))),
        ],
    )
    def test_cosine(self, step, expected):
        schedule = ScheduleConfig(kind="cosine", warmup=4, final=0.1)
        assert learning_rate(step, 15, 2.0, schedule) == pytest.approx(2.0 * expected)

    @pytest.mark.parametrize(
        ("step", "expected"),
        [(0, 0.5), (1, 1.0), (2, 1.0), (7, 1.0), (8, 0.8), (9, 0.6), (10, 0.4), (11, 0.2)],
    )
    def test_wsd(self, step, expected):
        # the last third of 12 steps falls from 1 to 0.2 in four equal parts
        schedule = ScheduleConfig(kind="wsd", warmup=2, final=0.2, decay=1 / 3)
        assert learning_rate(step, 12, 3.0, schedule) == pytest.approx(3.0 * expected)

    def test_one_step(self):
        assert learning_rate(0, 1, 3.0, ScheduleConfig()) == pytest.approx(3.0)
        assert learning_rate(0, 1, 3.0, ScheduleConfig(kind="wsd", final=0.5, decay=1.0)) == pytest.approx(1.5)

    @given(
        kind=st.sampled_from(["cosine", "wsd"]),
        steps=st.integers(2, 60),
        warmup=st.integers(0, 20),
        final=st.floats(0, 1),
        decay=st.floats(0.01, 1),
    )
    def test_rises_then_falls_between_its_ends(self, kind, steps, warmup, final, decay):
        warmup = min(warmup, steps - 1)
        schedule = ScheduleConfig(kind=kind, warmup=warmup, final=final, decay=decay)
        rates = [learning_rate(step, steps, 1.0, schedule) for step in range(steps)]
        assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
        rising, falling = rates[:warmup], rates[warmup:]
        assert rising == sorted(rising)
        assert all(later <= earlier + 1e-12 for earlier, later in pairwise(falling))
        if len(falling) > 1 and (kind == "cosine" or round(decay * steps) >= 1):
            assert rates[-1] == pytest.approx(final)


def test_decay_is_for_matrices():
    model = Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(0))
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert plain == {name for name in names.values() if name.endswith("norm.weight")}
    assert decayed | plain == set(names.values())
    for name in (
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.gate.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.2.eh_proj.weight",
    ):
        assert name in decayed


def test_two_steps_against_the_formula():
    """AdamW (arXiv 1711.05101, algorithm 2) in float64."""
    model = Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(0)).double()
    config = OptimizerConfig(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer(model, config)
    generator = torch.Generator().manual_seed(3)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in (1, 2):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            decay = 0.0 if name.endswith("norm.weight") else 0.2
            first[name] = 0.8 * first[name] + 0.2 * p.grad
            second[name] = 0.9 * second[name] + 0.1 * p.grad**2
            m, v = first[name] / (1 - 0.8**step), second[name] / (1 - 0.9**step)
            expected[name] -= 0.01 * (m / (v.sqrt() + 1e-6) + decay * expected[name])
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-9, atol=1e-12)


def nbytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(x.nbytes for state in optimizer.state.values() for key, x in state.items() if key != "step")


class TestState:
    @pytest.mark.parametrize(
        ("name", "state", "expected"),
        [
            ("adamw", "float32", 8.0),
            ("adamw", "bfloat16", 4.0),
            ("adamw", "8bit", 2 * (1 + 4 / 128)),
            ("muon", "float32", 4.0),
            ("muon", "bfloat16", 2.0),
            ("muon", "8bit", 1 + 4 / 128),
        ],
    )
    def test_bytes_a_weight(self, name, state, expected):
        """In the experts' stacks; and over the model, tensors of fewer than 4096 numbers included, as is said."""
        model = Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(0))
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, name=name, state=state))
        stack = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
        assert stack.numel() == 4096
        one = sum(x.nbytes for key, x in optimizer.state[stack].items() if key != "step")
        assert one == expected * stack.numel()
        norm = optimizer.state[model.model.norm.weight]
        assert norm["exp_avg"].dtype == (torch.bfloat16 if state == "bfloat16" else torch.float32)
        total = 0.0
        for key, p in model.named_parameters():
            moments = 1 if name == "muon" and not key.endswith(("norm.weight", "tokens.weight", "head.weight")) else 2
            small = state == "8bit" and p.numel() < 4096
            blocks = -(-p.numel() // 128)
            bits = {"float32": 4 * p.numel(), "bfloat16": 2 * p.numel(), "8bit": p.numel() + 4 * blocks}[state]
            total += moments * (4 * p.numel() if small else bits)
        assert nbytes(optimizer) == total

    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_training_comes_as_far(self, name, data, tmp_path):
        """30 steps on a little text: the last losses, with every kind of moments, and with BF16 weights."""
        data["model"] = {**MODEL, "hidden_size": 64, "intermediate_size": 128}
        data["training"] |= {"steps": 30, "accumulate": 1, "batch_size": 3, "recompute": False}
        data |= {"checkpoint": {"every": 100}, "samples": {"every": 100}, "validation": {"every": 100}}
        final = {}
        for state, dtype in (("float32", "float32"), ("8bit", "float32"), ("bfloat16", "bfloat16")):
            data["optimizer"] = {"lr": 1e-2, "name": name, "state": state}
            data["training"]["dtype"] = dtype
            trainer = tiny_trainer(data, tmp_path / f"{state}-{dtype}")
            losses = []
            for _ in range(30):
                losses.append(trainer.step().loss)
                trainer.done += 1
            final[state, dtype] = sum(losses[-8:]) / 8
            assert losses[0] == pytest.approx(math.log(258), rel=0.03)
        exact = final["float32", "float32"]
        assert exact < 3.2
        for key, loss in final.items():
            assert loss == pytest.approx(exact, rel=0.03), key


@pytest.mark.parametrize("state", ["float32", "bfloat16", "8bit"])
def test_state_dict_comes_back_bit_by_bit(state):
    """torch's own loading casts every tensor to its parameter's dtype, which would spoil all of these."""
    config = OptimizerConfig(lr=0.1, state=state)
    steps = [one_parameter_step(config) for _ in range(2)]
    steps[1].load_state_dict(steps[0].state_dict())
    for old, new in zip(*(s.state.values() for s in steps), strict=True):
        assert {k: v.dtype for k, v in old.items()} == {k: v.dtype for k, v in new.items()}
        assert all(torch.equal(old[key].float(), new[key].float()) for key in old)


def one_parameter_step(config: OptimizerConfig) -> AdamW:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128).bfloat16())
    optimizer = AdamW([{"params": [weight], "weight_decay": 0.1}], config)
    optimizer.state[weight]["low"] = torch.arange(8192, dtype=torch.int16).view(64, 128)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer
