"""A model that trains in FP8: what is swapped and what stays, what the modules compute, and that it learns as before.

What the products are is tests/kernels/test_fp8_training.py's.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_models import MHA, SEPARATE, small, tokens_for
from torch import Tensor, nn

from abyssal.kernels import fp8_training
from abyssal.model import Transformer
from abyssal.model.fp8_training import FP8TrainingExperts, FP8TrainingLinear, train_in_fp8
from abyssal.model.moe import Experts
from abyssal.model.variants import SegmentMoE

# No size is a multiple of 128, some are less, some more.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 136,
    "num_hidden_layers": 2,
    "intermediate_size": 144,
    "attention": {
        "num_attention_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 34,
    },
    "moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 72,
        "n_group": 1,
        "topk_group": 1,
    },
}


def built(seed: int = 0, **changes: Any) -> Transformer:
    return Transformer(small(**(SIZES | changes)), generator=torch.Generator().manual_seed(seed))


def in_fp8(model: Transformer) -> Transformer:
    model = copy.deepcopy(model)
    train_in_fp8(model)
    return model


def loss_of(model: Transformer, tokens: Tensor, recompute: bool = False) -> Tensor:
    hidden = model.hidden(tokens[:, :-1], recompute=recompute)
    return F.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), tokens[:, 1:].flatten())


class TestWhatIsSwapped:
    @pytest.mark.parametrize(
        "changes",
        [
            {"mtp": {"num_nextn_predict_layers": 1}},
            {"attention": MHA | {"bias": True}},
            {"attention": SEPARATE},
            {"tie_word_embeddings": True},
        ],
    )
    def test_every_linear_layer_but_the_head(self, changes: dict[str, Any]):
        model = built(**changes)
        matrices = {
            name
            for name, p in model.named_parameters()
            if p.dim() > 1 and not name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"))
        }
        train_in_fp8(model)
        swapped = {
            f"{name}.{own}"
            for name, module in model.named_modules()
            if isinstance(module, FP8TrainingLinear | FP8TrainingExperts)
            for own, p in module.named_parameters()
            if p.dim() > 1
        }
        assert swapped == matrices

    def test_nothing_else_changes(self):
        model = built(mtp={"num_nextn_predict_layers": 1})
        modules, parameters, state = dict(model.named_modules()), dict(model.named_parameters()), model.state_dict()
        train_in_fp8(model)
        classes = [type(module) for module in model.modules()]
        train_in_fp8(model)
        assert [type(module) for module in model.modules()] == classes
        for before, after in (
            (modules, dict(model.named_modules())),
            (parameters, dict(model.named_parameters())),
        ):
            assert list(before) == list(after)
            assert all(before[name] is after[name] for name in before)
        for name, tensor in model.state_dict().items():
            assert tensor.data_ptr() == state[name].data_ptr()
        assert list(model.state_dict()) == list(state)
        built().load_state_dict(in_fp8(built(seed=1)).state_dict())

    def test_segments(self):
        model = built(hidden_size=144, moe=SIZES["moe"] | {"segments": 2, "n_shared_experts": 1})
        train_in_fp8(model)
        assert [type(m.experts) for m in model.modules() if isinstance(m, SegmentMoE)] == [FP8TrainingExperts]
        loss_of(model, tokens_for(model.config, 2, 9)).backward()


class TestModules:
    @pytest.mark.parametrize("bias", [False, True])
    def test_linear(self, bias: bool):
        torch.manual_seed(0)
        layer = nn.Linear(150, 140, bias=bias)
        layer.__class__ = FP8TrainingLinear
        x, weight = torch.randn(3, 50, 150), layer.weight.detach().clone().requires_grad_()
        grad = torch.randn(3, 50, 140)
        out = layer(x)
        out.backward(grad)
        plain = fp8_training.linear(x.flatten(0, 1), weight)
        plain.backward(grad.flatten(0, 1))
        assert torch.equal(out, plain.view(3, 50, 140) + (layer.bias if bias else 0.0))
        assert torch.equal(layer.weight.grad, weight.grad)
        if bias:
            torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))
        with torch.no_grad():
            assert torch.equal(layer(x), out)

    def test_linear_under_autocast(self):
        torch.manual_seed(0)
        layer = nn.Linear(150, 140)
        layer.__class__ = FP8TrainingLinear
        x = torch.randn(50, 150)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        out.backward(torch.ones_like(out))
        assert layer.weight.grad.dtype == torch.float32
        product = fp8_training.linear(x.bfloat16(), layer.weight)
        assert torch.equal(out, product + layer.bias.bfloat16())

    @pytest.mark.parametrize("chosen", ["spread", "one gets all", "one token"])
    def test_experts(self, chosen: str):
        """Against every expert by itself on the tokens that chose it, in their order."""
        torch.manual_seed(0)
        experts = built().model.layers[1].mlp.experts
        nn.init.normal_(experts.gate_up_proj)
        nn.init.normal_(experts.down_proj)
        plain = copy.deepcopy(experts)
        experts.__class__ = FP8TrainingExperts
        tokens = 1 if chosen == "one token" else 150
        x = torch.randn(tokens, 136)
        indices = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
        if chosen == "one gets all":
            indices = torch.tensor([[2, 0]]).expand(tokens, -1)
        weights = torch.rand(tokens, 2)
        given = [t.clone().requires_grad_() for t in (x, weights)]
        out = experts(given[0], indices, given[1])
        grad = torch.randn_like(out)
        out.backward(grad)

        again = [t.clone().requires_grad_() for t in (x, weights)]
        wanted = torch.zeros_like(x)
        for e in range(4):
            token, choice = torch.where(indices == e)
            both = fp8_training.linear(again[0][token], plain.gate_up_proj[e])
            hidden = F.silu(both[:, :72]) * both[:, 72:] * again[1][token, choice].unsqueeze(1)
            wanted = wanted.index_add(0, token, fp8_training.linear(hidden, plain.down_proj[e]))
        wanted.backward(grad)
        # A last bit of SwiGLU's that differs can be a step of E4M3 further on.
        pairs = [(out, wanted), *((a.grad, b.grad) for a, b in zip(given, again, strict=True))]
        pairs += [(getattr(experts, n).grad, getattr(plain, n).grad) for n in ("gate_up_proj", "down_proj")]
        for a, b in pairs:
            assert float((a - b).detach().norm()) <= 0.003 * float(b.detach().norm())
        exact = Experts.forward(plain, x, indices, weights)
        assert 0.01 < float((out - exact).detach().norm() / exact.detach().norm()) < 0.1

    def test_recomputing_changes_nothing(self):
        model = in_fp8(built())
        tokens = tokens_for(model.config, 2, 20)
        gradients = []
        for recompute in (False, True):
            model.zero_grad()
            loss_of(model, tokens, recompute).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)

    def test_evaluation_sees_the_same_numbers(self):
        model = in_fp8(built())
        tokens = tokens_for(model.config, 2, 20)
        with torch.no_grad():
            evaluated = model(tokens)
        assert torch.equal(evaluated, model(tokens))
        dense = built()(tokens).detach()
        assert 0.001 < float((evaluated - dense).norm() / dense.norm()) < 0.2


class TestLearning:
    def curve(self, fp8: bool, steps: int) -> Tensor:
        """Losses of a model that learns a random Markov chain from fresh samples."""
        model = built()
        if fp8:
            train_in_fp8(model)
        generator = torch.Generator().manual_seed(1)
        chain = torch.randn(64, 64, generator=generator).mul(3).softmax(-1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
        losses = []
        for _ in range(steps):
            tokens = torch.randint(64, (16, 1), generator=generator)
            for _ in range(16):
                following = torch.multinomial(chain[tokens[:, -1]], 1, generator=generator)
                tokens = torch.cat((tokens, following), dim=1)
            loss = loss_of(model, tokens)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    def test_the_loss_falls_as_it_does_in_fp32(self):
        plain, fp8 = (self.curve(which, 60) for which in (False, True))
        assert plain[-20:].mean() < 0.62 * plain[0]  # there was something to learn
        assert not torch.equal(plain, fp8)
        assert abs(fp8[-20:].mean() / plain[-20:].mean() - 1) < 0.01
        assert ((fp8 / plain - 1).view(-1, 10).mean(1).abs() < 0.02).all()
