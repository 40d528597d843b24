"""Checkpoints with packed weights: bit for bit what loading with ``weights=`` makes, in little memory, and never
misread."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from plain_models import randomised, small
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_recipe, tiny_trainer, write_corpus
from torch import Tensor

import abyssal
from abyssal.checkpoint import load_model, save_model
from abyssal.checkpoint.convert import JOURNAL, convert
from abyssal.cli import main
from abyssal.errors import UserError
from abyssal.kernels.packed import Kind, dequantize, quantize
from abyssal.model import Transformer
from abyssal.model.quantized import packed_matrices

KINDS: list[Kind] = ["int8", "int4"]
FP8 = torch.float8_e4m3fn
SMALL: dict[str, object] = {"vocab_size": 264, "hidden_size": 160, "mtp": {"num_nextn_predict_layers": 1}}
UP = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in several files and dtypes; exported ones repeat embedding and head under the MTP module."""
    root = tmp_path_factory.mktemp("sources")
    plain = randomised(small(**SMALL), std=0.1, dtype=torch.float32)
    tied = randomised(small(**SMALL, tie_word_embeddings=True), std=0.1, dtype=torch.bfloat16)
    abyssal.export(plain, root / "fp32", shard_size=200_000)
    abyssal.export(tied, root / "tied", shard_size=100_000, force=True)
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", FP8)):
        convert(root / "fp32", root / name, dtype)
    (root / "own").mkdir()  # what no published code computes: config.json in abyssal's own form
    save_model(randomised(small(**SMALL, moe={"segments": 2}), std=0.1, dtype=torch.float32), root / "own")
    return root


