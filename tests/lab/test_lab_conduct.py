"""Experiments that are run, stopped and gone on with; their folders."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab_helpers import tiny

from abyssal.checkpoint.run import Run
from abyssal.errors import UserError
from abyssal.lab.conduct import conduct, machine_of, time_spent
from abyssal.lab.experiment import Job, Stopped

pytest.importorskip("matplotlib")

SMALL = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.intermediate_size=48",
    "model.vocab_size=300",
    "training.batch_size=2",
    "training.sequence_length=32",
    "schedule.warmup=1",
    "validation.batches=2",
]


def lab(*arguments, **options):
    program = [sys.executable, "-m", "abyssal", "lab", *map(str, arguments)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_stopped_goes_on_where_it_was_and_comes_to_the_same(tmp_path):
    """Ctrl-C after the first job: what is done is kept and is not done again."""
    out = tmp_path / "lab" / "precision"
    arguments = ["precision", "training.steps=40", *SMALL, "--seeds", 2, "--jobs", 1, "--out", out]
    began = lab(*arguments, start_new_session=True)
    figures = out / "figures"
    until = time.monotonic() + 240
    while not list(figures.glob("*.json")):
        assert began.poll() is None, began.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    with pytest.raises(UserError, match="another process is running an experiment there"):
        conduct(tiny("precision"), out, overwrite=True)
    os.killpg(began.pid, signal.SIGINT)
    said, errors = began.communicate(timeout=240)
    assert began.returncode == 130, said + errors
    assert "the same command goes on" in said
    assert "Traceback" not in errors
    kept = {file: file.stat().st_mtime_ns for file in figures.glob("*.json")}
    assert 1 <= len(kept) < 6
    assert not (out / "report.html").exists()
    again = lab(*arguments)
    said, errors = again.communicate(timeout=500)
    assert again.returncode == 0, said + errors
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    assert len(list(figures.glob("*.json"))) == 6
    assert f"{len(kept)} of 6 jobs were done before" in said
    text = (out / "report.html").read_text()
    assert "abyssal lab precision training.steps=40" in text
    assert "all jobs were done before" in lab(*arguments).communicate(timeout=240)[0]
    assert (out / "README.md").read_text().startswith("# Does training in FP8 lose anything against BF16?")


def test_a_run_that_was_stopped_in_the_middle_is_the_run_that_was_not(tmp_path):
    recipe = tiny("balancing", changes={"training": {"steps": 6}})
    asked = [0]

    def stop_after_three():
        asked[0] += 1
        return asked[0] >= 3

    whole = Job(recipe, "none", 1, tmp_path / "a", tmp_path / "a" / "models")
    cut = Job(recipe, "none", 1, tmp_path / "b", tmp_path / "b" / "models", stop_after_three)
    with pytest.raises(Stopped):
        cut.train(cut.recipe())
    (partial,) = (tmp_path / "b" / "models").iterdir()
    assert 0 < Run(partial).steps()[-1] < 6
    resumed = Job(recipe, "none", 1, tmp_path / "b", tmp_path / "b" / "models")

    def losses(path: Path) -> list[float]:
        return [r["loss"] for r in Run(path).metrics() if r["kind"] == "train"]

    assert losses(resumed.train(resumed.recipe())) == losses(whole.train(whole.recipe()))


def test_pauses_are_looked_at_and_change_nothing(tmp_path):
    recipe = tiny("balancing", changes={"training": {"steps": 5}})
    seen = []
    job = Job(recipe, "none", 1, tmp_path, tmp_path / "models")
    watched = job.train(
        job.recipe(), pauses=[0, 2, 5], at=lambda trainer: seen.append((trainer.done, trainer.model.training)), salt="w"
    )
    assert [done for done, _ in seen] == [0, 2, 5]
    plain = job.train(job.recipe())
    assert plain != watched
    a, b = ([r["loss"] for r in Run(path).metrics() if "loss" in r] for path in (watched, plain))
    assert a == b


def test_the_same_run_is_trained_once(tmp_path):
    recipe = tiny("balancing")
    job = Job(recipe, "bias, γ 0.01", 1, tmp_path, tmp_path / "models")
    path = job.train(job.recipe())
    when = (path / "metrics.jsonl").stat().st_mtime_ns
    other = Job(tiny("ablation"), "bias balancing", 1, tmp_path / "other", tmp_path / "models")
    assert other.train(other.recipe()) == path
    assert (path / "metrics.jsonl").stat().st_mtime_ns == when


def test_figures_of_another_experiment_are_not_mixed_in(tmp_path):
    recipe = tiny("granularity")
    out = tmp_path / "granularity"
    (out / "figures").mkdir(parents=True)
    told = {"recipe": json.loads(json.dumps(recipe.decisive())), "abyssal": "1", "machine": {}}
    (out / "lab.json").write_text(json.dumps(told))
    (out / "figures" / "00-seed1.json").write_text("{}")
    other = tiny("granularity", changes={"training": {"steps": 9}})
    with pytest.raises(UserError, match=r"base.training.steps is 4 there, 9 here.*--overwrite") as raised:
        conduct(other, out)
    assert "\n" not in str(raised.value)
    (out / "lab.json").write_text("{")
    with pytest.raises(UserError, match=r"lab\.json: damaged"):
        conduct(other, out)


def test_nothing_is_dropped_for_a_run_that_cannot_begin(tmp_path):
    out = tmp_path / "granularity"
    (out / "figures").mkdir(parents=True)
    kept = out / "figures" / "00-seed1.json"
    kept.write_text("{}")
    (out / "lab.json").write_text("{}")
    with pytest.raises(UserError, match=r"missing\.txt"):
        conduct(tiny("granularity", changes={"data": {"source": "missing.txt"}}), out, overwrite=True)
    short = tmp_path / "short.txt"
    short.write_text("too short to train on")
    with pytest.raises(UserError, match=r"tokens|characters"):
        conduct(tiny("granularity", changes={"data": {"source": str(short)}}), out, overwrite=True)
    assert kept.read_text() == "{}"
    assert (out / "lab.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("ablation", {"lab": {"tokenz": 5}}, "lab: tokenz: no such key"),
        ("ablation", {"lab": {"tokens": "abc"}}, "lab: tokens: 'abc'"),
        ("ablation", {"model": {"moe": {"n_shared_experts": 0}}}, "expected both kinds"),
        ("context", {"lab": {"factor": 0}}, "lab: factor: 0"),
        ("context", {"lab": {"factor": 2.5}}, "lab: factor: 2.5"),
        ("context", {"lab": {"factor": 64}}, "max_position_embeddings 512"),
        ("dense", {"lab": {"against": "foo"}}, "'foo' is no arm; the arms: MoE"),
        ("finetuning", {"lab": {"methods": {"LoRA": 3}}}, "lab: methods"),
        ("balancing", {"lab": {"tokens": 5}}, "lab: tokens: no such key"),
    ],
)
def test_settings_that_cannot_be_are_said_before_anything_is_made(tmp_path, name, changes, said):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        conduct(tiny(name, changes=changes), tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all there is")
    with pytest.raises(UserError, match="is no lab's folder"):
        conduct(tiny("granularity"), tmp_path)
    with pytest.raises(UserError, match="is a file; expected a folder"):
        conduct(tiny("granularity"), tmp_path / "thesis.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_jobs_in_processes_and_more_seeds_later(tmp_path):
    out = tmp_path / "lab" / "granularity"
    recipe = tiny("granularity", changes={"training": {"steps": 2}})
    told = []
    results = conduct(recipe, out, jobs=2, watch=lambda done, of, what, seconds: told.append((done, of)))
    assert told == [(n, 8) for n in range(1, 9)]
    assert all(sorted(found) == [1, 2] for found in results.figures.values())
    assert min(time_spent(recipe, out)) > 0
    assert machine_of(out)["device"] in ("cpu", "cuda")
    before = {file: file.stat().st_mtime_ns for file in (out / "figures").iterdir()}
    # A figure that was cut off is found out anew, from the run that is there.
    broken = sorted(before)[0]
    broken.write_text('{"figures": ')
    more = conduct(tiny("granularity", seeds=2, changes={"training": {"steps": 2}}), out, jobs=1)
    assert more.figures == results.figures
    assert all(file.stat().st_mtime_ns == when for file, when in before.items() if file != broken)
