"""What ``abyssal inspect`` prints: its figures are tested in tests/analysis, here that they are there and readable."""

import json

import pytest
from tiny_runs import MODEL

from abyssal.analysis.inspection import inspect_model
from abyssal.cli import main, show
from abyssal.config import preset, preset_names

THREE = ("deepseek-moe-16b", "deepseek-v2-lite", "deepseek-v3")


@pytest.fixture
def inspect(monkeypatch, tmp_path, capsys):
    """Runs ``abyssal inspect`` in tmp_path, which must end well; gives its stdout."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, width=80):
        monkeypatch.setattr(show.console, "_width", width)
        monkeypatch.setattr("sys.argv", ["abyssal", "inspect", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        assert (caught.value.code, out.err) == (0, "")
        return out.out

    return run


def cells(out: str, label: str) -> list[str]:
    """What stands behind ``label`` in the first line that begins with it."""
    line = next(line for line in out.splitlines() if line.startswith(label + "  "))
    return line.removeprefix(label).split()


class TestOne:
    def test_published_figures(self, inspect):
        out = inspect("deepseek-v3")
        assert cells(out, "total")[:2] == ["671,026,419,200", "37,552,297,472"]
        assert cells(out, "MTP modules (not in the total)") == ["11,610,068,224"]
        assert cells(out, "embedding")[0] == "926,679,040"
        assert cells(out, "3-60 MoE")[:2] == ["11,507,286,272", "585,318,656"]
        assert cells(out, "latent, a token and layer") == ["576"]
        assert "70.27 kB" in out
        assert cells(out, "expanded / latent") == ["71.1×"]
        assert cells(out, "FP8 blocks of 128 × 128")[:2] == ["673.15", "GB"]

    def test_context_and_batch(self, inspect):
        out = inspect("deepseek-v2-lite", "--context", "32768", "--batch", "3")
        assert "context of 32,768" in out
        values = 27 * 576 * 32768 * 3
        assert cells(out, "  32,768 tokens × 3")[0] == f"{values:,}"
        data = json.loads(inspect("deepseek-v2-lite", "--context", "32768", "--batch", "3", "--json"))
        cache = data["cache"]
        assert (cache["context"], cache["batch"], data["flops"]["context"]) == (32768, 3, 32768)
        assert cache["bytes"]["cached"] == {"float8_e4m3fn": values, "bfloat16": 2 * values, "float32": 4 * values}
        assert cache["bytes"]["expanded"]["bfloat16"] == 2 * 27 * 5120 * 32768 * 3
        assert cache["bytes_per_token"]["cached"]["bfloat16"] == data["cached_bytes_per_token"]["bfloat16"]

    def test_layers_in_json_add_up(self, inspect):
        data = json.loads(inspect("deepseek-v3", "--json"))
        sums = dict.fromkeys(("dense", "MoE", "MTP"), 0)
        for group in data["layers"]:
            assert group["parameters"]["total"] == sum(n for part, n in group["parameters"].items() if part != "total")
            sums[group["kind"]] += len(group["layers"]) * group["parameters"]["total"]
        assert sums["MTP"] == data["mtp"] == 11_610_068_224
        assert sums["dense"] + sums["MoE"] + 2 * 926_679_040 + 7168 == data["parameters"]["total"]
        assert data["weights"]["bf16"]["mtp"] == 2 * 11_610_068_224 + 2 * 256

    def test_nothing_is_compressed(self, inspect):
        out = inspect("llama2-7b")
        assert cells(out, "keys and values, a token and layer") == ["8,192"]
        assert "expanded" not in out
        assert "MTP" not in out

    @pytest.mark.parametrize("name", preset_names())
    def test_every_preset_fits_100_columns(self, inspect, name):
        assert max(map(len, inspect(name).splitlines())) <= 100

    def test_a_name_is_no_markup(self, inspect, tmp_path):
        (tmp_path / "[bold]x").mkdir()
        (tmp_path / "[bold]x" / "config.json").write_text(json.dumps(MODEL))
        assert inspect("[bold]x").startswith("[bold]x: hidden")
        assert "[bold]x" in inspect("[bold]x", "demo")


class TestCompare:
    def test_where_the_flag_stands_does_not_matter(self, inspect):
        out = inspect("--compare", *THREE)
        assert out == inspect(*THREE, "--compare") == inspect(THREE[0], "--compare", *THREE[1:]) == inspect(*THREE)
        assert out.split("\n")[0].split() == list(THREE)

    def test_published_figures(self, inspect):
        out = inspect("--compare", *THREE)
        assert cells(out, "attention") == ["MHA", "MLA", "MLA"]
        assert cells(out, "parameters") == ["16.38", "B", "15.71", "B", "671.03", "B"]
        assert cells(out, "  active") == ["2.83", "B", "2.66", "B", "37.55", "B"]
        assert cells(out, "MTP modules") == ["–", "–", "11.61", "B"]
        assert cells(out, "    values a layer") == ["4,096", "576", "576"]
        assert cells(out, "  expanded / cached") == ["1.0×", "8.9×", "71.1×"]
        assert cells(out, "experts: routed") == ["64", "64", "256"]
        assert cells(out, "  a token (routed)") == ["6", "6", "8"]

    def test_json_maps_names_to_what_each_alone_gives(self, inspect):
        data = json.loads(inspect("--compare", *THREE, "--json", "--context", "100", "--batch", "2"))
        assert list(data) == list(THREE)
        for name in THREE:
            assert data[name] == json.loads(inspect(name, "--json", "--context", "100", "--batch", "2"))
        assert list(json.loads(inspect("--compare", "demo", "--json"))) == ["demo"]

    def test_the_context_is_one_that_all_have(self, inspect):
        data = json.loads(inspect("deepseek-v3", "demo", "--json"))
        assert {row["flops"]["context"] for row in data.values()} == {preset("demo").max_position_embeddings}
        data = json.loads(inspect("deepseek-v3", "deepseek-v2", "--json"))
        assert {row["cache"]["context"] for row in data.values()} == {4096}

    @pytest.mark.parametrize("width", [60, 80, 100, 140, 1000])
    def test_it_keeps_to_the_terminal(self, inspect, tmp_path, width):
        folder = tmp_path / "a-folder" / "with-a-name-that-is" / "much-too-long"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(MODEL))
        names = [*THREE, folder.relative_to(tmp_path), "kimi-k2", "llama2-7b", "smollm2-135m-mla-moe"]
        lines = inspect("--compare", *names, "--batch", "1000", "--context", "64", width=width).splitlines()
        assert max(map(len, lines)) <= max(width, 77)  # the last line is one of words
        tables = [line for line in lines if line.startswith("attention")]
        assert sum(len(line.split()) - 1 for line in tables) == len(names)
        assert (len(tables) == 1) == (width == 1000)

    def test_grouped_heads_are_said(self, inspect, tmp_path):
        published = json.loads(inspect("llama2-7b", "--json"))["config"]
        published["attention"]["num_key_value_heads"] = 8
        (tmp_path / "config.json").write_text(json.dumps(published))
        assert cells(inspect("llama2-7b", "config.json"), "attention") == ["MHA", "GQA"]


def test_from_python():
    with pytest.raises(ValueError, match="batch: 0"):
        inspect_model(preset("demo"), context=4, batch=0)
    assert inspect_model(preset("demo"), context=4, batch=2).as_json()["cache"]["bytes"]["cached"]["bfloat16"] == (
        4 * 96 * 4 * 2 * 2
    )
