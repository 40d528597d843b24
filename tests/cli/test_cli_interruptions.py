"""Runs that are killed, stopped, or find the disk full, each in a process of its own; then they go on."""

import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from tiny_runs import figures, same, tiny_recipe, tiny_trainer

import abyssal
from abyssal.checkpoint import read_tensors
from abyssal.checkpoint.run import Run
from abyssal.cli import main

# Each driver runs the command line after preparing its own end; arguments of its own come first.
KILL = """
import os, signal, sys
import abyssal.checkpoint.atomic as atomic
import abyssal.checkpoint.folder as folder
from abyssal.cli import main

point, step = sys.argv[1:3]
save_file, rename = folder.save_file, os.rename
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def save(tensors, path, metadata=None):
    if step not in str(path):
        return save_file(tensors, path, metadata=metadata)
    if point == "before any tensor":
        die()
    save_file(tensors, path, metadata=metadata)
    if point == "half a file" and path.name == "training.safetensors":
        os.truncate(path, path.stat().st_size // 2)
        die()

def to(source, target):
    if step in str(target):
        die()
    rename(source, target)

folder.save_file = save
if point == "before renaming":
    atomic.os.rename = to
sys.argv = ["abyssal", *sys.argv[3:]]
main()
"""

# Waits on stdin after the first step's line, so that a signal certainly comes while there are steps left.
WAIT = """
import sys
from abyssal.cli import main
from abyssal.cli.progress import ConsoleWatcher

shown = ConsoleWatcher.step
def step(self, step, steps, record):
    shown(self, step, steps, record)
    if step == 3:
        sys.stdin.readline()
ConsoleWatcher.step = step
sys.argv = ["abyssal", *sys.argv[1:]]
main()
"""

FULL_DISK = """
import resource, sys
from abyssal.cli import main
from abyssal.training.trainer import Trainer

limit, save = int(sys.argv[1]), Trainer.save
def limited(self):
    if self.done == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    save(self)
Trainer.save = limited
sys.argv = ["abyssal", *sys.argv[2:]]
main()
"""


def command(*arguments, driver: str | None = None) -> list[str]:
    return [sys.executable, *(("-c", driver) if driver else ("-m", "abyssal")), *map(str, arguments)]


@pytest.fixture(scope="module")
def environment():
    """As many threads as this process has: with another number sums may be rounded in another order."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def call(environment, *arguments, driver=None):
    return subprocess.run(
        command(*arguments, driver=driver), env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The recipe, and a run of it that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    data = tiny_recipe(folder)
    data["checkpoint"] = {"every": 2, "keep": 2}
    data["balance"] = {"bias_sign": {"rate": 0.01}, "bias_proportional": {"rate": 0.5, "every": 3}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    trainer = tiny_trainer(data, folder / "run")
    assert trainer.train()
    return folder / "tiny.yaml", trainer.run


def check_equal(run: Run, whole: Run) -> None:
    assert figures(run.metrics()) == figures(whole.metrics())
    assert run.steps() == whole.steps()
    for file in ("model.safetensors", "training.safetensors"):
        assert same(read_tensors(run.checkpoint(8) / file), read_tensors(whole.checkpoint(8) / file))
    assert run.state(8) == whole.state(8)


def test_killed_again_and_again(whole, environment, tmp_path):
    recipe, uninterrupted = whole
    path = tmp_path / "run"
    arguments = [recipe, "--out", path]
    # 3 and 6 are there too because their validations were the best so far
    for point, killed_at, left in (
        ("before any tensor", 4, 3),
        ("half a file", 6, 4),
        ("before renaming", 8, 6),
    ):
        step = f"step-{killed_at:08d}"
        done = call(environment, point, step, "train", *arguments, driver=KILL)
        assert done.returncode == -signal.SIGKILL, done.stderr
        run = Run(path)
        assert run.steps()[-1] == left
        assert not run.checkpoint(killed_at).exists()
        abyssal.load(run.checkpoint(left))
        arguments = ["--resume", path]
    done = call(environment, "train", "--resume", path)
    assert done.returncode == 0, done.stderr
    assert "continuing after step 6" in done.stdout
    check_equal(Run(path), uninterrupted)
    assert not list(path.rglob("*.partial"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(whole, environment, tmp_path, number, code, monkeypatch):
    recipe, uninterrupted = whole
    path = tmp_path / "run"
    child = subprocess.Popen(
        command("train", recipe, "--out", path, driver=WAIT),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in child.stdout:
            if line.startswith("step 3/8"):
                break
        child.send_signal(number)
        out, err = child.communicate("\n", timeout=120)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == code, err
    assert err == ""
    # should_stop was asked before step 3 was shown, so step 4 is the one after which it stops
    assert f"stopped after step 4 and saved; continue with: abyssal train --resume {path}" in out
    assert Run(path).steps()[-1] == 4

    monkeypatch.setattr("sys.argv", ["abyssal", "train", "--resume", str(path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    check_equal(Run(path), uninterrupted)


def test_a_full_disk(whole, environment, tmp_path, monkeypatch):
    recipe, uninterrupted = whole
    path = tmp_path / "run"
    size = (uninterrupted.checkpoint(8) / "model.safetensors").stat().st_size
    done = call(environment, size + 1000, "train", recipe, "--out", path, driver=FULL_DISK)
    assert done.returncode == 2
    assert done.stderr.startswith(f"abyssal: error: {path}/checkpoints/step-00000004.partial/training.safetensors: ")
    assert done.stderr.count("\n") == 1
    assert Run(path).steps() == [2, 3]
    assert not list(path.rglob("*.partial"))
    abyssal.load(path)
    monkeypatch.setattr("sys.argv", ["abyssal", "train", "--resume", str(path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    check_equal(Run(path), uninterrupted)


def test_a_learning_rate_that_ruins_everything(whole, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run"
    arguments = ["optimizer.lr=1e30", "schedule.warmup=0", "checkpoint.every=1", "samples.prompts=[]"]
    monkeypatch.setattr("sys.argv", ["abyssal", "train", str(whole[0]), "--out", str(path), *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    err = capsys.readouterr().err
    assert caught.value.code == 2
    run = Run(path)
    assert err.startswith("abyssal: error: step 2: the ")  # weights of 1e30: step 1 is the last with finite numbers
    assert f"is nan; the last good checkpoint is {run.checkpoint(1)}; begin anew with a lower optimizer.lr" in err
    assert err.count("\n") == 1
    assert run.steps() == [1]
    assert [r["step"] for r in run.metrics()] == [1]
    model, _ = abyssal.load(path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_errors_in_a_process_of_its_own(environment, tmp_path):
    done = call(environment, "train", "dmo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "abyssal: error: recipe 'dmo': no such recipe (did you mean 'demo'?)\n"


def test_a_pipe_that_closes(environment):
    """`abyssal inspect demo | head -1` ends without a word on stderr."""
    child = subprocess.Popen(
        command("inspect", "demo"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdout.close()
    assert child.stderr.read() == ""
    child.wait(timeout=120)
