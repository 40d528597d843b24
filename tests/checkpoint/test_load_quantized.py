"""``weights="int8"`` and ``"int4"``: what is loaded against the file's own numbers, quantised by the test."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_models import randomised, small, tokens_for
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_recipe, tiny_trainer, write_corpus
from torch import Tensor

import abyssal
from abyssal.checkpoint import load_model, save_model
from abyssal.checkpoint.convert import convert
from abyssal.cli import main
from abyssal.errors import UserError
from abyssal.kernels import fp8
from abyssal.kernels.packed import Kind, quantize
from abyssal.model import Transformer
from abyssal.model.quantized import packed_matrices

KINDS: list[Kind] = ["int8", "int4"]
FP8 = torch.float8_e4m3fn
SMALL: dict[str, object] = {"vocab_size": 264, "hidden_size": 160, "mtp": {"num_nextn_predict_layers": 1}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in FP32, BF16 and FP8 blocks; one with a tied head."""
    root = tmp_path_factory.mktemp("quantized")
    for name, config in (("fp32", small(**SMALL)), ("tied", small(**SMALL, tie_word_embeddings=True))):
        (root / name).mkdir()
        save_model(randomised(config, std=0.1, dtype=torch.float32), root / name)
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", FP8)):
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
    packed = dict(packed_matrices(model))
    assert len(packed) > 30
    for name, place in packed.items():
        made = quantize(stored[name], place.kind)
        assert torch.equal(place.data, made.data), name
        assert torch.equal(place.scales, made.scales), name
    dense = {name: p for name, p in model.named_parameters() if not name.endswith(".bias")}
    assert any(name.endswith("kv_b_proj.weight") for name in dense)
    for name, parameter in dense.items():
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
        assert torch.equal(parameter, stored[name].to(dtype)), name


