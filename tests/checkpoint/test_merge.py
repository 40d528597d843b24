"""Merged checkpoints against sums that the test makes in float64, tensor by tensor under its published name."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import difference, randomised, small, tokens_for
from safetensors.torch import load_file
from torch import Tensor

import abyssal
from abyssal.checkpoint import load_model
from abyssal.checkpoint.adapter import write_adapter
from abyssal.checkpoint.convert import convert
from abyssal.checkpoint.merge import Patched, Rounding, adapter_patches
from abyssal.checkpoint.overlay import Overlay, write_overlay
from abyssal.checkpoint.shards import Shards
from abyssal.cli import main
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.errors import UserError
from abyssal.kernels import fp8
from abyssal.model import Transformer
from abyssal.model.adapting import add_lora, low_ranks
from abyssal.model.lora import LowRank

FP8 = torch.float8_e4m3fn
V3 = {
    "vocab_size": 264,
    "hidden_size": 160,
    "moe": {"moe_intermediate_size": 72},
    "mtp": {"num_nextn_predict_layers": 1},
}


def numbers(folder: Path) -> dict[str, Tensor]:
    """What the files say of every tensor, FP8 blocks by plain products, in float64."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    return {
        name: (
            fp8.dequantize_reference(tensor, stored[name + "_scale_inv"].float()) if tensor.dtype == FP8 else tensor
        ).double()
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }


