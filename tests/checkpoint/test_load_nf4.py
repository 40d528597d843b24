"""``weights="nf4"``: what is loaded against the file's own numbers, quantised by bitsandbytes a matrix at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_models import randomised, small, tokens_for
from safetensors.torch import load_file, save_file
from torch import Tensor

import abyssal
from abyssal.checkpoint import load_model, save_model
from abyssal.checkpoint.convert import convert
from abyssal.cli import main
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.errors import UserError
from abyssal.kernels import fp8
from abyssal.model import Transformer
from abyssal.model.quantized import nf4_matrices

bnb = pytest.importorskip("bitsandbytes.functional")
FP8 = torch.float8_e4m3fn
SMALL: dict[str, object] = {"vocab_size": 264, "hidden_size": 96, "mtp": {"num_nextn_predict_layers": 1}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in FP32, BF16, FP8 blocks and int8; one with a tied head."""
    root = tmp_path_factory.mktemp("nf4")
    for name, config in (("fp32", small(**SMALL)), ("tied", small(**SMALL, tie_word_embeddings=True))):
        (root / name).mkdir()
        save_model(randomised(config, std=0.1, dtype=torch.float32), root / name)
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", FP8), ("int8", "int8")):
        convert(root / "fp32", root / name, dtype)
    return {path.name: path for path in root.iterdir()}


def numbers(folder: Path) -> dict[str, Tensor]:
    """What the file says of every tensor; FP8 blocks in FP32."""
    stored = load_file(folder / "model.safetensors")
    scale = "_scale_inv"
    return {
        name: fp8.dequantize_reference(tensor, stored[name + scale]) if tensor.dtype == FP8 else tensor
        for name, tensor in stored.items()
        if not name.endswith(scale)
    }


