"""Gradients through packed weights, and models in nf4: against dense ones that have the numbers which are left.

The numbers themselves are tests/kernels/test_nf4.py's and test_packed.py's.
"""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import MHA, SEPARATE, V1_MOE, difference, randomised, small, tokens_for
from torch import Tensor, nn

import abyssal
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.generation import Sampling
from abyssal.kernels import nf4, packed
from abyssal.kernels.grouped import experts_reference
from abyssal.model import Cache, Transformer, quantized
from abyssal.model.adapting import add_lora
from abyssal.model.quantized import (
    Held,
    QuantizedExperts,
    QuantizedLinear,
    nf4_matrices,
    packed_matrices,
    use_packed,
)

pytest.importorskip("bitsandbytes")
KINDS: list[Held] = ["int8", "int4", "nf4"]
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": {"vocab_size": 264, "hidden_size": 48, "mtp": {"num_nextn_predict_layers": 1}},
    "v1": {"attention": MHA, "moe": V1_MOE},
    "separate latents": {"attention": SEPARATE},
    "segments": {"moe": {"segments": 2}},
}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def left_of(weight: Tensor, kind: Held) -> Tensor:
    """The numbers that are left of a matrix, in its dtype."""
    if kind == "nf4":
        return nf4.dequantize(nf4.quantize(weight), torch.float32).to(weight.dtype)
    return packed.dequantize(packed.quantize(weight, kind), torch.float32).to(weight.dtype)


def fill(model: nn.Module, weight_of: Any) -> None:
    for name, place in packed_matrices(model):
        made = packed.quantize(weight_of(name), place.kind)
        place.data.copy_(made.data)
        place.scales.copy_(made.scales)
    for name, four in nf4_matrices(model):
        for to, tensor in zip(four.tensors, nf4.quantize(weight_of(name)).tensors, strict=True):
            to.copy_(tensor)


def both(config: dict[str, Any], kind: Held, dtype: torch.dtype) -> tuple[Transformer, Transformer]:
    """A packed model and a dense one with the same numbers."""
    dense = randomised(small(**config), std=0.1).to(dtype)
    model = copy.deepcopy(dense)
    use_packed(model, kind)
    state = dense.state_dict()

    @torch.no_grad()
    def weight_of(name: str) -> Tensor:
        prefix, experts, rest = name.partition(".experts.")
        matrix = state[name] if not experts else None
        if matrix is None:
            expert, which, _ = rest.split(".")
            if which == "down_proj":
                matrix = state[f"{prefix}.experts.down_proj"][int(expert)]
            else:
                matrix = state[f"{prefix}.experts.gate_up_proj"][int(expert)].chunk(2)[which == "up_proj"]
        left = left_of(matrix, "int8" if name == "lm_head.weight" else kind)
        before = matrix.clone()
        matrix.copy_(left)
        return before

    fill(model, weight_of)
    for network in (model, dense):
        network.requires_grad_(False)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("norm" in name or "embed" in name or ".gate." in name)
    return model, dense


