"""``abyssal preview``, in-process: what is learned is marked, with a terminal and without; and what it refuses."""

import json

import pytest
from rich.console import Console
from tokenizers import AddedToken

from abyssal.cli import main, show
from abyssal.data.tokenizer import BOS, EOS, Tokenizer, byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS = [{"question": f"{n}[bold]+1?\x1b[31m", "answer": f"{n + 1} [/red] é"} for n in range(4)]


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """Runs ``preview`` in tmp_path with a tokenizer in model/ and records in data.jsonl."""
    monkeypatch.chdir(tmp_path)
    backend = byte_tokenizer().backend
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    Tokenizer(backend, BOS, EOS, template=CHATML).save(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["abyssal", "preview", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        return caught.value.code, out.out, out.err

    return run


def test_without_a_terminal_what_is_learned_stands_in_marks(cli):
    code, out, err = cli("model", "data.jsonl", "--example", 2)
    assert (code, err) == (0, "")
    tokens = 3 + len("user\n1[bold]+1?\x1b[31m\nassistant\n") + len("2 [/red] é\n".encode()) + 1
    assert out == (
        f"example 2 of 4: {tokens} tokens, {len('2 [/red] é'.encode()) + 1} learned\n\n"
        "<|im_start|>user\n1[bold]+1?\\x1b[31m<|im_end|>\n<|im_start|>assistant\n«2 [/red] é<|im_end|>»\n\n\n"
        f"4 records: 4 examples (1 held out), {4 * tokens} tokens, {4 * (len('2 [/red] é'.encode()) + 1)} learned\n"
    )


def test_with_a_terminal_it_has_a_colour(cli, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Console(highlight=False, soft_wrap=True, force_terminal=True, color_system="256", legacy_windows=False)
    monkeypatch.setattr(show, "console", terminal)
    code, out, _ = cli("model", "data.jsonl")
    assert code == 0
    assert "«" not in out
    grey, green = "\x1b[38;5;244m", "\x1b[32m"
    assert f"{grey}user\x1b[0m\n" in out
    assert f"{green}1 [/red] é" in out
    assert "\x1b[1;32m<|im_end|>\x1b[0m" in out
    assert "\\x1b[31m" in out


def test_the_last_examples_are_held_out(cli):
    code, out, _ = cli("model", "data.jsonl", "--example", 4)
    assert code == 0
    assert out.startswith("example 4 of 4, held out: ")
    assert "3[bold]" in out


def test_settings_are_those_of_tune(cli, tmp_path):
    code, out, _ = cli("model", "data.jsonl", "data.learn=all", "data.system=Hi", "data.validation_fraction=0")
    assert code == 0
    assert "<|im_start|>«system\nHi<|im_end|>\n" in out
    code, out, _ = cli("model", "data.jsonl", "training.sequence_length=45", "data.too_long=truncate")
    assert "4 cut at the end, longer than 46 tokens" in out
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 20}', encoding="utf-8")
    code, _, err = cli("model", "data.jsonl")
    assert (code, "4 dropped, longer than 21 tokens" in err) == (2, True)


def test_a_pair_is_shown_on_both_sides(cli, tmp_path):
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row), encoding="utf-8")
    code, out, _ = cli("model", "pairs.jsonl")
    assert code == 0
    for side, answer in (("chosen", "4"), ("rejected", "5")):
        assert f"example 1 of 1, {side}: " in out
        assert f"«{answer}<|im_end|>»" in out


def test_tokens_in_a_table(cli):
    code, out, _ = cli("model", "data.jsonl", "--tokens")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["place", "id", "learned", "token"] in lines
    assert ["0", "258", "'<|im_start|>'"] in lines
    assert ["1", str(2 + ord("u")), "'u'"] in lines
    assert sum(line[-1:] == ["'<|im_end|>'"] and line[2] == "yes" for line in lines) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model", "data.jsonl", "--example", "5"), "--example: 5 is not one of the 4 examples"),
        (("model", "data.jsonl", "--example", "0"), "--example: 0 is not one of"),
        (("model", "none.jsonl"), "none.jsonl: no such file or folder"),
        (("none", "data.jsonl"), "none: no such run or folder"),
        ((".", "data.jsonl"), "no tokenizer.json or tiktoken.model in this folder"),
        (("model", "data.jsonl", "data.lern=all"), "data: lern: no such key (did you mean 'learn'?)"),
        (("model", "data.jsonl", "data=3"), "data: 3; expected data.key=value"),
        (("model", "data.jsonl", "lora.rank=3"), "lora: plays no part in a preview"),
        (("model", "data.jsonl", "training.steps=3"), "training.steps: plays no part in a preview"),
        (("model", "data.jsonl", "training.sequence_length=0"), "training.sequence_length: 0; expected a number"),
        (("model", "data.jsonl", "data.format=chat"), "data.jsonl, line 1: it has question, answer and not the fields"),
    ],
)
def test_what_is_wrong_is_one_line(cli, arguments, words):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("abyssal: error: ")
    assert err.count("\n") == 1
    assert words in err
