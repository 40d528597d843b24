"""The commands at work, in-process."""

import json
from importlib.metadata import version

import pytest
import torch
import yaml
from tiny_runs import MODEL

import abyssal
from abyssal.checkpoint.run import Run
from abyssal.cli import main
from abyssal.config import preset_names
from abyssal.training.recipe import read_recipe


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """Runs the command line in tmp_path, which must end well; gives its stdout."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["abyssal", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        assert (caught.value.code, out.err) == (0, "")
        return out.out

    return run


@pytest.fixture
def recipe(data, tmp_path):
    data["training"] |= {"steps": 4, "accumulate": 1}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_version(cli):
    assert cli("--version") == f"abyssal {version('abyssal')}, torch {version('torch')}\n"


def plain_count(config: dict) -> dict:
    """Parameters of a tiny V3-shaped MODEL, multiplied out by hand."""
    d, v = config["hidden_size"], config["vocab_size"]
    attention = d * 16 + 16 + 16 * 32 + d * 24 + 16 + 16 * 32 + 16 * d
    expert = 3 * d * 16
    moe = 4 * d + 4 + expert  # router, its bias, the shared expert
    norms = 2 * d
    dense = attention + norms + 3 * d * 48
    layer = attention + norms + moe + 4 * expert
    total = 2 * v * d + dense + layer + d
    return {"total": total, "active": total - 2 * expert, "mtp": layer + 3 * d + 2 * d * d}


class TestLook:
    def test_presets(self, cli):
        out = cli("presets")
        assert all(name in out for name in preset_names())
        assert "671,026,419,200" in out  # published: DeepSeek-V3

    def test_presets_json(self, cli):
        rows = json.loads(cli("presets", "--json"))
        assert list(rows) == preset_names()
        assert rows["deepseek-v3"]["parameters"] == 671_026_419_200
        assert rows["deepseek-v3"]["active"] == 37_552_297_472
        assert rows["deepseek-v2-lite"]["active_without_embedding"] == 2_451_435_008
        assert rows["deepseek-v3"]["cached_values"] == 576

    def test_inspect(self, cli):
        out = cli("inspect", "deepseek-v3")
        for figure in ("671,026,419,200", "37,552,297,472", "11,610,068,224", "71.1×", "256 routed experts"):
            assert figure in out

    def test_inspect_file_folder_and_run(self, cli, recipe, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
        cli("train", recipe, "--out", "run")
        expected = plain_count(MODEL)
        for source in ("model", "model/config.json", "run", "run/checkpoints/step-00000004"):
            data = json.loads(cli("inspect", source, "--json"))
            assert data["parameters"]["total"] == expected["total"]
            assert data["active"]["total"] == expected["active"]
            assert data["mtp"] == expected["mtp"]
            assert data["cached_bytes_per_token"]["bfloat16"] == 2 * 2 * (16 + 8)
            assert f"{expected['total']:,}" in cli("inspect", source)

    def test_help(self, cli):
        assert "train" in cli()
        assert "--resume" in cli("train", "--help")


class TestTrain:
    def test_a_run(self, cli, recipe, tmp_path):
        out = cli("train", recipe, "training.steps=5", "balance=none", "optimizer.lr=2e-2", "name=other")
        run = Run(tmp_path / "runs" / "other")
        stored = yaml.safe_load((run.path / "recipe.yaml").read_text())
        assert (stored["training"]["steps"], stored["optimizer"]["lr"], stored["name"]) == (5, 0.02, "other")
        assert stored["balance"]["bias_sign"] is None
        assert {r["kind"] for r in run.metrics()} == {"train", "validation", "samples"}
        assert run.steps()[-1] == 5
        assert run.manifest["hardware"]["dtype"] == "float32"
        last = [r for r in run.metrics() if r["kind"] == "validation"][-1]
        assert f"{last['bits_per_byte']:.4f}" in out
        assert "abyssal generate runs/other" in out
        summary = json.loads((run.path / "summary.json").read_text())
        assert summary["validation"]["loss"] == last["loss"]
        assert summary["step"] == 5

    def test_print_config_is_a_recipe(self, cli, recipe, tmp_path):
        changes = ("training.steps=7", "balance=bias_sign+sequence_loss", "model.moe.n_routed_experts=6")
        text = cli("train", recipe, *changes, "--print-config")
        assert not (tmp_path / "runs").exists()
        (tmp_path / "printed.yaml").write_text(text)
        printed = read_recipe(str(tmp_path / "printed.yaml"))
        assert (printed.training.steps, printed.model_config_resolved().moe.n_routed_experts) == (7, 6)
        assert printed.balance.sequence_loss is not None
        assert cli("train", "printed.yaml", "--print-config") == text

    @pytest.mark.parametrize("name", ["demo"])
    def test_built_in_recipes_print_as_themselves(self, cli, tmp_path, name):
        (tmp_path / "printed.yaml").write_text(cli("train", name, "--print-config"))
        printed, built_in = read_recipe(str(tmp_path / "printed.yaml")), read_recipe(name)
        assert printed.model_config_resolved() == built_in.model_config_resolved()
        assert printed.model_dump(exclude={"model"}) == built_in.model_dump(exclude={"model"})

    def test_overwrite(self, cli, recipe, tmp_path):
        cli("train", recipe, "--out", "run")
        (tmp_path / "run" / "stale").write_text("x")
        cli("train", recipe, "--out", "run", "--overwrite", "training.steps=3")
        assert not (tmp_path / "run" / "stale").exists()
        assert Run(tmp_path / "run").steps()[-1] == 3

    def test_resume(self, cli, recipe, tmp_path):
        cli("train", recipe)
        text = cli("train", "--resume", "runs/tiny", "training.steps=6", "--print-config")
        assert yaml.safe_load(text)["training"]["steps"] == 6
        assert "continuing after step 4" in cli("train", "--resume", "runs/tiny", "training.steps=6")
        assert "continuing after step 6" in cli("train", recipe, "--resume", "training.steps=7")
        assert "continuing after step 7" in cli("train", recipe, "training.steps=8", "--resume", "auto")
        assert "continuing after step 8" in cli("train", recipe, "--resume", "runs/tiny", "training.steps=9")
        run = Run(tmp_path / "runs" / "tiny")
        assert [r["step"] for r in run.metrics() if r["kind"] == "train"] == list(range(1, 10))


class TestGenerate:
    def test_all(self, cli, recipe, tmp_path):
        cli("train", recipe, "--out", "run")
        one = cli("generate", "run", "the ", "--temperature", "0", "--tokens", "12")
        assert one.startswith("the ")
        assert one == cli("generate", "run", "the ", "--temperature", "0", "--tokens", "12")
        # greedy by hand, without a cache: the likeliest token after all that came before
        model, tokenizer = abyssal.load("run")
        ids = [tokenizer.bos_id, *tokenizer.encode("the ")]
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_id:
                break
        assert one == tokenizer.decode(ids) + "\n"

        sampled = [cli("generate", "run", "a", "--temperature", "2", "--seed", s) for s in ("1", "1", "2")]
        assert sampled[0] == sampled[1] != sampled[2]
        several = cli("generate", "run", "the ", "a", "--temperature", "0", "--tokens", "12")
        assert several.startswith("--- 1\n" + one.rstrip("\n"))
        assert "\n--- 2\na" in several
        text = one.removeprefix("the ").rstrip("\n")
        stop = next((c for c in text if c.isalnum() or c == " "), None)
        if stop is not None:
            cut = cli("generate", "run", "the ", "--temperature", "0", "--tokens", "12", "--stop", stop)
            assert cut == "the " + text[: text.index(stop)] + "\n"
