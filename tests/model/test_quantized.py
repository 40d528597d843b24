"""Packed modules against plain products with the numbers that they stand for, and whole models against dense ones whose
weights the test replaced by those numbers.

In float64 nothing is rounded but the weights, so both sides are equal; compiled code rounds what comes in as well, and
is compared with products in float64 whose inputs the test rounds. How numbers are packed is tests/kernels/
test_packed.py's, the compiled code tests/kernels/test_decode.py's.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import MHA, SEPARATE, V1_MOE, difference, randomised, small, tokens_for
from torch import Tensor, nn

import abyssal
from abyssal.config import ModelConfig
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.generation import Sampling
from abyssal.kernels import native
from abyssal.kernels.packed import Kind, dequantize, linear_reference, quantize
from abyssal.model import Cache, Transformer, quantized
from abyssal.model.quantized import QuantizedExperts, QuantizedLinear, QuantizedMLP, packed_matrices, use_packed

BYTES = byte_tokenizer()
KINDS: list[Kind] = ["int8", "int4"]
# No size is a multiple of 64 or 128, some are less, some more.
CONFIG: dict[str, object] = {
    "vocab_size": 264,
    "hidden_size": 160,
    "num_hidden_layers": 3,
    "intermediate_size": 200,
    "attention": {
        "num_attention_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 136,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 40,
        "bias": True,
    },
    "moe": {"n_routed_experts": 8, "moe_intermediate_size": 72},
    "max_position_embeddings": 64,
    "mtp": {"num_nextn_predict_layers": 1},
}
ATTENTION = [f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")]
MLP_NAMES = [f"{name}_proj" for name in ("gate", "up", "down")]
compiled = pytest.mark.skipif(native.library() is None, reason="no compiled code here")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stands_for(weight: Tensor, kind: Kind) -> Tensor:
    """The numbers that are left of ``weight``, exact."""
    return dequantize(quantize(weight, kind), torch.float64)


def packed_from(dense: Transformer, kind: Kind) -> Transformer:
    """``dense`` with its weights packed, through the names that they have there."""
    model = copy.deepcopy(dense)
    use_packed(model, kind)
    state = dense.state_dict()
    with torch.no_grad():
        for name, place in packed_matrices(model):
            prefix, experts, rest = name.partition(".experts.")
            weight = state[name] if not experts else _of_expert(state, prefix + ".experts", *rest.split(".")[:2])
            made = quantize(weight, place.kind)
            place.data.copy_(made.data)
            place.scales.copy_(made.scales)
    return model.requires_grad_(False)


def _of_expert(state: dict[str, Tensor], prefix: str, expert: str, matrix: str) -> Tensor:
    if matrix == "down_proj":
        return state[f"{prefix}.down_proj"][int(expert)]
    return state[f"{prefix}.gate_up_proj"][int(expert)].chunk(2)[matrix == "up_proj"]


def replaced(dense: Transformer, kind: Kind) -> Transformer:
    """``dense`` in float64, what is to be packed replaced by what it stands for."""
    model = copy.deepcopy(dense).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = parameter.dim() > 1 and not any(
                part in name for part in ("embed_tokens", "kv_b_proj", "eh_proj", ".gate.weight", "norm")
            )
            if matrix:
                parameter.copy_(stands_for(parameter, "int8" if name == "lm_head.weight" else kind))
    return model


def linear_of(outputs: int, inputs: int, kind: Kind, dtype: torch.dtype, bias: bool = False) -> QuantizedLinear:
    values = nn.Parameter(drawn(outputs, seed=1, dtype=dtype), requires_grad=False) if bias else None
    module = QuantizedLinear(torch.Size([outputs, inputs]), kind, values, dtype)
    fill(module, drawn(outputs, inputs, seed=2))
    return module


def fill(module: QuantizedLinear, weight: Tensor) -> None:
    made = quantize(weight, module.kind)
    module.data.copy_(made.data)
    module.scales.copy_(made.scales)


class TestLinear:
    @settings(max_examples=40)
    @given(
        lead=st.sampled_from([(), (1,), (5,), (2, 3), (40,), (0,), (2, 0)]),
        outputs=st.integers(1, 200),
        inputs=st.integers(1, 300),
        kind=st.sampled_from(KINDS),
        bias=st.booleans(),
        gradients=st.booleans(),
    )
    def test_product(self, lead: tuple[int, ...], outputs: int, inputs: int, kind: Kind, bias: bool, gradients: bool):
        module, x = linear_of(outputs, inputs, kind, torch.float64, bias), drawn(*lead, inputs)
        with torch.set_grad_enabled(gradients):
            got = module(x)
        assert (got.dtype, tuple(got.shape)) == (torch.float64, (*lead, outputs))
        right = x @ stands_for(drawn(outputs, inputs, seed=2), kind).t()
        torch.testing.assert_close(got, right if module.bias is None else right + module.bias)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rows", [1, 33])
    def test_slices(self, monkeypatch: pytest.MonkeyPatch, kind: Kind, rows: int):
        module, x = linear_of(50, 70, kind, torch.float64, bias=True), drawn(rows, 70)
        whole = module(x)
        largest = []
        monkeypatch.setattr(quantized, "_SLICE", 7 * 70 + 3)
        monkeypatch.setattr(quantized, "dequantize", lambda p, dtype: largest.append(p.shape) or dequantize(p, dtype))
        torch.testing.assert_close(module(x), whole)
        assert [tuple(shape) for shape in largest] == [(7, 70)] * 7 + [(1, 70)]

    @compiled
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_few_rows_are_those_of_the_reference(self, kind: Kind, dtype: torch.dtype):
        module, x = linear_of(90, 160, kind, dtype, bias=True), drawn(3, 160, dtype=dtype)
        right = linear_reference(x, module.packed) + module.bias.double()
        assert difference(module(x), right) < (1e-5 if dtype == torch.float32 else 1e-2)
        turned = x.t().contiguous().t()
        assert not turned.is_contiguous()
        assert torch.equal(module(turned), module(x))

    @torch.no_grad()
    def test_new_numbers_and_a_new_place_are_seen(self):
        module, x = linear_of(16, 64, "int8", torch.float32), drawn(1, 64, dtype=torch.float32)
        module(x)
        fill(module, drawn(16, 64, seed=5))
        other = copy.deepcopy(module)
        fill(module, drawn(16, 64, seed=6))
        assert difference(other(x), x.double() @ drawn(16, 64, seed=5).t()) < 0.03
        assert difference(module(x), x.double() @ drawn(16, 64, seed=6).t()) < 0.03
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x), module(x))

    def test_what_it_says_of_the_weight(self):
        module = linear_of(3, 5, "int4", torch.float32)
        assert (module.weight.shape, module.weight.dtype, module.weight.is_meta) == ((3, 5), torch.float32, True)
        assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16
        assert module.double().weight.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
class TestMLPAndExperts:
    @staticmethod
    def modules(kind: Kind, dtype: torch.dtype) -> tuple[Transformer, Transformer]:
        dense = randomised(small(**CONFIG), std=0.1)
        return packed_from(dense, kind).to(dtype), replaced(dense, kind)

    @pytest.mark.parametrize("rows", [1, 4, 50])
    @torch.no_grad()
    def test_float64(self, kind: Kind, rows: int):
        model, dense = self.modules(kind, torch.float64)
        x = drawn(rows, 160)
        ours, plain = model.model.layers[0].mlp, dense.model.layers[0].mlp
        assert isinstance(ours, QuantizedMLP)
        assert difference(ours(x), plain(x)) < 1e-6
        ours, plain = model.model.layers[1].mlp.experts, dense.model.layers[1].mlp.experts
        assert isinstance(ours, QuantizedExperts)
        routing = dense.model.layers[1].mlp.route(x.unsqueeze(0))
        chosen = routing.indices.flatten(0, 1), routing.weights.flatten(0, 1)
        assert difference(ours(x, *chosen), plain(x, *chosen)) < 1e-6

    @compiled
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_compiled(self, kind: Kind, dtype: torch.dtype):
        """Near, since inputs are rounded to int8; and in fact rounded."""
        model, dense = self.modules(kind, dtype)
        x = drawn(4, 160).to(dtype)
        got, right = model.model.layers[0].mlp(x), dense.model.layers[0].mlp(x.double())
        assert got.dtype == dtype
        assert 1e-4 < difference(got, right) < 0.03
        routing = dense.model.layers[1].mlp.route(x.double().unsqueeze(0))
        chosen = routing.indices.flatten(0, 1), routing.weights.flatten(0, 1)
        got = model.model.layers[1].mlp.experts(x, *chosen)
        right = dense.model.layers[1].mlp.experts(x.double(), *chosen)
        assert got.dtype == dtype
        assert 1e-4 < difference(got, right) < 0.03


class TestWhatIsPacked:
    @staticmethod
    def found(config: ModelConfig) -> dict[str, str]:
        with torch.device("meta"):
            model = Transformer(config)
        use_packed(model, "int4")
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        kinds = (QuantizedLinear, QuantizedExperts)
        return {name: module.kind for name, module in model.named_modules() if isinstance(module, kinds)}

    def test_names(self):
        expected = {f"model.layers.{layer}.{name}" for layer in range(4) for name in ATTENTION}
        expected |= {f"model.layers.0.mlp.{name}" for name in MLP_NAMES}
        expected |= {f"model.layers.{layer}.mlp.shared_experts.{name}" for layer in (1, 2, 3) for name in MLP_NAMES}
        expected |= {f"model.layers.{layer}.mlp.experts" for layer in (1, 2, 3)}
        assert self.found(small(**CONFIG)) == dict.fromkeys(expected, "int4") | {"lm_head": "int8"}

    def test_a_tied_head_stays_the_embedding(self):
        assert "lm_head" not in self.found(small(**CONFIG, tie_word_embeddings=True))
        dense = randomised(small(**CONFIG, tie_word_embeddings=True))
        use_packed(dense, "int8")
        assert dense.lm_head.weight is dense.model.embed_tokens.weight

    @pytest.mark.parametrize("kind", KINDS)
    def test_bytes(self, kind: Kind):
        """8.5 or 4.5 bits a number, and nothing dense beside it, before and after a pass."""
        sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 264, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "q_lora_rank": 128, "v_head_dim": 32}
        config = small(**sizes, attention=heads, moe={"n_routed_experts": 8, "moe_intermediate_size": 128})
        dense = randomised(config, dtype=torch.float32)
        model = packed_from(dense, kind)
        with torch.no_grad():
            model(tokens_for(config, 1, 3))
        old, new = (dict(x.named_modules()) for x in (dense, model))
        for name, module in new.items():
            if isinstance(module, QuantizedLinear | QuantizedExperts):
                numbers = sum(p.numel() for p in old[name].parameters())
                bits = 8.5 if module.kind == "int8" else 4.5
                assert sum(t.nbytes for t in module.state_dict().values()) * 8 == numbers * bits, name
                assert not list(module.parameters())
                assert not [t for t in vars(module).values() if isinstance(t, Tensor)]


CONFIGS: dict[str, dict[str, object]] = {
    "v3": CONFIG,
    "tied": {**CONFIG, "tie_word_embeddings": True},
    "v1": {"attention": MHA, "moe": V1_MOE},
    "separate latents": {"attention": SEPARATE},
    "segments": {"moe": {"segments": 2}},
}


@pytest.mark.parametrize("kind", KINDS)
class TestWholeModel:
    @pytest.mark.parametrize("which", CONFIGS)
    @torch.no_grad()
    def test_logits(self, kind: Kind, which: str):
        dense = randomised(small(**CONFIGS[which]), std=0.1)
        model, right = packed_from(dense, kind), replaced(dense, kind)
        tokens = tokens_for(model.config, 3, 12)
        assert difference(right(tokens), dense(tokens)) > 1e-3  # the weights did change
        assert difference(model(tokens), right(tokens)) < 1e-6
        for ours, theirs in zip(model.mtp_logits(tokens), right.mtp_logits(tokens), strict=True):
            assert difference(ours, theirs) < 1e-6

    @torch.no_grad()
    def test_token_by_token(self, kind: Kind):
        """Through the compiled code where there is any, in the absorbed path, near the exact logits."""
        dense = randomised(small(**CONFIG), std=0.05)
        model, right = packed_from(dense, kind).float(), replaced(dense, kind)
        tokens = tokens_for(model.config, 1, 8)
        cache = Cache(model.config, 1, 8, dtype=torch.float32)
        steps = torch.cat([model(tokens[:, i : i + 1], cache=cache) for i in range(8)], dim=1)
        away = ((steps.double() - right(tokens)).norm(dim=-1) / right(tokens).norm(dim=-1)).median()
        assert away < 0.03  # the median: where two experts score alike, rounding chooses

    def test_casting(self, kind: Kind):
        model = packed_from(randomised(small(**CONFIG), std=0.1), kind)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        packed = {n for n, t in before.items() if t.dtype == torch.uint8 or n.endswith("scales")}
        assert len(packed) == 2 * (4 * 4 + 3 + 3 * 3 + 1) + 4 * 3
        for cast in (Transformer.bfloat16, Transformer.half, Transformer.double, lambda m: m.to("cpu", torch.float32)):
            cast(model)
            for name, tensor in model.state_dict().items():
                if name in packed:
                    assert tensor.dtype == before[name].dtype
                    assert torch.equal(tensor, before[name]), name
        assert model.model.norm.weight.dtype == torch.float32
        with torch.no_grad():
            assert model.bfloat16()(tokens_for(model.config, 1, 5)).dtype == torch.bfloat16

    def test_meta_and_back(self, kind: Kind):
        model = packed_from(randomised(small(**CONFIG)), kind)
        described = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
        model.to("meta").to_empty(device="cpu")
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()} == described


class TestGeneration:
    PROMPTS = ("the quick", "a", "a somewhat longer prompt")

    @staticmethod
    def run(model: Transformer, drafts: int) -> list[list[int]]:
        engine = abyssal.Engine(model, BYTES, page=4, drafts=drafts)
        options = Sampling(temperature=0, max_new_tokens=12)
        sequences = [engine.add(BYTES.encode(prompt), options) for prompt in TestGeneration.PROMPTS]
        while engine.busy:
            engine.step()
        return [sequence.new for sequence in sequences]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("drafts", [0, 1])
    def test_engine(self, kind: Kind, drafts: int):
        dense = randomised(small(**CONFIG), std=0.1)
        right = self.run(replaced(dense, kind), 0)
        assert all(right)
        assert self.run(packed_from(dense, kind), drafts) == right

    def test_in_what_it_is_used(self):
        model = packed_from(randomised(small(**CONFIG), std=0.1), "int8").bfloat16()
        assert any(abyssal.generate(model, BYTES, list(self.PROMPTS), temperature=0, max_new_tokens=8))