def gradients(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    logits = model(tokens)
    (logits * drawn(*logits.shape, seed=3).to(logits.dtype)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
class TestWholeModel:
    @pytest.mark.parametrize("which", CONFIGS)
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
    def test_gradients(self, kind: Held, which: str, dtype: torch.dtype, bound: float):
        model, dense = both(CONFIGS[which], kind, dtype)
        tokens = tokens_for(model.config, 2, 12)
        ours, right = gradients(model, tokens), gradients(dense, tokens)
        assert ours.keys() == right.keys()
        assert len(right) > 6
        for name, grad in right.items():
            assert ours[name].dtype == dtype
            assert difference(ours[name], grad) < bound, name

    def test_adapters(self, kind: Held):
        """LoRA on everything, experts and kv_b_proj too, learns the same over packed weights; decoding sees it."""
        models = both(CONFIGS["v3"], kind, torch.float32)
        tokens, found = tokens_for(models[0].config, 2, 12), []
        for model in models:
            add_lora(model, "all", 4, 8.0, generator=torch.Generator().manual_seed(1))
            raised = [parameter for name, parameter in model.named_parameters() if name.endswith("lora_B")]
            for i, parameter in enumerate(raised):
                parameter.data = 0.05 * drawn(*parameter.shape, seed=i, dtype=torch.float32)
            found.append(gradients(model, tokens))
        ours, right = found
        assert ours.keys() == right.keys()
        assert {"base" in name or "lora" not in name for name in ours} == {False}
        assert len(ours) > 40
        for name, grad in right.items():
            assert difference(ours[name], grad) < 5e-4, name
        with torch.no_grad():
            assert difference(models[0](tokens[:1, :3]), models[1](tokens[:1, :3])) < 0.05

    def test_autocast(self, kind: Held):
        """Forward and backward in BF16, from FP32 parameters."""
        model, dense = both(CONFIGS["v3"], kind, torch.float32)
        tokens = tokens_for(model.config, 2, 12)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(tokens)
            assert out.dtype == dense(tokens).dtype == torch.bfloat16
            ours, right = gradients(model, tokens), gradients(dense, tokens)
        exact = gradients(both(CONFIGS["v3"], kind, torch.float64)[1], tokens)
        for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
            assert ours[name].dtype == torch.float32
            away, theirs = difference(ours[name], exact[name]), difference(right[name], exact[name])
            assert away < max(2 * theirs, 0.05), name


@pytest.mark.parametrize("slices", [2**22, 900])
@settings(max_examples=30)
@given(
    lead=st.sampled_from([(1,), (5,), (2, 3), (40,), (0,)]),
    outputs=st.integers(1, 120),
    inputs=st.sampled_from([1, 33, 64, 130, 512]),
    kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_linear(
    slices: int, lead: tuple[int, ...], outputs: int, inputs: int, kind: Held, bias: bool, dtype: torch.dtype
):
    weight = drawn(outputs, inputs, seed=2, dtype=torch.float32)
    values = nn.Parameter(drawn(outputs, seed=1, dtype=dtype)) if bias else None
    module = QuantizedLinear(weight.shape, kind, values, dtype)
    fill(module, lambda _: weight)
    x = drawn(*lead, inputs, dtype=dtype).requires_grad_()
    grad = drawn(*lead, outputs, seed=5, dtype=dtype)
    saved: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "_SLICE", slices)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            out = module(x)
        out.backward(grad)
    assert not saved
    assert (out.dtype, tuple(out.shape)) == (dtype, (*lead, outputs))
    left = left_of(weight, kind).double()
    bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    right = x.detach().double() @ left.t() + (0 if values is None else values.detach().double())
    if out.numel():
        assert difference(out, right) < bound
        assert difference(x.grad, grad.double() @ left) < bound
    if values is not None:
        torch.testing.assert_close(values.grad, grad.flatten(0, -2).sum(0), rtol=bound, atol=10 * bound)
    assert torch.equal(module.dense_weight(torch.float64), left)


def experts_of(experts: int, hidden: int, width: int, kind: Held) -> tuple[QuantizedExperts, Tensor, Tensor]:
    gate_up = drawn(experts, 2 * width, hidden, seed=1, dtype=torch.float32)
    down = drawn(experts, hidden, width, seed=2, dtype=torch.float32)
    module = QuantizedExperts(gate_up.shape, down.shape, kind)

    def weight_of(name: str) -> Tensor:
        expert, which = name.split(".")[1:3]
        if which == "down_proj":
            return down[int(expert)]
        return gate_up[int(expert)].chunk(2)[which == "up_proj"]

    fill(module, weight_of)
    halves = [torch.cat([left_of(half, kind) for half in own.chunk(2)]) for own in gate_up]
    return module, torch.stack(halves), torch.stack([left_of(own, kind) for own in down])


@pytest.mark.parametrize("slices", [2**22, 3000, 1])
@settings(max_examples=30)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    busy=st.integers(1, 9),
    k=st.integers(1, 3),
    sizes=st.sampled_from([(8, 5), (32, 64), (24, 33), (64, 32)]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_experts(
    slices: int,
    tokens: int,
    experts: int,
    busy: int,
    k: int,
    sizes: tuple[int, int],
    kind: Held,
    dtype: torch.dtype,
    seed: int,
):
    """Also where some experts, the first and last of all too, get no tokens."""
    module, gate_up, down = experts_of(experts, *sizes, kind)
    g = torch.Generator().manual_seed(seed)
    open_to = torch.randperm(experts, generator=g)[:busy]
    chosen = [open_to[torch.randperm(len(open_to), generator=g)[:k]] for _ in range(tokens)]
    indices = torch.stack(chosen)
    x, weights = drawn(tokens, sizes[0]), torch.rand(indices.shape, generator=g)
    grad = drawn(tokens, sizes[0], seed=7)

    exact = [y.double().requires_grad_() for y in (x.to(dtype), weights)]
    right = experts_reference(exact[0], indices, exact[1], gate_up.double(), down.double())
    right.backward(grad.to(dtype).double())
    ours = [x.to(dtype).requires_grad_(), weights.to(torch.float32).requires_grad_()]
    largest: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "_SLICE", slices)
        dense = quantized._dense
        patch.setattr(quantized, "_dense", lambda p, d: largest.append(p.shape.numel()) or dense(p, d))
        out = module(ours[0], indices, ours[1])
        out.backward(grad.to(dtype))
    # Of single numbers a gradient may be a difference of larger ones.
    bound = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert out.dtype == dtype
    assert difference(out, right) < bound
    for mine, theirs in zip(ours, exact, strict=True):
        assert difference(mine.grad, theirs.grad) < bound
    assert max(largest) <= max(slices, 2 * sizes[0] * sizes[1])


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_weight_is_kept(kind: Held):
    """Of 16 experts a few at a time are dense, in the forward and in the backward pass, and none in between."""
    module, gate_up, down = experts_of(16, 64, 96, kind)
    x = drawn(64, 64, dtype=torch.float32).requires_grad_()
    indices = torch.arange(128).view(64, 2) % 16
    at_once = 4 * gate_up[0].numel()
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "_SLICE", at_once)
        dense = quantized._dense
        patch.setattr(quantized, "_dense", lambda p, d: calls.append(p.shape.numel()) or dense(p, d))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = module(x, indices, torch.ones(64, 2))
        forward = len(calls)
        out.sum().backward()
    assert sum(saved.values()) < 4 * 128 * (2 * 96 + 96 + 64)
    assert forward == 4 + 2
    assert len(calls) == 2 * forward
    assert max(calls) <= at_once < (gate_up.numel() + down.numel()) / 4


class TestNF4:
    def test_what_is_packed(self):
        config = small(**CONFIGS["v3"])
        with torch.device("meta"):
            model = Transformer(config)
        use_packed(model, "nf4")
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        packed_ones = {name for name, _ in nf4_matrices(model)}
        assert not dict(packed_matrices(model))
        projections = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        expected = {f"model.layers.{i}.self_attn.{name}.weight" for i in range(4) for name in projections}
        places = ["model.layers.0.mlp", *(f"model.layers.{i}.mlp.shared_experts" for i in (1, 2, 3))]
        places += [f"model.layers.{i}.mlp.experts.{expert}" for i in (1, 2, 3) for expert in range(8)]
        expected |= {f"{place}.{name}_proj.weight" for place in places for name in ("gate", "up", "down")}
        assert packed_ones == expected
        dense = {name for name, _ in model.named_parameters() if "norm" not in name}
        assert {name for name in dense if "layers" not in name} == {"model.embed_tokens.weight", "lm_head.weight"}
        assert {name.split(".", 3)[3] for name in dense if "layers" in name} == {"mlp.gate.weight", "eh_proj.weight"}

    def test_bytes(self):
        """4 bits, 8 for 64 of them and 32 for 16384, and a mean a matrix; nothing dense beside it after a pass."""
        moe = {"n_routed_experts": 8, "moe_intermediate_size": 256}
        config = small(hidden_size=128, intermediate_size=256, moe=moe)
        with torch.device("meta"):
            dense = dict(Transformer(config).named_modules())
        model, _ = both({"hidden_size": 128, "intermediate_size": 256, "moe": moe}, "nf4", torch.float32)
        gradients(model, tokens_for(config, 2, 9))
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear | QuantizedExperts):
                expected = 0
                for parameter in dense[name].parameters():
                    stack = 1 if parameter.dim() == 2 else 8 * (2 if parameter.shape[1] == 512 else 1)
                    numbers = parameter.numel() // stack
                    blocks = math.ceil(numbers / 64)
                    expected += stack * (32 * blocks + blocks + 4 * math.ceil(blocks / 256) + 4)
                assert sum(tensor.nbytes for tensor in module.state_dict().values()) == expected
                assert not list(module.parameters())
                assert not [value for value in vars(module).values() if isinstance(value, Tensor)]

    def test_casting(self):
        model, _ = both(CONFIGS["v3"], "nf4", torch.float32)
        before = {name: tensor.clone() for name, tensor in model.named_buffers()}
        for dtype in (torch.bfloat16, torch.float64):
            model.to(dtype)
            for name, tensor in model.named_buffers():
                assert tensor.dtype == before[name].dtype
                assert torch.equal(tensor, before[name])
        copied = copy.deepcopy(model)
        copied.load_state_dict(model.state_dict())
        with torch.no_grad():
            tokens = tokens_for(model.config, 1, 4)
            assert torch.equal(copied(tokens), model(tokens))

    @pytest.mark.parametrize("which", CONFIGS)
    @torch.no_grad()
    def test_logits(self, which: str):
        model, dense = both(CONFIGS[which], "nf4", torch.float64)
        tokens = tokens_for(model.config, 2, 10)
        assert difference(model(tokens), dense(tokens)) < 1e-9
        for ours, theirs in zip(model.mtp_logits(tokens), dense.mtp_logits(tokens), strict=True):
            assert difference(ours, theirs) < 1e-9

    @pytest.mark.parametrize("which", ["v3", "v1"])
    @torch.no_grad()
    def test_token_by_token(self, which: str):
        """In the absorbed path too, which reads kv_b_proj's numbers."""
        model, dense = both(CONFIGS[which], "nf4", torch.float64)
        tokens = tokens_for(model.config, 1, 6)
        cache = Cache(model.config, 1, 6, dtype=torch.float64)
        steps = torch.cat([model(tokens[:, i : i + 1], cache=cache) for i in range(6)], dim=1)
        assert difference(steps, dense(tokens)) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_engine(self, dtype: torch.dtype):
        tokenizer = byte_tokenizer()
        model, dense = both(CONFIGS["v3"], "nf4", dtype)
        found = []
        for network in (model, dense):
            engine = abyssal.Engine(network, tokenizer, page=4)
            options = Sampling(temperature=0, max_new_tokens=10)
            sequences = [engine.add(tokenizer.encode(text), options) for text in ("the quick", "a", "some more")]
            while engine.busy:
                engine.step()
            found.append([sequence.new for sequence in sequences])
        assert found[0] == found[1]
        assert all(found[0])
