"""The report's data and figures against what the metrics say, worked out here a second time."""

import base64
import gzip
import json
import re
import statistics

import numpy as np
import plotly.graph_objects
import pytest
from fake_runs import fake_run, train_record
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import MODEL, tiny_recipe, tiny_trainer

from abyssal.analysis.charts import label, picked, smooth
from abyssal.analysis.report import ReportedRun, report, report_data, unique_names
from abyssal.checkpoint.run import Run
from abyssal.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 8 steps, a layer of experts and an MTP module's."""
    folder = tmp_path_factory.mktemp("trained")
    data = tiny_recipe(folder)
    data["samples"] = {"every": 4, "prompts": ["the ", "<b>fox"], "tokens": 4}
    data["balance"] = {"bias_sign": {"rate": 0.01}, "sequence_loss": {"alpha": 0.1}}
    tiny_trainer(data, folder / "run").train()
    return folder / "run"


def data_of(*paths):
    runs = [ReportedRun(path) for path in paths]
    for run in runs:
        run.history.read(whole=True)
    return report_data(runs)


def lines(path, kind):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def figures_in(data):
    if isinstance(data, dict) and "layout" in data:
        yield data
    elif isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            yield from figures_in(value)


def inside(page):
    block = re.search(r'<script type="text/plain" id="data">([^<]*)</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(block[1])))


class TestOneRun:
    def test_figures_are_plotlys(self, trained, tmp_path):
        other = fake_run(tmp_path / "other", [train_record(step, layers=range(3, 15), experts=20) for step in (1, 2)])
        for paths in ((trained,), (other,), (trained, other)):
            found = list(figures_in(data_of(*paths)))
            assert len(found) > 10
            for figure in found:
                plotly.graph_objects.Figure(figure)  # raises for a property that Plotly does not know

    def test_loads_and_biases(self, trained):
        records = lines(trained, "train")
        layers = data_of(trained)["runs"][0]["experts"]["layers"]
        assert [row["name"] for row in layers] == ["layer 1", "layer 2 (MTP)"]
        for row in layers:
            heatmap = row["load"]["data"][0]
            assert heatmap["x"] == [record["step"] for record in records]
            assert heatmap["y"] == [0, 1, 2, 3]
            for i, record in enumerate(records):
                load = record["layers"][str(row["layer"])]["load"]
                assert [heatmap["z"][e][i] for e in range(4)] == [round(x / (sum(load) / 4), 2) for x in load]
            for expert, trace in enumerate(row["bias"]["data"]):
                assert trace["name"] == f"expert {expert}"
                expected = [record["layers"][str(row["layer"])]["bias"][expert] for record in records]
                assert trace["y"] == pytest.approx(expected, abs=1e-4)

    def test_curves(self, trained):
        records, validations = lines(trained, "train"), lines(trained, "validation")
        data = data_of(trained)
        steps = [record["step"] for record in records]
        for chart, key, scale in (
            ("loss", "loss", 1),
            ("lr", "lr", 1),
            ("grad_norm", "grad_norm", 1),
            ("tokens_per_s", "tokens_per_s", 1),
            ("balance_loss", "balance_loss", 1),
        ):
            trace = data["charts"][chart]["data"][0]
            assert trace["x"] == steps
            assert trace["y"] == pytest.approx([record[key] * scale for record in records], rel=1e-4)
        assert data["charts"]["mtp_loss"]["data"][0]["y"] == pytest.approx(
            [r["mtp_loss"][0] for r in records], rel=1e-4
        )
        memory = [record["memory"]["process"] / 1e9 for record in records]
        assert data["charts"]["memory"]["data"][0]["y"] == pytest.approx(memory, rel=1e-4)
        for trace, key in (
            (data["charts"]["loss"]["data"][-1], "loss"),
            (data["charts"]["bits_per_byte"]["data"][0], "bits_per_byte"),
        ):
            assert trace["x"] == [record["step"] for record in validations]
            assert trace["y"] == pytest.approx([record[key] for record in validations], rel=1e-4)
        curves = data["runs"][0]["experts"]["curves"]
        for key in ("cv", "max_vio", "dead"):
            for trace, layer in zip(curves[key]["data"], ("1", "2"), strict=True):
                assert trace["y"] == pytest.approx([r["layers"][layer][key] for r in records], rel=1e-4)

    def test_key_figures(self, trained):
        records, validations = lines(trained, "train"), lines(trained, "validation")
        run = data_of(trained)["runs"][0]
        figures = dict(run["figures"])
        seconds = sum(record["step_time"] * record["steps"] for record in records)
        best = min(validations, key=lambda record: record["loss"])
        assert figures["steps"] == "8 of 8"
        assert figures["tokens"] == f"{8 * 2 * 2 * 16:,}"
        assert figures["tokens a second"] == f"{8 * 2 * 2 * 16 / seconds:,.0f}"
        assert figures["last validation loss"] == f"{validations[-1]['loss']:.4f} (step 8)"
        assert figures["best bits a byte"] == f"{best['bits_per_byte']:.4f} (step {best['step']})"
        assert figures["most memory of the process"] == f"{max(r['memory']['process'] for r in records) / 1e9:.2f} GB"
        assert figures["computed in"] == "float32"
        assert run["done"]
        assert run["recipe"] == (trained / "recipe.yaml").read_text()
        assert dict(run["model"])["experts"] == "4 routed, 2 a token, 1 shared"

    def test_samples(self, trained):
        expected = [
            {"step": r["step"], "samples": [[s["prompt"], s["text"]] for s in r["samples"]]}
            for r in lines(trained, "samples")
        ]
        assert [row["step"] for row in expected] == [4, 8]
        assert data_of(trained)["runs"][0]["samples"] == expected

    def test_the_page_holds_the_data(self, trained):
        page = report([trained])
        assert len(page) < 5e6
        assert inside(page)["runs"][0]["samples"][0]["samples"][1][0] == "<b>fox"
        assert "<b>fox" not in page

    def test_no_experts(self, tmp_path):
        path = fake_run(tmp_path / "dense", [train_record(step, layers=(), mtp_loss=[]) for step in (1, 2)])
        data = data_of(path)
        assert data["runs"][0]["experts"] is None
        assert "mtp_loss" not in data["charts"]
        assert "balance_loss" not in data["charts"]

    def test_a_router_without_a_bias(self, tmp_path):
        records = [train_record(step) for step in (1, 2)]
        for record in records:
            del record["layers"]["1"]["bias"]
        layers = data_of(fake_run(tmp_path / "run", records))["runs"][0]["experts"]["layers"]
        assert layers[0]["bias"] is None
        assert layers[1]["bias"] is not None

    def test_a_layer_that_nothing_was_routed_to(self, tmp_path):
        record = train_record(1)
        record["layers"]["1"]["load"] = [0, 0, 0, 0]
        heatmap = data_of(fake_run(tmp_path / "run", [record]))["runs"][0]["experts"]["layers"][0]["load"]["data"][0]
        assert heatmap["z"] == [[None]] * 4

    def test_a_run_that_trains_right_now(self, trained):
        run = Run(trained)
        run.lock()
        try:
            assert inside(report([trained]))["runs"][0]["done"]
        finally:
            run.unlock()

    @pytest.mark.parametrize("recipe", [None, {"model": {"hidden_size": "big"}}, {"model": 3, "training": 4}])
    def test_a_recipe_that_says_nothing_is_a_note(self, tmp_path, recipe):
        data = data_of(fake_run(tmp_path / "run", [train_record(1)], recipe))
        assert any("recipe.yaml" in note for note in data["runs"][0]["notes"])
        assert dict(data["runs"][0]["figures"])["steps"] == "1"

    def test_many_samples_are_thinned(self, tmp_path):
        text = "x" * 30_000
        samples = [
            {"kind": "samples", "step": step, "samples": [{"prompt": "p", "text": text}]} for step in range(1, 101)
        ]
        run = data_of(fake_run(tmp_path / "run", [train_record(1), *samples]))["runs"][0]
        steps = [row["step"] for row in run["samples"]]
        assert (steps[0], steps[-1]) == (1, 100)
        assert 20 < len(steps) < 60
        assert f"Samples of {len(steps)} of 100 steps are shown." in run["notes"]
        assert run["samples"][0]["samples"][0][1].endswith("(10,000 characters more)")


class TestSeveralRuns:
    def test_other_models_and_recipes(self, trained, tmp_path):
        other = fake_run(
            tmp_path / "other",
            [train_record(step, layers=(2, 3), experts=8) for step in range(1, 6)],
            {"model": {**MODEL, "num_hidden_layers": 4}, "training": {"steps": 5}, "name": "tiny"},
        )
        dense = fake_run(tmp_path / "dense", [train_record(1, layers=(), mtp_loss=[])])
        data = data_of(trained, other, dense)
        assert [trace["name"] for trace in data["charts"]["lr"]["data"]] == ["run", "other", "dense"]
        colours = [trace["line"]["color"] for trace in data["charts"]["lr"]["data"]]
        assert len(set(colours)) == 3
        assert [run["colour"] for run in data["runs"]] == colours
        names = {row["layer"]: [t["name"] for t in row["charts"]["cv"]["data"]] for row in data["overlaid"]}
        assert names == {1: ["run"], 2: ["run", "other"], 3: ["other"]}
        assert [row["name"] for row in data["overlaid"]] == ["layer 1", "layer 2", "layer 3"]  # 2: MTP in one only
        differences = {row[0]: row[1:] for row in data["differences"]}
        assert differences["training.steps"] == ["8", "5", "–"]
        assert differences["model.num_hidden_layers"] == ["2", "4", "–"]
        assert "model.moe.n_routed_experts" in differences  # missing in the third

    def test_the_same_recipe_twice(self, trained):
        data = data_of(trained, trained)
        assert data["differences"] == []
        assert inside(report([trained, trained]))["runs"][1]["name"] == "run (2)"

    def test_names(self, tmp_path):
        paths = [tmp_path / name for name in ("a/run", "b/run", "b/other", "c/b/run", "a/run")]
        assert unique_names(paths) == ["a/run", f"{tmp_path.name}/b/run", "other", "c/b/run", "a/run (2)"]
        assert unique_names([paths[0]]) == ["run"]


class TestRefused:
    def test_no_run(self, tmp_path):
        with pytest.raises(UserError, match=r"run\.json is missing"):
            report([tmp_path])
        with pytest.raises(UserError, match="no such run folder"):
            report([tmp_path / "nowhere"])

    @pytest.mark.parametrize(
        ("text", "right"),
        [
            (None, r"metrics\.jsonl: no such file"),
            ("", r"metrics\.jsonl: no training step in it; nothing to report"),
            ('{"kind": "validation", "step": 1, "loss": 1.0, "bits_per_byte": 1.0}\n', "no training step"),
            ('{"kind": "train", "step": 1}\n', r"no training step in it \(line 1: steps: missing"),
            ('{"kind": "tra', "no training step in it; nothing"),
        ],
    )
    def test_no_metrics(self, tmp_path, text, right):
        path = fake_run(tmp_path / "run", [])
        (path / "metrics.jsonl").unlink()
        if text is not None:
            (path / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=right) as caught:
            report([path])
        assert "\n" not in str(caught.value)

    def test_the_rest_of_a_cut_file_is_read(self, tmp_path):
        path = fake_run(tmp_path / "run", [train_record(1), train_record(2)])
        whole = (path / "metrics.jsonl").read_bytes()
        (path / "metrics.jsonl").write_bytes(whole[:-50])
        run = inside(report([path]))["runs"][0]
        assert dict(run["figures"])["steps"] == "1"
        assert any("its last line was cut off" in note for note in run["notes"])

    def test_skipped_lines_are_counted(self, tmp_path):
        path = fake_run(tmp_path / "run", [train_record(1), {"kind": "train"}, {"kind": "train"}, train_record(2)])
        notes = inside(report([path]))["runs"][0]["notes"]
        assert (
            "metrics.jsonl: 2 lines were skipped; the first: line 2: step: missing; expected a whole number, 0 or more"
            in notes
        )


values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200)


