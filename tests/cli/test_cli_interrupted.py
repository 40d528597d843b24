"""Runs that are killed or told to stop, as processes of their own, and what --resume makes of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import figures, tiny_trainer

from abyssal.checkpoint.run import Run, read_metrics

# Kills itself with SIGKILL in the middle of writing the second checkpoint (after step 6; the first is of step 3).
SUICIDE = """
import os, signal, sys
import abyssal.checkpoint.atomic as atomic, abyssal.checkpoint.folder as folder
point, calls = sys.argv.pop(1), {"write": 0, "rename": 0}
real_save, real_rename = folder.save_file, os.rename

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def save(tensors, path, **rest):
    calls["write"] += 1  # two files a checkpoint: the model's and the optimizer's
    if point == "before" and calls["write"] == 3:
        die()
    real_save(tensors, path, **rest)
    if point == "half" and calls["write"] == 4:
        os.truncate(path, os.path.getsize(path) // 2)
        die()

def rename(source, target):
    if "checkpoints" in str(target):
        calls["rename"] += 1
        if point == "rename" and calls["rename"] == 2:
            die()
    real_rename(source, target)
    if point == "after" and calls["rename"] == 2:
        die()

folder.save_file, os.rename = save, rename
from abyssal.cli import main
main()
"""


@pytest.fixture
def recipe_file(data, tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def abyssal(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "abyssal", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("point", ["before", "half", "rename", "after"])
def test_kill_9_in_the_middle_of_a_save(data, tmp_path, recipe_file, point):
    whole = tiny_trainer(data, tmp_path / "whole")
    whole.train()

    run = tmp_path / "killed"
    command = [sys.executable, "-c", SUICIDE, point, "train", str(recipe_file), "--out", str(run)]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    last = 6 if point == "after" else 3
    assert Run(run).steps()[-1] == last  # what was being written is not taken for a checkpoint

    resumed = abyssal("train", "--resume", run, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"continuing after step {last}" in resumed.stdout
    assert figures(read_metrics(run / "metrics.jsonl")) == figures(whole.run.metrics())
    assert not list((run / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop(data, tmp_path, recipe_file, number):
    run = tmp_path / "stopped"
    command = [sys.executable, "-m", "abyssal", "train", recipe_file, "training.steps=100000", "--out", run]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert any(line.startswith("step ") for line in iter(child.stdout.readline, ""))  # it is under way
        os.kill(child.pid, number)
        out, err = child.communicate(timeout=300)
    assert child.returncode == 128 + number, err
    step = Run(run).steps()[-1]
    assert f"stopped after step {step} and saved; continue with: abyssal train --resume {run}" in out.replace("\n", " ")
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == step

    resumed = abyssal("train", "--resume", run, f"training.steps={step + 2}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"continuing after step {step}" in resumed.stdout
    assert Run(run).steps()[-1] == step + 2


def test_an_existing_run_is_not_touched(tmp_path, recipe_file):
    run = tmp_path / "run"
    assert abyssal("train", recipe_file, "training.steps=3", "--out", run, cwd=tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = abyssal("train", recipe_file, "--out", run, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("abyssal: error: ")
    assert "--resume" in again.stderr
    assert again.stderr.count("\n") == 1
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
