"""Derived activation memory beside the storages that autograd really saves in training steps of small models."""

import gc
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from abyssal.analysis.activations import Adapters, StepShape, block_activations, count_activations
from abyssal.config import ModelConfig, MTPConfig, preset
from abyssal.data.loader import Batch
from abyssal.kernels import attention as softmax_attention
from abyssal.kernels import grouped, native
from abyssal.model import RoutingRecorder, Transformer
from abyssal.training.hardware import autocast
from abyssal.training.loss import compute_losses, count_targets, total_loss
from abyssal.training.weights import product_matrices

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="the plan is for the kernels; plain PyTorch, which runs here, saves more"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def tensors_alive() -> list[torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's lazy modules, which are asked what they are
        return [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"]


class Step:
    """A real forward pass with loss, as a training step makes it, and what it holds."""

    def __init__(
        self, config: ModelConfig, batch: int, length: int, dtype: str, recompute: bool, change: Any = None
    ) -> None:
        model = Transformer(config, generator=torch.Generator().manual_seed(1))
        if change is not None:
            change(model)
        if dtype == "bfloat16":
            for parameter in product_matrices(model).values():
                parameter.data = parameter.data.bfloat16()
        depths = len(model.mtp_modules)
        tokens = torch.randint(config.vocab_size, (batch, length + 1 + depths))
        data = Batch(tokens, torch.zeros_like(tokens))
        counts = count_targets(data, length, depths)
        gc.collect()
        before = {x.untyped_storage().data_ptr() for x in tensors_alive()}
        self.kept: dict[int, int] = {}
        keep = []

        def note(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in before:
                self.kept[storage.data_ptr()] = storage.nbytes()
            return x

        recorder = RoutingRecorder()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            with autocast(torch.device("cpu"), DTYPES[dtype]):
                losses = compute_losses(model, data, length, recorder=recorder, recompute=recompute, counts=counts)
            keep.append(total_loss(losses, counts, 0.3))
        # What a recomputed part's arguments and the recorder hold is no saved tensor, and memory all the same.
        for x in tensors_alive():
            note(x)

    @property
    def nbytes(self) -> int:
        return sum(self.kept.values())


HEADS = st.sampled_from([2, 4])


@st.composite
def configs(draw: Any) -> ModelConfig:
    heads, dims = draw(HEADS), st.sampled_from([8, 16, 24])
    kind = draw(st.sampled_from(["mha", "gqa", "mla", "mla", "separate_latents"]))
    if kind in ("mha", "gqa"):
        kv = heads if kind == "mha" else heads // 2
        attention = {"kind": "mha", "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": draw(dims)}
    else:
        nope, rope = draw(dims), draw(st.sampled_from([8, 16]))
        attention = {
            "kind": kind,
            "num_attention_heads": heads,
            "q_lora_rank": draw(st.sampled_from([None, 24, 40])),
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": rope,
            # Not wider than keys: nobody's are, and torch has no fast CPU kernel for it.
            "v_head_dim": draw(st.sampled_from([8, nope, nope + rope])),
        }
        attention |= {"kv_lora_rank": 32} if kind == "mla" else {"k_lora_rank": 32, "v_lora_rank": 24}
    moe = None
    if draw(st.integers(0, 3)):
        experts = draw(st.sampled_from([4, 6]))
        moe = {
            "n_routed_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, 3)),
            "moe_intermediate_size": draw(st.sampled_from([24, 64, 96])),
            "n_shared_experts": draw(st.integers(0, 2)),
            "first_k_dense_replace": draw(st.integers(0, 1)),
            "scoring_func": draw(st.sampled_from(["softmax", "sigmoid"])),
            "norm_topk_prob": draw(st.booleans()),
            "segments": draw(st.sampled_from([1, 1, 1, 2])),
        }
    return ModelConfig.model_validate(
        {
            "vocab_size": draw(st.sampled_from([100, 700])),
            "hidden_size": draw(st.sampled_from([48, 64, 128])),
            "num_hidden_layers": draw(st.integers(1, 3)),
            "intermediate_size": draw(st.sampled_from([64, 160])),
            "max_position_embeddings": 4096,
            "attention": attention,
            "moe": moe,
            "mtp": {"num_nextn_predict_layers": draw(st.integers(0, 2))},
            "tie_word_embeddings": draw(st.booleans()),
        }
    )


SHAPES = st.sampled_from([(1, 512), (4, 96), (2, 300), (3, 256), (1, 1056)])


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Has a CPU run the operations that a GPU's step runs: those that only the CPU's library has are taken away."""
    for name in ("turn_heads", "keys_values"):
        patch.delattr(native, name)
    patch.setattr(softmax_attention, "_trains_in_blocks", lambda *_: False)
    patch.setattr(grouped, "plan", lambda indices, experts, _: grouped.plan_on_device(indices, experts))


@settings(max_examples=30)
@given(configs(), SHAPES, st.sampled_from(["float32", "bfloat16"]), st.booleans(), st.sampled_from(["cpu", "cuda"]))
def test_derived_is_what_a_step_saves(
    config: ModelConfig, shape: tuple[int, int], dtype: str, recompute: bool, device: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Without AMX all experts may be padded to the busiest one's rows, which only the routing itself tells.
        patch.setattr(grouped, "_EVEN", 0.0)
        if device == "cuda":
            as_on_a_gpu(patch)
        counted = Step(config, *shape, dtype, recompute).nbytes
    derived = count_activations(config, StepShape(*shape, dtype=dtype, recompute=recompute, device=device)).kept
    assert derived == pytest.approx(counted, rel=1e-4 if dtype == "float32" or device == "cuda" else 0.01)


def test_recomputing_keeps_less_and_says_what_comes_back() -> None:
    """Of one block: what is kept without recomputation is what is kept with it, and both recomputed parts."""
    config = preset("demo")
    shape = StepShape(2, 128)
    for layer in (0, 1):
        plain = block_activations(config, layer, shape)
        recomputed = block_activations(config, layer, replace(shape, recompute=True))
        parts = [sum(part.values()) for part in (recomputed.attention, recomputed.feed_forward)]
        assert sum(plain.kept.values()) == sum(recomputed.kept.values()) + sum(parts)
        assert recomputed.recomputed == max(parts)
        assert plain.recomputed == 0


@pytest.mark.parametrize("layer", [0, 1])
def test_a_block_s_terms_by_hand(layer: int) -> None:
    """The demo model's blocks (D 256, 4 heads of 64 + 64, ranks 128 and 64 + 32), BF16 on a GPU, for a token."""
    config, tokens = preset("demo"), 512
    terms = block_activations(config, layer, StepShape(1, tokens)).kept
    assert terms["residual stream"] == tokens * 2 * 4 * 256
    assert terms["latents"] == tokens * 2 * (2 * 128 + 2 * 64 + 32)
    # Values are as wide as keys, a view beside the 32 dimensions without position of each head's key.
    assert terms["queries, keys, values"] == tokens * 2 * 4 * (64 + 64 + 64 + 32)
    assert terms["attention output"] == tokens * 4 * (2 * 64 + 4)
    if layer == 0:
        assert terms["gate and up"] == tokens * 2 * 2 * 768
        assert "router" not in terms
    else:
        rows = 2 * tokens + 8 * 7
        assert terms["gate and up"] == 2 * 2 * 256 * (rows + tokens)
        assert terms["expert rows"] == rows * (2 * 256 + 8) + 4 * 2 * tokens
        assert terms["router"] == tokens * (4 * 256 + 4 * 8 + 8 * 2 + 4 * 2 + 4 * 2 + 4)


def test_parallel_ranks_hold_their_share() -> None:
    config = preset("deepseek-v3")
    one = block_activations(config, 10, StepShape(1, 4096)).kept
    two = block_activations(config, 10, StepShape(1, 4096, tensor=2)).kept
    for term in ("queries, keys, values", "attention output", "gate and up", "SwiGLU output"):
        assert two[term] * 2 == one[term]
    for term in ("residual stream", "norms", "latents", "router", "expert rows"):
        assert two[term] == one[term]
    # Under expert parallelism a rank works on as many rows, of fewer experts: less padding.
    spread = block_activations(config, 10, StepShape(1, 4096, expert=64)).kept
    rows = [4096 * 8 + experts * 7 for experts in (256, 4)]
    assert one["expert rows"] - spread["expert rows"] == pytest.approx((rows[0] - rows[1]) * (2 * 7168 + 8), rel=0.01)


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter beside it."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear, dtype = linear, linear.weight.dtype
        self.a = nn.Parameter(torch.randn(rank, linear.in_features, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.a), self.b)


@pytest.mark.parametrize("parts", [("attention",), ("attention", "mlp", "shared")])
@pytest.mark.parametrize("recompute", [False, True])
def test_adapters(parts: tuple[str, ...], recompute: bool) -> None:
    names = {"attention": ".self_attn.", "mlp": ".0.mlp.", "shared": ".shared_experts."}

    def adapt(model: Transformer) -> None:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and any(names[part] in name for part in parts):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, LoRALinear(module, 8))

    config = preset("demo").model_copy(update={"mtp": MTPConfig()})
    counted = Step(config, 2, 200, "float32", recompute, change=adapt).nbytes
    shape = StepShape(2, 200, "float32", recompute, "cpu", adapters=Adapters(8, parts))
    # The first norm's input, which nothing behind it asks a gradient for, is counted all the same.
    assert count_activations(config, shape).kept == pytest.approx(counted, rel=0.03)
