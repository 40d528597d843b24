"""Jobs that torchrun starts and that something befalls: they end soon, with one line, and go on exactly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import figures, same, tiny_recipe

import abyssal
from abyssal.checkpoint import sharded
from abyssal.checkpoint.run import Run

JOB = Path(__file__).with_name("torchrun_job.py")
LIMIT = 200.0  # seconds until a job counts as hung: less than the 300 s that a collective waits


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """12 steps on two processes, saved every 4."""
    data = tiny_recipe(tmp_path)
    data["training"] |= {"steps": 12, "accumulate": 1, "recompute": False}
    data |= {"parallel": {"shard": 2}, "samples": {"prompts": ["a"]}, "checkpoint": {"every": 4, "keep": 9}}
    data["validation"] = {"every": 100, "batches": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    return str(tmp_path / "tiny.yaml")


class Job:
    """A torchrun of two processes with ``commands``; ``results[command][rank]`` is what they said."""

    def __init__(self, folder: Path, commands: list[dict[str, Any]], *options: str) -> None:
        self.folder, self.commands = folder / "results", commands
        self.folder.mkdir()
        plan = folder / "plan.json"
        plan.write_text(json.dumps({"commands": commands, "results": str(self.folder)}))
        self.torchrun = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
                *(*options, str(JOB), str(plan)),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self) -> Job:
        """Waits until it has ended."""
        try:
            self.out, self.err = self.torchrun.communicate(timeout=LIMIT)
        finally:
            if self.torchrun.poll() is None:
                os.killpg(self.torchrun.pid, signal.SIGKILL)
        self.code = self.torchrun.returncode
        self.results = [
            [json.loads(p.read_text()) if (p := self.folder / f"{n}-{rank}.json").exists() else None for rank in (0, 1)]
            for n in range(len(self.commands))
        ]
        return self

    @property
    def errors(self) -> list[str]:
        """Our lines on stderr."""
        return re.findall(r"abyssal: error: (.*)", self.err)

    @property
    def codes(self) -> dict[int, int]:
        """The processes' exit codes as torchrun reports them."""
        found = re.findall(r"rank +: (\d+) .*\n *exitcode +: (-?\d+)", self.err)
        return {int(rank): int(code) for rank, code in found}


def train(*arguments: object, **more: Any) -> dict[str, Any]:
    return {"arguments": ["train", *map(str, arguments)], **more}


def check_equal(run: Run, whole: Run) -> None:
    """Losses, weights, optimizer, balancers: bit for bit."""
    assert figures(run.metrics()) == figures(whole.metrics())
    assert run.state(12) == whole.state(12)
    assert same(sharded.read_all(run.checkpoint(12), ""), sharded.read_all(whole.checkpoint(12), ""))


def test_killed_in_a_step_asked_to_stop_killed_in_a_save(recipe: str, tmp_path: Path) -> None:
    """All of it happens to one process. Each time all end, and torchrun starts the job anew, which goes on by itself:
    the run comes to what it would have come to undisturbed."""
    path, whole = tmp_path / "run", tmp_path / "whole"
    commands = [train(recipe, "--out", path, fault=["one_after_another", 1, str(path)]), train(recipe, "--out", whole)]
    job = Job(tmp_path, commands, "--max-restarts", "3").end()
    assert job.code == 0, job.err
    assert re.findall(r"(stopped|continuing) after step (\d+)", job.out) == [
        ("continuing", "4"),
        ("stopped", "6"),
        ("continuing", "6"),
        ("continuing", "6"),
    ]
    assert f"stopped after step 6 and saved; continue with: abyssal train --resume {path}" in job.out
    assert len(job.errors) == 2
    assert all("another process of this job has ended" in line for line in job.errors)
    assert "Traceback" not in job.err
    check_equal(Run(path), Run(whole))
    assert not list(path.rglob("*.partial"))
    left = Run(tmp_path / "run-left")
    assert left.steps() == [4, 6]
    abyssal.load(left.path)


def test_the_job_is_asked_to_stop(recipe: str, tmp_path: Path) -> None:
    """torchrun hands the signal on; that the processes get it once more makes no difference."""
    path = tmp_path / "run"
    job = Job(tmp_path, [train(recipe, "--out", path, fault=["waiting_for_signals", 6, str(tmp_path)])])
    limit = time.monotonic() + LIMIT
    while len(list(tmp_path.glob("waiting-*"))) < 2 and job.torchrun.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    job.torchrun.send_signal(signal.SIGTERM)
    job.end()
    assert f"stopped after step 6 and saved; continue with: abyssal train --resume {path}" in job.out, job.err
    assert [result["code"] for result in job.results[0]] == [143, 143]
    assert job.errors == []
    assert Run(path).steps() == [4, 6]
    abyssal.load(path)


