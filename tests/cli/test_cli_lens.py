"""``abyssal lens``, in-process."""

import json
import os

import numpy as np
import pytest
import torch
from tiny_runs import MODEL, tiny_recipe, tiny_trainer

import abyssal
from abyssal.analysis.lens import look, read_texts
from abyssal.checkpoint import save_model
from abyssal.cli import main
from abyssal.config import ModelConfig
from abyssal.data.tokenizer import byte_tokenizer, train_bpe
from abyssal.model import Transformer


def write_model(path, tokenizer=None, seed=0, **changes):
    path.mkdir()
    torch.manual_seed(seed)
    save_model(Transformer(ModelConfig.model_validate(MODEL | changes)), path)
    if tokenizer is not None:
        tokenizer.save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model", byte_tokenizer())


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text("seven wizards brew strong black tea at dawn\n" * 4)
    return "a.txt"


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """Runs the command line in tmp_path; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["abyssal", "lens", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        return caught.value.code, out.out, out.err

    return run


def test_table_page_and_measures(cli, folder, text, tmp_path):
    (tmp_path / "b.txt").write_text("ein Text\n<|endoftext|>\nnoch einer\n")
    code, out, err = cli("model", "--text", text, "--text", "b.txt", "--json", "m.json", "--tokens", 100)
    assert (code, err) == (0, "")
    assert "a: 100 tokens; the rest of the text is left out" in out
    assert "b: 22 tokens in 2 documents\n" in out
    assert "2 (MTP)" in out
    assert max(map(len, out.splitlines())) <= 100
    assert "page  lens.html" in out
    assert (tmp_path / "lens.html").read_text().startswith("<!doctype html>")
    data = json.loads((tmp_path / "m.json").read_text())
    assert [text["name"] for text in data["texts"]] == ["a", "b"]
    model, tokenizer = abyssal.load(folder)
    texts = read_texts([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, 128, 100)
    for layer, found in look(model, texts).items():
        row = next(row for row in data["layers"] if row["layer"] == layer)
        assert row["load"] == np.bincount(found.indices[found.seen].ravel(), minlength=4).tolist()
        assert row["shared"] == pytest.approx(float(found.shared[found.seen].mean()), rel=1e-5)
        assert row["moved_tokens"] == 0  # the bias of a new model


def test_compare_with_itself_and_with_another(cli, folder, text, tmp_path):
    write_model(tmp_path / "other", byte_tokenizer(), seed=1)
    for name, overlap in (("model", True), ("other", False)):
        code, out, err = cli("model", "--text", text, "--compare", name, "--json", "m.json", "--out", "c.html")
        assert (code, err) == (0, "")
        assert "drift, layer" in out
        data = json.loads((tmp_path / "m.json").read_text())
        assert data["compared_with"] == name
        assert all((row["drift"]["overlap"] == 1) == overlap for row in data["layers"])
        assert (data["most_changed"] == []) == overlap


def test_a_run_takes_its_page_in(cli, text, tmp_path):
    trainer = tiny_trainer(tiny_recipe(tmp_path), tmp_path / "run", training__steps=1)
    trainer.train()
    code, _, err = cli("run", "--text", text)
    assert (code, err) == (0, "")
    assert (tmp_path / "run" / "lens.html").is_file()
    assert cli("run", "--text", text)[0] == 0  # ours may be written again


def test_built_in_text_and_other_fields(cli, folder, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "How many ducks?"}\n')
    code, out, err = cli(
        "model", "--text", "tinyshakespeare", "--text", "q.jsonl", "--field", "question", "--tokens", 50
    )
    assert (code, err) == (0, "")
    assert "tinyshakespeare: 50 tokens; the rest" in out


def test_names_are_no_markup(cli, tmp_path, text):
    name = "[bold]<script>&amp;\x1b[31m"
    write_model(tmp_path / name, byte_tokenizer())
    os.rename(tmp_path / text, tmp_path / f"{name}.txt")
    code, out, err = cli(name, "--text", f"{name}.txt")
    assert (code, err) == (0, "")
    assert "[bold]<script>&amp;\\x1b[31m: 177 tokens" in out
    assert "\x1b[31m" not in out
    page = (tmp_path / "lens.html").read_text()
    assert "<title>Routing of [bold]&lt;script&gt;&amp;amp;␛[31m</title>" in page
    assert "\x1b" not in page


class TestBadInput:
    def fails(self, result):
        code, _, err = result
        assert code == 2
        assert err.startswith("abyssal: error: ")
        assert err.count("\n") == 1
        return err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("model", "--text", "none.txt"), "none.txt: no such file or folder"),
            (("model", "--text", "empty.txt"), "empty.txt: the corpus is empty"),
            (("model", "--text", "latin.txt"), "latin.txt: not UTF-8 at byte 1"),
            (("model", "--text", "model"), "model: a folder; expected a file"),
            (("model", "--text", "a.txt", "--text", "./a.txt"), "a.txt: given twice"),
            (("model", "--text", "a.txt", "--tokens", "0"), "--tokens: 0 is not valid"),
            (("model", "--text", "a.txt", "--window", "129"), "--window: 129 is not between 1 and"),
            (("model", "--text", "a.txt", "--out", "none/x.html"), "--out: none/x.html: no such folder: none"),
            (("model", "--text", "a.txt", "--out", "a.txt"), "--out: a.txt exists and is none of ours"),
            (("model", "--text", "a.txt", "--out", "model"), "--out: model is a folder"),
            (("model", "--text", "a.txt", "--json", "a.txt"), "--json: a.txt exists and is none of ours"),
            (("demo", "--text", "a.txt"), "demo: a preset has neither weights nor a tokenizer; expected a run"),
            (("dense", "--text", "a.txt"), "dense: a model without MoE layers"),
            (("silent", "--text", "a.txt"), "silent: no tokenizer.json"),
            (("wrong", "--text", "a.txt"), "is outside the model's vocabulary of 258"),
            (("model", "--text", "a.txt", "--compare", "dense"), "dense: a model without MoE layers"),
            (("model", "--text", "a.txt", "--compare", "merged"), "merged has another tokenizer than model"),
            (("model", "--text", "a.txt", "--compare", "wide"), "wide has other experts a layer than model: 8, not 4"),
            (("model", "--text", "a.txt", "--compare", "deep"), "deep has other MoE layers than model"),
            (("none", "--text", "a.txt"), "none: no such run or folder"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_one_line(self, cli, folder, text, tmp_path, arguments, message):
        (tmp_path / "empty.txt").write_text(" \n")
        (tmp_path / "latin.txt").write_bytes(b"x\xe9t\xe9")
        merged = train_bpe(["seven wizards brew strong black tea at dawn\n"], 300)
        if "dense" in arguments:
            write_model(tmp_path / "dense", byte_tokenizer(), moe=None)
        elif "silent" in arguments:
            write_model(tmp_path / "silent")
        elif "wrong" in arguments:
            write_model(tmp_path / "wrong", merged)
        elif "merged" in arguments:
            write_model(tmp_path / "merged", merged, vocab_size=300)
        elif "wide" in arguments:
            write_model(tmp_path / "wide", byte_tokenizer(), moe=MODEL["moe"] | {"n_routed_experts": 8})
        elif "deep" in arguments:
            write_model(tmp_path / "deep", byte_tokenizer(), num_hidden_layers=3)
        before = (tmp_path / text).read_text()
        assert message in self.fails(cli(*arguments))
        assert (tmp_path / text).read_text() == before
        assert not (tmp_path / "lens.html").exists()
