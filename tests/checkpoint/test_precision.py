"""The published rule on the whole of V3, by names written out here; patterns over it; and tensors recast by a plan."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.checkpoint.export import InMemory
from abyssal.checkpoint.names import layer_of
from abyssal.checkpoint.precision import FP8, PRECISIONS, Plan, parse_plan, precision
from abyssal.checkpoint.recast import Recast
from abyssal.checkpoint.shards import Stored
from abyssal.checkpoint.writer import Entry
from abyssal.config import preset
from abyssal.errors import UserError
from abyssal.kernels import fp8
from abyssal.model import Transformer

BF16, FP32 = torch.bfloat16, torch.float32

# V3's tensors as its checkpoint lists them, layers as L, experts as E; beside each its dtype there.
ATTENTION = {
    "model.layers.L.self_attn.q_a_proj.weight": FP8,
    "model.layers.L.self_attn.q_a_layernorm.weight": BF16,
    "model.layers.L.self_attn.q_b_proj.weight": FP8,
    "model.layers.L.self_attn.kv_a_proj_with_mqa.weight": FP8,
    "model.layers.L.self_attn.kv_a_layernorm.weight": BF16,
    "model.layers.L.self_attn.kv_b_proj.weight": FP8,
    "model.layers.L.self_attn.o_proj.weight": FP8,
    "model.layers.L.input_layernorm.weight": BF16,
    "model.layers.L.post_attention_layernorm.weight": BF16,
}
EXPERTS = {
    "model.layers.L.mlp.gate.weight": BF16,
    "model.layers.L.mlp.gate.e_score_correction_bias": FP32,
    **{f"model.layers.L.mlp.experts.E.{part}_proj.weight": FP8 for part in ("gate", "up", "down")},
    **{f"model.layers.L.mlp.shared_experts.{part}_proj.weight": FP8 for part in ("gate", "up", "down")},
}
MAIN = {
    "model.embed_tokens.weight": BF16,
    "model.norm.weight": BF16,
    "lm_head.weight": BF16,
    **ATTENTION,
    **{f"model.layers.L.mlp.{part}_proj.weight": FP8 for part in ("gate", "up", "down")},
    **EXPERTS,
}
MTP = {
    **ATTENTION,
    **EXPERTS,
    "model.layers.L.enorm.weight": BF16,
    "model.layers.L.hnorm.weight": BF16,
    "model.layers.L.eh_proj.weight": BF16,
    "model.layers.L.shared_head.norm.weight": BF16,
}


def numel(entry: Entry) -> int:
    return torch.Size(entry.shape).numel()


class TestPublishedRule:
    @pytest.fixture(scope="class")
    @staticmethod
    def entries() -> list[Entry]:
        """Everything that V3 with its MTP module becomes in FP8; no weight is made."""
        with torch.device("meta"):
            source = InMemory(Transformer(preset("deepseek-v3")))
        recast = Recast(source, source.wanted, Plan(FP8))
        return [entry for name in recast.names("") for entry in recast.group(name)]

    @pytest.mark.parametrize(("mtp", "expected"), [(False, MAIN), (True, MTP)])
    def test_every_tensor(self, entries: list[Entry], mtp: bool, expected: dict[str, torch.dtype]):
        found: dict[str, set[torch.dtype]] = {}
        for entry in entries:
            if (layer_of(entry.name) == 61) == mtp:
                template = re.sub(r"experts\.\d+\.", "experts.E.", re.sub(r"layers\.\d+\.", "layers.L.", entry.name))
                found.setdefault(template, set()).add(entry.dtype)
        scales = {f"{name}_scale_inv": FP32 for name, dtype in expected.items() if dtype == FP8}
        assert found == {name: {dtype} for name, dtype in (expected | scales).items()}

    def test_counts(self, entries: list[Entry]):
        count: Counter[str] = Counter()
        for entry in entries:
            if layer_of(entry.name) != 61:
                kind = "scales" if entry.name.endswith("_scale_inv") else str(entry.dtype)
                count[kind] += numel(entry)
        total = 671_026_419_200
        assert count == {
            "torch.float8_e4m3fn": 669_065_609_216,
            "scales": 40_838_232,
            "torch.bfloat16": total - 669_065_609_216 - 14_848,
            "torch.float32": 14_848,  # 58 layers of 256 biases
        }
        assert round(100 * count["torch.float8_e4m3fn"] / total, 2) == 99.71

    def test_scales_stand_behind_their_weights(self, entries: list[Entry]):
        """In the order they are written, with a shape of ⌈O/128⌉ × ⌈I/128⌉."""
        for weight, scale in pairwise(entries):
            if weight.dtype == FP8:
                assert scale.name == weight.name + "_scale_inv"
                assert scale.shape == tuple((side + 127) // 128 for side in weight.shape)
        kv_a = next(e for e in entries if e.name.endswith("layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"))
        assert kv_a.shape == (5, 56)  # 576 rows: four blocks and a half


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.q_proj.weight", FP8),  # V2-Lite, MoE-16B
        ("model.layers.0.self_attn.k_proj.weight", FP8),
        ("model.layers.0.self_attn.v_proj.weight", FP8),
        ("model.layers.0.self_attn.q_a_proj.bias", BF16),
        ("model.layers.61.embed_tokens.weight", BF16),
        ("model.layers.61.shared_head.head.weight", BF16),
        ("model.layers.61.eh_proj.weight", BF16),
        ("model.layers.3.mlp.gate.weight", BF16),
        ("model.layers.3.mlp.gate_proj.weight", FP8),
        ("q_proj.weight", BF16),  # no layer's
    ],
)
def test_names_that_v3_has_not(name: str, dtype: torch.dtype):
    assert Plan(FP8).dtype(name, torch.float16) == dtype


BIAS = "model.layers.3.mlp.gate.e_score_correction_bias"


class TestPlan:
    def test_base(self):
        for base in (BF16, FP32, torch.float16):
            assert Plan(base).dtype("lm_head.weight", FP8) == base
            assert Plan(base).dtype(BIAS, BF16) == FP32
        assert Plan(None).dtype("lm_head.weight", torch.float16) == torch.float16
        assert Plan(None).dtype("model.layers.0.self_attn.o_proj.weight", FP8) == FP8
        assert Plan(None).dtype(BIAS, BF16) == BF16

    def test_the_first_that_fits_counts(self):
        name = "model.layers.5.self_attn.kv_b_proj.weight"
        first, second = ("*.kv_b_proj.*", BF16), ("*.self_attn.*", FP32)
        assert Plan(FP8, (first, second)).dtype(name, FP32) == BF16
        assert Plan(FP8, (second, first)).dtype(name, BF16) == FP32
        assert Plan(FP8, (second,)).dtype("model.layers.5.mlp.up_proj.weight", FP32) == FP8

    def test_patterns_are_globs_over_whole_names(self):
        name = "model.layers.5.self_attn.kv_b_proj.weight"
        for pattern, fits in (
            (name, True),
            ("model.layers.[0-5].*", True),
            ("model.layers.?.self_attn.*", True),
            ("model.layers.[6-9].*", False),
            ("kv_b_proj", False),
            ("self_attn.*", False),
            ("*.SELF_ATTN.*", False),
            ("model.layers.5.self_attn.kv_b_proj.weigh.", False),  # no regular expression
        ):
            assert (Plan(FP32, ((pattern, BF16),)).dtype(name, FP32) == BF16) == fits, pattern

    def test_a_pattern_goes_before_the_rule_for_biases(self):
        assert Plan(FP8, (("*.e_score_correction_bias", BF16),)).dtype(BIAS, FP32) == BF16


class TestParse:
    def test_plans(self):
        assert parse_plan([], BF16) == Plan(BF16)
        assert parse_plan([], None) == Plan(None)
        assert parse_plan(["fp8"], BF16) == Plan(FP8)
        assert parse_plan(["*.self_attn.*=bf16", "fp8", "*.mlp.*=fp32"], None) == Plan(
            FP8, (("*.self_attn.*", BF16), ("*.mlp.*", FP32))
        )
        assert parse_plan(["a=b=fp16"], None) == Plan(None, (("a=b", torch.float16),))

    @pytest.mark.parametrize("name", PRECISIONS)
    def test_names(self, name: str):
        assert precision(name, "--dtype") == PRECISIONS[name]
        assert parse_plan([f"x={name}"], None).dtype("x", torch.float64) == PRECISIONS[name]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("bf61", "--plan: 'bf61' is not one of bf16, fp32, fp16, fp8 (did you mean 'bf16'?)"),
            ("*.mlp.*=fp9", "--plan '*.mlp.*=fp9': 'fp9' is not one of bf16, fp32, fp16, fp8 (did you mean 'fp8'?)"),
            ("*.mlp.*", "--plan: '*.mlp.*' is not one of bf16, fp32, fp16, fp8"),
            ("*.mlp.*=", "--plan '*.mlp.*=': '' is not one of bf16, fp32, fp16, fp8"),
            ("=bf16", "--plan: '=bf16'; expected PATTERN=DTYPE, such as '*.self_attn.*=bf16', or a dtype alone"),
            ("", "--plan: '' is not one of bf16, fp32, fp16, fp8"),
            ("FP8", "--plan: 'FP8' is not one of bf16, fp32, fp16, fp8"),
        ],
    )
    def test_errors(self, text: str, message: str):
        with pytest.raises(UserError) as error:
            parse_plan([text], None)
        assert str(error.value) == message

    def test_another_field(self):
        with pytest.raises(UserError, match=r"^--to: 'int4' is not one of"):
            parse_plan(["int4"], None, "--to")


class Tensors(dict[str, Tensor]):
    """A checkpoint of one file, in memory."""

    files = ("file",)

    def names(self, file: str) -> list[str]:
        return list(self)

    def __getitem__(self, name: str) -> Any:
        return Stored("file", self.get_tensor(name).dtype, tuple(self.get_tensor(name).shape))

    def get_tensor(self, name: str) -> Tensor:
        return super().__getitem__(name)

    read = get_tensor

    def batches(self, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
        for name in names:
            yield "", [name]

    @contextmanager
    def open(self, file: str) -> Iterator[Any]:
        yield self


WEIGHT = "model.layers.0.self_attn.o_proj.weight"


def recast(tensors: dict[str, Tensor], plan: Plan, **options: Any) -> dict[str, Tensor]:
    """What becomes of ``tensors``; entries said what they would be."""
    wanted = [name for name in tensors if name.removesuffix("_scale_inv") == name]
    work = Recast(Tensors(tensors), wanted, plan, **options)
    entries = [entry for name in work.names("file") for entry in work.group(name)]
    out = dict(work.tensors(entries))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in out.items()} == {
        entry.name: (entry.dtype, entry.shape) for entry in entries
    }
    assert list(out) == [entry.name for entry in entries]
    return out


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class TestRecast:
    def test_to_blocks_and_back(self):
        weight = drawn(200, 130)
        small = recast({WEIGHT: weight, "lm_head.weight": weight}, Plan(FP8))
        stored, scale = fp8.quantize(weight)
        assert torch.equal(small[WEIGHT].view(torch.uint8), stored.view(torch.uint8))
        assert torch.equal(small[WEIGHT + "_scale_inv"], scale)
        assert torch.equal(small["lm_head.weight"], weight.bfloat16())
        back = recast(small, Plan(FP32))
        assert back.keys() == {WEIGHT, "lm_head.weight"}
        assert torch.equal(back[WEIGHT], fp8.dequantize(stored, scale, FP32))
        assert torch.equal(back["lm_head.weight"], weight.bfloat16().float())

    @pytest.mark.parametrize("scale_dtype", [FP32, torch.float8_e8m0fnu])
    def test_blocks_stay_as_they_are(self, scale_dtype: torch.dtype):
        stored, scale = fp8.quantize(drawn(200, 130), power_of_two=True)
        tensors = {WEIGHT: stored, WEIGHT + "_scale_inv": scale.to(scale_dtype)}
        for plan in (Plan(FP8), Plan(None), Plan(BF16, ((WEIGHT, FP8),))):
            out = recast(tensors, plan)
            for name, tensor in tensors.items():
                assert out[name].dtype == tensor.dtype
                assert torch.equal(out[name].view(torch.uint8), tensor.view(torch.uint8))

    def test_powers_of_two(self):
        out = recast({WEIGHT: drawn(200, 130)}, Plan(FP8), power_of_two=True)
        mantissa, _ = torch.frexp(out[WEIGHT + "_scale_inv"])
        assert (mantissa == 0.5).all()

    def test_blocks_get_powers_of_two(self):
        """Blocks that are not kept are quantised anew; where scales were powers of two, no number changes."""
        stored, scale = fp8.quantize(drawn(200, 130))
        out = recast({WEIGHT: stored, WEIGHT + "_scale_inv": scale}, Plan(FP8), power_of_two=True)
        mantissa, _ = torch.frexp(out[WEIGHT + "_scale_inv"])
        assert (mantissa == 0.5).all()
        before, after = fp8.dequantize(stored, scale, FP32), fp8.dequantize(*out.values(), FP32)
        assert 0 < float((after - before).abs().max() / before.abs().max()) < 2.0**-4
        stored, scale = fp8.quantize(drawn(200, 130), power_of_two=True)
        tensors = {WEIGHT: stored, WEIGHT + "_scale_inv": scale.to(torch.float8_e8m0fnu)}
        out = recast(tensors, Plan(FP8), power_of_two=True)
        assert torch.equal(fp8.dequantize(*out.values(), FP32), fp8.dequantize(stored, scale, FP32))

    @pytest.mark.parametrize("power_of_two", [False, True])
    @pytest.mark.parametrize(
        ("bad", "dtype"),
        [
            (float("nan"), FP32),
            (float("nan"), torch.float16),
            (float("inf"), BF16),
            (-float("inf"), FP32),
            (1e300, torch.float64),  # finite there, but not as FP32
        ],
    )
    def test_not_finite(self, bad: float, dtype: torch.dtype, power_of_two: bool):
        weight = drawn(200, 130).to(dtype)
        weight[150, 129] = bad
        with pytest.raises(UserError, match=f"^{re.escape(WEIGHT)}: holds NaN or infinite numbers"):
            recast({WEIGHT: weight}, Plan(FP8), power_of_two=power_of_two)
        assert recast({"lm_head.weight": weight}, Plan(FP8))  # no blocks, no harm

    @pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
    def test_no_matrix(self, shape: tuple[int, ...]):
        with pytest.raises(UserError, match=re.escape(f"x: shape {list(shape)}; FP8 blocks need a matrix")):
            recast({"x": drawn(*shape)}, Plan(BF16, (("x", FP8),)))
