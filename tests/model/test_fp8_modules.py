"""FP8 modules against float64 loops that dequantise block by block and quantise activations tile by tile, and a whole
checkpoint in FP8 blocks against the same model with dense weights whose inputs the test quantises.

Products run in float64, so that both sides round the same numbers to E4M3; what the numbers are, and that the fast
ways compute the same in BF16 and FP32, is tests/kernels/test_fp8.py's.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import difference, randomised, small, tokens_for
from torch import Tensor, nn

import abyssal
from abyssal.checkpoint import load_model, save_model
from abyssal.checkpoint.convert import convert
from abyssal.checkpoint.names import disk_tensors
from abyssal.checkpoint.shards import Shards
from abyssal.config import ModelConfig, MoEConfig, preset
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.kernels import fp8
from abyssal.model import Cache, Transformer
from abyssal.model.attention import Context, LatentAttention
from abyssal.model.fp8 import FP8Experts, FP8Linear, dense_weight, use_fp8
from abyssal.model.moe import Experts
from abyssal.model.rotary import rotary_tables

FP8, SCALE = torch.float8_e4m3fn, "_scale_inv"
BYTES = byte_tokenizer()

# No size is a multiple of 128, some are less, some more.
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
# What V3 has in FP8, of each kind of layer.
ATTENTION = [f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
MLP = [f"{name}_proj" for name in ("gate", "up", "down")]


def rounded(x: Tensor, power_of_two: bool = False) -> Tensor:
    """``x`` [..., I] as FP8 products see it: each tile of 128 as E4M3 and back, in FP32 (V3.1: ue8m0)."""
    out = x.float().clone()
    for start in range(0, x.shape[-1], 128):
        tile = out[..., start : start + 128]
        scale = tile.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448
        if power_of_two:
            scale = 2 ** scale.double().log2().ceil().float()
        tile.copy_((tile / scale).clamp(-448, 448).to(FP8).float() * scale)
    return out.double()


def restored(weight: Tensor, scale: Tensor) -> Tensor:
    """A stored matrix block by block, FP32 product, as float64."""
    out = weight.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            out[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= float(scale[i, j])
    return out.double()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear_of(outputs: int, inputs: int, bias: bool = False, power_of_two: bool = False) -> FP8Linear:
    values = nn.Parameter(drawn(outputs, seed=1)) if bias else None
    module = FP8Linear(torch.Size([outputs, inputs]), values, power_of_two=power_of_two)
    stored, scale = fp8.quantize(drawn(outputs, inputs, seed=2), power_of_two=power_of_two)
    module.weight.copy_(stored)
    module.weight_scale_inv.copy_(scale)
    return module


sides = st.one_of(st.sampled_from([1, 127, 128, 129, 256]), st.integers(1, 260))


class TestLinear:
    @settings(max_examples=40)
    @given(
        lead=st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 0), (0, 3)]),
        outputs=sides,
        inputs=sides,
        bias=st.booleans(),
        power_of_two=st.booleans(),
    )
    def test_product(self, lead: tuple[int, ...], outputs: int, inputs: int, bias: bool, power_of_two: bool):
        module = linear_of(outputs, inputs, bias, power_of_two)
        x = drawn(*lead, inputs)
        got = module(x)
        assert (got.dtype, tuple(got.shape)) == (torch.float64, (*lead, outputs))
        right = rounded(x, power_of_two) @ restored(module.weight, module.weight_scale_inv).t()
        right = right + module.bias.detach() if bias else right
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_takes_and_gives_the_dtype_of_its_input(self, dtype: torch.dtype):
        module = linear_of(150, 200, bias=True)
        x = drawn(2, 7, 200, dtype=dtype)
        got = module(x)
        assert got.dtype == dtype
        assert difference(got, module(x.double())) < (0.01 if dtype == torch.bfloat16 else 1e-5)

    def test_dense_weight(self):
        module = linear_of(150, 200)
        right = restored(module.weight, module.weight_scale_inv)
        assert torch.equal(dense_weight(module, torch.float64), right)
        assert torch.equal(dense_weight(module, torch.bfloat16), right.float().bfloat16())
        plain = nn.Linear(3, 4)
        assert torch.equal(dense_weight(plain, torch.float64), plain.weight.double())


def experts_of(
    experts: int, hidden: int, width: int, power_of_two: bool = False, up: float = 1.0
) -> tuple[FP8Experts, list[dict[str, Tensor]]]:
    """Experts filled through their published names, one matrix at a time, and each expert's matrices as float64; ``up``
    times as large an up_proj."""
    moe = MoEConfig(n_routed_experts=experts, num_experts_per_tok=1, moe_intermediate_size=width)
    module = FP8Experts(Experts(hidden, moe), power_of_two=power_of_two)
    places = dict(disk_tensors(nn.ModuleDict({"0": nn.ModuleDict({"mlp": nn.ModuleDict({"experts": module})})})))
    plain = []
    for expert in range(experts):
        matrices = {}
        for number, (name, shape) in enumerate(
            {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items()
        ):
            weight = drawn(*shape, seed=3 * expert + number) * (up if name == "up" else 1.0)
            stored, scale = fp8.quantize(weight, power_of_two=power_of_two)
            place = f"0.mlp.experts.{expert}.{name}_proj.weight"
            assert (places[place].shape, places[place + SCALE].shape) == (stored.shape, scale.shape)
            places[place].copy_(stored)
            places[place + SCALE].copy_(scale)
            matrices[name] = restored(stored, scale)
        plain.append(matrices)
    return module, plain


def loops(x: Tensor, indices: Tensor, weights: Tensor, plain: list[dict[str, Tensor]], power_of_two: bool) -> Tensor:
    """Token by token, choice by choice."""
    out = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for k in range(indices.shape[1]):
            expert = plain[int(indices[n, k])]
            row = rounded(x[n], power_of_two)
            gate, up = expert["gate"] @ row, expert["up"] @ row
            out[n] += weights[n, k] * (expert["down"] @ rounded(gate / (1 + torch.exp(-gate)) * up, power_of_two))
    return out


class TestExperts:
    @settings(max_examples=30)
    @given(
        tokens=st.integers(0, 12),
        experts=st.integers(1, 6),
        hidden=st.sampled_from([1, 40, 128, 160]),
        width=st.sampled_from([1, 72, 128, 130]),
        routing=st.sampled_from(["random", "one takes all", "half are empty"]),
        power_of_two=st.booleans(),
    )
    def test_equal_loops(self, tokens: int, experts: int, hidden: int, width: int, routing: str, power_of_two: bool):
        module, plain = experts_of(experts, hidden, width, power_of_two)
        chosen = {"random": range(experts), "one takes all": [experts - 1], "half are empty": range(0, experts, 2)}
        candidates = torch.tensor(list(chosen[routing]))
        k = min(2, len(candidates))
        picks = torch.rand(tokens, len(candidates), generator=torch.Generator().manual_seed(5)).topk(k).indices
        indices, x, weights = candidates[picks], drawn(tokens, hidden), drawn(tokens, k, seed=1).abs()
        got = module(x, indices, weights)
        assert got.dtype == torch.float64
        right = loops(x, indices, weights, plain, power_of_two)
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9 * (float(right.abs().max()) if tokens else 1))

    @pytest.mark.parametrize("tokens", [1, 31, 200])
    def test_bfloat16(self, tokens: int):
        """Rows are padded and sorted otherwise there."""
        module, plain = experts_of(6, 160, 72)
        indices = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(5)).topk(2).indices
        x, weights = drawn(tokens, 160, dtype=torch.bfloat16), drawn(tokens, 2, seed=1).abs()
        got = module(x, indices, weights.float())
        assert got.dtype == torch.bfloat16
        right = loops(x.double(), indices, weights, plain, False)
        # BF16 numbers between the two products fall on other E4M3 numbers here and there.
        assert float((got.double() - right).norm() / right.norm()) < 0.03

    def test_gate_and_up_have_blocks_of_their_own(self):
        """Width 72: a block over both would give gate the scale of an up_proj that is 10,000 times as large."""
        module, plain = experts_of(3, 160, 72, up=1e4)
        assert tuple(module.gate_up_scale_inv.shape) == (3, 2, 1, 2)
        assert (module.gate_up_scale_inv[:, 1] > 1000 * module.gate_up_scale_inv[:, 0]).all()
        for expert in range(3):
            assert difference(plain[expert]["gate"], drawn(72, 160, seed=3 * expert)) < 2.0**-4
        x, indices = drawn(4, 160), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]])
        right = loops(x, indices, torch.ones(4, 2), plain, False)
        assert difference(module(x, indices, torch.ones(4, 2)), right) < 1e-9


def fp8_model() -> Transformer:
    """The small model with random FP8 weights in the places that V3 has them."""
    model = randomised(small(**CONFIG), dtype=torch.float32).requires_grad_(False)
    names = {name for name, parameter in model.named_parameters() if parameter.dim() == 2 and "_proj" in name}
    use_fp8(model, names | {name for name, _ in model.named_parameters() if ".experts." in name})
    for name, buffer in model.named_buffers():
        if buffer.dtype == FP8:
            buffer.copy_((drawn(*buffer.shape, seed=len(name)) * 50).clamp(-448, 448).to(FP8))
        elif name.endswith(SCALE):
            buffer.copy_(drawn(*buffer.shape, seed=len(name)).abs() * 1e-3 + 1e-4)
    return model


def is_kept(name: str, tensor: Tensor) -> bool:
    return tensor.dtype == FP8 or name.endswith((SCALE, "e_score_correction_bias"))


class TestCasting:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
    @pytest.mark.parametrize("way", ["to", "method", "to with device", "module by module"])
    def test_bytes_and_scales_are_kept(self, dtype: torch.dtype, way: str):
        model = fp8_model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        method = {torch.bfloat16: "bfloat16", torch.float32: "float", torch.float16: "half", torch.float64: "double"}
        match way:
            case "to":
                model.to(dtype)
            case "method":
                getattr(model, method[dtype])()
            case "to with device":
                model.to("cpu", dtype)
            case _:
                for module in model.modules():
                    module.to(dtype)
        after = model.state_dict()
        assert after.keys() == before.keys()
        for name, old in before.items():
            new = after[name]
            assert new.dtype == (old.dtype if is_kept(name, old) else dtype), name
            if is_kept(name, old):
                assert torch.equal(new.view(torch.uint8), old.view(torch.uint8)), name

    def test_meta_and_back(self):
        model = fp8_model()
        described = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
        model.to("meta")
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        model.to_empty(device="cpu")
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()} == described

    def test_meta_in_another_dtype(self):
        model = fp8_model().to("meta", torch.bfloat16)
        for name, tensor in model.state_dict().items():
            assert tensor.is_meta
            assert tensor.dtype in ((FP8, torch.float32) if is_kept(name, tensor) else (torch.bfloat16,)), name

    def test_copies(self):
        model = fp8_model()
        tokens = tokens_for(model.config, 2, 9)
        logits = model(tokens)
        copied = copy.deepcopy(model)
        fresh = fp8_model()
        for buffer in fresh.buffers():
            buffer.copy_(torch.zeros_like(buffer.float()))
        fresh.load_state_dict(model.state_dict())
        for other in (copied, fresh):
            for name, tensor in other.state_dict().items():
                old = model.state_dict()[name]
                assert tensor.dtype == old.dtype
                assert torch.equal(tensor.reshape(-1).view(torch.uint8), old.reshape(-1).view(torch.uint8))
                assert tensor.data_ptr() != old.data_ptr()
            assert torch.equal(other(tokens), logits)


class TestReplacing:
    def test_only_what_is_named(self):
        model = randomised(small(**CONFIG))
        dense = {name: type(module) for name, module in model.named_modules()}
        names = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"}
        names |= {"model.layers.2.mlp.experts.gate_up_proj", "model.layers.2.mlp.experts.down_proj"}
        names |= {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts.down_proj"}  # halves: no
        bias = model.model.layers[1].self_attn.o_proj.bias
        use_fp8(model, names, power_of_two=True)
        new = {"model.layers.0.mlp.up_proj": FP8Linear, "model.layers.1.self_attn.o_proj": FP8Linear}
        new["model.layers.2.mlp.experts"] = FP8Experts
        assert {name: type(module) for name, module in model.named_modules()} == dense | new
        assert all(model.get_submodule(name).power_of_two for name in new)
        assert model.model.layers[1].self_attn.o_proj.bias is bias

    def test_on_the_meta_device_nothing_is_made(self):
        with torch.device("meta"):
            model = Transformer(small(**CONFIG))
        use_fp8(model, {name for name, _ in model.named_parameters()})
        assert all(tensor.is_meta for tensor in model.state_dict().values())


class Tiled(nn.Module):
    """Its input as E4M3 and back, after ``inner``. Doing it again changes nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return rounded(self.inner(x))


