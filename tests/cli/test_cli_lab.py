"""``abyssal lab``: what is listed, and what is refused, in one line and before anything is made."""

from __future__ import annotations

import builtins

import pytest

from abyssal.cli import main
from abyssal.lab.recipe import lab_names


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["abyssal", "lab", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        return caught.value.code, out.out, out.err

    return run


def test_without_a_name_all_are_listed(cli):
    code, out, _ = cli()
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == lab_names()
    assert out.count("?") == len(lab_names())


def test_print_config_shows_every_arm_and_runs_nothing(cli, tmp_path):
    code, out, _ = cli("balancing", "training.steps=77", "--print-config")
    assert code == 0
    assert "steps: 77" in out
    assert "bias, γ 0.1" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["balansing"], "did you mean 'balancing'"),
        (["nothing-like-it"], "known: ablation, balancing, context, conversion, dense, finetuning, granularity"),
        (["balancing", "--size", "xl"], "--size: 'xl' is not one of cpu, gpu"),
        (["balancing", "--seeds", "1"], "seeds: 1"),
        (["balancing", "--jobs", "0"], "--jobs: 0 is not valid"),
        (["balancing", "steps"], "steps"),
        (["balancing", "training.stepz=3"], "training.stepz"),
        (["balancing", "training.device=warp"], "training.device: 'warp' cannot be used here"),
        (["balancing", "--report", "taken.txt"], "taken.txt is a file; expected a folder"),
        (["balancing", "--out", "taken.txt"], "--out: taken.txt is a file; expected a folder"),
        (["balancing", "--out", "mine"], "mine: exists and is no lab's folder"),
    ],
)
def test_refused_in_one_line_with_nothing_made(cli, tmp_path, arguments, said):
    (tmp_path / "taken.txt").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = cli(*arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_extra_is_named_before_anything_is_trained(cli, tmp_path, monkeypatch):
    there = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return there(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = cli("balancing")
    assert code == 2
    assert "pip install 'abyssal[plot]'" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
