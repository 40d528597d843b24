"""Memory of training beside the trainer's own tensors, and what must hold of any layout."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from abyssal.analysis.activations import Adapters, StepShape, count_activations
from abyssal.analysis.inventory import Inventory
from abyssal.analysis.memory import Layout, TrainingMemory, TrainingSetup, adapter_parameters
from abyssal.config import ModelConfig, preset
from abyssal.config.parallel import stage_layers
from abyssal.data.loader import Batch
from abyssal.kernels import native
from abyssal.model import Transformer
from abyssal.model.adapting import add_lora
from abyssal.model.quantized import use_packed
from abyssal.training.hardware import autocast
from abyssal.training.loss import compute_losses, total_loss
from abyssal.training.recipe import BalanceConfig, OptimizerConfig
from abyssal.training.step import TrainingStep
from abyssal.training.weights import sum_gradients_in_float32

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {"vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 72}
ATTENTION: dict[str, dict[str, Any]] = {
    "mha": {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bias": True},
    "mla": {"kind": "mla", "num_attention_heads": 4, "kv_lora_rank": 40, "qk_nope_head_dim": 16},
}
ATTENTION["mla"] |= {"qk_rope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": 24}
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1}


def small(attention: str, moe: bool = True, depths: int = 1, tied: bool = False) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            **SIZES,
            "max_position_embeddings": 128,
            "attention": ATTENTION[attention],
            "moe": MOE | {"first_k_dense_replace": 1} if moe else None,
            "mtp": {"num_nextn_predict_layers": depths},
            "tie_word_embeddings": tied,
        }
    )


def nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@settings(max_examples=25)
@given(
    st.builds(small, st.sampled_from(["mha", "mla"]), st.booleans(), st.integers(0, 2), st.booleans()),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["adamw", "muon"]),
    st.sampled_from(["float32", "bfloat16", "8bit"]),
    st.integers(1, 2),
)
def test_training_state_is_what_the_trainer_keeps(
    config: ModelConfig, dtype: str, optimizer: str, state: str, accumulate: int
) -> None:
    model, cpu = Transformer(config), torch.device("cpu")
    step = TrainingStep(
        model,
        optimizer=OptimizerConfig(name=optimizer, lr=1e-3, state=state),
        balance=BalanceConfig(),
        clip=1.0,
        mtp_weight=0.3,
        device=cpu,
        dtype=DTYPES[dtype],
    )
    sum_gradients_in_float32(model, accumulate > 1)
    tokens = torch.randint(config.vocab_size, (2, 16 + 1 + len(model.mtp_modules)))
    for _ in range(accumulate):
        with autocast(cpu, DTYPES[dtype]):
            losses = compute_losses(model, Batch(tokens, torch.zeros_like(tokens)), 16)
        total_loss(losses, losses.counts, 0.3).backward()
    kept = [value for s in step.optimizer.state.values() for key, value in s.items() if key != "step"]
    found = {
        "weights": nbytes([*model.parameters(), *model.buffers()]),
        "gradients": nbytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": nbytes(kept),
    }
    setup = TrainingSetup(2, 16, accumulate, dtype, optimizer=optimizer, state=state)
    assert TrainingMemory(Inventory(config), setup).state(Layout()) == found


SETUPS = st.sampled_from(
    [
        TrainingSetup(1, 64),
        TrainingSetup(2, 64, accumulate=8, recompute=True),
        TrainingSetup(1, 64, dtype="float32", optimizer="muon"),
        TrainingSetup(1, 64, adapters=Adapters(4), frozen="nf4"),
    ]
)
V3 = Inventory(preset("deepseek-v3"))
POWERS = st.sampled_from([1, 2, 4])


@settings(max_examples=60)
@given(SETUPS, POWERS, POWERS, POWERS, POWERS, st.sampled_from([1, 2]))
def test_no_byte_is_lost_between_gpus(
    setup: TrainingSetup, replicate: int, shard: int, tensor: int, expert: int, pipeline: int
) -> None:
    """All GPUs together hold each replica once, what tensor parallelism repeats once more a rank, and what the last
    pipeline stage repeats."""
    layout = Layout(replicate, shard, tensor, expert, pipeline)
    assume(layout.data % expert == 0)
    memory = TrainingMemory(Inventory(small("mla")), setup)
    alone = memory.state(Layout())
    # Expert ranks are data-parallel ranks: together they hold an expert as often as ranks go into one copy.
    held = [memory.state(layout, stage) for stage in range(pipeline)]
    for term in alone:
        together = sum(stage[term] for stage in held) * layout.data * tensor
        assert together >= alone[term] * (1 if expert > shard else replicate) * 0.999
    if tensor == expert == pipeline == 1:
        for term, one in alone.items():
            assert sum(stage[term] for stage in held) * shard == pytest.approx(one, abs=shard)


def test_layers_of_stages_are_all_layers() -> None:
    config = preset("deepseek-v3")
    for stages in (1, 2, 7, 16, 61):
        layers = [layer for stage in range(stages) for layer in stage_layers(config, stages, stage)]
        assert layers == list(range(62))
        sizes = [len(stage_layers(config, stages, stage)) for stage in range(stages)]
        assert max(sizes) - min(sizes) <= 2  # the last has the MTP module too


def test_stages_keep_together_what_one_gpu_keeps() -> None:
    config, shape = preset("deepseek-v3"), StepShape(1, 512)
    whole = count_activations(config, shape)
    tables = count_activations(config, shape).by_term["rotary tables"] // 2
    stages = [count_activations(config, shape, 4, stage) for stage in range(4)]
    assert sum(stage.kept for stage in stages) == whole.kept + 3 * tables
    # 1F1B: the first of p stages holds p micro-batches.
    setup = TrainingSetup(1, 512, accumulate=16)
    memory = TrainingMemory(Inventory(config), setup)._stage(Layout(pipeline=4), 0)
    assert memory.by_term["activations"] == 4 * stages[0].kept


def test_a_gathered_block_by_hand() -> None:
    """MoE-16B under ZeRO-3: two MoE blocks in BF16 and the gradient of one."""
    config = preset("deepseek-moe-16b")
    block = 4 * 2048 * 2048 + 66 * 3 * 2048 * 1408 + 64 * 2048 + 2 * 2048
    memory = TrainingMemory(Inventory(config), TrainingSetup(1, 4096)).of(Layout(shard=8))
    assert memory.by_term["gathered blocks"] == 3 * 2 * block
    # Under expert parallelism over the same ranks, experts are never gathered.
    spread = TrainingMemory(Inventory(config), TrainingSetup(1, 4096)).of(Layout(shard=8, expert=8))
    ends = 102400 * 2048
    others = block - 64 * 3 * 2048 * 1408
    assert spread.by_term["gathered blocks"] == 2 * (2 * (ends + 2048) + ends)  # the norm goes with the head
    assert others < ends


@settings(max_examples=30)
@given(SETUPS, st.sampled_from([1, 2, 4, 7, 13, 31, 61]), POWERS)
def test_the_largest_of_all_stages_counts(setup: TrainingSetup, pipeline: int, tensor: int) -> None:
    memory = TrainingMemory(V3, setup)
    layout = Layout(shard=8, tensor=tensor, pipeline=pipeline)
    assert memory.of(layout).total == max(memory._stage(layout, stage).total for stage in range(pipeline))


def test_adapters_by_hand() -> None:
    """LoRA of rank 8 on the small model: r · (inputs + outputs) for every projection, every expert its own."""
    inventory = Inventory(small("mla", depths=0))
    found = {
        part: sum(adapter_parameters(w, Adapters(8, (part,))) for w in inventory.weights)
        for part in ("attention", "mlp", "shared", "experts")
    }
    attention = (64 + 24) + (24 + 4 * 24) + (64 + 48) + (40 + 4 * 32) + (4 * 16 + 64)
    assert found == {
        "attention": 2 * 8 * attention,
        "mlp": 8 * 3 * (64 + 72),
        "shared": 8 * 3 * (64 + 48),
        "experts": 4 * 8 * ((64 + 96) + (48 + 64)),
    }
    setup = TrainingSetup(1, 64, adapters=Adapters(8), frozen="nf4")
    state = TrainingMemory(inventory, setup).state(Layout())
    assert state["adapters"] == 16 * sum(found.values())  # FP32 number, gradient, two moments
    # Every projection, each expert's gate and up by themselves: whole blocks of 64, groups of 256 blocks, and a mean.
    quantised = 0
    for w in inventory.weights:
        if w.adaptable:
            matrices = 1 if len(w.shape) == 2 else 4 * (2 if "gate_up" in w.name else 1)
            blocks = math.ceil(w.numel / matrices / 64)
            quantised += matrices * (32 * blocks + blocks + 4 * math.ceil(blocks / 256) + 4)
    rest = sum(w.numel for w in inventory.weights if not w.adaptable and w.trained)
    biases = sum(w.numel for w in inventory.weights if not w.trained)
    assert state["weights"] == quantised + 2 * rest + 4 * biases


@pytest.mark.parametrize("frozen", ["dense", "int8", "int4", "nf4"])
@pytest.mark.parametrize("attention", ["mha", "mla"])
@pytest.mark.parametrize("tied", [False, True])
def test_frozen_weights_and_adapters_are_those_of_the_modules(frozen: str, attention: str, tied: bool) -> None:
    """To the byte: what packed modules hold; of adapters FP32 numbers, gradients and two moments."""
    if frozen == "nf4":
        pytest.importorskip("bitsandbytes")
    config = small(attention, depths=1, tied=tied)
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
        if frozen != "dense":
            use_packed(model, frozen)
        trained = add_lora(model, "all", 4, 8.0).trainable
    unique = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    setup = TrainingSetup(1, 64, adapters=Adapters(4), frozen=frozen)
    state = TrainingMemory(Inventory(config), setup).state(Layout())
    assert trained > 0
    assert state == {"weights": nbytes(unique.values()) - 4 * trained, "adapters": 16 * trained}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_esft_s_state_by_hand(dtype: str, accumulate: int) -> None:
    """One of four experts of the one MoE layer: 2 bytes and 2 more of its FP32 number, its gradient, two moments."""
    inventory = Inventory(small("mla", depths=1))
    whole = sum(w.numel for w in inventory.weights if w.trained)
    biases = sum(w.numel for w in inventory.weights if not w.trained)
    expert = 3 * 48 * 64
    setup = TrainingSetup(1, 64, accumulate, dtype, adapters=Adapters.esft(0.25))
    half = dtype == "bfloat16"
    assert TrainingMemory(inventory, setup).state(Layout()) == {
        "weights": (2 if half else 4) * whole + 4 * biases,
        "gradients": (2 if half and accumulate == 1 else 4) * expert,
        "optimizer": (10 if half else 8) * expert,
    }


def test_what_is_dequantised_at_a_time() -> None:
    """In BF16: an expert's gate and up, or 2^22 numbers of a large matrix."""
    for name, numbers in (("deepseek-v3", 2 * 2048 * 7168), ("llama2-7b", 2**22)):
        setup = TrainingSetup(1, 64, adapters=Adapters(4), frozen="nf4")
        memory = TrainingMemory(Inventory(preset(name)), setup).of(Layout())
        assert memory.by_term["dequantised weights"] == 2 * numbers
        dense = TrainingMemory(Inventory(preset(name)), TrainingSetup(1, 64, adapters=Adapters(4))).of(Layout())
        assert "dequantised weights" not in dense.by_term


@pytest.mark.skipif(native.library() is None, reason="plain PyTorch, which runs here, saves more")
def test_activations_are_those_counted() -> None:
    """The plan's activations are :func:`count_activations`', which tests/analysis/test_activations.py checks."""
    config = small("mla")
    memory = TrainingMemory(Inventory(config), TrainingSetup(2, 64)).of(Layout())
    counted = count_activations(config, StepShape(2, 64))
    assert memory.by_term["activations"] == counted.kept == sum(memory.activations.values())
    assert memory.by_term["backward buffers"] == counted.working
    assert math.isclose(memory.total, sum(memory.by_term.values()))
