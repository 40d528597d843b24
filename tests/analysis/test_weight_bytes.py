"""Bytes of weights from a config, beside files that were written and tensors that were quantised."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from plain_models import MHA, SEPARATE, V1_MOE, small
from safetensors.torch import load_file
from torch import Tensor

import abyssal
from abyssal.analysis.precision import count_precisions
from abyssal.analysis.weights import count_weights
from abyssal.checkpoint.precision import FP8, Plan
from abyssal.config import ModelConfig, preset
from abyssal.model import Transformer

# Wider than a block and a group, and no multiple of them; widths of experts are odd.
WIDE = {"hidden_size": 272, "intermediate_size": 301, "vocab_size": 50}
CONFIGS = {
    "v3": small(**WIDE, mtp={"num_nextn_predict_layers": 2}),
    "v3, tied": small(**WIDE, tie_word_embeddings=True),
    "dense": small(
        **WIDE,
        attention=MHA | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 34},
        moe=None,
        rope={"layout": "halves"},
    ),
}


def written(config: ModelConfig, folder: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the main model's tensors in an export, and of the MTP modules' without what they repeat."""
    abyssal.export(Transformer(config), folder, dtype=dtype)
    main = mtp = 0
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer is None or int(layer[1]) < config.num_hidden_layers:
                main += tensor.nbytes
            elif not re.search(r"embed_tokens|shared_head\.head", name):
                mtp += tensor.nbytes
    return main, mtp


@pytest.mark.parametrize("name", CONFIGS)
def test_as_exported(name: str, tmp_path: Path):
    config = CONFIGS[name]
    counted = count_weights(config)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        assert (counted[precision].main, counted[precision].mtp) == written(config, tmp_path / precision, dtype)


def pack8(weight: Tensor) -> Iterator[Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    yield (weight / scale).round().to(torch.int8)
    yield scale.bfloat16()


def pack4(weight: Tensor) -> Iterator[Tensor]:
    for row in weight:
        nibbles = []
        for group in row.split(128):
            scale = group.abs().amax() / 7
            yield scale.bfloat16()
            nibbles.append((group / scale).round().to(torch.int8) & 15)
        numbers = torch.cat(nibbles)
        even, odd = numbers[0::2], numbers[1::2]
        packed = even.to(torch.uint8)
        packed[: len(odd)] |= odd.to(torch.uint8) << 4
        yield packed


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["v3", "v3, tied"])
def test_as_quantised(name: str, precision: str):
    config = CONFIGS[name]
    pack = {"int8": pack8, "int4": pack4}[precision]
    model = Transformer(config)
    main = mtp = 0
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if re.search(r"(experts\.(gate_up|down)_proj|(?<!eh)_proj(_with_mqa)?\.weight)$", key):
            stack = tensor.detach() if tensor.dim() == 3 else tensor.detach().unsqueeze(0)
            nbytes = sum(packed.nbytes for matrix in stack for packed in pack(matrix))
        elif key.endswith("e_score_correction_bias"):
            nbytes = 4 * tensor.numel()
        else:
            nbytes = 2 * tensor.numel()
        if re.match(r"model\.layers\.[34]\.", key):
            mtp += nbytes
        else:
            main += nbytes
    counted = count_weights(config)[precision]
    assert (counted.main, counted.mtp) == (main, mtp)


@pytest.mark.parametrize("name", ["deepseek-moe-16b", "deepseek-v2-lite", "llama2-7b"])
def test_published_models(name: str):
    config = preset(name)
    counted = count_weights(config)
    for precision, base in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp8", FP8)):
        assert counted[precision].main == count_precisions(config, Plan(base)).nbytes


def test_the_published_v3():
    """FACTS of the checkpoint: 669,065,609,216 parameters of 671,026,419,200 in FP8 with 40,838,232 scales of FP32, the
    rest BF16 but for 256 numbers of FP32 bias in each of 58 layers."""
    fp8, bias = 669_065_609_216, 58 * 256
    counted = count_weights(preset("deepseek-v3"))
    assert counted["fp8"].main == fp8 + 4 * 40_838_232 + 2 * (671_026_419_200 - fp8 - bias) + 4 * bias
    assert counted["bf16"].main == 2 * 671_026_419_200 + 2 * bias


def test_a_study_variant_too():
    config = small(attention=SEPARATE, moe=V1_MOE)
    assert count_weights(config)["fp32"].main == 4 * sum(t.numel() for t in Transformer(config).parameters())