def with_deltas(before: dict[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    """s · B A added in float64, from the parameters' names and the layout on disk."""
    out, parameters = dict(before), dict(model.named_parameters())
    for name, a in parameters.items():
        if not name.endswith("lora_A"):
            continue
        b = parameters[name.removesuffix("A") + "B"].detach().double()
        delta = 4.0 / a.shape[-2] * b @ a.detach().double()
        if delta.dim() == 2:
            out[name.removesuffix("lora_A") + "weight"] = before[name.removesuffix("lora_A") + "weight"] + delta
            continue
        prefix, which = name.rpartition(".")[0], name.rpartition(".")[2].removesuffix("_lora_A")
        for expert, change in enumerate(delta):
            halves = [("down", change)] if which == "down" else zip(("gate", "up"), change.chunk(2), strict=True)
            for half, part in halves:
                key = f"{prefix}.{expert}.{half}_proj.weight"
                out[key] = before[key] + part
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A base in FP32, BF16, FP8 blocks and int8, and an adapter for it."""
    root = tmp_path_factory.mktemp("merge")
    model = randomised(small(**V3), std=0.1, dtype=torch.float32)
    abyssal.export(model, root / "fp32", tokenizer=byte_tokenizer(), force=True, shard_size=300_000)
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", FP8), ("int8", "int8")):
        convert(root / "fp32", root / name, dtype)
    convert(root / "fp32", root / "ue8m0", FP8, power_of_two=True)
    add_lora(model, ["all", "model.layers.3.*"], 4, 4.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for change in low_ranks(model).values():
            change.b.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(change.b.numel()))
    (root / "adapter").mkdir()
    write_adapter(root / "adapter", model, base=root / "fp32")
    return root


@pytest.fixture(scope="module")
def model(folders) -> Transformer:
    """The adapted model itself."""
    from abyssal.checkpoint.adapter import copy_adapter, read_adapter

    out = load_model(folders / "fp32")
    add_lora(out, ["all", "model.layers.3.*"], 4, 4.0)
    copy_adapter(read_adapter(folders / "adapter"), out)
    return out


def over(folders: Path, base: str, to: Path) -> Path:
    """The same adapter for another file of the base."""
    to.mkdir()
    for file in (folders / "adapter").iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    data = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(data | {"base_model_name_or_path": str(folders / base)}))
    return to


class TestExact:
    def test_fp32(self, folders, model, tmp_path):
        """Each expert's matrix within 1e-6 of the float64 sum."""
        abyssal.export(folders / "adapter", tmp_path / "m", force=True)
        found, right = numbers(tmp_path / "m"), with_deltas(numbers(folders / "fp32"), model)
        assert found.keys() == right.keys()
        changed = 0
        for name, tensor in right.items():
            assert (found[name] - tensor).abs().max() <= 1e-6, name
            changed += not torch.equal(tensor, numbers(folders / "fp32")[name]) if "layers.1." in name else 0
        assert changed == 5 + 3 + 3 * 8
        tokens = tokens_for(model.config, 2, 9)
        with torch.no_grad():
            assert difference(load_model(tmp_path / "m")(tokens), model(tokens)) < 1e-5
        assert (tmp_path / "m" / "tokenizer.json").is_file()
        before, after = (
            json.loads((folder / "config.json").read_text()) for folder in (folders / "fp32", tmp_path / "m")
        )
        assert before == after

    def test_bf16_is_rounded_once(self, folders, model, tmp_path):
        over(folders, "bf16", tmp_path / "a")
        told: list[Rounding] = []
        abyssal.export(tmp_path / "a", tmp_path / "m", force=True, rounding=told.append)
        right = with_deltas(numbers(folders / "bf16"), model)
        for name, tensor in numbers(tmp_path / "m").items():
            if name.endswith("correction_bias"):
                continue  # FP32 in both
            once = right[name].float().bfloat16().double()
            assert (tensor != once).double().mean() < 0.01, name  # where FP32 and float64 round to neighbours
            assert torch.allclose(tensor, once, rtol=2**-7, atol=1e-9)
        self.check_rounding(told, numbers(folders / "bf16"), right, numbers(tmp_path / "m"))

    def test_another_dtype(self, folders, model, tmp_path):
        """From the exact sums, not from what the base's dtype would make of them."""
        over(folders, "bf16", tmp_path / "a")
        abyssal.export(tmp_path / "a", tmp_path / "m", dtype=torch.float32, force=True)
        right = with_deltas(numbers(folders / "bf16"), model)
        assert all((t - right[name]).abs().max() <= 1e-6 for name, t in numbers(tmp_path / "m").items())

    @staticmethod
    def check_rounding(told, before, right, found):
        """Added up again, from the files."""
        (rounding,) = told
        names = [name for name in right if not torch.equal(right[name], before[name])]
        assert rounding.tensors == len(names)
        exact = sum(float(right[n].square().sum()) for n in names)
        change = sum(float((right[n] - before[n]).square().sum()) for n in names)
        error = sum(float((found[n] - right[n]).square().sum()) for n in names)
        along = sum(float(((right[n] - before[n]) * (found[n] - before[n])).sum()) for n in names)
        assert math.isclose(rounding.of_weights, math.sqrt(error / exact), rel_tol=1e-3)
        assert math.isclose(rounding.of_change, math.sqrt(error / change), rel_tol=1e-3)
        assert math.isclose(rounding.survived, along / change, rel_tol=1e-3)
        text = rounding.describe()
        assert f"{len(names):,} tensors changed" in text
        assert f"{along / change:.1%} of the change" in text


class TestFP8:
    @pytest.mark.parametrize("base", ["fp8", "ue8m0"])
    def test_dequantised_added_requantised(self, folders, model, tmp_path, base):
        over(folders, base, tmp_path / "a")
        told: list[Rounding] = []
        abyssal.export(tmp_path / "a", tmp_path / "m", force=True, rounding=told.append)
        before, found = numbers(folders / base), numbers(tmp_path / "m")
        right = with_deltas(before, model)
        stored: dict[str, Tensor] = {}
        for file in (tmp_path / "m").glob("*.safetensors"):
            stored |= load_file(file)
        assert {n: t.dtype for n, t in stored.items()} == {
            n: t.dtype for file in (folders / base).glob("*.safetensors") for n, t in load_file(file).items()
        }
        for name, tensor in right.items():
            if torch.equal(tensor, before[name]):
                assert torch.equal(found[name], tensor), name
            elif stored[name].dtype == FP8:
                # Half a step of E4M3: 2^-4 of a number, or half of the smallest step of its block.
                rows, columns = tensor.shape
                scale = stored[name + "_scale_inv"].double()
                spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
                bound = torch.maximum(tensor.abs() * 2**-4, spread * 2**-10) * 1.01
                assert ((found[name] - tensor).abs() <= bound).all(), name
                if base == "ue8m0":
                    assert torch.equal(scale.log2(), scale.log2().round())
        TestExact.check_rounding(told, before, right, found)
        assert 0.01 < told[0].of_weights < 0.05
        assert abs(told[0].survived - 1) < 0.05
        key = "quantization_config"
        configs = [json.loads((folder / "config.json").read_text())[key] for folder in (folders / base, tmp_path / "m")]
        assert configs[0] == configs[1]

    def test_to_bf16(self, folders, model, tmp_path):
        over(folders, "fp8", tmp_path / "a")
        abyssal.export(tmp_path / "a", tmp_path / "m", dtype=torch.bfloat16, force=True)
        right = with_deltas(numbers(folders / "fp8"), model)
        for name, tensor in numbers(tmp_path / "m").items():
            assert torch.allclose(tensor, right[name].float().bfloat16().double(), rtol=2**-7, atol=1e-9), name

    def test_said_on_the_command_line(self, folders, tmp_path, monkeypatch, capsys):
        over(folders, "fp8", tmp_path / "a")
        monkeypatch.setattr("sys.argv", ["abyssal", "export", str(tmp_path / "a"), str(tmp_path / "m"), "--force"])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        out = capsys.readouterr().out
        assert "merged: " in out
        assert "of the change is in what was written" in " ".join(out.split())


class TestRefusals:
    def test_packed(self, folders, tmp_path):
        over(folders, "int8", tmp_path / "a")
        with pytest.raises(UserError, match=r"int8: its weights are int8; merge into the checkpoint"):
            abyssal.export(tmp_path / "a", tmp_path / "m", force=True)
        assert not (tmp_path / "m").exists()

    def test_an_adapted_model_in_memory(self, model, tmp_path):
        with pytest.raises(UserError, match="has an adapter beside it; merge_lora"):
            abyssal.export(model, tmp_path / "m", force=True)

    def test_what_the_base_has_not(self, folders):
        shards = Shards(folders / "fp32")
        shapes = {name: stored.shape for name, stored in shards.tensors.items()}
        change = LowRank(torch.ones(1, 160), torch.ones(160, 1), 1.0)
        with pytest.raises(UserError, match=r"self_attn.z_proj: the base has no such weight"):
            adapter_patches({"model.layers.0.self_attn.z_proj": change}, shapes)
        with pytest.raises(UserError, match=r"gone.weight: the base has no such tensor"):
            Patched(shards, {"gone.weight": lambda base: base})
        with pytest.raises(UserError, match=r"q_a_proj.weight: changed by one of"):
            adapter_patches({"model.layers.0.self_attn.q_a_proj": change}, shapes)


class TestOverlay:
    """Whole tensors in place of the base's."""

    @pytest.fixture
    def overlay(self, folders, tmp_path) -> tuple[Path, dict[str, Tensor]]:
        before = numbers(folders / "fp8")
        generator = torch.Generator().manual_seed(4)
        names = [f"model.layers.2.mlp.experts.{e}.{h}_proj.weight" for e in (1, 6) for h in ("gate", "up", "down")]
        names.append("model.layers.2.mlp.gate.e_score_correction_bias")
        tensors = {name: torch.randn(before[name].shape, generator=generator) for name in names}
        (tmp_path / "o").mkdir()
        write_overlay(Overlay(str(folders / "fp8"), "x", tensors), tmp_path / "o")
        return tmp_path / "o", tensors

    def test_loaded(self, folders, overlay):
        folder, tensors = overlay
        model, tokenizer = abyssal.load(folder, dtype=torch.float32)
        assert tokenizer is not None
        base = load_model(folders / "fp8", dtype=torch.float32)
        from abyssal.checkpoint.names import disk_tensors

        plain = dict(disk_tensors(base))
        for name, tensor in disk_tensors(model):
            assert torch.equal(tensor, tensors.get(name, plain[name])), name
        with pytest.raises(UserError, match="need weights='dense'"):
            abyssal.load(folder, weights="int8")

    def test_exported(self, folders, overlay, tmp_path):
        folder, tensors = overlay
        abyssal.export(folder, tmp_path / "m", dtype=torch.float32, force=True)
        before = numbers(folders / "fp8")
        for name, tensor in numbers(tmp_path / "m").items():
            assert torch.equal(tensor, tensors[name].double() if name in tensors else before[name]), name
        abyssal.export(folder, tmp_path / "stored", force=True)
        for name, tensor in numbers(tmp_path / "stored").items():
            right = tensors[name].double() if name in tensors else before[name]
            assert difference(tensor, right) < 0.05, name

    def test_shapes(self, folders, overlay):
        folder, tensors = overlay
        name = next(iter(tensors))
        for bad in ({name: torch.ones(2, 2)}, {"model.layers.2.gone": torch.ones(2)}):
            write_overlay(Overlay(str(folders / "fp8"), "x", bad), folder)
            with pytest.raises(UserError, match=next(iter(bad))):
                abyssal.load(folder)
            with pytest.raises(UserError, match=next(iter(bad))):
                abyssal.export(folder, folder.parent / "m", force=True)


@settings(max_examples=25)
@given(
    rank=st.integers(1, 6),
    experts=st.integers(1, 4),
    width=st.integers(1, 9),
    hidden=st.integers(1, 9),
    rslora=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_parts_of_a_stack(rank, experts, width, hidden, rslora, seed):
    """Gate and up of every expert are the halves of what the stack is changed by."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    change = LowRank(drawn(experts, rank, hidden), drawn(experts, 2 * width, rank), 3.0, rslora)
    names = [f"l.mlp.experts.{e}.{half}_proj.weight" for e in range(experts) for half in ("gate", "up", "down")]
    shapes = {name: (hidden, width) if "down" in name else (width, hidden) for name in names}
    patches = adapter_patches({"l.mlp.experts.gate_up_proj": change}, shapes)
    assert patches.keys() == {name for name in names if "down" not in name}
    scale = 3.0 / (math.sqrt(rank) if rslora else rank)
    whole = scale * torch.einsum("eor,eri->eoi", change.b.double(), change.a.double())
    for expert in range(experts):
        base = drawn(2 * width, hidden)
        parts = [
            patches[f"l.mlp.experts.{expert}.{half}_proj.weight"](part)
            for half, part in zip(("gate", "up"), base.chunk(2), strict=True)
        ]
        right = base.double() + whole[expert]
        assert (torch.cat(parts).double() - right).abs().max() <= 1e-5
