"""Where reports go, and that those in docs/ are what their figures say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abyssal.errors import UserError
from abyssal.lab.charts import curves, heat, points
from abyssal.lab.experiment import Finding, Results, Table
from abyssal.lab.experiments import lab_of
from abyssal.lab.recipe import LabRecipe, lab_names, read_lab
from abyssal.lab.report import check_place, write_report

pytest.importorskip("matplotlib")
DOCS = Path(__file__).parents[2] / "docs" / "lab"


def one(tmp_path, answer="It is so."):
    results = Results(read_lab("precision"), {"A": {1: {"loss": 1.0}}})
    finding = Finding(
        "In short.",
        [answer],
        [Table("T", ["a", "b"], [["<i>x</i> | y", "1"]])],
        [points("P", "nats", {"A": [1.0, 2.0]})],
    )
    return write_report(
        results, finding, tmp_path, command="abyssal lab precision", machine={"cores": 2}, spent=(60.0, 90.0)
    )


def test_text_is_text(tmp_path):
    page, readme, *_ = one(tmp_path, "<script>alert(1)</script> & more")
    assert "&lt;script&gt;alert(1)" in page.read_text()
    assert "<i>x</i>" not in page.read_text()
    assert "<i>x</i> / y" in readme.read_text()


def test_a_report_is_written_over_its_own_and_over_nothing_else(tmp_path):
    files = one(tmp_path)
    assert one(tmp_path) == files
    with pytest.raises(UserError, match="holds the report on lab precision"):
        check_place(tmp_path, "dense")
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README\.md exists and is no lab's report"):
        check_place(other, "dense")
    (other / "report.html").write_text("mine")
    with pytest.raises(UserError, match=r"report\.html exists and is no lab's report"):
        check_place(other, "dense")
    with pytest.raises(UserError, match="is a file"):
        check_place(other / "README.md", "dense")


def test_charts_of_others_stay(tmp_path):
    (tmp_path / "chart-mine.svg").write_text("mine")
    (tmp_path / "chart-7.svg").write_text("mine too")
    one(tmp_path)
    assert (tmp_path / "chart-7.svg").read_text() == "mine too"
    one(tmp_path)
    assert (tmp_path / "chart-mine.svg").read_text() == "mine"


def test_charts_are_svg_that_takes_the_colour_of_its_page():
    charts = [
        points("P", "nats", {"A & B": [1.0, 2.0], "C": [2.0, 2.5]}),
        curves(
            "C", [0, 1, 10], {"A": [[1, 2, 3], [2, 3, 4]], "B": [[1, 1, 1], [1, 1, 2]]}, across="x", up="y", log_x=True
        ),
        heat("H", ["r"], ["c", "d"], [[0.1, -0.2]]),
    ]
    for chart in charts:
        assert chart.svg.startswith("<svg")
        assert "currentColor" in chart.svg
        assert "<image" not in chart.svg
        assert "currentColor" not in chart.on_white()
        assert chart.svg == chart.svg.strip()
    assert "A &amp; B" in charts[0].svg
    assert points("P", "nats", {"A": [1.0, 2.0]}).svg == points("P", "nats", {"A": [1.0, 2.0]}).svg


@pytest.mark.parametrize("name", lab_names())
def test_report_in_the_docs_is_what_its_figures_say(name):
    """Made by the recipe that is here, with the finding that follows from the figures beside it."""
    told = json.loads((DOCS / name / "figures.json").read_text(encoding="utf-8"))
    recipe = LabRecipe.model_validate(told["recipe"])
    assert recipe.decisive() == json.loads(json.dumps(read_lab(name, size=recipe.size).decisive()))
    assert told["command"] == f"abyssal lab {name}"
    figures = {arm: {int(seed): one for seed, one in found.items()} for arm, found in told["figures"].items()}
    assert all(sorted(found) == [1, 2, 3] for found in figures.values())
    finding = lab_of(name).conclude(Results(recipe, figures))
    readme = (DOCS / name / "README.md").read_text(encoding="utf-8")
    page = (DOCS / name / "report.html").read_text(encoding="utf-8")
    for sentence in (finding.short, *finding.answer):
        assert sentence in readme
    for table in finding.tables:
        for row in table.rows:
            assert f"| {' | '.join(row)} |" in readme
    assert recipe.question in page
    assert finding.short in (DOCS / "README.md").read_text(encoding="utf-8")
    assert len(list((DOCS / name).glob("chart-*.svg"))) == len(finding.charts)