def check(model: Transformer, stored: dict[str, Tensor], dtype: torch.dtype) -> None:
    packed = dict(nf4_matrices(model))
    assert len(packed) > 30
    for name, place in packed.items():
        data, state = bnb.quantize_4bit(stored[name], blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(place.data[: len(data)], data.view(-1)), name
        assert torch.equal(place.absmax, state.absmax), name
        assert torch.equal(place.nested, state.state2.absmax), name
        assert torch.equal(place.offset, state.offset), name
    dense = {name: p for name, p in model.named_parameters() if not name.endswith(".bias")}
    assert not any(name.endswith("kv_b_proj.weight") for name in dense)
    for name, parameter in dense.items():
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
        assert torch.equal(parameter, stored[name].to(dtype)), name


class TestLoading:
    @pytest.mark.parametrize(("which", "threads"), [("fp32", 1), ("bf16", 3), ("fp8", 1), ("tied", 3)])
    def test_what_the_file_holds(self, folders: dict[str, Path], which: str, threads: int):
        model = load_model(folders[which], weights="nf4", threads=threads)
        check(model, numbers(folders[which]), torch.float32 if which in ("fp32", "tied") else torch.bfloat16)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (which == "tied")
        tokens = tokens_for(model.config, 2, 9)
        with torch.no_grad():
            assert model(tokens).isfinite().all()
            assert model.mtp_logits(tokens)[0].isfinite().all()

    def test_the_dtype_does_not_round_what_is_packed(self, folders: dict[str, Path]):
        model, _ = abyssal.load(folders["fp32"], torch.bfloat16, weights="nf4")
        check(model, numbers(folders["fp32"]), torch.bfloat16)

    def test_some_layers(self, folders: dict[str, Path]):
        model = load_model(folders["bf16"], weights="nf4", layers=2)
        assert {name.split(".")[2] for name, _ in nf4_matrices(model)} == {"0", "1"}
        check(model, numbers(folders["bf16"]), torch.bfloat16)

    def test_what_is_missing_is_drawn(self, folders: dict[str, Path], tmp_path: Path):
        missing = ["model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.kv_b_proj.weight"]
        stored = load_file(folders["fp32"] / "model.safetensors")
        save_file({n: t for n, t in stored.items() if n not in missing}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((folders["fp32"] / "config.json").read_text())
        with pytest.warns(UserWarning, match="drawn anew"):
            ours = load_model(tmp_path, weights="nf4", allow_missing=missing)
        with pytest.warns(UserWarning, match="drawn anew"):
            dense = load_model(tmp_path, allow_missing=missing)
        drawn = dense.state_dict()
        stored[missing[0]] = drawn["model.layers.1.mlp.experts.gate_up_proj"][3].chunk(2)[1].clone()
        stored[missing[1]] = drawn[missing[1]]
        check(ours, stored, torch.float32)

    def test_auto_is_as_it_was(self, folders: dict[str, Path]):
        for which in ("bf16", "int8"):
            assert not dict(nf4_matrices(load_model(folders[which])))


class TestRefused:
    def test_a_packed_checkpoint(self, folders: dict[str, Path]):
        with pytest.raises(UserError, match="its weights are int8 and not made nf4 from that"):
            load_model(folders["int8"], weights="nf4")

    def test_saving(self, folders: dict[str, Path], tmp_path: Path):
        model = load_model(folders["bf16"], weights="nf4")
        with pytest.raises(UserError, match="nf4 are only held in memory"):
            save_model(model, tmp_path)
        with pytest.raises(UserError, match="nf4 are only held in memory"):
            abyssal.export(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_without_bitsandbytes(self, folders: dict[str, Path]):
        """One line, before anything is read."""
        code = "import sys; sys.modules['bitsandbytes.functional'] = None; from abyssal.cli import main; main()"
        byte_tokenizer().save(folders["tied"])
        command = [sys.executable, "-c", code, "generate", folders["tied"], "a", "--weights", "nf4"]
        out = subprocess.run(command, capture_output=True, text=True)
        assert out.returncode == 2
        assert out.stderr.startswith("abyssal: error: weights='nf4' needs bitsandbytes: pip install 'abyssal[tune]'")
        assert out.stderr.count("\n") == 1


def test_generate(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    byte_tokenizer().save(folders["bf16"])
    options = ("--tokens", "5", "--weights", "nf4", "--device", "cpu")
    monkeypatch.setattr("sys.argv", ["abyssal", "generate", str(folders["bf16"]), "the quick", *options])
    with pytest.raises(SystemExit) as caught:
        main()
    out = capsys.readouterr()
    assert (caught.value.code, out.err) == (0, "")
    assert out.out.startswith("the quick")


_MEASURE = """
import sys
from pathlib import Path
import torch
from abyssal.checkpoint.load import load_model, read_model_config
from abyssal.kernels import nf4
from abyssal.model import Transformer

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

with torch.device("meta"):
    Transformer(read_model_config(Path(sys.argv[1])))  # what this imports is not to count
nf4.dequantize(nf4.quantize(torch.ones(64, 64)))
before = memory("VmRSS")
model = load_model(Path(sys.argv[1]), weights="nf4")
print(memory("VmHWM") - before, sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory(tmp_path: Path):
    """At its peak: what is packed, the pages of the file that are read at a time (64 MiB), and some for the numbers
    being quantised. With the dense model beside what is packed it would be more. Nothing is printed."""
    config = small(
        vocab_size=2048,
        hidden_size=1024,
        num_hidden_layers=2,
        moe={"n_routed_experts": 32, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 1024},
    )
    save_model(Transformer(config).bfloat16(), tmp_path)
    out = subprocess.run([sys.executable, "-c", _MEASURE, tmp_path], capture_output=True, text=True, check=True)
    peak, packed = map(int, out.stdout.split())
    dense = (tmp_path / "model.safetensors").stat().st_size
    assert out.stderr == ""
    assert 0.25 * dense < packed < 0.35 * dense
    assert peak < packed + 2**26 + 3 * 2**25 < packed + dense
