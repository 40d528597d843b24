"""``abyssal tune`` as it is used, and one line for whatever is wrong with what it is given."""

import json
import sys

import pytest
from tiny_tuning import write_base, write_pairs, write_questions

from abyssal.cli import main

QUICK = [
    "training.steps=4",
    "training.batch_size=2",
    "training.sequence_length=48",
    "training.dtype=float32",
    "training.device=cpu",
    "data.validation_fraction=0.2",
    "drift.tokens=64",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_base(tmp_path_factory.mktemp("model")))


@pytest.fixture
def questions(tmp_path):
    return str(write_questions(tmp_path / "questions.jsonl"))


@pytest.fixture
def abyssal(monkeypatch, capsys):
    """Runs a command; gives its exit code, what it printed, and what it said of errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["abyssal", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_lora_says_what_it_adapts_and_how_routing_moved(abyssal, base, questions, tmp_path):
    run = str(tmp_path / "run")
    code, out, err = abyssal("tune", base, questions, *QUICK, "--rank", "4", "--out", run)
    assert (code, err) == (0, "")
    assert "24 records: 24 examples (5 held out)" in out
    assert "self_attn.q_a_proj" in out
    assert "mlp.experts.gate_up_proj 1 x [4, 32, 32], rank 4" in out
    assert "trained: " in out
    assert "routing drift, layer" in out
    assert f"try         abyssal chat {run}" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["drift"]) == {"1"}
    assert 0 <= summary["drift"]["1"]["overlap"] <= 1
    code, out, err = abyssal("generate", run, "Q:the\nA:", "--tokens", "4")
    assert code == 0, err
    code, out, err = abyssal("export", run, str(tmp_path / "merged"), "--force")
    assert code == 0, err
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog")
    for words in (["report", run], ["inspect", run], ["eval", run, "--perplexity", str(text)]):
        code, out, err = abyssal(*words)
        assert code == 0, err


def test_experts_alone(abyssal, base, questions, tmp_path):
    code, out, err = abyssal(
        "tune", base, questions, *QUICK, "--method", "esft", "esft.p=0.4", "--out", str(tmp_path / "run")
    )
    assert code == 0, err
    assert "layer 1: " in out
    assert "chosen on" in out
    code, out, err = abyssal("export", str(tmp_path / "run"), str(tmp_path / "whole"), "--force")
    assert code == 0, err


def test_preferences_in_pairs(abyssal, base, tmp_path):
    data = str(write_pairs(tmp_path / "pairs.jsonl"))
    code, out, err = abyssal("tune", base, data, *QUICK, "--out", str(tmp_path / "run"))
    assert code == 0, err
    assert "nats a pair, accuracy" in out


def test_a_recipe_in_a_file(abyssal, base, questions, tmp_path):
    code, out, _ = abyssal("tune", base, questions, *QUICK, "--print-config")
    assert code == 0
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(out)
    code, out, err = abyssal("tune", str(recipe), "lora.rank=2", "--out", str(tmp_path / "run"))
    assert code == 0, err
    assert "rank 2" in out


def test_other_settings_when_a_run_goes_on(abyssal, base, questions, tmp_path):
    run = str(tmp_path / "run")
    assert abyssal("tune", base, questions, *QUICK, "--out", run)[0] == 0
    code, _, err = abyssal("tune", "--resume", run, "lora.rank=16")
    assert code == 2
    assert "this run belongs to another recipe: lora.rank is 8 there, 16 here" in err
    code, out, err = abyssal("tune", "--resume", run, "training.steps=6")
    assert code == 0, err
    assert "continuing after step 4" in out
    code, _, err = abyssal("train", "--resume", run)
    assert code == 2
    assert "a run of abyssal tune; continue it with: abyssal tune --resume" in err


def line(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


CHAT = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([{"question": "a", "answer": "b"}, {"question": "a"}], "data.jsonl, line 2: "),
        ([{"messages": [CHAT]}, {"messages": "hello"}], "data.jsonl, line 2: "),
        ([{"messages": [{"role": "king", "content": "x"}]}], "data.jsonl, line 1: "),
        ([{"messages": [{"content": "x"}]}], "data.jsonl, line 1: "),
        ([{"colour": "red"}], "data.jsonl, line 1: "),
        ([{"prompt": "x", "chosen": "y"}], "data.jsonl, line 1: "),
        ([], "data.jsonl"),
    ],
)
def test_records_that_cannot_be_used(abyssal, base, tmp_path, records, expected):
    data = line(tmp_path / "data.jsonl", *records)
    code, _, err = abyssal("tune", base, data, *QUICK, "--out", str(tmp_path / "run"))
    assert code == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rank", "1000"], "lora.rank: 1000 is larger than a side of model.layers.0"),
        (["lora.targets=[q_prij]"], "q_prij"),
        (["lora.targets=[lm_head]"], "lm_head"),
        (["--method", "lara"], "method"),
        (["--weights", "nf3"], "weights"),
        (["--method", "full", "--weights", "int8"], "weights: int8 holds what is not trained"),
        (["data.template=missing.jinja"], "missing.jinja"),
        (["training.sequence_length=4"], "questions.jsonl"),
        (["training.device=tpu"], "training.device"),
        (["--port", "1"], "--port 1: what --live serves on"),
    ],
)
def test_settings_that_cannot_be_used(abyssal, base, questions, tmp_path, words, expected):
    code, _, err = abyssal("tune", base, questions, *QUICK, *words, "--out", str(tmp_path / "run"))
    assert code == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_is_missing(abyssal, base, questions, tmp_path):
    assert "which model, and which data?" in abyssal("tune")[2]
    assert "which data?" in abyssal("tune", base)[2]
    assert "no such run or folder" in abyssal("tune", "nothing", questions)[2]
    assert "nothing.jsonl" in abyssal("tune", base, "nothing.jsonl")[2]
    assert "no such run folder" in abyssal("tune", "--resume", str(tmp_path / "none"))[2]
    assert "leave" in abyssal("tune", base, questions, "--resume", str(tmp_path))[2]


def test_a_tokenizer_without_a_template(abyssal, tmp_path, questions):
    from tiny_runs import MODEL

    from abyssal import Transformer, export
    from abyssal.config import resolve_model
    from abyssal.data.tokenizer import byte_tokenizer

    plain = export(Transformer(resolve_model(MODEL)), tmp_path / "plain", tokenizer=byte_tokenizer(), force=True)
    code, _, err = abyssal("tune", str(plain), questions, *QUICK, "--out", str(tmp_path / "run"))
    assert code == 2
    assert "template" in err
    assert "data.template" in err
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    code, _, err = abyssal(
        "tune", str(plain), questions, *QUICK, f"data.template={template}", "--out", str(tmp_path / "run")
    )
    assert code == 0, err


def test_an_adapter_of_another_base(abyssal, base, questions, tmp_path):
    other = write_base(tmp_path, num_hidden_layers=3)
    run = str(tmp_path / "run")
    assert abyssal("tune", base, questions, *QUICK, "--out", run)[0] == 0
    adapter = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(other)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    code, _, err = abyssal("generate", str(adapter), "Q:", "--tokens", "2")
    assert code == 2
    assert "num_hidden_layers" in err
    assert len(err.strip().splitlines()) == 1