def test_what_is_wrong_is_said_once(recipe: str, tmp_path: Path) -> None:
    """By one process, on one line; all end with 2, and nothing is changed."""
    run, other, late = tmp_path / "run0", tmp_path / "run1", tmp_path / "late"
    part = str(other / "checkpoints/step-00000012/sharded/shard-00002-model-00001-of-00001.safetensors")
    wrong: list[tuple[str, dict[str, Any]]] = [
        (r"parallel: .* = 4 processes; there are 2 \(torchrun", train(recipe, "parallel.shard=4")),
        (
            r"parallel\.expert: 2 does not divide the 5 routed experts",
            train(recipe, "parallel.expert=2", "model.moe.n_routed_experts=5"),
        ),
        (
            r"parallel\.tensor: 2 does not divide the model's num_attention_heads 3",
            train(recipe, "parallel.shard=1", "parallel.tensor=2", "model.attention.num_attention_heads=3"),
        ),
        (r"recipe: seed: 1 on process 1, seed: 0 on process 0; all have to", train(recipe, "training.seed={rank}")),
        (r".*training\.steps: 0 is not valid", train(recipe, "training.steps={rank}")),
        (r"process 1: .*training\.seed: ", train(recipe, "training.seed=-{rank}")),
        (r"process 1: \S+/1/run: not what process 0 has there", train(recipe, "--out", tmp_path / "{rank}" / "run")),
        (r"\S+run0: this run exists; continue it with", train(recipe, "--out", run)),
        (
            r"\S+run0: this run belongs to another recipe: optimizer\.lr",
            train(recipe, "optimizer.lr=1", "--resume", run),
        ),
        (r".* another recipe: model\.hidden_size", train(recipe, "model.hidden_size=64", "--resume", run)),
        (r"process 1: \S+run1: no such run folder", train("--resume", tmp_path / "run{rank}")),
        (
            r"process 1: \S+run1: not what process 0 has there",
            train("--resume", tmp_path / "run{rank}", fault=["copied", str(run), str(other)]),
        ),
        (r"\S+/sharded: not a readable checkpoint", train("--resume", other, fault=["cut", part])),
        (r"\S+/sharded: .*: \[\d.*, expected \[", train("--resume", other, fault=["lost", part])),
        (
            r"step 6: the gradient norm is nan; the last good checkpoint is \S+/nan/checkpoints/step-00000004;",
            train(recipe, "--out", tmp_path / "nan", fault=["nan", 1, 6]),
        ),
        (
            r"\S+/full/checkpoints/step-00000008.partial/sharded: process 1: File too large",
            train(recipe, "--out", tmp_path / "full", fault=["full_disk", 1, 6, str(tmp_path / "full")]),
        ),
    ]
    right = [
        train(recipe, "--out", run, "checkpoint.background=false"),
        train(recipe, "--out", late, fault=["slow_disk", 4, 7]),
    ]
    last = train(recipe, "training.seed={rank}")
    job = Job(tmp_path, [*right, *(command | {"expected": True} for _, command in wrong), last]).end()

    assert [[result["code"] for result in ranks] for ranks in job.results] == [[0, 0]] * 2 + [[2, 2]] * (len(wrong) + 1)
    for (match, _), ranks in zip(wrong, job.results[2:], strict=False):
        stderr = "".join(result["stderr"] for result in ranks)
        assert re.fullmatch(f"abyssal: error: {match}.*\n", stderr), stderr
    assert (job.code, job.codes) == (1, {0: 2, 1: 2}), job.err

    began = (job.folder / "1-0.json").stat().st_mtime
    assert not [p for p in run.rglob("*") if p.is_file() and p.stat().st_mtime > began and p.name != ".lock"]
    for name in ("nan", "full"):
        assert Run(tmp_path / name).steps() == [4]
        abyssal.load(tmp_path / name)
    # What was written while training went on is what was written while it stood still.
    check_equal(Run(late), Run(run))
    for step in (4, 8):
        assert same(*(sharded.read_all(Run(path).checkpoint(step), "") for path in (late, run)))


@pytest.mark.slow
def test_what_one_process_alone_finds_out(recipe: str, tmp_path: Path) -> None:
    """The others wait for it in the middle of a step; so it speaks itself, and they follow."""
    job = Job(tmp_path, [train(recipe, "--out", tmp_path / "run", fault=["unreadable", 1, 6])]).end()
    assert job.errors == ["tokens.bin: Input/output error"]
    assert (job.code, job.codes) == (1, {0: 2, 1: 2}), job.err
    assert Run(tmp_path / "run").steps() == [4]