@pytest.fixture(scope="module")
def packed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BF16 one, packed."""
    root = tmp_path_factory.mktemp("packed")
    for kind in KINDS:
        abyssal.convert(sources / "bf16", root / kind, kind)
    return root


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a: Transformer, b: Transformer) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("kind", KINDS)
class TestConverting:
    @pytest.mark.parametrize("which", ["fp32", "bf16", "fp8", "tied", "own"])
    def test_read_back(self, sources: Path, tmp_path: Path, kind: Kind, which: str):
        abyssal.convert(sources / which, tmp_path / "out", kind)
        made, _ = abyssal.load(sources / which, weights=kind)
        for weights in ("auto", kind):
            assert same(load_model(tmp_path / "out", weights=weights), made)
        assert same(load_model(tmp_path / "out", threads=3), made)
        abyssal.convert(tmp_path / "out", tmp_path / "again", kind)
        assert same(load_model(tmp_path / "again"), made)
        assert "embed_tokens" not in "".join(name for name in tensors_in(tmp_path / "out") if ".layers." in name)

    def test_files(self, sources: Path, packed: Path, kind: Kind):
        """The numbers in the files, taken apart here."""
        stored, original = tensors_in(packed / kind), tensors_in(sources / "bf16")
        matrices = {name.removesuffix("_scales") for name in stored if name.endswith("_scales")}
        assert len(matrices) > 30
        for name in matrices:
            data, scales, weight = stored[name], stored[name + "_scales"], original[name].float()
            own = "int8" if name == "lm_head.weight" else kind
            assert (data.dtype, scales.dtype, data.shape[0], data.shape[2]) == (
                *(torch.uint8, torch.bfloat16),
                *(weight.shape[0], 64),
            )
            if own == "int4":
                data = torch.cat((data & 15, data >> 4), dim=-1)
            numbers = data.float() - (128 if own == "int8" else 8)
            by_group = scales.float().unflatten(-1, (data.shape[1], -1)).unsqueeze(-1)
            back = (numbers.unflatten(-1, (-1, 32)) * by_group).flatten(1)
            assert torch.equal(back[:, : weight.shape[1]], dequantize(quantize(weight, own), torch.float32))
        for name in stored.keys() - matrices - {name + "_scales" for name in matrices}:
            assert torch.equal(stored[name], original[name])
        index = json.loads((packed / kind / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == stored.keys()
        assert len(set(index["weight_map"].values())) > 3
        config = json.loads((packed / kind / "config.json").read_text())
        assert config["torch_dtype"] == "bfloat16"
        settings = config["quantization_config"]
        assert (settings["quant_method"], settings["kind"], settings["group_size"]) == ("abyssal", kind, 32)

    def test_some_layers(self, sources: Path, packed: Path, kind: Kind):
        assert same(load_model(packed / kind, layers=[1]), load_model(sources / "bf16", layers=[1], weights=kind))

    def test_interrupted(self, sources: Path, packed: Path, tmp_path: Path, kind: Kind):
        class Interrupted(Exception):
            pass

        def stop(done: int, total: int) -> None:
            if done > total / 2:
                raise Interrupted

        with pytest.raises(Interrupted):
            convert(sources / "bf16", tmp_path / "out", kind, progress=stop)
        assert json.loads((tmp_path / "out.partial" / JOURNAL).read_text())["done"]
        convert(sources / "bf16", tmp_path / "out", kind)
        assert {n: t.tolist() for n, t in tensors_in(tmp_path / "out").items()} == {
            n: t.tolist() for n, t in tensors_in(packed / kind).items()
        }

    def test_dense_again(self, packed: Path, tmp_path: Path, kind: Kind):
        """Loaded and converted, dequantised weights are the same."""
        held = dict(packed_matrices(load_model(packed / kind)))
        with pytest.warns(UserWarning, match=f"its weights are {kind}; dequantised"):
            dense = load_model(packed / kind, weights="dense")
        assert dense.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(dense.lm_head.weight, dequantize(held["lm_head.weight"]))
        up = dense.model.layers[1].mlp.experts.gate_up_proj[3].chunk(2)[1]
        assert torch.equal(up, dequantize(held[UP]))
        convert(packed / kind, tmp_path / "bf16", torch.bfloat16)
        assert same(load_model(tmp_path / "bf16"), dense)
        assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
        with pytest.warns(UserWarning, match="dequantised"):
            exact = load_model(packed / kind, dtype=torch.float32, weights="dense")
        assert torch.equal(exact.lm_head.weight, dequantize(held["lm_head.weight"], torch.float32))
        convert(packed / kind, tmp_path / "fp8", FP8)
        assert tensors_in(tmp_path / "fp8")[UP].dtype == FP8
        made = dequantize(held[UP], torch.float32)
        blocks = load_model(tmp_path / "fp8", dtype=torch.float32)
        assert (
            blocks.model.layers[1].mlp.experts.gate_up_proj[3].chunk(2)[1] - made
        ).abs().max() < made.abs().max() / 16

    def test_from_memory(self, packed: Path, tmp_path: Path, kind: Kind):
        model = load_model(packed / kind)
        abyssal.export(model, tmp_path / "exported", shard_size=100_000)
        (tmp_path / "saved").mkdir()
        save_model(model, tmp_path / "saved")
        abyssal.export(packed / kind, tmp_path / "copied")
        for name in ("exported", "saved", "copied"):
            assert same(load_model(tmp_path / name), model), name
            assert len(tensors_in(tmp_path / name)) == len(tensors_in(packed / kind))
        assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 3
        abyssal.export(model, tmp_path / "dense", dtype=torch.bfloat16)
        with pytest.warns(UserWarning, match="dequantised"):
            assert same(load_model(tmp_path / "dense"), load_model(packed / kind, weights="dense"))

    def test_own_form_from_memory(self, sources: Path, tmp_path: Path, kind: Kind):
        model = load_model(sources / "own", weights=kind)
        save_model(model, tmp_path)
        assert same(load_model(tmp_path), model)
        with pytest.warns(UserWarning, match="dequantised"):
            dense = load_model(tmp_path, weights="dense")
        (tmp_path / "dense").mkdir()
        save_model(dense, tmp_path / "dense")
        assert same(load_model(tmp_path / "dense"), dense)


class TestRefused:
    @pytest.mark.parametrize(("stored", "wanted"), [("int8", "int4"), ("int4", "int8"), ("int4", "fp8")])
    def test_another_kind(self, packed: Path, tmp_path: Path, stored: Kind, wanted: str):
        with pytest.raises(UserError, match=f"its weights are {stored} and not made {wanted} from that") as caught:
            load_model(packed / stored, weights=wanted)
        assert "\n" not in str(caught.value)
        if wanted != "fp8":
            with pytest.raises(UserError, match=f"its weights are {stored}; convert what that was made from"):
                convert(packed / stored, tmp_path / "out", wanted)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda s: s.update(kind="int3"), r"quantization_config.kind: 'int3' is not one of int8, int4"),
            (lambda s: s.update(kind=["int8"]), r"quantization_config.kind: \['int8'\] is not one of"),
            (lambda s: s.pop("kind"), r"quantization_config.kind: None is not one of"),
            (lambda s: s.update(group_size=64), r"quantization_config.group_size: 64 is not supported, only 32"),
            (lambda s: s.update(lm_head="int4"), r"quantization_config.lm_head: 'int4' is not supported, only 'int8'"),
            (lambda s: s.update(kind="int8"), r"tensors wrong: .*: shape \[\d+, 2, 64\], int8 of \[\d+, 160\] has"),
            (lambda s: s.clear(), r"tensors wrong: .*: U8, and no quantization_config says that it is packed"),
            (lambda s: s.update(quant_method="gptq"), r"U8, and no quantization_config says"),
        ],
    )
    def test_settings(self, packed: Path, tmp_path: Path, change: Callable[[dict[str, object]], None], said: str):
        shutil.copytree(packed / "int4", tmp_path / "m")
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        change(config["quantization_config"])
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        refused(tmp_path / "m", said)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                lambda t: t.pop(UP + "_scales"),
                rf"tensors wrong: {UP}: int4 without its scales \({UP}_scales is missing",
            ),
            (lambda t: t.pop(UP), f"tensors missing: {UP}"),
            (lambda t: t.update({UP: t[UP][:-1]}), rf"{UP}: shape \[\d+, 2, 64\], int4 of \[\d+, 160\] has"),
            (lambda t: t.update({UP: t[UP].flatten(1)}), rf"{UP}: shape \[\d+, 128\]"),
            (lambda t: t.update({UP: torch.zeros(3, 4)}), f"{UP}: torch.float32, but quantization_config says .* int4"),
            (lambda t: t.update({UP + "_scales": t[UP + "_scales"][:, 1:]}), rf"{UP}_scales: shape \[\d+, 7\]"),
            (lambda t: t.update({UP + "_scales": t[UP + "_scales"].float()}), f"{UP}_scales: torch.float32; expected"),
            (lambda t: t[UP + "_scales"].fill_(torch.nan), f"{UP}_scales: holds NaN"),
            (
                lambda t: t.update({"model.norm.weight": t[UP].clone()}),
                "model.norm.weight: U8, and no quantization_config",
            ),
            (lambda t: t.update({"model.norm.weight_scales": torch.ones(2)}), "unexpected: model.norm.weight_scales"),
        ],
    )
    def test_tensors(self, packed: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], said: str):
        tensors = tensors_in(packed / "int4")
        change(tensors)
        (tmp_path / "m").mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(packed / "int4" / "config.json", tmp_path / "m")
        refused(tmp_path / "m", said)

    def test_truncated(self, packed: Path, tmp_path: Path):
        shutil.copytree(packed / "int8", tmp_path / "m")
        last = sorted((tmp_path / "m").glob("*.safetensors"))[-1]
        last.write_bytes(last.read_bytes()[:-1])
        refused(tmp_path / "m", f"{last.name}: not a readable safetensors file")

    def test_numbers_that_are_not_finite(self, sources: Path, tmp_path: Path):
        shutil.copytree(sources / "own", tmp_path / "m")
        tensors = load_file(tmp_path / "m" / "model.safetensors")
        tensors[UP][2, 3] = torch.inf
        save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"{UP}: holds NaN or infinite numbers, which int4 cannot"):
            convert(tmp_path / "m", tmp_path / "out", "int4")

    def test_a_copy_that_differs(self, sources: Path, tmp_path: Path):
        """Under the MTP module: it would be lost."""
        shutil.copytree(sources / "bf16", tmp_path / "m")
        files = {name: file for file in (tmp_path / "m").glob("*.safetensors") for name in load_file(file)}
        name, file = next((name, file) for name, file in files.items() if name.endswith(".shared_head.head.weight"))
        save_file(load_file(file) | {name: torch.zeros(264, 160).bfloat16()}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"{name} differs from lm_head.weight"):
            convert(tmp_path / "m", tmp_path / "out", "int8")
        convert(tmp_path / "m", tmp_path / "out", "int8", allow_missing=[name])

    @pytest.mark.parametrize("kind", KINDS)
    def test_by_transformers(self, packed: Path, kind: Kind):
        """It says that it skips the unknown quantization, and would go on: the shapes stop it."""
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            transformers.AutoModelForCausalLM.from_pretrained(packed / kind)


def refused(folder: Path, said: str) -> None:
    """By everything that reads it, in one line, and nothing is left behind."""
    for read in (
        lambda: load_model(folder),
        lambda: abyssal.export(folder, folder.parent / "out"),
        lambda: convert(folder, folder.parent / "out", torch.bfloat16),
    ):
        with pytest.raises(UserError, match=said) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert not [path for path in folder.parent.iterdir() if path.name == "out"]
        shutil.rmtree(folder.parent / "out.partial", ignore_errors=True)


_MEASURE = """
import sys
from pathlib import Path
import torch
from abyssal.checkpoint.convert import convert
from abyssal.checkpoint.load import load_model
from abyssal.kernels import native

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

