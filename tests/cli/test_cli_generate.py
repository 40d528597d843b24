"""``abyssal generate``, in-process: many prompts, schemas, log-probabilities, figures; and what it refuses."""

import json
import re
import sys

import pytest
import torch
from tiny_runs import MODEL

import abyssal
from abyssal.checkpoint import save_model
from abyssal.cli import main
from abyssal.config import ModelConfig
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.generation.engine import Engine
from abyssal.model import Transformer

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model with an MTP module, and one without."""
    root = tmp_path_factory.mktemp("models")
    for name, changes in (("mtp", {}), ("plain", {"mtp": None})):
        data = {key: value for key, value in (MODEL | changes).items() if value is not None}
        model = Transformer(ModelConfig.model_validate(data), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter *= 10  # as drawn, hardly anything but the last token matters
        (root / name).mkdir()
        save_model(model, root / name)
        byte_tokenizer().save(root / name)
    return root


@pytest.fixture
def cli(folders, monkeypatch, tmp_path, capsys):
    """Runs ``generate`` in tmp_path; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model="mtp"):
        monkeypatch.setattr("sys.argv", ["abyssal", "generate", str(folders / model), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        return caught.value.code, out.out, out.err

    return run


@pytest.fixture
def good(cli):
    """Runs what must end well and say nothing on stderr; gives stdout."""

    def run(*arguments, **options):
        code, out, err = cli(*arguments, **options)
        assert (code, err) == (0, "")
        return out

    return run


@pytest.fixture
def refused(cli, tmp_path):
    """Runs what must be refused in one line, with nothing printed and no file touched."""

    def run(*arguments, **options):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = cli(*arguments, **options)
        assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
        assert err.startswith("abyssal: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


GREEDY = ("--temperature", "0", "--tokens", "12")


def test_prompts_of_a_file_and_of_the_line(good, folders, tmp_path):
    (tmp_path / "p.txt").write_text("the fox\r\n\n  dawn \nné", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\\ntwo", "id": 3}\n\n{"prompt": ""}\n')
    model, tokenizer = abyssal.load(folders / "mtp")
    for file, prompts in (("p.txt", ["the fox", "  dawn ", "né"]), ("p.jsonl", ["one\ntwo", ""])):
        said = good("first", "--prompts", file, *GREEDY)
        texts = abyssal.generate(model, tokenizer, ["first", *prompts], temperature=0, max_new_tokens=12)
        blocks = [f"--- {i}\n{p}{t}\n" for i, (p, t) in enumerate(zip(["first", *prompts], texts, strict=True), 1)]
        assert said == "\n".join(blocks)


def test_more_prompts_than_are_worked_on_at_a_time(good, folders, tmp_path):
    prompts = [f"{i} the brown fox" for i in range(70)]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    data = json.loads(good("--prompts", "p.txt", "--temperature", "0", "--tokens", "2", "--json"))
    model, tokenizer = abyssal.load(folders / "mtp")
    texts = [abyssal.generate(model, tokenizer, p, temperature=0, max_new_tokens=2) for p in prompts]
    assert [result["prompt"] for result in data["results"]] == prompts
    assert [result["text"] for result in data["results"]] == texts


def test_json(good, folders):
    model, tokenizer = abyssal.load(folders / "mtp")
    data = json.loads(good("the ", "né", *GREEDY, "--json", "--logprobs", "2"))
    for prompt, result in zip(["the ", "né"], data["results"], strict=True):
        assert result["prompt"] == prompt
        assert result["text"] == abyssal.generate(model, tokenizer, prompt, temperature=0, max_new_tokens=12)
        assert result["finished"] in ("length", "stop")
        assert result["new_tokens"] == len(result["logprobs"]) <= 12
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        assert result["prompt_tokens"] == len(ids)
        with torch.no_grad():
            whole = torch.tensor([ids + [one["token"] for one in result["logprobs"]]])
            right = model(whole)[0, len(ids) - 1 : -1].log_softmax(-1)
        for row, one in zip(right, result["logprobs"], strict=True):
            assert one["logprob"] == pytest.approx(float(row[one["token"]]), abs=1e-4)
            assert one["likeliest"][0]["token"] == one["token"]
            assert [t["logprob"] for t in one["likeliest"]] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    stats = data["stats"]
    assert stats["prompt_tokens"] == sum(result["prompt_tokens"] for result in data["results"])
    assert stats["new_tokens"] == sum(result["new_tokens"] for result in data["results"])
    assert stats["seconds_to_first_token"] > 0
    assert stats["bytes_a_token"] == 4 * 24 * 3  # 16 latent and 8 rotary values in FP32, two layers and the module


def test_logprobs_as_text(good):
    plain = good("the ", *GREEDY)
    out = good("the ", *GREEDY, "--logprobs", "2")
    assert out.startswith(plain)
    rows = out[len(plain) :].splitlines()
    assert rows[0].split() == ["token", "logprob", "the", "likeliest"]
    assert len(rows) == 1 + 12
    assert re.fullmatch(r"'.+' +-\d+\.\d{3}  '.+' -\d+\.\d\d  '.+' -\d+\.\d\d *", rows[1])
    assert "likeliest" not in good("the ", *GREEDY, "--logprobs", "0")


def test_stats(cli):
    code, out, err = cli("the ", *GREEDY, "--stats", "--drafts", "2")
    lines = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in err.splitlines()}
    assert (code, out) == (0, cli("the ", *GREEDY)[1])
    assert list(lines)[:6] == ["prompt tokens", "new tokens", "prefix hits", "preemptions", "cache", "drafts"]
    assert lines["prompt tokens"] == "5"
    assert lines["new tokens"] == "12"
    assert lines["cache"].startswith("288 bytes a token")
    assert re.fullmatch(r"depth 1: \d+ of \d+ right \(\d+%\); depth 2: \d+ of \d+ right \(\d+%\)", lines["drafts"])
    assert re.fullmatch(r"after \d+\.\d{3} s", lines["first token"])
    assert "given up" not in lines
    plain = cli("the ", *GREEDY, "--stats", "--drafts", "0")[2]
    assert "none" in next(line for line in plain.splitlines() if line.startswith("drafts"))
    assert "288 bytes" not in plain  # the module caches nothing then


def test_stats_of_shared_beginnings_and_of_guesses_given_up(cli, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("\n".join("x" * 80 + str(i) for i in range(30)))  # more than one step reads
    monkeypatch.setattr("abyssal.generation.engine.cost_of_a_draft", lambda model: 1.1)
    code, _, err = cli("--prompts", "p.txt", "--temperature", "0", "--stats", "--tokens", "40")
    assert code == 0
    hits = next(line for line in err.splitlines() if line.startswith("prefix hits"))
    assert int(hits.split()[2].replace(",", "")) in range(64, 30 * 64, 64)
    assert re.search(r"^given up +drafts of \d+ texts: they did not pay$", err, re.M)


def test_a_schema(good, tmp_path):
    pytest.importorskip("llguidance")
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    arguments = ("--schema", "s.json", "--seed", "3", "--tokens", "100")
    for result in json.loads(good("a", "b", *arguments, "--json"))["results"]:
        said = json.loads(result["text"])
        assert said.keys() == {"colour", "n"}
        assert said["colour"] in ("red", "green")
        assert 0 <= said["n"] <= 99
        assert result["finished"] == "stop"
    assert json.loads(good("a", *arguments).removeprefix("a")).keys() == {"colour", "n"}


def test_one_of_several_fails(cli, monkeypatch):
    """The others are shown; the error is last, and names it."""
    add = Engine.add

    def adding(engine, tokens, *arguments, **options):
        sequence = add(engine, tokens, *arguments, **options)
        if len(tokens) == 3:

            def broken(token):
                raise abyssal.errors.UserError("broken text")

            sequence.text.push = broken
        return sequence

    monkeypatch.setattr(Engine, "add", adding)
    right = cli("a", "c", *GREEDY)[1]
    code, out, err = cli("a", "bb", "c", *GREEDY)
    assert (code, err) == (2, "abyssal: error: prompts[1]: broken text\n")
    assert right.split("--- 2\n")[0].strip() in out
    assert right.split("--- 2\n")[1].strip() in out
    code, out, err = cli("bb", *GREEDY, "--json")
    assert (code, err) == (2, "abyssal: error: broken text\n")
    result = json.loads(out)["results"][0]
    assert (result["finished"], result["error"], result["text"]) == ("error", "broken text", "")


class TestRefused:
    def test_prompts(self, refused, tmp_path):
        assert "prompt: 201 tokens leave no room in the model's context of 128" in refused("x" * 200)
        assert "prompts[1]: 201 tokens leave no room" in refused("a", "x" * 200)
        assert "--prompts: nowhere: No such file" in refused("--prompts", "nowhere")
        assert "--prompts: .: " in refused("--prompts", ".")
        for name, data, right in (
            ("empty", b"\n \n", "no prompt in it"),
            ("latin", b"caf\xe9\n", "not UTF-8 at byte 3"),
            ("a.jsonl", b'{"prompt": "a"}\n{', "line 2: not JSON"),
            ("b.jsonl", b'"a"\n', 'line 1: expected {"prompt"'),
            ("c.jsonl", b'{"text": "a"}\n', 'line 1: expected {"prompt"'),
        ):
            (tmp_path / name).write_bytes(data)
            assert f"--prompts: {name}" in (said := refused("--prompts", name))
            assert right in said

    @pytest.mark.parametrize(
        ("arguments", "right"),
        [
            (("--temperature", "nan"), "temperature: nan is not valid"),
            (("--temperature", "-1"), "temperature: -1.0 is not valid"),
            (("--logprobs", "-1"), "logprobs: -1 is not valid"),
            (("--logprobs", "101"), "logprobs: 101 is not valid; expected None or a whole number up to 100"),
            (("--logprobs", "many"), "--logprobs"),
            (("--drafts", "-1"), "drafts: -1 is not valid; expected a number from 0"),
            (("--tokens", "0"), "max_new_tokens: 0 is not valid"),
            (("--tokens", "127"), "127 do not fit behind a prompt of 2 tokens in the model's context of 128"),
            (("--tokens", "9" * 30), "expected at most 126"),
            (("--stop", ""), "stop: ('',) is not valid"),
            (("--schema", "nowhere"), "--schema: nowhere: No such file"),
        ],
    )
    def test_settings(self, refused, arguments, right):
        assert right in refused("a", *arguments)

    def test_what_fits_exactly(self, good):
        assert json.loads(good("a", "--tokens", "126", "--temperature", "0", "--json"))["results"][0]["new_tokens"] > 0

    def test_drafts_of_a_model_without_modules(self, refused, good):
        assert "drafts: 1 is not valid; expected 0: this model has no MTP module" in refused(
            "a", "--drafts", "1", model="plain"
        )
        good("a", "--drafts", "0", *GREEDY, model="plain")

    @pytest.mark.parametrize(
        ("schema", "right"),
        [
            ("{", "--schema: s.json: not JSON"),
            ("[" * 100_000, "--schema: s.json: not JSON"),
            ("[]", "schema: [] is no JSON schema; expected an object"),
            ('{"type": "nonsense"}', "schema: "),
            ('{"type": "string", "pattern": "(("}', "schema: "),
            ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ],
    )
    def test_schemas(self, refused, tmp_path, schema, right):
        pytest.importorskip("llguidance")
        (tmp_path / "s.json").write_text(schema)
        assert right in refused("a", "--schema", "s.json")

    def test_a_schema_without_the_library(self, refused, tmp_path, monkeypatch):
        (tmp_path / "s.json").write_text("{}")
        monkeypatch.setitem(sys.modules, "llguidance", None)
        assert "needs llguidance: pip install 'abyssal[serve]'" in refused("a", "--schema", "s.json")