class TestAttention:
    @pytest.fixture
    @staticmethod
    def attention() -> LatentAttention:
        return fp8_model().double().model.layers[0].self_attn

    @staticmethod
    def context(config: ModelConfig, tokens: int) -> Context:
        rope = rotary_tables(config.rope, config.attention.rotary_dim, torch.arange(tokens).unsqueeze(0), torch.float64)
        return Context(rope, 0, None, tokens > 1)

    @pytest.mark.parametrize("tokens", [1, 9])
    def test_absorbed_equals_expanded(self, attention: LatentAttention, tokens: int):
        """Where the latents are E4M3 numbers already: the absorbed path does not quantise them."""
        attention.kv_a_layernorm = Tiled(attention.kv_a_layernorm)
        x, context = drawn(2, tokens, 160), self.context(small(**CONFIG), tokens)
        expanded, absorbed = (attention(x, context, absorb=absorb) for absorb in (False, True))
        # Only o_proj's input is rounded after them, and jumps where the two lie on either side of a middle: not here.
        assert difference(absorbed, expanded) < 1e-10

    @pytest.mark.parametrize("tokens", [1, 9])
    def test_absorbed_is_that_of_the_dense_weight(self, attention: LatentAttention, tokens: int):
        x, context = drawn(2, tokens, 160), self.context(small(**CONFIG), tokens)
        got, near = attention(x, context, absorb=True), attention(x, context, absorb=False)
        assert 1e-4 < difference(near, got) < 0.1  # the rounding of the latents
        quantized, (outputs, inputs) = attention.kv_b_proj, attention.kv_b_proj.weight.shape
        dense = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64).requires_grad_(False)
        dense.weight.copy_(restored(quantized.weight, quantized.weight_scale_inv))
        attention.kv_b_proj = dense
        for absorb in (True, False):
            assert difference(attention(x, context, absorb=absorb), got) < 1e-10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A checkpoint in FP8 blocks, with scales of any size and with powers of two."""
    root = tmp_path_factory.mktemp("fp8")
    (root / "source").mkdir()
    save_model(randomised(small(**CONFIG), std=0.1, dtype=torch.float32), root / "source")
    for power_of_two in (False, True):
        convert(root / "source", root / str(power_of_two), FP8, power_of_two=power_of_two)
    return {power_of_two: root / str(power_of_two) for power_of_two in (False, True)}


def with_rounded_inputs(model: Transformer, power_of_two: bool) -> Transformer:
    """A dense model whose projections round what they get, as FP8 products do."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(tuple(ATTENTION + MLP)):
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0], power_of_two),))
        elif isinstance(module, Experts):
            module.forward = _in_loops(module, power_of_two)
    return model