what, tiny, large, out = sys.argv[1], *map(Path, sys.argv[2:])

def work(source, target):
    return load_model(source) if what == "load" else convert(source, target, what)

work(tiny, out.with_name("tiny-out"))  # what this imports and compiles is not to count
before = memory("VmRSS")
kept = work(large, out)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory(sources: Path, packed: Path, tmp_path: Path):
    """Converting: a shard of the source and a tensor at most. Loading: what is packed and the pages read at a time."""
    config = small(
        vocab_size=2048,
        hidden_size=1024,
        num_hidden_layers=2,
        moe={"n_routed_experts": 48, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 1024},
    )
    shard = 20_000_000
    abyssal.export(Transformer(config).bfloat16(), tmp_path / "large", shard_size=shard)
    whole = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))

    def peak(*arguments: object) -> int:
        command = [sys.executable, "-c", _MEASURE, *map(str, arguments)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    made = peak("int4", sources / "bf16", tmp_path / "large", tmp_path / "out")
    assert made < shard + 2**24 < whole / 4
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert stored < 0.3 * whole
    assert peak("load", packed / "int4", tmp_path / "out", tmp_path) < stored + 2**26 + 2**24 < whole


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    data = tiny_recipe(root)
    data["validation"] = data["samples"] = {"every": 1000}
    tiny_trainer(data, root / "run").train()
    write_corpus(root / "other.txt", documents=2, seed=9)
    return root / "run"


class TestCommands:
    @pytest.fixture
    def cli(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        def call(*arguments: object) -> tuple[int, str, str]:
            monkeypatch.setattr("sys.argv", ["abyssal", *map(str, arguments)])
            capsys.readouterr()
            with pytest.raises(SystemExit) as caught:
                main()
            out = capsys.readouterr()
            return caught.value.code, out.out, out.err

        return call

    @pytest.mark.parametrize("kind", KINDS)
    def test_perplexity_and_more(self, cli, run: Path, tmp_path: Path, kind: Kind):
        out = tmp_path / "out"
        code, said, err = cli("convert", run, out, "--to", kind)
        assert (code, err) == (0, "")
        assert "read back and equal" in said

        def measured(*arguments: object) -> tuple[float, str]:
            text = run.parent / "other.txt"
            given = ("--perplexity", text, "--context", 16, "--batch-size", 1, "--device", "cpu", "--json")
            code, said, err = cli("eval", *arguments, *given)
            assert code == 0
            return json.loads(said)["perplexity"]["perplexity"], err

        assert measured(out) == measured(out, "--weights", kind) == measured(run, "--weights", kind)
        assert measured(out)[1] == ""
        assert f"warning: {out}: its weights are {kind}; dequantised" in measured(out, "--weights", "dense")[1]
        code, said, err = cli("generate", out, "the quick", "--tokens", 5, "--device", "cpu")
        assert (code, err) == (0, "")
        assert said.startswith("the quick")
        code, said, _ = cli("export", out, tmp_path / "exported")
        assert code == 0
        assert f"its weights stay {kind}" in said
        code, _, err = cli("inspect", out, "--precision")
        assert (code, err.count("\n")) == (2, 1)
        assert "holds packed weights" in err

    def test_bad_names(self, cli, run: Path, tmp_path: Path):
        code, _, err = cli("convert", run, tmp_path / "out", "--to", "int3")
        assert code == 2
        assert err.startswith("abyssal: error: --to: 'int3' is not one of bf16, fp32, fp16, fp8, int8, int4")
        code, _, err = cli("convert", run, tmp_path / "out", "--to", "int8", "--scales", "ue8m0")
        assert code == 2
        assert "nothing is written in FP8 blocks" in err
