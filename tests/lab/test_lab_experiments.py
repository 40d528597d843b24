"""Every experiment runs, and what it says follows from its figures: a difference where there is one, none where not."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from lab_helpers import tiny

from abyssal.lab.experiment import Job, Results
from abyssal.lab.experiments import lab_of
from abyssal.lab.recipe import lab_names, read_lab
from abyssal.lab.report import write_report

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("name", lab_names())
def test_runs_and_reports(name, tmp_path):
    recipe = tiny(name)
    lab, figures = lab_of(name), {}
    # Two arms suffice to see that jobs run; conclusions are given the others' figures from them.
    arms = list(recipe.arms)
    chosen = {"finetuning": arms, "context": arms, "dense": [arms[0], *arms[3:]], "conversion": arms[-2:]}.get(
        name, arms[:2]
    )
    for seed in (1, 2):
        if lab.has_common:
            lab.common(Job(recipe, None, seed, tmp_path / name, tmp_path / "models"))
        for arm in chosen if seed == 1 else chosen[:1]:
            found = lab.run(Job(recipe, arm, seed, tmp_path / name, tmp_path / "models"))
            figures.setdefault(arm, {})[seed] = json.loads(json.dumps(found))
    for arm in arms:
        figures.setdefault(arm, dict(next(iter(figures.values()))))
        figures[arm].setdefault(2, figures[arm][1])
    results = Results(recipe, {arm: figures[arm] for arm in arms})
    finding = lab.conclude(results)
    assert finding.answer
    assert finding.tables
    assert finding.charts
    assert not any(
        re.search(r"\bnan\b|\binf\b", text)
        for text in [*finding.answer, *(c for t in finding.tables for r in t.rows for c in r)]
    )
    files = write_report(
        results, finding, tmp_path / "report", command="abyssal lab x", machine={"cores": 2}, spent=(60.0, 90.0)
    )
    page = files[0].read_text(encoding="utf-8")
    assert recipe.question in page
    assert "http-equiv" in page
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "two charts share an id"
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)) <= {(i, "") for i in ids} | {("", i) for i in ids}
    assert json.loads(files[2].read_text())["lab"] == name


def test_figures_are_the_models_own_after_another_was_trained(tmp_path):
    """The same experiment, another, the same again: looks, texts and tuned models of the other are not taken for it."""
    for name in ("specialisation", "context", "finetuning"):
        found = []
        for rate in (0.002, 0.05, 0.002):
            recipe = tiny(name, changes={"optimizer": {"lr": rate}})
            arm = list(recipe.arms)[2 if name == "context" else 0]
            job = Job(recipe, arm, 1, tmp_path / name, tmp_path / "models")
            if lab_of(name).has_common:
                lab_of(name).common(job)
            found.append(lab_of(name).run(job))
        assert found[0] == found[2], name
        assert found[0] != found[1], name


def test_a_second_folder_beside_the_first_finds_the_same(tmp_path):
    recipe = tiny("specialisation")
    jobs = [Job(recipe, "bias balancing", 1, tmp_path / folder, tmp_path / "models") for folder in "ab"]
    first = lab_of("specialisation").run(jobs[0])
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    assert lab_of("specialisation").run(jobs[1]) == first


def test_text_that_has_changed_is_trained_on_anew(tmp_path):
    text = tmp_path / "text.txt"
    losses = []
    for words in ("the sea is deep and dark ", "small fish swim in wide slow circles "):
        text.write_text(words * 2000)
        recipe = tiny("ablation", changes={"data": {"source": str(text), "cache": str(tmp_path / "cache")}})
        job = Job(recipe, "bias balancing", 1, tmp_path / "a", tmp_path / "models")
        losses.append(job.train(job.recipe()))
    assert losses[0] != losses[1]


def made_up(name: str, values: dict[str, dict[str, float]], noise: float = 0.001) -> Results:
    """Results in which an arm's figures are the given ones, with a little noise by seed."""
    recipe = read_lab(name)
    rng = np.random.default_rng(0)
    figures = {
        arm: {seed: {key: value + noise * float(rng.normal()) for key, value in found.items()} for seed in (1, 2, 3)}
        for arm, found in values.items()
    }
    return Results(recipe, figures)


def test_precision_says_no_difference_where_there_is_none():
    curve = [3.0, 2.5, 2.2]
    same = made_up("precision", {arm: {"loss": 2.0, "bits_per_byte": 1.5} for arm in ("FP32", "BF16", "FP8")})
    for found in same.figures.values():
        for one in found.values():
            one["loss_curve"] = curve
    said = lab_of("precision").conclude(same).answer
    assert "no difference between FP8 and BF16" in said[0]
    for one in same.figures["FP8"].values():
        one["loss"] += 0.3
    said = lab_of("precision").conclude(same).answer
    assert said[0].startswith("Validation loss: higher with FP8 than with BF16")


def test_granularity_names_the_steps_that_help():
    recipe = read_lab("granularity")
    arms = list(recipe.arms)
    values = {arm: {"loss": 3.0 - 0.1 * min(i, 2), "cv_per_step": 0.2, "seconds": 60.0} for i, arm in enumerate(arms)}
    results = made_up("granularity", values)
    for found in results.figures.values():
        for one in found.values():
            one |= {"parameters": 10, "active": 5}
    said = " ".join(lab_of("granularity").conclude(results).answer)
    assert f"lower with {arms[-1]} than with {arms[0]}" in said
    assert f"{arms[0]} → {arms[1]}; {arms[1]} → {arms[2]}; it rises clearly for: none." in said


def test_balancing_tells_what_costs_loss():
    recipe = read_lab("balancing")
    values = {
        arm: {
            "loss": 3.1 if "sequence-wise loss, α 0.1" in arm else 3.0,
            "cv": 0.3,
            "cv_per_step": 0.4,
            "max_vio": 1.0,
            "dead": 0,
        }
        for arm in recipe.arms
    }
    values["bias, γ 0.01"] |= {"cv": 0.05, "cv_per_step": 0.1}
    results = made_up("balancing", values)
    for found in results.figures.values():
        for one in found.values():
            one["cv_curve"] = [0.5, 0.4, 0.3]
    said = " ".join(lab_of("balancing").conclude(results).answer)
    assert "Evenest load: bias, γ 0.01" in said
    assert "summed over the last 50 steps: bias, γ 0.01." in said
    assert "higher with sequence-wise loss, α 0.1;" in said
    assert "lower with none of them" in said