def _in_loops(module: Experts, power_of_two: bool) -> Callable[..., Tensor]:
    width = module.down_proj.shape[-1]
    plain = [
        {"gate": gate_up[:width].double(), "up": gate_up[width:].double(), "down": down.double()}
        for gate_up, down in zip(module.gate_up_proj.detach(), module.down_proj.detach(), strict=True)
    ]
    return lambda x, indices, weights: loops(x, indices, weights, plain, power_of_two)


class TestWholeModel:
    @pytest.mark.parametrize("power_of_two", [False, True])
    def test_logits(self, folders: dict[bool, Path], power_of_two: bool):
        model = load_model(folders[power_of_two], weights="fp8", dtype=torch.float64)
        dense = load_model(folders[power_of_two], dtype=torch.float64)
        tokens = tokens_for(model.config, 3, 12)
        with torch.no_grad():
            unrounded = dense(tokens)
            with_rounded_inputs(dense, power_of_two)
            right = dense(tokens)
            assert difference(right, unrounded) > 1e-3  # so that a lost rounding is noticed
            assert difference(model(tokens), right) < 1e-9
            assert difference(model.mtp_logits(tokens)[0], dense.mtp_logits(tokens)[0]) < 1e-9

    def test_the_two_kinds_of_scales_are_told_apart(self, folders: dict[bool, Path]):
        for power_of_two, folder in folders.items():
            model = load_model(folder, weights="fp8")
            modules = [m for m in model.modules() if isinstance(m, FP8Linear | FP8Experts)]
            assert {module.power_of_two for module in modules} == {power_of_two}

    def test_what_is_in_fp8(self, folders: dict[bool, Path]):
        model = load_model(folders[False], weights="fp8")
        found = {name for name, module in model.named_modules() if isinstance(module, FP8Linear | FP8Experts)}
        expected = {f"model.layers.{layer}.{name}" for layer in range(4) for name in ATTENTION}
        expected |= {f"model.layers.0.mlp.{name}" for name in MLP}
        expected |= {f"model.layers.{layer}.mlp.shared_experts.{name}" for layer in (1, 2, 3) for name in MLP}
        expected |= {f"model.layers.{layer}.mlp.experts" for layer in (1, 2, 3)}
        assert found == expected
        for name, tensor in model.state_dict().items():
            if tensor.dtype != FP8:
                assert tensor.dtype == (torch.float32 if is_kept(name, tensor) else torch.bfloat16), name

    def test_bfloat16(self, folders: dict[bool, Path]):
        """As it is loaded by default, it is as near to the dense model in float64 as FP8 in float64 is.

        Nearer to each other than that they are not: a difference e before a rounding to E4M3 of step s moves e / s of
        the numbers by s, which is √(e · s) after it. Layer by layer that grows to the size of the rounding itself.
        """
        dense = load_model(folders[False], dtype=torch.float64)
        exact = load_model(folders[False], weights="fp8", dtype=torch.float64)
        model = load_model(folders[False], weights="fp8")
        tokens = tokens_for(model.config, 8, 12)
        with torch.no_grad():
            right, near, got = dense(tokens), exact(tokens), model(tokens)
        assert got.dtype == torch.bfloat16

        def away(logits: Tensor) -> float:
            """Of a token, in the middle: where two experts score alike, rounding chooses."""
            return float(((logits.double() - right).norm(dim=-1) / right.norm(dim=-1)).median())

        assert 0.01 < away(near) < 0.2
        assert away(got) < 1.2 * away(near)

    def test_bytes(self, folders: dict[bool, Path]):
        """Memory holds what the file holds, and nothing beside it."""
        model = load_model(folders[False], weights="fp8")
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
        beside = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
        assert not beside
        assert sum(storages.values()) == Shards(folders[False]).nbytes
        dense = load_model(folders[False])
        for name, module in model.named_modules():
            if isinstance(module, FP8Linear | FP8Experts):
                own = [tensor for part, tensor in module.state_dict().items() if part != "bias"]
                plain = [tensor for part, tensor in dense.get_submodule(name).state_dict().items() if part != "bias"]
                scales = sum(tensor.numel() for tensor in own if tensor.dtype == torch.float32)
                assert 2 * (sum(t.nbytes for t in own) - 4 * scales) == sum(t.nbytes for t in plain)

    def test_half_of_v3(self):
        """With V3's sizes scales weigh nothing. Of eight layers 51.4% of BF16 are left: embedding and head weigh more
        there than in the whole, which keeps 50.2%."""
        config = preset("deepseek-v3").model_copy(update={"num_hidden_layers": 8})
        with torch.device("meta"):
            model = Transformer(config)
        bf16 = 2 * sum(p.numel() for p in model.parameters())
        use_fp8(model, {name for name, _ in model.named_parameters() if "_proj" in name and ".eh_proj" not in name})
        model.to(torch.bfloat16)
        assert round(sum(tensor.nbytes for tensor in model.state_dict().values()) / bf16, 3) == 0.514