class TestLoading:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("which", ["fp32", "bf16", "fp8", "tied"])
    @pytest.mark.parametrize("threads", [1, 3])
    def test_what_the_file_holds(self, folders: dict[str, Path], kind: Kind, which: str, threads: int):
        heard: list[tuple[int, int]] = []
        model = load_model(folders[which], weights=kind, threads=threads, progress=lambda *x: heard.append(x))
        check(model, numbers(folders[which]), torch.float32 if which in ("fp32", "tied") else torch.bfloat16)
        assert not model.training
        assert heard[-1][0] == heard[-1][1] > 0
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (which == "tied")
        tokens = tokens_for(model.config, 2, 9)
        with torch.no_grad():
            assert model(tokens).isfinite().all()
            assert model.mtp_logits(tokens)[0].isfinite().all()

    def test_the_dtype_does_not_round_what_is_packed(self, folders: dict[str, Path]):
        model, _ = abyssal.load(folders["fp32"], torch.bfloat16, weights="int8")
        check(model, numbers(folders["fp32"]), torch.bfloat16)

    def test_some_layers(self, folders: dict[str, Path]):
        model = load_model(folders["bf16"], weights="int4", layers=2)
        stored = numbers(folders["bf16"])
        found = {name.split(".")[2] for name, _ in packed_matrices(model) if name != "lm_head.weight"}
        assert found == {"0", "1"}
        check(model, stored, torch.bfloat16)

    def test_what_is_missing_is_drawn(self, folders: dict[str, Path], tmp_path: Path):
        missing = ["lm_head.weight", "model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"]
        stored = load_file(folders["fp32"] / "model.safetensors")
        save_file({n: t for n, t in stored.items() if n not in missing}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((folders["fp32"] / "config.json").read_text())
        with pytest.warns(UserWarning, match="drawn anew"):
            ours = load_model(tmp_path, weights="int8", allow_missing=missing)
        with pytest.warns(UserWarning, match="drawn anew"):
            dense = load_model(tmp_path, allow_missing=missing)
        drawn = {name: place for name, place in packed_matrices(ours) if name in missing}
        assert len(drawn) == 2
        for name, place in drawn.items():
            made = quantize(_one_of(dense, name), place.kind)
            assert torch.equal(place.data, made.data), name

    @pytest.mark.parametrize("bad", ["int3", "q8_0", "", None, ["int8"]])
    def test_bad_names(self, folders: dict[str, Path], bad: object):
        with pytest.raises(UserError, match=r"weights: .* is not one of 'auto', 'dense', 'fp8', 'int8', 'int4', 'nf4'"):
            abyssal.load(folders["bf16"], weights=bad)


def _one_of(model: Transformer, name: str) -> Tensor:
    if ".experts." not in name:
        return model.state_dict()[name]
    return model.model.layers[1].mlp.experts.gate_up_proj[3].chunk(2)[1]


_MEASURE = """
import sys
from pathlib import Path
import torch
from abyssal.checkpoint.load import load_model, read_model_config
from abyssal.model import Transformer

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

with torch.device("meta"):
    Transformer(read_model_config(Path(sys.argv[1])))  # what this imports is not to count
before = memory("VmRSS")
model = load_model(Path(sys.argv[1]), weights="int8")
print(memory("VmHWM") - before, sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory(tmp_path: Path):
    """At its peak: what is packed, the pages of the file that are read at a time (64 MiB), and some for the rows
    being quantised and for what is imported meanwhile. With the dense model beside what is packed it would be more."""
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
    assert 0.5 * dense < packed < 0.6 * dense
    assert peak < packed + 2**26 + 3 * 2**25 < packed + dense


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, and a text of the same kind beside it."""
    root = tmp_path_factory.mktemp("trained")
    data = tiny_recipe(root)
    data["training"] |= {"steps": 120, "accumulate": 1, "batch_size": 4, "sequence_length": 32}
    data["validation"] = data["samples"] = {"every": 1000}
    data["checkpoint"] = {"every": 120}
    tiny_trainer(data, root / "run").train()
    write_corpus(root / "other.txt", documents=2, seed=9)
    return root / "run"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command line; gives exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["abyssal", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        return caught.value.code, out.out, out.err

    return call


class TestCommands:
    @pytest.mark.parametrize("context", [64, 16])
    def test_perplexity(self, cli, run: Path, context: int):
        """Within 1% of FP32's in int8, by the unpacked weights as well as by the compiled code (16 rows)."""

        def measured(*options: object) -> float:
            text = run.parent / "other.txt"
            given = ("--perplexity", text, "--context", context, "--batch-size", 1, "--device", "cpu", "--json")
            code, out, err = cli("eval", run, *given, *options)
            assert (code, err) == (0, "")
            return json.loads(out)["perplexity"]["perplexity"]

        dense, int8, int4 = (measured("--weights", weights) for weights in ("dense", "int8", "int4"))
        text = (run.parent / "other.txt").read_text()
        shares = torch.tensor([text.count(letter) / len(text) for letter in set(text)])
        assert dense < 0.7 * math.exp(
            -float((shares * shares.log()).sum())
        )  # more is learned than how often letters are
        assert int8 == pytest.approx(dense, rel=0.01)
        assert int8 != dense
        assert int4 == pytest.approx(dense, rel=0.15)
        assert int4 not in (int8, dense)
        assert measured("--quantize", "int8") == int8

    def test_generate(self, cli, run: Path):
        for kind in KINDS:
            code, out, err = cli("generate", run, "the quick", "--tokens", 5, "--quantize", kind, "--device", "cpu")
            assert (code, err) == (0, "")
            assert out.startswith("the quick")

    @pytest.mark.parametrize("option", ["--weights", "--quantize"])
    @pytest.mark.parametrize("command", ["generate", "chat", "eval"])
    def test_bad_names(self, cli, run: Path, command: str, option: str):
        text = ("--perplexity", run.parent / "other.txt") if command == "eval" else ()
        code, _, err = cli(command, run, *text, option, "int3")
        assert (code, err) == (2, "abyssal: error: --weights: 'int3' is not one of auto, dense, fp8, int8, int4, nf4\n")