@given(values, st.integers(2, 40))
def test_picked_keeps_ends_and_extremes(column, most):
    chosen = picked(column, most)
    assert chosen == sorted(set(chosen))
    assert {0, len(column) - 1} <= set(chosen)
    assert {max(column), min(column)} <= {column[i] for i in chosen}
    assert len(chosen) <= max(most + 2, 4)


@given(values, st.integers(1, 30))
def test_smooth(column, window):
    half, last = window // 2, len(column) - 1
    expected = []
    for i in range(len(column)):
        before = min(half, i)
        after = min(half, i, last - i)
        expected.append(statistics.fmean(column[i - before : i + after + 1]))
    assert smooth(column, window) == pytest.approx(expected, rel=1e-6, abs=1e-3)


def test_labels():
    assert label("<b>&\n x") == "&lt;b&gt;&amp; x"
    assert label("a" * 50 + "b" * 50) == "a" * 20 + "…" + "b" * 20


@pytest.mark.slow
def test_the_largest_models_fit(tmp_path):
    """58 layers and an MTP module's of 256 experts: under 5 MB, experts in stretches, and it says so."""
    rng = np.random.default_rng(0)
    path = fake_run(tmp_path / "big", [])
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, 301):
            record = train_record(step, layers=())
            for layer in range(3, 62):
                load, bias = rng.poisson(500 * rng.lognormal(0, 0.3, 256)), rng.normal(0, 0.2, 256).round(7)
                row = {"load": load.tolist(), "bias": bias.tolist(), "cv": 0.1, "max_vio": 0.3, "dead": 0}
                record["layers"][str(layer)] = row
            file.write(json.dumps(record) + "\n")
    page = report([path])
    assert len(page) < 5e6
    run = inside(page)["runs"][0]
    assert len(run["experts"]["layers"]) == 59
    assert len(run["experts"]["layers"][0]["load"]["data"][0]["z"]) == 256
    assert any("stretches of 8 records" in note for note in run["notes"])


@pytest.mark.slow
def test_the_longest_runs_fit(tmp_path):
    path = fake_run(tmp_path / "long", [])
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            file.write(json.dumps(train_record(step, loss=99.0 if step == 77_777 else 2.0 + 1 / step)) + "\n")
    page = report([path])
    assert len(page) < 3e6
    data = inside(page)
    trace = data["charts"]["loss"]["data"][0]
    assert trace["y"][trace["x"].index(77_777)] == 99.0  # a spike of one step is not lost
    assert any("every 200 records" in note for note in data["runs"][0]["notes"])