class TestGeneration:
    PROMPTS = ("the quick", "a", "a somewhat longer prompt")

    @staticmethod
    @torch.no_grad()
    def naive(model: Transformer, text: str, count: int) -> str:
        """Greedy, one sequence, everything computed anew for each token (over latents, as with a cache)."""
        ids = BYTES.encode(text)
        new: list[int] = []
        for _ in range(count):
            cache = Cache(model.config, 1, len(ids), dtype=torch.float64)
            logits = model(torch.tensor([ids]), cache=cache)[0, -1]
            allowed = [token for token in range(BYTES.vocab_size) if BYTES.token_bytes(token)]
            token = max(allowed, key=lambda t: float(logits[t]))
            if token in (BYTES.eos_id, model.config.eos_token_id):
                break
            ids.append(token)
            new.append(token)
        return BYTES.decode(new)

    def test_batch_and_cache(self, folders: dict[bool, Path]):
        model = load_model(folders[False], weights="fp8", dtype=torch.float64)
        options = {"temperature": 0, "max_new_tokens": 6, "add_bos": False}
        right = [self.naive(model, prompt, 6) for prompt in self.PROMPTS]
        assert any(right)
        assert abyssal.generate(model, BYTES, list(self.PROMPTS), **options) == right
        assert [abyssal.generate(model, BYTES, prompt, **options) for prompt in self.PROMPTS] == right

    def test_bfloat16(self, folders: dict[bool, Path]):
        model = load_model(folders[True], weights="fp8")
        texts = abyssal.generate(model, BYTES, list(self.PROMPTS), temperature=0, max_new_tokens=8)
        assert any(texts)
