"""``abyssal eval``, in-process."""

import gzip
import json
import math

import pytest
import torch
import yaml
from tiny_runs import MODEL

import abyssal
from abyssal.checkpoint import save_model
from abyssal.cli import main
from abyssal.config import ModelConfig
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.model import Transformer


@pytest.fixture
def folder(tmp_path):
    """A model and its tokenizer."""
    path = tmp_path / "model"
    path.mkdir()
    torch.manual_seed(0)
    save_model(Transformer(ModelConfig.model_validate(MODEL)), path)
    byte_tokenizer().save(path)
    return path


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """Runs the command line in tmp_path; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["abyssal", "eval", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        return caught.value.code, out.out, out.err

    return run


@torch.no_grad()
def plain_nats(folder, text):
    """Sum of -log p over a text that fits into the context."""
    model, _ = abyssal.load(folder, dtype=torch.float64)
    ids = torch.tensor([[0] + [2 + byte for byte in text.encode()]])
    return -float(model(ids[:, :-1])[0].log_softmax(-1).gather(1, ids[:, 1:].T).sum())


class TestPerplexity:
    def test_json(self, cli, folder, tmp_path):
        texts = ["tea at dawn", "été"]
        with gzip.open(tmp_path / "texts.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(json.dumps({"text": text}) for text in texts))
        code, out, err = cli(folder, "--perplexity", "texts.jsonl.gz", "--json")
        assert (code, err) == (0, "")
        nats = sum(plain_nats(folder, text) for text in texts)
        size = sum(len(text.encode()) for text in texts)
        assert json.loads(out) == {
            "perplexity": {
                "file": "texts.jsonl.gz",
                "nats": pytest.approx(nats / size, rel=1e-5),
                "perplexity": pytest.approx(math.exp(nats / size), rel=1e-5),
                "bits_per_byte": pytest.approx(nats / size / math.log(2), rel=1e-5),
                "tokens": size,
                "bytes": size,
                "documents": 2,
            }
        }

    def test_table(self, cli, folder, tmp_path):
        (tmp_path / "a.txt").write_text("seven wizards brew strong black tea at dawn " * 30)
        options = ("--context", 16, "--stride", 4, "--batch-size", 3, "--device", "cpu", "--dtype", "bf16")
        code, out, err = cli(folder, "--perplexity", "a.txt", *options)
        assert (code, err) == (0, "")
        figures = json.loads(cli(folder, "--perplexity", "a.txt", *options, "--json")[1])["perplexity"]
        assert figures["nats"] != json.loads(cli(folder, "--perplexity", "a.txt", "--json")[1])["perplexity"]["nats"]
        header, row = out.splitlines()
        assert header.split()[:2] == ["text", "perplexity"]
        numbers = [f"{figures[name]:.4f}" for name in ("perplexity", "nats", "bits_per_byte")]
        assert row.split() == ["a.txt", *numbers, "1,320", "1,320", "1"]


class TestTasks:
    @pytest.fixture
    def tasks(self, tmp_path, monkeypatch):
        """A folder with one task, and no way to the network or to lm_eval's own tasks."""
        pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
        import datasets
        import lm_eval.tasks.manager

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked for"))
        monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tmp_path / "own" / "manager.py"))
        path = tmp_path / "tasks"
        path.mkdir()
        rows = [{"text": "tea at", "choices": [" dawn", " dusk"], "gold": index % 2} for index in range(4)]
        (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task = {
            "task": "tea",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path / "data.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "text",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (path / "tea.yaml").write_text(yaml.safe_dump(task))
        return path

    def test_both(self, cli, folder, tasks, tmp_path):
        (tmp_path / "a.txt").write_text("tea at dawn")
        options = ("--tasks", "tea,", "--include-path", tasks, "--perplexity", "a.txt")
        code, out, _ = cli(folder, *options, "--json")  # stderr: bars of lm_eval's, as tqdm was imported long ago
        assert code == 0
        data = json.loads(out)
        assert data["perplexity"]["tokens"] == 11
        assert data["tasks"]["results"]["tea"]["acc,none"] == 0.5  # the same two choices, each right half the time
        code, out, _ = cli(folder, *options, "--limit", 3)
        assert code == 0
        lines = [line.split() for line in out.splitlines()]
        assert lines[1][:1] == ["a.txt"]
        assert lines[-1][:2] == ["tea", "acc"]
        assert lines[-1][2] in ("0.3333", "0.6667")
        assert lines[-1][-2:] == ["0", "3"]

    def test_unknown(self, cli, folder, tasks):
        code, _, err = cli(folder, "--tasks", "tee", "--include-path", tasks)
        assert (code, err.count("\n")) == (2, 1)
        assert "tasks: 'tee' is not known to lm-evaluation-harness (did you mean 'tea'?)" in err


class TestErrors:
    @pytest.fixture
    def refused(self, cli):
        def run(*arguments):
            code, out, err = cli(*arguments)
            assert (code, out, err.count("\n")) == (2, "", 1), err
            assert err.startswith("abyssal: error: ")
            return err

        return run

    def test_nothing_asked(self, refused, folder):
        assert "give --perplexity FILE, --tasks NAMES or both" in refused(folder)
        assert "give --perplexity FILE, --tasks NAMES or both" in refused(folder, "--tasks", " ,")

    def test_files(self, refused, folder, tmp_path):
        assert "gone.txt: no such file" in refused(folder, "--perplexity", "gone.txt")
        (tmp_path / "empty.txt").write_text("")
        assert "empty.txt: the corpus is empty" in refused(folder, "--perplexity", "empty.txt")
        (tmp_path / "a.pdf").write_text("x")
        assert "a.pdf: files of this kind are not read" in refused(folder, "--perplexity", "a.pdf")

    def test_model(self, refused, folder, tmp_path):
        (tmp_path / "a.txt").write_text("tea")
        assert "gone: no such run or folder" in refused("gone", "--perplexity", "a.txt")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        assert "no tokenizer.json" in refused(folder, "--perplexity", "a.txt")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--context", "200"), "context: 200"),
            (("--context", "16", "--stride", "17"), "stride: 17"),
            (("--batch-size", "0"), "batch_size: 0"),
            (("--dtype", "floot32"), "--dtype: 'floot32' is not one of auto, bf16"),
            (("--device", "toaster"), "--device: 'toaster'"),
        ],
    )
    def test_options(self, refused, folder, tmp_path, options, message):
        (tmp_path / "a.txt").write_text("tea at dawn")
        assert message in refused(folder, "--perplexity", "a.txt", *options)
