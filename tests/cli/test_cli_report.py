"""`abyssal report` and `abyssal train --live` as commands: what is written where, and what is refused."""

import json
import re
import shutil
import socket

import pytest
import yaml
from tiny_runs import tiny_recipe, tiny_trainer

from abyssal.cli import main


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """Runs the command line in tmp_path; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["abyssal", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        return caught.value.code, out.out, out.err

    return run


@pytest.fixture
def refused(cli, tmp_path):
    """Runs what must be refused and gives the message; nothing may appear, vanish or change."""

    def listing():
        found = {p.relative_to(tmp_path): p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}
        return {path: content for path, content in found.items() if path.name != ".lock"}

    def run(*arguments):
        before = listing()
        code, out, err = cli(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("abyssal: error: ")
        assert listing() == before
        return err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data = tiny_recipe(folder)
    data["training"] |= {"steps": 2, "accumulate": 1}
    data["schedule"] = {}
    tiny_trainer(data, folder / "run").train()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    return folder


@pytest.fixture
def run_folder(trained, tmp_path):
    return shutil.copytree(trained / "run", tmp_path / "runs" / "first")


class TestReport:
    def test_one_run(self, cli, run_folder):
        code, out, err = cli("report", run_folder)
        assert (code, err) == (0, "")
        file = run_folder / "report.html"
        assert re.fullmatch(rf"report  {file} \(\d\.\d\d MB\)\n", out)
        assert file.stat().st_size < 5e6
        assert cli("report", run_folder)[0] == 0  # a report of ours is replaced

    def test_several_runs(self, cli, run_folder, tmp_path):
        second = shutil.copytree(run_folder, tmp_path / "runs" / "second")
        code, out, err = cli("report", run_folder, second)
        assert (code, err) == (0, "")
        assert out.startswith("report  report.html (")
        assert (tmp_path / "report.html").is_file()
        assert not (run_folder / "report.html").exists()

    def test_out(self, cli, run_folder, tmp_path):
        assert cli("report", run_folder, "--out", "here.html")[0] == 0
        assert (tmp_path / "here.html").is_file()
        assert not (run_folder / "report.html").exists()

    def test_open(self, cli, run_folder, monkeypatch):
        opened = []
        monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
        assert cli("report", run_folder, "--open")[0] == 0
        assert opened == [(run_folder / "report.html").as_uri()]
        monkeypatch.setattr("webbrowser.open", lambda url: False)
        assert "no browser was found" in cli("report", run_folder, "--open")[1]

    def test_somebody_elses_file(self, refused, run_folder, tmp_path):
        (tmp_path / "thesis.html").write_text("<!doctype html><p>years of work")
        assert "exists and is none of ours" in refused("report", run_folder, "--out", "thesis.html")

    def test_where_nothing_can_be_written(self, refused, run_folder, tmp_path):
        assert "no such folder: nowhere" in refused("report", run_folder, "--out", "nowhere/report.html")
        assert "a folder; expected a file" in refused("report", run_folder, "--out", tmp_path)
        (tmp_path / "file").write_text("x")
        assert "no such folder" in refused("report", run_folder, "--out", "file/report.html")
        assert "File name too long" in refused("report", run_folder, "--out", "x" * 253)

    def test_no_run(self, refused, tmp_path):
        assert "nowhere: no such run folder" in refused("report", "nowhere")
        (tmp_path / "thesis").mkdir()
        assert "thesis: not a run folder" in refused("report", "thesis")
        assert "runs" in refused("report")

    def test_no_metrics(self, refused, run_folder):
        (run_folder / "metrics.jsonl").write_text("")
        assert "metrics.jsonl: no training step in it" in refused("report", run_folder)
        (run_folder / "metrics.jsonl").unlink()
        assert "metrics.jsonl: no such file; this run has no metrics yet" in refused("report", run_folder)


class TestLive:
    def test_the_page_is_named_once_and_the_figures_are_the_same(self, cli, trained, tmp_path):
        def plain(out):
            return [
                line
                for line in out.splitlines()
                if not re.match(r"step|training|run folder|try|live|.*run folder", line)
            ]

        code, with_page, err = cli("train", trained / "tiny.yaml", "--out", "live", "--live", "--port", "0")
        assert (code, err) == (0, "")
        assert len(re.findall(r"live page http://127\.0\.0\.1:\d+/\n", with_page)) == 1
        code, without, _ = cli("train", trained / "tiny.yaml", "--out", "plain")
        assert code == 0
        assert plain(with_page) == plain(without)
        assert {p.name for p in (tmp_path / "live").iterdir()} == {p.name for p in (tmp_path / "plain").iterdir()}

    def test_resumed(self, cli, run_folder):
        code, out, err = cli("train", "--resume", run_folder, "training.steps=3", "--live", "--port", "0")
        assert (code, err) == (0, "")
        assert "live page http://127.0.0.1:" in out
        steps = [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1] == 3

    def test_a_port_in_use(self, refused, trained):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            err = refused("train", trained / "tiny.yaml", "--out", "run", "--live", "--port", port)
        assert f"--port {port}: Address already in use" in err

    @pytest.mark.parametrize("port", ["-1", "65536", "http"])
    def test_no_port(self, refused, trained, port):
        assert "--port" in refused("train", trained / "tiny.yaml", "--out", "run", "--live", "--port", port)

    def test_a_port_for_nothing(self, refused, trained):
        assert "give --live too" in refused("train", trained / "tiny.yaml", "--out", "run", "--port", "0")

    def test_what_is_wrong_is_said_with_a_page_too(self, refused, trained, run_folder):
        err = refused("train", trained / "tiny.yaml", "--out", run_folder, "--live", "--port", "0")
        assert "--overwrite" in err
